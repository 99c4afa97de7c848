//! The decode ranks that read an offer.

use std::collections::BTreeMap;

use super::PrefillRank;
use super::offer::Reader;
use crate::protocol::{Event, Message, NicCommand, OpenFetch, OpenedFetch, Refusal};
use crate::{Direction, HandoverId, Moment, NodeId, PlanRequest, RequestId};

impl PrefillRank {
    pub(super) fn open(&mut self, now: Moment, from: NodeId, open: OpenFetch) -> Result<(), Refusal> {
        let (request, handover) = (open.request, open.handover);
        let peer = match self.peers.get(&from) {
            Some(Ok(peer)) => peer,
            Some(Err(reason)) => return Err(Refusal::Mismatch(reason.to_string())),
            None => return Err(Refusal::Mismatch("the peer has not introduced itself".to_owned())),
        };
        if peer.direction != open.direction {
            return Err(Refusal::Mismatch(format!(
                "direction: {:?} was agreed, {:?} was asked for",
                peer.direction, open.direction
            )));
        }
        let offer = self.offers.get_mut(&request).ok_or(Refusal::UnknownRequest(request))?;
        if offer.closing.is_some() {
            return Err(Refusal::UnknownRequest(request));
        }
        let tokens = offer.job.spec.tokens;
        let held = offer.held.as_mut().ok_or(Refusal::UnknownRequest(request))?;
        if !held.lease.renew(now) {
            return Err(Refusal::LeaseExpired(request));
        }
        self.outbox.event(Event::LeaseHeld { request, until: held.lease.expires() });
        // Planning the whole offer once proves that both sides' tables fit, before any byte moves.
        let layers = 0..self.local.geometry.model.layers;
        peer.plan
            .program(&PlanRequest {
                tokens,
                have: open.have,
                layers,
                source: &held.tables,
                destination: &open.destination,
            })
            .map_err(|error| Refusal::BadTables(error.to_string()))?;
        match held.handover {
            Some(newer) if newer > handover => return Err(Refusal::Superseded { request, newer }),
            Some(current) if current == handover => {}
            _ => {
                held.handover = Some(handover);
                let old: Vec<NodeId> = held.readers.keys().copied().collect();
                for node in old {
                    self.stop_reader(request, node);
                }
            }
        }
        let Some(held) = self.held(request) else { return Err(Refusal::UnknownRequest(request)) };
        if held.readers.get(&from).is_some_and(|reader| reader.open.handover == handover) {
            return Ok(());
        }
        let direction = open.direction;
        let addresses = match self.peers.get(&from) {
            Some(Ok(peer)) => peer.addresses(),
            _ => BTreeMap::new(),
        };
        let Some(held) = self.held(request) else { return Err(Refusal::UnknownRequest(request)) };
        // What an earlier handover left under way still has to end.
        let mut flight = held.readers.remove(&from).map(|old| old.flight).unwrap_or_default();
        flight.forget_shares();
        let shared = BTreeMap::new();
        let reader =
            Reader { open, expecting: false, posted: 0, flight, shared, stopped: false, confirmed: false, addresses };
        held.readers.insert(from, reader);
        let source = match direction {
            Direction::Pull => held.tables.clone(),
            Direction::Push => held.tables.shapes(),
        };
        let ready = held.ready;
        self.outbox.send(from, Message::Opened(OpenedFetch { handover, source, ready }));
        Ok(())
    }

    /// Our transport gave up on a reader: it is told, instead of waiting for what will not come.
    pub(super) fn fail_reader(&mut self, request: RequestId, node: NodeId, reason: &str) {
        let reader = self.offers.get(&request).and_then(|offer| offer.held.as_ref()?.readers.get(&node));
        let Some(handover) = reader.filter(|reader| !reader.stopped).map(|reader| reader.open.handover) else { return };
        self.stop_reader(request, node);
        let refusal = Refusal::Transport(reason.to_owned());
        self.outbox.send(node, Message::Refused { handover, refusal });
    }

    pub(super) fn fetched(&mut self, now: Moment, from: NodeId, handover: HandoverId) {
        let answer = match self.request_of(handover) {
            None => Err(Refusal::UnknownHandover(handover)),
            Some(request) => match self.held(request) {
                Some(held) if held.readers.get(&from).is_none_or(|reader| reader.open.handover != handover) => {
                    Err(Refusal::UnknownHandover(handover))
                }
                Some(held) if held.lease.is_alive(now) => {
                    if let Some(reader) = held.readers.get_mut(&from) {
                        reader.confirmed = true;
                    }
                    Ok(())
                }
                _ => Err(Refusal::LeaseExpired(request)),
            },
        };
        self.outbox.send(
            from,
            match answer {
                Ok(()) => Message::Confirmed { handover },
                Err(refusal) => Message::Refused { handover, refusal },
            },
        );
    }

    /// No new transfers for this reader; ours that run are cancelled.
    pub(super) fn stop_reader(&mut self, request: RequestId, node: NodeId) {
        let Some(held) = self.offers.get_mut(&request).and_then(|offer| offer.held.as_mut()) else { return };
        let Some(reader) = held.readers.get_mut(&node) else { return };
        if reader.stopped {
            return;
        }
        reader.stopped = true;
        reader.flight.forget_shares();
        for (id, nic) in reader.flight.stop() {
            self.outbox.nic(nic, NicCommand::Cancel { id });
        }
    }

    /// Readers that have not got everything hear that they will not.
    pub(super) fn refuse_readers(&mut self, request: RequestId, refusal: &Refusal) {
        let held = self.offers.get(&request).and_then(|offer| offer.held.as_ref());
        let waiting: Vec<(NodeId, HandoverId)> = held
            .iter()
            .flat_map(|held| &held.readers)
            .filter(|(_, reader)| !reader.stopped && !reader.confirmed)
            .map(|(node, reader)| (*node, reader.open.handover))
            .collect();
        for (node, handover) in waiting {
            self.outbox.send(node, Message::Refused { handover, refusal: refusal.clone() });
        }
    }
}
