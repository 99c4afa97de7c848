//! A program as bytes: fixed little-endian fields, one encoding for one program.

use std::sync::Arc;

use super::check::ProgramError;
use super::{End, Program, Segment, Side};
use crate::limits::{LAYER_GROUPS_MAX, SEGMENTS_MAX, TABLE_BLOCKS_MAX};

const SEGMENT_BYTES: usize = 2 * SIDE_BYTES + 28;
const SIDE_BYTES: usize = 56;

const ABSENT: u8 = 0;
const INLINE: u8 = 1;
/// The same blocks as an earlier inline table, named by its number.
const SHARED: u8 = 2;

type Tables = Vec<Option<Arc<[u32]>>>;

impl Program {
    /// Appends the program to `out`: about 140 bytes per segment, 4 bytes per block of each different table, a byte per absent one.
    pub fn encode(&self, out: &mut Vec<u8>) {
        self.encode_tables(out, |_| true);
    }

    /// Appends what the program [without](Program::without) the other end's tables is encoded as: what `end` tells the other one.
    pub fn encode_for(&self, end: End, out: &mut Vec<u8>) {
        self.encode_tables(out, |other| other == end);
    }

    fn encode_tables(&self, out: &mut Vec<u8>, is_told: impl Fn(End) -> bool) {
        put_u32(out, self.segments.len());
        for segment in &self.segments {
            put_side(out, &segment.source);
            put_side(out, &segment.destination);
            put_all(out, [segment.planes, segment.heads, segment.run_bytes].map(u32::to_le_bytes));
            put_all(out, [segment.start, segment.end].map(u64::to_le_bytes));
        }
        let mut inline = Vec::new();
        for end in [End::Source, End::Destination] {
            let tables = self.tables(end);
            put_u32(out, tables.len());
            for table in tables {
                put_table(out, table.as_ref().filter(|_| is_told(end)), &mut inline);
            }
        }
    }

    /// Reads what [`Program::encode`] wrote, all of `bytes`. Lengths are capped before anything is allocated for them. The program
    /// is well formed, not yet [valid](Program::validate).
    pub fn decode(bytes: &[u8]) -> Result<Program, ProgramError> {
        let mut reader = Reader { bytes, total: bytes.len() };
        let count = reader.count("segments", SEGMENTS_MAX)?;
        let mut fields = Reader { bytes: reader.take(count.saturating_mul(SEGMENT_BYTES))?, total: bytes.len() };
        let segments = (0..count).map(|_| fields.segment()).collect::<Result<_, _>>()?;
        let mut inline = Vec::new();
        let sources = reader.tables(&mut inline)?;
        let destinations = reader.tables(&mut inline)?;
        if !reader.bytes.is_empty() {
            let (have, left) = (bytes.len() as u64, reader.bytes.len() as u64);
            return Err(ProgramError::Length { have, need: have - left });
        }
        Ok(Program { segments, sources, destinations })
    }
}

/// Counts above the limits of a program saturate, and are then refused by whoever decodes them.
fn put_u32(out: &mut Vec<u8>, value: usize) {
    out.extend_from_slice(&u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes());
}

fn put_side(out: &mut Vec<u8>, side: &Side) {
    let narrow = [side.plane, side.plane_step, side.table, side.block_tokens, side.cp, side.cp_rank];
    put_all(out, narrow.map(u32::to_le_bytes));
    put_all(out, [side.first_block, side.token_pitch, side.head_pitch, side.offset].map(u64::to_le_bytes));
}

fn put_all<const COUNT: usize, const BYTES: usize>(out: &mut Vec<u8>, fields: [[u8; BYTES]; COUNT]) {
    out.extend_from_slice(fields.as_flattened());
}

fn put_table<'a>(out: &mut Vec<u8>, table: Option<&'a Arc<[u32]>>, inline: &mut Vec<&'a Arc<[u32]>>) {
    let Some(table) = table else {
        out.push(ABSENT);
        return;
    };
    if let Some(earlier) = inline.iter().position(|other| Arc::ptr_eq(other, table) || other == &table) {
        out.push(SHARED);
        put_u32(out, earlier);
        return;
    }
    inline.push(table);
    out.push(INLINE);
    put_u32(out, table.len());
    let start = out.len();
    out.resize(start + 4 * table.len(), 0);
    if let Some(room) = out.get_mut(start..) {
        for (bytes, block) in room.chunks_exact_mut(4).zip(table.iter()) {
            bytes.copy_from_slice(&block.to_le_bytes());
        }
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    total: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], ProgramError> {
        let Some((taken, rest)) = self.bytes.split_at_checked(count) else {
            let read = self.total - self.bytes.len();
            return Err(ProgramError::Length { have: self.total as u64, need: read.saturating_add(count) as u64 });
        };
        self.bytes = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ProgramError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32, ProgramError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, ProgramError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn count(&mut self, what: &'static str, limit: usize) -> Result<usize, ProgramError> {
        let value = self.u32()? as usize;
        if value > limit {
            return Err(ProgramError::TooMany { what, value: value as u64, limit: limit as u64 });
        }
        Ok(value)
    }

    fn segment(&mut self) -> Result<Segment, ProgramError> {
        let (source, destination) = (self.side()?, self.side()?);
        let (planes, heads, run_bytes) = (self.u32()?, self.u32()?, self.u32()?);
        let (start, end) = (self.u64()?, self.u64()?);
        Ok(Segment { source, destination, planes, start, end, heads, run_bytes })
    }

    fn side(&mut self) -> Result<Side, ProgramError> {
        let (plane, plane_step, table) = (self.u32()?, self.u32()?, self.u32()?);
        let (block_tokens, cp, cp_rank) = (self.u32()?, self.u32()?, self.u32()?);
        let (first_block, token_pitch, head_pitch, offset) = (self.u64()?, self.u64()?, self.u64()?, self.u64()?);
        Ok(Side { plane, plane_step, table, first_block, block_tokens, cp, cp_rank, token_pitch, head_pitch, offset })
    }

    fn tables(&mut self, inline: &mut Vec<Arc<[u32]>>) -> Result<Tables, ProgramError> {
        let count = self.count("block tables", LAYER_GROUPS_MAX)?;
        let mut tables = Vec::with_capacity(count);
        for _ in 0..count {
            tables.push(self.table(inline)?);
        }
        Ok(tables)
    }

    fn table(&mut self, inline: &mut Vec<Arc<[u32]>>) -> Result<Option<Arc<[u32]>>, ProgramError> {
        match self.array()? {
            [ABSENT] => Ok(None),
            [INLINE] => {
                let count = self.count("blocks in a table", TABLE_BLOCKS_MAX)?;
                let (blocks, _) = self.take(4 * count)?.as_chunks::<4>();
                let table: Arc<[u32]> = blocks.iter().map(|block| u32::from_le_bytes(*block)).collect();
                inline.push(table.clone());
                Ok(Some(table))
            }
            [SHARED] => {
                let number = self.u32()?;
                let earlier = inline.get(number as usize).cloned();
                earlier
                    .map(Some)
                    .ok_or(ProgramError::Malformed { what: "number of an earlier table", value: number.into() })
            }
            [tag] => Err(ProgramError::Malformed { what: "table tag", value: tag.into() }),
        }
    }
}
