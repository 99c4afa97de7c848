//! Pairs offers with decode consumers: who prefills, who decodes, what is tried again.

mod adopt;
mod ends;
mod request;
mod terms;
mod work;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use ends::Ended;
use request::{Request, Stage};
pub use terms::SchedulerTerms;

use super::scheduler_group::{DecodeGroup, PrefillGroup};
use super::{
    Awaited, Begun, Deadline, Event, FailReason, Finished, Lost, Member, Message, OfferSummary, Outbox, Outcome,
    OutcomeReport, Part, Policy, RequestSpec, Role, Vitals,
};
use crate::{GroupId, HandoverId, Moment, NodeId, RequestId, TraceContext, limits};

/// After how long a handover is tried a second time; doubled for each further attempt.
const REST: core::time::Duration = core::time::Duration::from_millis(50);

/// The state machine of the scheduler.
#[derive(Debug)]
pub struct Scheduler {
    terms: SchedulerTerms,
    policy: Box<dyn Policy>,
    requests: BTreeMap<RequestId, Request>,
    /// The deadlines of all requests, soonest first.
    deadlines: BTreeSet<(Moment, RequestId)>,
    /// Requests without a prefill group, oldest first.
    arrivals: VecDeque<RequestId>,
    /// Offers without a decode group, oldest first.
    offers: VecDeque<RequestId>,
    prefill: BTreeMap<GroupId, PrefillGroup>,
    decode: BTreeMap<GroupId, DecodeGroup>,
    handovers: BTreeMap<HandoverId, RequestId>,
    /// Decided handovers whose blocks are not the engines' again: their credits are out.
    held: BTreeMap<HandoverId, Held>,
    /// The last requests that ended: whatever a leader announces of them late, they do not end again.
    ended: BTreeMap<RequestId, Ended>,
    /// The same, oldest first.
    ended_order: BTreeSet<(Moment, RequestId)>,
    /// Offers that are paired again only after a while, by when.
    resting: BTreeSet<(Moment, RequestId)>,
    next_handover: u64,
    /// Handovers of lower numbers are a predecessor's.
    first_handover: u64,
    /// Leaders may still be about to announce what a predecessor gave them: until then requests wait.
    listens_until: Option<Moment>,
    /// There may have been a scheduler before this one.
    succeeds: bool,
    /// Which roles have had a complete group: without one so far, requests wait; after the last is gone, they fail.
    seen: BTreeSet<Role>,
    /// Roles whose last complete group is gone, and until when requests wait for the next all the same.
    regroup_until: BTreeMap<Role, Moment>,
    renew_at: Option<Moment>,
    outbox: Outbox,
}

/// A handover whose blocks are still out.
#[derive(Debug)]
struct Held {
    group: GroupId,
    spec: RequestSpec,
    delivered: bool,
}

/// What became of a submission.
#[derive(Clone, Debug, PartialEq)]
pub enum Submitted {
    /// It will end in one [`Event::Finished`].
    Taken,
    /// It has, while the scheduler that it was first given to was gone.
    Ended(Finished),
}

impl Scheduler {
    /// A scheduler without groups. Handover numbers ascend from `first_handover`, which must be larger in every later incarnation.
    pub fn new(terms: SchedulerTerms, policy: Box<dyn Policy>, first_handover: u64) -> Self {
        Scheduler {
            terms,
            policy,
            requests: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            arrivals: VecDeque::new(),
            offers: VecDeque::new(),
            prefill: BTreeMap::new(),
            decode: BTreeMap::new(),
            handovers: BTreeMap::new(),
            held: BTreeMap::new(),
            ended: BTreeMap::new(),
            ended_order: BTreeSet::new(),
            resting: BTreeSet::new(),
            next_handover: first_handover,
            first_handover,
            listens_until: None,
            succeeds: false,
            seen: BTreeSet::new(),
            regroup_until: BTreeMap::new(),
            renew_at: None,
            outbox: Outbox::default(),
        }
    }

    /// There may have been a scheduler before this one: nothing is begun before leaders had [`SchedulerTerms::adopt_after`] to announce what they
    /// have of it, so that it is neither computed nor delivered again. A decode group takes nothing, whenever it joins, before its leader has said
    /// that it is whole: its survivors may hold what an earlier leader gave them.
    pub fn expect_announcements(&mut self, now: Moment) {
        self.listens_until = Some(now + self.terms.adopt_after);
        self.succeeds = true;
    }

    /// Commands and events to drain.
    pub fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// Requests that are not finished.
    pub fn unfinished(&self) -> usize {
        self.requests.len()
    }

    /// When [`Scheduler::handle_timeout`] is due.
    pub fn poll_timeout(&self) -> Option<Moment> {
        let deadline = self.deadlines.first().map(|(at, _)| *at);
        let resting = self.resting.first().map(|(at, _)| *at);
        let regroup = self.regroup_until.values().min().copied();
        deadline.into_iter().chain(resting).chain(self.listens_until).chain(regroup).chain(self.renew_at).min()
    }

    /// What is in hand.
    pub fn vitals(&self) -> Vitals {
        let prefill: u64 = self.prefill.values().map(PrefillGroup::used).sum();
        let decode: u64 = self.decode.values().map(DecodeGroup::used).sum();
        Vitals {
            name: "scheduler",
            waiting: vec![("requests", self.requests.len() as u64)],
            engine: vec![("held", self.held.len() as u64)],
            credits: vec![("prefill", prefill), ("decode", decode)],
            due: self.poll_timeout(),
        }
    }

    /// A new request. One that is known already is refused with [`Outcome::Failed`] for the newcomer only, unless it was adopted from a
    /// leader's announcement after a restart: then this is whoever asked for it in the first place.
    pub fn handle_submit(&mut self, now: Moment, spec: RequestSpec) -> Result<Submitted, super::Refusal> {
        self.handle_submit_traced(now, spec, None)
    }

    /// The same for a request that belongs to a span: what is done for it has spans below that one.
    pub fn handle_submit_traced(
        &mut self,
        now: Moment,
        spec: RequestSpec,
        trace: Option<TraceContext>,
    ) -> Result<Submitted, super::Refusal> {
        let request = spec.request;
        if spec.tokens > limits::TOKENS_MAX || spec.prefix.len() > limits::PREFIX_HASHES_MAX {
            let (tokens, hashes) = (spec.tokens, spec.prefix.len());
            return Err(super::Refusal::TooLarge { request, tokens, hashes });
        }
        if let Some(known) = self.requests.get_mut(&request) {
            if known.adopted && known.spec == spec {
                known.adopted = false;
                self.begin(now, request, trace);
                self.claim(now, request);
                return Ok(Submitted::Taken);
            }
            return Err(super::Refusal::Duplicate(request));
        }
        if let Some(finished) = self.take_end(now, request) {
            return Ok(Submitted::Ended(finished));
        }
        let deadline = Deadline::after(now, self.terms.queue_within);
        self.deadlines.insert((deadline.at, request));
        self.requests.insert(
            request,
            Request {
                spec,
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
                adopted: false,
                avoid: BTreeSet::new(),
            },
        );
        self.arrivals.push_back(request);
        self.begin(now, request, trace);
        self.pump(now);
        Ok(Submitted::Taken)
    }

    fn begin(&mut self, now: Moment, request: RequestId, trace: Option<TraceContext>) {
        let begun = Begun::new(Part::Request, request, None, trace, &[now.0]);
        if let Some(known) = self.requests.get_mut(&request) {
            known.trace = begun.span();
        }
        self.outbox.event(Event::Began(Box::new(begun)));
    }

    /// Nobody wants the request any more. It still ends in one [`Event::Finished`].
    pub fn handle_cancel(&mut self, now: Moment, request: RequestId) {
        let listens = self.listens(now);
        let Some(known) = self.requests.get_mut(&request) else { return };
        known.cancelled = true;
        match &known.stage {
            Stage::Paired { decode, handover, .. } => {
                let handover = *handover;
                if let Some(leader) = self.decode.get(decode).and_then(DecodeGroup::leader) {
                    self.outbox.send(leader, Message::Abort { handover, reason: None });
                }
            }
            // A leader may be about to announce that it is delivered.
            _ if listens => {}
            _ => {
                self.finish(now, request, Outcome::Cancelled, None, Vec::new());
                self.pump(now);
            }
        }
    }

    /// A member joined.
    pub fn handle_member(&mut self, now: Moment, member: &Member) {
        let Some(place) = &member.place else { return };
        let known = |node| {
            self.prefill.values().any(|group| group.rank_of(node).is_some())
                || self.decode.values().any(|group| group.rank_of(node).is_some())
        };
        if known(member.node) {
            // It came back before its loss was noticed: what the earlier incarnation held is gone.
            self.handle_lost(
                now,
                &Lost { node: member.node, epoch: member.epoch, cause: format!("it restarted as {}", member.epoch) },
            );
        }
        let complete = match place.role {
            Role::Prefill => {
                let jobs = self.terms.prefill_jobs_max;
                let group = self.prefill.entry(place.group).or_insert_with(|| PrefillGroup::new(&place.geometry, jobs));
                group.join(place, member.node)
            }
            Role::Decode => {
                let group = self.decode.entry(place.group).or_insert_with(|| match self.succeeds {
                    true => DecodeGroup::inherited(place),
                    false => DecodeGroup::new(place),
                });
                group.join(place, member.node)
            }
        };
        if complete {
            self.seen.insert(place.role);
            self.regroup_until.remove(&place.role);
            self.outbox.event(Event::GroupReady { group: place.group });
            self.pump(now);
        }
    }

    /// A member is gone. What its group had in work is lost; the survivors are a group again once that rank's next incarnation joins.
    pub fn handle_lost(&mut self, now: Moment, lost: &Lost) {
        self.outbox.event(Event::NodeLost { node: lost.node, cause: lost.cause.clone() });
        let prefill = self.prefill.iter().find_map(|(id, group)| Some((*id, group.rank_of(lost.node)?)));
        let decode = self.decode.iter().find_map(|(id, group)| Some((*id, group.rank_of(lost.node)?)));
        let reason =
            |role, group, rank| FailReason::RankLost { role, group, rank, node: lost.node, cause: lost.cause.clone() };
        if let Some((group, rank)) = prefill {
            if let Some(left) =
                self.prefill.remove(&group).map(|group| group.without(rank)).filter(|left| !left.is_empty())
            {
                self.prefill.insert(group, left);
            }
            self.await_group(now, Role::Prefill);
            self.lose_prefill(now, group, &reason(Role::Prefill, group, rank));
        }
        if let Some((group, rank)) = decode {
            let whole = self.decode.remove(&group);
            let leader = whole.as_ref().and_then(DecodeGroup::chief).filter(|leader| *leader != lost.node);
            let left = whole.map(|whole| if leader.is_some() { whole.lacking(rank) } else { whole.without(rank) });
            if let Some(left) = left.filter(|left| !left.is_empty()) {
                self.decode.insert(group, left);
            }
            self.await_group(now, Role::Decode);
            // A leader that lives decides by itself.
            if leader.is_none() {
                self.held.retain(|_, held| held.group != group);
                self.fail_decode(now, group, &reason(Role::Decode, group, rank));
            }
        }
        self.pump(now);
    }

    /// A message of a leader.
    pub fn handle_message(&mut self, now: Moment, from: NodeId, message: Message) {
        match message {
            Message::Offered(offer) => self.offered(now, from, offer),
            Message::OfferReady { request, at } => {
                if let Some(known) = self.requests.get_mut(&request) {
                    known.ready_at = Some(at);
                }
            }
            Message::OfferFailed { request, reason } => self.offer_failed(now, from, request, reason),
            Message::Started { handover } => {
                if self.handovers.contains_key(&handover) {
                    self.outbox.event(Event::Started { handover });
                }
            }
            Message::Outcome(report) => self.outcome(now, from, report),
            Message::Freed { handover } => self.freed(now, from, handover),
            Message::StandingOffers(offers) => self.adopt_offers(now, from, offers),
            Message::StandingHandovers(standing) => self.adopt_handovers(now, from, *standing),
            Message::Health { trouble } => self.health(now, from, trouble),
            Message::Holds { added, removed } => {
                if let Some(group) = self.decode.values_mut().find(|group| group.leader() == Some(from)) {
                    group.hold(&added, &removed);
                }
            }
            _ => self.outbox.event(Event::Ignored { from, what: "a message that a scheduler does not take" }),
        }
    }

    /// Time has passed: leases are renewed, stages run out of time.
    pub fn handle_timeout(&mut self, now: Moment) {
        if self.renew_at.is_some_and(|at| now >= at) {
            self.renew(now);
        }
        while let Some((at, request)) = self.resting.first().copied().filter(|(at, _)| *at <= now) {
            self.resting.remove(&(at, request));
            if self.requests.get(&request).is_some_and(|known| !known.adopted) {
                self.offers.push_front(request);
            }
        }
        let late: Vec<RequestId> =
            self.deadlines.iter().take_while(|(at, _)| *at <= now).map(|(_, request)| *request).collect();
        for request in late {
            let Some(known) = self.requests.get(&request) else { continue };
            if known.is_left_to_its_lease() {
                self.forget(request);
                continue;
            }
            let awaited = match &known.stage {
                Stage::Queued => Awaited::Pairing,
                Stage::Prefilling { .. } => Awaited::Offer,
                Stage::Offered { .. } => Awaited::Pairing,
                Stage::Paired { .. } => Awaited::Outcome,
            };
            let reason = FailReason::Deadline { awaited, waited_ms: known.deadline.waited_ms(now) };
            if let Stage::Paired { decode, handover, .. } = &known.stage
                && let Some(leader) = self.decode.get(decode).and_then(DecodeGroup::leader)
            {
                self.outbox.send(leader, Message::Abort { handover: *handover, reason: Some(reason.clone()) });
            }
            self.finish(now, request, Outcome::Failed { reason }, None, Vec::new());
        }
        self.pump(now);
    }

    fn offered(&mut self, now: Moment, from: NodeId, offer: OfferSummary) {
        let Some(known) = self.requests.get_mut(&offer.request) else { return };
        let Stage::Prefilling { group } = known.stage else { return };
        // Before a scheduler that has just started has met its other ranks, too.
        if !self.prefill.get(&group).is_some_and(|group| group.is_led_by(from)) {
            return;
        }
        if !known.adopted {
            self.offers.push_back(offer.request);
        }
        known.stage = Stage::Offered { group, offer };
        known.wait(&mut self.deadlines, Deadline::after(now, self.terms.pair_within));
        self.pump(now);
    }

    fn offer_failed(&mut self, now: Moment, from: NodeId, request: RequestId, reason: FailReason) {
        let Some(known) = self.requests.get_mut(&request) else { return };
        let (Stage::Prefilling { group } | Stage::Offered { group, .. } | Stage::Paired { group, .. }) = known.stage
        else {
            return;
        };
        // Its leader closes offers also when the group lacks a rank: often just then.
        if !self.prefill.get(&group).is_some_and(|group| group.is_led_by(from)) {
            return;
        }
        match &known.stage {
            Stage::Paired { decode, handover, .. } => {
                if let Some(leader) = self.decode.get(decode).and_then(DecodeGroup::leader) {
                    self.outbox.send(leader, Message::Abort { handover: *handover, reason: Some(reason) });
                }
                known.withdrawn = true;
            }
            // An offer that lapsed can be made again.
            _ if matches!(reason, FailReason::Refused(_) | FailReason::RankLost { .. } | FailReason::Unhealthy(_)) => {
                self.resting.retain(|(_, resting)| *resting != request);
                self.offers.retain(|waiting| *waiting != request);
                self.try_again(now, request, group, None, reason);
            }
            // What one engine refuses for good, another of the same kind would too.
            _ => self.finish(now, request, Outcome::Failed { reason }, None, Vec::new()),
        }
        self.pump(now);
    }

    fn outcome(&mut self, now: Moment, from: NodeId, report: OutcomeReport) {
        // Only the group that has it may decide it.
        let decides = |group: &GroupId| self.decode.get(group).is_some_and(|group| group.is_led_by(from));
        let stage = self.handovers.get(&report.handover).and_then(|request| Some(&self.requests.get(request)?.stage));
        if let Some(Stage::Paired { decode, .. }) = stage
            && !decides(decode)
        {
            self.outbox.event(Event::Ignored { from, what: "an outcome of another group's handover" });
            return;
        }
        // A predecessor's, of which its leader has yet to tell with all that belongs to it: until then the leader has to keep it.
        let told = self.handovers.contains_key(&report.handover) || self.held.contains_key(&report.handover);
        if !told && report.handover.0 < self.first_handover {
            return;
        }
        let handover = report.handover;
        let request = self.handovers.get(&handover).copied();
        let request = request.or_else(|| self.held.get(&handover).map(|held| held.spec.request));
        // Nobody has asked for it yet: the leader keeps it, lest it be lost with this scheduler.
        let unasked = request.filter(|request| self.requests.get(request).is_some_and(|known| known.adopted));
        if unasked.is_none() {
            self.acknowledge(Some((from, handover)));
        }
        match self.handovers.remove(&handover) {
            Some(request) => self.decided(now, request, report),
            None => self.delivered_after_all(now, from, report),
        }
        if unasked.is_some() {
            self.knows(now, from, handover, unasked);
        }
    }

    /// The handover of a request is decided.
    fn decided(&mut self, now: Moment, request: RequestId, report: OutcomeReport) {
        let Some(known) = self.requests.get_mut(&request) else { return };
        let Stage::Paired { group, offer, decode, handover } = known.stage.clone() else { return };
        if handover != report.handover {
            return;
        }
        // Its credits come back with its blocks.
        let (spec, delivered) = (known.spec.clone(), report.outcome.is_delivered());
        if !delivered {
            known.avoid.insert(decode);
        }
        self.held.insert(handover, Held { group: decode, spec, delivered });
        match report.outcome {
            Outcome::Failed { reason } => self.try_again(now, request, group, Some(offer), reason),
            outcome => self.finish(now, request, outcome, Some(report.at), report.paths),
        }
        self.pump(now);
    }

    fn health(&mut self, now: Moment, from: NodeId, trouble: Option<String>) {
        if let Some(group) = self.prefill.values_mut().find(|group| group.is_led_by(from)) {
            group.trouble = trouble;
        } else if let Some(group) = self.decode.values_mut().find(|group| group.is_led_by(from)) {
            group.trouble = trouble;
        }
        self.pump(now);
    }

    fn renew(&mut self, now: Moment) {
        let mut wanted: BTreeMap<GroupId, Vec<RequestId>> = BTreeMap::new();
        for (request, known) in &self.requests {
            if let Stage::Prefilling { group } | Stage::Offered { group, .. } | Stage::Paired { group, .. } =
                &known.stage
                && !known.is_left_to_its_lease()
                // A group that formed anew has nothing of what its predecessor offered.
                && self.prefill.get(group).is_some_and(|group| group.has(*request))
            {
                wanted.entry(*group).or_default().push(*request);
            }
        }
        for (group, requests) in wanted {
            if let Some(leader) = self.prefill.get(&group).and_then(PrefillGroup::leader) {
                self.outbox.send(leader, Message::Renew { requests });
            }
        }
        self.renew_at = Some(now + self.terms.leases.renewal());
    }

    /// Groups that have all their ranks, for whoever shows them.
    pub fn ready_groups(&self) -> BTreeSet<GroupId> {
        let prefill = self.prefill.iter().filter(|(_, group)| group.leader().is_some()).map(|(id, _)| *id);
        prefill.chain(self.decode.iter().filter(|(_, group)| group.leader().is_some()).map(|(id, _)| *id)).collect()
    }
}
