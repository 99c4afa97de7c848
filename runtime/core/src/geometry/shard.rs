//! What one rank holds, and where in its blocks.

use core::ops::Range;

use serde::{Deserialize, Serialize};

use super::{Extent, GeometryError, GroupGeometry, KvPlacement, LayerGroup, Order, Parallel, PlanePlacement};
use crate::{Plane, PoolLayout, Rank};

/// One rank's part of a model's KV.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// The rank.
    pub rank: Rank,
    /// Its coordinates.
    pub coords: Coords,
    /// Context-parallel ranks of its group.
    pub cp: u32,
    /// How planes lie in allocations.
    pub planes: PlanePlacement,
    /// Its part of every layer group of the model, in order.
    pub groups: Vec<ShardGroup>,
}

/// Where a rank stands in its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coords {
    /// Tensor-parallel index, over all attention-data-parallel parts.
    pub tp: u32,
    /// Pipeline stage.
    pub pp: u32,
    /// Context-parallel index.
    pub cp: u32,
    /// Attention-data-parallel part.
    pub dp: u32,
}

/// One rank's part of a layer group. Its planes are consecutive: layer-major, then by tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardGroup {
    /// The model layers that it holds, ascending; perhaps none.
    pub layers: Vec<u32>,
    /// Tokens per block: 1 for state.
    pub block_tokens: u32,
    /// Number of its first plane.
    pub first_plane: u32,
    /// Block bytes of each plane of one layer; one plane per tensor, or one for all.
    pub plane_bytes: Vec<u64>,
    /// Its tensors, in the model's order.
    pub tensors: Vec<ShardTensor>,
}

/// One rank's part of a tensor, and its place in a block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardTensor {
    /// The heads that it holds, as the model numbers them.
    pub heads: Range<u32>,
    /// Which of the ranks that hold the same heads it is.
    pub replica: u32,
    /// How many those are.
    pub replicas: u32,
    /// Which plane of the layer, from 0.
    pub plane: u32,
    /// Bytes from the block's start to token 0 of the first held head.
    pub offset: u64,
    /// Bytes from one token to the next.
    pub token_pitch: u64,
    /// Bytes from one head to the next.
    pub head_pitch: u64,
    /// Bytes of one head of one token, contiguous.
    pub head_bytes: u32,
}

impl ShardGroup {
    /// Planes of one layer.
    pub fn planes_per_layer(&self) -> u32 {
        self.plane_bytes.len() as u32
    }

    /// Bytes that one block takes in all planes together.
    pub fn block_bytes(&self) -> u64 {
        let layer = self.plane_bytes.iter().copied().fold(0, u64::saturating_add);
        layer.saturating_mul(self.layers.len() as u64)
    }
}

impl GroupGeometry {
    /// What `rank` holds. The geometry is validated first.
    pub fn shard(&self, rank: Rank) -> Result<Shard, GeometryError> {
        self.validate()?;
        self.shard_of_valid(rank)
    }

    /// What `rank` holds of a geometry that has been validated.
    pub(crate) fn shard_of_valid(&self, rank: Rank) -> Result<Shard, GeometryError> {
        let ranks = self.ranks();
        if rank.0 >= ranks {
            return Err(GeometryError::NoSuchRank { rank, ranks });
        }
        let Parallel { tp, cp, .. } = self.parallel;
        let head_ranks = self.parallel.head_ranks();
        let index = rank.0 / cp % tp;
        let coords = Coords { tp: index, pp: rank.0 / (tp * cp), cp: rank.0 % cp, dp: index / head_ranks };
        let mut groups: Vec<ShardGroup> = Vec::with_capacity(self.model.groups.len());
        let mut first_plane = 0;
        for group in &self.model.groups {
            let part = self.shard_group(group, coords, first_plane);
            first_plane += part.planes_per_layer() * part.layers.len() as u32;
            groups.push(part);
        }
        Ok(Shard { rank, coords, cp, planes: self.format.planes, groups })
    }

    fn shard_group(&self, group: &LayerGroup, coords: Coords, first_plane: u32) -> ShardGroup {
        let state = group.extent == Extent::State;
        let block_tokens = if state { 1 } else { self.format.block_tokens };
        let ranks = self.parallel.head_ranks();
        let index = coords.tp % ranks;
        let one_plane = state || self.format.kv == KvPlacement::Interleaved;
        let (mut tensors, mut plane_bytes) = (Vec::with_capacity(group.tensors.len()), Vec::new());
        for (number, tensor) in group.tensors.iter().enumerate() {
            let heads = tensor.heads_of(index, ranks);
            let (replica, replicas) = tensor.replica(index, ranks);
            let head_bytes = tensor.elements * group.dtype.bytes();
            let (run, count, tokens) = (u64::from(head_bytes), heads.len() as u64, u64::from(block_tokens));
            let (token_pitch, head_pitch) = match self.format.order {
                Order::Nhd => (run * count, run),
                Order::Hnd => (run, run * tokens),
            };
            if !one_plane || number == 0 {
                plane_bytes.push(0);
            }
            let plane = plane_bytes.len() - 1;
            let mut offset = 0;
            if let Some(bytes) = plane_bytes.last_mut() {
                offset = *bytes;
                *bytes += run * count * tokens;
            }
            let plane = plane as u32;
            tensors.push(ShardTensor { heads, replica, replicas, plane, offset, token_pitch, head_pitch, head_bytes });
        }
        let holds = |layer: &u32| self.parallel.holds(coords.pp, *layer, self.model.layers);
        let layers = group.layers.iter().copied().filter(holds).collect();
        ShardGroup { layers, block_tokens, first_plane, plane_bytes, tensors }
    }
}

/// Every plane starts at a multiple of this: a cache line.
const PLANE_ALIGNMENT: u64 = 64;

impl Shard {
    /// The pool of this rank with `blocks[group]` blocks in every plane of each layer group (none for groups that `blocks` lacks).
    /// Sizes saturate: [`PoolLayout::validate`] refuses what no machine has.
    pub fn layout(&self, blocks: &[u32]) -> PoolLayout {
        let mut layout = PoolLayout::default();
        if self.planes == PlanePlacement::One {
            layout.regions.push(0);
        }
        for (index, group) in self.groups.iter().enumerate() {
            let blocks = blocks.get(index).copied().unwrap_or(0);
            for _ in &group.layers {
                if self.planes == PlanePlacement::PerLayer {
                    layout.regions.push(0);
                }
                for &block_bytes in &group.plane_bytes {
                    let region = layout.regions.len().saturating_sub(1) as u32;
                    let Some(bytes) = layout.regions.last_mut() else { continue };
                    let offset = bytes.saturating_add(PLANE_ALIGNMENT - 1) / PLANE_ALIGNMENT * PLANE_ALIGNMENT;
                    *bytes = offset.saturating_add(block_bytes.saturating_mul(u64::from(blocks)));
                    layout.planes.push(Plane { region, offset, blocks, block_stride: block_bytes, block_bytes });
                }
            }
        }
        layout
    }
}
