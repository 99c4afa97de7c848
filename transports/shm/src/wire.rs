//! What crosses the socket: addresses and keys (through the control link), frames (between two transports).

use bytes::Bytes;
use kvferry_core::{PoolId, PoolLayout, TransferId};
use kvferry_transport::Notice;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Version of everything in this file; both ends must have the same.
pub(crate) const VERSION: u32 = 1;
/// Descriptors that travel with one frame; the kernel takes 253.
pub(crate) const FDS_PER_FRAME_MAX: usize = 200;
/// Bytes of a frame before its sender has shown the key.
pub(crate) const GREETING_BYTES_MAX: usize = 256;
/// Bytes of a frame without block tables; the largest carries a whole `PoolLayout`.
pub(crate) const PLAIN_BYTES_MAX: usize = 4 << 20;
/// Bytes of a frame with block tables.
pub(crate) const PUSH_BYTES_MAX: usize = kvferry_core::limits::FRAME_BYTES_MAX;
/// Bytes of an encoded address.
const ADDRESS_BYTES_MAX: usize = 512;
const ADDRESS_MAGIC: u32 = 0x6b76_7361;
const KEYS_MAGIC: u32 = 0x6b76_736b;

/// Where a transport listens, and the key that it asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Address {
    magic: u32,
    version: u32,
    /// Identity of the host.
    pub(crate) boot: String,
    /// Name of the abstract socket.
    pub(crate) socket: [u8; 16],
    /// Session key.
    pub(crate) key: [u8; 16],
    /// Which opened transport this is.
    pub(crate) instance: [u8; 16],
}

impl Address {
    pub(crate) fn new(boot: String, socket: [u8; 16], key: [u8; 16], instance: [u8; 16]) -> Address {
        Address { magic: ADDRESS_MAGIC, version: VERSION, boot, socket, key, instance }
    }

    pub(crate) fn encode(&self) -> Bytes {
        encode(self)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Address, String> {
        if bytes.len() > ADDRESS_BYTES_MAX {
            return Err(format!("{} bytes where at most {ADDRESS_BYTES_MAX} are sent", bytes.len()));
        }
        let address: Address = decode(bytes)?;
        if address.magic != ADDRESS_MAGIC {
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
pub(crate) struct Keys {
    magic: u32,
    /// Whose it is.
    pub(crate) instance: [u8; 16],
    /// Which pool.
    pub(crate) pool: PoolId,
    /// Proof that the owner told us.
    pub(crate) token: u64,
    /// Bytes of each region.
    pub(crate) regions: Vec<u64>,
}

impl Keys {
    pub(crate) fn new(instance: [u8; 16], pool: PoolId, token: u64, regions: Vec<u64>) -> Keys {
        Keys { magic: KEYS_MAGIC, instance, pool, token, regions }
    }

    pub(crate) fn encode(&self) -> Bytes {
        encode(self)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Keys, String> {
        if bytes.len() > PLAIN_BYTES_MAX {
            return Err(format!("{} bytes where at most {PLAIN_BYTES_MAX} are sent", bytes.len()));
        }
        let keys: Keys = decode(bytes)?;
        if keys.magic != KEYS_MAGIC { Err("they begin with other bytes".into()) } else { Ok(keys) }
    }
}

/// One message between two transports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Frame {
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
}

/// How a pool's memory is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum MemoryKind {
    /// Its memfds were sent.
    Shared,
    /// At these addresses of the owner's process.
    Addresses(Vec<u64>),
}

/// A push, as its source announces it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Doorbell {
    pub(crate) id: TransferId,
    /// Tells this post from an earlier one of the same id.
    pub(crate) serial: u64,
    pub(crate) pool: PoolId,
    pub(crate) token: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) notice: Option<Notice>,
    /// The encoded program, with the source's tables only.
    pub(crate) program: Bytes,
}

/// How a push ended at its destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum PushOutcome {
    /// Every byte is in place.
    Done { bytes: u64, pieces: u64 },
    /// It was refused, or stopped.
    Refused(String),
    /// The destination planned this fingerprint.
    Mismatch(u64),
}

impl Frame {
    /// Its bytes behind a little-endian 32-bit length.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; 4];
        match postcard::to_extend(self, out) {
            Ok(bytes) => out = bytes,
            // Serialising into a growing vector has no way to fail for these types.
            Err(_) => out = vec![0; 4],
        }
        let length = (out.len() - 4) as u32;
        out.splice(..4, length.to_le_bytes());
        out
    }

    pub(crate) fn decode(body: &[u8]) -> Result<Frame, String> {
        decode(body)
    }

    /// The most bytes that a frame with this first byte may have.
    pub(crate) fn bytes_max(first: u8) -> usize {
        // `Push` is variant 2.
        if first == 2 { PUSH_BYTES_MAX } else { PLAIN_BYTES_MAX }
    }
}

/// Equal or not, in time that does not depend on where they differ.
pub(crate) fn same_key(a: &[u8; 16], b: &[u8; 16]) -> bool {
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
        let address = Address::new("boot".into(), [1; 16], [2; 16], [3; 16]).encode();
        let keys = Keys::new([3; 16], PoolId(7), 99, vec![1, 2]).encode();
        assert!(Address::decode(&address).is_ok() && Keys::decode(&keys).is_ok());
        assert!((0..address.len()).all(|n| Address::decode(&address[..n]).is_err()));
        assert!((0..keys.len()).all(|n| Keys::decode(&keys[..n]).is_err()));
        assert!(Address::decode(&keys).is_err() && Keys::decode(&address).is_err());
        assert!(Address::decode(&[address.as_ref(), &[0]].concat()).is_err());
    }

    #[test]
    fn keys_are_compared_whole() {
        let mut other = [7; 16];
        assert!(same_key(&[7; 16], &other));
        other[15] = 6;
        assert!(!same_key(&[7; 16], &other));
    }
}
