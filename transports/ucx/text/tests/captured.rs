//! What UCX 1.23-dev printed with production code of its srd transport above a simulated EFA device, read back exactly: every lane line, every
//! row and every endpoint lane of every log, the truncated and the emulated ones included. What is expected was written from reading the logs.

use ucx_text::{EndpointLane, LaneLine, ProtocolReader};

macro_rules! captured {
    ($name:literal) => {
        include_str!(concat!("logs/", $name, ".log"))
    };
}

/// Everything that is found in a log, in its order.
fn read(log: &str) -> Vec<String> {
    let mut tables = ProtocolReader::default();
    let mut found = Vec::new();
    for line in log.lines() {
        found.extend(LaneLine::parse(line).map(|line| line.to_string()));
        found.extend(tables.take(line).map(|row| {
            let (writer, sure) =
                (row.configuration.split(' ').next().unwrap_or_default(), if row.uncertain { "perhaps " } else { "" });
            format!("{writer}: {sure}{row}")
        }));
        found.extend(EndpointLane::parse(line).map(|lane| {
            let copies = if lane.is_zero_copy() { "zero-copy" } else { "copies" };
            format!("lane {}: {} {} {copies}", lane.number, lane.lane, lane.uses.join(" "))
        }));
    }
    found
}

const EAGER: &str = "active message by ucp_am_send* from host memory";
const REPLY: &str = "active message by ucp_am_send* with reply flag from host memory";

/// The rows of both tables of active messages that each context prints when rendezvous is off.
fn messages(context: &str, lane: &str) -> Vec<String> {
    vec![
        format!("{context}: {EAGER} of 0..4077 bytes: copy-in on {lane}"),
        format!("{context}: {EAGER} of 4078..inf bytes: multi-frag copy-in on {lane}"),
        format!("{context}: {REPLY} of 0..4069 bytes: copy-in on {lane}"),
        format!("{context}: {REPLY} of 4070..inf bytes: multi-frag copy-in on {lane}"),
    ]
}

fn wanted(parts: &[&[String]]) -> Vec<String> {
    parts.concat()
}

fn lines<const N: usize>(lines: [&str; N]) -> Vec<String> {
    lines.map(str::to_owned).to_vec()
}

#[test]
fn zero_copy_with_rendezvous_off() {
    let put = |context: &str| {
        lines(["put of 0..477 bytes: copy-in on srd/rdmap0:1", "put of 478..inf bytes: zero-copy on srd/rdmap0:1"])
            .iter()
            .map(|row| format!("{context}: {row}"))
            .collect::<Vec<_>>()
    };
    let expected = wanted(&[
        &lines(["ctxA intra-node cfg#0 rma_am(srd/rdmap0:1) am(srd/rdmap0:1 srd/rdmap1:1) ka(srd/rdmap0:1)"]),
        &put("ctxA"),
        &messages("ctxA", "srd/rdmap0:1"),
        &lines(["ctxB intra-node cfg#0 rma_am(srd/rdmap0:1) am(srd/rdmap0:1 srd/rdmap1:1) ka(srd/rdmap0:1)"]),
        &put("ctxB"),
        &messages("ctxB", "srd/rdmap0:1"),
        &lines([
            "ctxA: get of 0..624 bytes: copy-out on srd/rdmap0:1",
            "ctxA: get of 625..inf bytes: zero-copy on srd/rdmap0:1",
        ]),
    ]);
    assert_eq!(read(captured!("ucx_srd_peer1_rndv_inf")), expected);
}

#[test]
fn two_rails() {
    let put = |context: &str| {
        vec![
            format!("{context}: put of 0..764 bytes: copy-in on srd/rdmap0:1"),
            format!("{context}: put of 765..inf bytes: zero-copy on 50% on srd/rdmap0:1 and 50% on srd/rdmap1:1"),
        ]
    };
    let expected = wanted(&[
        &lines(["ctxA intra-node cfg#0 rma_am(srd/rdmap0:1) am(srd/rdmap0:1 srd/rdmap1:1) ka(srd/rdmap0:1)"]),
        &put("ctxA"),
        &messages("ctxA", "srd/rdmap0:1"),
        &lines(["ctxB intra-node cfg#0 rma_am(srd/rdmap0:1) am(srd/rdmap0:1 srd/rdmap1:1) ka(srd/rdmap0:1)"]),
        &put("ctxB"),
        &messages("ctxB", "srd/rdmap0:1"),
        &lines([
            "ctxA: get of 0..1160 bytes: copy-out on srd/rdmap0:1",
            "ctxA: get of 1161..inf bytes: zero-copy on 50% on srd/rdmap0:1 and 50% on srd/rdmap1:1",
        ]),
    ]);
    assert_eq!(read(captured!("ucx_srd_rails2")), expected);
}

/// The line of lanes looks as it does where access is zero-copy; only the tables tell.
#[test]
fn software_emulation() {
    let messages = |context: &str| {
        vec![
            format!("{context}: {EAGER} of 0..4077 bytes: copy-in on srd/rdmap0:1"),
            format!("{context}: {EAGER} of 4078..1551830 bytes: multi-frag copy-in on srd/rdmap0:1"),
            format!("{context}: perhaps {EAGER} of 1551831..inf bytes: rendezvous zero-copy on srd/rdmap0:1"),
            format!("{context}: {REPLY} of 0..4069 bytes: copy-in on srd/rdmap0:1"),
            format!("{context}: {REPLY} of 4070..1551830 bytes: multi-frag copy-in on srd/rdmap0:1"),
            format!("{context}: perhaps {REPLY} of 1551831..inf bytes: rendezvous zero-copy on srd/rdmap0:1"),
        ]
    };
    let expected = wanted(&[
        &lines([
            "ctxA intra-node cfg#0 rma_am(srd/rdmap0:1) am(srd/rdmap0:1) ka(srd/rdmap0:1)",
            "ctxA: put of 0..inf bytes: software emulation on srd/rdmap0:1",
        ]),
        &messages("ctxA"),
        &lines([
            "ctxA: put of 0..inf bytes: software emulation on srd/rdmap0:1",
            "ctxB intra-node cfg#0 rma_am(srd/rdmap0:1) am(srd/rdmap0:1) ka(srd/rdmap0:1)",
            "ctxB: put of 0..inf bytes: software emulation on srd/rdmap0:1",
        ]),
        &messages("ctxB"),
        &lines(["ctxA: get of 0..inf bytes: software emulation on srd/rdmap0:1"]),
    ]);
    assert_eq!(read(captured!("ucx_srd_peer1_software_emulation")), expected);
    assert_eq!(
        read(captured!("ucx_emulation_disabled_error")),
        ["ctxA intra-node cfg#0 rma_am(srd/rdmap0:1) am(srd/rdmap0:1) ka(srd/rdmap0:1)"]
    );
}

/// Two devices of one host are `inter-node` to UCX, and the tables count.
#[test]
fn across_devices_with_counts() {
    assert_eq!(
        read(captured!("ucx_srd_cross_device_inter_node")),
        [
            "ctxA inter-node cfg#0 rma_am(srd/rdmap0:1) am(srd/rdmap0:1) ka(srd/rdmap0:1)",
            "ctxB inter-node cfg#0 rma_am(srd/rdmap1:1) am(srd/rdmap1:1) ka(srd/rdmap1:1)",
            "ctxA: get of 0..624 bytes: copy-out on srd/rdmap0:1, used 0 times",
            "ctxA: get of 625..inf bytes: zero-copy on srd/rdmap0:1, used 1 times",
            "ctxA: put of 0..477 bytes: copy-in on srd/rdmap0:1, used 0 times",
            "ctxA: put of 478..inf bytes: zero-copy on srd/rdmap0:1, used 1 times",
        ]
    );
}

/// A table of devices is none of protocols.
#[test]
fn two_devices_with_tables_of_transports() {
    let messages = [
        "ctxA: active message by ucp_am_send* from host memory of 0..4077 bytes: copy-in on srd/rdmap0:1",
        "ctxA: active message by ucp_am_send* from host memory of 4078..16533 bytes: multi-frag copy-in on srd/rdmap0:1",
        "ctxA: perhaps active message by ucp_am_send* from host memory of 16534..inf bytes: rendezvous zero-copy read from remote on 50% on srd/rdmap0:1 and 50% on srd/rdmap1:1",
        "ctxA: active message by ucp_am_send* with reply flag from host memory of 0..4069 bytes: copy-in on srd/rdmap0:1",
        "ctxA: active message by ucp_am_send* with reply flag from host memory of 4070..16533 bytes: multi-frag copy-in on srd/rdmap0:1",
        "ctxA: perhaps active message by ucp_am_send* with reply flag from host memory of 16534..inf bytes: rendezvous zero-copy read from remote on 50% on srd/rdmap0:1 and 50% on srd/rdmap1:1",
    ];
    let expected = wanted(&[
        &lines([
            "ctxA intra-node cfg#0 rma_am(srd/rdmap0:1) am(srd/rdmap0:1 srd/rdmap1:1)",
            "ctxA: put of 0..477 bytes: copy-in on srd/rdmap0:1",
            "ctxA: put of 478..inf bytes: zero-copy on srd/rdmap0:1",
        ]),
        &lines(messages),
        &lines([
            "ctxA: get of 0..624 bytes: copy-out on srd/rdmap0:1",
            "ctxA: get of 625..inf bytes: zero-copy on srd/rdmap0:1",
        ]),
    ]);
    assert_eq!(read(captured!("ucx_srd_two_devices_peer0")), expected);
}

#[test]
fn a_range_of_devices() {
    assert_eq!(
        read(captured!("ucx_range_netdev")),
        ["ctxA intra-node cfg#0 rma_am(srd/rdmap0:1) am(srd/rdmap0:1 srd/rdmap1:1)"]
    );
}

/// UCX prints 255 bytes of a message: the sixteenth device lost its number.
#[test]
fn thirty_two_devices_cut_in_a_word() {
    assert_eq!(
        read(captured!("ucx_srd_32dev_truncated")),
        [
            "ctxA intra-node cfg#0 rma_am(srd/rdmap0:1) am(srd/rdmap0:1 srd/rdmap1:1 srd/rdmap2:1 srd/rdmap3:1 srd/rdmap4:1 \
          srd/rdmap5:1 srd/rdmap6:1 srd/rdmap7:1 srd/rdmap8:1 srd/rdmap9:1 srd/rdmap10:1 srd/rdmap11:1 srd/rdmap12:1 \
          srd/rdmap13:1 srd/rdmap14:1) (cut short)"
        ]
    );
}

#[test]
fn a_fall_back_to_tcp_and_a_device_that_is_not_there() {
    assert_eq!(
        read(captured!("ucx_fallback_tcp_no_uverbs")),
        [
            "ctxA intra-node cfg#0 rma_am(tcp/lo) am(tcp/lo) ka(tcp/lo)",
            "ctxB intra-node cfg#0 rma_am(tcp/lo) am(tcp/lo) ka(tcp/lo)",
        ]
    );
    assert_eq!(read(captured!("ucx_no_such_device")), [""; 0]);
}

#[test]
fn what_an_endpoint_prints() {
    let expected = wanted(&[&lines([
        "lane 0: srd/rdmap0:1 rma_bw#1 am keepalive zero-copy",
        "lane 1: srd/rdmap1:1 rma_bw#0 zero-copy",
        "ctxA: active message by ucp_am_send* with reply flag from host memory of 0..4069 bytes: copy-in on srd/rdmap0:1",
        "ctxA: active message by ucp_am_send* with reply flag from host memory of 4070..inf bytes: multi-frag copy-in on srd/rdmap0:1",
        "ctxA: active message by ucp_am_send* from host memory of 0..4077 bytes: copy-in on srd/rdmap0:1",
        "ctxA: active message by ucp_am_send* from host memory of 4078..inf bytes: multi-frag copy-in on srd/rdmap0:1",
    ])]);
    assert_eq!(read(captured!("ucx_ep_print_info")), expected);
}

/// No log is left out above.
#[test]
fn every_captured_log_is_there() {
    let mut logs: Vec<String> = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/logs"))
        .map(|folder| folder.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    logs.sort();
    let here = include_str!("captured.rs");
    assert_eq!(logs.len(), 11);
    for log in logs {
        let name = log.trim_end_matches(".log");
        assert!(here.contains(&format!("captured!(\"{name}\")")), "{log} is read by no test");
    }
}
