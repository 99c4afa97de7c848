//! Finds the devices that UCX can use here and opens them.

use kvferry_core::{PoolId, PoolLayout};
use kvferry_topology::Counters;
use kvferry_transport::{
    Device, NicInfo, OpenError, Options, PackedBy, Pool, PoolError, PoolOptions, Provider, Transport, TransportKind,
};

use crate::context::Context;
use crate::device::{self, Access, Found, Method, SysRoot};
use crate::library::Library;
use crate::memlock::Lockable;
use crate::settings;
use crate::staging::Staging;
use crate::transport::UcxTransport;
use crate::worker::Worker;

/// Opens devices through UCX, a context for each.
#[derive(Clone, Debug, Default)]
pub struct UcxProvider {
    root: SysRoot,
    only: Option<String>,
    two_sided: bool,
    packed: Option<(PackedBy, u64)>,
}

impl UcxProvider {
    /// All devices of this host.
    pub fn new() -> UcxProvider {
        UcxProvider::default()
    }

    /// One device only.
    pub fn only(mut self, device: &str) -> UcxProvider {
        self.only = Some(device.to_owned());
        self
    }

    /// Bytes are sent as active messages by rendezvous, whatever [`Options::two_sided`] says: no remote keys, no remote access. Both ends
    /// must do so.
    pub fn two_sided(mut self) -> UcxProvider {
        self.two_sided = true;
        self
    }

    /// Pieces that are shorter than `below` bytes on average are packed, and come as `by` says, whatever [`Options::packed_below_bytes`] and
    /// [`Options::packed_by`] say.
    pub fn packed(mut self, by: PackedBy, below: u64) -> UcxProvider {
        self.packed = Some((by, below));
        self
    }

    /// Why UCX cannot be used on this host at all, with the remedy: the library is missing, too old or incomplete.
    pub fn unavailable() -> Option<String> {
        Library::find().err()
    }

    /// Major, minor and release of the library that is used here; `None` without one.
    pub fn version() -> Option<(u32, u32, u32)> {
        Library::find().ok().map(|library| (library.version.0, library.version.1, library.version.2))
    }

    /// A device by its name: what sysfs shows, else a port that UCX may know. Where something speaks against it, UCX itself is asked: only
    /// what it refuses, or would use badly, is unavailable.
    fn find(&self, library: &'static Library, access: Access, name: &str) -> Option<Found> {
        let shown = self.found(Some(library.version)).into_iter().find(|found| found.name == name);
        let (mut found, against) = match shown {
            Some(mut found) => {
                let against = found.unavailable.take();
                (found, against)
            }
            None if self.only.as_ref().is_none_or(|only| only == name) => {
                (device::meant(name)?, Some("/sys/class/infiniband and /sys/class/net show no such device".to_owned()))
            }
            None => return None,
        };
        let Some(against) = against else { return Some(found) };
        found.unavailable = device::too_old(found.method, library.version).or_else(|| {
            let refusal = Context::open(library, &found, access).err()?;
            Some(format!("{against}; {refusal}"))
        });
        if found.unavailable.is_none() {
            tracing::warn!(device = name, against, "UCX takes the device nevertheless");
        }
        Some(found)
    }

    pub(crate) fn opened(&self, device: &Device, options: &Options) -> Result<UcxTransport, OpenError> {
        let unavailable = |reason: String| OpenError::Unavailable { device: device.name.clone(), reason };
        if device.kind != TransportKind::Ucx {
            return Err(unavailable(format!("it is a {} device; open it with that provider", device.kind)));
        }
        let library = Library::find().map_err(unavailable)?;
        let access = self.access(options.two_sided);
        let Some(found) = &self.find(library, access, &device.name) else {
            let all = self.found(Some(library.version));
            let names: Vec<&str> = all.iter().map(|found| found.name.as_str()).collect();
            return Err(unavailable(format!("there is no such device; there are {}", names.join(", "))));
        };
        if let Some(reason) = &found.unavailable {
            return Err(unavailable(reason.clone()));
        }
        let host = match found.method {
            Method::Memory => this_host().map_err(unavailable)?,
            Method::Tcp | Method::Srd | Method::Verbs => String::new(),
        };
        let users = settings::users();
        if !users.is_empty() {
            tracing::info!(settings = users.join(" "), "UCX is also told by the environment, which wins");
        }
        let replaced = settings::replaced(found.method, access, library.version);
        if !replaced.is_empty() {
            let (device, settings) = (&found.name, replaced.join(" "));
            tracing::warn!(
                device,
                settings,
                "the environment replaces what kvferry tells UCX; unset it unless you mean to"
            );
        }
        let others = library.others();
        if !others.is_empty() {
            let (builds, used) = (others.join(", "), &library.path);
            tracing::warn!(
                builds,
                used,
                "other builds of UCX are loaded in this process; they may compete for devices"
            );
        }
        let refused = |reason: String| {
            let doubt = if found.method.is_rdma() { Lockable::read().doubt() } else { String::new() };
            unavailable(reason + &doubt)
        };
        let context = Context::open(library, found, access).map_err(refused)?;
        let worker = Worker::new(&context).map_err(refused)?;
        let staging = Staging::new(&context, access.chunk_bytes_max(), options.staging_bytes_max);
        let staging = staging.map_err(|reason| unavailable(format!("no staging for packed chunks: {reason}")))?;
        let mut named = format!("{} {}", library.path, library.version);
        for (what, list) in [("with", users), ("beside", others)] {
            if !list.is_empty() {
                named = format!("{named} {what} {}", list.join(" "));
            }
        }
        let info = NicInfo {
            kind: TransportKind::Ucx,
            device: found.name.clone(),
            host,
            library: Some(named),
            bits_per_second: found.bits_per_second,
        };
        let mut options = options.clone();
        if let Some((by, below)) = self.packed {
            (options.packed_by, options.packed_below_bytes) = (by, Some(below));
        }
        let mut transport =
            UcxTransport::open(info, found.method, access, worker, staging, options).map_err(refused)?;
        transport.replaced = replaced;
        transport.counters = Counters::open(&self.root.0, &found.network);
        Ok(transport)
    }

    fn access(&self, two_sided: bool) -> Access {
        if self.two_sided || two_sided { Access::TwoSided } else { Access::OneSided }
    }

    fn found(&self, version: Option<crate::library::Version>) -> Vec<Found> {
        let mut found = self.root.discover(version);
        found.retain(|found| self.only.as_ref().is_none_or(|only| found.name == *only));
        found
    }
}

impl Provider for UcxProvider {
    fn kind(&self) -> TransportKind {
        TransportKind::Ucx
    }

    /// RDMA ports, `memory`, and the interfaces that are up. Without a usable library each of them says so.
    fn discover(&self) -> Vec<Device> {
        let library = Library::find();
        let version = library.as_ref().ok().map(|library| library.version);
        let device = |found: Found| Device {
            kind: TransportKind::Ucx,
            name: found.name,
            unavailable: found.unavailable.or_else(|| library.as_ref().err().cloned()),
        };
        self.found(version).into_iter().map(device).collect()
    }

    fn named(&self, name: &str) -> Option<Device> {
        let found = match Library::find() {
            Ok(library) => self.find(library, self.access(false), name)?,
            Err(reason) => {
                let listed = self.found(None).into_iter().find(|found| found.name == name);
                Found { unavailable: Some(reason), ..listed.or_else(|| device::meant(name))? }
            }
        };
        Some(Device { kind: TransportKind::Ucx, name: found.name, unavailable: found.unavailable })
    }

    /// Private memory on huge pages: it is read and registered by the page, and shared memory seldom has large ones.
    fn allocate(&self, _: &Device, id: PoolId, layout: PoolLayout, _: &str) -> Result<Pool, PoolError> {
        Pool::allocate_private(id, layout, &PoolOptions::default())
    }

    fn open(&self, device: &Device, options: &Options) -> Result<Box<dyn Transport>, OpenError> {
        Ok(Box::new(self.opened(device, options)?))
    }
}

/// Equal on one host until it boots again.
fn this_host() -> Result<String, String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(path).map_err(|error| format!("{path} cannot be read: {error}"))?;
    Ok(text.trim().to_owned())
}
