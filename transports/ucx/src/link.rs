//! The endpoint to one peer transport, what goes out over it, and the sessions that share it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use kvferry_core::TransferId;
use kvferry_topology::Way;
use kvferry_transport::{Cursor, PeerId, StagedOut, StagedShown};

use crate::collecting::Supply;
use crate::cost::Costs;
use crate::depot::Depot;
use crate::endpoint::Endpoint;
use crate::inbox::{Flow, Key};
use crate::lanes::Lanes;
use crate::process::Process;
use crate::warming::Warmth;
use crate::wire::{Header, KEY_BYTES};

/// Chunks that may be on a link before its reader has to take some off.
pub(crate) const CREDITS: u32 = 8;
/// Messages that UCX may hold of one link.
pub(crate) const SENDS_MAX: usize = 64;
/// Numbers of sessions that are over which a link keeps.
pub(crate) const ENDED_MAX: usize = 1024;
/// Bytes of answers that may wait on one link: a peer that only asks and never takes anything off is dropped.
pub(crate) const ANSWER_BYTES_MAX: usize = 32 << 20;

/// An endpoint to a peer transport.
pub(crate) struct Link {
    pub(crate) instance: [u8; KEY_BYTES],
    /// UCX's address of the peer.
    pub(crate) worker: Vec<u8>,
    pub(crate) process: Option<Process>,
    pub(crate) endpoint: Endpoint,
    /// How many endpoints to that transport were made here before. UCX pairs two ends by it: where the peer has made fewer or more, one end
    /// outlives the other.
    pub(crate) number: u64,
    /// The number of the endpoint that the peer speaks over, once it has said so.
    pub(crate) theirs: Option<u64>,
    /// Known once it is wired.
    pub(crate) lanes: Option<Lanes>,
    /// What reading over them costs and what packing; as soon as one of the two has to be chosen.
    pub(crate) costs: Option<Costs>,
    /// Which way bytes went without passing a processor at the end that holds them, if they did.
    pub(crate) moved: Option<Way>,
    /// What the device's counters showed of that.
    pub(crate) proven: Option<String>,
    pub(crate) outgoing: Outgoing,
    pub(crate) sessions: BTreeSet<PeerId>,
    /// Chunks taken off since the peer was told.
    pub(crate) consumed: u32,
    /// Chunks that UCX is bringing by rendezvous: no more than the peer has credits for.
    pub(crate) receiving: u32,
    /// Where packed chunks for the peer lie, if it reads them.
    pub(crate) depot: Option<Depot>,
    /// The peer has asked for that when nobody stood who could answer.
    pub(crate) owes_staging: bool,
    /// Where the peer's packed chunks lie, if they are read here.
    pub(crate) supply: Option<Supply>,
    /// Chunks that are being read from there, and those whose read failed.
    pub(crate) collecting: u32,
    pub(crate) warmth: Warmth,
    /// Nobody uses it; it is kept until then, since an endpoint that is made anew while the peer still closes the old one is often reset.
    pub(crate) idle_until: Option<Instant>,
    /// What was told of the stage of a pool that moves over it.
    pub(crate) shown: StagedShown,
    /// Numbers of sessions that are over: chunks of them may still come, and free their places.
    pub(crate) ended: VecDeque<u64>,
}

impl Link {
    pub(crate) fn new(
        (instance, process): ([u8; KEY_BYTES], Option<Process>),
        worker: Vec<u8>,
        endpoint: Endpoint,
        number: u64,
    ) -> Link {
        Link {
            instance,
            worker,
            process,
            endpoint,
            number,
            theirs: None,
            lanes: None,
            costs: None,
            moved: None,
            proven: None,
            outgoing: Outgoing::default(),
            sessions: BTreeSet::new(),
            consumed: 0,
            receiving: 0,
            depot: None,
            owes_staging: false,
            supply: None,
            collecting: 0,
            warmth: Warmth::default(),
            idle_until: None,
            shown: StagedShown::default(),
            ended: VecDeque::new(),
        }
    }
}

/// A message that waits.
pub(crate) struct Message {
    pub(crate) bytes: Vec<u8>,
    /// It was caused by the peer: requests are bounded by whoever posts here.
    pub(crate) is_answer: bool,
}

/// What waits to go out over a link.
pub(crate) struct Outgoing {
    pub(crate) messages: VecDeque<Message>,
    pub(crate) answer_bytes: usize,
    /// Messages that UCX holds.
    pub(crate) in_flight: usize,
    /// Those of them that are chunks the peer has to fetch.
    pub(crate) offered: usize,
    pub(crate) credits: u32,
    pub(crate) sources: VecDeque<Source>,
    /// Transfers out of a device's memory.
    pub(crate) staged: StagedOut<(Key, PeerId)>,
}

impl Default for Outgoing {
    fn default() -> Self {
        Outgoing {
            messages: VecDeque::new(),
            answer_bytes: 0,
            in_flight: 0,
            offered: 0,
            credits: CREDITS,
            sources: VecDeque::new(),
            staged: StagedOut::default(),
        }
    }
}

impl Outgoing {
    pub(crate) fn message(&mut self, message: Message) {
        if message.is_answer {
            self.answer_bytes += message.bytes.len();
        }
        self.messages.push_back(message);
    }

    /// The next message to go out.
    pub(crate) fn next_message(&mut self) -> Option<Vec<u8>> {
        let message = self.messages.pop_front()?;
        if message.is_answer {
            self.answer_bytes = self.answer_bytes.saturating_sub(message.bytes.len());
        }
        Some(message.bytes)
    }

    /// Whether a turn would get anything out.
    pub(crate) fn can_send(&self) -> bool {
        (self.in_flight < SENDS_MAX && !self.messages.is_empty())
            || (self.may_send_chunk() && (!self.sources.is_empty() || self.staged.can_refill()))
            || self.staged.has_next()
    }

    /// Whether the link has a place for one more chunk, beside those that a device fills already: these are sent as soon as they are full, so that
    /// no peer keeps a slot of the stage.
    pub(crate) fn may_send_chunk(&self) -> bool {
        let ahead = self.staged.ahead().count();
        self.credits as usize > ahead && self.in_flight + ahead < SENDS_MAX
    }

    /// Whether no transfer goes out.
    pub(crate) fn is_idle(&self) -> bool {
        self.sources.is_empty() && self.staged.is_idle()
    }

    /// Whether bytes of a transfer are still to go out.
    pub(crate) fn sends(&self, of: PeerId, flow: Flow, tag: u64) -> bool {
        let is_it = |key: &Key, peer: PeerId| peer == of && key.tag == tag && key.flow == flow;
        self.sources.iter().any(|source| is_it(&source.key, source.peer))
            || self.staged.holds(|(key, peer)| is_it(key, *peer))
    }

    /// Reads no more bytes of a transfer.
    pub(crate) fn remove_source(&mut self, key: Key) {
        self.sources.retain(|source| source.key != key);
        self.staged.remove(|(of, _)| *of == key);
    }

    /// Reads no more bytes of a peer's transfers.
    pub(crate) fn remove_sources_of(&mut self, peer: PeerId) {
        self.sources.retain(|source| source.peer != peer);
        self.staged.remove(|(_, of)| *of == peer);
    }
}

/// A transfer on its way out in chunks.
pub(crate) struct Source {
    /// With the peer's number of the session.
    pub(crate) key: Key,
    pub(crate) peer: PeerId,
    /// None where there are no bytes.
    pub(crate) cursor: Option<Box<Cursor>>,
    pub(crate) left: u64,
    /// Chunks so far.
    pub(crate) number: u32,
}

impl Source {
    /// What heads the next chunk, if it is sent.
    pub(crate) fn header(&self) -> Header {
        self.key.header(self.number)
    }

    /// Contiguous pieces so far.
    pub(crate) fn pieces(&self) -> u64 {
        self.cursor.as_ref().map_or(0, |cursor| cursor.pieces())
    }

    /// Packs the next chunk, at most `room` bytes long: `put` takes its pieces, which lie in a live pool, in order, and says whether there was room.
    /// Says how long it is; `None` where the program gave fewer bytes than it should, or there was no room.
    pub(crate) fn pack(&mut self, room: usize, mut put: impl FnMut(*const u8, usize) -> bool) -> Option<usize> {
        let bytes = usize::try_from(self.left).map_or(room, |left| left.min(room));
        let mut wanted = bytes;
        self.left -= wanted as u64;
        self.number = self.number.wrapping_add(1);
        while wanted > 0 {
            let piece = self.cursor.as_mut()?.take(wanted)?;
            if !put(piece.at, piece.bytes) {
                return None;
            }
            wanted = wanted.saturating_sub(piece.bytes);
        }
        Some(bytes)
    }
}

/// What `connect` opened, here or at the peer.
pub(crate) struct Session {
    pub(crate) link: u64,
    /// What messages to this side carry.
    pub(crate) here: u64,
    /// What messages to the peer carry, once it has answered.
    pub(crate) there: Option<u64>,
    /// The peer's secret, where this side had its address.
    pub(crate) secret: Option<[u8; KEY_BYTES]>,
    /// Until when the peer must have answered, and their link be warm: none once `Connected` was told.
    pub(crate) deadline: Option<Instant>,
    next_tag: u64,
    /// What this side initiated, by tag.
    pub(crate) posts: BTreeMap<u64, TransferId>,
    /// Pulls that this side serves, by the peer's tag.
    pub(crate) reads: BTreeMap<u64, Serving>,
    /// Pushes that are arriving or held, by the peer's tag.
    pub(crate) writes: BTreeMap<u64, TransferId>,
    /// Tokens of pools whose keys the peer was given.
    pub(crate) lent: BTreeSet<u64>,
    /// Messages that come in parts, by tag: how many parts, and their bytes.
    pub(crate) parts: BTreeMap<u64, (u32, Vec<u8>)>,
    /// Bytes of all of them.
    pub(crate) parts_bytes: usize,
}

impl Session {
    pub(crate) fn new(link: u64, here: u64) -> Session {
        Session {
            link,
            here,
            there: None,
            secret: None,
            deadline: None,
            next_tag: 1,
            posts: BTreeMap::new(),
            reads: BTreeMap::new(),
            writes: BTreeMap::new(),
            lent: BTreeSet::new(),
            parts: BTreeMap::new(),
            parts_bytes: 0,
        }
    }

    /// Whether transfers may start.
    pub(crate) fn is_up(&self) -> bool {
        self.there.is_some() && self.deadline.is_none()
    }

    pub(crate) fn new_tag(&mut self) -> u64 {
        let tag = self.next_tag;
        self.next_tag += 1;
        tag
    }
}

/// A pull that a peer asked for.
pub(crate) struct Serving {
    pub(crate) pool: kvferry_core::PoolId,
    /// Bytes of the request, for the limit on what a peer makes this side hold.
    pub(crate) request_bytes: usize,
}
