//! Memory of pools that only a device's driver reads and writes.

use std::any::Any;
use std::fmt;

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
