//! Who is alive, kept in memory by the scheduler's node.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Lost, Member, Message, Outbox, Role};
use crate::{Epoch, NodeId};

/// The state machine of the in-memory directory: joins and losses in, one list of members out to everybody.
#[derive(Debug, Default)]
pub struct Directory {
    members: BTreeMap<NodeId, Arc<Member>>,
    /// The newest epoch ever seen of a node: older ones are fenced.
    epochs: BTreeMap<NodeId, Epoch>,
    outbox: Outbox,
}

/// Why a member may not join.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Error)]
#[non_exhaustive]
pub enum JoinError {
    /// That incarnation is over.
    #[error("{node} joins in {epoch}, but {newest} is known; restart it with a newer epoch")]
    StaleEpoch {
        /// Who.
        node: NodeId,
        /// Its epoch.
        epoch: Epoch,
        /// The newest known.
        newest: Epoch,
    },
    /// Another live node has that place.
    #[error("{node} wants the place of {holder}, which is alive; give it another rank or stop {holder} first")]
    PlaceTaken {
        /// Who.
        node: NodeId,
        /// Who has it.
        holder: NodeId,
    },
    /// Ranks of one group must serve one geometry.
    #[error("{node} disagrees with its group: {fields}")]
    GeometryDiffers {
        /// Who.
        node: NodeId,
        /// What differs.
        fields: String,
    },
    /// The place is impossible.
    #[error("{node} cannot join: {why}")]
    BadPlace {
        /// Who.
        node: NodeId,
        /// Why not.
        why: String,
    },
}

impl Directory {
    /// Commands and events to drain.
    pub fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// Everybody who is alive.
    pub fn members(&self) -> Vec<Arc<Member>> {
        self.members.values().cloned().collect()
    }

    /// A node joins; everybody hears of it.
    pub fn handle_join(&mut self, member: Member) -> Result<Arc<Member>, JoinError> {
        self.check(&member)?;
        // An older incarnation whose loss nobody noticed is lost now.
        if let Some(epoch) = self.members.get(&member.node).map(|earlier| earlier.epoch) {
            self.handle_lost(member.node, epoch, &format!("it restarted as {}", member.epoch));
        }
        let member = Arc::new(member);
        self.epochs.insert(member.node, member.epoch);
        self.members.insert(member.node, Arc::clone(&member));
        self.announce();
        Ok(member)
    }

    /// A node is gone; everybody hears of it. `None` when that incarnation is no member.
    pub fn handle_lost(&mut self, node: NodeId, epoch: Epoch, cause: &str) -> Option<Lost> {
        if self.members.get(&node)?.epoch != epoch {
            return None;
        }
        self.members.remove(&node);
        let lost = Lost { node, epoch, cause: cause.to_owned() };
        for member in self.members.keys() {
            self.outbox.send(*member, Message::Lost(lost.clone()));
        }
        self.announce();
        Some(lost)
    }

    fn announce(&mut self) {
        let members = self.members();
        for member in self.members.keys() {
            self.outbox.send(*member, Message::Members(members.clone()));
        }
    }

    fn check(&self, member: &Member) -> Result<(), JoinError> {
        let (node, epoch) = (member.node, member.epoch);
        if let Some(newest) = self.epochs.get(&node).copied().filter(|newest| *newest >= epoch) {
            return Err(JoinError::StaleEpoch { node, epoch, newest });
        }
        let Some(place) = &member.place else { return Ok(()) };
        place.geometry.validate().map_err(|error| JoinError::BadPlace { node, why: error.to_string() })?;
        if place.rank.0 >= place.geometry.ranks() {
            let why = format!("{} of a group of {} ranks", place.rank, place.geometry.ranks());
            return Err(JoinError::BadPlace { node, why });
        }
        if place.blocks.len() != place.geometry.model.groups.len() {
            let why =
                format!("{} pool sizes for {} layer groups", place.blocks.len(), place.geometry.model.groups.len());
            return Err(JoinError::BadPlace { node, why });
        }
        for other in self.members.values().filter(|other| other.node != node) {
            let Some(theirs) = other.place.as_ref().filter(|theirs| theirs.group == place.group) else { continue };
            if theirs.role != place.role {
                let why = format!("{} is a {} group", place.group, theirs.role);
                return Err(JoinError::BadPlace { node, why });
            }
            if theirs.rank == place.rank {
                return Err(JoinError::PlaceTaken { node, holder: other.node });
            }
            if theirs.geometry != place.geometry {
                let fields = match place.geometry.model.mismatch(&theirs.geometry.model) {
                    Err(mismatch) => mismatch.to_string(),
                    Ok(()) => "format or parallelism".to_owned(),
                };
                return Err(JoinError::GeometryDiffers { node, fields });
            }
        }
        Ok(())
    }
}

/// Whether two members talk to each other: workers of opposite roles, a leader and its ranks, everybody and the scheduler.
pub fn are_peers(one: &Member, other: &Member) -> bool {
    match (&one.place, &other.place) {
        (Some(one), Some(other)) => {
            one.role != other.role || (one.group == other.group && (one.rank.0 == 0 || other.rank.0 == 0))
        }
        _ => true,
    }
}

/// Which of two peers dials: decode ranks dial prefill ranks, otherwise the larger number dials the smaller.
pub fn dials(one: &Member, other: &Member) -> bool {
    let role = |member: &Member| member.place.as_ref().map(|place| place.role);
    match (role(one), role(other)) {
        (Some(Role::Decode), Some(Role::Prefill)) => true,
        (Some(Role::Prefill), Some(Role::Decode)) => false,
        (Some(_), None) => true,
        (None, Some(_)) => false,
        _ => one.node > other.node,
    }
}
