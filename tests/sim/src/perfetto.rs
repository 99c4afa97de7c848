//! A run in Chrome's trace format, which Perfetto opens: a process per node, lanes on which nothing overlaps, faults where they hit.

mod lanes;

use std::collections::BTreeMap;

use kvferry_core::protocol::{EngineCall, EngineEvent, Event, Role};
use kvferry_core::{Direction, HandoverId, RequestId, TransferId};
use serde_json::{Value, json};

use crate::chronicle::{Entry, What};
use crate::config::Config;
use crate::faults::Fault;
use lanes::{Kind, Lanes, Span};

/// Collects what is to be drawn.
///
/// The scheduler's process shows every request from being asked for to its answer; prefill ranks their offers, decode ranks their handovers,
/// and whoever posts them transfers; every node the faults that hit it. What hits no node in particular is a process of its own.
#[derive(Clone, Debug)]
pub struct Timeline {
    /// Of processes, by number: all nodes, and one more for what happens everywhere.
    names: Vec<String>,
    lanes: Lanes,
    /// What is drawn, one JSON object each, separated by commas.
    out: String,
    requests: BTreeMap<HandoverId, RequestId>,
    faults: Vec<Standing>,
    now: u64,
}

/// A fault that is not mended.
#[derive(Clone, Debug)]
struct Standing {
    fault: Fault,
    /// By the process that it hits, its lane there.
    lanes: Vec<(usize, u64)>,
    since: u64,
}

impl Timeline {
    /// An empty one, for a run of that configuration.
    pub fn new(config: &Config) -> Self {
        let mut names = vec!["n0 scheduler".to_owned()];
        let mut first_group = 0;
        for (role, side) in [(Role::Prefill, &config.cluster.prefill), (Role::Decode, &config.cluster.decode)] {
            let side_name = if role == Role::Prefill { "prefill" } else { "decode" };
            for place in 0..side.groups * side.tp {
                let (group, rank) = (first_group + place / side.tp, place % side.tp);
                names.push(format!("n{} {side_name} group {group} rank {rank}", names.len()));
            }
            first_group += side.groups;
        }
        names.push("everywhere".to_owned());
        let (lanes, out) = (Lanes::default(), String::new());
        Timeline { names, lanes, out, requests: BTreeMap::new(), faults: Vec::new(), now: 0 }
    }

    /// Takes an entry in.
    pub fn take_in(&mut self, entry: &Entry) {
        let (node, at) = (entry.node, entry.at);
        self.now = at;
        match &entry.what {
            What::Submitted { request, .. } => self.phase(node, Kind::Request, request.0, "queued", *request),
            What::Answered(request, answer) => {
                let delivered = answer.as_ref().is_ok_and(|finished| finished.outcome.is_delivered());
                self.mark(
                    node,
                    if delivered { "answered: delivered" } else { "answered: not delivered" },
                    Some(*request),
                );
                self.close(node, Kind::Request, request.0);
            }
            What::CancelAsked(request) => self.mark(node, "cancelled by its user", Some(*request)),
            What::Called(EngineCall::Prefill(job)) => {
                let request = job.spec.request;
                self.phase(node, Kind::Offer, request.0, "prefill", request);
            }
            What::Told(EngineEvent::Opened { request, .. }) => {
                self.phase(node, Kind::Offer, request.0, "offer", *request);
            }
            What::Called(EngineCall::Release { request, .. }) => self.close(node, Kind::Offer, request.0),
            What::Called(EngineCall::Place { handover, spec }) => {
                self.requests.insert(*handover, spec.request);
                self.phase(node, Kind::Handover, handover.0, "placement", spec.request);
            }
            What::Told(EngineEvent::Placed { handover, .. }) => self.handover(node, *handover, "fetch"),
            What::Called(EngineCall::Settled { handover, outcome, quarantined, .. }) => {
                match (outcome.is_delivered(), *quarantined) {
                    (true, _) => self.handover(node, *handover, "held"),
                    (false, true) => self.handover(node, *handover, "quarantine"),
                    (false, false) => self.close(node, Kind::Handover, handover.0),
                }
            }
            What::LetGo(handover) => self.close(node, Kind::Handover, handover.0),
            What::Posted { id, direction, .. } => {
                let name = if *direction == Direction::Pull { "read" } else { "write" };
                let request = self.requests.get(&id.handover()).copied().unwrap_or_default();
                self.phase(node, Kind::Transfer, id.0, name, request);
            }
            What::Expected { id, .. } => {
                let request = self.requests.get(&id.handover()).copied().unwrap_or_default();
                self.phase(node, Kind::Transfer, id.0, "expected write", request);
            }
            What::Landed { id, bytes } => self.landed(node, *id, bytes.is_some()),
            What::Observed(event) => self.observed(node, event),
            What::Breach(violation) => {
                let request = self.requests.get(&violation.handover).copied();
                self.mark(node, &format!("BREACH {violation:?}"), request);
            }
            What::Fault(fault, true) => self.hit(fault),
            What::Fault(fault, false) => self.mend(|standing| standing == fault),
            What::Healed => {
                self.mend(|_| true);
                self.mark(self.everywhere(), "all is mended", None);
            }
            What::Started => self.mark(node, "starts", None),
            What::NoStart(why) => self.mark(node, &format!("does not start: {why}"), None),
            What::Ended(why) => self.mark(node, &format!("its incarnation ends: {why}"), None),
            What::Crashed => {
                self.mark(node, "dies", None);
                // Its users are no part of the scheduler, and ask again.
                for span in self.lanes.close_all(node, |kind| kind != Kind::Request) {
                    self.slice(&span, " (died)");
                }
            }
            What::Called(_) | What::Told(_) => {}
        }
    }

    /// The whole document. What has not ended is drawn until now.
    pub fn to_json(mut self) -> String {
        self.mend(|_| true);
        for node in 0..self.names.len() {
            for span in self.lanes.close_all(node, |_| true) {
                self.slice(&span, " (not ended)");
            }
        }
        let named = |pid: usize, tid: u64, what: &str, args: Value| json!({"ph": "M", "pid": pid + 1, "tid": tid, "name": what, "args": args});
        for (pid, name) in std::mem::take(&mut self.names).into_iter().enumerate() {
            self.event(&named(pid, 1, "process_name", json!({"name": name})));
            self.event(&named(pid, 1, "process_sort_index", json!({"sort_index": pid})));
        }
        for (pid, tid, name) in self.lanes.names() {
            self.event(&named(pid, tid, "thread_name", json!({"name": name})));
            self.event(&named(pid, tid, "thread_sort_index", json!({"sort_index": tid})));
        }
        format!("{{\"displayTimeUnit\":\"ns\",\"traceEvents\":[\n{}\n]}}\n", self.out)
    }

    fn observed(&mut self, node: usize, event: &Event) {
        match event {
            Event::Paired { request, handover, .. } => {
                self.requests.insert(*handover, *request);
                if self.lanes.has(node, Kind::Request, request.0.into()) {
                    self.phase(node, Kind::Request, request.0, "paired", *request);
                }
            }
            Event::Settled { report } => {
                let request = self.requests.get(&report.handover).copied();
                let name = if report.outcome.is_delivered() { "decided: delivered" } else { "decided: not delivered" };
                self.mark(node, name, request);
            }
            Event::LeaseExpired { request } => self.mark(node, "lease has run out", Some(*request)),
            Event::NodeLost { node: lost, .. } => self.mark(node, &format!("{lost} is lost"), None),
            _ => {}
        }
    }

    fn landed(&mut self, node: usize, id: TransferId, well: bool) {
        // What is expected ends here too, and was not posted here.
        if let Some(span) = self.lanes.close(node, Kind::Transfer, id.0, self.now) {
            self.slice(&span, if well { "" } else { " (failed)" });
        }
    }

    fn handover(&mut self, node: usize, handover: HandoverId, name: &'static str) {
        if self.lanes.has(node, Kind::Handover, handover.0.into()) {
            let request = self.requests.get(&handover).copied().unwrap_or_default();
            self.phase(node, Kind::Handover, handover.0, name, request);
        }
    }

    /// Something begins, or its next phase does.
    fn phase(&mut self, node: usize, kind: Kind, key: impl Into<u128>, name: &'static str, request: RequestId) {
        if let Some(before) = self.lanes.phase(node, kind, key.into(), name, request, self.now) {
            self.slice(&before, "");
        }
    }

    fn close(&mut self, node: usize, kind: Kind, key: impl Into<u128>) {
        if let Some(span) = self.lanes.close(node, kind, key.into(), self.now) {
            self.slice(&span, "");
        }
    }

    /// A fault begins, on all nodes that it hits.
    fn hit(&mut self, fault: &Fault) {
        let everywhere = vec![self.everywhere()];
        let hits = match fault {
            Fault::Down { node, .. }
            | Fault::Drain { node, .. }
            | Fault::Pause { node }
            | Fault::NicDead { node, .. }
            | Fault::NicSlow { node, .. } => vec![*node],
            Fault::DataCut { from, to } => vec![*from, *to],
            Fault::Partition { from, to, .. } => from.iter().chain(to).copied().collect(),
            Fault::Weather(_) | Fault::CompletionErrors(_) => everywhere,
        };
        let lanes = hits.into_iter().map(|pid| (pid, self.lanes.take(pid, Kind::Fault))).collect();
        self.faults.push(Standing { fault: fault.clone(), lanes, since: self.now });
    }

    /// The last of those faults is mended, or all of them when all is.
    fn mend(&mut self, which: impl Fn(&Fault) -> bool) {
        while let Some(index) = self.faults.iter().rposition(|standing| which(&standing.fault)) {
            let Standing { fault, lanes, since } = self.faults.remove(index);
            for (pid, lane) in lanes {
                self.lanes.put_back(pid, Kind::Fault, lane);
                self.draw(pid, Kind::Fault.row(lane), &fault.to_string(), (since, self.now), None);
            }
        }
    }

    fn slice(&mut self, span: &Span, how: &str) {
        let until = span.until.unwrap_or(self.now);
        let name = format!("{} {}{how}", span.name, span.request);
        self.draw(span.node, span.kind.row(span.lane), &name, (span.since, until), Some(span.request));
    }

    fn draw(&mut self, pid: usize, tid: u64, name: &str, (since, until): (u64, u64), request: Option<RequestId>) {
        let (ts, dur) = (micros(since), micros(until.saturating_sub(since)));
        let args = request.map_or(json!({}), |request| json!({"request": request.0}));
        self.event(&json!({"ph": "X", "pid": pid + 1, "tid": tid, "ts": ts, "dur": dur, "name": name, "args": args}));
    }

    /// Something without a duration, on its process's first row.
    fn mark(&mut self, pid: usize, name: &str, request: Option<RequestId>) {
        self.lanes.use_events(pid);
        let name = request.map_or(name.to_owned(), |request| format!("{name} {request}"));
        let (ts, tid) = (micros(self.now), Kind::Event.row(0));
        self.event(&json!({"ph": "i", "pid": pid + 1, "tid": tid, "ts": ts, "s": "t", "name": name}));
    }

    fn event(&mut self, event: &Value) {
        if !self.out.is_empty() {
            self.out.push_str(",\n");
        }
        self.out.push_str(&event.to_string());
    }

    /// The process of what happens everywhere.
    fn everywhere(&self) -> usize {
        self.names.len().saturating_sub(1)
    }
}

/// The format's unit.
fn micros(nanos: u64) -> f64 {
    nanos as f64 / 1e3
}
