//! Clusters whose network cards fail: every request still has exactly one outcome, and nobody keeps anything.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use kvferry_core::Direction;
use kvferry_core::protocol::Role;
use kvferry_fabric_sim::{Delivery, NicDeath};
use kvferry_sim::{Cluster, ClusterOptions, ClusterReport, Dice, World};

const SEEDS: u64 = 12;
const REQUESTS: u64 = 120;
const HOUR: Duration = Duration::from_secs(3600);
const SECOND: u64 = 1_000_000_000;

/// A busy cluster, and a prefill and a decode node of it in any order, to the first of which `hurt` happens.
fn busy(seed: u64, hurt: impl Fn(&mut World, usize, usize) + 'static) -> (Cluster, Dice, u64, (usize, usize)) {
    let mut dice = Dice::new(seed, "test", 0);
    let direction = if dice.below(2) == 0 { Direction::Pull } else { Direction::Push };
    let mut options = ClusterOptions { direction: Some(direction), ..ClusterOptions::tiny(seed) };
    options.world.fabric.delivery = Delivery::Unordered;
    options.world.fabric.jitter = Duration::from_micros(dice.below(200));
    options.world.fabric.slice_bytes = 4096;
    let mut cluster = Cluster::new(options).unwrap();
    cluster.submit(REQUESTS, Duration::from_millis(10));
    let one = cluster.node_of(Role::Prefill, 0, dice.below(2) as u32).unwrap();
    let other = cluster.node_of(Role::Decode, 0, dice.below(4) as u32).unwrap();
    let (one, other) = if dice.below(2) == 0 { (one, other) } else { (other, one) };
    let at = dice.within(500_000..10_000_000);
    cluster.world().at(at, move |world| hurt(world, one, other));
    (cluster, dice, at, (one, other))
}

/// Runs to the end; nothing may be left over.
fn ends(cluster: &mut Cluster, seed: u64) -> ClusterReport {
    assert!(cluster.run(HOUR), "seed {seed}: it does not end: {:?}", cluster.report());
    cluster.rest(Duration::from_secs(100));
    let report = cluster.report();
    assert!(report.violations().is_empty(), "seed {seed}: {:#?} {:#?}", report.violations(), report.reasons);
    report
}

/// What hurts ends after a while; then a second wave is delivered, all of it.
fn survives(
    hurt: impl Fn(&mut World, usize, usize) + Copy + 'static,
    heal: impl Fn(&mut World, usize, usize) + Copy + 'static,
) {
    let mut undelivered = 0;
    for seed in 0..SEEDS {
        let (mut cluster, mut dice, at, (one, other)) = busy(seed, hurt);
        cluster.world().at(at + dice.below(2 * SECOND), move |world| heal(world, one, other));
        let first = ends(&mut cluster, seed);
        undelivered += first.undelivered;
        cluster.submit(REQUESTS, Duration::from_millis(10));
        let both = ends(&mut cluster, seed);
        assert_eq!(both.delivered - first.delivered, REQUESTS, "seed {seed}: {:#?}", both.reasons);
    }
    assert!(undelivered > 0, "no fault came while something was under way");
}

fn revive(world: &mut World, node: usize, _: usize) {
    for nic in world.nics(node) {
        world.fabric().revive(nic);
    }
}

#[test]
fn a_nic_dies_with_errors_and_is_revived() {
    survives(
        |world, node, _| world.nics(node).into_iter().for_each(|nic| world.fabric().kill(nic, NicDeath::Error)),
        revive,
    );
}

#[test]
fn a_nic_is_a_black_hole_for_a_while() {
    survives(
        |world, node, _| world.nics(node).into_iter().for_each(|nic| world.fabric().kill(nic, NicDeath::BlackHole)),
        revive,
    );
}

fn cut(world: &mut World, from: usize, to: usize, on: bool) {
    for (from, to) in world.nics(from).into_iter().flat_map(|from| world.nics(to).into_iter().map(move |to| (from, to)))
    {
        world.fabric().cut(from, to, on);
    }
}

#[test]
fn the_way_between_two_nics_is_cut_for_a_while() {
    survives(|world, from, to| cut(world, from, to, true), |world, from, to| cut(world, from, to, false));
}

/// Nobody answers any more, and nobody waits for it: fences do not ask.
#[test]
fn a_way_that_stays_cut_keeps_nothing() {
    let mut undelivered = 0;
    for seed in 0..SEEDS {
        let (mut cluster, ..) = busy(seed, |world, from, to| {
            cut(world, from, to, true);
            cut(world, to, from, true);
        });
        undelivered += ends(&mut cluster, seed).undelivered;
    }
    assert!(undelivered > 0, "no fault came while something was under way");
}

#[test]
fn completions_fail_for_a_while() {
    survives(|world, _, _| world.fabric().fail_completions(200_000), |world, _, _| world.fabric().fail_completions(0));
}
