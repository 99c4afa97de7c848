//! A run in Chrome's trace format, which Perfetto opens: a process per node, a row per handover, marks for faults.

use std::collections::BTreeMap;
use std::fmt::Write;

use kvferry_core::protocol::{EngineCall, EngineEvent, Event};
use kvferry_core::{Direction, TransferId};

use crate::chronicle::{Entry, What};

/// Collects what is to be drawn.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    out: String,
    /// What has begun and not ended: by node, row and name.
    open: BTreeMap<(usize, u64, &'static str), u64>,
    transfers: BTreeMap<(usize, TransferId), (u64, Direction)>,
    nodes: BTreeMap<usize, u64>,
}

impl Timeline {
    /// Takes an entry in.
    pub fn take_in(&mut self, entry: &Entry) {
        let (node, at) = (entry.node, entry.at);
        self.nodes.entry(node).or_default();
        match &entry.what {
            What::Called(EngineCall::Prefill(job)) => self.begin(node, job.spec.request.0, "prefill", at),
            What::Told(EngineEvent::Opened { request, .. }) => {
                self.end(node, request.0, "prefill", at);
                self.begin(node, request.0, "offer", at);
            }
            What::Called(EngineCall::Release { request, .. }) => {
                self.end(node, request.0, "prefill", at);
                self.end(node, request.0, "offer", at);
            }
            What::Called(EngineCall::Place { handover, .. }) => self.begin(node, handover.0, "placement", at),
            What::Told(EngineEvent::Placed { handover, .. }) => {
                self.end(node, handover.0, "placement", at);
                self.begin(node, handover.0, "fetch", at);
            }
            What::Called(EngineCall::Settled { handover, outcome, quarantined, .. }) => {
                self.end(node, handover.0, "placement", at);
                self.end(node, handover.0, "fetch", at);
                if outcome.is_delivered() {
                    self.begin(node, handover.0, "held", at);
                } else if *quarantined {
                    self.begin(node, handover.0, "quarantine", at);
                }
            }
            What::LetGo(handover) => {
                self.end(node, handover.0, "held", at);
                self.end(node, handover.0, "quarantine", at);
            }
            What::Posted { id, direction, .. } => {
                self.transfers.insert((node, *id), (at, *direction));
            }
            What::Landed { id, bytes } => {
                if let Some((since, direction)) = self.transfers.remove(&(node, *id)) {
                    let name = match (direction, bytes) {
                        (_, None) => "failed transfer",
                        (Direction::Pull, _) => "read",
                        (Direction::Push, _) => "write",
                    };
                    self.slice(node, id.handover().0, name, since, at);
                }
            }
            What::Observed(Event::Settled { report }) => {
                let name = if report.outcome.is_delivered() { "delivered" } else { "not delivered" };
                self.mark(node, report.handover.0, name, at, "t");
            }
            What::Fault(fault, on) => {
                let name = if *on { fault.to_string() } else { format!("no longer: {fault}") };
                self.mark(0, 0, &name, at, "g");
            }
            What::Healed => self.mark(0, 0, "all is mended", at, "g"),
            What::Started => self.mark(node, 0, "starts", at, "p"),
            What::Crashed => {
                self.mark(node, 0, "dies", at, "p");
                let over: Vec<_> = self.open.keys().filter(|(of, ..)| *of == node).copied().collect();
                for (_, row, name) in over {
                    self.end(node, row, name, at);
                }
                self.transfers.retain(|(of, _), _| *of != node);
            }
            _ => {}
        }
    }

    /// The whole document.
    pub fn to_json(mut self) -> String {
        for node in std::mem::take(&mut self.nodes).into_keys() {
            let name = if node == 0 { "scheduler".to_owned() } else { format!("n{node}") };
            self.event(format_args!(r#""ph":"M","pid":{node},"name":"process_name","args":{{"name":"{name}"}}"#));
        }
        format!("{{\"displayTimeUnit\":\"ns\",\"traceEvents\":[\n{}\n]}}\n", self.out)
    }

    fn begin(&mut self, node: usize, row: u64, name: &'static str, at: u64) {
        self.open.insert((node, row, name), at);
    }

    fn end(&mut self, node: usize, row: u64, name: &'static str, at: u64) {
        if let Some(since) = self.open.remove(&(node, row, name)) {
            self.slice(node, row, name, since, at);
        }
    }

    fn slice(&mut self, node: usize, row: u64, name: &str, since: u64, at: u64) {
        let (from, lasted) = (Micros(since), Micros(at - since));
        // Handovers are told apart by their lower half; the upper one is the scheduler's epoch.
        let row = row & 0xffff_ffff;
        self.event(format_args!(r#""ph":"X","pid":{node},"tid":{row},"ts":{from},"dur":{lasted},"name":"{name}""#));
    }

    fn mark(&mut self, node: usize, row: u64, name: &str, at: u64, scope: &str) {
        let (at, row) = (Micros(at), row & 0xffff_ffff);
        let name = name.replace(['"', '\\'], "'");
        self.event(format_args!(r#""ph":"i","pid":{node},"tid":{row},"ts":{at},"s":"{scope}","name":"{name}""#));
    }

    fn event(&mut self, body: std::fmt::Arguments<'_>) {
        if !self.out.is_empty() {
            self.out.push_str(",\n");
        }
        // Writing to a string does not fail.
        let _ = write!(self.out, "{{{body}}}");
    }
}

/// Nanoseconds, written in the format's microseconds.
struct Micros(u64);

impl std::fmt::Display for Micros {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{:03}", self.0 / 1000, self.0 % 1000)
    }
}
