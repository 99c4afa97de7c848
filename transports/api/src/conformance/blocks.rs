//! Pools of whole blocks and the programs between them, for tests and benchmarks that are not about layouts.

use kvferry_core::{Plane, PoolLayout, Program, Segment, Side};

/// Planes of `blocks` blocks each, one behind the other in one region.
pub fn block_planes(planes: u32, blocks: u32, block_bytes: u64) -> PoolLayout {
    let plane_bytes = u64::from(blocks) * block_bytes;
    let plane = |plane: u32| Plane {
        region: 0,
        offset: u64::from(plane) * plane_bytes,
        blocks,
        block_stride: block_bytes,
        block_bytes,
    };
    PoolLayout { regions: vec![u64::from(planes) * plane_bytes], planes: (0..planes).map(plane).collect() }
}

/// Copies whole blocks of every plane: the first of `from` to the first of `to`, and so on. A block is `block_tokens` tokens, which its bytes
/// are divided by; there are as many units as tokens and planes.
pub fn whole_blocks(
    planes: u32,
    block_tokens: u32,
    block_bytes: u64,
    from: impl IntoIterator<Item = u32>,
    to: impl IntoIterator<Item = u32>,
) -> Program {
    let (from, to): (Vec<u32>, Vec<u32>) = (from.into_iter().collect(), to.into_iter().collect());
    let pitch = block_bytes / u64::from(block_tokens);
    let side = Side {
        plane: 0,
        plane_step: 1,
        table: 0,
        first_block: 0,
        block_tokens,
        cp: 1,
        cp_rank: 0,
        token_pitch: pitch,
        head_pitch: pitch,
        offset: 0,
    };
    let segment = Segment {
        source: side,
        destination: side,
        planes,
        start: 0,
        end: from.len() as u64 * u64::from(block_tokens),
        heads: 1,
        run_bytes: u32::try_from(pitch).unwrap(),
    };
    Program { segments: vec![segment], sources: vec![Some(from.into())], destinations: vec![Some(to.into())] }
}
