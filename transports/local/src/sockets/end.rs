//! Both ways to one peer: its socket, and memory.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::SocketAddrUnix;
use rustix::process::Pid;

use crate::board::{Board, Foreign};
use crate::carrier::Descriptor;
use crate::ring::{BOARD_WORDS, RING_WORDS, Ring};
use crate::socket::Connection;
use crate::wire::Frame;

/// A peer's socket, and the way through memory beside it.
pub(super) struct Socket {
    pub(super) connection: Connection,
    /// Its process, as the kernel told.
    pub(super) pid: Option<Pid>,
    /// Its backlog was full: to be tried again.
    pub(super) dialing: Option<SocketAddrUnix>,
    pub(super) is_stranger: bool,
    /// Whether it is on another host: neither descriptors nor memory go there.
    pub(super) is_beyond: bool,
    /// Whether epoll tells when it takes more.
    pub(super) watched_for_room: bool,
    /// Why it is of no further use, once what it has said is taken.
    pub(super) broken: Option<String>,
    /// Frames that were given to the socket, and that came through it.
    pub(super) queued: u64,
    pub(super) came: u64,
    /// What the peer reads, until its own is here.
    pub(super) board: Option<Board>,
    /// The way through memory.
    pub(super) ring: Option<Ring>,
    /// Whether the peer has sent its part of it.
    has_theirs: bool,
    /// Whether nothing more is due through the socket: it broke or ended.
    is_over: bool,
    /// How many words were taken from memory when what is there became bounded: a frame of the socket waits behind it, or all is over.
    bounded_since: Option<u64>,
}

impl Socket {
    pub(super) fn new(
        connection: Connection,
        pid: Option<Pid>,
        dialing: Option<SocketAddrUnix>,
        (is_stranger, is_beyond): (bool, bool),
    ) -> Socket {
        Socket {
            connection,
            pid,
            dialing,
            is_stranger,
            is_beyond,
            watched_for_room: false,
            broken: None,
            queued: 0,
            came: 0,
            board: None,
            ring: None,
            has_theirs: false,
            is_over: false,
            bounded_since: None,
        }
    }

    /// Queues a frame for the socket.
    pub(super) fn queue(&mut self, bytes: Vec<u8>, descriptors: Vec<Box<dyn Descriptor>>) {
        self.connection.send_with(bytes, descriptors);
        self.queued += 1;
    }

    /// Makes our part of the way through memory, and tells the peer of it. Without memory for it, all goes through the socket.
    pub(super) fn offer_ring(&mut self) {
        let made = Board::new(BOARD_WORDS).and_then(|board| {
            let fd =
                board.fd().ok_or("it has no descriptor")?.try_clone_to_owned().map_err(|error| error.to_string())?;
            Ok((board, fd))
        });
        match made {
            Ok((board, fd)) => {
                self.board = Some(board);
                self.queue(Frame::Ring.encode(), vec![Box::new(Whole(fd))]);
            }
            Err(error) => tracing::debug!(error, "frames do not go through memory"),
        }
    }

    /// The peer's part of the way through memory has come.
    fn take_ring(&mut self) -> Result<(), String> {
        let descriptors = self.connection.take_fds(1)?;
        if std::mem::replace(&mut self.has_theirs, true) {
            return Err("it sent a second ring".into());
        }
        // Who called answers.
        if self.board.is_none() {
            self.offer_ring();
        }
        if let (Some(board), Some(fd)) = (self.board.take(), descriptors.first()) {
            let theirs = Foreign::map(fd, BOARD_WORDS).map_err(|reason| format!("its ring is of no use: {reason}"))?;
            // Without it this side never says that it looks there, so that the peer writes nothing there.
            self.ring = theirs.map(|theirs| Ring::new(board, theirs));
        }
        Ok(())
    }

    /// The next frame. What is in memory was sent before whatever the socket has further.
    pub(super) fn next(&mut self, has_rings: bool) -> Result<Option<Frame>, String> {
        loop {
            if let Some(frame) = self.next_in_memory()? {
                return Ok(Some(frame));
            }
            let Some(frame) = self.connection.next()? else { return Ok(None) };
            self.came += 1;
            if !self.is_over {
                self.bounded_since = None;
            }
            match frame {
                Frame::Ring if has_rings => self.take_ring()?,
                Frame::Wake if self.ring.is_some() => {}
                frame => return Ok(Some(frame)),
            }
        }
    }

    /// The next frame in memory. Behind a frame of the socket, or behind the end, there cannot be more than a ring of them: what is written
    /// later waits for that frame. A peer that writes on nevertheless would keep the socket from ever being looked at.
    fn next_in_memory(&mut self) -> Result<Option<Frame>, String> {
        let Some(ring) = &mut self.ring else { return Ok(None) };
        let is_over = self.broken.is_some() || self.connection.has_ended();
        if is_over != std::mem::replace(&mut self.is_over, is_over) {
            self.bounded_since = None;
        }
        if is_over || self.connection.has_next() {
            self.bounded_since.get_or_insert(ring.taken());
        }
        let frame = ring.next(self.came)?;
        match self.bounded_since {
            Some(since) if ring.taken().wrapping_sub(since) > RING_WORDS => Err(match is_over {
                true => "it closed the connection, and writes to memory nevertheless".into(),
                false => {
                    format!("it wrote more than {RING_WORDS} words to memory ahead of a frame that it sent before")
                }
            }),
            _ => Ok(frame),
        }
    }
}

/// A descriptor that is kept until it is sent.
struct Whole(OwnedFd);

impl Descriptor for Whole {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}
