//! Pools with known bytes, the programs between them, and a naive check that uses no walker.

use std::sync::Arc;

use kvferry_core::{Plane, PoolId, PoolLayout, Program, Segment, Side};

use super::harness::device;
use crate::{Pool, Provider};

/// Bytes that no transfer may leave behind where it has nothing to write.
pub(super) const SENTINEL: u8 = 0xee;

/// What moves: K and V of some layers and tokens.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Layers.
    pub layers: u32,
    /// Heads.
    pub heads: u32,
    /// Bytes of one head of one token.
    pub run_bytes: u32,
    /// First token that moves.
    pub start: u64,
    /// One past the last.
    pub end: u64,
}

/// How one side keeps it.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// Tokens per block.
    pub block_tokens: u32,
    /// Heads outside tokens in a block.
    pub heads_first: bool,
    /// K and V in one plane.
    pub interleaved: bool,
}

impl Format {
    /// Token-major, K and V apart.
    pub fn plain(block_tokens: u32) -> Format {
        Format { block_tokens, heads_first: false, interleaved: false }
    }

    fn token_pitch(&self, shape: &Shape) -> u64 {
        u64::from(if self.heads_first { shape.run_bytes } else { shape.run_bytes * shape.heads })
    }

    fn head_pitch(&self, shape: &Shape) -> u64 {
        u64::from(shape.run_bytes) * if self.heads_first { u64::from(self.block_tokens) } else { 1 }
    }

    fn tensor_bytes(&self, shape: &Shape) -> u64 {
        u64::from(self.block_tokens) * u64::from(shape.heads) * u64::from(shape.run_bytes)
    }

    /// Plane and byte offset in its block of one run; the block is `token / block_tokens`.
    fn place(&self, shape: &Shape, layer: u32, tensor: u32, token: u64, head: u32) -> (u32, u64) {
        let inside =
            token % u64::from(self.block_tokens) * self.token_pitch(shape) + u64::from(head) * self.head_pitch(shape);
        if self.interleaved {
            (layer, u64::from(tensor) * self.tensor_bytes(shape) + inside)
        } else {
            (layer * 2 + tensor, inside)
        }
    }

    fn layout(&self, shape: &Shape, blocks: u32) -> PoolLayout {
        let block_bytes = self.tensor_bytes(shape) * if self.interleaved { 2 } else { 1 };
        // A gap behind every block, and two regions (one of them odd in size), so that offsets are not trivial.
        let block_stride = block_bytes + 64;
        let planes = shape.layers * if self.interleaved { 1 } else { 2 };
        let plane_bytes = block_stride * u64::from(blocks);
        let mut regions = vec![13, 0];
        let place = |plane: u32| {
            let region = plane % 2;
            let offset = regions.get(region as usize).copied().unwrap_or(0);
            if let Some(bytes) = regions.get_mut(region as usize) {
                *bytes += plane_bytes;
            }
            Plane { region, offset, blocks, block_stride, block_bytes }
        };
        let planes = (0..planes).map(place).collect();
        PoolLayout { regions, planes }
    }
}

/// One side's pool and block table.
pub(super) struct Holding {
    pub(super) pool: Pool,
    pub(super) format: Format,
    shape: Shape,
    table: Arc<[u32]>,
}

impl Holding {
    /// A pool with twice the blocks that the shape needs, every byte of it [`SENTINEL`].
    pub(super) fn new(provider: &dyn Provider, id: u32, shape: &Shape, format: Format, seed: u64) -> Holding {
        let first = shape.start / u64::from(format.block_tokens);
        let needed = (shape.end.div_ceil(u64::from(format.block_tokens)).max(first) - first) as u32;
        let blocks = needed * 2 + 1;
        let layout = format.layout(shape, blocks);
        let pool = provider.allocate(&device(provider), PoolId(id), layout, "conformance").unwrap();
        let mut ids: Vec<u32> = (0..blocks).collect();
        let mut state = seed | 1;
        for i in (1..ids.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ids.swap(i, (state >> 33) as usize % (i + 1));
        }
        let holding = Holding { pool, format, shape: *shape, table: ids.into_iter().take(needed as usize).collect() };
        holding.clear();
        holding
    }

    pub(super) fn clear(&self) {
        for (plane, p) in self.pool.layout().planes.iter().enumerate() {
            (0..p.blocks).for_each(|block| self.pool.fill(plane as u32, block, SENTINEL).unwrap());
        }
    }

    /// The block of a token.
    fn block(&self, token: u64) -> u32 {
        let bt = u64::from(self.format.block_tokens);
        self.table[(token / bt - self.shape.start / bt) as usize]
    }

    /// Writes the bytes that `salt` defines, for the tokens of its shape only.
    pub(super) fn fill(&self, salt: u64) {
        self.each_run(|plane, block, offset, bytes| self.pool.write(plane, block, offset, bytes).unwrap(), salt);
    }

    /// Checks that the tokens of its shape are what `salt` defines and that no other byte of any block was touched.
    pub(super) fn verify(&self, salt: u64) {
        let mut image = self.image();
        self.each_run(|plane, block, offset, bytes| self.paint(&mut image, plane, block, offset, bytes), salt);
        self.compare(&image);
    }

    /// Checks that no byte was ever written.
    pub(super) fn verify_untouched(&self) {
        self.compare(&self.image());
    }

    /// Every byte of every block, as it is now.
    pub(super) fn snapshot(&self) -> Vec<Vec<u8>> {
        let mut image = self.image();
        for (plane, (p, bytes)) in self.pool.layout().planes.iter().zip(&mut image).enumerate() {
            for (block, bytes) in bytes.chunks_mut(p.block_bytes.max(1) as usize).enumerate() {
                self.pool.read(plane as u32, block as u32, 0, bytes).unwrap();
            }
        }
        image
    }

    fn image(&self) -> Vec<Vec<u8>> {
        self.pool
            .layout()
            .planes
            .iter()
            .map(|p| vec![SENTINEL; (p.block_bytes * u64::from(p.blocks)) as usize])
            .collect()
    }

    fn paint(&self, image: &mut [Vec<u8>], plane: u32, block: u32, offset: u64, bytes: &[u8]) {
        let start = (u64::from(block) * self.pool.layout().planes[plane as usize].block_bytes + offset) as usize;
        image[plane as usize][start..start + bytes.len()].copy_from_slice(bytes);
    }

    fn compare(&self, image: &[Vec<u8>]) {
        for (plane, (now, wanted)) in self.snapshot().iter().zip(image).enumerate() {
            if let Some(byte) = now.iter().zip(wanted).position(|(a, b)| a != b) {
                let size = self.pool.layout().planes[plane].block_bytes as usize;
                let (block, offset) = (byte / size, byte % size);
                panic!("plane {plane} block {block} byte {offset}: {:#x} where {:#x} belongs", now[byte], wanted[byte]);
            }
        }
    }

    fn each_run(&self, mut f: impl FnMut(u32, u32, u64, &[u8]), salt: u64) {
        let shape = &self.shape;
        let mut run = vec![0; shape.run_bytes as usize];
        for (layer, tensor) in (0..shape.layers).flat_map(|layer| [(layer, 0), (layer, 1)]) {
            for (token, head) in
                (shape.start..shape.end).flat_map(|token| (0..shape.heads).map(move |head| (token, head)))
            {
                let place = [u64::from(layer), u64::from(tensor), token, u64::from(head)];
                let mut state = place
                    .iter()
                    .fold(salt ^ 0x9e37_79b9_7f4a_7c15, |h, v| (h ^ v).wrapping_mul(0x0100_0000_01b3).rotate_left(23));
                for byte in &mut run {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    *byte = (state >> 56) as u8;
                }
                let (plane, offset) = self.format.place(shape, layer, tensor, token, head);
                f(plane, self.block(token), offset, &run);
            }
        }
    }
}

/// The program from one holding to the other, of the same shape, with both sides' tables.
pub(super) fn program(source: &Holding, destination: &Holding) -> Program {
    let shape = &source.shape;
    let side = |holding: &Holding, tensor: u32| {
        let format = &holding.format;
        let (plane, offset) = format.place(shape, 0, tensor, 0, 0);
        Side {
            plane,
            plane_step: if format.interleaved { 1 } else { 2 },
            table: 0,
            first_block: shape.start / u64::from(format.block_tokens),
            block_tokens: format.block_tokens,
            cp: 1,
            cp_rank: 0,
            token_pitch: format.token_pitch(shape),
            head_pitch: format.head_pitch(shape),
            offset,
        }
    };
    let segment = |tensor| Segment {
        source: side(source, tensor),
        destination: side(destination, tensor),
        planes: shape.layers,
        start: shape.start,
        end: shape.end,
        heads: shape.heads,
        run_bytes: shape.run_bytes,
    };
    Program {
        segments: vec![segment(0), segment(1)],
        sources: vec![Some(Arc::clone(&source.table))],
        destinations: vec![Some(Arc::clone(&destination.table))],
    }
}

/// Bytes that a shape has.
pub(super) fn bytes(shape: &Shape) -> u64 {
    u64::from(shape.layers)
        * 2
        * u64::from(shape.heads)
        * u64::from(shape.run_bytes)
        * shape.end.saturating_sub(shape.start)
}
