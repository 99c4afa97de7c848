//! What is refused of foreign bytes while they are read, by the limits of what they stand for.

use core::fmt;
use core::marker::PhantomData;
use std::sync::Arc;

use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::limits;

/// Tokens of one request.
pub(super) fn tokens<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let tokens = u64::deserialize(deserializer)?;
    if tokens > limits::TOKENS_MAX {
        return Err(D::Error::custom(format_args!("{tokens} tokens; at most {} are accepted", limits::TOKENS_MAX)));
    }
    Ok(tokens)
}

/// Prefix hashes of one request.
pub(super) fn prefix<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<Vec<u64>>, D::Error> {
    capped::<_, _, { limits::PREFIX_HASHES_MAX }>(deserializer).map(Arc::new)
}

/// Requests or handovers that one message names.
pub(super) fn named<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    capped::<_, _, { limits::NAMED_MAX }>(deserializer)
}

/// Handovers that a rank has, each of a request with so many tokens.
pub(super) fn holding<'de, D, H, R>(deserializer: D) -> Result<Vec<(H, R, u64)>, D::Error>
where
    D: Deserializer<'de>,
    H: Deserialize<'de>,
    R: Deserialize<'de>,
{
    let held: Vec<(H, R, Tokens)> = named(deserializer)?;
    Ok(held.into_iter().map(|(handover, request, Tokens(tokens))| (handover, request, tokens)).collect())
}

#[derive(Deserialize)]
struct Tokens(#[serde(deserialize_with = "tokens")] u64);

/// Shares of one step.
pub(super) fn shares<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    capped::<_, _, { limits::SHARES_MAX }>(deserializer)
}

/// Offers or handovers that one message describes.
pub(super) fn standing<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    capped::<_, _, { limits::STANDING_MAX }>(deserializer)
}

/// A sequence of at most `MAX` elements: a longer one is refused by the length that it announces.
pub(crate) fn capped<'de, D, T, const MAX: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct Capped<T, const MAX: usize>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Capped<T, MAX> {
        type Value = Vec<T>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(formatter, "at most {MAX} elements")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Vec<T>, A::Error> {
            if let Some(announced) = sequence.size_hint().filter(|announced| *announced > MAX) {
                return Err(A::Error::invalid_length(announced, &self));
            }
            let mut elements = Vec::new();
            while let Some(element) = sequence.next_element()? {
                if elements.len() == MAX {
                    return Err(A::Error::invalid_length(MAX + 1, &self));
                }
                elements.push(element);
            }
            Ok(elements)
        }
    }

    deserializer.deserialize_seq(Capped::<T, MAX>(PhantomData))
}
