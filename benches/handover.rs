//! What a handover costs beside its bytes: three nodes in one process, one 4 KiB block, alone and many at once.

use criterion::{Criterion, criterion_group, criterion_main};
use kvferry::{Direction, TransportKind};
use kvferry_benches::Nodes;
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

criterion_group!(benches, handover);
criterion_main!(benches);
