//! One decode rank's part of one handover, as a record; [`DecodeRank`](super::DecodeRank) acts on it.

use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::flight::Flight;
use super::{Awaited, Deadline, FetchCourse, Outcome, Pairing, PathReport};
use crate::{Direction, Moment, NodeId, Rank, Tables, TransferId};

/// This rank's part of one handover. It ends with the leader's word *and* with nothing in flight.
#[derive(Debug)]
pub(super) struct Fetch {
    pub(super) pairing: Pairing,
    pub(super) deadline: Deadline,
    pub(super) awaited: Awaited,
    pub(super) placed: Option<Placed>,
    /// Empty until the source group's nodes are known.
    pub(super) legs: BTreeMap<NodeId, Leg>,
    pub(super) resolved: bool,
    pub(super) started: bool,
    /// This rank told its leader how its part ended.
    pub(super) reported: bool,
    pub(super) settled: Option<Outcome>,
    /// It is settled and something may still write its blocks: when whoever that is will be fenced.
    pub(super) fence_at: Option<Moment>,
    /// How long it has waited for bytes, until `since`; waiting for layers that are still being computed says nothing of the rate.
    pub(super) moved_for: Duration,
    pub(super) times: Times,
    /// When what is waited for changed last.
    pub(super) since: Moment,
}

/// Where the engine wants it.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) tables: Tables,
    pub(super) have: u64,
    /// What is to come, about: deadlines follow from it.
    pub(super) bytes: u64,
}

/// What one source rank owes.
#[derive(Debug)]
pub(super) struct Leg {
    pub(super) source: Rank,
    pub(super) state: LegState,
    pub(super) opened_at: Option<Moment>,
    /// Our NICs, the direction and the peer's NICs, for the report and the fence: the peer may be gone by then.
    pub(super) path: Option<Path>,
    pub(super) source_tables: Option<Tables>,
    /// Steps that the source called ready.
    pub(super) ready: u32,
    /// Steps posted (pull) or expected (push).
    pub(super) posted: u32,
    pub(super) flight: Flight,
    /// Pushed shares that are here: their source may not have heard it.
    pub(super) arrived: BTreeSet<TransferId>,
}

/// How a leg's bytes travel.
#[derive(Clone, Debug)]
pub(super) struct Path {
    /// The NIC that it has where nothing has moved.
    pub(super) nic: usize,
    pub(super) direction: Direction,
    /// Of the peer's NIC that each of ours is joined to.
    pub(super) addresses: BTreeMap<usize, Bytes>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LegState {
    /// The session to the source does not stand yet.
    Unopened,
    Moving,
    /// Every byte is here; the owner has yet to confirm its lease (pull).
    Confirming,
    Done,
}

/// When what happened to it, and what it brought: what its [`FetchCourse`] is made of.
#[derive(Debug, Default)]
pub(super) struct Times {
    pub(super) asked: Moment,
    pub(super) placed: Option<Moment>,
    pub(super) planned: Option<Moment>,
    pub(super) posted: Option<Moment>,
    pub(super) moved: Option<Moment>,
    pub(super) posting: Duration,
    pub(super) paths: Vec<PathReport>,
}

impl Fetch {
    /// Notes what has come about by now.
    pub(super) fn look(&mut self, now: Moment) {
        let (legs, resolved, steps) = (&self.legs, self.resolved, self.pairing.steps.len() as u32);
        let all = |is: fn(&Leg, u32) -> bool| resolved && legs.values().all(|leg| is(leg, steps));
        if all(|leg, _| leg.source_tables.is_some()) {
            self.times.planned.get_or_insert(now);
        }
        if legs.values().any(|leg| !leg.flight.is_empty() || leg.flight.bytes() > 0) {
            self.times.posted.get_or_insert(now);
        }
        if all(|leg, steps| leg.source_tables.is_some() && leg.posted == steps && leg.flight.is_over()) {
            self.times.moved.get_or_insert(now);
        }
    }

    /// The record of it, now that it is decided.
    pub(super) fn course(&mut self, now: Moment, outcome: Outcome) -> FetchCourse {
        let times = core::mem::take(&mut self.times);
        FetchCourse {
            handover: self.pairing.handover,
            request: self.pairing.spec.request,
            asked: times.asked,
            placed: times.placed,
            planned: times.planned,
            posted: times.posted,
            moved: times.moved,
            settled: now,
            posting: times.posting,
            outcome,
            paths: times.paths,
        }
    }

    /// Blocks are still to be found.
    pub(super) fn new(pairing: Pairing, deadline: Deadline, now: Moment) -> Self {
        Fetch {
            pairing,
            deadline,
            awaited: Awaited::Placement,
            placed: None,
            legs: BTreeMap::new(),
            resolved: false,
            started: false,
            reported: false,
            settled: None,
            fence_at: None,
            moved_for: Duration::ZERO,
            times: Times { asked: now, ..Times::default() },
            since: now,
        }
    }

    pub(super) fn in_flight(&self) -> bool {
        self.legs.values().any(|leg| !leg.flight.is_empty())
    }

    /// Whether every leg is done and said so.
    pub(super) fn is_complete(&self) -> bool {
        self.reported && self.resolved && self.legs.values().all(|leg| leg.state == LegState::Done)
    }

    /// Something else is waited for from now on.
    pub(super) fn turn_to(&mut self, now: Moment, awaited: Awaited, allowance: Duration) {
        if self.awaited == Awaited::Transfer {
            self.moved_for = self.moved_for.saturating_add(now.since(self.since));
        }
        self.awaited = awaited;
        self.since = now;
        self.deadline = Deadline::after(now, allowance);
    }

    /// Its part has ended; from now on the leader owes an outcome.
    pub(super) fn report(&mut self, now: Moment, within: Duration) {
        self.reported = true;
        self.turn_to(now, Awaited::Outcome, within);
    }

    /// Whether everything that is ready is here, and the rest is not computed yet.
    pub(super) fn waits_for_layers(&self) -> bool {
        let steps = self.pairing.steps.len() as u32;
        let mut unfinished = self.legs.values().filter(|leg| leg.state != LegState::Done).peekable();
        self.resolved && unfinished.peek().is_some() && unfinished.all(|leg| leg.waits_for_layers(steps))
    }
}

impl Leg {
    pub(super) fn new(source: Rank) -> Self {
        Leg {
            source,
            state: LegState::Unopened,
            opened_at: None,
            path: None,
            source_tables: None,
            ready: 0,
            posted: 0,
            flight: Flight::default(),
            arrived: BTreeSet::new(),
        }
    }

    /// Of the peer's NIC that one of ours is joined to.
    pub(super) fn address(&self, nic: usize) -> Bytes {
        self.path.as_ref().and_then(|path| path.addresses.get(&nic).cloned()).unwrap_or_default()
    }

    fn waits_for_layers(&self, steps: u32) -> bool {
        // A step of a push is expected from the beginning; it moves once it is ready.
        let still = self.flight.steps().all(|step| step >= self.ready);
        self.state == LegState::Moving && self.source_tables.is_some() && self.ready < steps && still
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::RequestSpec;
    use crate::{GroupId, HandoverId, RequestId};

    #[test]
    fn only_the_wait_for_bytes_tells_the_rate() {
        let at = |seconds| Moment(0) + Duration::from_secs(seconds);
        let within = Duration::from_secs(1);
        let spec = RequestSpec { request: RequestId(1), tokens: 16, prefix: Default::default(), prefix_tokens: 0 };
        let (handover, source) = (HandoverId(1), GroupId(0));
        let pairing = Pairing { handover, spec, source, source_dp: 0, steps: vec![1, 2], trace: None };
        let mut fetch = Fetch::new(pairing, Deadline::after(at(0), within), at(0));
        fetch.turn_to(at(5), Awaited::Transfer, within);
        fetch.turn_to(at(7), Awaited::Layers, within);
        fetch.turn_to(at(100), Awaited::Transfer, within);
        assert_eq!(fetch.deadline.at, at(101));
        fetch.report(at(103), within);
        fetch.report(at(200), within);
        assert_eq!(fetch.moved_for, Duration::from_secs(2 + 3));
    }
}
