//! I9: no offer has two live consumers, and no destination block two handovers.
//!
//! From the shadow of memory for blocks. For offers from the scheduler's pairings: an offer is paired again only once its earlier handover has
//! failed, or was delivered and has let all blocks go, or when its decode group is lost. A request that is prefilled again is another offer.
//! Lost is also, to a scheduler that has started again, a group whose leader it has not met: a predecessor would have declared it lost long
//! before, and what it still has of the offer is refused by the prefill ranks, which serve the newer handover alone.

use std::collections::{BTreeMap, BTreeSet};

use kvferry_core::protocol::{EngineCall, EngineEvent, Event};
use kvferry_core::{GroupId, HandoverId, RequestId};
use kvferry_fabric_sim::Breach;

use super::{Groups, Invariant};
use crate::chronicle::{Entry, What};
use crate::world::World;
use crate::yard::{SCHEDULER, node_of};

pub(super) struct Consumers {
    groups: Groups,
    /// How often each request was prefilled, by any rank.
    prefills: BTreeMap<RequestId, u64>,
    /// The last handover of each request.
    paired: BTreeMap<RequestId, Consumer>,
    /// Nodes whose engines were asked for blocks for handovers that are not over, or that hold blocks for them.
    holders: BTreeMap<HandoverId, BTreeSet<usize>>,
    /// Handovers that have reached their group: the death of a scheduler may lose its last words.
    taken: BTreeSet<HandoverId>,
    /// Handovers that are decided; whether they are delivered.
    settled: BTreeMap<HandoverId, bool>,
    /// Whom the present scheduler has met.
    met: BTreeSet<usize>,
}

struct Consumer {
    handover: HandoverId,
    group: GroupId,
    prefills: u64,
    is_lost: bool,
}

impl Consumers {
    pub(super) fn new(groups: Groups) -> Self {
        Consumers {
            groups,
            prefills: BTreeMap::new(),
            paired: BTreeMap::new(),
            holders: BTreeMap::new(),
            taken: BTreeSet::new(),
            settled: BTreeMap::new(),
            met: BTreeSet::new(),
        }
    }

    fn let_go(&mut self, handover: HandoverId, node: usize) {
        if let Some(holders) = self.holders.get_mut(&handover) {
            holders.remove(&node);
            if holders.is_empty() {
                self.holders.remove(&handover);
            }
        }
    }

    fn is_live(&self, handover: HandoverId) -> bool {
        match self.settled.get(&handover) {
            None => self.taken.contains(&handover),
            Some(delivered) => *delivered && self.holders.contains_key(&handover),
        }
    }

    /// Whether the present scheduler knows the group's leader.
    fn is_met(&self, group: GroupId) -> bool {
        self.groups.nodes(group).next().is_some_and(|leader| self.met.contains(&leader))
    }

    /// A rank of a group is gone, and the group with it.
    fn lose(&mut self, node: usize) {
        if let Some(group) = self.groups.group(node) {
            self.paired.values_mut().filter(|consumer| consumer.group == group).for_each(|lost| lost.is_lost = true);
        }
    }
}

impl Invariant for Consumers {
    fn name(&self) -> &'static str {
        "I9"
    }

    fn see(&mut self, _: &World, entry: &Entry, broken: &mut Vec<String>) {
        match &entry.what {
            What::Breach(violation) if matches!(violation.breach, Breach::ClaimedTwice(_)) => {
                broken.push(format!("{violation:?}"));
            }
            What::Called(EngineCall::Prefill(job)) => *self.prefills.entry(job.spec.request).or_default() += 1,
            What::Observed(Event::Paired { request, handover, group }) => {
                let prefills = self.prefills.get(request).copied().unwrap_or(0);
                if let Some(before) = self.paired.get(request)
                    // A scheduler that has started again pairs what is paired already.
                    && before.handover != *handover
                    && !self.settled.contains_key(handover)
                    && !before.is_lost
                    && self.is_met(before.group)
                    && self.is_live(before.handover)
                    && before.prefills == prefills
                {
                    let (earlier, of) = (before.handover, before.group);
                    broken.push(format!(
                        "{request} is paired as {handover} with {group}, and as {earlier} with {of}, which lives"
                    ));
                }
                let consumer = Consumer { handover: *handover, group: *group, prefills, is_lost: false };
                self.paired.insert(*request, consumer);
            }
            What::Observed(Event::Settled { report }) => {
                self.settled.insert(report.handover, report.outcome.is_delivered());
            }
            What::Called(EngineCall::Place { handover, .. }) => {
                self.taken.insert(*handover);
            }
            What::Told(EngineEvent::Placed { handover, .. }) => {
                self.holders.entry(*handover).or_default().insert(entry.node);
            }
            What::LetGo(handover) => self.let_go(*handover, entry.node),
            What::Observed(Event::Met { node, .. }) if entry.node == SCHEDULER => {
                self.met.insert(node_of(*node));
            }
            What::Crashed if entry.node == SCHEDULER => self.met.clear(),
            What::Observed(Event::NodeLost { node, .. }) if entry.node == SCHEDULER => self.lose(node_of(*node)),
            What::Crashed => {
                self.lose(entry.node);
                self.holders.retain(|_, holders| {
                    holders.remove(&entry.node);
                    !holders.is_empty()
                });
            }
            _ => {}
        }
    }
}
