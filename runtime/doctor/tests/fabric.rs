//! A compute tray of GB200 in an NVLink domain, and one thing wrong with it each; other hosts, of which nothing of this is a concern.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code")]

mod tree;

use kvferry_doctor::{DriverSaid, Question, Report, Status, SysRoot, examine};
use proptest::prelude::*;
use tree::Tree;

/// The page's variables for EFA workers of GB200.
fn page() -> Question {
    let variables = [
        ("FI_PROVIDER", "efa"),
        ("FI_EFA_USE_DEVICE_RDMA", "1"),
        ("FI_EFA_ENABLE_SHM_TRANSFER", "0"),
        ("LD_LIBRARY_PATH", "/opt/amazon/efa/lib:/usr/local/lib:/usr/lib"),
        ("NCCL_MNNVL_ENABLE", "1"),
        ("NCCL_CUMEM_ENABLE", "1"),
        ("NCCL_NVLS_ENABLE", "1"),
    ];
    let environment = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    Question { environment, ..Question::default() }
}

fn wrong(report: &Report) -> Vec<(&'static str, Status)> {
    report.checks.iter().filter(|check| check.status != Status::Ok).map(|check| (check.id, check.status)).collect()
}

fn said(report: &Report, id: &str) -> String {
    let check = report.checks.iter().find(|check| check.id == id).unwrap();
    format!("{} {}", check.evidence.join("\n"), check.fix)
}

#[test]
fn a_healthy_gb200_has_nothing_wrong() {
    let tree = Tree::gb200("healthy");
    let mut question = page();
    question.expect = "efa=4,gpu=4,imex=1".parse().unwrap();
    let report = examine(&SysRoot::captured(tree.path()), &question);
    assert_eq!(wrong(&report), [], "{report:#?}");
    let state = said(&report, "fabric.state");
    let line = "GPU 00000019:01:00.0: Completed, Success, cluster 5b1c0102-0304-0506-0708-090a0b0c0d0e, clique 32766";
    assert!(state.contains("4 GPUs are registered in one NVLink domain") && state.contains(line), "{state}");
}

/// What one case does to the healthy host and the question.
type Break = fn(&Tree, &mut Question);

/// Name, what is broken, which check finds it, how bad it is, and a word of evidence or fix.
const BROKEN: &[(&str, Break, &str, Status, &str)] = &[
    (
        "registration goes on",
        |tree, _| {
            tree.smi_says(
                ": Completed\n        Status                            : Success",
                ": In Progress\n        Status                            : N/A",
                1,
            )
        },
        "fabric.state",
        Status::Fail,
        "1 of 4 GPUs are not registered",
    ),
    (
        "registration has not begun",
        |tree, _| tree.smi_says(": Completed", ": Not Started", 4),
        "fabric.state",
        Status::Fail,
        "NMX-C",
    ),
    (
        "registration failed",
        |tree, _| tree.smi_says(": Success", ": Insufficient Resources", 1),
        "fabric.state",
        Status::Fail,
        "ended in an error on 1 of 4",
    ),
    (
        "no domain",
        |tree, _| tree.smi_says("5b1c0102-0304-0506-0708-090a0b0c0d0e", "00000000-0000-0000-0000-000000000000", 4),
        "fabric.state",
        Status::Fail,
        "4 of 4 GPUs are in no NVLink domain",
    ),
    (
        "no clique",
        |tree, _| tree.smi_says(": 32766", ": N/A", 1),
        "fabric.state",
        Status::Fail,
        "1 of 4 GPUs are in no NVLink domain",
    ),
    (
        "GPUs of two clusters",
        |tree, _| tree.smi_says("5b1c0102", "5b1c0103", 1),
        "fabric.state",
        Status::Fail,
        "different NVLink domains",
    ),
    ("GPUs of two cliques", |tree, _| tree.smi_says(": 32766", ": 32765", 2), "fabric.state", Status::Fail, "cliques"),
    (
        "a GPU without a fabric",
        |tree, _| {
            tree.smi_says(": Completed\n        Status                            : Success\n        CliqueId                          : 32766\n        ClusterUUID                       : 5b1c0102-0304-0506-0708-090a0b0c0d0e", ": N/A\n        Status                            : N/A\n        CliqueId                          : N/A\n        ClusterUUID                       : N/A", 1)
        },
        "fabric.state",
        Status::Fail,
        "1 of 4",
    ),
    (
        "a degraded link",
        |tree, _| tree.smi_says("Bandwidth                     : Full", "Bandwidth                     : Degraded", 1),
        "fabric.state",
        Status::Warn,
        "GPU 00000008:01:00.0: Bandwidth is Degraded",
    ),
    (
        "a GPU in no partition",
        |tree, _| tree.smi_says("Configuration       : None", "Configuration       : No Partition", 1),
        "fabric.state",
        Status::Fail,
        "No Partition",
    ),
    (
        "a summary that speaks for itself",
        |tree, _| {
            tree.smi_says(
                "Summary                       : Healthy",
                "Summary                       : Limited Capacity",
                1,
            )
        },
        "fabric.state",
        Status::Warn,
        "Summary is Limited Capacity",
    ),
    (
        "a GPU without a partition",
        |tree, _| tree.smi_says("Assigned            : True", "Assigned            : False", 1),
        "fabric.state",
        Status::Fail,
        "Partition Assigned is False",
    ),
    (
        "a driver that cannot tell",
        |tree, _| tree.smi("GPU 00000008:01:00.0\n    Product Name                          : NVIDIA GB200"),
        "fabric.state",
        Status::Fail,
        "570.124.06 is too old",
    ),
    (
        "a text that was cut",
        |tree, _| tree.smi_says("    Fabric\n        State                             : Completed", "", 1),
        "fabric.state",
        Status::Warn,
        "1 of 4 GPUs have no section",
    ),
    (
        "no GPU",
        |tree, _| tree.smi("Attached GPUs                             : 0"),
        "fabric.state",
        Status::Fail,
        "lists no GPU",
    ),
    (
        "NVML that does not load",
        |tree, question| {
            tree.remove("nvidia-smi-q.txt");
            question.driver = DriverSaid::Refused("libnvidia-ml.so.1: cannot open".to_owned());
        },
        "fabric.state",
        Status::Warn,
        "NVIDIA_DRIVER_CAPABILITIES",
    ),
    (
        "no channel, forced",
        |tree, _| tree.remove("dev/nvidia-caps-imex-channels"),
        "fabric.imex",
        Status::Fail,
        "no channel was given to this container",
    ),
    (
        "no channel, and nothing said of it: NCCL finds the domain by itself",
        |tree, question| {
            tree.remove("dev/nvidia-caps-imex-channels");
            question.environment.retain(|name, _| !name.starts_with("NCCL_"));
        },
        "fabric.imex",
        Status::Fail,
        "unhandled system error",
    ),
    (
        "no channel, and nobody knows of a domain",
        |tree, question| {
            tree.remove("dev/nvidia-caps-imex-channels");
            tree.remove("nvidia-smi-q.txt");
            question.environment.retain(|name, _| !name.starts_with("NCCL_"));
        },
        "fabric.imex",
        Status::Warn,
        "NCCL_MNNVL_ENABLE=0",
    ),
    (
        "a driver loaded without channels",
        |tree, _| {
            tree.remove("dev/nvidia-caps-imex-channels");
            tree.write("proc/driver/nvidia/params", "ImexChannelCount: 0");
        },
        "fabric.imex",
        Status::Fail,
        "NVreg_ImexChannelCount",
    ),
    (
        "nodes listed and no daemon",
        |tree, _| {
            tree.write(
                "etc/nvidia-imex/config.cfg",
                "LOG_LEVEL=4\nIMEX_NODE_CONFIG_FILE=/etc/nvidia-imex/nodes_config.cfg",
            );
            tree.write("etc/nvidia-imex/nodes_config.cfg", "# one a line\n10.0.0.1\n10.0.0.2");
        },
        "fabric.daemon",
        Status::Warn,
        "lists 2 nodes, and no nvidia-imex runs",
    ),
    (
        "a daemon that knows no node",
        |tree, _| {
            tree.write("etc/nvidia-imex/config.cfg", "IMEX_NODE_CONFIG_FILE=/etc/imex/nodes");
            tree.write("etc/imex/nodes", "# nobody");
            tree.write("proc/4711/comm", "nvidia-imex");
        },
        "fabric.daemon",
        Status::Warn,
        "its list of nodes is empty",
    ),
    (
        "UCX told to leave the domain alone",
        |_, question| drop(question.environment.insert("UCX_CUDA_IPC_ENABLE_MNNVL".to_owned(), "n".to_owned())),
        "fabric.kv",
        Status::Warn,
        "UCX_CUDA_IPC_ENABLE_MNNVL=n",
    ),
    (
        "a pool without fabric handles",
        |_, question| {
            drop(question.environment.insert("TRTLLM_KVCACHE_POOL_USE_FABRIC_MEMORY".to_owned(), "0".to_owned()));
        },
        "fabric.kv",
        Status::Warn,
        "no fabric handle",
    ),
    (
        "UCX without cuda_ipc",
        |_, question| drop(question.environment.insert("UCX_TLS".to_owned(), "srd,cuda_copy".to_owned())),
        "fabric.kv",
        Status::Warn,
        "leaves cuda_ipc out",
    ),
    (
        "NCCL is not told",
        |_, question| {
            question.environment.remove("NCCL_NVLS_ENABLE");
        },
        "fabric.nccl",
        Status::Warn,
        "NCCL_NVLS_ENABLE is not set",
    ),
];

#[test]
fn one_thing_wrong_is_found_and_nothing_else() {
    let mut failures = Vec::new();
    for (name, broken, id, status, word) in BROKEN {
        let tree = Tree::gb200("broken");
        let mut question = page();
        broken(&tree, &mut question);
        let report = examine(&SysRoot::captured(tree.path()), &question);
        let (found, said) = (wrong(&report), said(&report, id));
        if found != [(*id, *status)] || !said.contains(word) {
            failures.push(format!("{name}: {id} {status:?} with {word:?} expected, found {found:?}: {said}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Where the domain is not to be used, nothing of it is missed.
#[test]
fn a_domain_that_is_turned_off_needs_no_channel() {
    let tree = Tree::gb200("off");
    tree.remove("dev/nvidia-caps-imex-channels");
    let mut question = page();
    question.environment.insert("NCCL_MNNVL_ENABLE".to_owned(), "0".to_owned());
    assert_eq!(wrong(&examine(&SysRoot::captured(tree.path()), &question)), []);
}

#[test]
fn a_daemon_with_its_nodes_is_as_it_should_be() {
    let tree = Tree::gb200("daemon");
    tree.write("etc/nvidia-imex/config.cfg", "SERVER_PORT=50000");
    tree.write("etc/nvidia-imex/nodes_config.cfg", "10.0.0.1\n10.0.0.2");
    tree.write("proc/4711/comm", "nvidia-imex");
    let report = examine(&SysRoot::captured(tree.path()), &page());
    assert_eq!(wrong(&report), []);
    assert!(said(&report, "fabric.daemon").contains("lists 10.0.0.1, 10.0.0.2"));
}

/// H100 behind this host's own switches register, too, in no cluster; older ones and virtual machines say N/A.
#[test]
fn hosts_without_a_domain_have_nothing_wrong() {
    let own = "GPU 00000000:45:00.0\n    Fabric\n        State                             : Completed\n        Status                            : Success\n        \
               CliqueId                          : 0\n        ClusterUUID                       : 00000000-0000-0000-0000-000000000000\n        Health\n            \
               Bandwidth                     : N/A\n";
    let none = "GPU 00000000:45:00.0\n    Fabric\n        State                             : N/A\n        Status                            : N/A\n";
    let mut question = page();
    question.environment.retain(|name, _| !name.starts_with("NCCL_"));
    for (text, words) in [
        (own, "this host's own NVLink fabric"),
        (none, "no GPU has"),
        ("GPU 1\n    Product Name : A100\n", "tells nothing"),
    ] {
        for tree in [Tree::p5("own-p5"), Tree::p4d("own-p4d")] {
            tree.smi(text);
            let report = examine(&SysRoot::captured(tree.path()), &question);
            assert_eq!(wrong(&report), [], "{text}");
            assert!(said(&report, "fabric.state").contains(words), "{}", said(&report, "fabric.state"));
        }
    }
    // Without its manager no GPU behind switches starts.
    let tree = Tree::p5("unmanaged");
    tree.smi(&own.replace("Completed", "In Progress"));
    let report = examine(&SysRoot::captured(tree.path()), &question);
    assert_eq!(wrong(&report), [("fabric.state", Status::Fail)]);
    assert!(said(&report, "fabric.state").contains("nvidia-fabricmanager"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// What a file claims to be of `nvidia-smi`, cut and mixed up: always a verdict.
    #[test]
    fn any_text_of_the_drivers_ends_in_a_verdict(
        text in "(GPU 0000|    Fabric\n|        State  : |Completed\n|N/A\n|ClusterUUID : |0000-1\n|CliqueId : 7\n|Health|\n|: |\\PC){0,40}"
    ) {
        let tree = Tree::empty("any");
        let question = Question { driver: DriverSaid::Told(text), expect: "imex=1".parse().unwrap(), ..Question::default() };
        let report = examine(&SysRoot::captured(tree.path()), &question);
        prop_assert!(report.checks.iter().any(|check| check.id == "fabric.state"));
    }
}
