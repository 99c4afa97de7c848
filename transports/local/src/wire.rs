//! What crosses between two transports: addresses and keys (through the control link), frames (between two transports).
#![allow(missing_docs, reason = "variants explain their fields, and constructors take them in order")]

use bytes::Bytes;
use kvferry_core::{PoolId, PoolLayout, TransferId};
use kvferry_transport::{Notice, TransportKind};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Version of everything in this file; both ends must have the same.
pub const VERSION: u32 = 6;
/// Descriptors that travel with one frame; the kernel takes 253.
pub const FDS_PER_FRAME_MAX: usize = 200;
/// Bytes of a frame before its sender has shown the key.
pub const GREETING_BYTES_MAX: usize = 256;
/// Bytes of a frame without block tables; the largest carries a whole `PoolLayout`.
pub const PLAIN_BYTES_MAX: usize = 4 << 20;
/// Room that most frames fit in, apart from a program.
const PLAIN_BYTES: usize = 128;
/// Bytes of a frame with block tables.
pub const PUSH_BYTES_MAX: usize = kvferry_core::limits::FRAME_BYTES_MAX;
/// Bytes of an encoded address.
const ADDRESS_BYTES_MAX: usize = 512;
const ADDRESS_MAGIC: u32 = 0x6b76_7361;
const KEYS_MAGIC: u32 = 0x6b76_736b;

/// Where a transport listens, and the key that it asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    magic: u32,
    version: u32,
    /// Identity of the host.
    pub boot: String,
    /// Where the carrier finds it.
    pub place: Bytes,
    /// Session key.
    pub key: [u8; 16],
    /// Which opened transport this is.
    pub instance: [u8; 16],
}

impl Address {
    pub fn new(kind: TransportKind, boot: String, place: Bytes, key: [u8; 16], instance: [u8; 16]) -> Address {
        Address { magic: magic(ADDRESS_MAGIC, kind), version: VERSION, boot, place, key, instance }
    }

    pub fn encode(&self) -> Bytes {
        encode(self)
    }

    pub fn decode(kind: TransportKind, bytes: &[u8]) -> Result<Address, String> {
        if bytes.len() > ADDRESS_BYTES_MAX {
            return Err(format!("{} bytes where at most {ADDRESS_BYTES_MAX} are sent", bytes.len()));
        }
        let address: Address = decode(bytes)?;
        if address.magic != magic(ADDRESS_MAGIC, kind) {
            return Err("it begins with other bytes".into());
        }
        if address.version != VERSION {
            return Err(format!(
                "its version is {} where this side has {VERSION}; run the same release on both",
                address.version
            ));
        }
        Ok(address)
    }
}

/// What names a pool of one transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keys {
    magic: u32,
    /// Whose it is.
    pub instance: [u8; 16],
    /// Which pool.
    pub pool: PoolId,
    /// Proof that the owner told us.
    pub token: u64,
    /// Bytes of each region.
    pub regions: Vec<u64>,
}

impl Keys {
    pub fn new(kind: TransportKind, instance: [u8; 16], pool: PoolId, token: u64, regions: Vec<u64>) -> Keys {
        Keys { magic: magic(KEYS_MAGIC, kind), instance, pool, token, regions }
    }

    pub fn encode(&self) -> Bytes {
        encode(self)
    }

    pub fn decode(kind: TransportKind, bytes: &[u8]) -> Result<Keys, String> {
        if bytes.len() > PLAIN_BYTES_MAX {
            return Err(format!("{} bytes where at most {PLAIN_BYTES_MAX} are sent", bytes.len()));
        }
        let keys: Keys = decode(bytes)?;
        if keys.magic != magic(KEYS_MAGIC, kind) { Err("they begin with other bytes".into()) } else { Ok(keys) }
    }
}

/// One message between two transports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Frame {
    /// First of whoever connected. The key is compared in constant time.
    Hello { version: u32, key: [u8; 16], instance: [u8; 16] },
    /// First of whoever accepted.
    Welcome { instance: [u8; 16] },
    /// A push is ready to be fetched.
    Push(Doorbell),
    /// Asks for a pool's memory.
    Open { request: u32, pool: PoolId, token: u64 },
    /// Carries `count` descriptors of regions that are not empty, in order.
    Fds { request: u32, count: u32 },
    /// All descriptors were sent, or none where the owner's memory is read by address.
    Opened { request: u32, layout: PoolLayout, memory: MemoryKind },
    /// The pool is not there.
    NotOpened { request: u32, reason: String },
    /// A push is over.
    PushEnd { id: TransferId, serial: u64, outcome: PushOutcome },
    /// The source no longer wants it.
    PushCancel { id: TransferId, serial: u64 },
    /// A pull is over, and what its initiator had to say.
    Notice(Notice),
    /// A pool is not to be read any more.
    Withdrawn { pool: PoolId, token: u64 },
    /// A pool that pushes may come from, so that the way to it is there before the first.
    Offered { pool: PoolId, token: u64 },
    /// Asks whether a pool is still bound under that token.
    Check { serial: u64, pool: PoolId, token: u64 },
    /// Whether it is.
    Checked { serial: u64, stood: bool },
    /// Comes with the descriptor of memory through which small frames may go; the carrier's own.
    Ring,
    /// There is something in that memory; the carrier's own.
    Wake,
    /// What one backend says to the other.
    Own(Bytes),
    /// Nothing of a withdrawn pool is read any more.
    LetGo { pool: PoolId, token: u64 },
}

/// How a pool's memory is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryKind {
    /// Its memfds were sent.
    Shared,
    /// At these addresses of the owner's process.
    Addresses(Vec<u64>),
    /// As this kind of transport describes it; descriptors may have been sent.
    Opaque(Bytes),
}

/// A push, as its source announces it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Doorbell {
    pub id: TransferId,
    /// Tells this post from an earlier one of the same id.
    pub serial: u64,
    pub pool: PoolId,
    pub token: u64,
    pub start: u64,
    pub end: u64,
    pub notice: Option<Notice>,
    /// The encoded program, with the source's tables only.
    pub program: Bytes,
}

/// How a push ended at its destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PushOutcome {
    /// Every byte is in place.
    Done { bytes: u64, pieces: u64 },
    /// It was refused, or stopped.
    Refused(String),
    /// The destination planned this fingerprint.
    Mismatch(u64),
}

impl Frame {
    /// Its bytes behind a little-endian 32-bit length.
    pub fn encode(&self) -> Vec<u8> {
        let payload = if let Frame::Push(doorbell) = self { doorbell.program.len() } else { 0 };
        let mut out = Vec::with_capacity(payload + PLAIN_BYTES);
        out.extend([0; 4]);
        match postcard::to_extend(self, out) {
            Ok(bytes) => out = bytes,
            // Serialising into a growing vector has no way to fail for these types.
            Err(_) => out = vec![0; 4],
        }
        let length = (out.len() - 4) as u32;
        out.splice(..4, length.to_le_bytes());
        out
    }

    pub fn decode(body: &[u8]) -> Result<Frame, String> {
        decode(body)
    }

    /// The most bytes that a frame with this first byte may have.
    pub fn bytes_max(first: u8) -> usize {
        // `Push` is variant 2.
        if first == 2 { PUSH_BYTES_MAX } else { PLAIN_BYTES_MAX }
    }
}

/// No two kinds of transport take each other's addresses or keys.
fn magic(base: u32, kind: TransportKind) -> u32 {
    kind.name().bytes().fold(base, |magic, byte| magic.rotate_left(5) ^ u32::from(byte))
}

/// Equal or not, in time that does not depend on where they differ.
pub fn same_key(a: &[u8; 16], b: &[u8; 16]) -> bool {
    let difference = a.iter().zip(b).fold(0, |d, (x, y)| d | (x ^ y));
    std::hint::black_box(difference) == 0
}

fn encode<T: Serialize>(value: &T) -> Bytes {
    // Serialising into a growing vector has no way to fail for these types; an empty message is refused by `decode`.
    Bytes::from(postcard::to_allocvec(value).unwrap_or_default())
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(format!("{} bytes are left over", rest.len())),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pushes_are_variant_two() {
        let bell = Doorbell {
            id: TransferId(1),
            serial: 2,
            pool: PoolId(3),
            token: 4,
            start: 5,
            end: 6,
            notice: None,
            program: Bytes::from_static(b"p"),
        };
        let bytes = Frame::Push(bell.clone()).encode();
        assert_eq!(Frame::bytes_max(bytes[4]), PUSH_BYTES_MAX);
        assert_eq!(Frame::decode(&bytes[4..]), Ok(Frame::Push(bell)));
        let other = Frame::Open { request: 1, pool: PoolId(2), token: 3 }.encode();
        assert_eq!(Frame::bytes_max(other[4]), PLAIN_BYTES_MAX);
    }

    #[test]
    fn every_cut_of_an_address_and_of_keys_is_refused() {
        let address =
            Address::new(TransportKind::Shm, "boot".into(), Bytes::from_static(&[1; 16]), [2; 16], [3; 16]).encode();
        let keys = Keys::new(TransportKind::Shm, [3; 16], PoolId(7), 99, vec![1, 2]).encode();
        assert!(
            Address::decode(TransportKind::Shm, &address).is_ok() && Keys::decode(TransportKind::Shm, &keys).is_ok()
        );
        assert!((0..address.len()).all(|n| Address::decode(TransportKind::Shm, &address[..n]).is_err()));
        assert!((0..keys.len()).all(|n| Keys::decode(TransportKind::Shm, &keys[..n]).is_err()));
        assert!(
            Address::decode(TransportKind::Shm, &keys).is_err() && Keys::decode(TransportKind::Shm, &address).is_err()
        );
        assert!(
            Address::decode(TransportKind::Cuda, &address).is_err()
                && Keys::decode(TransportKind::Cuda, &keys).is_err()
        );
        assert!(Address::decode(TransportKind::Shm, &[address.as_ref(), &[0]].concat()).is_err());
    }

    #[test]
    fn keys_are_compared_whole() {
        let mut other = [7; 16];
        assert!(same_key(&[7; 16], &other));
        other[15] = 6;
        assert!(!same_key(&[7; 16], &other));
    }
}
