//! Devices and affinity of simulated hosts.
#![allow(clippy::unwrap_used, reason = "this is test code")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use kvferry_topology::simulated::{Host, Nic};
use kvferry_topology::{Affinity, GpuNics, Make, Nearness, Overrides, Port, Topology};
use proptest::prelude::*;

fn affinity(host: &Host, overrides: &str) -> Affinity {
    Topology::read(host.path()).affinity(&overrides.parse().unwrap())
}

fn nics(affinity: &Affinity) -> Vec<String> {
    affinity.gpus.iter().map(|gpu| gpu.nics.join(" ")).collect()
}

fn nearness(affinity: &Affinity) -> BTreeSet<Nearness> {
    affinity.gpus.iter().map(|gpu| gpu.nearness).collect()
}

#[test]
fn p4d_shares_one_nic_between_two_gpus_of_a_root() {
    let host = Host::p4d("p4d").unwrap();
    let found = Topology::read(host.path());
    assert_eq!((found.ports.len(), found.gpus().count(), found.efa_on_pci().count()), (4, 8, 4));
    assert!(found.ports.iter().all(|port| port.make == Make::Efa && port.bits_per_second == Some(100_000_000_000)));
    let affinity = affinity(&host, "");
    let pairs = ["rdmap16s27:1", "rdmap32s27:1", "rdmap144s27:1", "rdmap160s27:1"];
    assert_eq!(nics(&affinity), pairs.map(|nic| [nic, nic]).concat());
    assert_eq!(nearness(&affinity), [Nearness::Root].into());
    assert_eq!((affinity.spare, affinity.warnings), (vec![], vec![]));
}

#[test]
fn p5_gives_every_gpu_the_nics_of_its_switch() {
    for (host, each, rate) in
        [(Host::p5("p5").unwrap(), 4, 100_000_000_000), (Host::p5en("p5en").unwrap(), 2, 200_000_000_000)]
    {
        let found = Topology::read(host.path());
        assert_eq!((found.ports.len(), found.gpus().count()), (8 * each, 8));
        assert!(found.ports.iter().all(|port| port.bits_per_second == Some(rate)));
        let affinity = affinity(&host, "");
        assert_eq!(nearness(&affinity), [Nearness::Switch].into());
        for (gpu, root) in affinity.gpus.iter().zip((0x40..).step_by(0x10)) {
            let expected: Vec<String> = (1..=each).map(|bus| format!("rdmap{}s0:1", root + bus)).collect();
            assert_eq!(gpu.nics, expected, "{}", gpu.gpu);
        }
        assert_eq!(affinity.spare, [""; 0]);
    }
}

#[test]
fn gb200_pairs_gpus_and_nics_of_one_grace() {
    let host = Host::gb200("gb200").unwrap();
    let affinity = affinity(&host, "");
    assert_eq!(nics(&affinity), ["rdmap3s0:1", "rdmaP2p3s0:1", "rdmaP16p3s0:1", "rdmaP18p3s0:1"]);
    assert_eq!(nearness(&affinity), [Nearness::Numa].into());
    let addresses: Vec<&str> = affinity.gpus.iter().map(|gpu| gpu.gpu.as_str()).collect();
    assert_eq!(addresses, ["0008:01:00.0", "0009:01:00.0", "0018:01:00.0", "0019:01:00.0"]);
}

#[test]
fn a_storage_network_is_nobodys_rail() {
    let host = Host::mlx5("mlx5").unwrap();
    let found = Topology::read(host.path());
    assert!(found.ports.iter().all(|port| port.make == Make::Mlx5));
    let affinity = affinity(&host, "");
    assert_eq!(nics(&affinity), [1, 2, 3, 4, 6, 7, 8, 9].map(|number| format!("mlx5_{number}:1")));
    assert_eq!(nearness(&affinity), [Nearness::Switch].into());
    assert_eq!(affinity.spare, ["mlx5_0:1", "mlx5_5:1"]);
}

#[test]
fn a_flat_machine_is_divided_by_numa_and_remainders_are_kept() {
    let host = Host::empty("flat").unwrap();
    let add = |numa: u32, name: &str, slot: u32| {
        let nic = Nic { name, vendor: "0x1d0f", device: "0xefa3", driver: "efa", gigabits: 200 };
        host.nic("pci0000:00", &format!("0000:00:{slot:02x}.0"), nic, Some(numa)).unwrap();
    };
    for (slot, numa) in [(0x10, 0), (0x11, 0), (0x18, 1)] {
        host.gpu("pci0000:00", &format!("0000:00:{slot:02x}.0"), "0x2330", Some(numa)).unwrap();
    }
    for (name, numa, slot) in [("a", 0, 1), ("b", 0, 2), ("c", 0, 3), ("d", 1, 4), ("e", 1, 5)] {
        add(numa, name, slot);
    }
    let shared = affinity(&host, "");
    assert_eq!(nics(&shared), ["a:1 b:1", "c:1", "d:1 e:1"], "three NICs for two GPUs");
    assert_eq!(nearness(&shared), [Nearness::Root].into());
    // A socket without NICs of its own: better all of them, from the root, than none.
    for name in ["d", "e"] {
        host.write(&format!("sys/class/infiniband/{name}/device/numa_node"), "0").unwrap();
    }
    assert_eq!(nics(&affinity(&host, "")), ["a:1 b:1", "c:1 d:1", "e:1"]);
}

#[test]
fn gpus_without_near_nics_take_far_ones_and_begin_with_different_ones() {
    let host = Host::empty("far").unwrap();
    for root in ["40", "50", "60", "70"] {
        host.gpu(&format!("pci0000:{root}"), &format!("0000:{root}:00.0"), "0x2330", Some(1)).unwrap();
    }
    for (bus, name) in [("10", "a"), ("20", "b")] {
        let nic = Nic { name, vendor: "0x15b3", device: "0x1021", driver: "mlx5_core", gigabits: 400 };
        host.nic(&format!("pci0000:{bus}"), &format!("0000:{bus}:00.0"), nic, Some(0)).unwrap();
    }
    let far = affinity(&host, "");
    assert_eq!(nics(&far), ["a:1 b:1", "a:1 b:1", "b:1 a:1", "b:1 a:1"]);
    assert_eq!(nearness(&far), [Nearness::Far].into());
}

#[test]
fn what_cannot_be_used_is_named_and_given_to_nobody() {
    let host = Host::p4d("broken").unwrap();
    host.write("sys/class/infiniband/rdmap16s27/ports/1/state", "1: DOWN").unwrap();
    host.remove("dev/infiniband/uverbs1").unwrap();
    let affinity = affinity(&host, "");
    let [down, absent] = &affinity.warnings[..] else { panic!("{:?}", affinity.warnings) };
    assert!(down.starts_with("rdmap16s27:1: ") && down.contains("1: DOWN"), "{down}");
    assert!(absent.starts_with("rdmap32s27:1: ") && absent.contains("/dev/infiniband/uverbs1"), "{absent}");
    // No NIC is left on their socket: far ones serve.
    assert_eq!(affinity.gpus[0].nearness, Nearness::Far);
    assert_eq!(affinity.gpus[0].nics.len(), 2);
    assert_eq!(affinity.gpus[7].nics, ["rdmap160s27:1"]);
}

#[test]
fn a_users_word_counts_and_what_it_names_in_vain_is_said() {
    let host = Host::mlx5("chosen").unwrap();
    let chosen = affinity(&host, "0=mlx5_0+mlx5_9:1,0000:47:00.0=mlx5_77,9=mlx5_1");
    let first = GpuNics {
        gpu: "0000:43:00.0".into(),
        nics: vec!["mlx5_0:1".into(), "mlx5_9:1".into()],
        nearness: Nearness::Chosen,
    };
    assert_eq!(chosen.gpus[0], first);
    assert_eq!((chosen.gpus[1].gpu.as_str(), &chosen.gpus[1].nics[..]), ("0000:47:00.0", &["mlx5_2:1".into()][..]));
    assert_eq!(chosen.spare, ["mlx5_5:1"]);
    assert_eq!(
        chosen.warnings,
        ["there is no GPU 9, for which NICs were chosen", "there is no NIC mlx5_77, chosen for GPU 0000:47:00.0"]
    );
}

#[test]
fn interfaces_are_their_ports_and_may_be_chosen_by_name() {
    let host = Host::mlx5("interfaces").unwrap();
    host.write("sys/class/infiniband/mlx5_1/device/net/ens1/dev_port", "0").unwrap();
    // An old adapter: one function, two ports, an interface of each.
    host.write("sys/class/infiniband/mlx5_2/ports/2/state", "4: ACTIVE").unwrap();
    for (name, port) in [("ens2", "0"), ("ens2d1", "1")] {
        host.write(&format!("sys/class/infiniband/mlx5_2/device/net/{name}/dev_port"), port).unwrap();
    }
    let found = Topology::read(host.path());
    let interfaces = |name: &str| {
        let port = found.ports.iter().find(|port| port.name() == name).unwrap();
        port.interfaces.join(" ")
    };
    let all = ["mlx5_1:1", "mlx5_2:1", "mlx5_2:2", "mlx5_3:1"].map(interfaces);
    assert_eq!(all, ["ens1", "ens2", "ens2d1", ""]);
    let chosen = affinity(&host, "7=ens2d1+ens1");
    assert_eq!((&chosen.gpus[7].nics[..], chosen.warnings), (&["mlx5_2:2".into(), "mlx5_1:1".into()][..], vec![]));
}

#[test]
fn an_empty_host_has_nothing() {
    let host = Host::empty("empty").unwrap();
    assert_eq!(affinity(&host, ""), Affinity::default());
    assert_eq!(Topology::read(Path::new("/nonexistent")), Topology::default());
}

/// A port below some bridges.
fn port(number: usize, path: Vec<u8>, numa: Option<u32>) -> Port {
    let pci = function(number, path, numa, (0x15b3, 0x1021, 0x02_0000));
    let (device, state) = (format!("mlx5_{number:02}"), "4: ACTIVE".to_owned());
    let (bits_per_second, interfaces, unusable) = (None, Vec::new(), None);
    Port { device, number: 1, make: Make::Mlx5, pci: Some(pci), bits_per_second, state, interfaces, unusable }
}

fn function(
    number: usize,
    path: Vec<u8>,
    numa: Option<u32>,
    (vendor, device, class): (u32, u32, u32),
) -> kvferry_topology::Pci {
    let path = path.iter().scan("root".to_owned(), |name, part| {
        *name = format!("{name}.{part}");
        Some(name.clone())
    });
    let (path, address) = (path.collect(), format!("0000:{number:02x}:00.{}", device & 1));
    kvferry_topology::Pci { address, path, numa, driver: None, vendor, device, class }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the tree: every GPU has a NIC if there is one, every NIC serves or is spare, nobody has one twice, and those that share one
    /// place differ by one at most.
    #[test]
    fn nobody_is_forgotten(
        gpus in prop::collection::vec((prop::collection::vec(0u8..3, 0..4), prop::option::of(0u32..3)), 0..9),
        nics in prop::collection::vec((prop::collection::vec(0u8..3, 0..4), prop::option::of(0u32..3)), 0..17),
    ) {
        let gpu = |(number, (path, numa))| function(number, path, numa, (0x10de, 0x2330, 0x03_0200));
        let pci: Vec<_> = gpus.into_iter().enumerate().map(gpu).collect();
        let ports: Vec<_> = nics.into_iter().enumerate().map(|(number, (path, numa))| port(number, path, numa)).collect();
        let host = Topology { pci, ports };
        let affinity = host.affinity(&Overrides::default());
        prop_assert_eq!(affinity.gpus.len(), host.gpus().count());
        let mut served: BTreeMap<&str, usize> = BTreeMap::new();
        for gpu in &affinity.gpus {
            prop_assert_eq!(gpu.nics.is_empty(), host.ports.is_empty());
            prop_assert_eq!(gpu.nearness == Nearness::None, host.ports.is_empty());
            let once: BTreeSet<&String> = gpu.nics.iter().collect();
            prop_assert_eq!(once.len(), gpu.nics.len(), "{:?}", gpu);
            gpu.nics.iter().for_each(|nic| *served.entry(nic).or_default() += 1);
        }
        for port in &host.ports {
            prop_assert_ne!(served.contains_key(port.name().as_str()), affinity.spare.contains(&port.name()));
        }
        // What a GPU has by the tree is as near in it as any NIC is. GPUs of one place and NUMA node have as many, but for one.
        let near = |gpu: &kvferry_topology::Pci, port: &Port| port.pci.as_ref().map_or(0, |pci| pci.common(gpu));
        let mut places: BTreeMap<(Vec<String>, Option<u32>), Vec<usize>> = BTreeMap::new();
        for (gpu, nics) in host.gpus().zip(&affinity.gpus).filter(|(_, nics)| nics.nearness <= Nearness::Root) {
            let nearest = host.ports.iter().map(|port| near(gpu, port)).max().unwrap_or_default();
            for nic in &nics.nics {
                let port = host.ports.iter().find(|port| port.name() == *nic).unwrap();
                prop_assert_eq!(near(gpu, port), nearest);
            }
            prop_assert!(nearest > 0);
            places.entry((gpu.path[..nearest].to_vec(), gpu.numa)).or_default().push(nics.nics.len());
        }
        for (place, counts) in places {
            let (least, most) = (counts.iter().min(), counts.iter().max());
            prop_assert!(most.zip(least).is_some_and(|(most, least)| most - least <= 1), "{:?}: {:?}", place, counts);
        }
    }
}
