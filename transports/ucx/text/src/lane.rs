//! One lane, as UCX names it.

use std::fmt;

/// A transport of UCX on a device: `srd/rdmap40s0:1`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lane {
    /// UCX's transport: `srd`, `tcp`, `cma`, …
    pub transport: String,
    /// UCX's device, with its port if it has one: `rdmap40s0:1`, `eth0`, `memory`.
    pub device: String,
}

impl Lane {
    /// Reads `transport/device`; neither may be empty.
    pub fn parse(word: &str) -> Option<Lane> {
        let (transport, device) = word.split_once('/')?;
        let whole = !transport.is_empty() && !device.is_empty();
        whole.then(|| Lane { transport: transport.to_owned(), device: device.to_owned() })
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.transport, self.device)
    }
}
