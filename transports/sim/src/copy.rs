//! The copies themselves.

use kvferry_core::{Program, UnitRange};
use kvferry_transport::{Pool, TransferError};

/// Copies a part of a program from one pool into another, as hardware does it: without asking anybody. Returns the pieces.
pub(crate) fn land(
    program: &Program,
    part: UnitRange,
    source: &Pool,
    destination: &Pool,
) -> Result<u64, TransferError> {
    let (mut pieces, mut bytes) = (0, 0);
    for copy in program.copies(part, source.layout(), destination.layout()) {
        let (Some(from), Some(to)) =
            (source.address(copy.source, copy.bytes), destination.address(copy.destination, copy.bytes))
        else {
            return Err(TransferError::Refused("a piece lies outside its pool".to_owned()));
        };
        // SAFETY: `address` checked both ranges against mapped regions that live as long as the pools; pool memory is never borrowed, and
        // `copy` allows the ranges to overlap.
        unsafe { std::ptr::copy(from, to, copy.bytes as usize) };
        pieces += 1;
        bytes += copy.bytes;
    }
    let planned = program.bytes_in(part);
    if bytes == planned {
        Ok(pieces)
    } else {
        let message =
            format!("{bytes} bytes were laid out where {planned} were planned; the program and the layouts disagree");
        Err(TransferError::Io { context: "walking the program", message })
    }
}
