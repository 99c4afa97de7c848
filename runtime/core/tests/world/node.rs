//! One rank's node: its cores, its engine, its NIC.

use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use kvferry_core::protocol::{
    Command, DeadlineTerms, DecodeLeader, DecodeRank, EngineCall, EngineEvent, Event, Lost, Message, NicAdvert,
    NicCommand, NicEvent, Outbox, PrefillLeader, PrefillRank, QuarantineTerms, Role, Vitals, WorkerProfile,
};
use kvferry_core::{
    Direction, End, FenceProof, GroupGeometry, GroupId, HandoverId, Moment, NodeId, Rank, TransferId, TransportKind,
};

use super::engine::Engine;
use super::nic::{Flight, Nic};
use super::{BLOCKS, SCHEDULER, World, leases};

pub(super) struct Node {
    pub(super) id: NodeId,
    pub(super) group: GroupId,
    pub(super) rank: Rank,
    pub(super) profile: WorkerProfile,
    pub(super) engine: Engine,
    pub(super) nic: Nic,
    core: RankCore,
    leader: Option<LeaderCore>,
    /// The node of the group's rank 0, unless it is this one: only it gives work and decides.
    elsewhere: Option<NodeId>,
    places: BTreeMap<NodeId, (GroupId, Rank)>,
    /// Whose loss it knows: nothing that they said counts any more.
    gone: BTreeSet<NodeId>,
}

enum RankCore {
    Prefill(Box<PrefillRank>),
    Decode(Box<DecodeRank>),
}

enum LeaderCore {
    Prefill(PrefillLeader),
    Decode(DecodeLeader),
}

impl Node {
    pub(super) fn new(
        id: NodeId,
        (role, group, rank): (Role, GroupId, Rank),
        geometry: &Arc<GroupGeometry>,
        direction: Direction,
        steps: u32,
        quarantine: QuarantineTerms,
    ) -> Self {
        let layout = Arc::new(geometry.shard(rank).expect("a valid rank").layout(&[BLOCKS]));
        let nic = NicAdvert {
            kind: TransportKind::Sim,
            device: "sim0".to_owned(),
            host: String::new(),
            address: Bytes::new(),
            keys: Bytes::new(),
            domain: None,
            gpu: None,
        };
        let profile = WorkerProfile {
            role,
            group,
            rank,
            geometry: Arc::clone(geometry),
            layout,
            nics: vec![nic],
            direction: Some(direction),
            rails: 0,
        };
        let core = match role {
            Role::Prefill => RankCore::Prefill(Box::new(PrefillRank::new(profile.clone(), leases(), quarantine))),
            Role::Decode => {
                let deadlines = DeadlineTerms::default();
                RankCore::Decode(Box::new(DecodeRank::new(profile.clone(), leases(), deadlines, quarantine)))
            }
        };
        let shared = Arc::clone(geometry);
        let leader = (rank == Rank(0)).then(|| match role {
            Role::Prefill => LeaderCore::Prefill(PrefillLeader::new(group, shared, SCHEDULER, Duration::from_secs(60))),
            Role::Decode => LeaderCore::Decode(DecodeLeader::new(group, shared, SCHEDULER, DeadlineTerms::default())),
        });
        let engine = Engine::new(geometry, rank, steps);
        let (nic, places, gone) = (Nic::default(), BTreeMap::new(), BTreeSet::new());
        Node { id, group, rank, profile, engine, nic, core, leader, elsewhere: None, places, gone }
    }

    pub(super) fn steps(&self) -> u32 {
        self.engine.steps.len() as u32
    }

    pub(super) fn agree(&mut self, steps: u32) {
        self.engine.agree(steps);
    }

    pub(super) fn is_busy(&self) -> bool {
        let open = match &self.core {
            RankCore::Prefill(core) => core.offers(),
            RankCore::Decode(core) => core.fetches(),
        };
        open > 0 || self.engine.is_busy() || !self.nic.flights.is_empty()
    }

    /// Whether it was told that another node is lost.
    pub(super) fn has_lost(&self, node: NodeId) -> bool {
        self.gone.contains(&node)
    }

    pub(super) fn describe(&self) -> String {
        let flights: Vec<String> = self.nic.flights.keys().map(ToString::to_string).collect();
        format!("{} {} {}: {:?}, in flight {flights:?}", self.id, self.group, self.rank, self.engine.leak())
    }

    pub(super) fn poll_timeout(&self) -> Option<Moment> {
        let rank = match &self.core {
            RankCore::Prefill(core) => core.poll_timeout(),
            RankCore::Decode(core) => core.poll_timeout(),
        };
        let leader = match &self.leader {
            Some(LeaderCore::Prefill(core)) => core.poll_timeout(),
            Some(LeaderCore::Decode(core)) => core.poll_timeout(),
            None => None,
        };
        rank.into_iter().chain(leader).min()
    }

    pub(super) fn fire(&mut self, now: Moment) {
        let due = |timer: Option<Moment>| timer.is_some_and(|timer| timer <= now);
        match &mut self.core {
            RankCore::Prefill(core) if due(core.poll_timeout()) => core.handle_timeout(now),
            RankCore::Decode(core) if due(core.poll_timeout()) => core.handle_timeout(now),
            _ => {}
        }
        match &mut self.leader {
            Some(LeaderCore::Prefill(core)) if due(core.poll_timeout()) => core.handle_timeout(now),
            Some(LeaderCore::Decode(core)) if due(core.poll_timeout()) => core.handle_timeout(now),
            _ => {}
        }
    }

    pub(super) fn vitals(&self) -> impl Iterator<Item = Vitals> {
        let rank = match &self.core {
            RankCore::Prefill(core) => core.vitals(),
            RankCore::Decode(core) => core.vitals(),
        };
        let leader = self.leader.as_ref().map(|leader| match leader {
            LeaderCore::Prefill(core) => core.vitals(),
            LeaderCore::Decode(core) => core.vitals(),
        });
        [rank].into_iter().chain(leader)
    }

    pub(super) fn handle_down(&mut self, now: Moment, from: NodeId) {
        let cause = "the session ended";
        match &mut self.leader {
            Some(LeaderCore::Prefill(core)) => core.handle_peer_down(now, from, cause),
            Some(LeaderCore::Decode(core)) => core.handle_peer_down(now, from, cause),
            None => {}
        }
        let leads = self.elsewhere.take_if(|leader| *leader == from).is_some();
        match &mut self.core {
            RankCore::Prefill(core) => {
                core.handle_peer_down(now, from);
                if leads {
                    core.handle_leader_down(now);
                }
            }
            RankCore::Decode(core) => {
                core.handle_peer_down(now, from, cause);
                if leads {
                    core.handle_leader_down(now, from, cause);
                }
            }
        }
    }

    /// A peer, or the scheduler, introduces itself.
    fn handle_profile(&mut self, now: Moment, from: NodeId, profile: Option<WorkerProfile>) {
        let rank = profile.as_ref().filter(|profile| profile.group == self.group).map(|profile| profile.rank);
        match (&mut self.leader, &profile) {
            (Some(LeaderCore::Prefill(core)), None) => core.handle_scheduler(),
            (Some(LeaderCore::Decode(core)), None) => core.handle_scheduler(),
            (Some(LeaderCore::Prefill(core)), Some(_)) => {
                if let Some(rank) = rank {
                    core.handle_rank(rank, from);
                    core.handle_peer_up(from);
                }
            }
            // A decode rank is met once it says what it holds.
            (Some(LeaderCore::Decode(core)), Some(_)) => {
                if let Some(rank) = rank {
                    core.handle_rank(rank, from);
                }
            }
            (None, _) => {}
        }
        let Some(profile) = profile else { return };
        let leads = profile.group == self.group && profile.rank == Rank(0);
        if leads {
            self.elsewhere = Some(from);
        }
        match &mut self.core {
            RankCore::Prefill(core) => core.handle_peer(now, from, profile),
            RankCore::Decode(core) => {
                if leads {
                    core.handle_leader_up(now, from);
                }
                core.handle_peer(now, from, profile);
            }
        }
    }

    pub(super) fn handle_message(&mut self, now: Moment, from: NodeId, message: Message) {
        if self.gone.contains(&from) {
            return;
        }
        match message {
            Message::Members(list) => {
                for member in &list.members {
                    let Some(place) = &member.place else { continue };
                    self.places.insert(member.node, (place.group, place.rank));
                    if place.group == self.group {
                        match &mut self.leader {
                            Some(LeaderCore::Prefill(core)) => core.handle_rank(place.rank, member.node),
                            Some(LeaderCore::Decode(core)) => core.handle_rank(place.rank, member.node),
                            None => {}
                        }
                    }
                }
                if let RankCore::Decode(core) = &mut self.core {
                    core.handle_members(now, &list);
                }
            }
            Message::Lost(lost) => self.handle_lost(now, &lost),
            Message::Profile(profile) => self.handle_profile(now, from, profile.worker),
            message if self.is_for_leader(from, &message) => match &mut self.leader {
                Some(LeaderCore::Prefill(core)) => core.handle_message(now, from, message),
                Some(LeaderCore::Decode(core)) => core.handle_message(now, from, message),
                None => {}
            },
            message if is_leaders_word(&message) && from != self.id && self.elsewhere != Some(from) => {}
            message => match &mut self.core {
                RankCore::Prefill(core) => core.handle_message(now, from, message),
                RankCore::Decode(core) => core.handle_message(now, from, message),
            },
        }
    }

    fn handle_lost(&mut self, now: Moment, lost: &Lost) {
        self.gone.insert(lost.node);
        let mine = self.places.get(&lost.node).filter(|(group, _)| *group == self.group).map(|(_, rank)| *rank);
        match &mut self.leader {
            Some(LeaderCore::Prefill(core)) => core.handle_lost(now, lost),
            Some(LeaderCore::Decode(core)) => core.handle_lost(now, lost),
            None => {}
        }
        match &mut self.core {
            RankCore::Prefill(core) => core.handle_lost(now, lost, mine.is_some()),
            RankCore::Decode(core) => core.handle_lost(now, lost, mine),
        }
    }

    /// The scheduler speaks to leaders; ranks report to them.
    fn is_for_leader(&self, from: NodeId, message: &Message) -> bool {
        let report = matches!(
            message,
            Message::RankOpened { .. }
                | Message::RankReady { .. }
                | Message::RankFailed { .. }
                | Message::Started { .. }
                | Message::RankDone { .. }
                | Message::Freed { .. }
                | Message::Holds { .. }
                | Message::Holding { .. }
                | Message::Health { .. }
        );
        self.leader.is_some() && (from == SCHEDULER || report)
    }

    fn outboxes(&mut self) -> impl Iterator<Item = &mut Outbox> {
        let rank = match &mut self.core {
            RankCore::Prefill(core) => core.outbox(),
            RankCore::Decode(core) => core.outbox(),
        };
        let leader = self.leader.as_mut().map(|leader| match leader {
            LeaderCore::Prefill(core) => core.outbox(),
            LeaderCore::Decode(core) => core.outbox(),
        });
        [rank].into_iter().chain(leader)
    }

    fn events(&mut self) -> Vec<Event> {
        self.outboxes().flat_map(|outbox| std::iter::from_fn(|| outbox.poll_event()).collect::<Vec<_>>()).collect()
    }

    pub(super) fn handle_nic(&mut self, now: Moment, event: NicEvent) {
        match &mut self.core {
            RankCore::Prefill(core) => core.handle_nic(now, 0, event),
            RankCore::Decode(core) => core.handle_nic(now, 0, event),
        }
    }

    fn next_command(&mut self) -> Option<Command> {
        self.outboxes().find_map(Outbox::poll_command)
    }
}

impl World {
    /// Carries out everything that a node's cores want.
    pub(super) fn drain(&mut self, id: NodeId) {
        loop {
            let Some(node) = self.nodes.get_mut(&id) else { return };
            for event in node.events() {
                if let Event::Settled { report } = event {
                    self.decided(report.handover, report.outcome.is_delivered());
                }
            }
            let Some(node) = self.nodes.get_mut(&id) else { return };
            let Some(command) = node.next_command() else {
                for vitals in node.vitals().filter(Vitals::is_stuck) {
                    self.violations.push(format!("I5: {id} may wait for ever: {vitals:?}"));
                }
                return;
            };
            match command {
                Command::Send { to, message } if to == id => node.handle_message(self.now, id, message),
                Command::Send { to, message } => self.push(id, to, message),
                Command::Engine(call) => self.engine_call(id, call),
                Command::Nic { command, .. } => self.nic_command(id, command),
                _ => {}
            }
        }
    }

    fn engine_call(&mut self, id: NodeId, call: EngineCall) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        // Blocks must not change hands while our own NIC still touches them.
        let touched = |mine: &dyn Fn(HandoverId) -> bool| node.nic.flights.keys().any(|flight| mine(flight.handover()));
        let busy = match &call {
            EngineCall::Release { request, .. } => {
                touched(&|handover| self.paired.get(&handover).is_some_and(|(paired, _)| paired == request))
            }
            EngineCall::Settled { handover, quarantined: false, .. } | EngineCall::Returned { handover, .. } => {
                touched(&|flying| flying == *handover)
            }
            _ => false,
        };
        if busy {
            self.violations.push(format!("I1: {id} gives blocks back that a transfer still touches: {call:?}"));
        }
        if let Err(violation) = node.engine.call(call) {
            self.violations.push(format!("{id}: {violation}"));
        }
    }

    fn nic_command(&mut self, id: NodeId, command: NicCommand) {
        let Some(node) = self.nodes.get(&id) else { return };
        let prefill = node.profile.role == Role::Prefill;
        if let NicCommand::Post { id: transfer, program, .. } | NicCommand::Expect { id: transfer, program, .. } =
            &command
        {
            let handover = transfer.handover();
            if node.engine.has_settled(handover) {
                self.violations.push(format!("{id}: {transfer} was posted after its handover was settled"));
            }
            let held = self.paired.get(&handover).is_some_and(|(request, _)| node.engine.holds(*request));
            if prefill && !held {
                self.violations.push(format!("{id}: {transfer} reads blocks that are not there"));
            }
            let end = if prefill { End::Source } else { End::Destination };
            if let Err(error) = program.validate(end, &node.profile.layout) {
                self.violations.push(format!("{id}: {transfer} is not valid here: {error}"));
            }
        }
        let stubborn = self.stubborn && self.random.one_in(2);
        let accepted = self.nodes.get_mut(&id).map_or(Ok(()), |node| node.nic.command(command, stubborn));
        if let Err(violation) = accepted {
            self.violations.push(format!("{id}: {violation}"));
        }
    }

    pub(super) fn engine_acts(&mut self, id: NodeId) {
        let (now, faulty) = (self.now, self.faulty);
        let Some(node) = self.nodes.get_mut(&id) else { return };
        if let Some(event) = node.engine.act(&mut self.random, faulty) {
            node.handle_engine(now, event);
            self.drain(id);
        }
    }

    /// A transfer ends, well or badly.
    pub(super) fn nic_acts(&mut self, id: NodeId, transfer: TransferId) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let Some(flight) = node.nic.flights.remove(&transfer) else { return };
        let by_chance = self.faulty && self.random.one_in(40);
        // A cancellation may come too late.
        let stopped = flight.cancelled && !self.random.one_in(4);
        let done = match flight.posted {
            None => flight.arrived && !stopped,
            Some((peer, _)) if by_chance || stopped || !node.nic.is_connected(peer) => false,
            Some((peer, Direction::Pull)) => self.pulls(peer, transfer),
            Some((peer, Direction::Push)) => self.pushes(peer, transfer),
        };
        let event = match done {
            true => NicEvent::Done { id: transfer, bytes: flight.bytes, pieces: 1 },
            false => NicEvent::Failed { id: transfer, reason: "by chance".to_owned() },
        };
        self.nic_says(id, event);
    }

    fn nic_says(&mut self, id: NodeId, event: NicEvent) {
        let now = self.now;
        if let Some(node) = self.nodes.get_mut(&id) {
            node.handle_nic(now, event);
        }
        self.drain(id);
    }

    /// A fence that was asked for gets through, or not: then it is asked for again.
    pub(super) fn nic_fences(&mut self, id: NodeId, peer: NodeId) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let Some((address, ticket)) = node.nic.fences.remove(&peer) else { return };
        if self.faulty && self.random.one_in(3) {
            return;
        }
        let with = |flight: &Flight, transfer: TransferId| match flight.posted {
            Some((node, _)) => node == peer,
            None => self
                .sources
                .get(&transfer.handover())
                .is_some_and(|group| self.places.get(&peer) == Some(&(*group, transfer.source()))),
        };
        let ended = node.nic.flights.iter().filter(|(id, flight)| with(flight, **id));
        let ended: Vec<(TransferId, bool)> = ended.map(|(id, flight)| (*id, flight.cancelled)).collect();
        for (transfer, _) in &ended {
            node.nic.flights.remove(transfer);
        }
        // What was cancelled before may end in the proof alone.
        for (transfer, cancelled) in ended {
            if !cancelled || self.random.one_in(2) {
                self.nic_says(id, NicEvent::Failed { id: transfer, reason: "fenced".to_owned() });
            }
        }
        self.nic_says(id, NicEvent::Fenced { node: peer, address, ticket, proof: FenceProof::OwnerCopies });
    }

    /// A foreign read gets whatever is in those blocks now.
    fn pulls(&mut self, source: NodeId, transfer: TransferId) -> bool {
        let Some(source) = self.nodes.get(&source) else { return false };
        let handover = transfer.handover();
        if !self.paired.get(&handover).is_some_and(|(request, _)| source.engine.holds(*request)) {
            self.tainted.insert(handover);
        }
        true
    }

    /// The receiver takes only what it expects.
    fn pushes(&mut self, destination: NodeId, transfer: TransferId) -> bool {
        let Some(flight) = self.nodes.get_mut(&destination).and_then(|node| node.nic.flights.get_mut(&transfer)) else {
            return false;
        };
        flight.arrived |= !flight.cancelled;
        flight.arrived
    }
}

impl Node {
    fn handle_engine(&mut self, now: Moment, event: EngineEvent) {
        match &mut self.core {
            RankCore::Prefill(core) => core.handle_engine(now, event),
            RankCore::Decode(core) => core.handle_engine(now, event),
        }
    }
}

/// What only the leader of a rank's group may say to it.
fn is_leaders_word(message: &Message) -> bool {
    matches!(
        message,
        Message::Prefill(_)
            | Message::Renew { .. }
            | Message::Release { .. }
            | Message::Fetch(_)
            | Message::Settled { .. }
    )
}
