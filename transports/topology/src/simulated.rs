//! Simulated hosts: the files of /sys and /dev that tell of PCI and RDMA, as kernel and drivers lay them out. For tests.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

const GPU: (&str, &str) = ("0x10de", "0x030200");
const NIC_CLASS: &str = "0x020000";

/// A folder with the files of a host, removed at the end.
#[derive(Debug)]
pub struct Host {
    path: PathBuf,
    devices: AtomicU32,
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// A NIC of one port.
#[derive(Clone, Copy, Debug)]
pub struct Nic<'a> {
    /// The RDMA device's name.
    pub name: &'a str,
    /// PCI's number of the vendor, such as `0x1d0f`.
    pub vendor: &'a str,
    /// The vendor's number of the device, such as `0xefa1`.
    pub device: &'a str,
    /// The driver that has it.
    pub driver: &'a str,
    /// Its rate in Gb/s.
    pub gigabits: u32,
}

impl Host {
    /// A host on which nothing is found. The name only tells folders apart.
    pub fn empty(name: &str) -> io::Result<Host> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("kvferry-host-{}-{number}-{name}", std::process::id()));
        fs::create_dir_all(path.join("sys/devices"))?;
        Ok(Host { path: fs::canonicalize(path)?, devices: AtomicU32::new(0) })
    }

    /// p5.48xlarge: two sockets, eight switches, each with four EFA devices of 100 Gb/s and a GPU.
    pub fn p5(name: &str) -> io::Result<Host> {
        Host::switched(name, 4, "0xefa1", 100)
    }

    /// p5en.48xlarge: the same with two devices of 200 Gb/s each.
    pub fn p5en(name: &str) -> io::Result<Host> {
        Host::switched(name, 2, "0xefa2", 200)
    }

    fn switched(name: &str, nics: u32, device: &str, gigabits: u32) -> io::Result<Host> {
        let host = Host::empty(name)?;
        for switch in 0..8u32 {
            let (root, numa) = (0x40 + switch * 0x10, switch / 4);
            let (above, bridge) = (format!("pci0000:{root:02x}"), format!("0000:{root:02x}:01.0"));
            host.pci(&above, &bridge, ("0x1d0f", "0x0200", "0x060400"), Some(numa), None)?;
            let below = format!("{above}/{bridge}");
            for bus in root + 1..=root + nics {
                let nic = Nic { name: &format!("rdmap{bus}s0"), vendor: "0x1d0f", device, driver: "efa", gigabits };
                host.nic(&below, &format!("0000:{bus:02x}:00.0"), nic, Some(numa))?;
            }
            host.gpu(&below, &format!("0000:{:02x}:00.0", root + nics + 1), "0x2330", Some(numa))?;
        }
        Ok(host)
    }

    /// p4d.24xlarge: no switches to be seen, an EFA device and two GPUs on each of four roots.
    pub fn p4d(name: &str) -> io::Result<Host> {
        let host = Host::empty(name)?;
        for (bus, numa) in [(0x10u32, 0), (0x20, 0), (0x90, 1), (0xa0, 1)] {
            let root = format!("pci0000:{bus:02x}");
            let name = format!("rdmap{bus}s27");
            let nic = Nic { name: &name, vendor: "0x1d0f", device: "0xefa0", driver: "efa", gigabits: 100 };
            host.nic(&root, &format!("0000:{bus:02x}:1b.0"), nic, Some(numa))?;
            for slot in ["1c", "1d"] {
                host.gpu(&root, &format!("0000:{bus:02x}:{slot}.0"), "0x20b0", Some(numa))?;
            }
        }
        Ok(host)
    }

    /// A compute tray of GB200 with EFA: two Grace, each with two GPUs and two NICs, every one on a PCI domain of its own.
    pub fn gb200(name: &str) -> io::Result<Host> {
        let host = Host::empty(name)?;
        for (numa, [gpus, nics]) in [(0, [[0x8, 0x9], [0x0, 0x2]]), (1, [[0x18, 0x19], [0x10, 0x12]])] {
            for domain in gpus {
                let above = format!("pci{domain:04x}:00/{domain:04x}:00:00.0");
                host.gpu(&above, &format!("{domain:04x}:01:00.0"), "0x2941", Some(numa))?;
            }
            for domain in nics {
                let above = format!("pci{domain:04x}:00/{domain:04x}:00:00.0");
                // systemd's names carry the domain, if there is one.
                let name = if domain == 0 { "rdmap3s0".to_owned() } else { format!("rdmaP{domain}p3s0") };
                let nic = Nic { name: &name, vendor: "0x1d0f", device: "0xefa4", driver: "efa", gigabits: 400 };
                host.nic(&above, &format!("{domain:04x}:03:00.0"), nic, Some(numa))?;
            }
        }
        Ok(host)
    }

    /// A server with ConnectX: four switches with two GPUs and two NICs of 400 Gb/s each, and a NIC of a storage network on each socket's own
    /// root.
    pub fn mlx5(name: &str) -> io::Result<Host> {
        let host = Host::empty(name)?;
        let (mut number, connectx) = (0, ("0x15b3", "mlx5_core"));
        let mut add = |above: &str, address: &str, device: &str, gigabits: u32, numa: u32| {
            let name = format!("mlx5_{number}");
            number += 1;
            let nic = Nic { name: &name, vendor: connectx.0, device, driver: connectx.1, gigabits };
            host.nic(above, address, nic, Some(numa))
        };
        for socket in 0..2u32 {
            let storage = 0x20 + socket * 0x80;
            add(&format!("pci0000:{storage:02x}"), &format!("0000:{storage:02x}:00.0"), "0x101d", 200, socket)?;
            for switch in 0..2u32 {
                let root = 0x40 + socket * 0x80 + switch * 0x20;
                let (above, bridge) = (format!("pci0000:{root:02x}"), format!("0000:{root:02x}:01.0"));
                host.pci(&above, &bridge, ("0x1000", "0xc030", "0x060400"), Some(socket), None)?;
                let below = format!("{above}/{bridge}");
                for slot in 0..2u32 {
                    let bus = root + 1 + slot * 4;
                    let port = format!("{below}/0000:{:02x}:0{slot}.0", root + 1);
                    add(&port, &format!("0000:{bus:02x}:00.0"), "0x1021", 400, socket)?;
                    host.gpu(&port, &format!("0000:{:02x}:00.0", bus + 2), "0x2330", Some(socket))?;
                }
            }
        }
        Ok(host)
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Replaces a file, through links. A line end is added.
    pub fn write(&self, file: &str, text: &str) -> io::Result<()> {
        let path = self.path.join(file.trim_start_matches('/'));
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(path, format!("{text}\n"))
    }

    /// Removes a file, a link or a folder.
    pub fn remove(&self, file: &str) -> io::Result<()> {
        let path = self.path.join(file);
        let kind = fs::symlink_metadata(&path)?.file_type();
        if kind.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
    }

    /// A link, by a relative path, as sysfs has them.
    pub fn link(&self, from: &str, to: &str) -> io::Result<()> {
        let (from, to) = (self.path.join(from), self.path.join(to));
        let parent = from.parent().unwrap_or(&self.path);
        fs::create_dir_all(parent)?;
        let outside = |_| io::Error::other("a link out of the host");
        let up = parent.strip_prefix(&self.path).map_err(outside)?.components().map(|_| Component::ParentDir);
        let target: PathBuf = up.chain(to.strip_prefix(&self.path).map_err(outside)?.components()).collect();
        symlink(target, from)
    }

    /// A function on PCI, of a vendor, a device and a class, below `above` (a path such as `pci0000:40/0000:40:01.0`).
    pub fn pci(
        &self,
        above: &str,
        address: &str,
        (vendor, device, class): (&str, &str, &str),
        numa: Option<u32>,
        driver: Option<&str>,
    ) -> io::Result<()> {
        let folder = format!("sys/devices/{above}/{address}");
        let numa = numa.map_or("-1".to_owned(), |numa| numa.to_string());
        for (file, text) in [("vendor", vendor), ("device", device), ("class", class), ("numa_node", &numa)] {
            self.write(&format!("{folder}/{file}"), text)?;
        }
        self.link(&format!("sys/bus/pci/devices/{address}"), &folder)?;
        if let Some(driver) = driver {
            fs::create_dir_all(self.path.join(format!("sys/bus/pci/drivers/{driver}")))?;
            self.link(&format!("{folder}/driver"), &format!("sys/bus/pci/drivers/{driver}"))?;
        }
        Ok(())
    }

    /// A GPU with its driver.
    pub fn gpu(&self, above: &str, address: &str, device: &str, numa: Option<u32>) -> io::Result<()> {
        self.pci(above, address, (GPU.0, device, GPU.1), numa, Some("nvidia"))
    }

    /// An RDMA device with its driver, an active port, counters and a node in /dev.
    pub fn nic(&self, above: &str, address: &str, nic: Nic<'_>, numa: Option<u32>) -> io::Result<()> {
        self.pci(above, address, (nic.vendor, nic.device, NIC_CLASS), numa, Some(nic.driver))?;
        let number = self.devices.fetch_add(1, Ordering::Relaxed);
        let pci = format!("sys/devices/{above}/{address}");
        let rdma = format!("{pci}/infiniband/{}", nic.name);
        let rate = format!("{} Gb/sec (4X EDR)", nic.gigabits);
        for (file, text) in [("state", "4: ACTIVE"), ("rate", &rate), ("link_layer", "Unspecified")] {
            self.write(&format!("{rdma}/ports/1/{file}"), text)?;
        }
        for counter in
            ["tx_pkts", "rx_pkts", "retrans_timeout_events", "unresponsive_remote_events", "rdma_write_bytes"]
        {
            self.write(&format!("{rdma}/ports/1/hw_counters/{counter}"), "0")?;
        }
        self.link(&format!("{rdma}/device"), &pci)?;
        self.link(&format!("sys/class/infiniband/{}", nic.name), &rdma)?;
        let verbs = format!("{pci}/infiniband_verbs/uverbs{number}");
        self.write(&format!("{verbs}/ibdev"), nic.name)?;
        self.write(&format!("{verbs}/dev"), &format!("231:{}", 192 + number))?;
        self.link(&format!("sys/class/infiniband_verbs/uverbs{number}"), &verbs)?;
        self.write(&format!("dev/infiniband/uverbs{number}"), "")
    }
}
