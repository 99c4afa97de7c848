//! GPU memory that NICs read and write by themselves: what stands for it, and when kernels see what was written.

use std::os::fd::{FromRawFd, OwnedFd};

use cudarc::driver::sys;
use kvferry_transport::{DeviceRegion, Dmabuf, Writer};

use crate::driver::{self, Attribute, CudaError, DeviceHandle, call};

/// `CU_STREAM_LEGACY`: the default stream of libraries that were not built for one per thread.
const LEGACY: usize = 1;

/// Whether a GPU's kernels, and every other device, see what a NIC wrote once the NIC says that it did
/// (`CUGPUDirectRDMAWritesOrdering`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ordering {
    AtOnce,
    /// After [`settle`].
    Flushed,
}

impl Ordering {
    pub(crate) fn of(device: DeviceHandle) -> Result<Ordering, String> {
        let ordering = driver::attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING)?;
        let flushes = driver::attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS)?;
        Ordering::judge(ordering, flushes)
    }

    /// By what the driver says. Ordering for the owner alone is not enough: another GPU may read the pool next.
    fn judge(ordering: i32, flushes: i32) -> Result<Ordering, String> {
        let all = sys::CUGPUDirectRDMAWritesOrdering_enum::CU_GPU_DIRECT_RDMA_WRITES_ORDERING_ALL_DEVICES as i32;
        let by_host = sys::CUflushGPUDirectRDMAWritesOptions_enum::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST as i32;
        if ordering >= all {
            return Ok(Ordering::AtOnce);
        }
        if flushes & by_host != 0 {
            return Ok(Ordering::Flushed);
        }
        Err(format!(
            "its kernels need not see what a NIC has written (GPU_DIRECT_RDMA_WRITES_ORDERING is {ordering}), and the driver flushes nothing \
             (GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS is {flushes}); a newer driver may"
        ))
    }
}

/// Waits until every device sees what was written into the memory of the present context's GPU.
pub(crate) fn settle(writer: Writer, ordering: impl FnOnce() -> Result<Ordering, String>) -> Result<(), String> {
    match writer {
        // SAFETY: the default stream of the present context, in which libraries' synchronous copies are.
        Writer::Driver => unsafe { driver::synchronize(std::ptr::without_provenance_mut(LEGACY))? },
        Writer::Nic if ordering()? == Ordering::Flushed => flush()?,
        Writer::Nic => {}
    }
    Ok(())
}

fn flush() -> Result<(), CudaError> {
    let target = sys::CUflushGPUDirectRDMAWritesTarget::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX;
    let scope = sys::CUflushGPUDirectRDMAWritesScope::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_ALL_DEVICES;
    // SAFETY: it touches no memory of ours.
    unsafe { call!(cuFlushGPUDirectRDMAWrites(target, scope)) }
}

/// What stands for a region of the present context's memory: of whole pages, as the driver wants it.
pub(crate) fn dmabuf(device: DeviceHandle, region: DeviceRegion) -> Result<Dmabuf, String> {
    if driver::attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED)? == 0 {
        return Err("its driver has no dma-buf".to_owned());
    }
    let (base, bytes, offset) = pages(region, rustix::param::page_size() as u64)
        .ok_or_else(|| "the region reaches beyond the address space".to_owned())?;
    let kind = sys::CUmemRangeHandleType::CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD;
    let mut descriptor = -1i32;
    // SAFETY: the driver checks the range and writes a new descriptor, which nobody else has.
    let fd = unsafe {
        call!(cuMemGetHandleForAddressRange((&raw mut descriptor).cast(), base, bytes as usize, kind, 0))?;
        OwnedFd::from_raw_fd(descriptor)
    };
    Ok(Dmabuf { fd, base, offset })
}

/// The whole pages around a region, and where it begins in them.
fn pages(region: DeviceRegion, page: u64) -> Option<(u64, u64, u64)> {
    let offset = region.address.checked_rem(page)?;
    let bytes = offset.checked_add(region.bytes)?.checked_next_multiple_of(page)?;
    Some((region.address - offset, bytes, offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_put_into_whole_pages() {
        let pages = |address, bytes| pages(DeviceRegion { address, bytes }, 4096);
        assert_eq!(pages(8192, 4096), Some((8192, 4096, 0)));
        assert_eq!(pages(8193, 4096), Some((8192, 8192, 1)));
        assert_eq!(pages(12287, 1), Some((8192, 4096, 4095)));
        assert_eq!(pages(4096, u64::MAX), None);
    }

    #[test]
    fn what_nobody_makes_visible_is_refused() {
        assert_eq!(Ordering::judge(200, 0), Ok(Ordering::AtOnce));
        for ordering in [0, 100] {
            assert_eq!(Ordering::judge(ordering, 1), Ok(Ordering::Flushed));
            assert_eq!(Ordering::judge(ordering, 3), Ok(Ordering::Flushed));
            for flushes in [0, 2] {
                let reason = Ordering::judge(ordering, flushes).unwrap_err();
                assert!(reason.contains("FLUSH_WRITES_OPTIONS"), "{reason}");
            }
        }
    }
}
