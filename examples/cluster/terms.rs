//! How long nodes wait for each other, where the command line says otherwise.

use std::time::Duration;

use kvferry::{DeadlineTerms, LeaseTerms, NodeConfig, RailTerms, SessionTerms};
use serde::{Deserialize, Serialize};

/// What `--silence`, `--lease`, `--rails` and `--config` give; the defaults of a node otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Terms {
    pub(crate) silence_ms: Option<u64>,
    pub(crate) lease_ms: Option<u64>,
    pub(crate) deadlines: Option<DeadlineTerms>,
    pub(crate) rails_max: Option<u32>,
}

impl Terms {
    /// Makes a node wait like that. All nodes of a run have the same terms.
    pub(crate) fn apply(&self, node: &mut NodeConfig) {
        if let Some(silence) = self.silence_ms.map(Duration::from_millis) {
            // In the proportions of the defaults, where a peer may miss several beats.
            let beat = silence / 6;
            node.session =
                SessionTerms { handshake_within: silence, beat_every: beat, silence_max: silence, resume_within: beat };
        }
        if let Some(rails_max) = self.rails_max {
            node.rails = RailTerms { rails_max, ..RailTerms::default() };
        }
        if let Some(deadlines) = self.deadlines {
            node.deadlines = deadlines;
        }
        if let Some(lease) = self.lease_ms.map(Duration::from_millis) {
            node.leases = LeaseTerms { duration: lease, ..LeaseTerms::default() };
            // A transfer that a paused peer holds up is given up as soon as its lease cannot be good any more.
            node.deadlines.floor = lease;
        }
    }

    /// After how long a peer that says nothing is lost for everybody.
    pub(crate) fn lost_after(&self) -> Duration {
        let SessionTerms { silence_max, resume_within, .. } = self.node().session;
        silence_max + resume_within
    }

    fn node(&self) -> NodeConfig {
        let mut node = NodeConfig::new(kvferry::NodeId(0), kvferry::Epoch(1));
        self.apply(&mut node);
        node
    }
}
