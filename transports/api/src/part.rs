//! Cutting a range of a program into parts of about so many bytes.

use kvferry_core::{Program, UnitRange};

/// The first part of `range` that has about `budget` bytes, at least one unit of it, and its bytes. `left` is the bytes of `range`.
///
/// Units differ in size from segment to segment: it takes the average of the rest, and halves while that is far off.
pub fn first_part(program: &Program, range: UnitRange, left: u64, budget: u64) -> (UnitRange, u64) {
    let units = range.end.saturating_sub(range.start);
    let each = (left / units.max(1)).max(1);
    let mut take = (budget / each).clamp(1, units.max(1));
    loop {
        let part = UnitRange { start: range.start, end: range.start.saturating_add(take).min(range.end) };
        let bytes = program.bytes_in(part);
        if bytes <= budget.saturating_mul(2) || take == 1 {
            return (part, bytes);
        }
        take /= 2;
    }
}
