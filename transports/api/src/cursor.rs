//! One side's memory of a part of a program, in stream order, as raw pieces that can be taken a few at a time.

use std::sync::Arc;

use kvferry_core::{End, PoolLayout, Program, Spans, UnitRange};

use crate::Pool;

/// A contiguous piece of a pool. Nothing but the kernel and raw copies may look at it.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Its first byte.
    pub at: *mut u8,
    /// Its length.
    pub bytes: usize,
}

/// Walks a part of a program over one pool and keeps that pool alive.
pub struct Cursor {
    // Declared first, so dropped before what it borrows.
    spans: Spans<'static>,
    rest: Option<Piece>,
    pieces: u64,
    pool: Pool,
    _program: Arc<Program>,
    _layout: Arc<PoolLayout>,
}

impl Cursor {
    /// Walks `end`'s side of `range`. The program was validated against the layout, which is the pool's.
    pub fn new(pool: Pool, layout: Arc<PoolLayout>, program: Arc<Program>, end: End, range: UnitRange) -> Cursor {
        // SAFETY: both values live in `Arc`s that the cursor holds and never replaces or gives away, so they stay in place and unchanged
        // for as long as `spans`, which is dropped before them and never leaves the cursor.
        let (program_ref, layout_ref): (&'static Program, &'static PoolLayout) =
            unsafe { (&*Arc::as_ptr(&program), &*Arc::as_ptr(&layout)) };
        let spans = program_ref.spans(end, range, layout_ref);
        Cursor { spans, rest: None, pieces: 0, pool, _program: program, _layout: layout }
    }

    /// The pool that it walks.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Contiguous pieces so far.
    pub fn pieces(&self) -> u64 {
        self.pieces
    }

    /// The next piece, cut at `bytes_max`; `None` at the end, or where the walk would leave the pool.
    pub fn take(&mut self, bytes_max: usize) -> Option<Piece> {
        let piece = match self.rest.take() {
            Some(piece) => piece,
            None => self.advance()?,
        };
        if piece.bytes <= bytes_max {
            return Some(piece);
        }
        // SAFETY: `bytes_max` is less than the piece's length, so the result stays inside the same region.
        let at = unsafe { piece.at.add(bytes_max) };
        self.rest = Some(Piece { at, bytes: piece.bytes - bytes_max });
        Some(Piece { at: piece.at, bytes: bytes_max })
    }

    /// Copies the next `bytes` bytes to `to`. `false` where the program ends before them, which leaves the rest as it was.
    ///
    /// # Safety
    /// `to` is writable for so many bytes, which are nobody else's and not the pool's.
    pub unsafe fn pack(&mut self, mut to: *mut u8, bytes: usize) -> bool {
        let mut left = bytes;
        while left > 0 {
            let Some(piece) = self.take(left) else { return false };
            // SAFETY: a piece of a live pool, no longer than what is left of the caller's room.
            unsafe { std::ptr::copy_nonoverlapping(piece.at, to, piece.bytes) };
            to = to.wrapping_add(piece.bytes);
            left -= piece.bytes;
        }
        true
    }

    /// Copies `bytes` bytes from `from` into the next pieces. `false` where the program ends before them.
    ///
    /// # Safety
    /// `from` is readable for so many bytes, which nobody writes meanwhile and which are not the pool's.
    pub unsafe fn unpack(&mut self, mut from: *const u8, bytes: usize) -> bool {
        let mut left = bytes;
        while left > 0 {
            let Some(piece) = self.take(left) else { return false };
            // SAFETY: as in `pack`, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(from, piece.at, piece.bytes) };
            from = from.wrapping_add(piece.bytes);
            left -= piece.bytes;
        }
        true
    }

    fn advance(&mut self) -> Option<Piece> {
        let span = self.spans.next()?;
        let region = self.pool.regions().get(usize::try_from(span.at.region).ok()?)?;
        // The program was validated against this layout; this check keeps a fault there from becoming a wild access here.
        if span.at.offset.checked_add(span.bytes)? > region.bytes() {
            return None;
        }
        self.pieces += 1;
        // SAFETY: offset + bytes is inside the region, which is one allocation.
        let at = unsafe { region.base().add(usize::try_from(span.at.offset).ok()?) };
        Some(Piece { at, bytes: usize::try_from(span.bytes).ok()? })
    }
}
