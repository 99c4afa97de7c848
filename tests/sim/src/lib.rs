//! kvferry's simulator: whole clusters in one thread, on virtual time, the same for the same seed.
//!
//! A [`World`] is a discrete-event kernel. Each of its nodes is a tokio `LocalSet` that the kernel polls by hand until nothing moves;
//! then time jumps to the next thing that happens. The actors on the nodes are those of production: clock, network and host
//! are the simulated sides of their seams, and NICs are those of a simulated [`Fabric`](kvferry_fabric_sim::Fabric). A [`Cluster`] is a
//! scheduler with prefill and decode groups in such a world, with engines that check every byte.
#![forbid(unsafe_code)]

mod capacity;
mod chronicle;
mod cluster;
mod config;
mod desk;
mod determinism;
mod dice;
mod faults;
mod host;
mod invariants;
mod network;
mod node;
mod panics;
mod perfetto;
mod plant;
mod report;
mod run;
mod storm;
mod story;
mod timeline;
mod trace;
mod users;
mod watched_nic;
mod weather;
mod wires;
mod world;
mod yard;

pub use capacity::{
    CapacityOptions, CapacityRequest, NicUse, PolicyName, PolicyReport, Quantiles, TraceError, capacity, parse_trace,
};
pub use chronicle::{Entry, What};
pub use cluster::{Cluster, ClusterOptions, GroupOptions, SimError};
pub use config::{Config, Shape, ShapeError};
pub use desk::RoomTrouble;
pub use determinism::{Divergence, rerun};
pub use dice::Dice;
pub use faults::{Fault, FaultKind, FaultSet, Planned, UnknownFault};
pub use invariants::Broken;
pub use perfetto::Timeline;
pub use plant::{Plant, UnknownPlant};
pub use report::{ClusterReport, RankReport};
pub use run::{Run, RunReport};
pub use story::Story;
pub use trace::{CHECKPOINT_EVERY, Record, Tag, Trace};
pub use weather::Weather;
pub use world::{World, WorldOptions};
