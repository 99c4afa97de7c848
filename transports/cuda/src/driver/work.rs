//! What a GPU is given to do: modules and their kernels, streams, events, launches and copies, in the calling thread's present context.
//! Handles are valid until destroyed, in the context that made them.

use std::ffi::{CStr, CString, c_void};

use cudarc::driver::sys::{self, CUresult};

use super::{CudaError, EventHandle, Function, Module, Stream, call};

/// Loads PTX.
pub(crate) fn load_module(ptx: &CStr) -> Result<Module, CudaError> {
    let mut module = std::ptr::null_mut();
    // SAFETY: the text ends with a zero and is only read; the driver writes the handle.
    unsafe { call!(cuModuleLoadData(&mut module, ptx.as_ptr().cast()))? };
    Ok(module)
}

/// # Safety
/// The module is loaded, and no kernel of it runs or is launched any more.
pub(crate) unsafe fn unload_module(module: Module) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { call!(cuModuleUnload(module)) }
}

/// # Safety
/// The module is loaded.
pub(crate) unsafe fn function(module: Module, name: &str) -> Result<Function, CudaError> {
    let name = CString::new(name).unwrap_or_default();
    let mut function = std::ptr::null_mut();
    // SAFETY: the caller's promise; the name ends with a zero.
    unsafe { call!(cuModuleGetFunction(&mut function, module, name.as_ptr()))? };
    Ok(function)
}

pub(crate) fn create_stream() -> Result<Stream, CudaError> {
    let mut stream = std::ptr::null_mut();
    // SAFETY: the driver writes the handle.
    unsafe { call!(cuStreamCreate(&mut stream, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32))? };
    Ok(stream)
}

/// # Safety
/// The stream is not used afterwards.
pub(crate) unsafe fn destroy_stream(stream: Stream) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { call!(cuStreamDestroy_v2(stream)) }
}

/// # Safety
/// The stream exists.
pub(crate) unsafe fn synchronize(stream: Stream) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { call!(cuStreamSynchronize(stream)) }
}

/// Has what comes into the stream wait for what the event stands for now.
///
/// # Safety
/// Both exist.
pub(crate) unsafe fn stream_waits(stream: Stream, event: EventHandle) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { call!(cuStreamWaitEvent(stream, event, 0)) }
}

/// Calls a function once the stream has come to it.
///
/// # Safety
/// The stream exists; the function may be called with the argument, once, on any thread, and uses no CUDA.
pub(crate) unsafe fn launch_host(
    stream: Stream,
    function: extern "C" fn(*mut c_void),
    argument: *mut c_void,
) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { call!(cuLaunchHostFunc(stream, Some(function), argument)) }
}

/// One whose time is taken costs the GPU a little more.
pub(crate) fn create_event(is_timed: bool) -> Result<EventHandle, CudaError> {
    let flags =
        if is_timed { sys::CUevent_flags::CU_EVENT_DEFAULT } else { sys::CUevent_flags::CU_EVENT_DISABLE_TIMING };
    let mut event = std::ptr::null_mut();
    // SAFETY: the driver writes the handle.
    unsafe { call!(cuEventCreate(&mut event, flags as u32))? };
    Ok(event)
}

/// Milliseconds between two records.
///
/// # Safety
/// Both events exist, are timed and done; [`super::Driver::tells_times`].
pub(crate) unsafe fn elapsed(start: EventHandle, end: EventHandle) -> Result<f32, CudaError> {
    let mut milliseconds = 0.0;
    // SAFETY: the caller's promise; the driver writes the number.
    unsafe { call!(cuEventElapsedTime_v2(&mut milliseconds, start, end))? };
    Ok(milliseconds)
}

/// # Safety
/// The event exists and is not used afterwards.
pub(crate) unsafe fn destroy_event(event: EventHandle) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { call!(cuEventDestroy_v2(event)) }
}

/// # Safety
/// Both exist.
pub(crate) unsafe fn record(event: EventHandle, stream: Stream) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { call!(cuEventRecord(event, stream)) }
}

/// Whether everything before the event's record is done.
///
/// # Safety
/// The event exists.
pub(crate) unsafe fn is_done(event: EventHandle) -> Result<bool, CudaError> {
    // SAFETY: the caller's promise.
    match unsafe { call!(cuEventQuery(event)) } {
        Ok(()) => Ok(true),
        Err(error) if error.code == CUresult::CUDA_ERROR_NOT_READY as u32 => Ok(false),
        Err(error) => Err(error),
    }
}

/// Waits for what was recorded.
///
/// # Safety
/// The event exists.
pub(crate) unsafe fn wait(event: EventHandle) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { call!(cuEventSynchronize(event)) }
}

/// # Safety
/// `parameters` point to values of the kernel's parameter types, which are copied before this returns; everything that the kernel touches is
/// valid until it has ended.
pub(crate) unsafe fn launch(
    function: Function,
    blocks: u32,
    threads: u32,
    stream: Stream,
    parameters: &mut [*mut c_void],
) -> Result<(), CudaError> {
    let parameters = parameters.as_mut_ptr();
    // SAFETY: the caller's promise.
    unsafe { call!(cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, parameters, std::ptr::null_mut())) }
}

/// # Safety
/// `to` has room for the bytes in the context's address space; `from` stays unchanged until the stream has done it.
pub(crate) unsafe fn upload(to: u64, from: *const u8, bytes: usize, stream: Stream) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { call!(cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, stream)) }
}

/// # Safety
/// `from` has the bytes in the context's address space; `to` is touched by nobody else until the stream has done it.
pub(crate) unsafe fn download(to: *mut u8, from: u64, bytes: usize, stream: Stream) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { call!(cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, stream)) }
}

/// # Safety
/// `to` has room for the bytes in the context's address space.
pub(crate) unsafe fn set(to: u64, byte: u8, bytes: usize, stream: Stream) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { call!(cuMemsetD8Async(to, byte, bytes, stream)) }
}
