//! How one group of ranks stores and divides the KV: what may differ between prefill and decode.

use core::ops::Range;

use serde::{Deserialize, Serialize};

/// Order of dimensions inside a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Token, head, element.
    #[default]
    Nhd,
    /// Head, token, element.
    Hnd,
}

/// Where the tensors of a layer lie. State always lies in one plane per layer, section after section.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum KvPlacement {
    /// One plane per tensor.
    #[default]
    Separate,
    /// One plane per layer; a block holds the tensors one after another.
    Interleaved,
}

/// How many allocations the planes of a rank take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PlanePlacement {
    /// One allocation for all planes.
    #[default]
    One,
    /// One allocation per layer of each layer group.
    PerLayer,
}

/// How a group of ranks stores KV.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Format {
    /// Tokens per block.
    pub block_tokens: u32,
    /// Order inside a block.
    pub order: Order,
    /// Tensors in planes.
    pub kv: KvPlacement,
    /// Planes in allocations.
    pub planes: PlanePlacement,
}

impl Default for Format {
    fn default() -> Self {
        Format { block_tokens: 16, order: Order::Nhd, kv: KvPlacement::Separate, planes: PlanePlacement::One }
    }
}

/// How a group of ranks divides KV. `rank = pp * (tp * cp) + tp_index * cp + cp_index`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parallel {
    /// Tensor-parallel ranks, over which heads are divided within each attention-data-parallel part.
    pub tp: u32,
    /// Pipeline stages, over which layers are divided.
    pub pp: u32,
    /// Context-parallel ranks, over which blocks are dealt round-robin.
    pub cp: u32,
    /// Attention-data-parallel parts of `tp`: a request belongs to one of them, heads are divided over `tp / adp` ranks.
    pub adp: u32,
    /// Layer intervals of every pipeline stage; empty for an even split in which the first stages have one layer more.
    pub stages: Vec<Vec<Range<u32>>>,
}

impl Default for Parallel {
    fn default() -> Self {
        Parallel { tp: 1, pp: 1, cp: 1, adp: 1, stages: Vec::new() }
    }
}

impl Parallel {
    /// Ranks of the group.
    pub fn ranks(&self) -> u32 {
        let ranks = u64::from(self.tp).saturating_mul(u64::from(self.pp)).saturating_mul(u64::from(self.cp));
        u32::try_from(ranks).unwrap_or(u32::MAX)
    }

    /// Ranks over which heads are divided: `tp / adp`.
    pub fn head_ranks(&self) -> u32 {
        self.tp.checked_div(self.adp).unwrap_or(0)
    }

    /// Whether stage `stage` of a model of `layers` layers holds `layer`.
    pub fn holds(&self, stage: u32, layer: u32, layers: u32) -> bool {
        if !self.stages.is_empty() {
            return self.stages.get(stage as usize).is_some_and(|list| list.iter().any(|range| range.contains(&layer)));
        }
        let (Some(least), Some(more)) = (layers.checked_div(self.pp), layers.checked_rem(self.pp)) else {
            return false;
        };
        let start = u64::from(stage) * u64::from(least) + u64::from(stage.min(more));
        let end = start + u64::from(least) + u64::from(stage < more);
        (start..end).contains(&u64::from(layer))
    }
}
