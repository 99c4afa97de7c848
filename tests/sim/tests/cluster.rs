//! Whole clusters: nothing lost, nothing wrong, and the same again from the same seed.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use kvferry_core::Direction;
use kvferry_sim::{Cluster, ClusterOptions, ClusterReport};

const SEEDS: u64 = 20;
const REQUESTS: u64 = 200;

fn run(seed: u64, direction: Direction) -> ClusterReport {
    let options = ClusterOptions { direction: Some(direction), ..ClusterOptions::tiny(seed) };
    let mut cluster = Cluster::new(options).unwrap();
    cluster.submit(REQUESTS, Duration::from_millis(20));
    assert!(cluster.run(Duration::from_secs(60)), "seed {seed}: it does not end: {:?}", cluster.report());
    cluster.rest(Duration::from_secs(2));
    let report = cluster.report();
    let violations = report.violations();
    assert!(violations.is_empty(), "seed {seed}: {violations:#?}");
    report
}

fn all_is_delivered(direction: Direction) {
    let mut hashes = Vec::new();
    for seed in 0..SEEDS {
        let report = run(seed, direction);
        assert_eq!(report.delivered, REQUESTS, "seed {seed}: {:?}", report.reasons);
        assert!(report.bytes > 0);
        let again = run(seed, direction);
        assert_eq!(
            (report.trace_hash, report.events),
            (again.trace_hash, again.events),
            "seed {seed} differs from itself"
        );
        hashes.push(report.trace_hash);
    }
    hashes.sort_unstable();
    hashes.dedup();
    assert_eq!(hashes.len() as u64, SEEDS, "different seeds, different runs");
}

#[test]
fn all_is_pulled() {
    all_is_delivered(Direction::Pull);
}

#[test]
fn all_is_pushed() {
    all_is_delivered(Direction::Push);
}
