//! The CUDA driver, one `Result` per call. Loaded at run time; nothing is linked.

use std::ffi::{CStr, CString, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUresult};
use thiserror::Error;

/// A call that the driver refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{call}: {text} (CUDA error {code})")]
pub(crate) struct CudaError {
    call: &'static str,
    code: u32,
    text: String,
}

impl CudaError {
    /// Whether every later call in this context fails, too: a kernel or the hardware has failed. Only a new process gets a new context.
    pub(crate) fn is_sticky(&self) -> bool {
        matches!(self.code, 214 | 220 | 226 | 700 | 702 | 709 | 710 | 714..=719 | 721 | 810 | 911)
    }

    /// Whether memory or another resource has run out.
    pub(crate) fn is_exhaustion(&self) -> bool {
        self.code == CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32
    }
}

impl From<CudaError> for String {
    fn from(error: CudaError) -> String {
        error.to_string()
    }
}

pub(crate) fn check(call: &'static str, result: CUresult) -> Result<(), CudaError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: the driver writes a pointer to a string of its own, which it keeps, or leaves null.
    let text = unsafe {
        let known = sys::cuGetErrorString(result, &mut text) == CUresult::CUDA_SUCCESS && !text.is_null();
        if known { CStr::from_ptr(text).to_string_lossy().into_owned() } else { "unknown".to_owned() }
    };
    Err(CudaError { call, code: result as u32, text })
}

/// Names the call after the function. The arguments' validity is the caller's, in whose `unsafe` block this stands.
macro_rules! call {
    ($function:ident($($argument:expr),* $(,)?)) => {
        $crate::driver::check(stringify!($function), ::cudarc::driver::sys::$function($($argument),*))
    };
}
pub(crate) use call;

/// The driver, once it is loaded and initialised.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Driver {
    /// 12020 is CUDA 12.2.
    pub(crate) version: i32,
}

/// Loads the driver. An error says why there is none.
pub(crate) fn driver() -> Result<Driver, String> {
    static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
    DRIVER.get_or_init(load).clone()
}

fn load() -> Result<Driver, String> {
    // SAFETY: loading the driver's library runs its initialisers, as every CUDA program does.
    if !unsafe { sys::is_culib_present() } {
        return Err(
            "there is no CUDA driver (libcuda.so.1) here; install the NVIDIA driver, or mount its libraries into \
                    the container"
                .to_owned(),
        );
    }
    let mut version = 0;
    // SAFETY: the library is there; the driver writes the version.
    unsafe {
        call!(cuInit(0)).map_err(|error| format!("{error}; is a GPU visible here (nvidia-smi)?"))?;
        call!(cuDriverGetVersion(&mut version))?;
    }
    if version < VERSION_MIN {
        let [have, need] = [version, VERSION_MIN].map(release);
        return Err(format!("the driver has CUDA {have}, at least {need} is needed for the kernels; update it"));
    }
    Ok(Driver { version })
}

/// As people write a version.
pub(crate) fn release(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The first driver that takes the PTX.
const VERSION_MIN: i32 = 12020;
/// The first one with the call that [`elapsed`] makes.
const TIMES_MIN: i32 = 12080;

impl Driver {
    /// Whether it tells the time between events; an error says which one does.
    pub(crate) fn tells_times(self) -> Result<(), String> {
        if self.version >= TIMES_MIN {
            return Ok(());
        }
        let [have, need] = [self.version, TIMES_MIN].map(release);
        Err(format!("the driver has CUDA {have}, and GPU times need {need}; update it, or measure without them"))
    }
}

pub(crate) use sys::{
    CUcontext as Context, CUdevice as DeviceHandle, CUdevice_attribute as Attribute, CUevent as EventHandle,
    CUfunction as Function, CUmodule as Module, CUstream as Stream,
};

pub(crate) fn device_count(_: Driver) -> Result<u32, CudaError> {
    let mut count = 0;
    // SAFETY: the driver is initialised (`Driver` proves it) and writes the count.
    unsafe { call!(cuDeviceGetCount(&mut count))? };
    Ok(count.max(0).cast_unsigned())
}

pub(crate) fn device(_: Driver, ordinal: u32) -> Result<DeviceHandle, CudaError> {
    let mut device = 0;
    // SAFETY: as above.
    unsafe { call!(cuDeviceGet(&mut device, ordinal.cast_signed()))? };
    Ok(device)
}

pub(crate) fn device_name(device: DeviceHandle) -> Result<String, CudaError> {
    let mut name = [0; 256];
    // SAFETY: the driver writes at most 256 bytes, the last of them zero.
    unsafe { call!(cuDeviceGetName(name.as_mut_ptr(), 256, device))? };
    let bytes: Vec<u8> = name.iter().map(|byte| byte.cast_unsigned()).take_while(|byte| *byte != 0).collect();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

pub(crate) fn device_uuid(device: DeviceHandle) -> Result<[u8; 16], CudaError> {
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: the driver writes 16 bytes.
    unsafe { call!(cuDeviceGetUuid_v2(&mut uuid, device))? };
    Ok(uuid.bytes.map(|byte| byte.cast_unsigned()))
}

pub(crate) fn attribute(device: DeviceHandle, attribute: Attribute) -> Result<i32, CudaError> {
    let mut value = 0;
    // SAFETY: the driver writes the value.
    unsafe { call!(cuDeviceGetAttribute(&mut value, attribute, device))? };
    Ok(value)
}

pub(crate) fn can_access(device: DeviceHandle, peer: DeviceHandle) -> Result<bool, CudaError> {
    let mut can = 0;
    // SAFETY: the driver writes the answer.
    unsafe { call!(cuDeviceCanAccessPeer(&mut can, device, peer))? };
    Ok(can != 0)
}

/// Whether two GPUs are joined by NVLink: it has the atomics of a GPU's own memory, which PCIe has not.
pub(crate) fn is_nvlink(device: DeviceHandle, peer: DeviceHandle) -> Result<bool, CudaError> {
    let mut native = 0;
    let attribute = sys::CUdevice_P2PAttribute::CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED;
    // SAFETY: the driver writes the answer.
    unsafe { call!(cuDeviceGetP2PAttribute(&mut native, attribute, device, peer))? };
    Ok(native != 0)
}

pub(crate) fn retain_context(device: DeviceHandle) -> Result<Context, CudaError> {
    let mut context = std::ptr::null_mut();
    // SAFETY: the driver writes the handle; whoever retains releases.
    unsafe { call!(cuDevicePrimaryCtxRetain(&mut context, device))? };
    Ok(context)
}

/// # Safety
/// It was retained once more than it was released, and nothing made in it is used afterwards.
pub(crate) unsafe fn release_context(device: DeviceHandle) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { call!(cuDevicePrimaryCtxRelease_v2(device)) }
}

/// # Safety
/// The context is retained for as long as this thread works in it.
pub(crate) unsafe fn set_context(context: Context) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { call!(cuCtxSetCurrent(context)) }
}

/// # Safety
/// The peer's context is retained for as long as its memory is used in the present one.
pub(crate) unsafe fn enable_peer(peer: Context) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    match unsafe { call!(cuCtxEnablePeerAccess(peer, 0)) } {
        Err(error) if error.code == CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED as u32 => Ok(()),
        other => other,
    }
}

// What follows works in the calling thread's present context. Handles are valid until destroyed, in the context that made them.

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
/// Both events exist, are timed and done; [`Driver::tells_times`].
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
