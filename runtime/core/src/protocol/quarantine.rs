//! How long blocks that something may still touch are waited for, and how many a node can do without.

use core::time::Duration;

use serde::{Deserialize, Serialize};

/// When a peer is fenced, and when a rank has too little left to be of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuarantineTerms {
    /// How long a cancelled transfer may take to end before its peer is fenced; and from one attempt to fence it to the next.
    pub fence_after: Duration,
    /// KV in quarantine, in thousandths of the pool, beyond which the rank takes no more work. It never reuses such blocks.
    pub share_max: u32,
}

impl Default for QuarantineTerms {
    fn default() -> Self {
        QuarantineTerms { fence_after: Duration::from_secs(2), share_max: 500 }
    }
}
