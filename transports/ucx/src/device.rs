//! What UCX could run on here: EFA and InfiniBand ports, this host's memory, network interfaces. All of it from sysfs.

use std::path::{Path, PathBuf};

use kvferry_topology::{Make, Topology};

use crate::library::Version;

/// The device of this host's memory.
pub(crate) const MEMORY: &str = "memory";
/// Added to a method's number where both sides move the bytes.
const TWO_SIDED: u8 = 16;
/// The first UCX whose srd reads and writes memory.
const SRD_SINCE: Version = Version(1, 20, 0);

/// How UCX crosses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    /// Shared memory of this host; its loopback interface carries what memory cannot.
    Memory,
    /// TCP over one interface.
    Tcp,
    /// EFA's scalable reliable datagrams.
    Srd,
    /// InfiniBand or RoCE, reliably connected.
    Verbs,
}

impl Method {
    /// UCX's names of the transports that it may use.
    pub(crate) fn transports(self) -> &'static str {
        match self {
            Method::Memory => "sm,tcp",
            Method::Tcp => "tcp",
            Method::Srd => "srd",
            Method::Verbs => "rc,ud",
        }
    }

    /// Its number in addresses.
    pub(crate) fn number(self, access: Access) -> u8 {
        let number = match self {
            Method::Memory => 1,
            Method::Tcp => 2,
            Method::Srd => 3,
            Method::Verbs => 4,
        };
        match access {
            Access::OneSided => number,
            Access::TwoSided => number + TWO_SIDED,
        }
    }

    /// Whether an address' number is this method's, with the other access.
    pub(crate) fn differs_in_access(self, access: Access, number: u8) -> bool {
        number != self.number(access) && number % TWO_SIDED == self.number(Access::OneSided)
    }

    /// Whether a device of its own moves the bytes.
    pub(crate) fn is_rdma(self) -> bool {
        matches!(self, Method::Srd | Method::Verbs)
    }

    /// Whether a descriptor announces its progress.
    pub(crate) fn wakes(self) -> bool {
        self != Method::Srd
    }

    /// Whether pools are registered, so that peers may read them.
    pub(crate) fn registers(self, access: Access) -> bool {
        self != Method::Tcp && access == Access::OneSided
    }
}

/// Whether a context's bytes are moved by one side or by both. The two cannot speak to each other: they are configured differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// The destination reads the source's memory, where lanes can.
    OneSided,
    /// The source sends active messages by rendezvous; there are no remote keys. TensorRT-LLM's `backend: UCX`.
    TwoSided,
}

/// A device that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Its name for people and in `--devices`.
    pub(crate) name: String,
    pub(crate) method: Method,
    /// Its name for UCX's `NET_DEVICES`.
    pub(crate) network: String,
    pub(crate) bits_per_second: Option<u64>,
    /// Why it cannot be used, if it cannot.
    pub(crate) unavailable: Option<String>,
}

/// Where this host's devices are described; another root in tests.
#[derive(Clone, Debug)]
pub(crate) struct SysRoot(pub(crate) PathBuf);

impl Default for SysRoot {
    fn default() -> Self {
        SysRoot(PathBuf::from("/"))
    }
}

/// The device that a name means, if it can mean one, where sysfs does not show it: a container's may be bare, and UCX may know devices of
/// its own. EFA's names are those that the kernel and rdma-core give.
pub(crate) fn meant(name: &str) -> Option<Found> {
    let plain = |word: &str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b));
    let (method, network) = match name.split_once(':') {
        Some((device, port)) if plain(device) && port.parse::<u8>().is_ok() => {
            let efa = ["rdmap", "efa_"].iter().any(|prefix| device.starts_with(prefix));
            (if efa { Method::Srd } else { Method::Verbs }, name)
        }
        None if name == MEMORY => (Method::Memory, "lo"),
        None if plain(name) => (Method::Tcp, name),
        _ => return None,
    };
    Some(Found { name: name.to_owned(), method, network: network.to_owned(), bits_per_second: None, unavailable: None })
}

/// Why this version cannot use a device that it would take all the same.
pub(crate) fn too_old(method: Method, version: Version) -> Option<String> {
    (method == Method::Srd && version < SRD_SINCE)
        .then(|| format!("UCX {version} has no usable srd; {SRD_SINCE} or later, built with EFA, is needed"))
}

impl SysRoot {
    /// All devices, the best first: EFA, InfiniBand, memory, interfaces with loopback last.
    pub(crate) fn discover(&self, version: Option<Version>) -> Vec<Found> {
        let mut found = self.ports(version);
        found.sort_by_key(|port| port.method.number(Access::OneSided));
        let interfaces = self.interfaces();
        if let Some(loopback) = interfaces.iter().find(|interface| interface.network == "lo") {
            found.push(Found { name: MEMORY.to_owned(), method: Method::Memory, ..loopback.clone() });
        }
        found.extend(interfaces);
        found
    }

    /// Ports of the RDMA devices.
    fn ports(&self, version: Option<Version>) -> Vec<Found> {
        let found = Topology::read(&self.0).ports.into_iter().map(|port| {
            let method = if port.make == Make::Efa { Method::Srd } else { Method::Verbs };
            let old = version.and_then(|version| too_old(method, version));
            let name = port.name();
            Found {
                network: name.clone(),
                name,
                method,
                bits_per_second: port.bits_per_second,
                unavailable: port.unusable.or(old),
            }
        });
        found.collect()
    }

    /// Network interfaces that are up, loopback last. An RDMA device's own interface is there, too.
    fn interfaces(&self) -> Vec<Found> {
        let class = self.0.join("sys/class/net");
        let mut found: Vec<Found> = Vec::new();
        for name in names(&class) {
            let flags = read(&class.join(&name).join("flags")).as_deref().and_then(hexadecimal).unwrap_or(0);
            if flags & libc::IFF_UP.cast_unsigned() == 0 {
                continue;
            }
            let megabits = read(&class.join(&name).join("speed")).and_then(|speed| speed.parse::<u64>().ok());
            found.push(Found {
                network: name.clone(),
                name,
                method: Method::Tcp,
                bits_per_second: megabits.map(|megabits| megabits.saturating_mul(1_000_000)),
                unavailable: None,
            });
        }
        found.sort_by_key(|interface| interface.name == "lo");
        found
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn read(file: &Path) -> Option<String> {
    std::fs::read_to_string(file).ok().map(|text| text.trim().to_owned())
}

fn hexadecimal(text: &str) -> Option<u32> {
    u32::from_str_radix(text.trim_start_matches("0x"), 16).ok()
}

#[cfg(test)]
mod tests {
    use kvferry_topology::simulated::{Host, Nic};

    use super::*;

    /// A host with loopback, an interface that is up and one that is down.
    fn host(name: &str) -> Host {
        let host = Host::empty(name).unwrap();
        let files = [("lo/flags", "0x9"), ("eth0/flags", "0x1003"), ("eth0/speed", "25000"), ("eth1/flags", "0x1002")];
        for (file, text) in files {
            host.write(&format!("sys/class/net/{file}"), text).unwrap();
        }
        host
    }

    fn efa(host: &Host, device: &str) {
        let nic = Nic { name: "rdmap40s0", vendor: "0x1d0f", device, driver: "efa", gigabits: 100 };
        host.nic("pci0000:20", "0000:28:00.0", nic, Some(0)).unwrap();
    }

    fn discover(host: &Host, version: Version) -> Vec<Found> {
        SysRoot(host.path().to_owned()).discover(Some(version))
    }

    fn named<'a>(found: &'a [Found], name: &str) -> &'a Found {
        found.iter().find(|found| found.name == name).unwrap()
    }

    #[test]
    fn a_host_without_rdma_has_memory_and_interfaces() {
        let found = discover(&host("plain"), Version(1, 22, 0));
        let names: Vec<&str> = found.iter().map(|found| found.name.as_str()).collect();
        assert_eq!(names, ["memory", "eth0", "lo"], "what is down is not there");
        assert_eq!(named(&found, "memory").network, "lo");
        assert_eq!(named(&found, "eth0").bits_per_second, Some(25_000_000_000));
    }

    #[test]
    fn efa_is_told_from_other_devices_and_comes_first() {
        let host = host("efa");
        let other = Nic { name: "mlx5_0", vendor: "0x15b3", device: "0x101e", driver: "mlx5_core", gigabits: 100 };
        host.nic("pci0000:10", "0000:18:00.0", other, Some(0)).unwrap();
        efa(&host, "0xefa4");
        let found = discover(&host, Version(1, 20, 0));
        let names: Vec<&str> = found.iter().map(|found| found.name.as_str()).collect();
        assert_eq!(names, ["rdmap40s0:1", "mlx5_0:1", "memory", "eth0", "lo"]);
        let efa = named(&found, "rdmap40s0:1");
        assert_eq!((efa.method, efa.bits_per_second, &efa.unavailable), (Method::Srd, Some(100_000_000_000), &None));
        assert_eq!(named(&found, "mlx5_0:1").method, Method::Verbs);
    }

    #[test]
    fn names_tell_the_method() {
        let method = |name| meant(name).map(|found| found.method);
        assert_eq!(method("rdmap0s6:1"), Some(Method::Srd));
        assert_eq!(method("efa_0:1"), Some(Method::Srd));
        assert_eq!(method("mlx5_0:1"), Some(Method::Verbs));
        assert_eq!((method("eth0.7"), method("memory")), (Some(Method::Tcp), Some(Method::Memory)));
        for name in ["mlx5_0:", ":1", "mlx5_0:x", "mlx5_0:1000", "mlx5_0:1,lo", "a b:1", "a b", ""] {
            assert_eq!(method(name), None, "{name}");
        }
    }

    #[test]
    fn a_device_that_cannot_be_opened_says_why() {
        let host = host("absent");
        efa(&host, "0xefa1");
        host.remove("dev/infiniband/uverbs0").unwrap();
        let why = |version| named(&discover(&host, version), "rdmap40s0:1").unavailable.clone().unwrap();
        assert!(why(Version(1, 22, 0)).contains("/dev/infiniband/uverbs0"), "{}", why(Version(1, 22, 0)));
        host.write("dev/infiniband/uverbs0", "").unwrap();
        assert!(why(Version(1, 13, 1)).contains("1.20.0"), "{}", why(Version(1, 13, 1)));
        host.write("sys/class/infiniband/rdmap40s0/ports/1/state", "1: DOWN").unwrap();
        assert!(why(Version(1, 22, 0)).contains("DOWN"), "{}", why(Version(1, 22, 0)));
    }
}
