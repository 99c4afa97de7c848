//! One GPU in this process: its context and the kernels.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::driver::{self, Attribute, Context, CudaError, DeviceHandle, Function, HandleKind, Module, driver};
use crate::{fabric, ptx};

/// A GPU, its primary context (the one that PyTorch and the runtime API use too) and the kernels in it.
pub(crate) struct Gpu {
    pub(crate) ordinal: u32,
    pub(crate) name: String,
    pub(crate) uuid: [u8; 16],
    pub(crate) driver_version: i32,
    /// Physical memory that handles can stand for; an error says why there is none.
    pub(crate) physical: Result<PhysicalMemory, String>,
    pub(crate) walk: Walks,
    pub(crate) even: Walks,
    pub(crate) even_standby: Function,
    pub(crate) write_known: Function,
    pub(crate) count_unknown: Function,
    device: DeviceHandle,
    context: Context,
    module: Module,
}

// SAFETY: the driver's handles may be used from any thread that has made the context current, which every user of a `Gpu` does first.
unsafe impl Send for Gpu {}
// SAFETY: nothing in it changes after construction.
unsafe impl Sync for Gpu {}

/// A kernel, by how its payload comes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Walks {
    /// As a short argument.
    pub(crate) small: Function,
    /// As a longer one.
    pub(crate) inline: Function,
    /// In GPU memory.
    pub(crate) uploaded: Function,
}

impl Walks {
    /// # Safety
    /// The module is loaded.
    unsafe fn of(module: Module, [small, inline, uploaded]: [&str; 3]) -> Result<Walks, CudaError> {
        // SAFETY: the caller's promise.
        let function = |name| unsafe { driver::function(module, name) };
        Ok(Walks { small: function(small)?, inline: function(inline)?, uploaded: function(uploaded)? })
    }
}

/// What a GPU's physical memory can be shared by.
#[derive(Clone, Debug)]
pub(crate) struct PhysicalMemory {
    pub(crate) kind: HandleKind,
    /// Allocations are multiples of this.
    pub(crate) granularity: u64,
    /// Why it is not by fabric handles, which other hosts could open.
    pub(crate) no_fabric: Option<String>,
}

/// What was found out of each GPU: it does not change while the process lives. A failure may be a full GPU's, and is not kept.
static PHYSICAL: Mutex<BTreeMap<u32, PhysicalMemory>> = Mutex::new(BTreeMap::new());

impl PhysicalMemory {
    fn known(ordinal: u32, device: DeviceHandle) -> Result<PhysicalMemory, String> {
        let mut known = PHYSICAL.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(memory) = known.get(&ordinal) {
            return Ok(memory.clone());
        }
        let memory = PhysicalMemory::of(ordinal, device)?;
        known.insert(ordinal, memory.clone());
        Ok(memory)
    }

    /// Found out by trying, in the GPU's context: what the device supports, the container, IMEX or a driver's setting may still forbid.
    fn of(ordinal: u32, device: DeviceHandle) -> Result<PhysicalMemory, String> {
        let has = |attribute| driver::attribute(device, attribute).is_ok_and(|value| value != 0);
        if !has(Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED) {
            return Err("it has no virtual memory management".to_owned());
        }
        let no_fabric = if has(Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED) {
            match PhysicalMemory::try_kind(ordinal, HandleKind::Fabric) {
                Ok(granularity) => {
                    return Ok(PhysicalMemory { kind: HandleKind::Fabric, granularity, no_fabric: None });
                }
                Err(error) => fabric::refusal(&error),
            }
        } else {
            "the device does not support them".to_owned()
        };
        if !has(Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED) {
            return Err(format!("no descriptors stand for it, nor fabric handles: {no_fabric}"));
        }
        let kind = HandleKind::Descriptor;
        let granularity = PhysicalMemory::try_kind(ordinal, kind)?;
        tracing::debug!(gpu = ordinal, reason = no_fabric, "no fabric handles; memory is shared by descriptors");
        Ok(PhysicalMemory { kind, granularity, no_fabric: Some(no_fabric) })
    }

    /// Makes and exports a little of it.
    fn try_kind(ordinal: u32, kind: HandleKind) -> Result<u64, CudaError> {
        let granularity = driver::granularity(ordinal, kind)?.max(1);
        let physical = driver::create_physical(ordinal, kind, granularity)?;
        // SAFETY: the handle was just made, and is used no more.
        unsafe {
            let exported = match kind {
                HandleKind::Descriptor => driver::export(physical).map(drop),
                HandleKind::Fabric => driver::export_fabric(physical).map(drop),
            };
            driver::release_physical(physical).and(exported)?;
        }
        Ok(granularity)
    }
}

/// What is known of a GPU without opening it.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) ordinal: u32,
    /// Why it cannot be used, if it cannot.
    pub(crate) unavailable: Option<String>,
}

/// The GPUs that this process may use (`CUDA_VISIBLE_DEVICES` numbers them). An error says why there are none.
pub(crate) fn find() -> Result<Vec<Found>, String> {
    let driver = driver()?;
    let found = |ordinal| {
        let major = driver::device(driver, ordinal)
            .and_then(|device| driver::attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR));
        let unavailable = match major {
            Ok(major) if major >= CAPABILITY_MIN => None,
            Ok(major) => Some(format!(
                "its compute capability is {major}.x, at least {CAPABILITY_MIN}.0 is needed for the kernels"
            )),
            Err(error) => Some(error.to_string()),
        };
        Found { ordinal, unavailable }
    };
    Ok((0..driver::device_count(driver)?).map(found).collect())
}

/// Where a GPU of this process is on PCI, as sysfs writes it: `0000:45:00.0`. An error says why the driver does not tell. Opens nothing.
pub fn pci_address(ordinal: u32) -> Result<String, String> {
    let device = driver::device(driver()?, ordinal)?;
    let part = |attribute| driver::attribute(device, attribute);
    let domain = part(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?;
    let bus = part(Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?;
    let slot = part(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?;
    // GPUs are a card's first function.
    Ok(format!("{domain:04x}:{bus:02x}:{slot:02x}.0"))
}

/// What the PTX is made for.
const CAPABILITY_MIN: i32 = 8;

static OPEN: Mutex<BTreeMap<u32, Weak<Gpu>>> = Mutex::new(BTreeMap::new());

impl Gpu {
    /// Opens a GPU; the same one for everybody in this process while anybody has it.
    pub(crate) fn open(ordinal: u32) -> Result<Arc<Gpu>, String> {
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = open.get(&ordinal).and_then(Weak::upgrade) {
            return Ok(gpu);
        }
        let gpu = Arc::new(Gpu::new(ordinal)?);
        open.insert(ordinal, Arc::downgrade(&gpu));
        Ok(gpu)
    }

    fn new(ordinal: u32) -> Result<Gpu, String> {
        let driver = driver()?;
        let device = driver::device(driver, ordinal)?;
        let (name, uuid) = (driver::device_name(device)?, driver::device_uuid(device)?);
        let context = driver::retain_context(device)?;
        let text = CString::new(ptx::PTX).map_err(|_| "the PTX has a zero in it".to_owned())?;
        // SAFETY: retained just above, released by `drop` only.
        let module = unsafe { driver::set_context(context) }.and_then(|()| driver::load_module(&text));
        let module = module.map_err(|error| {
            // SAFETY: retained just above; nothing was made in it.
            let _released = unsafe { driver::release_context(device) };
            format!("the kernels cannot be loaded: {error}")
        })?;
        let physical = PhysicalMemory::known(ordinal, device);
        let null = std::ptr::null_mut();
        let mut gpu = Gpu {
            ordinal,
            name,
            uuid,
            driver_version: driver.version,
            physical,
            walk: Walks { small: null, inline: null, uploaded: null },
            even: Walks { small: null, inline: null, uploaded: null },
            even_standby: null,
            write_known: null,
            count_unknown: null,
            device,
            context,
            module,
        };
        // SAFETY: the module is loaded for as long as `gpu` lives.
        unsafe {
            gpu.walk = Walks::of(module, [ptx::WALK_SMALL, ptx::WALK_INLINE, ptx::WALK])?;
            gpu.even = Walks::of(module, [ptx::EVEN_SMALL, ptx::EVEN_INLINE, ptx::EVEN])?;
            gpu.even_standby = driver::function(module, ptx::EVEN_STANDBY)?;
            gpu.write_known = driver::function(module, ptx::WRITE_KNOWN)?;
            gpu.count_unknown = driver::function(module, ptx::COUNT_UNKNOWN)?;
        }
        Ok(gpu)
    }

    /// Makes its context the calling thread's: first of all before anything in it.
    pub(crate) fn enter(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained for as long as this lives, and whoever works in it holds this.
        unsafe { driver::set_context(self.context) }
    }

    /// Lets kernels here reach plain allocations of another GPU of this process.
    pub(crate) fn reach(&self, other: &Gpu) -> Result<(), CudaError> {
        self.enter()?;
        // SAFETY: whoever uses the other's memory holds it, and with it the other GPU.
        unsafe { driver::enable_peer(other.context) }
    }

    /// Whether kernels here can reach the other's memory at all.
    pub(crate) fn can_reach(&self, other: &Gpu) -> bool {
        self.ordinal == other.ordinal || driver::can_access(self.device, other.device).unwrap_or(false)
    }

    /// As the driver calls it.
    pub(crate) fn device(&self) -> DeviceHandle {
        self.device
    }

    /// How memory that is allocated here is shared, for people.
    pub(crate) fn sharing(&self) -> String {
        match &self.physical {
            Ok(PhysicalMemory { kind: HandleKind::Fabric, .. }) => "memory by fabric handles".to_owned(),
            Ok(PhysicalMemory { no_fabric, .. }) => {
                let reason = no_fabric.as_deref().unwrap_or("not tried");
                format!("memory by descriptors (no fabric handles: {reason})")
            }
            Err(reason) => format!("memory by legacy CUDA IPC ({reason})"),
        }
    }

    /// As device lists call it.
    pub(crate) fn label(&self) -> String {
        label(self.ordinal)
    }
}

/// As device lists call the GPU of this number.
pub(crate) fn label(ordinal: u32) -> String {
    format!("gpu{ordinal}")
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.enter().is_ok() {
            // SAFETY: everybody who launches kernels holds this, and waits for them before letting go.
            let _unloaded = unsafe { driver::unload_module(self.module) };
        }
        // SAFETY: retained once in `new`; all memory, streams and events are owned by values that hold this.
        let _released = unsafe { driver::release_context(self.device) };
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gpu").field("ordinal", &self.ordinal).field("name", &self.name).finish()
    }
}
