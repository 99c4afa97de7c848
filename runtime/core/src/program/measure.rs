//! How much a program moves, and in which shares.

use super::{Program, Segment, Side, UnitRange};

/// A share this many times the bytes of a block is cut at a block edge: it costs at most that part of the balance and saves a piece.
const BLOCKS_PER_SHARE: u128 = 32;

impl Program {
    /// How many (plane, token) units it has, counted in walking order: segment, plane, token. Tokens that one side does not hold count.
    pub fn units(&self) -> u64 {
        self.segments.iter().map(Segment::units).fold(0, u64::saturating_add)
    }

    /// All its units.
    pub fn whole(&self) -> UnitRange {
        UnitRange { start: 0, end: self.units() }
    }

    /// Exactly the bytes that it moves.
    pub fn bytes(&self) -> u64 {
        clamp(self.segments.iter().map(Segment::bytes).fold(0, u128::saturating_add))
    }

    /// Exactly the bytes that `range` moves.
    pub fn bytes_in(&self, range: UnitRange) -> u64 {
        let (mut bytes, mut base) = (0u128, 0u64);
        for segment in &self.segments {
            let end = base.saturating_add(segment.units());
            let (from, to) = (range.start.max(base), range.end.min(end));
            if from < to {
                bytes = bytes
                    .saturating_add(segment.bytes_before(to - base).saturating_sub(segment.bytes_before(from - base)));
            }
            base = end;
        }
        clamp(bytes)
    }

    /// `parts` (at least one) contiguous ranges of nearly the same number of bytes that together are [`Program::whole`]. A
    /// pure function of the segments: both ends cut alike. A range is empty when there are fewer units than parts.
    pub fn split(&self, parts: u32) -> Vec<UnitRange> {
        self.split_by(&vec![1; parts.max(1) as usize])
    }

    /// One contiguous range for every weight, with about that share of the bytes; together they are [`Program::whole`], in order. Where no
    /// weight is above 0, the last range has everything. A pure function of the segments and the weights.
    pub fn split_by(&self, weights: &[u32]) -> Vec<UnitRange> {
        let sizes: Vec<u128> = self.segments.iter().map(Segment::bytes).collect();
        let total = sizes.iter().copied().fold(0, u128::saturating_add);
        let sum = weights.iter().copied().map(u128::from).sum::<u128>().max(1);
        let least = weights.iter().copied().filter(|weight| *weight > 0).min().map_or(1, u128::from);
        // In two parts: the product of all bytes and a weight may be larger than any number here.
        let share_of = |weight: u128| total / sum * weight + total % sum * weight / sum;
        let smallest = total / sum * least;
        let mut ranges = Vec::with_capacity(weights.len());
        let (mut index, mut base, mut before, mut start, mut weighed) = (0, 0u64, 0u128, 0, 0u128);
        for weight in weights.iter().take(weights.len().saturating_sub(1)) {
            weighed += u128::from(*weight);
            let target = share_of(weighed);
            let mut end = start;
            while let (Some(segment), Some(size)) = (self.segments.get(index), sizes.get(index)) {
                if target < before.saturating_add(*size) {
                    end = base.saturating_add(segment.unit_at(target - before, smallest));
                    break;
                }
                before = before.saturating_add(*size);
                base = base.saturating_add(segment.units());
                end = base;
                index += 1;
            }
            let end = end.max(start);
            ranges.push(UnitRange { start, end });
            start = end;
        }
        if !weights.is_empty() {
            ranges.push(UnitRange { start, end: self.units() });
        }
        ranges
    }

    /// A stable 64-bit hash (FNV-1a) of the segments, not of the tables: both ends plan the same program exactly when it is equal.
    pub fn fingerprint(&self) -> u64 {
        let mut hash = Fnv::default();
        for segment in &self.segments {
            for side in [&segment.source, &segment.destination] {
                let Side {
                    plane,
                    plane_step,
                    table,
                    first_block,
                    block_tokens,
                    cp,
                    cp_rank,
                    token_pitch,
                    head_pitch,
                    offset,
                } = *side;
                for field in [plane, plane_step, table, block_tokens, cp, cp_rank] {
                    hash.write(&field.to_le_bytes());
                }
                for field in [first_block, token_pitch, head_pitch, offset] {
                    hash.write(&field.to_le_bytes());
                }
            }
            for field in [segment.planes, segment.heads, segment.run_bytes] {
                hash.write(&field.to_le_bytes());
            }
            for field in [segment.start, segment.end] {
                hash.write(&field.to_le_bytes());
            }
        }
        hash.0
    }
}

impl Segment {
    pub(super) fn units(&self) -> u64 {
        self.tokens().saturating_mul(u64::from(self.planes))
    }

    fn token_bytes(&self) -> u128 {
        u128::from(self.heads) * u128::from(self.run_bytes)
    }

    /// Bytes that one plane moves of the tokens `start..to`.
    fn row_bytes(&self, to: u64) -> u128 {
        if self.tokens() == 0 {
            return 0;
        }
        self.token_bytes().saturating_mul(u128::from(self.held(self.start, to)))
    }

    fn bytes(&self) -> u128 {
        self.row_bytes(self.end).saturating_mul(u128::from(self.planes))
    }

    /// Bytes of its first `units` units.
    fn bytes_before(&self, units: u64) -> u128 {
        let tokens = self.tokens();
        if tokens == 0 {
            return 0;
        }
        let (rows, rest) = (units / tokens, units % tokens);
        let whole = if rows == 0 { 0 } else { self.row_bytes(self.end).saturating_mul(u128::from(rows)) };
        whole.saturating_add(self.row_bytes(self.start.saturating_add(rest)))
    }

    /// The unit where about `bytes` bytes, fewer than it has, lie before it; at a block edge where a share is many blocks.
    fn unit_at(&self, bytes: u128, share: u128) -> u64 {
        let (tokens, row) = (self.tokens(), self.row_bytes(self.end));
        if tokens == 0 || row == 0 {
            return 0;
        }
        let (plane, rest) = (clamp(bytes / row), bytes % row);
        let (mut low, mut high) = (self.start, self.end);
        if self.source.cp == 1 && self.destination.cp == 1 {
            low = self.start.saturating_add(clamp(rest / self.token_bytes()));
        } else {
            while low < high {
                let middle = low + (high - low) / 2;
                if self.row_bytes(middle) < rest {
                    low = middle + 1;
                } else {
                    high = middle;
                }
            }
        }
        let block = u64::from(self.source.block_tokens.max(self.destination.block_tokens));
        if share >= self.token_bytes().saturating_mul(u128::from(block)).saturating_mul(BLOCKS_PER_SHARE) {
            low = (low / block * block).max(self.start);
        }
        plane.saturating_mul(tokens).saturating_add(low - self.start)
    }
}

fn clamp(value: u128) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Fnv(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}
