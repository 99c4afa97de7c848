//! Each invariant finds the bug that is planted to break it, within 100 seeds; and nobody finds anything where nothing is planted.
//!
//! `tests/README.md` has the table of them; `KVFERRY_WRITE_CONTROLS=1 cargo test --release -p kvferry-sim --test controls` writes it anew.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};

use kvferry_sim::{Config, Plant, Run, RunReport, Shape, rerun};

const SEEDS: u64 = 100;

/// A planted bug, faults that make it matter, and the invariant that it breaks.
type Control = (Plant, &'static str, &'static str);

const CONTROLS: [Control; 13] = [
    (Plant::HastyEngine, "all", "I1"),
    (Plant::HalfNic, "none", "I2"),
    (Plant::TwoOutcomes, "none", "I3"),
    (Plant::FalseAnswers, "none", "I3"),
    (Plant::SilentEngine, "none", "I4"),
    (Plant::LostAlarms, "crashes,leader-loss,cancels", "I5"),
    (Plant::OldEpoch, "crashes,leader-loss", "I6"),
    (Plant::OverbookedEngine, "none", "I7"),
    (Plant::RandomOrder, "none", "I8"),
    (Plant::ProcessOrder, "none", "I8"),
    (Plant::DoubleBooking, "none", "I9"),
    (Plant::TwoConsumers, "none", "I9"),
    (Plant::RacingClock, "short-leases,pauses", "I10"),
];

fn control(plant: Plant) -> Control {
    *CONTROLS.iter().find(|(of, ..)| *of == plant).unwrap()
}

fn shape((plant, faults, _): Control) -> Shape {
    Shape {
        prefill: 4,
        decode: 4,
        rails: Some(1),
        requests: 80,
        faults: faults.parse().unwrap(),
        plant: Some(plant),
        ..Shape::default()
    }
}

fn run(seed: u64, shape: &Shape) -> (Config, RunReport) {
    let config = Config::from_seed(seed, shape).unwrap();
    let report = Run::new(config.clone()).unwrap().to_end(|_| {});
    (config, report)
}

/// The first seed in which the invariant finds the planted bug, and what it says; without the bug, that seed is fine.
fn caught(plant: Plant) -> (u64, String) {
    let control = control(plant);
    let (_, _, invariant) = control;
    let shape = shape(control);
    for seed in 0..SEEDS {
        let (_, report) = run(seed, &shape);
        if let Some(broken) = report.broken.iter().find(|broken| broken.invariant == invariant) {
            let (_, healthy) = run(seed, &Shape { plant: None, ..shape });
            assert_eq!(healthy.broken, [], "seed {seed} is broken without the plant, too");
            println!("{plant}: seed {seed}: {broken}");
            return (seed, broken.what.clone());
        }
    }
    panic!("{plant}: {invariant} did not find it in {SEEDS} seeds");
}

#[test]
fn i1_finds_engines_that_do_not_wait_for_quarantine() {
    caught(Plant::HastyEngine);
}

#[test]
fn i2_finds_nics_that_bring_half_of_it() {
    caught(Plant::HalfNic);
}

#[test]
fn i3_finds_leaders_of_two_minds() {
    caught(Plant::TwoOutcomes);
}

#[test]
fn i3_finds_answers_that_nobody_decided() {
    caught(Plant::FalseAnswers);
}

#[test]
fn i4_finds_engines_that_keep_silent() {
    caught(Plant::SilentEngine);
}

#[test]
fn i5_finds_alarms_that_never_ring() {
    caught(Plant::LostAlarms);
}

#[test]
fn i6_finds_nodes_that_keep_their_epoch() {
    caught(Plant::OldEpoch);
}

#[test]
fn i7_finds_engines_that_are_overbooked() {
    caught(Plant::OverbookedEngine);
}

/// Whether a run of that seed differs from itself in this process.
fn differs(plant: Plant, seed: u64) -> bool {
    let (config, report) = run(seed, &shape(control(plant)));
    let divergence = rerun(&config, &report).unwrap();
    println!("{plant}: {divergence:?}");
    divergence.is_some()
}

#[test]
fn i8_finds_a_hash_map_that_is_iterated() {
    assert!(differs(Plant::RandomOrder, 0));
}

/// Why runs are compared with those of another process, too: `simulate.rs` has this one found there.
#[test]
fn i8_does_not_find_here_what_is_the_same_throughout_a_process() {
    assert!(!differs(Plant::ProcessOrder, 0));
}

#[test]
fn i9_finds_blocks_that_are_given_out_twice() {
    let (_, what) = caught(Plant::DoubleBooking);
    assert!(what.contains("ClaimedTwice"), "{what}");
}

#[test]
fn i9_finds_offers_with_two_consumers() {
    let (_, what) = caught(Plant::TwoConsumers);
    assert!(what.contains("is paired as") && what.contains("which lives"), "{what}");
}

#[test]
fn i10_finds_clocks_that_race() {
    caught(Plant::RacingClock);
}

const README: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");
const HEAD: &str = "| planted bug | `--plant` | `--faults` | caught by | within seeds | seen by, too |\n| --- | --- | --- | --- | --- | --- |\n";
/// The invariant that needs to run a seed more than once.
const DETERMINISM: &str = "I8";

/// By invariant, the number of seeds from 0 on that it took to find something.
fn needed(control: Control, seeds: u64) -> BTreeMap<&'static str, u64> {
    let (plant, _, invariant) = control;
    if invariant == DETERMINISM {
        // One seed shows it, here or in the next process.
        assert_eq!(differs(plant, 0), plant == Plant::RandomOrder);
        return BTreeMap::from([(DETERMINISM, 1)]);
    }
    let mut needed = BTreeMap::new();
    for seed in 0..seeds {
        for broken in run(seed, &shape(control)).1.broken {
            needed.entry(broken.invariant).or_insert(seed + 1);
        }
    }
    needed
}

/// A row for a bug: seeds are rounded up, so that not every change of the runtime makes another table.
fn row(control: Control) -> String {
    let (plant, faults, invariant) = control;
    let most = needed(control, SEEDS);
    let within = [1, 2, 5, 10, 20, 50, SEEDS].into_iter().find(|within| *within >= most[invariant]).unwrap();
    let others = most.iter().filter(|(other, seeds)| **other != invariant && **seeds <= within);
    let others: Vec<&str> = others.map(|(other, _)| *other).collect();
    format!("| {plant} | `{}` | `{faults}` | {invariant} | {within} | {} |\n", plant.name(), others.join(", "))
}

#[test]
fn the_table_is_true() {
    assert!(Plant::ALL.iter().copied().eq(CONTROLS.iter().map(|(plant, ..)| *plant)), "every bug has a control");
    let readme = std::fs::read_to_string(README).unwrap();
    let (before, rest) = readme.split_once(HEAD).expect("tests/README.md has lost the table of planted bugs");
    let rows: Vec<&str> = rest.lines().take_while(|line| line.starts_with('|')).collect();
    if std::env::var_os("KVFERRY_WRITE_CONTROLS").is_some() {
        let after: String = rest.split_inclusive('\n').skip(rows.len()).collect();
        let rows: String = CONTROLS.into_iter().map(row).collect();
        std::fs::write(README, format!("{before}{HEAD}{rows}{after}")).unwrap();
        return;
    }
    assert_eq!(rows.len(), CONTROLS.len(), "a row for every planted bug: {rows:#?}");
    for (control, row) in CONTROLS.into_iter().zip(rows) {
        let (plant, faults, invariant) = control;
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [what, name, with, by, within, others] = cells[..] else { panic!("{row}") };
        let told = (what, name, with, by);
        assert_eq!(told, (&*plant.to_string(), &*format!("`{}`", plant.name()), &*format!("`{faults}`"), invariant));
        let needed = needed(control, within.parse().unwrap());
        let stated: BTreeSet<&str> = others.split(", ").filter(|other| !other.is_empty()).chain([by]).collect();
        let found: BTreeSet<&str> = needed.keys().copied().collect();
        assert_eq!(stated, found, "{row}: write the table anew");
    }
}
