//! I3: every handover has exactly one final outcome at the decode leader, and every request exactly one answer, which agree.
//!
//! From the leaders' events, from what engines are told, and from what users are answered.

use std::collections::{BTreeMap, BTreeSet};

use kvferry_core::protocol::{EngineCall, Event, Outcome};
use kvferry_core::{HandoverId, RequestId};

use super::Invariant;
use crate::chronicle::{Entry, What};
use crate::world::World;

#[derive(Default)]
pub(super) struct Outcomes {
    requests: BTreeMap<RequestId, Request>,
    settled: BTreeMap<HandoverId, Outcome>,
    told: BTreeMap<(HandoverId, usize), Outcome>,
    finished: BTreeMap<(RequestId, u64), Outcome>,
}

/// A request's true history.
#[derive(Default)]
struct Request {
    cancelled: bool,
    /// A scheduler that has started again may pair what is paired already.
    handovers: BTreeSet<HandoverId>,
    answer: Option<Outcome>,
}

impl Invariant for Outcomes {
    fn name(&self) -> &'static str {
        "I3"
    }

    fn see(&mut self, _: &World, entry: &Entry, broken: &mut Vec<String>) {
        match &entry.what {
            What::Submitted { request, .. } => {
                self.requests.entry(*request).or_default();
            }
            What::CancelAsked(request) => self.requests.entry(*request).or_default().cancelled = true,
            What::Observed(Event::Paired { request, handover, .. }) => {
                self.requests.entry(*request).or_default().handovers.insert(*handover);
            }
            What::Observed(Event::Settled { report }) => {
                if let Some(before) = self.settled.insert(report.handover, report.outcome.clone()) {
                    broken.push(format!("{} was decided twice: {before:?}, {:?}", report.handover, report.outcome));
                }
            }
            What::Called(EngineCall::Settled { handover, outcome, .. }) => {
                if let Some(before) = self.told.insert((*handover, entry.node), outcome.clone()) {
                    broken.push(format!(
                        "n{}'s engine was told of {handover} twice: {before:?}, {outcome:?}",
                        entry.node
                    ));
                }
                if outcome.is_delivered() && !self.settled.get(handover).is_some_and(Outcome::is_delivered) {
                    let node = entry.node;
                    broken
                        .push(format!("n{node}'s engine was told that {handover} is delivered, which was not decided"));
                }
            }
            What::Observed(Event::Finished(finished)) => {
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
                self.answered(*request, outcome, broken);
            }
            _ => {}
        }
    }
}

impl Outcomes {
    fn answered(&mut self, request: RequestId, outcome: Outcome, broken: &mut Vec<String>) {
        let history = self.requests.entry(request).or_default();
        let delivered = history.handovers.iter().filter(|of| self.settled.get(of).is_some_and(Outcome::is_delivered));
        match (&outcome, delivered.count()) {
            (Outcome::Delivered, 0) => broken.push(format!("{request} was answered with delivered, and it was not")),
            (Outcome::Cancelled, _) if !history.cancelled => {
                broken.push(format!("{request} was answered with cancelled, and nobody had asked for that"));
            }
            _ => {}
        }
        if let Some(before) = history.answer.replace(outcome.clone()) {
            broken.push(format!("{request} was answered twice: {before:?}, {outcome:?}"));
        }
    }
}
