//! How this rank's part of a handover ends, and how its blocks come back.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::DecodeRank;
use crate::protocol::fetch::{Fetch, LegState};
use crate::protocol::{EngineCall, Event, Message, NicCommand, Outcome};
use crate::{FenceProof, HandoverId, Moment, NodeId};

impl DecodeRank {
    pub(super) fn stop(&mut self, handover: HandoverId) {
        let Some(fetch) = self.fetches.get_mut(&handover) else { return };
        for (node, leg) in &mut fetch.legs {
            let met = matches!(self.peers.get(node), Some(Ok(_)));
            if met && leg.state != LegState::Unopened && leg.state != LegState::Done {
                self.outbox.send(*node, Message::Abandon { handover });
            }
            // Every transfer still ends in an event of its own, or is fenced, whether the peer is there or not.
            for (id, nic) in leg.flight.stop() {
                self.outbox.nic(nic, NicCommand::Cancel { id });
            }
        }
    }

    /// The leader's word.
    pub(super) fn settle(&mut self, now: Moment, handover: HandoverId, outcome: Outcome) {
        let Some(fetch) = self.fetches.get_mut(&handover) else {
            // Whatever was said of it did not arrive: there is nothing of it here.
            if !self.held.contains_key(&handover) {
                self.tell_leader(Message::Freed { handover });
            }
            return;
        };
        if fetch.settled.is_some() {
            return;
        }
        if outcome.is_delivered() && !fetch.is_complete() {
            // Whoever says so, bytes are missing here.
            self.outbox.event(Event::Ignored {
                from: self.leader.unwrap_or_default(),
                what: "a delivery without this rank's part",
            });
            return;
        }
        let (request, tokens) = (fetch.pairing.spec.request, fetch.pairing.spec.tokens);
        let delivered = outcome.is_delivered();
        fetch.settled = Some(outcome.clone());
        if !fetch.reported {
            fetch.reported = true;
            self.stop(handover);
        }
        let quarantined = self.fetches.get(&handover).is_some_and(Fetch::in_flight);
        let course = self.fetches.get_mut(&handover).map(|fetch| fetch.course(now, outcome.clone()));
        self.outbox.engine(EngineCall::Settled { handover, request, outcome, quarantined });
        if let Some(course) = course {
            self.outbox.event(Event::FetchEnded(Box::new(course)));
        }
        if quarantined {
            if let Some(fetch) = self.fetches.get_mut(&handover) {
                fetch.fence_at = Some(now + self.quarantine.fence_after);
            }
            self.outbox.event(Event::Quarantined { handover });
            self.check_health();
            return;
        }
        self.fetches.remove(&handover);
        if delivered {
            self.held.insert(handover, (request, tokens));
        } else {
            self.tell_leader(Message::Freed { handover });
        }
    }

    /// Gives quarantined blocks back once the last transfer that could write them has ended.
    pub(super) fn drain(&mut self, handover: HandoverId, proof: FenceProof) {
        if self.fetches.get(&handover).is_some_and(|fetch| fetch.settled.is_some() && !fetch.in_flight()) {
            self.fetches.remove(&handover);
            self.outbox.engine(EngineCall::Returned { handover, proof });
            self.outbox.event(Event::Drained { handover, proof });
            self.tell_leader(Message::Freed { handover });
            self.check_health();
        }
    }

    /// Fences whoever did not stop writing when it was told to; again and again, for a fence may be lost with its NIC.
    pub(super) fn fence(&mut self, now: Moment) {
        let mut due: BTreeSet<(NodeId, usize, Bytes)> = BTreeSet::new();
        for fetch in self.fetches.values_mut().filter(|fetch| fetch.fence_at.is_some_and(|at| now >= at)) {
            fetch.fence_at = Some(now + self.quarantine.fence_after);
            for (node, leg) in &fetch.legs {
                due.extend(leg.flight.attempts().map(|(_, attempt)| (*node, attempt.nic, leg.address(attempt.nic))));
            }
        }
        for (node, nic, address) in due {
            self.ask_for_fence(now, node, nic, address);
        }
    }

    /// Has a NIC prove that a peer writes nothing any more. What still runs ends by itself, and is moved by another rail; what moves at another
    /// address, where the node was before it started over or is since, takes a proof of its own.
    pub(super) fn ask_for_fence(&mut self, now: Moment, node: NodeId, nic: usize, address: Bytes) {
        let again_at = now + self.quarantine.fence_after;
        self.fences_asked += 1;
        let ticket = self.fences_asked;
        let legs = self.fetches.values_mut().filter_map(|fetch| fetch.legs.get_mut(&node));
        for leg in legs.filter(|leg| leg.address(nic) == address) {
            leg.flight.fence(nic, ticket, again_at);
        }
        self.outbox.nic(nic, NicCommand::Fence { node, address, ticket });
    }

    /// Tells the leader when the quarantine leaves too little of the pool, and when it no longer does.
    pub(super) fn check_health(&mut self) {
        let quarantined = self.fetches.values().filter(|fetch| fetch.settled.is_some());
        let bytes: u64 = quarantined.filter_map(|fetch| fetch.placed.as_ref()).map(|placed| placed.bytes).sum();
        let exhausted = u128::from(bytes) * 1000 > u128::from(self.pool_bytes) * u128::from(self.quarantine.share_max);
        if exhausted == self.trouble.is_some() {
            return;
        }
        self.trouble = exhausted.then(|| {
            format!(
                "peers may still write {bytes} of its {} bytes of blocks; it waits until they are fenced",
                self.pool_bytes
            )
        });
        self.outbox.event(Event::Health { trouble: self.trouble.clone() });
        self.tell_leader(Message::Health { trouble: self.trouble.clone() });
    }
}
