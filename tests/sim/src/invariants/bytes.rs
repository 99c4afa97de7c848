//! I2: a handover is delivered only when every byte equals the source's at the time its layers were marked ready.
//!
//! From the shadow of memory; from the engines, which verify every byte of what is delivered; and from the oracle's knowledge of which
//! ranks have to have it: as long as their group lives, each must be told, and must have verified and freed it in the end.

use std::collections::{BTreeMap, BTreeSet};

use kvferry_core::protocol::{EngineCall, EngineEvent, Event};
use kvferry_core::{GroupId, HandoverId};
use kvferry_fabric_sim::Breach;

use super::{Groups, Invariant, Scene};
use crate::chronicle::{Entry, What};
use crate::world::World;

/// A group that is lost so soon after a delivery had no time to hear of it on all its ranks.
const TIME_TO_HEAR_NS: u64 = 30_000_000_000;

pub(super) struct Bytes {
    groups: Groups,
    /// Delivered handovers that some rank has not verified.
    delivered: BTreeMap<HandoverId, Delivered>,
    /// When handovers first asked for blocks, and groups last lost a rank.
    placed_at: BTreeMap<HandoverId, u64>,
    lost_at: BTreeMap<GroupId, u64>,
}

struct Delivered {
    group: GroupId,
    at: u64,
    untold: BTreeSet<usize>,
    unverified: BTreeSet<usize>,
}

impl Bytes {
    pub(super) fn new(groups: Groups) -> Self {
        Bytes { groups, delivered: BTreeMap::new(), placed_at: BTreeMap::new(), lost_at: BTreeMap::new() }
    }
}

impl Delivered {
    fn accuse(&self, handover: HandoverId, broken: &mut Vec<String>) {
        let Delivered { at, untold, unverified, .. } = self;
        broken.push(format!(
            "{handover} was delivered at {at} ns; nodes {untold:?} were not told, nodes {unverified:?} have not verified it"
        ));
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
                let placed_at = self.placed_at.remove(&report.handover).unwrap_or(entry.at);
                if let Some(group) = self.groups.group(entry.node)
                    // A rank that has died meanwhile has taken its part with it, and the leader need not know yet.
                    && self.lost_at.get(&group).is_none_or(|lost| *lost < placed_at)
                {
                    let nodes: BTreeSet<usize> = self.groups.nodes(group).collect();
                    let delivered = Delivered { group, at: entry.at, untold: nodes.clone(), unverified: nodes };
                    self.delivered.insert(report.handover, delivered);
                }
            }
            What::Called(EngineCall::Place { handover, .. }) => {
                self.placed_at.entry(*handover).or_insert(entry.at);
            }
            What::Called(EngineCall::Settled { handover, outcome, .. }) if outcome.is_delivered() => {
                if let Some(delivered) = self.delivered.get_mut(handover) {
                    delivered.untold.remove(&entry.node);
                }
            }
            What::Told(EngineEvent::Freed { handover }) => {
                if let Some(delivered) = self.delivered.get_mut(handover) {
                    delivered.unverified.remove(&entry.node);
                    if delivered.unverified.is_empty() && delivered.untold.is_empty() {
                        self.delivered.remove(handover);
                    }
                }
            }
            What::Crashed => {
                // A group is only as alive as all its ranks: what it had, nobody can check any more.
                let Some(group) = self.groups.group(entry.node) else { return };
                self.lost_at.insert(group, entry.at);
                let lost = self.delivered.extract_if(.., |_, delivered| delivered.group == group);
                for (handover, delivered) in lost.filter(|(_, lost)| entry.at > lost.at + TIME_TO_HEAR_NS) {
                    delivered.accuse(handover, broken);
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
        for (handover, delivered) in std::mem::take(&mut self.delivered) {
            delivered.accuse(handover, broken);
        }
    }
}
