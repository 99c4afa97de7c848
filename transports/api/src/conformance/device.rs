//! A device that is not there: memory that only its own copies touch, which take their time and end in any order.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvferry_core::{End, PoolId, PoolLayout, Program, Strip, TransportKind};

use crate::region::Region;
use crate::{
    Copier, Device, DeviceMemory, DeviceRegion, OpenError, Options, Pool, PoolError, PoolOptions, Provider, Transport,
};

/// Where the device's addresses begin: nowhere in any process.
const BASE: u64 = 1 << 60;
/// From one region to the next.
const STEP: u64 = 1 << 48;

/// A provider whose pools are in the memory of such a device, some or all of them.
pub struct OnDevice<P> {
    provider: P,
    which: fn(PoolId) -> bool,
    chunk_bytes: usize,
    chunks: u32,
    faults: Faults,
}

/// Every pool of the suite, for [`OnDevice`] and its like.
pub fn every_pool(_: PoolId) -> bool {
    true
}

/// The pools that the suite's transfers come from: those of odd numbers.
pub fn source_pools(pool: PoolId) -> bool {
    !destination_pools(pool)
}

/// The pools that they go to: those of even numbers.
pub fn destination_pools(pool: PoolId) -> bool {
    pool.0.is_multiple_of(2)
}

/// Which copies fail.
#[derive(Clone, Default)]
pub struct Faults {
    /// Counts down to the one that fails; at zero none does.
    left: Arc<AtomicU64>,
}

impl Faults {
    /// Has the copy after `copies` others fail.
    pub fn after(&self, copies: u64) {
        self.left.store(copies + 1, Ordering::Relaxed);
    }

    fn is_due(&self) -> bool {
        let less = |left: u64| left.checked_sub(1);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less) == Ok(1)
    }
}

impl<P: Provider> OnDevice<P> {
    /// Pools for which `which` is true are in the device's memory, and are staged by `chunks` chunks of `chunk_bytes`.
    pub fn new(provider: P, which: fn(PoolId) -> bool, chunk_bytes: usize, chunks: u32) -> OnDevice<P> {
        OnDevice { provider, which, chunk_bytes, chunks, faults: Faults::default() }
    }

    /// What fails of its pools' copies.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }
}

impl<P: Provider> Provider for OnDevice<P> {
    fn kind(&self) -> TransportKind {
        self.provider.kind()
    }

    fn discover(&self) -> Vec<Device> {
        self.provider.discover()
    }

    fn allocate(&self, device: &Device, id: PoolId, layout: PoolLayout, name: &str) -> Result<Pool, PoolError> {
        if !(self.which)(id) {
            return self.provider.allocate(device, id, layout, name);
        }
        layout.validate()?;
        let bytes: Vec<u64> = layout.regions.clone();
        let region = |(index, bytes): (u64, &u64)| DeviceRegion { address: BASE + index * STEP, bytes: *bytes };
        let regions = (0..).zip(&bytes).map(region).collect();
        let zeros = bytes.iter().map(|bytes| vec![0; *bytes as usize]).collect();
        let memory = Memory { bytes: Arc::new(Mutex::new(zeros)), faults: self.faults.clone() };
        // SAFETY: every region is memory of the "device", which the memory owns.
        unsafe { Pool::on_device(id, layout, regions, Arc::new(memory)) }
    }

    fn open(&self, device: &Device, options: &Options) -> Result<Box<dyn Transport>, OpenError> {
        let (staged_chunk_bytes, staged_chunks) = (self.chunk_bytes, self.chunks);
        self.provider.open(device, &Options { staged_chunk_bytes, staged_chunks, ..options.clone() })
    }
}

type Bytes = Arc<Mutex<Vec<Vec<u8>>>>;

struct Memory {
    bytes: Bytes,
    faults: Faults,
}

impl Memory {
    /// The bytes from an address on.
    fn at<R>(&self, address: u64, length: usize, f: impl FnOnce(&mut [u8]) -> R) -> Result<R, String> {
        let (region, offset) = ((address - BASE) / STEP, ((address - BASE) % STEP) as usize);
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let place = bytes.get_mut(region as usize).and_then(|bytes| bytes.get_mut(offset..offset + length));
        place.map(f).ok_or_else(|| "no such address".to_owned())
    }
}

impl DeviceMemory for Memory {
    fn device(&self) -> &str {
        "a device of the tests"
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), String> {
        self.at(address, bytes.len(), |place| place.copy_from_slice(bytes))
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), String> {
        self.at(address, bytes.len(), |place| bytes.copy_from_slice(place))
    }

    fn fill(&self, address: u64, byte: u8, bytes: u64) -> Result<(), String> {
        self.at(address, bytes as usize, |place| place.fill(byte))
    }

    fn copier(&self, pool: &Pool, arena_bytes: usize) -> Result<Box<dyn Copier>, String> {
        let arena = Region::private(arena_bytes as u64, &PoolOptions::default()).map_err(|error| error.to_string())?;
        Ok(Box::new(Copies {
            arena,
            bytes: Arc::clone(&self.bytes),
            layout: pool.layout().clone(),
            faults: self.faults.clone(),
            under_way: BTreeMap::new(),
            number: 0,
            dice: 0x2545_f491_4f6c_dd1d ^ u64::from(pool.id().0),
        }))
    }
}

struct Copies {
    arena: Region,
    bytes: Bytes,
    layout: PoolLayout,
    faults: Faults,
    under_way: BTreeMap<u64, Copy>,
    number: u64,
    dice: u64,
}

/// A copy that moves its bytes at its very end: whatever was done to its slot or its pool too early shows.
struct Copy {
    end: End,
    /// Region, offset and place in the arena of every run, and its bytes.
    runs: Vec<(usize, usize, usize, usize)>,
    fails: bool,
}

// SAFETY: the arena is a region that lives as long as this; copies touch the runs that their strips name, when `is_done` says that they ended.
unsafe impl Copier for Copies {
    fn arena(&self) -> (*mut u8, usize) {
        (self.arena.base(), self.arena.bytes() as usize)
    }

    fn start(&mut self, program: &Program, end: End, strips: &[Strip], at: usize) -> Result<u64, String> {
        let mut runs = Vec::new();
        let mut start = at;
        for strip in strips {
            let segment = program.segments.get(strip.segment).ok_or("no such segment")?;
            let side = segment.side(end);
            let plane = side.plane + strip.plane * side.plane_step;
            let plane = self.layout.planes.get(plane as usize).ok_or("no such plane")?;
            let table = program.tables(end).get(side.table as usize).and_then(Option::as_ref).ok_or("no table")?;
            let (token_pitch, head_pitch) = strip.pitches();
            for (token, head) in (0..strip.tokens).flat_map(|token| (0..strip.heads).map(move |head| (token, head))) {
                let number = strip.token + token;
                let block = number / u64::from(side.block_tokens);
                let slot = block / u64::from(side.cp) - side.first_block;
                let block = *table.get(slot as usize).ok_or("no such block")?;
                let offset = plane.offset
                    + u64::from(block) * plane.block_stride
                    + side.offset
                    + number % u64::from(side.block_tokens) * side.token_pitch
                    + u64::from(strip.head + head) * side.head_pitch
                    + u64::from(strip.byte);
                let place = start as u64 + token * token_pitch + u64::from(head) * head_pitch;
                runs.push((plane.region as usize, offset as usize, place as usize, strip.run_bytes as usize));
            }
            start += strip.bytes() as usize;
        }
        if start > self.arena.bytes() as usize {
            return Err("the arena is too small".to_owned());
        }
        self.number += 1;
        self.under_way.insert(self.number, Copy { end, runs, fails: self.faults.is_due() });
        Ok(self.number)
    }

    fn is_done(&mut self, copy: u64) -> Result<bool, String> {
        self.dice = self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if self.dice >> 61 != 0 {
            return Ok(false);
        }
        let Some(copy) = self.under_way.remove(&copy) else { return Err("no such copy".to_owned()) };
        if copy.fails {
            return Err("the test says so".to_owned());
        }
        self.end(&copy);
        Ok(true)
    }
}

impl Copies {
    fn end(&self, copy: &Copy) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        for &(region, offset, place, length) in &copy.runs {
            let Some(memory) = bytes.get_mut(region).and_then(|bytes| bytes.get_mut(offset..offset + length)) else {
                panic!("a copy left the pool");
            };
            let arena = self.arena.base().wrapping_add(place);
            // SAFETY: `start` checked that the run lies in the arena, which is this copy's here and no memory of the device.
            unsafe {
                match copy.end {
                    End::Source => std::ptr::copy_nonoverlapping(memory.as_ptr(), arena, length),
                    End::Destination => std::ptr::copy_nonoverlapping(arena, memory.as_mut_ptr(), length),
                }
            }
        }
    }
}

impl Drop for Copies {
    /// What is under way goes on to its end, as a device does.
    fn drop(&mut self) {
        for copy in std::mem::take(&mut self.under_way).values() {
            self.end(copy);
        }
    }
}
