//! What an engine found.

use serde::{Deserialize, Serialize};

/// What an engine has checked since its start, and who has its blocks at the moment. Bytes and blocks are of one rank.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineReport {
    /// Bytes of KV that were computed (prefill).
    pub filled_bytes: u64,
    /// Bytes that handovers had to bring and that were compared (decode), whether they were right or not.
    pub verified_bytes: u64,
    /// Bytes of reused prefixes that were compared again.
    pub reused_bytes: u64,
    /// Bytes that were not what they have to be: wrong KV, and `stray_bytes`.
    pub mismatched_bytes: u64,
    /// Bytes that were written where nothing may be written: in padding, or in blocks that held nothing.
    pub stray_bytes: u64,
    /// The first byte that was wrong, in words.
    pub first_mismatch: Option<String>,
    /// Requests whose KV was computed or verified to the end.
    pub completed_requests: u64,
    /// Blocks of all layer groups.
    pub blocks: u64,
    /// Blocks that may be used: they hold nothing, or what a request left behind.
    pub free_blocks: u64,
    /// Blocks that hold prefixes for reuse; those that no request uses give way when blocks are short.
    pub cached_blocks: u64,
    /// Blocks of requests that were opened and not released (prefill), or placed and not let go of (decode); without shared prefixes.
    pub held_blocks: u64,
    /// Blocks that something may still write.
    pub quarantined_blocks: u64,
    /// Blocks that belong to nobody.
    pub leaked_blocks: u64,
    /// Requests that have blocks, quarantined ones included.
    pub held_requests: u64,
    /// Requests that wait for blocks.
    pub queued_requests: u64,
    /// Answers of the engine that its worker rejected.
    pub rejected: u64,
    /// The last of them, in words.
    pub last_rejection: Option<String>,
}

impl EngineReport {
    /// Adds another rank's report: numbers are summed, the first texts kept.
    pub fn merge(&mut self, other: &EngineReport) {
        let sums = [
            (&mut self.filled_bytes, other.filled_bytes),
            (&mut self.verified_bytes, other.verified_bytes),
            (&mut self.reused_bytes, other.reused_bytes),
            (&mut self.mismatched_bytes, other.mismatched_bytes),
            (&mut self.stray_bytes, other.stray_bytes),
            (&mut self.completed_requests, other.completed_requests),
            (&mut self.blocks, other.blocks),
            (&mut self.free_blocks, other.free_blocks),
            (&mut self.cached_blocks, other.cached_blocks),
            (&mut self.held_blocks, other.held_blocks),
            (&mut self.quarantined_blocks, other.quarantined_blocks),
            (&mut self.leaked_blocks, other.leaked_blocks),
            (&mut self.held_requests, other.held_requests),
            (&mut self.queued_requests, other.queued_requests),
            (&mut self.rejected, other.rejected),
        ];
        for (sum, value) in sums {
            *sum = sum.saturating_add(value);
        }
        for (mine, theirs) in
            [(&mut self.first_mismatch, &other.first_mismatch), (&mut self.last_rejection, &other.last_rejection)]
        {
            if mine.is_none() {
                mine.clone_from(theirs);
            }
        }
    }
}
