//! Known bytes in every block of a pool, written and compared by the GPU itself.

use std::ffi::c_void;

use kvferry_transport::Pool;

use crate::buffer::Buffer;
use crate::driver::{self, Function};
use crate::memory::GpuMemory;
use crate::planes::Planes;

const BLOCKS: u32 = 1024;
const THREADS: u32 = 512;

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

/// Writes every block of a pool whose planes are alike: block `b` of plane `p` gets bytes that `p` and `labels[b]` define, the complement of
/// them where the label is below `complement_below`.
///
/// The little-endian word `w` of a block is `mix(mix(p << 48 ^ label) + w)`, `mix` being SplitMix64's next output for a state.
pub fn fill_blocks(pool: &Pool, labels: &[u64], complement_below: u64) -> Result<(), String> {
    let blocks = Blocks::of(pool, labels)?;
    let mut below = complement_below;
    blocks.run(|memory| memory.gpu.fill, (&raw mut below).cast())
}

/// Compares every byte of every block with what [`fill_blocks`] writes, without complements.
pub fn check_blocks(pool: &Pool, labels: &[u64]) -> Result<Option<Difference>, String> {
    let blocks = Blocks::of(pool, labels)?;
    let found = Buffer::new(&blocks.memory.gpu, 16)?;
    let start: Vec<u8> = [0u64, u64::MAX].iter().flat_map(|word| word.to_le_bytes()).collect();
    found.upload(&start)?;
    let mut address = found.address();
    blocks.run(|memory| memory.gpu.check, (&raw mut address).cast())?;
    let mut words = [0; 16];
    found.download(&mut words)?;
    let (count, first) = words.split_at(8);
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
    let (bytes, first) = (word(count), word(first));
    let (row, size) = (first / blocks.block_bytes.max(1), u64::from(blocks.blocks).max(1));
    let difference = Difference {
        bytes,
        plane: (row / size) as u32,
        block: (row % size) as u32,
        byte: first % blocks.block_bytes.max(1),
    };
    Ok((bytes > 0).then_some(difference))
}

/// A pool as both kernels see it.
struct Blocks<'a> {
    memory: &'a GpuMemory,
    planes: Planes,
    labels: Buffer,
    block_bytes: u64,
    plane_count: u32,
    blocks: u32,
}

/// As in `walk.cu`.
#[repr(C)]
struct Arguments {
    planes: u64,
    labels: u64,
    block_bytes: u64,
    plane_count: u32,
    blocks: u32,
}

impl<'a> Blocks<'a> {
    fn of(pool: &'a Pool, labels: &[u64]) -> Result<Blocks<'a>, String> {
        let memory = GpuMemory::of(pool).ok_or("the pool is not on a GPU")?;
        let layout = pool.layout();
        let first = layout.planes.first().ok_or("the pool has no planes")?;
        let alike = layout.planes.iter().all(|p| (p.blocks, p.block_bytes) == (first.blocks, first.block_bytes));
        if !alike || labels.len() != first.blocks as usize {
            return Err("the pool's planes differ, or there is not one label per block".to_owned());
        }
        let bases: Vec<u64> = pool.device_regions().iter().map(|region| region.address).collect();
        let words: Vec<u8> = labels.iter().flat_map(|label| label.to_le_bytes()).collect();
        let buffer = Buffer::new(&memory.gpu, words.len())?;
        buffer.upload(&words)?;
        Ok(Blocks {
            memory,
            planes: Planes::new(&memory.gpu, layout, &bases)?,
            labels: buffer,
            block_bytes: first.block_bytes,
            plane_count: layout.planes.len() as u32,
            blocks: first.blocks,
        })
    }

    /// Runs one of the kernels and waits for it. `last` points to its second argument, a 64-bit word.
    fn run(&self, function: impl Fn(&GpuMemory) -> Function, last: *mut c_void) -> Result<(), String> {
        self.memory.gpu.enter()?;
        let mut arguments = Arguments {
            planes: self.planes.address(),
            labels: self.labels.address(),
            block_bytes: self.block_bytes,
            plane_count: self.plane_count,
            blocks: self.blocks,
        };
        let stream = driver::create_stream()?;
        let mut parameters = [(&raw mut arguments).cast(), last];
        // SAFETY: the parameters are the kernel's; what it touches, the pool's planes and the buffers, is held here until it has ended.
        let ran = unsafe {
            let ran = driver::launch(function(self.memory), BLOCKS, THREADS, stream, &mut parameters)
                .and_then(|()| driver::synchronize(stream));
            driver::destroy_stream(stream).and(ran)
        };
        Ok(ran?)
    }
}
