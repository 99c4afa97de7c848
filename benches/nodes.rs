//! A scheduler, a prefill and a decode node in one process, with engines that do nothing but answer: what is left is kvferry.

use std::sync::Arc;

use kvferry::{
    BlockTable, Direction, EngineCall, Epoch, Finished, Format, GroupGeometry, GroupId, LeastLoaded, Model, NodeConfig,
    NodeId, Parallel, PoolId, Rank, RequestId, RequestSpec, Role, SchedulerNode, SchedulerTerms, TableShape, Tables,
    ThreadOptions, TransportKind, WorkerConfig, WorkerNode, transport,
};

/// Anything that went wrong.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// Three nodes whose engines answer at once.
pub struct Nodes {
    scheduler: SchedulerNode,
    engines: Vec<tokio::task::JoinHandle<()>>,
    next: u64,
}

impl Nodes {
    /// Starts them; `geometry` is a `--geometry` text. The prefill and the decode node open these devices, by default the best.
    pub async fn start(
        geometry: &str,
        kind: TransportKind,
        direction: Direction,
        devices: [Option<&str>; 2],
    ) -> Result<Nodes, Error> {
        Nodes::start_watched(geometry, kind, direction, devices, |_| {}).await
    }

    /// The same, each node after `watch` has seen how it is to be.
    pub async fn start_watched(
        geometry: &str,
        kind: TransportKind,
        direction: Direction,
        devices: [Option<&str>; 2],
        mut watch: impl FnMut(&mut NodeConfig),
    ) -> Result<Nodes, Error> {
        let mut node_config = |node| {
            let mut config = NodeConfig::new(NodeId(node), Epoch(1));
            watch(&mut config);
            config
        };
        let model = Model::from_spec(geometry)?.model;
        let geometry = Arc::new(GroupGeometry { model, format: Format::default(), parallel: Parallel::default() });
        let scheduler = SchedulerNode::start(node_config(0), SchedulerTerms::default(), Box::new(LeastLoaded)).await?;
        let mut engines = Vec::new();
        for ((node, role), device) in [(1, Role::Prefill), (2, Role::Decode)].into_iter().zip(devices) {
            let blocks = vec![BLOCKS];
            let layout = geometry.shard(Rank(0))?.layout(&blocks);
            let pool = transport::allocate(kind, device, PoolId(0), layout, "bench")?;
            let here = (NodeId(0), scheduler.address().to_owned());
            let mut config =
                WorkerConfig::new(role, GroupId(node as u32), Rank(0), Arc::clone(&geometry), blocks, here);
            config.direction = Some(direction);
            config.handovers_max = 64;
            let nics = vec![transport::select(kind, device, &transport::Options::default())?];
            let node = node_config(node);
            // Whoever lets a node's thread poll on does so with its NICs', too.
            let threads = ThreadOptions { spin: node.linger.max(ThreadOptions::default().spin) };
            let worker = WorkerNode::start(node, config, pool, nics, threads).await?;
            engines.push(tokio::spawn(answer(worker, Arc::clone(&geometry))));
        }
        Ok(Nodes { scheduler, engines, next: 0 })
    }

    /// Moves one request of `tokens` tokens.
    pub async fn handover(&mut self, tokens: u64) -> Result<Finished, Error> {
        self.next += 1;
        let spec = RequestSpec { request: RequestId(self.next), tokens, prefix: Arc::default(), prefix_tokens: 512 };
        Ok(self.scheduler.submit(spec).await.await?)
    }

    /// Moves `count` requests of `tokens` tokens at once.
    pub async fn handovers(&mut self, count: u64, tokens: u64) -> Result<(), Error> {
        let mut running = Vec::new();
        for _ in 0..count {
            self.next += 1;
            let spec =
                RequestSpec { request: RequestId(self.next), tokens, prefix: Arc::default(), prefix_tokens: 512 };
            running.push(self.scheduler.submit(spec).await);
        }
        for handover in running {
            let finished = handover.await?;
            if !finished.outcome.is_delivered() {
                return Err(format!("{:?}", finished.outcome).into());
            }
        }
        Ok(())
    }

    /// Stops them.
    pub async fn shutdown(self) {
        self.scheduler.shutdown().await;
        for engine in self.engines {
            engine.abort();
        }
    }
}

const BLOCKS: u32 = 4096;

/// An engine whose every request lies in the same blocks: nothing is computed and nothing is checked here.
async fn answer(mut worker: WorkerNode, geometry: Arc<GroupGeometry>) {
    let port = worker.port();
    let tables = |tokens: u64| {
        let TableShape { first_token, blocks, .. } = geometry.blocks_for(0, tokens, Rank(0));
        Tables { groups: vec![BlockTable::known(first_token, (0..blocks).collect::<Vec<u32>>())] }
    };
    while let Some(call) = worker.next_call().await {
        match call {
            EngineCall::Prefill(job) => {
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
