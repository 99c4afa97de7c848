//! Programs between agents of ours: what neither NIXL's protocol nor its pieces have.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvferry_core::{PoolId, Program, TransferId};
use kvferry_transport::{OpenError, Transport};

use crate::Ticket;

/// Opens a device of one of kvferry's transports, on the agent's thread: `kvferry::transport::select` makes it.
pub type OpenNic = Box<dyn FnOnce() -> Result<Box<dyn Transport>, OpenError> + Send>;

/// A program that is read from a peer's pool.
#[derive(Clone, Debug)]
pub struct Fetch {
    /// The peer's name.
    pub peer: String,
    /// Its pool.
    pub from: PoolId,
    /// The local pool.
    pub to: PoolId,
    /// What moves, with both sides' tables.
    pub program: Arc<Program>,
    /// The lease under which it is read, if the peer gave one.
    pub lease: Option<Ticket>,
    /// Told to the peer when everything is here, and the lease was confirmed.
    pub notification: Option<Bytes>,
    /// How long it may take; the agent's own limit by default.
    pub within: Option<Duration>,
}

/// A program that a peer's agent takes from a pool of this one, and writes by itself: it has to expect it.
#[derive(Clone, Debug)]
pub struct Push {
    /// The peer's name.
    pub peer: String,
    /// The name of this transfer at both ends, used once.
    pub id: TransferId,
    /// The local pool.
    pub from: PoolId,
    /// The peer's.
    pub to: PoolId,
    /// What moves, with this side's tables.
    pub program: Arc<Program>,
    /// Told to the peer when it has everything.
    pub notification: Option<Bytes>,
    /// How long it may take; the agent's own limit by default.
    pub within: Option<Duration>,
}

/// What the receiver of a [`Push`] lets in.
#[derive(Clone, Debug)]
pub struct Expect {
    /// The name of the transfer.
    pub id: TransferId,
    /// The local pool.
    pub pool: PoolId,
    /// The same segments as the sender's, with this side's tables.
    pub program: Arc<Program>,
    /// How long it may take; the agent's own limit by default.
    pub within: Option<Duration>,
}

impl Fetch {
    /// A fetch without lease and notification.
    pub fn new(peer: &str, from: PoolId, to: PoolId, program: Arc<Program>) -> Fetch {
        Fetch { peer: peer.to_owned(), from, to, program, lease: None, notification: None, within: None }
    }

    /// Succeeds only if the lease was good until the last byte was here.
    pub fn under(self, ticket: Ticket) -> Fetch {
        Fetch { lease: Some(ticket), ..self }
    }

    /// With a notification once everything is here.
    pub fn then_notify(self, message: impl Into<Bytes>) -> Fetch {
        Fetch { notification: Some(message.into()), ..self }
    }

    /// With a limit of its own.
    pub fn within(self, within: Duration) -> Fetch {
        Fetch { within: Some(within), ..self }
    }
}

impl Push {
    /// A push without a notification.
    pub fn new(peer: &str, id: TransferId, from: PoolId, to: PoolId, program: Arc<Program>) -> Push {
        Push { peer: peer.to_owned(), id, from, to, program, notification: None, within: None }
    }

    /// With a notification once the peer has everything.
    pub fn then_notify(self, message: impl Into<Bytes>) -> Push {
        Push { notification: Some(message.into()), ..self }
    }

    /// With a limit of its own.
    pub fn within(self, within: Duration) -> Push {
        Push { within: Some(within), ..self }
    }
}

impl Expect {
    /// What may come under this name.
    pub fn new(id: TransferId, pool: PoolId, program: Arc<Program>) -> Expect {
        Expect { id, pool, program, within: None }
    }

    /// With a limit of its own.
    pub fn within(self, within: Duration) -> Expect {
        Expect { within: Some(within), ..self }
    }
}
