//! I4: when all is quiet, every block, lease and credit of surviving nodes is back, and quarantine is drained.
//!
//! From the engines' own counts, from what the actors have in hand, and from the fabric.

use super::{Invariant, Scene};
use crate::chronicle::Entry;
use crate::world::World;

pub(super) struct Back;

impl Invariant for Back {
    fn name(&self) -> &'static str {
        "I4"
    }

    fn see(&mut self, _: &World, _: &Entry, _: &mut Vec<String>) {}

    fn look_around(&mut self, scene: &Scene<'_>, broken: &mut Vec<String>) {
        let in_flight = scene.world.fabric().in_flight();
        if in_flight > 0 {
            broken.push(format!("{in_flight} transfers are under way"));
        }
        for (node, vitals) in scene.vitals.iter().filter(|(_, vitals)| !vitals.is_quiet()) {
            broken.push(format!("the {} of n{node} has something in hand: {vitals:?}", vitals.name));
        }
        for rank in scene.ranks {
            let name = format!("{} {} of {}", rank.role, rank.rank, rank.group);
            let Some(engine) = &rank.engine else {
                broken.push(format!("{name} is down"));
                continue;
            };
            if engine.leaked_blocks > 0 {
                broken.push(format!("{name} has leaked {} blocks", engine.leaked_blocks));
            }
            let kept = (engine.held_blocks, engine.quarantined_blocks, engine.held_requests, engine.queued_requests);
            if kept != (0, 0, 0, 0) {
                broken.push(format!("{name} keeps (held, quarantined blocks, held, queued requests) {kept:?}"));
            }
            if engine.free_blocks != engine.blocks {
                broken.push(format!("{name} has {} of {} blocks free", engine.free_blocks, engine.blocks));
            }
        }
    }
}
