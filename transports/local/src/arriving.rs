//! Pushes of peers: a doorbell meets what is expected, and this side copies.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::{End, Program, TransferId};
use kvferry_transport::{Event, Expected, PeerId, PostError, RemotePool, TransferError};

use crate::backend::{Backend, Copying};
use crate::carrier::Carrier;
use crate::posted::FELL;
use crate::remote::Access;
use crate::transport::{Job, LocalTransport, Role};
use crate::wire::{Address, Doorbell, Frame, PushOutcome};

/// Bytes of doorbells that nobody expects yet.
const HELD_BYTES_MAX: usize = 256 << 20;

/// What this side lets be written, and who came for it.
pub(crate) struct Expecting {
    pub(crate) expected: Expected,
    /// The only transport that it is taken from, where that is known.
    from: Option<[u8; 16]>,
    /// Of the program, known before its doorbell comes.
    fingerprint: u64,
    arriving: Option<Arriving>,
}

/// Pushes that may be expected per transfer that may be posted: every step of a handover is expected from its beginning.
const EXPECTED_PER_POST: usize = 4;

/// A push that met its expectation.
struct Arriving {
    peer: PeerId,
    remote: RemotePool,
    doorbell: Doorbell,
    /// Both ends' tables.
    program: Arc<Program>,
    copying: bool,
    /// Its bytes and pieces are here, if its source still stood: what the owner is asked under, bytes, pieces.
    checking: Option<(u64, u64, u64)>,
}

/// A doorbell that nobody expects yet.
pub(crate) struct Held {
    doorbell: Doorbell,
    pub(crate) until: Instant,
}

impl<B: Backend> LocalTransport<B> {
    pub(crate) fn expect_push(&mut self, expected: Expected) -> Result<(), PostError> {
        let id = expected.id;
        if self.expecting.len() >= self.options.transfers_max.saturating_mul(EXPECTED_PER_POST) {
            return Err(PostError::Full);
        }
        if self.expecting.contains_key(&id) || self.is_draining(id, Role::Arrival) {
            return Err(PostError::Duplicate(id));
        }
        let bound = self
            .pools
            .get(&expected.pool)
            .filter(|bound| !bound.leaving)
            .ok_or(PostError::UnknownPool(expected.pool))?;
        expected
            .program
            .validate(End::Destination, bound.pool.layout())
            .map_err(|source| PostError::Program { id, source })?;
        let from = match expected.from.as_deref().map(|from| Address::decode(B::KIND, from)).transpose() {
            Ok(address) => address.map(|address| address.instance),
            Err(reason) => return Err(PostError::BadSource { id, reason }),
        };
        let fingerprint = expected.program.fingerprint();
        self.expecting.insert(id, Expecting { expected, from, fingerprint, arriving: None });
        self.expected = Some(Instant::now());
        // Its doorbell may have been first, and so may others' that have no business here.
        let came: Vec<(PeerId, TransferId)> = self.held.keys().filter(|(_, held)| *held == id).copied().collect();
        for key in came {
            if let Some(held) = self.held.remove(&key) {
                self.doorbell(key.0, held.doorbell);
            }
        }
        Ok(())
    }

    pub(crate) fn doorbell(&mut self, peer: PeerId, doorbell: Doorbell) {
        let id = doorbell.id;
        match self.expecting.get(&id) {
            Some(Expecting { from: Some(from), .. }) if !self.is_from(peer, from) => {
                return self.refuse(peer, &doorbell, "it is expected from another transport");
            }
            Some(Expecting { arriving: None, .. }) => return self.meet(peer, doorbell),
            Some(_) => return self.refuse(peer, &doorbell, "a push of that id is arriving already"),
            None => {}
        }
        let bytes: usize = self.held.values().map(|held| held.doorbell.program.len()).sum();
        let full = self.held.len() >= self.options.transfers_max.saturating_mul(4)
            || bytes + doorbell.program.len() > HELD_BYTES_MAX;
        if full || self.held.contains_key(&(peer, id)) {
            return self.refuse(
                peer,
                &doorbell,
                "too many pushes wait to be expected; expect them before they are posted",
            );
        }
        let until = Instant::now() + Duration::from_millis(self.options.unexpected_wait_ms.min(3_600_000));
        self.held.insert((peer, id), Held { doorbell, until });
    }

    fn is_from(&self, peer: PeerId, instance: &[u8; 16]) -> bool {
        self.peers.get(&peer).is_some_and(|peer| peer.identity.instance == *instance)
    }

    /// Refuses what nobody expected in time.
    pub(crate) fn check_held(&mut self, now: Instant) {
        let late: Vec<(PeerId, TransferId)> =
            self.held.iter().filter(|(_, held)| held.until <= now).map(|(&key, _)| key).collect();
        for (peer, id) in late {
            if let Some(held) = self.held.remove(&(peer, id)) {
                self.refuse(
                    peer,
                    &held.doorbell,
                    "nobody expects it; the receiver has cancelled it or never planned it",
                );
            }
        }
    }

    fn refuse(&mut self, peer: PeerId, doorbell: &Doorbell, reason: &str) {
        self.send(peer, &refusal(doorbell, reason));
    }

    fn meet(&mut self, peer: PeerId, doorbell: Doorbell) {
        let id = doorbell.id;
        let Some(expecting) = self.expecting.get_mut(&id) else { return };
        let announced = match Program::decode(&doorbell.program) {
            Ok(program) => program,
            // Nobody's plan looks like that; the expectation stays for the true one.
            Err(error) => return self.refuse(peer, &doorbell, &format!("its program is malformed: {error}")),
        };
        let local = expecting.fingerprint;
        // What was planned alike has no need to be hashed: its sender waits.
        let is_same = announced.segments == expecting.expected.program.segments;
        let remote = if is_same { local } else { announced.fingerprint() };
        let range = expecting.expected.range;
        let end = if local != remote {
            Some((PushOutcome::Mismatch(local), TransferError::Mismatch { local, remote }))
        } else if (range.start, range.end) != (doorbell.start, doorbell.end) {
            let reason = format!(
                "units {}..{} were announced where {}..{} are expected; split alike at both ends",
                doorbell.start, doorbell.end, range.start, range.end
            );
            Some((PushOutcome::Refused(reason.clone()), TransferError::Refused(reason)))
        } else {
            None
        };
        if let Some((outcome, error)) = end {
            self.expecting.remove(&id);
            self.send(peer, &Frame::PushEnd { id, serial: doorbell.serial, outcome });
            self.events.push(Event::Failed { id, error });
            return;
        }
        let expected = Program::clone(&expecting.expected.program);
        let program = Arc::new(expected.with_tables(End::Source, announced.sources));
        let (pool, token) = (doorbell.pool, doorbell.token);
        expecting.arriving =
            Some(Arriving { peer, remote: RemotePool(u32::MAX), doorbell, program, copying: false, checking: None });
        let remote = self.remote(peer, pool, token);
        if let Some(Expecting { arriving: Some(arriving), .. }) = self.expecting.get_mut(&id) {
            arriving.remote = remote;
        }
        self.resume_push(id);
    }

    /// Starts the pushes that waited for their source to be mapped.
    pub(crate) fn resume_pushes(&mut self, remote: RemotePool) {
        let waits = |e: &Expecting| e.arriving.as_ref().is_some_and(|a| a.remote == remote && !a.copying);
        let waiting: Vec<TransferId> = self.expecting.iter().filter(|(_, e)| waits(e)).map(|(&id, _)| id).collect();
        for id in waiting {
            self.resume_push(id);
        }
    }

    fn resume_push(&mut self, id: TransferId) {
        let Some(Expecting { expected, arriving: Some(arriving), .. }) = self.expecting.get_mut(&id) else { return };
        let Some(remote) = self.remotes.get(&arriving.remote) else { return };
        let (memory, layout) = match (&remote.access, &remote.layout) {
            (Access::Refused(reason), _) => {
                let reason = format!("its source cannot be read: {reason}");
                return self.fail_arriving_id(id, &TransferError::Refused(reason.clone()), Some(&reason));
            }
            (Access::Ready(memory), Some(layout)) => (Rc::clone(memory), Arc::clone(layout)),
            (Access::Closed, _) => {
                let closed = arriving.remote;
                return self.reopen(closed);
            }
            _ => return,
        };
        if let Err(error) = arriving.program.validate(End::Source, &layout) {
            let reason = error.to_string();
            return self.fail_arriving_id(id, &TransferError::Refused(reason.clone()), Some(&reason));
        }
        let Some(bound) = self.pools.get(&expected.pool) else { return };
        arriving.copying = true;
        let (program, range, pool) = (Arc::clone(&arriving.program), expected.range, bound.pool.clone());
        match self.backend.copy(program, range, layout, memory, pool) {
            Ok(mut copy) => {
                copy.begin();
                self.jobs.push_back(Job { id, role: Role::Arrival, copy });
            }
            Err(error) => self.fail_arriving_id(id, &error, Some(&error.to_string())),
        }
    }

    /// The last byte of a push is in place.
    pub(crate) fn arrived(&mut self, id: TransferId, bytes: u64, pieces: u64) {
        if !B::CHECKS {
            return self.arrival_counts(id, bytes, pieces);
        }
        let serial = self.next_serial;
        let Some(Expecting { arriving: Some(arriving), .. }) = self.expecting.get_mut(&id) else { return };
        self.next_serial += 1;
        arriving.checking = Some((serial, bytes, pieces));
        let (peer, remote) = (arriving.peer, arriving.remote);
        self.ask_whether_stood(peer, serial, remote);
    }

    /// The owner says whether the source of a push stood while it was copied.
    pub(crate) fn arrival_checked(&mut self, peer: PeerId, serial: u64, stood: bool) {
        let found = self.expecting.iter().find_map(|(&id, expecting)| {
            let arriving = expecting.arriving.as_ref().filter(|arriving| arriving.peer == peer)?;
            let (asked, bytes, pieces) = arriving.checking?;
            (asked == serial).then_some((id, bytes, pieces))
        });
        let Some((id, bytes, pieces)) = found else { return };
        if stood {
            self.arrival_counts(id, bytes, pieces);
        } else {
            self.fail_arriving_id(id, &TransferError::Refused(FELL.into()), Some(FELL));
        }
    }

    fn arrival_counts(&mut self, id: TransferId, bytes: u64, pieces: u64) {
        let Some(Expecting { arriving: Some(arriving), .. }) = self.expecting.remove(&id) else { return };
        let outcome = PushOutcome::Done { bytes, pieces };
        self.send(arriving.peer, &Frame::PushEnd { id, serial: arriving.doorbell.serial, outcome });
        // Its source waits for that.
        self.carrier.flush();
        self.events.push(Event::Arrived { id, bytes, pieces });
        self.expected = Some(Instant::now());
        if let Some(notice) = arriving.doorbell.notice {
            self.events.push(Event::Notice { notice });
        }
    }

    /// The source no longer wants it.
    pub(crate) fn push_cancelled(&mut self, peer: PeerId, id: TransferId, serial: u64) {
        let reason = "its source cancelled it";
        let waits = self.held.get(&(peer, id)).is_some_and(|held| held.doorbell.serial == serial);
        if let Some(held) = if waits { self.held.remove(&(peer, id)) } else { None } {
            self.refuse(peer, &held.doorbell, reason);
        }
        let ours = |a: &Arriving| a.peer == peer && a.doorbell.serial == serial;
        if self.expecting.get(&id).and_then(|e| e.arriving.as_ref()).is_some_and(ours) {
            self.fail_arriving_id(id, &TransferError::Refused(reason.into()), Some(reason));
        }
    }

    /// Fails one expectation at once, telling the source if it came already.
    pub(crate) fn fail_arriving_id(&mut self, id: TransferId, error: &TransferError, tell: Option<&str>) {
        let Some(Expecting { expected, arriving, .. }) = self.expecting.remove(&id) else { return };
        let Some(Arriving { peer, doorbell, .. }) = arriving else {
            self.events.push(Event::Failed { id, error: error.clone() });
            return;
        };
        // The source may reuse its memory from then on.
        let tell = tell.map(|reason| refusal(&doorbell, reason));
        self.end_failed((id, Role::Arrival), peer, expected.pool, error.clone(), tell);
    }

    /// Fails what some peers are pushing, and drops their doorbells.
    pub(crate) fn fail_arriving(&mut self, whose: impl Fn(PeerId) -> bool, error: &TransferError, tell: Option<&str>) {
        let met = |e: &Expecting| e.arriving.as_ref().is_some_and(|a| whose(a.peer));
        let ended: Vec<TransferId> = self.expecting.iter().filter(|(_, e)| met(e)).map(|(&id, _)| id).collect();
        for id in ended {
            self.fail_arriving_id(id, error, tell);
        }
        let dropped: Vec<(PeerId, TransferId)> = self.held.keys().filter(|(peer, _)| whose(*peer)).copied().collect();
        for key in dropped {
            if let (Some(held), Some(reason)) = (self.held.remove(&key), tell) {
                self.refuse(key.0, &held.doorbell, reason);
            }
        }
    }

    /// Fails what is being read from one pool of a peer.
    pub(crate) fn fail_arriving_from(&mut self, remote: RemotePool, error: &TransferError, reason: &str) {
        let reads = |e: &Expecting| e.arriving.as_ref().is_some_and(|a| a.remote == remote);
        let ended: Vec<TransferId> = self.expecting.iter().filter(|(_, e)| reads(e)).map(|(&id, _)| id).collect();
        for id in ended {
            self.fail_arriving_id(id, error, Some(reason));
        }
    }
}

fn refusal(doorbell: &Doorbell, reason: &str) -> Frame {
    let outcome = PushOutcome::Refused(reason.into());
    Frame::PushEnd { id: doorbell.id, serial: doorbell.serial, outcome }
}
