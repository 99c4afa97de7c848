//! What one connection of a peer holds, and the records of transfers.

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Instant;

use kvferry_core::{End, PoolId, PoolLayout, Program, TransferId, UnitRange};
use kvferry_transport::{Direction, Evidence, Expected, Notice, PeerId, Pool, Stage, StagedShown};

use crate::address::KEY_BYTES;
use crate::frame::WriteRequest;
use crate::share::Share;
use crate::stream::{Flow, Key, Stream};

/// Transfers shorter than this stay on one stream.
const SPLIT_BYTES_MIN: u64 = 1 << 20;

/// A bound pool.
#[derive(Clone)]
pub(crate) struct Bound {
    pub(crate) pool: Pool,
    pub(crate) layout: Arc<PoolLayout>,
    pub(crate) token: u64,
    /// For a pool in a device's memory.
    pub(crate) stage: Option<Stage>,
}

/// The streams to one peer, opened by one of the two ends.
pub(crate) struct Connection {
    /// The peer's instance: all its connections fall with a fence.
    pub(crate) instance: [u8; KEY_BYTES],
    /// Empty until every stream is up.
    pub(crate) streams: Vec<Stream>,
    /// Admitted sockets of a connection that is not up.
    pub(crate) arriving: Vec<Option<TcpStream>>,
    /// Until when it must be up; `None` once it is.
    pub(crate) deadline: Option<Instant>,
    /// The tokens of its sockets.
    pub(crate) tokens: Vec<u64>,
    /// The acceptor's name for it: the initiator's instance and number.
    pub(crate) accepted_as: Option<([u8; KEY_BYTES], u64)>,
    next_tag: u64,
    next_stream: usize,
    /// What this side initiated, by tag.
    pub(crate) posts: BTreeMap<u64, TransferId>,
    /// Pulls that this side serves, by the peer's tag.
    pub(crate) reads: BTreeMap<u64, Serving>,
    /// Pushes that are arriving or held, by the peer's tag.
    pub(crate) writes: BTreeMap<u64, TransferId>,
    pub(crate) told: StagedShown,
}

impl Connection {
    pub(crate) fn new(instance: [u8; KEY_BYTES], streams: usize, deadline: Instant) -> Connection {
        Connection {
            instance,
            streams: Vec::new(),
            arriving: (0..streams).map(|_| None).collect(),
            deadline: Some(deadline),
            tokens: Vec::new(),
            accepted_as: None,
            next_tag: 1,
            next_stream: 0,
            posts: BTreeMap::new(),
            reads: BTreeMap::new(),
            writes: BTreeMap::new(),
            told: StagedShown::default(),
        }
    }

    pub(crate) fn is_up(&self) -> bool {
        self.deadline.is_none()
    }

    /// Takes an admitted socket; true when it was the last one.
    pub(crate) fn admit(&mut self, index: u16, socket: TcpStream) -> bool {
        if let Some(slot) = self.arriving.get_mut(usize::from(index)) {
            *slot = Some(socket);
        }
        if self.arriving.iter().any(Option::is_none) {
            return false;
        }
        self.streams = self.arriving.drain(..).flatten().map(Stream::new).collect();
        self.deadline = None;
        true
    }

    /// Between which addresses its streams run.
    pub(crate) fn evidence(&self) -> Evidence {
        let mut lanes: Vec<String> =
            self.streams.iter().filter_map(Stream::peer).map(|to| format!("tcp/{to}")).collect();
        lanes.dedup();
        let from = self
            .streams
            .first()
            .and_then(Stream::here)
            .map_or("an unknown address".to_owned(), |here| here.to_string());
        Evidence::connected(lanes)
            .seen(format!("connected streams: {}, the first from {from}", self.streams.len()))
            .unseen("zero-copy, for processors copy at both ends")
            .unseen("counters of a device")
    }

    pub(crate) fn new_tag(&mut self) -> u64 {
        let tag = self.next_tag;
        self.next_tag += 1;
        tag
    }

    /// The stream that carries the next transfer's request.
    pub(crate) fn new_base(&mut self) -> usize {
        let base = self.next_stream % self.streams.len().max(1);
        self.next_stream = base + 1;
        base
    }

    /// Reads and writes nothing more of a transfer.
    pub(crate) fn drop_transfer(&mut self, key: Key, outgoing: bool) {
        for stream in &mut self.streams {
            if outgoing {
                stream.remove_source(key);
            } else {
                stream.remove_sink(key);
            }
        }
    }
}

/// A pull that a peer asked for.
pub(crate) struct Serving {
    pub(crate) pool: PoolId,
    /// The stream that carried the request.
    pub(crate) base: usize,
    pub(crate) parts_left: usize,
    /// Bytes of the request, for the limit on what a peer makes this side hold.
    pub(crate) request_bytes: usize,
}

/// How far a posted transfer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Its connection is not up.
    Queued,
    /// A push that waits for the receiver's go.
    Announced,
    /// Bytes move.
    Moving,
}

/// A transfer that this side initiated.
pub(crate) struct Posted {
    pub(crate) peer: PeerId,
    pub(crate) tag: u64,
    pub(crate) base: usize,
    pub(crate) direction: Direction,
    pub(crate) phase: Phase,
    pub(crate) local: Bound,
    pub(crate) remote: crate::address::Keys,
    pub(crate) program: Arc<Program>,
    pub(crate) range: UnitRange,
    pub(crate) parts: Vec<UnitRange>,
    pub(crate) parts_left: usize,
    pub(crate) pieces: u64,
    pub(crate) notice: Option<Notice>,
    pub(crate) since: Instant,
}

impl Posted {
    pub(crate) fn key(&self) -> Key {
        (flow(self.direction), self.tag)
    }

    /// This side's memory of one part.
    pub(crate) fn share(&self, part: UnitRange) -> Share {
        let end = match self.direction {
            Direction::Pull => End::Destination,
            Direction::Push => End::Source,
        };
        self.local.share(&self.program, end, part)
    }
}

fn flow(direction: Direction) -> Flow {
    match direction {
        Direction::Pull => Flow::Pull,
        Direction::Push => Flow::Push,
    }
}

/// A push that this side expects.
pub(crate) struct Expectation {
    pub(crate) expected: Expected,
    pub(crate) local: Bound,
    pub(crate) fingerprint: u64,
    pub(crate) arriving: Option<Arriving>,
}

/// A push whose bytes are on their way here.
pub(crate) struct Arriving {
    pub(crate) peer: PeerId,
    pub(crate) tag: u64,
    pub(crate) base: usize,
    pub(crate) parts_left: usize,
    pub(crate) pieces: u64,
    pub(crate) notice: Option<Notice>,
    pub(crate) since: Instant,
}

/// A push that nobody expects yet.
pub(crate) struct Held {
    pub(crate) peer: PeerId,
    pub(crate) tag: u64,
    pub(crate) base: usize,
    pub(crate) request: WriteRequest,
    pub(crate) deadline: Instant,
}

/// Cuts a range into shares of nearly equal bytes, one a stream, if it is long enough to be worth it.
pub(crate) fn parts(program: &Program, range: UnitRange, streams: usize) -> Vec<UnitRange> {
    let total = program.bytes_in(range);
    if streams < 2 || total < SPLIT_BYTES_MIN {
        return vec![range];
    }
    if range == program.whole() {
        return program.split(u32::try_from(streams).unwrap_or(1));
    }
    let mut parts = Vec::with_capacity(streams);
    let mut start = range.start;
    for part in 1..streams as u128 {
        let target = u128::from(total) * part / streams as u128;
        let (mut low, mut high) = (start, range.end);
        while low < high {
            let middle = low + (high - low) / 2;
            if u128::from(program.bytes_in(UnitRange { start: range.start, end: middle })) < target {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        parts.push(UnitRange { start, end: low });
        start = low;
    }
    parts.push(UnitRange { start, end: range.end });
    parts
}
