//! kvferry over libfabric: a domain per device, found at run time, never linked.
//!
//! Nobody but its owner ever writes a pool. The destination reads merged runs of the source's registered memory straight into its blocks; a
//! push is a doorbell to it. Short pieces it has packed by their source, where that pays, and reads chunks of them. The protocol is kvferry-local's; its frames travel as messages of the device's one well-known endpoint. What is
//! read from a peer is read through an endpoint of its own: closing that one proves that nothing of the peer is written here any more.

mod abandoned;
mod backend;
mod collecting;
mod copy;
mod cutting;
mod device;
mod domain;
#[cfg(test)]
mod emulated;
mod endpoint;
mod events;
mod hmem;
mod info;
mod library;
mod memory;
mod messages;
mod neighbour;
mod object;
mod operations;
mod packed;
mod packing;
mod parting;
mod provider;
mod reader;
mod serving;
mod session;
mod slab;
mod staging;
mod wire;
mod words;

pub use provider::LibfabricProvider;
