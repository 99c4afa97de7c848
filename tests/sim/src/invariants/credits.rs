//! I7: bytes in flight and queue depths stay within credits.
//!
//! From the desks, which know what each decode engine really holds: never more handovers than its group takes at once. And from the NICs:
//! never more transfers posted than the queue's depth.

use std::collections::BTreeMap;

use kvferry_core::HandoverId;
use kvferry_core::protocol::EngineEvent;

use super::{Invariant, Scene};
use crate::chronicle::{Entry, What};
use crate::world::World;

pub(super) struct Credits {
    handovers_max: usize,
    depth: usize,
    /// By node.
    held: BTreeMap<usize, BTreeMap<HandoverId, u64>>,
}

impl Credits {
    pub(super) fn new(handovers_max: u32, depth: usize) -> Self {
        Credits { handovers_max: handovers_max as usize, depth, held: BTreeMap::new() }
    }
}

impl Invariant for Credits {
    fn name(&self) -> &'static str {
        "I7"
    }

    fn see(&mut self, _: &World, entry: &Entry, broken: &mut Vec<String>) {
        match &entry.what {
            What::Told(EngineEvent::Placed { handover, .. }) => {
                let held = self.held.entry(entry.node).or_default();
                held.insert(*handover, entry.at);
                if held.len() > self.handovers_max {
                    let (node, count, most) = (entry.node, held.len(), self.handovers_max);
                    broken.push(format!("n{node} holds {count} handovers at once, where {most} are allowed"));
                }
            }
            What::LetGo(handover) => {
                if let Some(held) = self.held.get_mut(&entry.node) {
                    held.remove(handover);
                }
            }
            What::Crashed => {
                self.held.remove(&entry.node);
            }
            _ => {}
        }
    }

    fn look_around(&mut self, scene: &Scene<'_>, broken: &mut Vec<String>) {
        for node in 0..scene.world.nodes() {
            for (index, nic) in scene.world.nics_of(node) {
                let stats = scene.world.fabric().stats(nic);
                if stats.posted_max > self.depth as u64 {
                    broken.push(format!(
                        "NIC {index} of n{node} had {} transfers posted, where its queue takes {}",
                        stats.posted_max, self.depth
                    ));
                }
                if stats.in_flight_out + stats.in_flight_in > 0 {
                    broken.push(format!("NIC {index} of n{node} has bytes on their way: {stats:?}"));
                }
            }
        }
    }
}
