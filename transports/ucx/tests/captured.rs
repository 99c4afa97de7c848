//! Logs of UCX, captured with production code of its srd transport above a simulated EFA device, read back exactly.
#![allow(clippy::unwrap_used, reason = "this is test code")]

use kvferry_ucx::log::{LaneLine, Locality, ProtocolTable};

macro_rules! captured {
    ($name:literal) => {
        include_str!(concat!("fixtures/", $name, ".log"))
    };
}

fn lanes(log: &str) -> Vec<LaneLine> {
    log.lines().filter_map(LaneLine::parse).collect()
}

fn uses(line: &LaneLine) -> Vec<String> {
    line.uses.iter().map(|(name, lanes)| format!("{name}({})", lanes.join(" "))).collect()
}

fn put(log: &str) -> ProtocolTable {
    let tables = ProtocolTable::parse_all(log);
    tables.into_iter().find(|table| table.operation.contains("ucp_put*")).unwrap()
}

#[test]
fn the_line_that_operators_look_for() {
    let found = lanes(captured!("ucx_srd_peer1_rndv_inf"));
    assert_eq!(found.len(), 2, "{found:?}");
    let first = found.first().unwrap();
    assert_eq!((first.context.as_deref(), first.locality), (Some("ctxA"), Some(Locality::IntraNode)));
    assert_eq!((first.configuration, first.truncated), (0, false));
    assert_eq!(uses(first), ["rma_am(srd/rdmap0:1)", "am(srd/rdmap0:1 srd/rdmap1:1)", "ka(srd/rdmap0:1)"]);
    // As in documentation, where spaces were folded, and of an endpoint to oneself.
    let line =
        "[1.2] [h:1:0]  ucp_worker.c:1 UCX  INFO  ucp_context_2 self cfg#1 rma_am(srd/rdmap40s0:1) am(srd/rdmap40s0:1)";
    let line = LaneLine::parse(line).unwrap();
    assert_eq!(
        (line.locality, line.configuration, line.lanes()),
        (Some(Locality::Oneself), 1, vec!["srd/rdmap40s0:1"])
    );
}

#[test]
fn it_looks_the_same_when_writes_are_emulated() {
    let emulated = lanes(captured!("ucx_srd_peer1_software_emulation"));
    assert_eq!(uses(emulated.first().unwrap()), ["rma_am(srd/rdmap0:1)", "am(srd/rdmap0:1)", "ka(srd/rdmap0:1)"]);
    for bytes in [1, 4096, 4 << 20] {
        let table = put(captured!("ucx_srd_peer1_software_emulation"));
        let row = table.row_for(bytes).unwrap();
        assert!(row.is_emulated() && !row.is_zero_copy(), "{row:?}");
    }
}

#[test]
fn the_table_says_what_is_zero_copy() {
    let table = put(captured!("ucx_srd_peer1_rndv_inf"));
    assert_eq!(table.configuration, "ctxA intra-node cfg#0");
    assert_eq!(table.operation, "remote memory write by ucp_put* from host memory to host");
    let found: Vec<_> = table.rows.iter().map(|r| (r.from, r.to, r.description.as_str(), r.lanes.as_str())).collect();
    assert_eq!(found, [(0, Some(477), "copy-in", "srd/rdmap0:1"), (478, None, "zero-copy", "srd/rdmap0:1")]);
    assert!(table.row_for(4096).unwrap().is_zero_copy() && !table.row_for(477).unwrap().is_zero_copy());
    let rails = put(captured!("ucx_srd_rails2"));
    assert_eq!(rails.row_for(1 << 20).unwrap().lanes, "50% on srd/rdmap0:1 and 50% on srd/rdmap1:1");
}

#[test]
fn tables_that_count_are_read() {
    let table = put(captured!("ucx_srd_cross_device_inter_node"));
    let counts: Vec<_> = table.rows.iter().map(|row| row.count).collect();
    assert_eq!(counts, [Some(0), Some(1)]);
    let line = lanes(captured!("ucx_srd_cross_device_inter_node")).into_iter().next().unwrap();
    assert_eq!(line.locality, Some(Locality::InterNode), "two devices of one host");
}

#[test]
fn a_line_that_ucx_cut_loses_its_last_half_word_only() {
    let found = lanes(captured!("ucx_srd_32dev_truncated"));
    let line = found.first().unwrap();
    assert!(line.truncated);
    let wanted: Vec<String> = (0..15).map(|device| format!("srd/rdmap{device}:1")).collect();
    assert_eq!(line.lanes(), wanted);
}

#[test]
fn a_fall_back_to_tcp_shows() {
    let found = lanes(captured!("ucx_fallback_tcp_no_uverbs"));
    assert_eq!(found.iter().map(LaneLine::lanes).collect::<Vec<_>>(), [["tcp/lo"], ["tcp/lo"]]);
    assert_eq!(lanes(captured!("ucx_no_such_device")), []);
}

#[test]
fn older_lines_and_other_lines() {
    let old = "[1795765665.718005] [vm:7861 :0]      ucp_worker.c:1763 UCX  INFO    ep_cfg[0]: rma_am(tcp/lo) am(tcp/lo) ka(tcp/lo)";
    let line = LaneLine::parse(old).unwrap();
    assert_eq!((line.context.as_deref(), line.locality, line.configuration), (None, None, 0));
    assert_eq!(uses(&line), ["rma_am(tcp/lo)", "am(tcp/lo)", "ka(tcp/lo)"]);
    let enabled = captured!("ucx_emulation_disabled_error");
    assert_eq!(lanes(enabled).len(), 1, "the error and the version are no lanes");
    for other in
        ["", "UCX  INFO ", "x UCX  INFO  cfg#", "x UCX  INFO  a b c", "x UCX  INFO  a intra-node cfg#1 ", "cfg#1 am(x)"]
    {
        assert_eq!(LaneLine::parse(other), None, "{other:?}");
    }
}

#[test]
fn tables_of_an_endpoint_and_of_devices() {
    let printed = ProtocolTable::parse_all(captured!("ucx_ep_print_info"));
    let operations: Vec<_> = printed.iter().map(|table| (table.operation.as_str(), table.rows.len())).collect();
    let reply = "active message by ucp_am_send* with reply flag from host memory";
    assert_eq!(operations, [(reply, 2), ("active message by ucp_am_send* from host memory", 2)]);
    // A table of devices is none of protocols.
    for table in ProtocolTable::parse_all(captured!("ucx_srd_two_devices_peer0")) {
        assert!(table.configuration.contains("cfg#"), "{table:?}");
    }
}
