//! Each invariant finds the bug that is planted to break it, within 100 seeds; and nobody finds anything where nothing is planted.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;

use kvferry_sim::{Config, FaultSet, Plant, Run, Shape, rerun};

const SEEDS: u64 = 100;

/// Which invariants find a planted bug first, and in which seed.
fn caught(plant: Plant, faults: &str, invariant: &str) {
    let mut first: BTreeMap<&'static str, u64> = BTreeMap::new();
    let faults = faults.parse::<FaultSet>().unwrap();
    let shape = Shape { prefill: 4, decode: 4, requests: 80, faults, plant: Some(plant), ..Shape::default() };
    for seed in 0..SEEDS {
        let report = Run::new(Config::from_seed(seed, &shape).unwrap()).unwrap().to_end(|_| {});
        for broken in &report.broken {
            first.entry(broken.invariant).or_insert(seed);
        }
        if first.contains_key(invariant) {
            let healthy = Shape { plant: None, ..shape };
            let report = Run::new(Config::from_seed(seed, &healthy).unwrap()).unwrap().to_end(|_| {});
            assert_eq!(report.broken, [], "seed {seed} is broken without the plant, too");
            println!("{plant}: {invariant} in seed {seed}; all that found it: {first:?}");
            return;
        }
    }
    assert!(first.contains_key(invariant), "{plant}: {invariant} did not find it in {SEEDS} seeds, but {first:?}");
}

#[test]
fn i1_finds_engines_that_do_not_wait_for_quarantine() {
    caught(Plant::HastyEngine, "all", "I1");
}

#[test]
fn i2_finds_nics_that_bring_half_of_it() {
    caught(Plant::HalfNic, "none", "I2");
}

#[test]
fn i3_finds_leaders_of_two_minds() {
    caught(Plant::TwoOutcomes, "none", "I3");
}

#[test]
fn i3_finds_answers_that_nobody_decided() {
    caught(Plant::FalseAnswers, "none", "I3");
}

#[test]
fn i4_finds_engines_that_keep_silent() {
    caught(Plant::SilentEngine, "none", "I4");
}

#[test]
fn i5_finds_alarms_that_never_ring() {
    caught(Plant::LostAlarms, "crashes,leader-loss,cancels", "I5");
}

#[test]
fn i6_finds_nodes_that_keep_their_epoch() {
    caught(Plant::OldEpoch, "crashes,leader-loss", "I6");
}

#[test]
fn i7_finds_engines_that_are_overbooked() {
    caught(Plant::OverbookedEngine, "none", "I7");
}

#[test]
fn i8_finds_a_hash_map_that_is_iterated() {
    let shape = Shape {
        prefill: 4,
        decode: 4,
        requests: 40,
        faults: FaultSet::none(),
        plant: Some(Plant::RandomOrder),
        ..Shape::default()
    };
    let config = Config::from_seed(0, &shape).unwrap();
    let first = Run::new(config.clone()).unwrap().to_end(|_| {});
    let divergence = rerun(&config, &first).unwrap();
    println!("{}: {divergence:?}", Plant::RandomOrder);
    assert!(divergence.is_some());
}

#[test]
fn i9_finds_blocks_that_are_given_out_twice() {
    caught(Plant::DoubleBooking, "none", "I9");
}

#[test]
fn i10_finds_clocks_that_race() {
    caught(Plant::RacingClock, "short-leases,pauses", "I10");
}
