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
/// Nor do all of them together, whoever connects meanwhile.
const IN_ALL: Duration = Duration::from_secs(10);

/// The connections of an endpoint that may still answer a peer that is gone.
#[derive(Default)]
pub(crate) struct Cutting {
    /// The descriptor of the endpoint's completion queue; none of a provider that has no connections.
    queue: Option<RawFd>,
    /// Those that are idle and those that were broken, too, until none is under way.
    watched: Vec<Watched>,
    /// By when all have to be over.
    until: Option<Instant>,
}

struct Watched {
    connection: Connection,
    /// Bytes that wait to be sent or taken, and since when it is that many.
    unsent: usize,
    since: Instant,
    until: Instant,
    /// The library may not have closed it yet.
    is_broken: bool,
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
        let queue = queue.filter(|_| provider.contains("tcp"));
        Cutting { queue, watched: Vec::new(), until: None }
    }

    /// A peer is gone that may have been answered. What is watched already goes on as it does: peers that come and go cannot put off its end.
    pub(crate) fn begin(&mut self, now: Instant) {
        if !self.is_under_way() {
            self.until = Some(now + IN_ALL);
        }
        // What the peer has asked for may not be answered yet.
        self.watched.iter_mut().filter(|watched| watched.unsent == 0).for_each(|watched| watched.since = now);
        self.watch(now);
    }

    /// Whether something may still be sent to a peer that is gone.
    pub(crate) fn is_under_way(&self) -> bool {
        !self.watched.is_empty()
    }

    /// Looks at the connections.
    pub(crate) fn go_on(&mut self, now: Instant) {
        if !self.is_under_way() {
            return;
        }
        let mut is_over = true;
        self.watched.retain_mut(|watched| {
            // One that was closed sends nothing.
            let Some(unsent) = unsent(&watched.connection) else { return false };
            match watched.judge(unsent, now) {
                Verdict::Wait => is_over = false,
                // A peer that is gone may begin another read over it while others are waited for.
                Verdict::Idle => {}
                Verdict::Break => watched.hang_up(),
            }
            true
        });
        if !is_over {
            return;
        }
        // Nor may it do so over one that came meanwhile.
        let known = self.watched.len();
        self.watch(now);
        let came = self.watched.get_mut(known..).unwrap_or_default();
        if !came.is_empty() && self.until.is_none_or(|until| now < until) {
            return;
        }
        came.iter_mut().for_each(Watched::hang_up);
        self.watched.clear();
    }

    /// Adds the connections that are not watched yet.
    fn watch(&mut self, now: Instant) {
        let Some(queue) = self.queue else { return };
        let most = now + MOST;
        let until = self.until.map_or(most, |until| until.min(most));
        for connection in parting::connections(queue) {
            if self.watched.iter().any(|watched| watched.connection == connection) {
                continue;
            }
            if let Some(unsent) = unsent(&connection) {
                self.watched.push(Watched { connection, unsent, since: now, until, is_broken: false });
            }
        }
    }
}

impl Watched {
    fn judge(&mut self, unsent: usize, now: Instant) -> Verdict {
        if self.is_broken {
            return Verdict::Idle;
        }
        if unsent != self.unsent {
            (self.unsent, self.since) = (unsent, now);
        }
        let for_so_long = now.saturating_duration_since(self.since);
        match unsent {
            0 if for_so_long >= IDLE => Verdict::Idle,
            // Not broken even at the end: it is idle soon, or has something to send.
            0 => Verdict::Wait,
            _ if for_so_long >= STILL || now >= self.until => Verdict::Break,
            _ => Verdict::Wait,
        }
    }

    fn hang_up(&mut self) {
        self.is_broken = true;
        let unsent = self.unsent;
        tracing::warn!(unsent, "a connection that may still answer a peer that is gone is broken");
        if let Some(descriptor) = self.connection.open() {
            let _broken_already = rustix::net::shutdown(&descriptor, Shutdown::Both);
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
    use std::os::fd::OwnedFd;

    use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

    use super::*;

    type Ends = (TcpStream, TcpStream);

    /// Connections that a queue waits for.
    struct Queue {
        listener: TcpListener,
        queue: OwnedFd,
    }

    impl Queue {
        fn new() -> Queue {
            let queue = epoll::create(CreateFlags::CLOEXEC).unwrap();
            Queue { listener: TcpListener::bind("127.0.0.1:0").unwrap(), queue }
        }

        /// Begins to cut its connections; when.
        fn begin(&self) -> (Cutting, Instant) {
            let (mut cutting, now) = (Cutting::of("tcp;ofi_rxm", Some(self.queue.as_raw_fd())), Instant::now());
            cutting.begin(now);
            (cutting, now)
        }

        /// One whose peer takes nothing of what it has to send, and one that has nothing to send.
        fn connect_two(&self) -> (Ends, Ends) {
            let (mut still, idle) = (self.connect(), self.connect());
            fill(&mut still.0);
            (still, idle)
        }

        /// A connection, and its other end.
        fn connect(&self) -> Ends {
            let near = TcpStream::connect(self.listener.local_addr().unwrap()).unwrap();
            near.set_nonblocking(true).unwrap();
            epoll::add(&self.queue, &near, EventData::new_u64(0), EventFlags::IN).unwrap();
            (near, self.listener.accept().unwrap().0)
        }
    }

    /// Its peer takes nothing any more.
    fn fill(stream: &mut TcpStream) {
        while stream.write(&[1; 65_536]).is_ok() {}
    }

    fn is_broken(stream: &mut TcpStream) -> bool {
        stream.write(&[1]).is_err_and(|error| error.kind() == ErrorKind::BrokenPipe)
    }

    #[test]
    fn only_what_stands_still_with_something_to_send_is_broken() {
        let queue = Queue::new();
        let ((mut still, mut its_peer), (mut idle, mut others_peer)) = queue.connect_two();
        let (mut cutting, now) = queue.begin();
        assert_eq!(cutting.watched.len(), 2);
        cutting.go_on(now + IDLE);
        cutting.go_on(now + STILL / 2);
        assert!(cutting.is_under_way());
        cutting.go_on(now + STILL);
        assert!(!cutting.is_under_way());
        assert!(is_broken(&mut still));
        assert!(its_peer.read_to_end(&mut Vec::new()).is_ok());
        idle.write_all(&[5]).unwrap();
        others_peer.read_exact(&mut [0]).unwrap();
        // Of a connection that is closed meanwhile nothing is left to do, and of others there are none.
        cutting.begin(now);
        drop((still, idle));
        cutting.go_on(now);
        assert!(!cutting.is_under_way());
        let mut none = Cutting::of("efa", Some(queue.queue.as_raw_fd()));
        none.begin(now);
        assert!(!none.is_under_way());
    }

    #[test]
    fn one_that_was_idle_is_watched_until_all_are() {
        let queue = Queue::new();
        let ((mut still, _its_peer), (mut idle, _others_peer)) = queue.connect_two();
        let (mut cutting, now) = queue.begin();
        cutting.go_on(now + IDLE);
        fill(&mut idle);
        cutting.go_on(now + STILL / 2);
        cutting.go_on(now + STILL);
        assert!(is_broken(&mut still) && cutting.is_under_way(), "a read was begun over the other one meanwhile");
        cutting.go_on(now + STILL / 2 + STILL);
        assert!(is_broken(&mut idle) && !cutting.is_under_way());
    }

    #[test]
    fn one_that_comes_meanwhile_is_looked_at_too_but_not_for_ever() {
        let queue = Queue::new();
        let _first = queue.connect();
        let (mut cutting, now) = queue.begin();
        let (mut second, _its_peer) = queue.connect();
        fill(&mut second);
        cutting.go_on(now + IDLE);
        assert!(cutting.is_under_way(), "the second has not been looked at");
        cutting.go_on(now + IDLE + STILL);
        assert!(is_broken(&mut second) && !cutting.is_under_way());
        // Somebody connects before each end.
        let (mut at, mut others) = (now + MOST, vec![queue.connect()]);
        cutting.begin(at);
        let last = at + IN_ALL;
        while cutting.is_under_way() {
            at += STILL / 2;
            assert!(at <= last);
            others.push(queue.connect());
            cutting.go_on(at);
        }
        let broken: Vec<bool> = others.iter_mut().map(|(near, _)| is_broken(near)).collect();
        let (late, others) = broken.split_last().unwrap();
        assert!(*late && !others.contains(&true));
    }

    /// A peer that comes and goes again and again.
    #[test]
    fn beginning_again_does_not_put_off_the_end() {
        let queue = Queue::new();
        let ((mut still, _its_peer), (mut idle, _others_peer)) = queue.connect_two();
        let (mut cutting, now) = queue.begin();
        let until: Vec<Instant> = cutting.watched.iter().map(|watched| watched.until).collect();
        cutting.go_on(now + IDLE);
        let again = now + STILL - IDLE / 2;
        let (_third, _thirds_peer) = queue.connect();
        cutting.begin(again);
        assert_eq!(cutting.watched.len(), 3);
        let is_kept = |(watched, until): (&Watched, &Instant)| watched.until == *until;
        assert!(cutting.watched.iter().zip(&until).all(is_kept));
        cutting.go_on(now + STILL);
        assert!(is_broken(&mut still));
        assert!(cutting.is_under_way(), "what was asked for last may not be answered yet");
        cutting.go_on(again + IDLE);
        assert!(!cutting.is_under_way() && !is_broken(&mut idle));
    }

    #[test]
    fn what_moves_is_waited_for_but_not_for_ever() {
        let now = Instant::now();
        let connection = || Connection { number: -1, inode: 0 };
        let watched =
            || Watched { connection: connection(), unsent: 9, since: now, until: now + MOST, is_broken: false };
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
        assert_eq!(taken.judge(1, now + STILL + IDLE * 4), Verdict::Wait);
        assert_eq!(taken.judge(0, now + MOST), Verdict::Wait, "it may live on");
        assert_eq!(taken.judge(1, now + MOST), Verdict::Break);
    }
}
