//! What a handover costs beside its bytes: three nodes in one process, one 4 KiB block, alone and many at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use kvferry::{
    ControlMessage, Direction, Event, FetchCourse, GroupId, HandoverId, Metrics, Moment, NodeConfig, NodeId, Outcome,
    PathReport, Rank, RequestId, Standing, TransportKind, Watch,
};
use kvferry_benches::{Error, Nodes};
use tokio::runtime::Builder;

/// 16 tokens of one head of 64 elements in 16 bits, K and V: two pieces of 2 KiB.
const GEOMETRY: &str = "layers=1,kv_heads=1,head_dim=64,dtype=bf16";
const BURST: u64 = 64;

fn handover(criterion: &mut Criterion) {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut group = criterion.benchmark_group("handover");
    group.sample_size(20);
    for kind in [TransportKind::Shm, TransportKind::Tcp] {
        for direction in [Direction::Pull, Direction::Push] {
            let mut nodes =
                runtime.block_on(Nodes::start(GEOMETRY, kind, direction, [None, None])).expect("three nodes");
            runtime.block_on(nodes.handovers(BURST, 16)).expect("a warm-up");
            group.throughput(criterion::Throughput::Elements(1));
            group.bench_function(format!("{kind}/{direction:?}/alone").to_lowercase(), |bencher| {
                bencher.iter(|| runtime.block_on(nodes.handover(16)).expect("a handover"));
            });
            group.throughput(criterion::Throughput::Elements(BURST));
            group.bench_function(format!("{kind}/{direction:?}/burst of {BURST}").to_lowercase(), |bencher| {
                bencher.iter(|| runtime.block_on(nodes.handovers(BURST, 16)).expect("a burst"));
            });
            let finished = runtime.block_on(async {
                let mut waits = Vec::new();
                for _ in 0..200 {
                    let finished = nodes.handover(16).await.expect("a handover");
                    if let (Some(ready), Some(settled)) = (finished.ready_at, finished.settled_at) {
                        waits.push(settled.since(ready));
                    }
                }
                waits.sort();
                waits
            });
            if let (Some(p50), Some(p99)) = (finished.get(finished.len() / 2), finished.get(finished.len() * 99 / 100))
            {
                println!("handover/{kind}/{direction:?}: last rank ready -> Delivered p50 {p50:?}, p99 {p99:?}");
            }
            runtime.block_on(nodes.shutdown());
        }
    }
    group.finish();
}

/// Rounds of handovers with and without metrics, in turn, and handovers of each.
const ROUNDS: usize = 40;
const HANDOVERS: u32 = 100;
/// Handovers of which the time in metrics is summed up.
const SHARED: u32 = 5000;

/// What metrics cost: the same handovers at nodes that are watched and at nodes that are not, in turn. Nodes are made anew for every round: where their
/// threads run and their memory lies makes more of a difference than metrics do.
fn metrics(_: &mut Criterion) {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut each = [Vec::new(), Vec::new()];
    for round in 0..ROUNDS {
        // Who is first takes turns, too.
        for which in [round % 2, 1 - round % 2] {
            each[which].push(runtime.block_on(time(which == 1)).expect("a round"));
        }
    }
    let mut ratios: Vec<f64> =
        each[0].iter().zip(&each[1]).map(|(without, with)| with.as_secs_f64() / without.as_secs_f64()).collect();
    ratios.sort_by(f64::total_cmp);
    let [without, with] = each.map(|mut times| {
        times.sort();
        times[times.len() / 2]
    });
    let [low, middle, high] = [1, 2, 3].map(|quarter| ratios[ratios.len() * quarter / 4]);
    println!(
        "handover/metrics: {without:?} without, {with:?} with; with / without by round: {middle:.3} ({low:.3}-{high:.3})"
    );
    runtime.block_on(share()).expect("watched nodes");
    // What a watcher does for one handover, by itself.
    let (metrics, course) = (Metrics::new(), Event::FetchEnded(Box::new(course())));
    let begun = Instant::now();
    for _ in 0..ALONE {
        metrics.happened(&course);
    }
    println!("handover/metrics: {:?} for the record of one part", begun.elapsed() / ALONE);
}

/// Metrics that know how long they took, with the clock's own time.
#[derive(Debug, Default)]
struct Timed {
    metrics: Metrics,
    nanoseconds: AtomicU64,
    calls: AtomicU64,
}

impl Timed {
    fn time(&self, call: impl FnOnce(&Metrics)) {
        let begun = Instant::now();
        call(&self.metrics);
        self.nanoseconds.fetch_add(begun.elapsed().as_nanos() as u64, Ordering::Relaxed);
        self.calls.fetch_add(1, Ordering::Relaxed);
    }
}

impl Watch for Timed {
    fn stands(&self, node: &Standing) {
        self.metrics.stands(node);
    }

    fn happened(&self, event: &Event) {
        self.time(|metrics| metrics.happened(event));
    }

    fn said(&self, peer: NodeId, sent: bool, message: &ControlMessage) {
        self.time(|metrics| metrics.said(peer, sent, message));
    }

    fn ended(&self) {
        self.metrics.ended();
    }
}

/// How much of a handover's time is spent in the metrics of all three nodes together, as if nothing of it were beside the way.
async fn share() -> Result<(), Error> {
    let timed = Arc::new(Timed::default());
    let watch = |config: &mut NodeConfig| config.watchers.push(Arc::clone(&timed) as Arc<dyn Watch>);
    let (kind, direction) = (TransportKind::Shm, Direction::Pull);
    let mut nodes = Nodes::start_watched(GEOMETRY, kind, direction, [None, None], watch).await?;
    nodes.handovers(BURST, 16).await?;
    let spent = || (timed.nanoseconds.load(Ordering::Relaxed), timed.calls.load(Ordering::Relaxed));
    let (before, mut times) = (spent(), Vec::new());
    for _ in 0..SHARED {
        let begun = Instant::now();
        nodes.handover(16).await?;
        times.push(begun.elapsed());
    }
    let after = spent();
    nodes.shutdown().await;
    times.sort();
    let median = times[times.len() / 2].as_secs_f64() * 1e6;
    let each = |(from, to): (u64, u64)| (to - from) as f64 / f64::from(SHARED);
    let (taken, calls) = (each((before.0, after.0)) / 1e3, each((before.1, after.1)));
    // What the clock takes of that.
    let clock = Timed::default();
    (0..ALONE).for_each(|_| clock.time(|_| {}));
    let clock = clock.nanoseconds.load(Ordering::Relaxed) as f64 / f64::from(ALONE) / 1e3 * calls;
    println!(
        "handover/metrics: {:.2} us in {calls:.0} calls of three nodes' metrics ({clock:.2} us of the clock beside that), of {median:.1} us for a \
         handover: {:.2} %",
        taken - clock,
        (taken - clock) / median * 100.0
    );
    Ok(())
}

/// The median time of handovers at new nodes.
async fn time(watched: bool) -> Result<Duration, Error> {
    let watch = |config: &mut NodeConfig| {
        if watched {
            config.watchers.push(Arc::new(Metrics::new()));
        }
    };
    let (kind, direction) = (TransportKind::Shm, Direction::Pull);
    let mut nodes = Nodes::start_watched(GEOMETRY, kind, direction, [None, None], watch).await?;
    nodes.handovers(BURST, 16).await?;
    let mut times = Vec::new();
    for _ in 0..HANDOVERS {
        let begun = Instant::now();
        nodes.handover(16).await?;
        times.push(begun.elapsed());
    }
    nodes.shutdown().await;
    times.sort();
    Ok(times[times.len() / 2])
}

const ALONE: u32 = 1_000_000;

/// A part that went well, from two sources.
fn course() -> FetchCourse {
    let at = |microseconds: u64| Moment(microseconds * 1000);
    let path = |source| PathReport {
        source_group: GroupId(1),
        source: Rank(source),
        destination_group: GroupId(2),
        destination: Rank(0),
        kind: TransportKind::Shm,
        device: "memory".to_owned(),
        direction: Direction::Pull,
        bytes: 1 << 20,
        pieces: 256,
    };
    FetchCourse {
        handover: HandoverId(1),
        request: RequestId(1),
        asked: at(0),
        placed: Some(at(10)),
        planned: Some(at(60)),
        posted: Some(at(61)),
        moved: Some(at(200)),
        settled: at(260),
        posting: Duration::from_micros(2),
        outcome: Outcome::Delivered,
        paths: vec![path(0), path(1)],
    }
}

criterion_group!(benches, handover, metrics);
criterion_main!(benches);
