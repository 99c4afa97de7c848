//! How many endpoints were made to each peer transport: UCX pairs two ends by it.

use std::collections::{BTreeMap, BTreeSet};

use crate::wire::KEY_BYTES;

/// Transports that are remembered beside those that are met. One that was forgotten and comes back is counted from zero again, at this side only:
/// an end of theirs may then be taken for a later one, is reset by UCX, and the next one stands.
const REMEMBERED_MAX: usize = 16 << 10;

/// The counts, bounded: peers come and go for as long as this transport lives.
#[derive(Default)]
pub(crate) struct Made {
    counts: BTreeMap<[u8; KEY_BYTES], Count>,
    /// Endpoints made in all.
    total: u64,
}

struct Count {
    made: u64,
    /// Of the last one, which endpoint of all.
    last: u64,
}

impl Made {
    /// Counts an endpoint to a transport; says how many were made before. `near` are those that must not be forgotten, asked for where that matters.
    pub(crate) fn count(&mut self, instance: [u8; KEY_BYTES], near: impl FnOnce() -> BTreeSet<[u8; KEY_BYTES]>) -> u64 {
        if self.counts.len() >= REMEMBERED_MAX && !self.counts.contains_key(&instance) {
            self.forget(&near());
        }
        self.total += 1;
        let count = self.counts.entry(instance).or_insert(Count { made: 0, last: 0 });
        let before = count.made;
        (count.made, count.last) = (before + 1, self.total);
        before
    }

    /// Forgets a quarter of what is remembered: whom no endpoint was made to for the longest.
    fn forget(&mut self, near: &BTreeSet<[u8; KEY_BYTES]>) {
        let mut last: Vec<u64> =
            self.counts.iter().filter(|(instance, _)| !near.contains(*instance)).map(|(_, count)| count.last).collect();
        last.sort_unstable();
        let Some(until) = last.get((REMEMBERED_MAX / 4).min(last.len()).saturating_sub(1)).copied() else { return };
        self.counts.retain(|instance, count| count.last > until || near.contains(instance));
    }

    /// Endpoints made in all.
    #[cfg(test)]
    pub(crate) fn total(&self) -> u64 {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(number: u64) -> [u8; KEY_BYTES] {
        let mut instance = [0; KEY_BYTES];
        instance[..8].copy_from_slice(&number.to_le_bytes());
        instance
    }

    #[test]
    fn endpoints_are_counted_for_each_transport() {
        let mut made = Made::default();
        let numbers = [1, 1, 2, 1, 2].map(|number| made.count(instance(number), BTreeSet::new));
        assert_eq!((numbers, made.total()), ([0, 1, 0, 2, 1], 5));
    }

    #[test]
    fn peers_that_come_and_go_are_forgotten_and_those_that_are_met_are_not() {
        let mut made = Made::default();
        let met = instance(0);
        assert_eq!(made.count(met, BTreeSet::new), 0);
        for number in 1..=100_000 {
            assert_eq!(made.count(instance(number), || BTreeSet::from([met])), 0);
            assert!(made.counts.len() <= REMEMBERED_MAX, "{number}");
        }
        assert_eq!(made.count(met, BTreeSet::new), 1, "as UCX counts");
        assert_eq!(made.count(instance(100_000), BTreeSet::new), 1, "who went last is remembered");
        assert_eq!(made.count(instance(1), BTreeSet::new), 0, "who went first is not");
    }

    #[test]
    fn nobody_is_forgotten_whom_an_endpoint_stands_to() {
        let mut made = Made::default();
        let all: BTreeSet<_> = (0..REMEMBERED_MAX as u64 + 9).map(instance).collect();
        for instance in &all {
            assert_eq!(made.count(*instance, || all.clone()), 0);
        }
        assert!(all.iter().all(|instance| made.count(*instance, || all.clone()) == 1));
    }
}
