//! Between two agents of ours: leases, registrations that are withdrawn, incarnations, programs. And what NIXL's agents make of it: nothing.
//!
//! As for the other tests with agents, `KVFERRY_NIXL_PYTHON` names a Python with a NIXL wheel.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "this is test code")]

#[allow(dead_code, reason = "each of the tests takes what it needs")]
mod support;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvferry_core::{Plane, PoolId, PoolLayout, Program, Segment, Side, TransferId};
use kvferry_nixl::{
    Agent, AgentConfig, AgentError, Expect, Fetch, Kvferry, Notifications, OpenNic, PeerKind, Piece, Push, Ticket,
    Transfer,
};
use kvferry_transport::{Options, Pool, Provider};
use kvferry_ucx::UcxProvider;
use serde_json::json;
use support::{Peer, address, config, contents, hex, ours, pattern, pool, run, turn, with};

const SIZE: u64 = 1 << 16;
const SOON: Duration = Duration::from_secs(10);

fn pieces(remote: u64, count: u64, bytes: u64) -> Vec<Piece> {
    let piece =
        |index| Piece { region: 0, offset: (count - 1 - index) * bytes, address: remote + index * bytes, bytes };
    (0..count).map(piece).collect()
}

fn told(kind: PeerKind) -> Kvferry {
    let PeerKind::Kvferry(told) = kind else { panic!("it is a NIXL agent") };
    *told
}

async fn hears(notifications: &mut Notifications) -> Bytes {
    tokio::time::timeout(SOON, notifications.next()).await.unwrap().unwrap().message
}

#[test]
fn peers_of_ours_tell_more_and_nixl_does_not_mind() {
    let Some(_turn) = turn() else { return };
    let mut peer = Peer::start("nixl", 4096, "tcp");
    run(async {
        let extension = Bytes::from_static(b"control=10.0.0.1:7000");
        let (agent, _notifications) = Agent::start_with(config().extension(extension.clone()), nic()).await.unwrap();
        let first = pool(1, 4096, 0x42);
        agent.register(first.clone()).await.unwrap();
        let metadata = agent.metadata().await.unwrap();
        assert_eq!(peer.ask(&json!({"do": "add", "metadata": hex(&metadata)})), agent.name());
        // What we say changes; what NIXL reads of it does not.
        agent.register(pool(2, 4096, 0)).await.unwrap();
        let later = agent.metadata().await.unwrap();
        assert_eq!(peer.ask(&json!({"do": "add", "metadata": hex(&later)})), agent.name());
        let order = json!({"do": "transfer", "op": "READ", "peer": agent.name(), "pieces": [(0, address(&first), 4096)], "notify": ""});
        assert_eq!(peer.ask(&order), "DONE");
        let read = peer.ask(&json!({"do": "digest", "at": 0, "bytes": 4096}));
        peer.ask(&json!({"do": "fill", "byte": 0x42}));
        assert_eq!(read, peer.ask(&json!({"do": "digest", "at": 0, "bytes": 4096})));

        let (other, _notifications, _local) = ours(4096, 0).await;
        let added = other.add_peer(later).await.unwrap();
        assert_eq!((added.ranges, added.kind.lacks().len()), (2, 3));
        let kvferry = told(added.kind);
        assert_eq!(kvferry.extension, extension);
        let known: Vec<_> = kvferry.pools.iter().map(|pool| (pool.id, pool.layout.clone())).collect();
        assert_eq!(known[0], (PoolId(1), first.layout().clone()));
        assert_eq!((known.len(), kvferry.pools[0].bases[0]), (2, address(&first)));
        assert!(kvferry.programs.unwrap_err().contains("this agent has no device"));
        // What came late is known to be older.
        let known = told(other.add_peer(metadata).await.unwrap().kind);
        assert_eq!(known.pools.len(), 2);
        // Also without anything to tell.
        let added = agent.add_peer(other.metadata().await.unwrap()).await.unwrap();
        assert!(told(added.kind).programs.unwrap_err().contains("the peer has no device"));
        let added = agent.add_peer(peer.metadata.clone()).await.unwrap();
        assert_eq!((added.kind.lacks().len(), added.kind), (4, PeerKind::Nixl));
    });
}

#[test]
fn what_is_read_under_a_lease_is_confirmed_until_its_owner_ends_it() {
    let Some(_turn) = turn() else { return };
    run(async {
        let (owner, mut heard, lent) = ours(SIZE, 0x33).await;
        let (reader, _notifications, local) = ours(SIZE, 0).await;
        let name = reader.add_peer(owner.metadata().await.unwrap()).await.unwrap().name;
        let read = || Transfer::read(&name, PoolId(1), pieces(address(&lent), 64, 1024));

        let lease = owner.lend().await.unwrap();
        let ticket = Ticket::from_bytes(&lease.ticket().to_bytes()).unwrap();
        let moved = reader.transfer(read().under(ticket).then_notify("first")).await.unwrap();
        assert!(moved.confirmed && moved.bytes == SIZE);
        assert!(contents(&local).iter().all(|byte| *byte == 0x33));
        assert_eq!(hears(&mut heard).await, "first");
        lease.end().await.unwrap();
        let ended = reader.transfer(read().under(ticket).then_notify("never")).await.unwrap_err();
        assert_eq!(ended, AgentError::LeaseEnded { name: name.clone() });
        // Its slot is another lease's now, and that one's end is a drop.
        let second = owner.lend().await.unwrap();
        assert!(reader.transfer(read().under(ticket)).await.is_err(), "another lease is not the first");
        let moved = reader.transfer(read().under(second.ticket()).then_notify("second")).await.unwrap();
        assert!(moved.confirmed);
        let ticket = second.ticket();
        drop(second);
        // In its thread's order.
        owner.metadata().await.unwrap();
        let ended = reader.transfer(read().under(ticket)).await.unwrap_err();
        assert!(matches!(ended, AgentError::LeaseEnded { .. }), "{ended}");
        assert_eq!(hears(&mut heard).await, "second", "what was not confirmed is not told");

        // Without a lease it is confirmed that the memory was registered.
        assert!(reader.transfer(read()).await.unwrap().confirmed);
        let nothing = reader.transfer(Transfer::read(&name, PoolId(1), vec![]).under(ticket)).await.unwrap_err();
        assert!(matches!(nothing, AgentError::LeaseEnded { .. }), "{nothing}");
        let written =
            reader.transfer(Transfer { lease: Some(ticket), ..Transfer::write(&name, PoolId(1), vec![]) }).await;
        assert!(written.unwrap_err().to_string().contains("what is read"));
    });
}

#[test]
fn nobody_confirms_what_a_nixl_agent_lends() {
    let Some(_turn) = turn() else { return };
    let peer = Peer::start("nixl", SIZE as usize, "tcp");
    run(async {
        let (agent, _notifications, local) = ours(SIZE, 0).await;
        agent.add_peer(peer.metadata.clone()).await.unwrap();
        let read = || Transfer::read("nixl", PoolId(1), pieces(peer.address, 1, SIZE));
        let ticket = agent.lend().await.unwrap().ticket();
        let refused = agent.transfer(read().under(ticket)).await.unwrap_err();
        assert!(matches!(&refused, AgentError::Peer { reason, .. } if reason.contains("no lease")), "{refused}");
        assert!(contents(&local).iter().all(|byte| *byte == 0), "nothing was read");
        assert!(!agent.transfer(read()).await.unwrap().confirmed);
        assert!(contents(&local).iter().zip(0..).all(|(byte, at)| *byte == pattern(at)));
    });
}

#[test]
fn what_its_owner_has_deregistered_is_found_out() {
    let Some(_turn) = turn() else { return };
    run(async {
        let (owner, _heard, kept) = ours(SIZE, 0x33).await;
        let (reader, _notifications, _local) = ours(SIZE, 0).await;
        let second = pool(2, SIZE, 0x44);
        owner.register(second.clone()).await.unwrap();
        let name = reader.add_peer(owner.metadata().await.unwrap()).await.unwrap().name;
        let read = |from: &Pool| Transfer::read(&name, PoolId(1), pieces(address(from), 16, 256));
        assert!(reader.transfer(read(&second)).await.unwrap().confirmed);
        // Its memory stays where it is, or nobody could say what a read finds.
        owner.deregister(PoolId(2)).await.unwrap();
        let gone = reader.transfer(read(&second)).await.unwrap_err();
        assert!(matches!(gone, AgentError::Withdrawn { .. } | AgentError::Failed { .. }), "{gone}");
        assert!(reader.transfer(read(&kept)).await.unwrap().confirmed, "the other one stands");

        // Its newer metadata replaces what was known.
        let added = reader.add_peer(owner.metadata().await.unwrap()).await.unwrap();
        assert_eq!(added.ranges, 1);
        let unknown = reader.transfer(read(&second)).await.unwrap_err();
        assert!(matches!(unknown, AgentError::Piece { .. }), "{unknown}");
        owner.register(second.clone()).await.unwrap();
        reader.add_peer(owner.partial_metadata(vec![PoolId(2)], true).await.unwrap()).await.unwrap();
        assert!(reader.transfer(read(&second)).await.unwrap().confirmed);
        assert!(reader.transfer(read(&kept)).await.unwrap().confirmed);
    });
}

#[test]
fn an_agent_that_starts_again_replaces_itself() {
    let Some(_turn) = turn() else { return };
    run(async {
        let named = || AgentConfig::exactly("decode-0").transports("tcp");
        let (reader, _notifications, _local) = ours(SIZE, 0).await;
        let (first, _heard, _memory) = with(named(), SIZE, 1).await;
        let earlier = first.metadata().await.unwrap();
        let incarnation = told(reader.add_peer(earlier.clone()).await.unwrap().kind).incarnation;
        reader.connect("decode-0", None).await.unwrap();
        first.shutdown().await;
        let (second, _heard, memory) = with(named(), SIZE, 2).await;
        let added = reader.add_peer(second.metadata().await.unwrap()).await.unwrap();
        assert!(told(added.kind).incarnation > incarnation);
        let read = Transfer::read("decode-0", PoolId(1), pieces(address(&memory), 16, 256));
        assert!(reader.transfer(read.clone()).await.unwrap().confirmed);
        let refused = reader.add_peer(earlier).await.unwrap_err();
        assert!(refused.to_string().contains("earlier incarnation"), "{refused}");
        assert!(reader.transfer(read).await.is_ok());
    });
}

#[test]
fn what_all_peers_together_make_an_agent_keep_has_a_limit() {
    let Some(_turn) = turn() else { return };
    run(async {
        let (agent, _notifications) = Agent::start(config().peers_bytes_max(4096)).await.unwrap();
        let (mut taken, mut refused) = (Vec::new(), None);
        for number in 0..16 {
            let (peer, _notifications, _memory) =
                with(AgentConfig::exactly(&format!("p{number}")).transports("tcp"), 64, 0).await;
            match agent.add_peer(peer.metadata().await.unwrap()).await {
                Ok(added) => taken.push(added.name),
                Err(error) => {
                    refused = Some((peer.metadata().await.unwrap(), error));
                    break;
                }
            }
        }
        let (metadata, error) = refused.unwrap();
        assert!(!taken.is_empty() && error.to_string().contains("peers_bytes_max"), "{error}");
        agent.remove_peer(&taken[0]).await.unwrap();
        agent.add_peer(metadata).await.unwrap();
    });
}

/// kvferry's own device beside an agent.
fn nic() -> OpenNic {
    Box::new(|| {
        let provider = UcxProvider::new().only("lo");
        let device = provider.named("lo").unwrap();
        provider.open(&device, &Options::default())
    })
}

const PLANES: u32 = 4;
const BLOCKS: u32 = 16;
const TOKENS: u64 = 20;
const TOKEN_BYTES: u64 = 48;
const BLOCK_BYTES: u64 = 4 * TOKEN_BYTES;

fn kv(id: u32, fill: impl Fn(u32, u32, u64) -> u8) -> Pool {
    let plane = |number: u64| Plane {
        region: 0,
        offset: number * u64::from(BLOCKS) * BLOCK_BYTES,
        blocks: BLOCKS,
        block_stride: BLOCK_BYTES,
        block_bytes: BLOCK_BYTES,
    };
    let bytes = u64::from(PLANES) * u64::from(BLOCKS) * BLOCK_BYTES;
    let layout = PoolLayout { regions: vec![bytes], planes: (0..u64::from(PLANES)).map(plane).collect() };
    let pool = Pool::allocate(PoolId(id), layout, "nixl-test").unwrap();
    for plane in 0..PLANES {
        for block in 0..BLOCKS {
            let bytes: Vec<u8> = (0..BLOCK_BYTES).map(|at| fill(plane, block, at)).collect();
            pool.write(plane, block, 0, &bytes).unwrap();
        }
    }
    pool
}

fn due(plane: u32, block: u32, at: u64) -> u8 {
    ((u64::from(plane) * 37 + u64::from(block) * 11 + at) % 251) as u8
}

const THERE: [u32; 5] = [3, 9, 0, 14, 7];
const HERE: [u32; 5] = [8, 1, 15, 2, 4];

/// Twenty tokens of every plane, in blocks of four: the last block is whole.
fn program() -> Program {
    let side = Side {
        plane: 0,
        plane_step: 1,
        table: 0,
        first_block: 0,
        block_tokens: 4,
        cp: 1,
        cp_rank: 0,
        token_pitch: TOKEN_BYTES,
        head_pitch: TOKEN_BYTES,
        offset: 0,
    };
    let segment = Segment {
        source: side,
        destination: side,
        planes: PLANES,
        start: 0,
        end: TOKENS,
        heads: 1,
        run_bytes: TOKEN_BYTES as u32,
    };
    let table = |blocks: [u32; 5]| vec![Some(Arc::from(blocks))];
    Program { segments: vec![segment], sources: table(THERE), destinations: table(HERE) }
}

/// Whether the destination's blocks hold the source's, and the others what they held.
fn has_moved(pool: &Pool, untouched: u8) -> bool {
    (0..PLANES).all(|plane| {
        (0..BLOCKS).all(|block| {
            let mut bytes = vec![0; BLOCK_BYTES as usize];
            pool.read(plane, block, 0, &mut bytes).unwrap();
            let from = HERE.iter().position(|here| *here == block).map(|index| THERE[index]);
            let expected = |at: usize| from.map_or(untouched, |from| due(plane, from, at as u64));
            bytes.iter().enumerate().all(|(at, byte)| *byte == expected(at))
        })
    })
}

async fn ferrying(pool: &Pool) -> (Agent, Notifications) {
    let (agent, notifications) = Agent::start_with(config(), nic()).await.unwrap();
    agent.register(pool.clone()).await.unwrap();
    (agent, notifications)
}

#[test]
fn programs_are_fetched_and_confirmed() {
    let Some(_turn) = turn() else { return };
    run(async {
        let (there, here) = (kv(5, due), kv(6, |_, _, _| 0xEE));
        let (owner, mut heard) = ferrying(&there).await;
        let (reader, _notifications) = ferrying(&here).await;
        let added = reader.add_peer(owner.metadata().await.unwrap()).await.unwrap();
        assert_eq!(added.kind.lacks().len(), 1);
        assert!(told(added.kind).programs.unwrap().contains("lo"));
        let fetch = || Fetch::new(&added.name, PoolId(5), PoolId(6), Arc::new(program()));
        let lease = owner.lend().await.unwrap();
        let moved = reader.fetch(fetch().under(lease.ticket()).then_notify("fetched")).await.unwrap();
        assert_eq!((moved.bytes, moved.confirmed), (u64::from(PLANES) * TOKENS * TOKEN_BYTES, true));
        assert!(has_moved(&here, 0xEE));
        assert_eq!(hears(&mut heard).await, "fetched");
        // Without a lease it is confirmed that the pool was registered.
        assert!(reader.fetch(fetch()).await.unwrap().confirmed);
        let ticket = lease.ticket();
        lease.end().await.unwrap();
        let ended = reader.fetch(fetch().under(ticket)).await.unwrap_err();
        assert!(matches!(ended, AgentError::LeaseEnded { .. }), "{ended}");

        let outside = Program { sources: vec![Some(Arc::from([99, 0, 1, 2, 3]))], ..program() };
        let refused = reader.fetch(Fetch::new(&added.name, PoolId(5), PoolId(6), Arc::new(outside))).await.unwrap_err();
        assert!(matches!(refused, AgentError::Program(_)), "{refused}");
        let untold =
            reader.fetch(Fetch::new(&added.name, PoolId(7), PoolId(6), Arc::new(program()))).await.unwrap_err();
        assert!(untold.to_string().contains("has not told"), "{untold}");

        // A pool that is withdrawn is read no more, whatever readers know.
        owner.deregister(PoolId(5)).await.unwrap();
        let gone = reader.fetch(fetch().within(SOON)).await.unwrap_err();
        assert!(matches!(gone, AgentError::Failed { .. } | AgentError::Withdrawn { .. }), "{gone}");
        owner.register(there.clone()).await.unwrap();
        reader.add_peer(owner.metadata().await.unwrap()).await.unwrap();
        assert!(reader.fetch(fetch()).await.unwrap().confirmed);
        reader.remove_peer(&added.name).await.unwrap();
        assert!(reader.fetch(fetch()).await.unwrap_err().to_string().contains("no such peer"));
        owner.shutdown().await;
    });
}

#[test]
fn programs_are_pushed_to_whom_expects_them() {
    let Some(_turn) = turn() else { return };
    run(async {
        let (source, destination) = (kv(5, due), kv(6, |_, _, _| 0xEE));
        let (sender, _notifications) = ferrying(&source).await;
        let (receiver, mut heard) = ferrying(&destination).await;
        let name = sender.add_peer(receiver.metadata().await.unwrap()).await.unwrap().name;
        let push = |id| {
            let sources = Program { destinations: vec![None], ..program() };
            Push::new(&name, TransferId(id), PoolId(5), PoolId(6), Arc::new(sources))
        };
        let expect =
            |id| Expect::new(TransferId(id), PoolId(6), Arc::new(Program { sources: vec![None], ..program() }));
        let (sent, came) = tokio::join!(sender.push(push(1).then_notify("pushed")), receiver.expect(expect(1)));
        let bytes = u64::from(PLANES) * TOKENS * TOKEN_BYTES;
        assert_eq!((sent.unwrap().bytes, came.unwrap().bytes), (bytes, bytes));
        assert!(has_moved(&destination, 0xEE));
        assert_eq!(hears(&mut heard).await, "pushed");

        let unsent = receiver.expect(expect(2).within(Duration::from_millis(50))).await.unwrap_err();
        assert!(matches!(unsent, AgentError::Unsent { id: TransferId(2), waited_ms: 50.. }), "{unsent}");
        // It is let in no more, and the sender has a deadline.
        let late = sender.push(push(2).within(Duration::from_millis(300))).await.unwrap_err();
        assert!(matches!(late, AgentError::Deadline { .. } | AgentError::Failed { .. }), "{late}");
        let (_, came) = tokio::join!(sender.push(push(3)), receiver.expect(expect(3)));
        assert!(came.is_ok(), "both go on: {came:?}");
    });
}

#[test]
fn programs_need_a_device_at_both_ends() {
    let Some(_turn) = turn() else { return };
    let peer = Peer::start("nixl", 4096, "tcp");
    run(async {
        let there = kv(5, due);
        let (owner, _heard) = ferrying(&there).await;
        let (plain, _notifications, _local) = ours(4096, 0).await;
        owner.add_peer(peer.metadata.clone()).await.unwrap();
        let plain_name = owner.add_peer(plain.metadata().await.unwrap()).await.unwrap().name;
        let owner_name = plain.add_peer(owner.metadata().await.unwrap()).await.unwrap().name;
        let fetch = |from: &str| Fetch::new(from, PoolId(1), PoolId(5), Arc::new(program()));
        for (agent, from, word) in [
            (&owner, "nixl", "no device for programs"),
            (&owner, &*plain_name, "no device for programs"),
            (&plain, &*owner_name, "start_with"),
        ] {
            let refused = agent.fetch(fetch(from)).await.unwrap_err();
            assert!(matches!(refused, AgentError::Peer { .. }) && refused.to_string().contains(word), "{refused}");
        }
        let refused = plain.expect(Expect::new(TransferId(1), PoolId(1), Arc::new(program()))).await.unwrap_err();
        assert!(refused.to_string().contains("start_with"), "{refused}");
        let broken = Agent::start_with(
            config(),
            Box::new(|| {
                let provider = UcxProvider::new();
                let nowhere = kvferry_transport::Device { name: "nowhere".into(), ..provider.named("lo").unwrap() };
                provider.open(&nowhere, &Options::default())
            }),
        );
        assert!(broken.await.unwrap_err().to_string().contains("device for programs"));
    });
}
