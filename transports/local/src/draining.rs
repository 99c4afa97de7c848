//! Copies that were stopped while something of them still ran: they end when it has.

use std::collections::BTreeSet;

use kvferry_core::{FenceProof, PoolId, TransferId};
use kvferry_transport::{Event, PeerId, TransferError};

use crate::backend::{Backend, Copying};
use crate::transport::{Job, LocalTransport, Role};
use crate::whose::Identity;
use crate::wire::Frame;

/// A stopped copy that still runs, and what is said once it does not.
pub(crate) struct Draining<C> {
    job: Job<C>,
    peer: PeerId,
    /// Whose connection that is, or was: it may be gone.
    identity: Option<Identity>,
    pool: PoolId,
    error: TransferError,
    tell: Option<Frame>,
}

/// A fence that waits for copies from its peer.
pub(crate) struct Fencing {
    peer: PeerId,
    whom: Whose,
    proof: FenceProof,
}

/// Whose copies a fence is about.
pub(crate) struct Whose {
    /// All its connections that are there.
    pub(crate) same: BTreeSet<PeerId>,
    /// Who that is: copies of its other connections, also of those that are gone, may run on. `None` where that is not known any more: then
    /// any copy may be its.
    pub(crate) identity: Option<Identity>,
}

impl<C> Draining<C> {
    pub(crate) fn is_from(&self, peer: PeerId) -> bool {
        self.peer == peer
    }

    pub(crate) fn named(&self) -> (TransferId, Role) {
        (self.job.id, self.job.role)
    }
}

impl Whose {
    fn is_of<C>(&self, draining: &Draining<C>) -> bool {
        let is_same = || self.identity.zip(draining.identity).is_none_or(|(one, other)| one.is_same(&other));
        self.same.contains(&draining.peer) || is_same()
    }
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
            let identity = self.peers.get(&peer).map(|peer| peer.identity);
            self.draining.push(Draining { job, peer, identity, pool, error, tell });
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

    /// Proves a fence once nothing that reads from that transport writes here any more. What could wait for the peer is cut off, and with it the
    /// connections; those that are gone were cut off when they went.
    pub(crate) fn fence_when_drained(&mut self, peer: PeerId, whom: Whose) {
        let is_severed = B::SEVERED != FenceProof::OwnerCopies;
        let proof = match is_severed && self.draining.iter().any(|draining| whom.is_of(draining)) {
            true => B::SEVERED,
            false => FenceProof::OwnerCopies,
        };
        if is_severed && self.draining.iter().any(|draining| whom.same.contains(&draining.peer)) {
            whom.same.iter().for_each(|&peer| self.lose(peer, "it was fenced here"));
        }
        self.fencing.push(Fencing { peer, whom, proof });
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
            if self.draining.iter().any(|draining| fencing.whom.is_of(draining)) {
                self.fencing.push(fencing);
            } else {
                self.events.push(Event::Fenced { peer: fencing.peer, proof: fencing.proof });
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
