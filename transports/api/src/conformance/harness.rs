//! Transports in one thread, and waiting for what they report.

use std::time::{Duration, Instant};

use kvferry_core::{PoolLayout, TransferId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{Device, Event, Options, PeerId, Pool, PoolKeys, Provider, RemotePool, Transport, Wait};

/// No case takes longer on any machine that works.
const DEADLINE: Duration = Duration::from_secs(60);

/// One transport and everything it has reported.
pub struct Party {
    /// The transport.
    pub transport: Box<dyn Transport>,
    /// Its events since the beginning.
    pub events: Vec<Event>,
}

impl Party {
    /// Opens the provider's first usable device, the loopback one where there is such a thing.
    pub fn open(provider: &dyn Provider, options: &Options) -> Party {
        let transport = provider.open(&device(provider), options).unwrap_or_else(|e| panic!("{e}"));
        Party { transport, events: Vec::new() }
    }

    /// Connects to another party, without waiting for it.
    pub fn connect(&mut self, to: &Party) -> PeerId {
        self.transport.connect(&to.transport.address()).unwrap()
    }

    /// Binds a pool.
    pub fn bind(&mut self, pool: &Pool) -> PoolKeys {
        self.transport.bind(pool).unwrap()
    }

    /// Imports a pool of a peer.
    pub fn import(&mut self, peer: PeerId, keys: &PoolKeys, layout: &PoolLayout) -> RemotePool {
        self.transport.import(peer, keys, layout).unwrap()
    }

    /// How a transfer ended here, if it did. Panics when it ended twice.
    pub fn end(&self, id: TransferId) -> Option<&Event> {
        let of = |event: &&Event| match event {
            Event::Completed { id: ended, .. } | Event::Arrived { id: ended, .. } | Event::Failed { id: ended, .. } => {
                *ended == id
            }
            _ => false,
        };
        let ends: Vec<&Event> = self.events.iter().filter(of).collect();
        assert!(ends.len() < 2, "{id} ended more than once: {ends:?}");
        ends.first().copied()
    }

    /// Whether a transfer failed here.
    pub fn failed(&self, id: TransferId) -> bool {
        matches!(self.end(id), Some(Event::Failed { .. }))
    }

    /// Whether an event was reported.
    pub fn saw(&self, event: &Event) -> bool {
        self.events.contains(event)
    }

    /// Whether a connection was lost.
    pub fn lost_someone(&self) -> bool {
        self.events.iter().any(|event| matches!(event, Event::PeerLost { .. }))
    }

    fn poll(&mut self) -> bool {
        let before = self.events.len();
        self.transport.poll(&mut self.events);
        self.events.len() > before
    }
}

/// Polls the parties in turn until `done`; sleeps on their descriptors when all of them say so. Panics with `what` after a minute.
pub fn until(parties: &mut [&mut Party], what: &str, mut done: impl FnMut(&[&mut Party]) -> bool) {
    let start = Instant::now();
    while !done(parties) {
        assert!(
            start.elapsed() < DEADLINE,
            "waited in vain: {what}; events: {:?}",
            parties.iter().map(|p| last(&p.events)).collect::<Vec<_>>()
        );
        turn(parties, Duration::from_millis(20));
    }
}

/// Polls the parties a number of times.
pub(super) fn turns(parties: &mut [&mut Party], times: usize) {
    for _ in 0..times {
        turn(parties, Duration::ZERO);
    }
}

/// Polls each party once. Then, when nobody has more to do, waits for one of their descriptors; returns whether one became readable.
pub(super) fn turn(parties: &mut [&mut Party], patience: Duration) -> bool {
    let mut reported = false;
    for party in parties.iter_mut() {
        reported |= party.poll();
    }
    if reported || patience.is_zero() {
        return true;
    }
    let mut fds = Vec::new();
    for party in parties.iter_mut() {
        match party.transport.arm() {
            Wait::Ready(fd) => fds.push(fd),
            Wait::Busy | Wait::MustPoll => return true,
        }
    }
    let mut polled: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    let patience = Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: patience.subsec_nanos().into() };
    poll(&mut polled, Some(&patience)).is_ok_and(|ready| ready > 0)
}

fn last(events: &[Event]) -> &[Event] {
    events.get(events.len().saturating_sub(8)..).unwrap_or_default()
}

/// The device that parties open.
pub(super) fn device(provider: &dyn Provider) -> Device {
    let mut devices: Vec<_> = provider.discover().into_iter().filter(|device| device.unavailable.is_none()).collect();
    let at = devices.iter().position(|device| device.name == "lo").unwrap_or(0);
    if devices.is_empty() {
        panic!("{} has no usable device here", provider.kind());
    }
    devices.swap_remove(at)
}

/// Two parties, each connected to the other.
pub struct Pair {
    /// The first.
    pub a: Party,
    /// The second.
    pub b: Party,
    /// The second, as the first knows it.
    pub b_at_a: PeerId,
    /// The first, as the second knows it.
    pub a_at_b: PeerId,
}

impl Pair {
    /// Opens and connects both.
    pub fn open(provider: &dyn Provider, options: &Options) -> Pair {
        let (mut a, mut b) = (Party::open(provider, options), Party::open(provider, options));
        let (b_at_a, a_at_b) = (a.connect(&b), b.connect(&a));
        let mut pair = Pair { a, b, b_at_a, a_at_b };
        pair.until("both connect", |a, b| {
            a.saw(&Event::Connected { peer: b_at_a }) && b.saw(&Event::Connected { peer: a_at_b })
        });
        pair
    }

    /// [`until`] over both.
    pub fn until(&mut self, what: &str, mut done: impl FnMut(&Party, &Party) -> bool) {
        until(&mut [&mut self.a, &mut self.b], what, |parties| match parties {
            [a, b] => done(a, b),
            _ => false,
        });
    }

    /// [`turns`] over both.
    pub fn turns(&mut self, times: usize) {
        turns(&mut [&mut self.a, &mut self.b], times);
    }
}
