//! Who gets what: the scheduler's one replaceable decision.

use core::fmt;

use super::RequestSpec;
use crate::GroupId;

/// What a policy may know of a group that has room for the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupView {
    /// Which group.
    pub group: GroupId,
    /// Tokens that it works on.
    pub load_tokens: u64,
    /// Handovers that it works on.
    pub handovers: u64,
    /// Tokens of this request's prefix that it holds (decode groups).
    pub held_tokens: u64,
}

/// Chooses among groups that all have room. Must be deterministic: the simulator replays it.
pub trait Policy: fmt::Debug + Send {
    /// A prefill group for a request; `candidates` is not empty and ascends by group.
    fn prefill(&mut self, request: &RequestSpec, candidates: &[GroupView]) -> Option<GroupId>;

    /// A decode group for an offer; `candidates` is not empty and ascends by group.
    fn decode(&mut self, request: &RequestSpec, candidates: &[GroupView]) -> Option<GroupId>;
}

/// The group with the fewest tokens in work; the lowest number among equals.
#[derive(Clone, Copy, Debug, Default)]
pub struct LeastLoaded;

impl Policy for LeastLoaded {
    fn prefill(&mut self, _request: &RequestSpec, candidates: &[GroupView]) -> Option<GroupId> {
        least_loaded(candidates)
    }

    fn decode(&mut self, _request: &RequestSpec, candidates: &[GroupView]) -> Option<GroupId> {
        least_loaded(candidates)
    }
}

/// The decode group that holds the longest prefix, unless it is overloaded; then, and for prefill, the least loaded.
#[derive(Clone, Copy, Debug)]
pub struct LongestHeldPrefix {
    /// How many more tokens in work than the least loaded group a group may have and still be preferred for its prefix.
    pub imbalance_tokens_max: u64,
}

impl Default for LongestHeldPrefix {
    fn default() -> Self {
        LongestHeldPrefix { imbalance_tokens_max: 1 << 17 }
    }
}

impl Policy for LongestHeldPrefix {
    fn prefill(&mut self, _request: &RequestSpec, candidates: &[GroupView]) -> Option<GroupId> {
        least_loaded(candidates)
    }

    fn decode(&mut self, _request: &RequestSpec, candidates: &[GroupView]) -> Option<GroupId> {
        let floor = candidates.iter().map(|view| view.load_tokens).min()?;
        let limit = floor.saturating_add(self.imbalance_tokens_max);
        let eligible = candidates.iter().filter(|view| view.load_tokens <= limit);
        eligible
            .min_by_key(|view| (core::cmp::Reverse(view.held_tokens), view.load_tokens, view.group))
            .map(|view| view.group)
    }
}

fn least_loaded(candidates: &[GroupView]) -> Option<GroupId> {
    candidates.iter().min_by_key(|view| (view.load_tokens, view.handovers, view.group)).map(|view| view.group)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::RequestId;

    fn view(group: u32, load_tokens: u64, held_tokens: u64) -> GroupView {
        GroupView { group: GroupId(group), load_tokens, handovers: 0, held_tokens }
    }

    #[test]
    fn prefix_wins_until_the_group_is_overloaded() {
        let request = RequestSpec { request: RequestId(1), tokens: 10, prefix: Arc::default(), prefix_tokens: 512 };
        let mut policy = LongestHeldPrefix { imbalance_tokens_max: 100 };
        assert_eq!(policy.decode(&request, &[view(0, 0, 0), view(1, 90, 512)]), Some(GroupId(1)));
        assert_eq!(policy.decode(&request, &[view(0, 0, 0), view(1, 190, 512)]), Some(GroupId(0)));
        assert_eq!(LeastLoaded.decode(&request, &[view(0, 5, 0), view(1, 4, 0)]), Some(GroupId(1)));
    }
}
