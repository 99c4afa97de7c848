//! A simulated fabric without a clock: one-sided pulls and pushes between NICs that have bandwidth and latency, over real pool memory.
//!
//! All NICs of a world share one [`Fabric`]. Posting works out when things will happen; [`Fabric::next_event_at`] says when the first of
//! them does, and [`Fabric::advance`] lets them happen: bytes are copied when they land, not when they are posted.

mod address;
mod copy;
mod due;
mod fabric;
mod flow;
mod link;
mod nic;
mod provider;
mod state;
mod transport;

pub use fabric::{Fabric, FabricOptions, NicId, Pacing};
pub use provider::SimProvider;
