//! One prefill rank: offers, their leases, and the readers that they have.

mod drain;
mod offer;
mod push;
mod readers;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use drain::Drain;
use offer::{Held, Offer};

use super::peer::Peer;
use super::{
    Begun, EngineCall, EngineEvent, Event, FailReason, Lease, LeaseTerms, Lost, Message, NicCommand, NicEvent, Outbox,
    Part, PrefillJob, PrefillView, QuarantineTerms, RailTerms, Refusal, Role, Vitals, WorkerProfile,
};
use crate::{Direction, HandoverId, Moment, NodeId, RequestId, Tables, limits};

/// Releases that an engine may leave unacknowledged.
const RELEASING_MAX: usize = 65_536;

/// The state machine of a prefill rank.
///
/// Inputs are `handle_*(now, …)`; after each, drain [`PrefillRank::outbox`] and arm one timer for [`PrefillRank::poll_timeout`].
/// `now` never goes back.
#[derive(Debug)]
pub struct PrefillRank {
    local: WorkerProfile,
    /// The node of the group's rank 0: whoever gave the latest job, or introduced itself as that.
    leader: Option<NodeId>,
    terms: LeaseTerms,
    quarantine: QuarantineTerms,
    /// So many fences were asked for.
    fences_asked: u64,
    offers: BTreeMap<RequestId, Offer>,
    peers: BTreeMap<NodeId, Result<Peer, FailReason>>,
    require_rdma: bool,
    rails: RailTerms,
    /// So many conversations with peers have begun.
    conversations: u64,
    /// Requests whose release the engine has not acknowledged, with the same request's next prefill if that came already: until then
    /// the engine may still be speaking of the old one.
    releasing: BTreeMap<RequestId, Option<PrefillJob>>,
    /// This rank leaves.
    drain: Option<Drain>,
    outbox: Outbox,
}

impl PrefillRank {
    /// A rank with no offers.
    pub fn new(local: WorkerProfile, terms: LeaseTerms, quarantine: QuarantineTerms) -> Self {
        PrefillRank {
            local,
            leader: None,
            terms,
            quarantine,
            fences_asked: 0,
            offers: BTreeMap::new(),
            peers: BTreeMap::new(),
            require_rdma: false,
            rails: RailTerms::default(),
            conversations: 0,
            releasing: BTreeMap::new(),
            drain: None,
            outbox: Outbox::default(),
        }
    }

    /// With RDMA required between hosts, or not: then no path without it is taken.
    pub fn with_rdma_required(mut self, required: bool) -> Self {
        self.require_rdma = required;
        self
    }

    /// Commands and events to drain.
    pub fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// Offers that are not fully closed.
    pub fn offers(&self) -> usize {
        self.offers.len()
    }

    /// When [`PrefillRank::handle_timeout`] is due.
    pub fn poll_timeout(&self) -> Option<Moment> {
        let leases = self.offers.values().filter(|offer| offer.closing.is_none());
        let leases = leases.filter_map(|offer| Some(offer.held.as_ref()?.lease.expires()));
        let drain = self.drain.as_ref().and_then(Drain::due);
        let fences = self.offers.values().filter_map(|offer| offer.fence_at);
        leases.chain(fences).chain(self.pushes_due()).chain(drain).min()
    }

    /// What is in hand.
    pub fn vitals(&self) -> Vitals {
        let closing = self.offers.values().filter(|offer| offer.closing.is_some()).count() as u64;
        let unopened =
            self.offers.values().filter(|offer| offer.closing.is_none() && offer.held.is_none()).count() as u64;
        Vitals {
            name: "prefill rank",
            waiting: vec![("offers", self.offers.len() as u64 - closing - unopened), ("closing", closing)],
            engine: vec![("unopened", unopened), ("releasing", self.releasing.len() as u64)],
            credits: Vec::new(),
            due: self.poll_timeout(),
        }
    }

    /// The leader can be reached (again).
    pub fn handle_leader_up(&mut self, _now: Moment, leader: NodeId) {
        self.leader = Some(leader);
        self.tell_of_drain();
    }

    /// The leader cannot be reached any more, while both live: it has given up every offer of this group, and nobody else can release them.
    pub fn handle_leader_down(&mut self, now: Moment) {
        self.close_all(now);
        self.group_offers_nothing(now);
    }

    fn close_all(&mut self, now: Moment) {
        for request in self.offers.keys().copied().collect::<Vec<_>>() {
            let view = self.unreleased_view(request);
            self.close(now, request, view);
        }
    }

    /// What is known of an offer that nobody released: a reader that was confirmed may or may not count as delivered.
    fn unreleased_view(&self, request: RequestId) -> PrefillView {
        let held = self.offers.get(&request).and_then(|offer| offer.held.as_ref());
        match held.is_some_and(|held| held.readers.values().any(|reader| reader.confirmed)) {
            true => PrefillView::InDoubt,
            false => PrefillView::Ended,
        }
    }

    /// A session with a peer stands and it has introduced itself.
    pub fn handle_peer(&mut self, _now: Moment, node: NodeId, profile: WorkerProfile) {
        if profile.role != Role::Decode {
            return;
        }
        self.conversations += 1;
        let conversation = self.conversations;
        let peer = Peer::meet(&self.local, profile, self.require_rdma)
            .map(|peer| peer.over_rails(&self.local, self.rails, self.require_rdma))
            .map(|peer| peer.of_conversation(conversation));
        if let Ok(peer) = &peer {
            peer.tell_path(node, &self.local, self.require_rdma, &mut self.outbox);
            peer.connect(node, Role::Prefill, &mut self.outbox);
        }
        self.peers.insert(node, peer);
    }

    /// A session ended. What the peer was reading is no longer its business.
    pub fn handle_peer_down(&mut self, now: Moment, node: NodeId) {
        // Transfers are cancelled while it is still known through which NIC they run.
        for request in self.offers.keys().copied().collect::<Vec<_>>() {
            self.stop_reader(request, node);
            self.finish_closing(now, request);
        }
        if let Some(Ok(peer)) = self.peers.remove(&node) {
            peer.disconnect(node, Role::Prefill, &mut self.outbox);
        }
    }

    /// The directory says that a member is gone. A group is only as alive as all its ranks.
    pub fn handle_lost(&mut self, now: Moment, lost: &Lost, of_my_group: bool) {
        if of_my_group {
            self.close_all(now);
            self.group_offers_nothing(now);
        }
        self.handle_peer_down(now, lost.node);
    }

    /// A message of a peer.
    pub fn handle_message(&mut self, now: Moment, from: NodeId, message: Message) {
        match message {
            Message::Prefill(job) => {
                self.leader = Some(from);
                self.prefill(now, job);
            }
            Message::Renew { requests } if requests.is_empty() && Some(from) == self.leader => {
                self.group_offers_nothing(now)
            }
            Message::Renew { requests } => {
                for request in requests {
                    self.renew(now, request);
                }
            }
            Message::Release { request, view } => {
                // Where nobody knows, this rank may: without its confirmation nothing was delivered.
                let view = if view == PrefillView::InDoubt { self.unreleased_view(request) } else { view };
                self.close(now, request, view);
            }
            Message::Open(open) => {
                let handover = open.handover;
                if let Err(refusal) = self.open(now, from, open) {
                    self.outbox.send(from, Message::Refused { handover, refusal });
                }
            }
            Message::Reading { handovers } => {
                for request in
                    handovers.into_iter().filter_map(|handover| self.request_of(handover)).collect::<Vec<_>>()
                {
                    self.renew(now, request);
                }
            }
            Message::Expecting { handover } => {
                if let Some(request) = self.request_of(handover)
                    && let Some(reader) = self.held(request).and_then(|held| held.readers.get_mut(&from))
                {
                    reader.expecting = true;
                    self.push_ready(now, request, from);
                }
            }
            Message::ShareEnded { share, arrived } => self.share_ended(now, from, share, arrived),
            Message::Fetched { handover } => self.fetched(now, from, handover),
            Message::Abandon { handover } => {
                if let Some(request) = self.request_of(handover) {
                    self.stop_reader(request, from);
                    self.finish_closing(now, request);
                }
            }
            _ => self.outbox.event(Event::Ignored { from, what: "a message that a prefill rank does not take" }),
        }
    }

    /// An answer of the engine.
    pub fn handle_engine(&mut self, now: Moment, event: EngineEvent) {
        let stale = |request: &RequestId| self.releasing.contains_key(request);
        match event {
            EngineEvent::Opened { request, .. }
            | EngineEvent::Ready { request, .. }
            | EngineEvent::Unable { request, .. }
                if stale(&request) => {}
            EngineEvent::Opened { request, tables, steps } => self.opened(now, request, tables, steps),
            EngineEvent::Ready { request, steps } => self.ready(now, request, steps),
            EngineEvent::Unable { request, reason } => self.unable(now, request, reason),
            EngineEvent::Released { request } => {
                if let Some(Some(job)) = self.releasing.remove(&request) {
                    self.prefill(now, job);
                }
            }
            EngineEvent::Drain { within } => self.drain(now, within),
            _ => {}
        }
    }

    /// Something happened at a NIC of this node.
    pub fn handle_nic(&mut self, now: Moment, nic: usize, event: NicEvent) {
        match event {
            NicEvent::Done { id, .. } => self.push_ended(now, id, Ok(())),
            NicEvent::Failed { id, reason } => self.push_ended(now, id, Err(reason)),
            NicEvent::Posted { id, took } => {
                if let Some(offer) = self.request_of(id.handover()).and_then(|request| self.offers.get_mut(&request)) {
                    offer.posting = offer.posting.saturating_add(took);
                }
            }
            NicEvent::PeerLost { node, reason } => self.rail_lost(now, nic, node, &reason),
            NicEvent::Fenced { node, address, ticket, .. } => self.fenced(now, nic, (node, &address), ticket),
            NicEvent::Shown { node, evidence } => {
                if let Some(Ok(peer)) = self.peers.get_mut(&node) {
                    let shown = (nic, *evidence);
                    if peer.show_path(node, &self.local, shown, self.require_rdma, &mut self.outbox) {
                        peer.rails.remove(nic);
                    }
                }
            }
            NicEvent::Connected { .. } => {}
        }
    }

    /// Time has passed: leases expire.
    pub fn handle_timeout(&mut self, now: Moment) {
        self.fence(now);
        self.watch_pushes(now);
        let expired: Vec<RequestId> = self
            .offers
            .iter()
            .filter(|(_, offer)| {
                offer.closing.is_none() && offer.held.as_ref().is_some_and(|held| !held.lease.is_alive(now))
            })
            .map(|(request, _)| *request)
            .collect();
        for request in expired {
            self.outbox.event(Event::LeaseExpired { request });
            let refusal = Refusal::LeaseExpired(request);
            self.refuse_readers(request, &refusal);
            self.fail_to_leader(request, FailReason::Refused(refusal));
            let view = self.unreleased_view(request);
            self.close(now, request, view);
        }
        self.go_on_draining(now);
    }

    fn renew(&mut self, now: Moment, request: RequestId) {
        if let Some(held) = self.held(request)
            && held.lease.renew(now)
        {
            let until = held.lease.expires();
            self.outbox.event(Event::LeaseHeld { request, until });
        }
    }

    /// Fences readers for whom our own NIC did not stop reading when it was told to.
    fn fence(&mut self, now: Moment) {
        let mut due: BTreeSet<(NodeId, usize, Bytes)> = BTreeSet::new();
        for offer in self.offers.values_mut().filter(|offer| offer.fence_at.is_some_and(|at| now >= at)) {
            offer.fence_at = Some(now + self.quarantine.fence_after);
            for (node, reader) in offer.held.iter().flat_map(|held| &held.readers) {
                due.extend(reader.flight.attempts().map(|(_, one)| (*node, one.nic, reader.address(one.nic))));
            }
        }
        for (node, nic, address) in due {
            self.fences_asked += 1;
            let ticket = self.fences_asked;
            let again_at = now + self.quarantine.fence_after;
            let held = self.offers.values_mut().filter_map(|offer| offer.held.as_mut());
            for reader in held.filter_map(|held| held.readers.get_mut(&node)) {
                if reader.address(nic) == address {
                    reader.flight.fence(nic, ticket, again_at);
                }
            }
            self.outbox.nic(nic, NicCommand::Fence { node, address, ticket });
        }
    }

    fn prefill(&mut self, now: Moment, mut job: PrefillJob) {
        let request = job.spec.request;
        if self.drain.is_some() {
            self.refuse_to_begin(request);
            return;
        }
        if let Some(next) = self.releasing.get_mut(&request) {
            next.get_or_insert(job);
            return;
        }
        match self.offers.get_mut(&request) {
            Some(offer) if offer.closing.is_some() && offer.next.is_none() => offer.next = Some(job),
            Some(_) => self.fail_to_leader(request, FailReason::Refused(Refusal::Duplicate(request))),
            None => {
                let of = [self.local.group.0.into(), self.local.rank.0.into(), now.0];
                let begun = Begun::new(Part::Offer, request, None, job.trace, &of);
                job.trace = begun.span();
                self.offers.insert(request, Offer::new(now, job.clone()));
                self.outbox.engine(EngineCall::Prefill(job));
                self.outbox.event(Event::Began(Box::new(begun)));
            }
        }
    }

    /// Before it opened, the engine holds nothing; afterwards its blocks go back as with every other end.
    fn unable(&mut self, now: Moment, request: RequestId, reason: String) {
        let Some(offer) = self.offers.get(&request).filter(|offer| offer.closing.is_none()) else { return };
        let opened = offer.held.is_some();
        self.fail_to_leader(request, FailReason::Engine(reason));
        if opened {
            self.close(now, request, PrefillView::Ended);
        } else {
            if let Some(offer) = self.offers.remove(&request) {
                self.outbox.event(Event::OfferEnded(Box::new(offer.course(now, PrefillView::Ended))));
            }
            self.go_on_draining(now);
        }
    }

    fn opened(&mut self, now: Moment, request: RequestId, tables: Tables, steps: Vec<u32>) {
        let refusal = match self.offers.get(&request) {
            None => Some(Refusal::UnknownRequest(request)),
            Some(offer) if offer.held.is_some() => Some(Refusal::Duplicate(request)),
            Some(_) => check_steps(&steps, self.local.geometry.model.layers).err(),
        };
        if let Some(refusal) = refusal {
            self.outbox.engine(EngineCall::Rejected { request, refusal });
            return;
        }
        if let Some(offer) = self.offers.get_mut(&request) {
            let lease = Lease::granted(now, &self.terms);
            let until = lease.expires();
            offer.held = Some(Held {
                tables,
                steps: steps.clone(),
                ready: 0,
                opened_at: now,
                ready_at: None,
                lease,
                handover: None,
                readers: BTreeMap::new(),
            });
            self.outbox.event(Event::OfferOpened { request });
            self.outbox.event(Event::LeaseHeld { request, until });
            self.tell_leader(Message::RankOpened { request, steps });
        }
    }

    fn ready(&mut self, now: Moment, request: RequestId, steps: u32) {
        let Some(held) = self.held(request) else {
            self.outbox.engine(EngineCall::Rejected { request, refusal: Refusal::UnknownRequest(request) });
            return;
        };
        let total = held.steps.len() as u32;
        if steps > total {
            let refusal = Refusal::BadTables(format!("{request} has {total} steps, {steps} were called ready"));
            self.outbox.engine(EngineCall::Rejected { request, refusal });
            return;
        }
        if steps <= held.ready {
            return;
        }
        held.ready = steps;
        held.ready_at = (steps == total).then_some(now);
        let told: Vec<(NodeId, HandoverId)> = held
            .readers
            .iter()
            .filter(|(_, reader)| !reader.stopped)
            .map(|(node, reader)| (*node, reader.open.handover))
            .collect();
        let pushes: Vec<NodeId> = held
            .readers
            .iter()
            .filter(|(_, reader)| reader.open.direction == Direction::Push)
            .map(|(node, _)| *node)
            .collect();
        for (node, handover) in told {
            self.outbox.send(node, Message::StepsReady { handover, ready: steps });
        }
        for node in pushes {
            self.push_ready(now, request, node);
        }
        if steps == total {
            self.tell_leader(Message::RankReady { request, at: now });
        }
    }

    /// The offer is over: its blocks go back once our own NICs have let go of them.
    ///
    /// A foreign *read* does not hold them: that reader's confirmation will be refused.
    fn close(&mut self, now: Moment, request: RequestId, view: PrefillView) {
        let Some(offer) = self.offers.get_mut(&request) else {
            // What was to follow a release that the engine still owes is not wanted any more.
            if let Some(next) = self.releasing.get_mut(&request) {
                *next = None;
            }
            return;
        };
        if offer.next.take().is_some() {
            return;
        }
        offer.closing.get_or_insert(view);
        offer.fence_at.get_or_insert(now + self.quarantine.fence_after);
        let readers: Vec<NodeId> = offer.held.iter().flat_map(|held| held.readers.keys().copied()).collect();
        for node in readers {
            self.stop_reader(request, node);
        }
        self.finish_closing(now, request);
    }

    fn finish_closing(&mut self, now: Moment, request: RequestId) {
        let Some(offer) = self.offers.get(&request) else { return };
        let Some(view) = offer.closing else { return };
        let busy = offer.held.iter().flat_map(|held| held.readers.values()).any(|reader| !reader.flight.is_empty());
        if !busy {
            let course = offer.course(now, view);
            let next = self.offers.remove(&request).and_then(|offer| offer.next);
            self.outbox.engine(EngineCall::Release { request, view });
            self.outbox.event(Event::OfferClosed { request, view });
            self.outbox.event(Event::OfferEnded(Box::new(course)));
            self.releasing.insert(request, next);
            // An engine that acknowledges nothing only loses the protection for the smallest ids.
            while self.releasing.len() > RELEASING_MAX {
                self.releasing.pop_first();
            }
            self.go_on_draining(now);
        }
    }

    fn fail_to_leader(&mut self, request: RequestId, reason: FailReason) {
        self.tell_leader(Message::RankFailed { request, reason });
    }

    fn tell_leader(&mut self, message: Message) {
        if let Some(leader) = self.leader {
            self.outbox.send(leader, message);
        }
    }

    fn held(&mut self, request: RequestId) -> Option<&mut Held> {
        self.offers.get_mut(&request).filter(|offer| offer.closing.is_none())?.held.as_mut()
    }

    fn request_of(&self, handover: HandoverId) -> Option<RequestId> {
        self.offers
            .iter()
            .find(|(_, offer)| {
                offer.closing.is_none() && offer.held.as_ref().is_some_and(|held| held.handover == Some(handover))
            })
            .map(|(request, _)| *request)
    }
}

/// The model layers of one step.
pub(crate) fn step_layers(steps: &[u32], step: u32) -> core::ops::Range<u32> {
    let at = |index: usize| steps.get(index).copied().unwrap_or(0);
    let start = if step == 0 { 0 } else { at(step as usize - 1) };
    start..at(step as usize)
}

/// Steps ascend, and the last ends the model.
pub(crate) fn check_steps(steps: &[u32], layers: u32) -> Result<(), Refusal> {
    let ascending = steps.windows(2).all(|pair| matches!(pair, [a, b] if a < b));
    let fits = steps.len() <= limits::STEPS_MAX as usize
        && steps.first().is_some_and(|first| *first > 0)
        && steps.last() == Some(&layers);
    if ascending && fits {
        Ok(())
    } else {
        Err(Refusal::BadTables(format!("steps {steps:?} do not ascend from above 0 to the model's {layers} layers")))
    }
}
