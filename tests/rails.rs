//! Two and four rails over real TCP devices, of kvferry's own and of libfabric's: pairs of virtual cables between two hosts, which are network
//! namespaces of the test's own.
//!
//! Where there may be none, or is no libfabric, the cases say so and pass, unless `KVFERRY_REQUIRE` names netns or libfabric. What a fault costs is printed:
//! `cargo test --test rails -- --nocapture`.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvferry::Direction::{self, Pull, Push};
use kvferry::{
    Epoch, Event, Finished, GroupGeometry, GroupId, LeastLoaded, NodeConfig, NodeId, OpenNic, Pool, PoolId,
    QuarantineTerms, RailHealth, RailTerms, Rank, RequestId, RequestSpec, Role, SchedulerNode, SchedulerTerms,
    ThreadOptions, TransportKind, Watch, WorkerConfig, WorkerNode,
};
use kvferry_libfabric::LibfabricProvider;
use kvferry_synthetic::{DecodeEngine, Engine, EngineConfig, EngineReport, PrefillEngine};
use kvferry_tcp::TcpProvider;
use kvferry_transport::conformance::absent;
use kvferry_transport::{Device, OpenError, Options, Provider};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::sync::{mpsc, oneshot};

const PATIENCE: Duration = Duration::from_secs(120);
/// 16 MiB a request.
const SPEC: &str = "layers=8,kv_heads=8,head_dim=128,dtype=bf16";
const TOKENS: u64 = 512;
const BLOCKS: u32 = 96;
/// Of each cable.
const MEGABITS: u32 = 200;

/// A host: a network namespace that lives as long as a process in it.
struct Host(Child);

impl Host {
    fn start() -> Result<Host, String> {
        let ours = std::fs::read_link("/proc/self/ns/net").map_err(|error| error.to_string())?;
        let mut unshare = Command::new("unshare");
        let child = unshare.args(["--net", "sleep", "600"]).stderr(Stdio::null()).spawn();
        let mut host = Host(child.map_err(|error| format!("unshare: {error}"))?);
        let late = Instant::now() + PATIENCE;
        while Instant::now() < late {
            if host.0.try_wait().is_ok_and(|ended| ended.is_some()) {
                return Err("unshare --net is not permitted".to_owned());
            }
            if std::fs::read_link(host.path()).is_ok_and(|theirs| theirs != ours) {
                return Ok(host);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Err("unshare --net does not come about".to_owned())
    }

    fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.0.id())
    }

    /// Runs a command there; what it prints.
    fn run(&self, command: &str) -> Result<String, String> {
        let mut nsenter = Command::new("nsenter");
        nsenter.arg(format!("--net={}", self.path())).args(command.split(' '));
        let output = nsenter.output().map_err(|error| format!("nsenter: {error}"))?;
        let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if !output.status.success() {
            return Err(format!("{command}: {}", said(&output.stderr).trim()));
        }
        Ok(said(&output.stdout))
    }

    /// Waits for a device to be up, which Linux says a while after it is: libraries look at what it says.
    fn wait_for(&self, device: &str) -> Result<(), String> {
        let late = Instant::now() + PATIENCE;
        while !self.run(&format!("ip -oneline link show dev {device}"))?.contains(" state UP ") {
            if Instant::now() >= late {
                return Err(format!("{device} does not come up"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Opens a device there, on the thread that is to own it.
    fn nic(&self, kind: TransportKind, name: String) -> OpenNic {
        let there = File::open(self.path()).unwrap();
        Box::new(move || {
            let io = |source: rustix::io::Errno| OpenError::Io {
                device: name.clone(),
                context: "its namespace",
                source: source.into(),
            };
            move_into_link_name_space(there.as_fd(), Some(LinkNameSpaceType::Network)).map_err(io)?;
            let provider: &dyn Provider =
                if kind == TransportKind::Tcp { &TcpProvider::new() } else { &LibfabricProvider::new() };
            provider.open(&Device { kind, name, unavailable: None }, &Options::default())
        })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One pair of hosts at a time: what another keeps from running looks like a slow cable.
static TURN: Mutex<()> = Mutex::new(());

/// Two hosts, and so many cables between them, whose ends are devices of one kind.
struct Hosts {
    prefill: Host,
    decode: Host,
    kind: TransportKind,
    rails: u32,
    _turn: MutexGuard<'static, ()>,
}

impl Hosts {
    fn cabled(kind: TransportKind, rails: u32) -> Result<Hosts, String> {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let hosts = Hosts { prefill: Host::start()?, decode: Host::start()?, kind, rails, _turn: turn };
        for rail in 0..rails {
            let there = hosts.decode.0.id();
            hosts.prefill.run(&format!("ip link add p{rail} type veth peer name d{rail} netns {there}"))?;
            for (host, side, last) in [(&hosts.prefill, 'p', 1), (&hosts.decode, 'd', 2)] {
                host.run(&format!("ip addr add 10.77.{rail}.{last}/24 dev {side}{rail}"))?;
                host.run(&format!("ip link set {side}{rail} up"))?;
            }
            hosts.throttle(rail, MEGABITS)?;
        }
        for rail in 0..rails {
            hosts.prefill.wait_for(&format!("p{rail}"))?;
            hosts.decode.wait_for(&format!("d{rail}"))?;
        }
        Ok(hosts)
    }

    /// None where there may be no namespaces, or is no library: said, and an error if they are required.
    fn new(kind: TransportKind, rails: u32) -> Option<Hosts> {
        if kind == TransportKind::Libfabric
            && let Some(reason) = LibfabricProvider::unavailable()
        {
            absent("libfabric", &reason);
            return None;
        }
        let without = |reason: &String| {
            absent("netns", &format!("{reason}; it needs root, unshare, nsenter, ip and tc with veth and tbf"));
        };
        Hosts::cabled(kind, rails).inspect_err(without).ok()
    }

    /// What the device at one end of a cable is called.
    fn device(&self, role: Role, rail: u32) -> String {
        let (side, last) = if role == Role::Prefill { ('p', 1) } else { ('d', 2) };
        if self.kind == TransportKind::Tcp { format!("10.77.{rail}.{last}") } else { format!("{side}{rail}") }
    }

    /// The second cable's device as paths name it, at the destination, and as whoever initiates and watches it does.
    fn devices(&self, direction: Direction) -> (String, String) {
        let initiator = if direction == Pull { Role::Decode } else { Role::Prefill };
        (self.device(Role::Decode, 1), self.device(initiator, 1))
    }

    /// What the prefill side sends over a cable.
    fn throttle(&self, rail: u32, megabits: u32) -> Result<(), String> {
        let shape = format!("tbf rate {megabits}mbit burst 256kb latency 50ms");
        self.prefill.run(&format!("tc qdisc replace dev p{rail} root {shape}")).map(drop)
    }
}

/// What is said of rails, and when.
#[derive(Debug, Default)]
struct Turns(Mutex<Vec<(Instant, String, RailHealth)>>);

impl Watch for Turns {
    fn happened(&self, event: &Event) {
        if let Event::RailTurned(turn) = event {
            self.0.lock().unwrap().push((Instant::now(), turn.device.clone(), turn.health));
        }
    }
}

impl Turns {
    /// How long after `since` a device became that.
    fn after(&self, since: Instant, device: &str, wanted: RailHealth) -> Option<Duration> {
        let turns = self.0.lock().unwrap();
        let found = turns.iter().find(|(at, of, health)| *at >= since && of == device && *health == wanted);
        found.map(|(at, ..)| at.duration_since(since))
    }
}

/// A scheduler, a prefill rank on one host and a decode rank on the other, each with a NIC at every cable.
struct Cluster {
    scheduler: Arc<SchedulerNode>,
    hosts: Hosts,
    turns: Arc<Turns>,
    engines: Vec<Running>,
    submitted: u64,
}

struct Running {
    ask: mpsc::UnboundedSender<oneshot::Sender<EngineReport>>,
}

impl Running {
    /// What it has found, once it has no more to do.
    async fn report(&self) -> EngineReport {
        let (to, report) = oneshot::channel();
        self.ask.send(to).unwrap();
        report.await.unwrap()
    }
}

impl Cluster {
    async fn start(hosts: Hosts, direction: Direction) -> Cluster {
        let turns: Arc<Turns> = Arc::default();
        let node = |number| NodeConfig::new(NodeId(number), Epoch(1));
        let scheduler = SchedulerNode::start(node(0), SchedulerTerms::default(), Box::new(LeastLoaded)).await.unwrap();
        let model = kvferry::Model::from_spec(SPEC).unwrap().model;
        let geometry = Arc::new(GroupGeometry { model, format: Default::default(), parallel: Default::default() });
        let mut engines = Vec::new();
        for (number, role) in [(1, Role::Prefill), (2, Role::Decode)] {
            let mut config = node(number);
            config.rails = RailTerms { rails_max: hosts.rails, ..RailTerms::default() };
            config.quarantine =
                QuarantineTerms { fence_after: Duration::from_millis(500), ..QuarantineTerms::default() };
            config.watchers.push(Arc::clone(&turns) as Arc<dyn Watch>);
            let host = if role == Role::Prefill { &hosts.prefill } else { &hosts.decode };
            let nics = (0..hosts.rails).map(|rail| host.nic(hosts.kind, hosts.device(role, rail))).collect();
            engines.push(rank(config, (role, direction), &geometry, scheduler.address(), nics).await);
        }
        Cluster { scheduler: Arc::new(scheduler), hosts, turns, engines, submitted: 0 }
    }

    /// Moves one request; what came by which device, and how long it took.
    async fn request(&mut self) -> (BTreeMap<String, u64>, Duration) {
        let (finished, took) = self.submit().await;
        by_device(&finished, took)
    }

    fn submit(&mut self) -> impl Future<Output = (Finished, Duration)> + use<> {
        self.submitted += 1;
        let request = RequestId(self.submitted);
        let spec = RequestSpec { request, tokens: TOKENS, prefix: Arc::default(), prefix_tokens: 512 };
        let (scheduler, began) = (Arc::clone(&self.scheduler), Instant::now());
        async move {
            let handover = scheduler.submit(spec).await;
            let ended = tokio::time::timeout(PATIENCE, handover).await.expect("the request did not end");
            (ended.unwrap(), began.elapsed())
        }
    }

    /// What a request takes once the rails' rates are known.
    async fn usual(&mut self) -> Duration {
        for _ in 0..4 {
            self.request().await;
        }
        self.request().await.1
    }

    /// Requests until a device carries again as much as its share.
    async fn until_even(&mut self, device: &str) -> u64 {
        let late = Instant::now() + PATIENCE;
        let mut requests = 0;
        loop {
            let (carried, _) = self.request().await;
            requests += 1;
            let all: u64 = carried.values().sum();
            if carried.get(device).is_some_and(|bytes| bytes * u64::from(self.hosts.rails) * 10 >= all * 8) {
                return requests;
            }
            assert!(Instant::now() < late, "{device} never came back: {carried:?}");
        }
    }

    /// Every byte that was brought is right, and nothing is left.
    async fn verify(self) {
        let late = Instant::now() + PATIENCE;
        for engine in &self.engines {
            let mut report = engine.report().await;
            // What was delivered last may not have been compared yet.
            while report.completed_requests < self.submitted && Instant::now() < late {
                tokio::time::sleep(Duration::from_millis(2)).await;
                report = engine.report().await;
            }
            assert_eq!(report.completed_requests, self.submitted, "{report:?}");
            assert_eq!((report.mismatched_bytes, report.leaked_blocks), (0, 0), "{report:?}");
        }
    }
}

fn by_device(finished: &Finished, took: Duration) -> (BTreeMap<String, u64>, Duration) {
    assert!(finished.outcome.is_delivered(), "{finished:?}");
    assert_eq!(finished.attempts, 1, "no handover failed: {finished:?}");
    let mut carried: BTreeMap<String, u64> = BTreeMap::new();
    for path in &finished.paths {
        *carried.entry(path.device.clone()).or_default() += path.bytes;
    }
    assert_eq!(carried.values().sum::<u64>(), TOKENS * 32_768, "each byte counts once: {carried:?}");
    (carried, took)
}

async fn rank(
    node: NodeConfig,
    (role, direction): (Role, Direction),
    geometry: &Arc<GroupGeometry>,
    scheduler: &str,
    nics: Vec<OpenNic>,
) -> Running {
    let layout = geometry.shard(Rank(0)).unwrap().layout(&[BLOCKS]);
    let pool = Pool::allocate(PoolId(0), layout, "rails").unwrap();
    let engine = EngineConfig {
        geometry: Arc::clone(geometry),
        rank: Rank(0),
        blocks: vec![BLOCKS],
        layers_per_step: None,
        reuse_prefix: false,
        seed: node.identity.node.0,
    };
    let mut engine: Box<dyn Engine> = match role {
        Role::Prefill => Box::new(PrefillEngine::new(engine, pool.clone()).unwrap()),
        Role::Decode => Box::new(DecodeEngine::new(engine, pool.clone()).unwrap()),
    };
    let (group, at) = (GroupId(node.identity.node.0 as u32), (NodeId(0), scheduler.to_owned()));
    let mut config = WorkerConfig::new(role, group, Rank(0), Arc::clone(geometry), vec![BLOCKS], at);
    config.direction = Some(direction);
    let mut worker = WorkerNode::start(node, config, pool, nics, ThreadOptions::default()).await.unwrap();
    let (ask, mut asked) = mpsc::unbounded_channel::<oneshot::Sender<EngineReport>>();
    tokio::spawn(async move {
        let port = worker.port();
        let mut emit = move |event| port.tell(event);
        let mut busy = false;
        loop {
            tokio::select! {
                biased;
                call = worker.next_call() => match call {
                    Some(call) => {
                        engine.handle(call, &mut emit);
                        busy = true;
                    }
                    None => return,
                },
                () = tokio::task::yield_now(), if busy => busy = engine.work(&mut emit),
                to = asked.recv(), if !busy => {
                    // Whoever asks no more has let the rank go.
                    let Some(to) = to else { return };
                    engine.audit();
                    let _ = to.send(engine.report());
                }
            }
        }
    });
    Running { ask }
}

/// Half a second of 16 MiB: what is submitted is in its midst.
async fn midst() {
    tokio::time::sleep(Duration::from_millis(150)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rails_share_within_a_tenth_of_even() {
    for (rails, direction) in [(2, Pull), (2, Push), (4, Pull), (4, Push)] {
        let Some(hosts) = Hosts::new(TransportKind::Tcp, rails) else { return };
        let mut cluster = Cluster::start(hosts, direction).await;
        let (mut carried, mut took) = (BTreeMap::<String, u64>::new(), Duration::ZERO);
        for _ in 0..6 {
            let (one, time) = cluster.request().await;
            one.into_iter().for_each(|(device, bytes)| *carried.entry(device).or_default() += bytes);
            took += time;
        }
        let even = carried.values().sum::<u64>() / u64::from(rails);
        let rate = even as f64 * f64::from(rails) / took.as_secs_f64() / 1e6;
        println!("{direction:?}, {rails} rails: {carried:?}, {rate:.0} MB/s");
        assert_eq!(carried.len() as u32, rails, "{carried:?}");
        assert!(carried.values().all(|bytes| bytes.abs_diff(even) * 10 <= even), "{carried:?}");
        cluster.verify().await;
    }
}

async fn a_cable_is_pulled_out_in_the_midst(kind: TransportKind, direction: Direction) {
    let Some(hosts) = Hosts::new(kind, 2) else { return };
    let mut cluster = Cluster::start(hosts, direction).await;
    let (device, of_initiator) = cluster.hosts.devices(direction);
    let usual = cluster.usual().await;
    let moving = cluster.submit();
    let moving = tokio::spawn(moving);
    midst().await;
    let pulled = Instant::now();
    cluster.hosts.decode.run("ip link set d1 down").unwrap();
    let (finished, took) = moving.await.unwrap();
    let (_, dip) = by_device(&finished, took);
    let noticed = cluster.turns.after(pulled, &of_initiator, RailHealth::Down).expect("nobody noticed");
    let (carried, alone) = cluster.request().await;
    assert!(!carried.contains_key(&device), "{carried:?}");
    let mended = Instant::now();
    cluster.hosts.decode.run("ip link set d1 up").unwrap();
    let requests = cluster.until_even(&device).await;
    let back = cluster.turns.after(mended, &of_initiator, RailHealth::Up).expect("it is back");
    println!(
        "{kind}, {direction:?}, pulled out: a handover of {usual:?} took {dip:?} (noticed after {noticed:?}), then {alone:?} over one rail; plugged in: \
         up after {back:?}, its share again after {requests} handovers and {:?}",
        mended.elapsed()
    );
    cluster.verify().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cable_that_is_pulled_out_in_the_midst_costs_time_only() {
    a_cable_is_pulled_out_in_the_midst(TransportKind::Tcp, Pull).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cable_that_is_pulled_out_in_the_midst_of_a_push_costs_time_only() {
    a_cable_is_pulled_out_in_the_midst(TransportKind::Tcp, Push).await;
}

async fn a_cable_becomes_a_tenth(kind: TransportKind, direction: Direction) {
    let Some(hosts) = Hosts::new(kind, 2) else { return };
    let mut cluster = Cluster::start(hosts, direction).await;
    let (device, of_initiator) = cluster.hosts.devices(direction);
    let usual = cluster.usual().await;
    let moving = tokio::spawn(cluster.submit());
    midst().await;
    let slowed = Instant::now();
    cluster.hosts.throttle(1, MEGABITS / 10).unwrap();
    let (finished, took) = moving.await.unwrap();
    let (_, dip) = by_device(&finished, took);
    let mut times = vec![dip];
    let late = Instant::now() + PATIENCE;
    let left_alone = loop {
        let of = |health| cluster.turns.after(slowed, &of_initiator, health);
        if let Some(noticed) = of(RailHealth::Slow).or_else(|| of(RailHealth::Down)) {
            break noticed;
        }
        assert!(Instant::now() < late, "nobody noticed: {times:?}");
        times.push(cluster.request().await.1);
    };
    let (_, avoided) = cluster.request().await;
    let mended = Instant::now();
    cluster.hosts.throttle(1, MEGABITS).unwrap();
    let requests = cluster.until_even(&device).await;
    println!(
        "{kind}, {direction:?}, a tenth: handovers of {usual:?} took {times:?} until it was left alone after {left_alone:?}, then {avoided:?}; mended: \
         its share again after {requests} handovers and {:?}",
        mended.elapsed()
    );
    cluster.verify().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cable_of_a_tenth_costs_time_only() {
    a_cable_becomes_a_tenth(TransportKind::Tcp, Pull).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cable_of_a_tenth_costs_a_push_time_only() {
    a_cable_becomes_a_tenth(TransportKind::Tcp, Push).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cable_of_libfabric_that_is_pulled_out_in_the_midst_costs_time_only() {
    a_cable_is_pulled_out_in_the_midst(TransportKind::Libfabric, Pull).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cable_of_libfabric_that_is_pulled_out_in_the_midst_of_a_push_costs_time_only() {
    a_cable_is_pulled_out_in_the_midst(TransportKind::Libfabric, Push).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cable_of_libfabric_of_a_tenth_costs_time_only() {
    a_cable_becomes_a_tenth(TransportKind::Libfabric, Pull).await;
}
