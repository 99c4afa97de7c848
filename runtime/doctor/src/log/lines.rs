//! The lines that mean something.

use ucx_text::{EndpointLane, LaneLine, ProtocolReader, ProtocolRow};

use crate::plain::plain;

/// Lines of one kind that are kept; a log has few of each, a hostile one must not fill the memory.
const KEPT_MAX: usize = 4096;
/// Bytes of a line that are looked at.
const LINE_MAX: usize = 64 << 10;
/// Characters of a line that are shown.
const SHOWN_MAX: usize = 300;

/// A line that says that something does not work.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) line: usize,
    pub(super) text: String,
    pub(super) fix: &'static str,
    /// It says that something was probably not meant so, and not that it failed.
    pub(super) mild: bool,
}

/// Everything that was found, with numbers of lines from 1.
#[derive(Debug, Default)]
pub(super) struct Lines {
    pub(super) backends: Vec<(usize, String)>,
    pub(super) versions: Vec<(usize, String)>,
    pub(super) addresses: Vec<(usize, String)>,
    pub(super) lanes: Vec<(usize, LaneLine)>,
    /// What `ucp_ep_print_info` wrote of lanes to peers.
    pub(super) endpoint_lanes: Vec<(usize, EndpointLane)>,
    /// Of what moves KV: put and get.
    pub(super) protocols: Vec<(usize, ProtocolRow)>,
    pub(super) errors: Vec<Failure>,
    /// Endpoints that libfabric's efa provider has opened.
    pub(super) endpoints: Vec<(usize, String)>,
    /// How many devices libfabric's efa provider says that it has selected.
    pub(super) efa_selected: Option<u64>,
}

/// What lines of failures contain, and what to do.
const FAILURES: [(&str, &str); 16] = [
    (
        "version `FABRIC_1.",
        "an older libfabric is loaded than the program was built for: put /opt/amazon/efa/lib first in LD_LIBRARY_PATH, see library.libfabric of \
         kvferry doctor on the host",
    ),
    ("RDMAV_HUGEPAGES_SAFE", "set RDMAV_HUGEPAGES_SAFE=1: the process forks and registers memory on huge pages"),
    ("No zero-copy protocol found", "set UCX_RNDV_THRESH=inf, and see gpu.direct of kvferry doctor on the host"),
    (
        "no usable transports/devices",
        "correct UCX_TLS and UCX_NET_DEVICES: see variables.ucx of kvferry doctor on the host",
    ),
    (
        "transport 'srd' is not available",
        "use a UCX that has the EFA component: see library.ucx and efa.nodes of kvferry doctor on the host",
    ),
    ("transport 'efa' is not available", "EFA's transport is called srd: UCX_TLS=srd,…"),
    ("Please set max locked memory", "see process.memlock of kvferry doctor on the host"),
    ("(4112)", "libfabric could not register its own buffers: see process.memlock of kvferry doctor on the host"),
    (
        "Libfabric EFA provider has encountered an internal error",
        "bind an event queue to endpoints, and see efa.peers of kvferry doctor on the host",
    ),
    ("Failed to register CUDA buffer with the EFA device", "see gpu.direct of kvferry doctor on the host"),
    ("createBackend: unsupported backend", "see nixl.plugins of kvferry doctor on the host"),
    (
        "Failed to load plugin from",
        "see nixl.plugins and nixl.abi of kvferry doctor, and kvferry plugins, which says what does not fit",
    ),
    ("Couldn't enable GPUDirect RDMA", "see gpu.direct of kvferry doctor on the host"),
    (
        "MNNVL (cliqueSize",
        "claim the ComputeDomain's channel on prefill and decode: see fabric.imex of kvferry doctor on the host; NCCL_MNNVL_ENABLE=0 does without",
    ),
    (
        "unhandled system error",
        "on GB200 NCCL lacks the ComputeDomain's channel: see fabric.state and fabric.imex of kvferry doctor on the host; elsewhere NCCL_DEBUG=INFO \
         says what failed",
    ),
    ("Plugin API version mismatch", "set NIXL_PLUGIN_DIR to the plugins that belong to the NIXL that is loaded"),
];

/// What lines contain that only warn, and what to do.
const WARNINGS: [(&str, &str); 1] = [(
    "unused environment variable",
    "correct the names of the variables that the line lists: see variables.unread and variables.ucx of kvferry doctor on the host",
)];

impl Lines {
    pub(super) fn read(text: &str) -> Lines {
        let mut lines = Lines::default();
        let mut tables = ProtocolReader::default();
        for (index, line) in text.lines().enumerate() {
            let cut = line.char_indices().map(|(at, _)| at).take_while(|at| *at <= LINE_MAX).last();
            let line = if line.len() > LINE_MAX { line.get(..cut.unwrap_or(0)).unwrap_or_default() } else { line };
            lines.take(&plain(line), index + 1, &mut tables);
        }
        lines
    }

    fn take(&mut self, text: &str, line: usize, tables: &mut ProtocolReader) {
        if let Some(lanes) = LaneLine::parse(text) {
            keep(&mut self.lanes, (line, lanes));
            return;
        }
        if let Some(lane) = EndpointLane::parse(text) {
            keep(&mut self.endpoint_lanes, (line, lane));
            return;
        }
        // Loggers put bars between their columns, too.
        if text.contains('|')
            && let Some(row) = tables.take(text)
        {
            if row.verb().is_some() {
                keep(&mut self.protocols, (line, row));
            }
            return;
        }
        if let Some((_, fix)) = FAILURES.iter().find(|(words, _)| text.contains(words)) {
            keep(&mut self.errors, Failure { line, text: shown(text), fix, mild: false });
        } else if let Some((_, fix)) = WARNINGS.iter().find(|(words, _)| text.contains(words)) {
            keep(&mut self.errors, Failure { line, text: shown(text), fix, mild: true });
        } else if text.contains("network device '") && text.contains("' is not available") {
            let fix = "correct UCX_NET_DEVICES: see variables.ucx and efa.devices of kvferry doctor on the host";
            keep(&mut self.errors, Failure { line, text: shown(text), fix, mild: false });
        } else if let Some(backend) = after(text, "NixlTransferAgent using NIXL backend:") {
            keep(&mut self.backends, (line, format!("NIXL backend {backend}")));
        } else if text.contains("Amazon EFA(s) were detected, but the UCX backend") {
            // NIXL's own opinion; Dynamo's page has the other.
            keep(&mut self.backends, (line, shown(text)));
        } else if let Some(bound) = after(text, "NIXL UCX backend bound to ") {
            keep(&mut self.versions, (line, bound));
        } else if text.contains("Backend LIBFABRIC was instantiated") || text.contains("Backend UCX was instantiated") {
            keep(&mut self.backends, (line, shown(text)));
        } else if let Some(address) = after(text, "NixlTransferAgent mAddress:") {
            keep(&mut self.addresses, (line, address));
        } else if text.contains("UCX") && text.contains("Version ") && text.contains("loaded from") {
            keep(
                &mut self.versions,
                (line, after(text, "Version ").map_or(String::new(), |version| format!("UCX {version}"))),
            );
        } else if let Some(count) = after(text, "g_efa_selected_device_cnt=") {
            let digits: String = count.chars().take_while(char::is_ascii_digit).collect();
            self.efa_selected = digits.parse().ok();
        } else if text.contains("efa endpoint created!") {
            keep(&mut self.endpoints, (line, shown(text)));
        }
    }

    /// Whether libfabric's efa provider speaks in it, and UCX does not.
    pub(super) fn is_libfabric(&self) -> bool {
        (self.efa_selected.is_some() || !self.endpoints.is_empty()) && self.lanes.is_empty() && self.versions.is_empty()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.backends.is_empty()
            && self.versions.is_empty()
            && self.addresses.is_empty()
            && self.lanes.is_empty()
            && self.endpoint_lanes.is_empty()
            && self.protocols.is_empty()
            && self.errors.is_empty()
            && self.endpoints.is_empty()
            && self.efa_selected.is_none()
    }
}

fn keep<T>(kept: &mut Vec<T>, more: T) {
    if kept.len() < KEPT_MAX {
        kept.push(more);
    }
}

/// What follows some words, without blanks.
fn after(text: &str, words: &str) -> Option<String> {
    text.split_once(words).map(|(_, rest)| shown(rest))
}

fn shown(text: &str) -> String {
    text.trim().chars().take(SHOWN_MAX).collect()
}
