//! The receiving half of a stream: headers and messages into buffers, data straight into blocks.

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpStream;

use crate::frame::{HEADER_BYTES, Header, Kind};
use crate::scatter::Scatter;
use crate::share::Share;
use crate::socket::{self, Moved};
use crate::stream::{Flow, Key};
use kvferry_transport::{Cursor, StagedIn};

/// Bytes that one call discards at most.
const DISCARD_BYTES: usize = 64 << 10;
/// Bytes that a message's buffer grows by: a length is believed only as far as bytes have come.
const GROW_BYTES: usize = 256 << 10;

/// What a stream tells its connection.
#[derive(Debug)]
pub(crate) enum Signal {
    /// A control frame came.
    Control { kind: Kind, tag: u64, payload: Vec<u8> },
    /// This stream's share of an incoming transfer is in place.
    Placed { key: Key, pieces: u64 },
    /// This stream's share of an outgoing transfer was queued to its last byte.
    Sent { key: Key, pieces: u64 },
    /// The device failed to copy a share, which goes no further here.
    Broken { key: Key, is_outgoing: bool, reason: String },
}

/// Where a stream's share of a transfer is put.
pub(crate) struct Sink {
    place: Place,
    left: u64,
}

enum Place {
    Direct(Box<Cursor>),
    Staged(StagedIn),
}

impl Sink {
    /// A place for a share's `left` bytes.
    pub(crate) fn new(share: Share, left: u64) -> Sink {
        let place = match share {
            Share::Direct(cursor) => Place::Direct(cursor),
            Share::Staged(staged) => Place::Staged(StagedIn::new(staged)),
        };
        Sink { place, left }
    }

    fn pieces(&self) -> u64 {
        match &self.place {
            Place::Direct(cursor) => cursor.pieces(),
            Place::Staged(incoming) => incoming.chunks(),
        }
    }

    fn incoming(&self) -> Option<&StagedIn> {
        match &self.place {
            Place::Direct(_) => None,
            Place::Staged(incoming) => Some(incoming),
        }
    }

    fn incoming_mut(&mut self) -> Option<&mut StagedIn> {
        match &mut self.place {
            Place::Direct(_) => None,
            Place::Staged(incoming) => Some(incoming),
        }
    }
}

/// What the next bytes are.
#[derive(Default)]
enum Reading {
    #[default]
    Header,
    Message {
        kind: Kind,
        tag: u64,
        buffer: Vec<u8>,
        bytes: usize,
    },
    Data {
        key: Key,
        left: usize,
    },
    Discard {
        left: usize,
    },
}

#[derive(Default)]
pub(crate) struct Receiver {
    reading: Reading,
    header: [u8; HEADER_BYTES],
    header_bytes: usize,
    scatter: Scatter,
    sinks: BTreeMap<Key, Sink>,
    /// Whose bytes are all here, and not yet out of their slots.
    ending: BTreeMap<Key, Sink>,
    /// Of these two, whose slots the device empties.
    emptying: BTreeSet<Key>,
    discard: Vec<u8>,
}

impl Receiver {
    pub(crate) fn add_sink(&mut self, key: Key, sink: Sink) {
        self.sinks.insert(key, sink);
    }

    pub(crate) fn remove_sink(&mut self, key: Key) {
        self.ending.remove(&key);
        self.emptying.remove(&key);
        if self.sinks.remove(&key).is_none() {
            return;
        }
        if let Reading::Data { key: current, left } = self.reading
            && current == key
        {
            self.scatter.clear();
            self.reading = Reading::Discard { left };
        }
    }

    /// Whether the next bytes wait for a slot.
    pub(crate) fn is_stalled(&self) -> bool {
        let Reading::Data { key, .. } = &self.reading else {
            return false;
        };
        self.sinks.get(key).and_then(Sink::incoming).is_some_and(StagedIn::is_stalled)
    }

    /// Whether anything waits for a device.
    pub(crate) fn is_staging(&self) -> bool {
        !self.emptying.is_empty() || self.is_stalled()
    }

    /// Whether [`Receiver::settle`] would get anywhere.
    pub(crate) fn has_settled(&self) -> bool {
        let incoming = |key| self.sinks.get(key).or_else(|| self.ending.get(key)).and_then(Sink::incoming);
        self.emptying.iter().filter_map(incoming).any(StagedIn::has_settled)
    }

    /// Lets go of slots that the device has emptied, and ends the shares that were the last ones.
    pub(crate) fn settle(&mut self, signals: &mut Vec<Signal>) {
        for key in self.emptying.iter().copied().collect::<Vec<_>>() {
            let sink = self.sinks.get_mut(&key).or_else(|| self.ending.get_mut(&key));
            match sink.and_then(Sink::incoming_mut).map_or(Ok(true), StagedIn::settle) {
                Ok(false) => {}
                Ok(true) => {
                    self.emptying.remove(&key);
                    if let Some(sink) = self.ending.remove(&key) {
                        signals.push(Signal::Placed { key, pieces: sink.pieces() });
                    }
                }
                Err(reason) => self.fail(key, reason, signals),
            }
        }
    }

    fn fail(&mut self, key: Key, reason: String, signals: &mut Vec<Signal>) {
        self.remove_sink(key);
        signals.push(Signal::Broken { key, is_outgoing: false, reason });
    }

    /// Gives back what is not needed while nothing comes.
    pub(crate) fn rest(&mut self, signals: &mut Vec<Signal>) {
        if let Reading::Data { key, .. } = self.reading
            && let Some(incoming) = self.sinks.get_mut(&key).and_then(Sink::incoming_mut)
        {
            match incoming.rest() {
                Ok(true) => drop(self.emptying.insert(key)),
                Ok(false) => {}
                Err(reason) => self.fail(key, reason, signals),
            }
        }
        if self.sinks.is_empty() && matches!(self.reading, Reading::Header) {
            self.scatter.shrink();
            self.discard = Vec::new();
        }
    }

    /// One receiving call; says what moved and whether all that was asked for came.
    pub(crate) fn receive(&mut self, socket: &TcpStream, signals: &mut Vec<Signal>) -> Result<(Moved, bool), String> {
        let (moved, wanted) = self.once(socket).map_err(|error| format!("receiving: {error}"))?;
        let Moved::Bytes(bytes) = moved else {
            return Ok((moved, false));
        };
        self.account(bytes, signals)?;
        Ok((moved, bytes >= wanted))
    }

    /// Receives into what the state asks for, and the next header behind it where the frame ends.
    fn once(&mut self, socket: &TcpStream) -> std::io::Result<(Moved, usize)> {
        let header = self.header.get_mut(self.header_bytes..).unwrap_or_default();
        let tail = libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: header.len() };
        match &mut self.reading {
            Reading::Header => {
                let wanted = tail.iov_len;
                // SAFETY: the entry is the unread part of `header`, borrowed mutably above.
                unsafe { socket::receive(socket, &mut [tail]) }.map(|moved| (moved, wanted))
            }
            Reading::Message { buffer, bytes, .. } => {
                let left = *bytes - buffer.len();
                let step = left.min(GROW_BYTES);
                buffer.reserve(step);
                let space = buffer.spare_capacity_mut();
                let body = libc::iovec { iov_base: space.as_mut_ptr().cast(), iov_len: step };
                let both = &mut [body, tail];
                let entries = if step == left { &mut both[..] } else { &mut both[..1] };
                let wanted = entries.iter().map(|entry| entry.iov_len).sum();
                // SAFETY: the entries are spare capacity of `buffer` and the unread part of `header`, both borrowed mutably.
                unsafe { socket::receive(socket, entries) }.map(|moved| (moved, wanted))
            }
            Reading::Discard { left } => {
                if self.discard.is_empty() {
                    self.discard = vec![0; DISCARD_BYTES];
                }
                let step = (*left).min(DISCARD_BYTES);
                let body = libc::iovec { iov_base: self.discard.as_mut_ptr().cast(), iov_len: step };
                let both = &mut [body, tail];
                let entries = if step == *left { &mut both[..] } else { &mut both[..1] };
                let wanted = entries.iter().map(|entry| entry.iov_len).sum();
                // SAFETY: the entries are `discard`, at most its length, and the unread part of `header`.
                unsafe { socket::receive(socket, entries) }.map(|moved| (moved, wanted))
            }
            Reading::Data { key, left } => {
                let place = self.sinks.get_mut(key).map(|sink| &mut sink.place);
                if let Some(Place::Staged(incoming)) = place {
                    let Some(room) = incoming.room(*left) else {
                        // Whoever calls has asked `is_stalled`.
                        return Ok((Moved::Bytes(0), 0));
                    };
                    let body = libc::iovec { iov_base: room.at.cast(), iov_len: room.bytes };
                    let both = &mut [body, tail];
                    let entries = if body.iov_len == *left { &mut both[..] } else { &mut both[..1] };
                    let wanted = entries.iter().map(|entry| entry.iov_len).sum();
                    // SAFETY: the entries are the unfilled part of a slot that this sink holds, in which nothing of the device runs, and the
                    // unread part of `header`. No reference covers either.
                    return unsafe { socket::receive(socket, entries) }.map(|moved| (moved, wanted));
                }
                if self.scatter.is_empty() {
                    match place {
                        Some(Place::Direct(cursor)) => self.scatter.fill(cursor, *left),
                        _ => self.scatter.clear(),
                    }
                    if self.scatter.is_empty() {
                        return Err(std::io::Error::other("a program ended before the bytes that came for it"));
                    }
                }
                let last = self.scatter.wanted() == *left;
                let wanted = self.scatter.wanted() + if last { tail.iov_len } else { 0 };
                self.scatter.with_tail(last.then_some(tail), |entries| {
                    // SAFETY: the entries are pieces of the pool that the sink's cursor keeps alive (a removed sink clears the batch), the
                    // batch's own buffer, and the unread part of `header`. No reference covers any of them.
                    unsafe { socket::receive(socket, entries) }.map(|moved| (moved, wanted))
                })
            }
        }
    }

    /// Gives `bytes` received bytes to the state, then to the next header.
    fn account(&mut self, mut bytes: usize, signals: &mut Vec<Signal>) -> Result<(), String> {
        match &mut self.reading {
            Reading::Header => {}
            Reading::Message { buffer, bytes: length, .. } => {
                let taken = bytes.min(*length - buffer.len());
                // SAFETY: the kernel wrote `taken` bytes into the spare capacity, from its start.
                unsafe { buffer.set_len(buffer.len() + taken) };
                bytes -= taken;
                if buffer.len() < *length {
                    return Ok(());
                }
            }
            Reading::Data { key, left } => {
                let (key, taken) = (*key, bytes.min(*left));
                *left -= taken;
                bytes -= taken;
                let (is_end, mut emptying) = (*left == 0, Ok(false));
                if let Some(sink) = self.sinks.get_mut(&key) {
                    sink.left -= taken as u64;
                    match &mut sink.place {
                        Place::Direct(_) => self.scatter.received(taken),
                        Place::Staged(incoming) => emptying = incoming.received(taken, is_end),
                    }
                }
                match emptying {
                    Ok(true) => drop(self.emptying.insert(key)),
                    Ok(false) => {}
                    // Leaves the rest of the frame to be discarded.
                    Err(reason) => self.fail(key, reason, signals),
                }
                if !is_end {
                    return Ok(());
                }
            }
            Reading::Discard { left } => {
                let taken = bytes.min(*left);
                *left -= taken;
                bytes -= taken;
                if *left > 0 {
                    return Ok(());
                }
            }
        }
        if let Reading::Message { kind, tag, buffer, .. } = std::mem::take(&mut self.reading) {
            signals.push(Signal::Control { kind, tag, payload: buffer });
        }
        self.header_bytes += bytes;
        if self.header_bytes == HEADER_BYTES {
            self.header_bytes = 0;
            let header = Header::decode(&self.header)?;
            self.begin(header, signals)?;
        }
        Ok(())
    }

    fn begin(&mut self, header: Header, signals: &mut Vec<Signal>) -> Result<(), String> {
        let Header { kind, bytes, tag } = header;
        let flow = match kind {
            Kind::PullData | Kind::PullEnd => Flow::Pull,
            Kind::PushData | Kind::PushEnd => Flow::Push,
            _ if bytes == 0 => {
                signals.push(Signal::Control { kind, tag, payload: Vec::new() });
                return Ok(());
            }
            _ => {
                self.reading = Reading::Message { kind, tag, buffer: Vec::new(), bytes: bytes as usize };
                return Ok(());
            }
        };
        let key = (flow, tag);
        let left = bytes as usize;
        // Data of a transfer that was taken back here is still on its way: it goes nowhere.
        let Some(sink) = self.sinks.get(&key) else {
            if left > 0 {
                self.reading = Reading::Discard { left };
            }
            return Ok(());
        };
        if u64::from(bytes) > sink.left {
            return Err(format!("{bytes} bytes came for a transfer that lacks {}", sink.left));
        }
        if left > 0 {
            self.reading = Reading::Data { key, left };
        } else if matches!(kind, Kind::PullEnd | Kind::PushEnd) {
            if sink.left > 0 {
                return Err(format!("a transfer ended {} bytes early", sink.left));
            }
            if let Some(sink) = self.sinks.remove(&key) {
                if self.emptying.contains(&key) {
                    self.ending.insert(key, sink);
                } else {
                    signals.push(Signal::Placed { key, pieces: sink.pieces() });
                }
            }
        }
        Ok(())
    }
}
