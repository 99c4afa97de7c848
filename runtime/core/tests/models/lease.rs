//! A lease: an expiry that only a living lease can move, and a holder who stops before the owner does.

use core::time::Duration;

use kvferry_core::Moment;
use kvferry_core::protocol::{Lease, LeaseTerms};
use proptest::prelude::*;

proptest! {
    #[test]
    fn it_lives_from_renewal_to_renewal(
        duration in 1..1_000_u64,
        operations in prop::collection::vec((0..600_u64, any::<bool>()), 1..80),
    ) {
        let terms = LeaseTerms { duration: Duration::from_nanos(duration), drift_ppm: 0 };
        let mut lease = Lease::granted(Moment(0), &terms);
        // The model: every moment that some renewal in time covers.
        let mut granted = vec![0];
        let mut now = 0;
        for (passes, renews) in operations {
            now += passes;
            let alive = granted.iter().any(|from| (*from..from + duration).contains(&now));
            prop_assert_eq!(lease.is_alive(Moment(now)), alive);
            if renews {
                prop_assert_eq!(lease.renew(Moment(now)), alive);
                if alive {
                    granted.push(now);
                }
            }
            let last = granted.iter().max().expect("the grant itself");
            prop_assert_eq!(lease.expires(), Moment(last + duration));
        }
    }

    /// However far the two clocks drift apart within the margin: while the holder relies on it, the owner keeps it.
    #[test]
    fn the_holder_stops_first(
        duration in 1_000..10_000_000_000_u64,
        drift_ppm in 0..500_000_u32,
        share in 0..=1_000_u64,
        under_way in 1..1_000_u64,
        elapsed in 0..1_100_u64,
    ) {
        let terms = LeaseTerms { duration: Duration::from_nanos(duration), drift_ppm };
        let held = Lease::held(Moment(0), &terms);
        let owned = Lease::granted(Moment(under_way), &terms);
        let true_nanos = duration / 1_000 * elapsed;
        // The holder's clock is slow by some share of the margin: the worst that is allowed.
        let slow = u128::from(true_nanos) * u128::from(drift_ppm) * u128::from(share) / 1_000_000_000;
        let holders = Moment(true_nanos - u64::try_from(slow).expect("less than the whole"));
        prop_assert!(!held.is_alive(holders) || owned.is_alive(Moment(true_nanos)));
        prop_assert!(terms.renewal() * 3 <= terms.duration);
    }
}
