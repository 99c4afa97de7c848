//! What two transports say to each other: active messages with a fixed header, and what travels on the control link before them.
//!
//! A *link* is the endpoint between two transports; *sessions* are what `connect` opens over it, each with a secret number at either end
//! that every message of it carries. A transfer has a tag, chosen by its initiator and never used twice in a session.

use std::sync::Arc;

use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use kvferry_core::limits::{FRAME_BYTES_MAX, REGIONS_MAX};
use kvferry_core::{PoolId, PoolLayout, TransferId, UnitRange};
use kvferry_transport::Notice;
use kvferry_transport::codec::{decode, encode, open, same_secret, seal};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

use crate::process::Process;

/// Bytes of a transport's secret or instance.
pub(crate) const KEY_BYTES: usize = 16;
/// Bytes of a check over something that travels.
const CHECK_BYTES: usize = 16;
/// Bytes of one message: it fits one segment of UCX's tcp.
pub(crate) const MESSAGE_BYTES_MAX: usize = 252 << 10;
/// Bytes of a chunk that is sent by rendezvous, and its header.
pub(crate) const RENDEZVOUS_BYTES_MAX: usize = (1 << 20) + HEADER_BYTES;
/// Bytes of a chunk that its destination reads.
pub(crate) const PARCEL_BYTES_MAX: usize = 1 << 20;
/// The tag of what warms a link up: of no transfer, since theirs begin with one.
pub(crate) const WARMING_TAG: u64 = 0;
/// Bytes of a message that came in parts.
pub(crate) const WHOLE_BYTES_MAX: usize = FRAME_BYTES_MAX + (64 << 10);
/// Bytes of a worker's address: with one device there are tens.
pub(crate) const ADDRESS_BYTES_MAX: usize = 4 << 10;
/// Bytes of a packed key of one region.
pub(crate) const RKEY_BYTES_MAX: usize = 1 << 10;
/// Bytes of a refusal's text.
const TEXT_BYTES_MAX: usize = 512;

/// Bytes of a header: kind, three zero bytes, number (u32), session (u64), tag (u64); little-endian.
pub(crate) const HEADER_BYTES: usize = 24;
/// Bytes that one message carries behind its header.
pub(crate) const BODY_BYTES_MAX: usize = MESSAGE_BYTES_MAX - HEADER_BYTES;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Opens a session: a [`Hello`], sealed with the receiver's secret.
    Hello = 1,
    /// Answers it: a [`Welcome`].
    Welcome = 2,
    /// The session is over: words.
    Bye = 3,
    /// The next bytes of a message of the same tag that is longer than one may be; `number` counts them.
    Part = 4,
    /// Initiator → owner of the source: a [`Read`], then the encoded program. The bytes come as [`Kind::PullData`].
    Read = 5,
    /// Initiator → owner of the destination: a [`Write`], then the encoded program where the destination may read by itself.
    Write = 6,
    /// Destination → initiator of a push: send the bytes as [`Kind::PushData`].
    Go = 7,
    /// Bytes that answer a `Read`; `number` counts the chunks of a transfer.
    PullData = 8,
    /// Bytes that follow a `Go`.
    PushData = 9,
    /// `number` chunks were taken off the link; of those that were read, the bits of `tag` say which buffers are the source's again.
    Credit = 10,
    /// Destination → initiator of a push: every byte is visible; a [`Done`].
    Done = 11,
    /// Responder → initiator: a [`Refusal`]; ends the transfer.
    Refuse = 12,
    /// Initiator → responder: ends the transfer.
    Cancel = 13,
    /// Initiator of a pull → owner: a [`Notice`].
    Notice = 14,
    /// Destination of a push → source: lend me that pool's keys; a [`Named`].
    Borrow = 15,
    /// The answer, or, with tag 0, ahead of the first push from a pool: a [`Lend`].
    Lend = 16,
    /// The owner withdraws a pool; a [`Named`].
    Withdraw = 17,
    /// A reader of it has stopped; a [`Named`].
    Withdrawn = 18,
    /// What a link begins with, after one chunk of no transfer; a [`Warmed`].
    Warmed = 19,
    /// Destination → source: put packed chunks where I can read them.
    Ask = 20,
    /// The answer, once a link: a [`Staged`].
    Staged = 21,
    /// Of the bytes that answer a `Read`, this chunk is to be read: a [`Parcel`].
    PullParcel = 22,
    /// The same of the bytes that follow a `Go`.
    PushParcel = 23,
}

impl Kind {
    fn of(byte: u8) -> Option<Kind> {
        use Kind::{
            Ask, Borrow, Bye, Cancel, Credit, Done, Go, Hello, Lend, Notice, Part, PullData, PullParcel, PushData,
            PushParcel, Read, Refuse, Staged, Warmed, Welcome, Withdraw, Withdrawn, Write,
        };
        [
            Hello, Welcome, Bye, Part, Read, Write, Go, PullData, PushData, Credit, Done, Refuse, Cancel, Notice,
            Borrow, Lend, Withdraw, Withdrawn, Warmed, Ask, Staged, PullParcel, PushParcel,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }

    /// Whether it is what a peer's message made this side say.
    pub(crate) fn is_answer(self) -> bool {
        use Kind::{Ask, Credit, Done, Go, Lend, Refuse, Staged, Warmed, Welcome, Withdrawn};
        matches!(self, Welcome | Warmed | Ask | Staged | Go | Credit | Done | Refuse | Lend | Withdrawn)
    }

    /// Whether it may be longer than one message.
    pub(crate) fn may_be_long(self) -> bool {
        matches!(self, Kind::Read | Kind::Write | Kind::Lend)
    }
}

/// What a chunk that is to be read would be if it had been sent.
pub(crate) fn data_of(parcel: Kind) -> Option<Kind> {
    match parcel {
        Kind::PullParcel => Some(Kind::PullData),
        Kind::PushParcel => Some(Kind::PushData),
        _ => None,
    }
}

/// A message's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) number: u32,
    /// The receiver's number of the session.
    pub(crate) session: u64,
    pub(crate) tag: u64,
}

impl Header {
    pub(crate) fn encode(self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[0] = self.kind as u8;
        out[4..8].copy_from_slice(&self.number.to_le_bytes());
        out[8..16].copy_from_slice(&self.session.to_le_bytes());
        out[16..].copy_from_slice(&self.tag.to_le_bytes());
        out
    }

    /// The header and what is behind it; `None` for what kvferry did not write.
    pub(crate) fn decode(bytes: &[u8]) -> Option<(Header, &[u8])> {
        let (head, body) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        let [kind, 0, 0, 0, n0, n1, n2, n3, rest @ ..] = *head else { return None };
        let (session, tag) = rest.split_first_chunk::<8>()?;
        let header = Header {
            kind: Kind::of(kind)?,
            number: u32::from_le_bytes([n0, n1, n2, n3]),
            session: u64::from_le_bytes(*session),
            tag: u64::from_le_bytes(tag.try_into().ok()?),
        };
        (body.len() <= BODY_BYTES_MAX).then_some((header, body))
    }
}

/// A whole message.
pub(crate) fn message(header: Header, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_BYTES + body.len());
    out.extend_from_slice(&header.encode());
    out.extend_from_slice(body);
    out
}

/// Where a transport is, and the secret that lets a peer in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Address {
    /// [`Method::number`](crate::device::Method::number).
    pub(crate) method: u8,
    pub(crate) instance: [u8; KEY_BYTES],
    pub(crate) secret: [u8; KEY_BYTES],
    /// UCX's address of the worker.
    pub(crate) worker: Vec<u8>,
    /// Whose it is, where that is told.
    pub(crate) process: Option<Process>,
}

impl Address {
    const MARK: [u8; 4] = *b"kuA\x05";

    /// With a check behind it: UCX itself takes what it is given, and may end the process.
    pub(crate) fn seal(&self) -> Bytes {
        let mut out = seal(Address::MARK, self).to_vec();
        let check = Sha256::digest(&out);
        out.extend(check.iter().take(CHECK_BYTES));
        Bytes::from(out)
    }

    pub(crate) fn open(bytes: &[u8]) -> Result<Address, String> {
        if bytes.len() > ADDRESS_BYTES_MAX + 256 {
            return Err(format!("{} bytes are too many", bytes.len()));
        }
        let Some((body, check)) = bytes.split_last_chunk::<CHECK_BYTES>() else {
            return Err("it was cut".to_owned());
        };
        let address: Address = open(Address::MARK, body)?;
        if Sha256::digest(body).iter().take(CHECK_BYTES).ne(check) {
            return Err("its bytes were changed on the way".to_owned());
        }
        if address.worker.is_empty() || address.worker.len() > ADDRESS_BYTES_MAX {
            return Err(format!("a worker address of {} bytes", address.worker.len()));
        }
        Ok(address)
    }
}

/// One region as its readers see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RegionKey {
    pub(crate) base: u64,
    pub(crate) bytes: u64,
    /// UCX's packed key; empty where nothing was registered.
    pub(crate) rkey: Vec<u8>,
}

impl RegionKey {
    /// Whether UCX may be shown it.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.rkey.len() > RKEY_BYTES_MAX || self.base.checked_add(self.bytes).is_none() {
            return Err("a region has no address, or a key of too many bytes".to_owned());
        }
        Ok(())
    }
}

/// Names one binding of a pool, and lets it be read where it is registered: a pool that is bound anew gets a new token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Keys {
    pub(crate) instance: [u8; KEY_BYTES],
    pub(crate) pool: PoolId,
    pub(crate) token: u64,
    pub(crate) regions: Vec<RegionKey>,
}

impl Keys {
    const MARK: [u8; 4] = *b"kuK\x01";

    /// Sealed with the owner's secret, which its peers have from its address: UCX trusts the bytes of a key.
    pub(crate) fn seal(&self, secret: &[u8; KEY_BYTES]) -> Bytes {
        let mut out = seal(Keys::MARK, self).to_vec();
        let check = check(secret, b"keys", &out);
        out.extend_from_slice(&check);
        Bytes::from(out)
    }

    pub(crate) fn open(bytes: &[u8], secret: &[u8; KEY_BYTES]) -> Result<Keys, String> {
        let Some((body, stated)) = bytes.split_last_chunk::<CHECK_BYTES>() else {
            return Err("they were cut".to_owned());
        };
        if !same_secret(stated, &check(secret, b"keys", body)) {
            return Err("they are not of this peer, or were changed on the way".to_owned());
        }
        let keys: Keys = open(Keys::MARK, body)?;
        keys.check()?;
        Ok(keys)
    }

    /// Whether UCX may be shown them.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.regions.len() > REGIONS_MAX {
            return Err(format!("{} regions, at most {REGIONS_MAX} are allowed", self.regions.len()));
        }
        self.regions.iter().try_for_each(RegionKey::check)
    }

    /// Whether every region with bytes can be read.
    pub(crate) fn are_readable(&self) -> bool {
        self.regions.iter().all(|region| region.bytes == 0 || !region.rkey.is_empty())
    }
}

/// Opens a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hello {
    /// For which incarnation it is meant.
    pub(crate) to: [u8; KEY_BYTES],
    pub(crate) from: [u8; KEY_BYTES],
    /// The sender's endpoint: how many it had made to the receiver before. A new one means that the sender has given up the old.
    pub(crate) link: u64,
    /// What messages to the sender carry.
    pub(crate) session: u64,
    pub(crate) worker: Vec<u8>,
    /// As in an [`Address`].
    pub(crate) process: Option<Process>,
}

impl Hello {
    pub(crate) fn seal(&self, secret: &[u8; KEY_BYTES]) -> Vec<u8> {
        let mut out = encode(self);
        let check = check(secret, b"hello", &out);
        out.extend_from_slice(&check);
        out
    }

    pub(crate) fn open(bytes: &[u8], secret: &[u8; KEY_BYTES]) -> Result<Hello, String> {
        let Some((body, stated)) = bytes.split_last_chunk::<CHECK_BYTES>() else {
            return Err("a hello that was cut".to_owned());
        };
        if !same_secret(stated, &check(secret, b"hello", body)) {
            return Err("a hello under another key".to_owned());
        }
        let hello: Hello = decode(body)?;
        if hello.worker.is_empty() || hello.worker.len() > ADDRESS_BYTES_MAX {
            return Err(format!("a worker address of {} bytes", hello.worker.len()));
        }
        Ok(hello)
    }
}

/// Answers a hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Welcome {
    /// The sender's endpoint, as in a [`Hello`].
    pub(crate) link: u64,
    /// What messages to the sender carry.
    pub(crate) session: u64,
}

/// Tells that all of what warms a link up was sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Warmed {
    /// Memory of the sender's that holds nothing and may be read, where its method reads memory.
    pub(crate) sample: Option<RegionKey>,
}

/// Staging of the sender's, for this link only: as many buffers of [`PARCEL_BYTES_MAX`] bytes as there are credits; none where it sends messages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Staged {
    pub(crate) staging: Option<RegionKey>,
}

/// A chunk that waits in the sender's staging.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Parcel {
    /// In which buffer; it is the reader's until a credit gives it back.
    pub(crate) buffer: u32,
    /// How long it is.
    pub(crate) bytes: u32,
}

/// Asks the owner of a source pool for its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Read {
    pub(crate) pool: PoolId,
    pub(crate) token: u64,
    pub(crate) fingerprint: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
}

/// Announces a push.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Write {
    pub(crate) id: TransferId,
    pub(crate) pool: PoolId,
    pub(crate) token: u64,
    pub(crate) fingerprint: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) notice: Option<Notice>,
    /// The pool that the destination may read, if it can; the program follows then.
    pub(crate) source: Option<Named>,
}

impl Write {
    pub(crate) fn range(&self) -> UnitRange {
        UnitRange { start: self.start, end: self.end }
    }
}

/// One binding of one of the sender's or the receiver's pools.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Named {
    pub(crate) pool: PoolId,
    pub(crate) token: u64,
}

/// A pool's keys and layout, or none where it is withdrawn.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lend {
    pub(crate) named: Named,
    pub(crate) pool: Option<(Keys, Arc<PoolLayout>)>,
}

/// How a push was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Done {
    pub(crate) pieces: u64,
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
    /// A refusal in words, cut to what a message may hold.
    pub(crate) fn text(words: impl Into<String>) -> Refusal {
        Refusal::Text(cut(words.into()))
    }
}

/// Words of a bounded length.
pub(crate) fn cut(mut words: String) -> String {
    let mut end = words.len().min(TEXT_BYTES_MAX);
    while !words.is_char_boundary(end) {
        end -= 1;
    }
    words.truncate(end);
    words
}

/// A value, and what stands behind it.
pub(crate) fn decode_first<T: DeserializeOwned>(bytes: &[u8]) -> Result<(T, &[u8]), String> {
    postcard::take_from_bytes(bytes).map_err(|error| error.to_string())
}

fn check(secret: &[u8; KEY_BYTES], purpose: &[u8], bytes: &[u8]) -> [u8; CHECK_BYTES] {
    let mut out = [0; CHECK_BYTES];
    // Keys of any length are taken.
    if let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret) {
        mac.update(purpose);
        mac.update(bytes);
        out.iter_mut().zip(mac.finalize().into_bytes()).for_each(|(to, byte)| *to = byte);
    }
    out
}
