//! The `cluster` example with NICs that are near, of a simulated host's sysfs, and with devices of which some are not there.
#![allow(clippy::unwrap_used, reason = "this is test code")]

#[allow(dead_code, reason = "of what other tests use")]
mod cluster;

use std::collections::BTreeSet;

use cluster::{Case, HEADS_4, Ran, may_have_hosts, run, run_bare, run_on_a_host};
use kvferry_libfabric::LibfabricProvider;
use kvferry_topology::simulated::Host;
use kvferry_transport::conformance::absent;
use kvferry_ucx::UcxProvider;

const TCP: Case = Case { transport: "tcp", direction: "pull", in_process: true };
const SIDES: [&str; 10] =
    ["--geometry", HEADS_4, "--prefill", "tp=2", "--decode", "tp=2", "--isl", "60", "--requests", "3"];

fn near(case: &Case, host: &Host, more: &[&str]) -> Ran {
    let root = ["--devices", "near", "--root", host.path().to_str().unwrap()];
    let ran = run(case, &[&SIDES[..], &root, more].concat());
    ran.check_delivered(case);
    ran
}

fn warnings(ran: &Ran) -> Vec<String> {
    let all = ran.json()["warnings"].as_array().cloned().unwrap();
    let all: Vec<String> = all.iter().map(|warning| warning.as_str().unwrap().to_owned()).collect();
    for warning in &all {
        assert!(ran.stderr.contains(&format!("warning: {warning}\n")), "{warning} is not in {}", ran.stderr);
    }
    all
}

fn notes(ran: &Ran) -> Vec<&str> {
    ran.stderr.lines().filter_map(|line| line.strip_prefix("note: --devices near: ")).collect()
}

fn devices(ran: &Ran) -> BTreeSet<String> {
    ran.paths().iter().map(|path| path["device"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn who_is_not_there_is_named_and_the_others_are_used() {
    for list in ["lo,nosuch0", "nosuch0,lo,tcp:lo"] {
        let ran = run(&TCP, &[&SIDES[..], &["--devices", list]].concat());
        ran.check_delivered(&TCP);
        let [warning] = &warnings(&ran)[..] else { panic!("{}", ran.stdout) };
        let said = format!("--devices {list}: there is no device nosuch0 for --transport tcp; there are ");
        assert!(warning.starts_with(&said) && warning.ends_with("; the others are used"), "{warning}");
        assert_eq!(devices(&ran), ["lo".to_owned()].into());
    }
    let ran = run(&TCP, &[&SIDES[..], &["--devices", "lo"]].concat());
    assert_eq!(warnings(&ran), [""; 0]);
    for list in ["nosuch0", "nosuch0,nosuch1"] {
        let ran = run_bare(&["--model", "tiny", "--transport", "tcp", "--devices", list]);
        assert_eq!((ran.code, &ran.stdout[..]), (Some(2), ""), "{}", ran.stderr);
        let said = format!("error: --devices {list}: there is no device nosuch0 for --transport tcp; there are ");
        assert!(ran.stderr.starts_with(&said) && !ran.stderr.contains("others"), "{}", ran.stderr);
    }
}

#[test]
fn a_host_without_nics_takes_the_default_and_says_so() {
    let host = Host::empty("without").unwrap();
    let ran = near(&TCP, &host, &[]);
    assert_eq!(notes(&ran), ["every rank takes tcp:lo; sysfs shows no NIC that it can use"]);
    assert_eq!((warnings(&ran), devices(&ran)), (vec![], ["lo".to_owned()].into()));
    // Each kind for itself.
    let ran = near(&Case { transport: "auto", ..TCP }, &host, &["--rails", "2"]);
    let expected = [
        "every rank takes shm:memory; it moves bytes without NICs",
        "every rank takes tcp:lo; sysfs shows no NIC that it can use",
    ];
    assert_eq!(notes(&ran), expected);
    let both = ["--devices", "memory,tcp:near", "--root", host.path().to_str().unwrap(), "--rails", "2"];
    let ran = run(&Case { transport: "auto", ..TCP }, &[&SIDES[..], &both].concat());
    assert_eq!((notes(&ran), ran.code), (vec![expected[1]], Some(0)));
}

#[test]
fn what_the_library_does_not_list_is_a_warning() {
    let host = Host::mlx5("unlisted").unwrap();
    host.write("sys/class/infiniband/mlx5_0/device/net/lo/dev_port", "0").unwrap();
    host.write("sys/class/infiniband/mlx5_1/device/net/nosuch0/dev_port", "0").unwrap();
    let ran = near(&TCP, &host, &["--nic-map", "0=mlx5_0,9=mlx5_1"]);
    assert_eq!(notes(&ran), ["prefill:0,prefill:1,decode:0,decode:1 tcp:lo (host memory)"]);
    let [unlisted, no_gpu] = &warnings(&ran)[..] else { panic!("{}", ran.stdout) };
    let said = "--devices near: tcp: mlx5_1:1: it is on this host (mlx5, PCI 0000:41:00.0), but tcp lists none of its interfaces (nosuch0)";
    assert!(unlisted.starts_with(said), "{unlisted}");
    assert_eq!(no_gpu, "--devices near: tcp: there is no GPU 9, for which NICs were chosen");

    let host = Host::p4d("no-efa").unwrap();
    for (transport, missing, taken) in [
        ("ucx", UcxProvider::unavailable(), "ucx:memory"),
        ("libfabric", LibfabricProvider::unavailable(), "libfabric:lo"),
    ] {
        if let Some(reason) = missing {
            absent(transport, &reason);
            continue;
        }
        let ran = near(&Case { transport, direction: "pull", in_process: false }, &host, &[]);
        let all = warnings(&ran);
        let said = format!(
            "--devices near: {transport}: rdmap16s27:1: it is on this host (EFA, PCI 0000:10:1b.0), but {transport} lists no "
        );
        assert!(all.len() == 4 && all.iter().any(|warning| warning.starts_with(&said)), "{all:?}");
        assert_eq!(notes(&ran), [format!("every rank takes {taken}; sysfs shows no NIC that it can use")]);
    }
}

/// Two cables of a host of the test's own, each with one end that counts as a NIC.
#[test]
fn ranks_share_the_nics_that_are_near() {
    if !may_have_hosts() {
        return;
    }
    let cables = "for i in 0 1; do ip link add rail$i type veth peer name end$i; ip addr add 10.78.$i.1/24 dev rail$i; \
                  ip link set rail$i up; ip link set end$i up; done";
    let host = Host::mlx5("cables").unwrap();
    for (nic, interface) in [("mlx5_1", "rail0"), ("mlx5_2", "rail1")] {
        host.write(&format!("sys/class/infiniband/{nic}/device/net/{interface}/dev_port"), "0").unwrap();
    }
    let root = host.path().to_str().unwrap();
    let options = ["--json", "--deadline", "120", "--transport", "tcp", "--devices", "near", "--root", root];
    let case = Case { transport: "tcp", direction: "auto", in_process: false };
    let run = |more: &[&str]| {
        let ran = run_on_a_host(cables, &[&options[..], more].concat());
        ran.check_delivered(&case);
        assert_eq!(warnings(&ran), [""; 0]);
        ran
    };
    let large = ["--geometry", "layers=8,kv_heads=8,head_dim=128,dtype=bf16", "--isl", "512", "--requests", "4"];
    let all = run(&[&large[..], &["--prefill", "tp=2", "--decode", "tp=2"]].concat());
    let ranks = "prefill:0,prefill:1,decode:0,decode:1";
    assert_eq!(notes(&all), [format!("{ranks} tcp:rail0,tcp:rail1 (host memory)")]);
    assert_eq!(devices(&all), ["rail0".to_owned(), "rail1".to_owned()].into());
    let one = run(&[&SIDES[..], &["--rails", "1"]].concat());
    assert_eq!(
        notes(&one),
        ["prefill:0,decode:0 tcp:rail0 (host memory)", "prefill:1,decode:1 tcp:rail1 (host memory)"]
    );
    assert_eq!(devices(&one), ["rail0".to_owned(), "rail1".to_owned()].into());
}

#[test]
fn what_would_be_ignored_is_refused() {
    let cases: &[(&[&str], &[&str])] = &[
        (&["--nic-map", "0=mlx5_0"], &["--nic-map", "--devices near"]),
        (&["--root", "/"], &["--root", "--devices near"]),
        (&["--devices", "near", "--root", "/nonexistent"], &["--root /nonexistent", "no folder sys"]),
        (&["--devices", "near", "--nic-map", "0"], &["--nic-map", "write GPU=NIC+NIC"]),
        (&["--devices", "ucx:near"], &["--devices ucx:near", "there is no device ucx:near for --transport tcp"]),
        (&["--devices", "near", "--rails", "0"], &["--rails 0", "from 1"]),
    ];
    for (options, words) in cases {
        let ran = run_bare(&[&["--model", "tiny", "--transport", "tcp"], *options].concat());
        assert_eq!((ran.code, &ran.stdout[..]), (Some(2), ""), "{options:?}: {}", ran.stderr);
        for word in *words {
            assert!(ran.stderr.contains(word), "{options:?}: no {word:?} in {}", ran.stderr);
        }
    }
}
