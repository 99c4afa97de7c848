//! The seam between the protocol and what carries its frames.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

use bytes::Bytes;
use kvferry_transport::{ConnectError, PeerId, Wait};
use rustix::process::Pid;

use crate::wire::Frame;

/// How frames get to peers and back: in order, once, each connection by itself. Nothing blocks.
///
/// What peers' bytes are worth is judged here only as far as frames go: a connection that breaks the rules is [lost](Carried::Lost).
pub trait Carrier: 'static {
    /// What a peer's [`Carrier::dial`] needs; part of the transport's address.
    fn place(&self) -> Bytes;

    /// The same for peers of other hosts, where there is a way for them. [`Carrier::is_beyond`] knows it from a place of this host.
    fn place_beyond(&self) -> Option<Bytes> {
        None
    }

    /// Whether a place may lead to another host.
    fn is_beyond(&self, place: &[u8]) -> bool {
        let _all_are_alike = place;
        false
    }

    /// Starts a connection, and gives it a number that was not used before. Frames may be sent at once.
    fn dial(&mut self, place: &[u8]) -> Result<PeerId, ConnectError>;

    /// The peer has shown the key: larger frames are taken from it.
    fn trust(&mut self, peer: PeerId);

    /// Queues a frame, and descriptors that go with it. Unknown peers are ignored.
    fn send(&mut self, peer: PeerId, frame: &Frame, descriptors: Vec<Box<dyn Descriptor>>);

    /// Sends as much of what is queued as is taken.
    fn flush(&mut self);

    /// Looks once what has come; [`Carrier::next`] then gives it.
    fn look(&mut self, now: Instant);

    /// The next thing that has come. A frame is given before the one behind it is looked at, so that `trust` counts for that one.
    fn next(&mut self) -> Option<Carried>;

    /// Descriptors that came with the frame that [`Carrier::next`] gave last.
    fn take_fds(&mut self, peer: PeerId, count: usize) -> Result<Vec<OwnedFd>, String>;

    /// What the kernel tells of a peer, where the kernel connects them.
    fn owner(&self, peer: PeerId) -> Owner<'_>;

    /// Ends a connection, after what was queued for it as far as that is taken. Nothing more comes of it.
    fn close(&mut self, peer: PeerId);

    /// How to wait for something to come, no longer than until a moment.
    fn wait(&mut self, deadline: Option<Instant>, now: Instant) -> Wait;
}

/// Something that has come.
#[derive(Debug)]
pub enum Carried {
    /// A peer has connected.
    Called(PeerId),
    /// A peer's frame.
    Frame(PeerId, Frame),
    /// A connection has ended, after every frame that came whole: nothing more comes of it.
    Lost(PeerId, String),
}

/// A descriptor that waits to be sent.
pub trait Descriptor {
    /// It, for as long as this value keeps it open.
    fn fd(&self) -> Option<BorrowedFd<'_>>;
}

/// Who shares a pool, as the kernel told; nothing where it does not connect the two.
#[derive(Clone, Copy, Debug, Default)]
pub struct Owner<'a> {
    /// Our end of the connection.
    pub socket: Option<BorrowedFd<'a>>,
    /// Its process, where it is visible here.
    pub pid: Option<Pid>,
    /// Its number, by which a backend that is its own carrier knows it.
    pub peer: Option<PeerId>,
    /// Whether it is on another host, for which neither descriptors nor addresses of processes mean anything.
    pub is_beyond: bool,
}
