//! One TCP stream of a connection: frames in, frames out, data straight between the socket and the pools' blocks.

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpStream};

use crate::frame::{DATA_BYTES_MAX, Header, Kind, frame};
use crate::gather::Gather;
use crate::receiver::{Receiver, Signal, Sink};
use crate::socket::Moved;
use kvferry_transport::Cursor;

/// Replies that may wait before the peer has to read some: a peer that only asks is not listened to.
const REPLY_BYTES_MAX: usize = 8 << 20;

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
    pub(crate) cursor: Cursor,
    pub(crate) left: u64,
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
    closing: bool,
    /// Whether it stands in the transport's queue of streams with work.
    pub(crate) scheduled: bool,
    receiver: Receiver,
    control: VecDeque<Vec<u8>>,
    reply_bytes: usize,
    sources: VecDeque<Source>,
    writing: Writing,
    gather: Gather,
}

impl Stream {
    pub(crate) fn new(socket: TcpStream) -> Stream {
        Stream {
            socket,
            readable: true,
            writable: true,
            closing: false,
            scheduled: false,
            receiver: Receiver::default(),
            control: VecDeque::new(),
            reply_bytes: 0,
            sources: VecDeque::new(),
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
        self.closing |= closing;
    }

    /// Whether a call to [`Stream::receive`] or [`Stream::send`] may get anywhere.
    pub(crate) fn has_work(&self) -> bool {
        (self.readable && self.reply_bytes <= REPLY_BYTES_MAX) || (self.writable && self.wants_to_send())
    }

    fn wants_to_send(&self) -> bool {
        !self.gather.is_empty()
            || !self.control.is_empty()
            || !self.sources.is_empty()
            || !matches!(self.writing, Writing::Idle)
    }

    /// Queues a control frame, ahead of data.
    pub(crate) fn control(&mut self, kind: Kind, tag: u64, payload: &[u8]) {
        let bytes = frame(kind, tag, payload);
        // Requests are bounded by the poster; only what answers a peer counts against it.
        if matches!(kind, Kind::Go | Kind::Ack | Kind::Refuse) {
            self.reply_bytes += bytes.len();
        }
        self.control.push_back(bytes);
    }

    /// Queues a share of a transfer; its end is reported as [`Signal::Sent`] once it is in the socket's hands or copied.
    pub(crate) fn add_source(&mut self, source: Source) {
        self.sources.push_back(source);
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
        self.gather.detach();
    }

    /// Touches no pool for what was queued already.
    pub(crate) fn release(&mut self) {
        self.gather.detach();
    }

    /// Receives up to about `budget` bytes. An error ends the connection.
    pub(crate) fn receive(&mut self, budget: u64, signals: &mut Vec<Signal>) -> Result<u64, String> {
        let mut total = 0;
        while self.readable && total < budget && self.reply_bytes <= REPLY_BYTES_MAX {
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
        if !self.readable {
            self.receiver.rest();
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
                Ok(Moved::Blocked | Moved::Closed) => self.writable = false,
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
                    let Some(source) = self.sources.front() else {
                        break;
                    };
                    self.begin(source.key, source.left, signals);
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

    /// Begins a data frame of the first source, or ends that source.
    fn begin(&mut self, key: Key, left: u64, signals: &mut Vec<Signal>) {
        let (flow, tag) = key;
        let bytes = left.min(u64::from(DATA_BYTES_MAX)) as u32;
        let kind = match (flow, bytes) {
            (Flow::Pull, 0) => Kind::PullEnd,
            (Flow::Pull, _) => Kind::PullData,
            (Flow::Push, 0) => Kind::PushEnd,
            (Flow::Push, _) => Kind::PushData,
        };
        self.gather.pack(&Header { kind, bytes, tag }.encode());
        if bytes > 0 {
            self.writing = Writing::Data(bytes as usize);
        } else if let Some(source) = self.sources.pop_front() {
            signals.push(Signal::Sent { key: source.key, pieces: source.cursor.pieces() });
        }
    }

    /// Adds a piece to the data frame of the first source.
    fn data(&mut self, left: usize) -> Result<(), String> {
        let Some(source) = self.sources.front_mut() else {
            self.writing = Writing::Filler(left);
            return Ok(());
        };
        let Some(piece) = source.cursor.take(left) else {
            return Err("a program ended before the bytes it announced".to_owned());
        };
        self.gather.keep(source.cursor.pool());
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
