//! NVML's calls.

use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_uint, c_void};
use std::fmt;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW, Symbol};
use thiserror::Error;

use crate::text::{Fabric, Gpu, SUCCESSFUL, uuid, write};

/// GPUs of one host that are asked; NVLink domains have 72 over all their hosts.
const GPUS_MAX: c_uint = 256;
/// Bytes of a name or version, `NVML_DEVICE_NAME_V2_BUFFER_SIZE`.
const NAME_MAX: usize = 96;

const SUCCESS: c_int = 0;
const INVALID_ARGUMENT: c_int = 2;
const NOT_SUPPORTED: c_int = 3;
const VERSION_MISMATCH: c_int = 25;

/// Why NVML tells nothing.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NvmlError {
    /// The loader refuses the library.
    #[error("{library} does not load: {reason}; containers get it with NVIDIA_DRIVER_CAPABILITIES=compute,utility")]
    Missing {
        /// The name or path that was asked for.
        library: String,
        /// The loader's words.
        reason: String,
    },
    /// It has no such call: it is not NVML, or older than any driver for GPUs with NVLink.
    #[error("NVML has no {call}: {reason}")]
    NoCall {
        /// The call.
        call: &'static str,
        /// The loader's words.
        reason: String,
    },
    /// The GPU is not registered with a fabric.
    #[error(
        "the GPU is in no NVLink domain: state {state}, {status}, cluster {cluster} (nvidia-smi -q, Fabric; do nvidia-fabricmanager or nvidia-imex run?)"
    )]
    Unregistered {
        /// How far its registration is.
        state: String,
        /// How it ended.
        status: String,
        /// The cluster's UUID, zeros where the fabric is one host's own.
        cluster: String,
    },
    /// A call fails.
    #[error("{call} says `{reason}` ({code})")]
    Refused {
        /// The call.
        call: &'static str,
        /// NVML's words for it.
        reason: String,
        /// `nvmlReturn_t`.
        code: i32,
    },
}

/// `nvmlPciInfo_t`, of `nvmlDeviceGetPciInfo_v3`.
#[repr(C)]
struct PciInfo {
    bus_id_legacy: [u8; 16],
    domain: c_uint,
    bus: c_uint,
    device: c_uint,
    pci_device_id: c_uint,
    pci_sub_system_id: c_uint,
    bus_id: [u8; 32],
}

/// `nvmlGpuFabricInfo_v3_t`; version 2 ends before the summary.
#[repr(C)]
#[derive(Default)]
struct FabricInfo {
    version: c_uint,
    cluster: [u8; 16],
    status: c_int,
    clique: c_uint,
    state: u8,
    health: c_uint,
    summary: u8,
}

/// `nvmlGpuFabricInfo_t`, of the call before it had versions.
#[repr(C)]
#[derive(Default)]
struct FabricInfo1 {
    cluster: [u8; 16],
    status: c_int,
    clique: c_uint,
    state: u8,
}

/// `NVML_STRUCT_VERSION`: the size, and the version in the upper byte. Version 2 is four bytes shorter.
const V3: c_uint = size_of::<FabricInfo>() as c_uint | 3 << 24;
const V2: c_uint = (size_of::<FabricInfo>() as c_uint - 4) | 2 << 24;

type Device = *mut c_void;
type Text = unsafe extern "C" fn(*mut c_char, c_uint) -> c_int;
type Words = unsafe extern "C" fn(c_int) -> *const c_char;

/// Loads NVML (`library`, a path or a name for the loader), asks every GPU and writes what it says as `nvidia-smi -q` does: a driver that is too
/// old for a GPU's fabric leaves the section out.
pub fn query(library: &OsStr) -> Result<String, NvmlError> {
    let nvml = Nvml::open(library)?;
    let driver = nvml.driver();
    let gpus: Result<Vec<Gpu>, NvmlError> = (0..nvml.count()?).map(|index| nvml.gpu(index)).collect();
    Ok(write(driver.as_deref(), &gpus?))
}

/// A GPU's place among the fabrics of many hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FabricPlace {
    /// The domain's UUID.
    pub cluster: [u8; 16],
    /// Which part of it: GPUs reach those of the same one.
    pub clique: u32,
}

impl fmt::Display for FabricPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", uuid(&self.cluster), self.clique)
    }
}

/// Loads NVML as [`query`] does, and asks where the GPU of this UUID is. One that is in no domain of several hosts, or not registered with it yet, is
/// an error that says so. It is meant for processes that have loaded NVIDIA's driver anyway.
pub fn place(library: &OsStr, gpu: &[u8; 16]) -> Result<FabricPlace, NvmlError> {
    const CALL: &str = "nvmlDeviceGetHandleByUUID";
    let nvml = Nvml::open(library)?;
    let call: Symbol<unsafe extern "C" fn(*const c_char, *mut Device) -> c_int> = nvml.call(CALL)?;
    let name = CString::new(format!("GPU-{}", uuid(gpu))).unwrap_or_default();
    let mut device: Device = std::ptr::null_mut();
    // SAFETY: the name ends with a zero; NVML writes one handle, which it owns.
    nvml.check(CALL, unsafe { call(name.as_ptr(), &mut device) })?;
    let fabric = nvml.fabric(device)?.unwrap_or_default();
    match fabric.place() {
        Some((cluster, clique)) => Ok(FabricPlace { cluster, clique }),
        None => Err(NvmlError::Unregistered {
            state: fabric.state(),
            status: fabric.status,
            cluster: uuid(&fabric.cluster),
        }),
    }
}

/// The library, initialised. It stays loaded for as long as the process lives.
struct Nvml {
    library: std::mem::ManuallyDrop<Library>,
}

impl Nvml {
    fn open(name: &OsStr) -> Result<Nvml, NvmlError> {
        // SAFETY: loading runs the library's initialisers, which is what the caller asks for; it is never unloaded.
        let library = unsafe { Library::open(Some(name), RTLD_NOW | RTLD_LOCAL) }.map_err(|error| {
            NvmlError::Missing { library: name.to_string_lossy().into_owned(), reason: words(&error) }
        })?;
        let nvml = Nvml { library: std::mem::ManuallyDrop::new(library) };
        let initialise: Symbol<unsafe extern "C" fn() -> c_int> = nvml.call("nvmlInit_v2")?;
        // SAFETY: NVML declares it so; it takes nothing.
        nvml.check("nvmlInit_v2", unsafe { initialise() })?;
        Ok(nvml)
    }

    fn call<T>(&self, call: &'static str) -> Result<Symbol<T>, NvmlError> {
        // SAFETY: the callers name types that NVML's header gives these calls.
        unsafe { self.library.get(call.as_bytes()) }.map_err(|error| NvmlError::NoCall { call, reason: words(&error) })
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), NvmlError> {
        if code == SUCCESS { Ok(()) } else { Err(NvmlError::Refused { call, reason: self.words(code), code }) }
    }

    /// NVML's words for a code.
    fn words(&self, code: c_int) -> String {
        let Ok(call) = self.call::<Words>("nvmlErrorString") else { return format!("error {code}") };
        // SAFETY: NVML declares it so; it returns a constant for every number.
        let text = unsafe { call(code) };
        if text.is_null() {
            return format!("error {code}");
        }
        // SAFETY: not null; the constant ends with a zero and lives as long as the library, which stays loaded.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    fn driver(&self) -> Option<String> {
        let call = self.call::<Text>("nvmlSystemGetDriverVersion").ok()?;
        let mut text = [0u8; NAME_MAX];
        // SAFETY: NVML writes at most as many bytes as it is told there are.
        let code = unsafe { call(text.as_mut_ptr().cast(), NAME_MAX as c_uint) };
        (code == SUCCESS).then(|| until_zero(&text))
    }

    fn count(&self) -> Result<c_uint, NvmlError> {
        const CALL: &str = "nvmlDeviceGetCount_v2";
        let call: Symbol<unsafe extern "C" fn(*mut c_uint) -> c_int> = self.call(CALL)?;
        let mut count = 0;
        // SAFETY: NVML writes one number.
        self.check(CALL, unsafe { call(&mut count) })?;
        Ok(count.min(GPUS_MAX))
    }

    fn gpu(&self, index: c_uint) -> Result<Gpu, NvmlError> {
        const CALL: &str = "nvmlDeviceGetHandleByIndex_v2";
        let call: Symbol<unsafe extern "C" fn(c_uint, *mut Device) -> c_int> = self.call(CALL)?;
        let mut device: Device = std::ptr::null_mut();
        // SAFETY: NVML writes one handle, which it owns.
        self.check(CALL, unsafe { call(index, &mut device) })?;
        Ok(Gpu { address: self.address(device)?, name: self.name(device), fabric: self.fabric(device)? })
    }

    fn address(&self, device: Device) -> Result<String, NvmlError> {
        const CALL: &str = "nvmlDeviceGetPciInfo_v3";
        let call: Symbol<unsafe extern "C" fn(Device, *mut PciInfo) -> c_int> = self.call(CALL)?;
        // SAFETY: numbers and arrays of numbers may be zero.
        let mut pci: PciInfo = unsafe { std::mem::zeroed() };
        // SAFETY: the handle is NVML's own; it writes one structure of this layout.
        self.check(CALL, unsafe { call(device, &mut pci) })?;
        Ok(until_zero(&pci.bus_id))
    }

    fn name(&self, device: Device) -> Option<String> {
        let call = self.call::<unsafe extern "C" fn(Device, *mut c_char, c_uint) -> c_int>("nvmlDeviceGetName").ok()?;
        let mut text = [0u8; NAME_MAX];
        // SAFETY: the handle is NVML's own; it writes at most as many bytes as it is told there are.
        let code = unsafe { call(device, text.as_mut_ptr().cast(), NAME_MAX as c_uint) };
        (code == SUCCESS).then(|| until_zero(&text))
    }

    /// `None` where the driver has no call for it.
    fn fabric(&self, device: Device) -> Result<Option<Fabric>, NvmlError> {
        const CALL: &str = "nvmlDeviceGetGpuFabricInfoV";
        let Ok(call) = self.call::<unsafe extern "C" fn(Device, *mut FabricInfo) -> c_int>(CALL) else {
            return self.fabric_without_version(device);
        };
        for version in [V3, V2] {
            let mut info = FabricInfo { version, ..FabricInfo::default() };
            // SAFETY: the handle is NVML's own; it writes what the version's structure has, which is no longer than this one.
            match unsafe { call(device, &mut info) } {
                VERSION_MISMATCH | INVALID_ARGUMENT => {}
                NOT_SUPPORTED => return Ok(Some(Fabric::default())),
                code => {
                    self.check(CALL, code)?;
                    let summary = (version == V3).then_some(info.summary);
                    return Ok(Some(Fabric {
                        state: info.state,
                        status: self.status(info.status),
                        clique: info.clique,
                        cluster: info.cluster,
                        health: Some((info.health, summary)),
                    }));
                }
            }
        }
        self.fabric_without_version(device)
    }

    fn fabric_without_version(&self, device: Device) -> Result<Option<Fabric>, NvmlError> {
        const CALL: &str = "nvmlDeviceGetGpuFabricInfo";
        let Ok(call) = self.call::<unsafe extern "C" fn(Device, *mut FabricInfo1) -> c_int>(CALL) else {
            return Ok(None);
        };
        let mut info = FabricInfo1::default();
        // SAFETY: the handle is NVML's own; it writes one structure of this layout.
        match unsafe { call(device, &mut info) } {
            NOT_SUPPORTED => Ok(Some(Fabric::default())),
            code => {
                self.check(CALL, code)?;
                Ok(Some(Fabric {
                    state: info.state,
                    status: self.status(info.status),
                    clique: info.clique,
                    cluster: info.cluster,
                    health: None,
                }))
            }
        }
    }

    fn status(&self, code: c_int) -> String {
        if code == SUCCESS { SUCCESSFUL.to_owned() } else { self.words(code) }
    }
}

fn until_zero(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let text = String::from_utf8_lossy(bytes.get(..end).unwrap_or(bytes)).into_owned();
    // One line is one value.
    text.replace(char::is_control, " ")
}

fn words(error: &libloading::Error) -> String {
    match error {
        libloading::Error::DlOpen { desc } | libloading::Error::DlSym { desc } => format!("{desc:?}"),
        other => other.to_string(),
    }
}
