//! One posted transfer, and the slices of it that are on their way.

use std::sync::Arc;

use kvferry_core::{Direction, PoolId, Program, UnitRange};
use kvferry_transport::{Pool, Transfer, TransferError};

use crate::fabric::NicId;
use crate::link::LinkId;
use crate::shadow::{Content, Watched};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FlowId(pub(crate) u64);

/// The end that posted it: also the side that dialed.
pub(crate) const INITIATOR: usize = 0;
/// The end whose pool it names: also the side that accepted.
pub(crate) const OWNER: usize = 1;

/// It lives until it is over at both ends and nothing of it is on its way.
pub(crate) struct Flow {
    pub(crate) transfer: Transfer,
    /// Initiator and owner.
    pub(crate) nics: [NicId; 2],
    pub(crate) link: LinkId,
    /// The owner's pool, and the key by which the initiator names it.
    pub(crate) remote: (PoolId, u128),
    pub(crate) local: Pool,
    pub(crate) stage: Stage,
    /// Which ends have nothing to do with it any more: what lands there is dropped.
    pub(crate) over: [bool; 2],
    /// Why it ends once nothing is on its way.
    pub(crate) stop: Option<Stop>,
    /// Slices on their way.
    pub(crate) in_flight: u32,
    /// Waits for the source's wire.
    pub(crate) queued: bool,
    /// Slices that have landed.
    pub(crate) landed: u64,
    /// Bytes that were written where they belong.
    pub(crate) landed_bytes: u64,
    pub(crate) pieces: u64,
    pub(crate) times: Times,
    /// When the last of its slices lands, where they land in order.
    pub(crate) last_at: u64,
    /// The receiver has asked the writer to stop.
    pub(crate) asked: bool,
    /// The initiator was told that nobody takes its slices.
    pub(crate) told: bool,
    /// What is on its way died with its source.
    pub(crate) lost: bool,
}

/// Nanoseconds.
#[derive(Clone, Copy, Default)]
pub(crate) struct Times {
    pub(crate) posted: u64,
    pub(crate) first_left: Option<u64>,
    pub(crate) last_landed: u64,
}

pub(crate) enum Stage {
    /// The owner has not heard of it.
    Requested,
    /// Nobody expects it.
    Waiting,
    /// Bytes move.
    Running(Running),
}

pub(crate) struct Running {
    /// With the source's tables.
    pub(crate) source: Arc<Program>,
    /// With the destination's.
    pub(crate) destination: Arc<Program>,
    /// The owner's.
    pub(crate) pool: Pool,
    pub(crate) range: UnitRange,
    pub(crate) left: UnitRange,
    pub(crate) left_bytes: u64,
    /// Hardware gives up after so many slices have landed.
    pub(crate) fails_after: Option<u64>,
    /// Both pools' shadows, where somebody watches.
    pub(crate) watched: Option<Watched>,
}

/// Why a flow ends early.
pub(crate) struct Stop {
    pub(crate) at_initiator: TransferError,
    pub(crate) at_owner: TransferError,
}

/// A slice that has left its source.
pub(crate) struct Slice {
    pub(crate) flow: FlowId,
    pub(crate) part: UnitRange,
    pub(crate) size: u64,
    /// Empty where no bytes are moved.
    pub(crate) bytes: Vec<u8>,
    /// What it carries.
    pub(crate) content: Content,
}

impl Flow {
    /// The end that is read.
    pub(crate) fn source(&self) -> usize {
        match self.transfer.direction {
            Direction::Pull => OWNER,
            Direction::Push => INITIATOR,
        }
    }

    /// The end that is written.
    pub(crate) fn destination(&self) -> usize {
        1 - self.source()
    }

    pub(crate) fn is_push(&self) -> bool {
        self.transfer.direction == Direction::Push
    }

    /// Whether its next slice may leave: there is one, nobody has stopped it, and its window is open.
    pub(crate) fn wants_out(&self, window: u32) -> bool {
        let open = !self.over[INITIATOR] && !self.over[self.source()] && self.stop.is_none();
        let Stage::Running(running) = &self.stage else { return false };
        open && self.in_flight < window.max(1) && !running.left.is_empty()
    }

    /// Whether every byte is where it belongs.
    pub(crate) fn is_whole(&self) -> bool {
        let Stage::Running(running) = &self.stage else { return false };
        let waits = !self.over[self.destination()] && self.stop.is_none() && self.in_flight == 0;
        waits && running.left.is_empty() && self.landed_bytes == running.source.bytes_in(running.range)
    }

    /// Whether the pool of that end is this one, or may become so.
    pub(crate) fn uses(&self, end: usize, pool: PoolId) -> bool {
        pool == if end == INITIATOR { self.transfer.local } else { self.remote.0 }
    }
}

impl Running {
    /// Source's and destination's pool, given the initiator's.
    pub(crate) fn pools<'a>(&'a self, direction: Direction, local: &'a Pool) -> (&'a Pool, &'a Pool) {
        match direction {
            Direction::Pull => (&self.pool, local),
            Direction::Push => (local, &self.pool),
        }
    }

    /// Takes the next slice of about `budget` bytes, at least one unit, off what is left; returns it and its bytes.
    pub(crate) fn next_slice(&mut self, budget: u64) -> (UnitRange, u64) {
        let units = self.left.units().max(1);
        let each = (self.left_bytes / units).max(1);
        let mut take = (budget / each).clamp(1, units);
        // Units differ in size from segment to segment.
        loop {
            let end = self.left.start.saturating_add(take).min(self.left.end);
            let part = UnitRange { start: self.left.start, end };
            let bytes = self.source.bytes_in(part);
            if take == 1 || bytes <= budget.saturating_mul(2) {
                self.left.start = end;
                self.left_bytes = self.left_bytes.saturating_sub(bytes);
                return (part, bytes);
            }
            take /= 2;
        }
    }
}
