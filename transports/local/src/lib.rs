//! What transports have in common whose destination fetches every byte itself: the protocol around it. How memory is shared and copied is a
//! [`Backend`]'s business, how frames travel a [`Carrier`]'s: [`Sockets`] inside one host, messages of the network's own beyond.
//!
//! Two transports speak in frames: a greeting with the session's key, requests for a pool's memory, doorbells and their answers, notices.
//! A pull needs no frame at all before its last byte is here; a push is a doorbell to its destination.
#![forbid(unsafe_code)]

mod alarm;
mod arriving;
mod backend;
mod carrier;
mod draining;
mod open;
mod peer;
mod posted;
mod remote;
mod socket;
mod sockets;
mod transport;
pub mod wire;

pub use alarm::Alarm;
pub use backend::{Backend, Copying, Shared, Step};
pub use carrier::{Carried, Carrier, Descriptor, Owner};
pub use open::{host, open};
pub use sockets::Sockets;
pub use transport::LocalTransport;
