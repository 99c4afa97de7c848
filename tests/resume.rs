//! Links that break and schedulers that start again: what stood before stands afterwards.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvferry::{Epoch, Event, LeastLoaded, NodeConfig, NodeId, Role, SchedulerNode, SchedulerTerms};
use support::{PATIENCE, rank, scheduler, submit};

const SPEC: &str = "layers=2,kv_heads=2,head_dim=16";

/// Carries bytes between whoever dials it and the node behind it, until it is told to drop them all.
struct Proxy {
    address: String,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    fn before(node: &str) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, node) = (listener.local_addr().unwrap().to_string(), node.to_owned());
        let open = Arc::<Mutex<Vec<TcpStream>>>::default();
        let kept = Arc::clone(&open);
        std::thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let Ok(far) = TcpStream::connect(&node) else { return };
                kept.lock().unwrap().extend([near.try_clone().unwrap(), far.try_clone().unwrap()]);
                for (mut from, mut to) in [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)] {
                    std::thread::spawn(move || {
                        let mut bytes = [0; 4096];
                        while let Ok(count @ 1..) = from.read(&mut bytes) {
                            if to.write_all(&bytes[..count]).is_err() {
                                return;
                            }
                        }
                    });
                }
            }
        });
        Proxy { address, open }
    }

    /// Breaks every link. Says how many there were.
    fn cut(&self) -> usize {
        let links: Vec<TcpStream> = self.open.lock().unwrap().drain(..).collect();
        for link in &links {
            let _ = link.shutdown(Shutdown::Both);
        }
        links.len() / 2
    }
}

#[tokio::test]
async fn a_broken_link_is_made_again_and_nobody_is_lost() {
    let scheduler = scheduler(&None).await;
    let mut events = scheduler.events().unwrap();
    let proxy = Proxy::before(scheduler.address());
    let _prefill = rank(1, Role::Prefill, SPEC, &proxy.address, &None).await;
    let _decode = rank(2, Role::Decode, SPEC, &proxy.address, &None).await;
    for request in 0..20 {
        if request % 4 == 3 {
            assert_eq!(proxy.cut(), 2, "both ranks are linked again");
        }
        assert!(submit(&scheduler, request).await.unwrap().outcome.is_delivered());
    }
    while let Ok(event) = events.try_recv() {
        assert!(!matches!(event, Event::NodeLost { .. } | Event::Parted { .. }), "{event:?}");
    }
}

async fn scheduler_at(address: &str, epoch: u64) -> SchedulerNode {
    let mut config = NodeConfig::new(NodeId(0), Epoch(epoch));
    config.listen = address.to_owned();
    let terms = SchedulerTerms { adopt_after: Duration::from_millis(500), ..SchedulerTerms::default() };
    SchedulerNode::start(config, terms, Box::new(LeastLoaded)).await.unwrap()
}

#[tokio::test]
async fn a_scheduler_that_starts_again_adopts_standing_offers() {
    let first = scheduler_at("127.0.0.1:0", 1).await;
    let (address, mut events) = (first.address().to_owned(), first.events().unwrap());
    let prefill = rank(1, Role::Prefill, SPEC, &address, &None).await;
    // Without a decode group the offer stands.
    let spec =
        kvferry::RequestSpec { request: kvferry::RequestId(7), tokens: 40, prefix: Arc::default(), prefix_tokens: 512 };
    let lost = first.submit(spec).await;
    let offered = async {
        while prefill.prefills.load(std::sync::atomic::Ordering::Relaxed) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, offered).await.unwrap();
    // What the engine said is with the leader soon after.
    tokio::time::sleep(Duration::from_millis(200)).await;
    while events.try_recv().is_ok() {}
    first.shutdown().await;
    assert!(lost.await.is_err());

    let second = scheduler_at(&address, 2).await;
    let _decode = rank(2, Role::Decode, SPEC, &address, &None).await;
    let finished = submit(&second, 7).await.unwrap();
    assert!(finished.outcome.is_delivered(), "{finished:?}");
    assert_eq!(prefill.prefills.load(std::sync::atomic::Ordering::Relaxed), 1, "it was not computed again");
    assert!(submit(&second, 8).await.unwrap().outcome.is_delivered());
}

#[tokio::test]
async fn what_happened_before_anybody_asked_is_told() {
    let scheduler = scheduler(&None).await;
    let _prefill = rank(1, Role::Prefill, SPEC, scheduler.address(), &None).await;
    let _decode = rank(2, Role::Decode, SPEC, scheduler.address(), &None).await;
    assert!(submit(&scheduler, 1).await.unwrap().outcome.is_delivered());
    // As with a scheduler that starts again at an address that workers dial all the time.
    let (mut events, mut ready) = (scheduler.events().unwrap(), 0);
    while let Ok(event) = events.try_recv() {
        ready += u32::from(matches!(event, Event::GroupReady { .. }));
    }
    assert_eq!(ready, 2);
    assert!(scheduler.events().is_none());
}
