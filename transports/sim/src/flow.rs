//! One posted transfer.

use std::sync::Arc;

use kvferry_core::{Direction, PoolId, Program, UnitRange};
use kvferry_transport::{Pool, Transfer, TransferError};

use crate::fabric::NicId;
use crate::link::LinkId;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FlowId(pub(crate) u64);

/// It owns what it reads and writes until it ends.
pub(crate) struct Flow {
    pub(crate) transfer: Transfer,
    pub(crate) initiator: NicId,
    pub(crate) owner: NicId,
    pub(crate) link: LinkId,
    /// The owner's pool, and the key by which the initiator names it.
    pub(crate) remote: (PoolId, u128),
    pub(crate) local: Pool,
    pub(crate) stage: Stage,
    /// Why it ends once the slice that is on its way has landed.
    pub(crate) stop: Option<Stop>,
    pub(crate) pieces: u64,
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
    /// With both ends' tables.
    pub(crate) program: Arc<Program>,
    /// The owner's.
    pub(crate) pool: Pool,
    pub(crate) left: UnitRange,
    pub(crate) left_bytes: u64,
    /// On its way.
    pub(crate) slice: UnitRange,
}

/// Why a flow ends early.
pub(crate) struct Stop {
    /// The NIC that wants it: it hears of the end first.
    pub(crate) by: NicId,
    pub(crate) at_initiator: TransferError,
    pub(crate) at_owner: TransferError,
}

impl Flow {
    /// Who is read, who is written.
    pub(crate) fn ends(&self) -> (NicId, NicId) {
        match self.transfer.direction {
            Direction::Pull => (self.owner, self.initiator),
            Direction::Push => (self.initiator, self.owner),
        }
    }

    pub(crate) fn joins(&self, one: NicId, other: NicId) -> bool {
        (self.initiator, self.owner) == (one, other) || (self.initiator, self.owner) == (other, one)
    }

    /// Whether it reads or writes that pool, or may begin to.
    pub(crate) fn uses(&self, nic: NicId, pool: PoolId) -> bool {
        (self.initiator == nic && self.transfer.local == pool)
            || (self.owner == nic && self.remote.0 == pool && matches!(self.stage, Stage::Running(_)))
    }
}

impl Running {
    /// Takes the next slice of about `budget` bytes, at least one unit, off what is left; returns its bytes.
    pub(crate) fn next_slice(&mut self, budget: u64) -> u64 {
        let units = self.left.units().max(1);
        let each = (self.left_bytes / units).max(1);
        let mut take = (budget / each).clamp(1, units);
        // Units differ in size from segment to segment.
        loop {
            let end = self.left.start.saturating_add(take).min(self.left.end);
            let part = UnitRange { start: self.left.start, end };
            let bytes = self.program.bytes_in(part);
            if take == 1 || bytes <= budget.saturating_mul(2) {
                self.slice = part;
                self.left.start = end;
                self.left_bytes = self.left_bytes.saturating_sub(bytes);
                return bytes;
            }
            take /= 2;
        }
    }
}
