//! This side's memory of one stream's share of a transfer.

use std::sync::Arc;

use kvferry_core::{End, Program, UnitRange};
use kvferry_transport::{Cursor, Staged};

use crate::connection::Bound;

/// Where bytes come from or go to.
pub(crate) enum Share {
    /// Straight between the socket and a pool in host memory.
    Direct(Box<Cursor>),
    /// By way of a stage's slots, for a pool in a device's memory.
    Staged(Staged),
}

impl Bound {
    /// The share of one stream. The program was validated against the pool's layout at that end.
    pub(crate) fn share(&self, program: &Arc<Program>, end: End, part: UnitRange) -> Share {
        match &self.stage {
            None => {
                let (pool, layout) = (self.pool.clone(), self.layout.clone());
                Share::Direct(Box::new(Cursor::new(pool, layout, program.clone(), end, part)))
            }
            Some(stage) => Share::Staged(Staged::new(stage, program, part)),
        }
    }
}
