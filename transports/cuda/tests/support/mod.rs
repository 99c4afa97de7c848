//! A GPU that is none: a driver whose device is the processor, and NVML that has it in an NVLink domain.
#![allow(dead_code, reason = "not every test needs all of it")]

use std::ffi::{CStr, CString};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::OnceLock;

use bytes::Bytes;
use kvferry_core::{GpuIdentity, PoolId, PoolLayout, TransferId};
use kvferry_cuda::{Allocate, CudaProvider};
use kvferry_transport::conformance::absent;
use kvferry_transport::{
    BindError, ConnectError, Device, DeviceEvent, Event, Expected, ImportError, MemoryDomain, NicInfo, OpenError,
    Options, PeerId, Pool, PoolError, PoolKeys, PostError, Provider, RemotePool, Transfer, Transport, TransportKind,
    Wait,
};

/// Where peers of "other hosts" come in.
pub(crate) const DEVICE: &str = "gpu0@127.0.0.1";

/// Puts both libraries where the transport finds them, whatever this machine has; `false` where there is no C++ compiler. To be called before
/// anything of the transport is.
pub(crate) fn is_ready() -> bool {
    static READY: OnceLock<bool> = OnceLock::new();
    *READY.get_or_init(|| {
        let here = env!("CARGO_MANIFEST_DIR");
        load(&["-std=c++17", "-O1", "-x", "c++"], &format!("{here}/tests/driver.cpp"), "libcuda.so")
            && load(&["-x", "c", "-DNEWEST"], &format!("{here}/../nvml/tests/nvml.c"), "libnvidia-ml.so.1")
    })
}

/// Whoever asks the loader for the name from now on gets what is built here.
fn load(options: &[&str], source: &str, name: &str) -> bool {
    let file = std::env::temp_dir().join(format!("kvferry-{}-{name}", std::process::id()));
    let mut compiler = Command::new("c++");
    compiler.args(["-shared", "-fPIC", "-w", &format!("-Wl,-soname,{name}")]).args(options);
    match compiler.arg(source).arg("-o").arg(&file).output() {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => {
            absent("c++", &format!("there is no GPU's driver to test with: c++ does not start ({error})"));
            return false;
        }
    }
    open(&file);
    std::fs::remove_file(file).unwrap();
    true
}

/// How often the driver was asked for attributes of its device.
pub(crate) fn asked() -> i32 {
    count(c"driver_of_none_asked")
}

/// How many launches that stood by have moved something.
pub(crate) fn ordered() -> i32 {
    count(c"driver_of_none_ordered")
}

/// How many launches of all kinds have moved something.
pub(crate) fn moved() -> i32 {
    count(c"driver_of_none_moved")
}

/// From now on launches that stand by overlook their orders, give up when they have one, and end later; or no more.
pub(crate) fn overlook() {
    count(c"driver_of_none_overlook");
}

/// From now on no launch may stand by; or it may again.
pub(crate) fn refuse() {
    count(c"driver_of_none_refuse");
}

/// How many were refused.
pub(crate) fn refused() -> i32 {
    count(c"driver_of_none_refused")
}

/// How many orders were overlooked.
pub(crate) fn overlooked() -> i32 {
    count(c"driver_of_none_overlooked")
}

/// What a function of the driver's own says.
fn count(function: &CStr) -> i32 {
    // SAFETY: our own library has it, declared so; the loader has that library already, under its own name.
    unsafe {
        let library = libc::dlopen(c"libcuda.so".as_ptr(), libc::RTLD_NOW);
        let found = libc::dlsym(library, function.as_ptr());
        assert!(!found.is_null(), "the driver is another one");
        std::mem::transmute::<*mut libc::c_void, unsafe extern "C" fn() -> i32>(found)()
    }
}

fn open(file: &Path) {
    let path = CString::new(file.to_str().unwrap()).unwrap();
    // SAFETY: the library was just built from our own source; it has no initialisers beyond the language's, and stays loaded.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!handle.is_null(), "{} does not load", file.display());
}

pub(crate) fn device() -> Device {
    Device { kind: TransportKind::Cuda, name: DEVICE.to_owned(), unavailable: None }
}

/// Every transport is on a host of its own as far as the others know: they meet at the address for other hosts.
pub(crate) struct Hosts(pub(crate) Allocate);

impl Hosts {
    fn gpus(&self) -> CudaProvider {
        CudaProvider::default().with_memory(self.0).by_turns()
    }
}

impl Provider for Hosts {
    fn kind(&self) -> TransportKind {
        TransportKind::Cuda
    }

    fn discover(&self) -> Vec<Device> {
        vec![self.named(DEVICE).unwrap()]
    }

    fn named(&self, name: &str) -> Option<Device> {
        self.gpus().named(name)
    }

    fn allocate(&self, device: &Device, id: PoolId, layout: PoolLayout, name: &str) -> Result<Pool, PoolError> {
        self.gpus().allocate(device, id, layout, name)
    }

    fn open(&self, device: &Device, options: &Options) -> Result<Box<dyn Transport>, OpenError> {
        Ok(Box::new(Apart(self.gpus().open(device, options)?)))
    }
}

/// A transport that only says where it is found from other hosts.
struct Apart(Box<dyn Transport>);

impl Transport for Apart {
    fn info(&self) -> &NicInfo {
        self.0.info()
    }

    fn address(&self) -> Bytes {
        self.0.domain().unwrap().address
    }

    fn domain(&self) -> Option<MemoryDomain> {
        self.0.domain()
    }

    fn gpu(&self) -> Option<GpuIdentity> {
        self.0.gpu()
    }

    fn bind(&mut self, pool: &Pool) -> Result<PoolKeys, BindError> {
        self.0.bind(pool)
    }

    fn unbind(&mut self, pool: PoolId) {
        self.0.unbind(pool);
    }

    fn connect(&mut self, address: &[u8]) -> Result<PeerId, ConnectError> {
        self.0.connect(address)
    }

    fn import(&mut self, peer: PeerId, keys: &PoolKeys, layout: &PoolLayout) -> Result<RemotePool, ImportError> {
        self.0.import(peer, keys, layout)
    }

    fn expect(&mut self, transfer: Expected) -> Result<(), PostError> {
        self.0.expect(transfer)
    }

    fn post(&mut self, transfer: Transfer) -> Result<(), PostError> {
        self.0.post(transfer)
    }

    fn post_after(&mut self, transfer: Transfer, after: Arc<dyn DeviceEvent>) -> Result<(), PostError> {
        self.0.post_after(transfer, after)
    }

    fn cancel(&mut self, id: TransferId) {
        self.0.cancel(id);
    }

    fn fence(&mut self, peer: PeerId) {
        self.0.fence(peer);
    }

    fn disconnect(&mut self, peer: PeerId) {
        self.0.disconnect(peer);
    }

    fn poll(&mut self, events: &mut Vec<Event>) {
        self.0.poll(events);
    }

    fn arm(&mut self) -> Wait {
        self.0.arm()
    }
}
