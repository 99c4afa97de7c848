//! Several NICs share what a rank reads: one that dies, is slow or falls silent costs time and nothing else, and carries again once it is mended.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use kvferry_core::Direction;
use kvferry_core::protocol::{RailTerms, Role};
use kvferry_fabric_sim::{NicDeath, NicStats};
use kvferry_sim::{Cluster, ClusterOptions, ClusterReport, World};

const SEEDS: u64 = 8;
const REQUESTS: u64 = 60;
const SECOND: u64 = 1_000_000_000;
const DIRECTIONS: [Direction; 2] = [Direction::Pull, Direction::Push];
const HOUR: Duration = Duration::from_secs(3600);

/// A cluster whose ranks have that many NICs each, with requests on their way for half a second.
fn busy(seed: u64, nics: u32, rails_max: u32, direction: Direction) -> Cluster {
    let millis = Duration::from_millis;
    let mut options = ClusterOptions { direction: Some(direction), nics, ..ClusterOptions::tiny(seed) };
    options.rails = RailTerms {
        rails_max,
        share_bytes_min: 512,
        silent_after: millis(5),
        wired_within: millis(0),
        rest: millis(20),
        rest_max: millis(200),
        ..RailTerms::default()
    };
    // Programs are small: transfers then take as long as they take in earnest.
    options.world.fabric.bytes_per_second = 2_000_000;
    options.world.fabric.slice_bytes = 512;
    options.tokens = 60..120;
    // What is pushed of one layer is too little for four.
    options.layers_per_step = Some(1).filter(|_| nics <= 2);
    let mut cluster = Cluster::new(options).unwrap();
    cluster.submit(REQUESTS, millis(500));
    cluster
}

fn ends(cluster: &mut Cluster, seed: u64) -> ClusterReport {
    assert!(cluster.run(HOUR), "seed {seed}: it does not end: {:?}", cluster.report());
    cluster.rest(Duration::from_secs(20));
    let report = cluster.report();
    assert!(report.violations().is_empty(), "seed {seed}: {:#?} {:#?}", report.violations(), report.reasons);
    report
}

fn read_by(cluster: &mut Cluster, node: usize) -> Vec<u64> {
    let nics = cluster.world().nics(node);
    let stats: Vec<NicStats> = nics.into_iter().map(|nic| cluster.world().fabric().stats(nic)).collect();
    stats.into_iter().map(|stats| stats.bytes_in).collect()
}

#[test]
fn rails_that_are_alike_carry_within_a_tenth_of_the_same() {
    for (nics, direction) in [2, 4].into_iter().flat_map(|nics| DIRECTIONS.map(|direction| (nics, direction))) {
        for seed in 0..SEEDS {
            let mut cluster = busy(seed, nics, nics, direction);
            let report = ends(&mut cluster, seed);
            assert_eq!(report.delivered, REQUESTS, "seed {seed}: {:#?}", report.reasons);
            for rank in 0..4 {
                let node = cluster.node_of(Role::Decode, 0, rank).unwrap();
                let read = read_by(&mut cluster, node);
                let even = read.iter().sum::<u64>() / u64::from(nics);
                assert!(even > 0 && read.iter().all(|read| read.abs_diff(even) * 10 <= even), "{seed}: {read:?}");
            }
        }
    }
}

/// What hurts a NIC of a prefill or of a decode rank in the midst of transfers, and is mended 300 ms later.
fn survives(
    hurt: impl Fn(&World, kvferry_fabric_sim::NicId) + Copy + 'static,
    heal: impl Fn(&World, kvferry_fabric_sim::NicId) + Copy + 'static,
) {
    let mut failed_alone = 0;
    for (seed, direction) in (0..SEEDS).flat_map(|seed| DIRECTIONS.map(|direction| (seed, direction))) {
        let run = |rails: u32| {
            let mut cluster = busy(seed, 2, rails, direction);
            let (role, rank) = if seed % 2 == 0 { (Role::Prefill, 1) } else { (Role::Decode, 2) };
            let node = cluster.node_of(role, 0, rank).unwrap();
            let nic = move |world: &World| world.nics(node)[1];
            cluster.world().at(SECOND / 5, move |world| hurt(world, nic(world)));
            cluster.world().at(SECOND / 2, move |world| heal(world, nic(world)));
            let report = ends(&mut cluster, seed);
            (cluster, report, node)
        };
        failed_alone += run(1).1.undelivered;
        let (mut cluster, report, node) = run(2);
        assert_eq!(
            (report.delivered, report.undelivered),
            (REQUESTS, 0),
            "seed {seed}, {direction:?}: {:#?}",
            report.reasons
        );
        // It is used again.
        let of = |cluster: &mut Cluster| {
            let nic = cluster.world().nics(node)[1];
            let stats = cluster.world().fabric().stats(nic);
            stats.bytes_in + stats.bytes_out
        };
        let before = of(&mut cluster);
        cluster.submit(REQUESTS, Duration::from_millis(500));
        let both = ends(&mut cluster, seed);
        assert_eq!(both.delivered, 2 * REQUESTS, "seed {seed}: {:#?}", both.reasons);
        let after = of(&mut cluster) - before;
        assert!(
            after > before / 4,
            "seed {seed}, {direction:?}: it carries {after} bytes where it had carried {before}"
        );
    }
    println!("without rails, {failed_alone} attempts failed");
}

#[test]
fn a_nic_that_dies_in_the_midst_fails_nothing() {
    survives(|world, nic| world.fabric().kill(nic, NicDeath::Error), |world, nic| world.fabric().revive(nic));
}

#[test]
fn a_nic_that_falls_silent_fails_nothing() {
    survives(|world, nic| world.fabric().kill(nic, NicDeath::BlackHole), |world, nic| world.fabric().revive(nic));
}

#[test]
fn a_nic_of_a_tenth_of_its_speed_fails_nothing() {
    survives(|world, nic| world.fabric().slow(nic, 10), |world, nic| world.fabric().slow(nic, 1));
}
