//! Who gets what next.

use super::{Scheduler, Stage};
use crate::protocol::{Deadline, Event, FailReason, GroupView, Message, Outcome, Pairing, PrefillJob, Role};
use crate::{HandoverId, Moment, RequestId};

impl Scheduler {
    /// Hands out work while there is room, oldest first; nothing overtakes.
    pub(super) fn pump(&mut self, now: Moment) {
        self.regroup_until.retain(|_, until| now < *until);
        if self.listens(now) {
            return;
        }
        if self.listens_until.take().is_some() {
            self.finish_cancelled(now);
        }
        while let Some(request) = self.arrivals.front().copied() {
            if !self.start_prefill(now, request) {
                break;
            }
            // Unless it finished and left by itself.
            self.arrivals.pop_front_if(|waiting| *waiting == request);
        }
        while let Some(request) = self.offers.front().copied() {
            if !self.start_pairing(now, request) {
                break;
            }
            self.offers.pop_front_if(|waiting| *waiting == request);
        }
    }

    /// Whether leaders may still be about to announce what a predecessor gave them.
    pub(super) fn listens(&self, now: Moment) -> bool {
        self.listens_until.is_some_and(|until| now < until)
    }

    /// Whether there is a complete group of a role, or one may be about to join: then work waits for it.
    pub(super) fn may_have(&self, role: Role) -> bool {
        self.has(role) || self.may_join(role) || self.listens_until.is_some()
    }

    fn has(&self, role: Role) -> bool {
        match role {
            Role::Prefill => self.prefill.values().any(|group| group.leader().is_some()),
            Role::Decode => self.decode.values().any(|group| group.leader().is_some()),
        }
    }

    /// Whether there has been no complete group so far, or none since so short a time that it may be back.
    fn may_join(&self, role: Role) -> bool {
        !self.seen.contains(&role) || self.regroup_until.contains_key(&role)
    }

    /// A group of a role has lost a rank. If it was the last one, work waits a while for the next.
    pub(super) fn await_group(&mut self, now: Moment, role: Role) {
        let within = self.terms.regroup_within;
        if !within.is_zero() && self.seen.contains(&role) && !self.has(role) {
            self.regroup_until.entry(role).or_insert(now + within);
        }
    }

    /// Says whether the request left the queue.
    pub(super) fn start_prefill(&mut self, now: Moment, request: RequestId) -> bool {
        let may_prefill = self.may_have(Role::Prefill);
        let Some(known) = self.requests.get_mut(&request) else { return true };
        if !may_prefill {
            self.finish(now, request, Outcome::Failed { reason: FailReason::NoGroup(Role::Prefill) }, None, Vec::new());
            return true;
        }
        let mut candidates: Vec<GroupView> = self.prefill.iter().filter_map(|(id, group)| group.view(*id)).collect();
        if candidates.iter().any(|view| !known.avoid.contains(&view.group)) {
            candidates.retain(|view| !known.avoid.contains(&view.group));
        }
        if candidates.is_empty() {
            return false;
        }
        let Some(choice) = self.policy.prefill(&known.spec, &candidates) else { return false };
        let Some(group) = self.prefill.get_mut(&choice) else { return false };
        let Some(leader) = group.leader() else { return false };
        if !group.take(request, known.spec.tokens) {
            return false;
        }
        known.stage = Stage::Prefilling { group: choice };
        // Ranks open at different times; the first lease must last until the last rank has opened.
        self.renew_at.get_or_insert(now + self.terms.leases.renewal());
        known.wait(&mut self.deadlines, Deadline::after(now, self.terms.prefill_within));
        self.outbox.send(leader, Message::Prefill(PrefillJob { spec: known.spec.clone(), dp: 0, trace: known.trace }));
        true
    }

    /// Says whether the offer left the queue.
    pub(super) fn start_pairing(&mut self, now: Moment, request: RequestId) -> bool {
        let may_join = self.may_join(Role::Decode);
        let Some(known) = self.requests.get_mut(&request) else { return true };
        let Stage::Offered { group, offer } = known.stage.clone() else { return true };
        let fits = self.decode.values().any(|decode| decode.leader().is_some() && decode.could_ever_take(&known.spec));
        if !fits && !may_join {
            self.finish(now, request, Outcome::Failed { reason: FailReason::NoGroup(Role::Decode) }, None, Vec::new());
            return true;
        }
        let mut candidates: Vec<GroupView> =
            self.decode.iter().filter_map(|(id, decode)| decode.view(*id, &known.spec)).collect();
        if candidates.iter().any(|view| !known.avoid.contains(&view.group)) {
            candidates.retain(|view| !known.avoid.contains(&view.group));
        }
        if candidates.is_empty() {
            return false;
        }
        let Some(choice) = self.policy.decode(&known.spec, &candidates) else { return false };
        let Some(decode) = self.decode.get_mut(&choice) else { return false };
        let Some(leader) = decode.leader() else { return false };
        let handover = HandoverId(self.next_handover);
        if !decode.take(handover, &known.spec) {
            return false;
        }
        self.next_handover += 1;
        self.handovers.insert(handover, request);
        let pairing = Pairing {
            handover,
            spec: known.spec.clone(),
            source: group,
            source_dp: offer.dp,
            steps: offer.steps.clone(),
            trace: known.trace,
        };
        known.stage = Stage::Paired { group, offer, decode: choice, handover };
        known.paired = Some((now, handover));
        known.wait(&mut self.deadlines, Deadline::after(now, self.terms.outcome_within));
        self.outbox.event(Event::Paired { request, handover, group: choice });
        self.outbox.send(leader, Message::Pair(pairing));
        true
    }
}
