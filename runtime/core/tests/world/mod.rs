//! A whole deployment in memory: every core wired by hand, messages, engines and NICs interleaved at random, faults on request.

mod engine;
mod faults;
mod nic;
mod node;
mod random;

use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};

use kvferry_core::protocol::{
    Command, Directory, Event, GroupView, LeaseTerms, LeastLoaded, Member, Message, Outcome, Place, Policy, Profile,
    QuarantineTerms, RequestSpec, Role, Scheduler, SchedulerTerms, Submitted,
};
use kvferry_core::{
    Direction, Epoch, Format, GroupGeometry, GroupId, HandoverId, Model, Moment, NodeId, Parallel, Rank, RequestId,
};

use node::Node;
use random::Random;

/// The node of the scheduler and the directory.
pub(crate) const SCHEDULER: NodeId = NodeId(1_000);
/// Blocks of every pool.
pub(crate) const BLOCKS: u32 = 32;
const EPOCH: Epoch = Epoch(1);

/// What travels from one node to another, in order.
enum Item {
    Message(Message),
    /// The conversation ended.
    Down,
    /// A leader has told this scheduler everything that it had to tell.
    Told,
}

/// What may happen next.
enum Action {
    Deliver(NodeId, NodeId),
    Engine(NodeId),
    Nic(NodeId, kvferry_core::TransferId),
    Fence(NodeId, NodeId),
    /// Two nodes whose conversation ended begin another.
    Meet(NodeId, NodeId),
    /// The client asks again for what a scheduler that is gone took.
    Ask(RequestId),
}

/// The deployment.
pub(crate) struct World {
    random: Random,
    now: Moment,
    faulty: bool,
    crashes_left: u64,
    /// Schedulers that may still start again.
    restarts_left: u64,
    /// One thing in so many is a fault.
    calm: u64,
    /// Some cancelled transfers end only with a fence.
    stubborn: bool,
    terms: SchedulerTerms,
    scheduler: Scheduler,
    directory: Directory,
    /// The first handover of the present scheduler.
    first_handover: u64,
    nodes: BTreeMap<NodeId, Node>,
    members: BTreeMap<NodeId, Member>,
    places: BTreeMap<NodeId, (GroupId, Rank)>,
    /// What the directory has declared lost, although it still runs.
    expelled: BTreeSet<NodeId>,
    links: BTreeMap<(NodeId, NodeId), VecDeque<Item>>,
    /// Pairs without a conversation, and how many of the two know.
    apart: BTreeMap<(NodeId, NodeId), u32>,
    views: Views,
    submitted: BTreeMap<RequestId, RequestSpec>,
    /// What the client awaits of the present scheduler.
    awaited: BTreeSet<RequestId>,
    /// What it has to ask for again.
    unasked: BTreeSet<RequestId>,
    finished: BTreeMap<RequestId, Vec<Outcome>>,
    /// When a request ended that nobody had asked this scheduler for.
    ended_unasked: BTreeMap<RequestId, Moment>,
    paired: BTreeMap<HandoverId, (RequestId, GroupId)>,
    /// The prefill group of every handover.
    sources: BTreeMap<HandoverId, GroupId>,
    /// Handovers that their leaders have heard of.
    heard: BTreeSet<HandoverId>,
    decided: BTreeMap<HandoverId, u32>,
    delivered: BTreeMap<RequestId, Vec<HandoverId>>,
    /// Leaders that have told the present scheduler what they had in hand.
    told: BTreeSet<NodeId>,
    /// Handovers that were paired when some decode leader had yet to tell, when the client had its answer already, or when it asked too late.
    excused: BTreeSet<HandoverId>,
    forgotten: BTreeSet<RequestId>,
    /// Handovers that read blocks which their owner had given away already.
    tainted: BTreeSet<HandoverId>,
    geometries: BTreeMap<GroupId, Arc<GroupGeometry>>,
    violations: Vec<String>,
}

/// The views of groups that the policy was shown last: prefill, decode.
type Views = Arc<Mutex<[Vec<GroupView>; 2]>>;

#[derive(Debug)]
struct Spy(Views);

impl Policy for Spy {
    fn prefill(&mut self, request: &RequestSpec, candidates: &[GroupView]) -> Option<GroupId> {
        self.0.lock().expect("one thread")[0] = candidates.to_vec();
        LeastLoaded.prefill(request, candidates)
    }

    fn decode(&mut self, request: &RequestSpec, candidates: &[GroupView]) -> Option<GroupId> {
        self.0.lock().expect("one thread")[1] = candidates.to_vec();
        LeastLoaded.decode(request, candidates)
    }
}

/// Runs one world to its quiet end; what is wrong with it, if anything.
pub(crate) fn run(seed: u64, faulty: bool) -> Vec<String> {
    let mut world = World::new(seed, faulty);
    let requests = world.random.between(1, 12);
    let mut next = 1;
    for _ in 0..4_000 {
        if next <= requests && world.random.one_in(8) {
            world.submit(next);
            next += 1;
        }
        if world.faulty {
            world.fault();
        }
        world.step();
    }
    for request in next..=requests {
        world.submit(request);
    }
    world.heal();
    world.settle();
    world.probe(requests + 1);
    world.check();
    world.violations
}

impl World {
    fn new(seed: u64, faulty: bool) -> Self {
        let mut random = Random::new(seed);
        let views: Views = Arc::default();
        let terms =
            SchedulerTerms { prefill_jobs_max: random.between(1, 6), leases: leases(), ..SchedulerTerms::default() };
        let (crashes_left, restarts_left, calm) =
            (random.between(0, 3), random.between(0, 3), random.between(100, 1_500));
        let stubborn = faulty && random.one_in(2);
        let mut world = World {
            scheduler: Scheduler::new(terms, Box::new(Spy(Arc::clone(&views))), 1),
            directory: Directory::default(),
            first_handover: 1,
            random,
            now: Moment(1_000),
            faulty,
            crashes_left,
            restarts_left,
            calm,
            stubborn,
            terms,
            nodes: BTreeMap::new(),
            members: BTreeMap::new(),
            places: BTreeMap::new(),
            expelled: BTreeSet::new(),
            links: BTreeMap::new(),
            apart: BTreeMap::new(),
            views,
            submitted: BTreeMap::new(),
            awaited: BTreeSet::new(),
            unasked: BTreeSet::new(),
            finished: BTreeMap::new(),
            ended_unasked: BTreeMap::new(),
            paired: BTreeMap::new(),
            sources: BTreeMap::new(),
            heard: BTreeSet::new(),
            decided: BTreeMap::new(),
            delivered: BTreeMap::new(),
            told: BTreeSet::new(),
            excused: BTreeSet::new(),
            forgotten: BTreeSet::new(),
            tainted: BTreeSet::new(),
            geometries: BTreeMap::new(),
            violations: Vec::new(),
        };
        world.build();
        world
    }

    fn build(&mut self) {
        let direction = if self.random.one_in(2) { Direction::Pull } else { Direction::Push };
        let mut members = Vec::new();
        let share_max = [0, 100, 500, 1_000][self.random.below(4) as usize];
        let quarantine =
            QuarantineTerms { fence_after: Duration::from_millis(self.random.between(1, 3_000)), share_max };
        for (role, first) in [(Role::Prefill, 0), (Role::Decode, 10)] {
            let geometry = self.geometry();
            for group in first..first + self.random.between(1, 2) as u32 {
                self.geometries.insert(GroupId(group), Arc::clone(&geometry));
                for rank in 0..geometry.ranks() {
                    let node = NodeId(u64::from(group) * 10 + u64::from(rank) + 1);
                    let steps = self.random.between(1, 3) as u32;
                    members.push(self.member(node, role, GroupId(group), Rank(rank), &geometry));
                    let place = (role, GroupId(group), Rank(rank));
                    self.places.insert(node, (GroupId(group), Rank(rank)));
                    self.nodes.insert(node, Node::new(node, place, &geometry, direction, steps, quarantine));
                }
            }
        }
        // Ranks of a group must agree on their steps: those of rank 0 count.
        let steps: BTreeMap<GroupId, u32> =
            self.nodes.values().filter(|node| node.rank == Rank(0)).map(|node| (node.group, node.steps())).collect();
        for node in self.nodes.values_mut() {
            node.agree(steps.get(&node.group).copied().unwrap_or(1));
        }
        let all: Vec<NodeId> = self.nodes.keys().copied().collect();
        for one in all.iter().chain([&SCHEDULER]) {
            for other in all.iter().filter(|other| *other != one) {
                self.introduce(*one, *other);
            }
        }
        self.random.shuffle(&mut members);
        for member in members {
            self.members.insert(member.node, member.clone());
            self.join(member);
        }
    }

    /// The first message of every conversation.
    fn introduce(&mut self, one: NodeId, other: NodeId) {
        let profile = Profile { worker: self.nodes.get(&one).map(|node| node.profile.clone()) };
        self.push(one, other, Message::Profile(Box::new(profile)));
    }

    fn join(&mut self, member: Member) {
        match self.directory.handle_join(self.now, member) {
            Ok(member) => {
                self.drain_scheduler();
                self.scheduler.handle_member(self.now, &member);
                self.drain_scheduler();
            }
            Err(error) => self.violations.push(format!("a living node may not join: {error}")),
        }
        if let Some(due) = self.directory.poll_timeout() {
            self.directory.handle_timeout(due);
            self.drain_scheduler();
        }
    }

    fn geometry(&mut self) -> Arc<GroupGeometry> {
        let tp = [1, 2, 2, 4][self.random.below(4) as usize];
        let adp = if tp > 1 && self.random.one_in(3) { 2 } else { 1 };
        let parallel = Parallel { tp, adp, pp: self.random.between(1, 2) as u32, ..Parallel::default() };
        let block_tokens = [16, 32][self.random.below(2) as usize];
        let model = Model::preset("tiny").expect("a preset");
        Arc::new(GroupGeometry { model, format: Format { block_tokens, ..Format::default() }, parallel })
    }

    fn member(
        &mut self,
        node: NodeId,
        role: Role,
        group: GroupId,
        rank: Rank,
        geometry: &Arc<GroupGeometry>,
    ) -> Member {
        let handovers_max = self.random.between(1, 4) as u32;
        let place = Place { role, group, rank, geometry: Arc::clone(geometry), blocks: vec![BLOCKS], handovers_max };
        Member { node, epoch: EPOCH, address: String::new(), place: Some(place) }
    }

    fn submit(&mut self, request: u64) {
        let tokens = self.random.between(1, 120);
        let spec = RequestSpec { request: RequestId(request), tokens, prefix: Arc::default(), prefix_tokens: 16 };
        self.submitted.insert(spec.request, spec.clone());
        self.ask(spec);
    }

    fn ask(&mut self, spec: RequestSpec) {
        let request = spec.request;
        // Before anything that this leads to.
        self.awaited.insert(request);
        match self.scheduler.handle_submit(self.now, spec) {
            Ok(Submitted::Taken) => {}
            Ok(Submitted::Ended(finished)) => {
                self.awaited.remove(&request);
                self.finished.entry(request).or_default().push(finished.outcome);
            }
            Err(refusal) => self.violations.push(format!("{request} was refused: {refusal}")),
        }
        self.drain_scheduler();
    }

    /// One thing that can happen, happens. Says whether there was one.
    fn step(&mut self) -> bool {
        self.now = self.now + Duration::from_micros(self.random.below(2_000));
        if self.random.one_in(16) {
            self.fire();
        }
        let mut actions: Vec<Action> = self
            .links
            .iter()
            .filter(|(_, link)| !link.is_empty())
            .map(|((from, to), _)| Action::Deliver(*from, *to))
            .collect();
        for (id, node) in &self.nodes {
            if node.engine.can_act() {
                actions.push(Action::Engine(*id));
            }
            actions.extend(node.nic.actionable().map(|transfer| Action::Nic(*id, transfer)));
            actions.extend(node.nic.fences.keys().map(|peer| Action::Fence(*id, *peer)));
        }
        let known = self.apart.iter().filter(|(_, known)| **known >= 2);
        actions.extend(known.map(|((one, other), _)| Action::Meet(*one, *other)));
        actions.extend(self.unasked.iter().map(|request| Action::Ask(*request)));
        if actions.is_empty() {
            return false;
        }
        let choice = self.random.below(actions.len() as u64) as usize;
        match actions.swap_remove(choice) {
            Action::Deliver(from, to) => {
                if let Some(item) = self.links.get_mut(&(from, to)).and_then(VecDeque::pop_front) {
                    self.deliver(from, to, item);
                }
            }
            Action::Engine(id) => self.engine_acts(id),
            Action::Nic(id, transfer) => self.nic_acts(id, transfer),
            Action::Fence(id, peer) => self.nic_fences(id, peer),
            Action::Meet(one, other) => self.meet(one, other),
            Action::Ask(request) => self.ask_again(request),
        }
        true
    }

    fn push(&mut self, from: NodeId, to: NodeId, message: Message) {
        if (to == SCHEDULER || self.nodes.contains_key(&to)) && !self.apart.contains_key(&pair(from, to)) {
            self.links.entry((from, to)).or_default().push_back(Item::Message(message));
        }
    }

    fn deliver(&mut self, from: NodeId, to: NodeId, item: Item) {
        if to == SCHEDULER {
            match item {
                Item::Message(Message::Profile(_)) => {}
                Item::Message(Message::Join(member)) => self.join(*member),
                Item::Message(message) => self.scheduler.handle_message(self.now, from, message),
                Item::Told => drop(self.told.insert(from)),
                Item::Down => {
                    self.notices(from, to);
                    if let Some(lost) = self.directory.handle_lost(from, EPOCH, "it crashed") {
                        self.drain_scheduler();
                        self.scheduler.handle_lost(self.now, &lost);
                    }
                }
            }
            self.drain_scheduler();
            return;
        }
        if let Item::Message(Message::Pair(pairing)) = &item {
            self.heard.insert(pairing.handover);
        }
        let meets = from == SCHEDULER && matches!(item, Item::Message(Message::Profile(_)));
        if let Item::Down = item {
            self.notices(from, to);
        }
        let now = self.now;
        if let Some(node) = self.nodes.get_mut(&to) {
            match item {
                Item::Message(message) => node.handle_message(now, from, message),
                Item::Down => node.handle_down(now, from),
                Item::Told => {}
            }
        }
        self.drain(to);
        if meets && !self.apart.contains_key(&pair(to, SCHEDULER)) {
            self.links.entry((to, SCHEDULER)).or_default().push_back(Item::Told);
        }
    }

    /// Every timer that is due.
    fn fire(&mut self) {
        let now = self.now;
        if self.scheduler.poll_timeout().is_some_and(|timer| timer <= now) {
            self.scheduler.handle_timeout(now);
            self.drain_scheduler();
        }
        let mut ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        self.random.shuffle(&mut ids);
        for id in ids {
            if let Some(node) = self.nodes.get_mut(&id) {
                node.fire(now);
            }
            self.drain(id);
        }
    }

    /// No more faults: everything that is under way ends, by itself or by its deadline.
    fn settle(&mut self) {
        for _ in 0..200_000 {
            if self.step() {
                continue;
            }
            let busy = self.nodes.values().any(Node::is_busy) || self.scheduler.unfinished() > 0;
            if !busy && self.is_quiet() {
                return;
            }
            let timers = self.nodes.values().filter_map(Node::poll_timeout).chain(self.scheduler.poll_timeout());
            let Some(next) = timers.min() else { break };
            self.now = self.now.max(next);
            self.fire();
        }
        let busy: Vec<String> = self.nodes.values().filter(|node| node.is_busy()).map(Node::describe).collect();
        self.violations
            .push(format!("I5: it never became quiet: {} unfinished, {busy:?}", self.scheduler.unfinished()));
    }

    /// One more request, to see which credits the scheduler believes to be out.
    fn probe(&mut self, request: u64) {
        *self.views.lock().expect("one thread") = [Vec::new(), Vec::new()];
        self.submit(request);
        self.settle();
        let views = self.views.lock().expect("one thread");
        for view in views.iter().flatten().filter(|view| view.load_tokens > 0 || view.handovers > 0) {
            self.violations.push(format!("I4: credits are out when all is quiet: {view:?}"));
        }
    }

    fn check(&mut self) {
        for vitals in self.busy() {
            self.violations.push(format!("I4: something is in hand when all is quiet: {vitals}"));
        }
        for request in self.submitted.keys() {
            let ends = self.finished.get(request).map_or(0, Vec::len);
            if ends != 1 {
                self.violations.push(format!("{request} finished {ends} times"));
            }
        }
        for (handover, (request, group)) in &self.paired {
            let decided = self.decided.get(handover).copied().unwrap_or(0);
            let leader = self.nodes.values().any(|node| node.group == *group && node.rank == Rank(0));
            if decided > 1 || (leader && decided == 0 && self.heard.contains(handover)) {
                self.violations.push(format!("I3: {handover} of {request} was decided {decided} times"));
            }
        }
        for node in self.nodes.values() {
            if let Some(leak) = node.engine.leak() {
                self.violations.push(format!("I4: {} ({} {}): {leak}", node.id, node.group, node.rank));
            }
        }
    }

    fn drain_scheduler(&mut self) {
        while let Some(command) = self.scheduler.outbox().poll_command() {
            let Command::Send { to, message } = command else { continue };
            if let Message::Pair(pairing) = &message {
                self.sources.insert(pairing.handover, pairing.source);
            }
            self.push(SCHEDULER, to, message);
        }
        while let Some(event) = self.scheduler.outbox().poll_event() {
            match event {
                Event::Finished(finished) => {
                    self.check_bytes(&finished);
                    if self.awaited.remove(&finished.request) {
                        self.finished.entry(finished.request).or_default().push(finished.outcome);
                    } else {
                        self.ended_unasked.insert(finished.request, self.now);
                    }
                }
                Event::Paired { request, handover, group } => self.pairs(request, handover, group),
                _ => {}
            }
        }
        let vitals = self.scheduler.vitals();
        if vitals.is_stuck() {
            self.violations.push(format!("I5: the scheduler may wait for ever: {vitals:?}"));
        }
        while let Some(command) = self.directory.outbox().poll_command() {
            let Command::Send { to, message } = command else { continue };
            self.push(SCHEDULER, to, message);
        }
    }

    /// Delivered means that every needed byte moved.
    fn check_bytes(&mut self, finished: &kvferry_core::protocol::Finished) {
        let (Some(spec), Some(first)) = (self.submitted.get(&finished.request), finished.paths.first()) else { return };
        let Some(geometry) = self.geometries.get(&first.destination_group) else { return };
        let moved: u64 = finished.paths.iter().map(|path| path.bytes).sum();
        let needed = geometry.bytes_expected(spec.tokens, 0);
        if finished.outcome.is_delivered() && moved != needed {
            self.violations.push(format!("I2: {} was delivered with {moved} of {needed} bytes", finished.request));
        }
    }
}

/// The leases of every rank: shorter than any deadline, so that they lapse under running transfers.
fn leases() -> LeaseTerms {
    LeaseTerms { duration: Duration::from_secs(3), ..LeaseTerms::default() }
}

/// A pair of nodes, whoever is named first.
fn pair(one: NodeId, other: NodeId) -> (NodeId, NodeId) {
    (one.min(other), one.max(other))
}
