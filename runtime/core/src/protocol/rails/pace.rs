//! How fast a rail is, as seen by who posts to it: from when transfers begin and end, and nothing else.

use core::time::Duration;

use super::SLOW;
use crate::Moment;

/// What a rail has shown, by rounds.
///
/// Only time counts in which something was under way, and once, however many transfers share it. A round is over when more transfers have ended in
/// it than were under way at its beginning: then one has both begun and ended in it, so it lasts as long as a transfer does. Those that end together
/// are one observation, not one that took all the time and others that took none. Those that begin with a round count as under way before, until
/// nothing is under way any more.
#[derive(Clone, Debug, Default)]
pub(super) struct Pace {
    under_way: u32,
    /// Up to when the round's sums are counted.
    since: Moment,
    /// How many were under way before the round began.
    carried: u32,
    /// And with those that began with it.
    begun_with: u32,
    round: Sums,
}

/// Of one round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sums {
    bytes: u64,
    transfers: u32,
    /// Nanoseconds in which anything was under way.
    busy: u64,
    /// Nanoseconds that transfers were under way, all together.
    waited: u128,
}

/// What one round, or several on average, say of a rail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Speed {
    /// Bytes per second: those that came ÷ the time in which anything was under way.
    pub(super) rate: u64,
    /// How long a transfer was under way: the time of all of them together ÷ how many ended (Little's law).
    pub(super) wait: Duration,
    /// Bytes of a transfer.
    pub(super) bytes: u64,
    /// The time in which anything was under way.
    pub(super) busy: Duration,
}

impl Pace {
    /// How many transfers are under way.
    pub(super) fn under_way(&self) -> u32 {
        self.under_way
    }

    /// A transfer begins.
    pub(super) fn began(&mut self, now: Moment) {
        self.count(now);
        self.under_way = self.under_way.saturating_add(1);
        if self.round == Sums::default() {
            self.begun_with = self.under_way;
        }
    }

    /// So many bytes have come. Returns what the round says if it is over and has at least `telling` bytes.
    pub(super) fn came(&mut self, now: Moment, bytes: u64, telling: u64) -> Option<Speed> {
        self.count(now);
        self.under_way = self.under_way.saturating_sub(1);
        self.round.bytes = self.round.bytes.saturating_add(bytes);
        self.round.transfers = self.round.transfers.saturating_add(1);
        let before = if self.under_way == 0 { self.carried } else { self.begun_with };
        let is_over = self.round.transfers > before;
        (is_over && self.round.bytes >= telling).then(|| {
            let speed = self.round.speed();
            self.restart(now);
            speed
        })
    }

    /// A transfer ended otherwise. Nobody knows how much of it came, so the round says nothing.
    pub(super) fn ended(&mut self, now: Moment) {
        self.under_way = self.under_way.saturating_sub(1);
        self.restart(now);
    }

    /// Begins a round, with what is under way.
    pub(super) fn restart(&mut self, now: Moment) {
        (self.since, self.round) = (now, Sums::default());
        (self.carried, self.begun_with) = (self.under_way, self.under_way);
    }

    fn count(&mut self, now: Moment) {
        if self.under_way > 0 {
            let nanos = u64::try_from(now.since(self.since).as_nanos()).unwrap_or(u64::MAX);
            self.round.busy = self.round.busy.saturating_add(nanos);
            let waited = u128::from(nanos) * u128::from(self.under_way);
            self.round.waited = self.round.waited.saturating_add(waited);
        }
        self.since = now;
    }
}

impl Sums {
    fn speed(&self) -> Speed {
        let (nanos, transfers) = (u128::from(self.busy.max(1)), self.transfers.max(1));
        let whole = |value: u128| u64::try_from(value).unwrap_or(u64::MAX);
        Speed {
            rate: whole(u128::from(self.bytes) * 1_000_000_000 / nanos).max(1),
            wait: Duration::from_nanos(whole(self.waited / u128::from(transfers))),
            bytes: self.bytes / u64::from(transfers),
            busy: Duration::from_nanos(self.busy),
        }
    }
}

impl Speed {
    /// Halfway to a later one.
    pub(super) fn towards(self, later: Speed) -> Speed {
        Speed {
            rate: (self.rate / 2).saturating_add(later.rate / 2).max(1),
            wait: (self.wait / 2).saturating_add(later.wait / 2),
            bytes: (self.bytes / 2).saturating_add(later.bytes / 2),
            busy: later.busy,
        }
    }

    /// Whether it is so slow that the other had better go on without it.
    pub(super) fn is_slow_beside(&self, best: &Speed) -> bool {
        self.rate.saturating_mul(SLOW) < best.rate
    }

    /// Whether it ended no later than what others carry does there on average, longer for being larger: then nobody had to wait for it.
    pub(super) fn is_in_time_for(&self, others: &Speed) -> bool {
        let [took, wait] = [self.busy, others.wait].map(|time| time.as_nanos());
        // Both sides times the others' bytes.
        let size = u128::from(others.bytes.max(1));
        took.saturating_mul(size) <= wait.saturating_mul(size.max(u128::from(self.bytes)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(micros: u64) -> Moment {
        Moment(micros * 1_000)
    }

    #[test]
    fn transfers_that_end_together_are_one_observation() {
        let mut pace = Pace::default();
        for _ in 0..8 {
            pace.began(at(0));
        }
        let all: Vec<_> = (0..8).filter_map(|which| pace.came(at(4_000 + which), 1_000, 1)).collect();
        let [one] = all[..] else { panic!("{all:?}") };
        assert!(one.rate.abs_diff(2_000_000) < 10_000, "{one:?}");
        assert!(one.bytes == 1_000 && one.wait.as_micros().abs_diff(4_000) < 10, "{one:?}");
    }

    #[test]
    fn an_unbroken_stream_is_seen_at_its_rate() {
        // A wire of 1 MB/s, always with four transfers of 1,000 bytes on it, one after the other or all at once in turns of four.
        for together in [1, 4] {
            let mut pace = Pace::default();
            (0..4).for_each(|_| pace.began(at(0)));
            let mut seen = Vec::new();
            for group in 1..64u64 {
                let end = group * together * 1_000;
                for which in 0..together {
                    seen.extend(pace.came(at(end + which), 1_000, 1));
                    pace.began(at(end + which));
                }
            }
            assert!(seen.len() >= 12, "{seen:?}");
            assert!(seen.iter().all(|speed| (500_000..=2_000_000).contains(&speed.rate)), "{seen:?}");
            let later = seen.split_off(2);
            let mean = |of: fn(&Speed) -> u64| later.iter().map(of).sum::<u64>() / later.len() as u64;
            assert!(mean(|speed| speed.rate).abs_diff(1_000_000) < 150_000, "{later:?}");
            assert!(mean(|speed| speed.wait.as_micros() as u64).abs_diff(4_000) < 600, "{later:?}");
        }
    }

    #[test]
    fn what_is_left_of_a_stream_is_no_round_of_its_own() {
        let mut pace = Pace::default();
        pace.began(at(0));
        pace.began(at(10));
        pace.began(at(20));
        // A round of two, and one that was under way all the time ends a moment later.
        let seen = [4_000, 4_000, 4_001].map(|now| pace.came(at(now), 1_000, 1));
        assert_eq!(seen.map(|speed| speed.is_some()), [false, true, false], "{seen:?}");
        pace.began(at(10_000));
        let speed = pace.came(at(14_000), 1_000, 1).expect("one began and ended in it");
        assert!(speed.rate < 500_000, "{speed:?}");
    }

    #[test]
    fn idle_time_does_not_count_and_small_rounds_wait_for_more() {
        let mut pace = Pace::default();
        for start in [0, 50_000, 900_000] {
            pace.began(at(start));
            assert_eq!(pace.came(at(start + 100), 100, 400), None);
        }
        pace.began(at(1_000_000));
        let speed = pace.came(at(1_000_100), 100, 400).expect("enough");
        assert_eq!(
            (speed.rate, speed.bytes, speed.wait.as_micros(), speed.busy.as_micros()),
            (1_000_000, 100, 100, 400)
        );
    }

    #[test]
    fn what_ended_otherwise_says_nothing() {
        let mut pace = Pace::default();
        pace.began(at(0));
        pace.began(at(0));
        pace.ended(at(1_000_000));
        assert_eq!(pace.came(at(1_000_100), 100, 1), None, "it began before");
        pace.began(at(2_000_000));
        let speed = pace.came(at(2_000_100), 100, 1).expect("one began and ended in it");
        assert_eq!((speed.rate, pace.under_way()), (1_000_000, 0));
    }

    #[test]
    fn a_part_of_a_share_is_in_time_when_it_takes_no_longer_than_a_share() {
        let speed = |bytes, micros| Speed {
            rate: 1,
            wait: Duration::from_micros(micros),
            bytes,
            busy: Duration::from_micros(micros),
        };
        let others = speed(16_000, 400);
        assert!(speed(1_000, 400).is_in_time_for(&others), "most of it latency");
        assert!(!speed(1_000, 401).is_in_time_for(&others));
        assert!(speed(32_000, 800).is_in_time_for(&others) && !speed(32_000, 900).is_in_time_for(&others));
    }

    proptest! {
        #[test]
        fn every_byte_and_every_busy_moment_is_in_one_round(
            transfers in prop::collection::vec((0..5_000u64, 1..2_000u64, 0..1_000u64), 1..40),
        ) {
            let begins = transfers.iter().map(|(start, ..)| (*start, 0, 0));
            let ends = transfers.iter().map(|(start, took, bytes)| (start + took, 1, *bytes));
            let mut events: Vec<(u64, u32, u64)> = begins.chain(ends).collect();
            events.sort_unstable();
            let (mut pace, mut rounds) = (Pace::default(), Vec::new());
            for (now, kind, bytes) in events {
                match kind {
                    0 => pace.began(at(now)),
                    _ => rounds.extend(pace.came(at(now), bytes, 0)),
                }
            }
            let is_busy = |micro: &u64| transfers.iter().any(|(start, took, _)| (*start..start + took).contains(micro));
            let busy = (0..7_000).filter(is_busy).count() as u128;
            let shortest = transfers.iter().map(|(_, took, _)| u128::from(*took)).min().unwrap_or(0);
            prop_assert!(rounds.iter().all(|round| round.busy.as_micros() >= shortest), "{:?}", rounds);
            // What came last may be too little for a round. Rates are whole numbers, and one at least.
            let left = pace.round;
            let in_rounds: u128 = rounds.iter().map(|round| round.busy.as_micros()).sum();
            prop_assert_eq!(in_rounds + u128::from(left.busy / 1_000), busy);
            let came: u128 = rounds.iter().map(|round| u128::from(round.rate) * round.busy.as_nanos()).sum();
            let bytes: u64 = transfers.iter().map(|(.., bytes)| bytes).sum();
            let exact = u128::from(bytes - left.bytes) * 1_000_000_000;
            prop_assert!(came.abs_diff(exact) <= busy * 1_000, "{} for {}", came, exact);
            prop_assert_eq!(pace.under_way(), 0);
        }
    }
}
