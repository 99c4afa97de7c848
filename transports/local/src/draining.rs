//! Copies that were stopped while something of them still ran: they end when it has.

use std::collections::BTreeSet;

use kvferry_core::{FenceProof, PoolId, TransferId};
use kvferry_transport::{Event, PeerId, TransferError};

use crate::backend::{Backend, Copying};
use crate::transport::{Job, LocalTransport, Role};
use crate::wire::Frame;

/// A stopped copy that still runs, and what is said once it does not.
pub(crate) struct Draining<C> {
    job: Job<C>,
    peer: PeerId,
    pool: PoolId,
    error: TransferError,
    tell: Option<Frame>,
}

/// A fence that waits for copies from its peer.
pub(crate) struct Fencing {
    peer: PeerId,
    /// All connections to the same transport.
    same: BTreeSet<PeerId>,
    proof: FenceProof,
}

impl<B: Backend> LocalTransport<B> {
    /// Ends a transfer that failed: at once, or when the copy that it had has stopped. `tell` goes to the peer then.
    pub(crate) fn end_failed(
        &mut self,
        (id, role): (TransferId, Role),
        peer: PeerId,
        pool: PoolId,
        error: TransferError,
        tell: Option<Frame>,
    ) {
        let at = self.jobs.iter().position(|job| job.id == id && job.role == role);
        if let Some(mut job) = at.and_then(|at| self.jobs.remove(at))
            && job.copy.is_running()
        {
            self.draining.push(Draining { job, peer, pool, error, tell });
            return;
        }
        if let Some(frame) = tell {
            self.send(peer, &frame);
        }
        self.events.push(Event::Failed { id, error });
    }

    /// Whether a transfer of that name has failed but not yet ended.
    pub(crate) fn is_draining(&self, id: TransferId, role: Role) -> bool {
        self.draining.iter().any(|draining| draining.job.id == id && draining.job.role == role)
    }

    /// Whether a stopped copy may still touch a pool of our own.
    pub(crate) fn drains_into(&self, pool: PoolId) -> bool {
        self.draining.iter().any(|draining| draining.pool == pool)
    }

    /// Proves a fence once nothing that reads from these connections writes here any more. What could wait for the peer is cut off, and with
    /// it the connections.
    pub(crate) fn fence_when_drained(&mut self, peer: PeerId, same: BTreeSet<PeerId>) {
        let cuts =
            B::SEVERED != FenceProof::OwnerCopies && self.draining.iter().any(|draining| same.contains(&draining.peer));
        let proof = if cuts { B::SEVERED } else { FenceProof::OwnerCopies };
        if cuts {
            same.iter().for_each(|&peer| self.lose(peer, "it was fenced here"));
        }
        self.fencing.push(Fencing { peer, same, proof });
        self.settle_draining();
        self.settle_fences();
    }

    /// Ends what has stopped.
    pub(crate) fn settle_draining(&mut self) {
        if self.draining.is_empty() {
            return;
        }
        for mut draining in std::mem::take(&mut self.draining) {
            if draining.job.copy.is_running() {
                self.draining.push(draining);
                continue;
            }
            if let Some(frame) = draining.tell {
                self.send(draining.peer, &frame);
            }
            self.events.push(Event::Failed { id: draining.job.id, error: draining.error });
        }
        self.settle_fences();
    }

    fn settle_fences(&mut self) {
        for fencing in std::mem::take(&mut self.fencing) {
            if self.draining.iter().any(|draining| fencing.same.contains(&draining.peer)) {
                self.fencing.push(fencing);
            } else {
                self.events.push(Event::Fenced { peer: fencing.peer, proof: fencing.proof });
            }
        }
    }
}
