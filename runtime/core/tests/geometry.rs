//! Geometry against the numbers and formulas of the field.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use kvferry_core::{
    BlockTable, Dtype, Extent, Format, GeometryError, GroupGeometry, KvPlacement, Model, Order, PairPlan, Parallel,
    PlanError, PlanRequest, PlanePlacement, Rank, Sharding, SpecError, TableShape, Tables, destinations, sources,
};
use proptest::prelude::*;

fn geometry(model: &str, tp: u32, pp: u32, block_tokens: u32) -> GroupGeometry {
    GroupGeometry {
        model: Model::preset(model).unwrap(),
        format: Format { block_tokens, ..Format::default() },
        parallel: Parallel { tp, pp, ..Parallel::default() },
    }
}

fn shapes(geometry: &GroupGeometry, rank: Rank, tokens: u64) -> Tables {
    let group = |index| BlockTable::from(geometry.blocks_for(index, tokens, rank));
    Tables { groups: (0..geometry.model.groups.len()).map(group).collect() }
}

fn bytes(from: &GroupGeometry, source: Rank, to: &GroupGeometry, destination: Rank, tokens: u64) -> u64 {
    let plan = PairPlan::new(from, source, to, destination).unwrap();
    let (source, destination) = (shapes(from, source, tokens), shapes(to, destination, tokens));
    let layers = 0..from.model.layers;
    plan.program(&PlanRequest { tokens, have: 0, layers, source: &source, destination: &destination }).unwrap().bytes()
}

#[test]
fn presets_have_the_published_sizes() {
    for (name, per_token) in [
        ("llama-3.1-8b", 131_072),
        ("llama-3.1-70b", 327_680),
        ("qwen3-32b", 262_144),
        ("qwen3-235b", 192_512),
        ("deepseek-r1", 70_272),
        ("gpt-oss-120b", 36_864),
        ("qwen3-next", 24_576),
        ("tiny", 4 * 2 * 4 * 32 * 2),
    ] {
        assert_eq!(Model::preset(name).unwrap().bytes_per_token(), per_token, "{name}");
    }
    for name in Model::PRESETS {
        geometry(name, 1, 1, 16).validate().unwrap();
    }
    assert!(Model::preset("llama").is_none());
    let next = Model::preset("qwen3-next").unwrap();
    assert_eq!(next.state_bytes(), 36 * ((48 << 10) + (2 << 20)));
    // The window's part does not grow beyond 128 tokens: 4.5 MiB.
    let gpt = geometry("gpt-oss-120b", 1, 1, 16);
    assert_eq!(gpt.bytes_expected(8192, 0), 8192 * 36_864 + 128 * 36_864);
    assert_eq!(gpt.bytes_expected(8192, 8192), 128 * 36_864);
}

#[test]
fn duplicated_heads_and_latents_count_at_every_rank_that_holds_them() {
    // Published: 8 ranks of Qwen3-235B take each of its 4 heads twice.
    assert_eq!(geometry("qwen3-235b", 8, 1, 16).bytes_expected(32_768, 0), 32_768 * 385_024);
    assert_eq!(geometry("deepseek-r1", 4, 1, 64).bytes_expected(100, 0), 4 * 100 * 70_272);
}

#[test]
fn only_the_ranks_that_take_part_share_the_bytes() {
    let mut parts = geometry("llama-3.1-70b", 8, 2, 16);
    let whole = parts.bytes_expected_by_a_rank(64, 0);
    assert_eq!(whole, parts.bytes_expected(64, 0) / 16);
    parts.parallel.adp = 4;
    assert_eq!(parts.owners(0).len(), 4);
    assert_eq!(parts.bytes_expected_by_a_rank(64, 0), 4 * whole);
    parts.parallel.adp = 0;
    assert_eq!(parts.bytes_expected_by_a_rank(0, 0), 0, "no division by what a peer says");
}

#[test]
fn peers_are_those_of_the_rank_formulas() {
    let peers = |from: &GroupGeometry, to: &GroupGeometry, rank| -> Vec<u32> {
        destinations(from, Rank(rank), to, 0).unwrap().into_iter().map(|rank| rank.0).collect()
    };
    let (tp2, tp4) = (geometry("llama-3.1-70b", 2, 1, 16), geometry("llama-3.1-70b", 4, 1, 16));
    assert_eq!(peers(&tp2, &tp4, 1), [2, 3]);
    assert_eq!(peers(&tp4, &tp2, 3), [1]);
    let pp2 = geometry("llama-3.1-70b", 2, 2, 16);
    assert_eq!(peers(&tp4, &pp2, 3), [1, 3], "rank = pp * (tp * cp) + tp * cp + cp");
    assert_eq!(peers(&pp2, &tp4, 2), [0, 1]);
    let mut uneven = pp2.clone();
    uneven.parallel.stages = vec![vec![0..50], vec![50..80]];
    assert_eq!(peers(&uneven, &pp2, 0), [0, 2], "layers 0..50 against 0..40 and 40..80");
    assert_eq!(peers(&uneven, &pp2, 3), [3]);

    let mut parts = geometry("llama-3.1-70b", 8, 1, 16);
    parts.parallel.adp = 2;
    assert_eq!(parts.owners(1), [4, 5, 6, 7].map(Rank));
    assert_eq!(sources(&parts, 1, &tp2, Rank(1)).unwrap(), [6, 7].map(Rank));
    assert_eq!(destinations(&tp2, Rank(0), &parts, 1).unwrap(), [4, 5].map(Rank));
    assert!(parts.owners(2).is_empty());

    let mut shared = geometry("llama-3.1-70b", 2, 2, 16);
    shared.parallel.cp = 2;
    let coords = shared.shard(Rank(6)).unwrap().coords;
    assert_eq!((coords.pp, coords.tp, coords.cp), (1, 1, 0));
    assert_eq!(shared.owners(0).len(), 8);
}

#[test]
fn replicas_share_the_work() {
    // Two ranks hold each head; each serves half of the layers to each destination.
    let (from, to) = (geometry("qwen3-235b", 8, 1, 16), geometry("qwen3-235b", 4, 1, 16));
    let whole = 64 * 192_512 / 4;
    assert_eq!([0, 1].map(|rank| bytes(&from, Rank(rank), &to, Rank(0), 64)), [whole / 2; 2]);
    assert_eq!([2, 3].map(|rank| bytes(&from, Rank(rank), &to, Rank(1), 64)), [whole / 2; 2]);
    // 61 latent layers from four replicas: 16 + 15 + 15 + 15.
    let (from, to) = (geometry("deepseek-r1", 4, 1, 16), geometry("deepseek-r1", 1, 1, 64));
    let layers = [0, 1, 2, 3].map(|rank| bytes(&from, Rank(rank), &to, Rank(0), 10) / (10 * 1152));
    assert_eq!(layers, [16, 15, 15, 15]);
}

#[test]
fn metadata_does_not_grow_with_layers() {
    let (from, to) = (geometry("llama-3.1-70b", 8, 1, 16), geometry("llama-3.1-70b", 4, 1, 16));
    let plan = PairPlan::new(&from, Rank(3), &to, Rank(1)).unwrap();
    let source = Tables { groups: vec![BlockTable::known(0, (0..512).collect::<Vec<u32>>())] };
    let destination = shapes(&to, Rank(1), 8192);
    let request = PlanRequest { tokens: 8192, have: 0, layers: 0..80, source: &source, destination: &destination };
    let program = plan.program(&request).unwrap();
    assert_eq!(program.segments.len(), 2, "K and V");
    assert_eq!(program.bytes(), 8192 * 327_680 / 8);
    let mut encoded = Vec::new();
    program.encode(&mut encoded);
    assert!(encoded.len() < 512 * 4 + 400, "{}", encoded.len());
}

#[test]
fn interleaved_tensors_move_as_one_piece() {
    for order in [Order::Nhd, Order::Hnd] {
        let mut geometry = geometry("llama-3.1-8b", 2, 1, 16);
        geometry.format.kv = KvPlacement::Interleaved;
        geometry.format.order = order;
        let plan = PairPlan::new(&geometry, Rank(1), &geometry, Rank(1)).unwrap();
        let tables = Tables { groups: vec![BlockTable::known(0, vec![6, 2, 4, 0])] };
        let request = PlanRequest { tokens: 64, have: 0, layers: 0..32, source: &tables, destination: &tables };
        let program = plan.program(&request).unwrap();
        let layout = geometry.shard(Rank(1)).unwrap().layout(&[8]);
        assert_eq!(program.copies(program.whole(), &layout, &layout).count(), 32 * 4, "{order:?}");
    }
}

#[test]
fn a_mismatch_lists_every_field() {
    let here = Model::preset("llama-3.1-8b").unwrap();
    let mut there = here.clone();
    there.name = "a copy".to_owned();
    here.mismatch(&there).unwrap();
    there.groups[0].dtype = Dtype::Fp8E4m3;
    there.groups[0].tensors[1].heads = 4;
    there.groups[0].layers.truncate(30);
    there.groups[0].extent = Extent::Window { tokens: 128 };
    let error = here.mismatch(&there).unwrap_err();
    let text = error.to_string();
    for part in [
        "groups[0].dtype: bf16 here, fp8 there",
        "groups[0].tensors[1].heads: 8 here, 4 there",
        "groups[0].layers: 0-31 here, 0-29 there",
        "groups[0].extent: Full here, Window { tokens: 128 } there",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!(error.fields.len(), 4);
    let from = geometry("llama-3.1-8b", 1, 1, 16);
    let mut to = from.clone();
    to.model = there;
    let refused = PairPlan::new(&from, Rank(0), &to, Rank(0)).unwrap_err();
    assert_eq!(refused, PlanError::Model(error));
}

#[test]
fn impossible_geometries_are_refused_with_the_reason() {
    let error = geometry("llama-3.1-8b", 3, 1, 16).validate().unwrap_err();
    assert!(error.to_string().contains("8 heads cannot be divided over 3 ranks"), "{error}");
    let mut uneven = geometry("llama-3.1-8b", 3, 1, 16);
    for tensor in &mut uneven.model.groups[0].tensors {
        tensor.sharding = Sharding::HeadsUneven;
    }
    let heads = [0, 1, 2].map(|rank| uneven.shard(Rank(rank)).unwrap().groups[0].tensors[0].heads.clone());
    assert_eq!(heads, [0..3, 3..6, 6..8]);
    assert!(matches!(uneven.shard(Rank(3)), Err(GeometryError::NoSuchRank { .. })));

    let mut holes = geometry("tiny", 1, 2, 16);
    holes.parallel.stages = vec![vec![0..2], vec![3..4]];
    assert!(matches!(holes.validate(), Err(GeometryError::StageCover { layer: 2, stages: 0, .. })));
    holes.parallel.stages = vec![vec![0..4]];
    assert!(matches!(holes.validate(), Err(GeometryError::StageCount { .. })));
    let mut odd = geometry("tiny", 4, 1, 16);
    odd.parallel.adp = 3;
    assert!(matches!(odd.validate(), Err(GeometryError::UnevenAdp { .. })));
    assert!(matches!(geometry("tiny", 1, 5, 16).validate(), Err(GeometryError::Range { .. })));
}

#[test]
fn tables_that_do_not_fit_are_refused() {
    let geometry = geometry("tiny", 1, 1, 16);
    let plan = PairPlan::new(&geometry, Rank(0), &geometry, Rank(0)).unwrap();
    let good = shapes(&geometry, Rank(0), 40);
    let program = |tokens, source: &Tables| {
        plan.program(&PlanRequest { tokens, have: 0, layers: 0..4, source, destination: &good })
            .map(|program| program.bytes())
    };
    assert_eq!(program(40, &good), Ok(40 * 2048));
    assert!(matches!(program(40, &Tables::default()), Err(PlanError::TableCount { .. })));
    assert!(matches!(program(49, &good), Err(PlanError::TableShort { .. })));
    let table = |first_token, blocks, ring| Tables { groups: vec![TableShape { first_token, blocks, ring }.into()] };
    assert!(matches!(program(40, &table(0, 2, false)), Err(PlanError::TableShort { .. })));
    assert!(matches!(program(40, &table(16, 8, false)), Err(PlanError::TableShort { .. })));
    assert!(matches!(program(40, &table(8, 8, false)), Err(PlanError::Misaligned { .. })));
    assert!(matches!(program(40, &table(0, 0, true)), Err(PlanError::TableShort { .. })));
    assert!(matches!(program(40, &table(0, 2, true)), Err(PlanError::TableShort { .. })));
    assert_eq!(program(40, &table(0, u32::MAX, true)), Ok(40 * 2048));
    assert!(matches!(program(1 << 60, &good), Err(PlanError::TooManyTokens { .. })));
}

#[test]
fn window_tables_are_suffixes() {
    let geometry = geometry("gpt-oss-120b", 1, 1, 16);
    let window = TableShape { first_token: 864, blocks: 9, ring: false };
    assert_eq!(geometry.blocks_for(0, 1000, Rank(0)), window);
    assert_eq!(geometry.needed(0, 1000, 990), 872..1000);
    assert_eq!(geometry.needed(1, 1000, 990), 990..1000);
    assert_eq!(geometry.blocks_for(1, 1000, Rank(0)).blocks, 63);
    let state = self::geometry("qwen3-next", 1, 1, 16);
    assert_eq!(state.blocks_for(1, 1000, Rank(0)).blocks, 1);
    assert_eq!(state.needed(2, 0, 0), 0..0);
}

#[test]
fn layouts_are_aligned_and_follow_the_placement() {
    let mut geometry = geometry("gpt-oss-120b", 8, 2, 3);
    let layout = geometry.shard(Rank(9)).unwrap().layout(&[5, 7]);
    layout.validate().unwrap();
    assert_eq!((layout.regions.len(), layout.planes.len()), (1, 36));
    assert!(layout.planes.iter().all(|plane| plane.offset.is_multiple_of(64)));
    geometry.format.planes = PlanePlacement::PerLayer;
    geometry.format.kv = KvPlacement::Interleaved;
    let layout = geometry.shard(Rank(9)).unwrap().layout(&[5, 7]);
    assert_eq!((layout.regions.len(), layout.planes.len()), (18, 18));
    assert_eq!(layout.planes[0].block_bytes, 3 * 2 * 64 * 2);
    assert_eq!(layout.planes[17].blocks, 7);
}

#[test]
fn specifications_are_read_strictly() {
    let spec = Model::from_spec("layers=2,kv_heads=4,head_dim=64,dtype=fp8,kv=interleaved,planes=per-layer").unwrap();
    assert_eq!(spec.model.bytes_per_token(), 2 * 2 * 4 * 64);
    assert_eq!((spec.kv, spec.planes), (KvPlacement::Interleaved, PlanePlacement::PerLayer));
    let latent = Model::from_spec("layers=3, latent=576, window=128").unwrap().model;
    assert_eq!(latent.groups[0].bytes_per_token(), 3 * 1152);
    assert_eq!(latent.groups[0].extent, Extent::Window { tokens: 128 });
    for (text, part) in [
        ("layers=2,kv_heads=4", "lacks `head_dim`"),
        ("kv_heads=4,head_dim=64", "lacks `layers`"),
        ("layers=0,latent=1", "a number from 1 to 1024"),
        ("layers=2,latent=576,kv_heads=1", "both `latent` and `kv_heads`"),
        ("layers=2,latent=576,colour=red", "no key `colour`"),
        ("layers=2,layers=3", "twice"),
        ("layers", "not key=value"),
        ("layers=2,latent=8,dtype=int3", "`dtype=int3` is not allowed"),
        ("layers=2,latent=8,kv=mixed", "separate or interleaved"),
    ] {
        let error: SpecError = Model::from_spec(text).unwrap_err();
        assert!(error.to_string().contains(part), "{text}: {error}");
    }
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16, Dtype::Fp8E4m3, Dtype::Fp8E5m2, Dtype::Int8, Dtype::Uint8] {
        assert_eq!(dtype.to_string().parse(), Ok(dtype));
    }
}

proptest! {
    /// What a peer sends as its geometry may be anything.
    #[test]
    fn hostile_geometries_never_panic(
        numbers in prop::array::uniform12(prop_oneof![0u32..9, any::<u32>(), Just(u32::MAX)]),
        tokens: u64,
        have: u64,
        intervals in prop::collection::vec(prop::collection::vec(any::<(u8, u8)>(), 0..3), 0..3),
    ) {
        let [tp, pp, cp, adp, layers, layer, heads, elements, block_tokens, window, rank, count] = numbers;
        let mut model = Model::preset("gpt-oss-120b").unwrap();
        model.layers = layers;
        model.groups[0].layers.push(layer);
        model.groups[0].extent = Extent::Window { tokens: window };
        model.groups[1].tensors[0].heads = heads;
        model.groups[1].tensors[1].elements = elements;
        model.groups[1].tensors[0].sharding = if tp % 2 == 0 { Sharding::Heads } else { Sharding::HeadsUneven };
        let stages = intervals.iter().map(|stage| stage.iter().map(|(a, b)| u32::from(*a)..u32::from(*b)).collect()).collect();
        let geometry = GroupGeometry {
            model,
            format: Format { block_tokens, ..Format::default() },
            parallel: Parallel { tp, pp, cp, adp, stages },
        };
        let _ = (geometry.validate(), geometry.bytes_expected(tokens, have), geometry.owners(rank));
        let _ = geometry.blocks_for(0, tokens, Rank(rank));
        let _ = geometry.needed(count as usize, tokens, have);
        if let Ok(shard) = geometry.shard(Rank(rank)) {
            let _ = shard.layout(&[count, count]).validate();
        }
        let good = GroupGeometry { model: Model::preset("tiny").unwrap(), ..geometry };
        let _ = PairPlan::new(&good, Rank(rank), &good, Rank(0));
    }
}
