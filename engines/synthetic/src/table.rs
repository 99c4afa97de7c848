//! A request's blocks on one rank, and walks over them.

use kvferry_core::{BlockTable, Tables};

use crate::shape::RankShape;

/// A request's blocks in one layer group.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    /// Which of the rank's own blocks of the request `blocks` starts with.
    pub(crate) first: u64,
    pub(crate) blocks: Vec<u32>,
    /// How many of the first blocks are shared with other requests.
    pub(crate) shared: usize,
}

/// As the worker is told.
pub(crate) fn announce(shape: &RankShape, tables: &[Table]) -> Tables {
    let groups = shape.groups.iter().zip(tables);
    Tables {
        groups: groups
            .map(|(group, table)| BlockTable::known(group.first_token(table.first), table.blocks.clone()))
            .collect(),
    }
}

/// One block of a request in one plane.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unit {
    /// Index into [`RankShape::planes`].
    pub(crate) plane: usize,
    pub(crate) block: u32,
    /// Its number among the rank's own blocks of the request.
    pub(crate) own_block: u64,
}

/// A place in the walk over a request's blocks: by model layer, plane, then token.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Walk {
    plane: usize,
    slot: usize,
    skip_shared: bool,
}

impl Walk {
    /// Over the blocks that belong to this request alone.
    pub(crate) fn unshared() -> Walk {
        Walk { skip_shared: true, ..Walk::default() }
    }

    /// The next unit; it is not passed yet.
    pub(crate) fn peek(&mut self, shape: &RankShape, tables: &[Table]) -> Option<Unit> {
        loop {
            let table = tables.get(shape.planes.get(self.plane)?.group)?;
            let slot = if self.skip_shared { self.slot.max(table.shared) } else { self.slot };
            if let Some(block) = table.blocks.get(slot) {
                self.slot = slot;
                return Some(Unit { plane: self.plane, block: *block, own_block: table.first + slot as u64 });
            }
            self.plane += 1;
            self.slot = 0;
        }
    }

    /// Passes the unit that [`Walk::peek`] gave.
    pub(crate) fn advance(&mut self) {
        self.slot += 1;
    }
}
