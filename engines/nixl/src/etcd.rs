//! Metadata in etcd, under the keys of NIXL agents that have `NIXL_ETCD_ENDPOINTS`.
//!
//! An agent is there while the key `NAMESPACE/AGENT/` is, which has no value; its metadata is under `NAMESPACE/AGENT/metadata`, parts of it under other
//! labels. The namespace ends with a slash by default, so that keys have two (`src/core/nixl_etcd_metadata_backend.cpp`).

use std::time::{Duration, Instant};

use bytes::Bytes;
use etcd_client::{
    Client, ConnectOptions, DeleteOptions, EventType, LeaseKeepAliveStream, LeaseKeeper, PutOptions, WatchOptions,
};
use thiserror::Error;
use tokio::task::JoinHandle;

use crate::{AgentMetadata, WireError};

/// The label of whole metadata.
pub const ETCD_LABEL: &str = "metadata";
const NAMESPACE: &str = "/nixl/agents/";
/// Etcd rounds shorter leases up.
const LEASE_LEAST: Duration = Duration::from_secs(2);

/// Where keys are, and how long they live.
#[derive(Clone, Debug)]
pub struct EtcdConfig {
    endpoints: Vec<String>,
    namespace: String,
    lease: Option<Duration>,
    within: Duration,
}

impl EtcdConfig {
    /// The endpoints of one etcd cluster, such as `http://10.0.0.1:2379`, and NIXL's namespace.
    pub fn new(endpoints: impl IntoIterator<Item = impl Into<String>>) -> EtcdConfig {
        EtcdConfig {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            namespace: NAMESPACE.to_owned(),
            lease: None,
            within: Duration::from_secs(5),
        }
    }

    /// Another namespace: what the peers have in `NIXL_ETCD_NAMESPACE`.
    pub fn namespace(mut self, namespace: &str) -> EtcdConfig {
        self.namespace = namespace.to_owned();
        self
    }

    /// Keys vanish so long after their agent's process, by which its peers forget it; at least 2 s. NIXL's own stay until somebody deletes them, and
    /// so do these by default.
    pub fn lease(mut self, lease: Duration) -> EtcdConfig {
        self.lease = Some(lease.max(LEASE_LEAST));
        self
    }

    /// How long etcd may take for one answer; 5 s by default.
    pub fn within(mut self, within: Duration) -> EtcdConfig {
        self.within = within;
        self
    }
}

/// Why metadata was not exchanged.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EtcdError {
    /// Etcd refuses it, or cannot be reached.
    #[error(
        "etcd at {endpoints} does not {what}: {reason}; check the endpoints, and that metadata is no larger than its request limit"
    )]
    Store {
        /// Where.
        endpoints: String,
        /// What it was asked for.
        what: &'static str,
        /// What it said.
        reason: String,
    },
    /// Etcd does not answer.
    #[error("etcd at {endpoints} did not {what} within {waited_ms} ms; check the endpoints")]
    Deadline {
        /// Where.
        endpoints: String,
        /// What it was asked for.
        what: &'static str,
        /// How long it was waited for.
        waited_ms: u64,
    },
    /// Nobody has published it.
    #[error(
        "nothing was published under {key} within {waited_ms} ms; look whether the agent runs, has the same NIXL_ETCD_NAMESPACE, and has sent its metadata"
    )]
    Absent {
        /// The key.
        key: String,
        /// How long it was waited for.
        waited_ms: u64,
    },
    /// A name that would be another's key.
    #[error("{0:?} cannot be part of a key: it is empty or has a slash; name the agent or label otherwise")]
    Name(String),
    /// The key's value is another agent's.
    #[error("{key} holds the metadata of agent {found:?}; delete the key, and have the agent publish again")]
    Foreign {
        /// The key.
        key: String,
        /// Whose it is.
        found: String,
    },
    /// The key's value is no metadata.
    #[error("{key} holds no metadata of an agent: {error}")]
    Wire {
        /// The key.
        key: String,
        /// Why not.
        #[source]
        error: WireError,
    },
}

/// One agent's view of etcd. Nothing in etcd is proven: whoever may write there can have any peer believed or dropped.
pub struct EtcdExchange {
    client: Client,
    agent: String,
    config: EtcdConfig,
    lease: Option<Lease>,
    /// The key by which the agent is there was written.
    present: bool,
}

/// A lease that is kept until this is dropped.
struct Lease {
    id: i64,
    keeping: JoinHandle<()>,
}

impl Lease {
    /// It has ended in etcd, or could not be renewed for as long as it lives.
    fn is_over(&self) -> bool {
        self.keeping.is_finished()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.keeping.abort();
    }
}

impl EtcdExchange {
    /// For the agent of this name. Nothing is written yet.
    pub async fn connect(agent: &str, config: EtcdConfig) -> Result<EtcdExchange, EtcdError> {
        part(agent)?;
        // A watch waits for days: only probes tell it that etcd's host is gone without a word.
        let options =
            ConnectOptions::new().with_connect_timeout(config.within).with_keep_alive(config.within, config.within);
        let connecting = Client::connect(&config.endpoints, Some(options));
        let client = answered(&config, "connect", connecting).await?;
        Ok(EtcdExchange { client, agent: agent.to_owned(), config, lease: None, present: false })
    }

    /// Publishes metadata: whole under [`ETCD_LABEL`], parts under other labels.
    pub async fn publish(&mut self, label: &str, metadata: Bytes) -> Result<(), EtcdError> {
        part(label)?;
        if self.lease.as_ref().is_some_and(Lease::is_over) {
            // Its keys went with it.
            (self.lease, self.present) = (None, false);
        }
        if let (Some(ttl), None) = (self.config.lease, &self.lease) {
            self.lease = Some(self.grant(ttl).await?);
        }
        if !self.present {
            self.put(self.key(&self.agent, ""), Bytes::new()).await?;
            self.present = true;
        }
        self.put(self.key(&self.agent, label), metadata).await
    }

    /// The metadata that an agent has published, or publishes while this waits: for [`Agent::add_peer`](crate::Agent::add_peer).
    pub async fn fetch(&self, agent: &str, label: &str, within: Duration) -> Result<Bytes, EtcdError> {
        part(agent)?;
        part(label)?;
        let (key, began) = (self.key(agent, label), Instant::now());
        let found = tokio::time::timeout(within, self.published(&key)).await;
        let absent = |_| EtcdError::Absent { key: key.clone(), waited_ms: began.elapsed().as_millis() as u64 };
        let metadata = Bytes::from(found.map_err(absent)??);
        match AgentMetadata::decode(metadata.clone()) {
            Ok(named) if named.name == agent => Ok(metadata),
            Ok(named) => Err(EtcdError::Foreign { key, found: named.name }),
            Err(error) => Err(EtcdError::Wire { key, error }),
        }
    }

    /// Returns once an agent has left: it withdrew its metadata, or its lease has ended. At once, if it is not there. Then
    /// [`Agent::remove_peer`](crate::Agent::remove_peer) is due.
    pub async fn gone(&self, agent: &str) -> Result<(), EtcdError> {
        part(agent)?;
        let key = self.key(agent, "");
        let (value, revision) = self.get(&key).await?;
        match value {
            None => Ok(()),
            Some(_) => self.watch(&key, revision, |event, _| (event == EventType::Delete).then_some(())).await,
        }
    }

    /// Withdraws everything that this agent has published; peers that watch it forget it.
    pub async fn withdraw(&mut self) -> Result<(), EtcdError> {
        self.present = false;
        let options = DeleteOptions::new().with_prefix();
        let mut client = self.client.clone();
        let deleting = client.delete(self.key(&self.agent, ""), Some(options));
        answered(&self.config, "delete keys", deleting).await?;
        if let Some(lease) = self.lease.take().filter(|lease| !lease.is_over()) {
            let mut client = self.client.clone();
            answered(&self.config, "end a lease", client.lease_revoke(lease.id)).await?;
        }
        Ok(())
    }

    fn key(&self, agent: &str, label: &str) -> String {
        format!("{}/{agent}/{label}", self.config.namespace)
    }

    async fn put(&self, key: String, value: Bytes) -> Result<(), EtcdError> {
        let options = self.lease.as_ref().map(|lease| PutOptions::new().with_lease(lease.id));
        let mut client = self.client.clone();
        answered(&self.config, "store a key", client.put(key, value, options)).await.map(drop)
    }

    /// A key's value, if it has one, and as of when.
    async fn get(&self, key: &str) -> Result<(Option<Vec<u8>>, i64), EtcdError> {
        let mut client = self.client.clone();
        let answer = answered(&self.config, "give a key", client.get(key, None)).await?;
        let revision = answer.header().map_or(0, |header| header.revision());
        Ok((answer.kvs().first().map(|found| found.value().to_vec()), revision))
    }

    /// A key's value once it has one. Empty ones are in the middle of something, as NIXL takes it.
    async fn published(&self, key: &str) -> Result<Vec<u8>, EtcdError> {
        let (value, revision) = self.get(key).await?;
        match value.filter(|value| !value.is_empty()) {
            Some(value) => Ok(value),
            None => {
                let filled =
                    |event, value: &[u8]| (event == EventType::Put && !value.is_empty()).then(|| value.to_vec());
                self.watch(key, revision, filled).await
            }
        }
    }

    /// Follows a key from after a revision until something is found.
    async fn watch<T>(
        &self,
        key: &str,
        revision: i64,
        find: impl Fn(EventType, &[u8]) -> Option<T>,
    ) -> Result<T, EtcdError> {
        let what = "watch a key";
        let options = WatchOptions::new().with_start_revision(revision.saturating_add(1));
        let mut client = self.client.clone();
        let mut stream = answered(&self.config, what, client.watch(key, Some(options))).await?;
        loop {
            // However long that takes: nothing may happen to it for days.
            let message = stream.message().await.map_err(|error| refused(&self.config, what, &error))?;
            let ended = || self.store(what, "the watch ended".to_owned());
            let message = message.ok_or_else(ended)?;
            if message.canceled() {
                return Err(self.store(what, message.cancel_reason().to_owned()));
            }
            let found = |event: &etcd_client::Event| find(event.event_type(), event.kv().map_or(&[], |kv| kv.value()));
            if let Some(found) = message.events().iter().find_map(found) {
                return Ok(found);
            }
        }
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, EtcdError> {
        let mut client = self.client.clone();
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        let granted = answered(&self.config, "grant a lease", client.lease_grant(seconds, None)).await?;
        let id = granted.id();
        let keeping = answered(&self.config, "keep a lease", client.lease_keep_alive(id)).await?;
        let agent = self.agent.clone();
        let keeping = tokio::spawn(keep(client, id, ttl, keeping, agent));
        Ok(Lease { id, keeping })
    }

    fn store(&self, what: &'static str, reason: String) -> EtcdError {
        EtcdError::Store { endpoints: self.config.endpoints.join(","), what, reason }
    }
}

/// Renews a lease until it is gone, or could not be renewed for its whole time to live.
async fn keep(
    mut client: Client,
    id: i64,
    ttl: Duration,
    mut keeping: (LeaseKeeper, LeaseKeepAliveStream),
    agent: String,
) {
    let every = ttl / 3;
    let mut renewed_at = Instant::now();
    loop {
        let (keeper, answers) = &mut keeping;
        let renewed = tokio::time::timeout(every, async {
            keeper.keep_alive().await?;
            answers.message().await
        });
        match renewed.await {
            Ok(Ok(Some(answer))) if answer.ttl() > 0 => renewed_at = Instant::now(),
            Ok(Ok(Some(_))) => {
                return tracing::warn!(%agent, "its lease in etcd has ended, and its keys with it; publish them again");
            }
            // Another stream, as long as there may be a lease: etcd is away, or has another leader.
            Ok(Ok(None) | Err(_)) | Err(_) => {
                let again = tokio::time::timeout(every, client.lease_keep_alive(id)).await;
                match again {
                    // Only a lease that there is has a new stream.
                    Ok(Ok(again)) => (keeping, renewed_at) = (again, Instant::now()),
                    _ if renewed_at.elapsed() > ttl => {
                        return tracing::warn!(%agent, "its lease in etcd has ended, and its keys with it; publish them again");
                    }
                    _ => tracing::debug!(%agent, "its lease in etcd was not renewed"),
                }
            }
        }
        tokio::time::sleep(every).await;
    }
}

/// What etcd answers in time.
async fn answered<T>(
    config: &EtcdConfig,
    what: &'static str,
    call: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, EtcdError> {
    let began = Instant::now();
    match tokio::time::timeout(config.within, call).await {
        Ok(answer) => answer.map_err(|error| refused(config, what, &error)),
        Err(_) => {
            let waited_ms = began.elapsed().as_millis() as u64;
            Err(EtcdError::Deadline { endpoints: config.endpoints.join(","), what, waited_ms })
        }
    }
}

fn refused(config: &EtcdConfig, what: &'static str, error: &etcd_client::Error) -> EtcdError {
    EtcdError::Store { endpoints: config.endpoints.join(","), what, reason: error.to_string() }
}

/// A name that stays one part of a key.
fn part(name: &str) -> Result<(), EtcdError> {
    match name.is_empty() || name.contains('/') {
        true => Err(EtcdError::Name(name.to_owned())),
        false => Ok(()),
    }
}
