//! This side's memory of one stream's share of a transfer.

use std::sync::Arc;

use kvferry_core::{End, Program, Strips, UnitRange};
use kvferry_transport::{Cursor, Stage};

use crate::connection::Bound;

/// Where bytes come from or go to.
pub(crate) enum Share {
    /// Straight between the socket and a pool in host memory.
    Direct(Box<Cursor>),
    /// By way of a stage's slots, for a pool in a device's memory.
    Staged(Staged),
}

/// A share that the device copies, chunk by chunk.
#[derive(Clone)]
pub(crate) struct Staged {
    pub(crate) stage: Stage,
    pub(crate) program: Arc<Program>,
    pub(crate) strips: Strips,
    /// Copies of the device so far.
    pub(crate) chunks: u64,
}

impl Bound {
    /// The share of one stream. The program was validated against the pool's layout at that end.
    pub(crate) fn share(&self, program: &Arc<Program>, end: End, part: UnitRange) -> Share {
        match &self.stage {
            None => {
                let (pool, layout) = (self.pool.clone(), self.layout.clone());
                Share::Direct(Box::new(Cursor::new(pool, layout, program.clone(), end, part)))
            }
            Some(stage) => Share::Staged(Staged {
                stage: stage.clone(),
                program: program.clone(),
                strips: program.strips(part),
                chunks: 0,
            }),
        }
    }
}
