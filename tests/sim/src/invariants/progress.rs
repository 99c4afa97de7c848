//! I5: every wait has a deadline, and the system makes progress once faults stop.
//!
//! From the kernel: nodes must not wake each other for ever, no actor may panic, and every node must come up. From the actors' vitals: none
//! of them waits for something that may never come without a deadline. A rank that leaves offers nothing new, and leaves. And from the run: everything ends within its bound, and a second
//! wave of requests, without faults, is delivered.

use std::collections::BTreeMap;

use kvferry_core::protocol::{Event, Vitals};

use super::{Invariant, Scene};
use crate::chronicle::{Entry, What};
use crate::world::World;

#[derive(Default)]
pub(super) struct Progress {
    /// Incarnations that leave, by node.
    leaving: BTreeMap<usize, u64>,
}

impl Invariant for Progress {
    fn name(&self) -> &'static str {
        "I5"
    }

    fn see(&mut self, _: &World, entry: &Entry, broken: &mut Vec<String>) {
        let leaves = self.leaving.get(&entry.node) == Some(&entry.epoch);
        match &entry.what {
            What::NoStart(error) => broken.push(format!("n{} did not start: {error}", entry.node)),
            What::Observed(Event::Draining { .. }) => drop(self.leaving.insert(entry.node, entry.epoch)),
            What::Observed(Event::OfferOpened { request }) if leaves => {
                broken.push(format!("n{} leaves and offers {request} all the same", entry.node));
            }
            What::Crashed if leaves => drop(self.leaving.remove(&entry.node)),
            _ => {}
        }
    }

    fn look_in(&mut self, vitals: &[(usize, Vitals)], broken: &mut Vec<String>) {
        for (node, vitals) in vitals.iter().filter(|(_, vitals)| vitals.is_stuck()) {
            broken.push(format!("the {} of n{node} waits without a deadline: {vitals:?}", vitals.name));
        }
    }

    fn look_around(&mut self, scene: &Scene<'_>, broken: &mut Vec<String>) {
        for what in &scene.unmet {
            broken.push(what.clone());
        }
        for (node, epoch) in &self.leaving {
            broken.push(format!("n{node} was to leave in epoch {epoch} and has not"));
        }
        if scene.world.is_stuck() {
            broken.push("nodes wake each other without end".to_owned());
        }
        if scene.world.panics() > 0 {
            broken.push(format!("{} panics", scene.world.panics()));
        }
    }
}
