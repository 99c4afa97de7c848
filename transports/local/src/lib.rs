//! What transports between processes of one host have in common: a Unix socket for greetings, descriptors and doorbells, and the rule that
//! the destination's own side does every copy. How memory is shared and copied is a [`Backend`]'s business.
//!
//! Two transports speak over an abstract Unix stream socket: a greeting with the session's key, requests for a pool's memory, doorbells
//! and their answers, notices. A pull needs no message at all before its last byte is here; a push is a doorbell to its destination.
#![forbid(unsafe_code)]

mod arriving;
mod backend;
mod draining;
mod open;
mod peer;
mod posted;
mod remote;
mod socket;
mod transport;
pub mod wire;

pub use backend::{Backend, Copying, Descriptor, Owner, Shared, Step};
pub use open::{host, open};
pub use transport::LocalTransport;
