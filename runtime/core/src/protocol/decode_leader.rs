//! A decode group's leader: it decides every handover's outcome, once.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::{
    Awaited, Deadline, DeadlineTerms, Event, FailReason, FetchJob, Lost, Message, Outbox, Outcome, OutcomeReport,
    Pairing, PathReport, Role,
};
use crate::{GroupGeometry, GroupId, HandoverId, Moment, NodeId, Rank};

/// Decided handovers that are remembered, so that late messages about them are recognised.
const DECIDED_MAX: usize = 4096;

/// The state machine of a decode group's leader. It runs on the node of rank 0.
#[derive(Debug)]
pub struct DecodeLeader {
    group: GroupId,
    geometry: Arc<GroupGeometry>,
    scheduler: NodeId,
    nodes: BTreeMap<Rank, NodeId>,
    handovers: BTreeMap<HandoverId, Handover>,
    /// Delivered handovers whose blocks some rank's engine still uses.
    holding: BTreeMap<HandoverId, (u32, u64, BTreeSet<Rank>)>,
    decided: VecDeque<HandoverId>,
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

impl DecodeLeader {
    /// A leader that does not know its ranks' nodes yet; [`DecodeLeader::handle_rank`] names them.
    pub fn new(group: GroupId, geometry: Arc<GroupGeometry>, scheduler: NodeId, terms: DeadlineTerms) -> Self {
        let load = vec![0; geometry.parallel.adp.max(1) as usize];
        DecodeLeader {
            group,
            geometry,
            scheduler,
            nodes: BTreeMap::new(),
            handovers: BTreeMap::new(),
            holding: BTreeMap::new(),
            decided: VecDeque::new(),
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

    /// A rank of the group is on this node.
    pub fn handle_rank(&mut self, rank: Rank, node: NodeId) {
        self.nodes.insert(rank, node);
    }

    /// A rank of this group is gone, and with it every handover that is not decided.
    pub fn handle_lost(&mut self, now: Moment, lost: &Lost) {
        let Some(rank) = self.rank_of(lost.node) else { return };
        self.nodes.remove(&rank);
        let reason = FailReason::RankLost {
            role: Role::Decode,
            group: self.group,
            rank,
            node: lost.node,
            cause: lost.cause.clone(),
        };
        for handover in self.handovers.keys().copied().collect::<Vec<_>>() {
            self.decide(now, handover, Outcome::Failed { reason: reason.clone() });
        }
        for handover in self.holding.keys().copied().collect::<Vec<_>>() {
            self.freed(handover, rank);
        }
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
                let ours = self.rank_of(from).is_some();
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
                if let Some(rank) = self.rank_of(from) {
                    self.freed(handover, rank);
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
        if self.handovers.contains_key(&handover) || self.decided.contains(&handover) {
            return;
        }
        let dp = (0..self.load.len()).min_by_key(|dp| self.load.get(*dp).copied().unwrap_or(u64::MAX)).unwrap_or(0);
        let owners = self.geometry.owners(dp as u32);
        let nodes: Option<Vec<NodeId>> = owners.iter().map(|rank| self.nodes.get(rank).copied()).collect();
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
            Some(nodes) => {
                for node in nodes {
                    self.outbox.send(node, Message::Fetch(job.clone()));
                }
            }
            None => self.decide(now, handover, Outcome::Failed { reason: FailReason::NoGroup(Role::Decode) }),
        }
    }

    fn rank_done(&mut self, now: Moment, from: NodeId, id: HandoverId, result: Result<Vec<PathReport>, FailReason>) {
        let Some(rank) = self.rank_of(from) else { return };
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
        let Some(handover) = self.handovers.remove(&id) else { return };
        self.decided.push_back(id);
        if self.decided.len() > DECIDED_MAX {
            self.decided.pop_front();
        }
        let report = OutcomeReport { handover: id, outcome: outcome.clone(), at: now, paths: handover.paths };
        self.outbox.event(Event::Settled { report: report.clone() });
        for node in handover.owners.iter().filter_map(|rank| self.nodes.get(rank)) {
            self.outbox.send(*node, Message::Settled { handover: id, outcome: outcome.clone() });
        }
        self.outbox.send(self.scheduler, Message::Outcome(report));
        let holders: BTreeSet<Rank> =
            handover.owners.iter().copied().filter(|rank| self.nodes.contains_key(rank)).collect();
        if outcome.is_delivered() && !holders.is_empty() {
            self.holding.insert(id, (handover.dp, handover.pairing.spec.tokens, holders));
        } else {
            self.let_go(id, handover.dp, handover.pairing.spec.tokens);
        }
    }

    fn freed(&mut self, id: HandoverId, rank: Rank) {
        let Some((dp, tokens, holders)) = self.holding.get_mut(&id) else { return };
        holders.remove(&rank);
        let (dp, tokens) = (*dp, *tokens);
        if holders.is_empty() {
            self.holding.remove(&id);
            self.let_go(id, dp, tokens);
        }
    }

    fn let_go(&mut self, id: HandoverId, dp: u32, tokens: u64) {
        if let Some(load) = self.load.get_mut(dp as usize) {
            *load = load.saturating_sub(tokens);
        }
        self.outbox.send(self.scheduler, Message::Freed { handover: id });
    }

    fn rank_of(&self, node: NodeId) -> Option<Rank> {
        self.nodes.iter().find(|(_, member)| **member == node).map(|(rank, _)| *rank)
    }
}
