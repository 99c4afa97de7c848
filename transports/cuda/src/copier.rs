//! Copies between a pool on a GPU and page-locked host memory, for transports that reach host memory only.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kvferry_core::{End, Program, Strip};
use kvferry_transport::{Copier, Pool};

use crate::buffer::{Buffer, HostBuffer};
use crate::gpu::Gpu;
use crate::launch::Launcher;
use crate::planes::Planes;
use crate::slot::Launch;
use crate::staged::lower_strips;

/// Thread blocks of one copy at most. PCIe is slower than they are, and a chunk of a mebibyte keeps no more of them busy.
const BLOCKS: u32 = 8;

/// One pool's launches, and the arena that they fill and empty.
pub(crate) struct StagedCopies {
    // First: whoever drops them waits for their end, before what they touch goes.
    launches: BTreeMap<u64, Launch>,
    launcher: Launcher,
    planes: Planes,
    /// The arena as a plane.
    plane: Buffer,
    arena: HostBuffer,
    number: u64,
}

impl StagedCopies {
    pub(crate) fn new(gpu: &Arc<Gpu>, pool: &Pool, arena_bytes: usize) -> Result<StagedCopies, String> {
        let bases: Vec<u64> = pool.device_regions().iter().map(|region| region.address).collect();
        let arena = HostBuffer::new(gpu, arena_bytes)
            .map_err(|error| format!("{arena_bytes} bytes of page-locked host memory cannot be had: {error}"))?;
        let words = [arena.base() as u64, 0];
        let plane = Buffer::new(gpu, size_of_val(&words))?;
        plane.upload(&words.map(u64::to_le_bytes).concat())?;
        Ok(StagedCopies {
            launches: BTreeMap::new(),
            launcher: Launcher::new(gpu, BLOCKS, Duration::ZERO, None)?,
            planes: Planes::new(gpu, pool.layout(), &bases)?,
            plane,
            arena,
            number: 0,
        })
    }
}

// SAFETY: the arena is page-locked memory that lives until this is dropped, after all launches. A launch moves what its strips name, by `lower_strips`,
// and its end is seen only when it has moved everything.
unsafe impl Copier for StagedCopies {
    fn arena(&self) -> (*mut u8, usize) {
        (self.arena.base(), self.arena.bytes())
    }

    fn start(&mut self, program: &Program, end: End, strips: &[Strip], at: usize) -> Result<u64, String> {
        let bytes: u64 = strips.iter().map(Strip::bytes).fold(0, u64::saturating_add);
        if (at as u64).saturating_add(bytes) > self.arena.bytes() as u64 {
            return Err(format!("{bytes} bytes do not fit the arena from byte {at} on"));
        }
        let tables = (self.planes.address(), self.plane.address());
        let payload = lower_strips(program, end, strips, at as u64, tables).map_err(|error| error.to_string())?;
        let stream = self.launcher.stream();
        // SAFETY: the program was validated against the pool's layout at this end, so its strips stay inside the pool; they stay inside the arena,
        // as was just checked. Both, and both plane tables, live until the launch has ended: it is kept here, and dropped first.
        let launch = unsafe { self.launcher.launch(&payload, stream, false) }?;
        self.number += 1;
        self.launches.insert(self.number, launch);
        Ok(self.number)
    }

    fn is_done(&mut self, copy: u64) -> Result<bool, String> {
        let Some(launch) = self.launches.get_mut(&copy) else { return Ok(true) };
        let done = self.launcher.is_done(launch);
        if done != Ok(false)
            && let Some(launch) = self.launches.remove(&copy)
        {
            match done {
                Ok(_) => self.launcher.recycle(launch),
                // Another launch must not find its slot in use: waits for its end, if it has none yet.
                Err(_) => drop(launch),
            }
        }
        done
    }
}
