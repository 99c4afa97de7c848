//! Transfers inside one host. Pools are memfds that peers can only map read-only; the destination's own thread does every copy, and a
//! push is a doorbell to it: no foreign process can ever write a pool. Memory that was allocated elsewhere is read by `process_vm_readv`.
//!
//! What the two sides say to each other is `kvferry-local`'s business.

mod backend;
mod copy;
#[cfg(test)]
mod hostile;
mod memory;
mod process;
mod provider;
mod stream;

pub use provider::ShmProvider;
