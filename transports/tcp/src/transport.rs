//! One opened device: the state behind [`Transport`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvferry_core::{End, PoolId, PoolLayout, Program, ProgramError, TransferId, UnitRange};
use kvferry_transport::codec::random;
use kvferry_transport::{
    BindError, ConnectError, Direction, Event, Expected, ImportError, NicInfo, Options, PeerId, Pool, PoolKeys,
    PostError, RemotePool, Stage, StagedEvents, Transfer, TransferError, Transport, TransportKind, Wait,
};

use crate::address::{Address, KEY_BYTES, Keys};
use crate::connection::{Bound, Connection, Expectation, Held, Phase, Posted};
use crate::frame::STREAMS_MAX;
use crate::greeting::{Greeting, Hello};
use crate::receiver::Signal;
use crate::socket::{self, Poller};

/// How long a connection may take to be up, and a client to say hello.
pub(crate) const GREETING_WAIT: Duration = Duration::from_secs(5);
/// Expected transfers for each one that may be posted: peers post too.
const EXPECTED_PER_POST: usize = 4;

/// Whose socket a token is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    Listener,
    Greeting,
    Stream(PeerId, usize),
}

/// A network address with its listener and connections.
pub(crate) struct TcpTransport {
    info: NicInfo,
    pub(crate) options: Options,
    pub(crate) listener: TcpListener,
    pub(crate) buffers: Option<usize>,
    pub(crate) own: Address,
    pub(crate) poller: Poller,
    pub(crate) accepting: bool,
    next_token: u64,
    next_peer: u32,
    next_remote: u32,
    pub(crate) places: BTreeMap<u64, Place>,
    pub(crate) greetings: BTreeMap<u64, Greeting>,
    pub(crate) connections: BTreeMap<PeerId, Connection>,
    /// Connections that peers opened, by their instance and number.
    pub(crate) accepted: BTreeMap<([u8; KEY_BYTES], u64), PeerId>,
    pub(crate) pools: BTreeMap<PoolId, Bound>,
    pub(crate) imports: BTreeMap<RemotePool, (PeerId, Keys)>,
    pub(crate) posts: BTreeMap<TransferId, Posted>,
    pub(crate) expected: BTreeMap<TransferId, Expectation>,
    pub(crate) held: BTreeMap<TransferId, Held>,
    /// Streams with work, in turn.
    pub(crate) active: VecDeque<(PeerId, usize)>,
    /// Streams that wait for a device.
    pub(crate) staging: BTreeSet<(PeerId, usize)>,
    /// Events that wait for one, in order.
    pub(crate) deferred: StagedEvents,
    /// What happened since the last poll.
    pub(crate) events: Vec<Event>,
    pub(crate) signals: Vec<Signal>,
    /// No deadline passes before this.
    pub(crate) next_deadline: Option<Instant>,
    pub(crate) armed: Option<Instant>,
}

impl TcpTransport {
    pub(crate) fn open(
        info: NicInfo,
        ip: IpAddr,
        options: Options,
        buffers: Option<usize>,
    ) -> Result<TcpTransport, (&'static str, io::Error)> {
        let listener = TcpListener::bind((ip, 0)).map_err(|error| ("listening on its address", error))?;
        listener.set_nonblocking(true).map_err(|error| ("making its listener non-blocking", error))?;
        // Accepted sockets inherit the sizes.
        socket::size_buffers(&listener, buffers).map_err(|error| ("sizing its socket buffers", error))?;
        let local = listener.local_addr().map_err(|error| ("asking for its port", error))?;
        let poller = Poller::new().map_err(|error| ("creating an epoll descriptor", error))?;
        poller.watch(&listener, 0).map_err(|error| ("watching its listener", error))?;
        let secret = || random::<KEY_BYTES>().map_err(|error| ("drawing a session key", error));
        let own = Address { ip, port: local.port(), key: secret()?, instance: secret()? };
        Ok(TcpTransport {
            info,
            options,
            listener,
            buffers,
            own,
            poller,
            accepting: true,
            next_token: 1,
            next_peer: 1,
            next_remote: 1,
            places: BTreeMap::from([(0, Place::Listener)]),
            greetings: BTreeMap::new(),
            connections: BTreeMap::new(),
            accepted: BTreeMap::new(),
            pools: BTreeMap::new(),
            imports: BTreeMap::new(),
            posts: BTreeMap::new(),
            expected: BTreeMap::new(),
            held: BTreeMap::new(),
            active: VecDeque::new(),
            staging: BTreeSet::new(),
            deferred: StagedEvents::default(),
            events: Vec::new(),
            signals: Vec::new(),
            next_deadline: None,
            armed: None,
        })
    }

    pub(crate) fn new_token(&mut self, place: Place) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.places.insert(token, place);
        token
    }

    pub(crate) fn new_peer(&mut self) -> PeerId {
        let peer = PeerId(self.next_peer);
        self.next_peer = self.next_peer.wrapping_add(1);
        peer
    }

    pub(crate) fn note_deadline(&mut self, deadline: Instant) {
        self.next_deadline = Some(self.next_deadline.map_or(deadline, |earlier| earlier.min(deadline)));
    }

    fn check(
        &self,
        id: TransferId,
        program: &Program,
        range: UnitRange,
        end: End,
        layout: &PoolLayout,
    ) -> Result<(), PostError> {
        let wrong = |source| PostError::Program { id, source };
        program.validate(end, layout).map_err(wrong)?;
        let units = program.units();
        if range.start > range.end || range.end > units {
            return Err(wrong(ProgramError::TooMany {
                what: "units",
                value: range.end.max(range.start),
                limit: units,
            }));
        }
        Ok(())
    }

    /// Opens one stream of a new connection.
    fn open_stream(&mut self, peer: PeerId, address: SocketAddr, hello: Hello, deadline: Instant) -> io::Result<u64> {
        // From a loopback device every address of this host can be reached, from others only by that device.
        let from = (!self.own.ip.is_loopback() && self.own.ip.is_ipv4() == address.is_ipv4()).then_some(self.own.ip);
        let socket = socket::start_connect(address, from, self.buffers)?;
        let token = self.new_token(Place::Greeting);
        if let Err(error) = self.poller.watch(&socket, token) {
            self.places.remove(&token);
            return Err(error);
        }
        self.greetings.insert(token, Greeting::initiator(socket, peer, &hello, deadline));
        Ok(token)
    }
}

impl Transport for TcpTransport {
    fn info(&self) -> &NicInfo {
        &self.info
    }

    fn address(&self) -> Bytes {
        self.own.seal()
    }

    fn bind(&mut self, pool: &Pool) -> Result<PoolKeys, BindError> {
        if self.pools.contains_key(&pool.id()) {
            return Err(BindError::Duplicate(pool.id()));
        }
        let stage = pool.device().map(|_| Stage::open(pool, &self.options)).transpose();
        let stage = stage.map_err(|reason| BindError::Unsupported { pool: pool.id(), reason })?;
        let token = random::<8>().map_err(|error| BindError::Unsupported {
            pool: pool.id(),
            reason: format!("no random token could be drawn ({error}); try again"),
        })?;
        let token = u64::from_le_bytes(token);
        let layout = Arc::new(pool.layout().clone());
        self.pools.insert(pool.id(), Bound { pool: pool.clone(), layout, token, stage });
        Ok(PoolKeys(Keys { pool: pool.id(), token }.seal()))
    }

    fn unbind(&mut self, pool: PoolId) {
        self.withdraw(pool);
    }

    fn connect(&mut self, address: &[u8]) -> Result<PeerId, ConnectError> {
        let kind = TransportKind::Tcp;
        let address: Address = Address::open(address).map_err(|reason| ConnectError::BadAddress { kind, reason })?;
        let failed = |source| ConnectError::Io { context: "opening a stream", source };
        let number = random::<8>().map_err(|source| ConnectError::Io { context: "drawing a number", source })?;
        let count = (self.options.streams_per_peer as usize).clamp(1, STREAMS_MAX);
        let deadline = Instant::now() + GREETING_WAIT;
        let peer = self.new_peer();
        let mut connection = Connection::new(address.instance, count, deadline);
        for index in 0..count {
            let hello = Hello {
                key: address.key,
                instance: self.own.instance,
                connection: u64::from_le_bytes(number),
                index: index as u16,
                count: count as u16,
            };
            match self.open_stream(peer, address.socket(), hello, deadline) {
                Ok(token) => connection.tokens.push(token),
                Err(error) => {
                    for token in connection.tokens {
                        self.places.remove(&token);
                        self.greetings.remove(&token);
                    }
                    return Err(failed(error));
                }
            }
        }
        self.connections.insert(peer, connection);
        self.note_deadline(deadline);
        Ok(peer)
    }

    fn import(&mut self, peer: PeerId, keys: &PoolKeys, layout: &PoolLayout) -> Result<RemotePool, ImportError> {
        if !self.connections.contains_key(&peer) {
            return Err(ImportError::UnknownPeer(peer));
        }
        let kind = TransportKind::Tcp;
        let keys: Keys = Keys::open(&keys.0).map_err(|reason| ImportError::BadKeys { kind, reason })?;
        layout.validate().map_err(|error| ImportError::Layout(error.to_string()))?;
        let remote = RemotePool(self.next_remote);
        self.next_remote = self.next_remote.wrapping_add(1);
        self.imports.insert(remote, (peer, keys));
        Ok(remote)
    }

    fn expect(&mut self, expected: Expected) -> Result<(), PostError> {
        let id = expected.id;
        if self.expected.contains_key(&id) || self.deferred.is_ending(id) {
            return Err(PostError::Duplicate(id));
        }
        if self.expected.len() >= self.options.transfers_max.saturating_mul(EXPECTED_PER_POST) {
            return Err(PostError::Full);
        }
        let local = self.pools.get(&expected.pool).ok_or(PostError::UnknownPool(expected.pool))?.clone();
        self.check(id, &expected.program, expected.range, End::Destination, &local.layout)?;
        let fingerprint = expected.program.fingerprint();
        self.expected.insert(id, Expectation { expected, local, fingerprint, arriving: None });
        if let Some(held) = self.held.remove(&id) {
            self.match_write(held.peer, held.base, held.tag, held.request);
        }
        Ok(())
    }

    fn post(&mut self, transfer: Transfer) -> Result<(), PostError> {
        let Transfer { id, peer, direction, local, remote, program, range, notice } = transfer;
        if self.posts.contains_key(&id) || self.deferred.is_ending(id) {
            return Err(PostError::Duplicate(id));
        }
        let connection = self.connections.get(&peer).ok_or(PostError::UnknownPeer(peer))?;
        if self.posts.len() >= self.options.transfers_max {
            return Err(PostError::Full);
        }
        let up = connection.is_up();
        let local = self.pools.get(&local).ok_or(PostError::UnknownPool(local))?.clone();
        let remote = match self.imports.get(&remote) {
            Some((of, keys)) if *of == peer => *keys,
            _ => return Err(PostError::UnknownRemote(remote)),
        };
        let end = match direction {
            Direction::Pull => End::Destination,
            Direction::Push => End::Source,
        };
        self.check(id, &program, range, end, &local.layout)?;
        let posted = Posted {
            peer,
            tag: 0,
            base: 0,
            direction,
            phase: Phase::Queued,
            local,
            remote,
            program,
            range,
            parts: Vec::new(),
            parts_left: 0,
            pieces: 0,
            notice,
            since: Instant::now(),
        };
        self.posts.insert(id, posted);
        if up {
            self.start(id);
        }
        Ok(())
    }

    fn cancel(&mut self, id: TransferId) {
        self.end_posted(id, TransferError::Cancelled);
        self.end_expected(id, TransferError::Cancelled, "the receiver cancelled it");
    }

    fn fence(&mut self, peer: PeerId) {
        let instance = self.connections.get(&peer).map(|connection| connection.instance);
        let peers: Vec<_> = self
            .connections
            .iter()
            .filter(|(of, connection)| **of == peer || Some(connection.instance) == instance)
            .map(|(of, _)| *of)
            .collect();
        for of in peers {
            self.lose(of, "fenced here");
        }
        self.report_fence(peer);
    }

    fn disconnect(&mut self, peer: PeerId) {
        self.flush(peer);
        self.lose(peer, "disconnected here");
    }

    fn poll(&mut self, events: &mut Vec<Event>) {
        self.serve();
        events.append(&mut self.events);
    }

    fn arm(&mut self) -> Wait {
        self.wake();
        if !self.active.is_empty() || !self.events.is_empty() || self.accepting {
            return Wait::Busy;
        }
        if let Some(is_recent) = self.waits_for_device() {
            return if is_recent { Wait::Busy } else { Wait::MustPoll };
        }
        if self.armed != self.next_deadline {
            let now = Instant::now();
            let delay = self.next_deadline.map(|deadline| deadline.saturating_duration_since(now));
            if self.poller.wake_after(delay).is_err() {
                return Wait::MustPoll;
            }
            self.armed = self.next_deadline;
        }
        Wait::Ready(self.poller.fd())
    }
}
