//! Transfers inside one host. Pools are memfds that peers can only map read-only; the destination's own thread does every copy, and a
//! push is a doorbell to it: no foreign process can ever write a pool. Memory that was allocated elsewhere is read by `process_vm_readv`.
//!
//! Two transports speak over an abstract Unix stream socket: a greeting with the session's key, requests for a pool's descriptors,
//! doorbells and their answers, notices. A pull needs no message at all before its last byte is here.

mod arriving;
mod copy;
#[cfg(test)]
mod hostile;
mod memory;
mod peer;
mod posted;
mod process;
mod provider;
mod remote;
mod socket;
mod stream;
mod transport;
mod wire;

pub use provider::ShmProvider;
