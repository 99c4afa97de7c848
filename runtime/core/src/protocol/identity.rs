//! Who a node is to others, and what it speaks.

use crate::wire;
use crate::{Epoch, NodeId};

/// Who speaks, and with which secret.
#[derive(Clone)]
pub struct Identity {
    /// Which node.
    pub node: NodeId,
    /// Which incarnation.
    pub epoch: Epoch,
    /// Shared by all nodes of a deployment; required off loopback.
    pub secret: Option<std::sync::Arc<[u8]>>,
    /// Which protocols it speaks.
    pub protocols: Protocols,
}

/// Versions of the control protocol that a node speaks, both ends included. The default is what this build speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protocols {
    /// The oldest.
    pub min: u16,
    /// The newest.
    pub max: u16,
}

impl Default for Protocols {
    fn default() -> Self {
        Protocols { min: wire::PROTOCOL_MIN, max: wire::PROTOCOL_MAX }
    }
}

impl core::fmt::Debug for Identity {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        // The secret stays out of logs.
        f.debug_struct("Identity")
            .field("node", &self.node)
            .field("epoch", &self.epoch)
            .field("secured", &self.secret.is_some())
            .finish()
    }
}
