//! Clusters that lose a node: every request still has exactly one outcome, and survivors lose nothing.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use kvferry_core::Direction;
use kvferry_core::protocol::Role;
use kvferry_sim::{Cluster, ClusterOptions, ClusterReport, Dice};

const SEEDS: u64 = 20;
const REQUESTS: u64 = 120;
const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);

/// A cluster with requests on their way, and the time at which something is to happen to it.
fn busy(seed: u64) -> (Cluster, Duration) {
    let mut dice = Dice::new(seed, "test", 0);
    let direction = if dice.below(2) == 0 { Direction::Pull } else { Direction::Push };
    let options = ClusterOptions { direction: Some(direction), ..ClusterOptions::tiny(seed) };
    let mut cluster = Cluster::new(options).unwrap();
    cluster.submit(REQUESTS, Duration::from_millis(10));
    (cluster, Duration::from_nanos(dice.within(500_000..16_000_000)))
}

/// Runs to the end, then a second wave that only finds room if everything came back.
fn ends_well(mut cluster: Cluster, seed: u64) -> ClusterReport {
    let check = |cluster: &mut Cluster| {
        let report = cluster.report();
        let violations = report.violations();
        assert!(violations.is_empty(), "seed {seed}: {violations:#?}\n{:#?}", report.reasons);
        report
    };
    assert!(cluster.run(HOUR), "seed {seed}: it does not end: {:?}", cluster.report());
    cluster.rest(100 * SECOND);
    let first = check(&mut cluster);
    assert_eq!(first.requests, REQUESTS);
    cluster.submit(REQUESTS, Duration::from_millis(10));
    assert!(cluster.run(HOUR), "seed {seed}: the second wave does not end: {:?}", cluster.report());
    cluster.rest(100 * SECOND);
    let both = check(&mut cluster);
    assert_eq!(both.delivered - first.delivered, REQUESTS, "seed {seed}: {:#?}", both.reasons);
    both
}

fn a_crash(role: Role, rank: u32) {
    let mut undelivered = 0;
    for seed in 0..SEEDS {
        let run = || {
            let (mut cluster, at) = busy(seed);
            let node = cluster.node_of(role, 0, rank).unwrap();
            cluster.crash_at(node, at).unwrap();
            ends_well(cluster, seed)
        };
        let report = run();
        assert_eq!(report.trace_hash, run().trace_hash, "seed {seed} differs from itself");
        undelivered += report.undelivered;
    }
    assert!(undelivered > 0, "no crash came while something was under way");
}

#[test]
fn a_prefill_rank_crashes() {
    a_crash(Role::Prefill, 1);
}

#[test]
fn a_prefill_leader_crashes() {
    a_crash(Role::Prefill, 0);
}

#[test]
fn a_decode_rank_crashes() {
    a_crash(Role::Decode, 2);
}

#[test]
fn a_decode_leader_crashes() {
    a_crash(Role::Decode, 0);
}

/// Not polled any more, its links stand: only silence tells.
#[test]
fn a_silent_node_is_declared_lost() {
    for (seed, (role, rank)) in (0..SEEDS)
        .zip([(Role::Prefill, 1), (Role::Decode, 2), (Role::Decode, 0), (Role::Prefill, 0)].into_iter().cycle())
    {
        let (mut cluster, at) = busy(seed);
        let node = cluster.node_of(role, 1, rank).unwrap();
        cluster.pause_at(node, at, None).unwrap();
        ends_well(cluster, seed);
    }
}

/// It wakes up in a world that has gone on without it.
#[test]
fn a_silent_node_comes_back() {
    for (seed, (role, rank)) in (0..SEEDS)
        .zip([(Role::Prefill, 1), (Role::Decode, 2), (Role::Decode, 0), (Role::Prefill, 0)].into_iter().cycle())
    {
        let (mut cluster, at) = busy(seed);
        let node = cluster.node_of(role, 1, rank).unwrap();
        cluster.pause_at(node, at, Some(20 * SECOND)).unwrap();
        ends_well(cluster, seed);
    }
}

/// A group is whole again with a rank's next incarnation.
#[test]
fn a_crashed_rank_is_restarted() {
    for seed in 0..SEEDS {
        let (mut cluster, at) = busy(seed);
        let node = cluster.node_of(Role::Decode, 0, 3).unwrap();
        cluster.crash_at(node, at).unwrap();
        cluster.rest(SECOND);
        cluster.restart(node).unwrap();
        ends_well(cluster, seed);
    }
}

/// Ranks that leave take no request with them: what was offered is fetched, what was not is prefilled by the other group.
#[test]
fn who_leaves_in_time_fails_nothing() {
    for seed in 0..SEEDS {
        let (mut cluster, at) = busy(seed);
        let node = cluster.node_of(Role::Prefill, 0, (seed % 2) as u32).unwrap();
        cluster.drain_at(node, at, 20 * SECOND).unwrap();
        let report = ends_well(cluster, seed);
        assert_eq!((report.undelivered, report.failed), (0, 0), "seed {seed}: {:#?}", report.reasons);
    }
}

/// Who may not wait ends with what it offers, as in a crash.
#[test]
fn who_leaves_at_once_harms_nobody_else() {
    for seed in 0..SEEDS {
        let (mut cluster, at) = busy(seed);
        let node = cluster.node_of(Role::Prefill, 1, (seed % 2) as u32).unwrap();
        cluster.drain_at(node, at, Duration::ZERO).unwrap();
        ends_well(cluster, seed);
    }
}
