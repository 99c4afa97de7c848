//! What happened, as one number, and the last of it in words.

use std::collections::VecDeque;
use std::fmt;

use kvferry_core::protocol::Event;

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
    /// An actor observed something: node, what, about whom.
    Observed,
    /// A node started: node, epoch.
    Start,
    /// A node crashed: node, epoch.
    Crash,
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

/// A running hash of all records.
#[derive(Clone, Debug)]
pub struct Trace {
    hash: u64,
    records: u64,
    recent: VecDeque<Record>,
}

impl Default for Trace {
    fn default() -> Self {
        Trace { hash: 0xcbf2_9ce4_8422_2325, records: 0, recent: VecDeque::with_capacity(RECENT_MAX) }
    }
}

impl Trace {
    /// Takes a record in.
    pub fn put(&mut self, at: u64, tag: Tag, words: [u64; 3]) {
        for word in [at, tag as u64].into_iter().chain(words) {
            self.hash = mix(self.hash, word);
        }
        self.records += 1;
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
        Event::Freed { request } => [10, request.0],
        Event::Ignored { from, .. } => [11, from.0],
        _ => [255, 0],
    }
}

/// FNV-1a by words, turned so that high bits reach low ones.
fn mix(hash: u64, word: u64) -> u64 {
    (hash ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29)
}
