//! Our agent and NIXL's: reads, writes and notifications both ways, peers that die, stop and come back.
//!
//! `KVFERRY_NIXL_PYTHON` names a Python with a NIXL wheel; without it the cases say so and pass, unless `KVFERRY_REQUIRE` names nixl-agent.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "this is test code")]

#[allow(dead_code, reason = "each of the tests takes what it needs")]
mod support;

use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvferry_core::PoolId;
use kvferry_nixl::{Agent, AgentConfig, AgentError, AgentMetadata, Notifications, PeerKind, Piece, Transfer};
use kvferry_transport::Pool;
use kvferry_ucx::raw::{PackedKey, WorkerAddress};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use rustix::process::Signal;
use serde_json::json;
use support::{Peer, address, config, contents, hex, ours, pattern, pool, run, turn, with};

const SIZE: u64 = 1 << 20;

/// Pieces of `bytes` bytes, of which the local ones lie backwards: none follows another at both ends.
fn scattered(count: u64, bytes: u64, remote: u64) -> Vec<Piece> {
    let piece =
        |index| Piece { region: 0, offset: (count - 1 - index) * bytes, address: remote + index * bytes, bytes };
    (0..count).map(piece).collect()
}

/// What is written from here: other bytes than a peer begins with, and no piece like its neighbours.
fn labelled() -> Vec<u8> {
    (0..SIZE).map(|at| ((at * 11 + at / 251 + 5) % 241) as u8).collect()
}

/// All of a peer's memory.
fn dump(peer: &mut Peer) -> Vec<u8> {
    let said = peer.ask(&json!({"do": "dump"}));
    let text = said.as_str().unwrap().as_bytes();
    text.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

/// How an agent of ours is set up for a NIXL agent that was started with the same list.
fn over(tls: &str) -> AgentConfig {
    let config = AgentConfig::new("kvferry");
    if tls.is_empty() { config } else { config.transports(tls) }
}

#[test]
fn we_read_and_write_a_nixl_agents_memory() {
    let Some(_turn) = turn() else { return };
    read_and_write("tcp");
}

fn read_and_write(tls: &str) {
    for (count, bytes) in [(1, SIZE), (1, 1), (256, 4096), (20_000, 48)] {
        let mut peer = Peer::start("nixl", SIZE as usize, tls);
        run(async {
            let (agent, _notifications, local) = with(over(tls), SIZE, 0xEE).await;
            let added = agent.add_peer(peer.metadata.clone()).await.unwrap();
            assert_eq!((added.name.as_str(), added.kind, added.ranges), ("nixl", PeerKind::Nixl, 1));
            let pieces = scattered(count, bytes, peer.address);
            let moved =
                agent.transfer(Transfer::read("nixl", PoolId(1), pieces.clone()).then_notify("read")).await.unwrap();
            assert_eq!((moved.bytes, moved.operations), (count * bytes, count));
            let here = contents(&local);
            for index in 0..count {
                for at in 0..bytes {
                    let offset = (count - 1 - index) * bytes + at;
                    assert_eq!(here[offset as usize], pattern(index * bytes + at), "piece {index}, byte {at}");
                }
            }
            assert!(here[(count * bytes) as usize..].iter().all(|byte| *byte == 0xEE), "nothing beside it");
            assert_eq!(peer.heard(), [(agent.name().to_owned(), b"read".to_vec())]);

            local.write(0, 0, 0, &labelled()).unwrap();
            agent.transfer(Transfer::write("nixl", PoolId(1), pieces).then_notify("written")).await.unwrap();
            assert_eq!(peer.heard(), [(agent.name().to_owned(), b"written".to_vec())]);
            let (there, source) = (dump(&mut peer), labelled());
            for (at, byte) in (0..SIZE).zip(there) {
                let (index, within) = (at / bytes, at % bytes);
                let written = index < count;
                let expected =
                    if written { source[((count - 1 - index) * bytes + within) as usize] } else { pattern(at) };
                assert_eq!(byte, expected, "byte {at} of {count} times {bytes}, said to be written");
            }
            agent.shutdown().await;
        });
    }
}

#[test]
fn a_nixl_agent_reads_and_writes_our_memory_while_nobody_polls_here() {
    let Some(_turn) = turn() else { return };
    be_read_and_written("tcp");
}

fn be_read_and_written(tls: &str) {
    for (count, bytes) in [(1, SIZE), (1, 1), (256, 4096), (20_000, 48)] {
        let mut peer = Peer::start("nixl", SIZE as usize, tls);
        run(async {
            let (agent, mut notifications, local) = with(over(tls), SIZE, 0x11).await;
            let added = peer.ask(&json!({"do": "add", "metadata": hex(&agent.metadata().await.unwrap())}));
            assert_eq!(added, agent.name());
            // Backwards, so that none follows another at both ends.
            let pieces: Vec<(u64, u64, u64)> =
                (0..count).map(|i| (i * bytes, address(&local) + (count - 1 - i) * bytes, bytes)).collect();
            let order = |op: &str| json!({"do": "transfer", "op": op, "peer": agent.name(), "pieces": pieces, "notify": hex(op.as_bytes())});
            let opposite = |at: u64| (count - 1 - at / bytes) * bytes + at % bytes;
            let is_moved = |at: u64| at < count * bytes;
            assert_eq!(peer.ask(&order("WRITE")), "DONE");
            let said = tokio::time::timeout(Duration::from_secs(10), notifications.next()).await.unwrap().unwrap();
            assert_eq!((said.from.as_str(), &said.message[..]), ("nixl", &b"WRITE"[..]));
            for (at, byte) in (0..SIZE).zip(contents(&local)) {
                let expected = if is_moved(at) { pattern(opposite(at)) } else { 0x11 };
                assert_eq!(byte, expected, "byte {at} of {count} times {bytes}, written by NIXL");
            }
            local.write(0, 0, 0, &labelled()).unwrap();
            assert_eq!(peer.ask(&order("READ")), "DONE");
            let said = tokio::time::timeout(Duration::from_secs(10), notifications.next()).await.unwrap().unwrap();
            assert_eq!(&said.message[..], b"READ");
            let source = labelled();
            for (at, byte) in (0..SIZE).zip(dump(&mut peer)) {
                let expected = if is_moved(at) { source[opposite(at) as usize] } else { pattern(at) };
                assert_eq!(byte, expected, "byte {at} of {count} times {bytes}, read by NIXL");
            }
            agent.shutdown().await;
        });
    }
}

#[test]
fn connecting_waits_for_the_peer_and_no_longer_than_it_may() {
    let Some(_turn) = turn() else { return };
    let mut peer = Peer::start("nixl", 4096, "tcp");
    run(async {
        let (agent, _notifications, _local) = ours(4096, 0).await;
        assert!(agent.connect("nixl", None).await.is_err(), "it was not added");
        agent.add_peer(peer.metadata.clone()).await.unwrap();
        peer.stop();
        let late = agent.connect("nixl", Some(Duration::from_millis(300))).await.unwrap_err();
        assert!(matches!(late, AgentError::Deadline { .. }), "{late}");
        rustix::process::kill_process(peer.pid(), Signal::CONT).unwrap();
        agent.connect("nixl", None).await.unwrap();
        agent.connect("nixl", None).await.unwrap();
        peer.kill();
        // A connection that stands needs nothing of the peer, until UCX has heard of its end.
        let killed = Instant::now();
        while agent.connect("nixl", Some(Duration::from_secs(5))).await.is_ok() {
            assert!(killed.elapsed() < Duration::from_secs(20), "it is connected to nobody");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
}

#[test]
fn what_was_said_last_arrives_though_the_agent_ends() {
    let Some(_turn) = turn() else { return };
    let mut peer = Peer::start("nixl", 4096, "tcp");
    run(async {
        for number in 0..10u8 {
            let (agent, _notifications) = Agent::start(config()).await.unwrap();
            agent.add_peer(peer.metadata.clone()).await.unwrap();
            // More than a socket takes at once.
            let message = Bytes::from(vec![number; 4 << 20]);
            agent.notify("nixl", message.clone(), None).await.unwrap();
            agent.shutdown().await;
            let heard = peer.heard();
            assert!(heard.len() == 1 && heard[0].1 == message, "message {number} is not what was heard");
        }
    });
}

#[test]
fn notifications_go_both_ways_whatever_they_hold() {
    let Some(_turn) = turn() else { return };
    let mut peer = Peer::start("nixl", 4096, "tcp");
    run(async {
        let (agent, mut notifications, _local) = ours(4096, 0).await;
        peer.ask(&json!({"do": "add", "metadata": hex(&agent.metadata().await.unwrap())}));
        agent.add_peer(peer.metadata.clone()).await.unwrap();
        for message in [Vec::new(), b"a|b\0nixlSerDes|".to_vec(), vec![7; 200_000]] {
            if !message.is_empty() {
                agent.notify("nixl", Bytes::from(message.clone()), None).await.unwrap();
                assert_eq!(peer.heard(), [(agent.name().to_owned(), message.clone())]);
            }
            peer.ask(&json!({"do": "notify", "peer": agent.name(), "message": hex(&message)}));
            let said = tokio::time::timeout(Duration::from_secs(10), notifications.next()).await.unwrap().unwrap();
            assert_eq!((said.from.as_str(), &said.message[..]), ("nixl", &message[..]));
        }
    });
}

#[test]
fn a_notification_follows_its_transfer_though_nobody_asks_for_that_any_more() {
    let Some(_turn) = turn() else { return };
    let mut peer = Peer::start("nixl", SIZE as usize, "tcp");
    run(async {
        let (agent, _notifications, _local) = ours(SIZE, 0).await;
        agent.add_peer(peer.metadata.clone()).await.unwrap();
        let read = Transfer::read("nixl", PoolId(1), scattered(256, 4096, peer.address)).then_notify("read");
        let mut transfer = std::pin::pin!(agent.transfer(read));
        // Asked once, by which it begins; then not before the peer has heard.
        let first = std::future::poll_fn(|context| Poll::Ready(transfer.as_mut().poll(context))).await;
        assert_eq!(peer.heard(), [(agent.name().to_owned(), b"read".to_vec())]);
        let moved = match first {
            Poll::Ready(moved) => moved,
            Poll::Pending => transfer.await,
        };
        assert_eq!(moved.unwrap().bytes, SIZE);
    });
}

#[test]
fn over_whatever_transports_ucx_finds_too() {
    let Some(_turn) = turn() else { return };
    read_and_write("");
    be_read_and_written("");
}

#[test]
fn a_killed_peer_fails_its_transfers_and_comes_back_under_a_new_name() {
    let Some(_turn) = turn() else { return };
    let mut first = Peer::start("nixl#1", SIZE as usize, "tcp");
    run(async {
        let (agent, _notifications, _local) = ours(SIZE, 0).await;
        agent.add_peer(first.metadata.clone()).await.unwrap();
        let read = |name: &str, at| Transfer::read(name, PoolId(1), scattered(16, 4096, at));
        agent.transfer(read("nixl#1", first.address)).await.unwrap();
        first.kill();
        let began = Instant::now();
        let failed = agent.transfer(read("nixl#1", first.address).within(Duration::from_secs(20))).await.unwrap_err();
        assert!(matches!(failed, AgentError::Failed { .. } | AgentError::Deadline { .. }), "{failed}");
        assert!(began.elapsed() < Duration::from_secs(25));

        let second = Peer::start("nixl#2", SIZE as usize, "tcp");
        agent.add_peer(second.metadata.clone()).await.unwrap();
        agent.transfer(read("nixl#2", second.address).within(Duration::MAX)).await.unwrap();
        agent.remove_peer("nixl#1").await.unwrap();
        let unknown = agent.transfer(read("nixl#1", first.address)).await.unwrap_err();
        assert!(matches!(unknown, AgentError::Peer { .. }), "{unknown}");
        // Under its old name, another incarnation is refused until the first is removed.
        drop(second);
        let again = Peer::start("nixl#2", SIZE as usize, "tcp");
        let refused = agent.add_peer(again.metadata.clone()).await.unwrap_err();
        assert!(refused.to_string().contains("started again"), "{refused}");
        agent.remove_peer("nixl#2").await.unwrap();
        agent.add_peer(again.metadata.clone()).await.unwrap();
        agent.transfer(read("nixl#2", again.address)).await.unwrap();
    });
}

#[test]
fn a_stopped_peer_costs_a_deadline_and_is_met_again() {
    let Some(_turn) = turn() else { return };
    let peer = Peer::start("nixl", SIZE as usize, "tcp");
    run(async {
        let (agent, _notifications, local) = ours(SIZE, 0).await;
        agent.add_peer(peer.metadata.clone()).await.unwrap();
        let read = || Transfer::read("nixl", PoolId(1), scattered(256, 4096, peer.address));
        agent.transfer(read()).await.unwrap();
        peer.stop();
        let began = Instant::now();
        let late = agent.transfer(read().within(Duration::from_millis(500))).await.unwrap_err();
        assert!(matches!(late, AgentError::Deadline { waited_ms: 500.., .. }), "{late}");
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        // Nothing comes afterwards, also when the peer goes on.
        local.write(0, 0, 0, &vec![0xCC; SIZE as usize]).unwrap();
        rustix::process::kill_process(peer.pid(), Signal::CONT).unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(contents(&local).iter().all(|byte| *byte == 0xCC));
        agent.transfer(read()).await.unwrap();
        assert_eq!(contents(&local)[0], pattern(255 * 4096));
    });
}

#[test]
fn a_peer_that_is_killed_or_stopped_in_the_middle_fails_the_transfer_in_time() {
    let Some(_turn) = turn() else { return };
    for (signal, tls) in [(Signal::KILL, "tcp"), (Signal::KILL, ""), (Signal::STOP, "tcp"), (Signal::STOP, "")] {
        // Whether it was in the middle is known afterwards. The kernel reads and writes the memory of a process that is stopped.
        let goes_on = (signal, tls) == (Signal::STOP, "");
        let in_the_middle = (0..if goes_on { 1 } else { 10 }).any(|_| interrupted(signal, tls));
        assert!(in_the_middle || goes_on, "{signal:?} {tls:?}: ten reads were over before it came");
        let in_the_middle = (0..if goes_on { 1 } else { 10 }).any(|_| write_interrupted(signal, tls));
        assert!(in_the_middle || goes_on, "{signal:?} {tls:?}: ten writes were over before it came");
    }
}

/// Memory of a transfer that a signal comes into.
const INTERRUPTED_BYTES: u64 = 64 << 20;

/// An agent with pool 1, of `INTERRUPTED_BYTES` of 0xEE, joined to the peer.
async fn beside(peer: &Peer, tls: &str) -> (Agent, Notifications, Pool) {
    let (agent, notifications) = Agent::start(over(tls).in_flight_max(8)).await.unwrap();
    let local = pool(1, INTERRUPTED_BYTES, 0xEE);
    agent.register(local.clone()).await.unwrap();
    agent.add_peer(peer.metadata.clone()).await.unwrap();
    agent.connect("nixl", None).await.unwrap();
    (agent, notifications, local)
}

/// Writes to a peer and sends it a signal soon after; false if it was all said to be written.
fn write_interrupted(signal: Signal, tls: &str) -> bool {
    let peer = Peer::start("nixl", INTERRUPTED_BYTES as usize, tls);
    run(async {
        let (agent, _notifications, _) = beside(&peer, tls).await;
        let pieces = scattered(INTERRUPTED_BYTES / 4096, 4096, peer.address);
        let write = Transfer::write("nixl", PoolId(1), pieces);
        let write = write.then_notify("written").within(Duration::from_secs(3));
        let mut transfer = std::pin::pin!(agent.transfer(write));
        let begun = std::future::poll_fn(|context| Poll::Ready(transfer.as_mut().poll(context))).await;
        assert!(begun.is_pending());
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(2) {
            std::hint::spin_loop();
        }
        rustix::process::kill_process(peer.pid(), signal).unwrap();
        let result = transfer.await;
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        if signal == Signal::STOP {
            rustix::process::kill_process(peer.pid(), Signal::CONT).unwrap();
        }
        match result {
            Ok(moved) => assert_eq!(moved.bytes, INTERRUPTED_BYTES),
            Err(AgentError::Failed { .. } | AgentError::Deadline { .. }) => return true,
            Err(error) => panic!("{error}"),
        }
        false
    })
}

/// Reads from a peer and sends it a signal once the first piece is here; false if the last one was by then.
fn interrupted(signal: Signal, tls: &str) -> bool {
    let peer = Peer::start("nixl", INTERRUPTED_BYTES as usize, tls);
    run(async {
        let (agent, _notifications, local) = beside(&peer, tls).await;
        let count = INTERRUPTED_BYTES / 4096;
        let is_here = |piece: u64| {
            let mut byte = [0];
            local.read(0, 0, (count - 1 - piece) * 4096 + 1, &mut byte).unwrap();
            byte == [pattern(piece * 4096 + 1)]
        };
        let read = Transfer::read("nixl", PoolId(1), scattered(count, 4096, peer.address));
        let mut transfer = std::pin::pin!(agent.transfer(read.within(Duration::from_secs(3))));
        let begun = std::future::poll_fn(|context| Poll::Ready(transfer.as_mut().poll(context))).await;
        assert!(begun.is_pending());
        let began = Instant::now();
        while !is_here(0) && began.elapsed() < Duration::from_secs(2) {
            std::hint::spin_loop();
        }
        rustix::process::kill_process(peer.pid(), signal).unwrap();
        let over = is_here(count - 1);
        let result = transfer.await;
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        match result {
            Ok(moved) => assert_eq!(moved.bytes, INTERRUPTED_BYTES),
            Err(AgentError::Failed { .. } | AgentError::Deadline { .. }) if !over => {
                // Nothing of it comes any more.
                local.write(0, 0, 0, &vec![0xCC; INTERRUPTED_BYTES as usize]).unwrap();
                if signal == Signal::STOP {
                    rustix::process::kill_process(peer.pid(), Signal::CONT).unwrap();
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
                assert!(contents(&local).iter().all(|byte| *byte == 0xCC));
                return true;
            }
            Err(error) => panic!("{error}"),
        }
        false
    })
}

#[test]
fn memory_is_registered_anew_and_told_in_parts() {
    let Some(_turn) = turn() else { return };
    let mut peer = Peer::start("nixl", SIZE as usize, "tcp");
    run(async {
        let (agent, _notifications, _local) = ours(4096, 1).await;
        peer.ask(&json!({"do": "add", "metadata": hex(&agent.metadata().await.unwrap())}));
        let more = pool(2, 8192, 2);
        agent.register(more.clone()).await.unwrap();
        let twice = agent.register(more.clone()).await.unwrap_err();
        assert!(twice.to_string().contains("already"), "{twice}");
        let part = agent.partial_metadata(vec![PoolId(2)], false).await.unwrap();
        assert_eq!(peer.ask(&json!({"do": "add", "metadata": hex(&part)})), agent.name());
        let pieces = [(0, address(&more), 8192)];
        let order = json!({"do": "transfer", "op": "READ", "peer": agent.name(), "pieces": pieces, "notify": ""});
        assert_eq!(peer.ask(&order), "DONE");
        agent.deregister(PoolId(2)).await.unwrap();
        assert!(agent.deregister(PoolId(2)).await.is_err());
        agent.register(more).await.unwrap();
    });
}

#[test]
fn a_dropped_future_frees_nothing_and_stops_what_was_not_begun() {
    let Some(_turn) = turn() else { return };
    let mut peer = Peer::start("nixl", SIZE as usize, "tcp");
    run(async {
        let (agent, _notifications) = Agent::start(config().in_flight_max(4)).await.unwrap();
        agent.register(pool(1, SIZE, 0)).await.unwrap();
        agent.add_peer(peer.metadata.clone()).await.unwrap();
        let read = Transfer::read("nixl", PoolId(1), scattered(20_000, 48, peer.address)).then_notify("never");
        let gone = tokio::time::timeout(Duration::from_millis(2), agent.transfer(read)).await;
        // The pool goes, too; what is in flight keeps it.
        agent.deregister(PoolId(1)).await.unwrap();
        agent.notify("nixl", Bytes::from_static(b"after"), None).await.unwrap();
        let heard: Vec<Vec<u8>> = peer.heard().into_iter().map(|(_, message)| message).collect();
        // Unless it was done within two milliseconds.
        assert!(gone.is_ok() || heard == [b"after".to_vec()], "{heard:?}");
        agent.shutdown().await;
        assert_eq!(agent.notify("nixl", Bytes::from_static(b"x"), None).await, Err(AgentError::Gone));
    });
}

#[test]
fn what_is_not_the_peers_or_ours_is_refused_before_anything_moves() {
    let Some(_turn) = turn() else { return };
    let peer = Peer::start("nixl", 65536, "tcp");
    run(async {
        let (agent, _notifications, _local) = ours(65536, 9).await;
        agent.add_peer(peer.metadata.clone()).await.unwrap();
        let piece = |offset, address, bytes| Piece { region: 0, offset, address, bytes };
        let last = peer.address + 65536;
        for (wrong, word) in [
            (piece(0, last - 1, 2), "no range"),
            (piece(0, peer.address - 1, 1), "no range"),
            (piece(65535, peer.address, 2), "outside"),
            (piece(u64::MAX, peer.address, 2), "outside"),
            (Piece { region: 3, ..piece(0, peer.address, 1) }, "outside"),
        ] {
            let good = piece(0, peer.address, 16);
            let refused = agent.transfer(Transfer::write("nixl", PoolId(1), vec![good, wrong])).await.unwrap_err();
            assert!(matches!(refused, AgentError::Piece { piece: 1, .. }), "{refused}");
            assert!(refused.to_string().contains(word), "{refused}");
        }
        let own = agent.metadata().await.unwrap();
        assert!(agent.add_peer(own).await.unwrap_err().to_string().contains("own name"));
        for (at, byte) in [(75, 0xF2), (80, 0)] {
            let mut broken = peer.metadata.to_vec();
            broken[at] = byte;
            // Refused, or as harmless as another identity.
            let _ = agent.add_peer(broken.into()).await;
        }
        let long = Bytes::from(vec![0; kvferry_nixl::NOTIFICATION_BYTES_MAX + 1]);
        assert!(matches!(agent.notify("nixl", long, None).await, Err(AgentError::Notification { .. })));
        let mut cut = peer.metadata.to_vec();
        cut.truncate(peer.metadata.len() - 1);
        assert!(matches!(agent.add_peer(cut.into()).await, Err(AgentError::Wire(_))));
    });
}

/// Whether everything of it that UCX would get was found to be well-formed, by those who check it.
fn is_whole(metadata: Bytes) -> bool {
    let Ok(metadata) = AgentMetadata::decode(metadata) else { return false };
    let ours = metadata.sections.iter().filter(|section| section.backend == "UCX");
    let keys = ours.flat_map(|section| &section.ranges).all(|range| PackedKey::check(&range.key).is_ok());
    keys && metadata.connection("UCX").is_some_and(|found| WorkerAddress::check(&found.address).is_ok())
}

#[test]
fn of_damaged_metadata_ucx_gets_only_what_is_whole() {
    let Some(_turn) = turn() else { return };
    let peer = Peer::start("nixl", 65536, "tcp");
    run(async {
        let (agent, _notifications, _local) = ours(4096, 0).await;
        let damage = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4);
        let case = (damage, any::<prop::sample::Index>(), 0..4u8);
        let config = ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() };
        let mut runner = proptest::test_runner::TestRunner::new(config);
        let (mut taken, mut refused) = (0, 0);
        for _ in 0..2000 {
            let (damage, end, cut) = case.new_tree(&mut runner).unwrap().current();
            let mut bytes = peer.metadata.to_vec();
            for (at, byte) in damage {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if cut == 0 {
                bytes.truncate(end.index(bytes.len()));
            }
            let bytes = Bytes::from(bytes);
            let added = agent.add_peer(bytes.clone()).await;
            assert_eq!(added.is_ok(), is_whole(bytes.clone()), "{added:?} of {bytes:?}");
            match added {
                Ok(added) => {
                    taken += 1;
                    agent.remove_peer(&added.name).await.unwrap();
                }
                Err(_) => refused += 1,
            }
        }
        assert!(taken > 50 && refused > 50, "{taken} taken, {refused} refused");
    });
}
