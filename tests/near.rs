//! Which NICs ranks get on simulated hosts, beside made lists of what a transport's library offers.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "this is test code")]

use std::collections::BTreeSet;

use kvferry::TransportKind;
use kvferry::topology::{Nearness, Topology};
use kvferry::transport::{Device, Memory, Near, Nearby};
use kvferry_topology::simulated::{Host, Nic};

const NONE: [&str; 0] = [];

fn listed(kind: TransportKind, names: impl IntoIterator<Item = impl Into<String>>) -> Vec<Device> {
    names.into_iter().map(|name| Device { kind, name: name.into(), unavailable: None }).collect()
}

/// With a library that lists all ports of the host, as that transport calls them, and interfaces besides.
fn whole(kind: TransportKind, host: &Host, overrides: &str) -> Nearby {
    let found = Topology::read(host.path());
    let name = |port: &kvferry::topology::Port| match kind {
        TransportKind::Libfabric => port.device.clone(),
        _ => port.name(),
    };
    let names = found.ports.iter().map(name).chain(["eth0".to_owned(), "lo".to_owned()]);
    Nearby::among(kind, &listed(kind, names), found.clone(), &overrides.parse().unwrap())
}

fn gpu(number: usize) -> Memory {
    Memory::Gpu(number.to_string())
}

/// What one rank on each of so many GPUs opens.
fn each(nearby: &Nearby, gpus: usize, rails: usize) -> Vec<String> {
    (0..gpus).map(|number| nearby.nics(&gpu(number), rails, 0).devices.join(" ")).collect()
}

fn used(nearby: &Nearby, gpus: usize, rails: usize) -> BTreeSet<String> {
    (0..gpus).flat_map(|number| nearby.nics(&gpu(number), rails, 0).devices).collect()
}

/// libfabric's devices on the buses of one switch, the first so many.
fn of_switch(switch: usize, nics: usize) -> String {
    let first = 0x41 + switch * 0x10;
    let names: Vec<String> = (first..first + nics).map(|bus| format!("rdmap{bus}s0")).collect();
    names.join(" ")
}

#[test]
fn every_gpu_of_a_p5_has_the_four_nics_of_its_switch() {
    let host = Host::p5("near-p5").unwrap();
    let nearby = whole(TransportKind::Libfabric, &host, "");
    assert_eq!(nearby.warnings(), NONE);
    for (rails, taken) in [(1, 1), (2, 2), (3, 3), (4, 4), (0, 4), (9, 4)] {
        let expected: Vec<String> = (0..8).map(|switch| of_switch(switch, taken)).collect();
        assert_eq!(each(&nearby, 8, rails), expected, "{rails} rails");
        assert_eq!(used(&nearby, 8, rails).len(), 8 * taken);
        assert_eq!(nearby.nics(&gpu(3), rails, 0).nearness, Some(Nearness::Switch));
    }
    // The second, third and fourth rank of a GPU begin with the NICs that the ones before left.
    let turns: Vec<String> = (0..5).map(|turn| nearby.nics(&gpu(0), 1, turn).devices.join(" ")).collect();
    assert_eq!(turns, ["rdmap65s0", "rdmap66s0", "rdmap67s0", "rdmap68s0", "rdmap65s0"]);
    let pairs: Vec<String> = (0..3).map(|turn| nearby.nics(&gpu(0), 2, turn).devices.join(" ")).collect();
    assert_eq!(pairs, ["rdmap65s0 rdmap66s0", "rdmap67s0 rdmap68s0", "rdmap65s0 rdmap66s0"]);
    // Who has all has them as every other has: rails meet by index.
    for rails in [0, 4, 5] {
        assert_eq!(nearby.nics(&gpu(0), rails, 1), nearby.nics(&gpu(0), rails, 0));
    }
}

#[test]
fn every_gpu_of_a_p5en_has_two() {
    let host = Host::p5en("near-p5en").unwrap();
    let nearby = whole(TransportKind::Libfabric, &host, "");
    for (rails, taken) in [(1, 1), (2, 2), (4, 2), (0, 2)] {
        let expected: Vec<String> = (0..8).map(|switch| of_switch(switch, taken)).collect();
        assert_eq!(each(&nearby, 8, rails), expected, "{rails} rails");
    }
    assert_eq!(used(&nearby, 8, 0).len(), 16);
    // By its address, however that is written.
    let by_address = nearby.nics(&Memory::Gpu("0000:B3:00.0".to_owned()), 0, 0);
    assert_eq!(by_address, nearby.nics(&gpu(7), 0, 0));
    assert_eq!(by_address.devices, ["rdmap177s0", "rdmap178s0"]);
}

#[test]
fn two_gpus_of_a_p4d_share_one() {
    let host = Host::p4d("near-p4d").unwrap();
    for (kind, end) in [(TransportKind::Libfabric, ""), (TransportKind::Ucx, ":1")] {
        let nearby = whole(kind, &host, "");
        let expected: Vec<String> =
            [16, 16, 32, 32, 144, 144, 160, 160].iter().map(|bus| format!("rdmap{bus}s27{end}")).collect();
        for rails in [1, 2, 4, 0] {
            assert_eq!(each(&nearby, 8, rails), expected, "{kind}, {rails} rails");
        }
        assert_eq!(nearby.nics(&gpu(5), 0, 0).nearness, Some(Nearness::Root));
    }
}

#[test]
fn a_gb200_has_one_of_its_grace_for_each_gpu() {
    let host = Host::gb200("near-gb200").unwrap();
    let nearby = whole(TransportKind::Ucx, &host, "");
    for rails in [1, 2, 0] {
        assert_eq!(each(&nearby, 4, rails), ["rdmap3s0:1", "rdmaP2p3s0:1", "rdmaP16p3s0:1", "rdmaP18p3s0:1"]);
    }
    assert_eq!(nearby.nics(&gpu(0), 0, 0).nearness, Some(Nearness::Numa));
}

#[test]
fn a_storage_network_serves_host_memory_only() {
    let host = Host::mlx5("near-mlx5").unwrap();
    let nearby = whole(TransportKind::Ucx, &host, "");
    for rails in [1, 2, 0] {
        assert_eq!(each(&nearby, 8, rails), [1, 2, 3, 4, 6, 7, 8, 9].map(|number| format!("mlx5_{number}:1")));
    }
    let all: Vec<String> = (0..10).map(|number| format!("mlx5_{number}:1")).collect();
    let host_memory = |memory, rails, turn| nearby.nics(&memory, rails, turn);
    assert_eq!(host_memory(Memory::Host, 0, 0), Near { devices: all.clone(), nearness: None, warning: None });
    let second = host_memory(Memory::Numa(1), 0, 0);
    assert_eq!((&second.devices[..], second.nearness), (&all[5..], Some(Nearness::Numa)));
    let nowhere = host_memory(Memory::Numa(7), 0, 0);
    assert_eq!((&nowhere.devices[..], nowhere.nearness), (&all[..], Some(Nearness::Far)));
    // Ranks in host memory take turns: five of two rails each use all ten.
    let taken: Vec<String> = (0..5).flat_map(|turn| host_memory(Memory::Host, 2, turn).devices).collect();
    assert_eq!(taken, all);
}

/// GPUs and NICs that do not divide evenly, on one root.
fn flat(name: &str, gpus: u32, nics: u32) -> Host {
    let host = Host::empty(name).unwrap();
    for slot in 0x10..0x10 + gpus {
        host.gpu("pci0000:00", &format!("0000:00:{slot:02x}.0"), "0x2330", Some(0)).unwrap();
    }
    for slot in 1..=nics {
        let nic =
            Nic { name: &format!("rdmap0s{slot}"), vendor: "0x1d0f", device: "0xefa3", driver: "efa", gigabits: 200 };
        host.nic("pci0000:00", &format!("0000:00:{slot:02x}.0"), nic, Some(0)).unwrap();
    }
    host
}

#[test]
fn remainders_are_kept() {
    let host = flat("near-remainder", 3, 8);
    let nearby = whole(TransportKind::Libfabric, &host, "");
    let expected = ["rdmap0s1 rdmap0s2 rdmap0s3", "rdmap0s4 rdmap0s5 rdmap0s6", "rdmap0s7 rdmap0s8"];
    assert_eq!(each(&nearby, 3, 0), expected);
    assert_eq!((used(&nearby, 3, 0).len(), used(&nearby, 3, 2).len()), (8, 6));
    // More GPUs than NICs: all NICs are near each, and as different ones come first as there are.
    let host = flat("near-shared", 8, 3);
    let nearby = whole(TransportKind::Libfabric, &host, "");
    assert_eq!(each(&nearby, 8, 1), [1, 1, 1, 2, 2, 2, 3, 3].map(|slot| format!("rdmap0s{slot}")));
    assert_eq!(
        each(&nearby, 8, 2)[3..7],
        ["rdmap0s2 rdmap0s3", "rdmap0s2 rdmap0s3", "rdmap0s2 rdmap0s3", "rdmap0s3 rdmap0s1"]
    );
    assert_eq!(used(&nearby, 8, 1).len(), 3);
}

#[test]
fn a_users_word_comes_first() {
    let host = Host::mlx5("near-chosen").unwrap();
    let nearby = whole(TransportKind::Ucx, &host, "0=mlx5_9+mlx5_0:1,0000:47:00.0=mlx5_77,9=mlx5_1");
    let chosen = nearby.nics(&gpu(0), 0, 0);
    assert_eq!(
        (&chosen.devices[..], chosen.nearness),
        (&["mlx5_9:1".into(), "mlx5_0:1".into()][..], Some(Nearness::Chosen))
    );
    assert_eq!(nearby.nics(&gpu(0), 1, 0).devices, ["mlx5_9:1"]);
    assert_eq!(nearby.nics(&gpu(1), 0, 0).devices, ["mlx5_2:1"], "better near ones than none");
    let expected =
        ["there is no GPU 9, for which NICs were chosen", "there is no NIC mlx5_77, chosen for GPU 0000:47:00.0"];
    assert_eq!(nearby.warnings(), expected);
}

#[test]
fn what_the_library_does_not_list_is_named_and_the_others_share_its_work() {
    let host = Host::p5("near-missing").unwrap();
    let found = Topology::read(host.path());
    // libfabric's own names of domains do as well.
    let names = found.ports.iter().filter(|port| port.device != "rdmap66s0").map(|port| format!("{}-rdm", port.device));
    let nearby =
        Nearby::among(TransportKind::Libfabric, &listed(TransportKind::Libfabric, names), found, &"".parse().unwrap());
    let [warning] = nearby.warnings() else { panic!("{:?}", nearby.warnings()) };
    let said = "rdmap66s0:1: it is on this host (EFA, PCI 0000:42:00.0), but libfabric lists no domain for it; FI_LOG_LEVEL=info says why";
    assert!(warning.starts_with(said) && warning.contains("KVFERRY_LIBFABRIC_LIBRARY"), "{warning}");
    assert_eq!(nearby.nics(&gpu(0), 0, 0).devices, ["rdmap65s0-rdm", "rdmap67s0-rdm", "rdmap68s0-rdm"]);
    assert_eq!(used(&nearby, 8, 0).len(), 31);

    // No library at all, and a device that it cannot use.
    let host = Host::p4d("near-none").unwrap();
    let without = |name: &str, why: &str, kind| {
        let listed = [Device { kind, name: name.to_owned(), unavailable: Some(why.to_owned()) }];
        Nearby::among(kind, &listed, Topology::read(host.path()), &"".parse().unwrap())
    };
    let nearby = without("any", "libfabric.so.1 is not there", TransportKind::Libfabric);
    assert_eq!((nearby.nics(&gpu(0), 0, 0), nearby.warnings().len()), (Near::default(), 4));
    assert!(nearby.warnings()[3].ends_with("libfabric lists no device for it: libfabric.so.1 is not there"));
    let nearby = without("rdmap32s27:1", "UCX 1.13 has no usable srd", TransportKind::Ucx);
    assert!(
        nearby.warnings()[1].ends_with("but ucx cannot use it: UCX 1.13 has no usable srd"),
        "{:?}",
        nearby.warnings()
    );
}

#[test]
fn a_port_that_is_down_serves_nobody() {
    let host = Host::p5en("near-down").unwrap();
    host.write("sys/class/infiniband/rdmap65s0/ports/1/state", "1: DOWN").unwrap();
    let nearby = whole(TransportKind::Libfabric, &host, "");
    assert_eq!(nearby.warnings(), ["rdmap65s0:1: its port is not active but \"1: DOWN\"; bring it up"]);
    assert_eq!(each(&nearby, 2, 0), ["rdmap66s0", "rdmap81s0 rdmap82s0"]);
}

#[test]
fn interfaces_are_near_as_their_ports_are() {
    let host = Host::mlx5("near-tcp").unwrap();
    for number in 1..=3 {
        host.write(&format!("sys/class/infiniband/mlx5_{number}/device/net/ens{number}/dev_port"), "0").unwrap();
    }
    // An interface needs nobody's leave to open verbs.
    host.remove("dev/infiniband/uverbs1").unwrap();
    for kind in [TransportKind::Tcp, TransportKind::Libfabric] {
        let listed = listed(kind, ["eth0", "ens1", "ens2", "lo"]);
        let nearby = Nearby::among(kind, &listed, Topology::read(host.path()), &"3=ens1".parse().unwrap());
        assert_eq!(each(&nearby, 4, 0), ["ens1", "ens2", "ens1 ens2", "ens1"], "{kind}");
        let down = nearby.warnings().iter().find(|warning| warning.starts_with("mlx5_3:1")).unwrap();
        assert!(down.contains("none of its interfaces (ens3)") && down.contains("ip link set ens3 up"), "{down}");
        // What has no interface is no loss to tcp, but one to libfabric.
        assert_eq!(nearby.warnings().len(), if kind == TransportKind::Tcp { 1 } else { 8 }, "{:?}", nearby.warnings());
    }
    // A user who counts on one is told.
    let listed = listed(TransportKind::Tcp, ["ens1", "ens2"]);
    let nearby = Nearby::among(TransportKind::Tcp, &listed, Topology::read(host.path()), &"0=mlx5_7".parse().unwrap());
    assert!(nearby.warnings()[1].starts_with("mlx5_7:1: it has no network interface"), "{:?}", nearby.warnings());
    assert_eq!(nearby.nics(&gpu(0), 0, 0).devices, ["ens1"]);
}

#[test]
fn a_host_without_nics_has_none_to_offer_and_an_unknown_gpu_all() {
    for kind in [TransportKind::Tcp, TransportKind::Ucx, TransportKind::Libfabric, TransportKind::Shm] {
        let host = Host::empty("near-empty").unwrap();
        let nearby = whole(kind, &host, "");
        assert_eq!((nearby.nics(&Memory::Host, 4, 3), nearby.warnings()), (Near::default(), &[][..]));
    }
    let host = Host::p4d("near-unknown").unwrap();
    let unknown = whole(TransportKind::Ucx, &host, "").nics(&Memory::Gpu("0000:ff:00.0".to_owned()), 0, 1);
    assert_eq!(unknown.devices, ["rdmap16s27:1", "rdmap32s27:1", "rdmap144s27:1", "rdmap160s27:1"]);
    assert!(unknown.warning.unwrap().starts_with("there is no GPU 0000:ff:00.0 on PCI"));
    // Shared memory needs no NIC, and says so to nobody who did not ask.
    assert_eq!(whole(TransportKind::Shm, &host, "").warnings(), NONE);
    // Nor does tcp run over EFA.
    assert_eq!(whole(TransportKind::Tcp, &host, "").warnings(), NONE);
}
