//! The prefill ranks that a decode rank may be sent to, as the directory tells of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{MemberList, Role};
use crate::{GroupGeometry, GroupId, NodeId, PlanError, Rank, sources};

/// All prefill groups.
#[derive(Debug, Default)]
pub(super) struct Sources {
    groups: BTreeMap<GroupId, SourceGroup>,
    places: BTreeMap<NodeId, (GroupId, Rank)>,
}

impl Sources {
    /// Takes in what the directory tells.
    pub(super) fn handle_members(&mut self, list: &MemberList) {
        if list.whole {
            *self = Sources::default();
        }
        for member in &list.members {
            self.remove(member.node);
            let Some(place) = member.place.as_ref().filter(|place| place.role == Role::Prefill) else { continue };
            let group = self.groups.entry(place.group).or_insert_with(|| SourceGroup::new(Arc::clone(&place.geometry)));
            if group.geometry != place.geometry {
                *group = SourceGroup::new(Arc::clone(&place.geometry));
            }
            if let Some(predecessor) = group.nodes.insert(place.rank, member.node) {
                self.places.remove(&predecessor);
            }
            self.places.insert(member.node, (place.group, place.rank));
        }
    }

    /// A node is no member any more.
    pub(super) fn remove(&mut self, node: NodeId) {
        let Some((id, rank)) = self.places.remove(&node) else { return };
        let Some(group) = self.groups.get_mut(&id) else { return };
        group.nodes.remove(&rank);
        if group.nodes.is_empty() {
            self.groups.remove(&id);
        }
    }

    /// A group of which some rank is known.
    pub(super) fn group(&mut self, group: GroupId) -> Option<&mut SourceGroup> {
        self.groups.get_mut(&group)
    }
}

/// A prefill group as the directory lists it.
#[derive(Debug)]
pub(super) struct SourceGroup {
    geometry: Arc<GroupGeometry>,
    pub(super) nodes: BTreeMap<Rank, NodeId>,
    /// Ranks that owe this rank something, by the attention-dp part that owns the request.
    owing: BTreeMap<u32, Arc<[Rank]>>,
}

impl SourceGroup {
    pub(super) fn new(geometry: Arc<GroupGeometry>) -> Self {
        SourceGroup { geometry, nodes: BTreeMap::new(), owing: BTreeMap::new() }
    }

    /// Which of its ranks owe `rank` of `destination` something.
    pub(super) fn owing(&mut self, dp: u32, destination: &GroupGeometry, rank: Rank) -> Result<Arc<[Rank]>, PlanError> {
        if let Some(known) = self.owing.get(&dp) {
            return Ok(Arc::clone(known));
        }
        let owing: Arc<[Rank]> = sources(&self.geometry, dp, destination, rank)?.into();
        // A peer names the part; only parts that exist are remembered.
        if !owing.is_empty() {
            self.owing.insert(dp, Arc::clone(&owing));
        }
        Ok(owing)
    }
}
