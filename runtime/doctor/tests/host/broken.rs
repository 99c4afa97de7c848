//! One thing wrong with the healthy host each.

use kvferry_doctor::{Backend, Question, Role, Status, SysRoot, examine};

use crate::kit::{BUNDLED, page, page_of_gb200, set, wrong};
use crate::tree::{self, Tree};

/// What one case does to the healthy host and the question.
type Break = fn(&Tree, &mut Question);

/// Name, what is broken, which check finds it, how bad it is, and a word of evidence or fix.
const BROKEN: &[(&str, Break, &str, Status, &str)] = &[
    ("no /dev/infiniband", |tree, _| tree.remove("dev/infiniband"), "efa.nodes", Status::Fail, "vpc.amazonaws.com/efa"),
    (
        "fewer devices requested than there are",
        |tree, _| (4..32).for_each(|n| tree.remove(&format!("dev/infiniband/uverbs{n}"))),
        "efa.nodes",
        Status::Fail,
        "28 of 32",
    ),
    ("driver not loaded", |tree, _| tree.unload_efa(), "efa.driver", Status::Fail, "modprobe efa"),
    (
        "a port is down",
        |tree, _| tree.write("sys/class/infiniband/rdmap65s0/ports/1/state", "1: DOWN"),
        "efa.ports",
        Status::Fail,
        "rdmap65s0/ports/1/state = 1: DOWN",
    ),
    (
        "other devices than expected",
        |_, question| question.expect.efa = Some(16),
        "efa.devices",
        Status::Fail,
        "16 expected",
    ),
    (
        "less rate than expected",
        |_, question| question.expect.gbps = Some(6400),
        "efa.rate",
        Status::Fail,
        "3200 Gb/s over all active ports, 6400 expected",
    ),
    (
        "fewer GPUs than expected",
        |_, question| question.expect.gpu = Some(9),
        "gpu.devices",
        Status::Fail,
        "9 expected",
    ),
    (
        "locked memory is limited",
        |tree, _| {
            tree.limits("8388608");
            tree.capabilities(tree::ALL & !(1 << 14));
        },
        "process.memlock",
        Status::Fail,
        "IPC_LOCK",
    ),
    (
        "locked memory is limited in a rootless container, whose IPC_LOCK does not count",
        |tree, _| {
            tree.limits("8388608");
            tree.write("proc/self/uid_map", "         0     100000      65536");
        },
        "process.memlock",
        Status::Fail,
        "user namespace",
    ),
    (
        "no huge pages",
        |tree, _| tree.write("proc/meminfo", "HugePages_Total:       0\nHugePages_Free:        0"),
        "process.hugepages",
        Status::Warn,
        "hugepages-2Mi",
    ),
    (
        "huge pages asked for and not there",
        |tree, question| {
            tree.write("proc/meminfo", "HugePages_Total:     128\nHugePages_Free:        0");
            set(question, "FI_EFA_USE_HUGE_PAGE", "1");
        },
        "process.hugepages",
        Status::Fail,
        "0 of 128",
    ),
    (
        "no GPUDirect",
        |tree, _| tree.remove("sys/module/efa_nv_peermem"),
        "gpu.direct",
        Status::Fail,
        "modprobe efa_nv_peermem",
    ),
    (
        "not privileged",
        |tree, _| tree.capabilities(tree::ALL & !(1 << 21)),
        "process.privileges",
        Status::Warn,
        "privileged: true",
    ),
    (
        "ptrace is restricted",
        |tree, _| {
            tree.write("proc/sys/kernel/yama/ptrace_scope", "1");
            tree.capabilities(tree::ALL & !(1 << 19));
        },
        "process.ptrace",
        Status::Warn,
        "SYS_PTRACE",
    ),
    (
        "a security group drops packets",
        |tree, _| tree.write("sys/class/infiniband/rdmap65s0/ports/1/hw_counters/unresponsive_remote_events", "17"),
        "efa.peers",
        Status::Warn,
        "security group",
    ),
    (
        "nothing comes back",
        |tree, _| tree.write("sys/class/infiniband/rdmap65s0/ports/1/hw_counters/tx_pkts", "1000"),
        "efa.peers",
        Status::Warn,
        "rx_pkts 0",
    ),
    (
        "SHM transfer left on with libfabric",
        |_, question| {
            question.environment.remove("FI_EFA_ENABLE_SHM_TRANSFER");
            question.backend = Backend::Libfabric;
        },
        "variables.shm-transfer",
        Status::Fail,
        "GPU buffers",
    ),
    (
        "SHM transfer on with UCX",
        |_, question| set(question, "FI_EFA_ENABLE_SHM_TRANSFER", "1"),
        "variables.shm-transfer",
        Status::Warn,
        "FI_EFA_ENABLE_SHM_TRANSFER=0",
    ),
    (
        "an older libfabric comes first",
        |tree, question| {
            tree.write("usr/lib/libfabric.so.1", "FABRIC_1.6\0");
            set(question, "LD_LIBRARY_PATH", "/usr/lib:/opt/amazon/efa/lib:/usr/local/lib");
        },
        "library.libfabric",
        Status::Fail,
        "the loader takes /usr/lib/libfabric.so.1",
    ),
    (
        "libfabric without the provider",
        |tree, question| {
            tree.remove("opt/amazon/efa");
            tree.write("usr/lib/libfabric.so.1", "FABRIC_1.8\0tcp_");
            question.backend = Backend::Libfabric;
        },
        "library.libfabric",
        Status::Fail,
        "no efa provider",
    ),
    (
        "no libfabric",
        |tree, question| {
            tree.remove("opt/amazon/efa");
            question.backend = Backend::Libfabric;
        },
        "library.libfabric",
        Status::Fail,
        "mount the host's /opt/amazon/efa",
    ),
    (
        "UCX without EFA",
        |tree, _| tree.remove("usr/local/lib/ucx/libuct_ib_efa.so.0"),
        "library.ucx",
        Status::Fail,
        "no libuct_ib_efa.so in /usr/local/lib/ucx",
    ),
    (
        "UCX without CUDA",
        |tree, _| tree.remove("usr/local/lib/ucx/libuct_cuda.so.0"),
        "library.ucx",
        Status::Fail,
        "built without CUDA",
    ),
    (
        "UCX too old",
        |tree, _| tree.write("usr/local/lib/pkgconfig/ucx.pc", "Version: 1.19.1"),
        "library.ucx",
        Status::Fail,
        "1.20",
    ),
    ("no UCX", |tree, _| tree.remove("usr/local/lib/libucp.so.0"), "library.ucx", Status::Fail, "KVFERRY_UCX_LIBRARY"),
    (
        "no libefa",
        |tree, _| tree.remove("usr/lib/x86_64-linux-gnu/libefa.so.1"),
        "library.verbs",
        Status::Fail,
        "no libefa.so.1",
    ),
    (
        "an efa provider of another rdma-core",
        |tree, _| tree.write("usr/lib/x86_64-linux-gnu/libibverbs.so.1.14.48", "\x7fELF lib%s-rdmav57.so"),
        "library.verbs",
        Status::Fail,
        "libibverbs loads libefa-rdmav57.so",
    ),
    (
        "libibverbs without the efa provider",
        |tree, _| tree.remove("usr/lib/x86_64-linux-gnu/libibverbs"),
        "library.verbs",
        Status::Warn,
        "no libefa-rdmav34.so in /usr/lib/x86_64-linux-gnu/libibverbs",
    ),
    (
        "NCCL kept to sockets",
        |_, question| set(question, "NCCL_NET", "Socket"),
        "library.nccl",
        Status::Warn,
        "NCCL_NET=Socket",
    ),
    (
        "an interface of another host",
        |_, question| {
            question.backend = Backend::Libfabric;
            set(question, "FI_EFA_IFACE", "rdmap65s0,rdmap7s0");
        },
        "variables.interfaces",
        Status::Fail,
        "there is no device rdmap7s0",
    ),
    (
        "NCCL's plugin is not on the path",
        |tree, _| tree.remove("etc/ld.so.conf.d/ofi.conf"),
        "library.nccl",
        Status::Warn,
        "add /opt/amazon/ofi-nccl/lib",
    ),
    (
        "a transport called efa",
        |_, question| set(question, "UCX_TLS", "efa,cuda_copy"),
        "variables.ucx",
        Status::Fail,
        "srd",
    ),
    (
        "EFA left out",
        |_, question| set(question, "UCX_TLS", "tcp,cuda_copy"),
        "variables.ucx",
        Status::Fail,
        "leaves EFA out",
    ),
    ("EFA excluded", |_, question| set(question, "UCX_TLS", "^ib"), "variables.ucx", Status::Fail, "excludes EFA"),
    (
        "a device without its port",
        |_, question| set(question, "UCX_NET_DEVICES", "rdmap65s0"),
        "variables.ucx",
        Status::Fail,
        "rdmap65s0:1",
    ),
    (
        "a device of another host",
        |_, question| set(question, "UCX_NET_DEVICES", "rdmap7s0:1"),
        "variables.ucx",
        Status::Fail,
        "there is no device `rdmap7s0`",
    ),
    (
        "too few components",
        |_, question| set(question, "UCX_MAX_COMPONENT_MDS", "16"),
        "variables.ucx",
        Status::Fail,
        "32 EFA devices",
    ),
    (
        "emulation",
        |_, question| set(question, "UCX_RNDV_THRESH", "8192"),
        "variables.ucx",
        Status::Fail,
        "UCX_RNDV_THRESH=inf",
    ),
    (
        "a variable that aborts",
        |_, question| set(question, "FI_EFA_MTU_SIZE", "4096"),
        "variables.aborting",
        Status::Fail,
        "its presence ends the process",
    ),
    ("no interface", |_, question| set(question, "FI_EFA_IFACE", ""), "variables.aborting", Status::Fail, "`all`"),
    (
        "a variable that nobody reads",
        |_, question| set(question, "FI_EFA_ENABLE_SHM", "0"),
        "variables.unread",
        Status::Warn,
        "FI_EFA_ENABLE_SHM_TRANSFER is",
    ),
    (
        "a variable with another name",
        |_, question| set(question, "UCX_NET_DEVICE", "rdmap65s0:1"),
        "variables.unread",
        Status::Warn,
        "UCX_NET_DEVICES is",
    ),
    (
        "fork safety on a kernel that needs none",
        |_, question| set(question, "FI_EFA_FORK_SAFE", "1"),
        "variables.unread",
        Status::Warn,
        "FI_EFA_FORK_SAFE has no effect on Linux 6.1",
    ),
    (
        "fork safety on a kernel that pays for it",
        |tree, question| {
            tree.write("proc/sys/kernel/osrelease", "5.10.223-212.873.amzn2.x86_64");
            set(question, "FI_EFA_FORK_SAFE", "1");
        },
        "process.hugepages",
        Status::Warn,
        "huge pages off on Linux 5.10",
    ),
    (
        "another provider",
        |_, question| set(question, "FI_PROVIDER", "tcp"),
        "variables.provider",
        Status::Fail,
        "FI_PROVIDER=efa",
    ),
    (
        "no provider named with libfabric",
        |_, question| {
            question.environment.remove("FI_PROVIDER");
            question.backend = Backend::Libfabric;
        },
        "variables.provider",
        Status::Warn,
        "FI_PROVIDER=efa",
    ),
    (
        "RDMA off",
        |_, question| set(question, "FI_EFA_USE_DEVICE_RDMA", "0"),
        "variables.device-rdma",
        Status::Fail,
        "emulated",
    ),
    (
        "RDMA neither on nor off",
        |_, question| set(question, "FI_EFA_USE_DEVICE_RDMA", "yes"),
        "variables.device-rdma",
        Status::Fail,
        "ends the process",
    ),
    (
        "GDRCopy as the page has it",
        |_, question| set(question, "NVIDIA_GDRCOPY", "1"),
        "gpu.gdrcopy",
        Status::Warn,
        "NVIDIA_GDRCOPY=enabled",
    ),
    (
        "plugins of decode on prefill",
        |_, question| {
            question.role = Some(Role::Prefill);
            set(question, "NIXL_PLUGIN_DIR", BUNDLED);
        },
        "nixl.plugins",
        Status::Fail,
        "unset NIXL_PLUGIN_DIR",
    ),
    (
        "system plugins on multinode decode",
        |_, question| {
            question.role = Some(Role::Decode);
            question.multinode = true;
        },
        "nixl.plugins",
        Status::Fail,
        BUNDLED,
    ),
    (
        "bundled plugins on decode of one node",
        |_, question| {
            question.role = Some(Role::Decode);
            set(question, "NIXL_PLUGIN_DIR", BUNDLED);
        },
        "nixl.plugins",
        Status::Warn,
        "--multinode",
    ),
    (
        "a folder without the plugin",
        |_, question| set(question, "NIXL_PLUGIN_DIR", "/usr/lib/nixl"),
        "nixl.plugins",
        Status::Fail,
        "libplugin_UCX.so",
    ),
    (
        "multi-node NVLink without a ComputeDomain",
        |_, question| page_of_gb200(question),
        "fabric.imex",
        Status::Fail,
        "ComputeDomain",
    ),
    (
        "a channel that is expected and that nobody claimed",
        |tree, question| {
            tree.write("proc/devices", "Character devices:\n195 nvidia\n505 nvidia-caps-imex-channels");
            question.expect.imex = Some(1);
            page_of_gb200(question);
        },
        "fabric.imex",
        Status::Fail,
        "no channel was given to this container",
    ),
    (
        "a channel that the driver does not know",
        |tree, question| {
            tree.write("proc/devices", "Character devices:\n195 nvidia");
            question.expect.imex = Some(1);
            page_of_gb200(question);
        },
        "fabric.imex",
        Status::Fail,
        "the driver does not know them",
    ),
    (
        "an IMEX channel that NCCL is not told of",
        |tree, question| {
            tree.write("dev/nvidia-caps-imex-channels/channel0", "");
            set(question, "NCCL_CUMEM_ENABLE", "0");
        },
        "fabric.nccl",
        Status::Warn,
        "NCCL_CUMEM_ENABLE=0",
    ),
    (
        "GPUs without NICs of their socket",
        |tree, _| tree.remove_efa_of_numa(1),
        "gpu.affinity",
        Status::Warn,
        "on another NUMA node",
    ),
];

#[test]
fn one_thing_wrong_is_found_and_nothing_else() {
    let mut failures = Vec::new();
    for (name, broken, id, status, word) in BROKEN {
        let tree = Tree::p5(id);
        let mut question = page();
        broken(&tree, &mut question);
        let report = examine(&SysRoot::captured(tree.path()), &question);
        let found = wrong(&report);
        let check = report.checks.iter().find(|check| check.id == *id).unwrap();
        let said = format!("{} {}", check.evidence.join("\n"), check.fix);
        if found != [(*id, *status)] || !said.contains(word) || check.fix.is_empty() {
            failures.push(format!("{name}: {id} {status:?} with {word:?} expected, found {found:?}: {said}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(BROKEN.len() >= 15);
}
