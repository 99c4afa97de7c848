//! What a scheduler that has started again learns from the leaders of what it, or its predecessor, had given them.

use std::collections::BTreeSet;

use super::{Held, Request, Scheduler, Stage};
use crate::protocol::scheduler_group::DecodeGroup;
use crate::protocol::{
    Deadline, Event, FailReason, Message, OfferSummary, OutcomeReport, Pairing, PrefillView, Refusal, RequestSpec,
    StandingHandovers, StandingOffer,
};
use crate::{GroupId, HandoverId, Moment, NodeId, RequestId};

impl Scheduler {
    /// A prefill leader announces its offers.
    pub(super) fn adopt_offers(&mut self, now: Moment, from: NodeId, offers: Vec<StandingOffer>) {
        let Some(group) = self.prefill.iter().find(|(_, group)| group.is_led_by(from)).map(|(id, _)| *id) else {
            self.outbox.event(Event::Ignored { from, what: "offers of a node that leads no prefill group" });
            return;
        };
        let mut standing = Vec::new();
        for offer in offers {
            let request = offer.spec.request;
            if self.adopt_offer(now, from, group, offer) {
                standing.push(request);
            }
        }
        if !standing.is_empty() {
            // Their leases have run since the last scheduler's time. Those that nobody asks for while this one runs lapse with it.
            self.outbox.send(from, Message::Renew { requests: standing });
            self.renew_at.get_or_insert(now + self.terms.leases.renewal());
        }
        self.pump(now);
    }

    /// Somebody asks for a request that was adopted.
    pub(super) fn claim(&mut self, now: Moment, request: RequestId) {
        let offered = self.requests.get(&request).is_some_and(|known| matches!(known.stage, Stage::Offered { .. }));
        if offered && !self.resting.iter().any(|(_, resting)| *resting == request) {
            self.offers.push_back(request);
        }
        // It was left to its lease.
        self.renew_at = Some(now);
        self.pump(now);
    }

    /// Says whether the offer stands here, too.
    fn adopt_offer(&mut self, now: Moment, from: NodeId, group: GroupId, offer: StandingOffer) -> bool {
        let (request, tokens) = (offer.spec.request, offer.spec.tokens);
        let ended = self.ended.contains_key(&request) && !self.requests.contains_key(&request);
        let known = self.requests.get(&request);
        let wanted = match known.map(|known| &known.stage) {
            None => !ended,
            Some(Stage::Queued) => known.is_some_and(|known| known.spec == offer.spec),
            // Announced by its decode leader, or given to this group already.
            Some(
                Stage::Prefilling { group: theirs }
                | Stage::Offered { group: theirs, .. }
                | Stage::Paired { group: theirs, .. },
            ) => *theirs == group,
        };
        if !wanted {
            self.outbox.send(from, Message::Release { request, view: PrefillView::Ended });
            return false;
        }
        if let Some(group) = self.prefill.get_mut(&group) {
            group.adopt(request, tokens);
        }
        let known = self.known(now, &offer.spec);
        known.ready_at = known.ready_at.max(offer.ready_at);
        if matches!(known.stage, Stage::Queued) {
            let (stage, within) = match offer.steps {
                Some(steps) => {
                    let offer = OfferSummary { request, dp: offer.dp, steps };
                    (Stage::Offered { group, offer }, self.terms.pair_within)
                }
                None => (Stage::Prefilling { group }, self.terms.prefill_within),
            };
            let rests = matches!(stage, Stage::Offered { .. });
            self.enter(now, request, stage, within);
            if rests {
                self.resting.insert((now + self.terms.adopt_after, request));
            }
        }
        true
    }

    /// A decode leader announces its handovers.
    pub(super) fn adopt_handovers(&mut self, now: Moment, from: NodeId, standing: StandingHandovers) {
        let Some(group) = self.decode.iter().find(|(_, group)| group.is_led_by(from)).map(|(id, _)| *id) else {
            self.outbox.event(Event::Ignored { from, what: "handovers of a node that leads no decode group" });
            return;
        };
        let held: BTreeSet<HandoverId> = standing.held.iter().map(|(handover, ..)| *handover).collect();
        for (handover, spec, delivered) in standing.held {
            self.adopt_held(group, handover, spec, delivered);
        }
        for (pairing, report) in standing.decided {
            if report.outcome.is_delivered() && self.adopt_pairing(now, group, &pairing, true) {
                let handover = report.handover;
                self.outcome(now, from, report);
                // Its blocks went back before this scheduler was met: nobody will say so again.
                if !held.contains(&handover) {
                    self.freed(now, from, handover);
                }
            } else {
                let request = report.outcome.is_delivered().then_some(pairing.spec.request);
                self.knows(now, from, report.handover, request);
            }
        }
        for pairing in standing.under_way {
            let (handover, request) = (pairing.handover, pairing.spec.request);
            if !self.adopt_pairing(now, group, &pairing, false) {
                let newer = match self.requests.get(&request).map(|known| &known.stage) {
                    Some(Stage::Paired { handover, .. }) => *handover,
                    _ => HandoverId(self.next_handover),
                };
                // Its outcome is no longer waited for; its credits are.
                self.adopt_held(group, handover, pairing.spec, false);
                let reason = Some(FailReason::Refused(Refusal::Superseded { request, newer }));
                self.outbox.send(from, Message::Abort { handover, reason });
            } else if self.requests.get(&request).is_some_and(|known| known.cancelled) {
                self.outbox.send(from, Message::Abort { handover, reason: None });
            }
        }
        self.pump(now);
    }

    fn adopt_held(&mut self, group: GroupId, handover: HandoverId, spec: RequestSpec, delivered: bool) {
        if let Some(decode) = self.decode.get_mut(&group)
            && !self.handovers.contains_key(&handover)
        {
            decode.adopt(handover, &spec);
            self.held.entry(handover).or_insert(Held { group, spec, delivered });
        }
    }

    /// Whether the handover is what this scheduler wants of its request: rather than a new prefill of a request that was asked for again before
    /// this was announced, and if it was delivered, rather than any other handover.
    fn adopt_pairing(&mut self, now: Moment, decode: GroupId, pairing: &Pairing, delivered: bool) -> bool {
        let (request, handover) = (pairing.spec.request, pairing.handover);
        if self.handovers.get(&handover) == Some(&request) {
            return true;
        }
        let wanted = match self.requests.get(&request) {
            None => !self.ended.contains_key(&request),
            Some(known) => {
                known.spec == pairing.spec
                    && match &known.stage {
                        Stage::Queued | Stage::Prefilling { .. } | Stage::Offered { .. } => true,
                        Stage::Paired { handover: other, .. } => delivered || handover > *other,
                    }
            }
        };
        if !wanted {
            return false;
        }
        if let Some(group) = self.supersede(request, handover).filter(|group| *group != pairing.source) {
            self.release_from(group, request, pairing.spec.tokens, PrefillView::Ended);
        }
        if let Some(group) = self.decode.get_mut(&decode) {
            group.adopt(handover, &pairing.spec);
        }
        self.held.remove(&handover);
        self.known(now, &pairing.spec).paired = Some((now, handover));
        let (group, steps) = (pairing.source, pairing.steps.clone());
        let offer = OfferSummary { request, dp: pairing.source_dp, steps };
        self.enter(now, request, Stage::Paired { group, offer, decode, handover }, self.terms.outcome_within);
        self.handovers.insert(handover, request);
        self.outbox.event(Event::Paired { request, handover, group: decode });
        self.renew_at = Some(now);
        true
    }

    /// Stops the handover that a request was given here, for another one. Says which prefill group has the request.
    fn supersede(&mut self, request: RequestId, newer: HandoverId) -> Option<GroupId> {
        let known = self.requests.get(&request)?;
        match known.stage.clone() {
            Stage::Queued => None,
            Stage::Prefilling { group } | Stage::Offered { group, .. } => Some(group),
            Stage::Paired { group, decode, handover, .. } => {
                let spec = known.spec.clone();
                self.handovers.remove(&handover);
                self.adopt_held(decode, handover, spec, false);
                if let Some(leader) = self.decode.get(&decode).and_then(DecodeGroup::leader) {
                    let reason = Some(FailReason::Refused(Refusal::Superseded { request, newer }));
                    self.outbox.send(leader, Message::Abort { handover, reason });
                }
                Some(group)
            }
        }
    }

    /// A handover was delivered although another one of its request had been preferred: that is what was wanted, sooner.
    pub(super) fn delivered_after_all(&mut self, now: Moment, from: NodeId, report: OutcomeReport) {
        let Some(held) = self.held.get_mut(&report.handover).filter(|_| report.outcome.is_delivered()) else { return };
        if !self.decode.get(&held.group).is_some_and(|group| group.is_led_by(from)) {
            return;
        }
        held.delivered = true;
        let spec = held.spec.clone();
        if self.requests.get(&spec.request).is_some_and(|known| known.spec == spec) {
            self.supersede(spec.request, report.handover);
            self.finish(now, spec.request, report.outcome, Some(report.at), report.paths);
            self.pump(now);
        }
    }

    /// A request that somebody announces, as it is known or as an adopted one.
    fn known(&mut self, now: Moment, spec: &RequestSpec) -> &mut Request {
        let deadline = Deadline::after(now, self.terms.queue_within);
        let deadlines = &mut self.deadlines;
        self.requests.entry(spec.request).or_insert_with(|| {
            deadlines.insert((deadline.at, spec.request));
            Request {
                spec: spec.clone(),
                stage: Stage::Queued,
                deadline,
                attempts: 0,
                given_back: 0,
                ready_at: None,
                submitted: now,
                trace: None,
                paired: None,
                cancelled: false,
                withdrawn: false,
                adopted: true,
                avoid: BTreeSet::new(),
            }
        })
    }

    fn enter(&mut self, now: Moment, request: RequestId, stage: Stage, within: core::time::Duration) {
        self.arrivals.retain(|waiting| *waiting != request);
        self.offers.retain(|waiting| *waiting != request);
        self.resting.retain(|(_, resting)| *resting != request);
        if let Some(known) = self.requests.get_mut(&request) {
            known.stage = stage;
            known.wait(&mut self.deadlines, Deadline::after(now, within));
        }
    }
}
