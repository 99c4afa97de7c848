//! Plain allocations and what legacy CUDA IPC shares of them, in the calling thread's present context; of any memory, what the driver knows.

use cudarc::driver::sys;

use super::{CudaError, call};

pub(crate) fn allocate(bytes: usize) -> Result<u64, CudaError> {
    let mut address = 0;
    // SAFETY: the driver writes the address.
    unsafe { call!(cuMemAlloc_v2(&mut address, bytes))? };
    Ok(address)
}

/// # Safety
/// `address` came from [`allocate`] and is not used afterwards.
pub(crate) unsafe fn free(address: u64) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { call!(cuMemFree_v2(address)) }
}

/// Page-locked host memory.
pub(crate) fn allocate_host(bytes: usize) -> Result<*mut u8, CudaError> {
    let mut address = std::ptr::null_mut();
    // SAFETY: the driver writes the address.
    unsafe { call!(cuMemHostAlloc(&mut address, bytes, sys::CU_MEMHOSTALLOC_PORTABLE))? };
    Ok(address.cast())
}

/// # Safety
/// `address` came from [`allocate_host`] and is not used afterwards.
pub(crate) unsafe fn free_host(address: *mut u8) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { call!(cuMemFreeHost(address.cast())) }
}

/// Bytes that nobody has allocated on the context's GPU.
pub(crate) fn free_memory() -> Result<u64, CudaError> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: the driver writes both.
    unsafe { call!(cuMemGetInfo_v2(&mut free, &mut total))? };
    Ok(free as u64)
}

/// Start and length of the allocation (or mapping) that an address lies in.
pub(crate) fn allocation_of(address: u64) -> Result<(u64, u64), CudaError> {
    let (mut base, mut bytes) = (0, 0);
    // SAFETY: the driver writes both, or refuses an address that it does not know.
    unsafe { call!(cuMemGetAddressRange_v2(&mut base, &mut bytes, address))? };
    Ok((base, bytes as u64))
}

/// Whether the allocation can be exported by [`ipc_handle`].
pub(crate) fn is_ipc_capable(address: u64) -> Result<bool, CudaError> {
    let mut capable = 0u32;
    let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE;
    // SAFETY: the driver writes a bool or an int, either fits; it refuses an address that it does not know.
    unsafe { call!(cuPointerGetAttribute((&raw mut capable).cast(), attribute, address))? };
    Ok(capable & 0xff != 0)
}

/// The GPU that memory belongs to.
pub(crate) fn ordinal_of(address: u64) -> Result<u32, CudaError> {
    let mut ordinal = 0i32;
    let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
    // SAFETY: the driver writes an int, or refuses an address that it does not know.
    unsafe { call!(cuPointerGetAttribute((&raw mut ordinal).cast(), attribute, address))? };
    Ok(ordinal.cast_unsigned())
}

pub(crate) fn ipc_handle(address: u64) -> Result<[u8; 64], CudaError> {
    let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
    // SAFETY: the driver writes 64 bytes, or refuses the address.
    unsafe { call!(cuIpcGetMemHandle(&mut handle, address))? };
    Ok(handle.reserved.map(|byte| byte.cast_unsigned()))
}

pub(crate) fn open_ipc(handle: [u8; 64]) -> Result<u64, CudaError> {
    let handle = sys::CUipcMemHandle { reserved: handle.map(|byte| byte.cast_signed()) };
    let (mut address, lazily) = (0, sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32);
    // SAFETY: the driver checks the handle and writes the address.
    unsafe { call!(cuIpcOpenMemHandle_v2(&mut address, handle, lazily))? };
    Ok(address)
}

/// # Safety
/// `address` came from [`open_ipc`] and is not used afterwards.
pub(crate) unsafe fn close_ipc(address: u64) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { call!(cuIpcCloseMemHandle(address)) }
}
