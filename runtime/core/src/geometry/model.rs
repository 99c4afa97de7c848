//! The KV of a model, as no parallelism or storage changes it.

use core::ops::Range;

use serde::{Deserialize, Serialize};

use super::Dtype;

/// A model's KV: layers in groups that are stored alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    /// For people; two models with different names may have the same KV.
    pub name: String,
    /// Layers of the model; those without KV count.
    pub layers: u32,
    /// The groups; a layer may be in several (attention and state), or in none.
    pub groups: Vec<LayerGroup>,
}

/// Layers whose KV has the same form and is stored under one block table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerGroup {
    /// For people and messages.
    pub name: String,
    /// Its layers, ascending numbers of model layers.
    pub layers: Vec<u32>,
    /// Type of all its elements.
    pub dtype: Dtype,
    /// Which tokens it keeps.
    pub extent: Extent,
    /// What a layer keeps per token: K and V, a latent, sections of state.
    pub tensors: Vec<Tensor>,
}

/// Which tokens a layer group keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Extent {
    /// All.
    Full,
    /// The last ones.
    Window {
        /// How many.
        tokens: u32,
    },
    /// None: a state of fixed size per request, kept as one block of one token; with context parallelism on the first rank.
    State,
}

/// One tensor of a layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tensor {
    /// Which one: `k`, `v`, …; both sides must name them alike, in the same order.
    pub name: String,
    /// Heads, or other units that are divided whole.
    pub heads: u32,
    /// Elements per head per token.
    pub elements: u32,
    /// How it is divided.
    pub sharding: Sharding,
}

/// How the ranks that divide heads hold a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sharding {
    /// Equal parts; with more ranks than heads, equal numbers of ranks hold each head. Anything else is refused.
    Heads,
    /// Parts as equal as possible, the first ranks have one head more. More ranks than heads are refused.
    HeadsUneven,
    /// Whole on every rank: MLA's latent, an indexer.
    Replicated,
}

impl Model {
    /// Bytes that a token adds in all layers that keep every token.
    pub fn bytes_per_token(&self) -> u64 {
        self.bytes_of(|extent| extent == Extent::Full)
    }

    /// Bytes of state of a request, in all layers.
    pub fn state_bytes(&self) -> u64 {
        self.bytes_of(|extent| extent == Extent::State)
    }

    fn bytes_of(&self, wanted: impl Fn(Extent) -> bool) -> u64 {
        let groups = self.groups.iter().filter(|group| wanted(group.extent));
        groups.map(LayerGroup::bytes_per_token).fold(0, u64::saturating_add)
    }
}

impl LayerGroup {
    /// Bytes that all its layers keep for one token, or of its state.
    pub fn bytes_per_token(&self) -> u64 {
        let head = |tensor: &Tensor| u64::from(tensor.elements).saturating_mul(u64::from(self.dtype.bytes()));
        let bytes = self.tensors.iter().map(|tensor| head(tensor).saturating_mul(u64::from(tensor.heads)));
        bytes.fold(0, u64::saturating_add).saturating_mul(self.layers.len() as u64)
    }
}

impl Extent {
    /// The tokens that a destination needs of a request of `tokens` tokens of which it has the first `have`. What it has counts
    /// only where all tokens are kept.
    pub fn needed(self, tokens: u64, have: u64) -> Range<u64> {
        match self {
            Extent::Full => have.min(tokens)..tokens,
            Extent::Window { tokens: window } => tokens.saturating_sub(u64::from(window))..tokens,
            Extent::State => 0..tokens.min(1),
        }
    }
}
