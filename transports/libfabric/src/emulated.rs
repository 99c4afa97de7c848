//! A libfabric that offers the memory of GPUs over TCP, where neither is: the library that is here, with some of its functions in front of which
//! something stands. Memory of the "GPU" is at addresses that fault whoever touches them; only this NIC knows where its bytes are.

mod calls;
pub(crate) mod faults;
mod memory;

use std::cell::RefCell;
use std::ffi::c_int;
use std::sync::OnceLock;

use kvferry_core::{PoolId, PoolLayout};
use kvferry_topology::Counters;
use kvferry_transport::conformance::absent;
use kvferry_transport::{
    Device, OpenError, Options, PackedBy, Pool, PoolError, PoolOptions, Provider, Transport, TransportKind,
};
use libfabric_sys::libloading::os::unix::{Library as Loaded, RTLD_LOCAL, RTLD_NOW};
use libfabric_sys::{Fabric, version};

use crate::hmem;
use crate::library::{Library, Version};
use crate::provider;

pub(crate) use memory::{Gpu, pool};

/// What the GPU is called, and how CUDA numbers it.
pub(crate) const GPU: (&str, i32) = ("gpu3", 3);

/// What this thread's endpoints and domains say.
#[derive(Clone, Debug, Default)]
pub(crate) struct Script {
    pub(crate) offers_nothing: bool,
    /// Status of each, zero if it is taken.
    pub(crate) p2p: c_int,
    pub(crate) cuda_api: c_int,
    pub(crate) by_dmabuf: c_int,
    pub(crate) by_address: c_int,
    /// What was done: options with their values in order, and registrations.
    pub(crate) options: Vec<(u32, i32)>,
    pub(crate) dmabufs: usize,
    pub(crate) addresses: usize,
    /// What should not have been.
    pub(crate) complaints: Vec<String>,
}

thread_local! {
    static SCRIPT: RefCell<Script> = RefCell::default();
}

/// Looks at this thread's script, or changes it.
pub(crate) fn script<R>(f: impl FnOnce(&mut Script) -> R) -> R {
    SCRIPT.with(|script| f(&mut script.borrow_mut()))
}

/// The library, in front of the one that is here; none, and a word, without that. It calls itself one of a version that knows all of it.
pub(crate) fn library() -> Option<&'static Library> {
    static MADE: OnceLock<Option<&'static Library>> = OnceLock::new();
    *MADE.get_or_init(|| {
        let real = match Library::find() {
            Ok(real) => real,
            Err(reason) => {
                absent("libfabric", &reason);
                return None;
            }
        };
        Some(in_front_of(real, Version(version(2, 5)), |api| {
            api.fi_getinfo = Ok(calls::getinfo);
            api.fi_fabric = Ok(calls::fabric);
        }))
    })
}

/// A library that is loaded already, with some of its functions changed, which says that it is of that version.
fn in_front_of(real: &Library, version: Version, change: impl FnOnce(&mut Fabric)) -> &'static Library {
    // SAFETY: it is loaded already, and stays so.
    let mut api = unsafe {
        let loaded = Loaded::open(Some(&real.path), RTLD_NOW | RTLD_LOCAL).unwrap();
        Fabric::from_library(loaded).unwrap()
    };
    change(&mut api);
    Box::leak(Box::new(Library { api, path: real.path.clone(), version }))
}

/// Opens devices of that library.
pub(crate) struct Gpus {
    device: &'static str,
    which: fn(PoolId) -> bool,
    packed: PackedBy,
}

impl Gpus {
    /// Pools for which `which` is true are in the GPU's memory.
    pub(crate) fn new(device: &'static str, which: fn(PoolId) -> bool) -> Gpus {
        Gpus { device, which, packed: PackedBy::Message }
    }

    /// Everything is packed that may be.
    pub(crate) fn packed(mut self) -> Gpus {
        self.packed = PackedBy::Read;
        self
    }
}

impl Provider for Gpus {
    fn kind(&self) -> TransportKind {
        TransportKind::Libfabric
    }

    fn discover(&self) -> Vec<Device> {
        vec![Device { kind: TransportKind::Libfabric, name: self.device.to_owned(), unavailable: None }]
    }

    fn allocate(&self, _: &Device, id: PoolId, layout: PoolLayout, name: &str) -> Result<Pool, PoolError> {
        if (self.which)(id) {
            return Ok(pool(id, layout, Gpu::default()));
        }
        Pool::allocate_with(id, layout, name, &PoolOptions { huge_pages: false, ..PoolOptions::default() })
    }

    fn open(&self, device: &Device, options: &Options) -> Result<Box<dyn Transport>, OpenError> {
        let domain = hmem::open(library().unwrap(), &device.name, true, false).unwrap();
        assert_eq!(domain.reach, Ok(hmem::Reach::Direct));
        let packed = Options { packed_by: self.packed, packed_below_bytes: Some(u64::MAX), ..options.clone() };
        Ok(Box::new(provider::open(&domain, &device.name, &packed, Counters::default())?))
    }
}

impl Drop for Gpus {
    fn drop(&mut self) {
        let Script { complaints, .. } = script(std::mem::take);
        if !std::thread::panicking() {
            assert!(complaints.is_empty(), "{complaints:?}");
        }
    }
}
