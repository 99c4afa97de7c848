//! Physical memory: made, exported and imported as a handle, and mapped at addresses that were reserved.

use std::ffi::c_void;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use cudarc::driver::sys;

use super::{CudaError, call};

/// Physical memory that a handle can stand for.
pub(crate) type Physical = sys::CUmemGenericAllocationHandle;

/// What stands for physical memory elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HandleKind {
    /// A file descriptor, in processes of this host.
    Descriptor,
    /// 64 bytes, in processes of every host of an NVLink domain that IMEX lets in.
    Fabric,
}

impl HandleKind {
    fn code(self) -> sys::CUmemAllocationHandleType {
        match self {
            HandleKind::Descriptor => sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
            HandleKind::Fabric => sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_FABRIC,
        }
    }
}

fn properties(ordinal: u32, kind: HandleKind) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: kind.code(),
        location: location(ordinal),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

fn location(ordinal: u32) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: ordinal.cast_signed() }
}

/// Sizes of physical memory are multiples of this.
pub(crate) fn granularity(ordinal: u32, kind: HandleKind) -> Result<u64, CudaError> {
    let mut granularity = 0;
    let minimum = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
    // SAFETY: the driver reads the properties and writes the size.
    unsafe { call!(cuMemGetAllocationGranularity(&mut granularity, &properties(ordinal, kind), minimum))? };
    Ok(granularity as u64)
}

pub(crate) fn create_physical(ordinal: u32, kind: HandleKind, bytes: u64) -> Result<Physical, CudaError> {
    let mut physical = 0;
    // SAFETY: the driver reads the properties and writes the handle.
    unsafe { call!(cuMemCreate(&mut physical, bytes as usize, &properties(ordinal, kind), 0))? };
    Ok(physical)
}

/// The physical memory that is mapped at an address; released like one that was created.
pub(crate) fn physical_of(address: u64) -> Result<Physical, CudaError> {
    let mut physical = 0;
    // SAFETY: the driver checks the address and writes the handle.
    unsafe { call!(cuMemRetainAllocationHandle(&mut physical, address as *mut c_void))? };
    Ok(physical)
}

/// # Safety
/// The handle is not used afterwards. Mappings of it stay.
pub(crate) unsafe fn release_physical(physical: Physical) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { call!(cuMemRelease(physical)) }
}

/// # Safety
/// The handle is valid.
pub(crate) unsafe fn export(physical: Physical) -> Result<OwnedFd, CudaError> {
    let mut descriptor = -1i32;
    // SAFETY: the driver writes a new descriptor, which nobody else has.
    unsafe {
        call!(cuMemExportToShareableHandle((&raw mut descriptor).cast(), physical, HandleKind::Descriptor.code(), 0))?;
        Ok(OwnedFd::from_raw_fd(descriptor))
    }
}

pub(crate) fn import(descriptor: BorrowedFd<'_>) -> Result<Physical, CudaError> {
    let mut physical = 0;
    let number = descriptor.as_raw_fd() as isize as *mut c_void;
    // SAFETY: the driver checks what the descriptor is and keeps it no longer than the call.
    unsafe { call!(cuMemImportFromShareableHandle(&mut physical, number, HandleKind::Descriptor.code()))? };
    Ok(physical)
}

/// # Safety
/// The handle is valid.
pub(crate) unsafe fn export_fabric(physical: Physical) -> Result<[u8; 64], CudaError> {
    let mut handle = sys::CUmemFabricHandle { data: [0; 64] };
    // SAFETY: the driver writes 64 bytes.
    unsafe { call!(cuMemExportToShareableHandle((&raw mut handle).cast(), physical, HandleKind::Fabric.code(), 0))? };
    Ok(handle.data)
}

pub(crate) fn import_fabric(handle: [u8; 64]) -> Result<Physical, CudaError> {
    let (mut physical, mut handle) = (0, sys::CUmemFabricHandle { data: handle });
    // SAFETY: the driver reads 64 bytes and checks them.
    unsafe {
        call!(cuMemImportFromShareableHandle(&mut physical, (&raw mut handle).cast(), HandleKind::Fabric.code()))?
    };
    Ok(physical)
}

pub(crate) fn reserve(bytes: u64) -> Result<u64, CudaError> {
    let mut address = 0;
    // SAFETY: the driver writes the address of a range that nobody uses.
    unsafe { call!(cuMemAddressReserve(&mut address, bytes as usize, 0, 0, 0))? };
    Ok(address)
}

/// # Safety
/// The range came from [`reserve`], nothing is mapped there, and it is not used afterwards.
pub(crate) unsafe fn unreserve(address: u64, bytes: u64) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { call!(cuMemAddressFree(address, bytes as usize)) }
}

/// # Safety
/// The range lies in one that was reserved and nothing is mapped there; the handle is valid and has as many bytes.
pub(crate) unsafe fn map(address: u64, bytes: u64, physical: Physical) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { call!(cuMemMap(address, bytes as usize, 0, physical, 0)) }
}

/// # Safety
/// The range was mapped as a whole by [`map`]s, and nothing touches it any more.
pub(crate) unsafe fn unmap(address: u64, bytes: u64) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { call!(cuMemUnmap(address, bytes as usize)) }
}

/// Lets a GPU reach a mapped range.
///
/// # Safety
/// The range is mapped.
pub(crate) unsafe fn allow(address: u64, bytes: u64, ordinal: u32, write: bool) -> Result<(), CudaError> {
    let flags = if write {
        sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    } else {
        sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READ
    };
    let access = sys::CUmemAccessDesc { location: location(ordinal), flags };
    // SAFETY: the caller's promise; the driver reads one description.
    unsafe { call!(cuMemSetAccess(address, bytes as usize, &access, 1)) }
}
