//! Finds the devices that libfabric can use here and opens them.

use std::path::Path;
use std::rc::Rc;
use std::sync::Once;

use kvferry_core::{PoolId, PoolLayout};
use kvferry_local::{LocalTransport, host};
use kvferry_topology::Counters;
use kvferry_transport::{
    Device, NicInfo, OpenError, Options, PackedBy, Pool, PoolError, PoolOptions, Provider, Transport, TransportKind,
};

use crate::backend::Fabric;
use crate::device;
use crate::domain::Domain;
use crate::hmem;
use crate::library::Library;
use crate::messages::Messages;
use crate::packing::Packing;

/// Opens devices through libfabric, a domain for each.
#[derive(Clone, Debug, Default)]
pub struct LibfabricProvider {
    only: Option<String>,
    packed: Option<(PackedBy, u64)>,
    within_process: bool,
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

    /// Pieces that are shorter than `below` bytes on average are packed as `by` says, whatever [`Options::packed_below_bytes`] and
    /// [`Options::packed_by`] say.
    pub fn packed(mut self, by: PackedBy, below: u64) -> LibfabricProvider {
        self.packed = Some((by, below));
        self
    }

    /// Has transports of one process meet in libfabric's shared memory, which 1.17 mostly survives where none of them is closed before the
    /// others, and later versions do not do. For tests that run in one process.
    #[doc(hidden)]
    pub fn within_process(mut self) -> LibfabricProvider {
        self.within_process = true;
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

/// The counters of an RDMA device, whose providers offer the first port only.
fn counters(root: &Path, provider: &str, device: &str) -> Counters {
    if provider == "efa" { Counters::open(root, &format!("{device}:1")) } else { Counters::default() }
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

    /// Private memory on huge pages: tcp's copies and a NIC's translations go by the page, and shared memory seldom has large ones.
    fn allocate(&self, _: &Device, id: PoolId, layout: PoolLayout, _: &str) -> Result<Pool, PoolError> {
        Pool::allocate_private(id, layout, &PoolOptions::default())
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
        let mut options = options.clone();
        if let Some((by, below)) = self.packed {
            (options.packed_by, options.packed_below_bytes) = (by, Some(below));
        }
        let explain = |reason: String| unavailable(explain(library, &reason));
        let domain = hmem::open(library, &device.name, options.device_memory, self.within_process).map_err(explain)?;
        let counters = counters(Path::new("/"), &domain.info.provider(), &device.name);
        Ok(Box::new(open(&domain, &device.name, &options, counters)?))
    }
}

/// Said once.
static SHM: Once = Once::new();
/// What nothing of ours can mend.
const SHM_WARNING: &str = "libfabric's shm does not survive a process that is killed: 1.17 reads under a lock in the peer's memory, for which all \
                           others then spin inside the library for ever, and 2.5 leaves survivors standing still; --transport shm does survive that";

fn explain(library: &Library, reason: &str) -> String {
    format!("{reason}; FI_LOG_LEVEL=info says more, {} is {}", library.path, library.version)
}

pub(crate) fn open(
    domain: &Rc<Domain>,
    name: &str,
    options: &Options,
    counters: Counters,
) -> Result<LocalTransport<Fabric>, OpenError> {
    let unavailable = |reason: String| OpenError::Unavailable { device: name.to_owned(), reason };
    let library = domain.library;
    let provider = domain.info.provider();
    let info = NicInfo {
        kind: TransportKind::Libfabric,
        device: name.to_owned(),
        host: if provider == "shm" { host().map_err(unavailable)? } else { String::new() },
        library: Some(format!("{} {} {provider}", library.path, library.version)),
        bits_per_second: domain.info.bits_per_second(),
    };
    if provider == "shm" {
        SHM.call_once(|| tracing::warn!("{SHM_WARNING}"));
    }
    let explain = |reason: String| unavailable(explain(library, &reason));
    let messages = Messages::open(domain).map_err(explain)?;
    let packing = Packing::new(options, &provider);
    let name = (messages.name(), messages.descriptor());
    let fabric = Fabric::new(domain, name, messages.emulates_reads(), counters, packing).map_err(explain)?;
    LocalTransport::over(fabric, messages, info, options)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use kvferry_core::{Direction, TransferId};
    use kvferry_transport::conformance::{absent, block_planes, whole_blocks};
    use kvferry_transport::{Event, Evidence, Transfer};

    use super::*;

    const BLOCKS: u32 = 4;
    const BLOCK_BYTES: u64 = 16 << 10;

    /// Ports are where an adapter's counters are; only EFA's are looked for.
    #[test]
    fn only_rdma_devices_have_counters() {
        let root: PathBuf = std::env::temp_dir().join(format!("kvferry-fabric-counters-{}", std::process::id()));
        let folder = root.join("sys/class/infiniband/rdmap40s0/ports/1/hw_counters");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("rdma_read_bytes"), "5").unwrap();
        let words = |provider| counters(&root, provider, "rdmap40s0").words(kvferry_topology::Way::Read);
        assert_eq!(words("efa"), "rdma_read_bytes +0 for 0 bytes moved");
        assert!(words("tcp").contains("no counters"), "{}", words("tcp"));
        std::fs::remove_dir_all(&root).unwrap();
    }

    /// Nobody maps a pool of this transport's, and tcp's copies slow down where it is read by small pages.
    #[test]
    fn its_pools_are_private_memory() {
        let (device, layout) = (device("lo", None), block_planes(1, BLOCKS, BLOCK_BYTES));
        let pool = LibfabricProvider::new().allocate(&device, PoolId(1), layout, "private").unwrap();
        assert!(!pool.is_shared() && pool.regions().iter().all(|region| region.fd().is_none()));
    }

    /// Counters of a device that is not there, beside a connection that is.
    #[test]
    fn what_a_device_counted_is_shown_once_it_covers_what_was_read() {
        let library = match Library::find() {
            Ok(library) => library,
            Err(reason) => return absent("libfabric", &reason),
        };
        let root: PathBuf = std::env::temp_dir().join(format!("kvferry-fabric-proof-{}", std::process::id()));
        let folder = root.join("sys/class/infiniband/rdmap40s0/ports/1/hw_counters");
        std::fs::create_dir_all(&folder).unwrap();
        let count = |bytes: &str| std::fs::write(folder.join("rdma_read_bytes"), bytes).unwrap();
        count("7");
        let side = |counters| {
            let domain = hmem::open(library, "lo", false, false).unwrap();
            open(&domain, "lo", &Options::default(), counters).unwrap()
        };
        let mut here = side(Counters::open(&root, "rdmap40s0:1"));
        let mut there = side(Counters::default());

        let layout = block_planes(1, BLOCKS, BLOCK_BYTES);
        let make = |id| Pool::allocate(PoolId(id), layout.clone(), "proof").unwrap();
        let (source, destination) = (make(1), make(2));
        let keys = there.bind(&source).unwrap();
        here.bind(&destination).unwrap();
        let peer = here.connect(&there.address()).unwrap();
        let remote = here.import(peer, &keys, &layout).unwrap();
        let program = Arc::new(whole_blocks(1, 16, BLOCK_BYTES, 0..BLOCKS, 0..BLOCKS));
        let (id, range, direction) = (TransferId(1), program.whole(), Direction::Pull);
        let mut turn = |here: &mut LocalTransport<Fabric>, until: &dyn Fn(&[Event]) -> bool| {
            let (mut events, deadline) = (Vec::new(), Instant::now() + Duration::from_secs(20));
            while !until(&events) && Instant::now() < deadline {
                here.poll(&mut events);
                there.poll(&mut Vec::new());
            }
            assert!(until(&events), "{events:?}");
            events
        };
        let shown = |events: Vec<Event>| -> Vec<Evidence> {
            let one = |event| if let Event::Shown { evidence, .. } = event { Some(*evidence) } else { None };
            events.into_iter().filter_map(one).collect()
        };
        let is_counted = |evidence: &Evidence| evidence.seen.iter().any(|seen| seen.starts_with("rdma_read_bytes"));

        turn(&mut here, &|events| events.iter().any(|event| matches!(event, Event::Connected { .. })));
        here.post(Transfer { id, peer, direction, local: PoolId(2), remote, range, program, notice: None }).unwrap();
        let before = turn(&mut here, &|events| events.iter().any(|event| matches!(event, Event::Completed { .. })));
        assert!(!shown(before).iter().any(is_counted), "the device has counted nothing");
        count("65543");
        let proves = |event: &Event| matches!(event, Event::Shown { evidence, .. } if is_counted(evidence));
        let after = shown(turn(&mut here, &|events| events.iter().any(proves)));
        let proof = "rdma_read_bytes +65536 for 65536 bytes moved";
        assert!(after.iter().any(|evidence| evidence.seen.iter().any(|seen| seen == proof)), "{after:?}");
        std::fs::remove_dir_all(&root).unwrap();
    }
}
