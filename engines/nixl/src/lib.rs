//! NIXL's own protocol, spoken without NIXL: what agents tell of themselves, and what they say to each other.
//!
//! The formats are those of agents from 0.6 to 1.5.1, whose metadata has not changed since. Everything that comes from a peer is checked here
//! before anything is done with it: lengths, counts, order, ranges.
//!
//! [`Agent`] is an agent over kvferry's UCX: no libnixl, no plugin. It reads and writes other agents' memory and is read and written, without their
//! or its programs' polling.
//!
//! ```no_run
//! # async fn example(metadata_of_peer: bytes::Bytes, pool: kvferry_transport::Pool) -> Result<(), kvferry_nixl::AgentError> {
//! use kvferry_nixl::{Agent, AgentConfig, Piece, Transfer};
//!
//! let (agent, mut notifications) = Agent::start(AgentConfig::new("decode-0")).await?;
//! agent.register(pool.clone()).await?;
//! let for_the_peer = agent.metadata().await?; // by whatever way the serving stack has
//! let peer = agent.add_peer(metadata_of_peer).await?;
//! let pieces = vec![Piece { region: 0, offset: 0, address: 0x7f00_0000_0000, bytes: 65_536 }];
//! agent.transfer(Transfer::read(&peer.name, pool.id(), pieces).then_notify("done")).await?;
//! # let _ = (for_the_peer, notifications.next().await);
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod agent;
mod config;
mod driver;
mod error;
#[cfg(feature = "etcd")]
mod etcd;
mod exchange;
mod frame;
mod lease;
mod metadata;
mod notification;
mod ours;
mod pieces;
mod programs;
mod serdes;
mod server;
mod wake;

pub use agent::{Agent, Kvferry, Moved, Notifications, Peer, PeerKind, PeerPool};
pub use config::AgentConfig;
pub use error::{AgentError, WireError};
#[cfg(feature = "etcd")]
pub use etcd::{ETCD_LABEL, EtcdConfig, EtcdError, EtcdExchange};
pub use exchange::{EXCHANGE_PORT, Exchange, ExchangeError};
pub use frame::{FRAME_BYTES_MAX, Frame};
pub use lease::{Lease, Ticket};
pub use metadata::{AgentMetadata, Connection, MemoryKind, NAME_BYTES_MAX, RANGES_MAX, Range, Section};
pub use notification::{NOTIFICATION_BYTES_MAX, Notification};
pub use pieces::{Operation, Piece, Transfer, pieces};
pub use programs::{Expect, Fetch, OpenNic, Push};
pub use server::{Met, MetadataServer, ServerConfig};
