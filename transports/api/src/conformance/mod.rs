//! One suite for every transport: `kvferry_transport::conformance!(MyProvider)` makes a `#[test]` of each case.
//!
//! Two or more transports are opened in one process and polled in turn by one thread. Every byte of every pool is compared with what a
//! naive reading of the definitions says, and every case has a generous deadline.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code, which other crates' tests call")]

mod absent;
mod apart;
mod blocks;
mod case;
mod device;
mod ends;
mod harness;
mod lane;
mod moves;
mod order;
mod refusals;

pub use absent::absent;
pub use apart::apart;
pub use blocks::{block_planes, whole_blocks};
pub use case::{Format, Shape};
pub use device::{Faults, OnDevice, destination_pools, every_pool, source_pools};
pub use ends::*;
pub use harness::{Pair, Party, until};
pub use moves::*;
pub use order::*;
pub use refusals::*;

/// Makes one `#[test]` of each case of the suite, over the given provider. With `if READY => PROVIDER` a case is run only where READY is
/// true; whoever says false prints why.
#[macro_export]
macro_rules! conformance {
    (if $ready:expr => $provider:expr) => {
        $crate::conformance!(@all $ready, $provider; []);
    };
    (@all $ready:expr, $provider:expr; $attributes:tt) => {
        $crate::conformance!(@each $ready, $provider; $attributes
            pulls_every_shape pushes_every_shape pulls_parts_in_any_order pushes_parts_in_any_order
            many_transfers_are_in_flight the_way_to_a_peer_is_shown several_peers_at_once notices_follow_the_bytes a_push_may_come_before_it_is_expected
            a_small_transfer_overtakes_a_large_one sleeping_on_the_descriptor_misses_nothing
            an_unexpected_push_is_refused plans_that_differ_fail_at_both_ends ranges_that_differ_fail_at_both_ends
            programs_outside_the_local_pool_are_not_posted programs_outside_the_remote_pool_are_refused
            unknown_names_are_typed_errors bad_addresses_are_refused bad_keys_are_refused a_wrong_session_key_is_refused
            queues_push_back
            a_cancelled_pull_touches_nothing_more a_cancelled_expectation_touches_nothing_more a_cancelled_push_ends_once
            unmatched_expectations_can_be_cancelled a_fence_ends_everything_with_a_peer a_disconnect_fails_both_ends
            a_dropped_peer_fails_its_transfers_only an_unbound_pool_is_let_go a_pool_outlives_its_user
            a_transfer_follows_its_event a_failed_event_fails_its_transfer a_transfer_that_waits_for_an_event_is_cancelled
        );
    };
    (@each $ready:expr, $provider:expr; $attributes:tt $($case:ident)*) => {
        $(
            $crate::conformance!(@one $ready, $provider; $attributes $case);
        )*
    };
    (@one $ready:expr, $provider:expr; [$(#[$attribute:meta])*] $case:ident) => {
            $(#[$attribute])*
            #[test]
            fn $case() {
                if $ready {
                    $crate::conformance::$case(&$provider);
                }
            }
    };
    ($provider:expr) => {
        $crate::conformance!(if true => $provider);
    };
    // With attributes for every test, such as `#[ignore = "why"]`.
    ($provider:expr; $(#[$attribute:meta])*) => {
        $crate::conformance!(@all true, $provider; [$(#[$attribute])*]);
    };
}
