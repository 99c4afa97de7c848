//! Strips of a program as the kernel takes them, with a contiguous buffer in the other side's place.

use std::sync::Arc;

use kvferry_core::{End, Program, Segment, Side, Strip};

use crate::rectangle::{LowerError, Payload, lower_apart};

/// Lowers strips that lie one behind the other in a buffer, from byte `at` on, to a copy between it and the pool at `end`, against whose layout
/// the program was validated. `pool` is the address of the pool's plane table, `buffer` that of a table with one plane: the buffer, and no
/// bytes from block to block. What the payload takes is bounded by the strips, not by how long the program's tables are: a peer may have made it.
pub(crate) fn lower_strips(
    program: &Program,
    end: End,
    strips: &[Strip],
    at: u64,
    (pool, buffer): (u64, u64),
) -> Result<Payload, LowerError> {
    let mut segments = Vec::with_capacity(strips.len());
    let mut place = at;
    for strip in strips {
        let of = program.segments.get(strip.segment).ok_or(LowerError::Table)?;
        segments.push(segment(of, end, strip, place)?);
        place = place.wrapping_add(strip.bytes());
    }
    // All of the buffer is block 0 of its only plane.
    let program = Program { segments, sources: program.sources.clone(), destinations: program.destinations.clone() }
        .with_tables(end.other(), vec![Some(Arc::from([0]))]);
    let planes = match end {
        End::Source => [pool, buffer],
        End::Destination => [buffer, pool],
    };
    lower_apart(&program, program.whole(), planes)
}

/// A strip as a segment of one plane, between the pool and the buffer's byte `place`.
fn segment(of: &Segment, end: End, strip: &Strip, place: u64) -> Result<Segment, LowerError> {
    let side = of.side(end);
    let inside = u64::from(strip.head).wrapping_mul(side.head_pitch).wrapping_add(u64::from(strip.byte));
    let plane = strip.plane.checked_mul(side.plane_step).and_then(|step| step.checked_add(side.plane));
    let pool = Side {
        plane: plane.ok_or(LowerError::Table)?,
        plane_step: 1,
        offset: side.offset.wrapping_add(inside),
        ..*side
    };
    let (token_pitch, head_pitch) = strip.pitches();
    let buffer = Side {
        plane: 0,
        plane_step: 1,
        table: 0,
        first_block: 0,
        // One block, longer than any request, of as many tokens as whole blocks of the pool have: cells are then the pool's blocks.
        block_tokens: u32::MAX / side.block_tokens.max(1) * side.block_tokens.max(1),
        cp: 1,
        cp_rank: 0,
        token_pitch,
        head_pitch,
        // Modulo 2^64, as the kernel counts: the strip's first token comes to lie at its place.
        offset: place.wrapping_sub(strip.token.wrapping_mul(token_pitch)),
    };
    let (source, destination) = match end {
        End::Source => (pool, buffer),
        End::Destination => (buffer, pool),
    };
    let tokens = strip.token.saturating_add(strip.tokens);
    Ok(Segment {
        source,
        destination,
        planes: 1,
        start: strip.token,
        end: tokens,
        heads: strip.heads,
        run_bytes: strip.run_bytes,
    })
}
