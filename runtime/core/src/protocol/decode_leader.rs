//! A decode group's leader: it decides every handover's outcome, once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::roll::Roll;
use super::{
    Awaited, Deadline, DeadlineTerms, Event, FailReason, FetchJob, Lost, Message, Outbox, Outcome, OutcomeReport,
    Pairing, PathReport, RequestSpec, Role, StandingHandovers, Vitals, standing,
};
use crate::{GroupGeometry, GroupId, HandoverId, Moment, NodeId, Rank, RequestId};

/// Decided handovers that are remembered, so that late messages about them are recognised.
const DECIDED_MAX: usize = 4096;

/// The state machine of a decode group's leader. It runs on the node of rank 0.
#[derive(Debug)]
pub struct DecodeLeader {
    group: GroupId,
    geometry: Arc<GroupGeometry>,
    scheduler: NodeId,
    ranks: Roll,
    handovers: BTreeMap<HandoverId, Handover>,
    /// Decided handovers whose blocks are not yet those of some rank's engine again.
    holding: BTreeMap<HandoverId, Holding>,
    /// What no scheduler has said that it knows.
    untold: BTreeMap<HandoverId, (Pairing, OutcomeReport)>,
    /// The last decisions; numbers of handovers ascend.
    decided: BTreeMap<HandoverId, Outcome>,
    /// Tokens in work per attention-dp group.
    load: Vec<u64>,
    terms: DeadlineTerms,
    outbox: Outbox,
}

#[derive(Debug)]
struct Handover {
    pairing: Pairing,
    dp: u32,
    owners: Vec<Rank>,
    pending: BTreeSet<Rank>,
    paths: Vec<PathReport>,
    started: bool,
    deadline: Deadline,
}

#[derive(Debug)]
struct Holding {
    dp: u32,
    spec: RequestSpec,
    delivered: bool,
    by: BTreeSet<Rank>,
}

impl DecodeLeader {
    /// A leader that does not know its ranks' nodes yet; [`DecodeLeader::handle_rank`] names them.
    pub fn new(group: GroupId, geometry: Arc<GroupGeometry>, scheduler: NodeId, terms: DeadlineTerms) -> Self {
        let load = vec![0; geometry.parallel.adp.max(1) as usize];
        DecodeLeader {
            group,
            ranks: Roll::new(geometry.ranks()),
            geometry,
            scheduler,
            handovers: BTreeMap::new(),
            holding: BTreeMap::new(),
            untold: BTreeMap::new(),
            decided: BTreeMap::new(),
            load,
            terms,
            outbox: Outbox::default(),
        }
    }

    /// Commands and events to drain.
    pub fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// When [`DecodeLeader::handle_timeout`] is due.
    pub fn poll_timeout(&self) -> Option<Moment> {
        self.handovers.values().map(|handover| handover.deadline.at).min()
    }

    /// What is in hand.
    pub fn vitals(&self) -> Vitals {
        Vitals {
            name: "decode leader",
            waiting: vec![("handovers", self.handovers.len() as u64)],
            engine: Vec::new(),
            credits: vec![("holding", self.holding.len() as u64), ("load_tokens", self.load.iter().sum())],
            due: self.poll_timeout(),
        }
    }

    /// A rank of the group is on this node.
    pub fn handle_rank(&mut self, rank: Rank, node: NodeId) {
        self.ranks.insert(rank, node);
        self.ranks.report_again(self.scheduler, &mut self.outbox);
    }

    /// A rank of this group is gone, and with it every handover that is not decided.
    pub fn handle_lost(&mut self, now: Moment, lost: &Lost) {
        let Some(rank) = self.ranks.remove(lost.node) else { return };
        self.fail_where(now, rank, lost.node, &lost.cause, |_| true);
        for handover in self.holding.keys().copied().collect::<Vec<_>>() {
            self.freed(handover, rank);
        }
        self.ranks.report(self.scheduler, &mut self.outbox);
    }

    /// The scheduler tells of the loss of an incarnation whose successor is met already: it counts the group as not whole, and as holding
    /// nothing, until it hears otherwise.
    pub fn handle_late_loss(&mut self) {
        self.announce_held();
        self.ranks.report_anew(self.scheduler, &mut self.outbox);
    }

    /// A rank cannot be reached any more, while both live: what it was told or said last may not have arrived.
    pub fn handle_peer_down(&mut self, now: Moment, node: NodeId, cause: &str) {
        if let Some(rank) = self.ranks.part(node, cause) {
            // What this rank has done and said may still be delivered.
            self.fail_where(now, rank, node, cause, |handover| handover.pending.contains(&rank));
            self.ranks.report(self.scheduler, &mut self.outbox);
        }
    }

    /// A scheduler is met that may know nothing of this group's work.
    pub fn handle_scheduler(&mut self) {
        let standing = StandingHandovers {
            under_way: self.handovers.values().map(|handover| handover.pairing.clone()).collect(),
            decided: self.untold.values().cloned().collect(),
            held: self.held(),
        };
        self.announce(standing);
        self.ranks.report_anew(self.scheduler, &mut self.outbox);
    }

    fn fail_where(&mut self, now: Moment, rank: Rank, node: NodeId, cause: &str, which: impl Fn(&Handover) -> bool) {
        let (role, group) = (Role::Decode, self.group);
        let reason = FailReason::RankLost { role, group, rank, node, cause: cause.to_owned() };
        let failed = self.handovers.iter().filter(|(_, handover)| which(handover)).map(|(id, _)| *id);
        for handover in failed.collect::<Vec<_>>() {
            self.decide(now, handover, Outcome::Failed { reason: reason.clone() });
        }
    }

    /// A rank is met and says what it has: what it heard and said before may be lost, and an earlier leader may have given it work.
    fn resume_with(&mut self, now: Moment, from: NodeId, handovers: Vec<(HandoverId, RequestId, u64)>) {
        let Some(rank) = self.ranks.rank_of(from) else { return };
        let mut held: BTreeMap<HandoverId, (RequestId, u64)> =
            handovers.into_iter().map(|(handover, request, tokens)| (handover, (request, tokens))).collect();
        // What it had reported and no longer has died with an earlier incarnation, of whose loss nobody may ever tell.
        let gone = |handover: &Handover| handover.owners.contains(&rank) && !handover.pending.contains(&rank);
        let gone = |(id, handover): &(&HandoverId, &Handover)| gone(handover) && !held.contains_key(id);
        for id in self.handovers.iter().filter(gone).map(|(id, _)| *id).collect::<Vec<_>>() {
            let (role, group, cause) = (Role::Decode, self.group, "it has started over without what it had".to_owned());
            let reason = FailReason::RankLost { role, group, rank, node: from, cause };
            self.decide(now, id, Outcome::Failed { reason });
        }
        for handover in self.holding.keys().copied().filter(|id| !held.contains_key(id)).collect::<Vec<_>>() {
            self.freed(handover, rank);
        }
        held.retain(|id, _| !self.handovers.contains_key(id));
        for (handover, (request, tokens)) in held {
            let unknown = Outcome::Failed { reason: FailReason::NoGroup(Role::Decode) };
            let outcome = self.decided.get(&handover).cloned().unwrap_or(unknown);
            let delivered = self.decided.get(&handover).is_none_or(Outcome::is_delivered);
            self.outbox.send(from, Message::Settled { handover, outcome });
            let (dp, load) = (0, self.load.first_mut());
            let holding = self.holding.entry(handover).or_insert_with(|| {
                if let Some(load) = load {
                    *load += tokens;
                }
                let spec = RequestSpec { request, tokens, prefix: Arc::default(), prefix_tokens: 0 };
                Holding { dp, spec, delivered, by: BTreeSet::new() }
            });
            holding.by.insert(rank);
        }
        // The scheduler may have counted a group that was not whole as one that has nothing.
        self.announce_held();
        if self.ranks.meet(from) {
            self.ranks.report(self.scheduler, &mut self.outbox);
        }
    }

    fn announce_held(&mut self) {
        self.announce(StandingHandovers { held: self.held(), ..StandingHandovers::default() });
    }

    fn announce(&mut self, standing: StandingHandovers) {
        for message in standing::handovers(standing) {
            self.outbox.send(self.scheduler, message);
        }
    }

    fn held(&self) -> Vec<(HandoverId, RequestSpec, bool)> {
        self.holding.iter().map(|(id, holding)| (*id, holding.spec.clone(), holding.delivered)).collect()
    }

    /// A message of the scheduler or of a rank.
    pub fn handle_message(&mut self, now: Moment, from: NodeId, message: Message) {
        match message {
            Message::Pair(pairing) => self.pair(now, pairing),
            Message::Abort { handover, reason } => {
                let outcome = reason.map_or(Outcome::Cancelled, |reason| Outcome::Failed { reason });
                self.decide(now, handover, outcome);
            }
            Message::Started { handover } => {
                let ours = self.ranks.rank_of(from).is_some();
                if let Some(known) = self.handovers.get_mut(&handover).filter(|_| ours)
                    && !known.started
                {
                    known.started = true;
                    self.outbox.event(Event::Started { handover });
                    self.outbox.send(self.scheduler, Message::Started { handover });
                }
            }
            Message::RankDone { handover, result } => self.rank_done(now, from, handover, result),
            Message::Freed { handover } => {
                if let Some(rank) = self.ranks.rank_of(from) {
                    self.freed(handover, rank);
                }
            }
            Message::Holding { handovers } => self.resume_with(now, from, handovers),
            Message::Health { trouble } => {
                if self.ranks.hear(from, trouble) {
                    self.ranks.report(self.scheduler, &mut self.outbox);
                }
            }
            Message::OutcomesKnown { handovers } => {
                for handover in handovers {
                    self.untold.remove(&handover);
                }
            }
            Message::Holds { added, removed } => self.outbox.send(self.scheduler, Message::Holds { added, removed }),
            _ => self.outbox.event(Event::Ignored { from, what: "a message that a decode leader does not take" }),
        }
    }

    /// Time has passed: ranks that never answered fail the handover. Ranks have deadlines of their own; this one only backs them up.
    pub fn handle_timeout(&mut self, now: Moment) {
        let late: Vec<(HandoverId, u64)> = self
            .handovers
            .iter()
            .filter(|(_, handover)| handover.deadline.has_passed(now))
            .map(|(id, handover)| (*id, handover.deadline.waited_ms(now)))
            .collect();
        for (handover, waited_ms) in late {
            self.decide(
                now,
                handover,
                Outcome::Failed { reason: FailReason::Deadline { awaited: Awaited::Transfer, waited_ms } },
            );
        }
    }

    fn pair(&mut self, now: Moment, pairing: Pairing) {
        let handover = pairing.handover;
        if self.handovers.contains_key(&handover) || self.decided.contains_key(&handover) {
            return;
        }
        let dp = (0..self.load.len()).min_by_key(|dp| self.load.get(*dp).copied().unwrap_or(u64::MAX)).unwrap_or(0);
        let owners = self.geometry.owners(dp as u32);
        let nodes = self.ranks.reach(Role::Decode, self.group, &owners);
        if let Some(load) = self.load.get_mut(dp) {
            *load += pairing.spec.tokens;
        }
        let job = FetchJob { pairing: pairing.clone(), dp: dp as u32 };
        let deadline = Deadline::after(now, self.terms.backstop());
        let pending = owners.iter().copied().collect();
        self.handovers.insert(
            handover,
            Handover { pairing, dp: dp as u32, owners, pending, paths: Vec::new(), started: false, deadline },
        );
        match nodes {
            Ok(nodes) => {
                for node in nodes {
                    self.outbox.send(node, Message::Fetch(job.clone()));
                }
            }
            Err(reason) => self.decide_untold(now, handover, Outcome::Failed { reason }),
        }
    }

    fn rank_done(&mut self, now: Moment, from: NodeId, id: HandoverId, result: Result<Vec<PathReport>, FailReason>) {
        let Some(rank) = self.ranks.rank_of(from) else { return };
        let Some(handover) = self.handovers.get_mut(&id) else { return };
        match result {
            Ok(paths) => {
                if handover.pending.remove(&rank) {
                    handover.paths.extend(paths);
                }
                if handover.pending.is_empty() {
                    self.decide(now, id, Outcome::Delivered);
                }
            }
            Err(reason) => self.decide(now, id, Outcome::Failed { reason }),
        }
    }

    fn decide(&mut self, now: Moment, id: HandoverId, outcome: Outcome) {
        let holders = self.handovers.get(&id).map(|handover| handover.owners.clone()).unwrap_or_default();
        self.end(now, id, outcome, holders);
    }

    /// Decides a handover that no rank has heard of.
    fn decide_untold(&mut self, now: Moment, id: HandoverId, outcome: Outcome) {
        self.end(now, id, outcome, Vec::new());
    }

    fn end(&mut self, now: Moment, id: HandoverId, outcome: Outcome, holders: Vec<Rank>) {
        let Some(handover) = self.handovers.remove(&id) else { return };
        self.decided.insert(id, outcome.clone());
        while self.decided.len() > DECIDED_MAX {
            self.decided.pop_first();
        }
        let report = OutcomeReport { handover: id, outcome: outcome.clone(), at: now, paths: handover.paths };
        self.outbox.event(Event::Settled { report: report.clone() });
        let mut by = BTreeSet::new();
        for rank in holders {
            if let Some(node) = self.ranks.node_of(rank) {
                self.outbox.send(node, Message::Settled { handover: id, outcome: outcome.clone() });
                by.insert(rank);
            }
        }
        self.untold.insert(id, (handover.pairing.clone(), report.clone()));
        while self.untold.len() > DECIDED_MAX {
            self.untold.pop_first();
        }
        self.outbox.send(self.scheduler, Message::Outcome(report));
        let held = Holding { dp: handover.dp, spec: handover.pairing.spec, delivered: outcome.is_delivered(), by };
        if held.by.is_empty() {
            self.let_go(id, held.dp, held.spec.tokens);
        } else {
            self.holding.insert(id, held);
        }
    }

    fn freed(&mut self, id: HandoverId, rank: Rank) {
        let Some(holding) = self.holding.get_mut(&id) else { return };
        holding.by.remove(&rank);
        if holding.by.is_empty()
            && let Some(holding) = self.holding.remove(&id)
        {
            self.let_go(id, holding.dp, holding.spec.tokens);
        }
    }

    fn let_go(&mut self, id: HandoverId, dp: u32, tokens: u64) {
        if let Some(load) = self.load.get_mut(dp as usize) {
            *load = load.saturating_sub(tokens);
        }
        self.outbox.send(self.scheduler, Message::Freed { handover: id });
    }
}
