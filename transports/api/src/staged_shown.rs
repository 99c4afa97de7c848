//! What is shown of a stage on the way to a peer.

use std::time::Duration;

use kvferry_core::Evidence;

use crate::Stage;

/// From so many bytes on, the figures of a way are told once more: those of the first transfer are cold.
const SHOWN_BYTES: u64 = 256 << 20;

/// What was told of the stage on one way.
#[derive(Clone, Copy, Debug, Default)]
pub struct StagedShown {
    times: u32,
    bytes: u64,
}

impl StagedShown {
    /// Notes a transfer that is over. Says whether to tell of it: after the first on a way, and once more when many bytes have come.
    pub fn is_due(&mut self, bytes: u64) -> bool {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.times >= 2 || bytes == 0 || (self.times == 1 && self.bytes < SHOWN_BYTES) {
            return false;
        }
        self.times += 1;
        true
    }
}

impl Stage {
    /// The evidence of a way, and what is known of this stage on it after a transfer of `bytes` bytes that took so long.
    pub fn shown(&self, evidence: Evidence, bytes: u64, took: Duration) -> Evidence {
        let wire = bytes as f64 / took.as_secs_f64().max(1e-9);
        let (kibibytes, slots) = (self.slot_bytes() >> 10, self.slots());
        let copies = self.speed().map_or("an unknown speed".to_owned(), |speed| format!("{:.1} GB/s", speed / 1e9));
        Evidence { staged: true, ..evidence }.seen(format!(
            "staged through page-locked host memory: chunks of {kibibytes} KiB, {slots} of them for both directions; the device copies at {copies}, \
             a whole transfer went at {:.2} GB/s",
            wire / 1e9
        ))
    }
}
