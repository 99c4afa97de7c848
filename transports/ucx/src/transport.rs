//! One opened device: the state behind [`Transport`].

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvferry_core::{End, PoolId, PoolLayout, Program, ProgramError, TransferId, UnitRange};
use kvferry_topology::Counters;
use kvferry_transport::codec::random;
use kvferry_transport::{
    BindError, ConnectError, Event, Expected, ImportError, NicInfo, Options, PeerId, Pool, PoolKeys, PostError,
    RemotePool, Stage, StagedEvents, Transfer, TransferError, Transport, Wait,
};
use rustix::event::epoll;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use crate::arriving::{Expectation, Held};
use crate::choice::Watched;
use crate::closing::{Closing, Fence};
use crate::context::{Context, Mapped};
use crate::device::{Access, Method};
use crate::fetch::Fetch;
use crate::handle::Armed;
use crate::link::{Link, Session};
use crate::made::Made;
use crate::posted::Posted;
use crate::process::Process;
use crate::receiving::Receiving;
use crate::remote::{Bound, Remote, Withdrawing};
use crate::staging::Staging;
use crate::warming::Sample;
use crate::wire::{Address, Keys, PARCEL_BYTES_MAX, RegionKey};
use crate::worker::Worker;

/// A device with its worker, peers and transfers.
pub(crate) struct UcxTransport {
    pub(crate) info: NicInfo,
    pub(crate) options: Options,
    pub(crate) method: Method,
    pub(crate) access: Access,
    pub(crate) own: Address,
    pub(crate) context: Rc<Context>,
    pub(crate) worker: Rc<Worker>,
    /// Announces the worker's descriptor and the timer; none where nothing announces progress.
    waiting: Option<Waiting>,
    next_number: u64,
    pub(crate) links: BTreeMap<u64, Link>,
    pub(crate) made: Made,
    pub(crate) closing: BTreeMap<u64, Closing>,
    pub(crate) fences: Vec<Fence>,
    pub(crate) sessions: BTreeMap<PeerId, Session>,
    /// Whose session a message is of, and over which link it came; sessions that are over leave their number to the link.
    pub(crate) numbers: BTreeMap<u64, (Option<PeerId>, u64)>,
    pub(crate) pools: BTreeMap<PoolId, Bound>,
    pub(crate) remotes: BTreeMap<RemotePool, Remote>,
    /// Pools that peers withdrew and that are still being read.
    pub(crate) withdrawing: Vec<Withdrawing>,
    pub(crate) posts: BTreeMap<TransferId, Posted>,
    pub(crate) expected: BTreeMap<TransferId, Expectation>,
    pub(crate) held: BTreeMap<TransferId, Held>,
    pub(crate) fetches: BTreeMap<u64, Fetch>,
    /// Fetches that can go on, in turn.
    pub(crate) turns: VecDeque<u64>,
    /// The lone transfer whose time is taken.
    pub(crate) watched: Option<Watched>,
    /// What its device has counted.
    pub(crate) counters: Counters,
    /// Settings of ours that a user's variables replaced when it was opened.
    pub(crate) replaced: Vec<String>,
    /// What happened since the last poll.
    pub(crate) events: Vec<Event>,
    /// Events that wait for a device, in order.
    pub(crate) deferred: StagedEvents,
    /// No deadline passes before this.
    pub(crate) next_deadline: Option<Instant>,
    /// Chunks that UCX is receiving by rendezvous, and buffers for them. The last to be dropped: by then the worker is gone, which a receive
    /// that failed might still have been writing for.
    pub(crate) receiving: Receiving,
    /// What peers read when they join, where they can.
    pub(crate) sample: Option<Sample>,
    /// Where packed chunks are put together, and received by rendezvous.
    pub(crate) staging: Staging,
    /// Where those are read to that lie in a peer's staging.
    pub(crate) landing: Staging,
}

struct Waiting {
    poller: Arc<OwnedFd>,
    timer: OwnedFd,
    armed: Option<Instant>,
}

impl UcxTransport {
    pub(crate) fn open(
        info: NicInfo,
        method: Method,
        access: Access,
        worker: Rc<Worker>,
        staging: Staging,
        options: Options,
    ) -> Result<UcxTransport, String> {
        let context = worker.context().clone();
        let sample = if method.registers(access) { Some(Sample::new(&context)?) } else { None };
        let waiting = if method.wakes() { Some(Waiting::new(&worker)?) } else { None };
        let secret = || random().map_err(|error| format!("no random bytes: {error}"));
        let own = Address {
            method: method.number(access),
            instance: secret()?,
            secret: secret()?,
            worker: worker.address()?,
            // Lanes of shared memory are of a process.
            process: if method == Method::Memory { Process::own() } else { None },
        };
        Ok(UcxTransport {
            info,
            options,
            method,
            access,
            own,
            context,
            worker,
            waiting,
            next_number: 1,
            links: BTreeMap::new(),
            made: Made::default(),
            closing: BTreeMap::new(),
            fences: Vec::new(),
            sessions: BTreeMap::new(),
            numbers: BTreeMap::new(),
            pools: BTreeMap::new(),
            remotes: BTreeMap::new(),
            withdrawing: Vec::new(),
            posts: BTreeMap::new(),
            expected: BTreeMap::new(),
            held: BTreeMap::new(),
            fetches: BTreeMap::new(),
            turns: VecDeque::new(),
            watched: None,
            counters: Counters::default(),
            replaced: Vec::new(),
            events: Vec::new(),
            deferred: StagedEvents::default(),
            next_deadline: None,
            receiving: Receiving::default(),
            sample,
            landing: staging.beside(PARCEL_BYTES_MAX),
            staging,
        })
    }

    /// A number that this transport has not used: of a link, a peer, a remote pool, a fetch.
    pub(crate) fn new_number(&mut self) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        number
    }

    pub(crate) fn note_deadline(&mut self, deadline: Instant) {
        self.next_deadline = Some(self.next_deadline.map_or(deadline, |earlier| earlier.min(deadline)));
    }

    pub(crate) fn check(
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

    /// Whether a poll would get anywhere by itself.
    fn has_work(&self) -> bool {
        !self.events.is_empty()
            || !self.worker.inbox.is_empty()
            || self.worker.inbox.can_settle()
            || self.worker.operations.has_done()
            || !self.turns.is_empty()
            || self.links.values().any(|link| {
                link.outgoing.can_send() || (link.consumed > 0 && self.speaker(link).is_some())
            })
            // The kernel copies while UCX makes progress, and announces nothing.
            || (self.method == Method::Memory
                && (self.receiving.in_flight > 0 || self.fetches.values().any(|fetch| fetch.in_flight > 0)
                    || self.links.values().any(|link| link.collecting > 0 || link.warmth.is_trying())))
            || self.closing.values().any(|closing| !closing.is_draining())
            || !self.fences.is_empty()
            || self.pools.values().any(|bound| bound.leaving.is_some() && self.is_idle(bound.pool.id()))
    }
}

impl Waiting {
    fn new(worker: &Worker) -> Result<Waiting, String> {
        let failed = |what: &str, error: rustix::io::Errno| format!("{what}: {}", io::Error::from(error));
        let poller =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| failed("creating an epoll descriptor", e))?;
        let timer =
            rustix::time::timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)
                .map_err(|e| failed("creating a timer", e))?;
        let watch = |fd: rustix::fd::BorrowedFd<'_>, number| {
            epoll::add(&poller, fd, epoll::EventData::new_u64(number), epoll::EventFlags::IN)
                .map_err(|e| failed("watching a descriptor", e))
        };
        watch(worker.descriptor()?, 0)?;
        watch(rustix::fd::AsFd::as_fd(&timer), 1)?;
        Ok(Waiting { poller: Arc::new(poller), timer, armed: None })
    }

    fn wake_at(&mut self, deadline: Option<Instant>) -> bool {
        if self.armed == deadline {
            return true;
        }
        // Zero would disarm it.
        let wait = deadline.map(|at| at.saturating_duration_since(Instant::now()).max(Duration::from_micros(1)));
        let wait = wait.unwrap_or_default();
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let it_value = Timespec { tv_sec: wait.as_secs().cast_signed(), tv_nsec: wait.subsec_nanos().into() };
        let value = Itimerspec { it_interval: zero, it_value };
        let set = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &value).is_ok();
        if set {
            self.armed = deadline;
        }
        set
    }

    /// Forgets that the timer rang.
    fn quiet(&mut self, now: Instant) {
        if self.armed.is_some_and(|at| at <= now) {
            let mut count = [0; 8];
            // Only its readiness counts.
            let _expirations = rustix::io::read(&self.timer, &mut count);
            self.armed = None;
        }
    }
}

impl Transport for UcxTransport {
    fn info(&self) -> &NicInfo {
        &self.info
    }

    fn address(&self) -> Bytes {
        self.own.seal()
    }

    fn bind(&mut self, pool: &Pool) -> Result<PoolKeys, BindError> {
        let id = pool.id();
        if self.pools.contains_key(&id) {
            return Err(BindError::Duplicate(id));
        }
        let unsupported = |reason: String| BindError::Unsupported { pool: id, reason };
        let stage = pool.device().map(|_| Stage::open(pool, &self.options)).transpose().map_err(unsupported)?;
        let token = random::<8>().map_err(|error| unsupported(format!("no random token could be drawn: {error}")))?;
        let (mapped, packed) = if stage.is_none() && self.method.registers(self.access) {
            let (mapped, packed) = Mapped::new(&self.context, pool).map_err(unsupported)?;
            (Some(Rc::new(mapped)), packed)
        } else {
            (None, vec![Vec::new(); pool.regions().len()])
        };
        let regions = pool.regions().iter().zip(packed);
        let regions =
            regions.map(|(region, rkey)| RegionKey { base: region.base() as u64, bytes: region.bytes(), rkey });
        // No peer reads a device's memory; its addresses are nobody's business.
        let unread =
            pool.device_regions().iter().map(|region| RegionKey { base: 0, bytes: region.bytes, rkey: Vec::new() });
        let regions = regions.chain(unread).collect();
        let keys = Keys { instance: self.own.instance, pool: id, token: u64::from_le_bytes(token), regions };
        let sealed = keys.seal(&self.own.secret);
        self.pools.insert(id, Bound::new(pool.clone(), keys, mapped, stage));
        Ok(PoolKeys(sealed))
    }

    fn unbind(&mut self, pool: PoolId) {
        self.withdraw(pool);
    }

    fn connect(&mut self, address: &[u8]) -> Result<PeerId, ConnectError> {
        self.dial(address)
    }

    fn import(&mut self, peer: PeerId, keys: &PoolKeys, layout: &PoolLayout) -> Result<RemotePool, ImportError> {
        self.import_pool(peer, keys, layout)
    }

    fn expect(&mut self, expected: Expected) -> Result<(), PostError> {
        self.expect_push(expected)
    }

    fn post(&mut self, transfer: Transfer) -> Result<(), PostError> {
        self.post_transfer(transfer)
    }

    fn cancel(&mut self, id: TransferId) {
        self.end_posted(id, TransferError::Cancelled);
        self.end_expected(id, TransferError::Cancelled, "the receiver cancelled it");
    }

    fn fence(&mut self, peer: PeerId) {
        self.fence_peer(peer);
    }

    fn disconnect(&mut self, peer: PeerId) {
        self.hang_up(peer, "disconnected here");
    }

    fn poll(&mut self, events: &mut Vec<Event>) {
        let now = Instant::now();
        if let Some(waiting) = &mut self.waiting {
            waiting.quiet(now);
        }
        self.serve(now);
        events.append(&mut self.events);
    }

    fn arm(&mut self) -> Wait {
        if self.has_work() {
            return Wait::Busy;
        }
        if let Some(is_recent) = self.waits_for_device() {
            return if is_recent { Wait::Busy } else { Wait::MustPoll };
        }
        let deadline = self.next_deadline;
        let Some(waiting) = &mut self.waiting else { return Wait::MustPoll };
        if !waiting.wake_at(deadline) {
            return Wait::MustPoll;
        }
        match self.worker.arm() {
            Armed::Yes => Wait::Ready(Arc::clone(&waiting.poller)),
            Armed::Busy => Wait::Busy,
            Armed::Never => Wait::MustPoll,
        }
    }
}

impl Drop for UcxTransport {
    fn drop(&mut self) {
        self.shut_down();
    }
}
