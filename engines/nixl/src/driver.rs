//! The agent's thread: it owns the UCX worker, and every peer and transfer.

mod board;
mod confirming;
mod ferry;
mod flight;
mod remote;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvferry_core::PoolId;
use kvferry_transport::{Pool, Wait};
use kvferry_ucx::raw::{Ending, RawEvent, RawMemory, RawWait, RawWorker};
use tokio::sync::oneshot;

use crate::agent::{Moved, Peer, Queue};
use crate::metadata::{AgentMetadata, Connection, MemoryKind, Range, Section};
use crate::ours::{OURS, Ours, SLOTS, ToldBoard, ToldPool};
use crate::wake::Wake;
use crate::{AgentConfig, AgentError, Expect, Fetch, Notification, OpenNic, Push, Ticket, Transfer};
use board::Board;
use ferry::Ferry;
use flight::{Flight, Posted};
use remote::Remote;

/// NIXL's name of its UCX backend.
pub(super) const UCX: &str = "UCX";
/// Steps of UCX without a look at commands and deadlines.
const STEPS: usize = 64;
/// Longest time for what has happened, and for copies of one peer, before commands and deadlines are looked at again.
pub(super) const TURN: Duration = Duration::from_millis(2);
/// How long the thread keeps looking after something happened, before it sleeps.
const SPIN: Duration = Duration::from_micros(50);
/// It never sleeps longer: UCX asks silent peers whether they live while it is driven.
const NAP: Duration = Duration::from_millis(200);
/// Where UCX cannot wake it.
const DOZE: Duration = Duration::from_micros(200);
/// How long a peer may take at the end for what was said to it last.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long connections may take to close at the end.
const FAREWELL: Duration = Duration::from_secs(5);

pub(crate) type Reply<T> = oneshot::Sender<Result<T, AgentError>>;

/// What an agent is asked for.
pub(crate) enum Command {
    Register { pool: Pool, reply: Reply<()> },
    Deregister { pool: PoolId, reply: Reply<()> },
    Metadata { pools: Option<(Vec<PoolId>, bool)>, reply: Reply<Bytes> },
    AddPeer { metadata: Bytes, reply: Reply<Peer> },
    Connect { peer: String, within: Option<Duration>, reply: Reply<Moved> },
    RemovePeer { name: String, reply: Reply<()> },
    Transfer { transfer: Transfer, reply: Reply<Moved> },
    Fetch { fetch: Fetch, reply: Reply<Moved> },
    Push { push: Push, reply: Reply<Moved> },
    Expect { expect: Expect, reply: Reply<Moved> },
    Lend { reply: Reply<Ticket> },
    EndLease { ticket: Ticket, reply: Option<Reply<()>> },
    Notify { peer: String, message: Bytes, within: Option<Duration>, reply: Reply<Moved> },
    Shutdown { done: Option<oneshot::Sender<()>>, ending: Ending },
}

/// What the thread knows.
pub(super) struct Driver {
    pub(super) worker: RawWorker,
    pub(super) name: String,
    pub(super) incarnation: u64,
    /// How often memory was registered or deregistered.
    edition: u64,
    extension: Bytes,
    pub(super) in_flight_max: usize,
    pub(super) peers_bytes_max: usize,
    pub(super) within: Duration,
    queue: Arc<Queue>,
    dropped: u64,
    pub(super) pools: BTreeMap<PoolId, Rc<RawMemory>>,
    /// What registrations are confirmed by.
    registrations: BTreeMap<PoolId, Ticket>,
    pub(super) board: Board,
    /// Transfers for whose answers there was no room on it.
    pub(super) unconfirmed: Vec<u64>,
    /// What carries programs.
    pub(super) ferry: Option<Ferry>,
    pub(super) peers: BTreeMap<String, Remote>,
    /// Names of peers by the number of their connection.
    pub(super) connections: BTreeMap<u64, String>,
    pub(super) flights: BTreeMap<u64, Flight>,
    /// Operations that UCX holds.
    pub(super) operations: BTreeMap<u64, Posted>,
    /// Connections that UCX has not given up yet.
    pub(super) closing: BTreeSet<u64>,
    /// Who waits for a peer to be gone, and transfers of it that have something in flight.
    pub(super) leaving: Vec<(BTreeSet<u64>, Reply<()>)>,
    /// What ended inside a call.
    pub(super) at_once: VecDeque<RawEvent>,
    /// Peers whose turn was over before everything was begun that could be.
    pub(super) resume: BTreeSet<String>,
    next: u64,
}

/// Runs an agent until it is shut down.
pub(crate) fn run(
    config: AgentConfig,
    nic: Option<OpenNic>,
    commands: mpsc::Receiver<Command>,
    wake: &Wake,
    queue: Arc<Queue>,
    ready: Reply<(String, String)>,
) {
    // However this thread ends, nobody waits for another notification.
    let _end = End(queue.clone());
    let mut driver = match Driver::open(config, nic, queue) {
        Ok(driver) => driver,
        Err(error) => return drop(ready.send(Err(error))),
    };
    let (path, version) = driver.worker.library();
    if ready.send(Ok((driver.name.clone(), format!("{path} {version}")))).is_err() {
        return;
    }
    // Held until everything of UCX's is gone.
    let (mut done, _ending) = driver.serve(&commands, wake);
    driver.say_farewell(wake);
    if !driver.is_idle() {
        tracing::warn!(transfers = driver.flights.len(), "UCX still holds operations; their memory stays registered");
        if let Some(done) = done.take() {
            let _nobody_waits = done.send(());
        }
        // Their callers are answered once nothing of them touches memory.
        while !driver.is_idle() {
            if !driver.step() {
                wake.wait([None, None], NAP);
            }
        }
    }
    drop(driver);
    if let Some(done) = done {
        let _nobody_waits = done.send(());
    }
}

struct End(Arc<Queue>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl Driver {
    fn open(config: AgentConfig, nic: Option<OpenNic>, queue: Arc<Queue>) -> Result<Driver, AgentError> {
        let (in_flight_max, peers_bytes_max, within) = (config.in_flight_max, config.peers_bytes_max, config.within);
        let incarnation = config.incarnation;
        let (name, extension, settings) = config.check()?;
        let worker = RawWorker::open(&settings).map_err(AgentError::Ucx)?;
        let board = Board::new(&worker).map_err(AgentError::Ucx)?;
        let opened = nic.map(|open| open()).transpose();
        let nic = opened.map_err(|error| AgentError::Config(format!("its device for programs: {error}")))?;
        Ok(Driver {
            worker,
            name,
            incarnation,
            edition: 0,
            extension,
            in_flight_max,
            peers_bytes_max,
            within,
            queue,
            dropped: 0,
            pools: BTreeMap::new(),
            registrations: BTreeMap::new(),
            board,
            unconfirmed: Vec::new(),
            ferry: nic.map(Ferry::new),
            peers: BTreeMap::new(),
            connections: BTreeMap::new(),
            flights: BTreeMap::new(),
            operations: BTreeMap::new(),
            closing: BTreeSet::new(),
            leaving: Vec::new(),
            at_once: VecDeque::new(),
            resume: BTreeSet::new(),
            next: 1,
        })
    }

    /// Until it is shut down; who waits for that, and what has the process's end wait, too.
    fn serve(
        &mut self,
        commands: &mpsc::Receiver<Command>,
        wake: &Wake,
    ) -> (Option<oneshot::Sender<()>>, Option<Ending>) {
        let mut busy_until = now();
        loop {
            let mut active = false;
            loop {
                match commands.try_recv() {
                    Ok(Command::Shutdown { done, ending }) => return (done, Some(ending)),
                    Ok(command) => self.command(command),
                    Err(mpsc::TryRecvError::Empty) => break,
                    Err(mpsc::TryRecvError::Disconnected) => return (None, None),
                }
                active = true;
            }
            active |= self.step();
            let now = now();
            if active {
                busy_until = now + SPIN;
            }
            if now < busy_until {
                std::hint::spin_loop();
                continue;
            }
            self.sleep(wake, now);
        }
    }

    /// Drives UCX and everything that follows from it; false when nothing happened.
    fn step(&mut self) -> bool {
        let mut active = false;
        for _ in 0..STEPS {
            if !self.worker.progress() {
                break;
            }
            active = true;
        }
        active |= self.ferry_step();
        for peer in std::mem::take(&mut self.resume) {
            active = true;
            self.pump(&peer);
        }
        let mut events = Vec::new();
        self.worker.take(&mut events);
        self.at_once.extend(events);
        let until = now() + TURN;
        while let Some(event) = self.at_once.pop_front() {
            active = true;
            self.event(event);
            // Each may begin more: other peers, commands and deadlines have their turn, too.
            if now() >= until {
                break;
            }
        }
        self.confirm_waiting();
        let now = now();
        self.expire(now);
        if let Some(ferry) = &mut self.ferry {
            ferry.expire(now);
        }
        active
    }

    fn sleep(&mut self, wake: &Wake, now: Instant) {
        let waiting = self.flights.values().filter(|flight| !flight.cut);
        let due = waiting.map(|flight| flight.deadline).chain(self.ferry.as_ref().and_then(Ferry::due)).min();
        let due = due.map(|due| due.saturating_duration_since(now));
        // UCX does not always tell that it has let go of what a closed connection had in flight.
        let nap = if self.flights.values().any(|flight| flight.cut) { DOZE } else { NAP };
        let at_most = due.unwrap_or(nap).min(nap);
        let (mut polls, mut nic) = (false, None);
        match self.ferry.as_mut().map(Ferry::arm) {
            None => {}
            Some(Wait::Busy) => return,
            Some(Wait::MustPoll) => polls = true,
            Some(Wait::Ready(descriptor)) => nic = Some(descriptor),
        }
        let worker = match self.worker.wait() {
            RawWait::Busy => return,
            RawWait::Readable(descriptor) => Some(descriptor),
            RawWait::Poll => {
                polls = true;
                None
            }
        };
        let at_most = if polls { at_most.min(DOZE) } else { at_most };
        wake.wait([worker, nic.as_ref().map(|descriptor| descriptor.as_fd())], at_most);
    }

    /// Whether nothing of any transfer is under way.
    fn is_idle(&self) -> bool {
        self.flights.is_empty() && self.ferry.as_ref().is_none_or(Ferry::is_idle)
    }

    fn say_farewell(&mut self, wake: &Wake) {
        self.flush_all(wake);
        let names: Vec<String> = self.peers.keys().cloned().collect();
        for name in names {
            self.drop_peer(&name, &AgentError::Gone);
        }
        if let Some(ferry) = &mut self.ferry {
            ferry.leave();
        }
        let until = now() + FAREWELL;
        while !(self.closing.is_empty() && self.is_idle()) && now() < until {
            if !self.step() {
                wake.wait([None, None], DOZE);
            }
        }
    }

    /// What was said last may still be here; closing would lose it.
    fn flush_all(&mut self, wake: &Wake) {
        let connected = self.peers.iter().filter(|(_, remote)| remote.link.is_some());
        let names: Vec<String> = connected.map(|(name, _)| name.clone()).collect();
        let mut flushed = Vec::new();
        for name in names {
            let (reply, answer) = oneshot::channel();
            self.warm(name, Some(LAST_WORDS), reply);
            flushed.push(answer);
        }
        // Each has a deadline of its own; but UCX does not always let go of what ran out of time.
        let until = now() + 2 * LAST_WORDS;
        let mut waits = || {
            let waiting =
                |answer: &mut oneshot::Receiver<_>| answer.try_recv() == Err(oneshot::error::TryRecvError::Empty);
            flushed.iter_mut().any(waiting)
        };
        while waits() && now() < until {
            if !self.step() {
                wake.wait([None, None], DOZE);
            }
        }
    }

    fn command(&mut self, command: Command) {
        // Whoever asked may be gone.
        match command {
            Command::Register { pool, reply } => drop(reply.send(self.register(&pool))),
            Command::Deregister { pool, reply } => self.deregister(pool, reply),
            Command::Metadata { pools, reply } => drop(reply.send(self.metadata(pools))),
            Command::AddPeer { metadata, reply } => drop(reply.send(self.add_peer(metadata))),
            Command::Connect { peer, within, reply } => self.warm(peer, within, reply),
            Command::RemovePeer { name, reply } => self.remove_peer(&name, reply),
            Command::Transfer { transfer, reply } => self.transfer(transfer, reply),
            Command::Fetch { fetch, reply } => self.fetch(fetch, reply),
            Command::Push { push, reply } => self.push(push, reply),
            Command::Expect { expect, reply } => self.expect(expect, reply),
            Command::Lend { reply } => {
                let full = || AgentError::Leases { max: SLOTS };
                drop(reply.send(self.board.issue().ok_or_else(full)));
            }
            Command::EndLease { ticket, reply } => {
                self.board.end(ticket);
                drop(reply.map(|reply| reply.send(Ok(()))));
            }
            Command::Notify { peer, message, within, reply } => self.notify(peer, message, within, reply),
            Command::Shutdown { .. } => {}
        }
    }

    fn event(&mut self, event: RawEvent) {
        match event {
            RawEvent::Message(message) => self.message(message),
            RawEvent::Done { operation, result } => self.operation_ended(operation, result),
            RawEvent::Broken { peer, reason } => {
                if let Some(name) = self.connections.get(&peer).cloned() {
                    self.disconnect(&name, &AgentError::Failed { name: name.clone(), reason });
                }
            }
            RawEvent::Closed { peer } => drop(self.closing.remove(&peer)),
        }
    }

    fn message(&mut self, message: Vec<u8>) {
        match Notification::decode(message.into()) {
            Ok(notification) => {
                if !self.queue.push(notification) {
                    self.dropped += 1;
                    // Once is news; then each time that it has doubled.
                    if self.dropped.is_power_of_two() {
                        tracing::warn!(dropped = self.dropped, "notifications that nobody takes are dropped");
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "a message that is no notification is dropped"),
        }
    }

    fn register(&mut self, pool: &Pool) -> Result<(), AgentError> {
        let id = pool.id();
        if self.pools.contains_key(&id) || self.ferry.as_ref().is_some_and(|ferry| ferry.is_unbinding(id)) {
            return Err(AgentError::Pool(format!(
                "{id} is registered already, or still being deregistered; deregister it first"
            )));
        }
        let memory = self.worker.register(pool).map_err(AgentError::Ucx)?;
        if let Some(ferry) = &mut self.ferry {
            ferry.bind(pool).map_err(AgentError::Pool)?;
        }
        self.pools.insert(id, memory);
        // Beyond the board's slots it is registered as NIXL does it: nobody confirms it.
        if let Some(ticket) = self.board.issue() {
            self.registrations.insert(id, ticket);
        }
        self.edition += 1;
        Ok(())
    }

    fn deregister(&mut self, pool: PoolId, reply: Reply<()>) {
        if self.pools.remove(&pool).is_none() {
            return drop(reply.send(Err(AgentError::Pool(format!("{pool} is not registered")))));
        }
        self.edition += 1;
        if let Some(ticket) = self.registrations.remove(&pool) {
            self.board.end(ticket);
        }
        match &mut self.ferry {
            Some(ferry) => ferry.unbind(pool, reply),
            None => drop(reply.send(Ok(()))),
        }
    }

    fn metadata(&self, part: Option<(Vec<PoolId>, bool)>) -> Result<Bytes, AgentError> {
        let whole = part.is_none();
        let (wanted, connection) = match part {
            None => (self.pools.keys().copied().collect(), true),
            Some(part) => part,
        };
        let (mut ranges, mut pools) = (Vec::new(), Vec::new());
        for id in wanted {
            let unknown = || AgentError::Pool(format!("{id} is not registered"));
            let memory = self.pools.get(&id).ok_or_else(unknown)?;
            let regions = memory.pool().regions();
            let keyed = regions.iter().zip(memory.keys()).filter(|(region, _)| region.bytes() > 0);
            ranges.extend(keyed.map(|(region, key)| Range {
                device: 0,
                address: region.base() as u64,
                bytes: region.bytes(),
                key: Bytes::copy_from_slice(key),
            }));
            pools.push(ToldPool {
                id,
                ticket: self.registrations.get(&id).copied(),
                bases: regions.iter().map(|region| region.base() as u64).collect(),
                layout: memory.pool().layout().clone(),
                keys: self.ferry.as_ref().and_then(|ferry| ferry.keys(id)),
            });
        }
        let mut connections = Vec::new();
        if connection {
            let address = self.worker.address().map_err(AgentError::Ucx)?.into();
            connections.push(Connection { backend: UCX.to_owned(), address });
            let address = self.ours(whole, pools).encode().into();
            connections.push(Connection { backend: OURS.to_owned(), address });
        }
        let sections = match ranges.is_empty() {
            true => Vec::new(),
            false => vec![Section::new(UCX, MemoryKind::Dram, ranges)?],
        };
        Ok(AgentMetadata { name: self.name.clone(), connections, sections }.encode()?.into())
    }

    /// What agents of ours are told beside NIXL's protocol.
    fn ours(&self, whole: bool, pools: Vec<ToldPool>) -> Ours {
        let (address, key) = self.board.told();
        Ours {
            incarnation: self.incarnation,
            edition: self.edition,
            whole,
            board: ToldBoard { address, slots: SLOTS, key: Bytes::copy_from_slice(key) },
            nic: self.ferry.as_ref().map(Ferry::told),
            pools,
            extension: self.extension.clone(),
        }
    }

    /// A number that was never used.
    pub(super) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

#[allow(clippy::disallowed_methods, reason = "this thread is never simulated")]
pub(super) fn now() -> Instant {
    Instant::now()
}
