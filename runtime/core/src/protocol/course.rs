//! When what happened to a request: one record per request at each state machine that has a part in it, told once it is over there.
//!
//! Moments are of the clock of the node that tells; only differences between those of one record mean anything on another node.

use core::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Outcome, PathReport, PrefillView};
use crate::{HandoverId, Moment, RequestId, TraceContext};

/// Which part of a request a record is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// All of it, at the scheduler: [`RequestCourse`].
    Request,
    /// A prefill rank's offer: [`OfferCourse`].
    Offer,
    /// A decode rank's part of a handover: [`FetchCourse`].
    Fetch,
}

/// Something begins whose end will be told in a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    /// What.
    pub part: Part,
    /// Of which request.
    pub request: RequestId,
    /// Which handover; of a fetch only.
    pub handover: Option<HandoverId>,
    /// Its own span and the one that it belongs to, if whoever submitted the request said one.
    pub trace: Option<(TraceContext, TraceContext)>,
}

impl Begun {
    /// With a span of its own below `parent`, that tells it apart from others `of` the kind.
    pub(super) fn new(
        part: Part,
        request: RequestId,
        handover: Option<HandoverId>,
        parent: Option<TraceContext>,
        of: &[u64],
    ) -> Self {
        let words = [part as u64, request.0, handover.map_or(0, |handover| handover.0)];
        let words: Vec<u64> = words.iter().chain(of).copied().collect();
        Begun { part, request, handover, trace: parent.map(|parent| (parent.child(&words), parent)) }
    }

    /// Its own span.
    pub(super) fn span(&self) -> Option<TraceContext> {
        self.trace.map(|(own, _)| own)
    }
}

/// One decode rank's part of one handover.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FetchCourse {
    /// Which handover.
    pub handover: HandoverId,
    /// Of which request.
    pub request: RequestId,
    /// The leader asked for it.
    pub asked: Moment,
    /// The engine has found blocks.
    pub placed: Option<Moment>,
    /// The last source rank's tables are here, and what moves is planned.
    pub planned: Option<Moment>,
    /// The first transfer was given to a NIC.
    pub posted: Option<Moment>,
    /// The last byte is here.
    pub moved: Option<Moment>,
    /// The leader's decision is here.
    pub settled: Moment,
    /// How long NICs took to take its transfers, all of them together; zero where nobody measured.
    pub posting: Duration,
    /// How the handover ended.
    pub outcome: Outcome,
    /// What came here, from each source rank; empty unless this rank had all of it.
    pub paths: Vec<PathReport>,
}

/// One prefill rank's offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferCourse {
    /// Of which request.
    pub request: RequestId,
    /// The handover that had it last.
    pub handover: Option<HandoverId>,
    /// The leader asked for it.
    pub asked: Moment,
    /// The engine has allocated blocks, and the lease began.
    pub opened: Option<Moment>,
    /// Every layer is computed.
    pub ready: Option<Moment>,
    /// Its blocks are the engine's again.
    pub closed: Moment,
    /// How long NICs took to take its pushes, all of them together; zero where nobody measured.
    pub posting: Duration,
    /// What is known of its handover.
    pub view: PrefillView,
}

/// One request at the scheduler.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestCourse {
    /// Which request.
    pub request: RequestId,
    /// The handover that had it last.
    pub handover: Option<HandoverId>,
    /// It was submitted, or announced by a leader.
    pub submitted: Moment,
    /// An offer of it was given to a decode group, the last time.
    pub paired: Option<Moment>,
    /// It is over.
    pub finished: Moment,
    /// How it ended.
    pub outcome: Outcome,
}

impl FetchCourse {
    /// From the leader's word to blocks.
    pub fn room(&self) -> Option<Duration> {
        Some(self.placed?.since(self.asked))
    }

    /// From blocks to the last source's tables and plan.
    pub fn plan(&self) -> Option<Duration> {
        Some(self.planned?.since(self.placed?))
    }

    /// From the first transfer to the last byte: with layers that become ready one after another, their computation included.
    pub fn wire(&self) -> Option<Duration> {
        Some(self.moved?.since(self.posted?))
    }

    /// From the last byte to the leader's decision.
    pub fn notice(&self) -> Option<Duration> {
        Some(self.settled.since(self.moved?))
    }
}

impl RequestCourse {
    /// From the submission to the pairing with a decode group.
    pub fn queue(&self) -> Option<Duration> {
        Some(self.paired?.since(self.submitted))
    }
}
