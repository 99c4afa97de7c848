//! One decode rank: fetches, and the destination blocks that they own until nothing can write them.

mod ends;
mod legs;
mod rails;
mod shares;

use std::collections::BTreeMap;

use super::fetch::{Fetch, Leg, LegState, Path, Placed};
use super::peer::Peer;
use super::prefill::check_steps;
use super::sources::Sources;
use super::{
    Awaited, Begun, Deadline, DeadlineTerms, EngineCall, EngineEvent, Event, FailReason, FetchJob, Lease, LeaseTerms,
    Lost, MemberList, Message, NicEvent, Outbox, Outcome, Pace, Part, PathReport, QuarantineTerms, RailTerms, Role,
    Vitals, WorkerProfile,
};
use crate::{HandoverId, Moment, NodeId, Plane, Rank, RequestId, Tables, TransferId};

/// The state machine of a decode rank.
///
/// Inputs are `handle_*(now, …)`; after each, drain [`DecodeRank::outbox`] and arm one timer for [`DecodeRank::poll_timeout`].
#[derive(Debug)]
pub struct DecodeRank {
    local: WorkerProfile,
    /// Whoever gave the latest job: the node of the group's rank 0.
    leader: Option<NodeId>,
    leases: LeaseTerms,
    deadlines: DeadlineTerms,
    pace: Pace,
    fetches: BTreeMap<HandoverId, Fetch>,
    peers: BTreeMap<NodeId, Result<Peer, FailReason>>,
    require_rdma: bool,
    rails: RailTerms,
    sources: Sources,
    renew_at: Option<Moment>,
    quarantine: QuarantineTerms,
    /// So many fences were asked for.
    fences_asked: u64,
    /// So many conversations with peers have begun.
    conversations: u64,
    /// Bytes of the pool.
    pool_bytes: u64,
    /// Delivered handovers whose blocks the engine still uses.
    held: BTreeMap<HandoverId, (RequestId, u64)>,
    /// What the leader was told last.
    trouble: Option<String>,
    outbox: Outbox,
}

impl DecodeRank {
    /// A rank with no fetches.
    pub fn new(
        local: WorkerProfile,
        leases: LeaseTerms,
        deadlines: DeadlineTerms,
        quarantine: QuarantineTerms,
    ) -> Self {
        let plane_bytes = |plane: &Plane| u64::from(plane.blocks).saturating_mul(plane.block_bytes);
        DecodeRank {
            pool_bytes: local.layout.planes.iter().map(plane_bytes).fold(0, u64::saturating_add),
            quarantine,
            fences_asked: 0,
            conversations: 0,
            held: BTreeMap::new(),
            trouble: None,
            local,
            leader: None,
            leases,
            deadlines,
            pace: Pace::new(deadlines),
            fetches: BTreeMap::new(),
            peers: BTreeMap::new(),
            require_rdma: false,
            rails: RailTerms::default(),
            sources: Sources::default(),
            renew_at: None,
            outbox: Outbox::default(),
        }
    }

    /// With RDMA required between hosts, or not: then no path without it is taken.
    pub fn with_rdma_required(mut self, required: bool) -> Self {
        self.require_rdma = required;
        self
    }

    /// Commands and events to drain.
    pub fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// Fetches that are not fully over.
    pub fn fetches(&self) -> usize {
        self.fetches.len()
    }

    /// When [`DecodeRank::handle_timeout`] is due.
    pub fn poll_timeout(&self) -> Option<Moment> {
        let deadlines = self.fetches.values().filter(|fetch| fetch.settled.is_none()).map(|fetch| fetch.deadline.at);
        let fences = self.fetches.values().filter_map(|fetch| fetch.fence_at);
        deadlines.chain(fences).chain(self.rails_due()).chain(self.renew_at.filter(|_| !self.fetches.is_empty())).min()
    }

    /// What is in hand.
    pub fn vitals(&self) -> Vitals {
        let quarantined = self.fetches.values().filter(|fetch| fetch.settled.is_some()).count() as u64;
        Vitals {
            name: "decode rank",
            waiting: vec![
                ("fetches", self.fetches.len() as u64 - quarantined),
                ("quarantined", quarantined),
                ("quarantined_blocks", self.quarantined_blocks()),
            ],
            engine: vec![("held", self.held.len() as u64)],
            credits: Vec::new(),
            due: self.poll_timeout(),
        }
    }

    /// The group's leader is there (again): what it said since is what counts, and it learns what is held here.
    pub fn handle_leader_up(&mut self, _now: Moment, leader: NodeId) {
        self.leader = Some(leader);
        let fetches =
            self.fetches.iter().map(|(id, fetch)| (*id, fetch.pairing.spec.request, fetch.pairing.spec.tokens));
        let held = self.held.iter().map(|(id, (request, tokens))| (*id, *request, *tokens));
        let handovers = fetches.chain(held).collect();
        self.outbox.send(leader, Message::Holding { handovers });
        if self.trouble.is_some() {
            self.outbox.send(leader, Message::Health { trouble: self.trouble.clone() });
        }
    }

    /// The leader cannot be reached any more, while both live. What it has not got this rank's word on cannot be delivered; of the rest it will
    /// say what it decided once it is back.
    pub fn handle_leader_down(&mut self, now: Moment, leader: NodeId, cause: &str) {
        let reason = FailReason::RankLost {
            role: Role::Decode,
            group: self.local.group,
            rank: Rank(0),
            node: leader,
            cause: cause.to_owned(),
        };
        for handover in self.handovers() {
            if self.fetches.get(&handover).is_some_and(|fetch| !fetch.reported) {
                self.fail(now, handover, reason.clone());
                self.settle(now, handover, Outcome::Failed { reason: reason.clone() });
            }
        }
    }

    /// The directory tells of members.
    pub fn handle_members(&mut self, now: Moment, list: &MemberList) {
        self.sources.handle_members(list);
        for handover in self.handovers() {
            self.resolve(now, handover);
        }
    }

    /// A session with a peer stands and it has introduced itself.
    pub fn handle_peer(&mut self, now: Moment, node: NodeId, profile: WorkerProfile) {
        if profile.role != Role::Prefill {
            return;
        }
        self.conversations += 1;
        let conversation = self.conversations;
        let peer = Peer::meet(&self.local, profile, self.require_rdma)
            .map(|peer| peer.over_rails(&self.local, self.rails, self.require_rdma))
            .map(|peer| peer.of_conversation(conversation));
        if let Ok(peer) = &peer {
            peer.tell_path(node, &self.local, self.require_rdma, &mut self.outbox);
            peer.connect(node, Role::Decode, &mut self.outbox);
        }
        self.peers.insert(node, peer);
        for handover in self.handovers() {
            self.open_leg(now, handover, node);
        }
    }

    /// A session ended: what still depended on that peer fails.
    pub fn handle_peer_down(&mut self, now: Moment, node: NodeId, cause: &str) {
        if let Some(Ok(peer)) = self.peers.remove(&node) {
            peer.disconnect(node, Role::Decode, &mut self.outbox);
        }
        for handover in self.handovers() {
            if let Some(reason) = self.owed_by(handover, node, cause) {
                self.fail(now, handover, reason);
            }
        }
    }

    /// The directory says that a member is gone. A group is only as alive as all its ranks.
    pub fn handle_lost(&mut self, now: Moment, lost: &Lost, of_my_group: Option<Rank>) {
        if let Some(rank) = of_my_group {
            let reason = FailReason::RankLost {
                role: Role::Decode,
                group: self.local.group,
                rank,
                node: lost.node,
                cause: lost.cause.clone(),
            };
            for handover in self.handovers() {
                self.fail(now, handover, reason.clone());
                self.settle(now, handover, Outcome::Failed { reason: reason.clone() });
            }
        }
        self.sources.remove(lost.node);
        self.handle_peer_down(now, lost.node, &lost.cause);
    }

    /// A message of a peer.
    pub fn handle_message(&mut self, now: Moment, from: NodeId, message: Message) {
        match message {
            Message::Fetch(job) => {
                self.leader = Some(from);
                self.fetch(now, job);
            }
            Message::Settled { handover, outcome } => self.settle(now, handover, outcome),
            Message::Opened(opened) => {
                if let Some(leg) = self.leg(opened.handover, from)
                    && leg.source_tables.is_none()
                {
                    leg.source_tables = Some(opened.source);
                    leg.ready = leg.ready.max(opened.ready);
                    self.expect(now, opened.handover, from);
                    self.advance(now, opened.handover, from);
                    self.anchor(now, opened.handover);
                }
            }
            Message::Shares(shares) => self.shares(now, from, &shares),
            Message::ShareStopped(share) => self.share_stopped(now, from, share),
            Message::StepsReady { handover, ready } => {
                if let Some(leg) = self.leg(handover, from) {
                    leg.ready = leg.ready.max(ready);
                    self.advance(now, handover, from);
                    self.anchor(now, handover);
                }
            }
            Message::Confirmed { handover } => {
                // What has failed here does not become complete by a confirmation that comes late.
                if self.fetches.get(&handover).is_some_and(|fetch| !fetch.reported)
                    && let Some(leg) = self.leg(handover, from)
                    && leg.state == LegState::Confirming
                {
                    leg.state = LegState::Done;
                    self.finish(now, handover);
                }
            }
            Message::Refused { handover, refusal } => {
                if self.leg(handover, from).is_some() {
                    self.fail(now, handover, FailReason::Refused(refusal));
                }
            }
            _ => self.outbox.event(Event::Ignored { from, what: "a message that a decode rank does not take" }),
        }
    }

    /// An answer of the engine.
    pub fn handle_engine(&mut self, now: Moment, event: EngineEvent) {
        match event {
            EngineEvent::Placed { handover, tables, have } => self.placed(now, handover, tables, have),
            EngineEvent::NoRoom { handover, reason }
                if self.fetches.get(&handover).is_some_and(|fetch| fetch.placed.is_none()) =>
            {
                self.fail(now, handover, FailReason::Engine(reason));
            }
            EngineEvent::Freed { handover } if self.held.remove(&handover).is_some() => {
                self.tell_leader(Message::Freed { handover });
            }
            // The ranks of a group hold the same prefixes; one of them speaks.
            EngineEvent::Holds { added, removed } if self.local.rank == Rank(0) => {
                self.tell_leader(Message::Holds { added, removed });
            }
            // Nothing is drained here; whoever waits for the answer decides by what is under way.
            EngineEvent::Drain { .. } => {
                let left = self.fetches.len() as u64;
                self.outbox.engine(EngineCall::Drained { left });
            }
            _ => {}
        }
    }

    /// Something happened at a NIC of this node.
    pub fn handle_nic(&mut self, now: Moment, nic: usize, event: NicEvent) {
        match event {
            NicEvent::Done { id, bytes, pieces } => self.transfer_done(now, id, bytes, pieces),
            NicEvent::Failed { id, reason } => self.transfer_failed(now, id, reason),
            NicEvent::PeerLost { node, reason } => {
                let initiates = matches!(self.peers.get(&node), Some(Ok(peer)) if peer.initiates(Role::Decode));
                if initiates && !self.rail_lost(now, nic, node, &reason) {
                    for handover in self.handovers() {
                        if self.owed_by(handover, node, &reason).is_some() {
                            let reason = self.transport_failure(nic, node, reason.clone());
                            self.fail(now, handover, reason);
                        }
                    }
                }
            }
            NicEvent::Fenced { node, address, ticket, proof } => {
                self.fenced(now, nic, (node, address, ticket), proof);
            }
            NicEvent::Shown { node, evidence } => {
                if let Some(Ok(peer)) = self.peers.get_mut(&node) {
                    let shown = (nic, *evidence);
                    if peer.show_path(node, &self.local, shown, self.require_rdma, &mut self.outbox) {
                        peer.rails.remove(nic);
                    }
                }
            }
            NicEvent::Posted { id, took } => {
                if let Some(fetch) = self.fetches.get_mut(&id.handover()) {
                    fetch.times.posting = fetch.times.posting.saturating_add(took);
                }
            }
            NicEvent::Connected { .. } => {}
        }
    }

    /// Time has passed: leases are renewed, deadlines run out.
    pub fn handle_timeout(&mut self, now: Moment) {
        if self.renew_at.is_some_and(|at| now >= at) {
            self.renew(now);
        }
        let late: Vec<(HandoverId, FailReason)> = self
            .fetches
            .iter()
            .filter(|(_, fetch)| fetch.settled.is_none() && fetch.deadline.has_passed(now))
            .map(|(handover, fetch)| {
                (*handover, FailReason::Deadline { awaited: fetch.awaited, waited_ms: fetch.deadline.waited_ms(now) })
            })
            .collect();
        self.fence(now);
        self.watch_rails(now);
        for (handover, reason) in late {
            if self.fetches.get(&handover).is_some_and(|fetch| fetch.reported) {
                // The leader has fallen silent and nobody has said that it is lost: what this rank holds is not going to be used.
                self.settle(now, handover, Outcome::Failed { reason });
            } else {
                self.fail(now, handover, reason);
            }
        }
    }

    fn fetch(&mut self, now: Moment, job: FetchJob) {
        let handover = job.pairing.handover;
        if self.fetches.contains_key(&handover) || self.held.contains_key(&handover) {
            // Its blocks are out: a second placement would be given back under the first one's name.
            let from = self.leader.unwrap_or_default();
            self.outbox.event(Event::Ignored { from, what: "a handover that is here already" });
            return;
        }
        let spec = job.pairing.spec.clone();
        let malformed = check_steps(&job.pairing.steps, self.local.geometry.model.layers).err();
        let deadline = Deadline::after(now, self.pace.allowance(0, 0));
        let of = [self.local.group.0.into(), self.local.rank.0.into(), now.0];
        let begun = Begun::new(Part::Fetch, spec.request, Some(handover), job.pairing.trace, &of);
        self.outbox.event(Event::Began(Box::new(begun)));
        let fetch = Fetch::new(job.pairing, deadline, now);
        self.fetches.insert(handover, fetch);
        self.renew_at.get_or_insert(now + self.leases.renewal());
        self.outbox.engine(EngineCall::Place { handover, spec });
        if let Some(refusal) = malformed {
            self.fail(now, handover, FailReason::Refused(refusal));
        } else if let Some(trouble) = self.trouble.clone() {
            self.fail(now, handover, FailReason::Unhealthy(trouble));
        }
    }

    fn placed(&mut self, now: Moment, handover: HandoverId, tables: Tables, have: u64) {
        let queued = self.queued_bytes();
        let Some(fetch) = self.fetches.get_mut(&handover) else { return };
        if fetch.placed.is_some() || fetch.reported {
            return;
        }
        let bytes = self.local.geometry.bytes_expected_by_a_rank(fetch.pairing.spec.tokens, have);
        fetch.placed = Some(Placed { tables, have, bytes });
        fetch.times.placed = Some(now);
        fetch.turn_to(now, Awaited::Transfer, self.pace.allowance(bytes, queued));
        self.resolve(now, handover);
    }

    /// Reports success once every leg is done.
    fn finish(&mut self, now: Moment, handover: HandoverId) {
        let Some(fetch) = self.fetches.get_mut(&handover) else { return };
        if fetch.reported || !fetch.resolved || fetch.legs.values().any(|leg| leg.state != LegState::Done) {
            return;
        }
        fetch.report(now, self.deadlines.backstop());
        let mut paths = Vec::with_capacity(fetch.legs.len());
        for leg in fetch.legs.values() {
            let Some(Path { nic, direction, .. }) = leg.path else { continue };
            let nothing = leg.flight.bytes() == 0;
            for (nic, (bytes, pieces)) in leg.flight.carried().chain(nothing.then_some((nic, (0, 0)))) {
                let Some(nic) = self.local.nics.get(nic) else { continue };
                paths.push(PathReport {
                    source_group: fetch.pairing.source,
                    source: leg.source,
                    destination_group: self.local.group,
                    destination: self.local.rank,
                    kind: nic.kind,
                    device: nic.device.clone(),
                    direction,
                    bytes,
                    pieces,
                });
            }
        }
        fetch.times.paths.clone_from(&paths);
        self.pace.observe(paths.iter().map(|path| path.bytes).sum(), fetch.moved_for);
        self.tell_leader(Message::RankDone { handover, result: Ok(paths) });
    }

    /// This rank's part failed: stop everything, tell everybody.
    fn fail(&mut self, now: Moment, handover: HandoverId, reason: FailReason) {
        let Some(fetch) = self.fetches.get_mut(&handover) else { return };
        if fetch.reported {
            return;
        }
        fetch.report(now, self.deadlines.backstop());
        self.stop(handover);
        self.tell_leader(Message::RankDone { handover, result: Err(reason) });
    }

    fn renew(&mut self, now: Moment) {
        let mut readers: BTreeMap<NodeId, Vec<HandoverId>> = BTreeMap::new();
        for (handover, fetch) in self.fetches.iter_mut().filter(|(_, fetch)| !fetch.reported) {
            for (node, leg) in &mut fetch.legs {
                // A lease that ran out while nobody looked stays expired.
                let alive = leg.opened_at.is_some_and(|sent| Lease::held(sent, &self.leases).is_alive(now));
                if alive && leg.state != LegState::Done {
                    leg.opened_at = Some(now);
                    readers.entry(*node).or_default().push(*handover);
                }
            }
        }
        for (node, handovers) in readers {
            self.outbox.send(node, Message::Reading { handovers });
        }
        self.renew_at = (!self.fetches.is_empty()).then(|| now + self.leases.renewal());
    }

    fn tell_leader(&mut self, message: Message) {
        if let Some(leader) = self.leader {
            self.outbox.send(leader, message);
        }
    }

    fn handovers(&self) -> Vec<HandoverId> {
        self.fetches.keys().copied().collect()
    }

    fn leg(&mut self, handover: HandoverId, node: NodeId) -> Option<&mut Leg> {
        self.fetches.get_mut(&handover)?.legs.get_mut(&node)
    }

    fn owner_of(&self, id: TransferId) -> Option<(HandoverId, NodeId)> {
        let handover = id.handover();
        let fetch = self.fetches.get(&handover)?;
        let (node, _) = fetch.legs.iter().find(|(_, leg)| leg.flight.contains(id))?;
        Some((handover, *node))
    }

    /// The reason to fail with when `node` is gone and this fetch still needs it.
    fn owed_by(&self, handover: HandoverId, node: NodeId, cause: &str) -> Option<FailReason> {
        let fetch = self.fetches.get(&handover).filter(|fetch| !fetch.reported)?;
        let leg = fetch.legs.get(&node).filter(|leg| leg.state != LegState::Done)?;
        let (role, group, rank) = (Role::Prefill, fetch.pairing.source, leg.source);
        Some(FailReason::RankLost { role, group, rank, node, cause: cause.to_owned() })
    }

    fn transport_failure(&self, nic: usize, node: NodeId, message: String) -> FailReason {
        match self.local.nics.get(nic).or_else(|| self.local.nics.first()).map(|nic| nic.kind) {
            Some(kind) => FailReason::Transport { kind, peer: node, message },
            None => FailReason::Mismatch(message),
        }
    }

    /// Blocks of this rank that something may still write although their handover is over.
    fn quarantined_blocks(&self) -> u64 {
        let quarantined = self.fetches.values().filter(|fetch| fetch.settled.is_some());
        let tables = quarantined.filter_map(|fetch| fetch.placed.as_ref()).flat_map(|placed| &placed.tables.groups);
        tables.map(|table| u64::from(table.shape().blocks)).sum()
    }

    fn queued_bytes(&self) -> u64 {
        let placed = self.fetches.values().filter(|fetch| !fetch.reported).filter_map(|fetch| fetch.placed.as_ref());
        placed.map(|placed| placed.bytes).sum()
    }
}
