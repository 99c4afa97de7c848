//! The fabric itself: what happens when, and whom it reaches.

use std::collections::BTreeSet;
use std::mem;

use kvferry_transport::{Event, Options};

use crate::due::{Agenda, Due, Entry};
use crate::fabric::{FabricOptions, NicId, Timing};
use crate::flow::{Flow, FlowId, INITIATOR, OWNER, Slice};
use crate::link::{Link, LinkId};
use crate::nic::{Health, NicState};
use crate::random::Stream;
use crate::shadow::Shadow;
use crate::slab::Slab;

pub(crate) struct State {
    pub(crate) options: FabricOptions,
    /// Nanoseconds.
    pub(crate) now: u64,
    /// By number; those that are gone stay, for their numbers.
    nics: Vec<NicState>,
    pub(crate) flows: Slab<Flow>,
    pub(crate) links: Slab<Link>,
    pub(crate) slices: Slab<Slice>,
    /// Buffers to use again.
    pub(crate) spare: Vec<Vec<u8>>,
    /// Ordered pairs of NICs between which nothing passes.
    pub(crate) cuts: BTreeSet<(NicId, NicId)>,
    /// Of a million transfers, how many end in a completion error.
    pub(crate) errors_ppm: u32,
    pub(crate) jitter: Stream,
    pub(crate) errors: Stream,
    pub(crate) deaths: Stream,
    keys: Stream,
    /// Present while somebody asks for them.
    pub(crate) timings: Option<Vec<Timing>>,
    /// Present while somebody watches.
    pub(crate) shadow: Option<Shadow>,
    agenda: Agenda,
    ready: Vec<NicId>,
    hash: u64,
    happened: u64,
}

impl State {
    pub(crate) fn new(options: FabricOptions) -> Self {
        let seed = options.seed;
        State {
            options,
            now: 0,
            nics: Vec::new(),
            flows: Slab::new(),
            links: Slab::new(),
            slices: Slab::new(),
            spare: Vec::new(),
            cuts: BTreeSet::new(),
            errors_ppm: 0,
            jitter: Stream::new(seed, 1),
            errors: Stream::new(seed, 2),
            deaths: Stream::new(seed, 3),
            keys: Stream::new(seed, 4),
            timings: None,
            shadow: None,
            agenda: Agenda::default(),
            ready: Vec::new(),
            hash: 0xcbf2_9ce4_8422_2325,
            happened: 0,
        }
    }

    pub(crate) fn nic(&self, nic: NicId) -> Option<&NicState> {
        self.nics.get(nic.0 as usize)
    }

    pub(crate) fn nic_mut(&mut self, nic: NicId) -> Option<&mut NicState> {
        self.nics.get_mut(nic.0 as usize)
    }

    pub(crate) fn next_at(&self) -> Option<u64> {
        self.agenda.next_at()
    }

    pub(crate) fn take_ready(&mut self) -> Vec<NicId> {
        let mut ready = mem::take(&mut self.ready);
        ready.sort_unstable();
        for nic in &ready {
            if let Some(state) = self.nic_mut(*nic) {
                state.is_ready = false;
            }
        }
        ready
    }

    pub(crate) fn digest(&self) -> (u64, u64) {
        (self.hash, self.happened)
    }

    pub(crate) fn advance(&mut self, now: u64) {
        while let Some(entry) = self.agenda.take(now) {
            self.now = self.now.max(entry.at);
            self.fire(entry);
        }
        self.now = self.now.max(now);
    }

    pub(crate) fn add_nic(&mut self, options: Options) -> (NicId, u128) {
        let key = self.fresh_key();
        let nic = NicId(self.nics.len() as u32);
        self.nics.push(NicState::new(key, options));
        (nic, key)
    }

    /// Keys only have to differ; guessing them is no part of a simulation.
    pub(crate) fn fresh_key(&mut self) -> u128 {
        u128::from(self.keys.word()) << 64 | u128::from(self.keys.word())
    }

    fn fire(&mut self, entry: Entry) {
        let Entry { since, due, .. } = entry;
        self.happened += 1;
        let [a, b] = due.words();
        for word in [self.now, a, b] {
            self.hash = (self.hash ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
        }
        if let Some((from, to)) = self.path(&due)
            && !self.passes(from, to)
        {
            return self.stuck(since, due);
        }
        match due {
            Due::Hello { link } => self.hello(link),
            Due::Welcome { link } => self.welcome(link),
            Due::Farewell { link, side, reason } => self.hear_farewell(link, side, reason),
            Due::Rekeyed { link } => self.hear_of_new_keys(link),
            Due::Request { flow } => self.requested(flow),
            Due::Grant { flow } => self.granted(flow),
            Due::Slice { slice } => self.landed(slice),
            Due::Done { flow } => self.done(flow),
            Due::Stop { flow } => self.asked_to_stop(flow),
            Due::Tell { flow, end, event } => self.end(flow, end, *event),
            Due::Notice { link, event } => self.noticed(link, *event),
            Due::Egress { nic } => {
                if let Some(state) = self.nic_mut(nic) {
                    state.egress_armed = false;
                }
                self.egress(nic);
            }
            Due::Unexpected { flow } => self.waited(flow),
            Due::Report { nic, event } => self.report(nic, *event),
            Due::GiveUp { link } => self.break_off(link),
        }
    }

    /// Between which NICs it travels; nothing for what is over or does not travel.
    fn path(&self, due: &Due) -> Option<(NicId, NicId)> {
        let of_link = |link: &LinkId, from: usize| {
            let sides = self.links.get(link.0)?.sides;
            Some((sides[from].nic, sides[1 - from].nic))
        };
        let of_flow = |flow: &FlowId, from: usize| {
            let nics = self.flows.get(flow.0)?.nics;
            Some((nics[from], nics[1 - from]))
        };
        match due {
            Due::Hello { link } | Due::Notice { link, .. } => of_link(link, INITIATOR),
            Due::Welcome { link } | Due::Rekeyed { link } => of_link(link, OWNER),
            Due::Farewell { link, side, .. } => of_link(link, 1 - *side),
            Due::Request { flow } => of_flow(flow, INITIATOR),
            Due::Grant { flow } | Due::Done { flow } | Due::Stop { flow } => of_flow(flow, OWNER),
            Due::Tell { flow, end, .. } => of_flow(flow, 1 - *end),
            Due::Slice { slice } => {
                let flow = self.flows.get(self.slices.get(*slice)?.flow.0)?;
                Some((flow.nics[flow.source()], flow.nics[flow.destination()]))
            }
            Due::Egress { .. } | Due::Unexpected { .. } | Due::Report { .. } | Due::GiveUp { .. } => None,
        }
    }

    fn passes(&self, from: NicId, to: NicId) -> bool {
        let cut = !self.cuts.is_empty() && self.cuts.contains(&(from, to));
        !cut && self.nic(to).is_none_or(|nic| nic.health != Health::BlackHole)
    }

    /// Something did not get through: it is tried again, and given up after the retry time.
    fn stuck(&mut self, since: u64, due: Due) {
        let patience = nanos(self.options.retry_for);
        let again = self.now.saturating_add((patience / 8).max(1));
        if again.saturating_sub(since) <= patience {
            return self.agenda.put(again, since, due);
        }
        let link = match due {
            Due::Hello { link } | Due::Welcome { link } | Due::Rekeyed { link } | Due::Notice { link, .. } => {
                Some(link)
            }
            Due::Slice { slice } => self.drop_slice(slice),
            Due::Request { flow } | Due::Grant { flow } | Due::Done { flow } | Due::Tell { flow, .. } => {
                self.flows.get(flow.0).map(|flow| flow.link)
            }
            Due::Stop { flow } => {
                if let Some(flow) = self.flows.get_mut(flow.0) {
                    flow.asked = false;
                }
                None
            }
            // A dialer asks now and then whether anybody is still there; an acceptor does not.
            Due::Farewell { link, side, .. } => Some(link).filter(|_| side == INITIATOR),
            Due::Egress { .. } | Due::Unexpected { .. } | Due::Report { .. } | Due::GiveUp { .. } => None,
        };
        if let Some(link) = link {
            self.break_off(link);
        }
    }

    /// Tells software something; a black hole tells nothing.
    pub(crate) fn report(&mut self, nic: NicId, event: Event) {
        let Some(state) = self.nic_mut(nic) else { return };
        match state.health {
            Health::Gone => {}
            Health::BlackHole => {
                if matches!(event, Event::Fenced { .. } | Event::Unbound { .. } | Event::PeerLost { .. }) {
                    state.withheld.push(event);
                }
            }
            Health::Up | Health::Dead => {
                state.events.push(event);
                self.wake(nic);
            }
        }
    }

    /// Notes that a NIC has something to report.
    pub(crate) fn wake(&mut self, nic: NicId) {
        if let Some(state) = self.nic_mut(nic)
            && !mem::replace(&mut state.is_ready, true)
        {
            self.ready.push(nic);
        }
    }

    pub(crate) fn at(&mut self, at: u64, due: Due) {
        self.agenda.put(at, at, due);
    }

    /// One way across the fabric from now.
    pub(crate) fn later(&mut self, due: Due) {
        self.at(self.now.saturating_add(self.latency()), due);
    }

    /// The same, said by that NIC: a black hole says nothing.
    pub(crate) fn send(&mut self, from: NicId, due: Due) {
        if self.nic(from).is_none_or(|nic| nic.health != Health::BlackHole) {
            self.later(due);
        }
    }

    pub(crate) fn latency(&self) -> u64 {
        nanos(self.options.latency).max(1)
    }
}

pub(crate) fn nanos(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
