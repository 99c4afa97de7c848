//! What a transfer moves: block tables and strides, never a list of pieces.
//!
//! **Stream order.** The bytes of a range of a program are ordered by segment, then plane, then token interval, where intervals end at block
//! edges of *either* side and skip what one side does not hold. Inside an interval the order is token, head, byte; when both sides
//! keep a head's tokens together (`head_pitch > token_pitch`) it is head, token, byte. All of that follows from the segments
//! alone, so each end walks the same stream with nothing but its own tables and layout.

mod check;
mod codec;
mod copies;
mod cut;
mod measure;
mod spans;
mod strips;
mod tiles;
mod walk;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use check::ProgramError;
pub use copies::Copies;
pub use spans::Spans;
pub use strips::{Strip, Strips};
pub use tiles::{Tile, Tiles};

/// The copies for one pair of ranks. Its size is independent of the number of layers.
///
/// A table that the receiver of an encoded program already has is absent (`None`) on the wire.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Program {
    /// Rectangles of KV, walked in order; the bytes of a stream follow this order too.
    pub segments: Vec<Segment>,
    /// Block tables of the source rank, named by [`Side::table`].
    pub sources: Vec<Option<Arc<[u32]>>>,
    /// Block tables of the destination rank, named by [`Side::table`].
    pub destinations: Vec<Option<Arc<[u32]>>>,
}

/// One (layer group, tensor): `planes` planes × tokens `start..end` × `heads` heads × `run_bytes` bytes.
///
/// Only tokens that **both** sides hold move (they differ under context parallelism).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Where it is read.
    pub source: Side,
    /// Where it is written.
    pub destination: Side,
    /// Planes on either side.
    pub planes: u32,
    /// First token, counted from the request's start.
    pub start: u64,
    /// One past the last token.
    pub end: u64,
    /// Heads (or units of state) per token.
    pub heads: u32,
    /// Contiguous bytes of one head of one token.
    pub run_bytes: u32,
}

/// One end of a [`Segment`].
///
/// Token `t` lies in global block `g = t / block_tokens`; this side holds it when `g % cp == cp_rank`, in the block
/// `table[g / cp - first_block]`, at byte `offset + (t % block_tokens) * token_pitch + head * head_pitch`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Side {
    /// First plane.
    pub plane: u32,
    /// Planes from one layer of the segment to the next.
    pub plane_step: u32,
    /// Which block table.
    pub table: u32,
    /// The block number (counted among this rank's own blocks of the request) that `table[0]` holds.
    pub first_block: u64,
    /// Tokens per block.
    pub block_tokens: u32,
    /// Ranks that share the request's blocks round-robin; 1 without context parallelism.
    pub cp: u32,
    /// Which of them this is.
    pub cp_rank: u32,
    /// Bytes from one token to the next inside a block.
    pub token_pitch: u64,
    /// Bytes from one head to the next.
    pub head_pitch: u64,
    /// Byte of the segment's first head of token 0 in a block.
    pub offset: u64,
}

/// Which end of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// The side that is read.
    Source,
    /// The side that is written.
    Destination,
}

/// A part of a program in (plane, token) units, counted in walking order; see [`Program::units`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitRange {
    /// First unit.
    pub start: u64,
    /// One past the last unit.
    pub end: u64,
}

/// A place in a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Location {
    /// Index into [`PoolLayout::regions`](crate::PoolLayout::regions).
    pub region: u32,
    /// Bytes from the region's start.
    pub offset: u64,
}

/// A contiguous copy: one lowered, merged piece of a program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copy {
    /// Read here.
    pub source: Location,
    /// Written here.
    pub destination: Location,
    /// This many bytes.
    pub bytes: u64,
}

/// A contiguous range of one side's memory, in stream order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its start.
    pub at: Location,
    /// Its length.
    pub bytes: u64,
}

impl Program {
    /// This program without the block tables of `end`, for a reader that has them. Cheap: the other tables are shared.
    pub fn without(&self, end: End) -> Program {
        let absent = |tables: &[Option<Arc<[u32]>>]| vec![None; tables.len()];
        let mut program = self.clone();
        match end {
            End::Source => program.sources = absent(&self.sources),
            End::Destination => program.destinations = absent(&self.destinations),
        }
        program
    }

    /// This program with `tables` as the block tables of `end`.
    pub fn with_tables(mut self, end: End, tables: Vec<Option<Arc<[u32]>>>) -> Program {
        match end {
            End::Source => self.sources = tables,
            End::Destination => self.destinations = tables,
        }
        self
    }

    /// The block tables of `end`.
    pub fn tables(&self, end: End) -> &[Option<Arc<[u32]>>] {
        match end {
            End::Source => &self.sources,
            End::Destination => &self.destinations,
        }
    }
}

impl Segment {
    /// The side at `end`.
    pub fn side(&self, end: End) -> &Side {
        match end {
            End::Source => &self.source,
            End::Destination => &self.destination,
        }
    }

    /// Whether the stream keeps the tokens of one head together inside an interval.
    fn head_major(&self) -> bool {
        self.source.head_pitch > self.source.token_pitch && self.destination.head_pitch > self.destination.token_pitch
    }

    /// Tokens per plane, whether both sides hold them or not; none in a segment that no walker can walk.
    fn tokens(&self) -> u64 {
        if self.source.is_walkable() && self.destination.is_walkable() {
            self.end.saturating_sub(self.start)
        } else {
            0
        }
    }
}

impl Side {
    fn is_walkable(&self) -> bool {
        self.block_tokens > 0 && self.cp_rank < self.cp
    }
}

impl End {
    /// The opposite end.
    pub fn other(self) -> End {
        match self {
            End::Source => End::Destination,
            End::Destination => End::Source,
        }
    }
}

impl UnitRange {
    /// How many units it has.
    pub fn units(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether it has none.
    pub fn is_empty(self) -> bool {
        self.start >= self.end
    }
}
