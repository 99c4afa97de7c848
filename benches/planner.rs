//! What planning, lowering and encoding one pair of ranks costs: Llama-3.1-70B from tp=8 to tp=4.

#![allow(missing_docs, reason = "criterion's macros define public items")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kvferry_core::{
    BlockTable, End, Format, GroupGeometry, Model, Order, PairPlan, Parallel, PlanRequest, PoolLayout, Program, Rank,
    Tables,
};

const SOURCE: Rank = Rank(3);
const DESTINATION: Rank = Rank(1);
const BLOCK_TOKENS: u32 = 16;

struct Case {
    from: GroupGeometry,
    to: GroupGeometry,
    source: Tables,
    destination: Tables,
    source_layout: PoolLayout,
    destination_layout: PoolLayout,
    tokens: u64,
}

impl Case {
    fn new(tp: u32, order: Order, blocks: u32) -> Case {
        let geometry = |tp| GroupGeometry {
            model: Model::preset("llama-3.1-70b").unwrap_or_else(|| unreachable!("a preset")),
            format: Format { block_tokens: BLOCK_TOKENS, order, ..Format::default() },
            parallel: Parallel { tp, ..Parallel::default() },
        };
        let (from, to) = (geometry(8), geometry(tp));
        let layout = |geometry: &GroupGeometry, rank| match geometry.shard(rank) {
            Ok(shard) => shard.layout(&[2 * blocks]),
            Err(error) => unreachable!("{error}"),
        };
        // Odd blocks only: nothing lies next to its neighbour, so every block is a piece.
        let scattered = |step: u32| {
            let ids: Vec<u32> = (0..blocks).map(|index| 2 * (index.wrapping_mul(step) % blocks)).collect();
            Tables { groups: vec![BlockTable::known(0, ids)] }
        };
        let rank = if tp == 8 { SOURCE } else { DESTINATION };
        let (source_layout, destination_layout) = (layout(&from, SOURCE), layout(&to, rank));
        let tokens = u64::from(blocks) * u64::from(BLOCK_TOKENS);
        Case { from, to, source: scattered(17), destination: scattered(29), source_layout, destination_layout, tokens }
    }

    fn pair(&self) -> PairPlan {
        let rank = if self.to.parallel.tp == 8 { SOURCE } else { DESTINATION };
        PairPlan::new(&self.from, SOURCE, &self.to, rank).unwrap_or_else(|error| unreachable!("{error}"))
    }

    fn program(&self, pair: &PairPlan) -> Program {
        let (source, destination) = (&self.source, &self.destination);
        let request = PlanRequest { tokens: self.tokens, have: 0, layers: 0..80, source, destination };
        pair.program(&request).unwrap_or_else(|error| unreachable!("{error}"))
    }
}

fn plan(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("plan");
    for blocks in [512, 8192] {
        let case = Case::new(4, Order::Nhd, blocks);
        let pair = case.pair();
        group.bench_function(BenchmarkId::new("pair, cached", blocks), |bench| {
            bench.iter(|| case.program(black_box(&pair)))
        });
        group
            .bench_function(BenchmarkId::new("pair, first", blocks), |bench| bench.iter(|| case.program(&case.pair())));
        let program = case.program(&pair);
        group.bench_function(BenchmarkId::new("validate one end", blocks), |bench| {
            bench.iter(|| black_box(&program).validate(End::Source, &case.source_layout));
        });
        group.bench_function(BenchmarkId::new("split in 8", blocks), |bench| {
            bench.iter(|| black_box(&program).split(8))
        });
    }
    group.finish();
}

/// Blocks of 4 KiB: a head of 16 tokens. `tp8 to tp8` in either order and `tp8 to tp4` head-major are one piece a block; token-major
/// `tp8 to tp4` is 16 pieces of 256 bytes a block.
fn lower(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lower");
    for (name, tp, order) in
        [("tp8 to tp8", 8, Order::Nhd), ("tp8 to tp4 hnd", 4, Order::Hnd), ("tp8 to tp4 nhd", 4, Order::Nhd)]
    {
        let case = Case::new(tp, order, 512);
        let program = case.program(&case.pair());
        let (whole, source, destination) = (program.whole(), &case.source_layout, &case.destination_layout);
        group.throughput(Throughput::Elements(program.copies(whole, source, destination).count() as u64));
        group.bench_function(BenchmarkId::new("copies", name), |bench| {
            bench.iter(|| {
                program
                    .copies(whole, source, destination)
                    .fold(0u64, |sum, copy| sum ^ copy.source.offset ^ copy.destination.offset)
            });
        });
        group.throughput(Throughput::Elements(program.spans(End::Source, whole, source).count() as u64));
        group.bench_function(BenchmarkId::new("spans", name), |bench| {
            bench.iter(|| program.spans(End::Source, whole, source).fold(0u64, |sum, span| sum ^ span.at.offset));
        });
        group.throughput(Throughput::Elements(program.tiles(whole, source, destination).count() as u64));
        group.bench_function(BenchmarkId::new("tiles", name), |bench| {
            bench.iter(|| program.tiles(whole, source, destination).fold(0u64, |sum, tile| sum ^ tile.source.offset));
        });
    }
    group.finish();
}

fn encode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("encode");
    for blocks in [512, 8192] {
        let case = Case::new(4, Order::Nhd, blocks);
        let program = case.program(&case.pair()).without(End::Destination);
        let mut bytes = Vec::new();
        program.encode(&mut bytes);
        group.throughput(Throughput::Elements(u64::from(blocks)));
        group.bench_function(BenchmarkId::new("encode", blocks), |bench| {
            bench.iter(|| {
                bytes.clear();
                black_box(&program).encode(&mut bytes);
            });
        });
        group.bench_function(BenchmarkId::new("decode", blocks), |bench| {
            bench.iter(|| Program::decode(black_box(&bytes)))
        });
    }
    group.finish();
}

criterion_group!(benches, plan, lower, encode);
criterion_main!(benches);
