//! The copies themselves: out of the source's memory when a slice leaves, into the destination's when it lands.

use kvferry_core::{End, Program, UnitRange};
use kvferry_transport::{Pool, TransferError};

/// Reads a part of a program out of its source, as hardware does it: without asking anybody.
pub(crate) fn take(
    program: &Program,
    part: UnitRange,
    source: &Pool,
    bytes: &mut Vec<u8>,
) -> Result<(), TransferError> {
    bytes.clear();
    for span in program.spans(End::Source, part, source.layout()) {
        let from = source.address(span.at, span.bytes).ok_or_else(outside)?;
        let (at, length) = (bytes.len(), span.bytes as usize);
        bytes.reserve(length);
        // SAFETY: `address` checked the range against a mapped region that lives as long as the pool; `reserve` made as much room behind
        // the buffer's end, which is no pool memory; pool memory is never borrowed.
        unsafe {
            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr().add(at), length);
            bytes.set_len(at + length);
        }
    }
    complete(bytes.len() as u64, program.bytes_in(part))
}

/// Writes what [`take`] read into the destination. Returns the pieces.
pub(crate) fn put(program: &Program, part: UnitRange, destination: &Pool, bytes: &[u8]) -> Result<u64, TransferError> {
    let (mut pieces, mut rest) = (0, bytes);
    for span in program.spans(End::Destination, part, destination.layout()) {
        let to = destination.address(span.at, span.bytes).ok_or_else(outside)?;
        let Some((piece, behind)) = rest.split_at_checked(span.bytes as usize) else { break };
        // SAFETY: as in `take`, the other way round.
        unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), to, piece.len()) };
        (pieces, rest) = (pieces + 1, behind);
    }
    complete((bytes.len() - rest.len()) as u64, bytes.len() as u64).map(|()| pieces)
}

fn outside() -> TransferError {
    TransferError::Refused("a piece lies outside its pool".to_owned())
}

fn complete(bytes: u64, planned: u64) -> Result<(), TransferError> {
    if bytes == planned {
        return Ok(());
    }
    let message =
        format!("{bytes} bytes were laid out where {planned} were planned; the program and the layouts disagree");
    Err(TransferError::Io { context: "walking the program", message })
}
