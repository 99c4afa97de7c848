//! What moves between this rank and each of its sources.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::protocol::fetch::{Leg, LegState, Path};
use crate::protocol::prefill::step_layers;
use crate::protocol::{Awaited, FailReason, Lease, Message, NicCommand, OpenFetch, Refusal};
use crate::{Direction, HandoverId, Moment, NodeId, PlanRequest, TransferId};

use super::DecodeRank;
use super::rails::post;

impl DecodeRank {
    /// Finds out which nodes owe what. The directory may still be on its way: then [`DecodeRank::handle_members`] tries again.
    pub(super) fn resolve(&mut self, now: Moment, handover: HandoverId) {
        let Some(fetch) = self
            .fetches
            .get_mut(&handover)
            .filter(|fetch| !fetch.resolved && !fetch.reported && fetch.placed.is_some())
        else {
            return;
        };
        let Some(group) = self.sources.group(fetch.pairing.source) else { return };
        let owing = match group.owing(fetch.pairing.source_dp, &self.local.geometry, self.local.rank) {
            Ok(owing) => owing,
            Err(error) => {
                self.fail(now, handover, FailReason::Mismatch(error.to_string()));
                return;
            }
        };
        let nodes: Option<BTreeMap<NodeId, Leg>> =
            owing.iter().map(|source| group.nodes.get(source).map(|node| (*node, Leg::new(*source)))).collect();
        let Some(legs) = nodes else { return };
        fetch.legs = legs;
        fetch.resolved = true;
        for node in fetch.legs.keys().copied().collect::<Vec<_>>() {
            if !self.peers.contains_key(&node) {
                self.outbox.meet(node);
            }
            self.open_leg(now, handover, node);
        }
        self.finish(now, handover);
    }

    /// Opens the source's part, if its session stands. Its answer brings the tables that both ends plan from.
    pub(super) fn open_leg(&mut self, now: Moment, handover: HandoverId, node: NodeId) {
        let Some(fetch) = self.fetches.get_mut(&handover) else { return };
        let Some(placed) = &fetch.placed else { return };
        let Some(leg) = fetch.legs.get_mut(&node).filter(|leg| leg.state == LegState::Unopened && !fetch.reported)
        else {
            return;
        };
        let peer = match self.peers.get(&node) {
            Some(Ok(peer)) => peer,
            Some(Err(reason)) => {
                let reason = reason.clone();
                self.fail(now, handover, reason);
                return;
            }
            None => return,
        };
        let shapes = placed.tables.shapes();
        leg.state = LegState::Moving;
        leg.opened_at = Some(now);
        leg.path = Some(Path { nic: peer.nic, direction: peer.direction, addresses: peer.addresses() });
        let open = OpenFetch {
            handover,
            request: fetch.pairing.spec.request,
            have: placed.have,
            direction: peer.direction,
            destination: shapes,
        };
        self.outbox.send(node, Message::Open(open));
    }

    /// Registers every step of a push, then tells the source that it may write.
    pub(super) fn expect(&mut self, now: Moment, handover: HandoverId, node: NodeId) {
        let Some(fetch) = self.fetches.get_mut(&handover).filter(|fetch| !fetch.reported) else { return };
        let (Some(placed), Some(Ok(peer))) = (&fetch.placed, self.peers.get(&node)) else { return };
        let Some(leg) = fetch.legs.get_mut(&node).filter(|leg| leg.state == LegState::Moving) else { return };
        let (Some(source), Direction::Push, 0) = (&leg.source_tables, peer.direction, leg.posted) else { return };
        if peer.shares_pushes {
            // The source says what to expect where, step by step.
            self.outbox.send(node, Message::Expecting { handover });
            return;
        }
        let mut mismatch = None;
        for step in 0..fetch.pairing.steps.len() as u32 {
            let layers = step_layers(&fetch.pairing.steps, step);
            let tokens = fetch.pairing.spec.tokens;
            let request = PlanRequest { tokens, have: placed.have, layers, source, destination: &placed.tables };
            match peer.plan.program(&request) {
                Ok(program) if program.units() == 0 => {}
                Ok(program) => {
                    let id = TransferId::of(handover, leg.source, self.local.rank, step);
                    leg.flight.expect(id, peer.nic, program.bytes());
                    let (range, program) = (program.whole(), Arc::new(program));
                    let from = peer.address_of(peer.nic);
                    self.outbox.nic(peer.nic, NicCommand::Expect { id, from, program, range });
                }
                Err(error) => mismatch = Some(error.to_string()),
            }
        }
        leg.posted = fetch.pairing.steps.len() as u32;
        match mismatch {
            Some(error) => self.fail(now, handover, FailReason::Mismatch(error)),
            None => self.outbox.send(node, Message::Expecting { handover }),
        }
    }

    /// Posts what became ready (pull) and notices what is complete.
    pub(super) fn advance(&mut self, now: Moment, handover: HandoverId, node: NodeId) {
        let Some(fetch) = self.fetches.get_mut(&handover).filter(|fetch| !fetch.reported) else { return };
        let (Some(placed), Some(Ok(peer))) = (&fetch.placed, self.peers.get_mut(&node)) else { return };
        let Some(leg) = fetch.legs.get_mut(&node).filter(|leg| leg.state == LegState::Moving) else { return };
        let steps = fetch.pairing.steps.len() as u32;
        let mut failure = None;
        if peer.direction == Direction::Pull
            && let Some(source) = &leg.source_tables
            && leg.posted < leg.ready.min(steps)
        {
            // A late fetch stops here, before it posts.
            if !leg.opened_at.is_some_and(|sent| Lease::held(sent, &self.leases).is_alive(now)) {
                failure = Some(FailReason::Refused(Refusal::LeaseExpired(fetch.pairing.spec.request)));
            } else {
                let layers = step_layers(&fetch.pairing.steps, leg.posted).start
                    ..step_layers(&fetch.pairing.steps, leg.ready.min(steps) - 1).end;
                let request = PlanRequest {
                    tokens: fetch.pairing.spec.tokens,
                    have: placed.have,
                    layers,
                    source,
                    destination: &placed.tables,
                };
                match peer.plan.program(&request) {
                    Ok(program) => {
                        if program.units() > 0 {
                            let shared = peer.rails.share_out(now, program);
                            let program = Arc::new(shared.program);
                            for (nic, range) in shared.shares {
                                let share = leg.flight.add(leg.posted, Arc::clone(&program), range);
                                let of = (handover, node, self.local.rank);
                                post(now, of, leg, peer, (share, nic), &mut self.outbox);
                            }
                        }
                        leg.posted = leg.ready.min(steps);
                    }
                    Err(error) => failure = Some(FailReason::Mismatch(error.to_string())),
                }
            }
        }
        if let Some(reason) = failure {
            self.fail(now, handover, reason);
            return;
        }
        fetch.look(now);
        let Some(leg) = fetch.legs.get_mut(&node) else { return };
        if !fetch.started && (!leg.flight.is_empty() || leg.flight.bytes() > 0) {
            fetch.started = true;
            if let Some(leader) = self.leader {
                self.outbox.send(leader, Message::Started { handover });
            }
        }
        if leg.posted == steps && leg.flight.is_over() {
            if peer.destination_reads() {
                leg.state = LegState::Confirming;
                self.outbox.send(node, Message::Fetched { handover });
            } else {
                leg.state = LegState::Done;
                self.finish(now, handover);
            }
        }
    }

    /// Anchors the deadline anew when what is waited for changes: bytes, or layers that the sources have yet to compute.
    pub(super) fn anchor(&mut self, now: Moment, handover: HandoverId) {
        let queued = self.queued_bytes();
        let Some(fetch) = self.fetches.get_mut(&handover).filter(|fetch| !fetch.reported) else { return };
        let Some(placed) = &fetch.placed else { return };
        let awaited = if fetch.waits_for_layers() { Awaited::Layers } else { Awaited::Transfer };
        if awaited != fetch.awaited {
            let allowance = match awaited {
                Awaited::Layers => self.deadlines.prefill,
                _ => self.pace.allowance(placed.bytes, queued.saturating_sub(placed.bytes)),
            };
            fetch.turn_to(now, awaited, allowance);
        }
    }
}
