//! One request's KV on a prefill rank and its readers, as records; [`PrefillRank`](super::PrefillRank) acts on them.

use core::time::Duration;
use std::collections::BTreeMap;

use bytes::Bytes;

use crate::protocol::flight::{Flight, Share};
use crate::protocol::{Lease, OfferCourse, OpenFetch, PrefillJob, PrefillView};
use crate::{HandoverId, Moment, NodeId, Tables, TransferId};

/// One request's KV on this rank. Held under a lease from its opening to its release.
#[derive(Debug)]
pub(super) struct Offer {
    pub(super) job: PrefillJob,
    /// When it was asked for.
    pub(super) asked: Moment,
    /// How long our NICs took to take its pushes.
    pub(super) posting: Duration,
    /// `None` until the engine has allocated blocks.
    pub(super) held: Option<Held>,
    /// Set when it is over but our own NICs still read its blocks.
    pub(super) closing: Option<PrefillView>,
    /// When readers for whom they still do are fenced.
    pub(super) fence_at: Option<Moment>,
    /// The same request prefilled anew: it starts when this offer has closed and the engine has let go of it.
    pub(super) next: Option<PrefillJob>,
}

#[derive(Debug)]
pub(super) struct Held {
    pub(super) tables: Tables,
    /// Model-layer ends of the steps.
    pub(super) steps: Vec<u32>,
    /// The ready watermark: layers of the first `ready` steps are immutable until release.
    pub(super) ready: u32,
    pub(super) opened_at: Moment,
    pub(super) ready_at: Option<Moment>,
    pub(super) lease: Lease,
    /// The handover that has it: I9, no offer to two live consumers.
    pub(super) handover: Option<HandoverId>,
    pub(super) readers: BTreeMap<NodeId, Reader>,
}

/// A decode rank that reads one offer.
#[derive(Debug)]
pub(super) struct Reader {
    pub(super) open: OpenFetch,
    /// It is ready for pushes.
    pub(super) expecting: bool,
    /// Steps posted so far (push).
    pub(super) posted: u32,
    /// What is pushed to it: while a transfer is in here, our NIC may still read blocks for it.
    pub(super) flight: Flight,
    /// Shares of which the reader has not said how their transfer ended, and what they are.
    pub(super) shared: BTreeMap<TransferId, Shared>,
    /// No new transfers: the reader gave up or was lost.
    pub(super) stopped: bool,
    /// It has every byte, and was told that the lease was good: only its leader's word is missing.
    pub(super) confirmed: bool,
    /// Of the reader's NIC that each of ours is joined to: the peer may be gone when it has to be fenced.
    pub(super) addresses: BTreeMap<usize, Bytes>,
}

/// A share as one transfer of it was posted.
#[derive(Debug)]
pub(super) struct Shared {
    /// Its number in the reader's flight.
    pub(super) number: u32,
    /// Our NIC.
    pub(super) nic: usize,
    pub(super) share: Share,
}

impl Offer {
    pub(super) fn new(now: Moment, job: PrefillJob) -> Self {
        Offer { job, asked: now, posting: Duration::ZERO, held: None, closing: None, fence_at: None, next: None }
    }

    pub(super) fn course(&self, now: Moment, view: PrefillView) -> OfferCourse {
        let held = self.held.as_ref();
        OfferCourse {
            request: self.job.spec.request,
            handover: held.and_then(|held| held.handover),
            asked: self.asked,
            opened: held.map(|held| held.opened_at),
            ready: held.and_then(|held| held.ready_at),
            closed: now,
            posting: self.posting,
            view,
        }
    }
}

impl Reader {
    /// Whether everything was pushed, as far as our NICs say.
    pub(super) fn has_all(&self, steps: u32) -> bool {
        !self.stopped && self.posted == steps && self.flight.is_over()
    }

    /// Of the reader's NIC that one of ours is joined to.
    pub(super) fn address(&self, nic: usize) -> Bytes {
        self.addresses.get(&nic).cloned().unwrap_or_default()
    }
}
