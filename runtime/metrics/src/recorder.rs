//! The last that was said and happened, kept in memory and written when something goes wrong.

mod writer;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvferry_actors::{MonotonicClock, Standing, Watch};
use kvferry_core::protocol::{Event, FailReason, Message, Outcome};
use kvferry_core::{Moment, NodeId};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use writer::{Dump, Writer};

/// Peers of which something is kept; of the one heard least lately nothing is any more, then.
const PEERS_MAX: usize = 4096;
/// Entries of one dump; of more, the latest are written. With descriptions as long as they may be that is about 12 MiB.
const DUMP_ENTRIES_MAX: usize = 16_384;
/// Dumps that nobody asked for come no faster.
const UNASKED_EVERY: Duration = Duration::from_secs(1);
/// Longest description of an event that is kept.
const DETAIL_BYTES_MAX: usize = 512;

/// Where a recorder writes, and how much it keeps.
#[derive(Clone, Debug)]
pub struct RecorderOptions {
    /// JSON lines are appended here; once it has 64 MiB, it is renamed to the same name with `.1` at its end and begun anew.
    pub file: PathBuf,
    /// Messages and events kept per peer, and as many of the node itself.
    pub entries_per_peer: usize,
}

impl RecorderOptions {
    /// 256 entries per peer.
    pub fn new(file: impl Into<PathBuf>) -> Self {
        RecorderOptions { file: file.into(), entries_per_peer: 256 }
    }
}

/// A flight recorder: a watcher that keeps the last messages of every peer and the last events of the node, and writes them as JSON lines when a
/// deadline runs out, when blocks are quarantined, or when it is asked to. Cheap to clone.
#[derive(Clone)]
pub struct Recorder(Arc<Inner>);

struct Inner {
    entries_per_peer: usize,
    kept: Mutex<Kept>,
    writer: Writer,
}

#[derive(Debug, Default)]
struct Kept {
    node: Option<(u64, u64)>,
    entries: u64,
    peers: BTreeMap<NodeId, VecDeque<Entry>>,
    own: VecDeque<Entry>,
    last_unasked: Option<Moment>,
    dumps: u64,
}

/// One line.
#[derive(Clone, Debug, Serialize)]
struct Entry {
    /// Counts over all of a recorder's entries.
    entry: u64,
    /// Nanoseconds of the monotonic clock.
    at_ns: u64,
    /// `sent`, `heard` or `event`.
    what: &'static str,
    name: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    handover: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorder").field("writer", &self.0.writer).finish_non_exhaustive()
    }
}

impl Recorder {
    /// Opens the file and starts the thread that writes to it. Nothing is written before something goes wrong.
    pub fn start(options: RecorderOptions) -> std::io::Result<Self> {
        let writer = Writer::start(options.file)?;
        let entries_per_peer = options.entries_per_peer.max(1);
        Ok(Recorder(Arc::new(Inner { entries_per_peer, kept: Mutex::default(), writer })))
    }

    /// Has what is kept written, oldest first: the latest 16,384 entries, and how many older ones were left out. Does not wait for that; says whether the writer could take it.
    pub fn dump(&self, because: &str) -> bool {
        let dump = self.kept().dump(because.to_owned());
        self.0.writer.write(dump)
    }

    /// Waits until what was dumped so far is written, or could not be.
    pub fn flush(&self) {
        self.0.writer.flush();
    }

    /// Dumps at every SIGUSR1 from now on, whose default would end the process. To be spawned; ends only if signals cannot be listened for.
    pub async fn dump_at_sigusr1(self) -> std::io::Result<()> {
        let mut asked = signal(SignalKind::user_defined1())?;
        while asked.recv().await.is_some() {
            self.dump("SIGUSR1");
        }
        Ok(())
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, peer: Option<NodeId>, mut entry: Entry) {
        let most = self.0.entries_per_peer;
        let mut kept = self.kept();
        kept.entries += 1;
        entry.entry = kept.entries;
        let ring = match peer {
            None => &mut kept.own,
            Some(peer) => {
                if kept.peers.len() >= PEERS_MAX && !kept.peers.contains_key(&peer) {
                    kept.forget_one();
                }
                kept.peers.entry(peer).or_default()
            }
        };
        if ring.len() >= most {
            ring.pop_front();
        }
        ring.push_back(entry);
    }

    fn dump_unasked(&self, because: String) {
        let now = MonotonicClock::moment();
        let dump = {
            let mut kept = self.kept();
            if kept.last_unasked.is_some_and(|last| now.since(last) < UNASKED_EVERY) {
                return;
            }
            kept.last_unasked = Some(now);
            kept.dump(because)
        };
        if !self.0.writer.write(dump) {
            tracing::warn!("the flight recorder's file is too slow; a dump is left out");
        }
    }
}

impl Kept {
    fn dump(&mut self, because: String) -> Dump {
        self.dumps += 1;
        let mut kept: Vec<&Entry> = self.peers.values().flatten().chain(&self.own).collect();
        let left_out = kept.len().saturating_sub(DUMP_ENTRIES_MAX);
        if left_out > 0 {
            // Only references are moved: the node waits.
            kept.select_nth_unstable_by_key(left_out, |entry| entry.entry);
        }
        let mut entries: Vec<Entry> = kept.into_iter().skip(left_out).cloned().collect();
        entries.sort_by_key(|entry| entry.entry);
        Dump { dump: self.dumps, because, node: self.node, entries, left_out }
    }

    /// The peer of which the last entry is oldest.
    fn forget_one(&mut self) {
        let last = |ring: &VecDeque<Entry>| ring.back().map_or(0, |entry| entry.entry);
        if let Some(peer) = self.peers.iter().min_by_key(|(_, ring)| last(ring)).map(|(peer, _)| *peer) {
            self.peers.remove(&peer);
        }
    }
}

impl Watch for Recorder {
    fn stands(&self, node: &Standing) {
        self.kept().node = Some((node.node.0, node.epoch.0));
    }

    fn happened(&self, event: &Event) {
        // Renewals are many, and the messages that cause them are kept.
        if matches!(event, Event::LeaseHeld { .. }) {
            return;
        }
        let mut detail = format!("{event:?}");
        if detail.len() > DETAIL_BYTES_MAX {
            let end = (0..=DETAIL_BYTES_MAX).rev().find(|end| detail.is_char_boundary(*end)).unwrap_or(0);
            detail.truncate(end);
        }
        let entry = Entry { detail: Some(detail), ..Entry::new("event", event.name()) };
        self.keep(None, entry);
        if let Some(because) = alarming(event) {
            self.dump_unasked(because);
        }
    }

    fn said(&self, peer: NodeId, sent: bool, message: &Message) {
        let subject = message.subject();
        let entry = Entry {
            peer: Some(peer.0),
            request: subject.request.map(|request| request.0),
            handover: subject.handover.map(|handover| handover.0),
            ..Entry::new(if sent { "sent" } else { "heard" }, message.name())
        };
        self.keep(Some(peer), entry);
    }
}

impl Entry {
    fn new(what: &'static str, name: &'static str) -> Self {
        let at_ns = MonotonicClock::moment().0;
        Entry { entry: 0, at_ns, what, name, peer: None, request: None, handover: None, detail: None }
    }
}

/// Why what happened is worth a dump, if it is.
fn alarming(event: &Event) -> Option<String> {
    let late = |outcome: &Outcome| match outcome {
        Outcome::Failed { reason: reason @ FailReason::Deadline { .. } } => Some(reason.to_string()),
        _ => None,
    };
    match event {
        Event::Quarantined { handover } => Some(format!("the blocks of {handover} are quarantined")),
        Event::Settled { report } => Some(format!("{}: {}", report.handover, late(&report.outcome)?)),
        Event::FetchEnded(course) => Some(format!("{}: {}", course.handover, late(&course.outcome)?)),
        Event::RequestEnded(course) => Some(format!("{}: {}", course.request, late(&course.outcome)?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
