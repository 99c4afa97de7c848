//! The protocol as a whole, in random worlds: what must hold at the end of each, whatever went wrong in it.

mod world;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 0, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_world_ends_well(seed in any::<u64>(), faulty in prop::bool::weighted(0.8)) {
        let violations = world::run(seed, faulty);
        prop_assert!(violations.is_empty(), "world::run({seed}, {faulty}): {violations:#?}");
    }
}

/// Worlds that once ended badly.
const ENDED_BADLY: &[u64] = &[
    // An outcome reached a scheduler that had just started before its handover was announced, and was forgotten when that one was gone, too.
    201_801_970_777_666_356,
    // A leader that was declared lost delivered after the group that had the request next: the check counted it.
    1_199_989,
    1_229_156,
];

#[test]
fn what_went_wrong_once_does_not_again() {
    for seed in ENDED_BADLY.iter().copied() {
        let violations = world::run(seed, true);
        assert!(violations.is_empty(), "world::run({seed}, true): {violations:#?}");
    }
}

/// The worlds `KVFERRY_WORLDS=first..last`; without it, a few: for long searches in a release build.
#[test]
fn every_faulty_world_of_a_range_ends_well() {
    let range = std::env::var("KVFERRY_WORLDS").unwrap_or_else(|_| "0..100".to_owned());
    let (first, last) = range.split_once("..").expect("first..last");
    let number = |word: &str| word.parse::<u64>().expect("a number");
    let bad: Vec<String> = (number(first)..number(last))
        .filter_map(|seed| {
            let violations = world::run(seed, true);
            (!violations.is_empty()).then(|| format!("world::run({seed}, true): {violations:#?}"))
        })
        .take(5)
        .collect();
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}
