//! Whole handovers between groups that are cut and stored differently.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Bench, Setup, freed, spec};
use kvferry_core::{
    Dtype, Extent, Format, KvPlacement, LayerGroup, Model, Order, Parallel, PlanePlacement, Sharding, Tensor,
};

fn tp(tp: u32) -> Parallel {
    Parallel { tp, ..Parallel::default() }
}

fn block(block_tokens: u32) -> Format {
    Format { block_tokens, ..Format::default() }
}

fn attention(layers: Vec<u32>, heads: u32, extent: Extent, dtype: Dtype) -> LayerGroup {
    let tensor = |name: &str| Tensor { name: name.to_owned(), heads, elements: 24, sharding: Sharding::Heads };
    let tensors = vec![tensor("k"), tensor("v")];
    LayerGroup { name: format!("{extent:?}"), layers, dtype, extent, tensors }
}

fn heads(heads: u32) -> Model {
    let group = attention((0..5).collect(), heads, Extent::Full, Dtype::Bf16);
    Model { name: "heads".to_owned(), layers: 5, groups: vec![group] }
}

fn windowed() -> Model {
    let groups = vec![
        attention(vec![0, 2, 4], 2, Extent::Window { tokens: 40 }, Dtype::Bf16),
        attention(vec![1, 3, 5], 2, Extent::Full, Dtype::Fp8E4m3),
    ];
    Model { name: "windowed".to_owned(), layers: 6, groups }
}

fn stateful() -> Model {
    let section =
        |name: &str, heads, elements| Tensor { name: name.to_owned(), heads, elements, sharding: Sharding::Heads };
    let convolution = LayerGroup {
        name: "convolution".to_owned(),
        layers: vec![0, 1, 2],
        dtype: Dtype::Bf16,
        extent: Extent::State,
        tensors: vec![section("q", 4, 9), section("k", 4, 9), section("v", 8, 9)],
    };
    let recurrent = LayerGroup {
        name: "recurrent".to_owned(),
        dtype: Dtype::F32,
        tensors: vec![section("state", 8, 100)],
        ..convolution.clone()
    };
    let attention = attention(vec![3], 2, Extent::Full, Dtype::Bf16);
    Model { name: "stateful".to_owned(), layers: 4, groups: vec![attention, convolution, recurrent] }
}

fn latent() -> Model {
    let tensor = |name: &str, heads, elements, sharding| Tensor { name: name.to_owned(), heads, elements, sharding };
    let group = LayerGroup {
        name: "latent".to_owned(),
        layers: (0..3).collect(),
        dtype: Dtype::Fp8E4m3,
        extent: Extent::Full,
        tensors: vec![tensor("latent", 1, 71, Sharding::Replicated), tensor("uneven", 7, 5, Sharding::HeadsUneven)],
    };
    Model { name: "latent".to_owned(), layers: 3, groups: vec![group] }
}

/// Requests of several lengths, all of whose bytes arrive, are counted exactly and leave nothing behind.
fn check(name: &str, setup: &Setup) {
    let mut bench = Bench::new(setup);
    let mut expected = 0;
    for (number, tokens) in [1u64, 15, 16, 100, 0, 133].into_iter().enumerate() {
        let number = number as u64;
        let moved = bench.hand_over(number, &spec(number, tokens, 0, &[]));
        let bytes = setup.destination.bytes_expected(tokens, 0);
        assert_eq!(moved, bytes, "{name}: {tokens} tokens");
        expected += bytes;
        assert!(bench.decode.iter().all(|node| freed(&node.events, number)), "{name}");
    }
    let report = bench.report();
    assert_eq!(report.first_mismatch, None, "{name}");
    assert_eq!(report.verified_bytes, expected, "{name}");
    assert_eq!(report.completed_requests, 6 * bench.decode.len() as u64, "{name}");
    bench.assert_quiet();
}

#[test]
fn tensor_parallel_sizes() {
    check("tp 2 to 4", &Setup::new(heads(4), (tp(2), block(16)), (tp(4), block(16))));
    check("tp 4 to 1", &Setup::new(heads(4), (tp(4), block(16)), (tp(1), block(16))));
    check("tp 3 to 6", &Setup::new(heads(6), (tp(3), block(16)), (tp(6), block(16))));
    check("tp 3 to 2", &Setup::new(heads(6), (tp(3), block(16)), (tp(2), block(16))));
    check("copies to copies", &Setup::new(heads(2), (tp(8), block(16)), (tp(4), block(16))));
    check("copies to parts", &Setup::new(heads(4), (tp(8), block(16)), (tp(2), block(16))));
    check("parts to copies", &Setup::new(heads(4), (tp(2), block(16)), (tp(8), block(16))));
    check("replicas", &Setup::new(latent(), (tp(4), block(16)), (tp(3), block(16))));
}

#[test]
fn pipelines() {
    let staged = |stages: Vec<Vec<core::ops::Range<u32>>>| Parallel {
        pp: stages.len() as u32,
        tp: 2,
        stages,
        ..Parallel::default()
    };
    let uneven = staged(vec![vec![0..1, 3..4], vec![1..3, 4..5]]);
    check(
        "uneven to even",
        &Setup::new(heads(4), (uneven.clone(), block(16)), (Parallel { pp: 2, ..Parallel::default() }, block(16))),
    );
    check(
        "even to uneven",
        &Setup::new(heads(4), (Parallel { pp: 3, ..Parallel::default() }, block(16)), (uneven, block(16))),
    );
    let stage = |pp| Parallel { pp, ..Parallel::default() };
    check("stages without layers of a group", &Setup::new(stateful(), (stage(4), block(16)), (stage(2), block(16))));
}

#[test]
fn blocks_and_orders() {
    for (from, to) in [(16, 64), (64, 16), (32, 48), (24, 40), (7, 16)] {
        for (from_order, to_order) in [(Order::Nhd, Order::Hnd), (Order::Hnd, Order::Hnd), (Order::Hnd, Order::Nhd)] {
            for (kv, planes) in
                [(KvPlacement::Separate, PlanePlacement::PerLayer), (KvPlacement::Interleaved, PlanePlacement::One)]
            {
                let source = Format { block_tokens: from, order: from_order, kv, planes };
                let destination = Format { block_tokens: to, order: to_order, ..Format::default() };
                let setup = Setup::new(heads(4), (tp(2), source.clone()), (tp(4), destination.clone()));
                check(&format!("{source:?} to {destination:?}"), &setup);
                let setup = Setup::new(latent(), (tp(2), destination.clone()), (tp(1), source.clone()));
                check(&format!("{destination:?} to {source:?}"), &setup);
            }
        }
    }
}

#[test]
fn windows_and_state() {
    let hnd = Format { order: Order::Hnd, kv: KvPlacement::Interleaved, ..block(32) };
    check("window", &Setup::new(windowed(), (tp(1), block(16)), (tp(2), hnd.clone())));
    check("window, copies", &Setup::new(windowed(), (tp(4), block(24)), (tp(1), block(16))));
    check("state", &Setup::new(stateful(), (tp(1), block(16)), (tp(2), hnd.clone())));
    check("state, parts", &Setup::new(stateful(), (tp(4), hnd), (tp(2), block(16))));
}

#[test]
fn attention_data_parallelism() {
    let adp = |tp, adp| Parallel { tp, adp, ..Parallel::default() };
    let setup = Setup::new(heads(4), (adp(4, 2), block(16)), (adp(4, 4), block(16)));
    check("adp", &Setup { source_dp: 1, destination_dp: 3, ..setup });
    let setup = Setup::new(latent(), (adp(6, 3), block(16)), (tp(2), block(16)));
    check("adp, replicas", &Setup { source_dp: 2, ..setup });
}

#[test]
fn context_parallelism() {
    let cp = |tp, cp| Parallel { tp, cp, ..Parallel::default() };
    check("cp 2 to 1", &Setup::new(heads(4), (cp(2, 2), block(16)), (tp(4), block(16))));
    check("cp 2 to 3", &Setup::new(heads(4), (cp(1, 2), block(16)), (cp(2, 3), block(24))));
    check("cp, window", &Setup::new(windowed(), (tp(2), block(16)), (cp(1, 2), block(16))));
    check("cp, state", &Setup::new(stateful(), (cp(1, 2), block(16)), (cp(2, 2), block(16))));
}

#[test]
fn layers_step_by_step() {
    for each in [1, 2, 4] {
        let setup = Setup::new(windowed(), (Parallel { pp: 2, ..tp(1) }, block(16)), (tp(2), block(16)));
        check(&format!("{each} layers per step"), &Setup { layers_per_step: Some(each), ..setup });
    }
}

#[test]
fn presets() {
    for name in ["gpt-oss-120b", "qwen3-next", "deepseek-r1"] {
        let model = Model::preset(name).unwrap();
        let setup = Setup::new(model, (tp(2), block(64)), (tp(1), block(128)));
        let setup = Setup { blocks: 3, ..setup };
        let mut bench = Bench::new(&setup);
        let moved = bench.hand_over(1, &spec(1, 150, 0, &[]));
        assert_eq!(moved, setup.destination.bytes_expected(150, 0), "{name}");
        assert_eq!(bench.report().verified_bytes, moved, "{name}");
        bench.assert_quiet();
    }
}
