//! What configurations and environments resolve to. Tests that are named `page_…` are lines of NVIDIA Dynamo's page "KV Cache Transfer".
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code")]

use std::time::Duration;

use kvferry_trtllm::{
    Carrier, Contradiction, Environment, Finding, Follow, Method, NixlBackend, Peers, Plan, Resolution, Severity,
    Source, TransceiverConfig, resolve,
};

fn environment(variables: &[(&str, &str)]) -> Environment {
    variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn resolved(section: &str, variables: &[(&str, &str)], follow: Follow) -> Resolution {
    let text = format!("cache_transceiver_config:\n  {section}\n");
    resolve(&TransceiverConfig::parse(&text).unwrap(), "engine.yaml", &environment(variables), follow, Peers::Kvferry)
}

fn plan(section: &str, variables: &[(&str, &str)]) -> Plan {
    resolved(section, variables, Follow::Dynamo).plan.unwrap()
}

fn finding<'a>(resolution: &'a Resolution, code: &str) -> &'a Finding {
    resolution
        .findings
        .iter()
        .find(|finding| finding.code == code)
        .unwrap_or_else(|| panic!("no {code} in {resolution:#?}"))
}

/// "By default, TensorRT-LLM uses NIXL with UCX as backend"
#[test]
fn page_default_is_nixl_with_ucx() {
    let plan = plan("backend: DEFAULT", &[]);
    assert_eq!(plan.method.value, Method::Nixl(NixlBackend::Ucx));
    assert_eq!(plan.method.source.to_string(), "engine.yaml:2");
    assert!(plan.method.reason.contains("DEFAULT means NIXL"), "{}", plan.method.reason);
    assert_eq!(plan.transport.value, Carrier::Ucx);
    assert!(plan.devices.value.is_empty() && plan.devices.source == Source::Default);
}

/// "TensorRT-LLM supports two NIXL communication backends: UCX and LIBFABRIC. By default, UCX is used"
#[test]
fn page_nixl_has_two_backends() {
    assert_eq!(plan("backend: NIXL", &[]).method.value, Method::Nixl(NixlBackend::Ucx));
    let ucx = plan("backend: NIXL", &[("TRTLLM_NIXL_KVCACHE_BACKEND", "UCX")]);
    assert_eq!(ucx.method.value, Method::Nixl(NixlBackend::Ucx));
    let libfabric = plan("backend: DEFAULT", &[("TRTLLM_NIXL_KVCACHE_BACKEND", "LIBFABRIC"), ("FI_PROVIDER", "efa")]);
    assert_eq!(libfabric.method.value, Method::Nixl(NixlBackend::Libfabric));
    assert_eq!(libfabric.method.source, Source::Variable("TRTLLM_NIXL_KVCACHE_BACKEND".to_owned()));
    assert_eq!(
        (libfabric.transport.value, libfabric.library_transports.value),
        (Carrier::Libfabric, vec!["efa".to_owned()])
    );
}

#[test]
fn any_other_nixl_backend_is_silently_ucx_there_and_a_warning_here() {
    for word in ["libfabric", "LibFabric", "", "GDS"] {
        let resolution = resolved("backend: NIXL", &[("TRTLLM_NIXL_KVCACHE_BACKEND", word)], Follow::Trtllm);
        let warning = finding(&resolution, "unknown-nixl-backend");
        assert_eq!(warning.severity, Severity::Warning);
        let meant = if word.eq_ignore_ascii_case("libfabric") { "LIBFABRIC" } else { "UCX" };
        assert_eq!(warning.remedy.as_deref(), Some(format!("set TRTLLM_NIXL_KVCACHE_BACKEND={meant}").as_str()));
        assert_eq!(resolution.plan.unwrap().method.value, Method::Nixl(NixlBackend::Ucx));
    }
}

/// "set cache_transceiver_config.backend: UCX"
#[test]
fn page_ucx_is_direct() {
    let resolution = resolved("backend: UCX", &[("TRTLLM_NIXL_KVCACHE_BACKEND", "LIBFABRIC")], Follow::Dynamo);
    assert!(finding(&resolution, "ignored-variable").message.contains("the method is UCX"));
    let plan = resolution.plan.unwrap();
    assert_eq!((plan.method.value, plan.transport.value), (Method::Ucx, Carrier::Ucx));
}

/// "The environment variable TRTLLM_USE_UCX_KVCACHE=1 with cache_transceiver_config.backend: DEFAULT does not enable UCX. You must explicitly
/// set backend: UCX in the configuration."
#[test]
fn page_the_variable_does_not_enable_ucx() {
    let resolution = resolved("backend: DEFAULT", &[("TRTLLM_USE_UCX_KVCACHE", "1")], Follow::default());
    let warning = finding(&resolution, "ignored-variable");
    assert_eq!(warning.severity, Severity::Warning);
    assert!(warning.message.contains("does not enable UCX"));
    assert!(warning.remedy.as_deref().unwrap().contains("`backend: UCX`"));
    assert_eq!(warning.contradiction, Some(Contradiction::DEFAULT_AND_VARIABLES));
    assert_eq!(resolution.plan.unwrap().method.value, Method::Nixl(NixlBackend::Ucx));
}

#[test]
fn tensorrt_llm_rule_lets_the_first_variable_choose() {
    let follow = |variables: &[(&str, &str)]| resolved("backend: DEFAULT", variables, Follow::Trtllm);
    let ucx = follow(&[("TRTLLM_USE_UCX_KVCACHE", "1"), ("TRTLLM_USE_MPI_KVCACHE", "1")]);
    assert_eq!(finding(&ucx, "default-by-variable").contradiction, Some(Contradiction::DEFAULT_AND_VARIABLES));
    assert!(
        finding(&ucx, "default-by-variable").remedy.as_deref().is_some_and(|remedy| remedy.contains("`backend: UCX`"))
    );
    // What is refused is no remedy.
    let mpi = follow(&[("TRTLLM_USE_MPI_KVCACHE", "1")]);
    assert!(
        finding(&mpi, "default-by-variable").remedy.as_deref().is_some_and(|remedy| remedy.starts_with("unset it"))
    );
    let plan = ucx.plan.unwrap();
    assert_eq!(
        (plan.method.value, plan.method.source.to_string().as_str()),
        (Method::Ucx, "variable TRTLLM_USE_UCX_KVCACHE")
    );
    let nixl = follow(&[("TRTLLM_USE_NIXL_KVCACHE", "1"), ("TRTLLM_USE_UCX_KVCACHE", "1")]);
    assert_eq!(nixl.plan.unwrap().method.value, Method::Nixl(NixlBackend::Ucx));
    // Only "1" counts.
    let word = follow(&[("TRTLLM_USE_UCX_KVCACHE", "true")]);
    assert_eq!(word.plan.unwrap().method.value, Method::Nixl(NixlBackend::Ucx));
    assert_eq!(follow(&[("TRTLLM_USE_MOONCAKE_KVCACHE", "1")]).plan, None);
}

#[test]
fn a_variable_against_the_file_and_a_misspelt_one_are_warned_of() {
    let resolution =
        resolved("backend: NIXL", &[("TRTLLM_USE_UCX_KVCACHE", "1"), ("TRTLLM_USE_UCX_KV_CACHE", "1")], Follow::Trtllm);
    assert!(finding(&resolution, "ignored-variable").message.contains("`backend: NIXL`"));
    assert!(finding(&resolution, "misspelt-variable").remedy.as_deref().unwrap().contains("backend: UCX"));
}

#[test]
fn mpi_and_mooncake_are_refused_with_what_to_use() {
    for (backend, instead) in [("MPI", "`backend: UCX`"), ("MOONCAKE", "`backend: NIXL`")] {
        let resolution = resolved(&format!("backend: {backend}"), &[], Follow::Dynamo);
        let error = finding(&resolution, "refused-backend");
        assert_eq!((error.severity, &resolution.plan), (Severity::Error, &None));
        assert!(error.remedy.as_deref().unwrap().contains(instead));
        assert_eq!(error.source.to_string(), "engine.yaml:2");
    }
}

#[test]
fn without_a_backend_there_is_nothing_to_run() {
    for (text, source) in [
        ("", "default"),
        ("cache_transceiver_config:\n", "engine.yaml:1"),
        ("\ncache_transceiver_config:\n  backend: ~\n", "engine.yaml:3"),
    ] {
        let config = TransceiverConfig::parse(text).unwrap();
        let resolution = resolve(&config, "engine.yaml", &Environment::new(), Follow::Dynamo, Peers::Kvferry);
        let error = finding(&resolution, "disaggregation-off");
        assert_eq!((error.source.to_string().as_str(), &resolution.plan), (source, &None), "{text:?}");
    }
}

/// "UCX with SRD transport is the tested and recommended backend" and "no NIXL-level configuration changes are needed"
#[test]
fn page_efa_needs_no_configuration_and_who_recommends_what_is_cited() {
    let variables = [("FI_PROVIDER", "efa"), ("FI_EFA_USE_DEVICE_RDMA", "1"), ("FI_EFA_ENABLE_SHM_TRANSFER", "0")];
    let resolution = resolved("backend: DEFAULT", &variables, Follow::Dynamo);
    assert_eq!(finding(&resolution, "efa-backend").contradiction, Some(Contradiction::EFA_BACKEND));
    let unused = finding(&resolution, "without-effect");
    assert_eq!(unused.severity, Severity::Note);
    assert!(
        unused.message.starts_with("FI_EFA_ENABLE_SHM_TRANSFER, FI_EFA_USE_DEVICE_RDMA, FI_PROVIDER: without effect")
    );
    assert!(resolution.findings.iter().all(|finding| finding.severity == Severity::Note), "{resolution:#?}");
    assert_eq!(resolution.plan.unwrap().transport.value, Carrier::Ucx);
}

#[test]
fn devices_and_transports_of_the_library_come_from_its_variables() {
    let plan = plan("backend: UCX", &[("UCX_NET_DEVICES", "rdmap40s0:1, rdmap62s0:1"), ("UCX_TLS", "srd,cuda_copy")]);
    assert_eq!(plan.devices.value, ["rdmap40s0:1", "rdmap62s0:1"]);
    assert_eq!(plan.devices.source, Source::Variable("UCX_NET_DEVICES".to_owned()));
    assert_eq!(plan.library_transports.value, ["srd", "cuda_copy"]);
    assert!(plan.transport.reason.contains("two-sided method"), "{}", plan.transport.reason);
    let nixl = self::plan("backend: NIXL", &[]).transport;
    assert_eq!((nixl.value, nixl.reason.contains("two-sided")), (Carrier::Ucx, false));
    let all = self::plan("backend: UCX", &[("UCX_NET_DEVICES", "all")]);
    assert!(all.devices.value.is_empty());
}

#[test]
fn timeouts_become_deadlines() {
    let terms = |section: &str| plan(section, &[]).deadlines.terms();
    assert_eq!(terms("backend: UCX").cap, Duration::from_secs(60));
    let long = terms("{backend: UCX, kv_transfer_timeout_ms: 600000}");
    assert_eq!((long.cap, long.floor), (Duration::from_secs(600), Duration::from_secs(10)));
    let short = terms("{backend: UCX, kv_transfer_timeout_ms: 1500}");
    assert_eq!((short.cap, short.floor), (Duration::from_millis(1500), Duration::from_millis(1500)));
    let absent = resolved("backend: UCX", &[], Follow::Dynamo);
    assert_eq!(finding(&absent, "timeout-default").contradiction, Some(Contradiction::TIMEOUT_DEFAULT));
    let null = resolved("{backend: UCX, kv_transfer_timeout_ms: null}", &[], Follow::Dynamo);
    assert_eq!(finding(&null, "no-timeout").severity, Severity::Warning);
    assert_eq!(null.plan.unwrap().deadlines.cap_ms.value, 60_000);
}

#[test]
fn buffer_counts_become_credits() {
    let counts = [("TRTLLM_KVCACHE_RECV_BUFFER_COUNT", "3"), ("TRTLLM_KVCACHE_SEND_MAX_CONCURRENCY_NUM", "2")];
    let alone = plan("backend: NIXL", &counts).credits;
    assert_eq!((alone.decode_handovers.value, alone.prefill_handovers.value), (None, Some(2)));
    let concurrent = [counts[0], ("TRTLLM_REQUEST_KV_CACHE_CONCURRENT", "1")];
    let both = plan("backend: NIXL", &concurrent).credits;
    assert_eq!(both.decode_handovers.value, Some(3));
    assert_eq!(both.decode_handovers.source, Source::Variable("TRTLLM_KVCACHE_RECV_BUFFER_COUNT".to_owned()));
    let bad = resolved("backend: NIXL", &[("TRTLLM_KVCACHE_SEND_MAX_CONCURRENCY_NUM", "0")], Follow::Dynamo);
    assert_eq!(finding(&bad, "bad-count").severity, Severity::Warning);
    assert_eq!(bad.plan.unwrap().credits.prefill_handovers.value, None);
}

#[test]
fn what_changes_nothing_here_is_said() {
    let section = "{backend: NIXL, transceiver_runtime: auto, max_tokens_in_buffer: 8448, kv_cache_bounce_size_mb: 64, \
                   enable_pipelined_transfer: true, kv_transfer_poll_interval_ms: 5000, agent_bounce_params: {a: 1}, odd: 1}";
    let variables = [
        ("TRTLLM_KVCACHE_TRANSFER_BUFFER_SIZE", "1GB"),
        ("TRTLLM_DISAGG_LAYERWISE", "1"),
        ("TRTLLM_UCX_INTERFACE", "eth0"),
    ];
    let resolution = resolved(section, &variables, Follow::Dynamo);
    let text = messages(&resolution);
    for word in [
        "transceiver_runtime: auto",
        "max_tokens_in_buffer: 8448",
        "bounded by the node's credits",
        "kv_cache_bounce_size_mb: 64",
        "enable_pipelined_transfer",
        "kv_transfer_poll_interval_ms: 5000",
        "agent_bounce_params",
        "TRTLLM_KVCACHE_TRANSFER_BUFFER_SIZE=1GB",
        "TRTLLM_DISAGG_LAYERWISE=1",
        "TRTLLM_UCX_INTERFACE=eth0",
        "`odd: 1`",
    ] {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
    assert!(text.contains("not wire-compatible with NIXL agents"));
}

/// reference: what each field of the schema needs of the others.
#[test]
fn fields_that_tensorrt_llm_does_not_take_together_are_warned_of() {
    for (section, words) in [
        ("{backend: UCX, transceiver_runtime: PYTHON}", Some("PYTHON works with NIXL only")),
        ("{backend: NIXL, transceiver_runtime: PYTHON, kv_transfer_timeout_ms: null}", Some("needs a finite")),
        ("{backend: NIXL, transceiver_runtime: PYTHON}", None),
        ("{backend: UCX, enable_pipelined_transfer: true}", Some("the method is UCX")),
        (
            "{backend: NIXL, transceiver_runtime: CPP, enable_pipelined_transfer: true}",
            Some("transceiver_runtime is CPP"),
        ),
        (
            "{backend: NIXL, kv_transfer_timeout_ms: null, enable_pipelined_transfer: true}",
            Some("the C++ runtime is taken"),
        ),
        (
            "{backend: NIXL, kv_cache_bounce_size_mb: 64, enable_pipelined_transfer: true}",
            Some("kv_cache_bounce_size_mb is not 0"),
        ),
        ("{backend: NIXL, enable_pipelined_transfer: true}", None),
        ("{backend: NIXL, transceiver_runtime: CPP, kv_cache_bounce_size_mb: 64}", Some("is the Python runtime's")),
        ("{backend: UCX, kv_cache_bounce_size_mb: 0}", None),
    ] {
        let resolution = resolved(section, &[], Follow::Dynamo);
        let clashes: Vec<&str> = resolution
            .findings
            .iter()
            .filter(|finding| finding.code == "contradicting-fields")
            .map(|finding| finding.message.as_str())
            .collect();
        assert_eq!(clashes.len(), usize::from(words.is_some()), "{section}: {clashes:?}");
        assert!(clashes.iter().zip(words).all(|(clash, words)| clash.contains(words)), "{section}: {clashes:?}");
        assert!(resolution.plan.is_some(), "{section}");
    }
    let cpp = resolved("{backend: NIXL, transceiver_runtime: CPP}", &[], Follow::Dynamo);
    assert_eq!(finding(&cpp, "nixl-buffer").severity, Severity::Note);
}

/// The seven contradictions between documents and code (one is about two defaults): each is cited where what it is about is met.
#[test]
fn each_contradiction_is_cited_where_it_matters() {
    let cited = |section: &str, variables: &[(&str, &str)]| -> Vec<&'static str> {
        let resolution = resolved(section, variables, Follow::Dynamo);
        resolution.findings.iter().filter_map(|finding| Some(finding.contradiction?.about)).collect()
    };
    let plain = "{backend: NIXL, transceiver_runtime: CPP, kv_transfer_timeout_ms: 1000}";
    assert_eq!(cited(plain, &[]), [""; 0]);
    let mut all: Vec<&str> = Vec::new();
    for (section, name) in [
        ("{backend: DEFAULT, transceiver_runtime: CPP, kv_transfer_timeout_ms: 1}", "TRTLLM_USE_UCX_KVCACHE"),
        (plain, "FI_EFA_USE_DEVICE_RDMA"),
        (plain, "UCX_CUDA_IPC_ENABLE_MNNVL"),
        (plain, "VLLM_NIXL_ABORT_REQUEST_TIMEOUT"),
        (plain, "SGLANG_DISAGGREGATION_WAITING_TIMEOUT"),
        ("{backend: NIXL, transceiver_runtime: CPP}", "A"),
        ("{backend: NIXL, kv_transfer_timeout_ms: 1}", "A"),
    ] {
        let found = cited(section, &[(name, "1")]);
        assert_eq!(found.len(), 1, "{section} {name}: {found:?}");
        all.extend(found);
    }
    let bootstrap = cited(plain, &[("SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT", "300")]);
    all.extend(bootstrap.first());
    let known = Contradiction::ALL.map(|contradiction| contradiction.about);
    assert_eq!(known.iter().filter(|about| all.contains(about)).count(), known.len(), "{all:?}");
}

#[test]
fn nixl_agents_are_spoken_to_by_the_nixl_engine_over_ucx_or_not_at_all() {
    let with = |backend: &str, variables: &[(&str, &str)]| {
        let config = TransceiverConfig::parse(&format!("cache_transceiver_config: {{backend: {backend}}}\n")).unwrap();
        resolve(&config, "engine.yaml", &environment(variables), Follow::Dynamo, Peers::Nixl)
    };
    for backend in ["NIXL", "DEFAULT"] {
        let resolution = with(backend, &[("UCX_NET_DEVICES", "mlx5_0:1"), ("FI_PROVIDER", "verbs")]);
        let plan = resolution.plan.as_ref().unwrap();
        assert_eq!((plan.method.value, plan.transport.value), (Method::Nixl(NixlBackend::Ucx), Carrier::Nixl));
        assert!(plan.transport.reason.contains("the peer is a NIXL agent"), "{}", plan.transport.reason);
        assert_eq!(plan.devices.value, ["mlx5_0:1"]);
        let text = messages(&resolution);
        assert!(text.contains("no programs, leases, fences") && text.contains("never loads libfabric"), "{text}");
        assert!(!text.contains("not wire-compatible"), "{text}");
    }
    let libfabric = with("NIXL", &[("TRTLLM_NIXL_KVCACHE_BACKEND", "LIBFABRIC")]);
    assert_eq!(finding(&libfabric, "nixl-over-libfabric").severity, Severity::Error);
    let ucx = with("UCX", &[]);
    assert_eq!(finding(&ucx, "no-nixl").severity, Severity::Error);
    assert!(libfabric.plan.is_none() && ucx.plan.is_none());
}

fn messages(resolution: &Resolution) -> String {
    resolution.findings.iter().map(|finding| format!("{}\n", finding.message)).collect()
}
