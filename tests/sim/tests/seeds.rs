//! A few seeds with everything that may go wrong; many more run in `.ci/run`.
#![allow(clippy::unwrap_used, reason = "tests")]

use kvferry_sim::{Config, FaultSet, Run, RunReport, Shape, rerun};

fn run(seed: u64, shape: &Shape) -> (Config, RunReport) {
    let config = Config::from_seed(seed, shape).unwrap();
    let report = Run::new(config.clone()).unwrap().to_end(|_| {});
    assert!(report.broken.is_empty(), "seed {seed}: {:#?}", report.broken);
    assert_eq!(report.delivered + report.failed + report.cancelled, report.requests, "seed {seed}");
    (config, report)
}

#[test]
fn without_faults_everything_is_delivered() {
    let shape = Shape { faults: FaultSet::none(), ..Shape::default() };
    for seed in 0..10 {
        let (_, report) = run(seed, &shape);
        assert_eq!(report.delivered, report.requests, "seed {seed}: {:?}", report.reasons);
    }
}

#[test]
fn a_seed_is_the_same_run_again() {
    let mut hashes = std::collections::BTreeSet::new();
    for seed in 0..4 {
        let (config, report) = run(seed, &Shape::default());
        assert_eq!(rerun(&config, &report).unwrap(), None, "seed {seed}");
        hashes.insert(report.trace_hash);
    }
    assert_eq!(hashes.len(), 4, "different seeds, different runs");
}
