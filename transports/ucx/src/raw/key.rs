//! Packed keys of other programs' memory.
//!
//! UCX takes a key without its length and follows what it says (`src/ucp/core/ucp_rkey.c`): a map of memory domains, a memory type, then for each
//! domain a length and so many bytes; since 1.13 the system device, and if that is known, distances to devices up to an end mark.

/// Bytes of the longest key that is taken.
const BYTES_MAX: usize = 1 << 12;
/// Behind what was checked: end marks.
const PADDING: usize = 512;
/// Domains that UCX has room for.
const DOMAINS_MAX: u32 = 64;
/// The highest kind of memory whose keys are taken: the host's, CUDA's, CUDA's managed.
const MEMORY_MAX: u8 = 2;
/// An unknown device: the end of the list.
const END: u8 = 0xff;
/// A device, a latency and a bandwidth.
const DISTANCE_BYTES: usize = 3;

/// A packed key whose structure was checked: every length in it stays inside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedKey {
    padded: Vec<u8>,
}

impl PackedKey {
    /// Checks a key that came from somewhere else. The error says what is wrong with it.
    pub fn check(bytes: &[u8]) -> Result<PackedKey, String> {
        if bytes.len() > BYTES_MAX {
            return Err(format!("a key of {} bytes; at most {BYTES_MAX} are taken", bytes.len()));
        }
        let cut = || format!("the key is cut: {} bytes are not all of it", bytes.len());
        let map = bytes.get(..8).and_then(|map| map.try_into().ok()).map(u64::from_le_bytes).ok_or_else(cut)?;
        let memory = *bytes.get(8).ok_or_else(cut)?;
        if memory > MEMORY_MAX {
            return Err(format!("a key of memory of kind {memory}; the host's and CUDA's are taken"));
        }
        let mut rest = bytes.get(9..).unwrap_or_default();
        for _ in 0..map.count_ones().min(DOMAINS_MAX) {
            let (length, after) = rest.split_first().ok_or_else(cut)?;
            rest = after.get(usize::from(*length)..).ok_or_else(cut)?;
        }
        if let Some((device, distances)) = rest.split_first()
            && *device != END
        {
            let mut distances = distances;
            while distances.first().is_some_and(|device| *device != END) {
                distances = distances.get(DISTANCE_BYTES..).ok_or_else(cut)?;
            }
            rest = distances;
        }
        // Nothing, or the end mark.
        if !matches!(rest, [] | [END]) {
            return Err(format!("{} bytes follow the key's end", rest.len()));
        }
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len() + PADDING - 1, END);
        // And an end of texts.
        padded.push(0);
        Ok(PackedKey { padded })
    }

    /// The bytes as they came.
    pub fn bytes(&self) -> &[u8] {
        self.padded.get(..self.padded.len() - PADDING).unwrap_or_default()
    }

    /// The bytes with end marks behind them.
    pub(crate) fn padded(&self) -> &[u8] {
        &self.padded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(map: u64, rest: &[u8]) -> Vec<u8> {
        [&map.to_le_bytes()[..], rest].concat()
    }

    #[test]
    fn real_keys_are_taken() {
        // tcp's of a host: no key of a domain of its own; two domains with keys; a GPU's with distances.
        for whole in [
            key(1, &[0, 0, END]),
            key(0, &[0]),
            key(0b101, &[0, 2, 7, 7, 1, 9, END]),
            key(1, &[1, 1, 5, 3, 0, 1, 2, 4, 1, 2, END]),
            key(1, &[0, 1, 5]),
        ] {
            assert_eq!(PackedKey::check(&whole).unwrap().bytes(), whole);
        }
    }

    #[test]
    fn what_would_be_read_beyond_its_end_is_refused() {
        for wrong in [
            vec![],
            vec![0; 8],
            key(3, &[0, 0]),
            key(1, &[0, 200, 1]),
            key(u64::MAX, &[0; 60]),
            key(1, &[9, 0, END]),
            key(1, &[0, 0, END, 1]),
            key(1, &[0, 0, 3, 1, 2]),
            vec![0; BYTES_MAX + 1],
        ] {
            assert!(PackedKey::check(&wrong).is_err(), "{wrong:?}");
        }
    }
}
