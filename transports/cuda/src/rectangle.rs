//! A range of a program as the kernel takes it: a few rectangles and the block tables, whatever the number of pieces.

use kvferry_core::{End, Program, Segment, Side, UnitRange};

/// Bytes that one warp moves at a time, as in `walk.cu`.
const CHUNK_BYTES: u64 = 4096;
/// Items are counted in 32 bits, with room for a stride.
pub(crate) const ITEMS_MAX: u64 = 1 << 30;
/// Runs of one cell are counted in 32 bits.
const CELL_RUNS_MAX: u64 = u32::MAX as u64;
const SIDE_BYTES: usize = 56;
/// Bytes of an encoded rectangle, as in `walk.cu`.
pub(crate) const RECTANGLE_BYTES: usize = 2 * SIDE_BYTES + 48;

const DRIVEN_BY_DESTINATION: u32 = 1;
const TOKENS_INNER: u32 = 2;

/// Which kernel takes a payload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Walk {
    /// Rectangles of tokens, then the block tables: any program.
    #[default]
    Tokens,
    /// Rectangles of even pieces, then their places ([`lower_even`](crate::even::lower_even)).
    Even,
}

/// What one launch is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Payload {
    pub(crate) walk: Walk,
    /// What the kernel of that walk takes.
    pub(crate) bytes: Vec<u8>,
    pub(crate) rectangles: u32,
    /// What warps take one by one.
    pub(crate) items: u32,
    /// Contiguous pieces that it moves, in the sense of merged runs.
    pub(crate) pieces: u64,
}

/// Why a range is not lowered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LowerError {
    /// The range has too many items for one launch: halve it.
    #[error("more than {ITEMS_MAX} pieces in one launch")]
    TooMany,
    /// Not even a single token fits a launch.
    #[error("a block of {runs} separate pieces is more than the kernel counts ({CELL_RUNS_MAX}); use smaller blocks")]
    Shape {
        /// Pieces of the smallest unit.
        runs: u64,
    },
    /// A table is absent or short; the program was not validated.
    #[error("a block table is absent or too short")]
    Table,
}

/// Part of a segment: whole rows of planes, the same tokens in each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) segment: usize,
    pub(crate) plane: u32,
    pub(crate) planes: u32,
    /// Tokens, counted from the request's start.
    pub(crate) start: u64,
    pub(crate) end: u64,
}

/// Own blocks of one table that a launch needs, and where they are in the payload.
#[derive(Clone, Copy, Debug)]
struct Slice {
    end: End,
    table: u32,
    /// Own block number of the table's first entry.
    first_block: u64,
    /// Own block numbers, both included.
    first: u64,
    last: u64,
    /// First index in the table.
    from: usize,
    /// Word of the payload's tables that stands for `first`.
    word: u32,
}

/// Whether parts have slices of the tables in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sharing {
    /// One slice of each table, from the first to the last block that any part needs: short where parts need nearly the same blocks.
    All,
    /// No slice has a block that none of its parts needs, whatever the program is: at most a word for each token that is moved.
    Adjacent,
}

/// Lowers a range of a program that was validated at both ends. `planes` are the addresses of the plane tables, source first.
pub(crate) fn lower(program: &Program, range: UnitRange, planes: [u64; 2]) -> Result<Payload, LowerError> {
    lower_sharing(Sharing::All, program, range, planes)
}

/// The same where segments may need few blocks each of tables that are long, and a peer says which.
pub(crate) fn lower_apart(program: &Program, range: UnitRange, planes: [u64; 2]) -> Result<Payload, LowerError> {
    lower_sharing(Sharing::Adjacent, program, range, planes)
}

fn lower_sharing(
    sharing: Sharing,
    program: &Program,
    range: UnitRange,
    planes: [u64; 2],
) -> Result<Payload, LowerError> {
    let parts = parts(program, range);
    let [sources, destinations] = [End::Source, End::Destination].map(|end| slices_of(sharing, program, &parts, end));
    let ((mut slices, of_source), (more, of_destination)) = (sources?, destinations?);
    let sources = slices.len();
    slices.extend(more);
    number(&mut slices)?;
    let blocks: u64 = slices.iter().map(|slice| slice.last - slice.first + 1).sum();
    let room = (parts.len() * RECTANGLE_BYTES).saturating_add(4 * blocks as usize);
    let mut payload = Payload { bytes: Vec::with_capacity(room), ..Payload::default() };
    let mut items = 0u64;
    for (index, part) in parts.iter().enumerate() {
        let Some(segment) = program.segments.get(part.segment) else { continue };
        let Some(cells) = Cells::of(segment, part)? else { continue };
        let more = cells.items(part).ok_or(LowerError::TooMany)?;
        items = items.checked_add(more).filter(|items| *items <= ITEMS_MAX).ok_or(LowerError::TooMany)?;
        payload.pieces = payload.pieces.saturating_add(cells.pieces(segment, part));
        let ends =
            [(&segment.source, planes[0], 0, &of_source), (&segment.destination, planes[1], sources, &of_destination)];
        for (side, table, start, of) in ends {
            let slice = of.get(index).and_then(|slice| slices.get(start + (*slice)?)).ok_or(LowerError::Table)?;
            // Own block `b` is word `base + b`, modulo 2^32.
            encode_side(&mut payload.bytes, side, table, slice.word.wrapping_sub(slice.first as u32));
        }
        let head = [items as u32, part.plane, part.start as u32, part.end as u32];
        let tail = [segment.heads, segment.run_bytes, cells.flags];
        for word in head.into_iter().chain(cells.words()).chain(tail) {
            payload.bytes.extend(word.to_le_bytes());
        }
        payload.rectangles += 1;
    }
    payload.items = items as u32;
    for slice in &slices {
        let blocks = program.tables(slice.end).get(slice.table as usize).and_then(Option::as_deref);
        let count = (slice.last - slice.first) as usize + 1;
        let blocks = blocks.and_then(|blocks| blocks.get(slice.from..slice.from.checked_add(count)?));
        payload.bytes.extend(blocks.ok_or(LowerError::Table)?.iter().flat_map(|block| block.to_le_bytes()));
    }
    Ok(payload)
}

/// The range cut into rectangles: per segment at most a part of a row, whole rows, and a part of a row.
pub(crate) fn parts(program: &Program, range: UnitRange) -> Vec<Part> {
    let mut parts = Vec::with_capacity(program.segments.len() + 2);
    let mut base = 0u64;
    for (index, segment) in program.segments.iter().enumerate() {
        let tokens = segment.end.saturating_sub(segment.start);
        let end = base.saturating_add(tokens.saturating_mul(u64::from(segment.planes)));
        let (mut from, to) = (range.start.max(base), range.end.min(end));
        while from < to {
            let (plane, token) = ((from - base) / tokens, (from - base) % tokens);
            let rows = (to - from) / tokens;
            let (planes, until) =
                if token == 0 && rows > 0 { (rows, tokens) } else { (1, tokens.min(token + (to - from))) };
            parts.push(Part {
                segment: index,
                plane: plane as u32,
                planes: planes as u32,
                start: segment.start + token,
                end: segment.start + until,
            });
            from += planes * (until - token);
        }
        base = end;
    }
    parts
}

/// The blocks that the parts need of the tables of one end, and for each part which of these slices has its own; none where it needs none.
fn slices_of(
    sharing: Sharing,
    program: &Program,
    parts: &[Part],
    end: End,
) -> Result<(Vec<Slice>, Vec<Option<usize>>), LowerError> {
    let mut slices: Vec<Slice> = Vec::new();
    let mut of = Vec::with_capacity(parts.len());
    for part in parts {
        let side = program.segments.get(part.segment).map(|segment| segment.side(end));
        let blocks = side.and_then(|side| Some((side, side.blocks(part.start, part.end)?)));
        let Some((side, (first, last))) = blocks else {
            of.push(None);
            continue;
        };
        let from = first.checked_sub(side.first_block).ok_or(LowerError::Table)? as usize;
        let is_of = |slice: &Slice| (slice.table, slice.first_block) == (side.table, side.first_block);
        let found = match sharing {
            Sharing::All => slices.iter().position(is_of),
            Sharing::Adjacent => slices.len().checked_sub(1),
        };
        let joins = |slice: &Slice| {
            let touches = first <= slice.last.saturating_add(1) && slice.first <= last.saturating_add(1);
            is_of(slice) && (sharing == Sharing::All || touches)
        };
        let found = found.and_then(|index| Some((index, slices.get_mut(index).filter(|slice| joins(slice))?)));
        let index = match found {
            Some((index, slice)) => {
                if first < slice.first {
                    (slice.first, slice.from) = (first, from);
                }
                slice.last = slice.last.max(last);
                index
            }
            None => {
                let (table, first_block) = (side.table, side.first_block);
                slices.push(Slice { end, table, first_block, first, last, from, word: 0 });
                slices.len() - 1
            }
        };
        of.push(Some(index));
    }
    Ok((slices, of))
}

/// Says where in the payload's tables each slice begins.
fn number(slices: &mut [Slice]) -> Result<(), LowerError> {
    let mut word = 0u32;
    for slice in slices {
        slice.word = word;
        let count = u32::try_from(slice.last - slice.first + 1).map_err(|_| LowerError::Table)?;
        word = word.checked_add(count).ok_or(LowerError::Table)?;
    }
    Ok(())
}

/// How the tokens of a part are dealt out: cells that lie in one block on either side, as many tokens each as both block sizes have in common.
#[derive(Clone, Copy, Debug)]
struct Cells {
    tokens: u32,
    /// Per plane.
    count: u32,
    per_block: u32,
    first_block: u32,
    chunks: u32,
    flags: u32,
}

impl Cells {
    /// `None` when one side holds none of the tokens.
    fn of(segment: &Segment, part: &Part) -> Result<Option<Cells>, LowerError> {
        let (source, destination) = (&segment.source, &segment.destination);
        let tokens = gcd(source.block_tokens, destination.block_tokens);
        let (Some(at_source), Some(at_destination)) =
            (source.blocks(part.start, part.end), destination.blocks(part.start, part.end))
        else {
            return Ok(None);
        };
        // The side that has fewer cells to go through, in vain where it shares blocks with others or has larger ones than the part.
        let cells = |side: &Side, (first, last): (u64, u64)| {
            (last - first + 1).saturating_mul(u64::from(side.block_tokens / tokens.max(1)))
        };
        let by_destination = cells(destination, at_destination) < cells(source, at_source);
        let (driver, (first, last)) = if by_destination { (destination, at_destination) } else { (source, at_source) };
        let per_block = driver.block_tokens / tokens.max(1);
        let cell = Cell::of(segment, u64::from(tokens).min(part.end - part.start));
        let runs = cell.runs();
        if runs > CELL_RUNS_MAX {
            return Err(LowerError::Shape { runs });
        }
        let bytes = runs.saturating_mul(cell.run_bytes);
        let count = (last - first + 1).checked_mul(u64::from(per_block)).and_then(|count| u32::try_from(count).ok());
        let chunks = u32::try_from(bytes.div_ceil(CHUNK_BYTES));
        let (Some(count), Ok(chunks)) = (count, chunks) else { return Err(LowerError::TooMany) };
        let mut flags = 0;
        flags |= if by_destination { DRIVEN_BY_DESTINATION } else { 0 };
        flags |= if has_inner_tokens(segment) { TOKENS_INNER } else { 0 };
        Ok(Some(Cells { tokens, count, per_block, first_block: first as u32, chunks, flags }))
    }

    fn items(&self, part: &Part) -> Option<u64> {
        u64::from(part.planes).checked_mul(u64::from(self.count))?.checked_mul(u64::from(self.chunks))
    }

    /// Merged runs of the part: of cells that both sides hold, the first and the last as far as the part reaches into them. Where ranks share the
    /// request's blocks round-robin, cells of one plane are gone through, else none.
    fn pieces(&self, segment: &Segment, part: &Part) -> u64 {
        let tokens = u64::from(self.tokens.max(1));
        let (first, last) = (part.start / tokens, part.end.saturating_sub(1) / tokens);
        let (source, destination) = (&segment.source, &segment.destination);
        let holds = |side: &Side, cell: u64| {
            cell * tokens / u64::from(side.block_tokens.max(1)) % u64::from(side.cp.max(1)) == u64::from(side.cp_rank)
        };
        let is_held = |cell: &u64| holds(source, *cell) && holds(destination, *cell);
        let runs = |cell: u64| {
            let (from, to) = (part.start.max(cell * tokens), part.end.min((cell + 1) * tokens));
            Cell::of(segment, to.saturating_sub(from)).runs()
        };
        let ends = [Some(first), Some(last).filter(|last| *last != first)].into_iter().flatten();
        let of_ends = ends.filter(is_held).fold(0u64, |sum, cell| sum.saturating_add(runs(cell)));
        let between = match (source.cp, destination.cp) {
            (1, 1) => last.saturating_sub(first).saturating_sub(1),
            _ => (first + 1..last).filter(is_held).count() as u64,
        };
        let whole = between.saturating_mul(Cell::of(segment, tokens).runs());
        u64::from(part.planes).saturating_mul(of_ends.saturating_add(whole))
    }

    fn words(&self) -> [u32; 5] {
        [self.tokens, self.count, self.per_block, self.first_block, self.chunks]
    }
}

/// Whether a head's tokens lie together on both sides.
fn has_inner_tokens(segment: &Segment) -> bool {
    let (source, destination) = (&segment.source, &segment.destination);
    source.head_pitch > source.token_pitch && destination.head_pitch > destination.token_pitch
}

/// How often something repeats, and the bytes from one to the next, at the source and at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dimension {
    pub(crate) count: u64,
    pub(crate) pitches: [u64; 2],
}

/// Tokens that lie in one block on either side, contiguous dimensions merged, as in `walk.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) run_bytes: u64,
    pub(crate) inner: Dimension,
    pub(crate) outer: Dimension,
}

impl Cell {
    pub(crate) fn of(segment: &Segment, tokens: u64) -> Cell {
        let (source, destination) = (&segment.source, &segment.destination);
        let heads = Dimension { count: segment.heads.into(), pitches: [source.head_pitch, destination.head_pitch] };
        let tokens = Dimension { count: tokens, pitches: [source.token_pitch, destination.token_pitch] };
        let (mut inner, mut outer) = if has_inner_tokens(segment) { (tokens, heads) } else { (heads, tokens) };
        let mut run_bytes = u64::from(segment.run_bytes);
        for _ in 0..2 {
            if inner.count == 1 || inner.pitches == [run_bytes; 2] {
                run_bytes = run_bytes.saturating_mul(inner.count);
                inner = outer;
                outer.count = 1;
            }
        }
        Cell { run_bytes, inner, outer }
    }

    /// Contiguous runs.
    pub(crate) fn runs(&self) -> u64 {
        self.inner.count.saturating_mul(self.outer.count)
    }
}

fn encode_side(out: &mut Vec<u8>, side: &Side, planes: u64, table: u32) {
    for word in [planes, side.token_pitch, side.head_pitch, side.offset] {
        out.extend(word.to_le_bytes());
    }
    for word in [side.plane, side.plane_step, table, side.block_tokens, side.cp, side.cp_rank] {
        out.extend(word.to_le_bytes());
    }
}

pub(crate) fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}
