//! How long a wait may last.

use core::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Moment;

/// Deadlines that grow with the work in front of them, anchored when resources are granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadlineTerms {
    /// The least that anything is given: scheduling noise, not work.
    pub floor: Duration,
    /// The most: `kv_transfer_timeout_ms`.
    pub cap: Duration,
    /// Rate assumed before any was observed, in bytes per second.
    pub initial_bytes_per_second: u64,
    /// How many times the expected duration is granted.
    pub slack: u32,
    /// How long a reader waits for layers that its source has yet to compute; no transfer is under way meanwhile.
    pub prefill: Duration,
}

impl Default for DeadlineTerms {
    fn default() -> Self {
        DeadlineTerms {
            floor: Duration::from_secs(10),
            cap: Duration::from_secs(60),
            initial_bytes_per_second: 100_000_000,
            slack: 8,
            prefill: Duration::from_secs(600),
        }
    }
}

impl DeadlineTerms {
    /// After which a decode leader decides by itself: every rank's own deadlines have run out long before.
    pub fn backstop(&self) -> Duration {
        self.cap.saturating_add(self.floor).saturating_mul(2).saturating_add(self.prefill)
    }
}

/// An observed rate, and the deadlines that follow from it.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    terms: DeadlineTerms,
    bytes_per_second: u64,
}

impl Pace {
    /// Nothing observed yet.
    pub fn new(terms: DeadlineTerms) -> Self {
        Pace { terms, bytes_per_second: terms.initial_bytes_per_second.max(1) }
    }

    /// Takes in one finished transfer. Small ones say nothing of the rate and are left out.
    pub fn observe(&mut self, bytes: u64, took: Duration) {
        const TELLING_BYTES: u64 = 1 << 20;
        let nanos = took.as_nanos();
        if bytes >= TELLING_BYTES && nanos > 0 {
            let rate = u64::try_from(u128::from(bytes) * 1_000_000_000 / nanos).unwrap_or(u64::MAX);
            self.bytes_per_second = (self.bytes_per_second / 8 * 7).saturating_add(rate / 8).max(1);
        }
    }

    /// How long `bytes` may take behind `queued` bytes.
    pub fn allowance(&self, bytes: u64, queued: u64) -> Duration {
        let work = u128::from(bytes) + u128::from(queued);
        let nanos = work * 1_000_000_000 / u128::from(self.bytes_per_second) * u128::from(self.terms.slack);
        let expected = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.terms.floor.saturating_add(expected).min(self.terms.cap.max(self.terms.floor))
    }
}

/// One running wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    /// When it was anchored.
    pub since: Moment,
    /// When it ends.
    pub at: Moment,
}

impl Deadline {
    /// Anchored now.
    pub fn after(now: Moment, allowance: Duration) -> Self {
        Deadline { since: now, at: now + allowance }
    }

    /// Whether it has passed.
    pub fn has_passed(&self, now: Moment) -> bool {
        now >= self.at
    }

    /// Milliseconds waited so far.
    pub fn waited_ms(&self, now: Moment) -> u64 {
        u64::try_from(now.since(self.since).as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_with_bytes_and_queue_and_is_capped() {
        let mut pace = Pace::new(DeadlineTerms::default());
        let small = pace.allowance(0, 0);
        assert_eq!(small, Duration::from_secs(10));
        assert!(pace.allowance(1 << 28, 0) > small);
        assert!(pace.allowance(1 << 28, 1 << 28) > pace.allowance(1 << 28, 0));
        assert_eq!(pace.allowance(u64::MAX, u64::MAX), Duration::from_secs(60));
        pace.observe(1 << 30, Duration::from_millis(100));
        assert!(pace.allowance(1 << 28, 0) < Duration::from_secs(31));
    }
}
