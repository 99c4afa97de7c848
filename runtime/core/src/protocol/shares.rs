//! How a push over rails is announced: the source says in which shares it moves a step, and the destination expects each where it comes.

use serde::{Deserialize, Serialize};

use super::bounds;
use crate::{HandoverId, Program, Rank, TransferId, UnitRange};

/// Prefill rank → decode rank: a step, or one share of it again, is pushed like this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PushShares {
    /// Which handover.
    pub handover: HandoverId,
    /// Which of its steps.
    pub step: u32,
    /// What [`Program::with_units_up_to`] was given, in bytes, where units were too large to be shared: ranges are of those units.
    pub unit_bytes_max: Option<u64>,
    /// In the order of the program; the first time, together all of it.
    #[serde(deserialize_with = "bounds::shares")]
    pub shares: Vec<PushShare>,
}

/// One share: a transfer of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PushShare {
    /// Which of the step's transfers it is; no number comes twice while one is under way.
    pub chunk: u16,
    /// The NIC of the destination that it comes through, by its place in that profile.
    pub nic: u32,
    /// What it moves.
    pub range: UnitRange,
}

/// One transfer of a pushed step, for what both sides say of its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ShareName {
    /// Which handover.
    pub handover: HandoverId,
    /// Which of its steps.
    pub step: u32,
    /// Which of the step's transfers.
    pub chunk: u16,
}

impl ShareName {
    /// Of that transfer.
    pub(super) fn of(id: TransferId) -> ShareName {
        ShareName { handover: id.handover(), step: id.step(), chunk: id.chunk() }
    }

    /// The transfer between these ranks.
    pub(super) fn transfer(self, source: Rank, destination: Rank) -> TransferId {
        TransferId::of(self.handover, source, destination, self.step).with_chunk(self.chunk)
    }
}

impl PushShares {
    /// Whether the shares are all of that program, in order, and none twice.
    pub(super) fn cover(&self, program: &Program) -> bool {
        let mut next = 0;
        let follows = |share: &PushShare| {
            let fits = share.range.start == next && share.range.end > next;
            next = share.range.end;
            fits
        };
        self.shares.iter().all(follows) && next == program.units()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Segment, Side};

    #[test]
    fn shares_are_all_of_a_program_or_refused() {
        let side = Side {
            plane: 0,
            plane_step: 1,
            table: 0,
            first_block: 0,
            block_tokens: 1,
            cp: 1,
            cp_rank: 0,
            token_pitch: 8,
            head_pitch: 0,
            offset: 0,
        };
        let segment = Segment { source: side, destination: side, planes: 1, start: 0, end: 10, heads: 1, run_bytes: 8 };
        let program = Program { segments: vec![segment], sources: vec![None], destinations: vec![None] };
        let cover = |ranges: &[(u64, u64)]| {
            let share = |(start, end): &(u64, u64)| PushShare {
                chunk: 1,
                nic: 0,
                range: UnitRange { start: *start, end: *end },
            };
            let shares = ranges.iter().map(share).collect();
            PushShares { handover: HandoverId(1), step: 0, unit_bytes_max: None, shares }.cover(&program)
        };
        assert!(cover(&[(0, 10)]) && cover(&[(0, 3), (3, 4), (4, 10)]));
        for wrong in [&[][..], &[(0, 9)], &[(1, 10)], &[(0, 5), (4, 10)], &[(0, 5), (6, 10)], &[(0, 10), (10, 10)]] {
            assert!(!cover(wrong), "{wrong:?}");
        }
        assert!(!cover(&[(0, 5), (5, 11)]) && !cover(&[(5, 10), (0, 5)]) && !cover(&[(0, u64::MAX)]));
        let name = ShareName { handover: HandoverId(7), step: 3, chunk: 9 };
        assert_eq!(ShareName::of(name.transfer(Rank(1), Rank(2))), name);
    }
}
