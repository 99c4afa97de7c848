//! How requests end, or begin again.

use super::{Held, REST, Request, Scheduler, Stage};
use crate::protocol::scheduler_group::DecodeGroup;
use crate::protocol::{
    Awaited, Deadline, Event, FailReason, Finished, Message, OfferSummary, Outcome, PathReport, PrefillView,
    RequestCourse, RequestSpec, Role,
};
use crate::{GroupId, HandoverId, Moment, NodeId, Rank, RequestId};

/// Ended requests that are remembered.
const ENDED_MAX: usize = 65_536;

/// Times that a group may give a request back before that counts as attempts.
const GIVEN_BACK_MAX: u32 = 4;

/// A request that ended.
#[derive(Debug)]
pub(super) struct Ended {
    /// Until then whoever asks gets what is unclaimed.
    until: Moment,
    /// How it ended, if nobody has asked for it so far: it was adopted.
    unclaimed: Option<Finished>,
    /// The leader that keeps the outcome until then.
    owed: Option<(NodeId, HandoverId)>,
}

impl Scheduler {
    /// A handover failed: the offer is paired again if it still stands, prefilled again if there is another group, or the request fails.
    pub(super) fn try_again(
        &mut self,
        now: Moment,
        request: RequestId,
        group: GroupId,
        offer: Option<OfferSummary>,
        reason: FailReason,
    ) {
        let (may_prefill, may_decode) = (self.may_have(Role::Prefill), self.may_have(Role::Decode));
        let listens = self.listens(now);
        let Some(known) = self.requests.get_mut(&request) else { return };
        // Whoever leaves in order has cost nothing but time, and is asked for nothing more: its leader has said that it takes no work.
        if offer.is_none() && matches!(reason, FailReason::Unhealthy(_)) && known.given_back < GIVEN_BACK_MAX {
            known.given_back += 1;
        } else {
            known.attempts += 1;
        }
        // A decode leader may be about to announce that it is delivered.
        if known.cancelled && !listens {
            self.finish(now, request, Outcome::Cancelled, None, Vec::new());
            return;
        }
        let again = known.attempts < self.terms.attempts_max && !matches!(reason, FailReason::Mismatch(_));
        let held = self.prefill.get(&group).is_some_and(|group| group.has(request));
        // The decode side may notice a lost prefill rank before the directory does: its offer is gone all the same.
        let gone = matches!(reason, FailReason::Refused(_) | FailReason::RankLost { role: Role::Prefill, .. });
        let stands = held && !known.withdrawn && !gone;
        if again
            && stands
            && may_decode
            && let Some(offer) = offer
        {
            known.stage = Stage::Offered { group, offer };
            known.wait(&mut self.deadlines, Deadline::after(now, self.terms.pair_within));
            if known.adopted {
                return;
            }
            let known_cause = match &reason {
                FailReason::Engine(_) => true,
                FailReason::RankLost { role: Role::Decode, group, .. } => {
                    self.decode.get(group).and_then(DecodeGroup::leader).is_none()
                }
                _ => false,
            };
            if known_cause {
                self.offers.push_front(request);
            } else {
                // Ranks notice a loss before the directory does: tried at once, every attempt would meet the same dead rank.
                self.resting.insert((now + REST * (1 << known.attempts.min(5)), request));
            }
        } else if known.adopted {
            self.forget(request);
        } else if again && may_prefill && may_decode {
            self.release(request, view_of(&reason));
            if let Some(known) = self.requests.get_mut(&request) {
                known.stage = Stage::Queued;
                known.ready_at = None;
                known.withdrawn = false;
                // Its peers know before the directory does that it lacks a rank.
                if matches!(reason, FailReason::RankLost { role: Role::Prefill, .. }) {
                    known.avoid.insert(group);
                }
                known.wait(&mut self.deadlines, Deadline::after(now, self.terms.queue_within));
            }
            self.arrivals.push_front(request);
        } else {
            self.finish(now, request, Outcome::Failed { reason }, None, Vec::new());
        }
    }

    pub(super) fn lose_prefill(&mut self, now: Moment, lost: GroupId, reason: &FailReason) {
        for request in self.requests.keys().copied().collect::<Vec<_>>() {
            let Some(known) = self.requests.get(&request) else { continue };
            match &known.stage {
                Stage::Prefilling { group } | Stage::Offered { group, .. } if *group == lost => {
                    self.resting.retain(|(_, resting)| *resting != request);
                    self.offers.retain(|waiting| *waiting != request);
                    self.try_again(now, request, lost, None, reason.clone());
                }
                Stage::Paired { group, decode, handover, .. } if *group == lost => {
                    if let Some(leader) = self.decode.get(decode).and_then(DecodeGroup::leader) {
                        self.outbox.send(leader, Message::Abort { handover: *handover, reason: Some(reason.clone()) });
                    }
                }
                _ => {}
            }
        }
    }

    /// Nobody is left who could decide this group's handovers.
    pub(super) fn fail_decode(&mut self, now: Moment, lost: GroupId, reason: &FailReason) {
        for request in self.requests.keys().copied().collect::<Vec<_>>() {
            let Some(known) = self.requests.get(&request) else { continue };
            if let Stage::Paired { group, offer, decode, handover } = &known.stage
                && *decode == lost
            {
                let (group, offer) = (*group, offer.clone());
                self.handovers.remove(handover);
                self.try_again(now, request, group, Some(offer), reason.clone());
            }
        }
    }

    pub(super) fn freed(&mut self, now: Moment, from: NodeId, handover: HandoverId) {
        let holder = self.held.get(&handover).and_then(|held| self.decode.get(&held.group));
        if holder.is_some_and(|group| !group.is_led_by(from)) {
            self.outbox.event(Event::Ignored { from, what: "the end of another group's handover" });
            return;
        }
        if let Some(Held { group, spec, delivered }) = self.held.remove(&handover) {
            if delivered {
                self.outbox.event(Event::Freed { request: spec.request });
            }
            self.give_back(group, handover, &spec);
            self.pump(now);
        }
    }

    pub(super) fn give_back(&mut self, group: GroupId, handover: HandoverId, spec: &RequestSpec) {
        if let Some(group) = self.decode.get_mut(&group) {
            group.give_back(handover, spec);
        }
    }

    pub(super) fn finish(
        &mut self,
        now: Moment,
        request: RequestId,
        outcome: Outcome,
        settled_at: Option<Moment>,
        paths: Vec<PathReport>,
    ) {
        let view = match &outcome {
            Outcome::Delivered => PrefillView::Confirmed,
            Outcome::Failed { reason } => view_of(reason),
            Outcome::Cancelled => PrefillView::Ended,
        };
        let Some(known) = self.strike(request, view) else { return };
        let attempts = known.attempts + 1;
        let course = RequestCourse {
            request,
            handover: known.paired.map(|(_, handover)| handover),
            submitted: known.submitted,
            paired: known.paired.map(|(at, _)| at),
            finished: now,
            outcome: outcome.clone(),
        };
        let finished = Finished { request, outcome, attempts, ready_at: known.ready_at, settled_at, paths };
        let until = now + self.terms.leases.duration * 2;
        let unclaimed = known.adopted.then(|| finished.clone());
        if let Some(earlier) = self.ended.insert(request, Ended { until, unclaimed, owed: None }) {
            self.ended_order.remove(&(earlier.until, request));
            self.acknowledge(earlier.owed);
        }
        self.ended_order.insert((until, request));
        if self.ended.len() > ENDED_MAX
            && let Some((_, oldest)) = self.ended_order.pop_first()
            && let Some(oldest) = self.ended.remove(&oldest)
        {
            self.acknowledge(oldest.owed);
        }
        self.outbox.event(Event::Finished(finished));
        self.outbox.event(Event::RequestEnded(Box::new(course)));
    }

    /// The end of a request that ended before anybody had asked for it, for whoever asks now. Once, and not too late.
    pub(super) fn take_end(&mut self, now: Moment, request: RequestId) -> Option<Finished> {
        let ended = self.ended.get_mut(&request)?;
        let finished = ended.unclaimed.take().filter(|_| now < ended.until);
        let owed = ended.owed.take();
        self.acknowledge(owed);
        finished
    }

    /// An outcome is known here. Its leader may forget it, unless it has to tell it to the next scheduler, should this one be gone before
    /// anybody asks for the request.
    pub(super) fn knows(&mut self, now: Moment, leader: NodeId, handover: HandoverId, request: Option<RequestId>) {
        let ended = request.filter(|request| !self.requests.contains_key(request));
        let kept = ended.and_then(|request| self.ended.get_mut(&request));
        let kept = kept.filter(|ended| ended.unclaimed.is_some() && now < ended.until);
        // One delivery is enough to tell of.
        let known = match kept {
            Some(ended) => ended.owed.replace((leader, handover)).filter(|(_, earlier)| *earlier != handover),
            None => Some((leader, handover)),
        };
        self.acknowledge(known);
    }

    pub(super) fn acknowledge(&mut self, known: Option<(NodeId, HandoverId)>) {
        if let Some((leader, handover)) = known {
            self.outbox.send(leader, Message::OutcomesKnown { handovers: vec![handover] });
        }
    }

    /// What was cancelled while leaders were listened to, and no decode leader has announced.
    pub(super) fn finish_cancelled(&mut self, now: Moment) {
        let waits = |known: &Request| known.cancelled && !matches!(known.stage, Stage::Paired { .. });
        let cancelled: Vec<RequestId> =
            self.requests.iter().filter(|(_, known)| waits(known)).map(|(request, _)| *request).collect();
        for request in cancelled {
            self.finish(now, request, Outcome::Cancelled, None, Vec::new());
        }
    }

    /// A request that nobody here has asked for, and of which there is nothing to give: whoever asks for it after all begins anew.
    pub(super) fn forget(&mut self, request: RequestId) {
        self.strike(request, PrefillView::Ended);
    }

    /// Takes a request out of every list.
    fn strike(&mut self, request: RequestId, view: PrefillView) -> Option<Request> {
        self.release(request, view);
        let known = self.requests.remove(&request)?;
        self.deadlines.remove(&(known.deadline.at, request));
        self.resting.retain(|(_, resting)| *resting != request);
        match &known.stage {
            Stage::Queued => self.arrivals.retain(|waiting| *waiting != request),
            Stage::Prefilling { .. } => {}
            Stage::Offered { .. } => self.offers.retain(|waiting| *waiting != request),
            Stage::Paired { decode, handover, .. } => {
                // The group may still work on it: its credits come back with its blocks.
                if self.handovers.remove(handover).is_some() && self.decode.contains_key(decode) {
                    let (group, spec) = (*decode, known.spec.clone());
                    self.held.insert(*handover, Held { group, spec, delivered: false });
                }
            }
        }
        Some(known)
    }

    /// The prefill side may let go, and its credit comes back.
    pub(super) fn release(&mut self, request: RequestId, view: PrefillView) {
        let Some(known) = self.requests.get(&request) else { return };
        let group = match &known.stage {
            Stage::Queued => return,
            Stage::Prefilling { group } | Stage::Offered { group, .. } | Stage::Paired { group, .. } => *group,
        };
        let tokens = known.spec.tokens;
        self.release_from(group, request, tokens, view);
    }

    pub(super) fn release_from(&mut self, group: GroupId, request: RequestId, tokens: u64, view: PrefillView) {
        if let Some(group) = self.prefill.get_mut(&group)
            && group.release(request, tokens)
            && let Some(leader) = group.leader()
        {
            self.outbox.send(leader, Message::Release { request, view });
        }
    }
}

/// What a prefill group may believe of a handover that failed so: where its decode leader is gone, nobody knows what that decided last.
fn view_of(reason: &FailReason) -> PrefillView {
    match reason {
        FailReason::RankLost { role: Role::Decode, rank: Rank(0), .. }
        | FailReason::Deadline { awaited: Awaited::Outcome, .. } => PrefillView::InDoubt,
        _ => PrefillView::Ended,
    }
}
