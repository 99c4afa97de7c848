//! Closing an endpoint of `tcp;ofi_rxm` of 1.17 that has part of an answer.
//!
//! That provider keeps the read whose answer is coming in two places, and closing the endpoint ends both: the second time without a context,
//! which its layer for datagrams looks into (`tcpx_ep_flush_all_queues`, `rxm_handle_comp_error`). Since 1.18 it keeps it in one. A connection
//! that breaks ends every read once, in all versions: so it is broken first.

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use libfabric_sys::version;
use rustix::net::{AddressFamily, Shutdown};

use crate::library::Version;

/// From this version on endpoints can be closed as they are.
const NOT_FROM: Version = Version(version(1, 18));
/// How deep descriptors that watch others are looked into: the queue's, and that of the queue below it.
const DEPTH: u32 = 3;

/// Whether reads have to be over before an endpoint of that provider is closed.
pub(crate) fn is_needed(provider: &str, library: Version) -> bool {
    library < NOT_FROM && provider.contains("tcp") && provider.contains("ofi_rxm")
}

/// A connection of the library's, by the number of its descriptor and by what that stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Connection {
    pub(crate) number: RawFd,
    pub(crate) inode: u64,
}

impl Connection {
    /// A descriptor of our own for it, unless it was closed.
    pub(crate) fn open(&self) -> Option<OwnedFd> {
        same(self.number, self.inode)
    }
}

/// Breaks the connections that a completion queue waits for, by its descriptor. How many there were.
pub(crate) fn hang_up(queue: RawFd) -> usize {
    let opened = connections(queue).into_iter().filter_map(|connection| connection.open());
    opened.filter(|descriptor| rustix::net::shutdown(descriptor, Shutdown::Both).is_ok()).count()
}

/// The connections that a completion queue waits for, by its descriptor.
pub(crate) fn connections(queue: RawFd) -> Vec<Connection> {
    let mut found = Vec::new();
    collect(queue, DEPTH, &mut found);
    found
}

fn collect(watcher: RawFd, depth: u32, found: &mut Vec<Connection>) {
    // Linux says there which descriptors an epoll descriptor watches; of others there is nothing of that kind.
    let said = fs::read_to_string(format!("/proc/self/fdinfo/{watcher}")).unwrap_or_default();
    for (number, inode) in said.lines().filter_map(watched) {
        let Some(descriptor) = same(number, inode) else { continue };
        if is_connection(&descriptor) {
            found.push(Connection { number, inode });
        } else if depth > 1 {
            collect(descriptor.as_raw_fd(), depth - 1, found);
        }
    }
}

/// The descriptor and the inode of a line such as `tfd:        5 events:       19 data:                5  pos:0 ino:1ce3757 sdev:9`.
fn watched(line: &str) -> Option<(RawFd, u64)> {
    let mut words = line.strip_prefix("tfd:")?.split_whitespace();
    let number = words.next()?.parse().ok()?;
    let inode = words.find_map(|word| word.strip_prefix("ino:"))?;
    Some((number, u64::from_str_radix(inode, 16).ok()?))
}

/// A descriptor of our own for what had that number, unless something else has it by now: the library has threads, and so has the process.
fn same(number: RawFd, inode: u64) -> Option<OwnedFd> {
    // SAFETY: copies a number, which need not be open.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 0) };
    if copy < 0 {
        return None;
    }
    // SAFETY: new, and nobody else's.
    let copy = unsafe { OwnedFd::from_raw_fd(copy) };
    rustix::fs::fstat(&copy).is_ok_and(|status| status.st_ino == inode).then_some(copy)
}

/// Whether it is a connection over IP, not what wakes the library's own threads.
fn is_connection(descriptor: &OwnedFd) -> bool {
    let peer = rustix::net::getpeername(descriptor).ok().flatten();
    peer.is_some_and(|peer| matches!(peer.address_family(), AddressFamily::INET | AddressFamily::INET6))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

    use super::*;

    #[test]
    fn only_what_a_queue_waits_for_is_broken() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connect = || TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (own, other) = (connect(), connect());
        let accept = || listener.accept().unwrap().0;
        let (mut its_peer, others_peer) = (accept(), accept());
        let (bell, _rope) = UnixStream::pair().unwrap();
        let (outer, inner) =
            (epoll::create(CreateFlags::CLOEXEC).unwrap(), epoll::create(CreateFlags::CLOEXEC).unwrap());
        epoll::add(&outer, &inner, EventData::new_u64(0), EventFlags::IN).unwrap();
        epoll::add(&inner, &own, EventData::new_u64(0), EventFlags::IN).unwrap();
        epoll::add(&inner, &bell, EventData::new_u64(0), EventFlags::IN).unwrap();
        assert_eq!(hang_up(outer.as_raw_fd()), 1);
        assert_eq!(its_peer.read(&mut [0]).unwrap(), 0);
        others_peer.set_nonblocking(true).unwrap();
        let still = (&others_peer).read(&mut [0]).unwrap_err();
        assert_eq!(still.kind(), std::io::ErrorKind::WouldBlock);
        bell.set_nonblocking(true).unwrap();
        assert_eq!((&bell).read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        drop(other);
        assert_eq!(hang_up(own.as_raw_fd()), 0);
    }

    #[test]
    fn a_number_that_names_something_else_by_now_is_left_alone() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let inode = rustix::fs::fstat(&listener).unwrap().st_ino;
        assert!(same(listener.as_raw_fd(), inode).is_some());
        assert!(same(listener.as_raw_fd(), inode + 1).is_none());
        assert_eq!(watched("tfd:        5 events:       19 data: 5  pos:0 ino:1c sdev:9"), Some((5, 28)));
        for strange in ["pos:\t0", "tfd:", "tfd: x ino:1", "tfd: 5 events: 19", "tfd: 5 ino:xyz"] {
            assert_eq!(watched(strange), None, "{strange}");
        }
    }

    #[test]
    fn only_the_old_layer_over_tcp_needs_it() {
        let (old, new) = (Version(version(1, 17)), NOT_FROM);
        assert!(is_needed("tcp;ofi_rxm", old));
        assert!(!is_needed("tcp;ofi_rxm", new) && !is_needed("shm", old) && !is_needed("verbs;ofi_rxm", old));
    }
}
