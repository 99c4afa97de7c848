//! What the scheduler keeps of each group: its ranks, its credits, what it holds.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{Credit, GroupView, Place, RequestSpec};
use crate::{GroupGeometry, GroupId, HandoverId, NodeId, Rank, RequestId};

/// Hashes remembered per decode group; beyond that the scheduler forgets the largest, and only chooses less well.
const HELD_HASHES_MAX: usize = 1 << 20;

/// Of a decode group that a predecessor may have given work: its leader says what that was, and that all ranks have told it what they hold.
const UNHEARD: &str = "it may hold what an earlier scheduler gave it, and its leader has yet to say that it is whole";

/// Of a group that has lost a rank: its leader says so when it has met all of them again, and what they still hold.
const NOT_WHOLE: &str = "it has lost a rank, and its leader has yet to say that it is whole";

/// The ranks of a group and where they are.
#[derive(Debug)]
struct Ranks {
    expected: u32,
    nodes: BTreeMap<Rank, NodeId>,
}

impl Ranks {
    fn new(geometry: &GroupGeometry) -> Self {
        Ranks { expected: geometry.ranks(), nodes: BTreeMap::new() }
    }

    fn without(&self, rank: Rank) -> Ranks {
        let mut nodes = self.nodes.clone();
        nodes.remove(&rank);
        Ranks { expected: self.expected, nodes }
    }

    /// Says whether this made the group complete.
    fn join(&mut self, rank: Rank, node: NodeId) -> bool {
        let before = self.is_complete();
        self.nodes.insert(rank, node);
        !before && self.is_complete()
    }

    fn is_complete(&self) -> bool {
        self.nodes.len() == self.expected as usize
    }

    /// The node of rank 0, once every rank is here.
    fn leader(&self) -> Option<NodeId> {
        self.nodes.get(&Rank(0)).copied().filter(|_| self.is_complete())
    }

    fn rank_of(&self, node: NodeId) -> Option<Rank> {
        self.nodes.iter().find(|(_, member)| **member == node).map(|(rank, _)| *rank)
    }
}

/// A prefill group.
#[derive(Debug)]
pub(super) struct PrefillGroup {
    ranks: Ranks,
    jobs: Credit,
    /// Why it takes no work.
    pub(super) trouble: Option<String>,
    /// Requests whose credit is out. A group that formed anew under an old number owes nothing of its predecessor's.
    working: BTreeSet<RequestId>,
    load_tokens: u64,
}

impl PrefillGroup {
    pub(super) fn new(geometry: &GroupGeometry, jobs_max: u64) -> Self {
        PrefillGroup {
            ranks: Ranks::new(geometry),
            jobs: Credit::new(jobs_max),
            trouble: None,
            working: BTreeSet::new(),
            load_tokens: 0,
        }
    }

    /// What is left of it when a rank is gone: the surviving ranks, working on nothing, until the rank's next incarnation joins.
    pub(super) fn without(&self, rank: Rank) -> PrefillGroup {
        let (ranks, jobs) = (self.ranks.without(rank), Credit::new(self.jobs.limit()));
        PrefillGroup { ranks, jobs, trouble: Some(NOT_WHOLE.to_owned()), working: BTreeSet::new(), load_tokens: 0 }
    }

    pub(super) fn join(&mut self, place: &Place, node: NodeId) -> bool {
        self.ranks.join(place.rank, node)
    }

    pub(super) fn leader(&self) -> Option<NodeId> {
        self.ranks.leader()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ranks.nodes.is_empty()
    }

    pub(super) fn rank_of(&self, node: NodeId) -> Option<Rank> {
        self.ranks.rank_of(node)
    }

    /// `None` when it has no room or not all its ranks.
    pub(super) fn view(&self, group: GroupId) -> Option<GroupView> {
        (self.leader().is_some() && self.trouble.is_none() && self.jobs.left() > 0).then_some(GroupView {
            group,
            load_tokens: self.load_tokens,
            handovers: self.jobs.used(),
            held_tokens: 0,
        })
    }

    /// Whether it works on the request, or holds its offer.
    pub(super) fn has(&self, request: RequestId) -> bool {
        self.working.contains(&request)
    }

    pub(super) fn take(&mut self, request: RequestId, tokens: u64) -> bool {
        let taken = !self.has(request) && self.jobs.take(1).is_ok();
        if taken {
            self.working.insert(request);
            self.load_tokens += tokens;
        }
        taken
    }

    /// It works on the request already, whether there is a credit for it or not.
    pub(super) fn adopt(&mut self, request: RequestId, tokens: u64) {
        if self.working.insert(request) {
            self.jobs.force(1);
            self.load_tokens += tokens;
        }
    }

    /// Whether a node is the one that leads it, be it complete or not.
    pub(super) fn is_led_by(&self, node: NodeId) -> bool {
        self.ranks.rank_of(node) == Some(Rank(0))
    }

    /// Credits that are out.
    pub(super) fn used(&self) -> u64 {
        self.jobs.used()
    }

    /// Says whether there was anything to release.
    pub(super) fn release(&mut self, request: RequestId, tokens: u64) -> bool {
        let released = self.working.remove(&request);
        if released {
            self.jobs.give(1);
            self.load_tokens = self.load_tokens.saturating_sub(tokens);
        }
        released
    }
}

/// A decode group.
#[derive(Debug)]
pub(super) struct DecodeGroup {
    ranks: Ranks,
    geometry: Arc<GroupGeometry>,
    handovers: Credit,
    /// Blocks of one rank's pool, per layer group.
    blocks: Vec<Credit>,
    /// Why it takes no work.
    pub(super) trouble: Option<String>,
    /// Handovers whose credits are out. A group that formed anew under an old number owes nothing of its predecessor's.
    working: BTreeSet<HandoverId>,
    load_tokens: u64,
    held: BTreeSet<u64>,
}

impl DecodeGroup {
    pub(super) fn new(place: &Place) -> Self {
        DecodeGroup {
            ranks: Ranks::new(&place.geometry),
            geometry: Arc::clone(&place.geometry),
            handovers: Credit::new(u64::from(place.handovers_max.max(1))),
            // The ranks of a group have equal pools in practice; the first to join speaks for all.
            blocks: place.blocks.iter().map(|blocks| Credit::new(u64::from(*blocks))).collect(),
            trouble: None,
            working: BTreeSet::new(),
            load_tokens: 0,
            held: BTreeSet::new(),
        }
    }

    /// One that a predecessor of this scheduler may have given work.
    pub(super) fn inherited(place: &Place) -> Self {
        DecodeGroup { trouble: Some(UNHEARD.to_owned()), ..DecodeGroup::new(place) }
    }

    /// What is left of it when a rank is gone and its leader is not: the leader still says of everything when its blocks are back.
    pub(super) fn lacking(mut self, rank: Rank) -> DecodeGroup {
        self.ranks = self.ranks.without(rank);
        self.trouble = Some(NOT_WHOLE.to_owned());
        self.held.clear();
        self
    }

    /// What is left of it when its leader is gone: the surviving ranks, until the leader's next incarnation says what they still hold.
    pub(super) fn without(&self, rank: Rank) -> DecodeGroup {
        DecodeGroup {
            ranks: self.ranks.without(rank),
            geometry: Arc::clone(&self.geometry),
            handovers: Credit::new(self.handovers.limit()),
            blocks: self.blocks.iter().map(|credit| Credit::new(credit.limit())).collect(),
            trouble: Some(NOT_WHOLE.to_owned()),
            working: BTreeSet::new(),
            load_tokens: 0,
            // Another incarnation holds no prefixes; the survivors' alone are of no use.
            held: BTreeSet::new(),
        }
    }

    pub(super) fn join(&mut self, place: &Place, node: NodeId) -> bool {
        self.ranks.join(place.rank, node)
    }

    pub(super) fn leader(&self) -> Option<NodeId> {
        self.ranks.leader()
    }

    /// The node of rank 0, be the group complete or not.
    pub(super) fn chief(&self) -> Option<NodeId> {
        self.ranks.nodes.get(&Rank(0)).copied()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ranks.nodes.is_empty()
    }

    pub(super) fn rank_of(&self, node: NodeId) -> Option<Rank> {
        self.ranks.rank_of(node)
    }

    /// `None` when it has no room for the request now, or not all its ranks.
    pub(super) fn view(&self, group: GroupId, spec: &RequestSpec) -> Option<GroupView> {
        let room =
            self.handovers.left() > 0 && self.costs(spec).zip(&self.blocks).all(|(cost, credit)| cost <= credit.left());
        (self.leader().is_some() && self.trouble.is_none() && room).then(|| GroupView {
            group,
            load_tokens: self.load_tokens,
            handovers: self.handovers.used(),
            held_tokens: self.held_tokens(spec),
        })
    }

    /// Whether the request fits when the group is empty.
    pub(super) fn could_ever_take(&self, spec: &RequestSpec) -> bool {
        self.costs(spec).zip(&self.blocks).all(|(cost, credit)| cost <= credit.limit())
    }

    pub(super) fn take(&mut self, handover: HandoverId, spec: &RequestSpec) -> bool {
        let costs: Vec<u64> = self.costs(spec).collect();
        if self.handovers.left() == 0 || costs.iter().zip(&self.blocks).any(|(cost, credit)| *cost > credit.left()) {
            return false;
        }
        for (cost, credit) in costs.iter().zip(&mut self.blocks) {
            if credit.take(*cost).is_err() {
                return false;
            }
        }
        self.load_tokens += spec.tokens;
        self.working.insert(handover);
        self.handovers.take(1).is_ok()
    }

    /// It works on the handover already, whether there are credits for it or not.
    pub(super) fn adopt(&mut self, handover: HandoverId, spec: &RequestSpec) {
        if self.working.insert(handover) {
            let costs: Vec<u64> = self.costs(spec).collect();
            for (cost, credit) in costs.iter().zip(&mut self.blocks) {
                credit.force(*cost);
            }
            self.handovers.force(1);
            self.load_tokens += spec.tokens;
        }
    }

    /// Whether a node is the one that leads it, be it complete or not.
    pub(super) fn is_led_by(&self, node: NodeId) -> bool {
        self.ranks.rank_of(node) == Some(Rank(0))
    }

    /// Credits that are out: handovers and blocks.
    pub(super) fn used(&self) -> u64 {
        self.handovers.used() + self.blocks.iter().map(Credit::used).sum::<u64>()
    }

    pub(super) fn give_back(&mut self, handover: HandoverId, spec: &RequestSpec) {
        if !self.working.remove(&handover) {
            return;
        }
        let costs: Vec<u64> = self.costs(spec).collect();
        for (cost, credit) in costs.iter().zip(&mut self.blocks) {
            credit.give(*cost);
        }
        self.handovers.give(1);
        self.load_tokens = self.load_tokens.saturating_sub(spec.tokens);
    }

    pub(super) fn hold(&mut self, added: &[u64], removed: &[u64]) {
        for hash in removed {
            self.held.remove(hash);
        }
        self.held.extend(added);
        while self.held.len() > HELD_HASHES_MAX {
            self.held.pop_last();
        }
    }

    fn held_tokens(&self, spec: &RequestSpec) -> u64 {
        let hashes = spec.prefix.iter().take_while(|hash| self.held.contains(hash)).count() as u64;
        (hashes * u64::from(spec.prefix_tokens)).min(spec.tokens)
    }

    /// Blocks of each layer group that the request takes on the rank that needs most of it (pipeline stages hold different groups).
    fn costs<'a>(&'a self, spec: &'a RequestSpec) -> impl Iterator<Item = u64> + 'a {
        let columns = (self.geometry.parallel.tp * self.geometry.parallel.cp).max(1) as usize;
        (0..self.blocks.len()).map(move |group| {
            let stages = (0..self.geometry.ranks()).step_by(columns);
            let cost = stages.map(|rank| self.geometry.blocks_for(group, spec.tokens, Rank(rank)).blocks).max();
            u64::from(cost.unwrap_or(0))
        })
    }
}
