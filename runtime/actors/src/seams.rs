//! The four seams: everything that differs between production and simulation.

use core::time::Duration;
use std::rc::Rc;

use actix::prelude::*;
use bytes::Bytes;
use kvferry_core::Moment;
use kvferry_transport::{OpenError, Pool, Transport};

use crate::nic::{NicOpened, NicReport, NicRequest};

/// Time. One per node.
pub trait Clock {
    /// The node's monotonic clock.
    fn now(&self) -> Moment;

    /// Sends a [`Tick`] at `at`, or at once if that has passed.
    fn wake(&self, at: Moment, to: Recipient<Tick>);

    /// An actor of the node has had something to do: what follows may be close.
    fn stir(&self) {}
}

/// A timer that an actor armed has run out. It carries nothing: deadlines live in the core.
#[derive(Clone, Copy, Debug)]
pub struct Tick;

impl Message for Tick {
    type Result = ();
}

/// One control link, as the session actor sees it.
pub trait Link {
    /// Writes a whole frame. Never blocks; a link that cannot write reports [`LinkInput::Closed`].
    fn send(&mut self, frame: Bytes);

    /// The peer is authenticated: large frames may come from now on.
    fn trust(&mut self);

    /// Closes once everything that was sent is written.
    fn close(&mut self);
}

/// What a link reports to its session actor.
#[derive(Debug)]
pub enum LinkInput {
    /// Frames came, without their lengths.
    Frames(Vec<Bytes>),
    /// The bytes are not frames.
    Garbage(kvferry_core::wire::WireError),
    /// It is over.
    Closed(String),
}

impl Message for LinkInput {
    type Result = ();
}

/// Control links. One per node.
pub trait Network {
    /// Dials an address; `answer` gets the link, or why there is none, `within` so long.
    fn dial(&self, address: &str, within: Duration, answer: Box<dyn FnOnce(Result<LinkUp, String>)>);

    /// Starts to accept links; each is given to `accept`. Returns the address to advertise.
    fn listen(&self, address: &str, accept: Box<dyn Fn(LinkUp)>) -> Result<String, ListenError>;
}

/// A link that stands but does not yet report to anybody.
pub struct LinkUp {
    /// Whether it never leaves this host.
    pub loopback: bool,
    /// Gives it the actor to report to.
    pub attach: Box<dyn FnOnce(Recipient<LinkInput>) -> Box<dyn Link> + Send>,
}

/// Why a node cannot listen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// The address makes no sense.
    #[error("cannot listen on {address:?}: {reason}")]
    BadAddress {
        /// What was given.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The operating system refused, for example because the port is in use.
    #[error("cannot listen on {address}: {source}; free the port or choose another (0 takes any)")]
    Io {
        /// What was given.
        address: String,
        /// What it said.
        #[source]
        source: std::io::Error,
    },
}

/// Opens a transport; runs on the thread that is to own it.
pub type OpenNic = Box<dyn FnOnce() -> Result<Box<dyn Transport>, OpenError> + Send>;

/// Where NIC actors run. One per node.
pub trait Host {
    /// Starts a NIC actor on a host of its own, which opens the transport, binds the pool and reports to `opened`, then to `reports`.
    fn start_nic(
        &self,
        nic: usize,
        open: OpenNic,
        pool: Pool,
        opened: tokio::sync::oneshot::Sender<Result<NicOpened, crate::nic::NicStartError>>,
        reports: Recipient<NicReport>,
    );
}

/// All seams of one node.
#[derive(Clone)]
pub struct Environment {
    /// Time.
    pub clock: Rc<dyn Clock>,
    /// Control links.
    pub network: Rc<dyn Network>,
    /// Threads for NICs.
    pub host: Rc<dyn Host>,
    /// Fresh, unpredictable bytes.
    pub nonce: Rc<dyn Fn() -> [u8; 16]>,
}

/// A way to reach a NIC actor.
pub type NicPort = Recipient<NicRequest>;
