//! The ranks of a group as their leader knows them: where they are, who can be reached, who takes no work.

use std::collections::BTreeMap;

use super::{Event, FailReason, Message, Outbox, Role};
use crate::{GroupId, NodeId, Rank};

/// A group's roll.
#[derive(Debug)]
pub(super) struct Roll {
    /// How many ranks the group has.
    expected: u32,
    ranks: BTreeMap<Rank, Entry>,
    /// What the scheduler was told.
    told: Option<String>,
}

#[derive(Debug)]
struct Entry {
    node: NodeId,
    /// It has said what it holds. The leader's own rank has nothing that the leader does not know.
    met: bool,
    /// The conversation with it is over, and the next has not begun.
    parted: Option<String>,
    /// It takes no work.
    trouble: Option<String>,
}

impl Roll {
    /// A group of so many ranks, none of which is known.
    pub(super) fn new(expected: u32) -> Self {
        Roll { expected, ranks: BTreeMap::new(), told: None }
    }

    /// A rank is on this node.
    pub(super) fn insert(&mut self, rank: Rank, node: NodeId) {
        if self.ranks.get(&rank).is_none_or(|entry| entry.node != node) {
            self.ranks.insert(rank, Entry { node, met: rank == Rank(0), parted: None, trouble: None });
        }
    }

    /// A node is gone for good. Says which rank it was.
    pub(super) fn remove(&mut self, node: NodeId) -> Option<Rank> {
        let rank = self.rank_of(node)?;
        self.ranks.remove(&rank);
        Some(rank)
    }

    /// A node cannot be reached any more. Says which rank it is.
    pub(super) fn part(&mut self, node: NodeId, cause: &str) -> Option<Rank> {
        let (rank, entry) = self.ranks.iter_mut().find(|(_, entry)| entry.node == node)?;
        entry.parted = Some(cause.to_owned());
        entry.met = false;
        // It will say anew what troubles it.
        entry.trouble = None;
        Some(*rank)
    }

    /// A node can be reached, and has said what it holds. Says whether it is a rank of the group.
    pub(super) fn meet(&mut self, node: NodeId) -> bool {
        let entry = self.ranks.values_mut().find(|entry| entry.node == node);
        entry.map(|entry| (entry.met, entry.parted) = (true, None)).is_some()
    }

    /// A rank says how it is. Says whether it is a rank of the group.
    pub(super) fn hear(&mut self, node: NodeId, trouble: Option<String>) -> bool {
        let entry = self.ranks.values_mut().find(|entry| entry.node == node);
        entry.map(|entry| entry.trouble = trouble).is_some()
    }

    /// Tells the scheduler whether the group takes work, when that has changed.
    pub(super) fn report(&mut self, scheduler: NodeId, outbox: &mut Outbox) {
        let trouble = self.trouble();
        if trouble != self.told {
            self.told.clone_from(&trouble);
            outbox.event(Event::Health { trouble: trouble.clone() });
            outbox.send(scheduler, Message::Health { trouble });
        }
    }

    /// The same while the scheduler believes that there is trouble.
    pub(super) fn report_again(&mut self, scheduler: NodeId, outbox: &mut Outbox) {
        if self.told.is_some() {
            self.report(scheduler, outbox);
        }
    }

    /// The same to a scheduler that was told nothing.
    pub(super) fn report_anew(&mut self, scheduler: NodeId, outbox: &mut Outbox) {
        let trouble = self.trouble();
        // Of a group that has never been whole nothing was told so far.
        if trouble != self.told {
            outbox.event(Event::Health { trouble: trouble.clone() });
        }
        self.told.clone_from(&trouble);
        outbox.send(scheduler, Message::Health { trouble });
    }

    /// The nodes of ranks that take no work: they may be leaving.
    pub(super) fn troubled(&self) -> Vec<NodeId> {
        self.ranks.values().filter(|entry| entry.trouble.is_some()).map(|entry| entry.node).collect()
    }

    /// Why the group takes no work.
    pub(super) fn trouble(&self) -> Option<String> {
        let troubles = self.ranks.iter().find_map(|(rank, entry)| {
            let parted =
                entry.parted.as_ref().map(|cause| format!("{rank} ({}) cannot be reached: {cause}", entry.node));
            parted.or_else(|| Some(format!("{rank} ({}): {}", entry.node, entry.trouble.as_ref()?)))
        });
        let met = self.ranks.values().filter(|entry| entry.met).count();
        troubles.or_else(|| (met < self.expected as usize).then(|| format!("{met} of {} ranks are met", self.expected)))
    }

    /// The nodes of these ranks, if all of them can be told something now.
    pub(super) fn reach(&self, role: Role, group: GroupId, ranks: &[Rank]) -> Result<Vec<NodeId>, FailReason> {
        let mut nodes = Vec::with_capacity(ranks.len());
        for rank in ranks {
            let entry = self.ranks.get(rank).ok_or(FailReason::NoGroup(role))?;
            if let Some(cause) = entry.parted.clone() {
                return Err(FailReason::RankLost { role, group, rank: *rank, node: entry.node, cause });
            }
            nodes.push(entry.node);
        }
        Ok(nodes)
    }

    /// Where a rank is.
    pub(super) fn node_of(&self, rank: Rank) -> Option<NodeId> {
        self.ranks.get(&rank).map(|entry| entry.node)
    }

    /// Which rank a node is.
    pub(super) fn rank_of(&self, node: NodeId) -> Option<Rank> {
        self.ranks.iter().find(|(_, entry)| entry.node == node).map(|(rank, _)| *rank)
    }
}
