//! The planner's choice of peers against TensorRT-LLM's own formulas (`TargetRanksInfoForDPImpl` in cacheSplitConcat.cu, `needSendCache` and
//! `pickRecvConnections` in cacheFormatter.cpp and mlaCacheFormatter.cpp), wherever TensorRT-LLM supports the case: powers of two for tp,
//! one context-parallel rank on the prefill side, equal blocks.
//!
//! Where several source ranks hold the same heads, TensorRT-LLM lets one of them send everything and kvferry lets them share the layers; so
//! what is compared is which *heads* of which stage come from where: source ranks that hold the same are one class. Without replicas the
//! ranks themselves must be equal.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code")]

use std::collections::BTreeSet;

use kvferry_core::{
    Dtype, Extent, Format, GroupGeometry, LayerGroup, Model, Parallel, Rank, Sharding, Tensor, destinations, sources,
};
use proptest::prelude::*;

/// One side as TensorRT-LLM's `CacheState` describes it.
#[derive(Clone, Debug)]
struct Side {
    tp: u32,
    cp: u32,
    adp: u32,
    layers_of_stage: Vec<u32>,
}

impl Side {
    fn ranks(&self) -> u32 {
        self.tp * self.cp * self.layers_of_stage.len() as u32
    }

    fn tp_per_dp(&self) -> u32 {
        self.tp / self.adp
    }

    /// `(pp, tp, cp)`: cp is fastest.
    fn coordinates(&self, rank: u32) -> (u32, u32, u32) {
        (rank / (self.tp * self.cp), (rank % (self.tp * self.cp)) / self.cp, rank % self.cp)
    }

    fn stage(&self, pp: u32) -> std::ops::Range<u32> {
        let start: u32 = self.layers_of_stage.iter().take(pp as usize).sum();
        start..start + self.layers_of_stage[pp as usize]
    }

    fn dp_of(&self, rank: u32) -> u32 {
        self.coordinates(rank).1 / self.tp_per_dp()
    }

    fn geometry(&self, model: &Model) -> GroupGeometry {
        let stages = (0..self.layers_of_stage.len() as u32).map(|pp| vec![self.stage(pp)]).collect();
        let pp = self.layers_of_stage.len() as u32;
        let parallel = Parallel { tp: self.tp, pp, cp: self.cp, adp: self.adp, stages };
        GroupGeometry { model: model.clone(), format: Format::default(), parallel }
    }
}

/// `heads` KV heads, or a latent that every rank holds.
#[derive(Clone, Copy, Debug)]
enum Kv {
    Heads(u32),
    Latent,
}

impl Kv {
    fn heads_per_rank(self, side: &Side) -> u32 {
        match self {
            Kv::Heads(heads) => (heads / side.tp_per_dp()).max(1),
            Kv::Latent => 1,
        }
    }

    fn model(self, layers: u32) -> Model {
        let tensors = match self {
            Kv::Heads(heads) => ["k", "v"]
                .map(|name| Tensor { name: name.to_owned(), heads, elements: 8, sharding: Sharding::Heads })
                .to_vec(),
            Kv::Latent => {
                vec![Tensor { name: "latent".to_owned(), heads: 1, elements: 8, sharding: Sharding::Replicated }]
            }
        };
        let group = LayerGroup {
            name: "kv".to_owned(),
            layers: (0..layers).collect(),
            dtype: Dtype::Bf16,
            extent: Extent::Full,
            tensors,
        };
        Model { name: "m".to_owned(), layers, groups: vec![group] }
    }

    /// `max(1, heads held by `me`'s part, replicas counted / the same of `peer`)`.
    fn duplicates(self, me: &Side, peer: &Side) -> u32 {
        ((self.heads_per_rank(me) * me.tp_per_dp()) / (self.heads_per_rank(peer) * peer.tp_per_dp())).max(1)
    }
}

/// The half-open range of indices of one dimension that `index` of `size` meets among `peers`.
fn domain(index: u32, size: u32, peers: u32) -> std::ops::Range<u32> {
    if size <= peers {
        let width = peers / size;
        index * width..(index + 1) * width
    } else {
        let at = index / (size / peers);
        at..at + 1
    }
}

/// `TargetRanksInfoForDPImpl`: ranks of `peer`'s part `peer_dp` that `rank` of `me` talks to, cp outermost, pp innermost.
fn targets(me: &Side, rank: u32, peer: &Side, peer_dp: u32) -> Vec<u32> {
    let (pp, tp, cp) = me.coordinates(rank);
    let own = me.stage(pp);
    let stages: Vec<u32> = (0..peer.layers_of_stage.len() as u32)
        .filter(|stage| own.start.max(peer.stage(*stage).start) < own.end.min(peer.stage(*stage).end))
        .collect();
    let mut found = Vec::new();
    for c in domain(cp, me.cp, peer.cp) {
        for t in domain(tp % me.tp_per_dp(), me.tp_per_dp(), peer.tp_per_dp()) {
            for p in &stages {
                found.push(p * peer.tp * peer.cp + (t + peer_dp * peer.tp_per_dp()) * peer.cp + c);
            }
        }
    }
    found
}

/// Whether `rank` of the context side sends anything.
fn needs_to_send(kv: Kv, context: &Side, rank: u32, generation: &Side) -> bool {
    let tp_in_dp = context.coordinates(rank).1 % context.tp_per_dp();
    match kv {
        Kv::Heads(_) => tp_in_dp.is_multiple_of(kv.duplicates(context, generation)),
        Kv::Latent => tp_in_dp.is_multiple_of((context.tp_per_dp() / generation.tp_per_dp()).max(1)),
    }
}

/// What `rank` of the generation side receives from.
fn received_from(kv: Kv, context: &Side, context_dp: u32, generation: &Side, rank: u32) -> BTreeSet<u32> {
    let all = targets(generation, rank, context, context_dp);
    let stages = all.iter().map(|rank| context.coordinates(*rank).0).collect::<BTreeSet<_>>().len();
    match kv {
        // Only from the pipeline domain: the first of the tensor-parallel targets.
        Kv::Latent => all.into_iter().take(stages).collect(),
        Kv::Heads(_) => {
            // Targets are kept or skipped by tensor-parallel index; the stages of one index go together.
            let step = kv.duplicates(context, generation) as usize;
            let chunks = all.chunks(stages);
            chunks.step_by(step).flatten().copied().collect()
        }
    }
}

/// What a source rank holds: its stage, and which heads.
fn class(kv: Kv, context: &Side, rank: u32) -> (u32, u32) {
    let (pp, tp, _) = context.coordinates(rank);
    let tp_in_dp = tp % context.tp_per_dp();
    match kv {
        Kv::Heads(heads) => (pp, tp_in_dp / (context.tp_per_dp() / heads).max(1)),
        Kv::Latent => (pp, 0),
    }
}

fn replicated(kv: Kv, side: &Side) -> bool {
    match kv {
        Kv::Heads(heads) => side.tp_per_dp() > heads,
        Kv::Latent => side.tp_per_dp() > 1,
    }
}

fn check(kv: Kv, layers: u32, context: &Side, generation: &Side) {
    let model = kv.model(layers);
    let (from, to) = (context.geometry(&model), generation.geometry(&model));
    for context_dp in 0..context.adp {
        for rank in 0..generation.ranks() {
            let ours = sources(&from, context_dp, &to, Rank(rank)).unwrap();
            let theirs = received_from(kv, context, context_dp, generation, rank);
            // Whoever they receive from does send, to this rank.
            for source in &theirs {
                let to_me = targets(context, *source, generation, generation.dp_of(rank)).contains(&rank);
                assert!(
                    to_me && (matches!(kv, Kv::Latent) || needs_to_send(kv, context, *source, generation)),
                    "the formulas contradict each other: {source} to {rank}"
                );
            }
            let classes = |ranks: &mut dyn Iterator<Item = u32>| -> BTreeSet<(u32, u32)> {
                ranks.map(|rank| class(kv, context, rank)).collect()
            };
            assert_eq!(
                classes(&mut ours.iter().map(|rank| rank.0)),
                classes(&mut theirs.iter().copied()),
                "sources of generation rank {rank}"
            );
            if !replicated(kv, context) {
                assert_eq!(ours.iter().map(|rank| rank.0).collect::<BTreeSet<_>>(), theirs);
            }
        }
    }
    for generation_dp in 0..generation.adp {
        for rank in (0..context.ranks()).filter(|_| !replicated(kv, context)) {
            let ours = destinations(&from, Rank(rank), &to, generation_dp).unwrap();
            let theirs: BTreeSet<u32> = targets(context, rank, generation, generation_dp).into_iter().collect();
            assert!(needs_to_send(kv, context, rank, generation));
            assert_eq!(ours.iter().map(|rank| rank.0).collect::<BTreeSet<_>>(), theirs, "destinations of {rank}");
        }
    }
}

/// Layers in stages of at least one each.
fn stages(layers: u32) -> impl Strategy<Value = Vec<u32>> {
    proptest::collection::btree_set(1..layers.max(2), 0..4).prop_map(move |cuts| {
        let mut stages = Vec::new();
        let mut from = 0;
        for cut in cuts.into_iter().filter(|cut| *cut < layers).chain([layers]) {
            stages.push(cut - from);
            from = cut;
        }
        stages
    })
}

fn side(layers: u32, cp_max: u32) -> impl Strategy<Value = Side> {
    (0u32..5, 0u32..=cp_max, 0u32..5, stages(layers)).prop_map(|(tp, cp, adp, layers_of_stage)| Side {
        tp: 1 << tp,
        cp: 1 << cp,
        adp: 1 << adp.min(tp),
        layers_of_stage,
    })
}

fn kv() -> impl Strategy<Value = Kv> {
    prop_oneof![
        3 => prop_oneof![Just(1u32), Just(2), Just(3), Just(4), Just(6), Just(8), Just(16)].prop_map(Kv::Heads),
        1 => Just(Kv::Latent),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn the_planner_agrees_with_tensorrt_llm(
        (layers, kv, context, generation) in (1u32..12).prop_flat_map(|layers| (Just(layers), kv(), side(layers, 0), side(layers, 2)))
    ) {
        if let Kv::Heads(heads) = kv {
            // What does not divide, neither supports.
            let divides = |side: &Side| heads.is_multiple_of(side.tp_per_dp()) || side.tp_per_dp().is_multiple_of(heads);
            prop_assume!(divides(&context) && divides(&generation));
        }
        check(kv, layers, &context, &generation);
    }
}

#[test]
fn eight_ranks_of_four_heads_feed_two() {
    let context = Side { tp: 8, cp: 1, adp: 1, layers_of_stage: vec![3, 2] };
    let generation = Side { tp: 2, cp: 1, adp: 1, layers_of_stage: vec![5] };
    assert_eq!(received_from(Kv::Heads(4), &context, 0, &generation, 0), BTreeSet::from([0, 2, 8, 10]));
    check(Kv::Heads(4), 5, &context, &generation);
}

#[test]
fn attention_data_parallel_parts_meet_their_own() {
    let context = Side { tp: 4, cp: 1, adp: 4, layers_of_stage: vec![2] };
    let generation = Side { tp: 8, cp: 2, adp: 2, layers_of_stage: vec![1, 1] };
    check(Kv::Latent, 2, &context, &generation);
    check(Kv::Heads(8), 2, &context, &generation);
}
