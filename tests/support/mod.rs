//! Nodes in this process with engines that answer at once, for tests of everything around the bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use kvferry::{
    BlockTable, EngineCall, Epoch, Finished, Format, GroupGeometry, GroupId, HandoverError, LeastLoaded, Model,
    NodeConfig, NodeId, Parallel, Pool, PoolId, Rank, RequestId, RequestSpec, Role, SchedulerNode, SchedulerTerms,
    Tables, ThreadOptions, TransportKind, WorkerConfig, WorkerNode, transport,
};
use tokio::task::JoinHandle;

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) type Secret = Option<Arc<[u8]>>;

pub(crate) fn node_config(node: u64, secret: &Secret) -> NodeConfig {
    let mut config = NodeConfig::new(NodeId(node), Epoch(1));
    config.identity.secret = secret.clone();
    config
}

pub(crate) async fn scheduler(secret: &Secret) -> SchedulerNode {
    SchedulerNode::start(node_config(0, secret), SchedulerTerms::default(), Box::new(LeastLoaded)).await.unwrap()
}

/// A rank that is a whole group. Dropping it stops the rank.
pub(crate) struct Rig {
    #[allow(dead_code, reason = "not every test that uses this module dials")]
    pub(crate) address: String,
    /// How often its engine was asked to prefill.
    #[allow(dead_code, reason = "not every test that uses this module counts")]
    pub(crate) prefills: Arc<AtomicU32>,
    engine: JoinHandle<()>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.engine.abort();
    }
}

/// Starts a one-rank group over shared memory whose model is `--geometry` text `spec`.
pub(crate) async fn rank(node: u64, role: Role, spec: &str, scheduler: &str, secret: &Secret) -> Rig {
    let model = Model::from_spec(spec).unwrap().model;
    let geometry = Arc::new(GroupGeometry { model, format: Format::default(), parallel: Parallel::default() });
    let blocks = vec![16];
    let pool = Pool::allocate(PoolId(0), geometry.shard(Rank(0)).unwrap().layout(&blocks), "test").unwrap();
    let config = WorkerConfig::new(
        role,
        GroupId(node as u32),
        Rank(0),
        Arc::clone(&geometry),
        blocks,
        (NodeId(0), scheduler.to_owned()),
    );
    let nics = vec![transport::select(TransportKind::Shm, None, &transport::Options::default()).unwrap()];
    let worker =
        WorkerNode::start(node_config(node, secret), config, pool, nics, ThreadOptions::default()).await.unwrap();
    let address = worker.address().to_owned();
    let prefills = Arc::new(AtomicU32::new(0));
    let engine = tokio::spawn(answer(worker, geometry, Arc::clone(&prefills)));
    Rig { address, prefills, engine }
}

async fn answer(mut worker: WorkerNode, geometry: Arc<GroupGeometry>, prefills: Arc<AtomicU32>) {
    let port = worker.port();
    let tables = |tokens: u64| {
        let shape = geometry.blocks_for(0, tokens, Rank(0));
        Tables { groups: vec![BlockTable::known(shape.first_token, (0..shape.blocks).collect::<Vec<u32>>())] }
    };
    while let Some(call) = worker.next_call().await {
        match call {
            EngineCall::Prefill(job) => {
                prefills.fetch_add(1, Ordering::Relaxed);
                port.opened(job.spec.request, tables(job.spec.tokens), vec![geometry.model.layers]);
                port.ready(job.spec.request, 1);
            }
            EngineCall::Release { request, .. } => port.released(request),
            EngineCall::Place { handover, spec } => port.placed(handover, tables(spec.tokens), 0),
            EngineCall::Settled { handover, outcome, .. } if outcome.is_delivered() => port.freed(handover),
            _ => {}
        }
    }
}

/// Submits a request of 40 tokens and waits for its end.
pub(crate) async fn submit(scheduler: &SchedulerNode, request: u64) -> Result<Finished, HandoverError> {
    let spec = RequestSpec { request: RequestId(request), tokens: 40, prefix: Arc::default(), prefix_tokens: 512 };
    let handover = scheduler.submit(spec).await;
    tokio::time::timeout(PATIENCE, handover).await.expect("the request did not end")
}
