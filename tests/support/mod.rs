//! Nodes in this process with engines that answer at once, for tests of everything around the bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use kvferry::{
    BlockTable, Direction, EngineCall, EnginePort, Epoch, Event, Finished, Format, GroupGeometry, GroupId,
    HandoverError, LeastLoaded, Model, NodeConfig, NodeId, OpenNic, Parallel, Pool, PoolId, Rank, RequestId,
    RequestSpec, Role, SchedulerNode, SchedulerTerms, Tables, ThreadOptions, TransportKind, WorkerConfig, WorkerNode,
    transport,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Of every pool.
const BLOCKS: u32 = 16;

pub(crate) type Secret = Option<Arc<[u8]>>;

pub(crate) fn node_config(node: u64, secret: &Secret) -> NodeConfig {
    let mut config = NodeConfig::new(NodeId(node), Epoch(1));
    config.identity.secret = secret.clone();
    config
}

pub(crate) async fn scheduler(secret: &Secret) -> SchedulerNode {
    SchedulerNode::start(node_config(0, secret), SchedulerTerms::default(), Box::new(LeastLoaded)).await.unwrap()
}

/// What a test plants in a rank.
#[derive(Default)]
pub(crate) struct Watch {
    /// Its engine panics at the next call.
    pub(crate) panics: AtomicBool,
    /// NICs of its that may be touching the pool at the moment.
    pub(crate) copying: AtomicU32,
}

/// A rank that is a whole group. Dropping it stops the rank.
#[allow(dead_code, reason = "not every test that uses this module uses all of it")]
pub(crate) struct Rig {
    pub(crate) address: String,
    /// How often its engine was asked to prefill.
    pub(crate) prefills: Arc<AtomicU32>,
    /// How often it was told that a prefill is released.
    pub(crate) releases: Arc<AtomicU32>,
    /// Where its engine speaks.
    pub(crate) port: EnginePort,
    /// What happens at its node.
    pub(crate) events: mpsc::UnboundedReceiver<Event>,
    /// Ends when the node's calls end.
    pub(crate) engine: JoinHandle<()>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.engine.abort();
    }
}

/// Starts a one-rank group over shared memory whose model is `--geometry` text `spec`.
pub(crate) async fn rank(node: u64, role: Role, spec: &str, scheduler: &str, secret: &Secret) -> Rig {
    let geometry = geometry(spec);
    let pool = pool(&geometry);
    let nic = transport::select(TransportKind::Shm, None, &transport::Options::default()).unwrap();
    rank_over(node_config(node, secret), role, None, geometry, scheduler, (pool, vec![nic]), Arc::default()).await
}

pub(crate) fn geometry(spec: &str) -> Arc<GroupGeometry> {
    let model = Model::from_spec(spec).unwrap().model;
    Arc::new(GroupGeometry { model, format: Format::default(), parallel: Parallel::default() })
}

/// The memory of a one-rank group.
pub(crate) fn pool(geometry: &GroupGeometry) -> Pool {
    Pool::allocate(PoolId(0), geometry.shard(Rank(0)).unwrap().layout(&[BLOCKS]), "test").unwrap()
}

/// The same over a pool that is there already, with NICs of the caller's.
pub(crate) async fn rank_over(
    node: NodeConfig,
    role: Role,
    direction: Option<Direction>,
    geometry: Arc<GroupGeometry>,
    scheduler: &str,
    (pool, nics): (Pool, Vec<OpenNic>),
    watch: Arc<Watch>,
) -> Rig {
    let mut config = WorkerConfig::new(
        role,
        GroupId(node.identity.node.0 as u32),
        Rank(0),
        Arc::clone(&geometry),
        vec![BLOCKS],
        (NodeId(0), scheduler.to_owned()),
    );
    config.direction = direction;
    let worker = WorkerNode::start(node, config, pool, nics, ThreadOptions::default()).await.unwrap();
    let (address, events) = (worker.address().to_owned(), worker.events().unwrap());
    let port = worker.port();
    let (prefills, releases) = Default::default();
    let counts = (Arc::clone(&prefills), Arc::clone(&releases));
    let engine = tokio::spawn(answer(worker, geometry, counts, watch));
    Rig { address, port, prefills, releases, events, engine }
}

async fn answer(
    mut worker: WorkerNode,
    geometry: Arc<GroupGeometry>,
    (prefills, releases): (Arc<AtomicU32>, Arc<AtomicU32>),
    watch: Arc<Watch>,
) {
    let port = worker.port();
    let tables = |tokens: u64| {
        let shape = geometry.blocks_for(0, tokens, Rank(0));
        Tables { groups: vec![BlockTable::known(shape.first_token, (0..shape.blocks).collect::<Vec<u32>>())] }
    };
    while let Some(call) = worker.next_call().await {
        assert!(!watch.panics.load(Ordering::Relaxed), "planted, in the engine");
        match call {
            EngineCall::Prefill(job) => {
                prefills.fetch_add(1, Ordering::Relaxed);
                port.opened(job.spec.request, tables(job.spec.tokens), vec![geometry.model.layers]);
                port.ready(job.spec.request, 1);
            }
            EngineCall::Release { request, .. } => {
                releases.fetch_add(1, Ordering::Relaxed);
                port.released(request);
            }
            EngineCall::Place { handover, spec } => port.placed(handover, tables(spec.tokens), 0),
            EngineCall::Settled { handover, outcome, .. } if outcome.is_delivered() => port.freed(handover),
            _ => {}
        }
    }
    assert_eq!(watch.copying.load(Ordering::Relaxed), 0, "its calls ended while a NIC may still touch the pool");
}

/// Submits a request of 40 tokens and waits for its end.
pub(crate) async fn submit(scheduler: &SchedulerNode, request: u64) -> Result<Finished, HandoverError> {
    let spec = RequestSpec { request: RequestId(request), tokens: 40, prefix: Arc::default(), prefix_tokens: 512 };
    let handover = scheduler.submit(spec).await;
    tokio::time::timeout(PATIENCE, handover).await.expect("the request did not end")
}
