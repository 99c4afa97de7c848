//! Where a pool's planes lie, on the GPU: uploaded once, used by every launch.

use std::sync::Arc;

use kvferry_core::{Plane, PoolLayout};

use crate::buffer::Buffer;
use crate::gpu::Gpu;

/// A table of (address of block 0, bytes from block to block) in GPU memory, one entry per plane.
pub(crate) struct Planes {
    buffer: Buffer,
    entries: Vec<[u64; 2]>,
}

/// The same table, in GPU memory and here.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlaneTable<'a> {
    pub(crate) address: u64,
    /// (address of block 0, bytes from block to block)
    pub(crate) entries: &'a [[u64; 2]],
}

impl Planes {
    /// For a valid layout whose regions begin at `bases`, as kernels of `gpu` reach them.
    pub(crate) fn new(gpu: &Arc<Gpu>, layout: &PoolLayout, bases: &[u64]) -> Result<Planes, String> {
        let base = |plane: &Plane| bases.get(plane.region as usize).copied().unwrap_or(0).wrapping_add(plane.offset);
        let entries: Vec<[u64; 2]> = layout.planes.iter().map(|plane| [base(plane), plane.block_stride]).collect();
        let bytes: Vec<u8> = entries.as_flattened().iter().flat_map(|word| word.to_le_bytes()).collect();
        let buffer = Buffer::new(gpu, bytes.len())?;
        buffer.upload(&bytes)?;
        Ok(Planes { buffer, entries })
    }

    /// Where the table is.
    pub(crate) fn address(&self) -> u64 {
        self.buffer.address()
    }

    pub(crate) fn table(&self) -> PlaneTable<'_> {
        PlaneTable { address: self.buffer.address(), entries: &self.entries }
    }
}
