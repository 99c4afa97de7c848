//! A range of a program whose pieces are even, as the short kernel takes it: whole blocks that both sides store alike, and little else.
//!
//! A piece lies in the same place of every plane, so the host works out the places in one plane, and where planes begin; the rest follows.

use kvferry_core::{End, Program, Segment, Side, UnitRange};

use crate::planes::PlaneTable;
use crate::rectangle::{Cell, Dimension, ITEMS_MAX, Part, Payload, Walk, gcd, parts};

/// Bytes that one warp moves at a time, as in `walk.cu`.
const SHARE_BYTES: u64 = 4096;
/// Places are counted in these, as long as the kernel's vectors.
const VECTOR_BYTES: u64 = 16;
/// Bytes of an encoded rectangle, as in `walk.cu`.
pub(crate) const EVEN_BYTES: usize = 80;
/// Rectangles are gone through one after another.
const RECTANGLES_MAX: usize = 64;
/// Places take eight bytes each, whatever the number of planes.
const PLACES_MAX: usize = 1 << 17;
/// Runs of a block that the range takes only in part; whole ones have to be one.
const RUNS_MAX: u64 = 64;

/// Lowers a range for the short kernel, if all of its pieces are even; else [`lower`](crate::rectangle::lower) takes it.
pub(crate) fn lower_even(program: &Program, range: UnitRange, planes: [PlaneTable<'_>; 2]) -> Option<Payload> {
    let mut lowering = Lowering { program, planes, rectangles: Vec::new(), places: Vec::new(), items: 0, pieces: 0 };
    for part in parts(program, range) {
        lowering.part(&part)?;
    }
    Some(lowering.payload())
}

struct Lowering<'a> {
    program: &'a Program,
    planes: [PlaneTable<'a>; 2],
    rectangles: Vec<(Key, Rectangle)>,
    places: Vec<[u32; 2]>,
    items: u64,
    pieces: u64,
}

/// What places follow from: segments that differ in planes only, as K and V do, share them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    tables: [(u32, u64); 2],
    block_tokens: [u32; 2],
    strides: [u64; 2],
    token_pitches: [u64; 2],
    /// First token, and cells.
    token: u64,
    cells: u64,
    cell: Cell,
}

/// Planes x pieces.
#[derive(Clone, Copy, Debug)]
struct Rectangle {
    sides: [Planes; 2],
    items: u32,
    bytes: u32,
    shares: u32,
    pieces: u32,
    first: u32,
}

/// Planes of one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Planes {
    /// Of the first plane; or what is added to the bases in the table.
    base: u64,
    step: u64,
    /// Address of the first base, if planes do not follow each other evenly.
    table: u64,
}

impl Lowering<'_> {
    fn part(&mut self, part: &Part) -> Option<()> {
        let segment = self.program.segments.get(part.segment)?;
        if segment.source.cp != 1 || segment.destination.cp != 1 {
            return None;
        }
        let tokens = u64::from(gcd(segment.source.block_tokens, segment.destination.block_tokens));
        let start_of = |token: u64| token.checked_div(tokens).map(|cell| cell * tokens);
        // Whole cells, and what is left before and behind them.
        let (first, last) = (start_of(part.start.checked_add(tokens - 1)?)?, start_of(part.end)?);
        if first > last {
            return self.cells(segment, part, part.start, 1, part.end - part.start);
        }
        if part.start < first {
            self.cells(segment, part, part.start, 1, first - part.start)?;
        }
        if first < last {
            self.cells(segment, part, first, (last - first) / tokens, tokens)?;
        }
        if last < part.end {
            self.cells(segment, part, last, 1, part.end - last)?;
        }
        Some(())
    }

    /// Adds `cells` cells of `tokens` tokens from `token` on, which lie in one block on either side; more than one are whole.
    fn cells(&mut self, segment: &Segment, part: &Part, token: u64, cells: u64, tokens: u64) -> Option<()> {
        let cell = Cell::of(segment, tokens);
        let runs = cell.runs();
        if runs > if cells == 1 { RUNS_MAX } else { 1 } || !cell.run_bytes.is_multiple_of(VECTOR_BYTES) {
            return None;
        }
        let sides = [&segment.source, &segment.destination];
        let [source, destination] = [0, 1].map(|end| planes_of(self.planes.get(end)?, sides.get(end)?, part));
        let ((source, source_stride), (destination, destination_stride)) = (source?, destination?);
        let strides = [source_stride, destination_stride];
        let key = Key {
            tables: sides.map(|side| (side.table, side.first_block)),
            block_tokens: sides.map(|side| side.block_tokens),
            strides,
            token_pitches: sides.map(|side| side.token_pitch),
            token,
            cells,
            cell,
        };
        let known = self.rectangles.iter().find(|(known, _)| *known == key).map(|(_, known)| known.first);
        let first = match known {
            Some(first) => first,
            None => self.place(&key, sides)?,
        };
        let pieces = cells.checked_mul(runs)?;
        let shares = cell.run_bytes.div_ceil(SHARE_BYTES);
        let moved = pieces.checked_mul(part.planes.into())?;
        let items = moved.checked_mul(shares)?;
        self.items = self.items.checked_add(items).filter(|items| *items <= ITEMS_MAX)?;
        self.pieces = self.pieces.saturating_add(moved);
        let rectangle = Rectangle {
            sides: [source, destination],
            items: items as u32,
            bytes: u32::try_from(cell.run_bytes).ok().filter(|bytes| *bytes <= u32::MAX - SHARE_BYTES as u32)?,
            shares: shares as u32,
            pieces: pieces as u32,
            first,
        };
        self.rectangles.push((key, rectangle));
        (self.rectangles.len() <= RECTANGLES_MAX).then_some(())
    }

    /// Adds the places of a plane's pieces, and says which is the first.
    fn place(&mut self, key: &Key, [source, destination]: [&Side; 2]) -> Option<u32> {
        let Key { token, cells, cell, strides, .. } = *key;
        let program = self.program;
        let table = |end, table: u32| program.tables(end).get(table as usize)?.as_deref();
        let tables = [table(End::Source, source.table)?, table(End::Destination, destination.table)?];
        let (first, count) = (self.places.len(), usize::try_from(cells).ok()?);
        if first.saturating_add(count) > PLACES_MAX {
            return None;
        }
        let step = u64::from(gcd(source.block_tokens, destination.block_tokens));
        let extent = |end: usize| cell.outer.extent(end)?.checked_add(cell.inner.extent(end)?);
        let run = |end: usize, side: &Side| {
            let inside = Inside::of(side, token, step, extent(end)?)?;
            inside.vectors(tables.get(end)?, *strides.get(end)?, count)
        };
        let (of_source, of_destination) = (run(0, source)?, run(1, destination)?);
        if cell.runs() == 1 {
            self.places.extend(of_source.iter().zip(&of_destination).map(|(from, to)| [*from, *to]));
        } else {
            let (from, to) = (of_source.first()?, of_destination.first()?);
            for row in 0..cell.outer.count {
                for column in 0..cell.inner.count {
                    let at = |end: usize| vectors(cell.outer.at(end, row)?.checked_add(cell.inner.at(end, column)?)?);
                    self.places.push([from.checked_add(at(0)?)?, to.checked_add(at(1)?)?]);
                }
            }
        }
        u32::try_from(first).ok()
    }

    fn payload(&self) -> Payload {
        let mut bytes = Vec::with_capacity(self.rectangles.len() * EVEN_BYTES + self.places.len() * 8);
        for (_, rectangle) in &self.rectangles {
            for Planes { base, step, table } in rectangle.sides {
                bytes.extend([base, step, table].map(u64::to_le_bytes).as_flattened());
            }
            let (of_shares, shift) = factor(rectangle.shares);
            let (of_pieces, shift_of_pieces) = factor(rectangle.pieces);
            let Rectangle { items, bytes: length, shares, pieces, first, .. } = *rectangle;
            let words = [items, length, shares, pieces, first, of_shares, of_pieces, shift | shift_of_pieces << 8];
            bytes.extend(words.map(u32::to_le_bytes).as_flattened());
        }
        let start = bytes.len();
        bytes.resize(start + 8 * self.places.len(), 0);
        for (to, places) in bytes.get_mut(start..).unwrap_or_default().chunks_exact_mut(8).zip(&self.places) {
            to.copy_from_slice(places.map(u32::to_le_bytes).as_flattened());
        }
        let rectangles = self.rectangles.len() as u32;
        Payload { walk: Walk::Even, bytes, rectangles, items: self.items as u32, pieces: self.pieces }
    }
}

/// Where the planes of a part lie on one side, and their common block stride.
fn planes_of(table: &PlaneTable<'_>, side: &Side, part: &Part) -> Option<(Planes, u64)> {
    let first = u64::from(part.plane).checked_mul(side.plane_step.into())?.checked_add(side.plane.into())?;
    let count = part.planes as usize;
    if let Some(step) = table.step
        && (count == 1 || side.plane_step > 0)
    {
        return evenly(table, side, (usize::try_from(first).ok()?, count), step);
    }
    let mut planes = table.entries.get(usize::try_from(first).ok()?..)?.iter().step_by(side.plane_step.max(1) as usize);
    let (&[base, stride], rest) = (planes.next()?, planes.take(count.checked_sub(1)?));
    if rest.len() + 1 != count || (count > 1 && side.plane_step == 0) {
        return None;
    }
    let mut odd = base.wrapping_add(side.offset) | stride;
    let (mut step, mut before, mut is_straight) = (None, base, true);
    for &[base, other] in rest {
        // Wraps, as the kernel counts.
        let here = base.wrapping_sub(before);
        is_straight &= *step.get_or_insert(here) == here;
        before = base;
        if other != stride {
            return None;
        }
        odd |= here;
    }
    if !odd.is_multiple_of(VECTOR_BYTES) {
        return None;
    }
    let planes = if is_straight {
        Planes { base: base.wrapping_add(side.offset), step: step.unwrap_or(0), table: 0 }
    } else {
        let entry = size_of::<[u64; 2]>() as u64;
        let table = table.address.wrapping_add(first * entry);
        Planes { base: side.offset, step: u64::from(side.plane_step) * entry, table }
    };
    Some((planes, stride))
}

/// The same where all planes of the pool follow each other evenly, without a look at each.
fn evenly(table: &PlaneTable<'_>, side: &Side, (first, count): (usize, usize), step: u64) -> Option<(Planes, u64)> {
    let last = count.checked_sub(1)?.checked_mul(side.plane_step as usize)?.checked_add(first)?;
    let (&[base, stride], _last) = (table.entries.get(first)?, table.entries.get(last)?);
    let (base, step) =
        (base.wrapping_add(side.offset), if count > 1 { step.wrapping_mul(side.plane_step.into()) } else { 0 });
    (base | stride | step).is_multiple_of(VECTOR_BYTES).then_some((Planes { base, step, table: 0 }, stride))
}

/// A number of bytes in vectors, if it is that many and the kernel counts so far.
fn vectors(bytes: u64) -> Option<u32> {
    bytes.is_multiple_of(VECTOR_BYTES).then_some(bytes / VECTOR_BYTES)?.try_into().ok()
}

impl Dimension {
    /// Bytes before its `index`th, at the source (0) or the destination (1).
    fn at(&self, end: usize, index: u64) -> Option<u64> {
        self.pitches.get(end)?.checked_mul(index)
    }

    /// Bytes before its last.
    fn extent(&self, end: usize) -> Option<u64> {
        self.at(end, self.count.saturating_sub(1))
    }
}

/// Where cells lie in one side's blocks.
struct Inside {
    /// Index into the table of the first cell's block.
    index: usize,
    /// The first cell in its block, and how many there are in one.
    cell: u64,
    per_block: u64,
    /// Vectors from cell to cell, and from the first cell's start to its first token, which only a single cell has.
    pitch: u32,
    start: u32,
    /// Bytes behind a block's start that any cell's run begins at.
    reach: u64,
}

impl Inside {
    /// For cells of `tokens` tokens from the one on in which `token` is; the last run of a cell begins `extent` bytes behind its first.
    fn of(side: &Side, token: u64, tokens: u64, extent: u64) -> Option<Inside> {
        let block_tokens = u64::from(side.block_tokens);
        let block = token.checked_div(block_tokens)?;
        let rest = token - block * block_tokens;
        let (cell, start) = (rest.checked_div(tokens)?, rest % tokens);
        let per_block = block_tokens / tokens;
        let (pitch, start) = (side.token_pitch.checked_mul(tokens)?, side.token_pitch.checked_mul(start)?);
        let reach = pitch.checked_mul(per_block)?.checked_add(start)?.checked_add(extent)?;
        let index = usize::try_from(block.checked_sub(side.first_block)?).ok()?;
        // With one cell a block nothing is counted in its pitch.
        let pitch = if per_block > 1 { vectors(pitch)? } else { 0 };
        Some(Inside { index, cell, per_block, pitch, start: vectors(start)?, reach })
    }

    /// The places of `count` cells, in vectors.
    fn vectors(&self, table: &[u32], stride: u64, count: usize) -> Option<Vec<u32>> {
        let blocks = (self.cell + count as u64).div_ceil(self.per_block);
        let slots = table.get(self.index..)?.get(..usize::try_from(blocks).ok()?)?;
        // Nothing below is larger than this, which is no more than 32 bits of vectors.
        let largest = u64::from(slots.iter().copied().max()?).checked_mul(stride)?.checked_add(self.reach)?;
        vectors(largest.checked_next_multiple_of(VECTOR_BYTES)?)?;
        let (stride, start) = (vectors(stride)?, self.start);
        if self.per_block == 1 {
            return Some(slots.iter().map(|slot| slot * stride + start).collect());
        }
        let (mut places, mut cell, mut left) = (Vec::with_capacity(count), self.cell, count as u64);
        for slot in slots {
            let end = self.per_block.min(cell + left);
            places.extend((cell..end).map(|cell| slot * stride + cell as u32 * self.pitch + start));
            left -= end - cell;
            cell = 0;
        }
        Some(places)
    }
}

/// A factor and a shift by which the kernel divides numbers below 2^31: `n / divisor == n * factor >> shift`.
fn factor(divisor: u32) -> (u32, u32) {
    // 2^(31 + bits) / divisor, rounded up, which errs by less than one in 2^31 / n; below 2^32, for divisor > 2^(bits - 1).
    let divisor = u64::from(divisor.max(1));
    let bits = u64::BITS - (divisor - 1).leading_zeros();
    ((1u64 << (31 + bits)).div_ceil(divisor) as u32, 31 + bits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_are_divided_as_by_division(number in 0u32..1 << 31, divisor in 1u32..1 << 31, shift in 0u32..31) {
            for divisor in [divisor, (divisor >> shift).max(1)] {
                let (factor, shift) = factor(divisor);
                for number in [number, number / divisor * divisor, (number / divisor * divisor).saturating_sub(1)] {
                    prop_assert_eq!(((u64::from(number) * u64::from(factor)) >> shift) as u32, number / divisor);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn even_planes_are_found_without_a_look_at_each(
            (base, distance, stride) in (0u64..64, 0u64..64, 0u64..64),
            (held, plane, plane_step) in (0usize..9, 0u32..5, 0u32..4),
            (first, planes, offset) in (0u32..4, 0u32..6, 0u64..64),
            (odd, is_odd) in (0usize..9, proptest::bool::weighted(0.2)),
            scale in prop::sample::select(vec![1u64, 8, 16]),
        ) {
            let entry = |index: u64| [(base + index * distance) * scale, stride * scale];
            let mut entries: Vec<[u64; 2]> = (0..held as u64).map(entry).collect();
            if let Some(entry) = entries.get_mut(odd).filter(|_| is_odd) {
                entry[odd % 2] ^= 16;
            }
            let side = Side {
                plane, plane_step, offset: offset * scale,
                table: 0, first_block: 0, block_tokens: 1, cp: 1, cp_rank: 0, token_pitch: 0, head_pitch: 0,
            };
            let part = Part { segment: 0, plane: first, planes, start: 0, end: 1 };
            let table = |step| PlaneTable { address: 4096, entries: &entries, step };
            let found = planes_of(&table(crate::planes::step(&entries)), &side, &part);
            prop_assert_eq!(found, planes_of(&table(None), &side, &part));
        }
    }

    #[test]
    fn the_largest_numbers_are_divided_as_by_division() {
        for divisor in (1..5000).chain((0..31).flat_map(|bits| [(1u32 << bits) - 1, 1 << bits, (1 << bits) + 1])) {
            let divisor = divisor.max(1);
            let (factor, shift) = factor(divisor);
            let last = (1u32 << 31) - 1;
            for number in [0, 1, divisor - 1, divisor, last, last / divisor * divisor, last / divisor * divisor - 1] {
                assert_eq!(
                    ((u64::from(number) * u64::from(factor)) >> shift) as u32,
                    number / divisor,
                    "{number} / {divisor}"
                );
            }
        }
    }
}
