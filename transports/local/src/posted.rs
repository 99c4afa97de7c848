//! Transfers that this side posted. A pull is copied here; a push is announced, and its destination copies.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use kvferry_core::{End, TransferId};
use kvferry_transport::{DeviceEvent, Direction, Event, PeerId, PostError, RemotePool, Transfer, TransferError};

use crate::backend::{Backend, Copying};
use crate::carrier::Carrier;
use crate::remote::Access;
use crate::transport::{Job, LocalTransport, Role};
use crate::wire::{Doorbell, Frame, PUSH_BYTES_MAX, PushOutcome};

/// Why a source that was copied does not count.
pub(crate) const FELL: &str = "its owner withdrew the pool while it was read";

/// About what an encoded program takes, and each of its segments, beside four bytes a block.
const PROGRAM_BYTES: usize = 128;
const SEGMENT_BYTES: usize = 144;

/// A transfer that this side initiated.
pub(crate) struct Posted {
    pub(crate) transfer: Transfer,
    serial: u64,
    progress: Progress,
    /// A pull's program was checked against its source's layout.
    is_checked: bool,
    /// What has to be done first.
    after: Option<Arc<dyn DeviceEvent>>,
}

enum Progress {
    /// A pull whose source is not mapped yet, or a transfer that waits for an event.
    Waiting,
    /// A pull that is being copied.
    Copying,
    /// A pull whose bytes are here, if its source still stood: bytes and pieces.
    Checking(u64, u64),
    /// A push that the destination knows of.
    Announced,
    /// A push that was called back and may still be read; why it was.
    Stopping(TransferError),
}

impl Posted {
    pub(crate) fn is_push(&self) -> bool {
        self.transfer.direction == Direction::Push
    }

    pub(crate) fn reads_from(&self, remote: RemotePool) -> bool {
        self.transfer.direction == Direction::Pull && self.transfer.remote == remote
    }
}

impl<B: Backend> LocalTransport<B> {
    pub(crate) fn post_transfer(
        &mut self,
        transfer: Transfer,
        after: Option<Arc<dyn DeviceEvent>>,
    ) -> Result<(), PostError> {
        let id = transfer.id;
        if self.posted.len() >= self.options.transfers_max {
            return Err(PostError::Full);
        }
        if self.posted.contains_key(&id) || self.is_draining(id, Role::Pull) {
            return Err(PostError::Duplicate(id));
        }
        if self.peers.get(&transfer.peer).is_none_or(|peer| peer.is_stranger()) {
            return Err(PostError::UnknownPeer(transfer.peer));
        }
        let bound = self
            .pools
            .get(&transfer.local)
            .filter(|bound| !bound.leaving)
            .ok_or(PostError::UnknownPool(transfer.local))?;
        let unknown = PostError::UnknownRemote(transfer.remote);
        let remote = self.remotes.get(&transfer.remote).filter(|remote| remote.peer == transfer.peer).ok_or(unknown)?;
        let program = |source| PostError::Program { id, source };
        let serial = self.next_serial;
        self.next_serial += 1;
        match transfer.direction {
            Direction::Pull => {
                transfer.program.validate(End::Destination, bound.pool.layout()).map_err(program)?;
                if let Some(layout) = &remote.layout {
                    transfer.program.validate(End::Source, layout).map_err(program)?;
                }
                let (is_checked, remote) = (remote.layout.is_some(), transfer.remote);
                self.posted.insert(id, Posted { transfer, serial, progress: Progress::Waiting, is_checked, after });
                self.resume_pull(id, remote);
            }
            Direction::Push => {
                transfer.program.validate(End::Source, bound.pool.layout()).map_err(program)?;
                let is_first = after.is_some();
                let progress = Progress::Waiting;
                self.posted.insert(id, Posted { transfer, serial, progress, is_checked: false, after });
                if is_first {
                    self.waiting.push(id);
                    self.check_events();
                } else {
                    self.announce(id);
                }
            }
        }
        Ok(())
    }

    /// Tells a push's destination that its source may be read.
    fn announce(&mut self, id: TransferId) {
        let Some(posted) = self.posted.get_mut(&id) else { return };
        let transfer = &posted.transfer;
        let Some(bound) = self.pools.get(&transfer.local) else { return };
        let program = &transfer.program;
        let blocks: usize = program.sources.iter().flatten().map(|table| table.len()).sum();
        let mut encoded = Vec::with_capacity(PROGRAM_BYTES + program.segments.len() * SEGMENT_BYTES + 4 * blocks);
        program.encode_for(End::Source, &mut encoded);
        if encoded.len() > PUSH_BYTES_MAX - 1024 {
            let length = encoded.len();
            let message =
                format!("its block tables take {length} bytes, at most {PUSH_BYTES_MAX} fit a message; split it");
            let error = TransferError::Io { context: "announcing a push", message };
            return self.fail_posted(|posted| posted.transfer.id == id, &error);
        }
        let doorbell = Doorbell {
            id,
            serial: posted.serial,
            pool: transfer.local,
            token: bound.token,
            start: transfer.range.start,
            end: transfer.range.end,
            notice: transfer.notice,
            program: encoded.into(),
        };
        posted.progress = Progress::Announced;
        let peer = transfer.peer;
        self.send(peer, &Frame::Push(doorbell));
        // Its destination need not wait for our next turn.
        self.carrier.flush();
        self.announced = Some(Instant::now());
    }

    /// Goes on with what waited for events that are done.
    pub(crate) fn check_events(&mut self) {
        for id in std::mem::take(&mut self.waiting) {
            let Some(posted) = self.posted.get_mut(&id) else { continue };
            let Some(after) = &posted.after else { continue };
            match after.is_done() {
                Ok(false) => self.waiting.push(id),
                Ok(true) => {
                    posted.after = None;
                    let (direction, remote) = (posted.transfer.direction, posted.transfer.remote);
                    match direction {
                        Direction::Pull => self.resume_pull(id, remote),
                        Direction::Push => self.announce(id),
                    }
                }
                Err(message) => {
                    let error = TransferError::Io { context: "waiting for the event before it", message };
                    self.fail_posted(|posted| posted.transfer.id == id, &error);
                }
            }
        }
    }

    /// Starts the pulls that waited for a pool.
    pub(crate) fn resume_pulls(&mut self, remote: RemotePool) {
        let waits = |posted: &Posted| posted.reads_from(remote) && matches!(posted.progress, Progress::Waiting);
        let waiting: Vec<TransferId> =
            self.posted.iter().filter(|(_, posted)| waits(posted)).map(|(&id, _)| id).collect();
        for id in waiting {
            self.resume_pull(id, remote);
        }
    }

    fn resume_pull(&mut self, id: TransferId, remote: RemotePool) {
        let Some(posted) = self.posted.get_mut(&id) else { return };
        let Some(remote) = self.remotes.get(&remote) else { return };
        let transfer = &posted.transfer;
        let (memory, layout) = match (&remote.access, &remote.layout) {
            (Access::Refused(reason), _) => {
                let error = TransferError::Refused(reason.clone());
                return self.fail_posted(|posted| posted.transfer.id == id, &error);
            }
            (Access::Ready(memory), Some(layout)) => (Rc::clone(memory), Arc::clone(layout)),
            (Access::Closed, _) => {
                let closed = transfer.remote;
                return self.reopen(closed);
            }
            _ => return,
        };
        // The layout may have been unknown when it was posted.
        if !posted.is_checked
            && let Err(error) = transfer.program.validate(End::Source, &layout)
        {
            let error = TransferError::Refused(error.to_string());
            return self.fail_posted(|posted| posted.transfer.id == id, &error);
        }
        let Some(bound) = self.pools.get(&transfer.local) else { return };
        let (program, range, pool) = (Arc::clone(&transfer.program), transfer.range, bound.pool.clone());
        posted.progress = Progress::Copying;
        let after = posted.after.clone();
        let made = self.backend.copy(program, range, layout, memory, pool).and_then(|mut copy| {
            let is_ordered = after.map_or(Ok(true), |after| self.backend.order(&mut copy, &*after))?;
            Ok((copy, is_ordered))
        });
        match made {
            Ok((mut copy, true)) => {
                copy.begin();
                self.jobs.push_back(Job { id, role: Role::Pull, copy });
                if B::SPEAKS {
                    // Its source need not wait for our next turn.
                    self.speak();
                    self.carrier.flush();
                }
            }
            Ok((_, false)) => {
                posted.progress = Progress::Waiting;
                self.waiting.push(id);
            }
            Err(error) => self.fail_posted(|posted| posted.transfer.id == id, &error),
        }
    }

    /// The last byte of a pull is here.
    pub(crate) fn pulled(&mut self, id: TransferId, bytes: u64, pieces: u64) {
        let Some(posted) = self.posted.get_mut(&id) else { return };
        posted.progress = Progress::Checking(bytes, pieces);
        let (peer, serial, remote) = (posted.transfer.peer, posted.serial, posted.transfer.remote);
        if B::CHECKS {
            return self.ask_whether_stood(peer, serial, remote);
        }
        self.pull_counts(id, bytes, pieces);
    }

    /// A pull is a success: its source is told that nothing more is read, and may let its memory go.
    fn pull_counts(&mut self, id: TransferId, bytes: u64, pieces: u64) {
        let Some(posted) = self.posted.remove(&id) else { return };
        if let Some(notice) = posted.transfer.notice {
            self.send(posted.transfer.peer, &Frame::Notice(notice));
        }
        self.events.push(Event::Completed { id, bytes, pieces });
    }

    /// Asks a source's owner whether what was copied from it counts.
    pub(crate) fn ask_whether_stood(&mut self, peer: PeerId, serial: u64, remote: RemotePool) {
        if let Some(remote) = self.remotes.get(&remote) {
            let frame = Frame::Check { serial, pool: remote.pool, token: remote.token };
            self.send(peer, &frame);
            self.carrier.flush();
        }
    }

    /// The owner says whether a source stood while it was copied.
    pub(crate) fn checked(&mut self, peer: PeerId, serial: u64, stood: bool) {
        let pull = self.posted.iter().find_map(|(&id, posted)| match posted.progress {
            Progress::Checking(bytes, pieces) if posted.serial == serial && posted.transfer.peer == peer => {
                Some((id, bytes, pieces))
            }
            _ => None,
        });
        let Some((id, bytes, pieces)) = pull else { return self.arrival_checked(peer, serial, stood) };
        if stood {
            self.pull_counts(id, bytes, pieces);
        } else {
            let error = TransferError::Refused(FELL.into());
            self.fail_posted(|posted| posted.transfer.id == id, &error);
        }
    }

    /// The destination says how a push ended.
    pub(crate) fn push_ended(&mut self, peer: PeerId, id: TransferId, serial: u64, outcome: PushOutcome) {
        let ours = |posted: &Posted| {
            posted.transfer.peer == peer && posted.serial == serial && posted.transfer.direction == Direction::Push
        };
        if !self.posted.get(&id).is_some_and(ours) {
            return;
        }
        let Some(posted) = self.posted.remove(&id) else { return };
        let event = match (outcome, posted.progress) {
            (PushOutcome::Done { bytes, pieces }, _) => Event::Completed { id, bytes, pieces },
            (_, Progress::Stopping(error)) => Event::Failed { id, error },
            (PushOutcome::Refused(reason), _) => Event::Failed { id, error: TransferError::Refused(reason) },
            (PushOutcome::Mismatch(remote), _) => Event::Failed {
                id,
                error: TransferError::Mismatch { local: posted.transfer.program.fingerprint(), remote },
            },
        };
        self.events.push(event);
    }

    /// Ends a posted transfer early: a pull at once, a push when its destination has stopped reading.
    pub(crate) fn stop_posted(&mut self, id: TransferId, error: TransferError) {
        let Some(posted) = self.posted.get_mut(&id) else { return };
        match (posted.transfer.direction, &posted.progress) {
            (Direction::Pull, _) | (Direction::Push, Progress::Waiting) => {
                self.fail_posted(|posted| posted.transfer.id == id, &error);
            }
            (Direction::Push, Progress::Stopping(_)) => {}
            (Direction::Push, _) => {
                posted.progress = Progress::Stopping(error);
                let (peer, serial) = (posted.transfer.peer, posted.serial);
                self.send(peer, &Frame::PushCancel { id, serial });
            }
        }
    }

    /// Fails posted transfers: at once, or when what was started has stopped. Reading by peers, where there was any, is no danger to memory.
    pub(crate) fn fail_posted(&mut self, which: impl Fn(&Posted) -> bool, error: &TransferError) {
        let ended: Vec<TransferId> =
            self.posted.iter().filter(|(_, posted)| which(posted)).map(|(&id, _)| id).collect();
        for id in ended {
            let Some(posted) = self.posted.remove(&id) else { continue };
            let error = match posted.progress {
                Progress::Stopping(reason) => reason,
                Progress::Announced => {
                    self.send(posted.transfer.peer, &Frame::PushCancel { id, serial: posted.serial });
                    error.clone()
                }
                _ => error.clone(),
            };
            let Transfer { peer, local, .. } = posted.transfer;
            self.end_failed((id, Role::Pull), peer, local, error, None);
        }
    }
}
