//! I1: no block returns to its pool while a foreign write may still reach it.
//!
//! From the shadow of memory, which compares what engines say of their blocks with what the fabric writes, and from the engines'
//! poisoned blocks.

use kvferry_fabric_sim::Breach;

use super::{Invariant, Scene};
use crate::chronicle::{Entry, What};
use crate::world::World;

pub(super) struct Fences;

impl Invariant for Fences {
    fn name(&self) -> &'static str {
        "I1"
    }

    fn see(&mut self, _: &World, entry: &Entry, broken: &mut Vec<String>) {
        if let What::Breach(violation) = &entry.what
            && matches!(violation.breach, Breach::ForeignWrite(_) | Breach::ReleasedUnderWrite)
        {
            broken.push(format!("{violation:?}"));
        }
    }

    fn look_around(&mut self, scene: &Scene<'_>, broken: &mut Vec<String>) {
        for rank in scene.ranks {
            if let Some(engine) = rank.engine.as_ref().filter(|engine| engine.stray_bytes > 0) {
                let (bytes, first) = (engine.stray_bytes, &engine.first_mismatch);
                broken.push(format!("{} {} of {}: {bytes} stray bytes: {first:?}", rank.role, rank.rank, rank.group));
            }
        }
    }
}
