//! A program as nested strided copies, for whoever can walk strides: shared memory, GPU kernels, packing.

use std::sync::Arc;

use super::walk::{Intervals, Place};
use super::{End, Location, Program, Segment, Side, UnitRange};
use crate::{Plane, PoolLayout};

/// `outer` × `inner` contiguous runs of `run_bytes` bytes: run `(o, i)` starts `o * outer_* + i * inner_*` bytes from `source` and
/// `destination`. Contiguous dimensions are merged into the run, then into `inner`; a dimension that is not there counts 1.
///
/// The stream takes runs in the order of `o`, then `i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Where run (0, 0) is read.
    pub source: Location,
    /// Where run (0, 0) is written.
    pub destination: Location,
    /// Bytes of one run.
    pub run_bytes: u64,
    /// Runs per row.
    pub inner: u32,
    /// Bytes between the runs of a row, where they are read.
    pub inner_source: u64,
    /// Bytes between the runs of a row, where they are written.
    pub inner_destination: u64,
    /// Rows.
    pub outer: u32,
    /// Bytes between rows, where they are read.
    pub outer_source: u64,
    /// Bytes between rows, where they are written.
    pub outer_destination: u64,
}

impl Tile {
    /// All its bytes.
    pub fn bytes(&self) -> u64 {
        self.run_bytes.wrapping_mul(u64::from(self.inner)).wrapping_mul(u64::from(self.outer))
    }

    /// How many contiguous runs it has.
    pub fn runs(&self) -> u64 {
        u64::from(self.inner) * u64::from(self.outer)
    }
}

/// The tiles of a range of a program, in stream order: see [`Program::tiles`].
#[derive(Clone, Debug)]
pub struct Tiles<'a> {
    segments: &'a [Segment],
    intervals: Intervals<'a>,
    /// Segment and plane that the ends stand at.
    at: (usize, u32),
    nest: Nest,
    source: Memory<'a>,
    destination: Memory<'a>,
}

/// No segment and plane: an index that no `Vec` has.
pub(super) const NOWHERE: (usize, u32) = (usize::MAX, 0);

impl Program {
    /// The tiles of `range`, one for every interval of tokens that lies in one block on either side. Needs both ends' tables.
    ///
    /// Ends early, without a panic, at the first tile that cannot be located; [`Program::validate`] at both ends excludes that.
    pub fn tiles<'a>(&'a self, range: UnitRange, source: &'a PoolLayout, destination: &'a PoolLayout) -> Tiles<'a> {
        Tiles {
            segments: &self.segments,
            intervals: Intervals::new(self, range),
            at: NOWHERE,
            nest: Nest::default(),
            source: Memory::new(&self.sources, source),
            destination: Memory::new(&self.destinations, destination),
        }
    }
}

impl Tiles<'_> {
    /// Goes to the next interval: where it lies on both sides. Its form is then [`Nest::shape`].
    #[inline(always)]
    pub(super) fn advance(&mut self) -> Option<(Location, Location)> {
        let interval = self.intervals.next()?;
        if self.at != (interval.segment, interval.plane) {
            self.open(interval.segment, interval.plane)?;
        }
        let places = (self.source.locate(interval.source)?, self.destination.locate(interval.destination)?);
        self.nest.set_tokens(interval.tokens);
        Some(places)
    }

    #[cold]
    #[inline(never)]
    fn open(&mut self, segment: usize, plane: u32) -> Option<()> {
        let of = self.segments.get(segment)?;
        self.source.open(&of.source, plane)?;
        self.destination.open(&of.destination, plane)?;
        self.nest = Nest::new(of, &of.source, &of.destination);
        self.at = (segment, plane);
        Some(())
    }

    pub(super) fn shape(&self) -> &Shape {
        self.nest.shape()
    }
}

impl Iterator for Tiles<'_> {
    type Item = Tile;

    #[inline]
    fn next(&mut self) -> Option<Tile> {
        let (source, destination) = self.advance()?;
        let shape = self.nest.shape();
        Some(Tile {
            source,
            destination,
            run_bytes: shape.run_bytes,
            inner: shape.inner,
            inner_source: shape.inner_pitch.source,
            inner_destination: shape.inner_pitch.destination,
            outer: shape.outer,
            outer_source: shape.outer_pitch.source,
            outer_destination: shape.outer_pitch.destination,
        })
    }
}

/// One end's memory, standing at one plane of one segment.
#[derive(Clone, Debug)]
pub(super) struct Memory<'a> {
    tables: &'a [Option<Arc<[u32]>>],
    layout: &'a PoolLayout,
    table: &'a [u32],
    plane: Plane,
    token_pitch: u64,
}

impl<'a> Memory<'a> {
    pub(super) fn new(tables: &'a [Option<Arc<[u32]>>], layout: &'a PoolLayout) -> Self {
        let plane = Plane { region: 0, offset: 0, blocks: 0, block_stride: 0, block_bytes: 0 };
        Memory { tables, layout, table: &[], plane, token_pitch: 0 }
    }

    pub(super) fn of(program: &'a Program, end: End, layout: &'a PoolLayout) -> Self {
        Memory::new(program.tables(end), layout)
    }

    /// Goes to the segment's plane number `index`.
    pub(super) fn open(&mut self, side: &Side, index: u32) -> Option<()> {
        let plane = side.plane.checked_add(index.checked_mul(side.plane_step)?)?;
        self.plane = *self.layout.planes.get(plane as usize)?;
        self.plane.offset = self.plane.offset.wrapping_add(side.offset);
        self.table = self.tables.get(side.table as usize)?.as_deref()?;
        self.token_pitch = side.token_pitch;
        Some(())
    }

    /// Where the first head of a token lies.
    #[inline(always)]
    pub(super) fn locate(&self, place: Place) -> Option<Location> {
        let block = *self.table.get(place.slot as usize)?;
        if block >= self.plane.blocks {
            return None;
        }
        let block = u64::from(block).wrapping_mul(self.plane.block_stride);
        let token = u64::from(place.within).wrapping_mul(self.token_pitch);
        Some(Location { region: self.plane.region, offset: self.plane.offset.wrapping_add(block).wrapping_add(token) })
    }
}

/// How the heads and tokens of an interval nest, with what is contiguous merged.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Nest {
    head_major: bool,
    heads: u32,
    run_bytes: u64,
    head: Pitch,
    token: Pitch,
    /// The shape for `tokens` tokens, kept because nearly all intervals are alike.
    tokens: u32,
    shape: Shape,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pitch {
    pub(super) source: u64,
    pub(super) destination: u64,
}

/// The runs of one interval.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Shape {
    pub(super) run_bytes: u64,
    pub(super) inner: u32,
    pub(super) inner_pitch: Pitch,
    pub(super) outer: u32,
    pub(super) outer_pitch: Pitch,
}

impl Shape {
    /// Whether all is one contiguous run.
    #[inline(always)]
    pub(super) fn is_one_run(&self) -> bool {
        self.inner == 1 && self.outer == 1
    }
}

impl Nest {
    /// The nest of `segment` between two memories; the same side twice gives one side's own nest, still in stream order.
    pub(super) fn new(segment: &Segment, source: &Side, destination: &Side) -> Self {
        Nest {
            head_major: segment.head_major(),
            heads: segment.heads,
            run_bytes: u64::from(segment.run_bytes),
            head: Pitch { source: source.head_pitch, destination: destination.head_pitch },
            token: Pitch { source: source.token_pitch, destination: destination.token_pitch },
            tokens: 0,
            shape: Shape::default(),
        }
    }

    /// Makes [`Nest::shape`] that of `tokens` tokens.
    #[inline(always)]
    pub(super) fn set_tokens(&mut self, tokens: u32) {
        if self.tokens != tokens {
            self.shape = self.shape_of(tokens);
            self.tokens = tokens;
        }
    }

    pub(super) fn shape(&self) -> &Shape {
        &self.shape
    }

    #[cold]
    #[inline(never)]
    fn shape_of(&self, tokens: u32) -> Shape {
        let (heads, tokens) = ((self.heads, self.head), (tokens, self.token));
        let (mut inner, mut outer) = if self.head_major { (tokens, heads) } else { (heads, tokens) };
        let mut run_bytes = self.run_bytes;
        for _ in 0..2 {
            if inner.0 == 1 || inner.1 == (Pitch { source: run_bytes, destination: run_bytes }) {
                run_bytes = run_bytes.wrapping_mul(u64::from(inner.0));
                inner = outer;
                outer = (1, Pitch::default());
            }
        }
        let row = Pitch {
            source: inner.1.source.wrapping_mul(u64::from(inner.0)),
            destination: inner.1.destination.wrapping_mul(u64::from(inner.0)),
        };
        if outer.1 == row
            && let Some(all) = inner.0.checked_mul(outer.0)
        {
            inner.0 = all;
            outer = (1, Pitch::default());
        }
        Shape { run_bytes, inner: inner.0, inner_pitch: inner.1, outer: outer.0, outer_pitch: outer.1 }
    }
}
