//! I3: every handover has exactly one final outcome at the decode leader, and every request exactly one answer, which agree.
//!
//! From the leaders' events, from what engines are told, and from what users are answered. Who is answered that it is delivered has a handover
//! that was decided so; who is answered otherwise has none, be it decided before or after. That an answer is otherwise all the same is
//! legitimate in one case only: the scheduler that gives it does not talk with the incarnation of the decode leader that decides. Either it has
//! declared that lost, so that nobody can know what it decided last; or it has started again, has listened for as long as its terms say, and was
//! not found by it.

use std::collections::BTreeMap;
use std::time::Duration;

use kvferry_core::protocol::{EngineCall, Event, Outcome};
use kvferry_core::{GroupId, HandoverId, RequestId};

use super::{Groups, Invariant, Scene};
use crate::chronicle::{Entry, What};
use crate::world::World;
use crate::yard::{SCHEDULER, node_of};

pub(super) struct Outcomes {
    groups: Groups,
    requests: BTreeMap<RequestId, Request>,
    /// What was decided, and by which incarnation.
    settled: BTreeMap<HandoverId, (Outcome, u64)>,
    told: BTreeMap<(HandoverId, usize), Outcome>,
    finished: BTreeMap<(RequestId, u64), Outcome>,
    /// Which incarnations of other nodes the present scheduler talks with.
    met: BTreeMap<usize, u64>,
    /// Which live.
    lives: BTreeMap<usize, u64>,
    /// For how long a scheduler that has started again listens, and until when the present one does.
    listens: u64,
    listens_until: u64,
    /// Handovers that nobody had decided when their requests were answered otherwise, and by whom they would be decided.
    denied: BTreeMap<HandoverId, (RequestId, u64)>,
}

/// A request's true history.
#[derive(Default)]
struct Request {
    submitted: bool,
    cancelled: bool,
    /// A scheduler that has started again may pair what is paired already.
    handovers: BTreeMap<HandoverId, GroupId>,
    /// Handovers whose leaders the scheduler talked with when it was done with the request, in which incarnation.
    witnesses: Option<BTreeMap<HandoverId, u64>>,
    answer: Option<Outcome>,
}

impl Invariant for Outcomes {
    fn name(&self) -> &'static str {
        "I3"
    }

    fn see(&mut self, _: &World, entry: &Entry, broken: &mut Vec<String>) {
        match &entry.what {
            What::Submitted { request, .. } => self.requests.entry(*request).or_default().submitted = true,
            What::CancelAsked(request) => self.requests.entry(*request).or_default().cancelled = true,
            What::Observed(Event::Paired { request, handover, group }) => {
                self.requests.entry(*request).or_default().handovers.insert(*handover, *group);
            }
            What::Observed(Event::Met { node, epoch }) if entry.node == SCHEDULER => {
                self.met.insert(node_of(*node), epoch.0);
            }
            What::Observed(Event::NodeLost { node, .. } | Event::Parted { node, .. }) if entry.node == SCHEDULER => {
                self.met.remove(&node_of(*node));
            }
            What::Started => {
                self.lives.insert(entry.node, entry.epoch);
                if entry.node == SCHEDULER && entry.epoch > 1 {
                    self.listens_until = entry.at.saturating_add(self.listens);
                }
            }
            What::Crashed => {
                self.lives.remove(&entry.node);
                if entry.node == SCHEDULER {
                    self.met.clear();
                }
            }
            What::Observed(Event::Settled { report }) => {
                let (handover, outcome) = (report.handover, &report.outcome);
                if let Some((before, _)) = self.settled.insert(handover, (outcome.clone(), entry.epoch)) {
                    broken.push(format!("{handover} was decided twice: {before:?}, {outcome:?}"));
                }
                if let Some((request, epoch)) = self.denied.remove(&handover)
                    && outcome.is_delivered()
                    && epoch == entry.epoch
                {
                    let answer = self.requests.get(&request).and_then(|request| request.answer.as_ref());
                    broken.push(format!("{request} was delivered as {handover} after it was answered with {answer:?}"));
                }
            }
            What::Called(EngineCall::Settled { handover, outcome, .. }) => {
                if let Some(before) = self.told.insert((*handover, entry.node), outcome.clone()) {
                    broken.push(format!(
                        "n{}'s engine was told of {handover} twice: {before:?}, {outcome:?}",
                        entry.node
                    ));
                }
                if outcome.is_delivered() && !self.is_delivered(*handover) {
                    let node = entry.node;
                    broken
                        .push(format!("n{node}'s engine was told that {handover} is delivered, which was not decided"));
                }
            }
            What::Observed(Event::Finished(finished)) => {
                let witnesses = self.witnesses(finished.request, entry.at);
                self.requests.entry(finished.request).or_default().witnesses = Some(witnesses);
                let key = (finished.request, entry.epoch);
                if let Some(before) = self.finished.insert(key, finished.outcome.clone()) {
                    let (request, outcome) = (finished.request, &finished.outcome);
                    broken.push(format!("{request} was finished twice: {before:?}, {outcome:?}"));
                }
            }
            What::Answered(request, answer) => {
                let outcome = match answer {
                    Ok(finished) => finished.outcome.clone(),
                    Err(refusal) => Outcome::from(refusal.clone()),
                };
                self.answered(*request, outcome, entry.at, broken);
            }
            _ => {}
        }
    }

    fn look_around(&mut self, _: &Scene<'_>, broken: &mut Vec<String>) {
        let open = self.requests.iter().filter(|(_, history)| history.submitted && history.answer.is_none());
        broken.extend(open.map(|(request, _)| format!("{request} was never answered")));
    }
}

impl Outcomes {
    /// `listens`: for how long at least, by the world's clock, a scheduler that has started again begins nothing.
    pub(super) fn new(groups: Groups, listens: Duration) -> Self {
        Outcomes {
            groups,
            requests: BTreeMap::new(),
            settled: BTreeMap::new(),
            told: BTreeMap::new(),
            finished: BTreeMap::new(),
            met: BTreeMap::new(),
            lives: BTreeMap::new(),
            listens: u64::try_from(listens.as_nanos()).unwrap_or(u64::MAX),
            listens_until: 0,
            denied: BTreeMap::new(),
        }
    }

    fn is_delivered(&self, handover: HandoverId) -> bool {
        self.settled.get(&handover).is_some_and(|(outcome, _)| outcome.is_delivered())
    }

    /// The handovers of a request of which the scheduler could be told by those who decide them: just now, or as long as it listens.
    fn witnesses(&self, request: RequestId, at: u64) -> BTreeMap<HandoverId, u64> {
        let reach = if at < self.listens_until { &self.lives } else { &self.met };
        let handovers = self.requests.get(&request).into_iter().flat_map(|history| &history.handovers);
        let met = handovers.filter_map(|(handover, group)| {
            let leader = self.groups.nodes(*group).next()?;
            Some((*handover, *reach.get(&leader)?))
        });
        met.collect()
    }

    fn answered(&mut self, request: RequestId, outcome: Outcome, at: u64, broken: &mut Vec<String>) {
        let history = self.requests.entry(request).or_default();
        let (cancelled, witnesses) = (history.cancelled, history.witnesses.take());
        let before = history.answer.replace(outcome.clone());
        if let Some(before) = before {
            broken.push(format!("{request} was answered twice: {before:?}, {outcome:?}"));
        }
        if outcome.is_delivered() {
            let handovers = self.requests.get(&request).into_iter().flat_map(|history| history.handovers.keys());
            if !handovers.copied().any(|handover| self.is_delivered(handover)) {
                broken.push(format!("{request} was answered with delivered, and it was not"));
            }
            return;
        }
        if outcome == Outcome::Cancelled && !cancelled {
            broken.push(format!("{request} was answered with cancelled, and nobody had asked for that"));
        }
        for (handover, met) in witnesses.unwrap_or_else(|| self.witnesses(request, at)) {
            match self.settled.get(&handover) {
                Some((decided, by)) if decided.is_delivered() && *by == met => {
                    broken.push(format!("{request} was answered with {outcome:?}, and was delivered as {handover}"));
                }
                Some(_) => {}
                None => {
                    self.denied.insert(handover, (request, met));
                }
            }
        }
    }
}
