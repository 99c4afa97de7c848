//! A prefill rank that is read from: offers under leases, one handover each, and what every peer is answered.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use kvferry_core::protocol::{
    Command, EngineCall, EngineEvent, Message, OpenFetch, PrefillJob, PrefillRank, PrefillView, QuarantineTerms,
    Refusal, Role,
};
use kvferry_core::{Direction, HandoverId, NodeId, RequestId};
use proptest::prelude::*;

use super::kit::*;

const LEADER: u64 = 1;
const READERS: [u64; 2] = [20, 21];

#[derive(Clone, Debug)]
enum Operation {
    Prefill(u64),
    Opened(u64),
    Ready(u64, u32),
    Unable(u64),
    Released(u64),
    Release(u64),
    Renew(u64),
    Open(usize, u64, u64),
    Fetched(usize, u64),
    Reading(usize, u64),
    Abandon(usize, u64),
    Down(usize),
    Up(usize),
    LeaderDown,
    Wait(u64, bool),
}

fn operation() -> impl Strategy<Value = Operation> {
    let (reader, request, handover) = (0..2_usize, 0..3_u64, 0..6_u64);
    let by_reader = (reader.clone(), handover.clone());
    prop_oneof![
        5 => request.clone().prop_map(Operation::Prefill),
        6 => request.clone().prop_map(Operation::Opened),
        4 => (request.clone(), 0..4_u32).prop_map(|(r, steps)| Operation::Ready(r, steps)),
        1 => request.clone().prop_map(Operation::Unable),
        5 => request.clone().prop_map(Operation::Released),
        2 => request.clone().prop_map(Operation::Release),
        3 => request.clone().prop_map(Operation::Renew),
        10 => (reader.clone(), request, handover).prop_map(|(k, r, h)| Operation::Open(k, r, h)),
        6 => by_reader.clone().prop_map(|(k, h)| Operation::Fetched(k, h)),
        2 => by_reader.clone().prop_map(|(k, h)| Operation::Reading(k, h)),
        2 => by_reader.prop_map(|(k, h)| Operation::Abandon(k, h)),
        1 => reader.clone().prop_map(Operation::Down),
        2 => reader.prop_map(Operation::Up),
        1 => Just(Operation::LeaderDown),
        5 => (0..1_500_u64, any::<bool>()).prop_map(|(ms, fires)| Operation::Wait(ms, fires)),
    ]
}

/// What is said, without its details.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Said {
    Compute(u64),
    Release(u64, &'static str),
    Rejected(u64),
    RankOpened(u64),
    RankReady(u64),
    RankFailed(u64),
    Opened(usize, u64),
    Steps(usize, u64, u32),
    Confirmed(usize, u64),
    Refused(usize, u64, &'static str),
}

#[derive(Default)]
struct Offer {
    /// When its lease ends, once it is open.
    expires: Option<u64>,
    ready: u32,
    handover: Option<u64>,
    readers: BTreeMap<usize, Reader>,
}

#[derive(Clone, Copy)]
struct Reader {
    handover: u64,
    stopped: bool,
    confirmed: bool,
}

#[derive(Default)]
struct Naive {
    now: u64,
    met: [bool; 2],
    offers: BTreeMap<u64, Offer>,
    /// Releases that the engine has not taken, and whether the request is to be computed anew.
    releasing: BTreeMap<u64, bool>,
    said: Vec<Said>,
}

impl Naive {
    fn say(&mut self, said: Said) {
        self.said.push(said);
    }

    fn apply(&mut self, operation: &Operation) {
        match *operation {
            Operation::Prefill(request) => self.prefill(request),
            Operation::Opened(request) | Operation::Ready(request, _) | Operation::Unable(request)
                if self.releasing.contains_key(&request) => {}
            Operation::Opened(request) => match self.offers.get_mut(&request).filter(|offer| offer.expires.is_none()) {
                Some(offer) => {
                    offer.expires = Some(self.now + 3_000);
                    self.say(Said::RankOpened(request));
                }
                None => self.say(Said::Rejected(request)),
            },
            Operation::Ready(request, steps) => self.ready(request, steps),
            Operation::Unable(request) => {
                let Some(open) = self.offers.get(&request).map(|offer| offer.expires.is_some()) else { return };
                self.say(Said::RankFailed(request));
                if open {
                    self.close(request, "ended");
                } else {
                    self.offers.remove(&request);
                }
            }
            Operation::Released(request) => {
                if self.releasing.remove(&request) == Some(true) {
                    self.prefill(request);
                }
            }
            Operation::Release(request) if self.offers.contains_key(&request) => self.close(request, "ended"),
            Operation::Release(request) => {
                self.releasing.entry(request).and_modify(|again| *again = false);
            }
            Operation::Renew(request) => drop(self.renew(request)),
            Operation::Open(reader, request, handover) => self.open(reader, request, handover),
            Operation::Fetched(reader, handover) => self.fetched(reader, handover),
            Operation::Reading(_, handover) => {
                self.of(handover).map(|request| self.renew(request));
            }
            Operation::Abandon(reader, handover) => {
                if let Some(offer) = self.of(handover).and_then(|request| self.offers.get_mut(&request)) {
                    offer.readers.entry(reader).and_modify(|reader| reader.stopped = true);
                }
            }
            Operation::Down(reader) => {
                self.met[reader] = false;
                for offer in self.offers.values_mut() {
                    offer.readers.entry(reader).and_modify(|reader| reader.stopped = true);
                }
            }
            Operation::Up(reader) => self.met[reader] = true,
            Operation::LeaderDown => {
                for request in self.offers.keys().copied().collect::<Vec<_>>() {
                    let view = self.view(request);
                    self.close(request, view);
                }
            }
            Operation::Wait(milliseconds, fires) => {
                self.now += milliseconds;
                if fires {
                    self.expire();
                }
            }
        }
    }

    fn prefill(&mut self, request: u64) {
        if let Some(again) = self.releasing.get_mut(&request) {
            *again = true;
        } else if let Entry::Vacant(place) = self.offers.entry(request) {
            place.insert(Offer::default());
            self.say(Said::Compute(request));
        } else {
            self.say(Said::RankFailed(request));
        }
    }

    fn ready(&mut self, request: u64, steps: u32) {
        let Some(offer) = self.offers.get_mut(&request).filter(|offer| offer.expires.is_some() && steps <= 2) else {
            return self.say(Said::Rejected(request));
        };
        if steps <= offer.ready {
            return;
        }
        offer.ready = steps;
        let readers = offer.readers.iter().filter(|(_, reader)| !reader.stopped);
        let told: Vec<Said> = readers.map(|(node, reader)| Said::Steps(*node, reader.handover, steps)).collect();
        self.said.extend(told);
        if steps == 2 {
            self.say(Said::RankReady(request));
        }
    }

    /// Whether it is alive.
    fn renew(&mut self, request: u64) -> bool {
        let now = self.now;
        let expires = self.offers.get_mut(&request).and_then(|offer| offer.expires.as_mut());
        expires.filter(|expires| now < **expires).map(|expires| *expires = now + 3_000).is_some()
    }

    fn open(&mut self, reader: usize, request: u64, handover: u64) {
        let refused = |why| Said::Refused(reader, handover, why);
        if !self.met[reader] {
            return self.say(refused("mismatch"));
        }
        if self.offers.get(&request).is_none_or(|offer| offer.expires.is_none()) {
            return self.say(refused("unknown request"));
        }
        if !self.renew(request) {
            return self.say(refused("expired"));
        }
        let offer = self.offers.get_mut(&request).expect("it is there");
        if offer.handover > Some(handover) {
            return self.say(refused("superseded"));
        }
        if offer.handover < Some(handover) {
            offer.readers.values_mut().for_each(|reader| reader.stopped = true);
            offer.handover = Some(handover);
        }
        let new = Reader { handover, stopped: false, confirmed: false };
        if offer.readers.get(&reader).is_none_or(|reader| reader.handover != handover) {
            offer.readers.insert(reader, new);
            self.say(Said::Opened(reader, handover));
        }
    }

    fn fetched(&mut self, reader: usize, handover: u64) {
        let now = self.now;
        let offer = self.of(handover).and_then(|request| self.offers.get_mut(&request));
        let alive = offer.as_ref().is_some_and(|offer| offer.expires.is_some_and(|expires| now < expires));
        let known = offer.and_then(|offer| offer.readers.get_mut(&reader));
        let answer = match known.filter(|known| known.handover == handover) {
            None => Said::Refused(reader, handover, "unknown handover"),
            Some(_) if !alive => Said::Refused(reader, handover, "expired"),
            Some(known) => {
                known.confirmed = true;
                Said::Confirmed(reader, handover)
            }
        };
        self.say(answer);
    }

    /// Which request a handover has.
    fn of(&self, handover: u64) -> Option<u64> {
        self.offers.iter().find(|(_, offer)| offer.handover == Some(handover)).map(|(request, _)| *request)
    }

    fn view(&self, request: u64) -> &'static str {
        let doubt = self.offers[&request].readers.values().any(|reader| reader.confirmed);
        if doubt { "in doubt" } else { "ended" }
    }

    fn expire(&mut self) {
        let now = self.now;
        let late = self.offers.iter().filter(|(_, offer)| offer.expires.is_some_and(|expires| expires <= now));
        for request in late.map(|(request, _)| *request).collect::<Vec<_>>() {
            let waiting = self.offers[&request].readers.clone();
            for (node, reader) in waiting.into_iter().filter(|(_, reader)| !reader.stopped && !reader.confirmed) {
                self.say(Said::Refused(node, reader.handover, "expired"));
            }
            self.say(Said::RankFailed(request));
            let view = self.view(request);
            self.close(request, view);
        }
    }

    fn close(&mut self, request: u64, view: &'static str) {
        self.offers.remove(&request);
        self.releasing.insert(request, false);
        self.say(Said::Release(request, view));
    }
}

fn said(command: Command) -> Said {
    match command {
        Command::Engine(EngineCall::Prefill(job)) => Said::Compute(job.spec.request.0),
        Command::Engine(EngineCall::Release { request, view }) => {
            Said::Release(request.0, if view == PrefillView::InDoubt { "in doubt" } else { "ended" })
        }
        Command::Engine(EngineCall::Rejected { request, .. }) => Said::Rejected(request.0),
        Command::Send { to: NodeId(LEADER), message } => match message {
            Message::RankOpened { request, .. } => Said::RankOpened(request.0),
            Message::RankReady { request, .. } => Said::RankReady(request.0),
            Message::RankFailed { request, .. } => Said::RankFailed(request.0),
            other => panic!("{other:?}"),
        },
        Command::Send { to, message } => {
            let reader = READERS.iter().position(|node| NodeId(*node) == to).expect("a reader");
            match message {
                Message::Opened(opened) => Said::Opened(reader, opened.handover.0),
                Message::StepsReady { handover, ready } => Said::Steps(reader, handover.0, ready),
                Message::Confirmed { handover } => Said::Confirmed(reader, handover.0),
                Message::Refused { handover, refusal } => Said::Refused(
                    reader,
                    handover.0,
                    match refusal {
                        Refusal::Mismatch(_) => "mismatch",
                        Refusal::UnknownRequest(_) => "unknown request",
                        Refusal::UnknownHandover(_) => "unknown handover",
                        Refusal::LeaseExpired(_) => "expired",
                        Refusal::Superseded { .. } => "superseded",
                        other => panic!("{other:?}"),
                    },
                ),
                other => panic!("{other:?}"),
            }
        }
        other => panic!("{other:?}"),
    }
}

fn apply(rank: &mut PrefillRank, now: u64, operation: &Operation) {
    let at = millis(now);
    let (from, message) = match *operation {
        Operation::Prefill(request) => {
            (LEADER, Message::Prefill(PrefillJob { spec: spec(request), dp: 0, trace: None }))
        }
        Operation::Release(request) => {
            (LEADER, Message::Release { request: RequestId(request), view: PrefillView::Ended })
        }
        Operation::Renew(request) => (LEADER, Message::Renew { requests: vec![RequestId(request)] }),
        Operation::Open(reader, request, handover) => {
            let open = OpenFetch {
                handover: HandoverId(handover),
                request: RequestId(request),
                have: 0,
                direction: Direction::Pull,
                destination: tables(&geometry(2), reader as u32).shapes(),
            };
            (READERS[reader], Message::Open(open))
        }
        Operation::Fetched(reader, handover) => (READERS[reader], Message::Fetched { handover: HandoverId(handover) }),
        Operation::Reading(reader, handover) => {
            (READERS[reader], Message::Reading { handovers: vec![HandoverId(handover)] })
        }
        Operation::Abandon(reader, handover) => (READERS[reader], Message::Abandon { handover: HandoverId(handover) }),
        Operation::Opened(request) => {
            let (request, tables, steps) = (RequestId(request), tables(&geometry(1), 0), vec![2, 4]);
            return rank.handle_engine(at, EngineEvent::Opened { request, tables, steps });
        }
        Operation::Ready(request, steps) => {
            return rank.handle_engine(at, EngineEvent::Ready { request: RequestId(request), steps });
        }
        Operation::Unable(request) => {
            let (request, reason) = (RequestId(request), "full".to_owned());
            return rank.handle_engine(at, EngineEvent::Unable { request, reason });
        }
        Operation::Released(request) => {
            return rank.handle_engine(at, EngineEvent::Released { request: RequestId(request) });
        }
        Operation::Down(reader) => return rank.handle_peer_down(at, NodeId(READERS[reader])),
        Operation::Up(reader) => {
            let profile = worker(Role::Decode, 1, reader as u32, &geometry(2), Direction::Pull);
            return rank.handle_peer(at, NodeId(READERS[reader]), profile);
        }
        Operation::LeaderDown => return rank.handle_leader_down(at),
        Operation::Wait(_, true) => return rank.handle_timeout(at),
        Operation::Wait(_, false) => return,
    };
    rank.handle_message(at, NodeId(from), message);
}

proptest! {
    #[test]
    fn every_peer_gets_the_answer_that_it_should(operations in prop::collection::vec(operation(), 1..150)) {
        let local = worker(Role::Prefill, 0, 0, &geometry(1), Direction::Pull);
        let mut rank = PrefillRank::new(local, leases(), QuarantineTerms::default());
        let mut naive = Naive::default();
        for operation in operations {
            naive.apply(&operation);
            apply(&mut rank, naive.now, &operation);
            let mut heard: Vec<Said> = commands(rank.outbox()).into_iter().map(said).collect();
            let mut expected = std::mem::take(&mut naive.said);
            heard.sort();
            expected.sort();
            prop_assert_eq!(heard, expected, "{:?}", operation);
            prop_assert_eq!(rank.offers(), naive.offers.len());
            let due = naive.offers.values().filter_map(|offer| offer.expires).min();
            prop_assert_eq!(rank.poll_timeout(), due.map(millis));
            let vitals = rank.vitals();
            let open = naive.offers.values().filter(|offer| offer.expires.is_some()).count() as u64;
            prop_assert_eq!(&vitals.waiting, &[("offers", open), ("closing", 0)]);
            let unopened = naive.offers.len() as u64 - open;
            prop_assert_eq!(&vitals.engine, &[("unopened", unopened), ("releasing", naive.releasing.len() as u64)]);
        }
    }
}
