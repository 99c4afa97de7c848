//! One TCP stream of a connection: frames in, frames out, data straight between the socket and the pools' blocks.

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::frame::{DATA_BYTES_MAX, Header, Kind, frame};
use crate::gather::Gather;
use crate::receiver::{Receiver, Signal, Sink};
use crate::share::Share;
use crate::socket::Moved;
use kvferry_transport::{Cursor, StagedOut};

/// Replies that may wait before the peer has to read some: a peer that only asks is not listened to.
const REPLY_BYTES_MAX: usize = 8 << 20;
/// A peer that takes nothing for so long keeps no slot that another stream needs.
const STUCK: Duration = Duration::from_millis(20);

/// Which way a transfer's data goes: tags of pulls and pushes are counted by different ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Flow {
    /// From the responder to the initiator.
    Pull,
    /// From the initiator to the responder.
    Push,
}

/// One transfer on one connection, as seen by its data frames.
pub(crate) type Key = (Flow, u64);

/// A stream's share of a transfer, on its way out.
pub(crate) struct Source {
    pub(crate) key: Key,
    pub(crate) share: Share,
    pub(crate) left: u64,
}

/// A share that goes straight from a pool's blocks to the socket, or that has no bytes.
struct Direct {
    key: Key,
    cursor: Option<Box<Cursor>>,
    left: u64,
}

/// What is being put into the socket.
enum Writing {
    /// The next frame is to be chosen.
    Idle,
    /// The first control frame, from this byte on.
    Control(usize),
    /// A data frame of the first source that still lacks so many bytes.
    Data(usize),
    /// A data frame whose transfer was taken back: its receiver discards it or will, since no end frame follows.
    Filler(usize),
}

/// A connected socket and its state machines.
pub(crate) struct Stream {
    socket: TcpStream,
    readable: bool,
    writable: bool,
    /// Since when the peer has not taken a byte.
    blocked: Option<Instant>,
    closing: bool,
    /// Whether it stands in the transport's queue of streams with work.
    pub(crate) scheduled: bool,
    receiver: Receiver,
    control: VecDeque<Vec<u8>>,
    reply_bytes: usize,
    /// Whether it has stopped listening for the replies that wait, and not yet given back what it needs for nothing else.
    is_deaf: bool,
    sources: VecDeque<Direct>,
    outgoing: StagedOut<Key>,
    /// Whether the last data frame was a staged one: the two kinds take turns.
    was_staged: bool,
    writing: Writing,
    gather: Gather,
}

impl Stream {
    pub(crate) fn new(socket: TcpStream) -> Stream {
        Stream {
            socket,
            readable: true,
            writable: true,
            blocked: None,
            closing: false,
            scheduled: false,
            receiver: Receiver::default(),
            control: VecDeque::new(),
            reply_bytes: 0,
            is_deaf: false,
            sources: VecDeque::new(),
            outgoing: StagedOut::default(),
            was_staged: false,
            writing: Writing::Idle,
            gather: Gather::default(),
        }
    }

    /// The peer's address, while the socket is connected.
    pub(crate) fn peer(&self) -> Option<SocketAddr> {
        self.socket.peer_addr().ok()
    }

    /// This side's address.
    pub(crate) fn here(&self) -> Option<SocketAddr> {
        self.socket.local_addr().ok()
    }

    /// Notes an edge.
    pub(crate) fn ready(&mut self, readable: bool, writable: bool, closing: bool) {
        self.readable |= readable;
        self.writable |= writable;
        if writable {
            self.blocked = None;
        }
        self.closing |= closing;
    }

    /// Whether a call to [`Stream::receive`] or [`Stream::send`] may get anywhere.
    pub(crate) fn has_work(&self) -> bool {
        self.listens() || self.is_deaf || self.receiver.has_settled() || (self.writable && self.wants_to_send())
    }

    /// Whether anything of it waits for a device, so that it may have work without a word of the kernel's.
    pub(crate) fn is_staging(&self) -> bool {
        !self.outgoing.is_idle() || self.receiver.is_staging()
    }

    /// Whether it has no slot for what it could send.
    pub(crate) fn is_starved(&self) -> bool {
        self.writable && self.outgoing.is_starved()
    }

    /// Gives its slots up if the peer has not read for a while: others need them.
    pub(crate) fn relieve(&mut self) {
        if self.blocked.is_some_and(|since| since.elapsed() > STUCK) {
            self.outgoing.shed();
            self.gather.shed();
        }
    }

    fn listens(&self) -> bool {
        self.readable && self.reply_bytes <= REPLY_BYTES_MAX && !self.receiver.is_stalled()
    }

    fn wants_to_send(&self) -> bool {
        !self.gather.is_empty()
            || !self.control.is_empty()
            || !self.sources.is_empty()
            || self.outgoing.has_next()
            || self.outgoing.can_refill()
            || !matches!(self.writing, Writing::Idle)
    }

    /// Queues a control frame, ahead of data.
    pub(crate) fn control(&mut self, kind: Kind, tag: u64, payload: &[u8]) {
        let bytes = frame(kind, tag, payload);
        // Requests are bounded by the poster; only what answers a peer counts against it.
        if matches!(kind, Kind::Go | Kind::Ack | Kind::Refuse) {
            let listened = self.reply_bytes <= REPLY_BYTES_MAX;
            self.reply_bytes += bytes.len();
            self.is_deaf |= listened && self.reply_bytes > REPLY_BYTES_MAX;
        }
        self.control.push_back(bytes);
    }

    /// Queues a share of a transfer; its end is reported as [`Signal::Sent`] once it is in the socket's hands or copied.
    pub(crate) fn add_source(&mut self, source: Source) {
        let Source { key, share, left } = source;
        match share {
            Share::Direct(cursor) => self.sources.push_back(Direct { key, cursor: Some(cursor), left }),
            Share::Staged(staged) if left > 0 => self.outgoing.add(key, staged, left),
            Share::Staged(_) => self.sources.push_back(Direct { key, cursor: None, left }),
        }
    }

    /// Registers where a share of a transfer is put.
    pub(crate) fn add_sink(&mut self, key: Key, sink: Sink) {
        self.receiver.add_sink(key, sink);
    }

    /// Puts no more bytes of a transfer anywhere; later ones are discarded.
    pub(crate) fn remove_sink(&mut self, key: Key) {
        self.receiver.remove_sink(key);
    }

    /// Reads no more bytes of a transfer from its pool.
    pub(crate) fn remove_source(&mut self, key: Key) {
        if let (Writing::Data(left), Some(first)) = (&self.writing, self.sources.front())
            && first.key == key
        {
            self.writing = Writing::Filler(*left);
        }
        self.sources.retain(|source| source.key != key);
        self.outgoing.remove(|of| *of == key);
        self.gather.detach();
    }

    /// Touches no pool for what was queued already, and holds no slot for it: the peer may never read it, and a slot keeps its pool's memory.
    pub(crate) fn release(&mut self) {
        self.gather.detach();
        self.gather.shed();
    }

    /// Receives up to about `budget` bytes. An error ends the connection.
    pub(crate) fn receive(&mut self, budget: u64, signals: &mut Vec<Signal>) -> Result<u64, String> {
        let mut total = 0;
        self.receiver.settle(signals);
        while total < budget && self.listens() {
            match self.receiver.receive(&self.socket, signals)? {
                (Moved::Bytes(bytes), full) => {
                    // Even a tiny frame costs a call.
                    total += bytes.max(512) as u64;
                    // A short read empties the socket; the next byte makes an edge. Not so the end of the stream that came with it.
                    if bytes > 0 && !full && !self.closing {
                        self.readable = false;
                    }
                }
                (Moved::Blocked, _) => self.readable = false,
                (Moved::Closed, _) => return Err("it closed the connection".to_owned()),
            }
        }
        self.is_deaf = false;
        // Whatever the reason: nothing more comes for a while, and others may need its slot.
        if !self.listens() {
            self.receiver.rest(signals);
        }
        Ok(total)
    }

    /// Sends up to about `budget` bytes. An error ends the connection.
    pub(crate) fn send(&mut self, budget: u64, signals: &mut Vec<Signal>) -> Result<u64, String> {
        let mut total = 0;
        while self.writable && total < budget {
            if self.gather.is_empty() {
                self.fill(signals)?;
                if self.gather.is_empty() {
                    self.gather.shrink();
                    break;
                }
            }
            match self.gather.send(&self.socket) {
                Ok(Moved::Bytes(bytes)) => total += bytes as u64,
                Ok(Moved::Blocked | Moved::Closed) => {
                    self.writable = false;
                    self.blocked = Some(Instant::now());
                }
                Err(error) => return Err(format!("sending: {error}")),
            }
        }
        Ok(total)
    }

    fn fill(&mut self, signals: &mut Vec<Signal>) -> Result<(), String> {
        self.gather.reset();
        while self.gather.has_room() {
            match self.writing {
                Writing::Idle if !self.control.is_empty() => self.writing = Writing::Control(0),
                Writing::Idle => {
                    let is_staged_turn = !self.was_staged;
                    let began = is_staged_turn && self.chunk(signals);
                    if !began && !self.begin(signals) && !self.chunk(signals) {
                        break;
                    }
                }
                Writing::Control(from) => {
                    let Some(first) = self.control.front() else {
                        self.writing = Writing::Idle;
                        continue;
                    };
                    let length = first.len();
                    let to = from + self.gather.pack(first.get(from..).unwrap_or_default());
                    self.writing = Writing::Control(to);
                    if to >= length {
                        self.reply_bytes = self.reply_bytes.saturating_sub(length);
                        self.control.pop_front();
                        self.writing = Writing::Idle;
                        if self.control.is_empty() {
                            self.reply_bytes = 0;
                        }
                    }
                }
                Writing::Data(left) => self.data(left)?,
                Writing::Filler(left) => {
                    let left = left - self.gather.zeros(left);
                    self.writing = if left == 0 { Writing::Idle } else { Writing::Filler(left) };
                }
            }
        }
        Ok(())
    }

    /// Begins a data frame of the first source, or ends that source; false where there is none.
    fn begin(&mut self, signals: &mut Vec<Signal>) -> bool {
        let Some(source) = self.sources.front() else {
            return false;
        };
        let bytes = source.left.min(u64::from(DATA_BYTES_MAX)) as u32;
        self.header(source.key, bytes);
        if bytes > 0 {
            self.writing = Writing::Data(bytes as usize);
            self.was_staged = false;
        } else if let Some(source) = self.sources.pop_front() {
            let pieces = source.cursor.map_or(0, |cursor| cursor.pieces());
            signals.push(Signal::Sent { key: source.key, pieces });
        }
        true
    }

    /// Adds a whole data frame of the next full slot, and the end of its share behind the last one; false where none is full.
    fn chunk(&mut self, signals: &mut Vec<Signal>) -> bool {
        self.refill(signals);
        let mut failed = Vec::new();
        let next = self.outgoing.next(&mut failed);
        break_off(failed, signals);
        let Some(chunk) = next else {
            return false;
        };
        let (key, bytes, last) = (chunk.key, chunk.bytes, chunk.last);
        self.header(key, bytes as u32);
        self.gather.slot(chunk.into_slot(), bytes);
        if let Some(pieces) = last {
            self.header(key, 0);
            signals.push(Signal::Sent { key, pieces });
        }
        self.was_staged = true;
        self.refill(signals);
        true
    }

    /// Has the device fill slots while there are some, the shares in turn.
    fn refill(&mut self, signals: &mut Vec<Signal>) {
        let mut failed = Vec::new();
        while self.outgoing.refill(|_| DATA_BYTES_MAX as usize, &mut failed) {}
        break_off(failed, signals);
    }

    /// The header of a data frame, or with no bytes of an end.
    fn header(&mut self, (flow, tag): Key, bytes: u32) {
        let kind = match (flow, bytes) {
            (Flow::Pull, 0) => Kind::PullEnd,
            (Flow::Pull, _) => Kind::PullData,
            (Flow::Push, 0) => Kind::PushEnd,
            (Flow::Push, _) => Kind::PushData,
        };
        self.gather.pack(&Header { kind, bytes, tag }.encode());
    }

    /// Adds a piece to the data frame of the first source.
    fn data(&mut self, left: usize) -> Result<(), String> {
        let Some(source) = self.sources.front_mut() else {
            self.writing = Writing::Filler(left);
            return Ok(());
        };
        let taken = source.cursor.as_mut().and_then(|cursor| Some((cursor.take(left)?, cursor.pool())));
        let Some((piece, pool)) = taken else {
            return Err("a program ended before the bytes it announced".to_owned());
        };
        self.gather.keep(pool);
        self.gather.piece(piece);
        source.left -= piece.bytes as u64;
        if piece.bytes < left {
            self.writing = Writing::Data(left - piece.bytes);
            return Ok(());
        }
        self.writing = Writing::Idle;
        // The others' turn, unless only the end of this one is left.
        if source.left > 0 {
            self.sources.rotate_left(1);
        }
        Ok(())
    }
}

/// Tells of shares that the device failed to copy.
fn break_off(failed: Vec<(Key, String)>, signals: &mut Vec<Signal>) {
    signals.extend(failed.into_iter().map(|(key, reason)| Signal::Broken { key, is_outgoing: true, reason }));
}
