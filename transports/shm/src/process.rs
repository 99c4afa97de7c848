//! A peer's process: known by a descriptor, since its number may become another one's.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Which process a socket's other end belongs to.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Process {
    /// The process `pid` at the other end of a socket, as the kernel told when they were connected.
    pub(crate) fn of_peer(socket: &impl AsFd, pid: Pid) -> Result<Process, String> {
        let pidfd = match peer_pidfd(socket) {
            Err(Errno::NOPROTOOPT) => opened_by_number(socket, pid),
            other => other,
        };
        let pidfd = pidfd.map_err(|error| format!("its process cannot be watched ({error}); has it ended?"))?;
        Ok(Process { pid, pidfd })
    }

    /// Its number, which is its own for as long as [`Process::is_alive`].
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Whether it has not ended. A number is given to another process only after that.
    pub(crate) fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        loop {
            match poll(&mut fds, Some(&Timespec::default())) {
                Ok(ready) => return ready == 0,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}

/// Linux 6.5 and later know for certain.
fn peer_pidfd(socket: &impl AsFd) -> Result<OwnedFd, Errno> {
    let (mut pidfd, mut length) = (-1, size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: the kernel writes at most `length` bytes to `pidfd` and the new length to `length`; both live across the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut pidfd).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL));
    }
    // SAFETY: the kernel has just made this descriptor for us, closed on exec, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}

/// A process that has its end of the socket still open after its number was looked up had that number when it was.
fn opened_by_number(socket: &impl AsFd, pid: Pid) -> Result<OwnedFd, Errno> {
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
    match poll(&mut fds, Some(&Timespec::default()))? {
        0 => Ok(pidfd),
        _ => Err(Errno::SRCH),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::process::{Command, Stdio};

    use rustix::process::getpid;

    /// A process that has ended, whose number is this process's now.
    pub(crate) fn reused() -> Process {
        let mut child = Command::new("true").stdout(Stdio::null()).spawn().expect("a child");
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).expect("a child's descriptor");
        child.wait().expect("its end");
        Process { pid: getpid(), pidfd }
    }

    #[test]
    fn a_process_that_has_ended_is_not_its_successor() {
        assert!(!reused().is_alive());
        let (here, there) = UnixStream::pair().expect("a pair of sockets");
        let itself = Process::of_peer(&here, getpid()).expect("its own peer");
        assert!(itself.is_alive());
        assert_eq!(itself.pid(), getpid());
        drop(there);
        assert!(itself.is_alive(), "a socket may go before its process");
    }

    #[test]
    fn a_number_counts_only_while_the_socket_is_open() {
        let (here, there) = UnixStream::pair().expect("a pair of sockets");
        assert!(opened_by_number(&here, getpid()).is_ok());
        drop(there);
        assert_eq!(opened_by_number(&here, getpid()).expect_err("it is closed"), Errno::SRCH);
    }
}
