//! Captured hosts, made: the files that the doctor reads, as kernel, drivers and images lay them out.
#![allow(dead_code, reason = "not every test that uses this module uses all of it")]

use std::fs;
use std::path::Path;

use kvferry_topology::simulated::Host;

/// Every capability of current kernels.
pub(crate) const ALL: u64 = 0x1ff_ffff_ffff;

/// A folder with sys, dev, proc and libraries, removed at the end.
pub(crate) struct Tree(Host);

/// A GPU of GB200 as `nvidia-smi -q` prints it, but for what does not matter here.
fn gb200_smi(address: &str) -> String {
    format!(
        "GPU {address}
    Product Name                          : NVIDIA GB200
    Performance State                     : P0
    Voltage
        Graphics                          : N/A
    Fabric
        State                             : Completed
        Status                            : Success
        CliqueId                          : 32766
        ClusterUUID                       : 5b1c0102-0304-0506-0708-090a0b0c0d0e
        Health
            Summary                       : Healthy
            Bandwidth                     : Full
            Route Recovery in progress    : False
            Route Unhealthy               : False
            Access Timeout Recovery       : False
            Incorrect Configuration       : None
            Partition Assigned            : True
    Processes                             : None

"
    )
}

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

    /// A compute tray of GB200, see [`Host::gb200`], in the clique of a domain, with the channel that a ComputeDomain gives.
    pub(crate) fn gb200(name: &str) -> Tree {
        let tree = Tree::worker(Host::gb200(name).unwrap());
        tree.write(
            "proc/driver/nvidia/version",
            "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  570.124.06",
        );
        tree.write("proc/driver/nvidia/params", "EnableMSI: 1\nImexChannelCount: 2048\nCreateImexChannel0: 0");
        tree.write("proc/devices", "Character devices:\n195 nvidia\n505 nvidia-caps-imex-channels");
        tree.write("dev/nvidia-caps-imex-channels/channel0", "");
        tree.write("opt/amazon/efa/lib/libfabric.so.1.30.0", "\x7fELF FABRIC_1.9\0efa_rdm_ep_ctrl\0");
        tree.smi(
            &["00000008:01:00.0", "00000009:01:00.0", "00000018:01:00.0", "00000019:01:00.0"].map(gb200_smi).concat(),
        );
        tree
    }

    /// What `nvidia-smi -q` prints, of these GPUs.
    pub(crate) fn smi(&self, gpus: &str) {
        let heading =
            "\n==============NVSMI LOG==============\n\nDriver Version                            : 570.124.06\n\n";
        self.write("nvidia-smi-q.txt", &format!("{heading}{gpus}"));
    }

    /// Replaces words in what `nvidia-smi -q` printed, `times` times.
    pub(crate) fn smi_says(&self, from: &str, to: &str, times: usize) {
        let text = fs::read_to_string(self.path().join("nvidia-smi-q.txt")).unwrap();
        assert!(text.matches(from).count() >= times, "{from}");
        self.write("nvidia-smi-q.txt", &text.replacen(from, to, times));
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
            ("usr/lib/x86_64-linux-gnu/libibverbs.so.1.14.48", "\x7fELF lib%s-rdmav34.so"),
            ("usr/lib/x86_64-linux-gnu/libibverbs/libefa-rdmav34.so", "\x7fELF"),
            ("usr/lib/x86_64-linux-gnu/libefa.so.1", "\x7fELF"),
            ("proc/self/uid_map", "         0          0 4294967295"),
            ("usr/local/lib/libucp.so.0.0.0", "\x7fELF"),
            ("usr/local/lib/ucx/libuct_ib_efa.so.0", "\x7fELF"),
            ("usr/local/lib/ucx/libuct_cuda.so.0", "\x7fELF"),
            ("usr/local/lib/pkgconfig/ucx.pc", "Name: ucx\nVersion: 1.20.0"),
        ] {
            tree.write(file, text);
        }
        tree.0.link("opt/amazon/efa/lib/libfabric.so.1", "opt/amazon/efa/lib/libfabric.so.1.30.0").unwrap();
        let verbs = "usr/lib/x86_64-linux-gnu/libibverbs.so.1";
        tree.0.link(verbs, "usr/lib/x86_64-linux-gnu/libibverbs.so.1.14.48").unwrap();
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
