//! The "GPU's" memory: addresses that nobody can touch, and the bytes that are meant by them.

use std::os::fd::OwnedFd;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvferry_core::{PoolId, PoolLayout};
use kvferry_transport::{DeviceMemory, DeviceRegion, Dmabuf, Pool, Writer};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::GPU;

/// A region does not begin where its pages do.
const OFFSET: usize = 192;
const PAGE: usize = 4096;

/// How the memory of one pool is.
#[derive(Clone, Default)]
pub(crate) struct Gpu {
    /// It is of some other make.
    pub(crate) is_no_cuda: bool,
    /// No descriptors stand for it.
    pub(crate) has_no_dmabuf: bool,
    /// Why kernels never see what a NIC writes, if they do not.
    pub(crate) unordered: Option<String>,
    /// Why it cannot be waited for, if it cannot.
    pub(crate) unsettled: Option<String>,
    /// How often it was.
    pub(crate) settled: Arc<AtomicU32>,
}

/// One allocation.
struct Area {
    /// What everybody knows.
    shown: usize,
    actual: usize,
    bytes: usize,
    file: OwnedFd,
}

struct Memory {
    gpu: Gpu,
    areas: Vec<Arc<Area>>,
}

static AREAS: Mutex<Vec<Arc<Area>>> = Mutex::new(Vec::new());

/// Where bytes of the GPU's really are; none of other memory.
pub(super) fn actual(address: usize, bytes: usize) -> Option<usize> {
    let areas = AREAS.lock().unwrap_or_else(PoisonError::into_inner);
    areas.iter().find_map(|area| area.actual(address, bytes))
}

impl Area {
    fn new(bytes: usize) -> Arc<Area> {
        let bytes = (OFFSET + bytes).next_multiple_of(PAGE);
        let file = memfd_create("gpu", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, bytes as u64).unwrap();
        let both = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: fresh mappings at addresses of the kernel's choice.
        let (shown, actual) = unsafe {
            (
                mmap_anonymous(ptr::null_mut(), bytes, ProtFlags::empty(), MapFlags::PRIVATE).unwrap(),
                mmap(ptr::null_mut(), bytes, both, MapFlags::SHARED, &file, 0).unwrap(),
            )
        };
        let area = Arc::new(Area { shown: shown as usize, actual: actual as usize, bytes, file });
        AREAS.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&area));
        area
    }

    fn actual(&self, address: usize, bytes: usize) -> Option<usize> {
        let at = address.checked_sub(self.shown)?;
        (at.checked_add(bytes)? <= self.bytes).then_some(self.actual + at)
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, of this length; nobody knows of them any more.
        unsafe {
            munmap(ptr::without_provenance_mut(self.shown), self.bytes).unwrap();
            munmap(ptr::without_provenance_mut(self.actual), self.bytes).unwrap();
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let mut areas = AREAS.lock().unwrap_or_else(PoisonError::into_inner);
        areas.retain(|area| !self.areas.iter().any(|own| Arc::ptr_eq(own, area)));
    }
}

/// A pool in that memory.
pub(crate) fn pool(id: PoolId, layout: PoolLayout, gpu: Gpu) -> Pool {
    let areas: Vec<Arc<Area>> = layout.regions.iter().map(|bytes| Area::new(*bytes as usize)).collect();
    let regions = areas.iter().zip(&layout.regions);
    let regions = regions.map(|(area, &bytes)| DeviceRegion { address: (area.shown + OFFSET) as u64, bytes }).collect();
    // SAFETY: the areas are as long as the regions, and live as long as the memory.
    unsafe { Pool::on_device(id, layout, regions, Arc::new(Memory { gpu, areas })) }.unwrap()
}

impl Memory {
    fn at(&self, address: u64, bytes: usize) -> Result<*mut u8, String> {
        let found = self.areas.iter().find_map(|area| area.actual(address as usize, bytes));
        found.map(ptr::with_exposed_provenance_mut).ok_or_else(|| "no such address".to_owned())
    }
}

impl DeviceMemory for Memory {
    fn device(&self) -> &str {
        GPU.0
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), String> {
        // SAFETY: inside an area.
        unsafe { ptr::copy(bytes.as_ptr(), self.at(address, bytes.len())?, bytes.len()) };
        Ok(())
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), String> {
        // SAFETY: inside an area.
        unsafe { ptr::copy(self.at(address, bytes.len())?, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn fill(&self, address: u64, byte: u8, bytes: u64) -> Result<(), String> {
        // SAFETY: inside an area.
        unsafe { ptr::write_bytes(self.at(address, bytes as usize)?, byte, bytes as usize) };
        Ok(())
    }

    fn cuda_device(&self) -> Result<i32, String> {
        if self.gpu.is_no_cuda { Err(format!("{} is no device of CUDA's", GPU.0)) } else { Ok(GPU.1) }
    }

    fn dmabuf(&self, region: DeviceRegion) -> Result<Dmabuf, String> {
        let area = self.areas.iter().find(|area| (area.shown + OFFSET) as u64 == region.address);
        let area = area.filter(|_| !self.gpu.has_no_dmabuf).ok_or_else(|| "no dma-buf stands for it".to_owned())?;
        Ok(Dmabuf { fd: area.file.try_clone().unwrap(), base: area.shown as u64, offset: OFFSET as u64 })
    }

    fn settles(&self, writer: Writer) -> Result<(), String> {
        assert_eq!(writer, Writer::Nic);
        self.gpu.unordered.clone().map_or(Ok(()), Err)
    }

    fn settle(&self, writer: Writer) -> Result<(), String> {
        assert_eq!(writer, Writer::Nic);
        self.gpu.settled.fetch_add(1, Ordering::Relaxed);
        self.gpu.unsettled.clone().map_or(Ok(()), Err)
    }
}
