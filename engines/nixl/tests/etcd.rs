//! Metadata in a real etcd, between our agent and NIXL's.
//!
//! Without `etcd` on the path, or without `KVFERRY_NIXL_PYTHON`, the cases say so and pass, unless `KVFERRY_REQUIRE` names etcd or nixl-agent.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "this is test code")]

#[allow(dead_code, reason = "each of the tests takes what it needs")]
mod support;

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use kvferry_core::PoolId;
use kvferry_nixl::{
    AgentMetadata, Connection, ETCD_LABEL, EtcdConfig, EtcdError, EtcdExchange, MemoryKind, Piece, Range, Section,
    Transfer,
};
use serde_json::json;
use support::{Peer, address, ours, pattern, run, turn};

const SOON: Duration = Duration::from_secs(15);

/// An etcd of one's own, with its files in a folder of its own.
struct Etcd {
    child: Child,
    folder: std::path::PathBuf,
    endpoint: String,
}

impl Etcd {
    fn start(test: &str) -> Option<Etcd> {
        if Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
            kvferry_transport::conformance::absent(
                "etcd",
                "no program etcd on the path; Debian's package is etcd-server",
            );
            return None;
        }
        let free = || format!("http://{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
        let (endpoint, peers) = (free(), free());
        let folder = std::env::temp_dir().join(format!("kvferry-etcd-{}-{test}", std::process::id()));
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(&folder)
            .args(["--listen-client-urls", &endpoint, "--advertise-client-urls", &endpoint])
            .args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers])
            .args(["--initial-cluster", &format!("default={peers}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let etcd = Etcd { child, folder, endpoint };
        for _ in 0..2000 {
            if TcpStream::connect(etcd.endpoint.trim_start_matches("http://")).is_ok() {
                return Some(etcd);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("etcd did not listen within 20 s");
    }

    fn config(&self) -> EtcdConfig {
        EtcdConfig::new([&self.endpoint]).within(SOON)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
        let _left = std::fs::remove_dir_all(&self.folder);
    }
}

fn metadata(name: &str) -> Bytes {
    let connections = vec![Connection { backend: "UCX".into(), address: Bytes::from_static(b"somewhere") }];
    let range = Range { device: 0, address: 4096, bytes: 4096, key: Bytes::from_static(b"key") };
    let sections = vec![Section::new("UCX", MemoryKind::Dram, vec![range]).unwrap()];
    AgentMetadata { name: name.into(), connections, sections }.encode().unwrap().into()
}

#[test]
fn what_is_published_is_fetched_by_agent_and_label_and_goes_with_its_lease() {
    let Some(etcd) = Etcd::start("own") else { return };
    run(async {
        let mut first = EtcdExchange::connect("a", etcd.config().lease(Duration::from_secs(2))).await.unwrap();
        let second = EtcdExchange::connect("b", etcd.config()).await.unwrap();
        let short = Duration::from_millis(300);
        let absent = second.fetch("a", ETCD_LABEL, short).await.unwrap_err();
        assert!(matches!(absent, EtcdError::Absent { .. }), "{absent}");
        assert!(absent.to_string().contains("/nixl/agents//a/metadata"), "{absent}");

        // Asked for before it is there.
        let (fetched, published) = tokio::join!(second.fetch("a", ETCD_LABEL, SOON), async {
            tokio::time::sleep(short).await;
            first.publish(ETCD_LABEL, metadata("a")).await
        });
        published.unwrap();
        assert_eq!(fetched.unwrap(), metadata("a"));
        first.publish("more", metadata("a")).await.unwrap();
        assert_eq!(second.fetch("a", "more", SOON).await.unwrap(), metadata("a"));
        let elsewhere = EtcdExchange::connect("b", etcd.config().namespace("/others")).await.unwrap();
        assert!(elsewhere.fetch("a", ETCD_LABEL, short).await.is_err(), "another namespace");

        // It is kept beyond its time, and goes when its agent does.
        let lives = tokio::time::timeout(Duration::from_secs(5), second.gone("a")).await;
        assert!(lives.is_err(), "the lease was renewed");
        drop(first);
        tokio::time::timeout(SOON, second.gone("a")).await.unwrap().unwrap();
        assert!(second.fetch("a", ETCD_LABEL, short).await.is_err());
        second.gone("nobody").await.unwrap();

        let mut liar = EtcdExchange::connect("c", etcd.config()).await.unwrap();
        liar.publish(ETCD_LABEL, metadata("a")).await.unwrap();
        let foreign = second.fetch("c", ETCD_LABEL, SOON).await.unwrap_err();
        assert!(matches!(&foreign, EtcdError::Foreign { found, .. } if found == "a"), "{foreign}");
        liar.publish(ETCD_LABEL, Bytes::from_static(b"nothing of NIXL's")).await.unwrap();
        assert!(matches!(second.fetch("c", ETCD_LABEL, SOON).await, Err(EtcdError::Wire { .. })));
        liar.withdraw().await.unwrap();
        second.gone("c").await.unwrap();
        for name in ["", "a/b"] {
            assert!(matches!(second.fetch(name, ETCD_LABEL, SOON).await, Err(EtcdError::Name(_))));
            assert!(matches!(liar.publish(name, Bytes::new()).await, Err(EtcdError::Name(_))));
        }
        let large = liar.publish(ETCD_LABEL, Bytes::from(vec![0; 3 << 20])).await.unwrap_err();
        assert!(matches!(large, EtcdError::Store { .. }), "{large}");
    });
}

#[test]
fn what_went_with_a_lease_that_ended_is_published_again() {
    let Some(etcd) = Etcd::start("lease") else { return };
    run(async {
        let mut exchange = EtcdExchange::connect("a", etcd.config().lease(Duration::from_secs(2))).await.unwrap();
        exchange.publish(ETCD_LABEL, metadata("a")).await.unwrap();
        let mut other = etcd_client::Client::connect([&etcd.endpoint], None).await.unwrap();
        for lease in other.leases().await.unwrap().leases() {
            other.lease_revoke(lease.id()).await.unwrap();
        }
        let reader = EtcdExchange::connect("b", etcd.config()).await.unwrap();
        reader.gone("a").await.unwrap();

        // Refused until the end of the lease is noticed here.
        let again = async {
            while exchange.publish(ETCD_LABEL, metadata("a")).await.is_err() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(SOON, again).await.unwrap();
        assert_eq!(reader.fetch("a", ETCD_LABEL, SOON).await.unwrap(), metadata("a"));
        exchange.withdraw().await.unwrap();
        reader.gone("a").await.unwrap();
    });
}

#[test]
fn where_there_is_no_etcd_it_says_so_in_time() {
    run(async {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let config = EtcdConfig::new([format!("http://{free}")]).within(Duration::from_secs(2));
        // The connection may be made only when it is needed.
        let error = match EtcdExchange::connect("a", config).await {
            Ok(mut exchange) => exchange.publish(ETCD_LABEL, metadata("a")).await.unwrap_err(),
            Err(error) => error,
        };
        assert!(error.to_string().contains(&free.to_string()), "{error}");
    });
}

#[test]
fn nixl_agents_find_ours_and_ours_find_them() {
    let Some(_turn) = turn() else { return };
    let Some(etcd) = Etcd::start("nixl") else { return };
    let mut peer = Peer::with_etcd("nixl", 4096, &etcd.endpoint);
    run(async {
        let (agent, _notifications, local) = ours(4096, 0).await;
        let mut exchange = EtcdExchange::connect(agent.name(), etcd.config()).await.unwrap();
        let order = |what: &str| json!({"do": what, "peer": agent.name(), "ip": "", "port": 0});

        peer.ask(&order("send"));
        agent.add_peer(exchange.fetch("nixl", ETCD_LABEL, SOON).await.unwrap()).await.unwrap();
        let piece = Piece { region: 0, offset: 0, address: peer.address, bytes: 4096 };
        agent.transfer(Transfer::read("nixl", PoolId(1), vec![piece])).await.unwrap();
        assert!((0..4096).all(|at| support::contents(&local)[at as usize] == pattern(at)));

        exchange.publish(ETCD_LABEL, agent.metadata().await.unwrap()).await.unwrap();
        peer.ask(&order("fetch"));
        peer.until_it_knows(agent.name(), true);
        let pieces = [(8, address(&local), 8)];
        let write = json!({"do": "transfer", "op": "WRITE", "peer": agent.name(), "pieces": pieces, "notify": ""});
        assert_eq!(peer.ask(&write), "DONE");
        exchange.withdraw().await.unwrap();
        peer.until_it_knows(agent.name(), false);

        peer.ask(&order("invalidate"));
        tokio::time::timeout(SOON, exchange.gone("nixl")).await.unwrap().unwrap();
    });
}
