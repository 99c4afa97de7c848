//! Blocks whose every byte is known, for engines that check what was moved: a device can write and compare them where they lie.

use crate::device::DeviceMemory;
use crate::pool::{Place, Pool, PoolError, on};

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Bytes of a block that follow from a number: little-endian words, word `n` of them being [`known_word`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownRun {
    /// The number; it should be well mixed.
    pub state: u64,
    /// Where it begins in its block.
    pub offset: u32,
    /// How long it is.
    pub bytes: u32,
}

impl KnownRun {
    /// Its words from `index` on, as a run of the same place and length.
    pub fn from_word(self, index: u64) -> KnownRun {
        KnownRun { state: self.state.wrapping_add(index.wrapping_mul(GOLDEN)), ..self }
    }
}

/// Word `index` of what follows from a number.
pub fn known_word(state: u64, index: u64) -> u64 {
    let word = state.wrapping_add(index.wrapping_mul(GOLDEN));
    // Half of a mixer: enough for numbers that are mixed already.
    let word = (word ^ (word >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    word ^ (word >> 29)
}

/// Writes what follows from a number.
pub fn write_known(run: &mut [u8], state: u64) {
    let (words, tail) = run.as_chunks_mut::<8>();
    let count = words.len() as u64;
    for (index, word) in (0..).zip(words) {
        *word = known_word(state, index).to_le_bytes();
    }
    for (byte, value) in tail.iter_mut().zip(known_word(state, count).to_le_bytes()) {
        *byte = value;
    }
}

/// Blocks of a pool, and what is, or is to be, in them.
#[derive(Clone, Debug, Default)]
pub struct KnownBlocks {
    blocks: Vec<Block>,
    runs: Vec<KnownRun>,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    plane: u32,
    block: u32,
    background: u8,
    /// Where its runs end.
    runs_end: usize,
}

/// One of them, as a device's kernels take it: `count` runs from `first` on, in order and apart, and `background` everywhere else.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceBlock {
    /// Its first byte.
    pub address: u64,
    /// Its length.
    pub bytes: u32,
    /// Its first run.
    pub first: u32,
    /// Its runs.
    pub count: u32,
    /// The byte where no run is.
    pub background: u32,
}

impl KnownBlocks {
    /// Adds a block: `runs` in any order, none in another, and `background` everywhere else.
    pub fn push(&mut self, plane: u32, block: u32, background: u8, runs: impl IntoIterator<Item = KnownRun>) {
        let first = self.runs.len();
        self.runs.extend(runs.into_iter().filter(|run| run.bytes > 0));
        if let Some(added) = self.runs.get_mut(first..) {
            added.sort_unstable_by_key(|run| run.offset);
        }
        self.blocks.push(Block { plane, block, background, runs_end: self.runs.len() });
    }

    /// How many they are.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Forgets them.
    pub fn clear(&mut self) {
        self.blocks.clear();
        self.runs.clear();
    }

    /// For the memory that they are in, each checked against the pool's layout.
    fn placed<'a>(&self, pool: &'a Pool) -> Result<(&'a dyn DeviceMemory, Vec<DeviceBlock>), PoolError> {
        let mut memory = None;
        let mut placed = Vec::with_capacity(self.blocks.len());
        let mut first = 0;
        for known in &self.blocks {
            let Block { plane, block, background, runs_end } = *known;
            let bytes = pool.plane(plane, block, 0, 0)?.block_bytes;
            let outside = || PoolError::OutOfBounds { plane, block, offset: 0, bytes };
            let mut end = 0;
            for run in self.runs.get(first..runs_end).unwrap_or_default() {
                if u64::from(run.offset) < end || u64::from(run.offset) + u64::from(run.bytes) > bytes {
                    let (offset, bytes) = (run.offset.into(), run.bytes.into());
                    return Err(PoolError::OutOfBounds { plane, block, offset, bytes });
                }
                end = u64::from(run.offset) + u64::from(run.bytes);
            }
            let Place::Device(there, address) = pool.block(plane, block, 0, bytes)? else { return Err(outside()) };
            memory = Some(there);
            placed.push(DeviceBlock {
                address,
                bytes: u32::try_from(bytes).map_err(|_| outside())?,
                first: u32::try_from(first).map_err(|_| outside())?,
                count: (runs_end - first) as u32,
                background: background.into(),
            });
            first = runs_end;
        }
        let empty = || PoolError::OutOfBounds { plane: 0, block: 0, offset: 0, bytes: 0 };
        Ok((memory.ok_or_else(empty)?, placed))
    }
}

impl Pool {
    /// Has the device that the pool is on write blocks.
    pub fn write_known(&self, known: &KnownBlocks) -> Result<(), PoolError> {
        if known.is_empty() {
            return Ok(());
        }
        let (memory, blocks) = known.placed(self)?;
        memory.write_known(&blocks, &known.runs).map_err(|reason| on(memory, reason))
    }

    /// Has the device that the pool is on compare blocks: how many bytes of each differ from what they have to be.
    pub fn count_unknown(&self, known: &KnownBlocks) -> Result<Vec<u32>, PoolError> {
        if known.is_empty() {
            return Ok(Vec::new());
        }
        let (memory, blocks) = known.placed(self)?;
        memory.count_unknown(&blocks, &known.runs).map_err(|reason| on(memory, reason))
    }
}

/// The bytes of a block.
pub(crate) fn image(block: &DeviceBlock, runs: &[KnownRun]) -> Vec<u8> {
    let mut image = vec![block.background as u8; block.bytes as usize];
    let first = block.first as usize;
    for run in runs.get(first..first + block.count as usize).unwrap_or_default() {
        let start = run.offset as usize;
        if let Some(part) = image.get_mut(start..start + run.bytes as usize) {
            write_known(part, run.state);
        }
    }
    image
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvferry_core::{Plane, PoolId, PoolLayout};

    fn layout() -> PoolLayout {
        let plane = Plane { region: 0, offset: 4, blocks: 3, block_stride: 30, block_bytes: 20 };
        PoolLayout { regions: vec![94], planes: vec![plane] }
    }

    fn run(offset: u32, bytes: u32) -> KnownRun {
        KnownRun { state: 7, offset, bytes }
    }

    fn known(runs: &[KnownRun]) -> KnownBlocks {
        let mut known = KnownBlocks::default();
        known.push(0, 1, 0xdb, runs.iter().copied());
        known
    }

    #[test]
    fn a_run_goes_on_where_it_was_cut() {
        let rest = run(0, 8).from_word(5);
        assert_eq!((rest.offset, rest.bytes), (0, 8));
        for index in 0..9 {
            assert_eq!(known_word(rest.state, index), known_word(7, index + 5));
        }
    }

    #[test]
    fn a_run_is_its_words_whatever_its_length() {
        let words: Vec<u8> = (0..4).flat_map(|index| known_word(7, index).to_le_bytes()).collect();
        for length in 0..32 {
            let mut run = vec![0; length];
            write_known(&mut run, 7);
            assert_eq!(run, words[..length]);
        }
    }

    #[cfg(feature = "conformance")]
    #[test]
    fn blocks_are_written_and_every_changed_byte_counts() {
        let pool = crate::conformance::apart(PoolId(1), layout());
        let known = known(&[run(9, 11), run(0, 3), run(5, 0)]);
        pool.write_known(&known).unwrap();
        assert_eq!(pool.count_unknown(&known).unwrap(), [0]);
        let mut is = [0; 20];
        pool.read(0, 1, 0, &mut is).unwrap();
        assert_eq!(is[3..9], [0xdb; 6]);
        for at in 0..20 {
            pool.write(0, 1, at, &[!is[at as usize]]).unwrap();
            assert_eq!(pool.count_unknown(&known).unwrap(), [1], "byte {at}");
            pool.write(0, 1, at, &[is[at as usize]]).unwrap();
        }
        for block in [0, 2] {
            pool.read(0, block, 0, &mut is).unwrap();
            assert_eq!(is, [0; 20], "no other block is touched");
        }
    }

    #[cfg(feature = "conformance")]
    #[test]
    fn what_is_not_in_its_block_reaches_no_device() {
        let pool = crate::conformance::apart(PoolId(1), layout());
        for runs in [&[run(15, 6)][..], &[run(0, 8), run(7, 2)], &[run(u32::MAX, u32::MAX)]] {
            assert!(matches!(pool.write_known(&known(runs)), Err(PoolError::OutOfBounds { .. })), "{runs:?}");
            assert!(pool.count_unknown(&known(runs)).is_err(), "{runs:?}");
        }
        let mut far = KnownBlocks::default();
        far.push(0, 3, 0, []);
        assert!(pool.write_known(&far).is_err(), "there is no such block");
        let host = Pool::allocate(PoolId(1), layout(), "test").unwrap();
        assert!(host.write_known(&known(&[])).is_err(), "no device has it");
    }
}
