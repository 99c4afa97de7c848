//! Fetches KV blocks from a Python NIXL agent: `python examples/nixl_peer.py 5555`, then, with `KVFERRY_UCX_LIBRARY` naming the wheel's
//! `libucp*.so`, `cargo run --release --example nixl_peer -- 127.0.0.1:5555`.

use std::sync::Arc;
use std::time::Duration;

use kvferry::nixl::{Agent, AgentConfig, AgentMetadata, End, Exchange, Transfer, pieces};
use kvferry::{BlockTable, Format, GroupGeometry, Model, PairPlan, Parallel, PlanRequest, Pool, PoolId, Rank, Tables};

type Error = Box<dyn std::error::Error>;

const TOKENS: u64 = 40;
/// Of one block in one plane: 16 tokens of 4 heads of 32 bf16 numbers.
const BLOCK_BYTES: usize = 4096;
const WITHIN: Duration = Duration::from_secs(10);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let address = std::env::args().nth(1).ok_or("usage: nixl_peer ADDRESS, where examples/nixl_peer.py listens")?;

    // Both sides hold the same model: the other in 32 blocks, this one in 8.
    let model = Model::preset("tiny").ok_or("no such model")?;
    let layers = 0..model.layers;
    let geometry = GroupGeometry { model, format: Format::default(), parallel: Parallel::default() };
    let shard = geometry.shard(Rank(0))?;
    let (there, here) = (shard.layout(&[32]), shard.layout(&[8]));
    let pool = Pool::allocate(PoolId(0), here.clone(), "kv")?;

    let (agent, mut notifications) = Agent::start(AgentConfig::new("decode-0")).await?;
    agent.register(pool.clone()).await?;
    println!("agent {} over {}", agent.name(), agent.library());

    // NIXL's socket exchange; any other way to carry these bytes does as well.
    let mut exchange = Exchange::connect(address.parse()?, WITHIN).await?;
    let metadata = exchange.fetch().await?;
    let peer = agent.add_peer(metadata.clone()).await?;
    exchange.send(agent.metadata().await?).await?;

    // It is asked for a request, and answers with the blocks that hold it.
    agent.notify(&peer.name, "where is request 7?".into(), None).await?;
    let answer = tokio::time::timeout(WITHIN, notifications.next()).await?.ok_or("the agent has ended")?;
    let theirs: Vec<u32> = serde_json::from_slice(&answer.message)?;
    let ours = vec![5, 1, 3];

    // Which bytes go where follows from both geometries and tables; neighbours are moved as one.
    let plan = PairPlan::new(&geometry, Rank(0), &geometry, Rank(0))?;
    let table = |blocks: &[u32]| Tables { groups: vec![BlockTable::known(0, Arc::from(blocks))] };
    let (source, destination) = (table(&theirs), table(&ours));
    let request = PlanRequest { tokens: TOKENS, have: 0, layers, source: &source, destination: &destination };
    let program = plan.program(&request)?;
    let memory = AgentMetadata::decode(metadata)?;
    let base = memory.sections.iter().flat_map(|section| &section.ranges).next().ok_or("it has no memory")?.address;
    let pieces = pieces(&program, End::Destination, (&there, &here), &[base])?;

    let read = Transfer::read(&peer.name, PoolId(0), pieces).then_notify("done");
    let moved = agent.transfer(read).await?;
    println!(
        "{} bytes in {} reads from {} in {:?}: {}",
        moved.bytes, moved.operations, peer.name, moved.took, peer.kind
    );

    let valid = TOKENS as usize * BLOCK_BYTES / 16;
    for plane in 0..here.planes.len() {
        let mut bytes = vec![0; BLOCK_BYTES];
        for (index, (from, to)) in theirs.iter().zip(&ours).enumerate() {
            pool.read(plane as u32, *to, 0, &mut bytes)?;
            let due = |at: usize| ((plane * 31 + *from as usize * 7 + at) % 251) as u8;
            let wrong = (0..BLOCK_BYTES.min(valid - index * BLOCK_BYTES)).find(|at| bytes[*at] != due(*at));
            if let Some(at) = wrong {
                return Err(format!("plane {plane}, block {to}, byte {at} is not what the agent has").into());
            }
        }
    }
    println!("every byte is right");
    agent.shutdown().await;
    Ok(())
}
