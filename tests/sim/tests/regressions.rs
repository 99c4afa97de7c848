//! Seeds that once broke an invariant, each named by what was wrong.
#![allow(clippy::unwrap_used, reason = "tests")]

use kvferry_sim::{Config, Run, Shape};

fn holds(seed: u64, shape: &Shape) {
    let report = Run::new(Config::from_seed(seed, shape).unwrap()).unwrap().to_end(|_| {});
    assert_eq!(report.broken, [], "seed {seed}");
}

/// A scheduler that had started again took credits for handovers whose blocks had come back while there was no scheduler, and kept them.
#[test]
fn credits_that_came_back_unheard_are_not_taken_again() {
    for seed in [46, 127, 297] {
        holds(seed, &Shape::default());
    }
}
