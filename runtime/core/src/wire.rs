//! Control frames: how [`Message`]s become bytes, and what of foreign bytes is believed.
//!
//! A frame is `length: u32 LE | kind: u8 | body`, `length` counting kind and body. Bodies are postcard; block tables travel as raw
//! little-endian `u32`. Every length is checked against a named limit before anything is allocated for it.

use bytes::{Buf, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::protocol::{Domains, Message};
use crate::trace::TRACE_BYTES;
use crate::{Epoch, NodeId, TraceContext, limits};

/// Oldest protocol that this build speaks: everything but what a later one adds. What was written before the first release has no number; two builds
/// of that time do not understand each other.
pub const PROTOCOL_MIN: u16 = 1;
/// Newest protocol that this build speaks. 2 adds resumption (`Resume`, `Heard`), 3 trace contexts ([`encode_for`]), 4 pushes over rails (`Shares`,
/// `ShareStopped`, `ShareEnded`, and their number behind a profile), 5 domains of hosts behind a profile, 6 GPUs behind those.
/// `tests/encoding.rs` pins how each is written: a new message is appended to its enum, belongs to a new protocol, and is not said to peers of older
/// ones.
pub const PROTOCOL_MAX: u16 = 6;
/// The first protocol in which a message may have a trace context.
pub const TRACING_PROTOCOL: u16 = 3;
/// The first protocol in which pushes may go over rails. Whoever does not say in its profile over how many hears nothing of it.
pub const RAILS_PROTOCOL: u16 = 4;
/// The first protocol in which a profile may say from which other hosts its NICs are reached.
pub const DOMAINS_PROTOCOL: u16 = 5;
/// The first protocol in which a profile may say which GPUs its NICs are.
pub const GPUS_PROTOCOL: u16 = 6;

const HEADER_BYTES: usize = 4;
const RAILS_BYTES: usize = 4;
const HANDSHAKE_BYTES_MAX: usize = 4096;
/// Bytes of a message authentication code.
pub(crate) const MAC_BYTES: usize = 16;
const SEQUENCE_BYTES: usize = 8;

/// Bytes that are not a frame of this protocol.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WireError {
    /// Longer than anything that this side accepts.
    #[error("a frame of {bytes} bytes; at most {limit} are accepted")]
    Oversized {
        /// Announced length.
        bytes: u64,
        /// The limit.
        limit: usize,
    },
    /// Shorter than its own header.
    #[error("a frame of {bytes} bytes, too short for its kind")]
    Truncated {
        /// Its length.
        bytes: usize,
    },
    /// A kind that this protocol does not have.
    #[error("frame kind {0} is unknown; is the peer kvferry?")]
    UnknownKind(u8),
    /// The body does not decode.
    #[error("the {what} does not decode: {cause}")]
    Malformed {
        /// Which body.
        what: &'static str,
        /// Why.
        cause: String,
    },
    /// Bytes follow the body's end.
    #[error("{bytes} bytes follow the end of the {what}")]
    Trailing {
        /// Which body.
        what: &'static str,
        /// How many.
        bytes: usize,
    },
}

/// First frame of a dialer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Oldest protocol that it speaks.
    pub protocol_min: u16,
    /// Newest protocol that it speaks.
    pub protocol_max: u16,
    /// What else it can do, one bit each; unknown bits are ignored.
    pub capabilities: u64,
    /// Who it is.
    pub node: NodeId,
    /// In which incarnation.
    pub epoch: Epoch,
    /// Whom it means to reach.
    pub expects: NodeId,
    /// Its part of the session's freshness.
    pub nonce: [u8; 16],
    /// Whether it holds a shared secret.
    pub secured: bool,
}

/// The acceptor's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The protocol that both speak.
    pub protocol: u16,
    /// What else it can do.
    pub capabilities: u64,
    /// Who it is.
    pub node: NodeId,
    /// In which incarnation.
    pub epoch: Epoch,
    /// Its part of the session's freshness.
    pub nonce: [u8; 16],
    /// Proof that it holds the secret, over both nonces; zeros without one.
    pub mac: [u8; MAC_BYTES],
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A dialer begins.
    Hello(Hello),
    /// The acceptor answers.
    Welcome(Welcome),
    /// The dialer proves that it holds the secret.
    Proof([u8; MAC_BYTES]),
    /// No session: why. The link closes after it.
    Reject(String),
    /// An encoded [`Message`] (or nothing: a heartbeat) with its place in the sequence.
    Sealed {
        /// Counts from 0 in each direction; any other value than the next is a replay or a loss.
        sequence: u64,
        /// Over direction, sequence and body, with the session's key; zeros without a secret.
        mac: [u8; MAC_BYTES],
        /// The message.
        body: Bytes,
    },
}

const KIND_HELLO: u8 = 1;
const KIND_WELCOME: u8 = 2;
const KIND_PROOF: u8 = 3;
const KIND_REJECT: u8 = 4;
const KIND_SEALED: u8 = 5;

impl Frame {
    /// The frame with its length in front.
    pub fn encode(&self) -> Result<Bytes, WireError> {
        let mut out = vec![0; HEADER_BYTES];
        match self {
            Frame::Hello(hello) => {
                out.push(KIND_HELLO);
                out = append(hello, out, "hello")?;
            }
            Frame::Welcome(welcome) => {
                out.push(KIND_WELCOME);
                out = append(welcome, out, "welcome")?;
            }
            Frame::Proof(mac) => {
                out.push(KIND_PROOF);
                out.extend_from_slice(mac);
            }
            Frame::Reject(reason) => {
                out.push(KIND_REJECT);
                out.extend(reason.bytes().take(limits::NAME_BYTES_MAX * 8));
            }
            Frame::Sealed { sequence, mac, body } => {
                out.reserve(1 + SEQUENCE_BYTES + MAC_BYTES + body.len());
                out.push(KIND_SEALED);
                out.extend_from_slice(&sequence.to_le_bytes());
                out.extend_from_slice(mac);
                out.extend_from_slice(body);
            }
        }
        let bytes = out.len();
        if bytes > limits::FRAME_BYTES_MAX {
            return Err(WireError::Oversized { bytes: bytes as u64, limit: limits::FRAME_BYTES_MAX });
        }
        let length = (bytes - HEADER_BYTES) as u32;
        if let Some(header) = out.first_chunk_mut::<HEADER_BYTES>() {
            *header = length.to_le_bytes();
        }
        Ok(Bytes::from(out))
    }

    /// A frame without its length, as [`FrameReader`] yields it.
    pub fn decode(mut bytes: Bytes) -> Result<Frame, WireError> {
        let total = bytes.len();
        if bytes.is_empty() {
            return Err(WireError::Truncated { bytes: 0 });
        }
        let kind = bytes.get_u8();
        match kind {
            KIND_HELLO => Ok(Frame::Hello(parse_exact(&bytes, "hello")?)),
            KIND_WELCOME => Ok(Frame::Welcome(parse_exact(&bytes, "welcome")?)),
            KIND_PROOF => {
                let mac = bytes.as_ref().try_into().map_err(|_| WireError::Truncated { bytes: total })?;
                Ok(Frame::Proof(mac))
            }
            KIND_REJECT => Ok(Frame::Reject(String::from_utf8_lossy(&bytes).into_owned())),
            KIND_SEALED => {
                if bytes.len() < SEQUENCE_BYTES + MAC_BYTES {
                    return Err(WireError::Truncated { bytes: total });
                }
                let sequence = bytes.get_u64_le();
                let mut mac = [0; MAC_BYTES];
                bytes.copy_to_slice(&mut mac);
                Ok(Frame::Sealed { sequence, mac, body: bytes })
            }
            other => Err(WireError::UnknownKind(other)),
        }
    }
}

/// Encodes a message body for a peer that speaks `protocol`. From [`TRACING_PROTOCOL`] on, `Prefill`, `Pair` and `Fetch` are followed by their trace
/// context, if they have one: 16 bytes of the trace, 8 of the span, both big-endian, and one of flags. From [`RAILS_PROTOCOL`] on, the profile of a
/// worker that pushes or is pushed to over rails is followed by their number, four bytes in little-endian. From
/// [`DOMAINS_PROTOCOL`] on, the profile of a worker whose NICs are reached from other hosts is followed by that number, which may be 0 then, and a
/// list of those NICs with their domains. From [`GPUS_PROTOCOL`] on, the profile of a worker whose NICs are GPUs is followed by both, of which the list
/// may be empty then, and a list of those NICs with their GPUs.
pub fn encode_for(message: &Message, protocol: u16) -> Result<Bytes, WireError> {
    let mut out = append(message, Vec::new(), "message")?;
    if let Some(trace) = message.trace().filter(|_| protocol >= TRACING_PROTOCOL) {
        out.extend(trace.to_bytes());
    }
    let domains = message.domains().filter(|_| protocol >= DOMAINS_PROTOCOL);
    let rails = message.rails().filter(|_| protocol >= RAILS_PROTOCOL);
    let gpus = message.gpus().filter(|_| protocol >= GPUS_PROTOCOL);
    if rails.is_some() || domains.is_some() || gpus.is_some() {
        out.extend(rails.unwrap_or(0).to_le_bytes());
    }
    if domains.is_some() || gpus.is_some() {
        out = append(&domains.unwrap_or_default(), out, "domains")?;
    }
    if let Some(gpus) = gpus {
        out = append(&gpus, out, "GPUs")?;
    }
    Ok(Bytes::from(out))
}

/// Decodes a message body of a peer that speaks `protocol`, strictly: nothing else may follow it.
pub fn decode_from(bytes: &[u8], protocol: u16) -> Result<Message, WireError> {
    let (mut message, rest) = parse::<Message>(bytes, "message")?;
    if rest.is_empty() {
        return Ok(message);
    }
    let trailing = WireError::Trailing { what: "message", bytes: rest.len() };
    if let Some(rails) = message.rails_mut().filter(|_| protocol >= RAILS_PROTOCOL) {
        let (number, rest) = rest.split_first_chunk::<RAILS_BYTES>().ok_or_else(|| trailing.clone())?;
        *rails = u32::from_le_bytes(*number);
        if rest.is_empty() && *rails == 0 {
            let cause = "0 of them are not said".to_owned();
            return Err(WireError::Malformed { what: "number of rails", cause });
        }
        if !rest.is_empty() && protocol < DOMAINS_PROTOCOL {
            return Err(trailing);
        }
        if !rest.is_empty() {
            decode_nics(&mut message, rest, protocol)?;
        }
        return Ok(message);
    }
    let Some(place) = message.trace_mut().filter(|_| protocol >= TRACING_PROTOCOL) else { return Err(trailing) };
    let bytes: &[u8; TRACE_BYTES] = rest.try_into().map_err(|_| trailing)?;
    let trace = TraceContext::from_bytes(bytes).ok_or_else(|| WireError::Malformed {
        what: "trace context",
        cause: "its trace or span is 0, or it has unknown flags".to_owned(),
    })?;
    *place = Some(trace);
    Ok(message)
}

/// What is said of a profile's NICs behind it.
fn decode_nics(message: &mut Message, bytes: &[u8], protocol: u16) -> Result<(), WireError> {
    let malformed = |what| move |cause| WireError::Malformed { what, cause };
    let (domains, rest): (Domains, _) = parse(bytes, "domains")?;
    match (rest, domains.0.as_slice()) {
        ([], []) => return Err(malformed("domains")("an empty list is not said".to_owned())),
        ([_, ..], _) if protocol < GPUS_PROTOCOL => {
            return Err(WireError::Trailing { what: "domains", bytes: rest.len() });
        }
        _ => message.set_domains(domains).map_err(malformed("domains"))?,
    }
    if !rest.is_empty() {
        message.set_gpus(parse_exact(rest, "GPUs")?).map_err(malformed("GPUs"))?;
    }
    Ok(())
}

/// Encodes a message body without its trace context, as every protocol has it.
pub fn encode_message(message: &Message) -> Result<Bytes, WireError> {
    Ok(Bytes::from(append(message, Vec::new(), "message")?))
}

/// Decodes a message body without a trace context, strictly: nothing may follow it.
pub fn decode_message(bytes: &[u8]) -> Result<Message, WireError> {
    parse_exact(bytes, "message")
}

fn append<T: Serialize>(value: &T, out: Vec<u8>, what: &'static str) -> Result<Vec<u8>, WireError> {
    postcard::to_extend(value, out).map_err(|error| WireError::Malformed { what, cause: error.to_string() })
}

fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8], what: &'static str) -> Result<(T, &'a [u8]), WireError> {
    postcard::take_from_bytes(bytes).map_err(|error| WireError::Malformed { what, cause: error.to_string() })
}

fn parse_exact<'a, T: Deserialize<'a>>(bytes: &'a [u8], what: &'static str) -> Result<T, WireError> {
    let (value, rest) = parse(bytes, what)?;
    if rest.is_empty() { Ok(value) } else { Err(WireError::Trailing { what, bytes: rest.len() }) }
}

/// Cuts a byte stream into frames. Holds at most one frame's bytes.
#[derive(Debug)]
pub struct FrameReader {
    buffer: BytesMut,
    limit: usize,
}

impl Default for FrameReader {
    fn default() -> Self {
        FrameReader { buffer: BytesMut::new(), limit: HANDSHAKE_BYTES_MAX }
    }
}

impl FrameReader {
    /// Accepts frames up to [`limits::FRAME_BYTES_MAX`] from now on; before the handshake is done only small ones are.
    pub fn trust(&mut self) {
        self.limit = limits::FRAME_BYTES_MAX;
    }

    /// Whether [`FrameReader::trust`] was called.
    pub fn is_trusted(&self) -> bool {
        self.limit == limits::FRAME_BYTES_MAX
    }

    /// Where to read more bytes into.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The next whole frame, without its length.
    pub fn next_frame(&mut self) -> Result<Option<Bytes>, WireError> {
        let Some(header) = self.buffer.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let length = u32::from_le_bytes(*header) as usize;
        if length + HEADER_BYTES > self.limit {
            return Err(WireError::Oversized { bytes: length as u64, limit: self.limit });
        }
        if self.buffer.len() < HEADER_BYTES + length {
            return Ok(None);
        }
        self.buffer.advance(HEADER_BYTES);
        Ok(Some(self.buffer.split_to(length).freeze()))
    }
}
