//! A pool's memory on a GPU: made here, or a serving stack's own.

use std::any::Any;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use kvferry_core::{PoolId, PoolLayout};
use kvferry_transport::{Copier, DeviceBlock, DeviceMemory, DeviceRegion, Dmabuf, KnownRun, Pool, PoolError, Writer};

use crate::allocation::{Allocate, Allocation, Handle};
use crate::buffer::Buffer;
use crate::copier::StagedCopies;
use crate::driver::{self, Stream};
use crate::gpu::{Gpu, label};
use crate::known::{self, Task};
use crate::rdma::{self, Ordering};
use crate::shared::{How, Part};

/// What to do when a serving stack's memory cannot be exported.
const REMEDY: &str = "PyTorch: allocate the KV cache with PYTORCH_CUDA_ALLOC_CONF=backend:native,expandable_segments:False \
                      (memory of cudaMallocAsync, and of expandable segments without file descriptors, cannot be shared with other processes)";

/// What peers of other hosts need.
pub(crate) const BEYOND: &str = "peers of other hosts read only memory that fabric handles stand for; allocate it with them (kvferry's own pools \
                                 are where the process has an IMEX channel; CU_MEM_HANDLE_TYPE_FABRIC), or use a network transport";

/// GPU memory of one pool, and a stream for copies in and out.
pub(crate) struct GpuMemory {
    pub(crate) gpu: Arc<Gpu>,
    label: String,
    pub(crate) stream: Stream,
    /// What kernels that write and compare it are told; kept for the next time.
    pub(crate) scratch: Mutex<Option<Buffer>>,
    /// Name in this process.
    pub(crate) number: u64,
    pub(crate) regions: Vec<DeviceRegion>,
    allocations: Vec<Option<Allocation>>,
    /// When kernels see what NICs write, asked for when a NIC's pool is bound.
    ordering: OnceLock<Result<Ordering, String>>,
    _keep_alive: Option<Arc<dyn Any + Send + Sync>>,
}

// SAFETY: the stream is a driver handle, which any thread may use that has made the context current; every function here does that first.
unsafe impl Send for GpuMemory {}
// SAFETY: as above; calls on one stream from several threads are ordered by the driver.
unsafe impl Sync for GpuMemory {}

/// A piece of a region, and the descriptor that stands for it where one does.
pub(crate) type Piece = (Part, Option<Arc<OwnedFd>>);

/// What is alive in this process, so that a reader in the same process can hold on to it.
static ALIVE: Mutex<(u64, BTreeMap<u64, Weak<GpuMemory>>)> = Mutex::new((0, BTreeMap::new()));

/// Makes a pool in the memory of GPU `ordinal`: one allocation per region.
pub fn allocate(ordinal: u32, id: PoolId, layout: PoolLayout, how: Allocate) -> Result<Pool, PoolError> {
    layout.validate()?;
    let gpu = Gpu::open(ordinal).map_err(|reason| PoolError::Device { device: label(ordinal), reason })?;
    let (mut allocations, mut regions) = (Vec::new(), Vec::new());
    for &bytes in &layout.regions {
        let allocation = if bytes == 0 { None } else { Some(Allocation::new(&gpu, bytes, how)) };
        let allocation = allocation.transpose().map_err(|error| PoolError::Device {
            device: gpu.label(),
            reason: if error.is_exhaustion() {
                format!("no room for a region of {bytes} bytes ({error}); use fewer blocks")
            } else {
                error.to_string()
            },
        })?;
        regions.push(DeviceRegion { address: allocation.as_ref().map_or(0, |a| a.address), bytes });
        allocations.push(allocation);
    }
    let memory = GpuMemory::new(gpu, regions.clone(), allocations, None)?;
    // SAFETY: every region is an allocation of at least its length that the memory holds.
    unsafe { Pool::on_device(id, layout, regions, memory) }
}

/// Bytes of GPU `ordinal` that nobody has allocated. An error says why there is no such GPU.
pub fn free_bytes(ordinal: u32) -> Result<u64, String> {
    let gpu = Gpu::open(ordinal)?;
    gpu.enter()?;
    Ok(driver::free_memory()?)
}

/// A pool over GPU memory that a serving stack has allocated; its regions may be parts of larger allocations.
///
/// Whether it can be shared shows when a transport binds it: memory of `cudaMallocAsync`, for one, cannot.
///
/// # Safety
/// Every region must stay readable and writable memory of that GPU in this process's primary context for as long as `keep_alive` lives.
pub unsafe fn from_raw(
    ordinal: u32,
    id: PoolId,
    layout: PoolLayout,
    regions: Vec<DeviceRegion>,
    keep_alive: Arc<dyn Any + Send + Sync>,
) -> Result<Pool, PoolError> {
    let gpu = Gpu::open(ordinal).map_err(|reason| PoolError::Device { device: label(ordinal), reason })?;
    let refused = |reason| PoolError::Device { device: label(ordinal), reason };
    gpu.enter().map_err(|error| refused(error.to_string()))?;
    for region in regions.iter().filter(|region| region.bytes > 0) {
        let found = driver::ordinal_of(region.address);
        match found {
            Ok(found) if found == ordinal => {}
            Ok(found) => return Err(refused(format!("{:#x} is memory of {}", region.address, label(found)))),
            Err(error) => return Err(refused(format!("{:#x} is no GPU memory ({error})", region.address))),
        }
    }
    let memory = GpuMemory::new(gpu, regions.clone(), Vec::new(), Some(keep_alive))?;
    // SAFETY: the caller's promise.
    unsafe { Pool::on_device(id, layout, regions, memory) }
}

impl GpuMemory {
    fn new(
        gpu: Arc<Gpu>,
        regions: Vec<DeviceRegion>,
        allocations: Vec<Option<Allocation>>,
        keep_alive: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Result<Arc<GpuMemory>, PoolError> {
        let stream = gpu.enter().and_then(|()| driver::create_stream());
        let stream = stream.map_err(|e| PoolError::Device { device: gpu.label(), reason: e.to_string() })?;
        let mut alive = ALIVE.lock().unwrap_or_else(PoisonError::into_inner);
        alive.0 += 1;
        let number = alive.0;
        let label = gpu.label();
        let scratch = Mutex::new(None);
        let memory = Arc::new(GpuMemory {
            gpu,
            label,
            stream,
            scratch,
            number,
            regions,
            allocations,
            ordering: OnceLock::new(),
            _keep_alive: keep_alive,
        });
        alive.1.insert(number, Arc::downgrade(&memory));
        Ok(memory)
    }

    fn ordering(&self) -> Result<Ordering, String> {
        self.ordering.get_or_init(|| Ordering::of(self.gpu.device())).clone()
    }

    /// The memory of a pool, if it is a GPU's.
    pub(crate) fn of(pool: &Pool) -> Option<&GpuMemory> {
        let memory: &dyn Any = pool.device()?.as_ref();
        memory.downcast_ref()
    }

    /// Memory of this process by its name.
    pub(crate) fn find(number: u64) -> Option<Arc<GpuMemory>> {
        ALIVE.lock().unwrap_or_else(PoisonError::into_inner).1.get(&number).and_then(Weak::upgrade)
    }

    /// Whether all of it is plain memory, which another GPU of this process reaches as it is.
    pub(crate) fn is_plain(&self) -> bool {
        let plain = |(part, _): &Piece| matches!(part.how, How::Ipc { .. });
        let exported = |index| {
            self.regions.get(index).is_none_or(|region: &DeviceRegion| {
                region.bytes == 0 || self.export(index, *region).is_ok_and(|pieces| pieces.iter().all(plain))
            })
        };
        (0..self.regions.len()).all(exported)
    }

    /// How a region can be given to another process, piece by piece, and the descriptors for it.
    pub(crate) fn export(&self, index: usize, region: DeviceRegion) -> Result<Vec<Piece>, String> {
        self.gpu.enter()?;
        if let Some((handle, bytes)) = self.allocations.get(index).and_then(Option::as_ref).and_then(|a| a.handle()) {
            return Ok(vec![match handle {
                Handle::Descriptor(fd) => (Part { bytes, how: How::Descriptor { offset: 0 } }, Some(fd)),
                Handle::Fabric(handle) => {
                    (Part { bytes, how: How::Fabric { handle: handle.to_vec(), offset: 0 } }, None)
                }
            }]);
        }
        let unshareable = |why: String| format!("memory at {:#x} cannot be shared: {why}. {REMEDY}", region.address);
        let mut parts = Vec::new();
        let (mut at, end) = (region.address, region.address.saturating_add(region.bytes));
        while at < end {
            let (base, bytes, next) = piece_at(at).map_err(unshareable)?;
            if driver::is_ipc_capable(at).unwrap_or(false) {
                if base > region.address || next < end {
                    return Err(unshareable("it spans several allocations".to_owned()));
                }
                let handle = driver::ipc_handle(base).map_err(|error| unshareable(error.to_string()))?;
                let how = How::Ipc { handle: handle.to_vec(), offset: at - base };
                return Ok(vec![(Part { bytes, how }, None)]);
            }
            let physical = driver::physical_of(at).map_err(|error| unshareable(error.to_string()))?;
            let offset = if parts.is_empty() { at - base } else { 0 };
            // What its allocator asked for is all that can stand for it.
            // SAFETY: just retained, released right afterwards; a descriptor keeps the memory by itself, a handle stands for it while its allocator has
            // it, which is for as long as the pool.
            let exported = unsafe {
                let by_descriptor = driver::export(physical);
                let exported =
                    by_descriptor.map(|fd| (How::Descriptor { offset }, Some(Arc::new(fd)))).or_else(|error| {
                        let by_handle = driver::export_fabric(physical);
                        by_handle
                            .map(|handle| (How::Fabric { handle: handle.to_vec(), offset }, None))
                            .map_err(|_| error)
                    });
                driver::release_physical(physical).and(exported)
            };
            let (how, descriptor) = exported.map_err(|error| unshareable(error.to_string()))?;
            parts.push((Part { bytes, how }, descriptor));
            at = next;
        }
        Ok(parts)
    }

    /// The same for a process of another host: by fabric handles only.
    pub(crate) fn export_beyond(&self, index: usize, region: DeviceRegion) -> Result<Vec<Piece>, String> {
        self.gpu.enter()?;
        let stays = |why: String| format!("memory at {:#x} stays with its host ({why}): {BEYOND}", region.address);
        match self.allocations.get(index).and_then(Option::as_ref).map(Allocation::handle) {
            Some(Some((Handle::Fabric(handle), bytes))) => {
                return Ok(vec![(Part { bytes, how: How::Fabric { handle: handle.to_vec(), offset: 0 } }, None)]);
            }
            Some(Some((Handle::Descriptor(_), _))) => return Err(stays("a descriptor stands for it".to_owned())),
            Some(None) => return Err(stays("it is plain memory".to_owned())),
            None => {}
        }
        let mut parts = Vec::new();
        let (mut at, end) = (region.address, region.address.saturating_add(region.bytes));
        while at < end {
            let (base, bytes, next) = piece_at(at).map_err(stays)?;
            let offset = if parts.is_empty() { at - base } else { 0 };
            let physical = driver::physical_of(at).map_err(|error| stays(error.to_string()))?;
            // SAFETY: just retained, released right afterwards; its allocator has it for as long as the pool.
            let handle = unsafe {
                let handle = driver::export_fabric(physical);
                driver::release_physical(physical).and(handle)
            };
            let handle = handle.map_err(|error| stays(error.to_string()))?.to_vec();
            parts.push((Part { bytes, how: How::Fabric { handle, offset } }, None));
            at = next;
        }
        Ok(parts)
    }
}

/// Start and length of the allocation in which an address lies, and where the next one begins.
fn piece_at(at: u64) -> Result<(u64, u64, u64), String> {
    let (base, bytes) = driver::allocation_of(at)?;
    let next = base.saturating_add(bytes);
    if next <= at { Err("its allocation ends before it".to_owned()) } else { Ok((base, bytes, next)) }
}

impl DeviceMemory for GpuMemory {
    fn device(&self) -> &str {
        &self.label
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), String> {
        self.gpu.enter()?;
        // SAFETY: the pool has checked that the range lies in a region, which this memory holds; the slice lives until the stream is done.
        unsafe {
            driver::upload(address, bytes.as_ptr(), bytes.len(), self.stream)?;
            driver::synchronize(self.stream)?;
        }
        Ok(())
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), String> {
        self.gpu.enter()?;
        // SAFETY: as in `write`, the other way round.
        unsafe {
            driver::download(bytes.as_mut_ptr(), address, bytes.len(), self.stream)?;
            driver::synchronize(self.stream)?;
        }
        Ok(())
    }

    fn fill(&self, address: u64, byte: u8, bytes: u64) -> Result<(), String> {
        self.gpu.enter()?;
        // SAFETY: as in `write`.
        unsafe {
            driver::set(address, byte, bytes as usize, self.stream)?;
            driver::synchronize(self.stream)?;
        }
        Ok(())
    }

    fn write_known(&self, blocks: &[DeviceBlock], runs: &[KnownRun]) -> Result<(), String> {
        known::run(self, Task::Write, blocks, runs).map(drop)
    }

    fn count_unknown(&self, blocks: &[DeviceBlock], runs: &[KnownRun]) -> Result<Vec<u32>, String> {
        known::run(self, Task::Count, blocks, runs)
    }

    fn copier(&self, pool: &Pool, arena_bytes: usize) -> Result<Box<dyn Copier>, String> {
        Ok(Box::new(StagedCopies::new(&self.gpu, pool, arena_bytes)?))
    }

    fn cuda_device(&self) -> Result<i32, String> {
        self.gpu.enter()?;
        Ok(self.gpu.device())
    }

    fn dmabuf(&self, region: DeviceRegion) -> Result<Dmabuf, String> {
        self.gpu.enter()?;
        rdma::dmabuf(self.gpu.device(), region)
    }

    fn settles(&self, writer: Writer) -> Result<(), String> {
        match writer {
            Writer::Driver => Ok(()),
            Writer::Nic => self.ordering().map(drop),
        }
    }

    fn settle(&self, writer: Writer) -> Result<(), String> {
        self.gpu.enter()?;
        rdma::settle(writer, || self.ordering())
    }
}

impl Drop for GpuMemory {
    fn drop(&mut self) {
        ALIVE.lock().unwrap_or_else(PoisonError::into_inner).1.remove(&self.number);
        if self.gpu.enter().is_ok() {
            // SAFETY: every function waits for what it put there.
            let _destroyed = unsafe { driver::destroy_stream(self.stream) };
        }
    }
}
