//! Peers that could not be reached, and when they are tried again. Pure: time comes in.

use std::collections::BTreeMap;
use std::time::Duration;

use kvferry_core::{Moment, NodeId};

/// After a first try that failed. A connection that stood and broke is tried again at once.
const FIRST: Duration = Duration::from_millis(50);
/// Twice as long after each further one, up to this.
const LONGEST: Duration = Duration::from_secs(2);

/// Tries to reach peers that have not come to a connection.
#[derive(Debug, Default)]
pub(super) struct Absences(BTreeMap<NodeId, Absence>);

#[derive(Debug)]
struct Absence {
    /// Tries since it was met last.
    tries: u32,
    until: Option<Moment>,
}

impl Absences {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A try begins.
    pub(super) fn tried(&mut self, node: NodeId) {
        let absence = self.0.entry(node).or_insert(Absence { tries: 0, until: None });
        absence.tries = absence.tries.saturating_add(1);
        absence.until = None;
    }

    /// It is there.
    pub(super) fn met(&mut self, node: NodeId) {
        self.0.remove(&node);
    }

    /// A connection is gone, or a try has failed: only the latter is waited after.
    pub(super) fn lost(&mut self, node: NodeId, now: Moment) {
        if let Some(absence) = self.0.get_mut(&node) {
            let doubled = FIRST.saturating_mul(1 << absence.tries.saturating_sub(1).min(16));
            absence.until = Some(now + doubled.min(LONGEST));
        }
    }

    /// Nothing is known of it any more, or everything is new.
    pub(super) fn forget(&mut self, node: NodeId) {
        self.0.remove(&node);
    }

    /// Until when it is left alone.
    pub(super) fn until(&self, node: NodeId) -> Option<Moment> {
        self.0.get(&node).and_then(|absence| absence.until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId(5);

    fn after(millis: u64) -> Option<Moment> {
        Some(Moment(0) + Duration::from_millis(millis))
    }

    #[test]
    fn tries_that_fail_are_farther_and_farther_apart() {
        let mut absences = Absences::default();
        for wait in [50, 100, 200, 400, 800, 1600, 2000, 2000] {
            absences.tried(NODE);
            assert_eq!(absences.until(NODE), None, "nobody waits while it is tried");
            absences.lost(NODE, Moment(0));
            assert_eq!(absences.until(NODE), after(wait));
        }
        assert_eq!(absences.until(NodeId(6)), None, "another peer's");
        absences.tried(NODE);
        absences.met(NODE);
        absences.lost(NODE, Moment(0));
        assert_eq!(absences.until(NODE), None, "a connection that stood");
        absences.tried(NODE);
        absences.lost(NODE, Moment(0));
        assert_eq!(absences.until(NODE), after(50), "from the beginning");
        absences.forget(NODE);
        assert!(absences.is_empty());
    }
}
