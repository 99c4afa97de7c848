//! What a handover has to bring to one rank, from the definitions alone.

use core::ops::Range;

use kvferry::{GroupGeometry, Shard};

/// Bytes of a request of `tokens` tokens that a rank with this shard holds, apart from those of the first `have` tokens.
pub(crate) fn bytes(geometry: &GroupGeometry, shard: &Shard, tokens: u64, have: u64) -> u64 {
    let mut bytes = 0u64;
    for (index, group) in shard.groups.iter().enumerate() {
        let needed = geometry.needed(index, tokens, have);
        let own = own_tokens(needed, u64::from(group.block_tokens), u64::from(shard.cp), u64::from(shard.coords.cp));
        for tensor in &group.tensors {
            let token = u64::from(tensor.heads.end - tensor.heads.start) * u64::from(tensor.head_bytes);
            bytes = bytes.saturating_add(own.saturating_mul(token).saturating_mul(group.layers.len() as u64));
        }
    }
    bytes
}

/// How many of the tokens lie in blocks of rank `index` when blocks are dealt to `ranks` ranks in turn.
fn own_tokens(tokens: Range<u64>, block: u64, ranks: u64, index: u64) -> u64 {
    let (block, ranks) = (block.max(1), ranks.max(1));
    let before = |end: u64| {
        let (blocks, rest) = (end / block, end % block);
        let own = blocks / ranks + u64::from(blocks % ranks > index);
        own * block + if blocks % ranks == index { rest } else { 0 }
    };
    before(tokens.end).saturating_sub(before(tokens.start))
}
