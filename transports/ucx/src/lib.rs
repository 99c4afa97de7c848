//! kvferry over UCX: a context and worker per device and method, found at run time, never linked.
//!
//! Nobody but its owner ever writes a pool. Where an endpoint's lanes read remote memory (shared memory's `cma`, EFA's `srd`, InfiniBand),
//! the destination reads merged runs straight into its blocks; a push is a doorbell to it. Where UCX would only emulate that, as over tcp,
//! the source packs chunks and sends them as eager messages, and the destination unpacks them by the program that it already knows.

mod arriving;
mod choice;
mod closing;
mod collecting;
mod context;
mod cost;
mod depot;
mod device;
mod endpoint;
mod fetch;
mod handle;
#[cfg(test)]
mod hostile;
mod inbox;
mod lanes;
mod library;
mod link;
mod log;
mod made;
mod memlock;
mod posted;
mod process;
mod progress;
mod proof;
mod provider;
pub mod raw;
mod receiving;
mod remote;
mod request;
mod serving;
mod session;
mod settings;
mod share;
mod sink;
mod staged;
mod staging;
mod transport;
mod warming;
mod wire;
mod worker;

pub use provider::UcxProvider;
