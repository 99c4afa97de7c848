//! A program's stream cut at any byte: what is packed into, or taken out of, contiguous buffers by whoever can walk strides.

use super::walk::{Interval, Intervals};
use super::{Program, Segment, UnitRange};

/// Tokens × heads × bytes of one plane that follow each other in the stream: contiguous there, strided in a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strip {
    /// Index of its segment.
    pub segment: usize,
    /// Which of the segment's planes, from 0.
    pub plane: u32,
    /// Its first token, counted from the request's start. Both sides hold all its tokens.
    pub token: u64,
    /// How many tokens.
    pub tokens: u64,
    /// Its first head.
    pub head: u32,
    /// How many heads.
    pub heads: u32,
    /// Its first byte in every run of the segment.
    pub byte: u32,
    /// How many bytes of every run.
    pub run_bytes: u32,
    /// Whether the stream has the tokens of a head together: its order is head, token, byte instead of token, head, byte.
    pub is_head_major: bool,
}

impl Strip {
    /// All its bytes.
    pub fn bytes(&self) -> u64 {
        self.tokens.saturating_mul(u64::from(self.heads)).saturating_mul(u64::from(self.run_bytes))
    }

    /// Bytes in the stream from one token to the next, and from one head to the next.
    pub fn pitches(&self) -> (u64, u64) {
        let run = u64::from(self.run_bytes);
        if self.is_head_major {
            (run, run.saturating_mul(self.tokens))
        } else {
            (run.saturating_mul(u64::from(self.heads)), run)
        }
    }

    /// Whether `next` follows it in the stream and in tokens, so that both are one.
    fn goes_on_with(&self, next: &Strip) -> bool {
        let shape = |strip: &Strip| (strip.segment, strip.plane, strip.head, strip.heads, strip.byte, strip.run_bytes);
        !self.is_head_major
            && !next.is_head_major
            && shape(self) == shape(next)
            && self.token.checked_add(self.tokens) == Some(next.token)
    }
}

/// How far a range's stream has been cut: see [`Program::strips`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strips {
    /// Where the present interval begins.
    unit: u64,
    end: u64,
    /// Bytes of that interval that were taken.
    taken: u64,
}

impl Program {
    /// Cuts the stream of `range` into strips, so many bytes at a time: see [`Strips::take`].
    pub fn strips(&self, range: UnitRange) -> Strips {
        Strips { unit: range.start, end: range.end, taken: 0 }
    }
}

impl Strips {
    /// Appends the strips of the next `bytes` bytes of the stream, at most `strips_max` strips, and returns their bytes: fewer at the end of
    /// the range or where that many strips are reached. It is the program's that made this.
    pub fn take(&mut self, program: &Program, bytes: u64, strips_max: usize, into: &mut Vec<Strip>) -> u64 {
        let limit = into.len().saturating_add(strips_max);
        let mut left = bytes;
        let rest = UnitRange { start: self.unit, end: self.end };
        for interval in Intervals::new(program, rest) {
            let Some(segment) = program.segments.get(interval.segment) else { break };
            self.unit = program.unit_of(&interval, segment);
            let nest = Nest::of(segment, &interval);
            while left > 0 && self.taken < nest.bytes() {
                let strip = nest.first(self.taken, left);
                let is_full = into.len() >= limit;
                match into.last_mut() {
                    Some(last) if last.goes_on_with(&strip) => last.tokens += strip.tokens,
                    _ if is_full => return bytes - left,
                    _ => into.push(strip),
                }
                self.taken += strip.bytes();
                left -= strip.bytes();
            }
            if self.taken < nest.bytes() {
                return bytes - left;
            }
            self.unit = self.unit.saturating_add(u64::from(interval.tokens));
            self.taken = 0;
            if left == 0 {
                return bytes;
            }
        }
        self.unit = self.end;
        bytes - left
    }
}

impl Program {
    /// The unit of an interval's first token.
    fn unit_of(&self, interval: &Interval, segment: &Segment) -> u64 {
        let before = self.segments.iter().take(interval.segment);
        let base = before.map(Segment::units).fold(0, u64::saturating_add);
        let row = u64::from(interval.plane).saturating_mul(segment.tokens());
        base.saturating_add(row).saturating_add(interval.token - segment.start)
    }
}

/// One interval as outer × inner runs, in stream order.
struct Nest {
    whole: Strip,
    outer: u64,
    inner: u64,
}

impl Nest {
    fn of(segment: &Segment, interval: &Interval) -> Nest {
        let (tokens, heads) = (u64::from(interval.tokens), u64::from(segment.heads));
        // Where there is one of either, both orders are the same, and the one that can be merged is taken.
        let is_head_major = segment.head_major() && tokens > 1 && heads > 1;
        let (outer, inner) = if is_head_major { (heads, tokens) } else { (tokens, heads) };
        let whole = Strip {
            segment: interval.segment,
            plane: interval.plane,
            token: interval.token,
            tokens,
            head: 0,
            heads: segment.heads,
            byte: 0,
            run_bytes: segment.run_bytes,
            is_head_major,
        };
        Nest { whole, outer, inner }
    }

    fn bytes(&self) -> u64 {
        self.whole.bytes()
    }

    /// The longest strip that begins `from` bytes behind the start and has at most `bytes`, of which there is at least one.
    fn first(&self, from: u64, bytes: u64) -> Strip {
        let run = u64::from(self.whole.run_bytes).max(1);
        let (index, within) = (from / run, from % run);
        let (row, column) = (index / self.inner.max(1), index % self.inner.max(1));
        if within > 0 || bytes < run {
            let part = (run - within).min(bytes);
            let strip = self.part((row, 1), (column, 1));
            return Strip { byte: within as u32, run_bytes: part as u32, ..strip };
        }
        let runs = bytes / run;
        if column > 0 || runs < self.inner {
            return self.part((row, 1), (column, runs.min(self.inner - column)));
        }
        self.part((row, (runs / self.inner.max(1)).min(self.outer - row)), (0, self.inner))
    }

    /// Some rows and columns, each as the first of them and how many.
    fn part(&self, rows: (u64, u64), columns: (u64, u64)) -> Strip {
        let (tokens, heads) = if self.whole.is_head_major { (columns, rows) } else { (rows, columns) };
        Strip {
            token: self.whole.token + tokens.0,
            tokens: tokens.1,
            head: heads.0 as u32,
            heads: heads.1 as u32,
            ..self.whole
        }
    }
}
