//! Code that panics inside a node, be it a transport, a policy or the engine beside it, ends that node's incarnation and nothing else: the
//! engine sees its calls end once nothing touches the pool any more, the others hear of it, and every request has an end.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on fails, and planted panics are what is tested"
)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use kvferry::{
    Direction, Epoch, Event, FailReason, Finished, GroupGeometry, GroupId, GroupView, Handover, HandoverError,
    LeastLoaded, NodeConfig, NodeId, OpenNic, Outcome, Policy, Pool, PoolId, PoolLayout, RequestId, RequestSpec, Role,
    SchedulerNode, SchedulerTerms, TransportKind, transport,
};
use kvferry_core::TransferId;
use kvferry_transport::{
    BindError, ConnectError, Expected, ImportError, NicInfo, PeerId, PoolKeys, PostError, RemotePool, Transfer,
    Transport, Wait,
};
use support::{PATIENCE, Rig, Watch, geometry, node_config, pool, rank, rank_over, scheduler, submit};
use tokio::sync::mpsc::UnboundedReceiver;

/// Nodes, and the groups of the same numbers.
const HURT: u64 = 1;
const WELL: u64 = 2;
const SPEC: &str = "layers=2,kv_heads=2,head_dim=16";

/// Where a transport panics once it is told to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// In the handler of its actor.
    Post,
    /// In the loop of its thread.
    Poll,
    Nowhere,
}

/// A transport with a planted panic, which also says whether it may be copying.
struct Trapped {
    inner: Box<dyn Transport>,
    at: At,
    armed: Arc<AtomicBool>,
    /// How long each poll takes once the trap is armed, as if there was always much to copy.
    slow: Duration,
    watch: Arc<Watch>,
}

impl Trapped {
    fn pass(&self, at: At) {
        assert!(at != self.at || !self.armed.load(Ordering::Relaxed), "planted, at {at:?}");
    }
}

/// What the NICs of one rank have in common.
#[derive(Clone, Default)]
struct Trap {
    armed: Arc<AtomicBool>,
    watch: Arc<Watch>,
}

impl Trap {
    /// Arms it, and waits until the NICs are in the middle of their work.
    async fn arm(&self) {
        self.armed.store(true, Ordering::Relaxed);
        let busy = async {
            while self.watch.copying.load(Ordering::Relaxed) == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(PATIENCE, busy).await.expect("NICs look for work from time to time");
    }

    fn nic(&self, kind: TransportKind, at: At, slow: Duration) -> OpenNic {
        let open = nic(kind);
        let Trap { armed, watch } = self.clone();
        Box::new(move || Ok(Box::new(Trapped { inner: open()?, at, armed, slow, watch })))
    }
}

impl Transport for Trapped {
    fn info(&self) -> &NicInfo {
        self.inner.info()
    }

    fn address(&self) -> Bytes {
        self.inner.address()
    }

    fn bind(&mut self, pool: &Pool) -> Result<PoolKeys, BindError> {
        self.inner.bind(pool)
    }

    fn unbind(&mut self, pool: PoolId) {
        self.inner.unbind(pool);
    }

    fn connect(&mut self, address: &[u8]) -> Result<PeerId, ConnectError> {
        self.inner.connect(address)
    }

    fn import(&mut self, peer: PeerId, keys: &PoolKeys, layout: &PoolLayout) -> Result<RemotePool, ImportError> {
        self.inner.import(peer, keys, layout)
    }

    fn expect(&mut self, transfer: Expected) -> Result<(), PostError> {
        self.pass(At::Post);
        self.inner.expect(transfer)
    }

    fn post(&mut self, transfer: Transfer) -> Result<(), PostError> {
        self.pass(At::Post);
        self.inner.post(transfer)
    }

    fn cancel(&mut self, id: TransferId) {
        self.inner.cancel(id);
    }

    fn fence(&mut self, peer: PeerId) {
        self.inner.fence(peer);
    }

    fn disconnect(&mut self, peer: PeerId) {
        self.inner.disconnect(peer);
    }

    fn poll(&mut self, events: &mut Vec<kvferry_transport::Event>) {
        self.pass(At::Poll);
        self.watch.copying.fetch_add(1, Ordering::Relaxed);
        if self.armed.load(Ordering::Relaxed) {
            std::thread::sleep(self.slow);
        }
        self.inner.poll(events);
        self.watch.copying.fetch_sub(1, Ordering::Relaxed);
    }

    fn arm(&mut self) -> Wait {
        let busy = self.armed.load(Ordering::Relaxed) && !self.slow.is_zero();
        if busy { Wait::Busy } else { self.inner.arm() }
    }
}

fn incarnation(node: u64, epoch: u64) -> NodeConfig {
    let mut config = node_config(node, &None);
    config.identity.epoch = Epoch(epoch);
    config
}

fn nic(kind: TransportKind) -> OpenNic {
    let device = (kind == TransportKind::Tcp).then_some("127.0.0.1");
    transport::select(kind, device, &transport::Options::default()).unwrap()
}

/// Waits for the first event of a node that says it.
async fn hear<T>(what: &str, events: &mut UnboundedReceiver<Event>, says: impl Fn(Event) -> Option<T>) -> T {
    let heard = async {
        loop {
            let event = events.recv().await.unwrap_or_else(|| panic!("the node ended before {what}"));
            if let Some(said) = says(event) {
                return said;
            }
        }
    };
    tokio::time::timeout(PATIENCE, heard).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

/// Why a node says that `gone` is over.
async fn loss(events: &mut UnboundedReceiver<Event>, gone: u64) -> String {
    let cause = |event| match event {
        Event::NodeLost { node, cause } if node == NodeId(gone) => Some(cause),
        _ => None,
    };
    hear("the loss of the node", events, cause).await
}

/// Waits until a group is whole.
async fn whole(events: &mut UnboundedReceiver<Event>) {
    hear("a group", events, |event| matches!(event, Event::GroupReady { .. }).then_some(())).await;
}

/// A prefill and a decode rank, one of which will be hurt, and what it takes to bring that one back.
struct Bed {
    scheduler: SchedulerNode,
    events: UnboundedReceiver<Event>,
    geometry: Arc<GroupGeometry>,
    role: Role,
    kind: TransportKind,
    direction: Direction,
    memory: Pool,
    hurt: Rig,
    well: Rig,
}

impl Bed {
    /// The rank in whose NICs there is a trap is the one that will be hurt.
    async fn new(role: Role, kind: TransportKind, direction: Direction, trap: &Trap, nics: Vec<OpenNic>) -> Bed {
        let scheduler = scheduler(&None).await;
        let (mut events, geometry) = (scheduler.events().unwrap(), geometry(SPEC));
        let memory = pool(&geometry);
        let start = async |node, role, memory: Pool, nics, watch| {
            let geometry = Arc::clone(&geometry);
            let mine = (memory, nics);
            rank_over(incarnation(node, 1), role, Some(direction), geometry, scheduler.address(), mine, watch).await
        };
        let other = if role == Role::Prefill { Role::Decode } else { Role::Prefill };
        let hurt = start(HURT, role, memory.clone(), nics, Arc::clone(&trap.watch)).await;
        let well = start(WELL, other, pool(&geometry), vec![nic(kind)], Arc::default()).await;
        whole(&mut events).await;
        whole(&mut events).await;
        Bed { scheduler, events, geometry, role, kind, direction, memory, hurt, well }
    }

    async fn submit(&self, request: u64) -> Finished {
        submit(&self.scheduler, request).await.unwrap()
    }

    /// The same, without waiting for its end.
    async fn begin(&self, request: u64) -> Handover {
        let spec = RequestSpec { request: RequestId(request), tokens: 40, prefix: Arc::default(), prefix_tokens: 512 };
        self.scheduler.submit(spec).await
    }

    /// The hurt rank's next incarnation, over the same memory.
    async fn bring_back(&mut self) {
        let (mine, watch) = ((self.memory.clone(), vec![nic(self.kind)]), Arc::default());
        let (geometry, at) = (Arc::clone(&self.geometry), self.scheduler.address());
        self.hurt = rank_over(incarnation(HURT, 2), self.role, Some(self.direction), geometry, at, mine, watch).await;
        whole(&mut self.events).await;
    }

    /// Nothing is left at the rank that was not hurt, and both serve.
    async fn check_well(&self) {
        assert_eq!(self.submit(100).await.outcome, Outcome::Delivered);
        let prefill = if self.role == Role::Prefill { &self.hurt } else { &self.well };
        let released = async {
            while prefill.releases.load(Ordering::Relaxed) < prefill.prefills.load(Ordering::Relaxed) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, released).await.expect("an offer was not released");
    }
}

/// A request that the hurt rank had ends; the reason names that rank, unless somebody could still serve it.
async fn check_end(request: Handover) {
    let finished = tokio::time::timeout(PATIENCE, request).await.expect("the request ended").unwrap();
    let fits = match &finished.outcome {
        Outcome::Failed { reason: FailReason::RankLost { node, .. } } => *node == NodeId(HURT),
        outcome => outcome.is_delivered(),
    };
    assert!(fits, "{finished:?}");
}

#[tokio::test]
async fn a_transport_that_panics_ends_its_rank_and_nobody_else() {
    for (role, kind, direction, at) in [
        (Role::Decode, TransportKind::Shm, Direction::Pull, At::Post),
        (Role::Decode, TransportKind::Shm, Direction::Pull, At::Poll),
        (Role::Decode, TransportKind::Tcp, Direction::Push, At::Post),
        (Role::Prefill, TransportKind::Tcp, Direction::Pull, At::Poll),
        (Role::Prefill, TransportKind::Tcp, Direction::Push, At::Post),
    ] {
        let what = format!("{role}, {kind}, {direction:?}, {at:?}");
        let trap = Trap::default();
        let nics = vec![trap.nic(kind, at, Duration::ZERO)];
        let mut bed = Bed::new(role, kind, direction, &trap, nics).await;
        assert_eq!(bed.submit(1).await.outcome, Outcome::Delivered, "{what}");

        trap.armed.store(true, Ordering::Relaxed);
        let request = bed.begin(2).await;
        tokio::time::timeout(PATIENCE, &mut bed.hurt.engine).await.expect("its calls ended").unwrap();
        let cause = loss(&mut bed.hurt.events, HURT).await;
        assert!(cause.contains("NIC") && cause.ends_with("panicked"), "{what}: {cause}");
        let cause = loss(&mut bed.events, HURT).await;
        assert!(cause.contains("closed"), "{what}: it was noticed late: {cause}");
        bed.bring_back().await;
        check_end(request).await;
        bed.check_well().await;
    }
}

#[tokio::test]
async fn the_engine_hears_of_a_panic_when_nothing_copies_any_more() {
    let trap = Trap::default();
    // Whichever NIC gets the transfer panics; the other is in the middle of its work.
    let slow = Duration::from_millis(300);
    let nics = vec![trap.nic(TransportKind::Shm, At::Post, slow), trap.nic(TransportKind::Shm, At::Post, slow)];
    let mut bed = Bed::new(Role::Decode, TransportKind::Shm, Direction::Pull, &trap, nics).await;
    trap.arm().await;
    let request = bed.begin(2).await;
    tokio::time::timeout(PATIENCE, &mut bed.hurt.engine).await.expect("its calls ended").unwrap();
    bed.bring_back().await;
    check_end(request).await;
    bed.check_well().await;
}

#[tokio::test]
async fn an_engine_that_panics_takes_its_node_along() {
    for role in [Role::Decode, Role::Prefill] {
        let trap = Trap::default();
        let nics = vec![trap.nic(TransportKind::Shm, At::Nowhere, Duration::from_millis(300))];
        let mut bed = Bed::new(role, TransportKind::Shm, Direction::Pull, &trap, nics).await;
        assert_eq!(bed.submit(1).await.outcome, Outcome::Delivered);
        trap.arm().await;
        trap.watch.panics.store(true, Ordering::Relaxed);
        let request = bed.begin(2).await;
        let panicked = tokio::time::timeout(PATIENCE, &mut bed.hurt.engine).await.expect("the engine ended");
        assert!(panicked.unwrap_err().is_panic());
        assert_eq!(trap.watch.copying.load(Ordering::Relaxed), 0, "{role}: a NIC may still touch the pool");
        loss(&mut bed.events, HURT).await;
        bed.bring_back().await;
        check_end(request).await;
        bed.check_well().await;
    }
}

/// A policy with a planted panic, at the choice of a decode group.
#[derive(Debug)]
struct Panics;

impl Policy for Panics {
    fn prefill(&mut self, request: &RequestSpec, candidates: &[GroupView]) -> Option<GroupId> {
        LeastLoaded.prefill(request, candidates)
    }

    fn decode(&mut self, _: &RequestSpec, _: &[GroupView]) -> Option<GroupId> {
        panic!("planted, in the policy")
    }
}

#[tokio::test]
async fn a_policy_that_panics_ends_the_scheduler_and_its_next_incarnation_goes_on() {
    let start = async |listen: &str, epoch, policy: Box<dyn Policy>| {
        let mut config = incarnation(0, epoch);
        config.listen = listen.to_owned();
        let terms = SchedulerTerms { adopt_after: Duration::from_millis(500), ..SchedulerTerms::default() };
        SchedulerNode::start(config, terms, policy).await.unwrap()
    };
    let first = start("127.0.0.1:0", 1, Box::new(Panics)).await;
    let (address, mut events) = (first.address().to_owned(), first.events().unwrap());
    let prefill = rank(1, Role::Prefill, SPEC, &address, &None).await;
    let _decode = rank(2, Role::Decode, SPEC, &address, &None).await;
    whole(&mut events).await;
    whole(&mut events).await;

    assert_eq!(submit(&first, 7).await, Err(HandoverError::SchedulerGone(RequestId(7))));
    let cause = loss(&mut events, 0).await;
    assert!(cause.contains("scheduler panicked"), "{cause}");
    // Whoever submits to it afterwards hears the same, and does not wait.
    assert_eq!(submit(&first, 8).await, Err(HandoverError::SchedulerGone(RequestId(8))));
    first.shutdown().await;

    let second = start(&address, 2, Box::new(LeastLoaded)).await;
    assert!(submit(&second, 7).await.unwrap().outcome.is_delivered());
    assert_eq!(prefill.prefills.load(Ordering::Relaxed), 1, "its offer stood meanwhile");
}
