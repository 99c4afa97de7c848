//! Captured hosts, made: the files that the doctor reads, as kernel, drivers and images lay them out.

use std::fs;
use std::path::Path;

use kvferry_topology::simulated::Host;

/// Every capability of current kernels.
pub(crate) const ALL: u64 = 0x1ff_ffff_ffff;

/// A folder with sys, dev, proc and libraries, removed at the end.
pub(crate) struct Tree(Host);

impl Tree {
    /// A host on which nothing was found.
    pub(crate) fn empty(name: &str) -> Tree {
        Tree(Host::empty(name).unwrap())
    }

    /// p5.48xlarge, see [`Host::p5`].
    pub(crate) fn p5(name: &str) -> Tree {
        Tree::worker(Host::p5(name).unwrap())
    }

    /// p4d.24xlarge, see [`Host::p4d`].
    pub(crate) fn p4d(name: &str) -> Tree {
        Tree::worker(Host::p4d(name).unwrap())
    }

    /// A compute tray of GB200, see [`Host::gb200`].
    pub(crate) fn gb200(name: &str) -> Tree {
        Tree::worker(Host::gb200(name).unwrap())
    }

    /// A privileged container of the EFA image, on a host that is set up well.
    fn worker(host: Host) -> Tree {
        let tree = Tree(host);
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
        tree.0.link("opt/amazon/efa/lib/libfabric.so.1", "opt/amazon/efa/lib/libfabric.so.1.30.0").unwrap();
        tree.0.link("usr/local/lib/libucp.so.0", "usr/local/lib/libucp.so.0.0.0").unwrap();
        tree.limits("unlimited");
        tree.capabilities(ALL);
        tree
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Replaces a file, through links.
    pub(crate) fn write(&self, file: &str, text: &str) {
        self.0.write(file, text).unwrap();
    }

    /// Removes a file, a link or a folder.
    pub(crate) fn remove(&self, file: &str) {
        self.0.remove(file).unwrap();
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
        let devices = self.path().join("sys/bus/pci/devices");
        for device in fs::read_dir(devices).unwrap().flatten() {
            let driver = device.path().join("driver");
            if fs::read_link(&driver).is_ok_and(|driver| driver.ends_with("efa")) {
                fs::remove_file(driver).unwrap();
            }
        }
    }

    pub(crate) fn remove_efa_of_numa(&self, numa: u32) {
        let devices = self.path().join("sys/bus/pci/devices");
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
}
