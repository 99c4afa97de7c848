//! The answers, as they are printed.

use serde::Serialize;

/// What one policy makes of the workload.
///
/// Times are of delivered requests, in milliseconds of virtual time, and add up: `queue + prefill + room + post + wire + notice` and the
/// time of one decode step make `first_decode_token`; there are none when nothing was delivered. Of a group's ranks the last counts each time.
#[derive(Clone, Debug, Serialize)]
pub struct PolicyReport {
    /// Its name.
    pub policy: String,
    /// Requests that were submitted.
    pub requests: u64,
    /// Delivered.
    pub delivered: u64,
    /// Failed.
    pub failed: u64,
    /// Without an end when time was up.
    pub unfinished: u64,
    /// Why the first of those failed.
    pub first_failure: Option<String>,
    /// Virtual time from the first arrival to the last delivery.
    pub seconds: f64,
    /// Delivered requests over that time.
    pub requests_per_second: f64,
    /// Bytes of KV that moved.
    pub bytes: u64,
    /// Those over that time.
    pub gigabytes_per_second: f64,
    /// Of all prompt tokens, the share that the decode side held already.
    pub prefix_hit_rate: f64,
    /// The prefill side's NICs, outwards.
    pub prefill_nics: NicUse,
    /// The decode side's NICs, inwards.
    pub decode_nics: NicUse,
    /// From arrival until the prefill group computes: waiting in the scheduler, and behind other prompts.
    pub queue_ms: Option<Quantiles>,
    /// From there until the last layer is ready.
    pub prefill_ms: Option<Quantiles>,
    /// From there until the decode group has blocks for it; 0 where it had them before.
    pub room_ms: Option<Quantiles>,
    /// From the later of ready and placed until the last transfer was posted to a NIC.
    pub post_ms: Option<Quantiles>,
    /// From there until the last byte is in place.
    pub wire_ms: Option<Quantiles>,
    /// From there until the decode engine is told that it is delivered.
    pub notice_ms: Option<Quantiles>,
    /// From arrival until the first token after the handover is decoded.
    pub first_decode_token_ms: Option<Quantiles>,
    /// Events of the simulator's kernel and fabric.
    pub events: u64,
}

/// For which share of the time wires were busy.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct NicUse {
    /// Over all NICs of that side.
    pub mean_utilisation: f64,
    /// Of the busiest.
    pub max_utilisation: f64,
}

/// Of a distribution, by the nearest rank.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Quantiles {
    /// Half are below.
    pub p50: f64,
    /// 99 of 100 are below.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Quantiles {
    /// Of nanoseconds, in milliseconds; `None` of none.
    pub(super) fn of(mut nanos: Vec<u64>) -> Option<Self> {
        if nanos.is_empty() {
            return None;
        }
        nanos.sort_unstable();
        let at = |per_cent: usize| {
            let rank = (nanos.len() * per_cent).div_ceil(100).max(1) - 1;
            nanos.get(rank).map_or(0.0, |nanos| *nanos as f64 / 1e6)
        };
        Some(Quantiles { p50: at(50), p99: at(99), max: at(100) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_nearest_rank() {
        assert_eq!(Quantiles::of(Vec::new()), None, "no time is not a time of zero");
        let of = Quantiles::of((1..=200).rev().map(|ms| ms * 1_000_000).collect());
        assert_eq!(of, Some(Quantiles { p50: 100.0, p99: 198.0, max: 200.0 }));
    }
}
