//! What the lines of a worker's log prove, and what they do not.

mod lines;

use std::collections::BTreeSet;

use ucx_text::{EndpointLane, Lane, Locality};

use crate::expectations::Expectations;
use crate::report::{Check, Report};
use crate::verify::RDMA_LANES;
use lines::Lines;

/// Judges a worker's log (UCX with `UCX_LOG_LEVEL=info`, `UCX_PROTO_INFO=used`, or what `ucp_ep_print_info` writes; NIXL's and libfabric's
/// lines). `block_bytes` is the size of a KV piece, for which the protocol must be zero-copy.
pub fn read_log(text: &str, expect: &Expectations, block_bytes: u64) -> Report {
    let lines = Lines::read(text);
    if lines.is_empty() {
        let fix = "run the worker with UCX_LOG_LEVEL=info and UCX_PROTO_INFO=used (or FI_LOG_LEVEL=info) and NIXL_LOG_LEVEL=INFO";
        return Report::of(vec![Check::warn(
            "log.lines",
            "no line of NIXL, UCX or libfabric is in it: it proves nothing",
            fix,
        )]);
    }
    Report::of(vec![
        backend(&lines),
        versions(&lines),
        errors(&lines),
        lanes(&lines, expect),
        devices(&lines, expect),
        protocols(&lines, block_bytes),
        address(&lines),
    ])
}

fn backend(lines: &Lines) -> Check {
    const ID: &str = "log.backend";
    if lines.backends.is_empty() {
        return Check::ok(ID, "no line says which NIXL backend was asked for");
    }
    let said = lines.backends.iter().map(|(line, text)| format!("line {line}: {text}"));
    Check::ok(ID, "NIXL says which backend it was asked for; that is no proof of what carries the bytes").and(said)
}

fn versions(lines: &Lines) -> Check {
    const ID: &str = "log.versions";
    let distinct: BTreeSet<&str> = lines.versions.iter().map(|(_, text)| text.as_str()).collect();
    let said = distinct.iter().map(|text| (*text).to_owned());
    match distinct.len() {
        0 => Check::ok(ID, "no line says which library was loaded"),
        1 => Check::ok(ID, "one library").and(said),
        _ => Check::warn(
            ID,
            "several copies or versions of UCX",
            "leave one: set LD_LIBRARY_PATH so that all processes find the same",
        )
        .and(said),
    }
}

fn errors(lines: &Lines) -> Check {
    const ID: &str = "log.errors";
    if lines.errors.is_empty() {
        return Check::ok(ID, "no line of a known failure");
    }
    let said = lines.errors.iter().map(|error| format!("line {}: {}", error.line, error.text));
    let mut fixes: Vec<&str> = Vec::new();
    for error in &lines.errors {
        if !fixes.contains(&error.fix) {
            fixes.push(error.fix);
        }
    }
    let (evidence, fix) = (format!("lines of known failures: {}", lines.errors.len()), fixes.join("; "));
    match lines.errors.iter().all(|error| error.mild) {
        true => Check::warn(ID, evidence, fix),
        false => Check::fail(ID, evidence, fix),
    }
    .and(said)
}

/// Between hosts, which lanes are there? A `self` endpoint says nothing of peers.
fn lanes(lines: &Lines, expect: &Expectations) -> Check {
    const ID: &str = "log.lanes";
    let endpoint = |(line, lane): &(usize, EndpointLane)| format!("line {line}: an endpoint's lane {}", lane.lane);
    let listed = lines.lanes.iter().map(|(line, lanes)| format!("line {line}: {lanes}"));
    let shown = listed.chain(lines.endpoint_lanes.iter().map(endpoint)).take(16);
    if lines.lanes.is_empty() && lines.is_libfabric() {
        let opened = lines.endpoints.iter().take(16).map(|(line, text)| format!("line {line}: {text}"));
        let evidence = format!(
            "libfabric has opened {} efa endpoints: that shows that devices work, not that peers use them",
            lines.endpoints.len()
        );
        return Check::warn(ID, evidence, "look at the hardware counters of the devices before and after a transfer")
            .and(opened);
    }
    if lines.lanes.is_empty() && lines.endpoint_lanes.is_empty() {
        let fix = "set UCX_LOG_LEVEL=info";
        return Check::warn(ID, "no line lists an endpoint's lanes", fix);
    }
    // Of each peer, its lanes; who prints an endpoint's lanes line by line does that of one that has a peer.
    let mut peers: Vec<Vec<&Lane>> =
        lines.lanes.iter().filter(|(_, l)| l.locality != Locality::Own).map(|(_, l)| l.lanes().collect()).collect();
    for (_, lane) in &lines.endpoint_lanes {
        match peers.last_mut().filter(|_| lane.number > 0) {
            Some(lanes) => lanes.push(&lane.lane),
            None => peers.push(vec![&lane.lane]),
        }
    }
    if peers.is_empty() {
        let fix =
            "look for an `inter-node` line after the first transfer to another host, and at the hardware counters";
        let is_rdma = |lane: &Lane| RDMA_LANES.iter().any(|begin| lane.transport.starts_with(begin));
        let mut own = lines.lanes.iter().flat_map(|(_, lanes)| lanes.lanes());
        if own.any(is_rdma) {
            let evidence = "every endpoint is `self`: that shows that the device works, not that peers use it";
            return Check::warn(ID, evidence, fix).and(shown);
        }
        let evidence = "every endpoint is `self`, and no lane is RDMA's: UCX has found no such device and will fall back without a word";
        return no_rdma(expect, evidence.to_owned()).and(shown);
    }
    let uses = |transport: &str| peers.iter().flatten().any(|lane| lane.transport == transport);
    let only_tcp = |lanes: &&Vec<&Lane>| !lanes.is_empty() && lanes.iter().all(|lane| lane.transport == "tcp");
    let fallen = peers.iter().filter(only_tcp).count();
    if fallen > 0 {
        let evidence = format!("endpoints with TCP lanes only: {fallen}; UCX falls back without a word");
        return no_rdma(expect, evidence).and(shown);
    }
    if uses("srd") {
        let note = "endpoints to peers have SRD lanes over EFA (`rma_am` is always printed so for SRD and proves nothing; `intra-node` and \
                    `inter-node` follow from device addresses, not from hosts)";
        return Check::ok(ID, note).and(shown);
    }
    Check::ok(ID, "endpoints to peers have lanes other than TCP").and(shown)
}

/// UCX does without RDMA: a failure where EFA is expected.
fn no_rdma(expect: &Expectations, evidence: String) -> Check {
    const ID: &str = "log.lanes";
    let fix = "run kvferry doctor on the host (efa.nodes, library.ucx, variables.ucx); UCX_TLS=srd,cuda_copy,cuda_ipc,sm,self makes it an error";
    match expect.efa.is_some_and(|count| count > 0) {
        true => Check::fail(ID, evidence, fix),
        false => Check::warn(ID, evidence, fix),
    }
}

fn devices(lines: &Lines, expect: &Expectations) -> Check {
    const ID: &str = "log.devices";
    let printed = lines.endpoint_lanes.iter().map(|(_, lane)| &lane.lane);
    let srd = lines.lanes.iter().flat_map(|(_, l)| l.lanes()).chain(printed).filter(|lane| lane.transport == "srd");
    let seen: BTreeSet<&str> = srd.map(|lane| lane.device.split(':').next().unwrap_or(&lane.device)).collect();
    let cut = lines.lanes.iter().filter(|(_, lanes)| lanes.cut).count();
    let list: Vec<&str> = seen.iter().copied().collect();
    let evidence = format!(
        "{} EFA devices seen: {}",
        seen.len(),
        if list.is_empty() { "none".to_owned() } else { list.join(" ") }
    );
    if cut > 0 {
        let fix = "read the devices from kvferry doctor, or from `transports` of the endpoint; the list in the log cannot be completed";
        return Check::warn(
            ID,
            format!("{evidence}; lists that are cut short (UCX prints 256 bytes): {cut}; there may be more devices"),
            fix,
        );
    }
    match (lines.efa_selected, expect.efa) {
        (Some(selected), Some(count)) if selected < u64::from(count) => Check::fail(
            ID,
            format!("libfabric selected {selected} EFA devices, {count} expected"),
            "see efa.nodes of kvferry doctor on the host",
        ),
        (Some(selected), _) => Check::ok(ID, format!("libfabric selected {selected} EFA devices; {evidence}")),
        (None, Some(count)) if (seen.len() as u32) < count => Check::warn(
            ID,
            format!(
                "{evidence}, {count} expected; a lane list shows the lanes that one endpoint uses, not one device per GPU"
            ),
            "raise UCX_MAX_RMA_RAILS, or see efa.devices of kvferry doctor on the host",
        ),
        _ => Check::ok(ID, evidence),
    }
}

fn protocols(lines: &Lines, block_bytes: u64) -> Check {
    const ID: &str = "log.protocols";
    let rows: Vec<_> = lines.protocols.iter().filter(|(_, row)| row.covers(block_bytes)).collect();
    let shown = rows.iter().take(16).map(|(line, row)| format!("line {line}: {row}"));
    if rows.is_empty() && lines.is_libfabric() {
        return Check::ok(ID, "no UCX in it; libfabric prints no protocols");
    }
    if rows.is_empty() && !lines.endpoint_lanes.is_empty() {
        return endpoints(lines, ID);
    }
    if rows.is_empty() {
        let fix = "set UCX_PROTO_INFO=used and transfer once";
        return Check::warn(ID, "no protocol table of a put or get: lanes do not show whether bytes are copied", fix);
    }
    if rows.iter().any(|(_, row)| row.is_emulated()) {
        let fix = "set UCX_RNDV_THRESH=inf (with peer-failure handling SRD otherwise has no zero-copy lane); UCX_PROTO_EMULATION_ENABLE=n makes it \
                   an error";
        return Check::fail(ID, format!("pieces of {block_bytes} bytes are emulated in software with messages"), fix)
            .and(shown);
    }
    if rows.iter().all(|(_, row)| row.is_zero_copy()) {
        return Check::ok(
            ID,
            format!("pieces of {block_bytes} bytes move by zero-copy; counters on the wire are still to be seen"),
        )
        .and(shown);
    }
    let fix = "check that the memory is registered (GPU: gpu.direct of kvferry doctor) and that pieces are not smaller than the zero-copy range";
    Check::warn(ID, format!("pieces of {block_bytes} bytes are copied"), fix).and(shown)
}

/// No table says it, but endpoints whose lanes were printed: one with a lane of remote access can move large pieces by zero-copy.
fn endpoints(lines: &Lines, id: &'static str) -> Check {
    let uses =
        |(line, lane): &(usize, EndpointLane)| format!("line {line}: {} used for {}", lane.lane, lane.uses.join(" "));
    let shown = lines.endpoint_lanes.iter().take(16).map(uses);
    let mut capable: Vec<bool> = Vec::new();
    for (_, lane) in &lines.endpoint_lanes {
        match capable.last_mut().filter(|_| lane.number > 0) {
            Some(endpoint) => *endpoint |= lane.is_zero_copy(),
            None => capable.push(lane.is_zero_copy()),
        }
    }
    if capable.iter().all(|capable| *capable) {
        let note = "endpoints have lanes (`rma_bw#`) that can move large pieces by zero-copy; from which size on, only UCX_PROTO_INFO shows";
        return Check::ok(id, note).and(shown);
    }
    let fix = "set UCX_RNDV_THRESH=inf (with peer-failure handling SRD otherwise has no zero-copy lane); UCX_PROTO_EMULATION_ENABLE=n makes it an \
               error";
    let lacking = capable.iter().filter(|capable| !**capable).count();
    Check::fail(
        id,
        format!("endpoints without a lane (`rma_bw#`) for zero-copy: {lacking}; puts and gets are emulated"),
        fix,
    )
    .and(shown)
}

fn address(lines: &Lines) -> Check {
    const ID: &str = "log.address";
    let said = lines.addresses.iter().map(|(line, text)| format!("line {line}: {text}"));
    let local = |(_, text): &&(usize, String)| {
        text.starts_with("127.") || text.starts_with("0.0.0.0") || text.starts_with("[::1]")
    };
    match lines.addresses.iter().find(local) {
        _ if lines.addresses.is_empty() => Check::ok(ID, "no agent says its address"),
        Some(_) => Check::warn(
            ID,
            "an agent gives out an address that other hosts cannot reach",
            "set TRTLLM_NIXL_INTERFACE (TRTLLM_UCX_INTERFACE) to the interface that peers reach",
        )
        .and(said),
        None => Check::ok(ID, "agents say where they listen for control; the KV does not go there").and(said),
    }
}
