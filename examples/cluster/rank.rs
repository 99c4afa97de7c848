//! One rank: its node, its pool, and the engine that is driven beside it. The same code in a process of its own and on a thread.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry::{
    Direction, EngineCall, EngineEvent, EnginePort, Epoch, Event, GroupGeometry, GroupId, HandoverId, NodeConfig,
    NodeError, NodeId, Outcome, Pool, PoolError, PoolId, PoolLayout, Rank, Role, ServeError, Shard, ThreadOptions,
    TransportKind, WorkerConfig, WorkerNode, transport,
};
use kvferry_synthetic::{DecodeEngine, Engine, EngineConfig, EngineError, EngineReport, PrefillEngine};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::nics::{self, NicChoice};
use crate::paths::{Key, Paths, Told};
use crate::share;
use crate::terms::Terms;
use crate::timeline::Course;
use crate::worker::{Census, Worker, record, serve_metrics};

/// Everything that a rank is told at its start: one line of JSON on its standard input.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RankConfig {
    pub(crate) node: NodeId,
    /// How often its process was started before.
    pub(crate) life: u32,
    pub(crate) role: Role,
    pub(crate) group: GroupId,
    pub(crate) rank: Rank,
    /// Its place on its side, over all groups.
    pub(crate) number: u64,
    pub(crate) geometry: Arc<GroupGeometry>,
    pub(crate) blocks: Vec<u32>,
    pub(crate) nics: Vec<NicChoice>,
    /// The GPU in whose memory the pool is to be, where the NICs do not say so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) gpu: Option<String>,
    /// The simulated host that it is on; `None` for this one.
    pub(crate) host: Option<String>,
    pub(crate) direction: Option<Direction>,
    pub(crate) require_rdma: bool,
    pub(crate) handovers_max: u32,
    pub(crate) layers_per_step: Option<u32>,
    pub(crate) reuse_prefix: bool,
    /// Overwrites what was delivered, to see that it is noticed.
    pub(crate) corrupt: bool,
    pub(crate) seed: u64,
    /// NIC threads of the whole cluster, all on this machine.
    pub(crate) nic_threads: usize,
    pub(crate) terms: Terms,
    /// Signals reach it, SIGTERM tells it to leave: only in a process of its own.
    pub(crate) may_leave: bool,
    /// How long it then waits for what it offers.
    pub(crate) drain_within: Duration,
    /// Where its metrics are served.
    pub(crate) metrics: Option<String>,
    /// Where its flight recorder writes.
    pub(crate) recorder: Option<PathBuf>,
    /// Whether it says when what happened to requests.
    pub(crate) timeline: bool,
    /// The scheduler's control address; known once it listens.
    pub(crate) scheduler: String,
}

impl RankConfig {
    /// `prefill:1`.
    pub(crate) fn name(&self) -> String {
        name(self.role, self.number)
    }

    /// Memory regions of its pool that hold anything.
    pub(crate) fn regions(&self) -> usize {
        let layout = self.geometry.shard(self.rank).map(|shard| shard.layout(&self.blocks));
        layout.map_or(0, |layout| layout.regions.iter().filter(|bytes| **bytes > 0).count())
    }

    /// What its pool is called in `/proc/<pid>/maps`.
    pub(crate) fn pool_name(&self) -> String {
        pool_name(self.role, self.number)
    }
}

/// A rank as reports call it.
pub(crate) fn name(role: Role, number: u64) -> String {
    format!("{role}:{number}")
}

/// A rank's pool as the kernel calls it.
pub(crate) fn pool_name(role: Role, number: u64) -> String {
    format!("kv-{role}-{number}")
}

/// What a rank is told later. The end of the orders means `Stop`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Say what you have checked and hold.
    Report,
    /// The same, after a look at every block that holds nothing: has anybody written it?
    Audit,
    /// End.
    Stop,
}

/// What a rank says: one line of JSON each.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Said {
    /// Something was checked or asked for.
    Report(Box<RankReport>),
    /// An incarnation is over, for that reason; the next one follows.
    Lost(String),
    /// Its metrics are served there.
    Serving(String),
    /// When what happened to a request here.
    Course(Course),
    /// It was told to leave and does, with so many requests still offered, so long after that.
    Left { left: u64, seconds: f64 },
    /// It cannot go on.
    Failed(String),
}

/// What a rank has checked and what it holds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct RankReport {
    /// How many `Report` orders it has answered.
    pub(crate) answered: u64,
    /// Bytes that delivered handovers had to bring here.
    pub(crate) expected_bytes: u64,
    /// The engine has nothing to do at the moment.
    pub(crate) idle: bool,
    /// How often its node was declared lost and started again; what earlier incarnations checked is in all sums.
    pub(crate) restarts: u32,
    /// In answers only.
    pub(crate) census: Option<Census>,
    /// In answers only: what has become known of paths since the one before.
    pub(crate) paths: Vec<Told>,
    pub(crate) engine: EngineReport,
}

/// Why a rank cannot be or go on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub(crate) enum RankError {
    #[error("its part of the model is impossible: {0}")]
    Shape(#[from] kvferry::GeometryError),
    #[error(transparent)]
    Pool(#[from] PoolError),
    #[error(transparent)]
    Allocate(#[from] transport::AllocateError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Select(#[from] transport::SelectError),
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error("its flight recorder cannot write to {}: {source}; name a folder that is there with --recorder", file.display())]
    Recorder { file: PathBuf, source: std::io::Error },
    #[error("SIGTERM cannot be listened for: {0}")]
    Signal(std::io::Error),
    #[error("it has no runtime: {0}")]
    Runtime(std::io::Error),
    #[error("its node has stopped and did not say why")]
    NodeStopped,
}

/// What runs as `--rank-worker`.
pub(crate) struct RankWorker;

impl Worker for RankWorker {
    type Config = RankConfig;
    type Order = Order;
    type Said = Said;
    type Error = RankError;

    fn failed(reason: String) -> Said {
        Said::Failed(reason)
    }

    fn run(
        config: RankConfig,
        orders: mpsc::UnboundedReceiver<Order>,
        say: &mut dyn FnMut(Said),
    ) -> Result<(), RankError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(RankError::Runtime)?;
        runtime.block_on(live(&config, orders, say))
    }
}

/// One incarnation after another, all over the same pool.
async fn live(
    config: &RankConfig,
    mut orders: mpsc::UnboundedReceiver<Order>,
    say: &mut dyn FnMut(Said),
) -> Result<(), RankError> {
    let shard = config.geometry.shard(config.rank)?;
    let pool = allocate(config, shard.layout(&config.blocks))?;
    let mut report = RankReport::default();
    let mut node = NodeConfig::new(config.node, Epoch(0));
    config.terms.apply(&mut node);
    let serving = config.metrics.as_deref().map(|address| serve_metrics(&mut node, address)).transpose()?;
    if let Some(serving) = &serving {
        say(Said::Serving(serving.address().to_string()));
    }
    if let Some(file) = &config.recorder {
        record(&mut node, file, config.may_leave)
            .map_err(|source| RankError::Recorder { file: file.clone(), source })?;
    }
    let mut told_to_leave = match config.may_leave && config.role == Role::Prefill {
        true => Some(signal(SignalKind::terminate()).map_err(RankError::Signal)?),
        false => None,
    };
    let mut leaves = None;
    loop {
        let mut worker = start(config, node.clone(), report.restarts, pool.clone()).await?;
        let past = std::mem::take(&mut report.engine);
        let ledger = Ledger { shard: shard.clone(), config, placed: BTreeMap::new(), past, report };
        let engine = make_engine(config, pool.clone())?;
        let mut runner = Runner {
            port: worker.port(),
            engine,
            ledger,
            pool: pool.clone(),
            paths: Paths::default(),
            fresh: BTreeSet::new(),
            left: None,
        };
        if leaves.is_some() {
            // A drain ends with its incarnation; the order to leave does not.
            runner.port.drain(config.drain_within);
        }
        let ended = runner.serve(&mut worker, &mut orders, (told_to_leave.as_mut(), &mut leaves), say).await;
        // Peers see this incarnation end; a thread that hangs does not keep the process.
        let _ = tokio::time::timeout(Duration::from_secs(10), worker.shutdown()).await;
        match ended? {
            Ended::Told => return Ok(()),
            Ended::Lost(cause) => {
                say(Said::Lost(cause));
                report = runner.close();
            }
        }
        // Whoever refuses this node again and again is not asked all the time.
        tokio::time::sleep(REST).await;
    }
}

/// The rank's pool: on its GPU if it has one, else in the memory of the NIC that allocates, if one does.
fn allocate(config: &RankConfig, layout: PoolLayout) -> Result<Pool, RankError> {
    let (id, name) = (PoolId(0), config.pool_name());
    if let Some(gpu) = &config.gpu {
        return Ok(transport::allocate(TransportKind::Cuda, Some(gpu), id, layout, &name)?);
    }
    match nics::who_allocates(&config.nics) {
        Some(nic) => Ok(transport::allocate(nic.kind, Some(&nic.device), id, layout, &name)?),
        None => Ok(Pool::allocate(id, layout, &name)?),
    }
}

/// Between two incarnations.
const REST: Duration = Duration::from_millis(20);

async fn start(config: &RankConfig, mut node: NodeConfig, restarts: u32, pool: Pool) -> Result<WorkerNode, RankError> {
    let nics = config.nics.iter().map(NicChoice::select).collect::<Result<Vec<_>, _>>()?;
    let scheduler = (NodeId(0), config.scheduler.clone());
    let geometry = Arc::clone(&config.geometry);
    let mut worker =
        WorkerConfig::new(config.role, config.group, config.rank, geometry, config.blocks.clone(), scheduler);
    worker.handovers_max = config.handovers_max;
    worker.direction = config.direction;
    worker.require_rdma = config.require_rdma;
    worker.host = config.host.clone();
    // Every process begins beyond what the one before it can have come to.
    node.identity.epoch = Epoch((u64::from(config.life) << 16) + u64::from(restarts) + 1);
    Ok(WorkerNode::start(node, worker, pool, nics, ThreadOptions::for_nic_threads(config.nic_threads)).await?)
}

fn make_engine(config: &RankConfig, pool: Pool) -> Result<Box<dyn Engine>, RankError> {
    let engine = EngineConfig {
        geometry: Arc::clone(&config.geometry),
        rank: config.rank,
        blocks: config.blocks.clone(),
        layers_per_step: config.layers_per_step,
        reuse_prefix: config.reuse_prefix,
        // Ranks of a group have different tables, too.
        seed: config.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(config.node.0),
    };
    Ok(match config.role {
        Role::Prefill => Box::new(PrefillEngine::new(engine, pool)?),
        Role::Decode => Box::new(DecodeEngine::new(engine, pool)?),
    })
}

/// Why that node is over, if the event says so.
fn loss_of(node: NodeId, event: Event) -> Option<String> {
    match event {
        Event::NodeLost { node: gone, cause } if gone == node => Some(cause),
        _ => None,
    }
}

/// How an incarnation ended.
enum Ended {
    /// As it was told to.
    Told,
    /// The others had declared it lost, or something in it panicked.
    Lost(String),
}

/// Carries calls to the engine and its answers back.
struct Runner<'a> {
    port: EnginePort,
    engine: Box<dyn Engine>,
    ledger: Ledger<'a>,
    pool: Pool,
    paths: Paths,
    /// Paths of which the parent has not been told the latest.
    fresh: BTreeSet<Key>,
    /// It may leave, with so many requests still offered.
    left: Option<u64>,
}

impl Runner<'_> {
    async fn serve(
        &mut self,
        worker: &mut WorkerNode,
        orders: &mut mpsc::UnboundedReceiver<Order>,
        (mut told_to_leave, leaves): (Option<&mut Signal>, &mut Option<Instant>),
        say: &mut dyn FnMut(Said),
    ) -> Result<Ended, RankError> {
        let (_keep, nothing) = mpsc::unbounded_channel();
        let mut events = worker.events().unwrap_or(nothing);
        let node = self.ledger.config.node;
        let mut lost = None;
        // The first report says that the engine has been over its pool.
        let mut news = true;
        loop {
            while let Some(call) = worker.try_next_call() {
                news = true;
                self.handle(call);
            }
            while let Ok(event) = events.try_recv() {
                tracing::debug!(%node, ?event);
                self.fresh.extend(self.paths.note(&event));
                if self.ledger.config.timeline
                    && let Some(course) = Course::of(&event)
                {
                    say(Said::Course(course));
                }
                lost = lost.or(loss_of(node, event));
            }
            while let Ok(order) = orders.try_recv() {
                match order {
                    Order::Report => self.answer(say, false),
                    Order::Audit => self.audit(say),
                    Order::Stop => return Ok(Ended::Told),
                }
            }
            let Runner { port, engine, ledger, .. } = self;
            if engine.work(&mut |event| ledger.emit(port, event)) {
                news = true;
                continue;
            }
            if std::mem::take(&mut news) {
                // A rank that is killed later has told what it checked.
                say(Said::Report(Box::new(self.report(true))));
            }
            if let Some(left) = self.left {
                let seconds = leaves.map_or(0.0, |told| told.elapsed().as_secs_f64());
                say(Said::Left { left, seconds });
                return Ok(Ended::Told);
            }
            tokio::select! {
                call = worker.next_call() => match call {
                    Some(call) => {
                        news = true;
                        self.handle(call);
                    }
                    None => {
                        while let Ok(event) = events.try_recv() {
                            lost = lost.or(loss_of(node, event));
                        }
                        return lost.map(Ended::Lost).ok_or(RankError::NodeStopped);
                    }
                },
                order = orders.recv() => match order {
                    Some(Order::Report) => self.answer(say, true),
                    Some(Order::Audit) => self.audit(say),
                    Some(Order::Stop) | None => return Ok(Ended::Told),
                },
                () = heard(&mut told_to_leave) => {
                    self.port.drain(self.ledger.config.drain_within);
                    // Who is told twice was told at first.
                    leaves.get_or_insert_with(Instant::now);
                }
            }
        }
    }

    /// After the end of a node that was lost, when nothing touches the pool any more: what was delivered is checked to the end, and what
    /// holds nothing must not have been written. The blocks of everything else belong to nobody then. Returns the sums.
    fn close(mut self) -> RankReport {
        while self.engine.work(&mut |_| {}) {}
        self.engine.audit();
        let report = self.report(false);
        let engine = EngineReport {
            blocks: 0,
            free_blocks: 0,
            cached_blocks: 0,
            held_blocks: 0,
            quarantined_blocks: 0,
            held_requests: 0,
            queued_requests: 0,
            ..report.engine
        };
        RankReport { restarts: report.restarts + 1, engine, ..report }
    }

    fn handle(&mut self, call: EngineCall) {
        let Runner { port, engine, ledger, pool, .. } = self;
        if ledger.config.corrupt && matches!(&call, EngineCall::Settled { outcome: Outcome::Delivered, .. }) {
            for block in 0..pool.layout().planes.first().map_or(0, |plane| plane.blocks) {
                // A block that is not there cannot be spoilt; the run then ends well, and its caller notices.
                let _ = pool.write(0, block, 0, &[0x5a]);
            }
        }
        if let EngineCall::Drained { left } = call {
            self.left = Some(left);
        }
        ledger.note(&call);
        engine.handle(call, &mut |event| ledger.emit(port, event));
    }

    fn audit(&mut self, say: &mut dyn FnMut(Said)) {
        self.engine.audit();
        self.answer(say, true);
    }

    fn answer(&mut self, say: &mut dyn FnMut(Said), idle: bool) {
        self.ledger.report.answered += 1;
        let mut report = self.report(idle);
        report.census = Some(Census::take(&self.ledger.config.pool_name()));
        let told = |key: Key| Some((key.clone(), self.paths.get(&key)?.clone()));
        report.paths = std::mem::take(&mut self.fresh).into_iter().filter_map(told).collect();
        say(Said::Report(Box::new(report)));
    }

    fn report(&self, idle: bool) -> RankReport {
        let mut engine = self.engine.report();
        engine.merge(&self.ledger.past);
        RankReport { engine, idle, ..self.ledger.report.clone() }
    }
}

/// Pends where nobody can say that.
async fn heard(signal: &mut Option<&mut Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

/// Counts what delivered handovers had to bring, from what the engine was asked for and said that it has.
struct Ledger<'a> {
    config: &'a RankConfig,
    shard: Shard,
    /// Tokens of a handover, and how many of them were here before.
    placed: BTreeMap<HandoverId, (u64, u64)>,
    /// What the engines of earlier incarnations found.
    past: EngineReport,
    report: RankReport,
}

impl Ledger<'_> {
    fn note(&mut self, call: &EngineCall) {
        match call {
            EngineCall::Place { handover, spec } => {
                self.placed.insert(*handover, (spec.tokens, 0));
            }
            EngineCall::Settled { handover, outcome, .. } => {
                if let Some((tokens, have)) = self.placed.remove(handover)
                    && *outcome == Outcome::Delivered
                {
                    self.report.expected_bytes += share::bytes(&self.config.geometry, &self.shard, tokens, have);
                }
            }
            _ => {}
        }
    }

    fn emit(&mut self, port: &EnginePort, event: EngineEvent) {
        if let EngineEvent::Placed { handover, have, .. } = &event
            && let Some(placed) = self.placed.get_mut(handover)
        {
            placed.1 = *have;
        }
        port.tell(event);
    }
}
