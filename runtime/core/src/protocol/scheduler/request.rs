//! A request on its way, as the scheduler knows it.

use std::collections::BTreeSet;

use crate::protocol::{Deadline, OfferSummary, RequestSpec};
use crate::{GroupId, HandoverId, Moment, RequestId, TraceContext};

/// A request that has not ended.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) spec: RequestSpec,
    pub(super) stage: Stage,
    pub(super) deadline: Deadline,
    pub(super) attempts: u32,
    /// Times that a group gave it back because it leaves, which cost no attempt.
    pub(super) given_back: u32,
    pub(super) ready_at: Option<Moment>,
    pub(super) submitted: Moment,
    /// The span of it, if whoever submitted it said to which it belongs.
    pub(super) trace: Option<TraceContext>,
    /// When it was paired the last time, as which handover.
    pub(super) paired: Option<(Moment, HandoverId)>,
    pub(super) cancelled: bool,
    /// The prefill side said that its offer is gone while a handover was under way.
    pub(super) withdrawn: bool,
    /// Nobody here has asked for it: it was announced by a leader. Its offer is left to its lease.
    pub(super) adopted: bool,
    /// Groups that failed it: others are tried first.
    pub(super) avoid: BTreeSet<GroupId>,
}

impl Request {
    /// Whether nobody has asked for it, and nothing is under way that would deliver it all the same.
    pub(super) fn is_left_to_its_lease(&self) -> bool {
        self.adopted && !matches!(self.stage, Stage::Paired { .. })
    }

    /// Waits anew.
    pub(super) fn wait(&mut self, deadlines: &mut BTreeSet<(Moment, RequestId)>, deadline: Deadline) {
        let request = self.spec.request;
        deadlines.remove(&(self.deadline.at, request));
        deadlines.insert((deadline.at, request));
        self.deadline = deadline;
    }
}

/// How far it has come.
#[derive(Clone, Debug)]
pub(super) enum Stage {
    Queued,
    Prefilling { group: GroupId },
    Offered { group: GroupId, offer: OfferSummary },
    Paired { group: GroupId, offer: OfferSummary, decode: GroupId, handover: HandoverId },
}
