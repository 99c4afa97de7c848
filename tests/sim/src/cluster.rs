//! A scheduler with prefill and decode groups in one world.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use actix::Addr;
use kvferry_actors::{
    NodeConfig, NodeError, OpenNic, SESSIONS_EAGER_MAX, Scheduler, Submit, Surroundings, WorkerConfig,
    assemble_scheduler, assemble_worker,
};
use kvferry_core::protocol::{
    DeadlineTerms, Finished, LeaseTerms, LeastLoaded, Refusal, RequestSpec, Role, SchedulerTerms, SessionTerms,
};
use kvferry_core::{
    Direction, Dtype, Epoch, Extent, Format, GeometryError, GroupGeometry, GroupId, LayerGroup, Model, NodeId, Order,
    Parallel, PoolId, Rank, RequestId, Sharding, Tensor,
};
use kvferry_fabric_sim::SimProvider;
use kvferry_synthetic::{DecodeEngine, Engine, EngineConfig, EngineError, PrefillEngine};
use kvferry_transport::{Device, Options, Pool, PoolError, PoolOptions, Provider, TransportKind};
use thiserror::Error;
use tokio::sync::oneshot;

use crate::dice::Dice;
use crate::report::{ClusterReport, RankReport, Tally};
use crate::world::{World, WorldOptions};

const SCHEDULER: usize = 0;
pub(crate) const SECRET: &[u8] = b"simulated nodes share this";

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
    /// Handovers that a decode group takes at once.
    pub handovers_max: u32,
    /// How sessions wait.
    pub session: SessionTerms,
    /// Peers with whom a session is made before it is needed.
    pub sessions_eager_max: usize,
    /// How long KV is held.
    pub leases: LeaseTerms,
    /// How long transfers may take.
    pub deadlines: DeadlineTerms,
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
            handovers_max: 8,
            session: SessionTerms::default(),
            sessions_eager_max: SESSIONS_EAGER_MAX,
            leases: LeaseTerms::default(),
            deadlines: DeadlineTerms::default(),
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
    /// The node's number is no worker's, or it is down.
    #[error("node {0} is not a worker that is up; number workers from 1, prefill first, by group and rank")]
    NoSuchNode(usize),
}

/// One rank's place.
#[derive(Clone, Debug)]
pub(crate) struct Worker {
    pub(crate) node: usize,
    pub(crate) role: Role,
    pub(crate) group: GroupId,
    pub(crate) rank: Rank,
    pub(crate) geometry: Arc<GroupGeometry>,
    pub(crate) blocks: Vec<u32>,
    /// Whether it was down or paused at any time: what is checked of survivors is not checked of it.
    pub(crate) was_hurt: bool,
}

/// Answers to requests that were submitted.
pub(crate) type Answers = Rc<RefCell<Vec<(RequestId, oneshot::Receiver<Result<Finished, Refusal>>)>>>;

/// A cluster: node 0 is the scheduler, then come the prefill ranks and the decode ranks, by group and rank.
pub struct Cluster {
    world: World,
    options: ClusterOptions,
    scheduler: Addr<Scheduler>,
    workers: Vec<Worker>,
    failures: Rc<RefCell<Vec<String>>>,
    workload: Dice,
    submitted: u64,
    answers: Answers,
    tally: Rc<RefCell<Tally>>,
}

impl Cluster {
    /// Starts all nodes; they find each other as time passes.
    pub fn new(options: ClusterOptions) -> Result<Self, SimError> {
        let mut world = World::new(options.world.clone());
        let node = world.add_node();
        let epoch = world.start(node);
        let config = node_config(&options, node, epoch);
        let around = world.surroundings(node).ok_or(SimError::NoSuchNode(node))?;
        let terms = options.scheduler;
        let parts = world.on(node, || assemble_scheduler(&around, config, terms, Box::new(LeastLoaded)));
        let parts = parts.ok_or(SimError::NoSuchNode(node))??;
        let mut cluster = Cluster {
            workload: Dice::new(options.world.seed, "workload", 0),
            world,
            scheduler: parts.scheduler,
            workers: Vec::new(),
            failures: Rc::default(),
            submitted: 0,
            answers: Answers::default(),
            tally: Rc::default(),
            options,
        };
        let sides = [
            (Role::Prefill, cluster.options.prefill.clone(), 0),
            (Role::Decode, cluster.options.decode.clone(), cluster.options.prefill.groups),
        ];
        for (role, side, first) in sides {
            cluster.add_groups(role, &side, first)?;
        }
        Ok(cluster)
    }

    /// The node of a worker, for [`Cluster::crash_at`] and its like.
    pub fn node_of(&self, role: Role, group: u32, rank: u32) -> Option<usize> {
        let first = if role == Role::Prefill { 0 } else { self.options.prefill.groups };
        let place = (role, GroupId(first + group), Rank(rank));
        self.workers.iter().find(|worker| (worker.role, worker.group, worker.rank) == place).map(|worker| worker.node)
    }

    /// Crashes a worker at a time from now.
    pub fn crash_at(&mut self, node: usize, after: Duration) -> Result<(), SimError> {
        self.hurt(node)?;
        let at = self.time(after);
        self.world.at(at, move |world| world.crash(node));
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

    /// Starts a worker that has crashed, in its next incarnation, with an empty pool.
    pub fn restart(&mut self, node: usize) -> Result<(), SimError> {
        let worker = self.workers.iter().find(|worker| worker.node == node).ok_or(SimError::NoSuchNode(node))?.clone();
        self.start_worker(&worker)
    }

    /// Submits requests at random times of the next `within`.
    pub fn submit(&mut self, requests: u64, within: Duration) {
        let within = u64::try_from(within.as_nanos()).unwrap_or(u64::MAX);
        for _ in 0..requests {
            self.submitted += 1;
            let spec = RequestSpec {
                request: RequestId(self.submitted),
                tokens: self.workload.within(self.options.tokens.clone()),
                prefix: Arc::default(),
                prefix_tokens: 0,
            };
            let at = self.world.now().saturating_add(self.workload.below(within));
            let (scheduler, answers, tally) =
                (self.scheduler.clone(), Rc::clone(&self.answers), Rc::clone(&self.tally));
            self.world.at(at, move |_| {
                let (answer, finished) = oneshot::channel();
                answers.borrow_mut().push((spec.request, finished));
                tally.borrow_mut().tokens.insert(spec.request, spec.tokens);
                scheduler.do_send(Submit { spec, ticket: 0, answer });
            });
        }
    }

    /// Runs until every submitted request is finished, or for `limit`. Says whether they are.
    pub fn run(&mut self, limit: Duration) -> bool {
        let (limit, submitted, tally) = (self.time(limit), self.submitted, Rc::clone(&self.tally));
        self.world.run(limit, move |world| {
            let mut tally = tally.borrow_mut();
            tally.take_in(world.take_observed());
            tally.finished.len() as u64 == submitted
        })
    }

    /// Lets time pass: what is left over after the last request comes to its end.
    pub fn rest(&mut self, time: Duration) {
        let limit = self.time(time);
        self.world.run(limit, |_| false);
        self.tally.borrow_mut().take_in(self.world.take_observed());
    }

    /// The world that it runs in.
    pub fn world(&mut self) -> &mut World {
        &mut self.world
    }

    /// What came of everything so far.
    pub fn report(&mut self) -> ClusterReport {
        let world = &self.world;
        let ranks = self.workers.iter().map(|worker| RankReport {
            role: worker.role,
            group: worker.group,
            rank: worker.rank,
            was_hurt: worker.was_hurt,
            engine: world.engine_report(worker.node),
        });
        let ranks = ranks.collect();
        let workers = &self.workers;
        let geometry =
            |group: GroupId| workers.iter().find(|worker| worker.group == group).map(|worker| &*worker.geometry);
        let mut answers = self.answers.borrow_mut();
        let mut report = self.tally.borrow_mut().report(self.submitted, ranks, &mut answers, geometry);
        report.start_failures = self.failures.borrow().clone();
        report.panics = world.panics();
        report.stuck = world.is_stuck();
        report.in_flight = world.fabric().in_flight();
        report.trace_hash = world.trace().hash();
        report.recent = world.trace().recent().copied().collect();
        report.events = world.events();
        report.virtual_seconds = world.now() as f64 / 1e9;
        report
    }

    fn add_groups(&mut self, role: Role, side: &GroupOptions, first: u32) -> Result<(), SimError> {
        let geometry = Arc::new(GroupGeometry {
            model: self.options.model.clone(),
            format: Format { block_tokens: side.block_tokens, order: side.order, ..Format::default() },
            parallel: Parallel { tp: side.tp, ..Parallel::default() },
        });
        geometry.validate()?;
        let blocks = vec![side.blocks; geometry.model.groups.len()];
        for group in first..first + side.groups {
            for rank in 0..geometry.ranks() {
                let worker = Worker {
                    node: self.world.add_node(),
                    role,
                    group: GroupId(group),
                    rank: Rank(rank),
                    geometry: Arc::clone(&geometry),
                    blocks: blocks.clone(),
                    was_hurt: false,
                };
                self.start_worker(&worker)?;
                self.workers.push(worker);
            }
        }
        Ok(())
    }

    fn start_worker(&mut self, worker: &Worker) -> Result<(), SimError> {
        let node = worker.node;
        let layout = worker.geometry.shard(worker.rank)?.layout(&worker.blocks);
        let pool =
            Pool::allocate_with(PoolId(1), layout, "kvferry-sim", &PoolOptions { populate: false, huge_pages: false })?;
        let engine = EngineConfig {
            geometry: Arc::clone(&worker.geometry),
            rank: worker.rank,
            blocks: worker.blocks.clone(),
            layers_per_step: self.options.layers_per_step,
            reuse_prefix: false,
            seed: Dice::new(self.options.world.seed, "engine", node as u64).word(),
        };
        let engine: Box<dyn Engine> = match worker.role {
            Role::Prefill => Box::new(PrefillEngine::new(engine, pool.clone())?),
            Role::Decode => Box::new(DecodeEngine::new(engine, pool.clone())?),
        };
        let epoch = self.world.start(node);
        let seat = self.world.seat(node, engine);
        let around = self.world.surroundings(node).ok_or(SimError::NoSuchNode(node))?;
        let scheduler = (node_id(SCHEDULER), address(SCHEDULER));
        let (geometry, blocks) = (Arc::clone(&worker.geometry), worker.blocks.clone());
        let mut config = WorkerConfig::new(worker.role, worker.group, worker.rank, geometry, blocks, scheduler);
        config.handovers_max = self.options.handovers_max;
        config.direction = self.options.direction;
        let provider = SimProvider::new(self.world.fabric().clone());
        let device = Device { kind: TransportKind::Sim, name: format!("node-{node}"), unavailable: None };
        let nics: Vec<OpenNic> = vec![Box::new(move || provider.open(&device, &Options::default()))];
        let (identity, failures) = (node_config(&self.options, node, epoch), Rc::clone(&self.failures));
        let start = async move { assemble(around, identity, config, pool, nics, seat, failures).await };
        self.world.on(node, || tokio::task::spawn_local(start)).ok_or(SimError::NoSuchNode(node))?;
        Ok(())
    }

    fn hurt(&mut self, node: usize) -> Result<(), SimError> {
        let worker = self.workers.iter_mut().find(|worker| worker.node == node).ok_or(SimError::NoSuchNode(node))?;
        worker.was_hurt = true;
        Ok(())
    }

    fn time(&self, after: Duration) -> u64 {
        self.world.now().saturating_add(u64::try_from(after.as_nanos()).unwrap_or(u64::MAX))
    }
}

async fn assemble(
    around: Surroundings,
    node: NodeConfig,
    config: WorkerConfig,
    pool: Pool,
    nics: Vec<OpenNic>,
    seat: crate::node::Seat,
    failures: Rc<RefCell<Vec<String>>>,
) {
    match assemble_worker(&around, node, config, pool, nics).await {
        Ok(parts) => *seat.borrow_mut() = Some(parts),
        Err(error) => failures.borrow_mut().push(error.to_string()),
    }
}

fn node_config(options: &ClusterOptions, node: usize, epoch: Epoch) -> NodeConfig {
    let mut config = NodeConfig::new(node_id(node), epoch);
    config.identity.secret = Some(Arc::from(SECRET));
    config.listen = address(node);
    config.sessions_eager_max = options.sessions_eager_max;
    (config.session, config.leases, config.deadlines) = (options.session, options.leases, options.deadlines);
    config
}

pub(crate) fn node_id(node: usize) -> NodeId {
    NodeId(node as u64 + 1)
}

pub(crate) fn address(node: usize) -> String {
    format!("node-{node}")
}

/// What [`Tally`] keeps by handover.
pub(crate) type ByHandover<T> = BTreeMap<kvferry_core::HandoverId, T>;
