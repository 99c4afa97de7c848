//! The planner against a byte-by-byte oracle that knows only the definitions: which rank holds which element, and where.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use kvferry_core::{
    BlockTable, Dtype, End, Extent, Format, GroupGeometry, KvPlacement, LayerGroup, Model, Order, PairPlan, Parallel,
    PlanRequest, PlanePlacement, PoolLayout, Rank, Sharding, TableBlocks, Tables, Tensor, destinations, sources,
};
use proptest::prelude::*;

const SENTINEL: u8 = 0xee;

/// A small deterministic generator: one number decides a whole case.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.roll(from.len() as u64) as usize]
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.roll(one_in) == 0
    }

    fn shuffled(&mut self, count: u32) -> Vec<u32> {
        let mut ids: Vec<u32> = (0..count).collect();
        if self.chance(3) {
            return ids;
        }
        for index in (1..ids.len()).rev() {
            ids.swap(index, self.roll(index as u64 + 1) as usize);
        }
        ids
    }
}

fn model(dice: &mut Dice) -> Model {
    let layers = 1 + dice.roll(6) as u32;
    let mut groups = Vec::new();
    for index in 0..=dice.roll(3) {
        let mut held: Vec<u32> = (0..layers).filter(|_| !dice.chance(3)).collect();
        if held.is_empty() {
            held.push(dice.roll(u64::from(layers)) as u32);
        }
        let extent = match dice.roll(4) {
            0 | 1 => Extent::Full,
            2 => Extent::Window { tokens: 1 + dice.roll(90) as u32 },
            _ => Extent::State,
        };
        let alike = (dice.pick(&[1, 2, 3, 4, 6]), dice.pick(&[1, 2, 3, 8]));
        let tensor = |dice: &mut Dice, number: u64| Tensor {
            name: format!("t{number}"),
            heads: if dice.chance(3) { dice.pick(&[1, 2, 3, 4, 6]) } else { alike.0 },
            elements: if dice.chance(3) { dice.pick(&[1, 2, 3, 8]) } else { alike.1 },
            sharding: dice.pick(&[Sharding::Heads, Sharding::Heads, Sharding::HeadsUneven, Sharding::Replicated]),
        };
        let tensors = (0..1 + dice.roll(3)).map(|number| tensor(dice, number)).collect();
        let dtype = dice.pick(&[Dtype::Fp8E4m3, Dtype::Bf16, Dtype::F32]);
        groups.push(LayerGroup { name: format!("g{index}"), layers: held, dtype, extent, tensors });
    }
    Model { name: "random".to_owned(), layers, groups }
}

fn parallel(dice: &mut Dice, layers: u32) -> Parallel {
    let (heads, adp, cp) = (dice.pick(&[1u32, 2, 3, 4, 6]), dice.pick(&[1u32, 1, 2]), dice.pick(&[1u32, 1, 2, 3]));
    let pp = (1 + dice.roll(3) as u32).min(layers);
    let mut stages = Vec::new();
    if dice.chance(2) {
        // Every layer goes to any stage; stages may hold several intervals, or nothing.
        stages = vec![Vec::new(); pp as usize];
        for layer in 0..layers {
            let stage: &mut Vec<Range<u32>> = &mut stages[dice.roll(u64::from(pp)) as usize];
            match stage.last_mut() {
                Some(last) if last.end == layer => last.end = layer + 1,
                _ => stage.push(layer..layer + 1),
            }
        }
    }
    Parallel { tp: heads * adp, pp, cp, adp, stages }
}

fn format(dice: &mut Dice) -> Format {
    Format {
        block_tokens: dice.pick(&[1, 3, 16, 24, 32, 40, 64]),
        order: dice.pick(&[Order::Nhd, Order::Hnd]),
        kv: dice.pick(&[KvPlacement::Separate, KvPlacement::Interleaved]),
        planes: dice.pick(&[PlanePlacement::One, PlanePlacement::PerLayer]),
    }
}

fn geometries(dice: &mut Dice) -> (GroupGeometry, GroupGeometry) {
    let mut model = model(dice);
    let (source, destination) = (parallel(dice, model.layers), parallel(dice, model.layers));
    for tensor in model.groups.iter_mut().flat_map(|group| &mut group.tensors) {
        let heads = tensor.heads;
        for ranks in [source.tp / source.adp, destination.tp / destination.adp] {
            let fits = match tensor.sharding {
                Sharding::Heads => heads.is_multiple_of(ranks) || ranks.is_multiple_of(heads),
                Sharding::HeadsUneven => heads >= ranks,
                Sharding::Replicated => true,
            };
            if !fits {
                tensor.sharding = Sharding::Replicated;
            }
        }
    }
    let geometry = |parallel, format| GroupGeometry { model: model.clone(), format, parallel };
    (geometry(source, format(dice)), geometry(destination, format(dice)))
}

/// One rank as the definitions describe it, with its memory.
struct Node {
    rank: u32,
    tables: Tables,
    layout: PoolLayout,
    memory: Vec<Vec<u8>>,
}

impl Node {
    fn new(dice: &mut Dice, geometry: &GroupGeometry, rank: u32, tokens: u64, have: u64) -> Node {
        let cp = u64::from(geometry.parallel.cp);
        let (mut tables, mut pools) = (Tables::default(), Vec::new());
        for (index, group) in geometry.model.groups.iter().enumerate() {
            let shape = geometry.blocks_for(index, tokens, Rank(rank));
            let stride = u64::from(geometry.block_tokens(index)) * cp;
            let mut table = BlockTable::from(shape);
            let mut count = shape.blocks;
            match group.extent {
                Extent::Window { tokens: window } if count > 0 && have.is_multiple_of(2) => {
                    count = u64::from(window).div_ceil(stride) as u32 + (have % 3) as u32;
                    table.ring = true;
                    table.first_token = 0;
                }
                Extent::Full if count > 0 && have.is_multiple_of(3) => {
                    let skip = have.min(tokens) / stride;
                    table.first_token = skip * stride;
                    count = count.saturating_sub(skip as u32);
                }
                _ => {}
            }
            let pool = count + dice.roll(4) as u32;
            let blocks: Arc<[u32]> = dice.shuffled(pool).into_iter().take(count as usize).collect();
            table.blocks = TableBlocks::Known(blocks);
            tables.groups.push(table);
            pools.push(pool);
        }
        let layout = geometry.shard(Rank(rank)).unwrap().layout(&pools);
        layout.validate().unwrap();
        let memory = layout.regions.iter().map(|bytes| vec![SENTINEL; *bytes as usize]).collect();
        Node { rank, tables, layout, memory }
    }

    /// Region and byte of an element's first byte, if this rank holds it.
    fn find(
        &self,
        geometry: &GroupGeometry,
        group: usize,
        layer: u32,
        tensor: usize,
        head: u32,
        token: u64,
    ) -> Option<(usize, usize)> {
        let parallel = &geometry.parallel;
        let (cp_rank, stage) = (self.rank % parallel.cp, self.rank / (parallel.cp * parallel.tp));
        let index = self.rank / parallel.cp % parallel.tp % (parallel.tp / parallel.adp);
        let held = held_layers(geometry, group, stage);
        let position = held.iter().position(|held| *held == layer)?;
        let mine = heads(geometry, group, tensor, index);
        let local = mine.iter().position(|mine| *mine == head)? as u64;

        let spec = &geometry.model.groups[group];
        let state = spec.extent == Extent::State;
        let block_tokens = if state { 1 } else { u64::from(geometry.format.block_tokens) };
        let table = &self.tables.groups[group];
        let blocks = table.blocks.known().unwrap();
        let mut at = token;
        if table.ring {
            at = token % (blocks.len() as u64 * block_tokens * u64::from(parallel.cp));
        }
        let turn = at / block_tokens;
        if turn % u64::from(parallel.cp) != u64::from(cp_rank) {
            return None;
        }
        let first = table.first_token / block_tokens / u64::from(parallel.cp);
        let slot = (turn / u64::from(parallel.cp)).checked_sub(first)?;
        let block = *blocks.get(slot as usize)?;

        let one_plane = state || geometry.format.kv == KvPlacement::Interleaved;
        let per_layer = |spec: &LayerGroup| {
            let one = spec.extent == Extent::State || geometry.format.kv == KvPlacement::Interleaved;
            if one { 1 } else { spec.tensors.len() }
        };
        let mut plane = 0;
        for (earlier, other) in geometry.model.groups.iter().enumerate().take(group) {
            plane += held_layers(geometry, earlier, stage).len() * per_layer(other);
        }
        plane += position * per_layer(spec) + if one_plane { 0 } else { tensor };
        let element = |number: usize| u64::from(spec.tensors[number].elements * spec.dtype.bytes());
        let mut offset = 0;
        if one_plane {
            for earlier in 0..tensor {
                offset += block_tokens * heads(geometry, group, earlier, index).len() as u64 * element(earlier);
            }
        }
        let within = at % block_tokens;
        offset += match geometry.format.order {
            Order::Nhd => (within * mine.len() as u64 + local) * element(tensor),
            Order::Hnd => (local * block_tokens + within) * element(tensor),
        };
        let location = self.layout.locate(plane as u32, block).unwrap();
        Some((location.region as usize, (location.offset + offset) as usize))
    }
}

fn held_layers(geometry: &GroupGeometry, group: usize, stage: u32) -> Vec<u32> {
    let (layers, parallel) = (geometry.model.layers, &geometry.parallel);
    let stage_of = |layer: u32| {
        if !parallel.stages.is_empty() {
            return parallel.stages.iter().position(|stage| stage.iter().any(|range| range.contains(&layer))).unwrap()
                as u32;
        }
        let mut left = layer;
        for stage in 0..parallel.pp {
            let size = layers / parallel.pp + u32::from(stage < layers % parallel.pp);
            if left < size {
                return stage;
            }
            left -= size;
        }
        unreachable!()
    };
    geometry.model.groups[group].layers.iter().copied().filter(|layer| stage_of(*layer) == stage).collect()
}

fn heads(geometry: &GroupGeometry, group: usize, tensor: usize, index: u32) -> Vec<u32> {
    let tensor = &geometry.model.groups[group].tensors[tensor];
    let ranks = geometry.parallel.tp / geometry.parallel.adp;
    let holder = |head: u32| match tensor.sharding {
        Sharding::Replicated => true,
        Sharding::Heads if ranks > tensor.heads => index * tensor.heads / ranks == head,
        Sharding::Heads => head * ranks / tensor.heads == index,
        Sharding::HeadsUneven => {
            let mut dealt = 0;
            (0..ranks).any(|rank| {
                let part = tensor.heads / ranks + u32::from(rank < tensor.heads % ranks);
                let mine = rank == index && (dealt..dealt + part).contains(&head);
                dealt += part;
                mine
            })
        }
    };
    (0..tensor.heads).filter(|head| holder(*head)).collect()
}

fn pattern(group: usize, layer: u32, tensor: usize, head: u32, token: u64, byte: u32) -> u8 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for part in [group as u64, u64::from(layer), tensor as u64, u64::from(head), token, u64::from(byte)] {
        hash = (hash ^ part).wrapping_mul(0x0000_0100_0000_01b3);
        hash ^= hash >> 29;
    }
    hash as u8
}

/// Every element of the model that a destination needs: group, layer, tensor, head, token, bytes.
fn elements(model: &Model, tokens: u64, have: u64, mut visit: impl FnMut(usize, u32, usize, u32, u64, u32)) {
    for (index, group) in model.groups.iter().enumerate() {
        let needed = match group.extent {
            Extent::Full => have.min(tokens)..tokens,
            Extent::Window { tokens: window } => tokens.saturating_sub(u64::from(window))..tokens,
            Extent::State => 0..tokens.min(1),
        };
        for &layer in &group.layers {
            for (number, tensor) in group.tensors.iter().enumerate() {
                for head in 0..tensor.heads {
                    for token in needed.clone() {
                        visit(index, layer, number, head, token, tensor.elements * group.dtype.bytes());
                    }
                }
            }
        }
    }
}

fn absent(tables: &Tables) -> Tables {
    Tables { groups: tables.groups.iter().map(|table| BlockTable::from(table.shape())).collect() }
}

/// Moves everything for `layers` between all ranks; checks every byte of every destination rank.
fn check(seed: u64) {
    let dice = &mut Dice(seed);
    let (from, to) = geometries(dice);
    from.validate().unwrap();
    to.validate().unwrap();
    let model = &from.model;
    let tokens = dice.roll(150);
    let have = if dice.chance(2) { 0 } else { dice.roll(tokens + 4) };
    let (from_dp, to_dp) =
        (dice.roll(u64::from(from.parallel.adp)) as u32, dice.roll(u64::from(to.parallel.adp)) as u32);
    let cut = dice.roll(u64::from(model.layers) + 1) as u32;
    let mut steps = vec![0..cut, cut..model.layers];
    if dice.chance(2) {
        steps.remove(0);
    }

    let mut source_nodes = Vec::new();
    for rank in from.owners(from_dp) {
        // The source has every token: its tables start at the beginning.
        let mut node = Node::new(dice, &from, rank.0, tokens, 1);
        elements(model, tokens, 0, |group, layer, tensor, head, token, bytes| {
            if let Some((region, at)) = node.find(&from, group, layer, tensor, head, token) {
                for byte in 0..bytes {
                    node.memory[region][at + byte as usize] = pattern(group, layer, tensor, head, token, byte);
                }
            }
        });
        source_nodes.push(node);
    }
    let mut moved = 0;
    let mut expected_bytes = 0;
    for rank in to.owners(to_dp) {
        let mut node = Node::new(dice, &to, rank.0, tokens, have);
        let mut wanted = node.memory.clone();
        elements(model, tokens, have, |group, layer, tensor, head, token, bytes| {
            if let Some((region, at)) = node.find(&to, group, layer, tensor, head, token) {
                expected_bytes += u64::from(bytes);
                if steps.iter().any(|step| step.contains(&layer)) {
                    for byte in 0..bytes {
                        wanted[region][at + byte as usize] = pattern(group, layer, tensor, head, token, byte);
                    }
                }
            }
        });
        let mut writes: Vec<Vec<u8>> = node.memory.iter().map(|region| vec![0; region.len()]).collect();
        let mut streamed = node.memory.clone();
        let peers: BTreeSet<Rank> = sources(&from, from_dp, &to, rank).unwrap().into_iter().collect();
        for source in &source_nodes {
            let plan = PairPlan::new(&from, Rank(source.rank), &to, rank).unwrap();
            assert_eq!(plan.is_empty(), !peers.contains(&Rank(source.rank)));
            let back = destinations(&from, Rank(source.rank), &to, to_dp).unwrap();
            assert_eq!(back.contains(&rank), !plan.is_empty());
            for layers in &steps {
                moved += run(&plan, layers.clone(), (tokens, have), source, &mut node, &mut writes, &mut streamed);
            }
        }
        assert!(node.memory == wanted, "copies, {rank}");
        assert!(streamed == wanted, "spans, {rank}");
        assert!(writes.iter().flatten().all(|count| *count <= 1), "written twice, {rank}");
    }
    assert_eq!(expected_bytes, to.bytes_expected(tokens, have));
    if steps.len() == 2 || cut == 0 {
        assert_eq!(moved, expected_bytes);
    }
}

fn run(
    plan: &PairPlan,
    layers: Range<u32>,
    (tokens, have): (u64, u64),
    source: &Node,
    node: &mut Node,
    writes: &mut [Vec<u8>],
    streamed: &mut [Vec<u8>],
) -> u64 {
    let request = PlanRequest { tokens, have, layers, source: &source.tables, destination: &node.tables };
    let program = plan.program(&request).unwrap();
    program.validate(End::Source, &source.layout).unwrap();
    program.validate(End::Destination, &node.layout).unwrap();
    let mut bytes = 0;
    for copy in program.copies(program.whole(), &source.layout, &node.layout) {
        let at = copy.source.offset as usize;
        let read = &source.memory[copy.source.region as usize][at..at + copy.bytes as usize];
        let at = copy.destination.offset as usize;
        let range = at..at + copy.bytes as usize;
        node.memory[copy.destination.region as usize][range.clone()].copy_from_slice(read);
        for count in &mut writes[copy.destination.region as usize][range] {
            *count += 1;
        }
        bytes += copy.bytes;
    }
    assert_eq!(bytes, program.bytes());

    // Each end plans for itself, with nothing but the shape of the other's tables.
    let far = absent(&node.tables);
    let sender = plan.program(&PlanRequest { destination: &far, ..request.clone() }).unwrap();
    let far = absent(&source.tables);
    let receiver = plan.program(&PlanRequest { source: &far, ..request }).unwrap();
    assert_eq!(sender.fingerprint(), receiver.fingerprint());
    assert_eq!(sender, program.without(End::Destination));
    let mut stream = Vec::new();
    for range in program.split(3) {
        for span in sender.spans(End::Source, range, &source.layout) {
            let at = span.at.offset as usize;
            stream.extend_from_slice(&source.memory[span.at.region as usize][at..at + span.bytes as usize]);
        }
    }
    let mut rest = &stream[..];
    for range in program.split(3) {
        for span in receiver.spans(End::Destination, range, &node.layout) {
            let at = span.at.offset as usize;
            let (head, tail) = rest.split_at(span.bytes as usize);
            streamed[span.at.region as usize][at..at + span.bytes as usize].copy_from_slice(head);
            rest = tail;
        }
    }
    assert!(rest.is_empty());
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, max_shrink_iters: 0, ..ProptestConfig::default() })]

    #[test]
    fn every_needed_byte_arrives_once_and_nothing_else_is_touched(seed: u64) {
        check(seed);
    }
}
