//! Metadata over sockets, between our agent and NIXL's: asked for, sent and withdrawn, both ways.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "this is test code")]

#[allow(dead_code, reason = "each of the tests takes what it needs")]
mod support;

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use kvferry_core::PoolId;
use kvferry_nixl::{AgentMetadata, Exchange, Met, MetadataServer, Piece, ServerConfig, Transfer};
use serde_json::json;
use support::{Peer, address, ours, pattern, run, turn};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const SOON: Duration = Duration::from_secs(10);

fn one(remote: u64) -> Vec<Piece> {
    vec![Piece { region: 0, offset: 0, address: remote, bytes: 4096 }]
}

async fn met(server: &mut MetadataServer) -> Met {
    tokio::time::timeout(SOON, server.met()).await.unwrap().unwrap()
}

#[test]
fn a_listening_nixl_agent_gives_and_takes_metadata() {
    let Some(_turn) = turn() else { return };
    let (mut peer, listens) = Peer::listening("nixl", 4096);
    run(async {
        let (agent, mut notifications, local) = ours(4096, 0).await;
        let mut exchange = Exchange::connect(listens, SOON).await.unwrap();
        let fetched = exchange.fetch().await.unwrap();
        assert_eq!(AgentMetadata::decode(fetched.clone()), AgentMetadata::decode(peer.metadata.clone()));
        agent.add_peer(fetched).await.unwrap();
        agent.transfer(Transfer::read("nixl", PoolId(1), one(peer.address)).then_notify("read")).await.unwrap();
        assert!((0..4096).all(|at| support::contents(&local)[at as usize] == pattern(at)));
        assert_eq!(peer.heard().len(), 1);

        // Over the same connection.
        exchange.send(agent.metadata().await.unwrap()).await.unwrap();
        peer.until_it_knows(agent.name(), true);
        let order = json!({"do": "transfer", "op": "WRITE", "peer": agent.name(), "pieces": [(8, address(&local), 8)], "notify": "00"});
        assert_eq!(peer.ask(&order), "DONE");
        assert_eq!(&tokio::time::timeout(SOON, notifications.next()).await.unwrap().unwrap().message[..], b"\0");
        exchange.invalidate(agent.name()).await.unwrap();
        peer.until_it_knows(agent.name(), false);
    });
}

#[test]
fn nixl_agents_ask_our_server_send_to_it_and_leave() {
    let Some(_turn) = turn() else { return };
    let (mut peer, _) = Peer::listening("nixl", 4096);
    run(async {
        let (agent, _notifications, local) = ours(4096, 0).await;
        let mut server = MetadataServer::start(agent.clone(), ServerConfig::loopback(0)).await.unwrap();
        let order =
            |what: &str| json!({"do": what, "peer": agent.name(), "ip": "127.0.0.1", "port": server.address().port()});
        let [fetch, send, invalidate] = ["fetch", "send", "invalidate"].map(order);

        peer.ask(&send);
        let Met::Added(added) = met(&mut server).await else { panic!("not added") };
        assert_eq!((added.name.as_str(), added.ranges), ("nixl", 1));
        agent.transfer(Transfer::read("nixl", PoolId(1), one(peer.address))).await.unwrap();
        assert!((0..4096).all(|at| support::contents(&local)[at as usize] == pattern(at)));

        peer.ask(&fetch);
        // The server's tasks run on this thread.
        for _ in 0..2000 {
            if peer.ask(&json!({"do": "knows", "peer": agent.name()})) == true {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let order = json!({"do": "transfer", "op": "WRITE", "peer": agent.name(), "pieces": [(8, address(&local), 8)], "notify": ""});
        assert_eq!(peer.ask(&order), "DONE", "it knows the agent");

        peer.ask(&invalidate);
        assert_eq!(met(&mut server).await, Met::Removed("nixl".to_owned()));
        let gone = agent.transfer(Transfer::read("nixl", PoolId(1), one(peer.address))).await.unwrap_err();
        assert!(gone.to_string().contains("no such peer"), "{gone}");
    });
}

/// What the server says to these bytes until it closes the connection.
async fn answered(server: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(server).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    // Closed with bytes unread is reset.
    let _reset = tokio::time::timeout(SOON, stream.read_to_end(&mut answer)).await.unwrap();
    answer
}

#[test]
fn our_server_outlives_whatever_connects() {
    let Some(_turn) = turn() else { return };
    run(async {
        let (agent, _notifications, _local) = ours(4096, 0).await;
        let config = ServerConfig::loopback(0).connections_max(2).within(Duration::from_millis(300));
        let mut server = MetadataServer::start(agent.clone(), config).await.unwrap();
        let at = server.address();
        for nonsense in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            &[0xff; 64],
            b"\x0d\0\0\0\0\0\0\0NIXLCOMM:WHAT",
            b"\x20\0\0\0\0\0\0\0NIX",
            b"\x01",
        ] {
            assert_eq!(answered(at, nonsense).await, b"", "{nonsense:?}");
        }
        let mut client = Exchange::connect(at, SOON).await.unwrap();
        // Metadata that is none is refused, and the connection goes on.
        client.send(Bytes::from_static(b"nixlSerDes|Agent")).await.unwrap();
        client.invalidate("nobody").await.unwrap();
        assert_eq!(client.fetch().await.unwrap(), agent.metadata().await.unwrap());
        // Silence between frames is nobody's fault: only a frame that has begun has to end in time.
        tokio::time::sleep(Duration::from_millis(900)).await;
        assert_eq!(client.fetch().await.unwrap(), agent.metadata().await.unwrap());
        let mut second = Exchange::connect(at, SOON).await.unwrap();
        second.fetch().await.unwrap();
        assert!(Exchange::connect(at, SOON).await.unwrap().fetch().await.is_err(), "one too many");
        drop(second);
        let mut again = Err(());
        for _ in 0..200 {
            let mut third = Exchange::connect(at, SOON).await.unwrap();
            again = third.fetch().await.map_err(drop);
            if again.is_ok() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(again.is_ok(), "there is room again");

        let (other, _notifications, _local) = support::ours(4096, 1).await;
        client.send(other.metadata().await.unwrap()).await.unwrap();
        assert!(matches!(met(&mut server).await, Met::Added(peer) if peer.name == other.name()));
        drop(server);
        assert!(client.fetch().await.is_err(), "its connections end with it");
    });
}
