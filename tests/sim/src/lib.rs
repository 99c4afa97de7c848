//! kvferry's simulator: whole clusters in one thread, on virtual time, the same for the same seed.
//!
//! A [`World`] is a discrete-event kernel. Each of its nodes is a tokio `LocalSet` that the kernel polls by hand until nothing moves;
//! then time jumps to the next thing that happens. The actors on the nodes are those of production: clock, network and host
//! are the simulated sides of their seams, and NICs are those of a simulated [`Fabric`](kvferry_fabric_sim::Fabric). A [`Cluster`] is a
//! scheduler with prefill and decode groups in such a world, with engines that check every byte.
#![forbid(unsafe_code)]

mod capacity;
mod cluster;
mod dice;
mod host;
mod network;
mod node;
mod panics;
mod report;
mod timeline;
mod trace;
mod wires;
mod world;

pub use capacity::{
    CapacityOptions, CapacityRequest, NicUse, PolicyName, PolicyReport, Quantiles, TraceError, capacity, parse_trace,
};
pub use cluster::{Cluster, ClusterOptions, GroupOptions, SimError};
pub use dice::Dice;
pub use report::{ClusterReport, RankReport};
pub use trace::{Record, Tag, Trace};
pub use world::{Observed, World, WorldOptions};
