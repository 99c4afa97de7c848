//! Where a pool's planes lie, on the GPU: uploaded once, used by every launch.

use std::sync::Arc;

use kvferry_core::PoolLayout;

use crate::buffer::Buffer;
use crate::gpu::Gpu;

/// A table of (address of block 0, bytes from block to block) in GPU memory, one entry per plane.
pub(crate) struct Planes {
    buffer: Buffer,
}

impl Planes {
    /// For a valid layout whose regions begin at `bases`, as kernels of `gpu` reach them.
    pub(crate) fn new(gpu: &Arc<Gpu>, layout: &PoolLayout, bases: &[u64]) -> Result<Planes, String> {
        let mut bytes = Vec::with_capacity(layout.planes.len() * 16);
        for plane in &layout.planes {
            let base = bases.get(plane.region as usize).copied().unwrap_or(0).wrapping_add(plane.offset);
            bytes.extend(base.to_le_bytes());
            bytes.extend(plane.block_stride.to_le_bytes());
        }
        let buffer = Buffer::new(gpu, bytes.len())?;
        buffer.upload(&bytes)?;
        Ok(Planes { buffer })
    }

    /// Where the table is.
    pub(crate) fn address(&self) -> u64 {
        self.buffer.address()
    }
}
