//! Prefixes that delivered requests left behind.

use core::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use kvferry_core::protocol::RequestSpec;

use crate::pattern::mix;

/// Which tokens a stripe holds, and all before it: two stripes with the same key have the same bytes.
pub(crate) type StripeKey = u64;

/// Full prefix blocks by content. A stripe is one block number in every layer group that keeps all tokens; it stays as long as a
/// request uses it, and after that until blocks are short: the longest unused go first, and of a chain the last.
#[derive(Debug, Default)]
pub(crate) struct PrefixCache {
    stripes: BTreeMap<StripeKey, Stripe>,
    unused: BTreeSet<(u64, Reverse<usize>, StripeKey)>,
    /// How many stripes end each prefix hash.
    hashes: BTreeMap<u64, u32>,
    time: u64,
}

#[derive(Debug)]
struct Stripe {
    /// With their layer groups.
    blocks: Vec<(usize, u32)>,
    /// The prefix hashes whose last token it holds.
    hashes: Vec<u64>,
    users: u32,
    used_at: u64,
    depth: usize,
}

/// What a request's whole prefix stripes are.
#[derive(Clone, Debug, Default)]
pub(crate) struct Chain {
    pub(crate) keys: Vec<StripeKey>,
    /// The prefix hashes that end in each stripe.
    pub(crate) hashes: Vec<Vec<u64>>,
}

impl Chain {
    /// The stripes of `stride` tokens that the request's prefix hashes cover.
    pub(crate) fn of(spec: &RequestSpec, stride: u64) -> Chain {
        let each = u64::from(spec.prefix_tokens);
        let covered = each.saturating_mul(spec.prefix.len() as u64).min(spec.tokens);
        let (Some(count), Some(_)) = (covered.checked_div(stride), stride.checked_div(each)) else {
            return Chain::default();
        };
        let mut chain = Chain::default();
        let mut key = mix(each);
        for stripe in 0..count {
            let tokens = stripe * stride..(stripe + 1) * stride;
            let mut ends = Vec::new();
            for index in tokens.start / each..tokens.end.div_ceil(each) {
                let Some(hash) = usize::try_from(index).ok().and_then(|index| spec.prefix.get(index)) else {
                    continue;
                };
                key = mix(mix(key) ^ *hash);
                let end = (index + 1) * each;
                if end > tokens.start && end <= tokens.end {
                    ends.push(*hash);
                }
            }
            chain.keys.push(key);
            chain.hashes.push(ends);
        }
        chain
    }
}

impl PrefixCache {
    /// How many of the first of these stripes are there.
    pub(crate) fn longest(&self, keys: &[StripeKey]) -> usize {
        keys.iter().take_while(|key| self.stripes.contains_key(key)).count()
    }

    /// Begins to use stripes. Returns the blocks of each.
    pub(crate) fn pin(&mut self, keys: &[StripeKey]) -> Vec<Vec<(usize, u32)>> {
        let mut blocks = Vec::with_capacity(keys.len());
        for key in keys {
            let Some(stripe) = self.stripes.get_mut(key) else {
                continue;
            };
            self.unused.remove(&(stripe.used_at, Reverse(stripe.depth), *key));
            stripe.users += 1;
            blocks.push(stripe.blocks.clone());
        }
        blocks
    }

    /// Ends the use of stripes: as if it had not been, or as the latest.
    pub(crate) fn unpin(&mut self, keys: &[StripeKey], touch: bool) {
        self.time += u64::from(touch);
        for key in keys {
            let Some(stripe) = self.stripes.get_mut(key) else {
                continue;
            };
            stripe.users = stripe.users.saturating_sub(1);
            if touch {
                stripe.used_at = self.time;
            }
            if stripe.users == 0 {
                self.unused.insert((stripe.used_at, Reverse(stripe.depth), *key));
            }
        }
    }

    /// Keeps a stripe as used by one request, unless there is one with the same bytes. Returns whether it was kept; adds the prefix
    /// hashes that are held with it to `added`.
    pub(crate) fn insert(
        &mut self,
        key: StripeKey,
        depth: usize,
        blocks: Vec<(usize, u32)>,
        hashes: Vec<u64>,
        added: &mut Vec<u64>,
    ) -> bool {
        if self.stripes.contains_key(&key) {
            return false;
        }
        for hash in &hashes {
            let stripes = self.hashes.entry(*hash).or_insert(0);
            *stripes += 1;
            if *stripes == 1 {
                added.push(*hash);
            }
        }
        self.stripes.insert(key, Stripe { blocks, hashes, users: 1, used_at: self.time, depth });
        true
    }

    /// Stripes that can be evicted.
    pub(crate) fn evictable(&self) -> usize {
        self.unused.len()
    }

    /// Evicts one stripe. Returns its blocks; adds the prefix hashes that are no longer held to `removed`.
    pub(crate) fn evict(&mut self, removed: &mut Vec<u64>) -> Option<Vec<(usize, u32)>> {
        let (_, _, key) = self.unused.pop_first()?;
        let stripe = self.stripes.remove(&key)?;
        for hash in stripe.hashes {
            let left = self.hashes.get_mut(&hash).map(|stripes| {
                *stripes = stripes.saturating_sub(1);
                *stripes
            });
            if left == Some(0) {
                self.hashes.remove(&hash);
                removed.push(hash);
            }
        }
        Some(stripe.blocks)
    }

    /// All blocks in it, with their layer groups.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        self.stripes.values().flat_map(|stripe| stripe.blocks.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvferry_core::RequestId;
    use std::sync::Arc;

    fn spec(tokens: u64, each: u32, prefix: &[u64]) -> RequestSpec {
        RequestSpec { request: RequestId(1), tokens, prefix: Arc::new(prefix.to_vec()), prefix_tokens: each }
    }

    #[test]
    fn stripes_are_covered_whole() {
        // 40 tokens are hashed, in stripes of 16: two are whole.
        let chain = Chain::of(&spec(100, 20, &[1, 2]), 16);
        assert_eq!(chain.keys.len(), 2);
        assert_eq!(chain.hashes, [vec![], vec![1]]);
        // The request is shorter than its hashes say.
        assert_eq!(Chain::of(&spec(31, 16, &[1, 2]), 16).keys.len(), 1);
        let wide = Chain::of(&spec(64, 16, &[1, 2, 3, 4]), 32);
        assert_eq!(wide.hashes, [vec![1, 2], vec![3, 4]]);
        assert!(Chain::of(&spec(64, 0, &[1]), 16).keys.is_empty());
    }

    #[test]
    fn a_chain_is_its_whole_past() {
        let (a, b) = (Chain::of(&spec(64, 16, &[1, 2, 3, 4]), 16), Chain::of(&spec(64, 16, &[1, 9, 3, 4]), 16));
        assert_eq!(a.keys.first(), b.keys.first());
        for index in 1..4 {
            assert_ne!(a.keys.get(index), b.keys.get(index));
        }
    }

    #[test]
    fn the_end_of_the_longest_unused_chain_goes_first() {
        let mut cache = PrefixCache::default();
        let mut added = Vec::new();
        for chain in [[10, 11], [20, 21]] {
            for (depth, key) in chain.into_iter().enumerate() {
                assert!(cache.insert(key, depth, vec![(0, key as u32)], vec![key], &mut added));
                assert!(!cache.insert(key, depth, vec![], vec![key], &mut added));
            }
            cache.unpin(&chain, true);
        }
        assert_eq!(added, [10, 11, 20, 21]);
        cache.pin(&[10]);
        cache.unpin(&[10], true);
        cache.pin(&[20]);
        let mut removed = Vec::new();
        let order: Vec<_> =
            std::iter::from_fn(|| cache.evict(&mut removed)).flatten().map(|(_, block)| block).collect();
        assert_eq!(order, [11, 21, 10]);
        assert_eq!(removed, [11, 21, 10]);
        assert_eq!(cache.longest(&[20, 21]), 1);
    }
}
