//! What a program must be before anything acts on it.

use super::{End, Program, Segment, Side};
use crate::PoolLayout;
use crate::limits::{
    LAYER_GROUPS_MAX, PLANES_MAX, RANKS_MAX, SEGMENT_PLANES_MAX, SEGMENTS_MAX, TABLE_BLOCKS_MAX, TOKENS_MAX,
};

/// Why a program cannot be run, or bytes are no program. Whoever planned or sent it is at fault: plan again from the layouts
/// and tables that the peers hold now, and reject the transfer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProgramError {
    /// More of something than [`crate::limits`] allows.
    #[error("the program has {value} {what}, at most {limit} are allowed: split the request")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How much of it.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// A field of a segment has a value that no planner gives it.
    #[error("segment {segment}: {field} is {value}, which no plan has: plan again")]
    Field {
        /// Index of the segment.
        segment: usize,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// Tokens or heads of a block lie over each other.
    #[error(
        "segment {segment}, {end:?}: tokens {token_pitch} bytes and heads {head_pitch} bytes apart overlap: plan again"
    )]
    Overlap {
        /// Index of the segment.
        segment: usize,
        /// At which end.
        end: End,
        /// Bytes between tokens.
        token_pitch: u64,
        /// Bytes between heads.
        head_pitch: u64,
    },
    /// The block table that a segment names is not there.
    #[error("segment {segment}, {end:?}: block table {table} is absent: send it, or fill it in with `with_tables`")]
    TableAbsent {
        /// Index of the segment.
        segment: usize,
        /// At which end.
        end: End,
        /// The table that it names.
        table: u32,
    },
    /// The block table is too short, or starts too late, for the tokens.
    #[error(
        "segment {segment}, {end:?}: needs blocks {first}..={last} of the request, table {table} holds {held_first}..{held_end}: \
         send the table for all of the tokens"
    )]
    TableShort {
        /// Index of the segment.
        segment: usize,
        /// At which end.
        end: End,
        /// The table that it names.
        table: u32,
        /// First block that it needs.
        first: u64,
        /// Last block that it needs.
        last: u64,
        /// First block in the table.
        held_first: u64,
        /// One past the last block in the table.
        held_end: u64,
    },
    /// A block number that the plane does not have.
    #[error(
        "segment {segment}, {end:?}: block {block} is not among the {blocks} blocks of plane {plane}: check the table's pool"
    )]
    NoSuchBlock {
        /// Index of the segment.
        segment: usize,
        /// At which end.
        end: End,
        /// The plane.
        plane: u32,
        /// The largest block number in the table.
        block: u32,
        /// Blocks of the plane.
        blocks: u32,
    },
    /// A plane that the layout does not have.
    #[error("segment {segment}, {end:?}: plane {plane} is not among the {planes} planes of the pool: check the layout")]
    NoSuchPlane {
        /// Index of the segment.
        segment: usize,
        /// At which end.
        end: End,
        /// The plane.
        plane: u64,
        /// Planes of the pool.
        planes: usize,
    },
    /// Bytes that a block does not have.
    #[error(
        "segment {segment}, {end:?}: reaches byte {bytes} of blocks that have {block_bytes} in plane {plane}: check the layout"
    )]
    OutsideBlock {
        /// Index of the segment.
        segment: usize,
        /// At which end.
        end: End,
        /// The plane.
        plane: u32,
        /// One past the last byte that it reaches.
        bytes: u64,
        /// Bytes of a block.
        block_bytes: u64,
    },
    /// Encoded bytes end too early, or go on too long.
    #[error("the encoded program has {have} bytes where {need} were expected: it was cut or is not a program")]
    Length {
        /// Bytes that there are.
        have: u64,
        /// Bytes that were expected.
        need: u64,
    },
    /// A byte or a reference that no encoder writes.
    #[error("the encoded program has {value} as a {what}: it is damaged or not a program")]
    Malformed {
        /// What it should have been.
        what: &'static str,
        /// What it was.
        value: u64,
    },
}

impl Program {
    /// Checks everything that `end`, whose pool has `layout`, can be made to touch: its tables are there and long enough, every
    /// block exists in every plane, every byte lies inside its block. Both ends' structure is checked too.
    ///
    /// `layout` must itself be valid ([`PoolLayout::validate`]). Costs O(planes of segments + blocks of tables), not pieces.
    pub fn validate(&self, end: End, layout: &PoolLayout) -> Result<(), ProgramError> {
        self.validate_structure()?;
        let mut largest = Vec::with_capacity(self.tables(end).len());
        for table in self.tables(end) {
            largest.push(table.as_ref().and_then(|table| table.iter().copied().max()));
        }
        for (index, segment) in self.segments.iter().enumerate() {
            let side = segment.side(end);
            if segment.start == segment.end {
                continue;
            }
            let table = self.tables(end).get(side.table as usize).and_then(Option::as_ref);
            let table = table.ok_or(ProgramError::TableAbsent { segment: index, end, table: side.table })?;
            let Some((first, last)) = side.blocks(segment.start, segment.end) else { continue };
            let held_end = side.first_block.saturating_add(table.len() as u64);
            if first < side.first_block || last >= held_end {
                return Err(ProgramError::TableShort {
                    segment: index,
                    end,
                    table: side.table,
                    first,
                    last,
                    held_first: side.first_block,
                    held_end,
                });
            }
            let block = largest.get(side.table as usize).copied().flatten().unwrap_or(0);
            check_planes(index, segment, end, block, layout)?;
        }
        Ok(())
    }

    fn validate_structure(&self) -> Result<(), ProgramError> {
        at_most("segments", self.segments.len() as u64, SEGMENTS_MAX as u64)?;
        for tables in [&self.sources, &self.destinations] {
            at_most("block tables", tables.len() as u64, LAYER_GROUPS_MAX as u64)?;
            for table in tables.iter().flatten() {
                at_most("blocks in a table", table.len() as u64, TABLE_BLOCKS_MAX as u64)?;
            }
        }
        let mut planes = 0u64;
        for (index, segment) in self.segments.iter().enumerate() {
            at_most("planes in a segment", u64::from(segment.planes), PLANES_MAX as u64)?;
            at_most("tokens", segment.end, TOKENS_MAX)?;
            planes = planes.saturating_add(u64::from(segment.planes));
            let bad = |field, value| Err(ProgramError::Field { segment: index, field, value });
            for (field, value) in
                [("planes", segment.planes), ("heads", segment.heads), ("run_bytes", segment.run_bytes)]
            {
                if value == 0 {
                    return bad(field, 0);
                }
            }
            if segment.start > segment.end {
                return bad("start", segment.start);
            }
            for end in [End::Source, End::Destination] {
                let side = segment.side(end);
                if side.block_tokens == 0 {
                    return bad("block_tokens", 0);
                }
                if side.cp == 0 || side.cp > RANKS_MAX {
                    return bad("cp", u64::from(side.cp));
                }
                if side.cp_rank >= side.cp {
                    return bad("cp_rank", u64::from(side.cp_rank));
                }
                if side.plane_step == 0 && segment.planes > 1 {
                    return bad("plane_step", 0);
                }
                if !side.is_disjoint(segment) {
                    let Side { token_pitch, head_pitch, .. } = *side;
                    return Err(ProgramError::Overlap { segment: index, end, token_pitch, head_pitch });
                }
            }
        }
        at_most("planes in all segments", planes, SEGMENT_PLANES_MAX)
    }
}

fn at_most(what: &'static str, value: u64, limit: u64) -> Result<(), ProgramError> {
    if value > limit { Err(ProgramError::TooMany { what, value, limit }) } else { Ok(()) }
}

fn check_planes(
    index: usize,
    segment: &Segment,
    end: End,
    block: u32,
    layout: &PoolLayout,
) -> Result<(), ProgramError> {
    let side = segment.side(end);
    let reach = side.reach(segment);
    for layer in 0..u64::from(segment.planes) {
        let plane = u64::from(side.plane) + layer * u64::from(side.plane_step);
        // Made only where it is needed: this is in the way of every transfer, once for each plane.
        let missing = || ProgramError::NoSuchPlane { segment: index, end, plane, planes: layout.planes.len() };
        let number = u32::try_from(plane).map_err(|_| missing())?;
        let place = layout.planes.get(number as usize).ok_or_else(missing)?;
        if block >= place.blocks {
            return Err(ProgramError::NoSuchBlock { segment: index, end, plane: number, block, blocks: place.blocks });
        }
        if reach.is_none_or(|bytes| bytes > place.block_bytes) {
            let bytes = reach.unwrap_or(u64::MAX);
            return Err(ProgramError::OutsideBlock {
                segment: index,
                end,
                plane: number,
                bytes,
                block_bytes: place.block_bytes,
            });
        }
    }
    Ok(())
}

impl Side {
    /// First and last of this rank's own blocks of the request that `start..end` touches, if any.
    pub fn blocks(&self, start: u64, end: u64) -> Option<(u64, u64)> {
        let (block_tokens, cp) = (u64::from(self.block_tokens), u64::from(self.cp));
        let first = self.next_held(start);
        if first >= end {
            return None;
        }
        let turns = (end - 1) / block_tokens;
        let last = (turns - (turns % cp + cp - u64::from(self.cp_rank)) % cp) / cp;
        Some((first / block_tokens / cp, last))
    }

    /// One past the last byte of a block that the segment may reach; `None` when that is no number.
    fn reach(&self, segment: &Segment) -> Option<u64> {
        let tokens = u64::from(self.block_tokens - 1).checked_mul(self.token_pitch)?;
        let heads = u64::from(segment.heads - 1).checked_mul(self.head_pitch)?;
        self.offset.checked_add(tokens)?.checked_add(heads)?.checked_add(u64::from(segment.run_bytes))
    }

    /// Whether no byte belongs to two (token, head)s.
    fn is_disjoint(&self, segment: &Segment) -> bool {
        let run = u128::from(segment.run_bytes);
        let (tokens, token_pitch) = (u128::from(self.block_tokens), u128::from(self.token_pitch));
        let (heads, head_pitch) = (u128::from(segment.heads), u128::from(self.head_pitch));
        let nested = |inner: u128, inner_pitch: u128, outer: u128, outer_pitch: u128| {
            (inner == 1 || inner_pitch >= run) && (outer == 1 || outer_pitch >= (inner - 1) * inner_pitch + run)
        };
        nested(heads, head_pitch, tokens, token_pitch) || nested(tokens, token_pitch, heads, head_pitch)
    }
}
