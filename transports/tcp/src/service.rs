//! One poll: what is ready, what is late, who is new, and the streams in turn.

use std::io::ErrorKind;
use std::time::Instant;

use kvferry_transport::{Event, PeerId};

use crate::connection::Connection;
use crate::frame::Refusal;
use crate::greeting::{Greeting, Hello, Progress, Role};
use crate::transport::{GREETING_WAIT, Place, TcpTransport};

/// Sockets that have not said hello; a newer one replaces the oldest.
const GREETINGS_MAX: usize = 256;
/// Connections that peers may have open here.
const ACCEPTED_MAX: usize = 4096;
/// Sockets accepted in one poll.
const ACCEPTS_PER_POLL: usize = 32;
/// Bytes that a stream may move before it is the next one's turn.
const TURN_BYTES: u64 = 1 << 20;
/// Bytes sent at a disconnect, without waiting: acknowledgements and notices.
const FLUSH_BYTES: u64 = 256 << 10;

impl TcpTransport {
    /// Makes progress; bounded by [`kvferry_transport::Options::poll_bytes_max`].
    pub(crate) fn serve(&mut self) {
        let mut ready = Vec::new();
        if let Err(error) = self.poller.ready(&mut ready) {
            tracing::error!(%error, "epoll failed");
        }
        for edge in ready {
            match self.places.get(&edge.token) {
                Some(Place::Listener) => self.accepting = true,
                Some(Place::Greeting) => self.greet(edge.token),
                Some(&Place::Stream(peer, index)) => {
                    if let Some(stream) = self.stream(peer, index) {
                        stream.ready(edge.readable, edge.writable, edge.closing);
                        self.schedule(peer, index);
                    }
                }
                // The timer, or a socket that went meanwhile.
                None => {}
            }
        }
        self.attend();
        if self.accepting {
            self.accept();
        }
        if let Some(deadline) = self.next_deadline {
            let now = Instant::now();
            if deadline <= now {
                self.expire(now);
            }
        }
        self.take_turns();
    }

    fn take_turns(&mut self) {
        let mut budget = self.options.poll_bytes_max.max(1);
        let mut signals = std::mem::take(&mut self.signals);
        while budget > 0
            && let Some((peer, index)) = self.active.pop_front()
        {
            let turn = budget.min(TURN_BYTES);
            let Some(stream) = self.stream(peer, index) else {
                continue;
            };
            stream.scheduled = false;
            let received = stream.receive(turn, &mut signals);
            // What came before the end of a connection still counts.
            let mut moved = self.settle(peer, index, received, &mut signals);
            if let Some(stream) = self.stream(peer, index) {
                let sent = stream.send(turn, &mut signals);
                moved += self.settle(peer, index, sent, &mut signals);
            }
            self.schedule(peer, index);
            budget = budget.saturating_sub(moved.max(1));
        }
        self.signals = signals;
    }

    /// Acts on what a stream said, then on its failure.
    fn settle(
        &mut self,
        peer: PeerId,
        index: usize,
        outcome: Result<u64, String>,
        signals: &mut Vec<crate::receiver::Signal>,
    ) -> u64 {
        let mut fault = None;
        for signal in signals.drain(..) {
            if fault.is_none() {
                fault = self.dispatch(peer, index, signal).err();
            }
        }
        let (moved, failure) = match outcome {
            Ok(moved) => (moved, fault),
            Err(reason) => (0, Some(fault.unwrap_or(reason))),
        };
        if let Some(reason) = failure {
            self.drop_peer(peer, reason);
        }
        moved
    }

    /// Takes a connection down that failed, and says so.
    pub(crate) fn drop_peer(&mut self, peer: PeerId, reason: String) {
        if self.connections.contains_key(&peer) {
            self.lose(peer, &reason);
            self.events.push(Event::PeerLost { peer, reason });
        }
    }

    pub(crate) fn stream(&mut self, peer: PeerId, index: usize) -> Option<&mut crate::stream::Stream> {
        self.connections.get_mut(&peer)?.streams.get_mut(index)
    }

    /// Gives a stream a turn if it has work.
    pub(crate) fn schedule(&mut self, peer: PeerId, index: usize) {
        let Some(stream) = self.stream(peer, index) else {
            return;
        };
        let has_work = !stream.scheduled && stream.has_work();
        stream.scheduled |= has_work;
        if stream.is_staging() {
            self.staging.insert((peer, index));
        }
        if has_work {
            self.active.push_back((peer, index));
        }
    }

    /// Sends what can be sent at once: the last words before a disconnect.
    pub(crate) fn flush(&mut self, peer: PeerId) {
        let Some(connection) = self.connections.get_mut(&peer) else {
            return;
        };
        let tags: Vec<_> = connection.reads.keys().copied().collect();
        for tag in tags {
            connection.drop_transfer((crate::stream::Flow::Pull, tag), true);
        }
        let mut unheard = Vec::new();
        for stream in &mut connection.streams {
            // It is closed next: a failure changes nothing.
            let _ = stream.send(FLUSH_BYTES, &mut unheard);
        }
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTS_PER_POLL {
            let socket = match self.listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted | ErrorKind::ConnectionAborted => continue,
                    ErrorKind::WouldBlock => {
                        self.accepting = false;
                        return;
                    }
                    _ => {
                        // Out of descriptors or memory: those that wait are taken at the next arrival or when one closes.
                        tracing::warn!(%error, "a connection was not accepted");
                        self.accepting = false;
                        return;
                    }
                },
            };
            if socket.set_nonblocking(true).is_err() || socket.set_nodelay(true).is_err() {
                continue;
            }
            let acceptors = self.greetings.iter().filter(|(_, greeting)| greeting.role == Role::Acceptor);
            if acceptors.clone().count() >= GREETINGS_MAX
                && let Some(oldest) = acceptors.map(|(token, _)| *token).next()
            {
                self.forget_greeting(oldest);
            }
            let token = self.new_token(Place::Greeting);
            if self.poller.watch(&socket, token).is_err() {
                self.places.remove(&token);
                continue;
            }
            let deadline = Instant::now() + GREETING_WAIT;
            self.note_deadline(deadline);
            self.greetings.insert(token, Greeting::acceptor(socket, deadline));
            self.greet(token);
        }
    }

    fn forget_greeting(&mut self, token: u64) -> Option<Greeting> {
        self.places.remove(&token);
        self.greetings.remove(&token)
    }

    fn greet(&mut self, token: u64) {
        let Some(greeting) = self.greetings.get_mut(&token) else {
            return;
        };
        let role = greeting.role;
        match (greeting.advance(&self.own.key), role) {
            (Ok(Progress::Waiting), _) => {}
            (Ok(Progress::Heard(hello)), _) => self.heard(token, hello),
            (Ok(Progress::Admitted), Role::Initiator(peer, index)) => self.admitted(token, peer, index),
            (Ok(Progress::Admitted), Role::Acceptor) | (Err(_), Role::Acceptor) => {
                self.forget_greeting(token);
            }
            (Err(reason), Role::Initiator(peer, _)) => self.drop_peer(peer, reason),
        }
    }

    /// Lets an authenticated stream in.
    fn heard(&mut self, token: u64, hello: Hello) {
        let Some(mut greeting) = self.forget_greeting(token) else {
            return;
        };
        let name = (hello.instance, hello.connection);
        let known = self.accepted.get(&name).copied();
        let fits = match known.and_then(|peer| self.connections.get(&peer)) {
            Some(connection) => {
                let slot = connection.arriving.get(usize::from(hello.index));
                connection.arriving.len() == usize::from(hello.count) && slot.is_some_and(Option::is_none)
            }
            None => self.accepted.len() < ACCEPTED_MAX,
        };
        if !fits {
            greeting.refuse();
            return;
        }
        if greeting.admit().is_err() {
            return;
        }
        let peer = known.unwrap_or_else(|| {
            let peer = self.new_peer();
            let mut connection = Connection::new(hello.instance, usize::from(hello.count), greeting.deadline);
            connection.accepted_as = Some(name);
            self.connections.insert(peer, connection);
            self.accepted.insert(name, peer);
            peer
        });
        self.place(token, peer, hello.index, greeting);
        if let Some(connection) = self.connections.get_mut(&peer) {
            connection.tokens.push(token);
        }
        if self.join(peer) {
            self.connected(peer);
        }
    }

    fn connected(&mut self, peer: PeerId) {
        self.events.push(Event::Connected { peer });
        if let Some(connection) = self.connections.get(&peer) {
            self.events.push(Event::Shown { peer, evidence: Box::new(connection.evidence()) });
        }
    }

    fn admitted(&mut self, token: u64, peer: PeerId, index: u16) {
        let Some(greeting) = self.forget_greeting(token) else {
            return;
        };
        self.place(token, peer, index, greeting);
        if self.join(peer) {
            self.connected(peer);
            let queued: Vec<_> = self.posts.iter().filter(|(_, p)| p.peer == peer).map(|(id, _)| *id).collect();
            for id in queued {
                self.start(id);
            }
        }
    }

    fn place(&mut self, token: u64, peer: PeerId, index: u16, greeting: Greeting) {
        self.places.insert(token, Place::Stream(peer, usize::from(index)));
        if let Some(connection) = self.connections.get_mut(&peer) {
            connection.admit(index, greeting.socket);
        }
    }

    /// Starts the streams of a connection that has become complete.
    fn join(&mut self, peer: PeerId) -> bool {
        let Some(connection) = self.connections.get(&peer).filter(|connection| connection.is_up()) else {
            return false;
        };
        for index in 0..connection.streams.len() {
            self.schedule(peer, index);
        }
        true
    }

    /// Ends what is late and finds the next deadline.
    fn expire(&mut self, now: Instant) {
        let late: Vec<_> = self
            .greetings
            .iter()
            .filter(|(_, greeting)| greeting.role == Role::Acceptor && greeting.deadline <= now)
            .map(|(token, _)| *token)
            .collect();
        for token in late {
            self.forget_greeting(token);
        }
        let is_late = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= now);
        let late: Vec<_> =
            self.connections.iter().filter(|(_, c)| is_late(c.deadline)).map(|(peer, _)| *peer).collect();
        for peer in late {
            let seconds = GREETING_WAIT.as_secs();
            self.drop_peer(peer, format!("no connection within {seconds} s; check that its address is reachable"));
        }
        let late: Vec<_> = self.held.iter().filter(|(_, held)| held.deadline <= now).map(|(id, _)| *id).collect();
        for id in late {
            if let Some(held) = self.held.remove(&id) {
                if let Some(connection) = self.connections.get_mut(&held.peer) {
                    connection.writes.remove(&held.tag);
                }
                let wait = self.options.unexpected_wait_ms;
                let words = format!("{id} was not expected within {wait} ms; expect it before it is pushed");
                self.refuse(held.peer, held.base, held.tag, &Refusal::text(words));
            }
        }
        let greetings = self.greetings.values().map(|greeting| greeting.deadline);
        let connections = self.connections.values().filter_map(|connection| connection.deadline);
        let held = self.held.values().map(|held| held.deadline);
        self.next_deadline = greetings.chain(connections).chain(held).min();
    }
}
