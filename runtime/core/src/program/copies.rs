//! A program as contiguous copies, merged where both sides are adjacent: what NICs take.

use super::tiles::{Pitch, Shape, Tiles};
use super::{Copy, Location, Program, UnitRange};
use crate::PoolLayout;

/// The merged contiguous copies of a range of a program: see [`Program::copies`].
#[derive(Clone, Debug)]
pub struct Copies<'a> {
    tiles: Tiles<'a>,
    runs: Runs,
    /// Read ahead, to see whether the next one continues it.
    pending: Option<Copy>,
}

impl Program {
    /// The contiguous copies of `range`, in stream order, merged when adjacent on both sides. Needs both ends' tables.
    ///
    /// Ends early, without a panic, at the first copy that cannot be located; [`Program::validate`] at both ends excludes that.
    pub fn copies<'a>(&'a self, range: UnitRange, source: &'a PoolLayout, destination: &'a PoolLayout) -> Copies<'a> {
        Copies { tiles: self.tiles(range, source, destination), runs: Runs::default(), pending: None }
    }
}

impl Iterator for Copies<'_> {
    type Item = Copy;

    #[inline]
    fn next(&mut self) -> Option<Copy> {
        loop {
            let copy = match self.runs.next() {
                Some(run) => run,
                None => match self.tiles.advance() {
                    Some((source, destination)) => {
                        let shape = self.tiles.shape();
                        if !shape.is_one_run() {
                            self.runs = Runs::of(shape, source, destination);
                            continue;
                        }
                        Copy { source, destination, bytes: shape.run_bytes }
                    }
                    None => return self.pending.take(),
                },
            };
            match &mut self.pending {
                Some(pending) if continues(pending, &copy) => pending.bytes = pending.bytes.wrapping_add(copy.bytes),
                Some(pending) => return Some(std::mem::replace(pending, copy)),
                None => self.pending = Some(copy),
            }
        }
    }
}

#[inline(always)]
fn continues(before: &Copy, after: &Copy) -> bool {
    follows(before.source, before.bytes, after.source) && follows(before.destination, before.bytes, after.destination)
}

/// Whether `bytes` bytes at `before` end where `after` begins.
#[inline(always)]
pub(super) fn follows(before: Location, bytes: u64, after: Location) -> bool {
    before.offset.wrapping_add(bytes) == after.offset && before.region == after.region
}

/// The runs of one interval, one after another.
#[derive(Clone, Debug, Default)]
pub(super) struct Runs {
    inner_left: u32,
    outer_left: u32,
    /// The next run of the present row.
    next: Copy,
    row: Copy,
    shape: Shape,
}

impl Runs {
    #[inline]
    pub(super) fn of(shape: &Shape, source: Location, destination: Location) -> Self {
        let first = Copy { source, destination, bytes: shape.run_bytes };
        Runs {
            inner_left: if shape.outer == 0 { 0 } else { shape.inner },
            outer_left: shape.outer.saturating_sub(1),
            next: first,
            row: first,
            shape: *shape,
        }
    }

    #[inline(always)]
    pub(super) fn next(&mut self) -> Option<Copy> {
        if self.inner_left == 0 {
            if self.outer_left == 0 || self.shape.inner == 0 {
                return None;
            }
            self.outer_left -= 1;
            self.inner_left = self.shape.inner;
            self.row = step(self.row, self.shape.outer_pitch);
            self.next = self.row;
        }
        let run = self.next;
        self.inner_left -= 1;
        self.next = step(run, self.shape.inner_pitch);
        Some(run)
    }
}

#[inline(always)]
fn step(mut run: Copy, pitch: Pitch) -> Copy {
    run.source.offset = run.source.offset.wrapping_add(pitch.source);
    run.destination.offset = run.destination.offset.wrapping_add(pitch.destination);
    run
}
