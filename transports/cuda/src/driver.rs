//! The CUDA driver, one `Result` per call: loaded at run time, never linked; its devices and contexts here, what works in them below.

mod memory;
mod physical;
mod work;

use std::ffi::CStr;
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUresult};
use thiserror::Error;

pub(crate) use memory::{
    allocate, allocate_host, allocation_of, close_ipc, free, free_host, free_memory, ipc_handle, is_ipc_capable,
    open_ipc, ordinal_of,
};
pub(crate) use physical::{
    HandleKind, Physical, allow, create_physical, export, export_fabric, granularity, import, import_fabric, map,
    physical_of, release_physical, reserve, unmap, unreserve,
};
pub(crate) use work::{
    create_event, create_stream, destroy_event, destroy_stream, download, elapsed, function, is_done, launch,
    launch_host, load_module, record, set, stream_waits, synchronize, unload_module, upload, wait,
};

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
