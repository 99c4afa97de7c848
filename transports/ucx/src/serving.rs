//! Bytes that go out in chunks: pulls that peers ask for, pushes that they let in.

use std::sync::Arc;

use kvferry_core::{End, Program, UnitRange};
use kvferry_transport::PeerId;
use kvferry_transport::codec::encode;

use crate::device::Access;
use crate::endpoint::Operation;
use crate::inbox::{Flow, Key};
use crate::link::{SENDS_MAX, Serving, Source};
use crate::request::Begun;
use crate::share::Share;
use crate::staging::Buffer;
use crate::transport::UcxTransport;
use crate::wire::{
    Header, Kind, MESSAGE_BYTES_MAX, Parcel, RENDEZVOUS_BYTES_MAX, Read, Refusal, decode_first, message,
};

impl Access {
    /// The longest chunk, with its header.
    pub(crate) fn chunk_bytes_max(self) -> usize {
        match self {
            Access::OneSided => MESSAGE_BYTES_MAX,
            Access::TwoSided => RENDEZVOUS_BYTES_MAX,
        }
    }

    /// Whether a chunk is offered for the peer to fetch.
    fn offers(self, chunk: &[u8]) -> bool {
        self == Access::TwoSided && chunk.len() > EAGER_BYTES_MAX
    }
}

/// Pulls that a peer may have served at once.
const READS_MAX: usize = 4096;
/// Chunks up to this long are sent even where longer ones are read: a device takes them in one packet or two, and a read is a round.
pub(crate) const PARCEL_BYTES_MIN: u64 = 8 << 10;
/// Chunks up to this long are not worth a rendezvous.
const EAGER_BYTES_MAX: usize = 32 << 10;
/// Bytes of requests that a peer may make this side hold.
const REQUEST_BYTES_MAX: usize = 256 << 20;

impl UcxTransport {
    /// A peer asks for bytes of a pool of ours.
    pub(crate) fn on_read(&mut self, peer: PeerId, tag: u64, body: &[u8]) -> Result<(), String> {
        let (read, encoded): (Read, &[u8]) = decode_first(body).map_err(|error| format!("a pull: {error}"))?;
        let Some(session) = self.sessions.get(&peer) else { return Ok(()) };
        if session.reads.contains_key(&tag) {
            return Err(format!("tag {tag} was used twice"));
        }
        let requests = self.beside(peer).flat_map(|session| session.reads.values());
        let held: usize = requests.map(|serving| serving.request_bytes).sum();
        if session.reads.len() >= READS_MAX || held + body.len() > REQUEST_BYTES_MAX {
            self.refuse(peer, tag, &Refusal::text("too many pulls at once; post fewer"));
            return Ok(());
        }
        let bound =
            self.pools.get(&read.pool).filter(|bound| bound.keys.token == read.token && bound.leaving.is_none());
        let Some(bound) = bound.cloned() else {
            let words = format!("{} is not bound here under that token; import its present keys", read.pool);
            self.refuse(peer, tag, &Refusal::text(words));
            return Ok(());
        };
        let program = Program::decode(encoded).map_err(|error| format!("a pull's program: {error}"))?;
        let here = program.fingerprint();
        let refusal = match program.validate(End::Source, &bound.layout) {
            Err(error) => Some(Refusal::text(error.to_string())),
            Ok(()) if here != read.fingerprint => Some(Refusal::Mismatch { here, there: read.fingerprint }),
            Ok(()) if read.start > read.end || read.end > program.units() => {
                Some(Refusal::text("the range is not one of the program"))
            }
            Ok(()) => None,
        };
        if let Some(refusal) = refusal {
            self.refuse(peer, tag, &refusal);
            return Ok(());
        }
        let Some(session) = self.sessions.get_mut(&peer) else { return Ok(()) };
        session.reads.insert(tag, Serving { pool: read.pool, request_bytes: body.len() });
        let range = UnitRange { start: read.start, end: read.end };
        let bytes = program.bytes_in(range);
        let share = bound.share(&Arc::new(program), End::Source, range);
        self.add_source(peer, Flow::Pull, tag, share, bytes);
        Ok(())
    }

    /// Queues a transfer's bytes; they go out in turn with those of others.
    pub(crate) fn add_source(&mut self, peer: PeerId, flow: Flow, tag: u64, share: Share, bytes: u64) {
        let Some(session) = self.sessions.get(&peer) else { return };
        let (Some(there), Some(link)) = (session.there, self.links.get_mut(&session.link)) else { return };
        let key = Key { session: there, flow, tag };
        self.watched = None;
        let cursor = match share {
            Share::Staged(staged) if bytes > 0 => return link.outgoing.staged.add((key, peer), staged, bytes),
            Share::Staged(_) => None,
            Share::Direct(cursor) => Some(cursor),
        };
        link.outgoing.sources.push_back(Source { key, peer, cursor, left: bytes, number: 0 });
    }

    /// Reads no more bytes of a transfer that goes out.
    pub(crate) fn stop_source(&mut self, peer: PeerId, flow: Flow, tag: u64) {
        let Some(session) = self.sessions.get(&peer) else { return };
        if let (Some(there), Some(link)) = (session.there, self.links.get_mut(&session.link)) {
            link.outgoing.remove_source(Key { session: there, flow, tag });
        }
    }

    /// Sends what waits to be said over a link, as far as UCX takes it.
    pub(crate) fn send_messages(&mut self, id: u64) {
        while let Some(link) = self.links.get_mut(&id)
            && link.outgoing.in_flight < SENDS_MAX
            && let Some(message) = link.outgoing.next_message()
        {
            link.outgoing.in_flight += 1;
            if let Begun::Over(operation, status) = link.endpoint.send(id, message.into(), false) {
                self.finished(operation, status);
            }
        }
    }

    /// Hands a chunk to UCX.
    pub(crate) fn send_chunk(&mut self, id: u64, buffer: Buffer) {
        let Some(link) = self.links.get_mut(&id) else { return };
        link.outgoing.credits = link.outgoing.credits.saturating_sub(1);
        link.outgoing.in_flight += 1;
        // What is short is there sooner than it could be fetched.
        let begun = if self.access.offers(&buffer) {
            link.outgoing.offered += 1;
            link.endpoint.offer(id, buffer)
        } else {
            link.endpoint.send(id, buffer, true)
        };
        if let Begun::Over(operation, status) = begun {
            self.finished(operation, status);
        }
    }

    /// Sends chunks over a link, up to about `budget` bytes; says how many. Those out of a device's memory and others take turns.
    pub(crate) fn send_chunks(&mut self, id: u64, budget: u64) -> u64 {
        let mut sent = 0;
        while sent < budget {
            let staged = self.send_staged(id);
            let packed = self.send_packed(id);
            if (staged, packed) == (None, None) {
                break;
            }
            sent += staged.unwrap_or(0) + packed.unwrap_or(0);
        }
        sent
    }

    /// Packs the next chunk and sends it; says how many bytes, none where there is nothing to send or no place for it.
    fn send_packed(&mut self, id: u64) -> Option<u64> {
        let link = self.links.get_mut(&id)?;
        if !link.outgoing.may_send_chunk() {
            return None;
        }
        let mut source = link.outgoing.sources.pop_front()?;
        let header = source.header();
        let worth_a_read = source.left > PARCEL_BYTES_MIN;
        let depot = link.depot.as_mut().filter(|_| worth_a_read);
        let packed = if let Some((depot, idle)) = depot.and_then(|depot| depot.idle().map(|idle| (depot, idle))) {
            let parcel = depot.load(idle, &mut source);
            parcel.map(|parcel| (named(header, parcel).into(), u64::from(parcel.bytes)))
        } else {
            pack_message(&mut source, header, self.access.chunk_bytes_max(), self.staging.buffer())
        };
        let Some((buffer, bytes)) = packed else {
            // Excluded by the program's validation.
            let words = "a program ended before its bytes";
            tracing::error!(words);
            self.lose_link(id, words);
            return None;
        };
        if source.left > 0 {
            link.outgoing.sources.push_back(source);
        } else {
            self.source_ended(source.peer, source.key, source.pieces());
        }
        self.send_chunk(id, buffer);
        Some(bytes)
    }

    /// All of a transfer was handed to UCX.
    pub(crate) fn source_ended(&mut self, peer: PeerId, key: Key, pieces: u64) {
        let Some(session) = self.sessions.get_mut(&peer) else { return };
        match key.flow {
            Flow::Pull => {
                session.reads.remove(&key.tag);
            }
            Flow::Push => {
                let id = session.posts.get(&key.tag);
                if let Some(posted) = id.and_then(|id| self.posts.get_mut(id)) {
                    posted.pieces = pieces;
                }
            }
        }
    }

    /// UCX is done with a message, or could not take it.
    pub(crate) fn sent(&mut self, operation: Operation) {
        let Operation::Sent { link, buffer, chunk } = operation else { return };
        if let Some(link) = self.links.get_mut(&link) {
            link.outgoing.in_flight = link.outgoing.in_flight.saturating_sub(1);
            if chunk && self.access.offers(&buffer) {
                link.outgoing.offered = link.outgoing.offered.saturating_sub(1);
            }
        }
    }
}

/// The message that names a chunk which lies in the staging of a link.
pub(crate) fn named(header: Header, parcel: Parcel) -> Vec<u8> {
    let kind = if header.kind == Kind::PullData { Kind::PullParcel } else { Kind::PushParcel };
    message(Header { kind, ..header }, &encode(&parcel))
}

/// A chunk behind its header, and how long both are; `None` where the program gave fewer bytes than it should.
fn pack_message(source: &mut Source, header: Header, bytes_max: usize, mut buffer: Buffer) -> Option<(Buffer, u64)> {
    if !buffer.append(&header.encode()) {
        return None;
    }
    let room = bytes_max.saturating_sub(buffer.len());
    // SAFETY: the piece lies in a live pool; the buffer is no memory of it.
    source.pack(room, |from, bytes| unsafe { buffer.append_from(from, bytes) })?;
    let bytes = buffer.len() as u64;
    Some((buffer, bytes))
}
