//! Withdrawn pools whose memory the library goes on reading for peers that had begun to: they are let go once no peer can have a read under way.
//!
//! Each reader is told, ends or cuts its reads of that peer, and says so. One that says nothing is cut off by the owner.

use std::time::{Duration, Instant};

use kvferry_core::{PoolId, TransferId};
use kvferry_transport::PeerId;

use crate::backend::Backend;
use crate::transport::{LocalTransport, Role};
use crate::wire::Frame;

/// How long a reader's copies may take to end before it cuts them off.
const READS_WITHIN: Duration = Duration::from_secs(3);
/// How long an owner waits for its readers' words before it cuts them off: longer than they may take.
const LET_GO_WITHIN: Duration = Duration::from_secs(5);

/// Withdrawn pools of one peer of which copies still run.
const LEAVING_MAX: usize = 256;

/// A peer's pool that was withdrawn, and the copies from that peer that still ran then.
pub(crate) struct Leaving {
    peer: PeerId,
    pool: PoolId,
    token: u64,
    copies: Vec<(TransferId, Role)>,
    pub(crate) until: Instant,
}

impl Leaving {
    pub(crate) fn is_of(&self, peer: PeerId) -> bool {
        self.peer == peer
    }
}

/// By when the readers of a pool that is withdrawn now have to have let go of it.
pub(crate) fn let_go_by() -> Instant {
    Instant::now() + LET_GO_WITHIN
}

impl<B: Backend> LocalTransport<B> {
    /// The reader's side: its transfers from that pool were failed. The owner is told once nothing of them reads on.
    pub(crate) fn leave(&mut self, peer: PeerId, pool: PoolId, token: u64) -> Result<(), String> {
        if self.leaving.iter().filter(|leaving| leaving.is_of(peer)).count() >= LEAVING_MAX {
            return Err(format!("it withdrew more than {LEAVING_MAX} pools that are still read"));
        }
        let copies = self.draining.iter().filter(|draining| draining.is_from(peer)).map(|draining| draining.named());
        let copies = copies.collect();
        self.leaving.push(Leaving { peer, pool, token, copies, until: Instant::now() + READS_WITHIN });
        Ok(())
    }

    /// Tells owners of pools that nothing reads any more, and cuts off what does not end.
    pub(crate) fn settle_leaving(&mut self, now: Instant) {
        for leaving in std::mem::take(&mut self.leaving) {
            if !self.peers.contains_key(&leaving.peer) {
                continue;
            }
            let Leaving { peer, pool, token, copies, until } = &leaving;
            let runs = copies.iter().any(|(id, role)| self.is_draining(*id, *role));
            if !runs && self.backend.rests(*peer) {
                self.send(*peer, &Frame::LetGo { pool: *pool, token: *token });
            } else if now < *until {
                self.leaving.push(leaving);
            } else {
                self.lose(*peer, "it withdrew a pool, and reads of it did not end in time: they are cut off");
            }
        }
    }

    /// The owner's side: a reader says that it reads that pool no more.
    pub(crate) fn was_let_go(&mut self, peer: PeerId, pool: PoolId, token: u64) {
        if let Some(bound) = self.pools.get_mut(&pool).filter(|bound| bound.token == token && bound.leaving)
            && bound.readers.remove(&peer)
            && bound.lacks_only_a_cut()
        {
            self.backend.cut();
        }
    }

    /// The owner's side: a reader is gone. What is still sent to it is cut off once the pool is withdrawn and its other readers have let go: one that
    /// was merely stopped may begin reads until then, and others live on their connections.
    pub(crate) fn reader_is_gone(&mut self, peer: PeerId) {
        let mut is_due = false;
        for bound in self.pools.values_mut().filter_map(|bound| bound.readers.remove(&peer).then_some(bound)) {
            bound.lost_reader = true;
            is_due |= bound.leaving && bound.lacks_only_a_cut();
        }
        if is_due {
            self.backend.cut();
        }
    }

    /// Cuts readers off that did not let go of a withdrawn pool in time.
    pub(crate) fn check_readers(&mut self, now: Instant) {
        let late = self.pools.values().filter(|bound| bound.let_go_by.is_some_and(|until| now >= until));
        let late: Vec<PeerId> = late.flat_map(|bound| bound.readers.iter().copied()).collect();
        for peer in late {
            self.lose(peer, "it did not let go of a pool that was withdrawn");
        }
    }

    /// When something has to be done about that though nobody says anything.
    pub(crate) fn leaving_deadline(&self) -> Option<Instant> {
        let owners = self.pools.values().filter(|bound| !bound.readers.is_empty()).filter_map(|bound| bound.let_go_by);
        owners.chain(self.leaving.iter().map(|leaving| leaving.until)).min()
    }
}

#[cfg(test)]
mod tests;
