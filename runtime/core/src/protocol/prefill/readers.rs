//! The decode ranks that read an offer, and what is pushed to them.

use std::sync::Arc;

use super::Reader;
use crate::protocol::prefill::step_layers;
use crate::protocol::{Event, Message, NicCommand, OpenFetch, OpenedFetch, Refusal};
use crate::{Direction, HandoverId, Moment, NodeId, PlanRequest, RequestId, TransferId};

use super::PrefillRank;

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
        let path = match self.peers.get(&from) {
            Some(Ok(peer)) => (peer.nic, peer.remote().map(|remote| remote.address.clone()).unwrap_or_default()),
            _ => Default::default(),
        };
        let Some(held) = self.held(request) else { return Err(Refusal::UnknownRequest(request)) };
        let carried = held.readers.remove(&from).map(|old| old.in_flight).unwrap_or_default();
        let reader = Reader {
            open,
            expecting: false,
            posted: 0,
            in_flight: carried,
            fencing: None,
            stopped: false,
            confirmed: false,
            path,
        };
        held.readers.insert(from, reader);
        let source = match direction {
            Direction::Pull => held.tables.clone(),
            Direction::Push => held.tables.shapes(),
        };
        let ready = held.ready;
        self.outbox.send(from, Message::Opened(OpenedFetch { handover, source, ready }));
        Ok(())
    }

    /// Posts every ready step that was not posted yet.
    pub(super) fn push_ready(&mut self, now: Moment, request: RequestId, to: NodeId) {
        let (Some(offer), Some(Ok(peer))) = (self.offers.get_mut(&request), self.peers.get(&to)) else { return };
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
            match peer.plan.program(&plan) {
                Ok(program) if program.units() == 0 => {}
                Ok(program) => {
                    let id = TransferId::of(reader.open.handover, self.local.rank, peer.profile.rank, step);
                    reader.in_flight.insert(id);
                    let (range, program) = (program.whole(), Arc::new(program));
                    let post = NicCommand::Post { id, node: to, direction: Direction::Push, program, range };
                    self.outbox.nic(peer.nic, post);
                }
                Err(error) => {
                    reader.stopped = true;
                    refusal = Some((reader.open.handover, Refusal::BadTables(error.to_string())));
                }
            }
        }
        if let Some((handover, refusal)) = refusal {
            self.outbox.send(to, Message::Refused { handover, refusal });
        }
        self.finish_closing(now, request);
    }

    pub(super) fn push_ended(&mut self, now: Moment, id: TransferId, end: Result<(), String>) {
        let Some((request, offer)) = self.offers.iter_mut().find(|(_, offer)| {
            offer.held.as_ref().is_some_and(|held| held.readers.values().any(|reader| reader.in_flight.contains(&id)))
        }) else {
            return;
        };
        let request = *request;
        let steps = offer.held.as_ref().map_or(0, |held| held.steps.len() as u32);
        let mut failed = None;
        for (node, reader) in offer.held.iter_mut().flat_map(|held| &mut held.readers) {
            // What is left of an earlier handover says nothing about this one.
            if reader.in_flight.remove(&id) && id.handover() == reader.open.handover {
                failed = end.as_ref().err().map(|reason| (*node, reason));
                reader.confirmed =
                    failed.is_none() && !reader.stopped && reader.posted == steps && reader.in_flight.is_empty();
            }
        }
        if let Some((node, reason)) = failed {
            self.fail_reader(request, node, reason);
        }
        self.finish_closing(now, request);
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
        for id in &reader.in_flight {
            self.outbox.nic(reader.path.0, NicCommand::Cancel { id: *id });
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
