//! One end of a program as memory ranges in stream order: what sockets and packing buffers take.

use super::copies::{Runs, follows};
use super::tiles::{Memory, NOWHERE, Nest};
use super::walk::Intervals;
use super::{End, Location, Program, Segment, Span, UnitRange};
use crate::PoolLayout;

/// One side's memory in stream order: see [`Program::spans`].
#[derive(Clone, Debug)]
pub struct Spans<'a> {
    segments: &'a [Segment],
    intervals: Intervals<'a>,
    end: End,
    at: (usize, u32),
    nest: Nest,
    memory: Memory<'a>,
    runs: Runs,
    pending: Option<Span>,
}

impl Program {
    /// The memory of `end` that `range` touches, in stream order, merged when adjacent. Needs only that end's tables and layout:
    /// both ends walk the same bytes in the same order.
    ///
    /// Ends early, without a panic, at the first span that cannot be located; [`Program::validate`] excludes that.
    pub fn spans<'a>(&'a self, end: End, range: UnitRange, layout: &'a PoolLayout) -> Spans<'a> {
        Spans {
            segments: &self.segments,
            intervals: Intervals::new(self, range),
            end,
            at: NOWHERE,
            nest: Nest::default(),
            memory: Memory::of(self, end, layout),
            runs: Runs::default(),
            pending: None,
        }
    }
}

impl Spans<'_> {
    /// Goes to the next interval: where it lies.
    #[inline(always)]
    fn advance(&mut self) -> Option<Location> {
        let interval = self.intervals.next()?;
        if self.at != (interval.segment, interval.plane) {
            self.open(interval.segment, interval.plane)?;
        }
        self.nest.set_tokens(interval.tokens);
        self.memory.locate(match self.end {
            End::Source => interval.source,
            End::Destination => interval.destination,
        })
    }

    #[cold]
    #[inline(never)]
    fn open(&mut self, segment: usize, plane: u32) -> Option<()> {
        let of = self.segments.get(segment)?;
        let side = of.side(self.end);
        self.memory.open(side, plane)?;
        self.nest = Nest::new(of, side, side);
        self.at = (segment, plane);
        Some(())
    }
}

impl Iterator for Spans<'_> {
    type Item = Span;

    #[inline]
    fn next(&mut self) -> Option<Span> {
        loop {
            let span = match self.runs.next() {
                Some(run) => Span { at: run.source, bytes: run.bytes },
                None => match self.advance() {
                    Some(at) => {
                        let shape = self.nest.shape();
                        if !shape.is_one_run() {
                            self.runs = Runs::of(shape, at, at);
                            continue;
                        }
                        Span { at, bytes: shape.run_bytes }
                    }
                    None => return self.pending.take(),
                },
            };
            match &mut self.pending {
                Some(pending) if follows(pending.at, pending.bytes, span.at) => {
                    pending.bytes = pending.bytes.wrapping_add(span.bytes);
                }
                Some(pending) => return Some(std::mem::replace(pending, span)),
                None => self.pending = Some(span),
            }
        }
    }
}
