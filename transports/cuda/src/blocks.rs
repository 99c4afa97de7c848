//! Known bytes in every block of a pool, written and compared by the GPU itself.

use kvferry_transport::{DeviceBlock, KnownRun, Pool, known_word, write_known};

use crate::known::{self, Task};
use crate::memory::GpuMemory;

/// Blocks are taken apart into pieces of this: a warp each.
const PIECE_BYTES: u64 = 1 << 20;

/// The first byte that is not what it must be, and how many there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// How many bytes differ.
    pub bytes: u64,
    /// Plane of the first.
    pub plane: u32,
    /// Its block.
    pub block: u32,
    /// Its byte in the block.
    pub byte: u64,
}

/// What the bytes of a block with this label follow from, in this plane ([`write_known`]).
pub fn block_state(plane: u32, label: u64) -> u64 {
    // Twice the mixer of words: labels are small numbers.
    known_word(known_word(u64::from(plane) << 48 ^ label, 1), 1)
}

/// Writes every block of a pool whose planes are alike: block `b` of plane `p` gets what follows from [`block_state`] of `p` and `labels[b]`, each
/// bit the other way round where the label is below `complement_below`.
pub fn fill_blocks(pool: &Pool, labels: &[u64], complement_below: u64) -> Result<(), String> {
    for is_complement in [false, true] {
        let pieces = Pieces::of(pool, labels, |label| (label < complement_below) == is_complement)?;
        pieces.run(if is_complement { Task::WriteComplement } else { Task::Write })?;
    }
    Ok(())
}

/// Compares every byte of every block with what [`fill_blocks`] writes, without complements.
pub fn check_blocks(pool: &Pool, labels: &[u64]) -> Result<Option<Difference>, String> {
    let pieces = Pieces::of(pool, labels, |_| true)?;
    let counts = pieces.run(Task::Count)?;
    let bytes: u64 = counts.iter().map(|count| u64::from(*count)).sum();
    let Some(first) = counts.iter().position(|count| *count > 0) else { return Ok(None) };
    let (Some((plane, block, start)), Some(run)) = (pieces.places.get(first).copied(), pieces.runs.get(first)) else {
        return Err("more counts than pieces".to_owned());
    };
    let mut due = vec![0; run.bytes as usize];
    let mut found = due.clone();
    write_known(&mut due, run.state);
    pool.read(plane, block, start, &mut found).map_err(|error| error.to_string())?;
    let at = due.iter().zip(&found).position(|(due, found)| due != found).unwrap_or(0);
    Ok(Some(Difference { bytes, plane, block, byte: start + at as u64 }))
}

/// Blocks of a pool as the kernels take them, one run each.
struct Pieces<'a> {
    memory: &'a GpuMemory,
    /// Plane, block, and byte of it.
    places: Vec<(u32, u32, u64)>,
    blocks: Vec<DeviceBlock>,
    runs: Vec<KnownRun>,
}

impl<'a> Pieces<'a> {
    fn of(pool: &'a Pool, labels: &[u64], is_meant: impl Fn(u64) -> bool) -> Result<Pieces<'a>, String> {
        let memory = GpuMemory::of(pool).ok_or("the pool is not on a GPU")?;
        let layout = pool.layout();
        let first = layout.planes.first().ok_or("the pool has no planes")?;
        let alike = layout.planes.iter().all(|p| (p.blocks, p.block_bytes) == (first.blocks, first.block_bytes));
        if !alike || labels.len() != first.blocks as usize {
            return Err("the pool's planes differ, or there is not one label per block".to_owned());
        }
        let mut pieces = Pieces { memory, places: Vec::new(), blocks: Vec::new(), runs: Vec::new() };
        for (plane, of) in (0..).zip(&layout.planes) {
            let region = pool.device_regions().get(of.region as usize).ok_or("a plane is in no region")?;
            for (block, label) in (0..).zip(labels).filter(|(_, label)| is_meant(**label)) {
                let state = block_state(plane, *label);
                let address = region.address + of.offset + u64::from(block) * of.block_stride;
                for start in (0..of.block_bytes).step_by(PIECE_BYTES as usize) {
                    let bytes = PIECE_BYTES.min(of.block_bytes - start) as u32;
                    let first = pieces.runs.len() as u32;
                    let address = address + start;
                    pieces.blocks.push(DeviceBlock { address, bytes, first, count: 1, background: 0 });
                    pieces.runs.push(KnownRun { state, offset: 0, bytes }.from_word(start / 8));
                    pieces.places.push((plane, block, start));
                }
            }
        }
        Ok(pieces)
    }

    fn run(&self, task: Task) -> Result<Vec<u32>, String> {
        if self.blocks.is_empty() {
            return Ok(Vec::new());
        }
        // Every piece lies in its block, which the pool's layout has in its region.
        known::run(self.memory, task, &self.blocks, &self.runs)
    }
}
