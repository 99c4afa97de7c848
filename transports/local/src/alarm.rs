//! A timer that a poller can watch.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use rustix::time::{timerfd_create, timerfd_settime};

/// A timer's descriptor, readable from the set moment on.
#[derive(Debug)]
pub struct Alarm {
    timer: OwnedFd,
    at: Option<Instant>,
}

impl Alarm {
    /// A timer that is not set.
    pub fn new() -> Result<Alarm, Errno> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        Ok(Alarm { timer, at: None })
    }

    /// Sets it, or with `None` stops it. `false` when the system refuses: then nothing announces the moment.
    pub fn set(&mut self, at: Option<Instant>, now: Instant) -> bool {
        if at == self.at {
            return true;
        }
        // Zero would disarm it.
        let wait = at.map(|at| at.saturating_duration_since(now).max(Duration::from_micros(1))).unwrap_or_default();
        let it_value = Timespec { tv_sec: wait.as_secs().cast_signed(), tv_nsec: wait.subsec_nanos().into() };
        let value = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        let set = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &value).is_ok();
        if set {
            self.at = at;
        }
        set
    }

    /// Whether it was set for a moment that has come.
    pub fn is_due(&self, now: Instant) -> bool {
        self.at.is_some_and(|at| at <= now)
    }

    /// Forgets that it rang.
    pub fn quiet(&mut self) {
        let mut count = [0; 8];
        // Only its readiness counts.
        let _expirations = rustix::io::read(&self.timer, &mut count);
        self.at = None;
    }
}

impl AsFd for Alarm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}
