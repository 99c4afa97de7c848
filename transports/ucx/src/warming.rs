//! What peers do when they join, so that their first transfer finds everything there: a chunk of no transfer goes each way, and each end reads
//! some of the other's memory where its lanes can. UCX chooses its protocols, and both have their buffers and keys, before `Connected` is told.

use std::rc::Rc;

use kvferry_core::{Plane, PoolId, PoolLayout};
use kvferry_transport::codec::{decode, encode};
use kvferry_transport::{Event, PeerId, Pool, PoolOptions, RemotePool};
use ucx_sys::{UCS_OK, ucs_status_t};

use crate::context::{Context, Mapped};
use crate::device::Access;
use crate::endpoint::{Operation, RemoteKeys};
use crate::request::Begun;
use crate::staging::Buffer;
use crate::transport::UcxTransport;
use crate::wire::{HEADER_BYTES, Header, Kind, RegionKey, WARMING_TAG, Warmed};

/// Bytes that peers read to try it: so many that no copy through UCX is worth it.
const SAMPLE_BYTES: usize = 64 << 10;

/// Memory that holds nothing, for peers to read when they join.
pub(crate) struct Sample {
    _mapped: Mapped,
    key: RegionKey,
}

impl Sample {
    pub(crate) fn new(context: &Rc<Context>) -> Result<Sample, String> {
        let bytes = SAMPLE_BYTES as u64;
        let plane = Plane { region: 0, offset: 0, blocks: 1, block_stride: bytes, block_bytes: bytes };
        let layout = PoolLayout { regions: vec![bytes], planes: vec![plane] };
        let options = PoolOptions { huge_pages: false, ..PoolOptions::default() };
        let pool = Pool::allocate_private(PoolId(u32::MAX), layout, &options).map_err(|error| error.to_string())?;
        let (mapped, keys) = Mapped::new(context, &pool)?;
        let base = pool.regions().first().map_or(0, |region| region.base() as u64);
        let key = RegionKey { base, bytes, rkey: keys.into_iter().next().unwrap_or_default() };
        Ok(Sample { _mapped: mapped, key })
    }
}

/// How far both ends of a link have come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Warmth {
    /// This end's chunk is on its way, or was.
    pub(crate) begun: bool,
    /// It was taken.
    pub(crate) taken: bool,
    /// The peer's has come, and all that it said of itself.
    heard: bool,
    /// It was asked where it puts packed chunks, and has not said so.
    pub(crate) asking: bool,
    /// Reads of the peer's sample that are under way.
    trying: u32,
}

impl Warmth {
    /// As the peer's next end finds it.
    pub(crate) fn anew(self) -> Warmth {
        Warmth { trying: self.trying, ..Warmth::default() }
    }

    /// Whether the peer's memory is being read.
    pub(crate) fn is_trying(self) -> bool {
        self.trying > 0
    }

    /// Whether a transfer would find nothing to wait for.
    pub(crate) fn is_whole(self) -> bool {
        self.begun && self.taken && self.heard && !self.asking && self.trying == 0
    }
}

impl UcxTransport {
    /// Sends one chunk of no transfer, which its receiver takes and forgets, and what the peer may read. Once a link, when its first session is up.
    pub(crate) fn warm_up(&mut self, peer: PeerId) {
        let Some(session) = self.sessions.get(&peer) else { return };
        let (Some(there), id) = (session.there, session.link) else { return };
        // What is sent, and what is received by rendezvous.
        let ways = if self.access == Access::TwoSided { 2 } else { 1 };
        self.staging.provide(ways * self.links.len());
        let Some(link) = self.links.get_mut(&id) else { return };
        if std::mem::replace(&mut link.warmth.begun, true) {
            // Unasked where nobody stood who could ask, and unanswered where nobody could answer.
            let (asks, owes) = (link.warmth.heard, std::mem::take(&mut link.owes_staging));
            if asks {
                self.ask_for_staging(id);
            }
            if owes && let Err(reason) = self.on_ask(id) {
                self.lose_link(id, &reason);
            }
            return;
        }
        let header = Header { kind: Kind::PushData, number: 0, session: there, tag: WARMING_TAG };
        let mut buffer = self.staging.buffer();
        // As long as chunks are: UCX's own buffers are touched, too.
        let body = vec![0; self.access.chunk_bytes_max() - HEADER_BYTES];
        if link.outgoing.credits > 0 && buffer.append(&header.encode()) && buffer.append(&body) {
            self.send_chunk(id, buffer);
        } else {
            link.warmth.taken = true;
        }
        let sample = self.sample.as_ref().map(|sample| sample.key.clone());
        self.say(peer, Kind::Warmed, 0, 0, &encode(&Warmed { sample }));
    }

    /// The peer's chunk is here, and what may be read of it.
    pub(crate) fn on_warmed(&mut self, id: u64, body: &[u8]) -> Result<(), String> {
        let warmed: Warmed = decode(body).map_err(|error| format!("what warms a link: {error}"))?;
        let Some(link) = self.links.get_mut(&id) else { return Ok(()) };
        if std::mem::replace(&mut link.warmth.heard, true) {
            return Ok(());
        }
        // It is wired by now: asked here, its lanes need not be asked for at the first transfer.
        if self.reads_memory(id)
            && let Some(sample) = warmed.sample
        {
            sample.check()?;
            self.try_read(id, &sample);
        }
        self.ask_for_staging(id);
        self.join(id);
        Ok(())
    }

    /// Reads the peer's sample into a buffer that is not looked at.
    fn try_read(&mut self, id: u64, sample: &RegionKey) {
        let mut buffer = self.staging.buffer();
        let bytes = SAMPLE_BYTES.min(usize::try_from(sample.bytes).unwrap_or(SAMPLE_BYTES));
        let Some(link) = self.links.get_mut(&id) else { return };
        let keys = match RemoteKeys::unpack(&link.endpoint, [sample.rkey.as_slice()].into_iter()) {
            Ok(keys) => Rc::new(keys),
            Err(reason) => return tracing::debug!(reason, "a read is not tried"),
        };
        let Some(to) = buffer.lay_open(bytes).filter(|_| bytes > 0) else { return };
        link.warmth.trying += 1;
        let memory = buffer.handle();
        let operation = Operation::Tried { link: id, buffer, _keys: keys.clone() };
        // SAFETY: the operation owns the buffer, which was laid open for so many bytes.
        let begun = unsafe { link.endpoint.read(operation, &keys, 0, sample.base, to, bytes, memory) };
        if let Begun::Over(operation, status) = begun {
            self.finished(operation, status);
        }
    }

    /// A read that was tried is over.
    pub(crate) fn tried(&mut self, id: u64, buffer: Buffer, status: ucs_status_t) {
        if status != UCS_OK {
            // It still counts as under way: a device that failed may write, until the worker is flushed behind the endpoint.
            self.receiving.doubt(id, buffer);
            let reason = format!("a read of the peer's memory failed: {}", self.context.library.words(status));
            return self.lose_link(id, &reason);
        }
        if let Some(link) = self.links.get_mut(&id) {
            link.warmth.trying = link.warmth.trying.saturating_sub(1);
        }
        self.join(id);
    }

    /// Tells of the sessions that have waited for their link to be warm.
    pub(crate) fn join(&mut self, id: u64) {
        let Some(link) = self.links.get(&id).filter(|link| link.warmth.is_whole()) else { return };
        let waits = |peer: &PeerId| self.sessions.get(peer).is_some_and(|s| s.there.is_some() && s.deadline.is_some());
        let waiting: Vec<PeerId> = link.sessions.iter().copied().filter(waits).collect();
        waiting.into_iter().for_each(|peer| self.connected(peer));
    }

    /// A session that was opened here is up.
    pub(crate) fn connected(&mut self, peer: PeerId) {
        let Some(session) = self.sessions.get_mut(&peer) else { return };
        session.deadline = None;
        self.events.push(Event::Connected { peer });
        self.show(peer);
        let remotes: Vec<RemotePool> = self.remotes.iter().filter(|(_, r)| r.peer == peer).map(|(id, _)| *id).collect();
        remotes.into_iter().for_each(|remote| self.unpack(remote));
        let queued: Vec<_> = self.posts.iter().filter(|(_, p)| p.peer == peer).map(|(id, _)| *id).collect();
        for id in queued {
            self.start(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use kvferry_transport::Transport;
    use kvferry_transport::conformance::block_planes;

    use super::*;
    use crate::proof::tests::open;

    fn is_connected(event: &Event) -> bool {
        matches!(event, Event::Connected { .. })
    }

    #[test]
    fn connected_is_told_when_nothing_is_left_to_wait_for() {
        let (Some(mut here), Some(mut there)) = (open(), open()) else { return };
        let layout = block_planes(1, 4, 64 << 10);
        let keys = there.bind(&Pool::allocate(PoolId(1), layout.clone(), "warm").unwrap()).unwrap();
        let peer = here.connect(&there.address()).unwrap();
        let remote = here.import(peer, &keys, &layout).unwrap();
        let (mut events, until) = (Vec::new(), Instant::now() + Duration::from_secs(20));
        while !events.iter().any(is_connected) && Instant::now() < until {
            assert!(!here.sessions.get(&peer).unwrap().is_up());
            here.poll(&mut events);
            there.poll(&mut Vec::new());
        }
        assert!(events.iter().any(is_connected), "{events:?}");
        let link = here.sessions.get(&peer).unwrap().link;
        assert!(here.links.get(&link).unwrap().warmth.is_whole() && here.sessions.get(&peer).unwrap().is_up());
        let reads = here.reads_memory(link);
        assert_eq!(
            here.remotes.get(&remote).unwrap().unpacked.is_some(),
            reads,
            "keys are unpacked where memory is read"
        );
    }

    /// It answered, and stands still with what was sent to it.
    #[test]
    fn a_peer_that_is_slow_to_warm_up_is_connected_all_the_same() {
        let (Some(mut here), Some(mut there)) = (open(), open()) else { return };
        let peer = here.connect(&there.address()).unwrap();
        let (mut events, until) = (Vec::new(), Instant::now() + Duration::from_secs(20));
        while !events.iter().any(is_connected) && Instant::now() < until {
            here.poll(&mut Vec::new());
            there.poll(&mut events);
        }
        let mut events = Vec::new();
        while here.sessions.get(&peer).unwrap().there.is_none() && Instant::now() < until {
            here.poll(&mut events);
        }
        (0..100).for_each(|_| here.poll(&mut events));
        assert!(!events.iter().any(is_connected), "its chunk was not taken: {events:?}");
        let now = Instant::now();
        here.sessions.get_mut(&peer).unwrap().deadline = Some(now);
        here.note_deadline(now);
        here.poll(&mut events);
        assert!(events.iter().any(is_connected), "{events:?}");
    }
}
