//! How what this rank reads is shared out among rails, and goes on when one of them fails or falls silent.
//!
//! A share whose rail fails is posted on another one at once: the same bytes to the same place. A rail that has fallen silent may still write
//! them, late; so its transfer is stopped, and fenced if it does not end, and neither is the source asked to confirm its lease nor do blocks go
//! back before it has ended.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::DecodeRank;
use crate::protocol::fetch::{Leg, LegState};
use crate::protocol::flight::Course;
use crate::protocol::peer::{Peer, posted_by};
use crate::protocol::{Lease, Message, NicCommand, Outbox, RailTerms, ShareName};
use crate::{Direction, FenceProof, HandoverId, Moment, NodeId, Rank, TransferId};

impl DecodeRank {
    /// With several NICs at once to every peer that this rank reads from, or that pushes to it and can.
    pub fn with_rails(mut self, terms: RailTerms) -> Self {
        self.rails = terms;
        self
    }

    /// A posted or expected transfer is done.
    pub(super) fn transfer_done(&mut self, now: Moment, id: TransferId, bytes: u64, pieces: u64) {
        let Some((handover, node)) = self.owner_of(id) else { return };
        let again_at = now + self.quarantine.fence_after;
        let Some(leg) = self.leg(handover, node) else { return };
        let Some((attempt, spared)) = leg.flight.done(id, bytes, pieces) else { return };
        for (other, _) in &spared {
            leg.flight.give_up(*other, Some(again_at));
        }
        if attempt.is_pushed_share() {
            leg.arrived.insert(id);
            if attempt.course != Course::Running {
                // The source has stopped it, and waits for what became of it.
                self.outbox.send(node, Message::ShareEnded { share: ShareName::of(id), arrived: true });
            }
        }
        for (id, nic) in spared {
            self.outbox.nic(nic, NicCommand::Cancel { id });
        }
        if let Some(peer) = posted_by(&mut self.peers, node, &attempt)
            && let Some(health) = peer.rails.moved(now, attempt.nic, attempt.bytes)
        {
            let reason = "as its rate shows";
            peer.tell_turn(node, &self.local, (attempt.nic, health), reason, &mut self.outbox);
        }
        self.advance(now, handover, node);
        self.anchor(now, handover);
        self.drain(handover, FenceProof::OwnerCopies);
    }

    /// A posted or expected transfer ended without success; nothing of it touches memory here any more.
    pub(super) fn transfer_failed(&mut self, now: Moment, id: TransferId, reason: String) {
        let Some((handover, node)) = self.owner_of(id) else { return };
        let over = self.fetches.get(&handover).is_none_or(|fetch| fetch.reported);
        let Some((attempt, open)) = self.leg(handover, node).and_then(|leg| leg.flight.failed(id)) else { return };
        let stopped = attempt.course != Course::Running;
        if let Some(peer) = posted_by(&mut self.peers, node, &attempt) {
            // What was stopped says nothing of its rail.
            if !over && !stopped {
                peer.blame(now, (node, attempt.nic), &self.local, &reason, &mut self.outbox);
            }
            peer.rails.ended(now, attempt.nic, attempt.bytes);
        }
        let goes_on = match open {
            Some(_) if attempt.is_pushed_share() => self.share_ended((handover, node), id),
            Some(share) => self.post_again(now, (handover, node), share, attempt.nic, true),
            None => attempt.share.is_some(),
        };
        if goes_on {
            self.advance(now, handover, node);
            self.anchor(now, handover);
        } else {
            let reason = self.transport_failure(attempt.nic, node, reason);
            self.fail(now, handover, reason);
        }
        self.drain(handover, FenceProof::OwnerCopies);
    }

    /// A NIC has lost a peer. Says whether another rail reaches it.
    pub(super) fn rail_lost(&mut self, now: Moment, nic: usize, node: NodeId, reason: &str) -> bool {
        let Some(Ok(peer)) = self.peers.get_mut(&node) else { return false };
        peer.blame(now, (node, nic), &self.local, reason, &mut self.outbox);
        peer.rails.another(now, nic, true).is_some()
    }

    /// It is proved that nothing of what a fence at that NIC was asked for can write here any more.
    pub(super) fn fenced(
        &mut self,
        now: Moment,
        nic: usize,
        (node, address, ticket): (NodeId, Bytes, u64),
        proof: FenceProof,
    ) {
        for handover in self.handovers() {
            let leg = self.leg(handover, node).filter(|leg| leg.address(nic) == address);
            let ended = leg.map(|leg| leg.flight.fenced(nic, ticket)).unwrap_or_default();
            if ended.is_empty() {
                continue;
            }
            for (id, attempt) in &ended {
                if let Some(peer) = posted_by(&mut self.peers, node, attempt) {
                    peer.rails.ended(now, nic, attempt.bytes);
                }
                if attempt.is_pushed_share() {
                    self.share_ended((handover, node), *id);
                }
            }
            self.advance(now, handover, node);
            self.anchor(now, handover);
            self.drain(handover, proof);
        }
    }

    /// When something is to be done about a rail that is silent.
    pub(super) fn rails_due(&self) -> Option<Moment> {
        let fetches = self.fetches.values().filter(|fetch| self.rails.rails_max > 1 && !fetch.reported);
        fetches.flat_map(|fetch| fetch.legs.values()).filter_map(|leg| leg.flight.due()).min()
    }

    /// Has others move what silent rails do not, and fences rails that were told to stop and did not.
    pub(super) fn watch_rails(&mut self, now: Moment) {
        let is_due = |due: Option<Moment>| due.is_some_and(|at| now >= at);
        let mut late = Vec::new();
        for (handover, fetch) in self.fetches.iter().filter(|(_, fetch)| !fetch.reported) {
            for (node, leg) in &fetch.legs {
                let of_leg = leg.flight.attempts().filter(|(_, attempt)| is_due(attempt.due));
                late.extend(of_leg.map(|(id, attempt)| (*handover, *node, id, *attempt)));
            }
        }
        let mut fences: BTreeSet<(NodeId, usize, Bytes)> = BTreeSet::new();
        let mut blamed = BTreeSet::new();
        for (handover, node, id, attempt) in late {
            let again_at = now + self.quarantine.fence_after;
            if attempt.course != Course::Running {
                let address = self.leg(handover, node).map(|leg| leg.address(attempt.nic));
                fences.insert((node, attempt.nic, address.unwrap_or_default()));
                continue;
            }
            let moves = match attempt.share {
                Some(share) => self.post_again(now, (handover, node), share, attempt.nic, false),
                None => false,
            };
            if moves {
                self.outbox.nic(attempt.nic, NicCommand::Cancel { id });
                if let Some(leg) = self.leg(handover, node) {
                    leg.flight.give_up(id, Some(again_at));
                }
            }
            // It is silent whether or not somebody may move this share; but the last one that moves bytes is not given up.
            if let Some(peer) = posted_by(&mut self.peers, node, &attempt)
                && (moves || peer.rails.has_another(attempt.nic))
                && blamed.insert((node, attempt.nic))
            {
                let reason = "it has been silent for too long";
                peer.blame(now, (node, attempt.nic), &self.local, reason, &mut self.outbox);
            }
            if !moves {
                let patience = match self.peers.get(&node) {
                    Some(Ok(peer)) => peer.rails.patience(attempt.nic),
                    _ => self.quarantine.fence_after,
                };
                if let Some(leg) = self.leg(handover, node) {
                    leg.flight.wait_until(id, now + patience);
                }
            }
        }
        for (node, nic, address) in fences {
            self.ask_for_fence(now, node, nic, address);
        }
    }

    /// Has another rail move a share. Says whether one does.
    fn post_again(
        &mut self,
        now: Moment,
        (handover, node): (HandoverId, NodeId),
        share: u32,
        nic: usize,
        at_last: bool,
    ) -> bool {
        let Some(fetch) = self.fetches.get_mut(&handover).filter(|fetch| !fetch.reported) else { return false };
        let Some(Ok(peer)) = self.peers.get_mut(&node) else { return false };
        let Some(leg) = fetch.legs.get_mut(&node).filter(|leg| leg.state == LegState::Moving) else { return false };
        // As with every other post: a late one would read what is no longer promised.
        let leased = leg.opened_at.is_some_and(|sent| Lease::held(sent, &self.leases).is_alive(now));
        let tries = leg.flight.share(share).map_or(u32::MAX, |share| share.tries);
        match peer.rails.another(now, nic, at_last).filter(|_| leased && tries < peer.rails.tries_max()) {
            Some(other) => {
                let of = (handover, node, self.local.rank);
                post(now, of, leg, peer, (share, other), &mut self.outbox);
                true
            }
            None => false,
        }
    }
}

/// Posts a share of a leg at a NIC of this side.
pub(super) fn post(
    now: Moment,
    (handover, node, rank): (HandoverId, NodeId, Rank),
    leg: &mut Leg,
    peer: &mut Peer,
    (number, nic): (u32, usize),
    outbox: &mut Outbox,
) {
    let Some(step) = leg.flight.share(number).map(|share| share.step) else { return };
    let first = TransferId::of(handover, leg.source, rank, step);
    let several = peer.rails.are_several();
    let Some((id, bytes, share)) = leg.flight.post(number, nic, first, !several) else { return };
    if peer.rails.begins_anew(nic) {
        peer.connect_at(node, nic, outbox);
    }
    leg.flight.book(id, peer.conversation);
    let patience = peer.rails.posted(now, nic, bytes);
    if several {
        leg.flight.wait_until(id, now + patience);
    }
    let (direction, program, range) = (Direction::Pull, share.program, share.range);
    outbox.nic(nic, NicCommand::Post { id, node, direction, program, range });
}
