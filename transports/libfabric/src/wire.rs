//! What crosses between two transports below the protocol's frames: messages with a fixed header, and where to send the first.

use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use kvferry_transport::codec::{decode, encode, open, same_secret, seal};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use crate::endpoint::NAME_BYTES_MAX;

/// Bytes of a secret or instance.
pub(crate) const KEY_BYTES: usize = 16;
/// Bytes of a check over something that travels.
const CHECK_BYTES: usize = 16;
/// Bytes of a header: kind, flags, two zero bytes, number (u32), session (u64), sequence (u64); little-endian.
pub(crate) const HEADER_BYTES: usize = 24;
/// Bytes of one message: it fits one packet of EFA's.
pub(crate) const MESSAGE_BYTES_MAX: usize = 8 << 10;
/// The last part of a frame.
pub(crate) const LAST: u8 = 1;
/// Nothing follows: the session ends.
pub(crate) const END: u8 = 2;
/// Says: answer, to show that you live.
pub(crate) const ANSWER: u8 = 4;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Opens a session: a sealed [`Call`].
    Call = 1,
    /// Answers it: eight bytes, what messages to the sender carry.
    Accept = 2,
    /// A part of a frame, counted by `sequence`.
    Data = 3,
    /// Says how many parts were taken; [`ANSWER`] may ask for one.
    Ack = 4,
}

/// A message's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) flags: u8,
    /// The receiver's number of the session.
    pub(crate) session: u64,
    /// Of a part: which one. Else: how many parts the sender has taken.
    pub(crate) sequence: u64,
}

impl Header {
    pub(crate) fn encode(self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[0] = self.kind as u8;
        out[1] = self.flags;
        out[8..16].copy_from_slice(&self.session.to_le_bytes());
        out[16..].copy_from_slice(&self.sequence.to_le_bytes());
        out
    }

    /// The header and what is behind it; `None` for what kvferry did not write.
    pub(crate) fn decode(bytes: &[u8]) -> Option<(Header, &[u8])> {
        let (head, body) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        let [kind, flags, 0, 0, 0, 0, 0, 0, rest @ ..] = *head else { return None };
        let (session, sequence) = rest.split_first_chunk::<8>()?;
        let kind = [Kind::Call, Kind::Accept, Kind::Data, Kind::Ack].into_iter().find(|known| *known as u8 == kind)?;
        let session = u64::from_le_bytes(*session);
        let sequence = u64::from_le_bytes(sequence.try_into().ok()?);
        Some((Header { kind, flags, session, sequence }, body))
    }
}

/// Where a transport is, and the secret that lets a peer in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Place {
    pub(crate) provider: String,
    pub(crate) name: Vec<u8>,
    pub(crate) instance: [u8; KEY_BYTES],
    pub(crate) secret: [u8; KEY_BYTES],
}

impl Place {
    const MARK: [u8; 4] = *b"kfP\x01";

    pub(crate) fn seal(&self) -> Bytes {
        seal(Place::MARK, self)
    }

    pub(crate) fn open(bytes: &[u8]) -> Result<Place, String> {
        let place: Place = open(Place::MARK, bytes)?;
        named(&place.name)?;
        Ok(place)
    }
}

/// Opens a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Call {
    /// For which incarnation it is meant.
    pub(crate) to: [u8; KEY_BYTES],
    /// The caller's endpoint.
    pub(crate) name: Vec<u8>,
    /// What messages to the caller carry.
    pub(crate) session: u64,
}

impl Call {
    /// Sealed with the receiver's secret.
    pub(crate) fn seal(&self, secret: &[u8; KEY_BYTES]) -> Vec<u8> {
        let mut out = encode(self);
        let check = check(secret, &out);
        out.extend_from_slice(&check);
        out
    }

    pub(crate) fn open(bytes: &[u8], secret: &[u8; KEY_BYTES]) -> Result<Call, String> {
        let Some((body, stated)) = bytes.split_last_chunk::<CHECK_BYTES>() else {
            return Err("a call that was cut".to_owned());
        };
        if !same_secret(stated, &check(secret, body)) {
            return Err("a call under another key".to_owned());
        }
        let call: Call = decode(body)?;
        named(&call.name)?;
        Ok(call)
    }
}

/// What lets a peer's memory be read, beside its layout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Memory {
    /// The endpoint through which it is read.
    pub(crate) name: Vec<u8>,
    /// By which packed chunks of it are asked for.
    pub(crate) number: u64,
    /// Of each region: its first byte, as the provider counts, and its key; zeroes where it has no bytes.
    pub(crate) regions: Vec<(u64, u64)>,
    /// It is in the memory of a GPU, which is read only; what says so is the mark.
    #[serde(skip)]
    pub(crate) is_on_device: bool,
}

impl Memory {
    const MARK: [u8; 4] = *b"kfM\x02";
    /// Of memory of a GPU: who does not know it would ask for packed chunks of it.
    const DEVICE_MARK: [u8; 4] = *b"kfM\x03";

    pub(crate) fn seal(&self) -> Bytes {
        seal(if self.is_on_device { Memory::DEVICE_MARK } else { Memory::MARK }, self)
    }

    pub(crate) fn open(bytes: &[u8], regions: usize) -> Result<Memory, String> {
        let is_on_device = bytes.starts_with(&Memory::DEVICE_MARK);
        let memory: Memory = open(if is_on_device { Memory::DEVICE_MARK } else { Memory::MARK }, bytes)?;
        let memory = Memory { is_on_device, ..memory };
        named(&memory.name)?;
        if memory.regions.len() != regions {
            return Err(format!("{} regions where its layout names {regions}", memory.regions.len()));
        }
        Ok(memory)
    }
}

fn named(name: &[u8]) -> Result<(), String> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(format!("an endpoint's name of {} bytes", name.len()));
    }
    Ok(())
}

fn check(secret: &[u8; KEY_BYTES], bytes: &[u8]) -> [u8; CHECK_BYTES] {
    let mut out = [0; CHECK_BYTES];
    // Keys of any length are taken.
    if let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret) {
        mac.update(b"call");
        mac.update(bytes);
        out.iter_mut().zip(mac.finalize().into_bytes()).for_each(|(to, byte)| *to = byte);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_cross_and_nothing_else_is_one() {
        for kind in [Kind::Call, Kind::Accept, Kind::Data, Kind::Ack] {
            let header = Header { kind, flags: LAST | ANSWER, session: u64::MAX - 5, sequence: 7 };
            let bytes = [&header.encode()[..], b"body"].concat();
            assert_eq!(Header::decode(&bytes), Some((header, &b"body"[..])));
            assert!((0..HEADER_BYTES).all(|cut| Header::decode(&bytes[..cut]).is_none()));
        }
        let mut bytes = Header { kind: Kind::Ack, flags: 0, session: 1, sequence: 2 }.encode();
        for (at, byte) in [(0, 0), (0, 9), (2, 1), (7, 1)] {
            let before = std::mem::replace(&mut bytes[at], byte);
            assert_eq!(Header::decode(&bytes), None);
            bytes[at] = before;
        }
    }

    #[test]
    fn a_call_counts_only_as_it_was_sealed() {
        let call = Call { to: [1; 16], name: vec![2; 16], session: 3 };
        let sealed = call.seal(&[9; 16]);
        assert_eq!(Call::open(&sealed, &[9; 16]), Ok(call.clone()));
        assert!(Call::open(&sealed, &[8; 16]).is_err());
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(Call::open(&changed, &[9; 16]).is_err() && Call::open(&sealed[..at], &[9; 16]).is_err());
        }
        assert!(Call::open(&Call { name: Vec::new(), ..call }.seal(&[9; 16]), &[9; 16]).is_err());
    }

    #[test]
    fn places_and_memory_that_were_cut_are_refused() {
        let place = Place { provider: "tcp".into(), name: vec![7; 16], instance: [1; 16], secret: [2; 16] }.seal();
        assert!(Place::open(&place).is_ok() && (0..place.len()).all(|cut| Place::open(&place[..cut]).is_err()));
        let memory =
            Memory { name: vec![7; 16], number: 8, regions: vec![(0, 5), (4096, 6)], is_on_device: false }.seal();
        assert!(Memory::open(&memory, 2).is_ok() && Memory::open(&memory, 1).is_err());
        assert!((0..memory.len()).all(|cut| Memory::open(&memory[..cut], 2).is_err()));
    }

    /// As kvferry 0.1 wrote it, which refuses a GPU's by its mark.
    #[test]
    fn only_memory_of_a_gpu_has_another_mark() {
        let memory = |is_on_device| Memory { name: vec![7; 2], number: 8, regions: vec![(0, 5)], is_on_device };
        let (host, device) = (memory(false).seal(), memory(true).seal());
        assert_eq!(host[..], *b"kfM\x02\x02\x07\x07\x08\x01\x00\x05");
        assert!(device[..4] == *b"kfM\x03" && device[4..] == host[4..]);
        for is_on_device in [false, true] {
            assert_eq!(Memory::open(&memory(is_on_device).seal(), 1), Ok(memory(is_on_device)));
        }
    }
}
