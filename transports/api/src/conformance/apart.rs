//! A device without a device.

use std::sync::{Arc, Mutex, PoisonError};

use kvferry_core::{PoolId, PoolLayout};

use crate::{DeviceMemory, DeviceRegion, Pool};

/// Where the memory begins, as it is called; nothing of this process is there.
const BASE: u64 = 1 << 60;

/// A pool in memory that only its owner's functions reach, as a GPU's is.
pub fn apart(id: PoolId, layout: PoolLayout) -> Pool {
    let mut regions = Vec::new();
    let mut end = BASE;
    for &bytes in &layout.regions {
        regions.push(DeviceRegion { address: end, bytes });
        end += bytes;
    }
    let memory = Arc::new(Apart(Mutex::new(vec![0; (end - BASE) as usize])));
    // SAFETY: every region is a part of the memory, of its own length.
    unsafe { Pool::on_device(id, layout, regions, memory) }.unwrap()
}

struct Apart(Mutex<Vec<u8>>);

impl Apart {
    fn with<T>(&self, address: u64, bytes: usize, reach: impl FnOnce(&mut [u8]) -> T) -> Result<T, String> {
        let mut memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let start = address.checked_sub(BASE).ok_or("before its beginning")? as usize;
        Ok(reach(memory.get_mut(start..start + bytes).ok_or("behind its end")?))
    }
}

impl DeviceMemory for Apart {
    fn device(&self) -> &str {
        "apart"
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), String> {
        self.with(address, bytes.len(), |memory| memory.copy_from_slice(bytes))
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), String> {
        self.with(address, bytes.len(), |memory| bytes.copy_from_slice(memory))
    }

    fn fill(&self, address: u64, byte: u8, bytes: u64) -> Result<(), String> {
        self.with(address, bytes as usize, |memory| memory.fill(byte))
    }
}
