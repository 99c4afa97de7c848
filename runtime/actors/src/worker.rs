//! What prefill and decode workers share.

use std::collections::BTreeMap;
use std::sync::Arc;

use actix::prelude::*;
use kvferry_core::protocol::{EngineEvent, Member, WorkerProfile};
use kvferry_core::{GroupId, NodeId, Rank};

/// An answer of the serving engine.
#[derive(Debug)]
pub struct Answer(pub EngineEvent);

impl Message for Answer {
    type Result = ();
}

/// Which node is which rank, remembered beyond its loss: a `Lost` may follow the list that no longer has it.
#[derive(Debug, Default)]
pub(crate) struct Roster {
    places: BTreeMap<NodeId, (GroupId, Rank)>,
}

impl Roster {
    pub(crate) fn update(&mut self, members: &[Arc<Member>]) {
        for member in members {
            if let Some(place) = &member.place {
                self.places.insert(member.node, (place.group, place.rank));
            }
        }
    }

    pub(crate) fn rank_in(&self, group: GroupId, node: NodeId) -> Option<Rank> {
        self.places.get(&node).filter(|(theirs, _)| *theirs == group).map(|(_, rank)| *rank)
    }
}

/// Which node leads this rank's group. A leader introduces itself before it says anything else.
#[derive(Debug)]
pub(crate) struct Leader {
    here: NodeId,
    elsewhere: Option<NodeId>,
}

impl Leader {
    pub(crate) fn new(here: NodeId) -> Self {
        Leader { here, elsewhere: None }
    }

    /// A peer introduced itself.
    pub(crate) fn meet(&mut self, group: GroupId, from: NodeId, profile: &WorkerProfile) {
        if profile.group == group && profile.rank == Rank(0) {
            self.elsewhere = Some(from);
        }
    }

    /// Whether a message of `node` is the leader's; a leader on this node has no session.
    pub(crate) fn is(&self, node: NodeId) -> bool {
        node == self.here || self.elsewhere == Some(node)
    }
}
