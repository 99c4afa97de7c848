//! Memory that holds KV blocks.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use kvferry_core::{LayoutError, Location, Plane, PoolId, PoolLayout};
use rustix::io::Errno;
use thiserror::Error;

use crate::device::{DeviceMemory, DeviceRegion};
use crate::region::Region;

/// The memory of one rank's KV blocks. Cheap to clone; it is unmapped when the last clone goes.
///
/// Peers read pools concurrently, so no reference is ever formed over their bytes: [`Pool::write`] and [`Pool::read`] copy in and out
/// by raw pointers. Which block may be touched when is the business of the handover, not of the pool.
#[derive(Clone)]
pub struct Pool {
    inner: Arc<Inner>,
}

struct Inner {
    id: PoolId,
    layout: PoolLayout,
    regions: Vec<Region>,
    shared: bool,
    device: Option<(Arc<dyn DeviceMemory>, Vec<DeviceRegion>)>,
    _keep_alive: Option<Arc<dyn Any + Send + Sync>>,
}

/// How [`Pool::allocate_with`] sets memory up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolOptions {
    /// Touch every page now, so that no transfer pays for page faults and exhaustion shows at once. On by default.
    pub populate: bool,
    /// Ask the kernel for huge pages (best effort): scattered copies then miss the TLB less. On by default.
    pub huge_pages: bool,
}

impl Default for PoolOptions {
    fn default() -> Self {
        PoolOptions { populate: true, huge_pages: true }
    }
}

/// Why a pool was not made, or a copy not done.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The layout contradicts itself.
    #[error("the pool's layout is not valid: {0}")]
    Layout(#[from] LayoutError),
    /// There is no memory, address space or descriptor left.
    #[error(
        "no room for a region of {bytes} bytes ({context}: {source}); use fewer blocks, or raise the limit that was hit"
    )]
    Exhausted {
        /// What was tried.
        context: &'static str,
        /// Bytes of the region.
        bytes: u64,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// The operating system refused.
    #[error("a region of {bytes} bytes cannot be made ({context}): {source}")]
    Io {
        /// What was tried.
        context: &'static str,
        /// Bytes of the region.
        bytes: u64,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// The given regions are not those of the layout.
    #[error("region {region} has {given} bytes where the layout names {named}; pass the regions in the layout's order")]
    Regions {
        /// Index of the first that differs.
        region: usize,
        /// Bytes given, 0 where there is none.
        given: u64,
        /// Bytes in the layout, 0 where there is none.
        named: u64,
    },
    /// A copy would leave its block.
    #[error("{bytes} bytes at offset {offset} of block {block} in plane {plane} are outside the pool")]
    OutOfBounds {
        /// Which plane.
        plane: u32,
        /// Which block.
        block: u32,
        /// Bytes from the block's start.
        offset: u64,
        /// Bytes to copy.
        bytes: u64,
    },
    /// The device's driver refused.
    #[error("{device}: {reason}")]
    Device {
        /// Which device.
        device: String,
        /// Cause and remedy.
        reason: String,
    },
}

impl Pool {
    /// Makes a pool of shared memory: one memfd per region, populated, and sealed so that nobody else can ever map it writable.
    ///
    /// `name` shows in `/proc/<pid>/maps`.
    pub fn allocate(id: PoolId, layout: PoolLayout, name: &str) -> Result<Pool, PoolError> {
        Pool::allocate_with(id, layout, name, &PoolOptions::default())
    }

    /// [`Pool::allocate`] with options.
    pub fn allocate_with(id: PoolId, layout: PoolLayout, name: &str, options: &PoolOptions) -> Result<Pool, PoolError> {
        layout.validate()?;
        let regions = layout
            .regions
            .iter()
            .map(|&bytes| Region::allocate(bytes, name, options))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Pool { inner: Arc::new(Inner { id, layout, regions, shared: true, device: None, _keep_alive: None }) })
    }

    /// A pool of this process's own memory, which others can at most read through their kernel: on huge pages where the kernel gives them when
    /// asked, which it seldom does for shared memory. For transports that map nothing; shared memory reads it more slowly.
    pub fn allocate_private(id: PoolId, layout: PoolLayout, options: &PoolOptions) -> Result<Pool, PoolError> {
        layout.validate()?;
        let regions =
            layout.regions.iter().map(|&bytes| Region::private(bytes, options)).collect::<Result<Vec<_>, _>>()?;
        Ok(Pool { inner: Arc::new(Inner { id, layout, regions, shared: false, device: None, _keep_alive: None }) })
    }

    /// A pool over memory that someone else allocated.
    ///
    /// # Safety
    /// Every region `(base, bytes)` must stay readable and writable memory of this process for as long as `keep_alive` lives, and nobody may
    /// form references over it while a transfer can touch it.
    pub unsafe fn from_raw(
        id: PoolId,
        layout: PoolLayout,
        regions: Vec<(*mut u8, u64)>,
        keep_alive: Arc<dyn Any + Send + Sync>,
    ) -> Result<Pool, PoolError> {
        check_regions(&layout, regions.iter().map(|region| region.1))?;
        let regions = regions.into_iter().map(|(base, bytes)| Region::foreign(base, bytes)).collect();
        let (shared, device, _keep_alive) = (false, None, Some(keep_alive));
        Ok(Pool { inner: Arc::new(Inner { id, layout, regions, shared, device, _keep_alive }) })
    }

    /// A pool in a device's memory.
    ///
    /// # Safety
    /// Every region must be memory of `memory`'s device, readable and writable through it for as long as `memory` lives.
    pub unsafe fn on_device(
        id: PoolId,
        layout: PoolLayout,
        regions: Vec<DeviceRegion>,
        memory: Arc<dyn DeviceMemory>,
    ) -> Result<Pool, PoolError> {
        check_regions(&layout, regions.iter().map(|region| region.bytes))?;
        let (shared, device) = (false, Some((memory, regions)));
        Ok(Pool { inner: Arc::new(Inner { id, layout, regions: Vec::new(), shared, device, _keep_alive: None }) })
    }

    /// Its name.
    pub fn id(&self) -> PoolId {
        self.inner.id
    }

    /// Where its blocks lie.
    pub fn layout(&self) -> &PoolLayout {
        &self.inner.layout
    }

    /// Its memory, if that is a device's.
    pub fn device(&self) -> Option<&Arc<dyn DeviceMemory>> {
        self.inner.device.as_ref().map(|(memory, _)| memory)
    }

    /// Its allocations in a device's memory, in the layout's order; none in host memory.
    pub fn device_regions(&self) -> &[DeviceRegion] {
        self.inner.device.as_ref().map_or(&[], |(_, regions)| regions)
    }

    /// Refuses memory that the processor cannot touch, for transports that copy by it.
    pub fn require_host(&self) -> Result<(), String> {
        self.device().map_or(Ok(()), |memory| {
            Err(format!(
                "its memory is on {}, which this transport cannot reach; use the cuda transport",
                memory.device()
            ))
        })
    }

    /// Its allocations in host memory, in the layout's order; none in a device's memory.
    pub fn regions(&self) -> &[Region] {
        &self.inner.regions
    }

    /// Whether its memory was allocated here and can be mapped by processes that get its descriptors.
    pub fn is_shared(&self) -> bool {
        self.inner.shared
    }

    /// The address of `bytes` bytes at a location, when they lie inside one region of host memory.
    pub fn address(&self, at: Location, bytes: u64) -> Option<*mut u8> {
        let region = self.inner.regions.get(usize::try_from(at.region).ok()?)?;
        let end = at.offset.checked_add(bytes)?;
        (end <= region.bytes()).then(|| region.base().wrapping_add(at.offset as usize))
    }

    /// Copies `bytes` into a block, from its byte `offset` on.
    pub fn write(&self, plane: u32, block: u32, offset: u64, bytes: &[u8]) -> Result<(), PoolError> {
        let at = match self.block(plane, block, offset, bytes.len() as u64)? {
            Place::Host(at) => at,
            Place::Device(memory, at) => return memory.write(at, bytes).map_err(|reason| on(memory, reason)),
        };
        // SAFETY: `block` checked that the range lies inside a mapped region, which lives as long as `self`; the slice is not pool memory
        // that we may not read, and pool memory is never borrowed.
        unsafe { std::ptr::copy(bytes.as_ptr(), at, bytes.len()) };
        Ok(())
    }

    /// Copies out of a block, from its byte `offset` on.
    pub fn read(&self, plane: u32, block: u32, offset: u64, bytes: &mut [u8]) -> Result<(), PoolError> {
        let at = match self.block(plane, block, offset, bytes.len() as u64)? {
            Place::Host(at) => at,
            Place::Device(memory, at) => return memory.read(at, bytes).map_err(|reason| on(memory, reason)),
        };
        // SAFETY: as in `write`, the other way round.
        unsafe { std::ptr::copy(at, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    /// Sets every byte of a block.
    pub fn fill(&self, plane: u32, block: u32, byte: u8) -> Result<(), PoolError> {
        let bytes = self.plane(plane, block, 0, 0)?.block_bytes;
        let at = match self.block(plane, block, 0, bytes)? {
            Place::Host(at) => at,
            Place::Device(memory, at) => return memory.fill(at, byte, bytes).map_err(|reason| on(memory, reason)),
        };
        // SAFETY: as in `write`.
        unsafe { std::ptr::write_bytes(at, byte, bytes as usize) };
        Ok(())
    }

    pub(crate) fn block(&self, plane: u32, block: u32, offset: u64, bytes: u64) -> Result<Place<'_>, PoolError> {
        let outside = PoolError::OutOfBounds { plane, block, offset, bytes };
        let shape = self.plane(plane, block, offset, bytes)?;
        if block >= shape.blocks || offset.checked_add(bytes).is_none_or(|end| end > shape.block_bytes) {
            return Err(outside);
        }
        let start = u64::from(block)
            .checked_mul(shape.block_stride)
            .and_then(|b| b.checked_add(shape.offset))
            .and_then(|b| b.checked_add(offset));
        start.and_then(|offset| self.place(Location { region: shape.region, offset }, bytes)).ok_or(outside)
    }

    fn place(&self, at: Location, bytes: u64) -> Option<Place<'_>> {
        let Some((memory, regions)) = &self.inner.device else { return self.address(at, bytes).map(Place::Host) };
        let region = regions.get(usize::try_from(at.region).ok()?)?;
        let end = at.offset.checked_add(bytes)?;
        (end <= region.bytes).then(|| Place::Device(memory.as_ref(), region.address.wrapping_add(at.offset)))
    }

    pub(crate) fn plane(&self, plane: u32, block: u32, offset: u64, bytes: u64) -> Result<Plane, PoolError> {
        let found = self.inner.layout.planes.get(plane as usize).copied();
        found.ok_or(PoolError::OutOfBounds { plane, block, offset, bytes })
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("id", &self.inner.id)
            .field("regions", &self.inner.regions)
            .field("device", &self.inner.device)
            .field("planes", &self.inner.layout.planes.len())
            .finish()
    }
}

/// Where a block's bytes are.
pub(crate) enum Place<'a> {
    Host(*mut u8),
    Device(&'a dyn DeviceMemory, u64),
}

pub(crate) fn on(memory: &dyn DeviceMemory, reason: String) -> PoolError {
    PoolError::Device { device: memory.device().to_owned(), reason }
}

/// A valid layout, and regions of the lengths that it names.
fn check_regions(layout: &PoolLayout, given: impl ExactSizeIterator<Item = u64>) -> Result<(), PoolError> {
    layout.validate()?;
    let (count, mut named) = (given.len(), layout.regions.iter().copied());
    for (region, given) in given.enumerate() {
        match named.next() {
            Some(named) if named == given => {}
            named => return Err(PoolError::Regions { region, given, named: named.unwrap_or(0) }),
        }
    }
    match named.next() {
        Some(named) => Err(PoolError::Regions { region: count, given: 0, named }),
        None => Ok(()),
    }
}

pub(crate) fn refused(context: &'static str, bytes: u64, errno: Errno) -> PoolError {
    let source = std::io::Error::from(errno);
    match errno {
        Errno::NOMEM | Errno::NOSPC | Errno::MFILE | Errno::NFILE | Errno::DQUOT | Errno::FBIG => {
            PoolError::Exhausted { context, bytes, source }
        }
        _ => PoolError::Io { context, bytes, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

    fn layout(bytes: u64) -> PoolLayout {
        let plane = Plane { region: 0, offset: 0, blocks: (bytes / 64) as u32, block_stride: 64, block_bytes: 48 };
        PoolLayout { regions: vec![bytes, 0], planes: if bytes == 0 { vec![] } else { vec![plane] } }
    }

    #[test]
    fn what_is_written_is_read() {
        let pool = Pool::allocate(PoolId(1), layout(6400), "test").unwrap();
        pool.write(0, 99, 40, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        let mut out = [0; 8];
        pool.clone().read(0, 99, 40, &mut out).unwrap();
        assert_eq!(out, [1, 2, 3, 4, 5, 6, 7, 8]);
        pool.fill(0, 98, 7).unwrap();
        pool.read(0, 98, 40, &mut out).unwrap();
        assert_eq!(out, [7; 8]);
    }

    #[test]
    fn copies_stay_inside_their_block() {
        let pool = Pool::allocate(PoolId(1), layout(6400), "test").unwrap();
        for (plane, block, offset, bytes) in
            [(1, 0, 0, 1), (0, 100, 0, 1), (0, 0, 48, 1), (0, 0, 41, 8), (0, 0, u64::MAX, 8)]
        {
            let error = pool.write(plane, block, offset, &vec![0; bytes]).unwrap_err();
            assert!(matches!(error, PoolError::OutOfBounds { .. }), "{error}");
        }
        assert!(matches!(pool.fill(0, 100, 0), Err(PoolError::OutOfBounds { .. })));
        assert!(pool.address(Location { region: 0, offset: 6400 }, 0).is_some());
        assert!(pool.address(Location { region: 0, offset: 6400 }, 1).is_none());
        assert!(pool.address(Location { region: 2, offset: 0 }, 0).is_none());
    }

    #[test]
    fn nobody_else_gets_a_writable_mapping() {
        let pool = Pool::allocate(PoolId(1), layout(6400), "test").unwrap();
        let fd = pool.regions()[0].fd().unwrap();
        // SAFETY: a fresh mapping at an address of the kernel's choice, which nothing uses.
        let writable =
            unsafe { mmap(std::ptr::null_mut(), 6400, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, fd, 0) };
        assert_eq!(writable.unwrap_err(), Errno::PERM);
        // SAFETY: as above.
        let readable = unsafe { mmap(std::ptr::null_mut(), 6400, ProtFlags::READ, MapFlags::SHARED, fd, 0) }.unwrap();
        pool.write(0, 0, 0, &[42]).unwrap();
        // SAFETY: the mapping is 6400 bytes long and readable; it is unmapped once, after its last use.
        unsafe {
            assert_eq!(readable.cast::<u8>().read_volatile(), 42);
            assert_eq!(
                rustix::mm::mprotect(readable, 6400, rustix::mm::MprotectFlags::WRITE).unwrap_err(),
                Errno::ACCESS
            );
            munmap(readable, 6400).unwrap();
        }
        assert_eq!(rustix::fs::ftruncate(fd, 0).unwrap_err(), Errno::PERM);
        assert_eq!(rustix::io::pwrite(fd, &[1], 0).unwrap_err(), Errno::PERM);
    }

    #[test]
    fn empty_regions_are_fine() {
        let pool = Pool::allocate(PoolId(1), layout(0), "test").unwrap();
        assert!(pool.regions()[0].fd().is_none());
        assert_eq!(pool.regions()[0].bytes(), 0);
        assert!(pool.is_shared());
    }

    #[test]
    fn impossible_sizes_are_typed_errors() {
        let huge =
            Pool::allocate(PoolId(1), PoolLayout { regions: vec![1 << 60], planes: vec![] }, "test").unwrap_err();
        assert!(matches!(huge, PoolError::Exhausted { .. } | PoolError::Io { .. } | PoolError::Layout(_)), "{huge}");
        let plane = Plane { region: 3, offset: 0, blocks: 1, block_stride: 1, block_bytes: 1 };
        let wrong =
            Pool::allocate(PoolId(1), PoolLayout { regions: vec![1], planes: vec![plane] }, "test").unwrap_err();
        assert!(matches!(wrong, PoolError::Layout(_)), "{wrong}");
    }

    #[test]
    fn private_memory_is_aligned_for_huge_pages_and_has_no_descriptor() {
        let bytes = (4 << 20) + 64;
        let pool = Pool::allocate_private(PoolId(3), layout(bytes), &PoolOptions::default()).unwrap();
        let [large, empty] = pool.regions() else { panic!("two regions") };
        assert_eq!((large.base() as usize % (2 << 20), large.bytes(), empty.bytes()), (0, bytes, 0));
        assert!(large.fd().is_none() && !pool.is_shared());
        let last = (bytes / 64) as u32 - 1;
        let mut out = [1; 48];
        pool.read(0, last, 0, &mut out).unwrap();
        assert_eq!(out, [0; 48]);
        pool.write(0, last, 0, &[7; 48]).unwrap();
        pool.read(0, last, 0, &mut out).unwrap();
        assert_eq!(out, [7; 48]);
    }

    #[test]
    fn raw_regions_must_be_those_of_the_layout() {
        let memory = Arc::new(vec![0u64; 800]);
        let base = memory.as_ptr() as *mut u8;
        // SAFETY: the vector outlives the pool through `keep_alive`, and nothing else reads it.
        let pool =
            unsafe { Pool::from_raw(PoolId(2), layout(6400), vec![(base, 6400), (base, 0)], memory.clone()) }.unwrap();
        assert!(!pool.is_shared());
        // SAFETY: as above.
        let short = unsafe { Pool::from_raw(PoolId(2), layout(6400), vec![(base, 6400)], memory.clone()) };
        assert!(matches!(short, Err(PoolError::Regions { region: 1, .. })));
        // SAFETY: as above.
        let wrong = unsafe { Pool::from_raw(PoolId(2), layout(6400), vec![(base, 6000), (base, 0)], memory) };
        assert!(matches!(wrong, Err(PoolError::Regions { region: 0, .. })));
    }
}
