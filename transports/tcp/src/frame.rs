//! What stands on a stream: a fixed header, then at most [`DATA_BYTES_MAX`] bytes of data or a small postcard message.
//!
//! Every transfer has a tag, chosen by its initiator and never used twice on a connection, so that bytes of a cancelled transfer are
//! told from those of a later one with the same id.

use kvferry_core::limits::FRAME_BYTES_MAX;
use kvferry_transport::Notice;
use serde::{Deserialize, Serialize};

/// Bytes of a header: kind, three zero bytes, length (u32), tag (u64); little-endian.
pub(crate) const HEADER_BYTES: usize = 16;
/// Bytes of one data frame. Small enough that a short transfer waits little behind a long one on the same stream.
pub(crate) const DATA_BYTES_MAX: u32 = 1 << 20;
/// Bytes of a refusal's text.
const TEXT_BYTES_MAX: usize = 512;
/// Streams of one connection.
pub(crate) const STREAMS_MAX: usize = 64;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Initiator → owner of the source: a [`ReadRequest`], then the encoded program.
    Read = 1,
    /// Initiator → owner of the destination: a [`WriteRequest`].
    Write = 2,
    /// Receiver → initiator of a push: send the data.
    Go = 3,
    /// Bytes that answer a `Read`.
    PullData = 4,
    /// The stream's share of a pull is complete.
    PullEnd = 5,
    /// Bytes that follow a `Go`.
    PushData = 6,
    /// The stream's share of a push is complete.
    PushEnd = 7,
    /// Receiver → initiator of a push: every byte is visible.
    Ack = 8,
    /// Responder → initiator: a [`Refusal`]; ends the transfer.
    Refuse = 9,
    /// Initiator → responder: ends the transfer.
    Cancel = 10,
    /// Initiator of a pull → owner: a [`Notice`].
    Notice = 11,
}

impl Kind {
    fn of(byte: u8) -> Option<Kind> {
        use Kind::{Ack, Cancel, Go, Notice, PullData, PullEnd, PushData, PushEnd, Read, Refuse, Write};
        [Read, Write, Go, PullData, PullEnd, PushData, PushEnd, Ack, Refuse, Cancel, Notice]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }

    /// The longest payload of such a frame.
    fn bytes_max(self) -> usize {
        match self {
            Kind::Read => FRAME_BYTES_MAX,
            Kind::Write => 4 << 10,
            Kind::PullData | Kind::PushData => DATA_BYTES_MAX as usize,
            Kind::Refuse => TEXT_BYTES_MAX + 64,
            Kind::Notice => 64,
            Kind::Go | Kind::PullEnd | Kind::PushEnd | Kind::Ack | Kind::Cancel => 0,
        }
    }
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) bytes: u32,
    pub(crate) tag: u64,
}

impl Header {
    pub(crate) fn encode(self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let [b0, b1, b2, b3] = self.bytes.to_le_bytes();
        let tag = self.tag.to_le_bytes();
        out[0] = self.kind as u8;
        out[4..8].copy_from_slice(&[b0, b1, b2, b3]);
        out[8..].copy_from_slice(&tag);
        out
    }

    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, String> {
        let [kind, z0, z1, z2, l0, l1, l2, l3, tag @ ..] = *bytes;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let Some(kind) = Kind::of(kind).filter(|_| [z0, z1, z2] == [0; 3]) else {
            return Err(format!("no frame begins with {kind:#04x}; the stream is out of step or not kvferry's"));
        };
        if length as usize > kind.bytes_max() {
            return Err(format!("a {kind:?} frame of {length} bytes; at most {} are allowed", kind.bytes_max()));
        }
        Ok(Header { kind, bytes: length, tag: u64::from_le_bytes(tag) })
    }
}

/// A whole control frame.
pub(crate) fn frame(kind: Kind, tag: u64, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_BYTES + payload.len());
    let bytes = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    out.extend_from_slice(&Header { kind, bytes, tag }.encode());
    out.extend_from_slice(payload);
    out
}

/// Asks the owner of a source pool for its bytes. Part `k` travels on stream `(s + k) % n` where `s` carried the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ReadRequest {
    pub(crate) pool: kvferry_core::PoolId,
    pub(crate) token: u64,
    pub(crate) fingerprint: u64,
    /// Adjacent unit ranges, at most one a stream.
    pub(crate) parts: Vec<(u64, u64)>,
}

/// Announces a push. The data follows a [`Kind::Go`], so that a push that nobody expects (yet) holds no stream up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WriteRequest {
    pub(crate) id: kvferry_core::TransferId,
    pub(crate) pool: kvferry_core::PoolId,
    pub(crate) token: u64,
    pub(crate) fingerprint: u64,
    /// Adjacent unit ranges, at most one a stream.
    pub(crate) parts: Vec<(u64, u64)>,
    pub(crate) notice: Option<Notice>,
}

/// Why a responder ends a transfer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Refusal {
    /// In words.
    Text(String),
    /// The programs differ: the responder's fingerprint and the initiator's.
    Mismatch {
        /// The responder's.
        here: u64,
        /// The initiator's.
        there: u64,
    },
}

impl Refusal {
    /// A refusal in words, cut to what a frame may hold.
    pub(crate) fn text(words: impl Into<String>) -> Refusal {
        let mut words = words.into();
        let mut end = words.len().min(TEXT_BYTES_MAX);
        while !words.is_char_boundary(end) {
            end -= 1;
        }
        words.truncate(end);
        Refusal::Text(words)
    }
}

/// Checks that a request's parts are adjacent and in order, and gives the range that they cover.
pub(crate) fn covered(parts: &[(u64, u64)], streams: usize) -> Result<kvferry_core::UnitRange, String> {
    let (Some(&(start, _)), Some(&(_, end))) = (parts.first(), parts.last()) else {
        return Err("a request without parts".to_owned());
    };
    if parts.len() > streams {
        return Err(format!("a request in {} parts on {streams} streams", parts.len()));
    }
    let ordered = parts.iter().all(|part| part.0 <= part.1);
    let adjacent = parts.windows(2).all(|pair| matches!(pair, [left, right] if left.1 == right.0));
    if !ordered || !adjacent {
        return Err("a request whose parts are not adjacent".to_owned());
    }
    Ok(kvferry_core::UnitRange { start, end })
}
