//! Policies: sorted lists, best first.

use std::sync::Arc;

use kvferry_core::protocol::{GroupView, LeastLoaded, LongestHeldPrefix, Policy, RequestSpec};
use kvferry_core::{GroupId, RequestId};
use proptest::prelude::*;

fn views() -> impl Strategy<Value = Vec<GroupView>> {
    let view = (0..40_u64, 0..4_u64, prop_oneof![Just(0), Just(16), Just(32)]);
    prop::collection::vec(view, 1..8).prop_map(|views| {
        let view = |(group, (load_tokens, handovers, held_tokens))| GroupView {
            group: GroupId(group),
            load_tokens,
            handovers,
            held_tokens,
        };
        (0..).zip(views).map(view).collect()
    })
}

proptest! {
    #[test]
    fn the_best_of_all_is_chosen(views in views(), imbalance in 0..50_u64) {
        let request = RequestSpec { request: RequestId(1), tokens: 64, prefix: Arc::default(), prefix_tokens: 16 };
        let mut by_load = views.clone();
        by_load.sort_by_key(|view| (view.load_tokens, view.handovers, view.group));
        let idlest = Some(by_load[0].group);
        let mut prefix = LongestHeldPrefix { imbalance_tokens_max: imbalance };
        prop_assert_eq!(LeastLoaded.prefill(&request, &views), idlest);
        prop_assert_eq!(LeastLoaded.decode(&request, &views), idlest);
        prop_assert_eq!(prefix.prefill(&request, &views), idlest);
        let chosen = prefix.decode(&request, &views).expect("one of them");
        let chosen = views.iter().find(|view| view.group == chosen).expect("one of them");
        let overloaded = |view: &GroupView| view.load_tokens > by_load[0].load_tokens + imbalance;
        prop_assert!(!overloaded(chosen));
        for other in views.iter().filter(|view| !overloaded(view)) {
            prop_assert!(chosen.held_tokens >= other.held_tokens, "{chosen:?} {other:?}");
            let equal = chosen.held_tokens == other.held_tokens;
            prop_assert!(!equal || (chosen.load_tokens, chosen.group) <= (other.load_tokens, other.group));
        }
        prop_assert_eq!(prefix.decode(&request, &[]), None);
    }
}
