//! What is pushed to this rank over several rails: the source says in which shares, and posts a share again only once this rank has said that
//! nothing of it is written here any more.

use std::sync::Arc;

use super::DecodeRank;
use crate::protocol::fetch::LegState;
use crate::protocol::prefill::step_layers;
use crate::protocol::{FailReason, Message, NicCommand, PushShares, Refusal, ShareName};
use crate::{Direction, HandoverId, Moment, NodeId, PlanRequest, TransferId};

impl DecodeRank {
    /// The source pushes a step in these shares, or one of them again.
    pub(super) fn shares(&mut self, now: Moment, from: NodeId, shares: &PushShares) {
        let handover = shares.handover;
        match self.expect_shares(from, shares) {
            Some(Ok(())) => {
                self.advance(now, handover, from);
                self.anchor(now, handover);
            }
            Some(Err(wrong)) => {
                let wrong = format!("step {} of {handover} cannot be pushed like that: {wrong}", shares.step);
                self.fail(now, handover, FailReason::Refused(Refusal::BadTables(wrong)));
            }
            // It is over here, or was never opened.
            None => {}
        }
    }

    /// Expects shares where they come. Says what is wrong with them, if they are of something that is under way.
    fn expect_shares(&mut self, from: NodeId, shares: &PushShares) -> Option<Result<(), String>> {
        let fetch = self.fetches.get_mut(&shares.handover).filter(|fetch| !fetch.reported)?;
        let (Some(placed), Some(Ok(peer))) = (&fetch.placed, self.peers.get(&from)) else { return None };
        let leg = fetch.legs.get_mut(&from).filter(|leg| leg.state == LegState::Moving)?;
        let source = leg.source_tables.as_ref().filter(|_| peer.shares_pushes)?;
        let steps = fetch.pairing.steps.len() as u32;
        if shares.step > leg.posted || shares.step >= steps {
            return Some(Err(format!("it is not the next one, {}", leg.posted)));
        }
        let mut numbers = Vec::with_capacity(shares.shares.len());
        if shares.step == leg.posted {
            let layers = step_layers(&fetch.pairing.steps, shares.step);
            let tokens = fetch.pairing.spec.tokens;
            let request = PlanRequest { tokens, have: placed.have, layers, source, destination: &placed.tables };
            let program = match (peer.plan.program(&request), shares.unit_bytes_max) {
                (Ok(program), None) => program,
                (Ok(program), Some(most)) => program.with_units_up_to(most),
                (Err(error), _) => return Some(Err(error.to_string())),
            };
            if !shares.cover(&program) {
                return Some(Err("the shares are not all of it, each once and in order".to_owned()));
            }
            leg.posted += 1;
            let program = Arc::new(program);
            numbers.extend(
                shares.shares.iter().map(|share| leg.flight.add(shares.step, Arc::clone(&program), share.range)),
            );
        } else {
            for share in &shares.shares {
                let open = leg.flight.open_share(shares.step, share.range);
                let Some(number) = open.filter(|number| !numbers.contains(number)) else {
                    return Some(Err("a share comes again that is here, or that is still written".to_owned()));
                };
                numbers.push(number);
            }
        }
        for (share, number) in shares.shares.iter().zip(numbers) {
            let (handover, step, chunk) = (shares.handover, shares.step, share.chunk);
            let id = ShareName { handover, step, chunk }.transfer(leg.source, self.local.rank);
            let nic = share.nic as usize;
            if !peer.pairs.iter().any(|(local, _)| *local == nic) {
                return Some(Err(format!("NIC {nic} is none of its rails")));
            }
            let Some(shared) = leg.flight.share(number).filter(|_| !leg.flight.contains(id) && chunk != 0) else {
                return Some(Err(format!("{id} is under way, or no share's name")));
            };
            let (program, range) = (Arc::clone(&shared.program), shared.range);
            leg.flight.expect_share(id, number, nic);
            let from = peer.address_of(nic);
            self.outbox.nic(nic, NicCommand::Expect { id, from, program, range });
        }
        Some(Ok(()))
    }

    /// The source has stopped a transfer: it learns when nothing of it is written here any more, or that it is all here.
    pub(super) fn share_stopped(&mut self, now: Moment, from: NodeId, share: ShareName) {
        let fence_at = now + self.rails.silent_after.min(self.quarantine.fence_after);
        let rank = self.local.rank;
        let fetch = self.fetches.get_mut(&share.handover).filter(|fetch| !fetch.reported);
        let Some(leg) = fetch.and_then(|fetch| fetch.legs.get_mut(&from)) else { return };
        let id = share.transfer(leg.source, rank);
        if let Some(nic) = leg.flight.attempt(id).map(|attempt| attempt.nic) {
            leg.flight.give_up(id, Some(fence_at));
            self.outbox.nic(nic, NicCommand::Cancel { id });
        } else if leg.arrived.contains(&id) {
            self.outbox.send(from, Message::ShareEnded { share, arrived: true });
        }
    }

    /// Nothing of a transfer is written here any more, and its share is not here: the source may push it again. Says whether it is to.
    pub(super) fn share_ended(&mut self, (handover, node): (HandoverId, NodeId), id: TransferId) -> bool {
        let Some(fetch) = self.fetches.get(&handover).filter(|fetch| !fetch.reported) else { return false };
        let moving = |state| matches!(state, LegState::Moving);
        let goes_on = fetch.legs.get(&node).is_some_and(|leg| moving(leg.state))
            && matches!(self.peers.get(&node), Some(Ok(peer)) if peer.direction == Direction::Push);
        if goes_on {
            self.outbox.send(node, Message::ShareEnded { share: ShareName::of(id), arrived: false });
        }
        goes_on
    }
}
