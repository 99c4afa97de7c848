//! How the nodes of a cluster start, and start again.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use actix::Addr;
use kvferry_actors::{NodeConfig, OpenNic, Scheduler, Surroundings, WorkerConfig, assemble_scheduler, assemble_worker};
use kvferry_core::protocol::{LeastLoaded, Protocols, Role};
use kvferry_core::{Epoch, GroupGeometry, GroupId, NodeId, PoolId, Rank};
use kvferry_fabric_sim::SimProvider;
use kvferry_synthetic::{DecodeEngine, Engine, EngineConfig, PrefillEngine};
use kvferry_transport::{Device, Options, Pool, PoolOptions, Provider, TransportKind};

use crate::chronicle::What;
use crate::cluster::{ClusterOptions, SimError};
use crate::desk::{Desk, DeskOptions, RoomTrouble};
use crate::dice::Dice;
use crate::node::Seat;
use crate::world::{WithNode, World};

/// The scheduler's node.
pub(crate) const SCHEDULER: usize = 0;
/// What all nodes share.
pub(crate) const SECRET: &[u8] = b"simulated nodes share this";

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
    pub(crate) was_hurt: Cell<bool>,
}

/// All nodes of a cluster, as they are to be started.
pub(crate) struct Yard {
    pub(crate) options: ClusterOptions,
    pub(crate) workers: Vec<Worker>,
    scheduler: RefCell<Option<Addr<Scheduler>>>,
    room: Rc<Cell<RoomTrouble>>,
}

impl Yard {
    pub(crate) fn new(options: ClusterOptions) -> Self {
        let room = Rc::new(Cell::new(options.room));
        Yard { options, workers: Vec::new(), scheduler: RefCell::default(), room }
    }

    /// Engines find room from now on whenever there is any.
    pub(crate) fn make_room(&self) {
        self.room.set(RoomTrouble::default());
    }

    /// The scheduler, while it is up.
    pub(crate) fn scheduler(&self) -> Option<Addr<Scheduler>> {
        self.scheduler.borrow().clone()
    }

    /// The worker on a node.
    pub(crate) fn worker(&self, node: usize) -> Option<&Worker> {
        // Workers follow the scheduler in the order of their nodes.
        self.workers.get(node.checked_sub(1)?).filter(|worker| worker.node == node)
    }

    /// Starts a node that is down, in its next incarnation, with an empty pool. One that is up goes on.
    pub(crate) fn start(&self, world: &mut World, node: usize) -> Result<(), SimError> {
        if world.is_up(node) {
            return Ok(());
        }
        match self.worker(node) {
            Some(worker) => self.start_worker(world, worker),
            None => self.start_scheduler(world),
        }
    }

    /// A node is down.
    pub(crate) fn note_down(&self, node: usize) {
        if node == SCHEDULER {
            *self.scheduler.borrow_mut() = None;
        } else if let Some(worker) = self.worker(node) {
            worker.was_hurt.set(true);
        }
    }

    fn start_scheduler(&self, world: &mut World) -> Result<(), SimError> {
        let epoch = world.start(SCHEDULER);
        let config = self.node_config(SCHEDULER, epoch);
        let around = world.surroundings(SCHEDULER).ok_or(SimError::NoSuchNode(SCHEDULER))?;
        let terms = self.options.scheduler;
        let parts = world.on(SCHEDULER, || assemble_scheduler(&around, config, terms, Box::new(LeastLoaded)));
        let parts = parts.ok_or(SimError::NoSuchNode(SCHEDULER))??;
        *self.scheduler.borrow_mut() = Some(parts.scheduler);
        Ok(())
    }

    fn start_worker(&self, world: &mut World, worker: &Worker) -> Result<(), SimError> {
        let (node, options) = (worker.node, &self.options);
        let layout = worker.geometry.shard(worker.rank)?.layout(&worker.blocks);
        let pool =
            Pool::allocate_with(PoolId(1), layout, "kvferry-sim", &PoolOptions { populate: false, huge_pages: false })?;
        let epoch = world.start(node);
        let life = world.life(node);
        let stream = |name| Dice::new(options.world.seed, name, (node as u64) << 32 | life.epoch);
        let engine = EngineConfig {
            geometry: Arc::clone(&worker.geometry),
            rank: worker.rank,
            blocks: worker.blocks.clone(),
            layers_per_step: options.layers_per_step,
            reuse_prefix: false,
            seed: stream("engine").word(),
        };
        let engine: Box<dyn Engine> = match worker.role {
            Role::Prefill => Box::new(PrefillEngine::new(engine, pool.clone())?),
            Role::Decode => Box::new(DecodeEngine::new(engine, pool.clone())?),
        };
        let (_, timeline, chronicle) = world.chronicle();
        let desk = DeskOptions {
            life,
            timeline,
            chronicle,
            fabric: world.fabric().clone(),
            pool: pool.clone(),
            trouble: Rc::clone(&self.room),
            dice: stream("room"),
            plant: options.world.plant,
        };
        let seat = world.seat(node, Desk::new(engine, &worker.geometry, worker.rank, desk));
        let around = world.surroundings(node).ok_or(SimError::NoSuchNode(node))?;
        let scheduler = (node_id(SCHEDULER), address(SCHEDULER));
        let (geometry, blocks) = (Arc::clone(&worker.geometry), worker.blocks.clone());
        let mut config = WorkerConfig::new(worker.role, worker.group, worker.rank, geometry, blocks, scheduler);
        config.handovers_max = options.handovers_max;
        config.direction = options.direction;
        let nics = (0..options.nics.max(1)).map(|nic| {
            let provider = SimProvider::new(world.fabric().clone());
            let device = Device { kind: TransportKind::Sim, name: format!("node-{node}/{nic}"), unavailable: None };
            let queue = Options { transfers_max: options.world.fabric.depth.min(1024), ..Options::default() };
            Box::new(move || provider.open(&device, &queue)) as OpenNic
        });
        let nics = nics.collect();
        let identity = self.node_config(node, epoch);
        let (_, timeline, chronicle) = world.chronicle();
        let failed = move |error: String| chronicle.put(timeline.now(), life, What::NoStart(error));
        let start = assemble(around, identity, config, pool, nics, seat, failed);
        world.on(node, || tokio::task::spawn_local(start)).ok_or(SimError::NoSuchNode(node))?;
        Ok(())
    }

    fn node_config(&self, node: usize, epoch: Epoch) -> NodeConfig {
        let options = &self.options;
        let mut config = NodeConfig::new(node_id(node), epoch);
        config.identity.secret = Some(Arc::from(SECRET));
        if options.old_peers.contains(&node) {
            config.identity.protocols = Protocols { min: 1, max: 1 };
        }
        config.listen = address(node);
        (config.session, config.leases, config.deadlines) = (options.session, options.leases, options.deadlines);
        (config.quarantine, config.rails) = (options.quarantine, options.rails);
        config.sessions_eager_max = options.sessions_eager_max;
        config
    }
}

async fn assemble(
    around: Surroundings,
    node: NodeConfig,
    config: WorkerConfig,
    pool: Pool,
    nics: Vec<OpenNic>,
    seat: Seat,
    failed: impl FnOnce(String),
) {
    match assemble_worker(&around, node, config, pool, nics).await {
        Ok(parts) => *seat.borrow_mut() = Some(parts),
        Err(error) => failed(error.to_string()),
    }
}

/// What the protocol calls a node.
pub(crate) fn node_id(node: usize) -> NodeId {
    NodeId(node as u64 + 1)
}

/// Which node the protocol calls so.
pub(crate) fn node_of(id: NodeId) -> usize {
    usize::try_from(id.0.saturating_sub(1)).unwrap_or(usize::MAX)
}

/// Where a node listens.
pub(crate) fn address(node: usize) -> String {
    format!("node-{node}")
}

/// Restarts nodes that end by themselves, as whatever supervises processes does, after a while.
pub(crate) fn restart_the_ended(world: &mut World, yard: &Rc<Yard>, back: WithNode) {
    const AFTER_NS: u64 = 1_000_000_000;
    let yard = Rc::clone(yard);
    world.on_end(Rc::new(move |world, node| {
        yard.note_down(node);
        let back = Rc::clone(&back);
        let at = world.now().saturating_add(AFTER_NS);
        world.at(at, move |world| back(world, node));
    }));
}
