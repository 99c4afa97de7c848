//! What a transfer moves.

use kvferry_core::{End, PoolId, PoolLayout, Program};
use kvferry_ucx::raw::RawWay;

use crate::{AgentError, MemoryKind, Ticket, WireError};

/// Bytes that are read from or written to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Region of the local pool.
    pub region: usize,
    /// Offset in it.
    pub offset: u64,
    /// Where at the peer, as the peer sees it.
    pub address: u64,
    /// How many.
    pub bytes: u64,
}

/// A transfer.
#[derive(Clone, Debug)]
pub struct Transfer {
    /// The peer's name.
    pub peer: String,
    /// Which way.
    pub operation: Operation,
    /// The local pool, which was registered.
    pub pool: PoolId,
    /// The kind of the peer's memory, and its device there.
    pub memory: (MemoryKind, u64),
    /// What moves, in any order. Pieces that follow each other at both ends are moved as one.
    pub pieces: Vec<Piece>,
    /// The lease under which it is read, if the peer, an agent of ours, gave one.
    pub lease: Option<Ticket>,
    /// Told to the peer when everything has moved.
    pub notification: Option<bytes::Bytes>,
    /// How long it may take; the agent's own limit by default.
    pub within: Option<std::time::Duration>,
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// From the peer, as NIXL's READ.
    Read,
    /// To the peer, as NIXL's WRITE.
    Write,
}

impl Operation {
    pub(crate) fn way(self) -> RawWay {
        match self {
            Operation::Read => RawWay::Read,
            Operation::Write => RawWay::Write,
        }
    }
}

/// The pieces of a program between a local pool and a peer's memory whose regions begin at `bases`, as the peer sees them.
///
/// `local` says which end is here; the layouts are the source's and the destination's.
pub fn pieces(
    program: &Program,
    local: End,
    layouts: (&PoolLayout, &PoolLayout),
    bases: &[u64],
) -> Result<Vec<Piece>, AgentError> {
    let (source, destination) = layouts;
    for (end, layout) in [(End::Source, source), (End::Destination, destination)] {
        program.validate(end, layout).map_err(|error| AgentError::Program(error.to_string()))?;
    }
    let mut pieces: Vec<Piece> = Vec::new();
    for copy in program.copies(program.whole(), source, destination) {
        let (here, there) = match local {
            End::Source => (copy.source, copy.destination),
            End::Destination => (copy.destination, copy.source),
        };
        let base = bases.get(there.region as usize);
        let address = base.and_then(|base| base.checked_add(there.offset));
        let address = address.ok_or(WireError::Range { address: there.offset, bytes: copy.bytes })?;
        pieces.push(Piece { region: here.region as usize, offset: here.offset, address, bytes: copy.bytes });
    }
    Ok(pieces)
}

/// Joins pieces that follow each other at both ends and whose bytes at the peer lie in one range. The order is kept.
pub(crate) fn joined(pieces: Vec<Piece>, mut one_range: impl FnMut(u64, u64) -> bool) -> Vec<Piece> {
    let mut out: Vec<Piece> = Vec::with_capacity(pieces.len().min(1 << 16));
    for piece in pieces {
        match out.last_mut() {
            Some(last)
                if last.region == piece.region
                    && last.offset.checked_add(last.bytes) == Some(piece.offset)
                    && last.address.checked_add(last.bytes) == Some(piece.address)
                    && one_range(last.address, last.bytes + piece.bytes) =>
            {
                last.bytes += piece.bytes;
            }
            _ => out.push(piece),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_follows_at_both_ends_is_joined() {
        let piece = |region, offset, address, bytes| Piece { region, offset, address, bytes };
        let all = vec![
            piece(0, 0, 100, 4),
            piece(0, 4, 104, 4),
            piece(0, 8, 200, 4),
            piece(0, 16, 204, 4),
            piece(1, 20, 208, 4),
            piece(1, u64::MAX, 212, 4),
        ];
        let expected = vec![piece(0, 0, 100, 8), piece(0, 8, 200, 4), piece(0, 16, 204, 4), piece(1, 20, 208, 4)];
        assert_eq!(joined(all.clone(), |_, _| true)[..4], expected);
        assert_eq!(joined(all.clone(), |_, _| true).len(), 5);
        // A range of the peer ends in between.
        assert_eq!(joined(all.clone(), |_, _| false), all);
        assert_eq!(joined(vec![], |_, _| true), []);
    }
}
