//! The device of kvferry's own transports that carries programs between agents of ours.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvferry_core::{Direction, PoolId, Program, TransferId};
use kvferry_transport::{
    Event, Expected, NicInfo, PeerId, Pool, PoolKeys, PostError, RemotePool, Transfer, Transport, Wait,
};

use super::flight::Start;
use super::{Driver, Reply, now, remote};
use crate::agent::{Moved, PeerKind};
use crate::error::AgentError;
use crate::ours::ToldNic;
use crate::{Expect, Fetch, Push, Ticket};

/// What was told to stop and has not ended by then is ended by force: the connection with it.
const FENCE_AFTER: Duration = Duration::from_secs(1);

/// Why a program does not move.
const NO_NIC: &str = "this agent has no device for programs; start it with Agent::start_with";

/// The device, and what moves through it.
pub(crate) struct Ferry {
    nic: Box<dyn Transport>,
    /// Keys of bound pools.
    pools: BTreeMap<PoolId, Bytes>,
    /// Who waits for a pool to be untouched.
    unbinding: BTreeMap<PoolId, Reply<()>>,
    /// Connections, by the peer's name.
    peers: BTreeMap<String, Connection>,
    /// Transfers that this side began.
    begun: BTreeMap<TransferId, Begun>,
    /// Those for which there was no room.
    full: VecDeque<Transfer>,
    /// Pushes that may come.
    expected: BTreeMap<TransferId, Expectation>,
}

struct Connection {
    peer: PeerId,
    /// With the keys that they were imported by.
    pools: BTreeMap<PoolId, (Bytes, RemotePool)>,
}

/// A transfer that the device has.
struct Begun {
    flight: u64,
    peer: PeerId,
    /// When it is ended by force, once it was told to stop.
    fence_at: Option<Instant>,
}

struct Expectation {
    started: Instant,
    deadline: Instant,
    /// Why it ends, once it was told to.
    doomed: Option<AgentError>,
    reply: Reply<Moved>,
}

impl Ferry {
    pub(super) fn new(nic: Box<dyn Transport>) -> Ferry {
        Ferry {
            nic,
            pools: BTreeMap::new(),
            unbinding: BTreeMap::new(),
            peers: BTreeMap::new(),
            begun: BTreeMap::new(),
            full: VecDeque::new(),
            expected: BTreeMap::new(),
        }
    }

    pub(super) fn told(&self) -> ToldNic {
        let NicInfo { kind, device, host, .. } = self.nic.info().clone();
        ToldNic { kind, device, host, address: self.nic.address() }
    }

    /// Whether programs can move between this device and a peer's; by what, or why not.
    pub(super) fn reaches(&self, there: &ToldNic) -> Result<String, String> {
        let here = self.nic.info();
        if here.kind != there.kind {
            return Err(format!("this agent has {} and the peer {}; give both one kind", here.kind, there.kind));
        }
        if here.host != there.host {
            return Err(format!("{} {} reaches its own host only, and the peer is on another", here.kind, here.device));
        }
        Ok(format!("{} by {} here and {} there", here.kind, here.device, there.device))
    }

    pub(super) fn bind(&mut self, pool: &Pool) -> Result<(), String> {
        let keys = self.nic.bind(pool).map_err(|error| error.to_string())?;
        self.pools.insert(pool.id(), keys.0);
        Ok(())
    }

    pub(super) fn keys(&self, pool: PoolId) -> Option<Bytes> {
        self.pools.get(&pool).cloned()
    }

    /// Withdraws a pool, and answers once nothing touches it any more.
    pub(super) fn unbind(&mut self, pool: PoolId, reply: Reply<()>) {
        if self.pools.remove(&pool).is_none() {
            return drop(reply.send(Ok(())));
        }
        self.unbinding.insert(pool, reply);
        self.nic.unbind(pool);
    }

    /// Whether a pool of that number is being withdrawn.
    pub(super) fn is_unbinding(&self, pool: PoolId) -> bool {
        self.unbinding.contains_key(&pool)
    }

    /// Whether nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.begun.is_empty() && self.expected.is_empty()
    }

    /// The peer's pool, as this device names it.
    fn import(
        &mut self,
        name: &str,
        kind: &PeerKind,
        nic: &ToldNic,
        pool: PoolId,
    ) -> Result<(PeerId, RemotePool), String> {
        let PeerKind::Kvferry(told) = kind else {
            return Err("it is a NIXL agent, which knows no programs".to_owned());
        };
        if !self.peers.contains_key(name) {
            let peer = self.nic.connect(&nic.address).map_err(|error| error.to_string())?;
            self.peers.insert(name.to_owned(), Connection { peer, pools: BTreeMap::new() });
        }
        let connection = self.peers.get_mut(name).ok_or("there is no connection")?;
        let untold = || format!("it has not told of its {pool}; add its newer metadata");
        let told = told.pools.iter().find(|told| told.id == pool).ok_or_else(untold)?;
        let keys = told.keys.clone().ok_or_else(untold)?;
        if let Some((by, known)) = connection.pools.get(&pool)
            && *by == keys
        {
            return Ok((connection.peer, *known));
        }
        let remote = self.nic.import(connection.peer, &PoolKeys(keys.clone()), &told.layout);
        let remote = remote.map_err(|error| error.to_string())?;
        connection.pools.insert(pool, (keys, remote));
        Ok((connection.peer, remote))
    }

    /// Hands a transfer to the device, or keeps it until there is room.
    fn post(&mut self, flight: u64, transfer: Transfer) -> Result<(), String> {
        let (id, peer) = (transfer.id, transfer.peer);
        if self.begun.contains_key(&id) || self.expected.contains_key(&id) {
            return Err(format!("{id} is under way already; each transfer needs a name of its own"));
        }
        match self.nic.post(transfer.clone()) {
            Ok(()) => {}
            Err(PostError::Full) => self.full.push_back(transfer),
            Err(error) => return Err(error.to_string()),
        }
        self.begun.insert(id, Begun { flight, peer, fence_at: None });
        Ok(())
    }

    /// Tells a transfer to stop; it ends by an event. Those that the device never had end at once: their flights.
    pub(super) fn stop(&mut self, id: TransferId) -> Option<u64> {
        let begun = self.begun.get_mut(&id)?;
        if self.full.iter().any(|waiting| waiting.id == id) {
            let flight = begun.flight;
            self.full.retain(|waiting| waiting.id != id);
            self.begun.remove(&id);
            return Some(flight);
        }
        if begun.fence_at.is_none() {
            begun.fence_at = Some(now() + FENCE_AFTER);
            self.nic.cancel(id);
        }
        None
    }

    /// Lets a peer go; what moves to or from it ends by events.
    pub(super) fn disconnect(&mut self, name: &str) {
        if let Some(connection) = self.peers.remove(name) {
            self.nic.disconnect(connection.peer);
        }
    }

    /// How to wait for what comes next.
    pub(super) fn arm(&mut self) -> Wait {
        self.nic.arm()
    }

    /// The next moment at which something is to be done.
    pub(super) fn due(&self) -> Option<Instant> {
        let fences = self.begun.values().filter_map(|begun| begun.fence_at);
        let deadlines = self.expected.values().filter(|expected| expected.doomed.is_none());
        fences.chain(deadlines.map(|expected| expected.deadline)).min()
    }

    /// Ends by force what was told to stop long ago, and expectations whose time is up or whose caller is gone.
    pub(super) fn expire(&mut self, now: Instant) {
        let late = |begun: &&mut Begun| begun.fence_at.is_some_and(|at| at <= now);
        for begun in self.begun.values_mut().filter(late) {
            begun.fence_at = Some(now + FENCE_AFTER);
            self.nic.fence(begun.peer);
        }
        for (id, expected) in self.expected.iter_mut().filter(|(_, expected)| expected.doomed.is_none()) {
            let waited_ms = now.saturating_duration_since(expected.started).as_millis() as u64;
            if expected.deadline <= now {
                expected.doomed = Some(AgentError::Unsent { id: *id, waited_ms });
            } else if expected.reply.is_closed() {
                expected.doomed = Some(AgentError::Gone);
            } else {
                continue;
            }
            self.nic.cancel(*id);
        }
    }

    /// Ends everything, as the agent does.
    pub(super) fn leave(&mut self) {
        let names: Vec<String> = self.peers.keys().cloned().collect();
        names.iter().for_each(|name| self.disconnect(name));
        for (id, expected) in self.expected.iter_mut().filter(|(_, expected)| expected.doomed.is_none()) {
            expected.doomed = Some(AgentError::Gone);
            self.nic.cancel(*id);
        }
    }

    fn expect(&mut self, expect: Expect, within: Duration, reply: Reply<Moved>) {
        let Expect { id, pool, program, .. } = expect;
        let range = program.whole();
        if self.begun.contains_key(&id) {
            let error = format!("{id} is under way already; each transfer needs a name of its own");
            return drop(reply.send(Err(AgentError::Program(error))));
        }
        if let Err(error) = self.nic.expect(Expected { from: None, id, pool, program, range }) {
            return drop(reply.send(Err(AgentError::Program(error.to_string()))));
        }
        let started = now();
        let deadline = started + within;
        self.expected.insert(id, Expectation { started, deadline, doomed: None, reply });
    }

    fn arrived(&mut self, id: TransferId, result: Result<(u64, u64), String>) {
        let Some(Expectation { started, doomed, reply, .. }) = self.expected.remove(&id) else { return };
        let took = now().saturating_duration_since(started);
        let answer = match (result, doomed) {
            (Ok((bytes, operations)), _) => Ok(Moved { bytes, operations, took, confirmed: false }),
            (Err(_), Some(error)) => Err(error),
            (Err(reason), None) => Err(AgentError::Refused { id, reason }),
        };
        let _nobody_waits = reply.send(answer);
    }
}

impl Driver {
    pub(super) fn fetch(&mut self, fetch: Fetch, reply: Reply<Moved>) {
        let Fetch { peer, from, to, program, lease, notification, within } = fetch;
        let id = TransferId(u128::from(self.incarnation) << 64 | u128::from(self.number()));
        let start = Start { peer, lease, tickets: Vec::new(), confirmed: true, notification, within };
        self.ferry_program(start, (id, Direction::Pull), (to, from), program, reply);
    }

    pub(super) fn push(&mut self, push: Push, reply: Reply<Moved>) {
        let Push { peer, id, from, to, program, notification, within } = push;
        // The receiver says itself that it has it.
        let start = Start { peer, lease: None, tickets: Vec::new(), confirmed: false, notification, within };
        self.ferry_program(start, (id, Direction::Push), (from, to), program, reply);
    }

    pub(super) fn expect(&mut self, expect: Expect, reply: Reply<Moved>) {
        let within = self.limit(expect.within);
        match &mut self.ferry {
            Some(ferry) => ferry.expect(expect, within, reply),
            None => drop(reply.send(Err(AgentError::Program(NO_NIC.to_owned())))),
        }
    }

    fn ferry_program(
        &mut self,
        mut start: Start,
        (id, direction): (TransferId, Direction),
        (local, there): (PoolId, PoolId),
        program: Arc<Program>,
        reply: Reply<Moved>,
    ) {
        let checked = self.check_start(&start.peer, start.lease, start.notification.as_ref());
        let found = checked.and_then(|()| self.way(&start.peer, there, &mut start.tickets, direction));
        let (peer, remote) = match found {
            Ok(found) => found,
            Err(error) => return drop(reply.send(Err(error))),
        };
        // By which tickets are read and the peer is told.
        if let Err(error) = self.connect(&start.peer) {
            return drop(reply.send(Err(error)));
        }
        let range = program.whole();
        let transfer = Transfer { id, peer, direction, local, remote, program, range, notice: None };
        let flight = self.number();
        let posted = self.ferry.as_mut().map_or_else(|| Err(NO_NIC.to_owned()), |ferry| ferry.post(flight, transfer));
        match posted {
            Ok(()) => self.begin_ferried(flight, id, start, reply),
            Err(reason) => drop(reply.send(Err(AgentError::Program(reason)))),
        }
    }

    /// The peer's pool as the device names it. What is pulled is confirmed to have been registered throughout.
    fn way(
        &mut self,
        name: &str,
        pool: PoolId,
        tickets: &mut Vec<Ticket>,
        direction: Direction,
    ) -> Result<(PeerId, RemotePool), AgentError> {
        let remote = self.peers.get(name).ok_or_else(|| remote::unknown(name))?;
        let refuse = |reason: String| AgentError::Peer { name: name.to_owned(), reason };
        let ferry = self.ferry.as_mut().ok_or_else(|| refuse(NO_NIC.to_owned()))?;
        let nic =
            remote.nic().ok_or_else(|| refuse("it has no device for programs; read or write pieces".to_owned()))?;
        ferry.reaches(nic).map_err(refuse)?;
        let found = ferry.import(name, &remote.kind, nic, pool).map_err(refuse)?;
        if direction == Direction::Pull {
            tickets.extend(remote.ticket_of(pool));
        }
        Ok(found)
    }

    /// Drives the device; false when nothing happened.
    pub(super) fn ferry_step(&mut self) -> bool {
        let Some(ferry) = &mut self.ferry else { return false };
        let mut events = Vec::new();
        ferry.nic.poll(&mut events);
        let mut active = !events.is_empty();
        let (mut waiting, mut refused) = (std::mem::take(&mut ferry.full), Vec::new());
        while let Some(transfer) = waiting.pop_front() {
            match ferry.nic.post(transfer.clone()) {
                Ok(()) => {}
                Err(PostError::Full) => {
                    waiting.push_front(transfer);
                    break;
                }
                Err(error) => refused.push((transfer.id, error.to_string())),
            }
            active = true;
        }
        ferry.full = waiting;
        for (id, reason) in refused {
            self.ferried(id, Err(reason));
        }
        for event in events {
            self.ferry_event(event);
        }
        active
    }

    fn ferry_event(&mut self, event: Event) {
        let Some(ferry) = &mut self.ferry else { return };
        // Connections are made at their first use; nothing waits for a proof but what fails with it.
        match event {
            Event::Completed { id, bytes, pieces } => self.ferried(id, Ok((bytes, pieces))),
            Event::Arrived { id, bytes, pieces } => ferry.arrived(id, Ok((bytes, pieces))),
            Event::Failed { id, error } => {
                ferry.arrived(id, Err(error.to_string()));
                self.ferried(id, Err(error.to_string()));
            }
            // Its transfers fail one by one; the next one connects again.
            Event::PeerLost { peer, reason } => {
                tracing::debug!(?peer, reason, "a connection for programs is gone");
                ferry.peers.retain(|_, connection| connection.peer != peer);
            }
            Event::Unbound { pool } => {
                if let Some(reply) = ferry.unbinding.remove(&pool) {
                    let _nobody_waits = reply.send(Ok(()));
                }
            }
            Event::Connected { .. } | Event::Shown { .. } | Event::Notice { .. } | Event::Fenced { .. } => {}
        }
    }

    /// The device is done with a transfer.
    fn ferried(&mut self, id: TransferId, result: Result<(u64, u64), String>) {
        let begun = self.ferry.as_mut().and_then(|ferry| ferry.begun.remove(&id));
        if let Some(begun) = begun {
            self.ferried_flight(begun.flight, result);
        }
    }
}
