//! One rank: its node, its pool, and the engine that is driven beside it. The same code in a process of its own and on a thread.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use kvferry::{
    Direction, EngineCall, EngineEvent, EnginePort, Epoch, GroupGeometry, GroupId, HandoverId, NodeConfig, NodeError,
    NodeId, Outcome, Pool, PoolError, PoolId, Rank, Role, Shard, ThreadOptions, WorkerConfig, WorkerNode, transport,
};
use kvferry_synthetic::{DecodeEngine, Engine, EngineConfig, EngineError, EngineReport, PrefillEngine};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::mpsc;

use crate::nics::NicChoice;
use crate::share;

/// Everything that a rank is told at its start: one line of JSON on its standard input.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RankConfig {
    pub(crate) node: NodeId,
    pub(crate) role: Role,
    pub(crate) group: GroupId,
    pub(crate) rank: Rank,
    /// Its place on its side, over all groups.
    pub(crate) number: u64,
    pub(crate) geometry: Arc<GroupGeometry>,
    pub(crate) blocks: Vec<u32>,
    pub(crate) nics: Vec<NicChoice>,
    /// The simulated host that it is on; `None` for this one.
    pub(crate) host: Option<String>,
    pub(crate) direction: Option<Direction>,
    pub(crate) handovers_max: u32,
    pub(crate) layers_per_step: Option<u32>,
    pub(crate) reuse_prefix: bool,
    /// Overwrites what was delivered, to see that it is noticed.
    pub(crate) corrupt: bool,
    pub(crate) seed: u64,
    /// NIC threads of the whole cluster, all on this machine.
    pub(crate) nic_threads: usize,
    /// The scheduler's control address; known once it listens.
    pub(crate) scheduler: String,
}

impl RankConfig {
    /// `prefill:1`.
    pub(crate) fn name(&self) -> String {
        name(self.role, self.number)
    }

    /// What its pool is called in `/proc/<pid>/maps`.
    fn pool_name(&self) -> String {
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
    /// Foreign pools that are mapped here, all of them without the right to write.
    pub(crate) mapped: Vec<String>,
    pub(crate) engine: EngineReport,
}

/// Why a rank cannot be or go on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub(crate) enum RankError {
    #[error("its configuration cannot be read: {0}")]
    Config(String),
    #[error("its part of the model is impossible: {0}")]
    Shape(#[from] kvferry::GeometryError),
    #[error(transparent)]
    Pool(#[from] PoolError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Select(#[from] transport::SelectError),
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error("it has no runtime: {0}")]
    Runtime(std::io::Error),
    #[error("its node has stopped: an actor panicked, or the directory refused it")]
    NodeStopped,
}

/// A rank in a process of its own.
pub(crate) fn process() -> ExitCode {
    // A parent that was killed leaves no ranks behind; one that ends otherwise closes the standard input.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    let mut say = |said: Said| {
        let mut out = std::io::stdout().lock();
        let line = serde_json::to_string(&said).unwrap_or_default();
        // Nobody listens any more: the end of the orders follows.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    };
    let mut first = String::new();
    let config = match std::io::stdin().lock().read_line(&mut first) {
        Ok(_) => serde_json::from_str(&first).map_err(|error| RankError::Config(error.to_string())),
        Err(error) => Err(RankError::Config(error.to_string())),
    };
    let (order, orders) = mpsc::unbounded_channel();
    let reader = std::thread::Builder::new().name("orders".to_owned()).spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if let Ok(given) = serde_json::from_str::<Order>(&line)
                && order.send(given).is_err()
            {
                return;
            }
        }
    });
    let ended = match reader {
        Ok(_) => config.and_then(|config| run(config, orders, &mut say)),
        Err(error) => Err(RankError::Runtime(error)),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(Said::Failed(error.to_string()));
            ExitCode::FAILURE
        }
    }
}

/// Serves until the orders end. Blocks its thread.
pub(crate) fn run(
    config: RankConfig,
    orders: mpsc::UnboundedReceiver<Order>,
    say: &mut dyn FnMut(Said),
) -> Result<(), RankError> {
    let shard = config.geometry.shard(config.rank)?;
    let pool = Pool::allocate(PoolId(0), shard.layout(&config.blocks), &config.pool_name())?;
    let engine = EngineConfig {
        geometry: Arc::clone(&config.geometry),
        rank: config.rank,
        blocks: config.blocks.clone(),
        layers_per_step: config.layers_per_step,
        reuse_prefix: config.reuse_prefix,
        // Ranks of a group have different tables, too.
        seed: config.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(config.node.0),
    };
    let engine: Box<dyn Engine> = match config.role {
        Role::Prefill => Box::new(PrefillEngine::new(engine, pool.clone())?),
        Role::Decode => Box::new(DecodeEngine::new(engine, pool.clone())?),
    };
    let nics = config.nics.iter().map(NicChoice::select).collect::<Result<Vec<_>, _>>()?;
    let scheduler = (NodeId(0), config.scheduler.clone());
    let geometry = Arc::clone(&config.geometry);
    let mut worker =
        WorkerConfig::new(config.role, config.group, config.rank, geometry, config.blocks.clone(), scheduler);
    worker.handovers_max = config.handovers_max;
    worker.direction = config.direction;
    worker.host = config.host.clone();
    let threads = ThreadOptions::for_nic_threads(config.nic_threads);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().map_err(RankError::Runtime)?;
    runtime.block_on(async {
        let node = NodeConfig::new(config.node, Epoch(1));
        let mut worker = WorkerNode::start(node, worker, pool.clone(), nics, threads).await?;
        let ledger = Ledger { shard, config: &config, placed: BTreeMap::new(), report: RankReport::default() };
        let ended =
            Runner { port: worker.port(), engine, ledger, pool: pool.clone() }.serve(&mut worker, orders, say).await;
        // Peers see this incarnation end; a thread that hangs does not keep the process.
        let _ = tokio::time::timeout(Duration::from_secs(10), worker.shutdown()).await;
        ended
    })
}

/// Carries calls to the engine and its answers back.
struct Runner<'a> {
    port: EnginePort,
    engine: Box<dyn Engine>,
    ledger: Ledger<'a>,
    pool: Pool,
}

impl Runner<'_> {
    async fn serve(
        mut self,
        worker: &mut WorkerNode,
        mut orders: mpsc::UnboundedReceiver<Order>,
        say: &mut dyn FnMut(Said),
    ) -> Result<(), RankError> {
        // The first report says that the engine has been over its pool.
        let mut news = true;
        loop {
            while let Some(call) = worker.try_next_call() {
                news = true;
                self.handle(call);
            }
            while let Ok(order) = orders.try_recv() {
                match order {
                    Order::Report => self.answer(say, false),
                    Order::Audit => self.audit(say),
                    Order::Stop => return Ok(()),
                }
            }
            let Runner { port, engine, ledger, .. } = &mut self;
            if engine.work(&mut |event| ledger.emit(port, event)) {
                news = true;
                continue;
            }
            if std::mem::take(&mut news) {
                // A rank that is killed later has told what it checked.
                say(Said::Report(Box::new(self.report(true))));
            }
            tokio::select! {
                call = worker.next_call() => match call {
                    Some(call) => {
                        news = true;
                        self.handle(call);
                    }
                    None => return Err(RankError::NodeStopped),
                },
                order = orders.recv() => match order {
                    Some(Order::Report) => self.answer(say, true),
                    Some(Order::Audit) => self.audit(say),
                    Some(Order::Stop) | None => return Ok(()),
                },
            }
        }
    }

    fn handle(&mut self, call: EngineCall) {
        let Runner { port, engine, ledger, pool } = self;
        if ledger.config.corrupt && matches!(&call, EngineCall::Settled { outcome: Outcome::Delivered, .. }) {
            for block in 0..pool.layout().planes.first().map_or(0, |plane| plane.blocks) {
                // A block that is not there cannot be spoilt; the run then ends well, and its caller notices.
                let _ = pool.write(0, block, 0, &[0x5a]);
            }
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
        report.mapped = mapped_pools(&self.ledger.config.pool_name());
        say(Said::Report(Box::new(report)));
    }

    fn report(&self, idle: bool) -> RankReport {
        RankReport { engine: self.engine.report(), idle, ..self.ledger.report.clone() }
    }
}

/// Counts what delivered handovers had to bring, from what the engine was asked for and said that it has.
struct Ledger<'a> {
    config: &'a RankConfig,
    shard: Shard,
    /// Tokens of a handover, and how many of them were here before.
    placed: BTreeMap<HandoverId, (u64, u64)>,
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

/// Foreign pools in this process's address space. A mapping that could be written is never ours to have, so it is not listed.
fn mapped_pools(own: &str) -> Vec<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mut pools: Vec<String> = maps
        .lines()
        .filter(|line| line.split_whitespace().nth(1).is_some_and(|rights| rights.starts_with("r--")))
        .filter_map(|line| line.split_once("memfd:"))
        .filter_map(|(_, name)| name.split_whitespace().next())
        .filter(|name| name.starts_with("kv-") && *name != own)
        .map(str::to_owned)
        .collect();
    pools.sort();
    pools.dedup();
    pools
}
