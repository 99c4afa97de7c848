//! Frames over stream sockets: abstract Unix sockets inside this host, which can carry descriptors, and TCP beyond it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvferry_transport::{ConnectError, OpenError, PeerId, TransportKind, Wait};
use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{SocketAddrUnix, connect};
use rustix::time::Timespec;

use crate::alarm::Alarm;
use crate::carrier::{Carried, Carrier, Descriptor, Owner};
use crate::ring::{Ring, Written};
use crate::socket::Connection;
use crate::wire::Frame;

mod door;
mod end;

use door::{Door, Place};
use end::Socket;

/// What epoll calls the listeners and the timer; peers have their numbers.
const LISTENER: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;
const BEYOND: u64 = u64::MAX - 2;
/// Sockets that are looked at in one poll.
const READY_MAX: usize = 64;
/// How often a full backlog is tried again.
const REDIAL: Duration = Duration::from_millis(1);
/// Connections from this host that have not shown the key yet.
const STRANGERS_MAX: usize = 1024;
/// The same from beyond it: a newer one replaces the oldest.
const STRANGERS_BEYOND_MAX: usize = 256;
/// Sockets are not looked at again so soon after nothing was there: it takes longer than all the rest.
const QUIET: Duration = Duration::from_micros(5);
/// The same while frames in memory wait, which go first.
const QUIET_AT_MOST: Duration = Duration::from_micros(50);

/// Listening sockets and their connections.
pub struct Sockets {
    kind: TransportKind,
    name: [u8; 16],
    door: Door,
    /// Where peers of other hosts come in, if they do.
    beyond: Option<(Door, SocketAddr)>,
    alarm: Alarm,
    poller: Arc<OwnedFd>,
    ready: Vec<epoll::Event>,
    connections: BTreeMap<PeerId, Socket>,
    next_peer: u32,
    /// Who has something to write.
    unflushed: BTreeSet<PeerId>,
    /// Who may have frames, and whether its socket was read for them.
    speaking: VecDeque<(PeerId, bool)>,
    /// Whether small frames go through memory.
    has_rings: bool,
    /// When nothing was found at the sockets, if that was the last look at them.
    quiet_since: Option<Instant>,
    /// Who has said so much through memory that it has to wait for the next look.
    later: Vec<PeerId>,
}

impl Sockets {
    /// Listens under a name of its own.
    pub(crate) fn open(kind: TransportKind, device: &str, has_rings: bool) -> Result<Sockets, OpenError> {
        let device = device.to_owned();
        let io = |context, error: Errno| OpenError::Io { device: device.clone(), context, source: error.into() };
        let name = kvferry_transport::codec::random().map_err(|source| OpenError::Io {
            device: device.clone(),
            context: "naming the socket",
            source,
        })?;
        let door = Door::here(&name, LISTENER).map_err(|(context, error)| io(context, error))?;
        let alarm = Alarm::new().map_err(|e| io("making a timer", e))?;
        let poller = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| io("making an epoll instance", e))?;
        door.watch(&poller)
            .and_then(|()| epoll::add(&poller, &alarm, epoll::EventData::new_u64(TIMER), epoll::EventFlags::IN))
            .map_err(|e| io("watching the socket", e))?;
        Ok(Sockets {
            kind,
            name,
            door,
            beyond: None,
            alarm,
            poller: Arc::new(poller),
            ready: Vec::with_capacity(READY_MAX),
            connections: BTreeMap::new(),
            next_peer: 0,
            unflushed: BTreeSet::new(),
            speaking: VecDeque::new(),
            has_rings,
            quiet_since: None,
            later: Vec::new(),
        })
    }

    /// Also listens at an address of this host, for peers beyond it.
    pub(crate) fn listen_beyond(&mut self, ip: IpAddr) -> Result<(), (&'static str, Errno)> {
        let (door, at) = Door::beyond(ip, BEYOND)?;
        door.watch(&self.poller).map_err(|error| ("watching the socket", error))?;
        self.beyond = Some((door, at));
        Ok(())
    }

    fn add(
        &mut self,
        socket: OwnedFd,
        dialing: Option<SocketAddrUnix>,
        (is_stranger, is_beyond): (bool, bool),
    ) -> Result<PeerId, Errno> {
        let peer = PeerId(self.next_peer);
        let pid = if is_beyond { None } else { socket_peercred(&socket).ok().map(|cred| cred.pid) };
        // A socket that still dials would only report that it hangs.
        if dialing.is_none() {
            epoll::add(&self.poller, &socket, epoll::EventData::new_u64(u64::from(peer.0)), epoll::EventFlags::IN)?;
        }
        self.next_peer = self.next_peer.wrapping_add(1);
        let mut connection = Connection::new(socket);
        // Who is called beyond this host has yet to answer with its welcome.
        if !is_stranger && !is_beyond {
            connection.trust();
        }
        let socket = Socket::new(connection, pid, dialing, (is_stranger, is_beyond));
        self.connections.insert(peer, socket);
        Ok(peer)
    }

    fn listen_to(&mut self, peer: PeerId) {
        match self.speaking.iter_mut().find(|(speaking, _)| *speaking == peer) {
            // There may be more than was read before.
            Some((_, is_read)) => *is_read = false,
            None => self.speaking.push_back((peer, false)),
        }
    }

    /// Tries again what a full backlog refused.
    fn redial(&mut self) {
        for (&id, socket) in &mut self.connections {
            let Some(to) = &socket.dialing else { continue };
            match connect(socket.connection.fd(), to) {
                Ok(()) => {
                    socket.dialing = None;
                    let data = epoll::EventData::new_u64(u64::from(id.0));
                    if let Err(error) = epoll::add(&self.poller, socket.connection.fd(), data, epoll::EventFlags::IN) {
                        socket.broken = Some(format!("its socket cannot be watched: {error}"));
                        self.speaking.push_back((id, true));
                        continue;
                    }
                    socket.pid = socket_peercred(socket.connection.fd()).ok().map(|cred| cred.pid);
                    self.unflushed.insert(id);
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => {
                    socket.dialing = None;
                    socket.broken = Some(format!("connecting failed: {error}"));
                    self.speaking.push_back((id, true));
                }
            }
        }
    }

    /// Accepts one of those who wait.
    fn accept(&mut self) -> Option<PeerId> {
        while let Some(socket) = self.door.accept(&self.poller) {
            if self.strangers(false).count() < STRANGERS_MAX
                && let Some(peer) = self.let_in(socket, false)
            {
                return Some(peer);
            }
        }
        while let Some(socket) = self.beyond.as_mut().and_then(|(door, _)| door.accept(&self.poller)) {
            if let Err(error) = door::tune(&socket) {
                tracing::debug!(%error, "a connection from another host cannot be set up");
                continue;
            }
            let full = self.strangers(true).count() >= STRANGERS_BEYOND_MAX;
            let oldest = self.strangers(true).next().filter(|_| full);
            if let Some(oldest) = oldest
                && let Some(socket) = self.connections.get_mut(&oldest)
            {
                socket.broken = Some("newer callers took its place".into());
                self.speaking.push_back((oldest, true));
            }
            if let Some(peer) = self.let_in(socket, true) {
                return Some(peer);
            }
        }
        None
    }

    /// Whoever of this host, or from beyond it, has yet to show the key, the oldest first.
    fn strangers(&self, is_beyond: bool) -> impl Iterator<Item = PeerId> {
        let waits =
            move |socket: &Socket| socket.is_stranger && socket.is_beyond == is_beyond && socket.broken.is_none();
        self.connections.iter().filter(move |(_, socket)| waits(socket)).map(|(&peer, _)| peer)
    }

    fn let_in(&mut self, socket: OwnedFd, is_beyond: bool) -> Option<PeerId> {
        match self.add(socket, None, (true, is_beyond)) {
            // Whoever has greeted already is no stranger to the next one in the queue.
            Ok(peer) => {
                self.speaking.push_back((peer, false));
                Some(peer)
            }
            Err(error) => {
                tracing::warn!(%error, "a connection was not accepted");
                None
            }
        }
    }

    fn is_called(&self) -> bool {
        self.door.is_called || self.beyond.as_ref().is_some_and(|(door, _)| door.is_called)
    }
}

impl Carrier for Sockets {
    fn place(&self) -> Bytes {
        Bytes::copy_from_slice(&self.name)
    }

    fn place_beyond(&self) -> Option<Bytes> {
        self.beyond.as_ref().map(|(_, at)| door::place_beyond(*at))
    }

    fn is_beyond(&self, place: &[u8]) -> bool {
        matches!(Place::decode(place), Some(Place::Beyond(_)))
    }

    fn dial(&mut self, place: &[u8]) -> Result<PeerId, ConnectError> {
        let bad = |reason: &str| ConnectError::BadAddress { kind: self.kind, reason: reason.into() };
        let io = |(context, error): (_, Errno)| ConnectError::Io { context, source: error.into() };
        let (socket, dialing, is_beyond) = match (Place::decode(place), &self.beyond) {
            (Some(Place::Here(name)), _) => {
                let (socket, dialing) = door::dial_here(&name).map_err(io)?;
                (socket, dialing, false)
            }
            (Some(Place::Beyond(to)), Some((_, from))) => (door::dial_beyond(to, from.ip()).map_err(io)?, None, true),
            (Some(Place::Beyond(_)), None) => {
                return Err(bad("it is another host's, and this side was opened for peers of its own host only"));
            }
            (None, _) => return Err(bad("it names no socket")),
        };
        self.add(socket, dialing, (false, is_beyond)).map_err(|error| io(("watching its socket", error)))
    }

    fn trust(&mut self, peer: PeerId) {
        if let Some(socket) = self.connections.get_mut(&peer) {
            socket.connection.trust();
            socket.is_stranger = false;
            if self.has_rings && !socket.is_beyond {
                socket.offer_ring();
                self.unflushed.insert(peer);
            }
        }
    }

    fn send(&mut self, peer: PeerId, frame: &Frame, descriptors: Vec<Box<dyn Descriptor>>) {
        let Some(socket) = self.connections.get_mut(&peer) else { return };
        // Nothing takes it any more, and nothing would bound it.
        if socket.broken.is_some() {
            return;
        }
        let bytes = frame.encode();
        let body = bytes.get(4..).unwrap_or_default();
        let written = match &mut socket.ring {
            Some(ring) if descriptors.is_empty() => ring.write(socket.queued, body),
            _ => Written::No,
        };
        match written {
            Written::Seen => return,
            Written::ToWake => socket.queue(Frame::Wake.encode(), Vec::new()),
            Written::No => socket.queue(bytes, descriptors),
        }
        self.unflushed.insert(peer);
    }

    /// Writes what sockets take, and has epoll tell about those that are full.
    fn flush(&mut self) {
        // Mostly so, and asked at every poll.
        if self.unflushed.is_empty() {
            return;
        }
        for id in std::mem::take(&mut self.unflushed) {
            let Some(socket) = self.connections.get_mut(&id) else { continue };
            if socket.dialing.is_some() || socket.broken.is_some() {
                continue;
            }
            let flushed = socket.connection.flush();
            let full = socket.connection.is_backed_up();
            if flushed.is_ok() && full != socket.watched_for_room {
                let flags = if full { epoll::EventFlags::IN | epoll::EventFlags::OUT } else { epoll::EventFlags::IN };
                let data = epoll::EventData::new_u64(u64::from(id.0));
                if epoll::modify(&self.poller, socket.connection.fd(), data, flags).is_ok() {
                    socket.watched_for_room = full;
                }
            }
            if let Err(reason) = flushed {
                // What it said before it went still counts.
                socket.broken = Some(reason);
                self.listen_to(id);
            }
        }
    }

    fn look(&mut self, now: Instant) {
        self.door.look(&self.poller, now);
        if let Some((door, _)) = &mut self.beyond {
            door.look(&self.poller, now);
        }
        let mut talking = std::mem::take(&mut self.later);
        for (&id, socket) in &mut self.connections {
            let Some(ring) = &mut socket.ring else { continue };
            ring.look();
            if ring.has_next(socket.came) {
                talking.push(id);
            }
        }
        let has_frames = !talking.is_empty();
        for id in talking {
            if !self.speaking.iter().any(|(speaking, _)| *speaking == id) {
                self.speaking.push_back((id, true));
            }
        }
        let quiet = if has_frames { QUIET_AT_MOST } else { QUIET };
        if self.quiet_since.is_some_and(|since| now.saturating_duration_since(since) < quiet) {
            return;
        }
        self.redial();
        self.ready.clear();
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        if epoll::wait(&self.poller, spare_capacity(&mut self.ready), Some(&zero)).is_err() {
            return;
        }
        let mut ready = std::mem::take(&mut self.ready);
        let is_quiet = ready.is_empty() && self.connections.values().any(|socket| socket.ring.is_some());
        self.quiet_since = is_quiet.then_some(now);
        for event in ready.drain(..) {
            match event.data.u64() {
                LISTENER => self.door.is_called = true,
                BEYOND => {
                    if let Some((door, _)) = &mut self.beyond {
                        door.is_called = true;
                    }
                }
                TIMER => self.alarm.quiet(),
                id => {
                    let (id, flags) = (PeerId(id as u32), event.flags);
                    if flags.contains(epoll::EventFlags::OUT) {
                        self.unflushed.insert(id);
                    }
                    self.listen_to(id);
                }
            }
        }
        // Its room serves the next poll, too.
        self.ready = ready;
    }

    fn next(&mut self) -> Option<Carried> {
        while let Some((peer, is_read)) = self.speaking.front_mut() {
            let peer = *peer;
            let Some(socket) = self.connections.get_mut(&peer) else {
                self.speaking.pop_front();
                continue;
            };
            // What came whole is taken before a broken stream counts.
            if !std::mem::replace(is_read, true)
                && let Err(reason) = socket.connection.fill()
            {
                socket.broken.get_or_insert(reason);
            }
            if socket.ring.as_ref().is_some_and(Ring::is_spent) {
                self.speaking.pop_front();
                self.later.push(peer);
                continue;
            }
            let next = socket.next(self.has_rings && !socket.is_beyond);
            if socket.connection.is_backed_up() {
                self.unflushed.insert(peer);
            }
            let reason = match next {
                Ok(Some(frame)) => {
                    if matches!(frame, Frame::Welcome { .. }) && !socket.is_stranger {
                        socket.connection.trust();
                    }
                    return Some(Carried::Frame(peer, frame));
                }
                Ok(None) => socket.broken.take(),
                Err(reason) => Some(socket.broken.take().unwrap_or(reason)),
            };
            self.speaking.pop_front();
            if let Some(reason) = reason {
                self.close(peer);
                return Some(Carried::Lost(peer, reason));
            }
        }
        self.accept().map(Carried::Called)
    }

    fn take_fds(&mut self, peer: PeerId, count: usize) -> Result<Vec<OwnedFd>, String> {
        self.connections.get_mut(&peer).map_or(Ok(Vec::new()), |socket| socket.connection.take_fds(count))
    }

    fn owner(&self, peer: PeerId) -> Owner<'_> {
        let found = self.connections.get(&peer);
        Owner {
            socket: found.map(|socket| socket.connection.fd()),
            pid: found.and_then(|socket| socket.pid),
            peer: Some(peer),
            is_beyond: found.is_some_and(|socket| socket.is_beyond),
        }
    }

    fn close(&mut self, peer: PeerId) {
        if let Some(mut socket) = self.connections.remove(&peer)
            && socket.dialing.is_none()
            && socket.broken.is_none()
        {
            // What was said before is sent, as far as the socket takes it.
            let _gone = socket.connection.flush();
        }
        self.unflushed.remove(&peer);
    }

    fn wait(&mut self, deadline: Option<Instant>, now: Instant) -> Wait {
        if self.is_called() || !self.speaking.is_empty() || !self.later.is_empty() {
            return Wait::Busy;
        }
        let mut has_frames = false;
        for socket in self.connections.values_mut() {
            let Some(ring) = &mut socket.ring else { continue };
            ring.sleep();
            has_frames |= ring.has_next(socket.came);
        }
        if has_frames {
            return Wait::Busy;
        }
        self.quiet_since = None;
        let redial = self.connections.values().any(|socket| socket.dialing.is_some()).then(|| now + REDIAL);
        let deaf = self.door.deaf_until.into_iter().chain(self.beyond.as_ref().and_then(|(door, _)| door.deaf_until));
        let at = deadline.into_iter().chain(redial).chain(deaf).min();
        if self.alarm.set(at, now) { Wait::Ready(Arc::clone(&self.poller)) } else { Wait::MustPoll }
    }
}

#[cfg(test)]
mod tests;
