//! What came of a run, and whether it is what the invariants allow.

use std::collections::BTreeMap;

use kvferry_core::protocol::{Event, Outcome, Role};
use kvferry_core::{GroupGeometry, GroupId, HandoverId, Rank, RequestId};
use kvferry_synthetic::EngineReport;

use crate::chronicle::{Entry, What};
use crate::cluster::ByHandover;
use crate::trace::Record;

/// One rank at the end.
#[derive(Clone, Debug)]
pub struct RankReport {
    /// Its side.
    pub role: Role,
    /// Its group.
    pub group: GroupId,
    /// Its rank.
    pub rank: Rank,
    /// Whether it crashed or stood still at some time.
    pub was_hurt: bool,
    /// What its engine found; `None` when it is down.
    pub engine: Option<EngineReport>,
}

/// A whole run.
#[derive(Clone, Debug)]
pub struct ClusterReport {
    /// Requests submitted.
    pub requests: u64,
    /// Of these, delivered.
    pub delivered: u64,
    /// Failed.
    pub failed: u64,
    /// Cancelled.
    pub cancelled: u64,
    /// Requests that have no answer, or more than one.
    pub unanswered: Vec<RequestId>,
    /// Handovers that were not delivered, as far as anybody said: their requests were tried again, or failed.
    pub undelivered: u64,
    /// Outcomes that were decided twice.
    pub decided_twice: Vec<HandoverId>,
    /// How requests failed.
    pub reasons: BTreeMap<RequestId, String>,
    /// Bytes that whole decode groups were brought.
    pub bytes: u64,
    /// Bytes that these groups have verified.
    pub verified_bytes: u64,
    /// All ranks.
    pub ranks: Vec<RankReport>,
    /// Transfers still under way.
    pub in_flight: usize,
    /// Nodes that did not start, with the reason.
    pub start_failures: Vec<String>,
    /// Panics.
    pub panics: u64,
    /// Nodes woke each other without end.
    pub stuck: bool,
    /// Of everything that happened.
    pub trace_hash: u64,
    /// The last things that happened.
    pub recent: Vec<Record>,
    /// Events of kernel and fabric.
    pub events: u64,
    /// Time that passed.
    pub virtual_seconds: f64,
}

impl ClusterReport {
    /// What the invariants do not allow, in words, each with the invariant's number; empty when all is well. Ask when all is quiet.
    pub fn violations(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut check = |holds: bool, what: String| {
            if !holds {
                found.push(what);
            }
        };
        check(self.panics == 0, format!("{} panics", self.panics));
        check(!self.stuck, "nodes wake each other without end".to_owned());
        check(self.start_failures.is_empty(), format!("nodes did not start: {:?}", self.start_failures));
        check(self.unanswered.is_empty(), format!("I3: without exactly one answer: {:?}", self.unanswered));
        check(self.decided_twice.is_empty(), format!("I3: decided twice: {:?}", self.decided_twice));
        let finished = self.delivered + self.failed + self.cancelled;
        check(finished == self.requests, format!("I3: {finished} of {} requests are finished", self.requests));
        let (bytes, verified) = (self.bytes, self.verified_bytes);
        check(bytes == verified, format!("I2: {verified} bytes were verified where {bytes} were delivered"));
        check(self.in_flight == 0, format!("I4: {} transfers are under way", self.in_flight));
        let any_hurt = self.ranks.iter().any(|rank| rank.was_hurt);
        for rank in &self.ranks {
            let Some(engine) = &rank.engine else { continue };
            let name = format!("{} {} of {}", rank.role, rank.rank, rank.group);
            let wrong = engine.mismatched_bytes;
            check(wrong == 0, format!("I2: {name} has {wrong} wrong bytes: {:?}", engine.first_mismatch));
            check(engine.leaked_blocks == 0, format!("I4: {name} has leaked {} blocks", engine.leaked_blocks));
            // What an engine says may cross a release that a loss has caused, not one of an ordinary end.
            let rejected = if any_hurt { 0 } else { engine.rejected };
            check(rejected == 0, format!("{name}'s engine was rejected: {:?}", engine.last_rejection));
            if rank.was_hurt {
                continue;
            }
            let kept = (engine.held_blocks, engine.quarantined_blocks, engine.held_requests, engine.queued_requests);
            check(
                kept == (0, 0, 0, 0),
                format!("I4: {name} keeps (held, quarantined blocks, held, queued requests) {kept:?}"),
            );
            let (free, all) = (engine.free_blocks, engine.blocks);
            check(free == all, format!("I4: {name} has {free} of {all} blocks free"));
        }
        found
    }
}

/// What was observed so far.
#[derive(Default)]
pub(crate) struct Tally {
    tokens: BTreeMap<RequestId, u64>,
    /// What users were told, and how often.
    answered: BTreeMap<RequestId, (u32, Outcome)>,
    paired: ByHandover<(RequestId, GroupId)>,
    settled: ByHandover<(u32, bool)>,
    no_starts: Vec<String>,
}

impl Tally {
    pub(crate) fn take_in(&mut self, entry: &Entry) {
        match &entry.what {
            What::Submitted { request, tokens, .. } => {
                self.tokens.insert(*request, *tokens);
            }
            What::Observed(Event::Paired { request, handover, group }) => {
                self.paired.insert(*handover, (*request, *group));
            }
            What::Observed(Event::Settled { report }) => {
                let settled = self.settled.entry(report.handover).or_default();
                *settled = (settled.0 + 1, report.outcome.is_delivered());
            }
            What::Answered(request, answer) => {
                let outcome = match answer {
                    Ok(finished) => finished.outcome.clone(),
                    Err(refusal) => Outcome::from(refusal.clone()),
                };
                let times = self.answered.get(request).map_or(0, |(times, _)| *times);
                self.answered.insert(*request, (times + 1, outcome));
            }
            What::NoStart(error) => self.no_starts.push(error.clone()),
            _ => {}
        }
    }

    pub(crate) fn report<'a>(
        &mut self,
        requests: u64,
        ranks: Vec<RankReport>,
        mut unanswered: Vec<RequestId>,
        geometry: impl Fn(GroupId) -> Option<&'a GroupGeometry>,
    ) -> ClusterReport {
        unanswered.extend(self.answered.iter().filter(|(_, (times, _))| *times != 1).map(|(request, _)| *request));
        let count =
            |which: fn(&Outcome) -> bool| self.answered.values().filter(|(_, outcome)| which(outcome)).count() as u64;
        let reason = |outcome: &Outcome| match outcome {
            Outcome::Failed { reason } => Some(reason.to_string()),
            _ => None,
        };
        // A group is whole when nothing ever happened to any of its ranks: then its engines have seen all that was delivered to it.
        let whole = |group: GroupId| {
            ranks.iter().filter(|rank| rank.group == group).all(|rank| !rank.was_hurt && rank.engine.is_some())
        };
        let delivered = self
            .settled
            .iter()
            .filter(|(_, (_, delivered))| *delivered)
            .filter_map(|(handover, _)| self.paired.get(handover));
        let bytes = delivered
            .filter(|(_, group)| whole(*group))
            .filter_map(|(request, group)| Some(geometry(*group)?.bytes_expected(*self.tokens.get(request)?, 0)));
        let verified = ranks.iter().filter(|rank| rank.role == Role::Decode && whole(rank.group));
        ClusterReport {
            requests,
            delivered: count(Outcome::is_delivered),
            failed: count(|outcome| matches!(outcome, Outcome::Failed { .. })),
            cancelled: count(|outcome| matches!(outcome, Outcome::Cancelled)),
            unanswered,
            undelivered: self
                .paired
                .keys()
                .filter(|of| !self.settled.get(of).is_some_and(|(_, delivered)| *delivered))
                .count() as u64,
            decided_twice: self
                .settled
                .iter()
                .filter(|(_, (times, _))| *times != 1)
                .map(|(handover, _)| *handover)
                .collect(),
            reasons: self
                .answered
                .iter()
                .filter_map(|(request, (_, outcome))| Some((*request, reason(outcome)?)))
                .collect(),
            bytes: bytes.sum(),
            verified_bytes: verified.filter_map(|rank| rank.engine.as_ref()).map(|engine| engine.verified_bytes).sum(),
            ranks,
            in_flight: 0,
            start_failures: self.no_starts.clone(),
            panics: 0,
            stuck: false,
            trace_hash: 0,
            recent: Vec::new(),
            events: 0,
            virtual_seconds: 0.0,
        }
    }
}
