//! What is pushed to readers: through one NIC, or shared out among rails.
//!
//! Rails are the source's business, as with a pull they are the reader's; but the reader has to expect every share where it comes, so it is told
//! of them ([`Message::Shares`]). A push writes into foreign memory: when its rail fails or falls silent, a share is posted on another one only
//! after the reader's word that nothing of the earlier transfer is written any more ([`Message::ShareEnded`]), which takes its NIC's word or a fence.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;

use super::PrefillRank;
use super::offer::{Reader, Shared};
use crate::protocol::flight::{Attempt, Course};
use crate::protocol::peer::{Peer, posted_by};
use crate::protocol::prefill::step_layers;
use crate::protocol::{
    Message, NicCommand, Outbox, PushShare, PushShares, RailTerms, Refusal, Role, ShareName, SharedOut,
};
use crate::{Direction, Moment, NodeId, PlanRequest, Rank, RequestId, TransferId};

impl PrefillRank {
    /// With several NICs at once to every peer that this rank pushes to, where that one says that it can.
    pub fn with_rails(mut self, terms: RailTerms) -> Self {
        self.rails = terms;
        self
    }

    /// Posts every ready step that was not posted yet.
    pub(super) fn push_ready(&mut self, now: Moment, request: RequestId, to: NodeId) {
        let rank = self.local.rank;
        let (Some(offer), Some(Ok(peer))) = (self.offers.get_mut(&request), self.peers.get_mut(&to)) else { return };
        let tokens = offer.job.spec.tokens;
        let (Some(held), None) = (&mut offer.held, offer.closing) else { return };
        let Some(reader) = held.readers.get_mut(&to) else { return };
        let mut refusal = None;
        while reader.expecting && reader.posted < held.ready && !reader.stopped {
            let step = reader.posted;
            reader.posted += 1;
            let layers = step_layers(&held.steps, step);
            let plan = PlanRequest {
                tokens,
                have: reader.open.have,
                layers,
                source: &held.tables,
                destination: &reader.open.destination,
            };
            let program = match peer.plan.program(&plan) {
                Ok(program) => program,
                Err(error) => {
                    reader.stopped = true;
                    refusal = Some((reader.open.handover, Refusal::BadTables(error.to_string())));
                    continue;
                }
            };
            let is_empty = program.units() == 0;
            let SharedOut { program, unit_bytes_max, shares } = peer.rails.share_out(now, program);
            let program = Arc::new(program);
            let shares = shares.into_iter().filter(|_| !is_empty);
            let numbers: Vec<(u32, usize)> =
                shares.map(|(nic, range)| (reader.flight.add(step, Arc::clone(&program), range), nic)).collect();
            post(now, (to, rank), (reader, peer), (step, unit_bytes_max, &numbers), &mut self.outbox);
        }
        if let Some((handover, refusal)) = refusal {
            self.outbox.send(to, Message::Refused { handover, refusal });
        }
        self.finish_closing(now, request);
    }

    /// A push has ended at our NIC.
    pub(super) fn push_ended(&mut self, now: Moment, id: TransferId, end: Result<(), String>) {
        let pushes = |(_, reader): &(&NodeId, &Reader)| reader.flight.contains(id);
        let found = self.offers.iter().find_map(|(request, offer)| {
            let (node, _) = offer.held.as_ref()?.readers.iter().find(pushes)?;
            Some((*request, *node))
        });
        let Some((request, node)) = found else { return };
        let held = self.offers.get_mut(&request).and_then(|offer| offer.held.as_mut());
        let Some(held) = held else { return };
        let steps = held.steps.len() as u32;
        let Some(reader) = held.readers.get_mut(&node) else { return };
        // What is left of an earlier handover says nothing about this one.
        let is_current = id.handover() == reader.open.handover;
        let mut failed = None;
        match end {
            Ok(()) => {
                let Some((attempt, _)) = reader.flight.done(id, 0, 0) else { return };
                if is_current {
                    reader.confirmed |= reader.has_all(steps);
                }
                if let Some(peer) = posted_by(&mut self.peers, node, &attempt)
                    && let Some(health) = peer.rails.moved(now, attempt.nic, attempt.bytes)
                {
                    peer.tell_turn(node, &self.local, (attempt.nic, health), "as its rate shows", &mut self.outbox);
                }
            }
            Err(reason) => {
                let Some((attempt, _)) = reader.flight.failed(id) else { return };
                // What was stopped says nothing of its rail, and its reader knows of it.
                let fails = !reader.stopped && attempt.course == Course::Running;
                let mut goes_on = false;
                if let Some(peer) = posted_by(&mut self.peers, node, &attempt) {
                    if fails {
                        peer.blame(now, (node, attempt.nic), &self.local, &reason, &mut self.outbox);
                    }
                    peer.rails.ended(now, attempt.nic, attempt.bytes);
                    let share = attempt.share.and_then(|number| reader.flight.share(number));
                    goes_on = peer.shares_pushes && share.is_some_and(|share| share.tries < peer.rails.tries_max());
                }
                match (is_current, fails, goes_on) {
                    (true, true, true) => self.outbox.send(node, Message::ShareStopped(ShareName::of(id))),
                    (true, true, false) => failed = Some(reason),
                    // Its reader may have said before that it is all there.
                    (true, false, _) => reader.confirmed |= reader.has_all(steps),
                    (false, ..) => {}
                }
                reader.confirmed &= !(is_current && fails);
            }
        }
        if let Some(reason) = failed {
            self.fail_reader(request, node, &reason);
        }
        self.finish_closing(now, request);
    }

    /// The reader says that nothing of a transfer is written there any more, and whether its share is there.
    pub(super) fn share_ended(&mut self, now: Moment, from: NodeId, name: ShareName, arrived: bool) {
        let Some(request) = self.request_of(name.handover) else { return };
        let Some(Ok(peer)) = self.peers.get_mut(&from) else { return };
        let Some(held) = self.offers.get_mut(&request).and_then(|offer| offer.held.as_mut()) else { return };
        let steps = held.steps.len() as u32;
        let reader = held.readers.get_mut(&from).filter(|one| !one.stopped && one.open.handover == name.handover);
        let Some(reader) = reader else { return };
        let id = name.transfer(self.local.rank, peer.profile.rank);
        let Some(Shared { number, nic, share }) = reader.shared.remove(&id) else { return };
        if reader.flight.attempt(id).is_some_and(|attempt| attempt.course == Course::Running) {
            reader.flight.give_up(id, None);
            self.outbox.nic(nic, NicCommand::Cancel { id });
            peer.blame(now, (from, nic), &self.local, "the peer's end of it failed", &mut self.outbox);
        }
        if arrived {
            reader.flight.arrived(number);
            reader.confirmed |= reader.has_all(steps);
            return;
        }
        reader.confirmed = false;
        reader.flight.reopen(number, share);
        self.post_again(now, (request, from), number, nic);
    }

    /// When something is to be done about a rail that is silent.
    pub(super) fn pushes_due(&self) -> Option<Moment> {
        let running = self.running().filter(|_| self.rails.rails_max > 1);
        running.filter_map(|(.., attempt)| attempt.due).min()
    }

    /// Stops what silent rails do not move: others do, once the reader says that it is not written any more.
    pub(super) fn watch_pushes(&mut self, now: Moment) {
        let is_due = |due: Option<Moment>| due.is_some_and(|at| now >= at);
        let late: Vec<_> = self.running().filter(|(.., attempt)| is_due(attempt.due)).collect();
        let mut blamed = BTreeSet::new();
        for (request, node, id, attempt) in late {
            let nic = attempt.nic;
            let held = self.offers.get_mut(&request).and_then(|offer| offer.held.as_mut());
            let Some(reader) = held.and_then(|held| held.readers.get_mut(&node)) else { continue };
            let Some(peer) = posted_by(&mut self.peers, node, &attempt) else {
                reader.flight.wait_until(id, now + self.quarantine.fence_after);
                continue;
            };
            let tries = attempt.share.and_then(|number| reader.flight.share(number)).map_or(u32::MAX, |one| one.tries);
            let moves = tries < peer.rails.tries_max() && peer.rails.another(now, nic, false).is_some();
            if moves {
                reader.flight.give_up(id, None);
                self.outbox.nic(nic, NicCommand::Cancel { id });
                self.outbox.send(node, Message::ShareStopped(ShareName::of(id)));
            }
            // It is silent whether or not somebody may move this share; but the last one that moves bytes is not given up.
            if (moves || peer.rails.has_another(nic)) && blamed.insert((node, nic)) {
                let reason = "it has been silent for too long";
                peer.blame(now, (node, nic), &self.local, reason, &mut self.outbox);
            }
            if !moves {
                reader.flight.wait_until(id, now + peer.rails.patience(nic));
            }
        }
    }

    /// A NIC has lost a reader. What was under way there ends by itself, and shares of it are posted again, so often and no more.
    pub(super) fn rail_lost(&mut self, now: Moment, nic: usize, node: NodeId, reason: &str) {
        let goes_on = match self.peers.get_mut(&node) {
            Some(Ok(peer)) if peer.shares_pushes => {
                peer.blame(now, (node, nic), &self.local, reason, &mut self.outbox);
                true
            }
            Some(Ok(peer)) => !peer.initiates(Role::Prefill),
            _ => true,
        };
        for request in self.offers.keys().copied().collect::<Vec<_>>() {
            if !goes_on {
                self.fail_reader(request, node, reason);
            }
            self.finish_closing(now, request);
        }
    }

    /// Nothing that a fence was asked for reads blocks here any more. Whatever else it ended fails by itself.
    pub(super) fn fenced(&mut self, now: Moment, nic: usize, (node, address): (NodeId, &Bytes), ticket: u64) {
        for request in self.offers.keys().copied().collect::<Vec<_>>() {
            let held = self.offers.get_mut(&request).and_then(|offer| offer.held.as_mut());
            let reader = held.and_then(|held| held.readers.get_mut(&node));
            let Some(reader) = reader.filter(|reader| reader.address(nic) == *address) else { continue };
            for (_, attempt) in reader.flight.fenced(nic, ticket) {
                if let Some(peer) = posted_by(&mut self.peers, node, &attempt) {
                    peer.rails.ended(now, nic, attempt.bytes);
                }
            }
            self.finish_closing(now, request);
        }
    }

    /// Has another rail move a share, or gives the reader up.
    fn post_again(&mut self, now: Moment, (request, node): (RequestId, NodeId), number: u32, nic: usize) {
        let rank = self.local.rank;
        let Some(Ok(peer)) = self.peers.get_mut(&node) else { return };
        let Some(held) = self.offers.get_mut(&request).and_then(|offer| offer.held.as_mut()) else { return };
        let Some(reader) = held.readers.get_mut(&node) else { return };
        let Some((step, tries)) = reader.flight.share(number).map(|share| (share.step, share.tries)) else { return };
        if tries < peer.rails.tries_max() {
            let other = peer.rails.resort(now, nic);
            // Its units are known to the reader.
            post(now, (node, rank), (reader, peer), (step, None, &[(number, other)]), &mut self.outbox);
        } else {
            self.fail_reader(request, node, "no rail has moved a share of it, however often it was posted");
        }
        self.finish_closing(now, request);
    }

    /// What is being pushed to readers that are to have it.
    fn running(&self) -> impl Iterator<Item = (RequestId, NodeId, TransferId, Attempt)> + '_ {
        let offers = self.offers.iter().filter(|(_, offer)| offer.closing.is_none());
        let readers = offers.flat_map(|(request, offer)| {
            let readers = offer.held.iter().flat_map(|held| &held.readers);
            readers.filter(|(_, reader)| !reader.stopped).map(|(node, reader)| (*request, *node, reader))
        });
        let attempts = readers.flat_map(|(request, node, reader)| {
            reader.flight.attempts().map(move |(id, attempt)| (request, node, id, *attempt))
        });
        attempts.filter(|(.., attempt)| attempt.course == Course::Running)
    }
}

/// Posts shares of a step, each at a NIC of this side, and tells the reader where they come if it has to know.
fn post(
    now: Moment,
    (to, rank): (NodeId, Rank),
    (reader, peer): (&mut Reader, &mut Peer),
    (step, unit_bytes_max, shares): (u32, Option<u64>, &[(u32, usize)]),
    outbox: &mut Outbox,
) {
    let handover = reader.open.handover;
    let first = TransferId::of(handover, rank, peer.profile.rank, step);
    let (mut told, mut posts) = (Vec::new(), Vec::new());
    for (number, nic) in shares.iter().copied() {
        let Some((id, bytes, share)) = reader.flight.post(number, nic, first, !peer.shares_pushes) else { continue };
        let begins_anew = peer.rails.begins_anew(nic);
        reader.flight.book(id, peer.conversation);
        let patience = peer.rails.posted(now, nic, bytes);
        if peer.rails.are_several() {
            reader.flight.wait_until(id, now + patience);
        }
        let (direction, program, range) = (Direction::Push, Arc::clone(&share.program), share.range);
        posts.push((nic, begins_anew, NicCommand::Post { id, node: to, direction, program, range }));
        if peer.shares_pushes {
            let there = peer.pairs.iter().find(|(local, _)| *local == nic).map_or(0, |(_, remote)| *remote);
            told.push(PushShare { chunk: id.chunk(), nic: u32::try_from(there).unwrap_or(u32::MAX), range });
            reader.shared.insert(id, Shared { number, nic, share });
        }
    }
    if peer.shares_pushes {
        outbox.send(to, Message::Shares(PushShares { handover, step, unit_bytes_max, shares: told }));
    }
    for (nic, begins_anew, post) in posts {
        if begins_anew {
            peer.connect_at(to, nic, outbox);
        }
        outbox.nic(nic, post);
    }
}
