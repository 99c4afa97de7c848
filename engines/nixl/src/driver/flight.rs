//! Transfers: pieces within a window, a flush, a notification, an answer.

use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvferry_ucx::raw::{RawEvent, RawMemory, RawRange};

use super::{Driver, Reply, TURN, now, remote};
use crate::agent::Moved;
use crate::pieces::{Operation, Piece, joined};
use crate::{AgentError, MemoryKind, NOTIFICATION_BYTES_MAX, Notification, Transfer};

/// Nobody waits longer; what is added to a moment must not leave the clock.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 86_400);

/// A transfer that is under way.
pub(crate) struct Flight {
    pub(super) peer: String,
    operation: Operation,
    /// What was begun is flushed before the peer is told.
    flush: bool,
    memory: (MemoryKind, u64),
    local: Option<Rc<RawMemory>>,
    pieces: Vec<Piece>,
    /// The piece that is begun next.
    next: usize,
    /// Operations of it that UCX holds.
    outstanding: usize,
    stage: Stage,
    notification: Option<Bytes>,
    started: Instant,
    pub(super) deadline: Instant,
    /// Why it will fail once nothing of it is in flight.
    doomed: Option<AgentError>,
    /// Its connection was closed: what is in flight comes to its end without a deadline's help.
    pub(super) cut: bool,
    reply: Reply<Moved>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Pieces are begun and come to their ends.
    Moving,
    /// All are begun; writes are to be visible at the peer.
    Flushing,
    /// The peer is told.
    Notifying,
}

impl Driver {
    pub(super) fn transfer(&mut self, transfer: Transfer, reply: Reply<Moved>) {
        if let Err(error) = self.check(&transfer) {
            return drop(reply.send(Err(error)));
        }
        let Transfer { peer, operation, pool, memory, pieces, notification, within } = transfer;
        let local = self.pools.get(&pool).cloned();
        let Some(remote) = self.peers.get(&peer) else { return drop(reply.send(Err(remote::unknown(&peer)))) };
        let pieces = pieces.into_iter().filter(|piece| piece.bytes > 0).collect();
        // A key is of one range: what lies in two stays two.
        let pieces = joined(pieces, |address, bytes| remote.has(memory, address, bytes));
        // Reads are here when they end; writes are there when a flush does.
        let flush = operation == Operation::Write && !pieces.is_empty();
        self.begin(peer, (operation, flush), (memory, local, pieces), notification, within, reply);
    }

    /// A flush comes to its end once the connection stands.
    pub(super) fn warm(&mut self, peer: String, within: Option<Duration>, reply: Reply<Moved>) {
        let nothing = ((MemoryKind::Dram, 0), None, Vec::new());
        self.begin(peer, (Operation::Write, true), nothing, None, within, reply);
    }

    pub(super) fn notify(&mut self, peer: String, message: Bytes, within: Option<Duration>, reply: Reply<Moved>) {
        if let Err(error) = short_enough(Some(&message)) {
            return drop(reply.send(Err(error)));
        }
        let nothing = ((MemoryKind::Dram, 0), None, Vec::new());
        self.begin(peer, (Operation::Write, false), nothing, Some(message), within, reply);
    }

    /// Every piece lies in the pool, and in what the peer has told of.
    fn check(&self, transfer: &Transfer) -> Result<(), AgentError> {
        let remote = self.peers.get(&transfer.peer).ok_or_else(|| remote::unknown(&transfer.peer))?;
        let local = self.pools.get(&transfer.pool);
        let local = local.ok_or_else(|| AgentError::Pool(format!("{} is not registered", transfer.pool)))?;
        short_enough(transfer.notification.as_ref())?;
        for (number, piece) in transfer.pieces.iter().enumerate() {
            let wrong = |reason: String| Err(AgentError::Piece { piece: number, reason });
            let Piece { region: index, offset, address, bytes } = *piece;
            let region = local.pool().regions().get(index).map_or(0, |region| region.bytes());
            if offset.checked_add(bytes).is_none_or(|end| end > region) {
                let pool = transfer.pool;
                return wrong(format!(
                    "{bytes} bytes at {offset} of region {index} are outside {pool}: it has {region}"
                ));
            }
            if bytes > 0 && !remote.has(transfer.memory, address, bytes) {
                let ((kind, device), peer) = (transfer.memory, &transfer.peer);
                return wrong(format!(
                    "{bytes} bytes at {address:#x} of {kind} {device} are in no range that {peer:?} has told of; add its newer metadata"
                ));
            }
        }
        Ok(())
    }

    fn begin(
        &mut self,
        peer: String,
        (operation, flush): (Operation, bool),
        (memory, local, pieces): ((MemoryKind, u64), Option<Rc<RawMemory>>, Vec<Piece>),
        notification: Option<Bytes>,
        within: Option<Duration>,
        reply: Reply<Moved>,
    ) {
        if let Err(error) = self.connect(&peer) {
            return drop(reply.send(Err(error)));
        }
        let (id, started) = (self.number(), now());
        let deadline = started + within.unwrap_or(self.within).min(FOREVER);
        let flight = Flight {
            peer: peer.clone(),
            operation,
            flush,
            memory,
            local,
            pieces,
            next: 0,
            outstanding: 0,
            stage: Stage::Moving,
            notification,
            started,
            deadline,
            doomed: None,
            cut: false,
            reply,
        };
        self.flights.insert(id, flight);
        if let Some(remote) = self.peers.get_mut(&peer) {
            remote.waiting.push_back(id);
        }
        self.pump(&peer);
    }

    /// Begins what there is room for, oldest transfer first.
    pub(super) fn pump(&mut self, peer: &str) {
        while let Some(id) = self.peers.get(peer).and_then(|remote| remote.waiting.front().copied()) {
            if !self.advance(peer, id) {
                return;
            }
            if let Some(remote) = self.peers.get_mut(peer) {
                remote.waiting.retain(|waiting| *waiting != id);
            }
        }
    }

    /// Says whether the next transfer may be begun: this one has nothing left to begin.
    fn advance(&mut self, peer: &str, id: u64) -> bool {
        let until = now() + TURN;
        while let Some(flight) = self.flights.get_mut(&id) {
            // Nobody waits for it any more: what was begun comes to its end, the rest is not begun.
            if flight.reply.is_closed() {
                flight.doomed.get_or_insert(AgentError::Gone);
            }
            if flight.doomed.is_some() {
                self.finish(id);
                return true;
            }
            let Some(piece) = flight.pieces.get(flight.next).copied() else { break };
            let Some(local) = flight.local.clone() else { break };
            let (operation, memory) = (flight.operation, flight.memory);
            let Some(remote) = self.peers.get_mut(peer) else { return true };
            if remote.link.as_ref().is_some_and(|link| link.in_flight >= self.in_flight_max) {
                return false;
            }
            let key = match remote.key(memory, piece.address, piece.bytes) {
                Ok(key) => key,
                Err(reason) => {
                    let piece = flight.next;
                    self.doom(id, AgentError::Piece { piece, reason });
                    return true;
                }
            };
            flight.next += 1;
            let range = RawRange { region: piece.region, offset: piece.offset, bytes: piece.bytes };
            let over = self.post(id, |link, number| match operation {
                Operation::Read => link.raw.read(number, &local, range, (piece.address, &key)),
                Operation::Write => link.raw.write(number, &local, range, (piece.address, &key)),
            });
            // UCX copies within the call where it can: other peers, commands and deadlines have their turn, too.
            if over && now() >= until {
                self.resume.insert(peer.to_owned());
                return false;
            }
        }
        self.after_pieces(id);
        true
    }

    /// All pieces are begun: writes are flushed, reads come to their ends, then the peer is told.
    fn after_pieces(&mut self, id: u64) {
        let Some(flight) = self.flights.get_mut(&id) else { return };
        // Nobody waits for it any more: the peer is not told.
        if flight.stage != Stage::Notifying && flight.reply.is_closed() {
            return self.doom(id, AgentError::Gone);
        }
        match flight.stage {
            Stage::Moving if flight.flush => {
                flight.stage = Stage::Flushing;
                if self.post(id, |link, number| link.raw.flush(number)) {
                    self.after_pieces(id);
                }
            }
            Stage::Moving | Stage::Flushing if flight.outstanding == 0 => match flight.notification.take() {
                Some(message) => {
                    flight.stage = Stage::Notifying;
                    let body = Notification { from: self.name.clone(), message }.encode();
                    if self.post(id, |link, number| link.raw.send(number, body)) {
                        self.after_pieces(id);
                    }
                }
                None => self.finish(id),
            },
            Stage::Notifying if flight.outstanding == 0 => self.finish(id),
            _ => {}
        }
    }

    /// Begins an operation of a transfer. True when it is over already, and well; what fails at once is looked at with what else happened.
    fn post(&mut self, id: u64, call: impl FnOnce(&remote::Link, u64) -> Option<RawEvent>) -> bool {
        let number = self.number();
        let Some(flight) = self.flights.get_mut(&id) else { return false };
        let Some(remote) = self.peers.get_mut(&flight.peer) else { return false };
        let Some(link) = &mut remote.link else { return false };
        let begun = call(link, number);
        if matches!(begun, Some(RawEvent::Done { result: Ok(()), .. })) {
            return true;
        }
        flight.outstanding += 1;
        link.in_flight += 1;
        self.operations.insert(number, (id, link.number));
        self.at_once.extend(begun);
        false
    }

    /// UCX is done with an operation.
    pub(super) fn operation_ended(&mut self, number: u64, result: Result<(), String>) {
        let Some((id, connection)) = self.operations.remove(&number) else { return };
        let Some(flight) = self.flights.get_mut(&id) else { return };
        flight.outstanding = flight.outstanding.saturating_sub(1);
        let peer = flight.peer.clone();
        if let Err(reason) = result {
            flight.doomed.get_or_insert(AgentError::Failed { name: peer.clone(), reason });
        }
        let (doomed, all_begun) = (flight.doomed.is_some(), flight.next >= flight.pieces.len());
        // Unless that connection is closed, and another one has a window of its own.
        let link = self.peers.get_mut(&peer).and_then(|remote| remote.link.as_mut());
        if let Some(link) = link.filter(|link| link.number == connection) {
            link.in_flight = link.in_flight.saturating_sub(1);
        }
        if doomed {
            self.finish(id);
        } else if all_begun {
            self.after_pieces(id);
        }
        self.pump(&peer);
    }

    /// It will fail with this error, unless it fails with another already.
    pub(super) fn doom(&mut self, id: u64, error: AgentError) {
        if let Some(flight) = self.flights.get_mut(&id) {
            flight.doomed.get_or_insert(error);
        }
        self.finish(id);
    }

    /// Answers, if nothing of it is in flight.
    fn finish(&mut self, id: u64) {
        if self.flights.get(&id).is_none_or(|flight| flight.outstanding > 0) {
            return;
        }
        let Some(flight) = self.flights.remove(&id) else { return };
        if let Some(remote) = self.peers.get_mut(&flight.peer) {
            remote.waiting.retain(|waiting| *waiting != id);
        }
        self.let_go(id);
        let answer = match flight.doomed {
            Some(error) => Err(error),
            None => Ok(Moved {
                bytes: flight.pieces.iter().map(|piece| piece.bytes).sum(),
                operations: flight.pieces.len() as u64,
                took: now().saturating_duration_since(flight.started),
            }),
        };
        let _nobody_waits = flight.reply.send(answer);
    }

    /// Transfers whose time is up. What is in flight can be ended only with its connection.
    pub(super) fn expire(&mut self, now: Instant) {
        let late = |flight: &Flight| flight.deadline <= now && !flight.cut;
        while let Some((id, flight)) = self.flights.iter().find(|(_, flight)| late(flight)) {
            let (id, name, outstanding) = (*id, flight.peer.clone(), flight.outstanding);
            let waited_ms = now.saturating_duration_since(flight.started).as_millis() as u64;
            self.doom(id, AgentError::Deadline { name: name.clone(), waited_ms });
            if outstanding > 0 {
                if let Some(flight) = self.flights.get_mut(&id) {
                    flight.cut = true;
                }
                let reason = "another transfer ran out of time, which closed the connection".to_owned();
                self.disconnect(&name, &AgentError::Failed { name: name.clone(), reason });
            }
        }
    }
}

/// Agents of ours take no longer notifications.
fn short_enough(message: Option<&Bytes>) -> Result<(), AgentError> {
    match message.map(Bytes::len).filter(|bytes| *bytes > NOTIFICATION_BYTES_MAX) {
        Some(bytes) => Err(AgentError::Notification { bytes, max: NOTIFICATION_BYTES_MAX }),
        None => Ok(()),
    }
}
