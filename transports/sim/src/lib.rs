//! A simulated fabric without a clock: one-sided pulls and pushes between NICs that have bandwidth and latency, over real pool memory.
//!
//! All NICs of a world share one [`Fabric`]. Posting works out when things will happen; [`Fabric::next_event_at`] says when the first of
//! them does, and [`Fabric::advance`] lets them happen.
//!
//! **Time.** A transfer is cut into slices. Those of one NIC leave in turns, one after the other; each takes its time on the source's wire
//! and on the destination's, crosses in [`FabricOptions::latency`] and some jitter, and lands in order or not
//! ([`FabricOptions::delivery`]). Bytes are read when a slice leaves, and written when it lands.
//!
//! **Ends.** Each end of a transfer is over on its own: what lands at an end that is over is dropped by its NIC and counted. A push that its
//! receiver cancels goes on until the writer's NIC has heard of it, and the receiver hears of its end only from there; a fence is a
//! local act and needs nobody.
//!
//! **Faults** come from the caller: dead NICs, cut ways, dead processes, completion errors. [`Fabric::watch`] keeps a shadow of memory that
//! finds every write after release and every wrong read.

mod address;
mod copy;
mod due;
mod fabric;
mod faults;
mod flow;
mod link;
mod nic;
mod provider;
mod random;
mod shadow;
mod slab;
mod slices;
mod state;
mod transfers;
mod transport;
mod watch;

pub use fabric::{Delivery, Fabric, FabricOptions, FenceBy, NicDeath, NicId, OnTheWire, Pacing, Timing};
pub use nic::NicStats;
pub use provider::SimProvider;
pub use shadow::{Breach, Owner, Violation};
