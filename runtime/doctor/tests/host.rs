//! A healthy p5 (32 EFA devices, 8 GPUs) and hosts with one thing wrong each: exactly that is found. The environment is the one that NVIDIA
//! Dynamo's page "KV Cache Transfer" requires of EFA workers.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code")]

mod tree;

use std::fs;

use kvferry_doctor::{Backend, Question, Report, Role, Status, SysRoot, examine};
use tree::Tree;

fn page() -> Question {
    let variables = [
        ("FI_PROVIDER", "efa"),
        ("FI_EFA_USE_DEVICE_RDMA", "1"),
        ("FI_EFA_ENABLE_SHM_TRANSFER", "0"),
        ("LD_LIBRARY_PATH", "/opt/amazon/efa/lib:/usr/local/lib:/usr/lib"),
    ];
    let environment = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    Question { environment, ..Question::default() }
}

fn wrong(report: &Report) -> Vec<(&'static str, Status)> {
    report.checks.iter().filter(|check| check.status != Status::Ok).map(|check| (check.id, check.status)).collect()
}

/// What one case does to the healthy host and the question.
type Break = fn(&Tree, &mut Question);

fn set(question: &mut Question, name: &str, value: &str) {
    question.environment.insert(name.to_owned(), value.to_owned());
}

fn page_of_gb200(question: &mut Question) {
    for name in ["NCCL_MNNVL_ENABLE", "NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"] {
        set(question, name, "1");
    }
}

const BUNDLED: &str = "/opt/dynamo/venv/lib/python3.12/site-packages/tensorrt_llm/libs/nixl/plugins";

#[test]
fn a_healthy_p5_has_nothing_wrong() {
    let tree = Tree::p5("healthy");
    for backend in [Backend::Ucx, Backend::Libfabric] {
        let mut question = Question { backend, ..page() };
        question.expect = "efa=32,gpu=8,imex=0,gbps=3200".parse().unwrap();
        let report = examine(&SysRoot::captured(tree.path()), &question);
        assert_eq!(wrong(&report), [], "{report:#?}");
        let affinity = report.checks.iter().find(|check| check.id == "gpu.affinity").unwrap();
        assert!(
            affinity
                .evidence
                .iter()
                .any(|line| line
                    == "GPU 0000:45:00.0: rdmap65s0:1 rdmap66s0:1 rdmap67s0:1 rdmap68s0:1 (below one switch)")
        );
        // A user's map is shown, and what it names in vain said.
        question.nic_map = "0=rdmap177s0+rdmap65s0".parse().unwrap();
        let chosen = |question: &Question| {
            let report = examine(&SysRoot::captured(tree.path()), question);
            let check = report.checks.iter().find(|check| check.id == "gpu.affinity").unwrap();
            (check.status, check.evidence.join("\n"))
        };
        let (status, lines) = chosen(&question);
        assert_eq!(status, Status::Ok, "{lines}");
        assert!(lines.contains("GPU 0000:45:00.0: rdmap177s0:1 rdmap65s0:1 (as chosen)"), "{lines}");
        question.nic_map = "0=mlx5_0,9=rdmap65s0".parse().unwrap();
        let (status, lines) = chosen(&question);
        assert_eq!(status, Status::Warn, "{lines}");
        assert!(lines.contains("there is no GPU 9") && lines.contains("there is no NIC mlx5_0"), "{lines}");
        let libfabric = report.checks.iter().find(|check| check.id == "library.libfabric").unwrap();
        assert!(
            libfabric.evidence[1].contains("/opt/amazon/efa/lib/libfabric.so.1 -> ")
                && libfabric.evidence[1].contains("LD_LIBRARY_PATH, entry 1")
        );
    }
}

/// A captured tree's absolute links are its own: what they name on this host is not looked at.
#[test]
fn a_tree_with_absolute_links_is_read_within_itself() {
    let tree = Tree::p5("linked");
    for (from, to) in [
        ("usr/local/lib/ucx", "opt/hpc/ucx"),
        ("usr/local/lib/pkgconfig", "opt/hpc/pkgconfig"),
        ("opt/amazon/ofi-nccl", "opt/amazon/ofi-nccl-1.2"),
        ("usr/lib/x86_64-linux-gnu/libibverbs", "opt/ibv"),
        ("etc/ld.so.conf.d/ofi.conf", "etc/alternatives/ofi"),
        ("etc", "data/etc"),
        ("proc/meminfo", "data/meminfo"),
        ("proc/self", "proc/42"),
        ("dev", "data/dev"),
    ] {
        let to = tree.path().join(to);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::rename(tree.path().join(from), &to).unwrap();
        let absolute = std::path::Path::new("/").join(to.strip_prefix(tree.path()).unwrap());
        std::os::unix::fs::symlink(absolute, tree.path().join(from)).unwrap();
    }
    let report = examine(&SysRoot::captured(tree.path()), &page());
    assert_eq!(wrong(&report), [], "{report:#?}");
    // A folder that only this host has.
    let elsewhere = std::env::temp_dir().join(format!("kvferry-live-plugins-{}", std::process::id()));
    fs::create_dir_all(&elsewhere).unwrap();
    fs::write(elsewhere.join("libplugin_UCX.so"), "").unwrap();
    std::os::unix::fs::symlink(&elsewhere, tree.path().join("opt/leak")).unwrap();
    for folder in ["/opt/leak".to_owned(), format!("/../../../../../..{}", elsewhere.display())] {
        let mut question = page();
        set(&mut question, "NIXL_PLUGIN_DIR", &folder);
        let report = examine(&SysRoot::captured(tree.path()), &question);
        assert_eq!(wrong(&report), [("nixl.plugins", Status::Fail)], "{folder}: {report:#?}");
    }
    fs::remove_dir_all(&elsewhere).unwrap();
}

#[test]
fn what_is_no_copy_of_a_host_is_told() {
    let tree = Tree::p5("copy");
    let flaw = || SysRoot::captured(tree.path()).flaw();
    assert_eq!(flaw(), None);
    fs::rename(tree.path().join("proc"), tree.path().join("was-proc")).unwrap();
    assert_eq!(flaw(), Some("it has no proc"));
    fs::create_dir(tree.path().join("proc")).unwrap();
    assert_eq!(flaw(), Some("it has no proc"));
    fs::write(tree.path().join("proc/meminfo"), "").unwrap();
    assert_eq!(flaw(), None);
    fs::rename(tree.path().join("sys"), tree.path().join("was-sys")).unwrap();
    let no_sys = Some("it has no sys with buses and classes of devices");
    assert_eq!(flaw(), no_sys);
    fs::create_dir(tree.path().join("sys")).unwrap();
    assert_eq!(flaw(), no_sys);
    fs::remove_dir(tree.path().join("sys")).unwrap();
    std::os::unix::fs::symlink("/sys", tree.path().join("sys")).unwrap();
    assert_eq!(flaw(), no_sys, "this host's");
}

#[test]
fn a_healthy_p4d_has_nothing_wrong() {
    let tree = Tree::p4d("p4d");
    let mut question = page();
    question.expect = "efa=4,gpu=8,gbps=400".parse().unwrap();
    let report = examine(&SysRoot::captured(tree.path()), &question);
    assert_eq!(wrong(&report), [], "{report:#?}");
}

#[test]
fn an_empty_host_has_nothing_wrong_until_something_is_expected() {
    let tree = Tree::empty("empty");
    let mut question = Question::default();
    let root = SysRoot::captured(tree.path());
    assert_eq!(wrong(&examine(&root, &question)), []);
    // A desktop's restriction is nobody's concern.
    tree.write("proc/sys/kernel/yama/ptrace_scope", "1");
    assert_eq!(wrong(&examine(&root, &question)), []);
    question.expect = "efa=4,gpu=1,imex=1".parse().unwrap();
    let ids: Vec<_> =
        wrong(&examine(&root, &question)).into_iter().filter(|(_, status)| *status == Status::Fail).collect();
    assert_eq!(ids.iter().map(|(id, _)| *id).collect::<Vec<_>>(), ["efa.devices", "gpu.devices", "fabric.imex"]);
}

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

/// Decode workers of several nodes with the plugins that the page gives them, and without a role.
#[test]
fn page_plugins_on_decode_only() {
    let tree = Tree::p5("plugins");
    tree.write(&format!("{BUNDLED}/libplugin_UCX.so"), "");
    let mut question = Question { role: Some(Role::Decode), multinode: true, ..page() };
    set(&mut question, "NIXL_PLUGIN_DIR", BUNDLED);
    assert_eq!(wrong(&examine(&SysRoot::captured(tree.path()), &question)), []);
    question.role = Some(Role::Prefill);
    question.environment.remove("NIXL_PLUGIN_DIR");
    assert_eq!(wrong(&examine(&SysRoot::captured(tree.path()), &question)), []);
}

#[test]
fn page_gb200_with_a_channel_and_its_variables() {
    let tree = Tree::p5("gb200");
    tree.write("dev/nvidia-caps-imex-channels/channel0", "");
    let mut question = page();
    question.expect = "imex=1".parse().unwrap();
    page_of_gb200(&mut question);
    set(&mut question, "NVIDIA_GDRCOPY", "enabled");
    assert_eq!(wrong(&examine(&SysRoot::captured(tree.path()), &question)), []);
}

/// 2.4 is what the EFA installer brought up to 1.48.
#[test]
fn gb200_needs_a_newer_libfabric_than_others() {
    for (abi, found) in [("FABRIC_1.8", &[("library.libfabric", Status::Fail)][..]), ("FABRIC_1.9", &[])] {
        let tree = Tree::gb200("gb200-libfabric");
        tree.write("opt/amazon/efa/lib/libfabric.so.1.30.0", &format!("\x7fELF {abi}\0efa_rdm_ep_ctrl\0"));
        let mut question = page();
        page_of_gb200(&mut question);
        let report = examine(&SysRoot::captured(tree.path()), &question);
        assert_eq!(wrong(&report), found, "{abi}");
        if let Some(check) = report.checks.iter().find(|check| check.status == Status::Fail) {
            assert!(check.evidence[0].contains("2.5") && check.fix.contains("1.48"), "{check:?}");
        }
    }
}

#[test]
fn copies_of_a_library_in_a_worker_are_found() {
    let tree = Tree::p5("maps");
    let own = tree.path().join("proc/self");
    fs::rename(own, tree.path().join("proc/77")).unwrap();
    let line = |path: &str| format!("7f00-7f01 r-xp 00000000 08:01 5  {path}\n");
    let one = line("/usr/local/lib/libucp.so.0.0.0") + &line("/opt/amazon/efa/lib/libfabric.so.1.30.0");
    tree.write("proc/77/maps", &one);
    let root = SysRoot::captured(tree.path()).of_process(77);
    assert_eq!(wrong(&examine(&root, &page())), []);
    tree.write("proc/77/maps", &(one + &line("/wheel/nixl_cu12.libs/libucp-b39b3ed9.so.0.0.0")));
    let report = examine(&root, &page());
    assert_eq!(wrong(&report), [("library.copies", Status::Warn)]);
    tree.write("proc/77/environ", "A=b\0C=d=e\0");
    assert_eq!(root.environment().unwrap().get("C").map(String::as_str), Some("d=e"));
}

#[test]
fn expectations_are_read_or_refused() {
    use kvferry_doctor::Expectations;
    let read: Expectations = "efa=4, gpu=8,gbps=400".parse().unwrap();
    assert_eq!((read.efa, read.gpu, read.imex, read.gbps), (Some(4), Some(8), None, Some(400)));
    for wrong in ["", "efa", "efa=x", "nic=1", "efa=-1"] {
        let error = wrong.parse::<Expectations>().unwrap_err().to_string();
        assert!(error.contains("efa=4,gpu=8"), "{error}");
    }
}
