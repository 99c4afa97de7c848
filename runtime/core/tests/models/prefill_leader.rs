//! A prefill group's leader: an offer stands when both ranks opened it alike, is ready when both are, and ends with either.

use std::collections::{BTreeMap, BTreeSet};

use kvferry_core::protocol::{Command, FailReason, Message, PrefillJob, PrefillLeader, PrefillView};
use kvferry_core::{GroupId, NodeId, Rank, RequestId};
use proptest::prelude::*;

use super::kit::*;

const SCHEDULER: u64 = 100;
const STRANGER: u64 = 99;
const RANKS: [u64; 2] = [1, 2];

#[derive(Clone, Debug)]
enum Operation {
    Prefill(u64),
    Opened(usize, u64, bool),
    Ready(usize, u64, u64),
    Failed(usize, u64),
    Release(u64),
    Renew(Vec<u64>),
    Part(usize),
    Meet(usize),
    Scheduler,
    Nonsense(u64),
}

fn operation() -> impl Strategy<Value = Operation> {
    let (rank, request) = (0..2_usize, 0..5_u64);
    let usual = prop::bool::weighted(0.9);
    prop_oneof![
        4 => request.clone().prop_map(Operation::Prefill),
        8 => (rank.clone(), request.clone(), usual).prop_map(|(k, r, usual)| Operation::Opened(k, r, usual)),
        6 => (rank.clone(), request.clone(), 0..50_u64).prop_map(|(k, r, at)| Operation::Ready(k, r, at)),
        1 => (rank.clone(), request.clone()).prop_map(|(k, r)| Operation::Failed(k, r)),
        3 => request.clone().prop_map(Operation::Release),
        1 => prop::collection::vec(0..7_u64, 0..4).prop_map(Operation::Renew),
        1 => rank.clone().prop_map(Operation::Part),
        2 => rank.prop_map(Operation::Meet),
        1 => Just(Operation::Scheduler),
        1 => request.prop_map(Operation::Nonsense),
    ]
}

/// What is said, without its details.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Said {
    Prefill(u64),
    Release(u64),
    Renew(Vec<u64>),
    Offered(u64),
    Ready(u64, u64),
    Failed(u64),
    Standing(Vec<(u64, bool, Option<u64>)>),
}

#[derive(Default)]
struct Offer {
    opened: BTreeSet<usize>,
    usual: Option<bool>,
    ready: BTreeMap<usize, u64>,
    /// The latest moment that anybody named.
    latest: u64,
}

impl Offer {
    fn ready_at(&self) -> Option<u64> {
        (self.ready.len() == 2).then_some(self.latest)
    }
}

#[derive(Default)]
struct Naive {
    parted: [bool; 2],
    offers: BTreeMap<u64, Offer>,
    said: Vec<(u64, Said)>,
}

impl Naive {
    fn apply(&mut self, operation: &Operation) {
        match operation {
            Operation::Prefill(request) if self.offers.contains_key(request) => {
                let offer = &self.offers[request];
                if offer.opened.len() == 2 {
                    self.said.push((SCHEDULER, Said::Offered(*request)));
                }
                self.said.extend(offer.ready_at().map(|at| (SCHEDULER, Said::Ready(*request, at))));
            }
            Operation::Prefill(request) if self.parted.contains(&true) => {
                self.said.push((SCHEDULER, Said::Failed(*request)));
            }
            Operation::Prefill(request) => {
                self.offers.insert(*request, Offer::default());
                RANKS.iter().for_each(|node| self.said.push((*node, Said::Prefill(*request))));
            }
            Operation::Opened(rank, request, usual) => {
                let Some(offer) = self.offers.get_mut(request) else { return };
                if *offer.usual.get_or_insert(*usual) != *usual {
                    self.fail(*request);
                } else if offer.opened.insert(*rank) && offer.opened.len() == 2 {
                    self.said.push((SCHEDULER, Said::Offered(*request)));
                }
            }
            Operation::Ready(rank, request, at) => {
                let Some(offer) = self.offers.get_mut(request) else { return };
                offer.latest = offer.latest.max(*at);
                let before = offer.ready.len();
                offer.ready.entry(*rank).or_insert(*at);
                if before == 1 && offer.ready.len() == 2 {
                    self.said.push((SCHEDULER, Said::Ready(*request, offer.latest)));
                }
            }
            Operation::Failed(_, request) if self.offers.contains_key(request) => self.fail(*request),
            Operation::Release(request) => self.release(*request),
            Operation::Renew(requests) => {
                let known: Vec<u64> =
                    requests.iter().copied().filter(|request| self.offers.contains_key(request)).collect();
                if !known.is_empty() {
                    RANKS.iter().for_each(|node| self.said.push((*node, Said::Renew(known.clone()))));
                }
            }
            Operation::Part(rank) => {
                self.parted[*rank] = true;
                self.offers.keys().copied().collect::<Vec<_>>().into_iter().for_each(|request| self.fail(request));
            }
            Operation::Meet(rank) => self.parted[*rank] = false,
            Operation::Scheduler if !self.offers.is_empty() => {
                let all = self.offers.iter();
                let all = all.map(|(request, offer)| (*request, offer.opened.len() == 2, offer.ready_at())).collect();
                self.said.push((SCHEDULER, Said::Standing(all)));
            }
            Operation::Failed(..) | Operation::Scheduler | Operation::Nonsense(_) => {}
        }
    }

    fn release(&mut self, request: u64) {
        if self.offers.remove(&request).is_some() {
            RANKS.iter().for_each(|node| self.said.push((*node, Said::Release(request))));
        }
    }

    fn fail(&mut self, request: u64) {
        self.release(request);
        self.said.push((SCHEDULER, Said::Failed(request)));
    }
}

fn said(command: Command) -> Option<(u64, Said)> {
    let Command::Send { to, message } = command else { panic!("a leader only talks") };
    let said = match message {
        Message::Prefill(job) => Said::Prefill(job.spec.request.0),
        Message::Release { request, .. } => Said::Release(request.0),
        Message::Renew { requests } => Said::Renew(requests.iter().map(|request| request.0).collect()),
        Message::Offered(offer) => Said::Offered(offer.request.0),
        Message::OfferReady { request, at } => Said::Ready(request.0, at.0),
        Message::OfferFailed { request, .. } => Said::Failed(request.0),
        Message::StandingOffers(offers) => Said::Standing(
            offers
                .iter()
                .map(|offer| (offer.spec.request.0, offer.steps.is_some(), offer.ready_at.map(|at| at.0)))
                .collect(),
        ),
        Message::Health { .. } => return None,
        other => panic!("{other:?}"),
    };
    Some((to.0, said))
}

fn apply(leader: &mut PrefillLeader, operation: &Operation) {
    let (from, message) = match operation.clone() {
        Operation::Prefill(request) => {
            (SCHEDULER, Message::Prefill(PrefillJob { spec: spec(request), dp: 0, trace: None }))
        }
        Operation::Opened(rank, request, usual) => {
            let steps = if usual { vec![2, 4] } else { vec![4] };
            (RANKS[rank], Message::RankOpened { request: RequestId(request), steps })
        }
        Operation::Ready(rank, request, at) => {
            (RANKS[rank], Message::RankReady { request: RequestId(request), at: kvferry_core::Moment(at) })
        }
        Operation::Failed(rank, request) => {
            let reason = FailReason::Engine("full".into());
            (RANKS[rank], Message::RankFailed { request: RequestId(request), reason })
        }
        Operation::Release(request) => {
            (SCHEDULER, Message::Release { request: RequestId(request), view: PrefillView::Ended })
        }
        Operation::Renew(requests) => {
            (SCHEDULER, Message::Renew { requests: requests.into_iter().map(RequestId).collect() })
        }
        Operation::Part(rank) => return leader.handle_peer_down(millis(1), NodeId(RANKS[rank]), "the cable"),
        Operation::Meet(rank) => return leader.handle_peer_up(NodeId(RANKS[rank])),
        Operation::Scheduler => return leader.handle_scheduler(),
        Operation::Nonsense(number) => {
            let request = RequestId(number);
            leader.handle_peer_down(millis(1), NodeId(STRANGER), "the cable");
            leader.handle_lost(millis(1), &lost(STRANGER, 1));
            let nonsense = match number % 4 {
                0 => Message::RankOpened { request, steps: vec![4] },
                1 => Message::RankReady { request, at: millis(9) },
                2 => Message::RankFailed { request, reason: FailReason::Engine("full".into()) },
                _ => Message::OfferReady { request, at: millis(9) },
            };
            (STRANGER, nonsense)
        }
    };
    leader.handle_message(millis(1), NodeId(from), message);
}

proptest! {
    #[test]
    fn a_group_speaks_when_both_ranks_have(operations in prop::collection::vec(operation(), 1..120)) {
        let within = core::time::Duration::from_secs(60);
        let mut leader = PrefillLeader::new(GroupId(0), geometry(2), NodeId(SCHEDULER), within);
        RANKS.iter().zip(0..).for_each(|(node, rank)| leader.handle_rank(Rank(rank), NodeId(*node)));
        let mut naive = Naive::default();
        for operation in operations {
            apply(&mut leader, &operation);
            naive.apply(&operation);
            let mut heard: Vec<(u64, Said)> = commands(leader.outbox()).into_iter().filter_map(said).collect();
            let mut expected = std::mem::take(&mut naive.said);
            heard.sort();
            expected.sort();
            prop_assert_eq!(heard, expected, "{:?}", operation);
            let unopened = naive.offers.values().filter(|offer| offer.opened.len() < 2).count() as u64;
            let vitals = leader.vitals();
            prop_assert_eq!(&vitals.waiting, &[("unopened", unopened)]);
            prop_assert_eq!(vitals.credits[0], ("offers", naive.offers.len() as u64));
            prop_assert_eq!(vitals.credits[1], ("load_tokens", naive.offers.len() as u64 * TOKENS));
            prop_assert_eq!(leader.poll_timeout().is_some(), unopened > 0, "every wait has a deadline");
        }
    }
}
