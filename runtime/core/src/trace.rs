//! Where a request belongs in somebody's distributed trace: W3C Trace Context, level 2.

use core::fmt;
use core::num::{NonZeroU64, NonZeroU128};
use core::str::FromStr;

use thiserror::Error;

/// Bytes of a context on the wire.
pub(crate) const TRACE_BYTES: usize = 25;
/// Of a `traceparent` of version 00.
const TEXT_BYTES: usize = 55;
/// `sampled` and `random`; a context that is handed on has no other flags.
const KNOWN_FLAGS: u8 = 0b11;

/// A span of a trace, as the `traceparent` header names it: `00-<trace>-<span>-<flags>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TraceContext {
    trace: NonZeroU128,
    span: NonZeroU64,
    flags: u8,
}

/// Why a text is no `traceparent`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{text}` is no traceparent: {why}; write 00-<32 hex digits>-<16 hex digits>-<2 hex digits>, in lower case")]
pub struct TraceError {
    /// Its beginning.
    text: String,
    why: &'static str,
}

impl TraceContext {
    /// The trace, never 0.
    pub fn trace(&self) -> u128 {
        self.trace.get()
    }

    /// The span, never 0.
    pub fn span(&self) -> u64 {
        self.span.get()
    }

    /// Whether whoever began the trace may have recorded it.
    pub fn is_sampled(&self) -> bool {
        self.flags & 1 == 1
    }

    /// A span below this one. Its number follows from this context and from what it is `of`, so that a simulated run repeats it.
    pub(crate) fn child(&self, of: &[u64]) -> TraceContext {
        let trace = self.trace.get();
        let seed = [(trace >> 64) as u64, trace as u64, self.span.get()];
        let span = seed.iter().chain(of).fold(0, |hash, word| mix(hash ^ word));
        TraceContext { span: NonZeroU64::new(span).unwrap_or(NonZeroU64::MIN), ..*self }
    }

    pub(crate) fn to_bytes(self) -> [u8; TRACE_BYTES] {
        let mut bytes = [0; TRACE_BYTES];
        let parts = self.trace.get().to_be_bytes().into_iter().chain(self.span.get().to_be_bytes()).chain([self.flags]);
        bytes.iter_mut().zip(parts).for_each(|(byte, part)| *byte = part);
        bytes
    }

    /// `None` where a number is 0 or a flag is unknown: nobody who follows the protocol writes that.
    pub(crate) fn from_bytes(bytes: &[u8; TRACE_BYTES]) -> Option<TraceContext> {
        let (trace, rest) = bytes.split_first_chunk::<16>()?;
        let (span, flags) = rest.split_first_chunk::<8>()?;
        let flags = flags.first().copied().filter(|flags| flags & !KNOWN_FLAGS == 0)?;
        let trace = NonZeroU128::new(u128::from_be_bytes(*trace))?;
        Some(TraceContext { trace, span: NonZeroU64::new(u64::from_be_bytes(*span))?, flags })
    }
}

/// The finaliser of SplitMix64.
fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

impl FromStr for TraceContext {
    type Err = TraceError;

    /// Of a version that is not known, what version 00 has is taken, as the recommendation asks.
    fn from_str(text: &str) -> Result<TraceContext, TraceError> {
        let no = |why| TraceError { text: text.chars().take(64).collect(), why };
        let known = text.get(..TEXT_BYTES).ok_or_else(|| no("it is too short"))?;
        let rest = text.get(TEXT_BYTES..).unwrap_or_default();
        let mut parts = known.split('-');
        let mut part = |digits: usize| {
            let part = parts.next().filter(|part| part.len() == digits);
            let lower = |digit: u8| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit);
            part.filter(|part| part.bytes().all(lower))
                .ok_or_else(|| no("a part is not of that many lower-case hex digits"))
        };
        let (version, trace, span, flags) = (part(2)?, part(32)?, part(16)?, part(2)?);
        match version {
            "ff" => return Err(no("there is no version ff")),
            "00" if !rest.is_empty() => return Err(no("version 00 has nothing behind the flags")),
            _ if !rest.is_empty() && !rest.starts_with('-') => return Err(no("its flags do not end")),
            _ => {}
        }
        let (trace, span) = (u128::from_str_radix(trace, 16).ok(), u64::from_str_radix(span, 16).ok());
        let flags = u8::from_str_radix(flags, 16).unwrap_or(0) & KNOWN_FLAGS;
        Ok(TraceContext {
            trace: trace.and_then(NonZeroU128::new).ok_or_else(|| no("its trace is 0"))?,
            span: span.and_then(NonZeroU64::new).ok_or_else(|| no("its span is 0"))?,
            flags,
        })
    }
}

/// As version 00.
impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace, self.span, self.flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn what_is_read_is_written_again() {
        let context: TraceContext = PARENT.parse().expect("the recommendation's own");
        assert_eq!(context.to_string(), PARENT);
        assert_eq!((context.trace() >> 64) as u64, 0x0af7_6519_16cd_43dd);
        assert_eq!((context.span(), context.is_sampled()), (0xb7ad_6b71_6920_3331, true));
        assert_eq!(TraceContext::from_bytes(&context.to_bytes()), Some(context));
        let later = PARENT.replacen("00", "cc", 1);
        assert_eq!(format!("{later}-more").parse(), Ok(context), "a later version may have more");
        assert_eq!(later.parse(), Ok(context));
        let flags = format!("{}fe", PARENT.trim_end_matches("01"));
        assert_eq!(
            flags.parse::<TraceContext>().map(|context| context.flags),
            Ok(2),
            "unknown flags are not handed on"
        );
    }

    #[test]
    fn what_is_none_is_refused() {
        let zero = "0".repeat(32);
        for wrong in [
            "",
            "00",
            &PARENT[..54],
            &format!("{PARENT}-"),
            &format!("{PARENT}0"),
            &PARENT.to_uppercase(),
            &PARENT.replacen("00", "ff", 1),
            &format!("{}x", PARENT.replacen("00", "cc", 1)),
            &PARENT.replace("0af7651916cd43dd8448eb211c80319c", &zero),
            &PARENT.replace("b7ad6b7169203331", &zero[..16]),
            &PARENT.replace('-', "_"),
            &PARENT.replacen("0a", "+a", 1),
            &"é".repeat(40),
        ] {
            let error = wrong.parse::<TraceContext>().expect_err(wrong).to_string();
            assert!(error.contains("00-<32 hex digits>"), "{error}");
        }
        let bytes = PARENT.parse::<TraceContext>().expect("parses").to_bytes();
        for (from, to) in [(0, 16), (16, 24)] {
            let mut none = bytes;
            none[from..to].fill(0);
            assert_eq!(TraceContext::from_bytes(&none), None);
        }
        let mut flags = bytes;
        flags[24] = 4;
        assert_eq!(TraceContext::from_bytes(&flags), None);
    }

    #[test]
    fn spans_below_one_are_told_apart() {
        let parent: TraceContext = PARENT.parse().expect("parses");
        let children = [parent.child(&[1, 2]), parent.child(&[2, 1]), parent.child(&[1]), parent.child(&[])];
        let spans: std::collections::BTreeSet<u64> = children.iter().chain([&parent]).map(TraceContext::span).collect();
        assert_eq!(spans.len(), 5);
        assert!(children.iter().all(|child| (child.trace, child.flags) == (parent.trace, parent.flags)));
        assert_eq!(parent.child(&[1, 2]), children[0], "repeatable");
    }
}
