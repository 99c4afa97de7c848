//! What the two processes say to each other: one JSON object a line, over the pipes of the second one's stdin and stdout.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use kvferry::PoolLayout;
use kvferry_core::Evidence;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, read, write};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Deadline;

/// The longest line: a table of as many blocks as a request can have.
const LINE_BYTES_MAX: usize = 64 << 20;
const READ_BYTES: usize = 64 << 10;

/// From the initiator.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToPeer {
    /// An iteration starts: expect its push. Answered by [`FromPeer::Spent`].
    Begin { handover: u64 },
    /// As many bytes follow in as few pieces as can be: expect them. Answered by [`FromPeer::Spent`].
    BeginContiguous { handover: u64 },
    /// It is over here. Answered by [`FromPeer::Spent`], once it is over there.
    End { handover: u64 },
    /// Compare everything. Answered by [`FromPeer::Compared`].
    Verify,
    /// Say what is known of the path. Answered by [`FromPeer::Knows`].
    Tell,
    /// Overwrite everything. Answered by [`FromPeer::Spent`].
    Write,
    /// Fill the processor's caches with so much other memory. Answered by [`FromPeer::Spent`].
    Rest { bytes: usize },
    /// That was all.
    Leave,
}

/// From the peer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum FromPeer {
    /// It is there, with everything that the initiator needs.
    Hello { address: Vec<u8>, keys: Vec<u8>, layout: PoolLayout, table: Vec<u32> },
    /// How to reach another one of its devices, and its pool there: one for each rail beside the first.
    Rail { address: Vec<u8>, keys: Vec<u8> },
    /// What it was shown last of the path, if anything.
    Knows(Option<Evidence>),
    /// Done; what it has used so far.
    Spent(Spent),
    /// The first difference, if any.
    Compared { mismatch: Option<String> },
    /// It cannot go on.
    Failed { reason: String },
}

/// What a process has used since its start, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Spent {
    /// Processor time, in user and system mode.
    pub(crate) processor: u64,
    /// Of its GPU, in transfers whose time is taken.
    pub(crate) gpu: u64,
}

impl Spent {
    /// What was used since `before`, added to `other`.
    pub(crate) fn since(self, before: Spent, other: Spent) -> Spent {
        let since = |now: u64, before: u64, other: u64| now.saturating_sub(before).saturating_add(other);
        Spent {
            processor: since(self.processor, before.processor, other.processor),
            gpu: since(self.gpu, before.gpu, other.gpu),
        }
    }
}

/// Why nothing was heard or said.
#[derive(Debug, Error)]
#[non_exhaustive]
pub(crate) enum WordsError {
    #[error("the other process is gone")]
    Closed,
    #[error("a pipe between them failed: {0}")]
    Io(#[source] io::Error),
    #[error("a line is longer than {LINE_BYTES_MAX} bytes; use fewer blocks")]
    TooLong,
    #[error("a line makes no sense ({0}); both must be the same build of kvferry")]
    Nonsense(#[from] serde_json::Error),
    #[error("the other process did not listen in time; raise --deadline")]
    Late,
}

/// The pair of pipes.
#[derive(Debug)]
pub(crate) struct Words {
    from: OwnedFd,
    to: OwnedFd,
    unread: Vec<u8>,
}

impl Words {
    pub(crate) fn new(from: OwnedFd, to: OwnedFd) -> Result<Words, WordsError> {
        for fd in [&from, &to] {
            let set = fcntl_getfl(fd).and_then(|flags| fcntl_setfl(fd, flags | OFlags::NONBLOCK));
            set.map_err(|error| WordsError::Io(error.into()))?;
        }
        Ok(Words { from, to, unread: Vec::new() })
    }

    /// Readable when there may be something to [`Words::take`].
    pub(crate) fn readable(&self) -> BorrowedFd<'_> {
        self.from.as_fd()
    }

    /// The next word, if it is here. Never waits.
    pub(crate) fn take<T: DeserializeOwned>(&mut self) -> Result<Option<T>, WordsError> {
        let mut searched = 0;
        loop {
            let newline = self.unread.iter().skip(searched).position(|byte| *byte == b'\n');
            if let Some(after) = newline {
                let line: Vec<u8> = self.unread.drain(..=searched + after).collect();
                return Ok(Some(serde_json::from_slice(&line)?));
            }
            searched = self.unread.len();
            if searched > LINE_BYTES_MAX {
                return Err(WordsError::TooLong);
            }
            let mut bytes = [0; READ_BYTES];
            match read(&self.from, &mut bytes) {
                Ok(0) => return Err(WordsError::Closed),
                Ok(count) => self.unread.extend(bytes.iter().take(count)),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(error) => return Err(WordsError::Io(error.into())),
            }
        }
    }

    /// Says one word; waits while the pipe is full.
    pub(crate) fn say<T: Serialize>(&self, word: &T, deadline: Deadline) -> Result<(), WordsError> {
        let mut line = serde_json::to_vec(word)?;
        line.push(b'\n');
        let mut left = line.as_slice();
        while !left.is_empty() {
            match write(&self.to, left) {
                Ok(count) => left = left.get(count..).unwrap_or_default(),
                Err(Errno::AGAIN) => self.until_writable(deadline)?,
                Err(Errno::INTR) => {}
                Err(Errno::PIPE) => return Err(WordsError::Closed),
                Err(error) => return Err(WordsError::Io(error.into())),
            }
        }
        Ok(())
    }

    fn until_writable(&self, deadline: Deadline) -> Result<(), WordsError> {
        let left = deadline.at.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&self.to, PollFlags::OUT)], Some(&timeout)) {
            Ok(0) => Err(WordsError::Late),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(WordsError::Io(error.into())),
        }
    }
}
