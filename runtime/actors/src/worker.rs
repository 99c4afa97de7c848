//! The actor of a rank: a thin shell around its core.

use std::collections::BTreeMap;

use actix::prelude::*;
use kvferry_core::protocol::{
    DecodeRank, EngineEvent, Event, Lost, MemberList, Message as Wire, NicEvent, Outbox, PrefillRank, Vitals,
    WorkerProfile,
};
use kvferry_core::{Epoch, GroupId, Moment, NodeId, Rank};

use crate::mesh::PeerDown;
use crate::nic::NicReport;
use crate::paths;
use crate::router::Incoming;
use crate::seams::Tick;
use crate::shell::{Inspect, Shell};

/// One prefill rank.
pub(crate) type PrefillWorker = Worker<PrefillRank>;
/// One decode rank.
pub(crate) type DecodeWorker = Worker<DecodeRank>;

/// What the cores of both kinds of rank have in common.
pub(crate) trait RankCore: Unpin + 'static {
    /// Whether only the group's leader may say that.
    fn is_leaders_word(message: &Wire) -> bool;
    fn outbox(&mut self) -> &mut Outbox;
    fn poll_timeout(&self) -> Option<Moment>;
    fn handle_members(&mut self, now: Moment, list: &MemberList);
    /// `mine`: which rank of this rank's own group it was.
    fn handle_lost(&mut self, now: Moment, lost: &Lost, mine: Option<Rank>);
    fn handle_peer(&mut self, now: Moment, node: NodeId, profile: WorkerProfile);
    fn handle_peer_down(&mut self, now: Moment, node: NodeId, cause: &str);
    fn handle_message(&mut self, now: Moment, from: NodeId, message: Wire);
    fn handle_engine(&mut self, now: Moment, event: EngineEvent);
    fn handle_nic(&mut self, now: Moment, nic: usize, event: NicEvent);
    fn handle_timeout(&mut self, now: Moment);
    fn handle_leader_up(&mut self, now: Moment, leader: NodeId);
    fn handle_leader_down(&mut self, now: Moment, leader: NodeId, cause: &str);
    fn vitals(&self) -> Vitals;
}

/// One rank.
pub(crate) struct Worker<C> {
    core: C,
    shell: Shell,
    group: GroupId,
    roster: Roster,
    /// The node of the group's rank 0: only it gives work and decides.
    leader: Leader,
}

impl<C: RankCore> Worker<C> {
    /// A worker over its core.
    pub(crate) fn new(core: C, shell: Shell, group: GroupId) -> Self {
        let leader = Leader::new(shell.router().node());
        Worker { core, shell, group, roster: Roster::default(), leader }
    }

    fn turn(&mut self, ctx: &mut Context<Self>) {
        self.shell.run(self.core.outbox(), paths::log);
        self.shell.arm(self.core.poll_timeout(), || ctx.address().recipient());
    }
}

impl<C: RankCore> Actor for Worker<C> {
    type Context = Context<Self>;
}

impl<C: RankCore> Handler<Incoming> for Worker<C> {
    type Result = ();

    fn handle(&mut self, Incoming { from, talk, message }: Incoming, ctx: &mut Context<Self>) {
        let now = self.shell.now();
        self.shell.hear(from, talk);
        match message {
            Wire::Members(list) => {
                self.roster.update(&list, self.group);
                self.core.handle_members(now, &list);
                if let Some(leader) = self.leader.believe(&self.roster) {
                    self.core.handle_leader_up(now, leader);
                }
            }
            Wire::Lost(lost) => {
                // The loss of an earlier incarnation is no news once a later one is here. What the loss of another rank of this group means its
                // leader says: work that it gave since may have been given with that rank's next incarnation.
                let mine = self.roster.rank_of(lost.node).filter(|rank| *rank == Rank(0));
                if !self.shell.router().is_newer(lost.node, lost.epoch) {
                    self.roster.vacate(&lost);
                    self.core.handle_lost(now, &lost, mine);
                }
            }
            Wire::Profile(profile) => {
                if let Some(profile) = profile.worker {
                    if profile.group == self.group && profile.rank == Rank(0) {
                        match self.leader.meet(from, &self.roster) {
                            true => self.core.handle_leader_up(now, from),
                            false => self.shell.observe(Event::Ignored { from, what: NOT_ITS_PLACE }),
                        }
                    }
                    self.core.handle_peer(now, from, profile);
                }
            }
            message if C::is_leaders_word(&message) && !self.leader.is(from) => {
                self.shell.observe(Event::Ignored { from, what: "work from a node that does not lead this group" });
            }
            message => self.core.handle_message(now, from, message),
        }
        self.turn(ctx);
    }
}

impl<C: RankCore> Handler<Answer> for Worker<C> {
    type Result = ();

    fn handle(&mut self, Answer(event): Answer, ctx: &mut Context<Self>) {
        self.core.handle_engine(self.shell.now(), event);
        self.turn(ctx);
    }
}

impl<C: RankCore> Handler<NicReport> for Worker<C> {
    type Result = ();

    fn handle(&mut self, NicReport { nic, events }: NicReport, ctx: &mut Context<Self>) {
        for event in events {
            self.core.handle_nic(self.shell.now(), nic, event);
        }
        self.turn(ctx);
    }
}

impl<C: RankCore> Handler<PeerDown> for Worker<C> {
    type Result = ();

    fn handle(&mut self, PeerDown { node, cause, .. }: PeerDown, ctx: &mut Context<Self>) {
        let now = self.shell.now();
        self.shell.part(node);
        self.core.handle_peer_down(now, node, &cause);
        if self.leader.part(node) {
            self.core.handle_leader_down(now, node, &cause);
        }
        self.turn(ctx);
    }
}

impl<C: RankCore> Handler<Inspect> for Worker<C> {
    type Result = ();

    fn handle(&mut self, inspect: Inspect, _: &mut Context<Self>) {
        inspect.answer(self.core.vitals());
    }
}

impl<C: RankCore> Handler<Tick> for Worker<C> {
    type Result = ();

    fn handle(&mut self, _: Tick, ctx: &mut Context<Self>) {
        let now = self.shell.ticked();
        self.core.handle_timeout(now);
        self.turn(ctx);
    }
}

macro_rules! rank_core {
    ($core:ty, leader: $leaders:pat, members: $members:expr, lost: $lost:expr, peer_down: $down:expr,
        leader_up: $leader_up:expr, leader_down: $leader_down:expr) => {
        impl RankCore for $core {
            fn is_leaders_word(message: &Wire) -> bool {
                matches!(message, $leaders)
            }

            fn outbox(&mut self) -> &mut Outbox {
                self.outbox()
            }

            fn poll_timeout(&self) -> Option<Moment> {
                self.poll_timeout()
            }

            fn handle_members(&mut self, now: Moment, list: &MemberList) {
                $members(self, now, list);
            }

            fn handle_lost(&mut self, now: Moment, lost: &Lost, mine: Option<Rank>) {
                $lost(self, now, lost, mine);
            }

            fn handle_peer(&mut self, now: Moment, node: NodeId, profile: WorkerProfile) {
                self.handle_peer(now, node, profile);
            }

            fn handle_peer_down(&mut self, now: Moment, node: NodeId, cause: &str) {
                $down(self, now, node, cause);
            }

            fn handle_message(&mut self, now: Moment, from: NodeId, message: Wire) {
                self.handle_message(now, from, message);
            }

            fn handle_engine(&mut self, now: Moment, event: EngineEvent) {
                self.handle_engine(now, event);
            }

            fn handle_nic(&mut self, now: Moment, nic: usize, event: NicEvent) {
                self.handle_nic(now, nic, event);
            }

            fn handle_timeout(&mut self, now: Moment) {
                self.handle_timeout(now);
            }

            fn handle_leader_up(&mut self, now: Moment, leader: NodeId) {
                $leader_up(self, now, leader);
            }

            fn handle_leader_down(&mut self, now: Moment, leader: NodeId, cause: &str) {
                $leader_down(self, now, leader, cause);
            }

            fn vitals(&self) -> Vitals {
                self.vitals()
            }
        }
    };
}

rank_core! {
    PrefillRank,
    leader: Wire::Prefill(_) | Wire::Renew { .. } | Wire::Release { .. },
    members: |_: &mut PrefillRank, _, _| {},
    lost: |core: &mut PrefillRank, now, lost, mine: Option<Rank>| core.handle_lost(now, lost, mine.is_some()),
    peer_down: |core: &mut PrefillRank, now, node, _| core.handle_peer_down(now, node),
    leader_up: |core: &mut PrefillRank, now, leader| core.handle_leader_up(now, leader),
    leader_down: |core: &mut PrefillRank, now, _, _| core.handle_leader_down(now)
}

rank_core! {
    DecodeRank,
    leader: Wire::Fetch(_) | Wire::Settled { .. },
    members: |core: &mut DecodeRank, now, list: &MemberList| core.handle_members(now, list),
    lost: |core: &mut DecodeRank, now, lost, mine| core.handle_lost(now, lost, mine),
    peer_down: |core: &mut DecodeRank, now, node, cause| core.handle_peer_down(now, node, cause),
    leader_up: |core: &mut DecodeRank, now, leader| core.handle_leader_up(now, leader),
    leader_down: |core: &mut DecodeRank, now, leader, cause| core.handle_leader_down(now, leader, cause)
}

/// An answer of the serving engine.
#[derive(Debug)]
pub struct Answer(pub EngineEvent);

impl Message for Answer {
    type Result = ();
}

/// Of a node that says to be a rank that the directory gives to another.
pub(crate) const NOT_ITS_PLACE: &str = "a place that the directory gives to another node";

/// Which node is which rank of this rank's own group, remembered beyond its loss: its earlier incarnations may be lost later than it came.
#[derive(Debug, Default)]
pub(crate) struct Roster {
    ranks: BTreeMap<NodeId, Rank>,
    /// Those whose place may be another node's by now.
    vacated: BTreeMap<NodeId, Epoch>,
}

impl Roster {
    pub(crate) fn update(&mut self, list: &MemberList, group: GroupId) {
        for member in &list.members {
            match member.place.as_ref().filter(|place| place.group == group) {
                Some(place) => self.ranks.insert(member.node, place.rank),
                None => self.ranks.remove(&member.node),
            };
            if self.vacated.get(&member.node).is_some_and(|lost| *lost < member.epoch) {
                self.vacated.remove(&member.node);
            }
        }
    }

    /// A node is gone, and has not come back already.
    pub(crate) fn vacate(&mut self, lost: &Lost) {
        if self.ranks.contains_key(&lost.node) {
            self.vacated.insert(lost.node, lost.epoch);
        }
    }

    pub(crate) fn rank_of(&self, node: NodeId) -> Option<Rank> {
        self.ranks.get(&node).copied()
    }

    /// Whether a node may be believed to be that rank. It may say so before the directory does, but not against it.
    pub(crate) fn allows(&self, node: NodeId, rank: Rank) -> bool {
        match self.rank_of(node) {
            Some(known) => known == rank,
            None => !self.ranks.iter().any(|(holder, known)| *known == rank && !self.vacated.contains_key(holder)),
        }
    }
}

/// Which node leads this rank's group. A leader introduces itself before it says anything else.
#[derive(Debug)]
pub(crate) struct Leader {
    here: NodeId,
    elsewhere: Option<NodeId>,
    /// Says that it leads, which the directory has yet to confirm.
    doubted: Option<NodeId>,
}

impl Leader {
    pub(crate) fn new(here: NodeId) -> Self {
        Leader { here, elsewhere: None, doubted: None }
    }

    /// A peer introduced itself as the leader. Says whether it may be that.
    pub(crate) fn meet(&mut self, from: NodeId, roster: &Roster) -> bool {
        let leads = roster.allows(from, Rank(0));
        *(if leads { &mut self.elsewhere } else { &mut self.doubted }) = Some(from);
        leads
    }

    /// The directory has spoken. Says who is the leader after all.
    pub(crate) fn believe(&mut self, roster: &Roster) -> Option<NodeId> {
        let leader = self.doubted.take_if(|node| roster.allows(*node, Rank(0)))?;
        self.elsewhere = Some(leader);
        Some(leader)
    }

    /// A node cannot be reached any more. Says whether it led this rank's group.
    pub(crate) fn part(&mut self, node: NodeId) -> bool {
        self.doubted.take_if(|doubted| *doubted == node);
        self.elsewhere.take_if(|leader| *leader == node).is_some()
    }

    /// Whether a message of `node` is the leader's; a leader on this node has no session.
    pub(crate) fn is(&self, node: NodeId) -> bool {
        node == self.here || self.elsewhere == Some(node)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use kvferry_core::GroupGeometry;
    use kvferry_core::protocol::{Member, Place, Role};

    use super::*;

    const GROUP: GroupId = GroupId(3);

    fn member(node: u64, epoch: u64, rank: u32) -> Option<MemberList> {
        let model = kvferry_core::Model::preset("tiny")?;
        let geometry = GroupGeometry { model, format: Default::default(), parallel: Default::default() };
        let place = Place {
            role: Role::Decode,
            group: GROUP,
            rank: Rank(rank),
            geometry: Arc::new(geometry),
            blocks: vec![1],
            handovers_max: 1,
        };
        let member = Member { node: NodeId(node), epoch: Epoch(epoch), address: String::new(), place: Some(place) };
        Some(MemberList { whole: false, members: vec![Arc::new(member)] })
    }

    #[test]
    fn nobody_takes_a_place_against_the_directorys_word() {
        let (mut roster, mut leader) = (Roster::default(), Leader::new(NodeId(2)));
        assert!(leader.meet(NodeId(1), &roster), "it may be sooner than the directory's word");
        roster.update(&member(1, 1, 0).unwrap_or_default(), GROUP);
        roster.update(&member(2, 1, 1).unwrap_or_default(), GROUP);
        assert!(!leader.meet(NodeId(9), &roster) && !leader.is(NodeId(9)), "a stranger");
        assert!(!leader.meet(NodeId(2), &roster), "another rank");
        assert!(leader.is(NodeId(1)));
        assert_eq!(leader.believe(&roster), None);
        let lost = Lost { node: NodeId(1), epoch: Epoch(1), cause: String::new() };
        roster.vacate(&lost);
        assert!(roster.allows(NodeId(9), Rank(0)), "the place is free");
        roster.update(&member(1, 2, 0).unwrap_or_default(), GROUP);
        assert!(!leader.meet(NodeId(9), &roster), "it has come back");
    }

    #[test]
    fn who_was_doubted_is_believed_once_the_directory_says_so() {
        let (mut roster, mut leader) = (Roster::default(), Leader::new(NodeId(2)));
        roster.update(&member(1, 1, 0).unwrap_or_default(), GROUP);
        assert!(!leader.meet(NodeId(9), &roster));
        roster.update(&member(9, 1, 0).unwrap_or_default(), GROUP);
        assert_eq!(leader.believe(&roster), Some(NodeId(9)));
        assert!(leader.is(NodeId(9)));
        assert_eq!(leader.believe(&roster), None, "once");
    }
}
