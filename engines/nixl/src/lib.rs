//! NIXL's own protocol, spoken without NIXL: what agents tell of themselves, and what they say to each other.
//!
//! The formats are those of agents from 0.6 to 1.5.1, whose metadata has not changed since. Everything that comes from a peer is checked here
//! before anything is done with it: lengths, counts, order, ranges.
//!
//! [`Agent`] is an agent over kvferry's UCX: no libnixl, no plugin. It reads and writes other agents' memory and is read and written, without their
//! or its programs' polling.
#![forbid(unsafe_code)]

mod agent;
mod config;
mod driver;
mod error;
mod frame;
mod metadata;
mod notification;
mod pieces;
mod serdes;
mod wake;

pub use agent::{Agent, Moved, Notifications, Peer, PeerKind};
pub use config::AgentConfig;
pub use error::{AgentError, WireError};
pub use frame::{FRAME_BYTES_MAX, Frame};
pub use metadata::{AgentMetadata, Connection, MemoryKind, NAME_BYTES_MAX, RANGES_MAX, Range, Section};
pub use notification::{NOTIFICATION_BYTES_MAX, Notification};
pub use pieces::{Operation, Piece, Transfer, pieces};
