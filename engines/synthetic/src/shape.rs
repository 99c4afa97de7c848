//! Where every element of a rank lies, straight from the definitions and apart from the planner.

use core::ops::Range;

use kvferry_core::{Extent, GroupGeometry, KvPlacement, Order, Rank, Sharding, Tensor};
use kvferry_transport::Pool;

use crate::{EngineConfig, EngineError};

/// One rank's planes and how it deals out tokens.
#[derive(Clone, Debug)]
pub(crate) struct RankShape {
    /// One per layer group of the model.
    pub(crate) groups: Vec<GroupShape>,
    /// Ascending by model layer, then by number.
    pub(crate) planes: Vec<PlaneShape>,
}

/// How a rank keeps the tokens of one layer group.
#[derive(Clone, Debug)]
pub(crate) struct GroupShape {
    pub(crate) name: String,
    extent: Extent,
    block_tokens: u64,
    cp: u64,
    cp_rank: u64,
    /// Whether the rank holds any layer of it.
    pub(crate) held: bool,
    pub(crate) blocks: u32,
}

/// One plane: a layer's tensors, or one of them.
#[derive(Clone, Debug)]
pub(crate) struct PlaneShape {
    pub(crate) group: usize,
    pub(crate) layer: u32,
    pub(crate) number: u32,
    pub(crate) block_bytes: usize,
    pub(crate) sections: Vec<Section>,
    order: Order,
    block_tokens: usize,
}

/// One tensor's part of a block.
#[derive(Clone, Debug)]
pub(crate) struct Section {
    pub(crate) tensor: usize,
    pub(crate) heads: Range<u32>,
    /// Bytes of one head of one token.
    pub(crate) run_bytes: usize,
    offset: usize,
}

impl RankShape {
    /// Works the shape out, and checks that the pool has it.
    pub(crate) fn new(config: &EngineConfig, pool: &Pool) -> Result<RankShape, EngineError> {
        let geometry: &GroupGeometry = &config.geometry;
        // Also refuses geometries and ranks that do not exist; the shard itself belongs to the planner.
        geometry.shard(config.rank)?;
        let groups = geometry.model.groups.len();
        if config.blocks.len() != groups {
            return Err(EngineError::BlockCounts { given: config.blocks.len(), groups });
        }
        let shape = RankShape::of(geometry, config.rank, &config.blocks);
        let (have, need) = (pool.layout().planes.len(), shape.planes.len());
        if have != need {
            return Err(EngineError::PlaneCount { have, need });
        }
        for plane in &shape.planes {
            let Some(there) = pool.layout().planes.get(plane.number as usize) else {
                return Err(EngineError::PlaneCount { have, need });
            };
            let need_blocks = shape.groups.get(plane.group).map_or(0, |group| group.blocks);
            if there.blocks != need_blocks || there.block_bytes != plane.block_bytes as u64 {
                return Err(EngineError::Plane {
                    plane: plane.number,
                    have_blocks: there.blocks,
                    have_bytes: there.block_bytes,
                    need_blocks,
                    need_bytes: plane.block_bytes as u64,
                });
            }
        }
        Ok(shape)
    }

    /// Of a valid geometry and a rank of it.
    fn of(geometry: &GroupGeometry, rank: Rank, blocks: &[u32]) -> RankShape {
        let (parallel, format) = (&geometry.parallel, &geometry.format);
        // rank = pp * (tp * cp) + tp_index * cp + cp_index
        let (tp, cp) = (parallel.tp.max(1), parallel.cp.max(1));
        let (stage, tp_index, cp_index) = (rank.0 / (tp * cp), rank.0 / cp % tp, rank.0 % cp);
        let head_ranks = (tp / parallel.adp.max(1)).max(1);
        let stages = stage_layers(geometry);
        let layers = stages.get(stage as usize).map_or(&[][..], Vec::as_slice);
        let mut shape = RankShape { groups: Vec::new(), planes: Vec::new() };
        let mut number = 0;
        for (index, group) in geometry.model.groups.iter().enumerate() {
            let state = group.extent == Extent::State;
            let block_tokens = if state { 1 } else { format.block_tokens };
            let held: Vec<u32> = group.layers.iter().copied().filter(|layer| layers.contains(layer)).collect();
            shape.groups.push(GroupShape {
                name: group.name.clone(),
                extent: group.extent,
                block_tokens: u64::from(block_tokens.max(1)),
                cp: u64::from(cp),
                cp_rank: u64::from(cp_index),
                held: !held.is_empty(),
                blocks: blocks.get(index).copied().unwrap_or(0),
            });
            for layer in held {
                let together = state || format.kv == KvPlacement::Interleaved;
                let mut planes: Vec<PlaneShape> = Vec::new();
                for (tensor_index, tensor) in group.tensors.iter().enumerate() {
                    if planes.is_empty() || !together {
                        planes.push(PlaneShape {
                            group: index,
                            layer,
                            number,
                            block_bytes: 0,
                            sections: Vec::new(),
                            order: format.order,
                            block_tokens: block_tokens as usize,
                        });
                        number += 1;
                    }
                    if let Some(plane) = planes.last_mut() {
                        let heads = heads_of(tensor, tp_index % head_ranks, head_ranks);
                        let run_bytes = tensor.elements as usize * group.dtype.bytes() as usize;
                        let section = Section { tensor: tensor_index, heads, run_bytes, offset: plane.block_bytes };
                        plane.block_bytes += section.token_bytes() * plane.block_tokens;
                        plane.sections.push(section);
                    }
                }
                shape.planes.append(&mut planes);
            }
        }
        shape.planes.sort_by_key(|plane| (plane.layer, plane.number));
        shape
    }
}

impl GroupShape {
    /// The tokens that it keeps of a request.
    pub(crate) fn kept(&self, tokens: u64) -> Range<u64> {
        match self.extent {
            Extent::Full => 0..tokens,
            Extent::Window { tokens: window } => tokens.saturating_sub(u64::from(window))..tokens,
            Extent::State => 0..tokens.min(1),
        }
    }

    /// Which of this rank's own blocks of a request hold those: numbers counted from the request's start.
    pub(crate) fn own_blocks(&self, tokens: u64) -> Range<u64> {
        let kept = self.kept(tokens);
        let first = kept.start / self.stride();
        if kept.is_empty() || !self.held {
            return first..first;
        }
        // Blocks are dealt round-robin: this rank's are `cp_rank`, `cp_rank + cp`, …
        let all = kept.end.div_ceil(self.block_tokens);
        let own = all.saturating_sub(self.cp_rank).div_ceil(self.cp);
        first..own.max(first)
    }

    /// The tokens of one of this rank's own blocks.
    pub(crate) fn tokens_of(&self, own_block: u64) -> Range<u64> {
        let block = own_block.saturating_mul(self.cp).saturating_add(self.cp_rank);
        let start = block.saturating_mul(self.block_tokens);
        start..start.saturating_add(self.block_tokens)
    }

    /// The first token of the blocks numbered `own_block` on all ranks that share a request.
    pub(crate) fn first_token(&self, own_block: u64) -> u64 {
        own_block.saturating_mul(self.stride())
    }

    /// Tokens from one of this rank's blocks to its next.
    pub(crate) fn stride(&self) -> u64 {
        self.block_tokens.saturating_mul(self.cp)
    }

    pub(crate) fn is_full(&self) -> bool {
        self.extent == Extent::Full
    }

    pub(crate) fn is_state(&self) -> bool {
        self.extent == Extent::State
    }
}

impl PlaneShape {
    /// The byte at which a section's head (counted among those held) of a token (counted in the block) starts.
    pub(crate) fn offset(&self, section: &Section, token: usize, head: usize) -> usize {
        let runs = match self.order {
            Order::Nhd => token * section.heads.len() + head,
            Order::Hnd => head * self.block_tokens + token,
        };
        section.offset + runs * section.run_bytes
    }

    /// The inverse of [`PlaneShape::offset`]: section, token, head, and the byte of the run.
    pub(crate) fn find(&self, offset: usize) -> Option<(&Section, usize, u32, usize)> {
        let inside = |section: &&Section| {
            (section.offset..section.offset + section.token_bytes() * self.block_tokens).contains(&offset)
        };
        let section = self.sections.iter().find(inside)?;
        let inner = offset - section.offset;
        let (run, byte) = (inner.checked_div(section.run_bytes)?, inner.checked_rem(section.run_bytes)?);
        let (token, head) = match self.order {
            Order::Nhd => (run.checked_div(section.heads.len())?, run.checked_rem(section.heads.len())?),
            Order::Hnd => (run.checked_rem(self.block_tokens)?, run.checked_div(self.block_tokens)?),
        };
        Some((section, token, section.heads.start + head as u32, byte))
    }

    /// Bytes of one token.
    pub(crate) fn token_bytes(&self) -> u64 {
        self.sections.iter().map(|section| section.token_bytes() as u64).sum()
    }
}

impl Section {
    fn token_bytes(&self) -> usize {
        self.heads.len() * self.run_bytes
    }
}

/// The model layers of every pipeline stage; without lists, as equal as possible, the first stages taking one more.
fn stage_layers(geometry: &GroupGeometry) -> Vec<Vec<u32>> {
    let (parallel, layers) = (&geometry.parallel, geometry.model.layers);
    if !parallel.stages.is_empty() {
        return parallel.stages.iter().map(|ranges| ranges.iter().cloned().flatten().collect()).collect();
    }
    let mut next = 0;
    let mut stage = |index: u32| {
        let count = layers / parallel.pp.max(1) + u32::from(index < layers % parallel.pp.max(1));
        let start = next;
        next += count;
        (start..next).collect()
    };
    (0..parallel.pp).map(&mut stage).collect()
}

/// The heads of rank `index` of `ranks`: equal parts, or copies when there are more ranks than heads; uneven parts give the first
/// ranks one more; replicated tensors are whole everywhere.
fn heads_of(tensor: &Tensor, index: u32, ranks: u32) -> Range<u32> {
    let heads = tensor.heads;
    match tensor.sharding {
        Sharding::Replicated => 0..heads,
        Sharding::Heads if heads < ranks => {
            let copies = ranks / heads.max(1);
            let head = index / copies.max(1);
            head..head + 1
        }
        Sharding::Heads => {
            let each = heads / ranks;
            index * each..(index + 1) * each
        }
        Sharding::HeadsUneven => {
            let count = |rank: u32| heads / ranks + u32::from(rank < heads % ranks);
            let start = (0..index).map(count).sum();
            start..start + count(index)
        }
    }
}
