//! Connections: greeting, frames, loss.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use kvferry_transport::{ConnectError, Event, PeerId, TransferError};
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, connect, socket_with};
use rustix::process::Pid;

use crate::backend::Backend;
use crate::open::abstract_name;
use crate::socket::Connection;
use crate::transport::{LISTENER, LocalTransport};
use crate::wire::{Address, Frame, VERSION, same_key};

/// How long a greeting may take.
const GREETING: Duration = Duration::from_secs(5);
/// How long nothing is accepted after descriptors ran out.
const DEAF: Duration = Duration::from_millis(50);
/// Connections that have not shown the key yet.
const STRANGERS_MAX: usize = 1024;

/// One connection and who is at its other end.
pub(crate) struct Peer {
    pub(crate) connection: Connection,
    pub(crate) stage: Stage,
    /// Which opened transport it is; two connections to the same one are the same for a fence.
    pub(crate) instance: [u8; 16],
    /// Its process, as the kernel told.
    pub(crate) pid: Option<Pid>,
    /// Whether epoll tells when it takes more.
    watched_for_room: bool,
}

pub(crate) enum Stage {
    /// Its backlog was full: to be tried again until then.
    Dialing { to: SocketAddrUnix, until: Instant },
    /// We called and wait for its welcome.
    Calling { until: Instant },
    /// It called and has to show the key.
    Stranger { until: Instant },
    /// Greeted.
    Up,
}

impl Peer {
    pub(crate) fn is_stranger(&self) -> bool {
        matches!(self.stage, Stage::Stranger { .. })
    }

    /// When something has to be done about it though it says nothing.
    pub(crate) fn deadline(&self, now: Instant) -> Option<Instant> {
        match self.stage {
            Stage::Dialing { until, .. } => Some(until.min(now + Duration::from_millis(1))),
            Stage::Calling { until } | Stage::Stranger { until } => Some(until),
            Stage::Up => None,
        }
    }
}

impl<B: Backend> LocalTransport<B> {
    pub(crate) fn dial(&mut self, address: &[u8]) -> Result<PeerId, ConnectError> {
        let bad = |reason| ConnectError::BadAddress { kind: B::KIND, reason };
        let address = Address::decode(B::KIND, address).map_err(bad)?;
        if address.boot != self.info.host {
            return Err(bad(format!(
                "it is on another host (boot id {}, here {}); use a network transport",
                address.boot, self.info.host
            )));
        }
        let io = |context, error: Errno| ConnectError::Io { context, source: error.into() };
        let to = abstract_name(&address.socket).map_err(|e| io("naming its socket", e))?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(|e| io("making a socket", e))?;
        let until = Instant::now() + GREETING;
        let stage = match connect(&socket, &to) {
            Ok(()) => Stage::Calling { until },
            Err(Errno::AGAIN | Errno::INTR) => Stage::Dialing { to, until },
            Err(error) => return Err(io("connecting (has it ended, or has it another network namespace?)", error)),
        };
        let dialed = matches!(stage, Stage::Calling { .. });
        let peer = self.add_peer(socket, stage, address.instance).map_err(|e| io("watching its socket", e))?;
        self.send(peer, &Frame::Hello { version: VERSION, key: address.key, instance: self.instance });
        if dialed {
            self.dialed(peer);
        }
        Ok(peer)
    }

    pub(crate) fn accept_all(&mut self) {
        loop {
            match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => {
                    if self.peers.values().filter(|peer| peer.is_stranger()).count() >= STRANGERS_MAX {
                        continue;
                    }
                    let until = Instant::now() + GREETING;
                    match self.add_peer(socket, Stage::Stranger { until }, [0; 16]) {
                        // Whoever has greeted already is no stranger to the next one in the queue.
                        Ok(peer) => self.read_from(peer),
                        Err(error) => tracing::warn!(%error, "a connection was not accepted"),
                    }
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return,
                Err(error) => {
                    // Out of descriptors or memory. Those that wait would wake us at once, again and again.
                    tracing::warn!(%error, "a connection was not accepted");
                    if self.listen_for(epoll::EventFlags::empty()) {
                        self.deaf_until = Some(Instant::now() + DEAF);
                    }
                    return;
                }
            }
        }
    }

    /// Accepts again what could not be accepted before.
    pub(crate) fn listen_again(&mut self, now: Instant) {
        if self.deaf_until.is_some_and(|until| until <= now) && self.listen_for(epoll::EventFlags::IN) {
            self.deaf_until = None;
            self.accept_all();
        }
    }

    fn listen_for(&self, flags: epoll::EventFlags) -> bool {
        epoll::modify(&self.poller, &self.listener, epoll::EventData::new_u64(LISTENER), flags).is_ok()
    }

    fn add_peer(&mut self, socket: OwnedFd, stage: Stage, instance: [u8; 16]) -> Result<PeerId, Errno> {
        let peer = PeerId(self.next_peer);
        let pid = socket_peercred(&socket).ok().map(|cred| cred.pid);
        // A socket that still dials would only report that it hangs.
        if !matches!(stage, Stage::Dialing { .. }) {
            epoll::add(&self.poller, &socket, epoll::EventData::new_u64(u64::from(peer.0)), epoll::EventFlags::IN)?;
        }
        self.next_peer = self.next_peer.wrapping_add(1);
        self.peers
            .insert(peer, Peer { connection: Connection::new(socket), stage, instance, pid, watched_for_room: false });
        Ok(peer)
    }

    fn dialed(&mut self, id: PeerId) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.connection.trust();
            peer.pid = socket_peercred(peer.connection.fd()).ok().map(|cred| cred.pid);
        }
    }

    /// Tries again what the backlog refused, and drops who did not greet in time.
    pub(crate) fn check_greetings(&mut self, now: Instant) {
        let waiting: Vec<PeerId> =
            self.peers.iter().filter(|(_, peer)| !matches!(peer.stage, Stage::Up)).map(|(&id, _)| id).collect();
        for id in waiting {
            let Some(peer) = self.peers.get_mut(&id) else { continue };
            let until = match &peer.stage {
                Stage::Dialing { to, until } => {
                    let until = *until;
                    match connect(peer.connection.fd(), to) {
                        Ok(()) => {
                            peer.stage = Stage::Calling { until };
                            let data = epoll::EventData::new_u64(u64::from(id.0));
                            if let Err(error) =
                                epoll::add(&self.poller, peer.connection.fd(), data, epoll::EventFlags::IN)
                            {
                                self.lose(id, &format!("its socket cannot be watched: {error}"));
                                continue;
                            }
                            self.dialed(id);
                            self.unflushed.insert(id);
                        }
                        Err(Errno::AGAIN | Errno::INTR) => {}
                        Err(error) => {
                            self.lose(id, &format!("connecting failed: {error}"));
                            continue;
                        }
                    }
                    until
                }
                Stage::Calling { until } | Stage::Stranger { until } => *until,
                Stage::Up => continue,
            };
            if now >= until {
                self.lose(id, "it did not greet in time");
            }
        }
    }

    pub(crate) fn send(&mut self, id: PeerId, frame: &Frame) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.connection.send(frame);
            self.unflushed.insert(id);
        }
    }

    /// Writes what sockets take, and has epoll tell about those that are full.
    pub(crate) fn flush_all(&mut self) {
        for id in std::mem::take(&mut self.unflushed) {
            let Some(peer) = self.peers.get_mut(&id) else { continue };
            if matches!(peer.stage, Stage::Dialing { .. }) {
                continue;
            }
            let flushed = peer.connection.flush();
            let full = peer.connection.is_backed_up();
            if flushed.is_ok() && full != peer.watched_for_room {
                let flags = if full { epoll::EventFlags::IN | epoll::EventFlags::OUT } else { epoll::EventFlags::IN };
                let data = epoll::EventData::new_u64(u64::from(id.0));
                if epoll::modify(&self.poller, peer.connection.fd(), data, flags).is_ok() {
                    peer.watched_for_room = full;
                }
            }
            if let Err(reason) = flushed {
                // What it said before it went still counts.
                self.read_from(id);
                self.lose(id, &reason);
            }
        }
    }

    /// Takes what a peer sent.
    pub(crate) fn read_from(&mut self, id: PeerId) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        if let Err(reason) = peer.connection.fill() {
            return self.lose(id, &reason);
        }
        loop {
            // Handling a frame may have lost the peer.
            let Some(peer) = self.peers.get_mut(&id) else { return };
            let handled = match peer.connection.next() {
                Ok(Some(frame)) => self.handle(id, frame),
                Ok(None) => return,
                Err(reason) => Err(reason),
            };
            if let Err(reason) = handled {
                return self.lose(id, &reason);
            }
        }
    }

    fn handle(&mut self, id: PeerId, frame: Frame) -> Result<(), String> {
        let Some(peer) = self.peers.get_mut(&id) else { return Ok(()) };
        match (&peer.stage, frame) {
            (Stage::Stranger { .. }, Frame::Hello { version, key, instance }) => {
                if !same_key(&key, &self.key) {
                    return Err("it showed a wrong key".into());
                }
                if version != VERSION {
                    return Err(format!(
                        "it speaks version {version}, this side {VERSION}; run the same release on both"
                    ));
                }
                peer.connection.trust();
                peer.instance = instance;
                peer.stage = Stage::Up;
                self.send(id, &Frame::Welcome { instance: self.instance });
                self.events.push(Event::Connected { peer: id });
            }
            (Stage::Calling { .. }, Frame::Welcome { instance }) => {
                if instance != peer.instance {
                    return Err("another transport answers at its address".into());
                }
                peer.stage = Stage::Up;
                self.events.push(Event::Connected { peer: id });
            }
            (Stage::Up, Frame::Push(doorbell)) => self.doorbell(id, doorbell),
            (Stage::Up, Frame::Open { request, pool, token }) => self.open_for(id, request, pool, token),
            (Stage::Up, Frame::Fds { request, count }) => {
                let fds = peer.connection.take_fds(count as usize)?;
                self.take_fds(id, request, fds)?;
            }
            (Stage::Up, Frame::Opened { request, layout, memory }) => self.opened(id, request, layout, memory)?,
            (Stage::Up, Frame::NotOpened { request, reason }) => self.not_opened(id, request, reason),
            (Stage::Up, Frame::PushEnd { id: transfer, serial, outcome }) => {
                self.push_ended(id, transfer, serial, outcome)
            }
            (Stage::Up, Frame::PushCancel { id: transfer, serial }) => self.push_cancelled(id, transfer, serial),
            (Stage::Up, Frame::Notice(notice)) => self.events.push(Event::Notice { notice }),
            (Stage::Up, Frame::Withdrawn { pool, token }) => self.withdrawn(id, pool, token),
            _ => return Err("it sent a frame that is not due".into()),
        }
        Ok(())
    }

    /// Ends everything with a connection that is of no further use.
    pub(crate) fn lose(&mut self, id: PeerId, reason: &str) {
        let Some(peer) = self.peers.remove(&id) else { return };
        self.forget(id, &TransferError::PeerLost(reason.into()));
        if peer.is_stranger() {
            tracing::debug!(reason, "a connection ended before it was greeted");
        } else {
            self.events.push(Event::PeerLost { peer: id, reason: reason.into() });
        }
    }

    /// Fails the transfers of a connection that is gone, and lets its memory go.
    pub(crate) fn forget(&mut self, id: PeerId, error: &TransferError) {
        self.unflushed.remove(&id);
        self.fail_posted(|posted| posted.transfer.peer == id, error);
        self.fail_arriving(|peer| peer == id, error, None);
        self.remotes.retain(|_, remote| remote.peer != id);
    }
}
