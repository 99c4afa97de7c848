//! Ends what the library's tcp still sends to peers that are gone: a read that it has begun to answer goes on reading memory whose registration
//! is closed, whenever the peer takes more.
//!
//! Nothing tells which connection is whose, so each of the endpoint's has to show that nothing waits to be sent, or is broken once it stands
//! still with something unsent. Those of peers that live on stand still only if these do.

use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use rustix::net::Shutdown;

use crate::parting::{self, Connection};

/// Nothing was under way over a connection that had nothing to send for so long.
const IDLE: Duration = Duration::from_millis(20);
/// A connection that has something to send, and has sent nothing of it for so long, is broken.
const STILL: Duration = Duration::from_secs(1);
/// None goes on for longer.
const MOST: Duration = Duration::from_secs(5);

/// The connections of an endpoint that may still answer a peer that is gone.
#[derive(Default)]
pub(crate) struct Cutting {
    /// The descriptor of the endpoint's completion queue; none of a provider that has no connections.
    queue: Option<RawFd>,
    watched: Vec<Watched>,
}

struct Watched {
    connection: Connection,
    /// Bytes that wait to be sent or taken, and since when it is that many.
    unsent: usize,
    since: Instant,
    until: Instant,
}

/// What is to be done about a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Wait,
    Idle,
    Break,
}

impl Cutting {
    /// Of the endpoint of that provider whose completion queue has that descriptor, open as long as this.
    pub(crate) fn of(provider: &str, queue: Option<RawFd>) -> Cutting {
        Cutting { queue: queue.filter(|_| provider.contains("tcp")), watched: Vec::new() }
    }

    /// A peer is gone that may have been answered.
    pub(crate) fn begin(&mut self, now: Instant) {
        let Some(queue) = self.queue else { return };
        self.watched = parting::connections(queue)
            .into_iter()
            .filter_map(|connection| {
                let unsent = unsent(&connection)?;
                Some(Watched { connection, unsent, since: now, until: now + MOST })
            })
            .collect();
    }

    /// Whether something may still be sent to a peer that is gone.
    pub(crate) fn is_under_way(&self) -> bool {
        !self.watched.is_empty()
    }

    /// Looks at the connections.
    pub(crate) fn go_on(&mut self, now: Instant) {
        self.watched.retain_mut(|watched| {
            // One that was closed sends nothing.
            let Some(unsent) = unsent(&watched.connection) else { return false };
            match watched.judge(unsent, now) {
                Verdict::Wait => true,
                Verdict::Idle => false,
                Verdict::Break => {
                    tracing::warn!(unsent, "a connection that may still answer a peer that is gone is broken");
                    if let Some(descriptor) = watched.connection.open() {
                        let _broken_already = rustix::net::shutdown(&descriptor, Shutdown::Both);
                    }
                    false
                }
            }
        });
    }
}

impl Watched {
    fn judge(&mut self, unsent: usize, now: Instant) -> Verdict {
        if unsent != self.unsent {
            (self.unsent, self.since) = (unsent, now);
        }
        let for_so_long = now.saturating_duration_since(self.since);
        match unsent {
            0 if for_so_long >= IDLE => Verdict::Idle,
            1.. if for_so_long >= STILL => Verdict::Break,
            _ if now >= self.until => Verdict::Break,
            _ => Verdict::Wait,
        }
    }
}

/// Bytes that a connection has to send, or that its peer has not taken; none if it was closed.
fn unsent(connection: &Connection) -> Option<usize> {
    let descriptor = connection.open()?;
    let mut bytes: libc::c_int = 0;
    // SAFETY: an open descriptor, and a place for the number.
    let status = unsafe { libc::ioctl(descriptor.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    (status == 0).then(|| usize::try_from(bytes).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream};

    use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

    use super::*;

    #[test]
    fn only_what_stands_still_with_something_to_send_is_broken() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connect = || {
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (near, listener.accept().unwrap().0)
        };
        let ((mut still, mut its_peer), (mut idle, mut others_peer)) = (connect(), connect());
        let queue = epoll::create(CreateFlags::CLOEXEC).unwrap();
        for stream in [&still, &idle] {
            stream.set_nonblocking(true).unwrap();
            epoll::add(&queue, stream, EventData::new_u64(0), EventFlags::IN).unwrap();
        }
        while still.write(&[1; 65_536]).is_ok() {}
        let mut cutting = Cutting::of("tcp;ofi_rxm", Some(queue.as_raw_fd()));
        let now = Instant::now();
        cutting.begin(now);
        assert_eq!(cutting.watched.len(), 2);
        cutting.go_on(now + IDLE);
        assert_eq!(cutting.watched.len(), 1, "one has nothing to send");
        cutting.go_on(now + STILL / 2);
        assert!(cutting.is_under_way());
        cutting.go_on(now + STILL);
        assert!(!cutting.is_under_way());
        assert_eq!(still.write(&[1]).unwrap_err().kind(), ErrorKind::BrokenPipe);
        assert!(its_peer.read_to_end(&mut Vec::new()).is_ok());
        idle.write_all(&[5]).unwrap();
        others_peer.read_exact(&mut [0]).unwrap();
        // Of a connection that is closed meanwhile nothing is left to do, and of others there are none.
        cutting.begin(now);
        drop((still, idle));
        cutting.go_on(now);
        assert!(!cutting.is_under_way());
        let mut none = Cutting::of("efa", Some(queue.as_raw_fd()));
        none.begin(now);
        assert!(!none.is_under_way());
    }

    #[test]
    fn what_moves_is_waited_for_but_not_for_ever() {
        let now = Instant::now();
        let connection = || Connection { number: -1, inode: 0 };
        let watched = || Watched { connection: connection(), unsent: 9, since: now, until: now + MOST };
        let mut moves = watched();
        let mut at = now;
        for unsent in (1..).map(|count| 10 + count % 2) {
            at += STILL / 2;
            match moves.judge(unsent, at) {
                Verdict::Wait => assert!(at < now + MOST),
                verdict => {
                    assert_eq!((verdict, at), (Verdict::Break, now + MOST));
                    break;
                }
            }
        }
        let mut taken = watched();
        assert_eq!(taken.judge(0, now + STILL), Verdict::Wait, "it has just been taken");
        assert_eq!(taken.judge(3, now + STILL + IDLE), Verdict::Wait);
        assert_eq!(taken.judge(0, now + STILL + IDLE * 2), Verdict::Wait);
        assert_eq!(taken.judge(0, now + STILL + IDLE * 3), Verdict::Idle);
    }
}
