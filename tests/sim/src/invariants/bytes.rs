//! I2: a handover is delivered only when every byte equals the source's at the time its layers were marked ready.
//!
//! From the shadow of memory; from the engines, which verify every byte of what is delivered; and from the oracle's knowledge of which
//! ranks have to have it: each that still lives must have been told, and must have verified and freed it in the end.

use std::collections::BTreeMap;

use kvferry_core::protocol::{EngineCall, EngineEvent, Event};
use kvferry_core::{GroupId, HandoverId};
use kvferry_fabric_sim::Breach;

use super::{Groups, Invariant, Scene};
use crate::chronicle::{Entry, What};
use crate::world::World;

pub(super) struct Bytes {
    groups: Groups,
    /// By handover: its group, and the incarnation of its leader that decided.
    handovers: BTreeMap<HandoverId, (GroupId, usize, u64)>,
    delivered: Vec<HandoverId>,
    /// By handover and node: in which incarnation the engine was given it, and whether it has verified it.
    given: BTreeMap<(HandoverId, usize), (u64, bool)>,
    /// By handover and node: which incarnation placed it.
    placed: BTreeMap<(HandoverId, usize), u64>,
}

impl Bytes {
    pub(super) fn new(groups: Groups) -> Self {
        Bytes {
            groups,
            handovers: BTreeMap::new(),
            delivered: Vec::new(),
            given: BTreeMap::new(),
            placed: BTreeMap::new(),
        }
    }
}

impl Invariant for Bytes {
    fn name(&self) -> &'static str {
        "I2"
    }

    fn see(&mut self, _: &World, entry: &Entry, broken: &mut Vec<String>) {
        match &entry.what {
            What::Breach(violation) => {
                if matches!(violation.breach, Breach::WrongContent | Breach::NothingCame | Breach::NotItsOwn(_)) {
                    broken.push(format!("{violation:?}"));
                }
            }
            What::Observed(Event::Settled { report }) if report.outcome.is_delivered() => {
                if let Some(group) = self.groups.group(entry.node) {
                    self.handovers.insert(report.handover, (group, entry.node, entry.epoch));
                }
                self.delivered.push(report.handover);
            }
            What::Called(EngineCall::Settled { handover, outcome, .. }) if outcome.is_delivered() => {
                self.given.insert((*handover, entry.node), (entry.epoch, false));
            }
            What::Told(EngineEvent::Placed { handover, .. }) => {
                self.placed.insert((*handover, entry.node), entry.epoch);
            }
            What::Told(EngineEvent::Freed { handover }) => {
                if let Some((epoch, verified)) = self.given.get_mut(&(*handover, entry.node))
                    && *epoch == entry.epoch
                {
                    *verified = true;
                }
            }
            _ => {}
        }
    }

    fn look_around(&mut self, scene: &Scene<'_>, broken: &mut Vec<String>) {
        for rank in scene.ranks {
            if let Some(engine) = rank.engine.as_ref().filter(|engine| engine.mismatched_bytes > 0) {
                let (bytes, first) = (engine.mismatched_bytes, &engine.first_mismatch);
                broken.push(format!("{} {} of {}: {bytes} wrong bytes: {first:?}", rank.role, rank.rank, rank.group));
            }
        }
        for handover in std::mem::take(&mut self.delivered) {
            let Some((group, leader, epoch)) = self.handovers.remove(&handover) else { continue };
            if scene.world.life(leader).epoch != epoch {
                // The group is lost with its leader, who may have had no time to tell the others.
                continue;
            }
            for node in self.groups.nodes(group) {
                // What an incarnation had that is over, nobody can check any more.
                let survives = match self.placed.get(&(handover, node)) {
                    Some(epoch) => *epoch == scene.world.life(node).epoch,
                    None => scene.world.life(node).epoch == 1,
                };
                match self.given.get(&(handover, node)) {
                    _ if !survives => {}
                    Some((_, true)) => {}
                    Some((_, false)) => broken.push(format!("{handover} was not verified on n{node}")),
                    None => broken.push(format!("{handover} was delivered, and n{node} was never told")),
                }
            }
        }
        self.given.clear();
        self.placed.clear();
    }
}
