//! What transports have in common whose destination fetches every byte itself: the protocol around it. How memory is shared and copied is a
//! [`Backend`]'s business, how frames travel a [`Carrier`]'s: [`Sockets`] inside one host, messages of the network's own beyond.
//!
//! Two transports speak in frames: a greeting with the session's key, requests for a pool's memory, doorbells and their answers, notices.
//! A pull needs no frame at all before its last byte is here; a push is a doorbell to its destination.
//!
//! Inside a host, small frames go through memory that both ends map, as long as their reader looks there anyway.
#![deny(unsafe_code)]

mod alarm;
mod arriving;
mod backend;
#[allow(unsafe_code, reason = "memory that is shared with a peer is only reached by addresses")]
mod board;
mod carrier;
mod draining;
mod leaving;
mod open;
mod peer;
mod posted;
mod remote;
mod ring;
mod socket;
mod sockets;
mod transport;
mod whose;
pub mod wire;

pub use alarm::Alarm;
pub use backend::{Backend, Copying, Shared, Step};
pub use board::check_sealed;
pub use carrier::{Carried, Carrier, Descriptor, Owner};
pub use open::{host, open, open_beyond};
pub use sockets::Sockets;
pub use transport::LocalTransport;
