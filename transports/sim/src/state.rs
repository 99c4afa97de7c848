//! The fabric itself: who is connected, what moves, what happens when.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::sync::Arc;

use kvferry_core::{Direction, End, FenceProof, PoolId, TransferId, UnitRange};
use kvferry_transport::{Event, Options, Pool, Transfer, TransferError};

use crate::copy::land;
use crate::due::Due;
use crate::fabric::{FabricOptions, NicId};
use crate::flow::{Flow, FlowId, Running, Stage, Stop};
use crate::link::{Link, LinkId};
use crate::nic::NicState;

/// Pushes that may wait at one NIC for somebody to expect them.
const WAITING_MAX: usize = 4096;

pub(crate) struct State {
    pub(crate) options: FabricOptions,
    /// Nanoseconds.
    pub(crate) now: u64,
    pub(crate) nics: BTreeMap<NicId, NicState>,
    pub(crate) flows: BTreeMap<FlowId, Flow>,
    pub(crate) links: BTreeMap<LinkId, Link>,
    due: BTreeMap<(u64, u64), Due>,
    ready: BTreeSet<NicId>,
    /// Numbers given out, to whatever needs one.
    numbers: u64,
    random: u64,
    hash: u64,
    happened: u64,
}

impl State {
    pub(crate) fn new(options: FabricOptions) -> Self {
        let random = options.seed;
        State {
            options,
            now: 0,
            nics: BTreeMap::new(),
            flows: BTreeMap::new(),
            links: BTreeMap::new(),
            due: BTreeMap::new(),
            ready: BTreeSet::new(),
            numbers: 0,
            random,
            hash: 0xcbf2_9ce4_8422_2325,
            happened: 0,
        }
    }

    pub(crate) fn next_at(&self) -> Option<u64> {
        self.due.first_key_value().map(|((at, _), _)| *at)
    }

    pub(crate) fn take_ready(&mut self) -> Vec<NicId> {
        mem::take(&mut self.ready).into_iter().collect()
    }

    pub(crate) fn digest(&self) -> (u64, u64) {
        (self.hash, self.happened)
    }

    pub(crate) fn advance(&mut self, now: u64) {
        while let Some(entry) = self.due.first_entry()
            && entry.key().0 <= now
        {
            self.now = self.now.max(entry.key().0);
            let due = entry.remove();
            self.fire(due);
        }
        self.now = self.now.max(now);
    }

    pub(crate) fn add_nic(&mut self, options: Options) -> (NicId, u128) {
        let key = self.fresh_key();
        let nic = NicId(self.number() as u32);
        self.nics.insert(nic, NicState::new(key, options));
        (nic, key)
    }

    pub(crate) fn remove_nic(&mut self, nic: NicId) {
        self.nics.remove(&nic);
        self.ready.remove(&nic);
        let error = TransferError::PeerLost("its NIC is down".to_owned());
        for link in self.links_where(|link| link.dialer.0 == nic || link.acceptor.0 == nic) {
            self.close(link, nic, &error, "its NIC is down");
        }
        // What was on its way died with the wire's end.
        for flow in self.flows_where(|flow| flow.initiator == nic || flow.owner == nic) {
            self.stop(flow, nic, error.clone(), error.clone());
            self.finish_stopped(flow);
        }
    }

    /// Keys only have to differ; guessing them is no part of a simulation.
    pub(crate) fn fresh_key(&mut self) -> u128 {
        let mut next = || {
            self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = self.random;
            word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            u128::from(word ^ (word >> 31))
        };
        next() << 64 | next()
    }

    pub(crate) fn unbind(&mut self, nic: NicId, pool: PoolId) {
        let Some(state) = self.nics.get_mut(&nic) else { return };
        let Some(bound) = state.pools.get_mut(&pool) else { return };
        bound.going = true;
        state.drop_unmet(&TransferError::Unbound, |unmet| unmet.expected.pool == pool);
        let withdrawn = TransferError::Refused("the pool was withdrawn".to_owned());
        for id in self.flows_where(|flow| flow.uses(nic, pool)) {
            let here = self.flows.get(&id).is_some_and(|flow| flow.initiator == nic);
            let (at_initiator, at_owner) = if here {
                (TransferError::Unbound, withdrawn.clone())
            } else {
                (withdrawn.clone(), TransferError::Unbound)
            };
            self.stop(id, nic, at_initiator, at_owner);
        }
        self.let_pools_go(nic);
    }

    pub(crate) fn request(
        &mut self,
        nic: NicId,
        owner: NicId,
        link: LinkId,
        remote: (PoolId, u128),
        local: Pool,
        transfer: Transfer,
    ) {
        let id = FlowId(self.number());
        if let Some(state) = self.nics.get_mut(&nic) {
            state.posted.insert(transfer.id, id);
        }
        let flow = Flow {
            transfer,
            initiator: nic,
            owner,
            link,
            remote,
            local,
            stage: Stage::Requested,
            stop: None,
            pieces: 0,
        };
        self.flows.insert(id, flow);
        self.later(Due::Request { flow: id });
    }

    pub(crate) fn cancel(&mut self, nic: NicId, id: TransferId) {
        let Some(state) = self.nics.get_mut(&nic) else { return };
        let posted = state.posted.get(&id).copied();
        let met = state.expected.get(&id).and_then(|expectation| expectation.flow);
        state.drop_unmet(&TransferError::Cancelled, |unmet| unmet.expected.id == id);
        self.ready.insert(nic);
        let other = |who: &str| TransferError::Refused(format!("the {who} cancelled it"));
        if let Some(flow) = posted {
            self.stop(flow, nic, TransferError::Cancelled, other("source"));
        }
        if let Some(flow) = met {
            self.stop(flow, nic, other("receiver"), TransferError::Cancelled);
        }
    }

    /// A push and its expectation have met.
    pub(crate) fn meet(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let owner = flow.owner;
        let Some(met) = self.nics.get_mut(&owner).and_then(|nic| nic.expected.get_mut(&flow.transfer.id)) else {
            return;
        };
        let (posted, expected) = (&flow.transfer, &met.expected);
        let (there, here) = (posted.program.fingerprint(), expected.program.fingerprint());
        let refuse = |why: &str| (TransferError::Refused(why.to_owned()), TransferError::Refused(why.to_owned()));
        let refused = if met.flow.is_some() {
            return self.refuse(id, "a push of that name is under way");
        } else if there != here {
            Some((
                TransferError::Mismatch { local: there, remote: here },
                TransferError::Mismatch { local: here, remote: there },
            ))
        } else if posted.range != expected.range {
            Some(refuse("another part of the program is expected"))
        } else if flow.remote.0 != expected.pool {
            Some(refuse("it is expected in another pool"))
        } else {
            None
        };
        met.flow = Some(id);
        let program =
            Arc::new((*posted.program).clone().with_tables(End::Destination, expected.program.destinations.clone()));
        let range = expected.range;
        let pool = met.pool.clone();
        flow.stage = Stage::Running(Running { program, pool, left: range, left_bytes: 0, slice: EMPTY });
        match refused {
            Some((at_initiator, at_owner)) => self.stop(id, owner, at_initiator, at_owner),
            None => self.start(id),
        }
    }

    fn fire(&mut self, due: Due) {
        self.happened += 1;
        let [a, b, c] = due.words();
        for word in [self.now, a, b, c] {
            self.hash = (self.hash ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
        }
        match due {
            Due::Hello { link } => self.hello(link),
            Due::Welcome { link } => self.welcome(link),
            Due::Report { nic, event } => self.report(nic, event),
            Due::End { nic, id, posted, event } => self.end(nic, id, posted, event),
            Due::Request { flow } => self.requested(flow),
            Due::Slice { flow } => self.landed(flow),
            Due::Refuse { flow } => {
                if self.flows.get(&flow).is_some_and(|flow| matches!(flow.stage, Stage::Waiting)) {
                    self.refuse(flow, "nobody expects it");
                }
            }
            Due::Fenced { nic, remote, peer } => {
                if self.flows.values().any(|flow| flow.joins(nic, remote)) {
                    self.later(Due::Fenced { nic, remote, peer });
                } else {
                    self.report(nic, Event::Fenced { peer, proof: FenceProof::EndpointDestroyed });
                }
            }
        }
    }

    /// A post has reached the NIC that owns the other pool.
    fn requested(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let Some(owner) = self.nics.get_mut(&flow.owner) else { return };
        let Some(pool) =
            owner.pool(flow.remote.0).filter(|bound| bound.key == flow.remote.1).map(|bound| bound.pool.clone())
        else {
            return self.refuse(id, "the pool is not bound here (any more)");
        };
        match flow.transfer.direction {
            Direction::Pull => {
                let program = Arc::clone(&flow.transfer.program);
                if let Err(error) = program.validate(End::Source, pool.layout()) {
                    return self.refuse(id, &error.to_string());
                }
                let left = flow.transfer.range;
                flow.stage = Stage::Running(Running { program, pool, left, left_bytes: 0, slice: EMPTY });
                self.start(id);
            }
            Direction::Push => {
                let name = flow.transfer.id;
                if owner.expected.contains_key(&name) {
                    self.meet(id);
                } else if owner.waiting.len() >= WAITING_MAX || owner.waiting.contains_key(&name) {
                    self.refuse(id, "too many pushes wait to be expected");
                } else {
                    flow.stage = Stage::Waiting;
                    owner.waiting.insert(name, id);
                    let wait = owner.options.unexpected_wait_ms.saturating_mul(1_000_000);
                    self.at(self.now.saturating_add(wait), Due::Refuse { flow: id });
                }
            }
        }
    }

    fn start(&mut self, id: FlowId) {
        let latency = self.latency();
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let Stage::Running(running) = &mut flow.stage else { return };
        let units = running.program.units();
        running.left = UnitRange { start: running.left.start.min(units), end: running.left.end.min(units) };
        running.left_bytes = running.program.bytes_in(running.left);
        if running.left_bytes == 0 {
            running.left.start = running.left.end;
        }
        self.go_on(id, self.now.saturating_add(latency));
    }

    /// Sends the next slice, not before `earliest`, or ends.
    fn go_on(&mut self, id: FlowId, earliest: u64) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let (source, destination) = flow.ends();
        let Stage::Running(running) = &mut flow.stage else { return };
        if running.left.is_empty() {
            return self.complete(id);
        }
        let limit = |nic: &NicState| nic.options.poll_bytes_max;
        let budget = [self.nics.get(&source).map(limit), self.nics.get(&destination).map(limit)];
        let budget = budget.into_iter().flatten().fold(self.options.slice_bytes, u64::min).max(1);
        let bytes = running.next_slice(budget);
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.options.bytes_per_second.max(1));
        let free = self.nics.get(&source).map_or(0, |nic| nic.out_free_at);
        let free = free.max(self.nics.get(&destination).map_or(0, |nic| nic.in_free_at));
        let lands = earliest.max(free).saturating_add(u64::try_from(nanos).unwrap_or(u64::MAX).max(1));
        if let Some(nic) = self.nics.get_mut(&source) {
            nic.out_free_at = lands;
        }
        if let Some(nic) = self.nics.get_mut(&destination) {
            nic.in_free_at = lands;
        }
        self.at(lands, Due::Slice { flow: id });
    }

    fn landed(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let Stage::Running(running) = &mut flow.stage else { return };
        let slice = mem::replace(&mut running.slice, EMPTY);
        let (source, destination) = match flow.transfer.direction {
            Direction::Pull => (&running.pool, &flow.local),
            Direction::Push => (&flow.local, &running.pool),
        };
        // A transfer that was stopped meanwhile still lands: that is why its end had to wait.
        match land(&running.program, slice, source, destination) {
            Ok(pieces) => flow.pieces += pieces,
            Err(error) => {
                let owner = flow.owner;
                self.stop(id, owner, error.clone(), error);
            }
        }
        if self.flows.get(&id).is_some_and(|flow| flow.stop.is_some()) {
            self.finish_stopped(id);
        } else {
            self.go_on(id, self.now);
        }
    }

    fn complete(&mut self, id: FlowId) {
        let Some(flow) = self.flows.remove(&id) else { return };
        let Stage::Running(running) = &flow.stage else { return };
        let (id, notice, pieces) = (flow.transfer.id, flow.transfer.notice, flow.pieces);
        let bytes = running.program.bytes_in(flow.transfer.range);
        let notice = notice.map(|notice| Event::Notice { notice });
        let completed = Event::Completed { id, bytes, pieces };
        match flow.transfer.direction {
            Direction::Pull => {
                self.end(flow.initiator, id, true, completed);
                if let Some(event) = notice {
                    self.later(Due::Report { nic: flow.owner, event });
                }
            }
            Direction::Push => {
                self.end(flow.owner, id, false, Event::Arrived { id, bytes, pieces });
                if let Some(event) = notice {
                    self.report(flow.owner, event);
                }
                self.later(Due::End { nic: flow.initiator, id, posted: true, event: completed });
            }
        }
        self.let_pools_go(flow.owner);
    }

    fn refuse(&mut self, id: FlowId, why: &str) {
        let Some(owner) = self.flows.get(&id).map(|flow| flow.owner) else { return };
        let error = TransferError::Refused(why.to_owned());
        self.stop(id, owner, error.clone(), error);
    }

    /// Ends a flow as soon as nothing of it is on its way.
    pub(crate) fn stop(&mut self, id: FlowId, by: NicId, at_initiator: TransferError, at_owner: TransferError) {
        let Some(flow) = self.flows.get_mut(&id).filter(|flow| flow.stop.is_none()) else { return };
        flow.stop = Some(Stop { by, at_initiator, at_owner });
        let under_way = matches!(&flow.stage, Stage::Running(running) if !running.slice.is_empty());
        if !under_way {
            self.finish_stopped(id);
        }
    }

    fn finish_stopped(&mut self, id: FlowId) {
        let Some(flow) = self.flows.remove(&id) else { return };
        let Some(stop) = flow.stop else { return };
        let name = flow.transfer.id;
        let mut ends = vec![(flow.initiator, true, stop.at_initiator)];
        if flow.transfer.direction == Direction::Push {
            match flow.stage {
                Stage::Running(_) => ends.push((flow.owner, false, stop.at_owner)),
                Stage::Waiting => {
                    if let Some(owner) = self.nics.get_mut(&flow.owner) {
                        owner.waiting.remove(&name);
                    }
                }
                Stage::Requested => {}
            }
        }
        for (nic, posted, error) in ends {
            let event = Event::Failed { id: name, error };
            if nic == stop.by {
                self.end(nic, name, posted, event);
            } else {
                self.later(Due::End { nic, id: name, posted, event });
            }
        }
        self.let_pools_go(flow.initiator);
        self.let_pools_go(flow.owner);
    }

    /// Tells a NIC that a transfer has ended there; once.
    fn end(&mut self, nic: NicId, id: TransferId, posted: bool, event: Event) {
        let Some(state) = self.nics.get_mut(&nic) else { return };
        let known = if posted { state.posted.remove(&id).is_some() } else { state.expected.remove(&id).is_some() };
        if known {
            self.report(nic, event);
        }
        self.let_pools_go(nic);
    }

    /// Reports pools that are withdrawn and unused.
    fn let_pools_go(&mut self, nic: NicId) {
        let Some(state) = self.nics.get_mut(&nic) else { return };
        let unused = |pool: &PoolId| !self.flows.values().any(|flow| flow.uses(nic, *pool));
        let gone: Vec<PoolId> =
            state.pools.iter().filter(|(id, bound)| bound.going && unused(id)).map(|(id, _)| *id).collect();
        for pool in &gone {
            state.pools.remove(pool);
            state.events.push(Event::Unbound { pool: *pool });
        }
        if !gone.is_empty() {
            self.ready.insert(nic);
        }
    }

    pub(crate) fn report(&mut self, nic: NicId, event: Event) {
        if let Some(state) = self.nics.get_mut(&nic) {
            state.events.push(event);
            self.ready.insert(nic);
        }
    }

    fn at(&mut self, at: u64, due: Due) {
        let number = self.number();
        self.due.insert((at, number), due);
    }

    /// One way across the fabric from now.
    pub(crate) fn later(&mut self, due: Due) {
        let at = self.now.saturating_add(self.latency().max(1));
        self.at(at, due);
    }

    fn latency(&self) -> u64 {
        u64::try_from(self.options.latency.as_nanos()).unwrap_or(u64::MAX)
    }

    pub(crate) fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    pub(crate) fn flows_where(&self, which: impl Fn(&Flow) -> bool) -> Vec<FlowId> {
        self.flows.iter().filter(|(_, flow)| which(flow)).map(|(id, _)| *id).collect()
    }
}

const EMPTY: UnitRange = UnitRange { start: 0, end: 0 };
