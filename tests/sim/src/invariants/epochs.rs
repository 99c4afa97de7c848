//! I6: nothing from an older epoch has an effect.
//!
//! From the kernel's knowledge of which incarnations live, from the sessions' events, and from the shadow of memory.

use std::collections::{BTreeMap, BTreeSet};

use kvferry_core::protocol::Event;
use kvferry_fabric_sim::Breach;

use super::Invariant;
use crate::chronicle::{Entry, What};
use crate::faults::Fault;
use crate::world::World;
use crate::yard::node_of;

/// What was said by a node that has died since is still on its way for a while; nobody can shake hands with it. Whoever stood still meanwhile finds
/// it when it goes on.
const LAST_WORDS_NS: u64 = 1_000_000_000;

#[derive(Default)]
pub(super) struct Epochs {
    /// By node: the last incarnation that is over, and since when.
    over: BTreeMap<usize, (u64, u64)>,
    /// Nodes that stand still.
    still: BTreeSet<usize>,
    /// By node: when it went on after it had last stood still.
    went_on: BTreeMap<usize, u64>,
}

impl Invariant for Epochs {
    fn name(&self) -> &'static str {
        "I6"
    }

    fn see(&mut self, world: &World, entry: &Entry, broken: &mut Vec<String>) {
        match &entry.what {
            What::Crashed => {
                self.over.insert(entry.node, (entry.epoch, entry.at));
            }
            What::Fault(Fault::Pause { node }, true) => drop(self.still.insert(*node)),
            What::Fault(Fault::Pause { node }, false) if self.still.remove(node) => {
                self.went_on.insert(*node, entry.at);
            }
            What::Healed => {
                self.went_on.extend(std::mem::take(&mut self.still).into_iter().map(|node| (node, entry.at)));
            }
            What::Observed(Event::Met { node, epoch }) => {
                let node = node_of(*node);
                let went_on = self.went_on.get(&entry.node).copied().unwrap_or(0);
                if let Some((over, since)) = self.over.get(&node)
                    && epoch.0 <= *over
                    && entry.at > went_on.max(*since) + LAST_WORDS_NS
                {
                    broken.push(format!("n{} meets {epoch} of n{node}, which is over", entry.node));
                }
                if epoch.0 > world.life(node).epoch {
                    broken.push(format!("n{} meets {epoch} of n{node}, which is not yet", entry.node));
                }
            }
            What::Breach(violation) if matches!(violation.breach, Breach::StaleWrite(_)) => {
                broken.push(format!("{violation:?}"));
            }
            What::Called(_) | What::Told(_) if entry.epoch != world.life(entry.node).epoch => {
                broken.push(format!("the engine of an earlier incarnation of n{} acts: {:?}", entry.node, entry.what));
            }
            _ => {}
        }
    }
}
