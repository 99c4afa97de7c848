//! The transport: all its state, and the loop over it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvferry_core::{GpuIdentity, MemoryDomain, PoolId, PoolLayout, TransferId};
use kvferry_transport::codec::random;
use kvferry_transport::{
    BindError, ConnectError, DeviceEvent, Event, Expected, ImportError, NicInfo, OpenError, Options, PeerId, Pool,
    PoolKeys, PostError, RemotePool, Transfer, TransferError, Transport, Wait,
};

use crate::arriving::{Expecting, Held};
use crate::backend::{Backend, Copying, Step};
use crate::carrier::Carrier;
use crate::draining::{Draining, Fencing, Whose};
use crate::leaving::{Leaving, let_go_by};
use crate::peer::Peer;
use crate::posted::Posted;
use crate::remote::Remote;
use crate::whose::Identity;
use crate::wire::{Address, Frame, Keys};

/// How often a backend is polled that has more to do than it announces.
const TEND_EVERY: Duration = Duration::from_millis(5);
/// After a push was announced its end is looked for all the time at first, then now and then for so many times as long.
const NAPS: u32 = 50;
/// Bytes that one transfer copies before it is another's turn.
const SLICE_BYTES: u64 = 512 << 10;

/// An opened transport whose destination fetches every byte itself.
pub struct LocalTransport<B: Backend> {
    pub(crate) backend: B,
    pub(crate) info: NicInfo,
    pub(crate) options: Options,
    pub(crate) instance: [u8; 16],
    pub(crate) key: [u8; 16],
    pub(crate) carrier: B::Carrier,
    pub(crate) peers: BTreeMap<PeerId, Peer>,
    /// Whose the connections were that are gone, the newest of them: fences of theirs are asked for afterwards, too.
    pub(crate) gone: BTreeMap<PeerId, Identity>,
    pub(crate) pools: BTreeMap<PoolId, Bound>,
    pub(crate) remotes: BTreeMap<RemotePool, Remote<B::Memory>>,
    pub(crate) next_remote: u32,
    pub(crate) posted: BTreeMap<TransferId, Posted>,
    /// Posted transfers that wait for an event.
    pub(crate) waiting: Vec<TransferId>,
    pub(crate) next_serial: u64,
    pub(crate) expecting: BTreeMap<TransferId, Expecting>,
    pub(crate) held: BTreeMap<(PeerId, TransferId), Held>,
    /// What is being copied, in turn.
    pub(crate) jobs: VecDeque<Job<B::Copy>>,
    /// When the last push was announced.
    pub(crate) announced: Option<Instant>,
    /// When something was expected last, or a push came.
    pub(crate) expected: Option<Instant>,
    /// Every job waits for something that needs nobody's hand.
    resting: bool,
    /// The backend has more to do beside jobs.
    tending: bool,
    /// What was stopped and still runs.
    pub(crate) draining: Vec<Draining<B::Copy>>,
    pub(crate) fencing: Vec<Fencing>,
    /// Peers' pools that were withdrawn and may still be read.
    pub(crate) leaving: Vec<Leaving>,
    pub(crate) events: Vec<Event>,
}

/// A pool of our own.
pub(crate) struct Bound {
    pub(crate) pool: Pool,
    pub(crate) token: u64,
    /// Unbound, but something has not ended.
    pub(crate) leaving: bool,
    /// Who may have reads of it under way that outlast it; only where a backend says that there are such.
    pub(crate) readers: BTreeSet<PeerId>,
    /// One of them was lost, and may still begin reads of it.
    pub(crate) lost_reader: bool,
    /// When those that have not let go are cut off, once it is unbound.
    pub(crate) let_go_by: Option<Instant>,
}

impl Bound {
    /// Nobody reads it but perhaps somebody who is gone.
    pub(crate) fn lacks_only_a_cut(&self) -> bool {
        self.lost_reader && self.readers.is_empty()
    }
}

/// A transfer that is being copied.
pub(crate) struct Job<C> {
    pub(crate) id: TransferId,
    pub(crate) role: Role,
    pub(crate) copy: C,
}

/// Who started it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Pull,
    Arrival,
}

impl<B: Backend> LocalTransport<B> {
    /// A transport over a backend and what carries its frames.
    pub fn over(
        backend: B,
        carrier: B::Carrier,
        info: NicInfo,
        options: &Options,
    ) -> Result<LocalTransport<B>, OpenError> {
        let drawn = || {
            random().map_err(|source| OpenError::Io { device: info.device.clone(), context: "drawing a key", source })
        };
        let (key, instance) = (drawn()?, drawn()?);
        Ok(LocalTransport {
            backend,
            info,
            options: options.clone(),
            instance,
            key,
            carrier,
            peers: BTreeMap::new(),
            gone: BTreeMap::new(),
            pools: BTreeMap::new(),
            remotes: BTreeMap::new(),
            next_remote: 0,
            posted: BTreeMap::new(),
            waiting: Vec::new(),
            next_serial: 0,
            expecting: BTreeMap::new(),
            held: BTreeMap::new(),
            jobs: VecDeque::new(),
            announced: None,
            expected: None,
            resting: false,
            tending: false,
            draining: Vec::new(),
            fencing: Vec::new(),
            leaving: Vec::new(),
            events: Vec::new(),
        })
    }

    /// Copies in turn, a slice of each transfer, until the budget is spent or everything waits.
    fn copy(&mut self) {
        let mut left = self.options.poll_bytes_max.max(1);
        let mut waiting = 0;
        while left > 0 && waiting < self.jobs.len() {
            let Some(mut job) = self.jobs.pop_front() else { break };
            match job.copy.step(SLICE_BYTES.min(left)) {
                Ok(Step::Done(cost)) => {
                    left = left.saturating_sub(cost);
                    let (bytes, pieces) = (job.copy.bytes(), job.copy.pieces());
                    match job.role {
                        Role::Pull => self.pulled(job.id, bytes, pieces),
                        Role::Arrival => self.arrived(job.id, bytes, pieces),
                    }
                }
                Ok(Step::More(cost)) => {
                    (left, waiting) = (left.saturating_sub(cost), 0);
                    self.jobs.push_back(job);
                }
                Ok(Step::Waiting) => {
                    waiting += 1;
                    self.jobs.push_back(job);
                }
                Err(error) => self.broke(job, error),
            }
        }
        self.resting = waiting >= self.jobs.len();
    }

    fn broke(&mut self, job: Job<B::Copy>, error: TransferError) {
        let (id, role, reason) = (job.id, job.role, error.to_string());
        // What it started may still run.
        self.jobs.push_front(job);
        match role {
            Role::Pull => self.fail_posted(|posted| posted.transfer.id == id, &error),
            Role::Arrival => self.fail_arriving_id(id, &error, Some(&reason)),
        }
    }

    /// Lets withdrawn pools go that nothing touches any more.
    fn settle_pools(&mut self) {
        let leaving: Vec<PoolId> = self.pools.iter().filter(|(_, bound)| bound.leaving).map(|(&id, _)| id).collect();
        for pool in leaving {
            if self.is_idle(pool) {
                self.pools.remove(&pool);
                self.backend.unbind(pool);
                self.events.push(Event::Unbound { pool });
            }
        }
    }

    fn is_idle(&self, pool: PoolId) -> bool {
        let posted = self.posted.values().any(|posted| posted.transfer.local == pool);
        let is_read = self.pools.get(&pool).is_some_and(|bound| !bound.readers.is_empty()) || self.backend.is_cutting();
        !posted
            && !is_read
            && !self.drains_into(pool)
            && !self.expecting.values().any(|expecting| expecting.expected.pool == pool)
    }

    /// The next moment at which something has to be done unasked.
    fn deadline(&self) -> Option<Instant> {
        let greetings = self.peers.values().filter_map(Peer::deadline);
        greetings.chain(self.held.values().map(|held| held.until)).chain(self.leaving_deadline()).min()
    }
}

impl<B: Backend> Transport for LocalTransport<B> {
    fn info(&self) -> &NicInfo {
        &self.info
    }

    fn address(&self) -> Bytes {
        Address::new(B::KIND, self.info.host.clone(), self.carrier.place(), self.key, self.instance).encode()
    }

    fn domain(&self) -> Option<MemoryDomain> {
        let (name, place) = self.backend.domain().zip(self.carrier.place_beyond())?;
        let address = Address::new(B::KIND, self.info.host.clone(), place, self.key, self.instance).encode();
        Some(MemoryDomain { name, address })
    }

    fn gpu(&self) -> Option<GpuIdentity> {
        self.backend.gpu()
    }

    fn bind(&mut self, pool: &Pool) -> Result<PoolKeys, BindError> {
        if self.pools.contains_key(&pool.id()) {
            return Err(BindError::Duplicate(pool.id()));
        }
        let unsupported = |reason| BindError::Unsupported { pool: pool.id(), reason };
        let mut token = [0; 8];
        getrandom::fill(&mut token)
            .map_err(|error| unsupported(format!("the system gives no random bytes: {error}")))?;
        self.backend.bind(pool).map_err(unsupported)?;
        let token = u64::from_le_bytes(token);
        self.pools.insert(
            pool.id(),
            Bound {
                pool: pool.clone(),
                token,
                leaving: false,
                readers: BTreeSet::new(),
                lost_reader: false,
                let_go_by: None,
            },
        );
        Ok(PoolKeys(Keys::new(B::KIND, self.instance, pool.id(), token, pool.layout().regions.clone()).encode()))
    }

    fn unbind(&mut self, pool: PoolId) {
        let Some(bound) = self.pools.get_mut(&pool) else {
            self.events.push(Event::Unbound { pool });
            return;
        };
        if std::mem::replace(&mut bound.leaving, true) {
            return;
        }
        bound.let_go_by = Some(let_go_by());
        let token = bound.token;
        if bound.lacks_only_a_cut() {
            self.backend.cut();
        }
        let users: Vec<PeerId> = self.peers.iter().filter(|(_, peer)| peer.is_up()).map(|(&id, _)| id).collect();
        for peer in users {
            self.send(peer, &Frame::Withdrawn { pool, token });
        }
        let posted: Vec<TransferId> =
            self.posted.iter().filter(|(_, p)| p.transfer.local == pool).map(|(&id, _)| id).collect();
        for id in posted {
            self.stop_posted(id, TransferError::Unbound);
        }
        let expected: Vec<TransferId> =
            self.expecting.iter().filter(|(_, e)| e.expected.pool == pool).map(|(&id, _)| id).collect();
        for id in expected {
            self.fail_arriving_id(id, &TransferError::Unbound, Some("its receiver withdrew the pool"));
        }
    }

    fn connect(&mut self, address: &[u8]) -> Result<PeerId, ConnectError> {
        self.dial(address)
    }

    fn import(&mut self, peer: PeerId, keys: &PoolKeys, layout: &PoolLayout) -> Result<RemotePool, ImportError> {
        self.import_pool(peer, keys, layout)
    }

    fn expect(&mut self, transfer: Expected) -> Result<(), PostError> {
        self.expect_push(transfer)
    }

    fn post(&mut self, transfer: Transfer) -> Result<(), PostError> {
        self.post_transfer(transfer, None)
    }

    fn post_after(&mut self, transfer: Transfer, after: Arc<dyn DeviceEvent>) -> Result<(), PostError> {
        self.post_transfer(transfer, Some(after))
    }

    fn cancel(&mut self, id: TransferId) {
        self.stop_posted(id, TransferError::Cancelled);
        self.fail_arriving_id(id, &TransferError::Cancelled, Some("its receiver cancelled it"));
    }

    fn fence(&mut self, peer: PeerId) {
        // Only this side writes our pools: once its copies have stopped, nothing of that peer reaches them.
        let identity = self.identity(peer);
        let same = identity.map_or_else(|| BTreeSet::from([peer]), |identity| self.same_as(peer, &identity));
        if identity.is_some() {
            self.fail_posted(|posted| same.contains(&posted.transfer.peer), &TransferError::Cancelled);
            self.fail_arriving(
                |peer| same.contains(&peer),
                &TransferError::Cancelled,
                Some("its receiver fenced the source"),
            );
        }
        if B::HANDLES {
            self.close_memory(&same);
        }
        self.fence_when_drained(peer, Whose { same, identity });
    }

    fn disconnect(&mut self, peer: PeerId) {
        self.forget(peer, &TransferError::PeerLost("it was disconnected here".into()));
    }

    fn poll(&mut self, events: &mut Vec<Event>) {
        let now = Instant::now();
        self.carrier.look(now);
        self.take_frames();
        self.check_greetings(now);
        self.check_held(now);
        self.check_events();
        self.carrier.flush();
        self.tending = self.backend.tend();
        let shown = self.backend.shown().into_iter();
        self.events.extend(shown.map(|(peer, evidence)| Event::Shown { peer, evidence: Box::new(evidence) }));
        for (peer, reason) in self.backend.broken() {
            self.lose(peer, &reason);
        }
        self.copy();
        self.settle_draining();
        self.settle_leaving(now);
        self.check_readers(now);
        self.settle_pools();
        self.speak();
        self.carrier.flush();
        events.append(&mut self.events);
    }

    fn arm(&mut self) -> Wait {
        // Something may have been cancelled since the last poll.
        self.speak();
        self.carrier.flush();
        if (!self.jobs.is_empty() && !self.resting)
            || !self.events.is_empty()
            || self.backend.is_busy()
            || self.pools.values().any(|bound| bound.leaving && self.is_idle(bound.pool.id()))
        {
            return Wait::Busy;
        }
        if (!self.jobs.is_empty() || !self.draining.is_empty())
            && let Some(wait) = self.backend.wait()
        {
            return wait;
        }
        let now = Instant::now();
        let since = |at| now.saturating_duration_since(at);
        let announced = self.announced.filter(|_| self.posted.values().any(Posted::is_push)).map(since);
        if announced.is_some_and(|since| since < B::PUSH_SPIN) {
            return Wait::Busy;
        }
        if !self.expecting.is_empty() && self.expected.map(since).is_some_and(|since| since < B::EXPECT_SPIN) {
            return Wait::Busy;
        }
        // A thread that is woken from deep sleep takes longer than one that naps.
        if !self.waiting.is_empty() || announced.is_some_and(|since| since < B::PUSH_SPIN * NAPS) {
            return Wait::MustPoll;
        }
        let tend = (self.tending || self.backend.is_cutting()).then(|| now + TEND_EVERY);
        self.carrier.wait(self.deadline().into_iter().chain(tend).min(), now)
    }
}
