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
