//! Pulls that peers ask for and pushes that they send. An `Err` is a breach of the protocol.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::{End, Program, UnitRange};
use kvferry_transport::{Event, PeerId, TransferError};

use crate::connection::{Arriving, Held, Serving};
use crate::frame::{Kind, ReadRequest, Refusal, WriteRequest, covered};
use crate::receiver::Sink;
use crate::stream::{Flow, Source};
use crate::transport::TcpTransport;
use kvferry_transport::codec::decode;

/// Pulls that a peer may have served at once.
const READS_MAX: usize = 4096;
/// Bytes of requests that a peer may make this side hold.
const REQUEST_BYTES_MAX: usize = 256 << 20;
/// Pushes that wait to be expected, over all peers.
const HELD_MAX: usize = 4096;

impl TcpTransport {
    pub(crate) fn on_read(&mut self, peer: PeerId, index: usize, tag: u64, payload: &[u8]) -> Result<(), String> {
        let (request, encoded): (ReadRequest, &[u8]) =
            postcard::take_from_bytes(payload).map_err(|error| format!("a read request: {error}"))?;
        let Some(connection) = self.connections.get_mut(&peer) else {
            return Ok(());
        };
        let range = covered(&request.parts, connection.streams.len())?;
        if connection.reads.contains_key(&tag) {
            return Err(format!("tag {tag} was used twice"));
        }
        let held: usize = connection.reads.values().map(|serving| serving.request_bytes).sum();
        if connection.reads.len() >= READS_MAX || held + payload.len() > REQUEST_BYTES_MAX {
            self.refuse(peer, index, tag, &Refusal::text("too many pulls at once; post fewer"));
            return Ok(());
        }
        let Some(bound) = self.pools.get(&request.pool).filter(|bound| bound.token == request.token).cloned() else {
            let words = format!("{} is not bound here under that token; import its present keys", request.pool);
            self.refuse(peer, index, tag, &Refusal::text(words));
            return Ok(());
        };
        let program = match Program::decode(encoded) {
            Ok(program) => program,
            Err(error) => return Err(format!("a read request's program: {error}")),
        };
        let here = program.fingerprint();
        let refusal = match program.validate(End::Source, &bound.layout) {
            Err(error) => Some(Refusal::text(error.to_string())),
            Ok(()) if here != request.fingerprint => Some(Refusal::Mismatch { here, there: request.fingerprint }),
            Ok(()) if range.end > program.units() => Some(Refusal::text("the range ends after the program")),
            Ok(()) => None,
        };
        if let Some(refusal) = refusal {
            self.refuse(peer, index, tag, &refusal);
            return Ok(());
        }
        let program = Arc::new(program);
        let serving =
            Serving { pool: request.pool, base: index, parts_left: request.parts.len(), request_bytes: payload.len() };
        let streams = connection.streams.len();
        connection.reads.insert(tag, serving);
        for (offset, (start, end)) in request.parts.into_iter().enumerate() {
            let part = UnitRange { start, end };
            let left = program.bytes_in(part);
            let share = bound.share(&program, End::Source, part);
            self.send_part(peer, (index + offset) % streams, Source { key: (Flow::Pull, tag), share, left });
        }
        Ok(())
    }

    pub(crate) fn on_write(&mut self, peer: PeerId, index: usize, tag: u64, payload: &[u8]) -> Result<(), String> {
        let request: WriteRequest = decode(payload).map_err(|error| format!("a write request: {error}"))?;
        let Some(connection) = self.connections.get_mut(&peer) else {
            return Ok(());
        };
        covered(&request.parts, connection.streams.len())?;
        if connection.writes.contains_key(&tag) {
            return Err(format!("tag {tag} was used twice"));
        }
        let id = request.id;
        if self.expected.contains_key(&id) {
            self.match_write(peer, index, tag, request);
            return Ok(());
        }
        if self.held.len() >= HELD_MAX || self.held.contains_key(&id) {
            let words =
                format!("{id} is not expected, and no more pushes can wait here; expect it before it is pushed");
            self.refuse(peer, index, tag, &Refusal::text(words));
            return Ok(());
        }
        connection.writes.insert(tag, id);
        let deadline = Instant::now() + Duration::from_millis(self.options.unexpected_wait_ms);
        self.held.insert(id, Held { peer, tag, base: index, request, deadline });
        self.note_deadline(deadline);
        Ok(())
    }

    /// Lets a push in that is expected, or refuses it.
    pub(crate) fn match_write(&mut self, peer: PeerId, index: usize, tag: u64, request: WriteRequest) {
        let id = request.id;
        let (Some(connection), Some(expectation)) = (self.connections.get_mut(&peer), self.expected.get_mut(&id))
        else {
            return;
        };
        connection.writes.remove(&tag);
        if expectation.arriving.is_some() {
            self.refuse(peer, index, tag, &Refusal::text(format!("{id} is arriving already")));
            return;
        }
        if (request.pool, request.token) != (expectation.expected.pool, expectation.local.token) {
            let words = format!("{id} is expected in another pool or under another token; import its present keys");
            self.refuse(peer, index, tag, &Refusal::text(words));
            return;
        }
        let (here, there) = (expectation.fingerprint, request.fingerprint);
        if here != there {
            self.expected.remove(&id);
            self.refuse(peer, index, tag, &Refusal::Mismatch { here, there });
            let error = TransferError::Mismatch { local: here, remote: there };
            self.events.push(Event::Failed { id, error });
            return;
        }
        let range = expectation.expected.range;
        if covered(&request.parts, connection.streams.len()) != Ok(range) {
            self.expected.remove(&id);
            let words = format!("units {}..{} of {id} are expected, others were pushed", range.start, range.end);
            self.refuse(peer, index, tag, &Refusal::text(words.clone()));
            self.events.push(Event::Failed { id, error: TransferError::Refused(words) });
            return;
        }
        let streams = connection.streams.len().max(1);
        for (offset, (start, end)) in request.parts.iter().enumerate() {
            let part = UnitRange { start: *start, end: *end };
            let (local, program) = (&expectation.local, &expectation.expected.program);
            let sink = Sink::new(local.share(program, End::Destination, part), program.bytes_in(part));
            if let Some(stream) = connection.streams.get_mut((index + offset) % streams) {
                stream.add_sink((Flow::Push, tag), sink);
            }
        }
        connection.writes.insert(tag, id);
        expectation.arriving = Some(Arriving {
            peer,
            tag,
            base: index,
            parts_left: request.parts.len(),
            pieces: 0,
            notice: request.notice,
            since: Instant::now(),
        });
        self.control(peer, index, Kind::Go, tag, &[]);
    }

    pub(crate) fn on_cancel(&mut self, peer: PeerId, tag: u64) {
        let Some(connection) = self.connections.get_mut(&peer) else {
            return;
        };
        if connection.reads.remove(&tag).is_some() {
            connection.drop_transfer((Flow::Pull, tag), true);
            return;
        }
        let Some(id) = connection.writes.remove(&tag) else {
            return;
        };
        connection.drop_transfer((Flow::Push, tag), false);
        if self.held.get(&id).is_some_and(|held| held.peer == peer && held.tag == tag) {
            self.held.remove(&id);
            return;
        }
        let of = |arriving: &Arriving| arriving.peer == peer && arriving.tag == tag;
        if self.expected.get(&id).and_then(|e| e.arriving.as_ref()).is_some_and(of)
            && let Some(expectation) = self.expected.remove(&id)
        {
            let error = TransferError::Refused("the sender cancelled it".to_owned());
            self.report(expectation.local.stage.as_slice(), Event::Failed { id, error });
        }
    }

    pub(crate) fn push_placed(&mut self, peer: PeerId, tag: u64, pieces: u64) {
        let Some(connection) = self.connections.get_mut(&peer) else {
            return;
        };
        let Some(id) = connection.writes.get(&tag).copied() else {
            return;
        };
        let Some(expectation) = self.expected.get_mut(&id) else {
            return;
        };
        let Some(arriving) = &mut expectation.arriving else {
            return;
        };
        arriving.pieces += pieces;
        arriving.parts_left = arriving.parts_left.saturating_sub(1);
        if arriving.parts_left > 0 {
            return;
        }
        let (pieces, notice, base, took) = (arriving.pieces, arriving.notice, arriving.base, arriving.since.elapsed());
        let bytes = expectation.expected.program.bytes_in(expectation.expected.range);
        connection.writes.remove(&tag);
        let stage = self.expected.remove(&id).and_then(|expectation| expectation.local.stage);
        self.control(peer, base, Kind::Ack, tag, &[]);
        if let Some(stage) = &stage {
            self.show_staged(peer, stage, bytes, took);
        }
        self.events.push(Event::Arrived { id, bytes, pieces });
        self.events.extend(notice.map(|notice| Event::Notice { notice }));
    }
}
