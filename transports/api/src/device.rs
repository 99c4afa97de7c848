//! Memory of pools that only a device's driver reads and writes.

use std::any::Any;
use std::fmt;
use std::os::fd::OwnedFd;

use kvferry_core::{End, Program, Strip};

use crate::Pool;
use crate::known::{DeviceBlock, KnownRun, image};

/// Where a pool's bytes are when they are not the host's: a GPU's memory, as its transport provides it.
///
/// Addresses are the device's. Whoever passes one has checked that it lies, with all its bytes, inside a region of the pool. Every copy is done
/// when its function returns, in the sense that any later work of any device sees it. Errors name cause and remedy.
pub trait DeviceMemory: Any + Send + Sync {
    /// The device that it is on, as it is called in device lists.
    fn device(&self) -> &str;

    /// Copies `bytes` to `address`.
    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), String>;

    /// Copies from `address`.
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), String>;

    /// Sets `bytes` bytes from `address` on.
    fn fill(&self, address: u64, byte: u8, bytes: u64) -> Result<(), String>;

    /// Writes blocks whose bytes are known. Runs are inside their blocks, in order and apart.
    fn write_known(&self, blocks: &[DeviceBlock], runs: &[KnownRun]) -> Result<(), String> {
        blocks.iter().try_for_each(|block| self.write(block.address, &image(block, runs)))
    }

    /// Counts the bytes of each block that are not what they have to be.
    fn count_unknown(&self, blocks: &[DeviceBlock], runs: &[KnownRun]) -> Result<Vec<u32>, String> {
        let count = |block: &DeviceBlock| {
            let due = image(block, runs);
            let mut is = vec![0; due.len()];
            self.read(block.address, &mut is)?;
            Ok(is.iter().zip(&due).filter(|(is, due)| is != due).count() as u32)
        };
        blocks.iter().map(count).collect()
    }

    /// What copies between `pool`, which is in this memory, and `arena_bytes` of host memory, for transports that reach host memory only.
    fn copier(&self, pool: &Pool, arena_bytes: usize) -> Result<Box<dyn Copier>, String> {
        let _any = (pool, arena_bytes);
        Err(format!("nothing copies between {} and host memory here; use the device's own transport", self.device()))
    }

    /// The device as CUDA's driver numbers it (`CUdevice`), for libraries that register such memory. Where there is one, its context is the
    /// calling thread's from then on, so that what such a library does on that thread happens there.
    fn cuda_device(&self) -> Result<i32, String> {
        Err(format!("{} is no device of CUDA's", self.device()))
    }

    /// A descriptor that stands for a region, by which a NIC's driver finds its pages.
    fn dmabuf(&self, region: DeviceRegion) -> Result<Dmabuf, String> {
        let _any = region;
        Err(format!("no dma-buf stands for memory of {}", self.device()))
    }

    /// Whether [`DeviceMemory::settle`] can do its work for that writer, or why not. To be asked before anything is written so.
    fn settles(&self, writer: Writer) -> Result<(), String> {
        let _any = writer;
        Err(format!("nothing makes visible to kernels what others write into memory of {}", self.device()))
    }

    /// Makes what `writer` has finished writing into this memory visible to any later work of any device.
    fn settle(&self, writer: Writer) -> Result<(), String> {
        self.settles(writer)
    }
}

/// What writes into a device's memory though it is none of the device's own copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// Another device, such as a NIC, by itself.
    Nic,
    /// A library on the calling thread, by copies of the device's driver in its default stream.
    Driver,
}

/// A dma-buf that holds a region.
#[derive(Debug)]
pub struct Dmabuf {
    /// It stands for the memory for as long as it is open.
    pub fd: OwnedFd,
    /// The address of its first byte, at the start of a page.
    pub base: u64,
    /// Where the region begins in it, in bytes.
    pub offset: u64,
}

/// Copies between a pool in a device's memory and an arena of page-locked host memory, by the device, while the processor goes on. It belongs
/// to one thread. Dropping it waits for what is under way.
///
/// # Safety
/// The arena is readable and writable memory of this process, at one place, until the copier is dropped. A copy touches nothing but the bytes
/// that its strips name and their place in the arena, and those only from its start until [`Copier::is_done`] has said that it ended.
pub unsafe trait Copier {
    /// The arena: its first byte, from the start of a page on, and its length.
    fn arena(&self) -> (*mut u8, usize);

    /// Starts a copy of `strips` of a program that was validated against the pool at `end`: for [`End::Source`] from the pool into the arena, for
    /// [`End::Destination`] the other way. In the arena they lie one behind the other from byte `at` on, where there is room for them. Returns
    /// the copy's number. Copies are not ordered among each other.
    fn start(&mut self, program: &Program, end: End, strips: &[Strip], at: usize) -> Result<u64, String>;

    /// Whether a copy has ended: asked again and again until it says so, or says why it failed; then nothing of it runs any more.
    fn is_done(&mut self, copy: u64) -> Result<bool, String>;
}

impl fmt::Debug for dyn DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DeviceMemory").field(&self.device()).finish()
    }
}

/// One allocation of a pool in a device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceRegion {
    /// Its first byte, in the device's address space as this process sees it.
    pub address: u64,
    /// Its length.
    pub bytes: u64,
}
