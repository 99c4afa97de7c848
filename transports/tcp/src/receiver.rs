//! The receiving half of a stream: headers and messages into buffers, data straight into blocks.

use std::collections::BTreeMap;
use std::net::TcpStream;

use crate::frame::{HEADER_BYTES, Header, Kind};
use crate::scatter::Scatter;
use crate::socket::{self, Moved};
use crate::stream::{Flow, Key};
use kvferry_transport::Cursor;

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
}

/// Where a stream's share of a transfer is put.
pub(crate) struct Sink {
    pub(crate) cursor: Cursor,
    pub(crate) left: u64,
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
    discard: Vec<u8>,
}

impl Receiver {
    pub(crate) fn add_sink(&mut self, key: Key, sink: Sink) {
        self.sinks.insert(key, sink);
    }

    pub(crate) fn remove_sink(&mut self, key: Key) {
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

    /// Gives back buffers while nothing is expected.
    pub(crate) fn rest(&mut self) {
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
                if self.scatter.is_empty() {
                    match self.sinks.get_mut(key) {
                        Some(sink) => self.scatter.fill(&mut sink.cursor, *left),
                        None => self.scatter.clear(),
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
                let taken = bytes.min(*left);
                self.scatter.received(taken);
                *left -= taken;
                bytes -= taken;
                if let Some(sink) = self.sinks.get_mut(key) {
                    sink.left -= taken as u64;
                }
                if *left > 0 {
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
                signals.push(Signal::Placed { key, pieces: sink.cursor.pieces() });
            }
        }
        Ok(())
    }
}
