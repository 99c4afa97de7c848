//! How transfers begin and end.

use std::sync::Arc;

use kvferry_core::{End, PoolId, Program, TransferId, UnitRange};
use kvferry_transport::{Event, Pool, Transfer, TransferError};

use crate::due::Due;
use crate::fabric::{NicId, Timing};
use crate::flow::{Flow, FlowId, INITIATOR, OWNER, Running, Stage, Stop, Times};
use crate::link::{LinkId, STALE};
use crate::nic::Health;
use crate::state::State;

/// Pushes that may wait at one NIC for somebody to expect them.
const WAITING_MAX: usize = 4096;

impl State {
    pub(crate) fn request(
        &mut self,
        nics: [NicId; 2],
        link: LinkId,
        remote: (PoolId, u128),
        local: Pool,
        transfer: Transfer,
    ) {
        let (name, nic) = (transfer.id, nics[INITIATOR]);
        let flow = Flow {
            transfer,
            nics,
            link,
            remote,
            local,
            stage: Stage::Requested,
            over: [false; 2],
            stop: None,
            in_flight: 0,
            queued: false,
            landed: 0,
            landed_bytes: 0,
            pieces: 0,
            times: Times { posted: self.now, ..Times::default() },
            last_at: 0,
            asked: false,
            told: false,
            lost: false,
        };
        let id = FlowId(self.flows.insert(flow));
        if let Some(state) = self.nic_mut(nic) {
            state.posted.insert(name, id);
            state.stats.posted_max = state.stats.posted_max.max(state.posted.len() as u64);
        }
        if let Some(link) = self.links.get_mut(link.0) {
            link.flows.insert(id);
        }
        if let Some(shadow) = &mut self.shadow {
            shadow.begin(name.handover());
        }
        self.send(nic, Due::Request { flow: id });
    }

    /// A post has reached the NIC that owns the other pool.
    pub(crate) fn requested(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get(id.0) else { return };
        let (owner, link, name, is_push) = (flow.nics[OWNER], flow.link, flow.transfer.id, flow.is_push());
        match self.links.get(link.0).map(|link| link.sides[OWNER]) {
            Some(side) if side.open => {}
            // The dial was held up longer than what came after it.
            Some(side) if side.peer.is_none() => return self.later(Due::Request { flow: id }),
            _ => {
                let reason = "the peer has closed the connection";
                return self.send(owner, Due::Farewell { link, side: INITIATOR, reason });
            }
        }
        if self.is_stale(link) {
            self.refuse(id, STALE);
            return self.send(owner, Due::Rekeyed { link });
        }
        let Some(pool) = self.remote_pool(id) else {
            return self.refuse(id, "the pool is not bound here (any more)");
        };
        if !is_push {
            let Some(program) = self.flows.get(id.0).map(|flow| Arc::clone(&flow.transfer.program)) else { return };
            return match program.validate(End::Source, pool.layout()) {
                Ok(()) => {
                    self.run(id, Arc::clone(&program), program, pool);
                    self.offer(id);
                }
                Err(error) => self.refuse(id, &error.to_string()),
            };
        }
        let Some(state) = self.nic_mut(owner) else { return };
        if state.expected.contains_key(&name) {
            self.meet(id);
        } else if state.waiting.len() >= WAITING_MAX || state.waiting.contains_key(&name) {
            self.refuse(id, "too many pushes wait to be expected");
        } else {
            state.waiting.insert(name, id);
            let wait = state.options.unexpected_wait_ms.saturating_mul(1_000_000);
            if let Some(flow) = self.flows.get_mut(id.0) {
                flow.stage = Stage::Waiting;
            }
            self.at(self.now.saturating_add(wait), Due::Unexpected { flow: id });
        }
    }

    /// The owner's pool, if the key is (still) the right one.
    fn remote_pool(&self, id: FlowId) -> Option<Pool> {
        let flow = self.flows.get(id.0)?;
        let bound = self.nic(flow.nics[OWNER])?.pools.get(&flow.remote.0)?;
        (bound.key == flow.remote.1).then(|| bound.pool.clone())
    }

    /// A push and its expectation have met.
    pub(crate) fn meet(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get(id.0) else { return };
        let (name, owner, posted) = (flow.transfer.id, flow.nics[OWNER], &flow.transfer);
        let Some(met) = self.nic(owner).and_then(|nic| nic.expected.get(&name)) else { return };
        if met.flow.is_some() {
            return self.refuse(id, "a push of that name is under way");
        }
        let (there, here) = (posted.program.fingerprint(), met.expected.program.fingerprint());
        let refused = if there != here {
            Some(TransferError::Mismatch { local: here, remote: there })
        } else if posted.range != met.expected.range {
            Some(TransferError::Refused("another part of the program is expected".to_owned()))
        } else if flow.remote.0 != met.expected.pool {
            Some(TransferError::Refused("it is expected in another pool".to_owned()))
        } else {
            None
        };
        let (source, destination) = (Arc::clone(&posted.program), Arc::clone(&met.expected.program));
        let pool = met.pool.clone();
        if let Some(met) = self.nic_mut(owner).and_then(|nic| nic.expected.get_mut(&name)) {
            met.flow = Some(id);
        }
        self.run(id, source, destination, pool);
        match refused {
            Some(error) => {
                let told = match &error {
                    TransferError::Mismatch { .. } => TransferError::Mismatch { local: there, remote: here },
                    error => error.clone(),
                };
                self.fail_end(id, OWNER, &error);
                self.tell(id, INITIATOR, told);
            }
            None => self.send(owner, Due::Grant { flow: id }),
        }
    }

    fn run(&mut self, id: FlowId, source: Arc<Program>, destination: Arc<Program>, pool: Pool) {
        let Some(flow) = self.flows.get_mut(id.0) else { return };
        let (range, units) = (flow.transfer.range, source.units());
        let mut left = UnitRange { start: range.start.min(units), end: range.end.min(units) };
        let left_bytes = source.bytes_in(left);
        if left_bytes == 0 {
            left.start = left.end;
        }
        let mut fails_after = None;
        if self.errors_ppm > 0 && self.errors.below(1_000_000) < u64::from(self.errors_ppm) {
            let slices = left_bytes / self.options.slice_bytes.max(1) + 1;
            fails_after = Some(1 + self.errors.below(slices));
        }
        let watched = self.shadow.as_ref().and_then(|shadow| {
            let (from, to) = if flow.is_push() { (&flow.local, &pool) } else { (&pool, &flow.local) };
            shadow.watched(from, to)
        });
        flow.stage =
            Stage::Running(Running { source, destination, pool, range, left, left_bytes, fails_after, watched });
    }

    /// The writer hears that its push is expected.
    pub(crate) fn granted(&mut self, id: FlowId) {
        self.offer(id);
    }

    /// A push has waited long enough.
    pub(crate) fn waited(&mut self, id: FlowId) {
        if self.flows.get(id.0).is_some_and(|flow| matches!(flow.stage, Stage::Waiting) && !flow.over[OWNER]) {
            self.refuse(id, "nobody expects it");
        }
    }

    /// The owner has nothing to do with it, and says why.
    fn refuse(&mut self, id: FlowId, why: &str) {
        let error = TransferError::Refused(why.to_owned());
        // Said first: where nobody expects it, nothing else keeps the flow.
        self.tell(id, INITIATOR, error.clone());
        self.leave(id, OWNER);
    }

    pub(crate) fn cancel(&mut self, nic: NicId, id: TransferId) {
        let Some(state) = self.nic_mut(nic).filter(|state| state.health != Health::BlackHole) else { return };
        let posted = state.posted.get(&id).copied();
        let met = state.expected.get(&id).and_then(|expectation| expectation.flow);
        if met.is_none() && state.expected.remove(&id).is_some() {
            self.report(nic, Event::Failed { id, error: TransferError::Cancelled });
        }
        if let Some(flow) = posted {
            let at_owner = TransferError::Refused("the source cancelled it".to_owned());
            self.stop(flow, Stop { at_initiator: TransferError::Cancelled, at_owner });
        }
        if let Some(id) = met
            && let Some(flow) = self.flows.get_mut(id.0)
            && !std::mem::replace(&mut flow.asked, true)
        {
            // Only the writer's NIC can stop what it writes.
            self.send(nic, Due::Stop { flow: id });
        }
    }

    /// The writer's NIC is asked to stop; it answers once nothing of that push is on its way.
    pub(crate) fn asked_to_stop(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get_mut(id.0) else { return };
        flow.asked = false;
        if self.nics_health(id, INITIATOR) == Some(Health::Gone) {
            return;
        }
        let at_initiator = TransferError::Refused("the receiver cancelled it".to_owned());
        self.stop(id, Stop { at_initiator, at_owner: TransferError::Cancelled });
    }

    fn nics_health(&self, id: FlowId, end: usize) -> Option<Health> {
        self.nic(*self.flows.get(id.0)?.nics.get(end)?).map(|nic| nic.health)
    }

    /// No further slice leaves; it ends once nothing is on its way.
    pub(crate) fn stop(&mut self, id: FlowId, stop: Stop) {
        let Some(flow) = self.flows.get_mut(id.0) else { return };
        if flow.stop.is_none() {
            flow.stop = Some(stop);
        }
        if flow.in_flight == 0 {
            self.finish_stopped(id);
        }
    }

    /// Nothing of a stopped transfer is on its way any more.
    pub(crate) fn finish_stopped(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get_mut(id.0) else { return };
        let Some(Stop { at_initiator, at_owner }) = flow.stop.take() else { return };
        // An owner that has not met it waits on, as it would for one that never came.
        if flow.is_push() && matches!(flow.stage, Stage::Running(_)) {
            self.tell(id, OWNER, at_owner);
        } else {
            self.leave(id, OWNER);
        }
        self.fail_end(id, INITIATOR, &at_initiator);
    }

    /// All slices have landed.
    pub(crate) fn complete(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get(id.0) else { return };
        let Stage::Running(running) = &flow.stage else { return };
        let bytes = running.source.bytes_in(running.range);
        let (name, pieces, link) = (flow.transfer.id, flow.pieces, flow.link);
        let notice = flow.transfer.notice.map(|notice| Event::Notice { notice });
        let (failed, is_push) = (running.fails_after.is_some(), flow.is_push());
        let [initiator, owner] = flow.nics;
        if is_push {
            self.end(id, OWNER, Event::Arrived { id: name, bytes, pieces });
            if let Some(event) = notice {
                self.report(owner, event);
            }
            if failed {
                self.tell(id, INITIATOR, completion_error());
            } else {
                self.send(owner, Due::Done { flow: id });
            }
        } else if failed {
            self.fail_end(id, INITIATOR, &completion_error());
        } else {
            self.end(id, INITIATOR, Event::Completed { id: name, bytes, pieces });
            if let Some(event) = notice {
                self.send(initiator, Due::Notice { link, event: Box::new(event) });
            }
        }
    }

    /// The writer hears that all of its push is in place.
    pub(crate) fn done(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get(id.0) else { return };
        let Stage::Running(running) = &flow.stage else { return };
        let bytes = running.source.bytes_in(running.range);
        let completed = Event::Completed { id: flow.transfer.id, bytes, pieces: flow.pieces };
        self.end(id, INITIATOR, completed);
    }

    /// The owner hears of a pull's end.
    pub(crate) fn noticed(&mut self, link: LinkId, event: Event) {
        let owner = self.links.get(link.0).map(|link| link.sides[OWNER]);
        if let Some(owner) = owner.filter(|owner| owner.open) {
            self.report(owner.nic, event);
        }
    }

    /// Lets an end hear, one way across the fabric from now, that it failed.
    pub(crate) fn tell(&mut self, id: FlowId, end: usize, error: TransferError) {
        let Some(flow) = self.flows.get(id.0) else { return };
        let (from, name) = (flow.nics[1 - end], flow.transfer.id);
        self.send(from, Due::Tell { flow: id, end, event: Box::new(Event::Failed { id: name, error }) });
    }

    /// An end fails, at once.
    pub(crate) fn fail_end(&mut self, id: FlowId, end: usize, error: &TransferError) {
        let Some(name) = self.flows.get(id.0).map(|flow| flow.transfer.id) else { return };
        self.end(id, end, Event::Failed { id: name, error: error.clone() });
    }

    /// An end is over, and says so if anybody there knows of it; once.
    pub(crate) fn end(&mut self, id: FlowId, end: usize, event: Event) {
        let Some(flow) = self.flows.get(id.0).filter(|flow| !flow.over[end]) else { return };
        let (nic, name, is_push) = (flow.nics[end], flow.transfer.id, flow.is_push());
        if end == INITIATOR
            && let Event::Completed { bytes, .. } = event
            && let Some(timings) = &mut self.timings
        {
            let Times { posted, first_left, last_landed } = flow.times;
            timings.push(Timing {
                id: name,
                direction: flow.transfer.direction,
                nics: flow.nics,
                bytes,
                posted_at: posted,
                left_at: first_left.unwrap_or(self.now),
                landed_at: last_landed.max(posted),
                ended_at: self.now,
            });
        }
        self.leave(id, end);
        let Some(state) = self.nic_mut(nic).filter(|state| state.health != Health::BlackHole) else { return };
        let known = if end == INITIATOR {
            state.posted.remove(&name).is_some()
        } else {
            is_push
                && state.expected.get(&name).is_some_and(|met| met.flow == Some(id))
                && state.expected.remove(&name).is_some()
        };
        if known {
            self.report(nic, event);
        }
    }

    /// An end has nothing to do with it any more.
    fn leave(&mut self, id: FlowId, end: usize) {
        let Some(flow) = self.flows.get_mut(id.0) else { return };
        flow.over[end] = true;
        let (nic, name) = (flow.nics[end], flow.transfer.id);
        if end == OWNER
            && let Some(state) = self.nic_mut(nic)
            && state.waiting.get(&name) == Some(&id)
        {
            state.waiting.remove(&name);
        }
        self.let_go(id);
    }

    /// Forgets a transfer that is over at both ends, unless something of it is on its way.
    pub(crate) fn let_go(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get(id.0) else { return };
        let owner_waits = flow.is_push() && !flow.over[OWNER] && !matches!(flow.stage, Stage::Requested);
        if flow.in_flight > 0 || !flow.over[INITIATOR] || owner_waits {
            return;
        }
        let (link, handover) = (flow.link, flow.transfer.id.handover());
        self.flows.remove(id.0);
        if let Some(link) = self.links.get_mut(link.0) {
            link.flows.remove(&id);
        }
        if let Some(shadow) = &mut self.shadow {
            shadow.end(handover);
        }
    }

    pub(crate) fn unbind(&mut self, nic: NicId, pool: PoolId) {
        let Some(state) = self.nic_mut(nic) else { return };
        if state.pools.remove(&pool).is_none() {
            return;
        }
        state.drop_unmet(&TransferError::Unbound, |unmet| unmet.expected.pool == pool);
        self.wake(nic);
        let withdrawn = TransferError::Refused("the pool was withdrawn".to_owned());
        for id in self.flows_of(nic) {
            for end in [INITIATOR, OWNER] {
                if self.flows.get(id.0).is_some_and(|flow| flow.nics[end] == nic && flow.uses(end, pool)) {
                    self.tell(id, 1 - end, withdrawn.clone());
                    self.fail_end(id, end, &TransferError::Unbound);
                }
            }
        }
        self.report(nic, Event::Unbound { pool });
    }
}

/// What hardware says when it does not know why.
pub(crate) fn completion_error() -> TransferError {
    TransferError::Io { context: "completion", message: "the NIC reports an error".to_owned() }
}
