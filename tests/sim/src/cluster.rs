//! A scheduler with prefill and decode groups in one world.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use kvferry_actors::{Inspect, NodeError, SESSIONS_EAGER_MAX};
use kvferry_core::protocol::{
    DeadlineTerms, LeaseTerms, QuarantineTerms, RailTerms, RequestSpec, Role, SchedulerTerms, SessionTerms, Vitals,
};
use kvferry_core::{
    Direction, Dtype, Extent, Format, GeometryError, GroupGeometry, GroupId, LayerGroup, Model, Order, Parallel, Rank,
    RequestId, Sharding, Tensor,
};
use kvferry_synthetic::EngineError;
use kvferry_transport::PoolError;
use thiserror::Error;
use tokio::sync::mpsc;

use crate::chronicle::{Entry, What};
use crate::desk::RoomTrouble;
use crate::dice::Dice;
use crate::report::{ClusterReport, RankReport, Tally};
use crate::users::Users;
use crate::world::{WithNode, World, WorldOptions};
use crate::yard::{SCHEDULER, Worker, Yard, restart_the_ended};

/// Groups of one side.
#[derive(Clone, Debug)]
pub struct GroupOptions {
    /// How many.
    pub groups: u32,
    /// Ranks of each.
    pub tp: u32,
    /// Tokens per block.
    pub block_tokens: u32,
    /// Order inside a block.
    pub order: Order,
    /// Blocks of a rank, in every layer group.
    pub blocks: u32,
}

/// What a cluster is like.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// The world's; its seed is the cluster's.
    pub world: WorldOptions,
    /// What is served.
    pub model: Model,
    /// Prefill groups.
    pub prefill: GroupOptions,
    /// Decode groups.
    pub decode: GroupOptions,
    /// Who initiates transfers.
    pub direction: Option<Direction>,
    /// Tokens of a request.
    pub tokens: Range<u64>,
    /// Model layers that become ready together.
    pub layers_per_step: Option<u32>,
    /// Peers with whom a session is made before it is needed.
    pub sessions_eager_max: usize,
    /// NICs of every worker.
    pub nics: u32,
    /// How NICs share what a decode rank reads.
    pub rails: RailTerms,
    /// How decode engines withhold room.
    pub room: RoomTrouble,
    /// Nodes that speak the first protocol only.
    pub old_peers: BTreeSet<usize>,
    /// Handovers that a decode group takes at once.
    pub handovers_max: u32,
    /// How sessions wait.
    pub session: SessionTerms,
    /// How long KV is held.
    pub leases: LeaseTerms,
    /// How long transfers may take.
    pub deadlines: DeadlineTerms,
    /// How long blocks are waited for that something may still write.
    pub quarantine: QuarantineTerms,
    /// What the scheduler waits for.
    pub scheduler: SchedulerTerms,
}

impl ClusterOptions {
    /// Two prefill groups of two ranks and two decode groups of four, which store a tiny model in other block sizes and orders.
    pub fn tiny(seed: u64) -> Self {
        let tensor = |name: &str| Tensor { name: name.to_owned(), heads: 4, elements: 8, sharding: Sharding::Heads };
        let attention = LayerGroup {
            name: "attention".to_owned(),
            layers: vec![0, 1],
            dtype: Dtype::Bf16,
            extent: Extent::Full,
            tensors: vec![tensor("k"), tensor("v")],
        };
        let model = Model { name: "sim".to_owned(), layers: 2, groups: vec![attention] };
        ClusterOptions {
            world: WorldOptions { seed, ..WorldOptions::default() },
            model,
            prefill: GroupOptions { groups: 2, tp: 2, block_tokens: 8, order: Order::Nhd, blocks: 64 },
            decode: GroupOptions { groups: 2, tp: 4, block_tokens: 16, order: Order::Hnd, blocks: 48 },
            direction: None,
            tokens: 1..120,
            layers_per_step: Some(1),
            sessions_eager_max: SESSIONS_EAGER_MAX,
            nics: 1,
            rails: RailTerms::default(),
            room: RoomTrouble::default(),
            old_peers: BTreeSet::new(),
            handovers_max: 8,
            session: SessionTerms::default(),
            leases: LeaseTerms::default(),
            deadlines: DeadlineTerms::default(),
            quarantine: QuarantineTerms::default(),
            scheduler: SchedulerTerms::default(),
        }
    }
}

/// Why there is no such cluster.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SimError {
    /// The geometry is impossible.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// No pool.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// No engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A node did not start.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// A node did not start, as time passed.
    #[error("a node did not start: {0}")]
    Start(String),
    /// A rank can never hold a request.
    #[error(
        "request {request} of {tokens} tokens takes {need} blocks, and a {side} rank has {blocks}; give --{side}-blocks {need} or more, or \
         leave it out"
    )]
    TooSmall {
        /// Which side's ranks.
        side: &'static str,
        /// Blocks of a rank.
        blocks: u32,
        /// Which request, from 1.
        request: usize,
        /// Tokens of its prompt.
        tokens: u64,
        /// Blocks that it takes.
        need: u32,
    },
    /// The node's number is no worker's, or it is down.
    #[error("node {0} is not a worker that is up; number workers from 1, prefill first, by group and rank")]
    NoSuchNode(usize),
}

/// A cluster: node 0 is the scheduler, then come the prefill ranks and the decode ranks, by group and rank.
pub struct Cluster {
    world: World,
    yard: Rc<Yard>,
    workload: Dice,
    submitted: u64,
    users: Rc<RefCell<Users>>,
    tally: Tally,
}

impl Cluster {
    /// Starts all nodes; they find each other as time passes.
    pub fn new(options: ClusterOptions) -> Result<Self, SimError> {
        let mut world = World::new(options.world.clone());
        world.fabric().watch();
        world.add_node();
        let workload = Dice::new(options.world.seed, "workload", 0);
        let mut yard = Yard::new(options);
        let (prefill, decode) = (yard.options.prefill.clone(), yard.options.decode.clone());
        add_groups(&mut yard, &mut world, Role::Prefill, &prefill, 0)?;
        add_groups(&mut yard, &mut world, Role::Decode, &decode, prefill.groups)?;
        let yard = Rc::new(yard);
        for node in 0..world.nodes() {
            yard.start(&mut world, node)?;
        }
        let users = Rc::new(RefCell::new(Users::new(yard.options.world.plant)));
        restart_the_ended(&mut world, &yard, bring_back(&yard, &users));
        Ok(Cluster { world, yard, workload, submitted: 0, users, tally: Tally::default() })
    }

    /// The node of a worker, for [`Cluster::crash_at`] and its like.
    pub fn node_of(&self, role: Role, group: u32, rank: u32) -> Option<usize> {
        let first = if role == Role::Prefill { 0 } else { self.yard.options.prefill.groups };
        let place = (role, GroupId(first + group), Rank(rank));
        let workers = &self.yard.workers;
        workers.iter().find(|worker| (worker.role, worker.group, worker.rank) == place).map(|worker| worker.node)
    }

    /// Crashes a worker at a time from now.
    pub fn crash_at(&mut self, node: usize, after: Duration) -> Result<(), SimError> {
        self.hurt(node)?;
        let at = self.time(after);
        self.world.at(at, move |world| world.crash(node));
        Ok(())
    }

    /// Tells a worker to leave at a time from now, for so long at most; it comes back a second after it has left.
    pub fn drain_at(&mut self, node: usize, after: Duration, within: Duration) -> Result<(), SimError> {
        self.hurt(node)?;
        let at = self.time(after);
        self.world.at(at, move |world| world.drain(node, within));
        Ok(())
    }

    /// Stops a worker's node at a time from now; it goes on at another, if at all.
    pub fn pause_at(&mut self, node: usize, after: Duration, until: Option<Duration>) -> Result<(), SimError> {
        self.hurt(node)?;
        let at = self.time(after);
        self.world.at(at, move |world| world.pause(node));
        if let Some(until) = until {
            let at = self.time(until);
            self.world.at(at, move |world| world.resume(node));
        }
        Ok(())
    }

    /// Starts a node that has crashed, in its next incarnation, with an empty pool.
    pub fn restart(&mut self, node: usize) -> Result<(), SimError> {
        self.yard.start(&mut self.world, node)
    }

    /// Brings a node that is down back at a time from now; users ask a scheduler that has come back again.
    pub(crate) fn bring_back(&self) -> WithNode {
        bring_back(&self.yard, &self.users)
    }

    /// Submits requests at random times of the next `within`, and lets `each` see every one of them and its time.
    pub fn submit(&mut self, requests: u64, within: Duration) {
        self.submit_each(requests, within, |_, _, _| {});
    }

    pub(crate) fn submit_each(
        &mut self,
        requests: u64,
        within: Duration,
        mut each: impl FnMut(&mut Self, RequestId, u64),
    ) {
        let within = nanos(within);
        for _ in 0..requests {
            self.submitted += 1;
            let spec = RequestSpec {
                request: RequestId(self.submitted),
                tokens: self.workload.within(self.yard.options.tokens.clone()),
                prefix: Arc::default(),
                prefix_tokens: 0,
            };
            let at = self.world.now().saturating_add(self.workload.below(within));
            each(self, spec.request, at);
            let (users, yard) = (Rc::clone(&self.users), Rc::clone(&self.yard));
            self.world.at(at, move |world| users.borrow_mut().submit(world, &yard, spec));
        }
    }

    /// Cancels a request at a time (nanoseconds of the world).
    pub(crate) fn cancel_at(&mut self, request: RequestId, at: u64) {
        let (users, yard) = (Rc::clone(&self.users), Rc::clone(&self.yard));
        self.world.at(at, move |world| users.borrow_mut().cancel(world, &yard, request));
    }

    /// Runs until every submitted request is answered, or for `limit`. Says whether they are.
    pub fn run(&mut self, limit: Duration) -> bool {
        self.watch(limit, |_, _| {}, |answered, submitted, _| answered == submitted)
    }

    /// Lets time pass: what is left over after the last request comes to its end.
    pub fn rest(&mut self, time: Duration) {
        self.watch(time, |_, _| {}, |_, _, _| false);
    }

    /// Runs until `done` says so, which is asked with the numbers of answered and of submitted requests whenever all are quiet, or for
    /// `limit`. Says whether it did. `each` sees everything that happens.
    pub(crate) fn watch(
        &mut self,
        limit: Duration,
        mut each: impl FnMut(&mut World, &Entry),
        mut done: impl FnMut(u64, u64, &World) -> bool,
    ) -> bool {
        let limit = self.time(limit);
        let (users, tally, submitted) = (&self.users, &mut self.tally, self.submitted);
        let ended = self.world.run(limit, |world| {
            if world.has_entries() {
                let mut entries = world.take_entries();
                for heard in users.borrow_mut().listen(&entries) {
                    world.note(heard);
                }
                entries.append(&mut world.take_entries());
                for entry in entries {
                    each(world, &entry);
                    tally.take_in(&entry);
                }
            }
            done(users.borrow().answered(), submitted, world)
        });
        ended && !self.world.is_stuck()
    }

    /// What the actors of all nodes that run have in hand just now, each with its node.
    pub fn vitals(&mut self) -> Vec<(usize, Vitals)> {
        let (to, mut answers) = mpsc::unbounded_channel();
        let mut found = Vec::new();
        let now = self.world.now();
        for node in 0..self.world.nodes() {
            if self.world.inspect(node, &to) {
                if let (SCHEDULER, Some(scheduler)) = (node, self.yard.scheduler()) {
                    scheduler.do_send(Inspect { to: to.clone() });
                }
                self.world.run(now, |_| true);
                while let Ok(vitals) = answers.try_recv() {
                    found.push((node, vitals));
                }
            }
        }
        found
    }

    /// The world that it runs in.
    pub fn world(&mut self) -> &mut World {
        &mut self.world
    }

    /// Requests submitted so far, or to be.
    pub(crate) fn submitted(&self) -> u64 {
        self.submitted
    }

    /// Those that have no answer.
    pub(crate) fn waiting(&self) -> Vec<RequestId> {
        self.users.borrow().waiting()
    }

    pub(crate) fn yard(&self) -> &Rc<Yard> {
        &self.yard
    }

    /// What came of everything so far.
    pub fn report(&mut self) -> ClusterReport {
        let (world, workers) = (&self.world, &self.yard.workers);
        let ranks = workers.iter().map(|worker| RankReport {
            role: worker.role,
            group: worker.group,
            rank: worker.rank,
            was_hurt: worker.was_hurt.get(),
            engine: world.engine_report(worker.node),
        });
        let ranks = ranks.collect();
        let geometry =
            |group: GroupId| workers.iter().find(|worker| worker.group == group).map(|worker| &*worker.geometry);
        let mut report = self.tally.report(self.submitted, ranks, self.users.borrow().waiting(), geometry);
        report.panics = world.panics();
        report.stuck = world.is_stuck();
        report.in_flight = world.fabric().in_flight();
        report.trace_hash = world.trace().hash();
        report.recent = world.trace().recent().copied().collect();
        report.events = world.events();
        report.virtual_seconds = world.now() as f64 / 1e9;
        report
    }

    fn hurt(&mut self, node: usize) -> Result<(), SimError> {
        let worker = self.yard.worker(node).ok_or(SimError::NoSuchNode(node))?;
        worker.was_hurt.set(true);
        Ok(())
    }

    fn time(&self, after: Duration) -> u64 {
        self.world.now().saturating_add(nanos(after))
    }
}

/// What brings a node back: users ask a scheduler that has come back again.
fn bring_back(yard: &Rc<Yard>, users: &Rc<RefCell<Users>>) -> WithNode {
    let (yard, users) = (Rc::clone(yard), Rc::clone(users));
    Rc::new(move |world, node| {
        if world.is_up(node) {
            return;
        }
        match yard.start(world, node) {
            Ok(()) if node == SCHEDULER => users.borrow_mut().ask_again(world, &yard),
            Ok(()) => {}
            Err(error) => world.note_of(node, What::NoStart(error.to_string())),
        }
    })
}

fn add_groups(yard: &mut Yard, world: &mut World, role: Role, side: &GroupOptions, first: u32) -> Result<(), SimError> {
    let geometry = Arc::new(GroupGeometry {
        model: yard.options.model.clone(),
        format: Format { block_tokens: side.block_tokens, order: side.order, ..Format::default() },
        parallel: Parallel { tp: side.tp, ..Parallel::default() },
    });
    geometry.validate()?;
    let blocks = vec![side.blocks; geometry.model.groups.len()];
    for group in first..first + side.groups {
        for rank in 0..geometry.ranks() {
            yard.workers.push(Worker {
                node: world.add_node(),
                role,
                group: GroupId(group),
                rank: Rank(rank),
                geometry: Arc::clone(&geometry),
                blocks: blocks.clone(),
                was_hurt: Cell::new(false),
            });
        }
    }
    Ok(())
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// What [`Tally`] keeps by handover.
pub(crate) type ByHandover<T> = BTreeMap<kvferry_core::HandoverId, T>;
