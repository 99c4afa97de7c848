//! A model as one group of ranks holds it.

use core::ops::Range;

use serde::{Deserialize, Serialize};

use super::{Extent, Format, LayerGroup, Model, Parallel, Sharding, Tensor};
use crate::Rank;
use crate::limits::{LAYER_GROUPS_MAX, LAYERS_MAX, NAME_BYTES_MAX, PLANES_MAX, RANKS_MAX, TENSORS_MAX, TOKENS_MAX};

/// Everything from which a rank's shard follows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupGeometry {
    /// What is held.
    pub model: Model,
    /// How it is stored.
    pub format: Format,
    /// How it is divided.
    pub parallel: Parallel,
}

/// A block table without its blocks: both ends can derive it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableShape {
    /// The first token of the table's first block: a multiple of `block_tokens * cp`, 0 in a ring.
    pub first_token: u64,
    /// How many blocks this rank has in it.
    pub blocks: u32,
    /// Whether token `t` lies where token `t mod (blocks * block_tokens * cp)` would.
    pub ring: bool,
}

/// Why a geometry is impossible.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GeometryError {
    /// A value outside its limits.
    #[error("{field} is {value}, allowed is {least} to {limit}: correct the geometry")]
    Range {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The least allowed.
        least: u64,
        /// The most allowed.
        limit: u64,
    },
    /// A rank that the group does not have.
    #[error("{rank} is not among the group's {ranks} ranks: correct the rank or tp, pp and cp")]
    NoSuchRank {
        /// The rank.
        rank: Rank,
        /// Ranks of the group.
        ranks: u32,
    },
    /// `adp` does not divide `tp`.
    #[error("adp={adp} does not divide tp={tp}: attention data parallelism takes equal parts of tp")]
    UnevenAdp {
        /// Parts.
        adp: u32,
        /// Of this.
        tp: u32,
    },
    /// Heads cannot be divided over the ranks.
    #[error(
        "group `{group}`, tensor `{tensor}`: {heads} heads cannot be divided over {ranks} ranks, {reason}: choose tp/adp to fit"
    )]
    Heads {
        /// The layer group.
        group: String,
        /// The tensor.
        tensor: String,
        /// Its heads.
        heads: u32,
        /// Ranks that divide them.
        ranks: u32,
        /// What the model demands.
        reason: &'static str,
    },
    /// The pipeline stages are not those of `pp`.
    #[error("{stages} lists of layers for pp={pp}: give one per stage, or none for an even split")]
    StageCount {
        /// Lists.
        stages: usize,
        /// Stages.
        pp: u32,
    },
    /// A layer is held by no stage, or by several.
    #[error("layer {layer} belongs to {stages} pipeline stages: each of the {layers} layers belongs to exactly one")]
    StageCover {
        /// The layer.
        layer: u32,
        /// How many stages hold it.
        stages: u32,
        /// Layers of the model.
        layers: u32,
    },
    /// Layers of a group are not ascending numbers of model layers.
    #[error("group `{group}`: layer {layer} is out of order or not among the {layers} layers: list them ascending")]
    Layer {
        /// The layer group.
        group: String,
        /// The layer.
        layer: u32,
        /// Layers of the model.
        layers: u32,
    },
    /// A size that no machine has.
    #[error(
        "group `{group}`: a block of tensor `{tensor}` overflows a 64-bit size: correct heads, elements or block size"
    )]
    Overflow {
        /// The layer group.
        group: String,
        /// The tensor.
        tensor: String,
    },
}

impl GroupGeometry {
    /// Checks everything; the other methods give no wrong answer without it, but perhaps an empty one.
    pub fn validate(&self) -> Result<(), GeometryError> {
        let Parallel { tp, pp, cp, adp, .. } = self.parallel;
        let ranks = u64::from(RANKS_MAX);
        for (field, value) in [("tp", tp), ("pp", pp), ("cp", cp), ("adp", adp)] {
            within(field, u64::from(value), 1, ranks)?;
        }
        within("tp * pp * cp", u64::from(self.parallel.ranks()), 1, ranks)?;
        if !tp.is_multiple_of(adp) {
            return Err(GeometryError::UnevenAdp { adp, tp });
        }
        within("block_tokens", u64::from(self.format.block_tokens), 1, TOKENS_MAX)?;
        self.validate_model()?;
        self.validate_stages()
    }

    fn validate_model(&self) -> Result<(), GeometryError> {
        let model = &self.model;
        within("bytes of the model's name", model.name.len() as u64, 0, NAME_BYTES_MAX as u64)?;
        within("layers", u64::from(model.layers), 1, u64::from(LAYERS_MAX))?;
        within("layer groups", model.groups.len() as u64, 1, LAYER_GROUPS_MAX as u64)?;
        let mut planes = 0u64;
        for group in &model.groups {
            within("bytes of a group's name", group.name.len() as u64, 0, NAME_BYTES_MAX as u64)?;
            within("tensors", group.tensors.len() as u64, 1, TENSORS_MAX as u64)?;
            within("layers of a group", group.layers.len() as u64, 1, u64::from(model.layers))?;
            if let Extent::Window { tokens } = group.extent {
                within("window", u64::from(tokens), 1, TOKENS_MAX)?;
            }
            let mut next = 0;
            for layer in &group.layers {
                if *layer < next || *layer >= model.layers {
                    let (group, layers) = (group.name.clone(), model.layers);
                    return Err(GeometryError::Layer { group, layer: *layer, layers });
                }
                next = layer + 1;
            }
            planes += (group.layers.len() * group.tensors.len()) as u64;
            for tensor in &group.tensors {
                self.validate_tensor(group, tensor)?;
            }
        }
        within("planes", planes, 1, PLANES_MAX as u64)
    }

    fn validate_tensor(&self, group: &LayerGroup, tensor: &Tensor) -> Result<(), GeometryError> {
        within("bytes of a tensor's name", tensor.name.len() as u64, 0, NAME_BYTES_MAX as u64)?;
        let run_limit = u64::from(u32::MAX / group.dtype.bytes());
        within("elements", u64::from(tensor.elements), 1, run_limit)?;
        within("heads", u64::from(tensor.heads), 1, u64::from(u32::MAX))?;
        let head = u64::from(tensor.elements) * u64::from(group.dtype.bytes());
        // Sixteen tensors of a block lie one after another.
        let block = head
            .checked_mul(u64::from(tensor.heads))
            .and_then(|token| token.checked_mul(u64::from(self.format.block_tokens)))
            .filter(|block| *block <= u64::MAX >> 8);
        if block.is_none() {
            return Err(GeometryError::Overflow { group: group.name.clone(), tensor: tensor.name.clone() });
        }
        let (heads, ranks) = (tensor.heads, self.parallel.head_ranks());
        let reason = match tensor.sharding {
            Sharding::Heads if !heads.is_multiple_of(ranks) && !ranks.is_multiple_of(heads) => {
                "this tensor takes equal parts, or equal copies when there are more ranks than heads"
            }
            Sharding::HeadsUneven if ranks > heads => "every rank must hold at least one",
            _ => return Ok(()),
        };
        let (group, tensor) = (group.name.clone(), tensor.name.clone());
        Err(GeometryError::Heads { group, tensor, heads, ranks, reason })
    }

    fn validate_stages(&self) -> Result<(), GeometryError> {
        let (pp, layers, stages) = (self.parallel.pp, self.model.layers, &self.parallel.stages);
        if stages.is_empty() {
            return within("pp", u64::from(pp), 1, u64::from(layers));
        }
        if stages.len() != pp as usize {
            return Err(GeometryError::StageCount { stages: stages.len(), pp });
        }
        let intervals = stages.iter().map(Vec::len).fold(0, usize::saturating_add);
        within("layer intervals", intervals as u64, 1, u64::from(layers))?;
        let mut holders = vec![0u32; layers as usize];
        for range in stages.iter().flatten() {
            within("end of a layer interval", u64::from(range.end), u64::from(range.start), u64::from(layers))?;
            for holder in holders.iter_mut().take(range.end as usize).skip(range.start as usize) {
                *holder += 1;
            }
        }
        match holders.iter().zip(0..).find(|(stages, _)| **stages != 1) {
            Some((stages, layer)) => Err(GeometryError::StageCover { layer, stages: *stages, layers }),
            None => Ok(()),
        }
    }

    /// Ranks of the group.
    pub fn ranks(&self) -> u32 {
        self.parallel.ranks()
    }

    /// The ranks that take part in requests of attention-data-parallel part `dp`, ascending; none when there is no such part.
    pub fn owners(&self, dp: u32) -> Vec<Rank> {
        let Parallel { cp, tp, .. } = self.parallel;
        let head_ranks = self.parallel.head_ranks();
        let tp_of = |rank: u32| rank.checked_div(cp).and_then(|column| column.checked_rem(tp));
        let owns = |rank: &u32| tp_of(*rank).and_then(|tp| tp.checked_div(head_ranks)) == Some(dp);
        (0..self.ranks().min(RANKS_MAX)).filter(owns).map(Rank).collect()
    }

    /// The tokens of layer group `group` that a destination needs of a request of `tokens` tokens of which it has the first `have`:
    /// see [`Extent::needed`].
    pub fn needed(&self, group: usize, tokens: u64, have: u64) -> Range<u64> {
        self.model.groups.get(group).map_or(0..0, |group| group.extent.needed(tokens, have))
    }

    /// Tokens per block of a layer group: 1 for state.
    pub fn block_tokens(&self, group: usize) -> u32 {
        match self.model.groups.get(group).map(|group| group.extent) {
            Some(Extent::State) => 1,
            _ => self.format.block_tokens,
        }
    }

    /// The block table that `rank` needs for a request of `tokens` tokens: all of its blocks, or for a window those from the first
    /// needed token on. No blocks where the rank holds no layer of the group.
    pub fn blocks_for(&self, group: usize, tokens: u64, rank: Rank) -> TableShape {
        let block_tokens = u64::from(self.block_tokens(group));
        let (Some(layers), cp) = (self.model.groups.get(group).map(|group| &group.layers), u64::from(self.parallel.cp))
        else {
            return TableShape::default();
        };
        let stride = block_tokens.saturating_mul(cp);
        let columns = u64::from(self.parallel.tp).saturating_mul(cp);
        let (Some(stage), true) = (u64::from(rank.0).checked_div(columns), stride > 0) else {
            return TableShape::default();
        };
        let needed = self.needed(group, tokens, 0);
        let first_token = needed.start / stride * stride;
        let holds = |layer: &u32| self.parallel.holds(stage as u32, *layer, self.model.layers);
        if needed.is_empty() || !layers.iter().any(holds) {
            return TableShape { first_token, ..TableShape::default() };
        }
        let blocks = (needed.end - first_token).div_ceil(block_tokens);
        let blocks = (blocks + cp - 1).saturating_sub(u64::from(rank.0) % cp) / cp;
        TableShape { first_token, blocks: u32::try_from(blocks).unwrap_or(u32::MAX), ring: false }
    }

    /// Bytes that a handover to one attention-data-parallel part of this group brings: over its ranks, everything that each
    /// holds of the tokens needed. Duplicated heads and replicated tensors count at every rank that holds them.
    pub fn bytes_expected(&self, tokens: u64, have: u64) -> u64 {
        let ranks = self.parallel.head_ranks();
        let mut bytes = 0u128;
        for group in &self.model.groups {
            let needed = group.extent.needed(tokens, have);
            let mut token = 0u128;
            for tensor in &group.tensors {
                let heads: u64 = (0..ranks.min(RANKS_MAX)).map(|rank| tensor.heads_of(rank, ranks).len() as u64).sum();
                token += u128::from(heads) * u128::from(tensor.elements) * u128::from(group.dtype.bytes());
            }
            let units = u128::from(needed.end - needed.start).saturating_mul(group.layers.len() as u128);
            bytes = bytes.saturating_add(token.saturating_mul(units));
        }
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    /// What of [`GroupGeometry::bytes_expected`] comes to one of the ranks that take part, on average.
    pub fn bytes_expected_by_a_rank(&self, tokens: u64, have: u64) -> u64 {
        // Every attention-data-parallel part has as many ranks.
        let ranks = self.ranks().checked_div(self.parallel.adp).unwrap_or(1).max(1);
        self.bytes_expected(tokens, have) / u64::from(ranks)
    }
}

impl Tensor {
    /// The heads that rank `index` of the `ranks` that divide them holds.
    pub(super) fn heads_of(&self, index: u32, ranks: u32) -> Range<u32> {
        let (Some(each), Some(more)) = (self.heads.checked_div(ranks), self.heads.checked_rem(ranks)) else {
            return 0..0;
        };
        match self.sharding {
            Sharding::Replicated => 0..self.heads,
            Sharding::Heads if ranks > self.heads => {
                let (_, copies) = self.replica(index, ranks);
                let head = index / copies;
                head..head.saturating_add(1)
            }
            Sharding::Heads | Sharding::HeadsUneven => {
                let start = (u64::from(index) * u64::from(each) + u64::from(index.min(more))) as u32;
                start..start.saturating_add(each).saturating_add(u32::from(index < more))
            }
        }
    }

    /// Which replica of its heads that rank holds, and how many there are.
    pub(super) fn replica(&self, index: u32, ranks: u32) -> (u32, u32) {
        match self.sharding {
            Sharding::Replicated => (index, ranks.max(1)),
            Sharding::Heads if ranks > self.heads => {
                let copies = ranks.checked_div(self.heads).unwrap_or(1).max(1);
                (index % copies, copies)
            }
            Sharding::Heads | Sharding::HeadsUneven => (0, 1),
        }
    }
}

fn within(field: &'static str, value: u64, least: u64, limit: u64) -> Result<(), GeometryError> {
    if (least..=limit).contains(&value) { Ok(()) } else { Err(GeometryError::Range { field, value, least, limit }) }
}
