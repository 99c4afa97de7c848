//! The KV itself: bytes as a function of content key, token, layer group, layer, tensor, head and place.

use kvferry_core::protocol::RequestSpec;

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
const REQUEST: u64 = 0x7265_7175_6573_7400;
const PREFIX: u64 = 0x7072_6566_6978_0000;

/// A bijection that spreads every bit over the word (splitmix64's finaliser).
pub(crate) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The key of a request as a whole: of its state, and of tokens that no prefix hash covers.
pub(crate) fn request_key(spec: &RequestSpec) -> u64 {
    mix(REQUEST ^ mix(spec.request.0))
}

/// The key of one token's content. Requests that begin with the same prefix hashes have the same keys there.
pub(crate) fn token_key(spec: &RequestSpec, token: u64) -> u64 {
    let index = token.checked_div(u64::from(spec.prefix_tokens)).and_then(|index| usize::try_from(index).ok());
    match index.and_then(|index| spec.prefix.get(index)) {
        Some(hash) => mix(PREFIX ^ mix(*hash)),
        None => request_key(spec),
    }
}

/// Where a run of bytes belongs, apart from its token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) group: usize,
    pub(crate) layer: u32,
    pub(crate) tensor: usize,
    pub(crate) head: u32,
}

impl Place {
    /// A different number for every place: groups, layers and tensors are far below the widths given here.
    fn code(self) -> u64 {
        (self.group as u64) << 52 | u64::from(self.layer) << 40 | (self.tensor as u64) << 32 | u64::from(self.head)
    }
}

/// What all runs of one token have in common.
pub(crate) fn token_seed(key: u64, token: u64) -> u64 {
    mix(key.wrapping_add(token.wrapping_mul(GOLDEN)))
}

/// The number that the bytes of one head of one token follow from.
pub(crate) fn run_state(token_seed: u64, place: Place) -> u64 {
    mix(token_seed.wrapping_add(mix(place.code())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvferry_core::RequestId;
    use kvferry_transport::write_known;
    use std::collections::BTreeSet;
    use std::sync::Arc;

    fn spec(request: u64, prefix: &[u64]) -> RequestSpec {
        RequestSpec { request: RequestId(request), tokens: 64, prefix: Arc::new(prefix.to_vec()), prefix_tokens: 16 }
    }

    #[test]
    fn every_coordinate_has_bytes_of_its_own() {
        let mut runs = BTreeSet::new();
        let mut count = 0;
        for request in 0..3 {
            for token in 0..5 {
                let seed = token_seed(token_key(&spec(request, &[]), token), token);
                for (group, layer, tensor, head) in (0..2usize).flat_map(|g| {
                    (0..4).flat_map(move |l| (0..2usize).flat_map(move |t| (0..4).map(move |h| (g, l, t, h))))
                }) {
                    let mut run = [0; 19];
                    write_known(&mut run, run_state(seed, Place { group, layer, tensor, head }));
                    assert!(runs.insert(run), "request {request} token {token} {group} {layer} {tensor} {head}");
                    count += 1;
                }
            }
        }
        assert_eq!(count, 3 * 5 * 2 * 4 * 2 * 4);
    }

    #[test]
    fn equal_prefixes_have_equal_keys_and_tails_do_not() {
        let (a, b) = (spec(1, &[7, 8]), spec(2, &[7, 9]));
        assert_eq!(token_key(&a, 15), token_key(&b, 15));
        assert_ne!(token_key(&a, 16), token_key(&b, 16));
        assert_ne!(token_key(&a, 32), token_key(&b, 32));
        assert_eq!(token_key(&a, 32), request_key(&a));
        // A request's number and a hash are different things.
        assert_ne!(token_key(&spec(7, &[]), 0), token_key(&spec(1, &[7]), 0));
        assert_eq!(token_key(&RequestSpec { prefix_tokens: 0, ..spec(1, &[7]) }, 0), request_key(&a));
    }
}
