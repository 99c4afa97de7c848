//! Where a pool's planes lie, on the GPU: uploaded once, used by every launch.

use std::sync::Arc;

use kvferry_core::{Plane, PoolLayout};

use crate::buffer::Buffer;
use crate::gpu::Gpu;

/// A table of (address of block 0, bytes from block to block) in GPU memory, one entry per plane.
pub(crate) struct Planes {
    buffer: Buffer,
    entries: Vec<[u64; 2]>,
    step: Option<u64>,
}

/// The same table, in GPU memory and here.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlaneTable<'a> {
    pub(crate) address: u64,
    /// (address of block 0, bytes from block to block)
    pub(crate) entries: &'a [[u64; 2]],
    /// Bytes from plane to plane, if all planes follow each other evenly and have one stride. Wraps.
    pub(crate) step: Option<u64>,
}

impl Planes {
    /// For a valid layout whose regions begin at `bases`, as kernels of `gpu` reach them.
    pub(crate) fn new(gpu: &Arc<Gpu>, layout: &PoolLayout, bases: &[u64]) -> Result<Planes, String> {
        let base = |plane: &Plane| bases.get(plane.region as usize).copied().unwrap_or(0).wrapping_add(plane.offset);
        let entries: Vec<[u64; 2]> = layout.planes.iter().map(|plane| [base(plane), plane.block_stride]).collect();
        let bytes: Vec<u8> = entries.as_flattened().iter().flat_map(|word| word.to_le_bytes()).collect();
        let buffer = Buffer::new(gpu, bytes.len())?;
        buffer.upload(&bytes)?;
        let step = step(&entries);
        Ok(Planes { buffer, entries, step })
    }

    /// Where the table is.
    pub(crate) fn address(&self) -> u64 {
        self.buffer.address()
    }

    pub(crate) fn table(&self) -> PlaneTable<'_> {
        PlaneTable { address: self.buffer.address(), entries: &self.entries, step: self.step }
    }
}

/// [`PlaneTable::step`] of these entries.
pub(crate) fn step(entries: &[[u64; 2]]) -> Option<u64> {
    let distance = |[before, after]: [[u64; 2]; 2]| after[0].wrapping_sub(before[0]);
    let pairs = || entries.array_windows::<2>().copied();
    let step = pairs().next().map_or(0, distance);
    pairs().all(|pair| distance(pair) == step && pair[0][1] == pair[1][1]).then_some(step)
}
