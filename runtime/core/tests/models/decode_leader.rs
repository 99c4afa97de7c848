//! A decode group's leader: a handover is open, then decided once, then out until both ranks have let go.

use std::collections::{BTreeMap, BTreeSet};

use kvferry_core::protocol::{
    Command, DeadlineTerms, DecodeLeader, FailReason, Message, Outcome, Role, StandingHandovers,
};
use kvferry_core::{GroupId, HandoverId, NodeId, Rank, RequestId};
use proptest::prelude::*;

use super::kit::*;

const SCHEDULER: u64 = 100;
const STRANGER: u64 = 99;
const RANKS: [u64; 2] = [20, 21];

#[derive(Clone, Debug)]
enum Operation {
    Pair(u64),
    Done(usize, u64, bool),
    Abort(u64),
    Freed(usize, u64),
    Holding(usize, BTreeSet<u64>),
    Part(usize),
    Known(u64),
    Scheduler,
    Nonsense(u64),
}

fn operation() -> impl Strategy<Value = Operation> {
    let (rank, handover) = (0..2_usize, 0..6_u64);
    prop_oneof![
        4 => handover.clone().prop_map(Operation::Pair),
        8 => (rank.clone(), handover.clone(), prop::bool::weighted(0.85)).prop_map(|(r, h, ok)| Operation::Done(r, h, ok)),
        1 => handover.clone().prop_map(Operation::Abort),
        6 => (rank.clone(), handover.clone()).prop_map(|(r, h)| Operation::Freed(r, h)),
        3 => (rank.clone(), prop::collection::btree_set(0..8_u64, 0..4)).prop_map(|(r, h)| Operation::Holding(r, h)),
        1 => rank.prop_map(Operation::Part),
        1 => handover.clone().prop_map(Operation::Known),
        1 => Just(Operation::Scheduler),
        1 => handover.prop_map(Operation::Nonsense),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Delivered,
    Failed,
    Cancelled,
}

/// What is said, without its details.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Said {
    Fetch(u64),
    Settled(u64, End),
    Outcome(u64, End),
    Freed(u64),
    Standing(Vec<u64>, Vec<u64>, Vec<(u64, bool)>),
}

#[derive(Default)]
struct Naive {
    parted: [bool; 2],
    /// Which ranks are done.
    open: BTreeMap<u64, [bool; 2]>,
    ended: BTreeMap<u64, End>,
    untold: BTreeSet<u64>,
    /// Which ranks have not let go.
    out: BTreeMap<u64, BTreeSet<usize>>,
    said: Vec<(u64, Said)>,
}

impl Naive {
    fn apply(&mut self, operation: &Operation) {
        match operation {
            Operation::Pair(handover) if self.open.contains_key(handover) || self.ended.contains_key(handover) => {}
            Operation::Pair(handover) if self.parted.contains(&true) => {
                self.ended.insert(*handover, End::Failed);
                self.untold.insert(*handover);
                self.said.push((SCHEDULER, Said::Outcome(*handover, End::Failed)));
                self.said.push((SCHEDULER, Said::Freed(*handover)));
            }
            Operation::Pair(handover) => {
                self.open.insert(*handover, [false; 2]);
                RANKS.iter().for_each(|node| self.said.push((*node, Said::Fetch(*handover))));
            }
            Operation::Done(rank, handover, true) => {
                let Some(done) = self.open.get_mut(handover) else { return };
                done[*rank] = true;
                if *done == [true; 2] {
                    self.decide(*handover, End::Delivered);
                }
            }
            Operation::Done(_, handover, false) => self.decide(*handover, End::Failed),
            Operation::Abort(handover) => self.decide(*handover, End::Cancelled),
            Operation::Freed(rank, handover) => self.let_go(*rank, *handover),
            Operation::Holding(rank, held) => {
                let lost = |(handover, done): &(&u64, &[bool; 2])| done[*rank] && !held.contains(handover);
                for handover in self.open.iter().filter(lost).map(|(handover, _)| *handover).collect::<Vec<_>>() {
                    self.decide(handover, End::Failed);
                }
                let gone = self.out.keys().copied().filter(|handover| !held.contains(handover));
                for handover in gone.collect::<Vec<_>>() {
                    self.let_go(*rank, handover);
                }
                for handover in held.iter().filter(|handover| !self.open.contains_key(handover)) {
                    let end = self.ended.get(handover).copied().unwrap_or(End::Failed);
                    self.said.push((RANKS[*rank], Said::Settled(*handover, end)));
                    self.out.entry(*handover).or_default().insert(*rank);
                }
                if !self.out.is_empty() {
                    self.said.push((SCHEDULER, Said::Standing(vec![], vec![], self.held())));
                }
                self.parted[*rank] = false;
            }
            Operation::Part(rank) => {
                self.parted[*rank] = true;
                let owed = self.open.iter().filter(|(_, done)| !done[*rank]).map(|(handover, _)| *handover);
                for handover in owed.collect::<Vec<_>>() {
                    self.decide(handover, End::Failed);
                }
            }
            Operation::Known(handover) => drop(self.untold.remove(handover)),
            Operation::Scheduler => {
                let keys = |map: &BTreeMap<u64, [bool; 2]>| map.keys().copied().collect::<Vec<_>>();
                let (open, untold) = (keys(&self.open), self.untold.iter().copied().collect());
                let standing = Said::Standing(open, untold, self.held());
                if standing != Said::Standing(vec![], vec![], vec![]) {
                    self.said.push((SCHEDULER, standing));
                }
            }
            Operation::Nonsense(_) => {}
        }
    }

    /// What is out; of what this leader never had nobody knows that it was not delivered.
    fn held(&self) -> Vec<(u64, bool)> {
        let delivered = |handover| self.ended.get(handover).is_none_or(|end| *end == End::Delivered);
        self.out.keys().map(|handover| (*handover, delivered(handover))).collect()
    }

    fn decide(&mut self, handover: u64, end: End) {
        if self.open.remove(&handover).is_some() {
            self.ended.insert(handover, end);
            self.untold.insert(handover);
            self.out.insert(handover, BTreeSet::from([0, 1]));
            RANKS.iter().for_each(|node| self.said.push((*node, Said::Settled(handover, end))));
            self.said.push((SCHEDULER, Said::Outcome(handover, end)));
        }
    }

    fn let_go(&mut self, rank: usize, handover: u64) {
        let Some(ranks) = self.out.get_mut(&handover) else { return };
        ranks.remove(&rank);
        if ranks.is_empty() {
            self.out.remove(&handover);
            self.said.push((SCHEDULER, Said::Freed(handover)));
        }
    }
}

fn end(outcome: &Outcome) -> End {
    match outcome {
        Outcome::Delivered => End::Delivered,
        Outcome::Failed { .. } => End::Failed,
        Outcome::Cancelled => End::Cancelled,
    }
}

fn said(command: Command) -> Option<(u64, Said)> {
    let Command::Send { to, message } = command else { panic!("a leader only talks") };
    let said = match message {
        Message::Fetch(job) => Said::Fetch(job.pairing.handover.0),
        Message::Settled { handover, outcome } => Said::Settled(handover.0, end(&outcome)),
        Message::Outcome(report) => Said::Outcome(report.handover.0, end(&report.outcome)),
        Message::Freed { handover } => Said::Freed(handover.0),
        Message::StandingHandovers(standing) => {
            let StandingHandovers { under_way, decided, held } = *standing;
            Said::Standing(
                under_way.iter().map(|pairing| pairing.handover.0).collect(),
                decided.iter().map(|(_, report)| report.handover.0).collect(),
                held.iter().map(|(handover, _, delivered)| (handover.0, *delivered)).collect(),
            )
        }
        Message::Health { .. } => return None,
        other => panic!("{other:?}"),
    };
    Some((to.0, said))
}

fn holding(handovers: BTreeSet<u64>) -> Message {
    let entry = |handover| (HandoverId(handover), RequestId(handover), TOKENS);
    Message::Holding { handovers: handovers.into_iter().map(entry).collect() }
}

fn apply(leader: &mut DecodeLeader, operation: &Operation) {
    let (from, message) = match operation.clone() {
        Operation::Pair(handover) => (SCHEDULER, Message::Pair(pairing(handover, handover))),
        Operation::Done(rank, handover, ok) => {
            let result = if ok { Ok(vec![]) } else { Err(FailReason::Engine("full".into())) };
            (RANKS[rank], Message::RankDone { handover: HandoverId(handover), result })
        }
        Operation::Abort(handover) => (SCHEDULER, Message::Abort { handover: HandoverId(handover), reason: None }),
        Operation::Freed(rank, handover) => (RANKS[rank], Message::Freed { handover: HandoverId(handover) }),
        Operation::Holding(rank, held) => (RANKS[rank], holding(held)),
        Operation::Known(handover) => (SCHEDULER, Message::OutcomesKnown { handovers: vec![HandoverId(handover)] }),
        Operation::Part(rank) => return leader.handle_peer_down(millis(1), NodeId(RANKS[rank]), "the cable"),
        Operation::Scheduler => return leader.handle_scheduler(),
        Operation::Nonsense(number) => {
            let handover = HandoverId(number);
            leader.handle_peer_down(millis(1), NodeId(STRANGER), "the cable");
            leader.handle_lost(millis(1), &lost(STRANGER, 1));
            let nonsense = match number % 4 {
                0 => Message::RankDone { handover, result: Err(FailReason::NoGroup(Role::Decode)) },
                1 => Message::Freed { handover },
                2 => holding(BTreeSet::from([number])),
                _ => Message::Confirmed { handover },
            };
            (STRANGER, nonsense)
        }
    };
    leader.handle_message(millis(1), NodeId(from), message);
}

proptest! {
    #[test]
    fn every_handover_is_decided_once_and_comes_back_once(operations in prop::collection::vec(operation(), 1..120)) {
        let mut leader = DecodeLeader::new(GroupId(1), geometry(2), NodeId(SCHEDULER), DeadlineTerms::default());
        RANKS.iter().zip(0..).for_each(|(node, rank)| leader.handle_rank(Rank(rank), NodeId(*node)));
        (0..2).for_each(|rank| apply(&mut leader, &Operation::Holding(rank, BTreeSet::new())));
        commands(leader.outbox());
        let mut naive = Naive::default();
        for mut operation in operations {
            if let Operation::Holding(_, held) = &mut operation {
                // What a rank has was paired by this leader, or, from 6 on, by an earlier one: never by a later one.
                held.retain(|id| *id >= 6 || naive.open.contains_key(id) || naive.ended.contains_key(id));
            }
            apply(&mut leader, &operation);
            naive.apply(&operation);
            let mut heard: Vec<(u64, Said)> = commands(leader.outbox()).into_iter().filter_map(said).collect();
            let mut expected = std::mem::take(&mut naive.said);
            heard.sort();
            expected.sort();
            prop_assert_eq!(heard, expected, "{:?}", operation);
            let vitals = leader.vitals();
            prop_assert_eq!(&vitals.waiting, &[("handovers", naive.open.len() as u64)]);
            prop_assert_eq!(vitals.credits[0], ("holding", naive.out.len() as u64));
            prop_assert_eq!(vitals.credits[1], ("load_tokens", (naive.open.len() + naive.out.len()) as u64 * TOKENS));
            prop_assert_eq!(leader.poll_timeout().is_some(), !naive.open.is_empty());
        }
    }
}
