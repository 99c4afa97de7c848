//! The block tables of one request on one rank.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::TableShape;

/// A block table per layer group of the model, in order; one without blocks where the rank holds nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tables {
    /// The tables.
    pub groups: Vec<BlockTable>,
}

/// The blocks of one request in one layer group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockTable {
    /// The first token of the first block: a multiple of `block_tokens * cp`, 0 in a ring.
    pub first_token: u64,
    /// Whether token `t` lies where token `t mod (blocks * block_tokens * cp)` would.
    pub ring: bool,
    /// The blocks.
    pub blocks: TableBlocks,
}

/// Block numbers, or only how many there are: programs planned from either have the same segments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TableBlocks {
    /// This rank's own blocks of the request, in token order.
    Known(#[serde(with = "raw")] Arc<[u32]>),
    /// The blocks are known elsewhere; there are this many.
    Absent(u32),
}

impl Tables {
    /// The same tables with the block numbers left out: what a peer needs for planning, but not for touching.
    pub fn shapes(&self) -> Tables {
        Tables { groups: self.groups.iter().map(|table| BlockTable::from(table.shape())).collect() }
    }
}

impl BlockTable {
    /// A table whose first block holds `first_token`.
    pub fn known(first_token: u64, blocks: impl Into<Arc<[u32]>>) -> Self {
        BlockTable { first_token, ring: false, blocks: TableBlocks::Known(blocks.into()) }
    }

    /// Its shape.
    pub fn shape(&self) -> TableShape {
        TableShape { first_token: self.first_token, blocks: self.blocks.count(), ring: self.ring }
    }
}

/// The tables of a model with one layer group.
impl From<BlockTable> for Tables {
    fn from(table: BlockTable) -> Self {
        Tables { groups: vec![table] }
    }
}

impl From<TableShape> for BlockTable {
    fn from(shape: TableShape) -> Self {
        let TableShape { first_token, blocks, ring } = shape;
        BlockTable { first_token, ring, blocks: TableBlocks::Absent(blocks) }
    }
}

impl TableBlocks {
    /// How many.
    pub fn count(&self) -> u32 {
        match self {
            TableBlocks::Known(blocks) => u32::try_from(blocks.len()).unwrap_or(u32::MAX),
            TableBlocks::Absent(count) => *count,
        }
    }

    /// The block numbers, where they are known.
    pub fn known(&self) -> Option<&Arc<[u32]>> {
        match self {
            TableBlocks::Known(blocks) => Some(blocks),
            TableBlocks::Absent(_) => None,
        }
    }
}

/// Block numbers on the wire: raw little-endian, four bytes each.
mod raw {
    use core::fmt;
    use std::sync::Arc;

    use serde::de::{Error, Visitor};
    use serde::{Deserializer, Serializer};

    use crate::limits::TABLE_BLOCKS_MAX;

    pub(super) fn serialize<S: Serializer>(blocks: &Arc<[u32]>, serializer: S) -> Result<S::Ok, S::Error> {
        let mut bytes = Vec::with_capacity(blocks.len() * 4);
        for block in blocks.iter() {
            bytes.extend_from_slice(&block.to_le_bytes());
        }
        serializer.serialize_bytes(&bytes)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<[u32]>, D::Error> {
        deserializer.deserialize_bytes(Blocks)
    }

    struct Blocks;

    impl Visitor<'_> for Blocks {
        type Value = Arc<[u32]>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {TABLE_BLOCKS_MAX} block numbers of four bytes")
        }

        fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Self::Value, E> {
            let (blocks, rest) = bytes.as_chunks::<4>();
            if !rest.is_empty() || blocks.len() > TABLE_BLOCKS_MAX {
                return Err(E::invalid_length(bytes.len(), &self));
            }
            Ok(blocks.iter().map(|block| u32::from_le_bytes(*block)).collect())
        }
    }
}
