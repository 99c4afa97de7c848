//! Which NICs a rank opens: those near the memory that its pool is in.

use std::collections::{BTreeMap, BTreeSet};

use kvferry_core::TransportKind;
use kvferry_topology::{Affinity, Make, Nearness, Overrides, Port, Topology};
use kvferry_transport::Device;

use super::providers;

/// What the library of a transport appends to the names of EFA's devices; a transport may have cut it off.
const DOMAIN_ENDS: [&str; 3] = ["", "-rdm", "-dgrm"];

/// Where a rank's pool is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Memory {
    /// In host memory, anywhere: all NICs are as near.
    #[default]
    Host,
    /// In host memory of this NUMA node.
    Numa(u32),
    /// On a GPU: its PCI address ([`cuda::pci_address`](super::cuda::pci_address) tells it), or its number in the order of PCI addresses.
    Gpu(String),
}

/// The NICs of one rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Near {
    /// What to open, by the names that [`select`](super::select) takes, the nearest first. Empty if the transport has no NIC near any memory here.
    pub devices: Vec<String>,
    /// How near they are to the GPU or NUMA node; `None` where the pool is anywhere, or its place is not known.
    pub nearness: Option<Nearness>,
    /// Why the rank's place is not known, if it is not.
    pub warning: Option<String>,
}

/// The NICs of this host that a transport can use, and what each is near to.
///
/// ```
/// use std::path::Path;
/// use kvferry::TransportKind;
/// use kvferry::topology::{Overrides, Topology};
/// use kvferry::transport::{self, Memory, Nearby};
///
/// let host = Topology::read(Path::new("/"));
/// let nearby = Nearby::find(TransportKind::Tcp, host, &"0=mlx5_0+mlx5_1".parse::<Overrides>()?);
/// nearby.warnings().iter().for_each(|warning| eprintln!("warning: {warning}"));
/// // All NICs near the first GPU, for the first rank that has its pool there.
/// let near = nearby.nics(&Memory::Gpu("0".to_owned()), 0, 0);
/// let options = transport::Options::default();
/// let nics = near.devices.iter().map(|device| transport::select(TransportKind::Tcp, Some(device), &options));
/// let _nics = nics.collect::<Result<Vec<_>, _>>()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Nearby {
    /// Ports; those that the transport cannot use say why.
    host: Topology,
    /// By port: what the transport calls it.
    devices: BTreeMap<String, String>,
    affinity: Affinity,
}

/// A port that a transport does not use.
enum Unused {
    /// It is none of the transport's.
    Other(String),
    /// It should be, and this is in the way.
    Missing(String),
}

impl Nearby {
    /// Asks the transport for its devices and lays them beside what sysfs shows.
    pub fn find(kind: TransportKind, host: Topology, overrides: &Overrides) -> Nearby {
        let provider = providers().into_iter().find(|provider| provider.kind() == kind);
        let listed = provider.map(|provider| provider.discover()).unwrap_or_default();
        Nearby::among(kind, &listed, host, overrides)
    }

    /// The same, with the transport's devices as they were listed elsewhere.
    pub fn among(kind: TransportKind, listed: &[Device], mut host: Topology, overrides: &Overrides) -> Nearby {
        let mut devices = BTreeMap::new();
        // What nobody has to be told, unless somebody counts on it.
        let mut quiet = BTreeSet::new();
        for port in &mut host.ports {
            match device(kind, port, listed) {
                Ok(device) => {
                    devices.insert(port.name(), device);
                    port.unusable = None;
                }
                Err(Unused::Missing(why)) => port.unusable = Some(why),
                Err(Unused::Other(why)) => {
                    if !overrides.names(port) {
                        quiet.insert(format!("{}: {why}", port.name()));
                    }
                    port.unusable = Some(why);
                }
            }
        }
        let mut affinity = host.affinity(overrides);
        affinity.warnings.retain(|warning| !quiet.contains(warning));
        Nearby { host, devices, affinity }
    }

    /// NICs that the host has and the transport does not use, each with the reason and a remedy, and what overrides name in vain.
    pub fn warnings(&self) -> &[String] {
        &self.affinity.warnings
    }

    /// The NICs of a rank whose pool is in that memory: `rails` of those that are near, 0 for all of them. `turn` counts the ranks that have their
    /// pools there, too, from 0: where some are left out, each takes those that the ones before it left. Who has all has them in one order, for
    /// NICs of one index meet each other, as rails are wired.
    pub fn nics(&self, memory: &Memory, rails: usize, turn: usize) -> Near {
        let (mut ports, nearness, warning) = match memory {
            Memory::Host => (self.usable(|_| true), None, None),
            Memory::Numa(node) => {
                let is_near = |port: &Port| port.pci.as_ref().and_then(|pci| pci.numa) == Some(*node);
                match self.usable(is_near) {
                    none if none.is_empty() => (self.usable(|_| true), Some(Nearness::Far), None),
                    near => (near, Some(Nearness::Numa), None),
                }
            }
            Memory::Gpu(named) => match self.gpu(named) {
                Some(gpu) => (gpu.nics.clone(), Some(gpu.nearness), None),
                None => {
                    let known = self.affinity.gpus.len();
                    let why = format!(
                        "there is no GPU {named} on PCI, as far as sysfs shows it ({known} are): no NIC is known to be near it, and all count as near"
                    );
                    (self.usable(|_| true), None, Some(why))
                }
            },
        };
        let count = ports.len();
        if (1..count).contains(&rails) {
            ports.rotate_left((turn % count) * rails % count);
            ports.truncate(rails);
        }
        let devices: Vec<String> = ports.iter().filter_map(|port| self.devices.get(port).cloned()).collect();
        let nearness = nearness.filter(|_| !devices.is_empty());
        Near { devices, nearness, warning }
    }

    fn gpu(&self, named: &str) -> Option<&kvferry_topology::GpuNics> {
        match named.parse::<usize>() {
            Ok(number) => self.affinity.gpus.get(number),
            Err(_) => self.affinity.gpus.iter().find(|gpu| gpu.gpu.eq_ignore_ascii_case(named)),
        }
    }

    /// By PCI address.
    fn usable(&self, is_meant: impl Fn(&Port) -> bool) -> Vec<String> {
        let usable = self.host.ports.iter().filter(|port| port.unusable.is_none() && is_meant(port));
        usable.map(Port::name).collect()
    }
}

/// What a transport calls a port, here and nowhere else: UCX by device and port, libfabric EFA's devices by their domains, and both libfabric's and
/// our own tcp by the network interface.
fn names(kind: TransportKind, port: &Port) -> Vec<String> {
    match (kind, port.make) {
        (TransportKind::Ucx, _) => vec![port.name()],
        (TransportKind::Libfabric, Make::Efa) => DOMAIN_ENDS.map(|end| format!("{}{end}", port.device)).into(),
        (TransportKind::Libfabric | TransportKind::Tcp, _) => port.interfaces.clone(),
        _ => Vec::new(),
    }
}

/// The device of a transport that is this port.
fn device(kind: TransportKind, port: &Port, listed: &[Device]) -> Result<String, Unused> {
    let names = names(kind, port);
    let what = match port.make {
        Make::Efa => "EFA",
        Make::Mlx5 => "mlx5",
        Make::Verbs => "verbs",
    };
    let place = port.pci.as_ref().map_or_else(|| "not on PCI".to_owned(), |pci| format!("PCI {}", pci.address));
    let missing = |why: &str| Err(Unused::Missing(format!("it is on this host ({what}, {place}), but {why}")));
    let is_interface = match kind {
        TransportKind::Tcp => true,
        TransportKind::Libfabric => port.make != Make::Efa,
        TransportKind::Ucx => false,
        _ => return Err(Unused::Other(format!("{kind} moves bytes without NICs"))),
    };
    if names.is_empty() {
        let why =
            "it has no network interface, which is what this transport runs over; --transport ucx takes such ports";
        return match kind {
            TransportKind::Libfabric => {
                missing(&format!("libfabric's transport speaks to EFA and to interfaces: {why}"))
            }
            _ => Err(Unused::Other(why.to_owned())),
        };
    }
    // Whether a process may open its verbs is nothing to an interface.
    if let Some(why) = port.unusable.clone().filter(|_| !is_interface || !port.is_active()) {
        return Err(Unused::Missing(why));
    }
    let found = names.iter().find_map(|name| listed.iter().find(|device| device.name == *name));
    match found {
        Some(Device { name, unavailable: None, .. }) => Ok(name.clone()),
        Some(Device { unavailable: Some(why), .. }) => missing(&format!("{kind} cannot use it: {why}")),
        None => missing(&match listed.iter().find_map(|device| device.unavailable.as_deref()) {
            Some(why) => format!("{kind} lists no device for it: {why}"),
            None => unlisted(kind, port),
        }),
    }
}

/// What to do about a port of which a library that is there says nothing.
fn unlisted(kind: TransportKind, port: &Port) -> String {
    match (kind, port.make) {
        (TransportKind::Libfabric, Make::Efa) => "libfabric lists no domain for it; FI_LOG_LEVEL=info says why: the library has to be one with EFA \
             (KVFERRY_LIBFABRIC_LIBRARY=/opt/amazon/efa/lib/libfabric.so.1), and memory to be lockable (ulimit -l unlimited)"
            .to_owned(),
        (TransportKind::Ucx, _) => "ucx lists no such device; `kvferry doctor` looks for the reason, UCX_LOG_LEVEL=info tells what UCX saw".to_owned(),
        _ => format!(
            "{kind} lists none of its interfaces ({0}): bring it up and give it an address (ip link set {0} up), or name the bond or bridge above it with its own name",
            port.interfaces.join(", ")
        ),
    }
}
