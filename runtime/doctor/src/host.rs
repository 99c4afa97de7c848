//! What Linux shows of a host, read once.

use std::collections::BTreeMap;

use kvferry_topology::{Pci, Topology};

use crate::question::SMI_FILE;
use crate::root::{DeviceNode, SysRoot, names, text};

/// An EFA device with its driver.
#[derive(Clone, Debug)]
pub(crate) struct Efa {
    pub(crate) name: String,
    pub(crate) pci: Pci,
    /// Such as `4: ACTIVE`.
    pub(crate) state: String,
    pub(crate) rate: String,
    /// Its `uverbsN`.
    pub(crate) verbs: Option<String>,
    pub(crate) node: DeviceNode,
    pub(crate) counters: BTreeMap<String, u64>,
}

/// What was read.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    pub(crate) topology: Topology,
    pub(crate) efa: Vec<Efa>,
    /// All RDMA devices, of whatever make.
    pub(crate) rdma: Vec<String>,
    pub(crate) efa_module: bool,
    /// The modules by which RDMA devices reach GPU memory.
    pub(crate) peer_memory: Vec<&'static str>,
    pub(crate) kernel: String,
    /// Bytes, `None` for unlimited.
    pub(crate) memlock: Option<Option<u64>>,
    pub(crate) capabilities: Option<u64>,
    /// The mode of the process's seccomp filter: 0 is none.
    /// Whether its capabilities are those of a user namespace, as in rootless containers: the host's drivers do not heed them.
    pub(crate) rootless: bool,
    pub(crate) seccomp: Option<u32>,
    pub(crate) hugepages: Option<(u64, u64)>,
    pub(crate) nvidia_driver: Option<String>,
    pub(crate) ptrace_scope: Option<u32>,
    pub(crate) imex_channels: Vec<(String, DeviceNode)>,
    /// Whether the kernel knows the device of IMEX channels; `None` where it does not say.
    pub(crate) imex_driver: Option<bool>,
    /// How many channels the driver was loaded for, where it says.
    pub(crate) imex_count: Option<u32>,
    /// The daemon that brings handles from host to host.
    pub(crate) imex_daemon: ImexDaemon,
    /// What `nvidia-smi -q` printed on a captured host.
    pub(crate) smi: Option<String>,
    pub(crate) gdr_node: DeviceNode,
    /// Loaded libraries by their name up to `.so`, with the files; of another process only.
    pub(crate) loaded: BTreeMap<String, Vec<String>>,
}

/// `nvidia-imex`, as far as it is seen from here.
#[derive(Clone, Debug, Default)]
pub(crate) struct ImexDaemon {
    pub(crate) running: bool,
    /// The file that lists the nodes, as the configuration names it, and its entries; `None` where there is no configuration.
    pub(crate) nodes: Option<(String, Vec<String>)>,
}

impl ImexDaemon {
    fn read(root: &SysRoot) -> ImexDaemon {
        let processes =
            names(&root.file("/proc")).into_iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
        let running = processes
            .filter_map(|process| text(&root.file(&format!("/proc/{process}/comm"))))
            .any(|name| name == "nvidia-imex");
        let nodes = text(&root.file("/etc/nvidia-imex/config.cfg")).map(|configuration| {
            let named = configuration.lines().find_map(|line| line.trim().strip_prefix("IMEX_NODE_CONFIG_FILE="));
            let file = named.map_or("/etc/nvidia-imex/nodes_config.cfg", str::trim).to_owned();
            let entries = text(&root.file(&file)).unwrap_or_default();
            let entries = entries.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
            (file, entries.map(str::to_owned).collect())
        });
        ImexDaemon { running, nodes }
    }
}

/// PCI devices of GB200 and GB300.
const RACK_GPUS: [u32; 2] = [0x2941, 0x31c2];
const PEER_MEMORY: [(&str, &str); 4] = [
    ("module/efa_nv_peermem/version", "efa_nv_peermem"),
    ("kernel/mm/memory_peers/nv_mem/version", "nv_mem"),
    ("module/nvidia_peermem/version", "nvidia_peermem"),
    ("module/nv_peer_mem/version", "nv_peer_mem"),
];
const WATCHED: [&str; 7] = ["libibverbs", "libefa", "libucp", "libucs", "libuct", "libfabric", "libnixl"];

impl Host {
    pub(crate) fn read(root: &SysRoot) -> Host {
        let topology = Topology::read(&root.files);
        let rdma = names(&root.file("/sys/class/infiniband"));
        let verbs = verbs(root);
        let efa = rdma.iter().filter_map(|name| efa_device(root, name, &topology.pci, &verbs)).collect();
        let memory = text(&root.file("/proc/meminfo")).unwrap_or_default();
        let pages = |name: &str| field(&memory, name).and_then(|value| value.split_whitespace().next()?.parse().ok());
        let status = text(&root.own("status")).unwrap_or_default();
        let channels = names(&root.file("/dev/nvidia-caps-imex-channels"));
        let channels = channels.into_iter().filter(|name| name.starts_with("channel"));
        Host {
            efa,
            rdma,
            efa_module: root.file("/sys/module/efa").exists(),
            peer_memory: PEER_MEMORY
                .iter()
                .filter(|(file, _)| root.file(&format!("/sys/{file}")).exists())
                .map(|(_, name)| *name)
                .collect(),
            kernel: text(&root.file("/proc/sys/kernel/osrelease")).unwrap_or_default(),
            memlock: text(&root.own("limits")).and_then(|limits| memlock(&limits)),
            capabilities: field(&status, "CapEff").and_then(|hex| u64::from_str_radix(hex, 16).ok()),
            rootless: text(&root.own("uid_map")).is_some_and(|map| !map.is_empty() && !maps_all(&map)),
            seccomp: field(&status, "Seccomp").and_then(|mode| mode.parse().ok()),
            hugepages: pages("HugePages_Total").zip(pages("HugePages_Free")),
            nvidia_driver: text(&root.file("/proc/driver/nvidia/version")),
            ptrace_scope: text(&root.file("/proc/sys/kernel/yama/ptrace_scope")).and_then(|text| text.parse().ok()),
            imex_channels: channels
                .map(|name| {
                    let node = root.device_node(&format!("nvidia-caps-imex-channels/{name}"));
                    (name, node)
                })
                .collect(),
            imex_driver: text(&root.file("/proc/devices"))
                .map(|devices| devices.lines().any(|line| line.trim_end().ends_with(" nvidia-caps-imex-channels"))),
            imex_count: text(&root.file("/proc/driver/nvidia/params"))
                .and_then(|params| field(&params, "ImexChannelCount")?.parse().ok()),
            imex_daemon: ImexDaemon::read(root),
            smi: if root.captured { text(&root.file(SMI_FILE)) } else { None },
            gdr_node: root.device_node("gdrdrv"),
            loaded: if root.process == "self" { BTreeMap::new() } else { loaded(root) },
            topology,
        }
    }

    pub(crate) fn gpus(&self) -> impl Iterator<Item = &Pci> {
        self.topology.gpus()
    }

    /// Whether its GPUs are made for NVLink between hosts.
    pub(crate) fn is_of_a_rack(&self) -> bool {
        self.gpus().any(|gpu| RACK_GPUS.contains(&gpu.device))
    }

    pub(crate) fn efa_on_pci(&self) -> impl Iterator<Item = &Pci> {
        self.topology.efa_on_pci()
    }

    /// Whether the process has a capability, by its bit.
    pub(crate) fn can(&self, bit: u32) -> bool {
        self.capabilities.is_some_and(|bits| bits >> bit & 1 == 1)
    }
}

/// `name:   value` of /proc's tables.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// `0 0 4294967295`: every user is who it is.
fn maps_all(uid_map: &str) -> bool {
    uid_map.split_whitespace().eq(["0", "0", "4294967295"])
}

fn memlock(limits: &str) -> Option<Option<u64>> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(None),
        bytes => bytes.parse().ok().map(Some),
    }
}

/// Device name to `uverbsN`.
fn verbs(root: &SysRoot) -> BTreeMap<String, String> {
    let folder = root.file("/sys/class/infiniband_verbs");
    let of = |name: String| Some((text(&root.inside(&folder.join(&name).join("ibdev")))?, name));
    names(&folder).into_iter().filter(|name| name.starts_with("uverbs")).filter_map(of).collect()
}

fn efa_device(root: &SysRoot, name: &str, pci: &[Pci], verbs: &BTreeMap<String, String>) -> Option<Efa> {
    let folder = root.file("/sys/class/infiniband").join(name);
    let device = root.real(&folder.join("device"))?;
    let address = device.file_name()?.to_string_lossy().into_owned();
    let pci = pci.iter().find(|pci| pci.address == address && pci.is_efa())?.clone();
    let port = root.inside(&folder.join("ports/1"));
    let counters = port.join("hw_counters");
    let read = |name: String| Some((text(&counters.join(&name))?.parse().ok()?, name));
    let verbs = verbs.get(name).cloned();
    Some(Efa {
        name: name.to_owned(),
        pci,
        state: text(&port.join("state")).unwrap_or_default(),
        rate: text(&port.join("rate")).unwrap_or_default(),
        node: verbs.as_ref().map_or(DeviceNode::Missing, |verbs| root.device_node(&format!("infiniband/{verbs}"))),
        verbs,
        counters: names(&counters).into_iter().filter_map(read).map(|(value, name)| (name, value)).collect(),
    })
}

fn loaded(root: &SysRoot) -> BTreeMap<String, Vec<String>> {
    let mut loaded: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in text(&root.own("maps")).unwrap_or_default().lines() {
        let Some(path) = line.split_whitespace().nth(5).filter(|path| path.starts_with('/')) else { continue };
        let file = path.rsplit('/').next().unwrap_or_default();
        let stem = file.split(".so").next().unwrap_or_default();
        // Wheels rename libraries to lib<name>-<hash>.so.
        let base = stem.split('-').next().unwrap_or_default();
        if file.contains(".so") && WATCHED.contains(&base) {
            let files = loaded.entry(base.to_owned()).or_default();
            if !files.iter().any(|known| known == path) {
                files.push(path.to_owned());
            }
        }
    }
    loaded
}
