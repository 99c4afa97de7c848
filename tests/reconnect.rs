//! A data connection that breaks while the control session lives is made again by the next transfer.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use kvferry::{
    BlockTable, Direction, Format, GroupGeometry, HandoverId, Model, NodeId, PairPlan, Parallel, PlanRequest, Pool,
    PoolId, Rank, Tables, transport,
};
use kvferry_actors::{MonotonicClock, Nic, NicActor, NicReport, NicRequest, local_runtime};
use kvferry_core::TransferId;
use kvferry_core::protocol::{NicCommand, NicEvent};
use kvferry_transport::{Event, TransportKind};

const PEER: NodeId = NodeId(7);

/// Keeps what a NIC reports.
struct Listener(Rc<RefCell<Vec<NicEvent>>>);

impl Actor for Listener {
    type Context = Context<Self>;
}

impl Handler<NicReport> for Listener {
    type Result = ();

    fn handle(&mut self, report: NicReport, _: &mut Context<Self>) {
        self.0.borrow_mut().extend(report.events);
    }
}

#[test]
fn the_next_transfer_connects_again() {
    for kind in [TransportKind::Shm, TransportKind::Tcp] {
        local_runtime().unwrap().block_on(cut_and_post(kind));
    }
}

async fn cut_and_post(kind: TransportKind) {
    let model = Model::from_spec("layers=2,kv_heads=2,head_dim=16").unwrap().model;
    let geometry = GroupGeometry { model, format: Format::default(), parallel: Parallel::default() };
    let layout = geometry.shard(Rank(0)).unwrap().layout(&[4]);
    let tables = |blocks: [u32; 2]| Tables { groups: vec![BlockTable::known(0, blocks.to_vec())] };
    let plan = PairPlan::new(&geometry, Rank(0), &geometry, Rank(0)).unwrap();
    let (source, destination) = (tables([3, 1]), tables([0, 2]));
    let request = PlanRequest { tokens: 20, have: 0, layers: 0..2, source: &source, destination: &destination };
    let program = Arc::new(plan.program(&request).unwrap());

    // The owner of the KV: a bare transport, so that the test can cut its connections.
    let options = transport::Options::default();
    let device = (kind == TransportKind::Tcp).then_some("127.0.0.1");
    let mut owner = transport::select(kind, device, &options).unwrap()().unwrap();
    let owned = Pool::allocate(PoolId(0), layout.clone(), "owner").unwrap();
    for plane in 0..layout.planes.len() as u32 {
        owned.fill(plane, 3, 33).unwrap();
        owned.fill(plane, 1, 11).unwrap();
    }
    let keys = owner.bind(&owned).unwrap();

    // The reader: a NIC as nodes have it.
    let pool = Pool::allocate(PoolId(0), layout.clone(), "reader").unwrap();
    let events = Rc::new(RefCell::new(Vec::new()));
    let listener = Listener(Rc::clone(&events)).start();
    let opened = transport::select(kind, device, &options).unwrap()().unwrap();
    let (nic, _) = Nic::new(0, opened, &pool, listener.recipient(), Rc::new(MonotonicClock::moment)).unwrap();
    let nic = Rc::new(RefCell::new(nic));
    let port = NicActor::new(Rc::clone(&nic), Rc::default()).start();

    let connect =
        NicCommand::Connect { node: PEER, address: owner.address(), keys: keys.0, layout: Arc::new(layout.clone()) };
    port.do_send(NicRequest(connect));
    let mut cut = Vec::new();
    for round in 0..3_u64 {
        let id = TransferId::of(HandoverId(round), Rank(0), Rank(0), 0);
        for plane in 0..layout.planes.len() as u32 {
            pool.fill(plane, 0, 0).unwrap();
        }
        let (range, program) = (program.whole(), Arc::clone(&program));
        let post = NicCommand::Post { id, node: PEER, direction: Direction::Pull, program, range };
        port.do_send(NicRequest(post));
        let done = |events: &[NicEvent]| {
            events.iter().any(|event| matches!(event, NicEvent::Done { id: done, .. } if *done == id))
        };
        let start = Instant::now();
        while !done(&events.borrow()) {
            assert!(start.elapsed() < Duration::from_secs(60), "{kind}, round {round}: {:?}", events.borrow());
            nic.borrow_mut().pump();
            let mut seen = Vec::new();
            owner.poll(&mut seen);
            cut.extend(seen.into_iter().filter_map(|event| match event {
                Event::Connected { peer } => Some(peer),
                _ => None,
            }));
            tokio::task::yield_now().await;
        }
        let mut byte = [0];
        pool.read(0, 0, 0, &mut byte).unwrap();
        assert_eq!(byte, [33]);
        // Break it at the owner's end, and let the reader notice.
        for peer in cut.drain(..) {
            owner.disconnect(peer);
        }
        let lost =
            |events: &[NicEvent]| events.iter().filter(|event| matches!(event, NicEvent::PeerLost { .. })).count();
        let start = Instant::now();
        while lost(&events.borrow()) <= round as usize {
            assert!(start.elapsed() < Duration::from_secs(60), "{kind}: the cut was not noticed");
            nic.borrow_mut().pump();
            owner.poll(&mut Vec::new());
            tokio::task::yield_now().await;
        }
    }
}
