//! A decode rank beside books that are kept of everything it says: who has which blocks, which transfers run, what was promised to whom.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kvferry_core::protocol::{
    Command, DeadlineTerms, DecodeRank, EngineCall, EngineEvent, FailReason, FetchJob, MemberList, Message, NicCommand,
    NicEvent, OpenedFetch, Outcome, QuarantineTerms, RailTerms, Refusal, Role,
};
use kvferry_core::{Direction, FenceProof, HandoverId, NodeId, RequestId, TransferId};
use proptest::prelude::*;

use super::kit::*;

const LEADER: u64 = 20;
const SOURCES: [u64; 2] = [1, 2];

#[derive(Clone, Copy, Debug)]
enum Operation {
    Fetch(u64),
    Place(u64),
    NoRoom(u64),
    Opened(usize, u64, u32),
    Steps(usize, u64, u32),
    Confirmed(usize, u64),
    Refused(usize, u64),
    /// One of the transfers that run ends, well or badly.
    Ends(usize, bool),
    Fenced(usize, usize),
    NicLoses(usize, usize),
    Settle(u64, u8),
    Freed(u64),
    LeaderDown,
    LeaderUp,
    Down(usize),
    Up(usize),
    Wait(u64),
}

fn operation() -> impl Strategy<Value = Operation> {
    let (source, handover, ready) = (0..2_usize, 0..4_u64, 0..4_u32);
    let leg = (source.clone(), handover.clone());
    prop_oneof![
        6 => handover.clone().prop_map(Operation::Fetch),
        8 => handover.clone().prop_map(Operation::Place),
        1 => handover.clone().prop_map(Operation::NoRoom),
        12 => (source.clone(), handover.clone(), ready.clone()).prop_map(|(s, h, ready)| Operation::Opened(s, h, ready)),
        10 => (source.clone(), handover.clone(), ready).prop_map(|(s, h, ready)| Operation::Steps(s, h, ready)),
        10 => leg.clone().prop_map(|(s, h)| Operation::Confirmed(s, h)),
        1 => leg.prop_map(|(s, h)| Operation::Refused(s, h)),
        20 => (0..8_usize, prop::bool::weighted(0.9)).prop_map(|(which, well)| Operation::Ends(which, well)),
        2 => (source.clone(), 0..2_usize).prop_map(|(source, nic)| Operation::Fenced(source, nic)),
        1 => (source.clone(), 0..2_usize).prop_map(|(source, nic)| Operation::NicLoses(source, nic)),
        4 => (handover.clone(), 0..4_u8).prop_map(|(h, outcome)| Operation::Settle(h, outcome)),
        4 => handover.prop_map(Operation::Freed),
        1 => Just(Operation::LeaderDown),
        2 => Just(Operation::LeaderUp),
        1 => source.clone().prop_map(Operation::Down),
        3 => source.prop_map(Operation::Up),
        2 => (0..4_000_u64).prop_map(Operation::Wait),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// The engine was asked for blocks, and has yet to hear how it ends.
    Open,
    Held,
    Quarantined,
}

/// What the engine knows of one handover, and what was said of it.
#[derive(Debug)]
struct Entry {
    state: State,
    placed: bool,
    /// The rank's word: whether its part is complete.
    reported: Option<bool>,
    fetched: BTreeSet<usize>,
    confirmed: BTreeSet<usize>,
    arrived: BTreeMap<usize, u64>,
}

#[derive(Default)]
struct Books {
    entries: BTreeMap<u64, Entry>,
    /// From which source, through which NIC.
    flights: BTreeMap<TransferId, (usize, usize)>,
    /// Those that were told to stop.
    cancelled: BTreeSet<TransferId>,
    /// Transfers that a fence was asked for.
    fencing: BTreeSet<TransferId>,
    /// Of the latest fence with each source at each NIC.
    tickets: BTreeMap<(usize, usize), u64>,
    /// Every transfer that was ever started.
    started: BTreeSet<TransferId>,
    /// Handovers that the leader has called delivered.
    delivered: BTreeSet<u64>,
    push: bool,
}

impl Books {
    fn flies(&self, handover: u64) -> bool {
        self.flights.keys().any(|id| id.handover().0 == handover)
    }

    fn note(&mut self, command: Command) {
        match command {
            Command::Engine(EngineCall::Place { handover, .. }) => {
                let entry = Entry {
                    state: State::Open,
                    placed: false,
                    reported: None,
                    fetched: BTreeSet::new(),
                    confirmed: BTreeSet::new(),
                    arrived: BTreeMap::new(),
                };
                assert!(self.entries.insert(handover.0, entry).is_none(), "{handover} is placed already");
            }
            Command::Engine(EngineCall::Settled { handover, outcome, quarantined, .. }) => {
                assert_eq!(quarantined, self.flies(handover.0), "{handover}: what may still be written is quarantined");
                let entry = self.entries.get_mut(&handover.0).expect("settled, but not placed");
                assert_eq!(entry.state, State::Open, "settled once");
                if outcome.is_delivered() {
                    assert!(self.delivered.contains(&handover.0) && entry.reported == Some(true) && !quarantined);
                    entry.state = State::Held;
                } else if quarantined {
                    entry.state = State::Quarantined;
                } else {
                    self.entries.remove(&handover.0);
                }
            }
            Command::Engine(EngineCall::Returned { handover, .. }) => {
                let entry = self.entries.remove(&handover.0).expect("returned, but not here");
                assert!(
                    entry.state == State::Quarantined && !self.flies(handover.0),
                    "{handover} may still be written"
                );
            }
            Command::Engine(other) => panic!("{other:?}"),
            Command::Nic { nic, command: NicCommand::Post { id, node, range, .. } } => {
                let source = SOURCES.iter().position(|known| NodeId(*known) == node).expect("a source");
                assert!(!range.is_empty(), "{id} moves nothing");
                self.starts(id, (source, nic));
            }
            Command::Nic { nic, command: NicCommand::Expect { id, .. } } => {
                self.starts(id, (id.source().0 as usize, nic));
            }
            Command::Nic { nic, command: NicCommand::Cancel { id } } => {
                assert_eq!(self.flights.get(&id).map(|(_, at)| *at), Some(nic), "{id} is not there");
                self.cancelled.insert(id);
            }
            Command::Nic { nic, command: NicCommand::Fence { node, ticket, .. } } => {
                let source = SOURCES.iter().position(|known| NodeId(*known) == node).expect("a source");
                assert!(self.tickets.values().all(|before| *before < ticket), "{ticket} once");
                self.tickets.insert((source, nic), ticket);
                let quarantined = |id: &TransferId| {
                    self.entries.get(&id.handover().0).is_some_and(|entry| entry.state == State::Quarantined)
                };
                let stopped = |id: &TransferId| self.cancelled.contains(id) || quarantined(id);
                let asked = self.flights.iter().filter(|(id, with)| **with == (source, nic) && stopped(id));
                self.fencing.extend(asked.map(|(id, _)| *id));
            }
            Command::Send { to: NodeId(LEADER), message } => self.report(message),
            Command::Send { to, message: Message::Fetched { handover } } => {
                let source = SOURCES.iter().position(|known| NodeId(*known) == to).expect("a source");
                let running = self.flights.iter().any(|(id, (with, _))| id.handover() == handover && *with == source);
                assert!(!running && !self.push, "{handover}: not every byte is here");
                let entry = self.entries.get_mut(&handover.0).expect("fetched, but not placed");
                assert!(entry.fetched.insert(source), "once");
            }
            _ => {}
        }
    }

    fn starts(&mut self, id: TransferId, source: (usize, usize)) {
        let entry = self.entries.get(&id.handover().0).expect("no blocks to write");
        assert!(entry.state == State::Open && entry.placed && entry.reported.is_none(), "{id} comes too late");
        // A handover that was given up may be fetched under the same number only in nonsense.
        self.started.insert(id);
        assert!(self.flights.insert(id, source).is_none(), "{id} runs already");
    }

    fn report(&mut self, message: Message) {
        match message {
            Message::RankDone { handover, result } => {
                let (flies, push) = (self.flies(handover.0), self.push);
                let entry = self.entries.get_mut(&handover.0).expect("reported, but not placed");
                assert!(entry.state == State::Open && entry.reported.is_none(), "{handover}: one word");
                if result.is_ok() {
                    assert!(entry.placed && !flies, "{handover}: bytes are missing");
                    let parts = if push { entry.arrived.len() } else { entry.confirmed.len() };
                    assert_eq!(parts, 2, "{handover}: a source has not confirmed, or not written: {entry:?}");
                    assert!(!push || entry.arrived.values().all(|steps| *steps == 2), "{entry:?}");
                }
                entry.reported = Some(result.is_ok());
            }
            Message::Freed { handover } => {
                assert!(
                    !self.entries.contains_key(&handover.0) && !self.flies(handover.0),
                    "{handover}: its blocks are out"
                );
            }
            Message::Holding { handovers } => {
                let known: Vec<u64> = self.entries.keys().copied().collect();
                let mut said: Vec<u64> = handovers.iter().map(|(handover, ..)| handover.0).collect();
                said.sort_unstable();
                assert_eq!(said, known, "everything that is here");
            }
            Message::Started { .. } | Message::Health { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

struct Subject {
    rank: DecodeRank,
    books: Books,
    now: u64,
    met: [bool; 2],
    direction: Direction,
}

impl Subject {
    fn new(push: bool, rails: u32) -> Self {
        let direction = if push { Direction::Push } else { Direction::Pull };
        let mut local = worker(Role::Decode, 1, 0, &geometry(1), direction);
        local.nics = vec![local.nics[0].clone(); 2];
        let terms = QuarantineTerms { share_max: 100, ..QuarantineTerms::default() };
        let rails = RailTerms { rails_max: rails, share_bytes_min: 64, ..RailTerms::default() };
        let mut rank = DecodeRank::new(local, leases(), DeadlineTerms::default(), terms).with_rails(rails);
        let place = |rank: u32| Some(place(Role::Prefill, 0, rank, &geometry(2)));
        let members = [0, 1].map(|rank| Arc::new(member(SOURCES[rank as usize], 1, place(rank)))).to_vec();
        rank.handle_members(millis(0), &MemberList { whole: true, members });
        let mut subject =
            Subject { rank, books: Books { push, ..Books::default() }, now: 0, met: [false; 2], direction };
        subject.rank.handle_leader_up(millis(0), NodeId(LEADER));
        for source in 0..2 {
            subject.apply(Operation::Up(source));
        }
        subject
    }

    fn apply(&mut self, operation: Operation) {
        match operation {
            Operation::Fetch(handover) => {
                let job = FetchJob { pairing: pairing(handover, handover), dp: 0 };
                // What comes again while the first is out changes nothing.
                if !self.books.entries.contains_key(&handover) {
                    self.books.delivered.remove(&handover);
                    self.books.flights.retain(|id, _| id.handover().0 != handover);
                }
                self.message(LEADER, Message::Fetch(job));
            }
            Operation::Place(handover) => {
                if let Some(entry) = self.books.entries.get_mut(&handover) {
                    entry.placed |= entry.reported.is_none() && entry.state == State::Open;
                }
                let tables = tables(&geometry(1), 0);
                self.engine(EngineEvent::Placed { handover: HandoverId(handover), tables, have: 0 });
            }
            Operation::NoRoom(handover) => {
                self.engine(EngineEvent::NoRoom { handover: HandoverId(handover), reason: "full".into() });
            }
            Operation::Opened(source, handover, ready) => {
                let tables = tables(&geometry(2), source as u32);
                let source_tables = if self.books.push { tables.shapes() } else { tables };
                let opened = OpenedFetch { handover: HandoverId(handover), source: source_tables, ready };
                self.message(SOURCES[source], Message::Opened(opened));
            }
            Operation::Steps(source, handover, ready) => {
                self.message(SOURCES[source], Message::StepsReady { handover: HandoverId(handover), ready });
            }
            Operation::Confirmed(source, handover) => {
                if let Some(entry) = self.books.entries.get_mut(&handover)
                    && entry.fetched.contains(&source)
                {
                    entry.confirmed.insert(source);
                }
                self.message(SOURCES[source], Message::Confirmed { handover: HandoverId(handover) });
            }
            Operation::Refused(source, handover) => {
                let refusal = Refusal::UnknownRequest(RequestId(handover));
                self.message(SOURCES[source], Message::Refused { handover: HandoverId(handover), refusal });
            }
            Operation::Ends(which, well) => self.ends(which, well),
            Operation::Fenced(source, nic) => {
                let fenced = std::mem::take(&mut self.books.fencing);
                let (ended, others): (BTreeSet<TransferId>, BTreeSet<TransferId>) =
                    fenced.into_iter().partition(|id| self.books.flights.get(id) == Some(&(source, nic)));
                self.books.fencing = others;
                self.books.flights.retain(|id, _| !ended.contains(id));
                let proof = FenceProof::EndpointDestroyed;
                let ticket = self.books.tickets.get(&(source, nic)).copied().unwrap_or_default();
                let (node, address) = (NodeId(SOURCES[source]), "a".into());
                self.nic(nic, NicEvent::Fenced { node, address, ticket, proof });
            }
            Operation::NicLoses(source, nic) => {
                self.nic(nic, NicEvent::PeerLost { node: NodeId(SOURCES[source]), reason: "reset".into() });
            }
            Operation::Settle(handover, outcome) => {
                let outcome = match outcome {
                    0 => Outcome::Cancelled,
                    1 => Outcome::Failed { reason: FailReason::Engine("elsewhere".into()) },
                    _ => Outcome::Delivered,
                };
                if outcome.is_delivered() {
                    self.books.delivered.insert(handover);
                }
                self.message(LEADER, Message::Settled { handover: HandoverId(handover), outcome });
            }
            Operation::Freed(handover) => {
                if self.books.entries.get(&handover).is_some_and(|entry| entry.state == State::Held) {
                    self.books.entries.remove(&handover);
                }
                self.engine(EngineEvent::Freed { handover: HandoverId(handover) });
            }
            Operation::LeaderDown => self.rank.handle_leader_down(millis(self.now), NodeId(LEADER), "the cable"),
            Operation::LeaderUp => self.rank.handle_leader_up(millis(self.now), NodeId(LEADER)),
            Operation::Down(source) => {
                self.met[source] = false;
                self.rank.handle_peer_down(millis(self.now), NodeId(SOURCES[source]), "the cable");
            }
            Operation::Up(source) if !self.met[source] => {
                self.met[source] = true;
                let mut profile = worker(Role::Prefill, 0, source as u32, &geometry(2), self.direction);
                profile.nics = vec![profile.nics[0].clone(); 2];
                self.rank.handle_peer(millis(self.now), NodeId(SOURCES[source]), profile);
            }
            Operation::Up(_) => {}
            Operation::Wait(milliseconds) => {
                self.now += milliseconds;
                self.rank.handle_timeout(millis(self.now));
            }
        }
        for command in commands(self.rank.outbox()) {
            self.books.note(command);
        }
    }

    fn ends(&mut self, which: usize, well: bool) {
        let Some((id, (source, nic))) = self.books.flights.iter().nth(which).map(|(id, with)| (*id, *with)) else {
            return;
        };
        self.books.flights.remove(&id);
        self.books.fencing.remove(&id);
        if let Some(entry) = self.books.entries.get_mut(&id.handover().0).filter(|_| well) {
            *entry.arrived.entry(source).or_default() += 1;
        }
        let event = match well {
            true => NicEvent::Done { id, bytes: 10, pieces: 1 },
            false => NicEvent::Failed { id, reason: "reset".into() },
        };
        self.nic(nic, event);
    }

    fn message(&mut self, from: u64, message: Message) {
        self.rank.handle_message(millis(self.now), NodeId(from), message);
    }

    fn engine(&mut self, event: EngineEvent) {
        self.rank.handle_engine(millis(self.now), event);
    }

    fn nic(&mut self, nic: usize, event: NicEvent) {
        self.rank.handle_nic(millis(self.now), nic, event);
    }

    fn check(&self) {
        let count = |state| self.books.entries.values().filter(|entry| entry.state == state).count() as u64;
        let vitals = self.rank.vitals();
        let quarantined = self.books.entries.values().filter(|entry| entry.state == State::Quarantined);
        let placed = quarantined.filter(|entry| entry.placed).count() as u64;
        let each: u64 = tables(&geometry(1), 0).groups.iter().map(|table| u64::from(table.shape().blocks)).sum();
        let waiting = [
            ("fetches", count(State::Open)),
            ("quarantined", count(State::Quarantined)),
            ("quarantined_blocks", placed * each),
        ];
        assert_eq!(vitals.waiting, waiting);
        assert_eq!(vitals.engine, [("held", count(State::Held))]);
        assert!(!vitals.is_stuck(), "{vitals:?}");
    }
}

proptest! {
    #[test]
    fn the_books_balance(
        push in any::<bool>(),
        rails in 1..3_u32,
        operations in prop::collection::vec(operation(), 1..250),
    ) {
        let mut subject = Subject::new(push, rails);
        for operation in operations {
            subject.apply(operation);
            subject.check();
        }
        // In the end everything ends: what runs, what the leader owes, what the engine holds.
        for handover in 0..4 {
            subject.apply(Operation::Settle(handover, 0));
            subject.apply(Operation::Freed(handover));
        }
        for _ in 0..64 {
            subject.apply(Operation::Ends(0, true));
        }
        subject.check();
        prop_assert!(subject.rank.vitals().is_quiet(), "{:?}", subject.rank.vitals());
        prop_assert!(subject.books.entries.is_empty() && subject.rank.poll_timeout().is_none());
    }
}
