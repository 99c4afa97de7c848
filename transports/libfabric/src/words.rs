//! What two backends say to each other about packed chunks, beside the protocol's frames. Every number is checked by who hears it.

use bytes::Bytes;
use kvferry_transport::codec::{decode, encode};
use serde::{Deserialize, Serialize};

/// Bytes of a program that is asked for packed: what is longer is read piece by piece.
pub(crate) const PROGRAM_BYTES_MAX: usize = 1 << 20;

/// One thing that is said. A *reader* is the side whose pool is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Word {
    /// The reader would have short pieces packed; once a session.
    Ask,
    /// The source's answer: where its staging begins, and its key. None: it packs nothing.
    Staged(Option<(u64, u64)>),
    /// The reader asks for a transfer.
    Pack(Pack),
    /// The source cannot do that.
    Refused { serial: u64, reason: String },
    /// A transfer's next bytes wait in a buffer.
    Parcel(Parcel),
    /// The reader needs these buffers no more, a bit each.
    Back { buffers: u64 },
    /// The reader wants no more of a transfer.
    Stop { serial: u64 },
}

/// What is to be packed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pack {
    /// The reader's number of it.
    pub(crate) serial: u64,
    /// The source's number of the pool.
    pub(crate) pool: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Encoded, with the source's tables only.
    pub(crate) program: Bytes,
}

/// A chunk in a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Parcel {
    pub(crate) serial: u64,
    pub(crate) buffer: u32,
    pub(crate) bytes: u32,
}

impl Word {
    pub(crate) fn encode(&self) -> Bytes {
        encode(self).into()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Word, String> {
        decode(bytes).map_err(|error| format!("it says of packed chunks what is not understood: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_cross_and_cut_ones_are_refused() {
        let pack = Pack { serial: 1, pool: u64::MAX, start: 2, end: 3, program: Bytes::from_static(b"program") };
        let parcel = Parcel { serial: 4, buffer: 5, bytes: 6 };
        let staged = [Word::Staged(None), Word::Staged(Some((7, 8)))];
        let refused = Word::Refused { serial: 9, reason: "why".to_owned() };
        let rest = [Word::Ask, Word::Pack(pack), refused, Word::Parcel(parcel), Word::Back { buffers: 1 }];
        for word in staged.into_iter().chain(rest).chain([Word::Stop { serial: 1 }]) {
            let bytes = word.encode();
            assert_eq!(Word::decode(&bytes).as_ref(), Ok(&word));
            assert!((0..bytes.len()).all(|cut| Word::decode(&bytes[..cut]).is_err()), "{word:?}");
            assert!(Word::decode(&[&bytes[..], &[0]].concat()).is_err(), "{word:?}");
        }
    }
}
