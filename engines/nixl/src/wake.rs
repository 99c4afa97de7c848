//! Wakes the agent's thread.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

#[derive(Debug)]
pub(crate) struct Wake(OwnedFd);

impl Wake {
    pub(crate) fn new() -> std::io::Result<Wake> {
        Ok(Wake(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    pub(crate) fn wake(&self) {
        // Full means that it is awake.
        let _full = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Waits for a call of [`Wake::wake`], for one of the others to become readable, or for so long.
    pub(crate) fn wait(&self, others: [Option<BorrowedFd<'_>>; 2], at_most: Duration) {
        let timeout = Timespec { tv_sec: at_most.as_secs() as i64, tv_nsec: i64::from(at_most.subsec_nanos()) };
        let [one, other] = others.map(|other| PollFd::from_borrowed_fd(other.unwrap_or(self.0.as_fd()), PollFlags::IN));
        // Interrupted is as good as woken.
        let _woken = poll(&mut [PollFd::new(&self.0, PollFlags::IN), one, other], Some(&timeout));
        let mut number = [0; 8];
        let _nothing_there = rustix::io::read(&self.0, &mut number);
    }
}
