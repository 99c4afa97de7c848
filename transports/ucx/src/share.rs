//! This side's memory of a transfer's bytes.

use std::sync::Arc;

use kvferry_core::{End, Program, UnitRange};
use kvferry_transport::{Cursor, Staged};

use crate::remote::Bound;

/// Where packed bytes come from or go to.
pub(crate) enum Share {
    /// A pool in host memory, which a processor packs and unpacks.
    Direct(Box<Cursor>),
    /// A pool in a device's memory, which the device itself packs and unpacks, by way of a stage's slots.
    Staged(Staged),
}

impl Bound {
    /// One end of a transfer. The program was validated against the pool's layout at that end.
    pub(crate) fn share(&self, program: &Arc<Program>, end: End, range: UnitRange) -> Share {
        match &self.stage {
            None => {
                let (pool, layout) = (self.pool.clone(), self.layout.clone());
                Share::Direct(Box::new(Cursor::new(pool, layout, program.clone(), end, range)))
            }
            Some(stage) => Share::Staged(Staged::new(stage, program, range)),
        }
    }
}
