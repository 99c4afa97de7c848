//! A serving process embeds a prefill and a decode worker and awaits one handover: `cargo run --release --example embed`.

use std::sync::Arc;

use kvferry::{
    BlockTable, EngineCall, Epoch, Format, GroupGeometry, GroupId, LeastLoaded, Model, NodeConfig, NodeId, Outcome,
    Parallel, Pool, PoolId, Rank, RequestId, RequestSpec, Role, SchedulerNode, SchedulerTerms, ThreadOptions,
    TransportKind, WorkerConfig, WorkerNode, transport,
};

type Error = Box<dyn std::error::Error>;

/// One rank, with a pool of 8 blocks and shared memory for its NIC.
async fn rank(node: u64, role: Role, scheduler: &str) -> Result<(WorkerNode, Pool), Error> {
    let model = Model::preset("tiny").ok_or("no such model")?;
    let geometry = Arc::new(GroupGeometry { model, format: Format::default(), parallel: Parallel::default() });
    let (group, blocks) = (GroupId(node as u32), vec![8]);
    let pool = Pool::allocate(PoolId(0), geometry.shard(Rank(0))?.layout(&blocks), "kv")?;
    let config = WorkerConfig::new(role, group, Rank(0), geometry, blocks, (NodeId(0), scheduler.to_owned()));
    let nics = vec![transport::select(TransportKind::Shm, None, &transport::Options::default())?];
    let node = NodeConfig::new(NodeId(node), Epoch(1));
    Ok((WorkerNode::start(node, config, pool.clone(), nics, ThreadOptions::default()).await?, pool))
}

/// The serving engine's side of a prefill rank: choose blocks, compute, say what is ready.
async fn prefill(mut worker: WorkerNode, pool: Pool) -> Result<(), Error> {
    let port = worker.port();
    while let Some(call) = worker.next_call().await {
        match call {
            EngineCall::Prefill(job) => {
                let blocks = vec![5, 2, 7];
                for plane in 0..pool.layout().planes.len() as u32 {
                    blocks.iter().try_for_each(|block| pool.fill(plane, *block, 42))?;
                }
                port.opened(job.spec.request, BlockTable::known(0, blocks).into(), vec![4]);
                port.ready(job.spec.request, 1);
            }
            EngineCall::Release { request, .. } => port.released(request),
            _ => {}
        }
    }
    Ok(())
}

/// The serving engine's side of a decode rank: find blocks; once it is settled they hold the KV.
async fn decode(mut worker: WorkerNode, pool: Pool) -> Result<u8, Error> {
    let port = worker.port();
    while let Some(call) = worker.next_call().await {
        match call {
            EngineCall::Place { handover, .. } => port.placed(handover, BlockTable::known(0, vec![1, 0, 3]).into(), 0),
            EngineCall::Settled { handover, outcome: Outcome::Delivered, .. } => {
                let mut first = [0];
                pool.read(0, 1, 0, &mut first)?;
                port.freed(handover);
                return Ok(first[0]);
            }
            _ => {}
        }
    }
    Err("the node has stopped".into())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let scheduler =
        SchedulerNode::start(NodeConfig::new(NodeId(0), Epoch(1)), SchedulerTerms::default(), Box::new(LeastLoaded))
            .await?;
    let (prefiller, source) = rank(1, Role::Prefill, scheduler.address()).await?;
    let (decoder, destination) = rank(2, Role::Decode, scheduler.address()).await?;
    let request = RequestSpec { request: RequestId(7), tokens: 40, prefix: Arc::default(), prefix_tokens: 512 };
    let handover = scheduler.submit(request).await;
    tokio::select! {
        ended = prefill(prefiller, source) => ended?,
        (finished, byte) = async { tokio::join!(handover, decode(decoder, destination)) } => {
            println!("the first byte of block 1 is {}: {:?}", byte?, finished?);
        }
    }
    scheduler.shutdown().await;
    Ok(())
}
