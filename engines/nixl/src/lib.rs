//! NIXL's own protocol, spoken without NIXL: what agents tell of themselves, and what they say to each other.
//!
//! The formats are those of agents from 0.6 to 1.5.1, whose metadata has not changed since. Everything that comes from a peer is checked here
//! before anything is done with it: lengths, counts, order, ranges.
#![forbid(unsafe_code)]

mod error;
mod frame;
mod metadata;
mod notification;
mod serdes;

pub use error::WireError;
pub use frame::{FRAME_BYTES_MAX, Frame};
pub use metadata::{AgentMetadata, Connection, MemoryKind, NAME_BYTES_MAX, RANGES_MAX, Range, Section};
pub use notification::{NOTIFICATION_BYTES_MAX, Notification};
