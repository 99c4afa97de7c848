//! The system calls: non-blocking sockets, vectored I/O on raw memory, epoll and one timer.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags};

/// What one attempt to move bytes gave.
pub(crate) enum Moved {
    /// So many bytes, at least one.
    Bytes(usize),
    /// The socket is full or empty: wait for readiness.
    Blocked,
    /// The peer closed (reads only).
    Closed,
}

/// Starts a non-blocking connection, from a given local address where there is one.
pub(crate) fn start_connect(
    address: SocketAddr,
    from: Option<IpAddr>,
    buffers: Option<usize>,
) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    size_buffers(&socket, buffers)?;
    if let Some(from) = from {
        rustix::net::bind(&socket, &SocketAddr::new(from, 0))?;
    }
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS | rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let socket = TcpStream::from(socket);
    socket.set_nodelay(true)?;
    Ok(socket)
}

/// Sets both socket buffers; `None` leaves them to the kernel's autotuning.
pub(crate) fn size_buffers(socket: &impl AsFd, bytes: Option<usize>) -> io::Result<()> {
    if let Some(bytes) = bytes {
        rustix::net::sockopt::set_socket_send_buffer_size(socket, bytes)?;
        rustix::net::sockopt::set_socket_recv_buffer_size(socket, bytes)?;
    }
    Ok(())
}

/// Sends from raw memory.
///
/// # Safety
/// Every entry must name memory that stays readable during the call. It may be written by others meanwhile: then what is sent is unspecified.
pub(crate) unsafe fn send(socket: &TcpStream, entries: &[libc::iovec]) -> io::Result<Moved> {
    // SAFETY: all-zero is a valid msghdr: null pointers with zero lengths.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = entries.as_ptr().cast_mut();
    message.msg_iovlen = entries.len();
    // SAFETY: the header is valid and outlives the call; the caller vouches for the entries, which sendmsg only reads.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    match outcome(sent)? {
        Moved::Closed => Ok(Moved::Blocked),
        moved => Ok(moved),
    }
}

/// Receives into raw memory.
///
/// # Safety
/// Every entry must name memory that stays writable during the call and that no Rust reference covers.
pub(crate) unsafe fn receive(socket: &TcpStream, entries: &mut [libc::iovec]) -> io::Result<Moved> {
    // SAFETY: all-zero is a valid msghdr: null pointers with zero lengths.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = entries.as_mut_ptr();
    message.msg_iovlen = entries.len();
    // SAFETY: the header is valid and outlives the call; the caller vouches for the entries.
    outcome(unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) })
}

fn outcome(moved: isize) -> io::Result<Moved> {
    match usize::try_from(moved) {
        Ok(0) => Ok(Moved::Closed),
        Ok(bytes) => Ok(Moved::Bytes(bytes)),
        Err(_) => {
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::WouldBlock => Ok(Moved::Blocked),
                // A signal came first; the socket may still be ready, and an edge would not come again.
                io::ErrorKind::Interrupted => Ok(Moved::Bytes(0)),
                _ => Err(error),
            }
        }
    }
}

/// What an epoll wait reported for one token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ready {
    pub(crate) token: u64,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// The peer will send no more, or the socket failed: read until that shows.
    pub(crate) closing: bool,
}

/// One epoll descriptor over all sockets, and the timer behind every deadline.
pub(crate) struct Poller {
    epoll: Arc<OwnedFd>,
    timer: OwnedFd,
}

impl Poller {
    /// The token of the timer; sockets use others.
    pub(crate) const TIMER: u64 = u64::MAX;

    pub(crate) fn new() -> io::Result<Poller> {
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &timer, epoll::EventData::new_u64(Poller::TIMER), flags)?;
        Ok(Poller { epoll, timer })
    }

    pub(crate) fn fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.epoll)
    }

    /// Watches a socket, edge-triggered, until it is closed.
    pub(crate) fn watch(&self, socket: &impl AsFd, token: u64) -> io::Result<()> {
        use epoll::EventFlags;
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        Ok(epoll::add(&self.epoll, socket, epoll::EventData::new_u64(token), flags)?)
    }

    /// What is ready now; at most a fixed number, the rest at the next call.
    pub(crate) fn ready(&self, into: &mut Vec<Ready>) -> io::Result<()> {
        use epoll::EventFlags;
        let mut space = [std::mem::MaybeUninit::uninit(); 64];
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        let events = match epoll::wait(&self.epoll, &mut space, Some(&none)) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        into.extend(events.iter().map(|event| {
            let flags = event.flags;
            let closing = flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
            Ready {
                token: event.data.u64(),
                readable: closing || flags.contains(EventFlags::IN),
                writable: closing || flags.contains(EventFlags::OUT),
                closing,
            }
        }));
        Ok(())
    }

    /// Makes the descriptor readable after `delay`; `None` disarms.
    pub(crate) fn wake_after(&self, delay: Option<Duration>) -> io::Result<()> {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = delay.map_or(zero, |delay| Timespec {
            tv_sec: i64::try_from(delay.as_secs()).unwrap_or(i64::MAX),
            // A zero value would disarm.
            tv_nsec: i64::from(delay.subsec_nanos()).max(1),
        });
        let timer = Itimerspec { it_interval: zero, it_value: value };
        rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer)?;
        Ok(())
    }
}
