//! A prefill group's leader: the group has an offer when every owning rank has one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::roll::Roll;
use super::{
    Awaited, Deadline, Event, FailReason, Lost, Message, OfferSummary, Outbox, PrefillJob, PrefillView, Refusal,
    RequestSpec, Role, StandingOffer, Vitals, standing,
};
use crate::{GroupGeometry, GroupId, Moment, NodeId, Rank, RequestId};

/// The state machine of a prefill group's leader. It runs on the node of rank 0.
#[derive(Debug)]
pub struct PrefillLeader {
    group: GroupId,
    geometry: Arc<GroupGeometry>,
    scheduler: NodeId,
    ranks: Roll,
    offers: BTreeMap<RequestId, GroupOffer>,
    /// Tokens in work per attention-dp group: the leader gives a request to the least loaded.
    load: Vec<u64>,
    /// How long ranks may take to open their parts; the engine queues behind blocks that are still held.
    open_within: core::time::Duration,
    outbox: Outbox,
}

#[derive(Debug)]
struct GroupOffer {
    dp: u32,
    spec: RequestSpec,
    owners: Vec<Rank>,
    unopened: BTreeSet<Rank>,
    unready: BTreeSet<Rank>,
    steps: Option<Vec<u32>>,
    ready_at: Moment,
    deadline: Deadline,
}

impl PrefillLeader {
    /// A leader that does not know its ranks' nodes yet; [`PrefillLeader::handle_rank`] names them.
    pub fn new(
        group: GroupId,
        geometry: Arc<GroupGeometry>,
        scheduler: NodeId,
        open_within: core::time::Duration,
    ) -> Self {
        let load = vec![0; geometry.parallel.adp.max(1) as usize];
        let (ranks, offers, outbox) = (Roll::new(geometry.ranks()), BTreeMap::new(), Outbox::default());
        PrefillLeader { group, geometry, scheduler, ranks, offers, load, open_within, outbox }
    }

    /// Commands and events to drain.
    pub fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// When [`PrefillLeader::handle_timeout`] is due.
    pub fn poll_timeout(&self) -> Option<Moment> {
        self.offers.values().filter(|offer| !offer.unopened.is_empty()).map(|offer| offer.deadline.at).min()
    }

    /// What is in hand.
    pub fn vitals(&self) -> Vitals {
        let unopened = self.offers.values().filter(|offer| !offer.unopened.is_empty()).count() as u64;
        Vitals {
            name: "prefill leader",
            waiting: vec![("unopened", unopened)],
            engine: Vec::new(),
            credits: vec![("offers", self.offers.len() as u64), ("load_tokens", self.load.iter().sum())],
            due: self.poll_timeout(),
        }
    }

    /// A rank of the group is on this node.
    pub fn handle_rank(&mut self, rank: Rank, node: NodeId) {
        self.ranks.insert(rank, node);
        self.ranks.report_again(self.scheduler, &mut self.outbox);
    }

    /// A rank of this group is gone, and with it every offer.
    pub fn handle_lost(&mut self, _now: Moment, lost: &Lost) {
        if let Some(rank) = self.ranks.remove(lost.node) {
            // First: what fails is given to another group.
            self.ranks.report(self.scheduler, &mut self.outbox);
            self.fail_all(rank, lost.node, &lost.cause);
        }
    }

    /// The scheduler tells of the loss of an incarnation whose successor is met already: it counts the group as not whole until it hears otherwise.
    pub fn handle_late_loss(&mut self) {
        self.ranks.report_anew(self.scheduler, &mut self.outbox);
    }

    /// A rank cannot be reached any more, while both live: what it was told last may not have arrived.
    pub fn handle_peer_down(&mut self, _now: Moment, node: NodeId, cause: &str) {
        if let Some(rank) = self.ranks.part(node, cause) {
            self.ranks.report(self.scheduler, &mut self.outbox);
            self.fail_all(rank, node, cause);
        }
    }

    /// A rank can be reached (again).
    pub fn handle_peer_up(&mut self, node: NodeId) {
        if self.ranks.meet(node) {
            self.ranks.report(self.scheduler, &mut self.outbox);
        }
    }

    /// A scheduler is met that may know nothing of this group's work.
    pub fn handle_scheduler(&mut self) {
        let offers = self.offers.values().map(|offer| StandingOffer {
            spec: offer.spec.clone(),
            dp: offer.dp,
            steps: offer.steps.clone().filter(|_| offer.unopened.is_empty()),
            ready_at: offer.unready.is_empty().then_some(offer.ready_at),
        });
        for message in standing::offers(offers) {
            self.outbox.send(self.scheduler, message);
        }
        self.ranks.report_anew(self.scheduler, &mut self.outbox);
    }

    /// A message of the scheduler or of a rank.
    pub fn handle_message(&mut self, now: Moment, from: NodeId, message: Message) {
        match message {
            Message::Prefill(job) => self.prefill(now, job),
            Message::RankOpened { request, steps } => self.rank_opened(from, request, steps),
            Message::RankReady { request, at } => self.rank_ready(from, request, at),
            Message::RankFailed { request, reason } if self.ranks.rank_of(from).is_some() => self.fail(request, reason),
            Message::Health { trouble } => {
                if self.ranks.hear(from, trouble) {
                    self.ranks.report(self.scheduler, &mut self.outbox);
                    self.let_leave();
                }
            }
            Message::Renew { requests } => {
                let mut renewals: BTreeMap<NodeId, Vec<RequestId>> = BTreeMap::new();
                for request in requests {
                    for node in self.owners(request) {
                        renewals.entry(node).or_default().push(request);
                    }
                }
                for (node, requests) in renewals {
                    self.outbox.send(node, Message::Renew { requests });
                }
            }
            Message::Release { request, view } => self.release(request, view),
            _ => self.outbox.event(Event::Ignored { from, what: "a message that a prefill leader does not take" }),
        }
    }

    /// Time has passed: ranks that never opened fail the request.
    pub fn handle_timeout(&mut self, now: Moment) {
        let late: Vec<(RequestId, u64)> = self
            .offers
            .iter()
            .filter(|(_, offer)| !offer.unopened.is_empty() && offer.deadline.has_passed(now))
            .map(|(request, offer)| (*request, offer.deadline.waited_ms(now)))
            .collect();
        for (request, waited_ms) in late {
            self.fail(request, FailReason::Deadline { awaited: Awaited::Offer, waited_ms });
        }
    }

    fn prefill(&mut self, now: Moment, mut job: PrefillJob) {
        let request = job.spec.request;
        if self.offers.get(&request).is_some_and(|offer| offer.spec == job.spec) {
            // A scheduler that has just started asks for what its predecessor had asked for.
            self.announce(request);
            return;
        }
        if self.offers.contains_key(&request) {
            let reason = FailReason::Refused(Refusal::Duplicate(request));
            self.outbox.send(self.scheduler, Message::OfferFailed { request, reason });
            return;
        }
        if self.is_divided()
            && !self.ranks.troubled().is_empty()
            && let Some(trouble) = self.ranks.trouble()
        {
            // A rank that leaves was told, or is about to be, that it may go: an offer of another part would be lost with it.
            let reason = FailReason::Unhealthy(trouble);
            self.outbox.send(self.scheduler, Message::OfferFailed { request, reason });
            return;
        }
        let dp = (0..self.load.len()).min_by_key(|dp| self.load.get(*dp).copied().unwrap_or(u64::MAX)).unwrap_or(0);
        job.dp = dp as u32;
        let owners = self.geometry.owners(job.dp);
        let nodes = match self.ranks.reach(Role::Prefill, self.group, &owners) {
            Ok(nodes) => nodes,
            Err(reason) => {
                self.outbox.send(self.scheduler, Message::OfferFailed { request, reason });
                return;
            }
        };
        if let Some(load) = self.load.get_mut(dp) {
            *load += job.spec.tokens;
        }
        let pending: BTreeSet<Rank> = owners.iter().copied().collect();
        let offer = GroupOffer {
            dp: job.dp,
            spec: job.spec.clone(),
            owners,
            unopened: pending.clone(),
            unready: pending,
            steps: None,
            ready_at: Moment(0),
            deadline: Deadline::after(now, self.open_within),
        };
        self.offers.insert(request, offer);
        for node in nodes {
            self.outbox.send(node, Message::Prefill(job.clone()));
        }
    }

    /// Says again how far an offer is.
    fn announce(&mut self, request: RequestId) {
        let Some(offer) = self.offers.get(&request) else { return };
        if let Some(steps) = offer.steps.clone().filter(|_| offer.unopened.is_empty()) {
            self.outbox.send(self.scheduler, Message::Offered(OfferSummary { request, dp: offer.dp, steps }));
        }
        if offer.unready.is_empty() {
            self.outbox.send(self.scheduler, Message::OfferReady { request, at: offer.ready_at });
        }
    }

    fn rank_opened(&mut self, from: NodeId, request: RequestId, steps: Vec<u32>) {
        let Some(rank) = self.ranks.rank_of(from) else { return };
        let Some(offer) = self.offers.get_mut(&request) else { return };
        if offer.steps.get_or_insert_with(|| steps.clone()) != &steps {
            let text = format!(
                "ranks of {} open {request} in different steps; give every rank the same layers per step",
                self.group
            );
            self.fail(request, FailReason::Mismatch(text));
            return;
        }
        if offer.unopened.remove(&rank) && offer.unopened.is_empty() {
            let summary = OfferSummary { request, dp: offer.dp, steps };
            self.outbox.send(self.scheduler, Message::Offered(summary));
        }
    }

    fn rank_ready(&mut self, from: NodeId, request: RequestId, at: Moment) {
        let Some(rank) = self.ranks.rank_of(from) else { return };
        let Some(offer) = self.offers.get_mut(&request) else { return };
        offer.ready_at = offer.ready_at.max(at);
        if offer.unready.remove(&rank) && offer.unready.is_empty() {
            self.outbox.send(self.scheduler, Message::OfferReady { request, at: offer.ready_at });
        }
    }

    fn fail_all(&mut self, rank: Rank, node: NodeId, cause: &str) {
        let (role, group) = (Role::Prefill, self.group);
        let reason = FailReason::RankLost { role, group, rank, node, cause: cause.to_owned() };
        for request in self.offers.keys().copied().collect::<Vec<_>>() {
            self.fail(request, reason.clone());
        }
    }

    fn fail(&mut self, request: RequestId, reason: FailReason) {
        if self.offers.contains_key(&request) {
            // It may have been read, and delivered, before it failed here.
            self.release(request, PrefillView::InDoubt);
            self.outbox.send(self.scheduler, Message::OfferFailed { request, reason });
        }
    }

    fn release(&mut self, request: RequestId, view: PrefillView) {
        for node in self.owners(request) {
            self.outbox.send(node, Message::Release { request, view });
        }
        if let Some(offer) = self.offers.remove(&request)
            && let Some(load) = self.load.get_mut(offer.dp as usize)
        {
            *load = load.saturating_sub(offer.spec.tokens);
        }
        self.let_leave();
    }

    /// Whether ranks have offers of their own, which no other rank has a part in.
    fn is_divided(&self) -> bool {
        self.geometry.parallel.adp > 1
    }

    /// Tells ranks that take no work once the group holds nothing that would be lost with them: of its offers, none is to be renewed.
    fn let_leave(&mut self) {
        if self.is_divided() && self.offers.is_empty() {
            for node in self.ranks.troubled() {
                self.outbox.send(node, Message::Renew { requests: Vec::new() });
            }
        }
    }

    fn owners(&self, request: RequestId) -> Vec<NodeId> {
        let owners = self.offers.get(&request).map(|offer| offer.owners.as_slice()).unwrap_or_default();
        owners.iter().filter_map(|rank| self.ranks.node_of(*rank)).collect()
    }
}
