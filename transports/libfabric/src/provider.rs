//! Finds the devices that libfabric can use here and opens them.

use kvferry_local::{LocalTransport, host};
use kvferry_transport::{Device, NicInfo, OpenError, Options, Provider, Transport, TransportKind};

use crate::backend::Fabric;
use crate::device;
use crate::domain::Domain;
use crate::library::Library;
use crate::messages::Messages;

/// Opens devices through libfabric, a domain for each.
#[derive(Clone, Debug, Default)]
pub struct LibfabricProvider {
    only: Option<String>,
}

impl LibfabricProvider {
    /// All devices of this host.
    pub fn new() -> LibfabricProvider {
        LibfabricProvider::default()
    }

    /// One device only, by the name of its domain (`eth0`, `rdmap40s0`, `shm`) or as `PROVIDER/DOMAIN`.
    pub fn only(mut self, device: &str) -> LibfabricProvider {
        self.only = Some(device.to_owned());
        self
    }

    /// Why libfabric cannot be used on this host at all, with the remedy: the library is missing, too old or incomplete.
    pub fn unavailable() -> Option<String> {
        Library::find().err()
    }

    /// Major and minor version of the library that is used here; `None` without one.
    pub fn version() -> Option<(u32, u32)> {
        Library::find().ok().map(|library| (library.version.0 >> 16, library.version.0 & 0xffff))
    }
}

fn device(name: &str, unavailable: Option<String>) -> Device {
    Device { kind: TransportKind::Libfabric, name: name.to_owned(), unavailable }
}

impl Provider for LibfabricProvider {
    fn kind(&self) -> TransportKind {
        TransportKind::Libfabric
    }

    /// What the library offers: EFA's devices, interfaces, `shm`. Without a usable library one device says why there is none.
    fn discover(&self) -> Vec<Device> {
        if let Some(only) = &self.only {
            return self.named(only).into_iter().collect();
        }
        match Library::find().and_then(device::discover) {
            Ok(names) => names.iter().map(|name| device(name, None)).collect(),
            Err(reason) => vec![device("any", Some(reason))],
        }
    }

    fn named(&self, name: &str) -> Option<Device> {
        if self.only.as_ref().is_some_and(|only| only != name) {
            return None;
        }
        let refusal = Library::find().and_then(|library| device::find(library, name)).err();
        Some(device(name, refusal))
    }

    fn open(&self, device: &Device, options: &Options) -> Result<Box<dyn Transport>, OpenError> {
        let unavailable = |reason: String| OpenError::Unavailable { device: device.name.clone(), reason };
        if device.kind != TransportKind::Libfabric {
            return Err(unavailable(format!("it is a {} device; open it with that provider", device.kind)));
        }
        if options.two_sided {
            return Err(unavailable("libfabric's transport reads memory; two-sided messages are UCX's method".into()));
        }
        let library = Library::find().map_err(unavailable)?;
        let found = device::find(library, &device.name).map_err(unavailable)?;
        let provider = found.provider();
        let info = NicInfo {
            kind: TransportKind::Libfabric,
            device: device.name.clone(),
            host: if provider == "shm" { host().map_err(unavailable)? } else { String::new() },
            library: Some(format!("{} {} {provider}", library.path, library.version)),
            bits_per_second: found.bits_per_second(),
        };
        let explain = |reason: String| {
            unavailable(format!("{reason}; FI_LOG_LEVEL=info says more, {} is {}", library.path, library.version))
        };
        let domain = Domain::open(library, found).map_err(explain)?;
        let messages = Messages::open(&domain).map_err(explain)?;
        let fabric = Fabric::new(&domain, messages.name(), messages.emulates_reads()).map_err(explain)?;
        Ok(Box::new(LocalTransport::over(fabric, messages, info, options)?))
    }
}
