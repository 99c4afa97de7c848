//! What became of every request, and when.

use std::collections::{BTreeMap, BTreeSet};

use kvferry_core::protocol::{Outcome, Role};
use kvferry_core::{Direction, HandoverId, RequestId};
use kvferry_fabric_sim::{Fabric, NicId, Timing};

use super::report::{NicUse, PolicyReport, Quantiles};
use super::{CapacityOptions, CapacityRequest};

/// What an engine notes; of several ranks the last counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Its prefill begins.
    Begun,
    /// Every layer is computed.
    Ready,
    /// The decode side has blocks for it.
    Placed,
    /// The decode side's engine knows that it is delivered.
    Settled,
}

/// The history of every request.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    entries: BTreeMap<RequestId, Entry>,
    handovers: BTreeMap<HandoverId, RequestId>,
    /// Seen to send KV, and to take it in.
    nics: [BTreeSet<NicId>; 2],
    finished: usize,
}

#[derive(Debug, Default)]
struct Entry {
    request: CapacityRequest,
    arrived: u64,
    begun: u64,
    ready: u64,
    placed: u64,
    posted: u64,
    landed: u64,
    settled: u64,
    bytes: u64,
    have: u64,
    outcome: Option<Outcome>,
}

impl Ledger {
    pub(super) fn arrive(&mut self, request: RequestId, what: CapacityRequest, at: u64) {
        self.entries.insert(request, Entry { request: what, arrived: at, ..Entry::default() });
    }

    pub(super) fn note(&mut self, request: RequestId, stage: Stage, at: u64) {
        let Some(entry) = self.entries.get_mut(&request) else { return };
        let slot = match stage {
            Stage::Begun => &mut entry.begun,
            Stage::Ready => &mut entry.ready,
            Stage::Placed => &mut entry.placed,
            Stage::Settled => &mut entry.settled,
        };
        *slot = at.max(*slot);
    }

    /// What of a request's prefix the decode side holds already, in tokens.
    pub(super) fn held(&mut self, request: RequestId, handover: HandoverId, have: u64) {
        self.handovers.insert(handover, request);
        if let Some(entry) = self.entries.get_mut(&request) {
            entry.have = have;
        }
    }

    pub(super) fn output_tokens(&self, request: RequestId) -> u64 {
        self.entries.get(&request).map_or(0, |entry| entry.request.output_tokens)
    }

    pub(super) fn finish(&mut self, request: RequestId, outcome: Outcome) {
        if let Some(entry) = self.entries.get_mut(&request) {
            self.finished += usize::from(entry.outcome.replace(outcome).is_none());
        }
    }

    /// Requests that ended.
    pub(super) fn finished(&self) -> usize {
        self.finished
    }

    pub(super) fn take_in(&mut self, timings: Vec<Timing>) {
        for timing in timings {
            let [poster, named] = timing.nics;
            let (source, destination) = match timing.direction {
                Direction::Pull => (named, poster),
                Direction::Push => (poster, named),
            };
            self.nics[0].insert(source);
            self.nics[1].insert(destination);
            let request = self.handovers.get(&timing.id.handover());
            let Some(entry) = request.and_then(|request| self.entries.get_mut(request)) else { continue };
            entry.posted = entry.posted.max(timing.posted_at);
            entry.landed = entry.landed.max(timing.landed_at);
            entry.bytes += timing.bytes;
        }
    }

    pub(super) fn report(&self, policy: &str, options: &CapacityOptions, fabric: &Fabric) -> PolicyReport {
        let delivered: Vec<&Entry> =
            self.entries.values().filter(|entry| entry.outcome.as_ref().is_some_and(Outcome::is_delivered)).collect();
        let times = |of: &dyn Fn(&Entry) -> u64| Quantiles::of(delivered.iter().map(|entry| of(entry)).collect());
        let first = self.entries.values().map(|entry| entry.arrived).min().unwrap_or(0);
        let last = delivered.iter().map(|entry| entry.settled).max().unwrap_or(first);
        let seconds = (last - first) as f64 / 1e9;
        let sum = |of: &dyn Fn(&Entry) -> u64| delivered.iter().map(|entry| of(entry)).sum::<u64>();
        let (bytes, tokens) = (sum(&|entry| entry.bytes), sum(&|entry| entry.request.input_tokens));
        let rate = |amount: f64| if seconds > 0.0 { amount / seconds } else { 0.0 };
        let one_token = (1e9 / options.decode_tokens_per_second) as u64;
        let failures = self.entries.values().filter_map(|entry| match entry.outcome.as_ref() {
            Some(Outcome::Failed { reason }) => Some(reason.to_string()),
            _ => None,
        });
        PolicyReport {
            policy: policy.to_owned(),
            requests: self.entries.len() as u64,
            delivered: delivered.len() as u64,
            first_failure: failures.clone().next(),
            failed: failures.count() as u64,
            unfinished: self.entries.values().filter(|entry| entry.outcome.is_none()).count() as u64,
            seconds,
            requests_per_second: rate(delivered.len() as f64),
            bytes,
            gigabytes_per_second: rate(bytes as f64 / 1e9),
            prefix_hit_rate: if tokens > 0 { sum(&|entry| entry.have) as f64 / tokens as f64 } else { 0.0 },
            prefill_nics: self.nic_use(Role::Prefill, options, fabric, seconds),
            decode_nics: self.nic_use(Role::Decode, options, fabric, seconds),
            queue_ms: times(&|entry| entry.begun.saturating_sub(entry.arrived)),
            prefill_ms: times(&|entry| entry.ready.saturating_sub(entry.begun)),
            room_ms: times(&|entry| entry.placed.saturating_sub(entry.ready)),
            post_ms: times(&|entry| entry.posted.saturating_sub(entry.ready.max(entry.placed))),
            wire_ms: times(&|entry| entry.landed.saturating_sub(entry.posted)),
            notice_ms: times(&|entry| entry.settled.saturating_sub(entry.landed)),
            first_decode_token_ms: times(&|entry| (entry.settled + one_token).saturating_sub(entry.arrived)),
            events: 0,
        }
    }

    fn nic_use(&self, role: Role, options: &CapacityOptions, fabric: &Fabric, seconds: f64) -> NicUse {
        let (used, ranks) = match role {
            Role::Prefill => (&self.nics[0], options.prefill_ranks),
            Role::Decode => (&self.nics[1], options.decode_ranks),
        };
        let busy = used.iter().map(|nic| {
            let stats = fabric.stats(*nic);
            (if role == Role::Prefill { stats.busy_out_ns } else { stats.busy_in_ns }) as f64 / 1e9
        });
        let busy: Vec<f64> = busy.collect();
        let all = f64::from(ranks) * f64::from(options.nics);
        let share = |busy: f64| if seconds > 0.0 { busy / seconds } else { 0.0 };
        NicUse {
            mean_utilisation: share(busy.iter().sum::<f64>() / all.max(1.0)),
            max_utilisation: share(busy.iter().copied().fold(0.0, f64::max)),
        }
    }
}
