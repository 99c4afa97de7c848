//! Walks the token intervals of a program: the one definition of its order.

use super::{Program, Segment, Side, UnitRange};

/// Tokens that lie in one block on either side.
#[derive(Clone, Copy, Debug)]
pub(super) struct Interval {
    /// Index of its segment.
    pub(super) segment: usize,
    /// Which of the segment's planes, from 0.
    pub(super) plane: u32,
    /// Its first token, counted from the request's start.
    pub(super) token: u64,
    /// How many tokens.
    pub(super) tokens: u32,
    pub(super) source: Place,
    pub(super) destination: Place,
}

/// A token's place on one side.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Place {
    /// Index into the side's block table; out of its bounds in a program that was not validated.
    pub(super) slot: u64,
    /// Token inside that block.
    pub(super) within: u32,
}

/// All intervals of a range, in stream order.
#[derive(Clone, Debug)]
pub(super) struct Intervals<'a> {
    segments: &'a [Segment],
    /// The segment being walked.
    index: usize,
    segment: Option<Segment>,
    plane: u32,
    row_start: u64,
    row_end: u64,
    token: u64,
    /// Whether the present row had an interval.
    moved: bool,
    /// Units of the range from `row_start` on.
    left: u64,
    /// Whether a side holds only some of the tokens, so that places are computed for every interval.
    shared: bool,
    source: Place,
    destination: Place,
}

impl<'a> Intervals<'a> {
    pub(super) fn new(program: &'a Program, range: UnitRange) -> Self {
        let mut walk = Intervals {
            segments: &program.segments,
            index: 0,
            segment: None,
            plane: 0,
            row_start: 0,
            row_end: 0,
            token: 0,
            moved: false,
            left: range.units(),
            shared: false,
            source: Place::default(),
            destination: Place::default(),
        };
        let mut skip = range.start;
        for (index, segment) in program.segments.iter().enumerate() {
            let tokens = segment.tokens();
            let units = tokens.saturating_mul(u64::from(segment.planes));
            if skip < units {
                walk.index = index;
                walk.open_segment(*segment, (skip / tokens) as u32, segment.start + skip % tokens);
                return walk;
            }
            skip -= units;
        }
        walk.left = 0;
        walk
    }

    fn open_segment(&mut self, segment: Segment, plane: u32, token: u64) {
        self.shared = segment.source.cp > 1 || segment.destination.cp > 1;
        self.segment = Some(segment);
        self.plane = plane;
        self.open_row(&segment, token);
    }

    fn open_row(&mut self, segment: &Segment, token: u64) {
        self.row_start = token;
        self.row_end = segment.end.min(token.saturating_add(self.left));
        self.token = token;
        self.moved = false;
        self.source = segment.source.place(token);
        self.destination = segment.destination.place(token);
    }

    /// Goes to the next plane or segment that has units left.
    #[cold]
    #[inline(never)]
    fn next_row(&mut self) -> Option<()> {
        let segment = self.segment?;
        // Every plane has the same intervals: when a whole one had none, neither has any other.
        let barren = !self.moved && self.row_start == segment.start && self.row_end == segment.end;
        self.left = self.left.saturating_sub(self.row_end - self.row_start);
        let planes_left = (segment.planes - self.plane).saturating_sub(1);
        if planes_left > 0 && !barren {
            if self.left == 0 {
                return None;
            }
            self.plane += 1;
            self.open_row(&segment, segment.start);
            return Some(());
        }
        self.left = self.left.saturating_sub(segment.tokens().saturating_mul(u64::from(planes_left)));
        self.segment = None;
        if self.left == 0 {
            return None;
        }
        loop {
            self.index += 1;
            let segment = *self.segments.get(self.index)?;
            if segment.planes > 0 && segment.tokens() > 0 {
                self.open_segment(segment, 0, segment.start);
                return Some(());
            }
        }
    }
}

impl Iterator for Intervals<'_> {
    type Item = Interval;

    #[inline(always)]
    fn next(&mut self) -> Option<Interval> {
        loop {
            if self.token >= self.row_end {
                self.next_row()?;
            }
            let segment = self.segment.as_ref()?;
            if self.shared {
                self.token = segment.next_held(self.token, self.row_end);
                if self.token >= self.row_end {
                    continue;
                }
                self.source = segment.source.place(self.token);
                self.destination = segment.destination.place(self.token);
            }
            let in_blocks = (segment.source.block_tokens - self.source.within)
                .min(segment.destination.block_tokens - self.destination.within);
            let tokens = u64::from(in_blocks).min(self.row_end - self.token) as u32;
            let interval = Interval {
                segment: self.index,
                plane: self.plane,
                token: self.token,
                tokens,
                source: self.source,
                destination: self.destination,
            };
            self.token += u64::from(tokens);
            self.source.advance(tokens, segment.source.block_tokens);
            self.destination.advance(tokens, segment.destination.block_tokens);
            self.moved = true;
            return Some(interval);
        }
    }
}

impl Place {
    /// The place `tokens` further on, at most one block away, where a side holds every block.
    #[inline(always)]
    fn advance(&mut self, tokens: u32, block_tokens: u32) {
        self.within += tokens;
        if self.within == block_tokens {
            self.within = 0;
            self.slot = self.slot.wrapping_add(1);
        }
    }
}

impl Segment {
    /// The first token from `token` on that both sides hold, or something at or past `limit`.
    fn next_held(&self, mut token: u64, limit: u64) -> u64 {
        while token < limit {
            let next = self.destination.next_held(self.source.next_held(token));
            if next == token {
                break;
            }
            token = next;
        }
        token
    }

    /// How many tokens of `from..to` both sides hold.
    pub(crate) fn held(&self, from: u64, to: u64) -> u64 {
        let (source, destination) = (&self.source, &self.destination);
        if from >= to {
            return 0;
        }
        if source.cp == 1 {
            return destination.held(from, to);
        }
        if destination.cp == 1 {
            return source.held(from, to);
        }
        if source.cp == destination.cp && source.block_tokens == destination.block_tokens {
            return if source.cp_rank == destination.cp_rank { source.held(from, to) } else { 0 };
        }
        // The coarser side has fewer blocks to go through.
        let (coarse, fine) =
            if source.stride() >= destination.stride() { (source, destination) } else { (destination, source) };
        let mut count = 0;
        let mut token = coarse.next_held(from);
        while token < to {
            let edge =
                (token / u64::from(coarse.block_tokens) + 1).saturating_mul(u64::from(coarse.block_tokens)).min(to);
            count += fine.held(token, edge);
            token = coarse.next_held(edge);
        }
        count
    }
}

impl Side {
    /// Tokens from one block that this side holds to the next.
    fn stride(&self) -> u64 {
        u64::from(self.block_tokens) * u64::from(self.cp)
    }

    /// Where a token lies that this side holds.
    fn place(&self, token: u64) -> Place {
        let block = token / u64::from(self.block_tokens);
        let own = if self.cp == 1 { block } else { block / u64::from(self.cp) };
        Place { slot: own.wrapping_sub(self.first_block), within: (token % u64::from(self.block_tokens)) as u32 }
    }

    /// The first token from `token` on that this side holds.
    pub(super) fn next_held(&self, token: u64) -> u64 {
        if self.cp == 1 {
            return token;
        }
        let block = token / u64::from(self.block_tokens);
        let (turn, rank) = (block % u64::from(self.cp), u64::from(self.cp_rank));
        if turn == rank {
            return token;
        }
        let ahead = if turn < rank { rank - turn } else { rank + u64::from(self.cp) - turn };
        block.saturating_add(ahead).saturating_mul(u64::from(self.block_tokens))
    }

    /// How many tokens of `from..to` this side holds.
    fn held(&self, from: u64, to: u64) -> u64 {
        if self.cp == 1 {
            return to.saturating_sub(from);
        }
        let (block, stride) = (u64::from(self.block_tokens), self.stride());
        let below = |token: u64| {
            let before = block * u64::from(self.cp_rank);
            token / stride * block + (token % stride).saturating_sub(before).min(block)
        };
        below(to) - below(from)
    }
}
