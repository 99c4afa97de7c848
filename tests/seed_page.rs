//! Every statement of NVIDIA Dynamo's page "KV Cache Transfer" (TensorRT-LLM Details) has a test that names it. This says which, and fails when one is gone.

/// What the page says, where that is tested, and by which test.
const STATEMENTS: &[(&str, &str, &str)] = &[
    ("Default Method: NIXL, with UCX as backend", RESOLVE, "page_default_is_nixl_with_ucx"),
    (
        "two NIXL communication backends: UCX and LIBFABRIC; UCX if no backend is specified",
        RESOLVE,
        "page_nixl_has_two_backends",
    ),
    (
        "For AWS EFA deployments, UCX with SRD transport is the recommended backend",
        RESOLVE,
        "page_efa_needs_no_configuration_and_who_recommends_what_is_cited",
    ),
    ("set cache_transceiver_config.backend: UCX", RESOLVE, "page_ucx_is_direct"),
    (
        "TRTLLM_USE_UCX_KVCACHE=1 with backend: DEFAULT does not enable UCX",
        RESOLVE,
        "page_the_variable_does_not_enable_ucx",
    ),
    ("You must explicitly set backend: UCX", CONFIG, "page_the_ignored_variable_golden"),
    (
        "NIXL discovers EFA devices through UCX: no NIXL-level configuration",
        RESOLVE,
        "page_efa_needs_no_configuration_and_who_recommends_what_is_cited",
    ),
    ("A dedicated EFA image (AMD64 only)", MANIFEST, "page_the_efa_image_is_for_amd64_only"),
    ("Host-mount approach (ARM64 / GB200)", MANIFEST, "page_arm64_mounts_the_hosts_sdk"),
    ("EFA resource requests", MANIFEST, "page_efa_is_requested_and_limited_alike"),
    (
        "Required environment variables for EFA workers, on both prefill and decode",
        MANIFEST,
        "page_efa_environment_on_both_sides",
    ),
    ("FI_PROVIDER, FI_EFA_USE_DEVICE_RDMA, LD_LIBRARY_PATH on a host", HOST, "a_healthy_p5_has_nothing_wrong"),
    ("the same with NIXL's LIBFABRIC", CONFIG, "page_efa_environment_with_libfabric_as_json"),
    ("FI_EFA_ENABLE_SHM_TRANSFER must be 0", MANIFEST, "page_shm_transfer_left_on_is_found"),
    ("SHM transfers break NIXL GPU buffer registrations", HOST, "one_thing_wrong_is_found_and_nothing_else"),
    ("AWS EFA currently requires privileged mode", MANIFEST, "page_workers_with_efa_are_privileged"),
    (
        "Override NIXL_PLUGIN_DIR on the decode service only",
        MANIFEST,
        "page_plugin_dir_on_decode_of_several_nodes_only",
    ),
    ("Do not set this on prefill workers", HOST, "page_plugins_on_decode_only"),
    (
        "system plugins that are ABI-incompatible with TRT-LLM's bundled NIXL",
        PLUGINS,
        "wheels_fit_or_do_not_as_loading_them_shows",
    ),
    ("NCCL requires a ComputeDomain CR", MANIFEST, "page_compute_domain"),
    (
        "Without it, workers fail with NCCL error 'unhandled system error'",
        HOST,
        "one_thing_wrong_is_found_and_nothing_else",
    ),
    ("the same in a worker's log", LOG, "page_nccls_error_without_a_compute_domain"),
    ("Both prefill and decode services must include ResourceClaims", MANIFEST, "page_both_sides_claim_the_channel"),
    (
        "Required NCCL environment variables for GB200; NVIDIA_GDRCOPY",
        MANIFEST,
        "page_nccl_variables_and_gdrcopy_by_its_word",
    ),
    ("the same on a host", HOST, "page_gb200_with_a_channel_and_its_variables"),
    (
        "confirm NIXL is using SRD over EFA in the worker logs: NixlTransferAgent, ucp_context, mAddress",
        LOG,
        "page_the_expected_lines_and_what_they_do_not_prove",
    ),
    ("srd/rdmap* confirms SRD transport over EFA devices", LOG, "page_srd_to_a_peer_with_zero_copy"),
    (
        "Multiple rdmap entries correspond to one EFA device per GPU",
        LOG,
        "page_rdmap_entries_are_lanes_not_one_device_per_gpu",
    ),
];

const RESOLVE: &str = include_str!("../engines/trtllm/tests/resolve.rs");
const CONFIG: &str = include_str!("config_command.rs");
const MANIFEST: &str = include_str!("manifest_command.rs");
const PLUGINS: &str = include_str!("plugins_command.rs");
const HOST: &str = concat!(
    include_str!("../runtime/doctor/tests/host/broken.rs"),
    include_str!("../runtime/doctor/tests/host/captured.rs"),
    include_str!("../runtime/doctor/tests/host/expected.rs"),
    include_str!("../runtime/doctor/tests/host/healthy.rs"),
    include_str!("../runtime/doctor/tests/host/page.rs"),
);
const LOG: &str = include_str!("../runtime/doctor/tests/log.rs");

#[test]
fn every_statement_has_its_test_and_every_such_test_a_statement() {
    for (statement, file, name) in STATEMENTS {
        assert!(file.contains(&format!("#[test]\nfn {name}()")), "{statement}: {name} is gone");
    }
    for file in [RESOLVE, CONFIG, MANIFEST, PLUGINS, HOST, LOG] {
        let tests = file.split("#[test]\nfn ").skip(1).filter_map(|test| test.split('(').next());
        for name in tests.filter(|name| name.starts_with("page_")) {
            assert!(
                STATEMENTS.iter().any(|(_, _, known)| *known == name),
                "{name} names a statement that is not listed"
            );
        }
    }
}
