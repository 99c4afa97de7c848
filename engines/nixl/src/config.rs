//! How an agent is set up.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use kvferry_ucx::raw::RawSettings;

use crate::AgentError;
use crate::metadata::NAME_BYTES_MAX;
use crate::notification::NOTIFICATION_BYTES_MAX;
use crate::ours::EXTENSION_BYTES_MAX;

/// The active message of notifications; 1 up to NIXL 0.4.1.
const MESSAGE: u32 = 0;
/// Older ones make NIXL's own worker abort, or do not meet it at all.
const OLDEST: (u32, u32, u32) = (1, 22, 0);
/// What NIXL's UCX backend sets: lanes are chosen by it, and both ends must choose alike (`src/plugins/ucx/ucx_utils.cpp`).
const LIKE_NIXL: [(&str, &str); 6] = [
    ("RNDV_THRESH", "inf"),
    ("MAX_RMA_RAILS", "2"),
    ("IB_PCI_RELAXED_ORDERING", "try"),
    ("RC_FENCE", "none"),
    ("MAX_HCA_PER_GPU", "auto"),
    ("RNDV_PIPELINE_ERROR_HANDLING", "y"),
];

/// How an agent is set up.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    name: String,
    devices: Option<String>,
    transports: Option<String>,
    extension: Bytes,
    pub(crate) incarnation: u64,
    pub(crate) in_flight_max: usize,
    pub(crate) peers_bytes_max: usize,
    pub(crate) notifications_max: usize,
    pub(crate) within: Duration,
}

impl AgentConfig {
    /// An agent whose name is `name`, `#` and the time of this call in nanoseconds since 1970. NIXL agents refuse an agent that comes back under
    /// its old name with another address, so every incarnation needs a name of its own.
    pub fn new(name: &str) -> AgentConfig {
        let config = AgentConfig::exactly(name);
        AgentConfig { name: format!("{name}#{}", config.incarnation), ..config }
    }

    /// An agent of exactly this name, for peers that look for it. When it starts again, peers of ours replace what they know of the earlier one; NIXL
    /// agents must remove that first.
    pub fn exactly(name: &str) -> AgentConfig {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        AgentConfig {
            name: name.to_owned(),
            devices: None,
            transports: None,
            extension: Bytes::new(),
            incarnation: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX),
            in_flight_max: 16_384,
            peers_bytes_max: 256 << 20,
            notifications_max: 1 << 16,
            within: Duration::from_secs(30),
        }
    }

    /// The devices that UCX may use, as its `NET_DEVICES` lists them; all by default.
    pub fn devices(mut self, devices: &str) -> AgentConfig {
        self.devices = Some(devices.to_owned());
        self
    }

    /// UCX's transports, as its `TLS` lists them; all by default. Both ends must have one in common, and choose better among more.
    pub fn transports(mut self, transports: &str) -> AgentConfig {
        self.transports = Some(transports.to_owned());
        self
    }

    /// Bytes that travel with the metadata in an entry of ours, which NIXL agents skip: what a peer of ours is told of better ways. At most 65,535.
    pub fn extension(mut self, extension: Bytes) -> AgentConfig {
        self.extension = extension;
        self
    }

    /// Reads and writes in flight to one peer, at most; 16,384 by default, at least 1. Each takes some hundred bytes of UCX's; NIXL has no limit.
    pub fn in_flight_max(mut self, operations: usize) -> AgentConfig {
        self.in_flight_max = operations.max(1);
        self
    }

    /// Bytes of memory for what all peers together have told of themselves, about: 256 MiB by default, enough for a million ranges. Peers beyond are
    /// refused: whoever can add peers, as through a [`MetadataServer`](crate::MetadataServer), cannot take more.
    pub fn peers_bytes_max(mut self, bytes: usize) -> AgentConfig {
        self.peers_bytes_max = bytes;
        self
    }

    /// Notifications that wait to be taken, at most; 65,536 by default, of 256 MiB together. Later ones are dropped with a warning.
    pub fn notifications_max(mut self, notifications: usize) -> AgentConfig {
        self.notifications_max = notifications.max(1);
        self
    }

    /// How long transfers and notifications may take that say nothing of it; 30 s by default.
    pub fn within(mut self, within: Duration) -> AgentConfig {
        self.within = within;
        self
    }

    pub(crate) fn check(self) -> Result<(String, Bytes, RawSettings), AgentError> {
        let bad = |reason: String| Err(AgentError::Config(reason));
        if self.name.is_empty() || self.name.len() > NAME_BYTES_MAX {
            return bad(format!("a name of {} bytes; 1 to {NAME_BYTES_MAX} are taken", self.name.len()));
        }
        if self.extension.len() > EXTENSION_BYTES_MAX {
            let (long, max) = (self.extension.len(), EXTENSION_BYTES_MAX);
            return bad(format!("an extension of {long} bytes; at most {max} are taken"));
        }
        let like = LIKE_NIXL.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned()));
        let devices = self.devices.iter().map(|devices| ("NET_DEVICES".to_owned(), devices.clone()));
        // A send without a copy that fails is ended twice by UCX's tcp; RDMA needs them.
        let only_tcp = self.transports.as_deref() == Some("tcp");
        let copies = only_tcp.then(|| ("ZCOPY_THRESH".to_owned(), "inf".to_owned()));
        // UCX's tcp waits inside the call for a host to answer, and leaves the socket of one that refuses open.
        let over_tcp = self.transports.as_deref().is_none_or(|transports| transports.contains("tcp"));
        let calls = over_tcp.then(|| ("TCP_CONN_NB".to_owned(), "y".to_owned()));
        let transports = self.transports.iter().map(|transports| ("TLS".to_owned(), transports.clone()));
        let settings = RawSettings {
            name: format!("kvferry:nixl:{}", self.name),
            settings: like.chain(devices).chain(transports).chain(copies).chain(calls).collect(),
            // NIXL goes on without them, too.
            optional: LIKE_NIXL.map(|(key, _)| key).to_vec(),
            oldest: OLDEST,
            message: MESSAGE,
            // Its name and the fields around both.
            message_bytes_max: NOTIFICATION_BYTES_MAX + NAME_BYTES_MAX + 64,
        };
        Ok((self.name, self.extension, settings))
    }
}
