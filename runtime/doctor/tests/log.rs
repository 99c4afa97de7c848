//! What logs prove: captured ones of `ucx-text` (UCX 1.23-dev over a simulated EFA device) and of libfabric in tests/logs, the four lines of NVIDIA Dynamo's page "KV Cache
//! Transfer", and hostile ones.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code")]

use kvferry_doctor::{Check, Expectations, Report, Status, read_log};
use proptest::prelude::*;

fn log(text: &str) -> Report {
    read_log(text, &Expectations::default(), 4096)
}

fn check<'a>(report: &'a Report, id: &str) -> &'a Check {
    report.checks.iter().find(|check| check.id == id).unwrap_or_else(|| panic!("no {id} in {report:#?}"))
}

fn wrong(report: &Report) -> Vec<(&'static str, Status)> {
    report.checks.iter().filter(|check| check.status != Status::Ok).map(|check| (check.id, check.status)).collect()
}

macro_rules! captured {
    ($name:literal) => {
        include_str!(concat!("../../../transports/ucx/text/tests/logs/", $name, ".log"))
    };
}

/// "confirm NIXL is using SRD over EFA in the worker logs", with the expected output as it stands there.
#[test]
fn page_the_expected_lines_and_what_they_do_not_prove() {
    let page = "NixlTransferAgent using NIXL backend: UCX\n\
        ucp_context_2 self cfg#1 rma_am(srd/rdmap40s0:1) am(srd/rdmap40s0:1 srd/rdmap62s0:1 ...)\n\
        NixlTransferAgent mAddress: 100.64.3.7:32939\n";
    let report = log(page);
    assert_eq!(check(&report, "log.backend").evidence[1], "line 1: NIXL backend UCX");
    // A `self` endpoint is no peer; the list is not complete; no word about zero-copy.
    assert_eq!(
        wrong(&report),
        [("log.lanes", Status::Warn), ("log.devices", Status::Warn), ("log.protocols", Status::Warn)]
    );
    assert!(check(&report, "log.lanes").evidence[0].contains("`self`"));
    assert!(check(&report, "log.devices").evidence[0].starts_with("2 EFA devices seen: rdmap40s0 rdmap62s0"));
    assert!(check(&report, "log.address").evidence[0].contains("control"));
}

#[test]
fn a_worker_that_finds_no_rdma_device_shows_it_to_itself() {
    for lanes in ["rma_am(tcp/eth0) am(tcp/eth0)", "tag(self/memory cma/memory tcp/eth0)", "am(sysv/memory)"] {
        let text = format!("ucp_context_2 self cfg#1 {lanes}\n");
        let report = log(&text);
        let judged = check(&report, "log.lanes");
        assert!(judged.evidence[0].contains("`self`, and no lane is RDMA's"), "{judged:?}");
        assert!(judged.status == Status::Warn && judged.fix.contains("kvferry doctor"), "{judged:?}");
        let expect = Expectations { efa: Some(4), ..Expectations::default() };
        assert_eq!(check(&read_log(&text, &expect, 4096), "log.lanes").status, Status::Fail);
    }
}

/// Workers write in colours, and whoever writes to a log must not command the terminal that shows it.
#[test]
fn colours_and_commands_to_terminals_are_no_part_of_a_line() {
    let coloured = "\u{1b}[32mINFO\u{1b}[0m \u{1b}[1;38;5;208mNixlTransferAgent\u{1b}[0m using NIXL backend: \u{1b}[33mUCX\u{1b}[m\u{7}\n\
        \u{1b}]0;title\u{7}\u{1b}]8;;http://x\u{1b}\\ucp_\u{1b}[2Jcontext self cfg#1 rma_am(srd/rdmap40s0:1\u{8}) am(srd/\u{1b}[31mrdmap62s0:1\u{1b}[0m)\n";
    let report = log(coloured);
    assert_eq!(check(&report, "log.backend").evidence[1], "line 1: NIXL backend UCX");
    assert!(
        check(&report, "log.devices").evidence[0].starts_with("2 EFA devices seen: rdmap40s0 rdmap62s0"),
        "{report:#?}"
    );
    let said = report.checks.iter().flat_map(|check| &check.evidence);
    assert!(said.flat_map(|text| text.chars()).all(|letter| !letter.is_control()), "{report:#?}");
}

/// "Without it, workers fail with NCCL error 'unhandled system error' during model loading."
#[test]
fn page_nccls_error_without_a_compute_domain() {
    let loading = "[TRT-LLM] [E] NCCL error communicator.cpp:40 'unhandled system error (run with NCCL_DEBUG=INFO for details)'\n";
    let debug = "dyn-0:512:512 [0] mnnvl.cc:60 NCCL WARN MNNVL (cliqueSize 8) is available but not working on some system. Check the IMEX channel \
                 configuration (/dev/nvidia-caps-imex-channels). Set NCCL_MNNVL_ENABLE=0 to ignore this issue.\n";
    for text in [loading, debug] {
        let report = log(text);
        let errors = check(&report, "log.errors");
        assert_eq!(errors.status, Status::Fail, "{report:#?}");
        assert!(errors.fix.contains("ComputeDomain's channel") && errors.fix.contains("fabric.imex"), "{errors:?}");
    }
}

/// What NIXL says of libraries and plugins at level INFO.
#[test]
fn nixls_own_lines_are_known() {
    let report = log("I1 ucx_plugin.cpp:51] NIXL UCX backend bound to UCX 1.23.0 at /opt/nixl/libucp-b39b3ed9.so.0\n\
         W1 nixl_agent.cpp:307] 4 Amazon EFA(s) were detected, but the UCX backend was configured\n\
         I1 nixl_plugin_manager.cpp:354] Failed to load plugin from /p/libplugin_UCX.so: undefined symbol: _Z15nixl_null_agentB5cxx11\n");
    assert!(check(&report, "log.versions").evidence[1].contains("UCX 1.23.0 at /opt/nixl"), "{report:#?}");
    assert!(check(&report, "log.backend").evidence[1].contains("4 Amazon EFA(s) were detected"), "{report:#?}");
    assert!(check(&report, "log.errors").fix.contains("kvferry plugins"), "{report:#?}");
    let columns =
        log("2026-11-28 01:02:03 | ERROR | nixl_agent.cpp:361 | createBackend: unsupported backend 'LIBFABRIC'\n");
    assert!(check(&columns, "log.errors").fix.contains("nixl.plugins"), "{columns:#?}");
}

/// "srd/rdmap* confirms SRD transport over EFA devices": on an endpoint to a peer, together with a zero-copy protocol.
#[test]
fn page_srd_to_a_peer_with_zero_copy() {
    for text in [
        captured!("ucx_srd_peer1_rndv_inf"),
        captured!("ucx_srd_rails2"),
        captured!("ucx_srd_two_devices_peer0"),
        captured!("ucx_srd_cross_device_inter_node"),
    ] {
        let report = log(text);
        assert_eq!(wrong(&report), [], "{report:#?}");
        assert!(check(&report, "log.protocols").evidence[0].contains("zero-copy"));
    }
    let rails = log(captured!("ucx_srd_rails2"));
    assert!(
        check(&rails, "log.protocols")
            .evidence
            .iter()
            .any(|row| row.contains("50% on srd/rdmap0:1 and 50% on srd/rdmap1:1"))
    );
}

#[test]
fn pieces_below_the_zero_copy_range_are_copied() {
    let report = read_log(captured!("ucx_srd_peer1_rndv_inf"), &Expectations::default(), 256);
    assert_eq!(wrong(&report), [("log.protocols", Status::Warn)]);
    assert!(check(&report, "log.protocols").evidence.iter().any(|row| row.contains("copy-in")));
}

#[test]
fn software_emulation_fails() {
    let report = log(captured!("ucx_srd_peer1_software_emulation"));
    assert_eq!(wrong(&report), [("log.protocols", Status::Fail)]);
    assert!(check(&report, "log.protocols").fix.contains("UCX_RNDV_THRESH=inf"));
    let refused = log(captured!("ucx_emulation_disabled_error"));
    assert_eq!(wrong(&refused), [("log.errors", Status::Fail), ("log.protocols", Status::Warn)]);
}

#[test]
fn fallback_to_tcp_is_a_warning_and_a_failure_where_efa_is_expected() {
    let text = captured!("ucx_fallback_tcp_no_uverbs");
    assert_eq!(check(&log(text), "log.lanes").status, Status::Warn);
    let expecting = read_log(text, &"efa=4".parse().unwrap(), 4096);
    let lanes = check(&expecting, "log.lanes");
    assert_eq!(lanes.status, Status::Fail);
    assert!(lanes.evidence.iter().any(|line| line.contains("tcp/lo")), "{lanes:#?}");
}

/// UCX prints a lane list into 256 bytes.
#[test]
fn a_list_that_is_cut_in_a_word_loses_the_word_and_says_so() {
    let report = log(captured!("ucx_srd_32dev_truncated"));
    let devices = check(&report, "log.devices");
    assert_eq!(devices.status, Status::Warn);
    assert!(devices.evidence[0].starts_with("15 EFA devices seen"), "{devices:#?}");
    assert!(!devices.evidence[0].contains("rdma "), "{devices:#?}");
}

/// "Multiple rdmap entries correspond to one EFA device per GPU": they are the lanes of one endpoint, which says nothing of GPUs.
#[test]
fn page_rdmap_entries_are_lanes_not_one_device_per_gpu() {
    let line = "ucp_context_2 inter-node cfg#1 rma_am(srd/rdmap40s0:1) am(srd/rdmap40s0:1 srd/rdmap62s0:1)\n";
    let report = read_log(line, &"efa=8".parse().unwrap(), 4096);
    let devices = check(&report, "log.devices");
    assert_eq!(devices.status, Status::Warn);
    assert!(
        devices.evidence[0].contains("2 EFA devices seen") && devices.evidence[0].contains("not one device per GPU")
    );
    assert!(devices.fix.contains("UCX_MAX_RMA_RAILS"), "{devices:?}");
}

/// What libfabric's efa provider says before it ends the process where memory must not be locked.
#[test]
fn an_error_of_locked_memory_is_told_from_others() {
    let provider = |code| format!("Libfabric EFA provider has encountered an internal error: {code}\n");
    let fix = |code| check(&log(&provider(code)), "log.errors").fix.clone();
    assert!(fix("(-12) Cannot allocate memory (4112)").contains("process.memlock"));
    assert!(fix("(-22) RMA address verification failed (4111)").contains("event queue"));
}

/// Different failures have their own fix each, and a warning is none.
#[test]
fn every_failure_has_its_fix() {
    let unused = "[1] parser.c:2058 UCX  WARN  unused environment variable: UCX_TL (maybe: UCX_TLS?)\n";
    let warned = check(&log(unused), "log.errors").clone();
    assert!(warned.status == Status::Warn && warned.fix.contains("variables.unread"), "{warned:?}");
    let older = "/lib/libfabric.so.1: version `FABRIC_1.10' not found (required by libplugin_LIBFABRIC.so)\n";
    let both = check(&log(&format!("{unused}{older}{older}")), "log.errors").clone();
    assert_eq!((both.status, both.evidence.len()), (Status::Fail, 4));
    assert!(both.fix.contains("/opt/amazon/efa/lib first"), "{both:?}");
    assert_eq!(both.fix.matches("library.libfabric").count(), 1, "{both:?}");
    assert!(both.fix.contains("variables.unread"), "{both:?}");
}

#[test]
fn devices_that_are_not_there_are_named() {
    let report = log(captured!("ucx_no_such_device"));
    let errors = check(&report, "log.errors");
    assert_eq!(errors.status, Status::Fail);
    assert!(errors.evidence[1].contains("mlx5_0:1") && errors.fix.contains("UCX_NET_DEVICES"), "{errors:#?}");
}

/// What `ucp_ep_print_info` wrote says less than a table, and more than a list of lanes.
#[test]
fn an_endpoint_that_prints_its_lanes() {
    let report = log(captured!("ucx_ep_print_info"));
    assert_eq!(wrong(&report), [], "{report:#?}");
    assert!(check(&report, "log.devices").evidence[0].starts_with("2 EFA devices seen: rdmap0 rdmap1"));
    assert!(check(&report, "log.lanes").evidence.iter().any(|line| line.contains("srd/rdmap1:1")));
    assert!(check(&report, "log.protocols").evidence.iter().any(|line| line.contains("rma_bw#0")));
    // The second endpoint has no such lane; the first one's do not count for it.
    let two = "lane[0]:  0:srd/rdmap0:1.0 md[0] -> md[0]/ib/sysdev[255] rma_bw#0 am\n\
        lane[1]:  1:srd/rdmap1:1.0 md[1] -> md[1]/ib/sysdev[255] am_bw#0\n\
        lane[0]:  0:srd/rdmap0:1.0 md[0] -> md[0]/ib/sysdev[255] am keepalive\n";
    let emulated = log(two);
    assert_eq!(wrong(&emulated), [("log.protocols", Status::Fail)]);
    assert!(check(&emulated, "log.protocols").evidence[0].contains("zero-copy: 1;"), "{emulated:#?}");
    let fallen = log("lane[0]:  0:tcp/lo.0 md[0] -> md[0]/tcp/sysdev[255] rma_bw#0 am\n");
    assert_eq!(check(&fallen, "log.lanes").status, Status::Warn);
}

/// Rows of messages are no rows of KV: a rendezvous that is zero-copy does not hide emulated access.
#[test]
fn only_puts_and_gets_count() {
    let rows: Vec<String> =
        check(&log(captured!("ucx_srd_peer1_software_emulation")), "log.protocols").evidence[1..].to_vec();
    assert_eq!(rows.len(), 4, "{rows:#?}");
    assert!(rows.iter().all(|row| row.contains("of 0..inf bytes: software emulation on srd/rdmap0:1")), "{rows:#?}");
}

#[test]
fn captured_libfabric() {
    let report = log(include_str!("logs/libfabric_efa_mock_mode2.log"));
    assert_eq!(wrong(&report), [("log.lanes", Status::Warn)]);
    let lanes = check(&report, "log.lanes");
    assert!(lanes.evidence[0].contains("2 efa endpoints"), "{lanes:#?}");
    assert!(lanes.evidence[1].contains("fi_addr_efa://[fe80::407:64ff:1:100]:1:221360676"), "{lanes:#?}");
    assert!(check(&report, "log.devices").evidence[0].contains("selected 4 EFA devices"));
    // This one opened no endpoint.
    let report = log(include_str!("logs/libfabric_efa_mock_mode5.log"));
    assert!(check(&report, "log.lanes").evidence[0].contains("0 efa endpoints"), "{report:#?}");
    assert!(check(&report, "log.devices").evidence[0].contains("selected 4 EFA devices"));
}

#[test]
fn libfabric_lines() {
    let text = "libfabric:24016:1795330133::efa:fabric:efa_device_list_initialize():376<info> g_efa_selected_device_cnt=4, g_efa_ibv_gid_cnt=4\n\
        libfabric:24016:1795330133::efa:ep_ctrl:efa_rdm_ep_ctrl():1492<info> libfabric 2.7.0a1 efa endpoint created! address: fi_addr_efa://[fe80::1]:1:2\n";
    let report = log(text);
    assert_eq!(wrong(&report), [("log.lanes", Status::Warn)]);
    assert!(check(&report, "log.lanes").evidence[0].contains("1 efa endpoints"));
    let expecting = read_log(text, &"efa=32".parse().unwrap(), 4096);
    assert_eq!(check(&expecting, "log.devices").status, Status::Fail);
}

#[test]
fn a_loopback_address_and_two_libraries_are_warned_of() {
    let report = log("NixlTransferAgent mAddress: 127.0.0.1:5\n");
    assert_eq!(check(&report, "log.address").status, Status::Warn);
    let report = log(
        "UCX  INFO  Version 1.23.0 (loaded from /a/libucp.so.0)\nUCX  INFO  Version 1.17.0 (loaded from /b/libucp.so.0)\n",
    );
    assert_eq!(check(&report, "log.versions").status, Status::Warn);
}

#[test]
fn a_log_of_something_else_proves_nothing() {
    for text in ["", "hello\n", "| 1..2 | zero-copy | x |\n"] {
        assert_eq!(wrong(&log(text)), [("log.lines", Status::Warn)], "{text:?}");
    }
}

#[test]
fn hostile_logs_take_no_memory() {
    let long = format!("x self cfg#1 am({})\n", "srd/rdmap0:1 ".repeat(200_000));
    let report = log(&long);
    assert!(check(&report, "log.lanes").evidence[1].len() < 64 << 10);
    let many = "x inter-node cfg#1 am(srd/rdmap0:1)\nNixlTransferAgent mAddress: 1.2.3.4:5\n".repeat(50_000);
    assert!(check(&log(&many), "log.address").evidence.len() <= 4097);
}

proptest! {
    #[test]
    fn no_log_makes_it_panic(text in "(?s)([|.:#() /\\[\\]a-z0-9é\n]|cfg#|self |inter-node |ep_cfg\\[|remote memory write by|\\.\\.inf){0,120}") {
        let _ = log(&text);
    }

    #[test]
    fn no_cut_of_a_captured_log_makes_it_panic(cut in 0usize..7000) {
        let text = captured!("ucx_srd_peer1_rndv_inf");
        let _ = log(&text[..cut.min(text.len())]);
    }
}
