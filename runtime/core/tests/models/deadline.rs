//! Deadlines: what the slowest and the fastest rate that was ever observed allow.

use core::time::Duration;

use kvferry_core::Moment;
use kvferry_core::protocol::{Deadline, DeadlineTerms, Pace};
use proptest::prelude::*;

proptest! {
    #[test]
    fn an_allowance_lies_between_those_of_the_extreme_rates(
        floor_ms in 0..2_000_u64,
        cap_ms in 0..100_000_u64,
        slack in 1..10_u32,
        initial in 1..10_000_000_000_u64,
        observed in prop::collection::vec((0..1_u64 << 34, 0..10_000_000_000_u64), 0..20),
        (bytes, queued) in (0..1_u64 << 36, 0..1_u64 << 36),
    ) {
        let (floor, cap) = (Duration::from_millis(floor_ms), Duration::from_millis(cap_ms));
        let terms = DeadlineTerms { floor, cap, initial_bytes_per_second: initial, slack, ..DeadlineTerms::default() };
        let mut pace = Pace::new(terms);
        let mut rates = vec![initial as f64];
        for (bytes, nanos) in observed {
            pace.observe(bytes, Duration::from_nanos(nanos));
            if bytes >= 1 << 20 && nanos > 0 {
                rates.push(bytes as f64 * 1e9 / nanos as f64);
            }
        }
        let fastest = rates.iter().copied().fold(0.0, f64::max);
        // Whole numbers of bytes per second are kept: a little is lost at every observation.
        let slowest = (rates.iter().copied().fold(f64::INFINITY, f64::min) - 16.0 * rates.len() as f64).max(1.0);
        let seconds = |rate: f64| {
            let expected = (bytes as f64 + queued as f64) / rate * f64::from(slack);
            (floor.as_secs_f64() + expected).min(cap.max(floor).as_secs_f64())
        };
        let allowed = pace.allowance(bytes, queued);
        prop_assert!(allowed >= floor && allowed <= cap.max(floor));
        prop_assert!(allowed.as_secs_f64() >= seconds(fastest) * 0.999 - 1e-6, "{allowed:?} {}", seconds(fastest));
        prop_assert!(allowed.as_secs_f64() <= seconds(slowest) * 1.001 + 1e-6, "{allowed:?} {}", seconds(slowest));
        prop_assert!(pace.allowance(bytes + 1, queued) >= allowed && pace.allowance(bytes, queued + 1) >= allowed);
        let slowest_work = pace.allowance(u64::MAX, u64::MAX);
        prop_assert!(terms.backstop() > slowest_work.saturating_add(terms.prefill), "ranks give up before their leader");
    }

    #[test]
    fn a_deadline_counts_from_its_anchor(since in 0..1_u64 << 60, allowance in 0..1_u64 << 40, later in 0..1_u64 << 41) {
        let deadline = Deadline::after(Moment(since), Duration::from_nanos(allowance));
        let now = Moment(since + later);
        prop_assert_eq!(deadline.has_passed(now), later >= allowance);
        prop_assert_eq!(deadline.waited_ms(now), later / 1_000_000);
        prop_assert_eq!(deadline.waited_ms(Moment(since.saturating_sub(later))), 0);
    }
}
