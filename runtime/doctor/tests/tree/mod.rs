//! Captured hosts, made: the files that the doctor reads, as kernel, drivers and images lay them out.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Every capability of current kernels.
pub(crate) const ALL: u64 = 0x1ff_ffff_ffff;

/// A folder with sys, dev, proc and libraries, removed at the end.
pub(crate) struct Tree {
    path: PathBuf,
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

impl Tree {
    /// A host on which nothing was found.
    pub(crate) fn empty(name: &str) -> Tree {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("kvferry-doctor-{}-{number}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Tree { path: fs::canonicalize(path).unwrap() }
    }

    /// p5.48xlarge: two sockets, eight switches, each with four EFA devices of 100 Gb/s and a GPU.
    pub(crate) fn p5(name: &str) -> Tree {
        let tree = Tree::worker(name);
        let mut number = 0;
        for switch in 0..8u32 {
            let (root, numa) = (0x40 + switch * 0x10, switch / 4);
            let bridge = format!("pci0000:{root:02x}/0000:{root:02x}:01.0");
            tree.pci(
                &format!("pci0000:{root:02x}"),
                &format!("0000:{root:02x}:01.0"),
                "0x1d0f",
                "0x0200",
                "0x060400",
                numa,
                None,
            );
            for bus in root + 1..root + 5 {
                tree.efa(&bridge, &format!("0000:{bus:02x}:00.0"), &format!("rdmap{bus}s0"), "0xefa1", numa, number);
                number += 1;
            }
            tree.pci(
                &bridge,
                &format!("0000:{:02x}:00.0", root + 5),
                "0x10de",
                "0x2330",
                "0x030200",
                numa,
                Some("nvidia"),
            );
        }
        tree
    }

    /// p4d.24xlarge: no switches to be seen, an EFA device and two GPUs on each of four roots.
    pub(crate) fn p4d(name: &str) -> Tree {
        let tree = Tree::worker(name);
        for (number, (bus, numa)) in [(0x10u32, 0), (0x20, 0), (0x90, 1), (0xa0, 1)].into_iter().enumerate() {
            let root = format!("pci0000:{bus:02x}");
            tree.efa(&root, &format!("0000:{bus:02x}:1b.0"), &format!("rdmap{bus}s27"), "0xefa0", numa, number as u32);
            for slot in ["1c", "1d"] {
                tree.pci(
                    &root,
                    &format!("0000:{bus:02x}:{slot}.0"),
                    "0x10de",
                    "0x20b0",
                    "0x030200",
                    numa,
                    Some("nvidia"),
                );
            }
        }
        tree
    }

    /// A privileged container of the EFA image, on a host that is set up well.
    fn worker(name: &str) -> Tree {
        let tree = Tree::empty(name);
        for (file, text) in [
            ("sys/module/efa/version", "2.13.0g"),
            ("sys/module/efa_nv_peermem/version", "1.1.0"),
            ("proc/meminfo", "MemTotal:       2097152000 kB\nHugePages_Total:    5128\nHugePages_Free:     5120"),
            ("proc/sys/kernel/osrelease", "6.1.112-122.189.amzn2023.x86_64"),
            ("proc/sys/kernel/yama/ptrace_scope", "0"),
            ("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.172.08"),
            ("dev/gdrdrv", ""),
            ("opt/amazon/efa/lib/libfabric.so.1.30.0", "\x7fELF FABRIC_1.0\0FABRIC_1.7\0FABRIC_1.8\0efa_rdm_ep_ctrl\0"),
            ("opt/amazon/ofi-nccl/lib/libnccl-net.so", "\x7fELF"),
            ("etc/ld.so.conf", "include /etc/ld.so.conf.d/*.conf"),
            ("etc/ld.so.conf.d/ofi.conf", "# NCCL\n/opt/amazon/ofi-nccl/lib"),
            ("usr/local/lib/libucp.so.0.0.0", "\x7fELF"),
            ("usr/local/lib/ucx/libuct_ib_efa.so.0", "\x7fELF"),
            ("usr/local/lib/pkgconfig/ucx.pc", "Name: ucx\nVersion: 1.20.0"),
        ] {
            tree.write(file, text);
        }
        tree.link("opt/amazon/efa/lib/libfabric.so.1", "opt/amazon/efa/lib/libfabric.so.1.30.0");
        tree.link("usr/local/lib/libucp.so.0", "usr/local/lib/libucp.so.0.0.0");
        tree.limits("unlimited");
        tree.capabilities(ALL);
        tree
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Replaces a file, through links.
    pub(crate) fn write(&self, file: &str, text: &str) {
        let path = self.path.join(file.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
    }

    /// Removes a file, a link or a folder.
    pub(crate) fn remove(&self, file: &str) {
        let path = self.path.join(file);
        let kind = fs::symlink_metadata(&path).unwrap().file_type();
        if kind.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
    }

    pub(crate) fn limits(&self, memlock: &str) {
        let text = format!(
            "Limit                     Soft Limit           Hard Limit           Units     \n\
             Max locked memory         {memlock:<20} {memlock:<20} bytes     \n\
             Max open files            1048576              1048576              files     "
        );
        self.write("proc/self/limits", &text);
    }

    pub(crate) fn capabilities(&self, bits: u64) {
        self.write("proc/self/status", &format!("Name:\tpython3\nCapEff:\t{bits:016x}\nSeccomp:\t0"));
    }

    /// The devices stay on PCI; nothing drives them.
    pub(crate) fn unload_efa(&self) {
        self.remove("sys/module/efa");
        self.remove("sys/class/infiniband");
        self.remove("sys/class/infiniband_verbs");
        let devices = self.path.join("sys/bus/pci/devices");
        for device in fs::read_dir(devices).unwrap().flatten() {
            let driver = device.path().join("driver");
            if fs::read_link(&driver).is_ok_and(|driver| driver.ends_with("efa")) {
                fs::remove_file(driver).unwrap();
            }
        }
    }

    pub(crate) fn remove_efa_of_numa(&self, numa: u32) {
        let devices = self.path.join("sys/bus/pci/devices");
        for device in fs::read_dir(devices).unwrap().flatten() {
            let read = |name: &str| fs::read_to_string(device.path().join(name)).unwrap().trim().to_owned();
            if read("device").starts_with("0xefa") && read("numa_node") == numa.to_string() {
                for entry in fs::read_dir(device.path().join("infiniband")).unwrap().flatten() {
                    self.remove(&format!("sys/class/infiniband/{}", entry.file_name().to_str().unwrap()));
                }
                fs::remove_file(device.path()).unwrap();
            }
        }
    }

    fn link(&self, from: &str, to: &str) {
        let (from, to) = (self.path.join(from), self.path.join(to));
        let parent = from.parent().unwrap();
        fs::create_dir_all(parent).unwrap();
        let up = parent.strip_prefix(&self.path).unwrap().components().map(|_| Component::ParentDir);
        let target: PathBuf = up.chain(to.strip_prefix(&self.path).unwrap().components()).collect();
        symlink(target, from).unwrap();
    }

    #[allow(clippy::too_many_arguments, reason = "a device is that much")]
    fn pci(
        &self,
        parent: &str,
        address: &str,
        vendor: &str,
        device: &str,
        class: &str,
        numa: u32,
        driver: Option<&str>,
    ) {
        let folder = format!("sys/devices/{parent}/{address}");
        for (file, text) in [("vendor", vendor), ("device", device), ("class", class), ("numa_node", &numa.to_string())]
        {
            self.write(&format!("{folder}/{file}"), text);
        }
        self.link(&format!("sys/bus/pci/devices/{address}"), &folder);
        if let Some(driver) = driver {
            fs::create_dir_all(self.path.join(format!("sys/bus/pci/drivers/{driver}"))).unwrap();
            self.link(&format!("{folder}/driver"), &format!("sys/bus/pci/drivers/{driver}"));
        }
    }

    fn efa(&self, parent: &str, address: &str, name: &str, device: &str, numa: u32, number: u32) {
        self.pci(parent, address, "0x1d0f", device, "0x020000", numa, Some("efa"));
        let pci = format!("sys/devices/{parent}/{address}");
        let rdma = format!("{pci}/infiniband/{name}");
        for (file, text) in [("state", "4: ACTIVE"), ("rate", "100 Gb/sec (4X EDR)"), ("link_layer", "Unspecified")] {
            self.write(&format!("{rdma}/ports/1/{file}"), text);
        }
        for counter in
            ["tx_pkts", "rx_pkts", "retrans_timeout_events", "unresponsive_remote_events", "rdma_write_bytes"]
        {
            self.write(&format!("{rdma}/ports/1/hw_counters/{counter}"), "0");
        }
        self.link(&format!("{rdma}/device"), &pci);
        self.link(&format!("sys/class/infiniband/{name}"), &rdma);
        let verbs = format!("{pci}/infiniband_verbs/uverbs{number}");
        self.write(&format!("{verbs}/ibdev"), name);
        self.write(&format!("{verbs}/dev"), &format!("231:{}", 192 + number));
        self.link(&format!("sys/class/infiniband_verbs/uverbs{number}"), &verbs);
        self.write(&format!("dev/infiniband/uverbs{number}"), "");
    }
}
