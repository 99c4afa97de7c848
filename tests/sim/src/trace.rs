//! What happened, as one number, and the last of it in words.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;

use kvferry_core::protocol::{EngineCall, EngineEvent, Event};

/// Records that are kept.
const RECENT_MAX: usize = 64;

/// What kind of thing happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Tag {
    /// A timer ran out: node.
    Tick,
    /// A link was dialed: node.
    Dial,
    /// A control frame arrived: link, length, hash.
    Frame,
    /// A link closed: link.
    Closed,
    /// The fabric moved: its digest.
    Fabric,
    /// A NIC reported: node.
    Pump,
    /// An engine worked: node.
    Engine,
    /// Something that the chronicle has: node and epoch, what, about whom.
    Observed,
    /// A node stopped running for a while: node.
    Pause,
    /// It runs again: node.
    Resume,
}

/// One thing that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Nanoseconds.
    pub at: u64,
    /// What.
    pub tag: Tag,
    /// The rest, by tag.
    pub words: [u64; 3],
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c] = self.words;
        write!(f, "{}.{:09} {:?} {a} {b:#x} {c:#x}", self.at / 1_000_000_000, self.at % 1_000_000_000, self.tag)
    }
}

/// Records between two checkpoints.
pub const CHECKPOINT_EVERY: u64 = 1024;

/// A running hash of all records, and what it was after every so many.
#[derive(Clone, Debug)]
pub struct Trace {
    hash: u64,
    records: u64,
    recent: VecDeque<Record>,
    checkpoints: Vec<u64>,
    /// Numbers of records that are kept in full.
    kept: Range<u64>,
    text: Vec<Record>,
}

impl Default for Trace {
    fn default() -> Self {
        Trace {
            hash: 0xcbf2_9ce4_8422_2325,
            records: 0,
            recent: VecDeque::with_capacity(RECENT_MAX),
            checkpoints: Vec::new(),
            kept: 0..0,
            text: Vec::new(),
        }
    }
}

impl Trace {
    /// Takes a record in.
    pub fn put(&mut self, at: u64, tag: Tag, words: [u64; 3]) {
        for word in [at, tag as u64].into_iter().chain(words) {
            self.hash = mix(self.hash, word);
        }
        if self.kept.contains(&self.records) {
            self.text.push(Record { at, tag, words });
        }
        self.records += 1;
        if self.records.is_multiple_of(CHECKPOINT_EVERY) {
            self.checkpoints.push(self.hash);
        }
        if self.recent.len() == RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(Record { at, tag, words });
    }

    /// The hash so far.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// Records so far.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// The hash after every [`CHECKPOINT_EVERY`] records.
    pub fn checkpoints(&self) -> &[u64] {
        &self.checkpoints
    }

    /// Keeps the records with these numbers in full from now on.
    pub fn keep(&mut self, numbers: Range<u64>) {
        self.kept = numbers;
    }

    /// The records that were kept.
    pub fn text(&self) -> &[Record] {
        &self.text
    }

    /// The last records, oldest first.
    pub fn recent(&self) -> impl Iterator<Item = &Record> {
        self.recent.iter()
    }
}

/// A hash of bytes, eight at a time.
pub(crate) fn hash_bytes(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let hash = words.iter().fold(bytes.len() as u64, |hash, word| mix(hash, u64::from_le_bytes(*word)));
    rest.iter().fold(hash, |hash, byte| mix(hash, u64::from(*byte)))
}

/// What an event was, and about whom.
pub(crate) fn event_words(event: &Event) -> [u64; 2] {
    match event {
        Event::GroupReady { group } => [1, group.0.into()],
        Event::NodeLost { node, .. } => [2, node.0],
        Event::OfferOpened { request } => [3, request.0],
        Event::OfferClosed { request, .. } => [4, request.0],
        Event::LeaseExpired { request } => [5, request.0],
        Event::Paired { request, handover, group } => [6 | u64::from(group.0) << 8, mix(request.0, handover.0)],
        Event::Started { handover } => [7, handover.0],
        Event::Settled { report } => [8 | u64::from(report.outcome.is_delivered()) << 8, report.handover.0],
        Event::Finished(finished) => [9 | u64::from(finished.outcome.is_delivered()) << 8, finished.request.0],
        Event::LeaseHeld { request, until } => [12, mix(request.0, until.0)],
        Event::Quarantined { handover } => [13, handover.0],
        Event::Drained { handover, .. } => [14, handover.0],
        Event::Health { trouble } => [15, u64::from(trouble.is_some())],
        Event::Met { node, epoch } => [16 | epoch.0 << 8, node.0],
        Event::Parted { node, epoch, .. } => [17 | epoch.0 << 8, node.0],
        Event::Draining { offers, until } => [18 | offers << 8, until.0],
        Event::DrainEnded { left } => [19, *left],
        Event::Freed { request } => [10, request.0],
        Event::Ignored { from, .. } => [11, from.0],
        _ => [255, 0],
    }
}

/// What a worker asked of its engine, and about whom.
pub(crate) fn call_words(call: &EngineCall) -> [u64; 2] {
    match call {
        EngineCall::Prefill(job) => [0x1000, job.spec.request.0],
        EngineCall::Release { request, .. } => [0x1001, request.0],
        EngineCall::Place { handover, .. } => [0x1002, handover.0],
        EngineCall::Settled { handover, outcome, quarantined, .. } => {
            [0x1100 | u64::from(outcome.is_delivered()) | u64::from(*quarantined) << 1, handover.0]
        }
        EngineCall::Returned { handover, .. } => [0x1003, handover.0],
        EngineCall::Rejected { request, .. } => [0x1004, request.0],
        EngineCall::Drained { left } => [0x1005, *left],
        _ => [0x10ff, 0],
    }
}

/// What an engine told its worker, and about whom.
pub(crate) fn engine_words(event: &EngineEvent) -> [u64; 2] {
    match event {
        EngineEvent::Opened { request, .. } => [0x2000, request.0],
        EngineEvent::Ready { request, steps } => [0x2200 | u64::from(*steps) << 16, request.0],
        EngineEvent::Unable { request, .. } => [0x2001, request.0],
        EngineEvent::Released { request } => [0x2002, request.0],
        EngineEvent::Placed { handover, .. } => [0x2003, handover.0],
        EngineEvent::NoRoom { handover, .. } => [0x2004, handover.0],
        EngineEvent::Freed { handover } => [0x2005, handover.0],
        EngineEvent::Drain { .. } => [0x2006, 0],
        _ => [0x20ff, 0],
    }
}

/// FNV-1a by words, turned so that high bits reach low ones.
fn mix(hash: u64, word: u64) -> u64 {
    (hash ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29)
}
