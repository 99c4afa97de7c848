//! Transfers: pieces within a window, or a program; a flush, what is confirmed, a notification, an answer.

use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvferry_core::TransferId;
use kvferry_ucx::raw::{RawEvent, RawMemory, RawPiece, RawRange};

use super::board::Places;
use super::{Driver, Reply, TURN, now, remote};
use crate::agent::Moved;
use crate::pieces::{Operation, Piece, joined};
use crate::{AgentError, MemoryKind, NOTIFICATION_BYTES_MAX, Notification, Range, Ticket, Transfer};

/// Pieces that are handed to UCX together, at most, and bytes of them but for the last: behind each such batch the clock is looked at.
const BATCH_PIECES: usize = 64;
const BATCH_BYTES: u64 = 512 << 10;
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
    pieces: Rc<Vec<Piece>>,
    /// The piece that is begun next.
    next: usize,
    /// Pieces and other operations of it that UCX holds.
    outstanding: usize,
    pub(super) stage: Stage,
    /// The program that kvferry's own device moves instead of pieces.
    ferried: Option<TransferId>,
    /// What the peer confirms behind the last byte, and where its answers come.
    pub(super) tickets: Vec<Ticket>,
    pub(super) places: Option<Places>,
    /// The lease among them.
    pub(super) lease: Option<Ticket>,
    /// Whatever was read is confirmed by then.
    confirmed: bool,
    /// Bytes and operations.
    moved: (u64, u64),
    notification: Option<Bytes>,
    started: Instant,
    pub(super) deadline: Instant,
    /// Why it will fail once nothing of it is in flight.
    doomed: Option<AgentError>,
    /// Its connection was closed: what is in flight comes to its end without a deadline's help.
    pub(super) cut: bool,
    reply: Reply<Moved>,
}

/// An operation that UCX holds.
pub(crate) struct Posted {
    /// Of which transfer.
    flight: u64,
    /// By which connection it went.
    connection: u64,
    /// For how many it counts.
    count: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Pieces are begun and come to their ends.
    Moving,
    /// All are begun; writes are to be visible at the peer.
    Flushing,
    /// The peer's tickets are read.
    Confirming,
    /// The peer is told.
    Notifying,
}

/// What every transfer begins with.
pub(super) struct Start {
    pub(super) peer: String,
    /// The lease that is to be confirmed, and registrations.
    pub(super) lease: Option<Ticket>,
    pub(super) tickets: Vec<Ticket>,
    /// Those are all that there is to confirm.
    pub(super) confirmed: bool,
    pub(super) notification: Option<Bytes>,
    pub(super) within: Option<Duration>,
}

impl Start {
    fn with(peer: String, notification: Option<Bytes>, within: Option<Duration>) -> Start {
        Start { peer, lease: None, tickets: Vec::new(), confirmed: false, notification, within }
    }
}

/// What is moved piece by piece.
struct Pieces {
    operation: Operation,
    flush: bool,
    memory: (MemoryKind, u64),
    local: Option<Rc<RawMemory>>,
    pieces: Vec<Piece>,
}

impl Pieces {
    fn none(flush: bool) -> Pieces {
        let memory = (MemoryKind::Dram, 0);
        Pieces { operation: Operation::Write, flush, memory, local: None, pieces: Vec::new() }
    }
}

impl Driver {
    pub(super) fn transfer(&mut self, transfer: Transfer, reply: Reply<Moved>) {
        if let Err(error) = self.check(&transfer) {
            return drop(reply.send(Err(error)));
        }
        let Transfer { peer, operation, pool, memory, pieces, lease, notification, within } = transfer;
        let local = self.pools.get(&pool).cloned();
        let Some(remote) = self.peers.get(&peer) else { return drop(reply.send(Err(remote::unknown(&peer)))) };
        let pieces = pieces.into_iter().filter(|piece| piece.bytes > 0).collect();
        // A key is of one range: what lies in two stays two.
        let mut known = remote.known(memory);
        let pieces = joined(pieces, |address, bytes| known.has(address, bytes));
        // What is written is nobody's to confirm.
        let (tickets, confirmed) = match operation {
            Operation::Read if memory.0 == MemoryKind::Dram => remote.tickets(&pieces),
            _ => (Vec::new(), false),
        };
        // Reads are here when they end; writes are there when a flush does.
        let flush = operation == Operation::Write && !pieces.is_empty();
        let start = Start { peer, lease, tickets, confirmed, notification, within };
        self.begin(start, Pieces { operation, flush, memory, local, pieces }, reply);
    }

    /// A flush comes to its end once the connection stands.
    pub(super) fn warm(&mut self, peer: String, within: Option<Duration>, reply: Reply<Moved>) {
        self.begin(Start::with(peer, None, within), Pieces::none(true), reply);
    }

    pub(super) fn notify(&mut self, peer: String, message: Bytes, within: Option<Duration>, reply: Reply<Moved>) {
        if let Err(error) = short_enough(Some(&message)) {
            return drop(reply.send(Err(error)));
        }
        self.begin(Start::with(peer, Some(message), within), Pieces::none(false), reply);
    }

    /// How long something may take.
    pub(super) fn limit(&self, within: Option<Duration>) -> Duration {
        within.unwrap_or(self.within).min(FOREVER)
    }

    /// Whether a lease can be confirmed, and a notification told.
    pub(super) fn check_start(
        &self,
        peer: &str,
        lease: Option<Ticket>,
        notification: Option<&Bytes>,
    ) -> Result<(), AgentError> {
        let remote = self.peers.get(peer).ok_or_else(|| remote::unknown(peer))?;
        short_enough(notification)?;
        match lease.and_then(|lease| remote.refuses(lease)) {
            Some(reason) => Err(AgentError::Peer { name: peer.to_owned(), reason }),
            None => Ok(()),
        }
    }

    /// Every piece lies in the pool, and in what the peer has told of.
    fn check(&self, transfer: &Transfer) -> Result<(), AgentError> {
        self.check_start(&transfer.peer, transfer.lease, transfer.notification.as_ref())?;
        if transfer.lease.is_some() && transfer.operation == Operation::Write {
            let reason = "a lease is of what is read; write without one, or push a program".to_owned();
            return Err(AgentError::Peer { name: transfer.peer.clone(), reason });
        }
        let remote = self.peers.get(&transfer.peer).ok_or_else(|| remote::unknown(&transfer.peer))?;
        let local = self.pools.get(&transfer.pool);
        let local = local.ok_or_else(|| AgentError::Pool(format!("{} is not registered", transfer.pool)))?;
        let mut known = remote.known(transfer.memory);
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
            if bytes > 0 && !known.has(address, bytes) {
                let ((kind, device), peer) = (transfer.memory, &transfer.peer);
                return wrong(format!(
                    "{bytes} bytes at {address:#x} of {kind} {device} are in no range that {peer:?} has told of; add its newer metadata"
                ));
            }
        }
        Ok(())
    }

    fn begin(&mut self, start: Start, pieces: Pieces, reply: Reply<Moved>) {
        if let Err(error) = self.connect(&start.peer) {
            return drop(reply.send(Err(error)));
        }
        let (id, peer) = (self.number(), start.peer.clone());
        let flight = self.flight(start, pieces, reply);
        self.flights.insert(id, flight);
        if let Some(remote) = self.peers.get_mut(&peer) {
            remote.waiting.push_back(id);
        }
        self.pump(&peer);
    }

    /// A transfer of this number that kvferry's own device has.
    pub(super) fn begin_ferried(&mut self, id: u64, transfer: TransferId, start: Start, reply: Reply<Moved>) {
        let flight = self.flight(start, Pieces::none(false), reply);
        self.flights.insert(id, Flight { ferried: Some(transfer), outstanding: 1, ..flight });
    }

    fn flight(&self, start: Start, pieces: Pieces, reply: Reply<Moved>) -> Flight {
        let Start { peer, lease, mut tickets, confirmed, notification, within } = start;
        let Pieces { operation, flush, memory, local, pieces } = pieces;
        tickets.extend(lease);
        let bytes = pieces.iter().map(|piece| piece.bytes).sum();
        let started = now();
        Flight {
            peer,
            operation,
            flush,
            memory,
            local,
            moved: (bytes, pieces.len() as u64),
            pieces: Rc::new(pieces),
            next: 0,
            outstanding: 0,
            stage: Stage::Moving,
            ferried: None,
            // Whether or not registrations are all known: of a lease, this is the owner's word.
            confirmed: (confirmed || lease.is_some()) && !tickets.is_empty(),
            tickets,
            places: None,
            lease,
            notification,
            started,
            deadline: started + self.limit(within),
            doomed: None,
            cut: false,
            reply,
        }
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
            let Some(first) = flight.pieces.get(flight.next).copied() else { break };
            let Some(local) = flight.local.clone() else { break };
            let (way, memory) = (flight.operation.way(), flight.memory);
            let Some(remote) = self.peers.get_mut(peer) else { return true };
            let in_flight = remote.link.as_ref().map_or(0, |link| link.in_flight);
            let room = self.in_flight_max.saturating_sub(in_flight).min(BATCH_PIECES);
            if room == 0 {
                return false;
            }
            let (key, range) = match remote.key(memory, first.address, first.bytes) {
                Ok(found) => found,
                Err(reason) => {
                    let piece = flight.next;
                    self.doom(id, AgentError::Piece { piece, reason });
                    return true;
                }
            };
            let (from, pieces) = (flight.next, flight.pieces.clone());
            let batch = pieces.get(from..).unwrap_or_default();
            let batch = batch.get(..together(batch, room, &range)).unwrap_or_default();
            flight.next += batch.len();
            let copies = batch.iter().map(|piece| RawPiece {
                range: RawRange { region: piece.region, offset: piece.offset, bytes: piece.bytes },
                address: piece.address,
            });
            self.post(id, batch.len(), |link, number| link.raw.copy(number, way, (&local, &key), copies));
            // UCX copies within the call where it can, and sends there in any case: what comes in, other peers, commands and deadlines have their turn, too.
            if now() >= until {
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
                if self.post(id, 1, |link, number| link.raw.flush(number)) {
                    self.after_pieces(id);
                }
            }
            Stage::Moving | Stage::Flushing if flight.outstanding == 0 => {
                if flight.tickets.is_empty() {
                    return self.tell(id);
                }
                flight.stage = Stage::Confirming;
                self.confirm(id);
            }
            Stage::Confirming if flight.outstanding == 0 => self.judge(id),
            Stage::Notifying if flight.outstanding == 0 => self.finish(id),
            _ => {}
        }
    }

    /// Everything is there: the peer is told, where it is to be.
    pub(super) fn tell(&mut self, id: u64) {
        let Some(flight) = self.flights.get_mut(&id) else { return };
        if flight.reply.is_closed() {
            return self.doom(id, AgentError::Gone);
        }
        let Some(message) = flight.notification.take() else { return self.finish(id) };
        flight.stage = Stage::Notifying;
        let body = Notification { from: self.name.clone(), message }.encode();
        if self.post(id, 1, |link, number| link.raw.send(number, body)) {
            self.finish(id);
        }
    }

    /// kvferry's own device is done with a transfer.
    pub(super) fn ferried_flight(&mut self, id: u64, result: Result<(u64, u64), String>) {
        let Some(flight) = self.flights.get_mut(&id) else { return };
        (flight.ferried, flight.outstanding) = (None, 0);
        match result {
            Ok(moved) if flight.doomed.is_none() => {
                flight.moved = moved;
                self.after_pieces(id);
            }
            Ok(_) => self.finish(id),
            Err(reason) => {
                let error = AgentError::Failed { name: flight.peer.clone(), reason };
                self.doom(id, error);
            }
        }
    }

    /// Has kvferry's own device stop a transfer, if it has one.
    pub(super) fn stop_ferried(&mut self, id: u64) {
        let transfer = self.flights.get(&id).and_then(|flight| flight.ferried);
        let ended = transfer.zip(self.ferry.as_mut()).and_then(|(transfer, ferry)| ferry.stop(transfer));
        if let Some(id) = ended {
            self.ferried_flight(id, Err("it was stopped before it began".to_owned()));
        }
    }

    /// Begins an operation of a transfer, which counts as so many. True when it is over already, and well; what fails at once is looked at with
    /// what else happened.
    pub(super) fn post(
        &mut self,
        id: u64,
        count: usize,
        call: impl FnOnce(&remote::Link, u64) -> Option<RawEvent>,
    ) -> bool {
        let number = self.number();
        let Some(flight) = self.flights.get_mut(&id) else { return false };
        let Some(remote) = self.peers.get_mut(&flight.peer) else { return false };
        let Some(link) = &mut remote.link else { return false };
        let begun = call(link, number);
        if matches!(begun, Some(RawEvent::Done { result: Ok(()), .. })) {
            return true;
        }
        flight.outstanding += count;
        link.in_flight += count;
        self.operations.insert(number, Posted { flight: id, connection: link.number, count });
        self.at_once.extend(begun);
        false
    }

    /// UCX is done with an operation.
    pub(super) fn operation_ended(&mut self, number: u64, result: Result<(), String>) {
        let Some(Posted { flight: id, connection, count }) = self.operations.remove(&number) else { return };
        let Some(flight) = self.flights.get_mut(&id) else { return };
        flight.outstanding = flight.outstanding.saturating_sub(count);
        let peer = flight.peer.clone();
        if let Err(reason) = result {
            flight.doomed.get_or_insert(AgentError::Failed { name: peer.clone(), reason });
        }
        let (doomed, all_begun) = (flight.doomed.is_some(), flight.next >= flight.pieces.len());
        // Unless that connection is closed, and another one has a window of its own.
        let link = self.peers.get_mut(&peer).and_then(|remote| remote.link.as_mut());
        if let Some(link) = link.filter(|link| link.number == connection) {
            link.in_flight = link.in_flight.saturating_sub(count);
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
        if let Some(places) = flight.places {
            self.board.release(places);
        }
        let answer = match flight.doomed {
            Some(error) => Err(error),
            None => Ok(Moved {
                bytes: flight.moved.0,
                operations: flight.moved.1,
                took: now().saturating_duration_since(flight.started),
                confirmed: flight.confirmed,
            }),
        };
        let _nobody_waits = flight.reply.send(answer);
    }

    /// Transfers whose time is up. What is in flight can be ended only with its connection.
    pub(super) fn expire(&mut self, now: Instant) {
        let dropped = |flight: &Flight| flight.ferried.is_some() && flight.doomed.is_none() && flight.reply.is_closed();
        let given_up = self.flights.iter().filter(|(_, flight)| dropped(flight)).map(|(id, _)| *id);
        for id in given_up.collect::<Vec<_>>() {
            self.doom(id, AgentError::Gone);
            self.stop_ferried(id);
        }
        let late = |flight: &Flight| flight.deadline <= now && !flight.cut;
        while let Some((id, flight)) = self.flights.iter().find(|(_, flight)| late(flight)) {
            let (id, name, outstanding) = (*id, flight.peer.clone(), flight.outstanding);
            let waited_ms = now.saturating_duration_since(flight.started).as_millis() as u64;
            let ferried = flight.ferried.is_some();
            self.doom(id, AgentError::Deadline { name: name.clone(), waited_ms });
            if outstanding > 0 {
                if let Some(flight) = self.flights.get_mut(&id) {
                    flight.cut = true;
                }
                if ferried {
                    self.stop_ferried(id);
                    continue;
                }
                let reason = "another transfer ran out of time, which closed the connection".to_owned();
                self.disconnect(&name, &AgentError::Failed { name: name.clone(), reason });
            }
        }
    }
}

/// How many of the first pieces are handed to UCX together: they have one key, and leave time for others.
fn together(pieces: &[Piece], room: usize, range: &Range) -> usize {
    let mut bytes = 0;
    let fits = |piece: &&Piece| {
        let before = bytes;
        bytes += piece.bytes;
        before < BATCH_BYTES && range.holds(range.device, piece.address, piece.bytes)
    };
    pieces.iter().take(room).take_while(fits).count()
}

/// Agents of ours take no longer notifications.
fn short_enough(message: Option<&Bytes>) -> Result<(), AgentError> {
    match message.map(Bytes::len).filter(|bytes| *bytes > NOTIFICATION_BYTES_MAX) {
        Some(bytes) => Err(AgentError::Notification { bytes, max: NOTIFICATION_BYTES_MAX }),
        None => Ok(()),
    }
}
