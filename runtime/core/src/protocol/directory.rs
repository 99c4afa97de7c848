//! Who is alive, kept in memory by the scheduler's node.

use core::time::Duration;
use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Lost, Member, MemberList, Message, Outbox, Role};
use crate::{Epoch, GroupGeometry, GroupId, Moment, NodeId, Rank, limits};

/// The least time between two rounds of news.
const ANNOUNCE_EVERY: Duration = Duration::from_millis(20);

/// The state machine of the in-memory directory: joins and losses in, what they change out to those whom it concerns.
#[derive(Debug, Default)]
pub struct Directory {
    members: BTreeMap<NodeId, Arc<Member>>,
    /// Who has which place.
    groups: BTreeMap<GroupId, BTreeMap<Rank, NodeId>>,
    /// Geometries of members, each once.
    geometries: Vec<Arc<GroupGeometry>>,
    /// Members that other groups have not been told of, in the order of joining.
    fresh: Vec<Arc<Member>>,
    /// Until when they are kept, so that many joins are told at once.
    quiet_until: Moment,
    /// There was a directory before this one, which may have declared nodes lost.
    succeeds: bool,
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
    /// There are as many as one list of all members can carry.
    #[error(
        "{node} cannot join: there are {most} {what} already, and there cannot be more; let it join another scheduler"
    )]
    Full {
        /// Who.
        node: NodeId,
        /// Of what there are so many.
        what: String,
        /// How many there are.
        most: u64,
    },
}

impl Directory {
    /// A directory that knows nobody, as [`Directory::default`], but follows another that did.
    pub fn successor() -> Self {
        Directory { succeeds: true, ..Directory::default() }
    }

    /// Commands and events to drain.
    pub fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// Everybody who is alive.
    pub fn members(&self) -> Vec<Arc<Member>> {
        self.members.values().cloned().collect()
    }

    /// When [`Directory::handle_timeout`] is due.
    pub fn poll_timeout(&self) -> Option<Moment> {
        (!self.fresh.is_empty()).then_some(self.quiet_until)
    }

    /// Time has passed: who has joined lately is told to those who have not heard of it.
    pub fn handle_timeout(&mut self, now: Moment) {
        if self.fresh.is_empty() || now < self.quiet_until {
            return;
        }
        self.quiet_until = now + ANNOUNCE_EVERY;
        let fresh = std::mem::take(&mut self.fresh);
        let order: BTreeMap<NodeId, usize> = fresh.iter().zip(1..).map(|(member, next)| (member.node, next)).collect();
        for hearer in self.members.values() {
            // Whoever joined meanwhile was told of all who were there already.
            let news = fresh.iter().skip(order.get(&hearer.node).copied().unwrap_or(0));
            let news = news.filter(|member| !are_of_one_group(hearer, member) && concerns(hearer, member));
            let list = MemberList { whole: false, members: news.cloned().collect() };
            if !list.members.is_empty() {
                self.outbox.send(hearer.node, Message::Members(list));
            }
        }
    }

    /// A node joins. It hears of those who concern it, its group hears of it at once, and whom it concerns otherwise 20 ms
    /// later at most.
    pub fn handle_join(&mut self, now: Moment, mut member: Member) -> Result<Arc<Member>, JoinError> {
        self.check(&member)?;
        // An older incarnation whose loss nobody noticed is lost now.
        if let Some(epoch) = self.members.get(&member.node).map(|earlier| earlier.epoch) {
            self.handle_lost(member.node, epoch, &format!("it restarted as {}", member.epoch));
        }
        if let Some(place) = &mut member.place {
            self.groups.entry(place.group).or_default().insert(place.rank, member.node);
            place.geometry = self.shared(&place.geometry);
        }
        let member = Arc::new(member);
        self.epochs.insert(member.node, member.epoch);
        self.members.insert(member.node, Arc::clone(&member));
        let mut known = MemberList { whole: true, members: Vec::new() };
        for other in self.members.values() {
            if concerns(&member, other) {
                known.members.push(Arc::clone(other));
            }
            if other.node != member.node && are_of_one_group(other, &member) {
                let news = MemberList { whole: false, members: vec![Arc::clone(&member)] };
                self.outbox.send(other.node, Message::Members(news));
            }
        }
        self.outbox.send(member.node, Message::Members(known));
        self.fresh.push(Arc::clone(&member));
        self.handle_timeout(now);
        Ok(member)
    }

    /// A node is gone; everybody who may have known it hears of it. `None` when that incarnation is no member.
    pub fn handle_lost(&mut self, node: NodeId, epoch: Epoch, cause: &str) -> Option<Lost> {
        if self.members.get(&node)?.epoch != epoch {
            return None;
        }
        let gone = self.members.remove(&node)?;
        self.fresh.retain(|member| member.node != node);
        if let Some(place) = &gone.place
            && let Some(ranks) = self.groups.get_mut(&place.group)
        {
            ranks.remove(&place.rank);
            if ranks.is_empty() {
                self.groups.remove(&place.group);
            }
        }
        let lost = Lost { node, epoch, cause: cause.to_owned() };
        for member in self.members.values() {
            // Also who never heard of it by name may have a session with it.
            if concerns(member, &gone) || concerns(&gone, member) {
                self.outbox.send(member.node, Message::Lost(lost.clone()));
            }
        }
        Some(lost)
    }

    /// A member says that an earlier directory had declared a worker lost: its incarnation is over for whoever heard that, so it is over for all.
    /// Nobody can tell when the last one who heard that meets the node again. `None` when there was no earlier directory, that incarnation is no member,
    /// or whoever says so is none.
    pub fn handle_report(&mut self, from: NodeId, lost: &Lost) -> Option<Lost> {
        let is_worker = self.members.get(&lost.node).is_some_and(|member| member.place.is_some());
        if !self.succeeds || !is_worker || !self.members.contains_key(&from) {
            return None;
        }
        self.handle_lost(lost.node, lost.epoch, &lost.cause)
    }

    /// An equal geometry that is known already, where there is one.
    fn shared(&mut self, geometry: &Arc<GroupGeometry>) -> Arc<GroupGeometry> {
        if let Some(known) = self.geometries.iter().find(|known| *known == geometry) {
            return Arc::clone(known);
        }
        // What no member has any more is forgotten.
        self.geometries.retain(|known| Arc::strong_count(known) > 1);
        self.geometries.push(Arc::clone(geometry));
        Arc::clone(geometry)
    }

    fn check(&self, member: &Member) -> Result<(), JoinError> {
        let (node, epoch) = (member.node, member.epoch);
        if let Some(newest) = self.epochs.get(&node).copied().filter(|newest| *newest >= epoch) {
            return Err(JoinError::StaleEpoch { node, epoch, newest });
        }
        let full = |what: &str, most| Err(JoinError::Full { node, what: what.to_owned(), most: most as u64 });
        if self.members.len() >= limits::MEMBERS_MAX && !self.members.contains_key(&node) {
            return full("members", limits::MEMBERS_MAX);
        }
        if member.address.len() > limits::NAME_BYTES_MAX {
            let (bytes, most) = (member.address.len(), limits::NAME_BYTES_MAX);
            return Err(JoinError::BadPlace {
                node,
                why: format!("an address of {bytes} bytes; at most {most} are taken"),
            });
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
        let in_use = || self.geometries.iter().filter(|known| Arc::strong_count(known) > 1).count();
        if !self.geometries.contains(&place.geometry) && in_use() >= limits::GEOMETRIES_MAX {
            return full("different geometries", limits::GEOMETRIES_MAX);
        }
        let group = self.groups.get(&place.group).into_iter().flat_map(BTreeMap::values);
        for other in group.filter(|other| **other != node).filter_map(|other| self.members.get(other)) {
            let Some(theirs) = &other.place else { continue };
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

fn are_of_one_group(one: &Member, other: &Member) -> bool {
    matches!((&one.place, &other.place), (Some(one), Some(other)) if one.group == other.group)
}

/// Whether `hearer` needs to know where `subject` is: ranks of one group each other, decode ranks every prefill rank, whoever has no place
/// everybody. The scheduler's node hears of all.
fn concerns(hearer: &Member, subject: &Member) -> bool {
    match (&hearer.place, &subject.place) {
        (Some(hearer), Some(subject)) => {
            hearer.group == subject.group || (hearer.role, subject.role) == (Role::Decode, Role::Prefill)
        }
        _ => true,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Format, Model, Parallel};

    fn member(node: u64, geometry: Option<GroupGeometry>) -> Member {
        let place = geometry.map(|geometry| super::super::Place {
            role: Role::Prefill,
            group: GroupId(node as u32),
            rank: Rank(0),
            blocks: vec![1; geometry.model.groups.len()],
            geometry: Arc::new(geometry),
            handovers_max: 1,
        });
        Member { node: NodeId(node), epoch: Epoch(1), address: String::new(), place }
    }

    fn geometry(block_tokens: u32) -> GroupGeometry {
        let (model, format) = (Model::preset("tiny").expect("a preset"), Format { block_tokens, ..Format::default() });
        GroupGeometry { model, format, parallel: Parallel::default() }
    }

    #[test]
    fn no_more_members_join_than_a_list_can_carry() {
        let mut directory = Directory::default();
        let earlier = Arc::new(Member { epoch: Epoch(0), ..member(0, None) });
        directory.members.extend((0..limits::MEMBERS_MAX as u64).map(|node| (NodeId(node), Arc::clone(&earlier))));
        let node = limits::MEMBERS_MAX as u64;
        let refused = directory.handle_join(Moment(0), member(node, None));
        assert!(matches!(refused, Err(JoinError::Full { .. })), "{refused:?}");
        assert_eq!(directory.check(&member(7, None)), Ok(()), "in its own place");
    }

    #[test]
    fn no_more_geometries_are_served_than_a_list_can_carry() {
        let mut directory = Directory::default();
        let held: Vec<_> = (1..=limits::GEOMETRIES_MAX as u32).map(|tokens| Arc::new(geometry(tokens))).collect();
        directory.geometries.clone_from(&held);
        assert_eq!(directory.check(&member(1, Some(geometry(1)))), Ok(()), "a known one");
        let refused = directory.check(&member(1, Some(geometry(5000))));
        assert!(matches!(refused, Err(JoinError::Full { .. })), "{refused:?}");
        drop(held);
        assert_eq!(directory.check(&member(1, Some(geometry(5000)))), Ok(()), "once nobody has the others any more");
    }

    #[test]
    fn an_address_is_as_short_as_a_name() {
        let long = Member { address: "x".repeat(limits::NAME_BYTES_MAX + 1), ..member(1, None) };
        let refused = Directory::default().handle_join(Moment(0), long);
        assert!(matches!(refused, Err(JoinError::BadPlace { .. })), "{refused:?}");
    }
}
