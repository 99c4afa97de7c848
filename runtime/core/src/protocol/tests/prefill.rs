//! The prefill rank: offers, pulls and pushes that go well, and requests that it refuses.

use std::sync::Arc;

use super::kit::*;
use crate::protocol::{
    Command, EngineCall, EngineEvent, Event, FailReason, Message, NicCommand, NicEvent, OpenFetch, OpenedFetch,
    PrefillJob, PrefillRank, PrefillView, Refusal, Role,
};
use crate::{Direction, GroupGeometry, HandoverId, NodeId, Rank, RequestId, Tables, TransferId};

pub(super) const LEADER: u64 = 1;
/// The nodes of the decode group's two ranks.
pub(super) const READERS: [u64; 2] = [20, 21];
pub(super) const STEPS: [u32; 2] = [2, 4];

/// Prefill rank 0 of tp=1, read by the two ranks of a decode group with tp=2.
pub(super) struct Fixture {
    pub(super) rank: PrefillRank,
    pub(super) source: Arc<GroupGeometry>,
    pub(super) destination: Arc<GroupGeometry>,
}

impl Fixture {
    pub(super) fn new() -> Self {
        let (source, destination) = (geometry(1), geometry(2));
        let rank = PrefillRank::new(
            worker(Role::Prefill, 0, &source, None),
            leases(),
            crate::protocol::QuarantineTerms::default(),
        );
        Fixture { rank, source, destination }
    }

    /// With an offer whose first step is ready, and both readers introduced.
    pub(super) fn offered(direction: Direction) -> Self {
        let mut fixture = Fixture::new();
        for (rank, node) in READERS.into_iter().enumerate() {
            let profile = worker(Role::Decode, rank as u32, &fixture.destination, Some(direction));
            fixture.rank.handle_peer(at(0), NodeId(node), profile);
        }
        fixture.rank.handle_message(at(0), NodeId(LEADER), job(1));
        fixture.rank.handle_engine(at(0), fixture.opened());
        fixture.rank.handle_engine(at(0), EngineEvent::Ready { request: R1, steps: 1 });
        fixture.drain();
        fixture
    }

    pub(super) fn opened(&self) -> EngineEvent {
        EngineEvent::Opened { request: R1, tables: self.tables(), steps: STEPS.to_vec() }
    }

    pub(super) fn tables(&self) -> Tables {
        tables(&self.source, 0, 5)
    }

    pub(super) fn open(&self, reader: usize, handover: HandoverId, direction: Direction) -> Message {
        let destination = tables(&self.destination, reader as u32, 0).shapes();
        Message::Open(OpenFetch { handover, request: R1, have: 0, direction, destination })
    }

    pub(super) fn message(&mut self, seconds: u64, from: u64, message: Message) -> Vec<Command> {
        self.rank.handle_message(at(seconds), NodeId(from), message);
        commands(self.rank.outbox())
    }

    pub(super) fn engine(&mut self, seconds: u64, event: EngineEvent) -> Vec<Command> {
        self.rank.handle_engine(at(seconds), event);
        commands(self.rank.outbox())
    }

    pub(super) fn nic(&mut self, event: NicEvent) -> Vec<Command> {
        self.rank.handle_nic(at(1), 0, event);
        commands(self.rank.outbox())
    }

    /// Opens and expects a push, and gives the transfer that was posted for the first step.
    pub(super) fn pushing(&mut self, reader: usize, handover: HandoverId) -> TransferId {
        let node = READERS[reader];
        let open = self.open(reader, handover, Direction::Push);
        self.message(0, node, open);
        let posted = posts(&self.message(0, node, Message::Expecting { handover }));
        assert_eq!(posted.len(), 1, "one step is ready");
        posted[0].1
    }

    pub(super) fn drain(&mut self) {
        commands(self.rank.outbox());
        events(self.rank.outbox());
    }
}

pub(super) fn job(request: u64) -> Message {
    Message::Prefill(PrefillJob { spec: spec(request), dp: 0, trace: None })
}

pub(super) fn done(id: TransferId) -> NicEvent {
    NicEvent::Done { id, bytes: 10, pieces: 1 }
}

pub(super) fn failed(id: TransferId) -> NicEvent {
    NicEvent::Failed { id, reason: "the link broke".into() }
}

pub(super) fn refused(to: u64, handover: HandoverId, refusal: Refusal) -> Command {
    send(to, Message::Refused { handover, refusal })
}

pub(super) fn rank_failed(reason: FailReason) -> Command {
    send(LEADER, Message::RankFailed { request: R1, reason })
}

pub(super) fn release(view: PrefillView) -> Command {
    engine(EngineCall::Release { request: R1, view })
}

#[test]
fn an_offer_opens_and_becomes_ready_in_steps() {
    let mut fixture = Fixture::new();
    assert_eq!(
        fixture.message(0, LEADER, job(1)),
        [engine(EngineCall::Prefill(PrefillJob { spec: spec(1), dp: 0, trace: None }))]
    );
    assert_eq!(fixture.rank.poll_timeout(), None, "no lease before the engine holds blocks");
    let opened = fixture.opened();
    assert_eq!(fixture.engine(1, opened), [send(LEADER, Message::RankOpened { request: R1, steps: STEPS.to_vec() })]);
    let held = Event::LeaseHeld { request: R1, until: at(31) };
    assert_eq!(events(fixture.rank.outbox()), [Event::OfferOpened { request: R1 }, held]);
    assert_eq!(fixture.rank.poll_timeout(), Some(at(31)));
    assert_eq!(fixture.engine(2, EngineEvent::Ready { request: R1, steps: 1 }), []);
    assert_eq!(
        fixture.engine(3, EngineEvent::Ready { request: R1, steps: 2 }),
        [send(LEADER, Message::RankReady { request: R1, at: at(3) })]
    );
    assert_eq!(
        fixture.engine(4, EngineEvent::Ready { request: R1, steps: 2 }),
        [],
        "the watermark never falls or repeats"
    );
    assert_eq!(
        fixture.message(5, LEADER, Message::Release { request: R1, view: PrefillView::Confirmed }),
        [release(PrefillView::Confirmed)]
    );
    assert_eq!(events(fixture.rank.outbox()), [Event::OfferClosed { request: R1, view: PrefillView::Confirmed }]);
    assert_eq!((fixture.rank.offers(), fixture.rank.poll_timeout()), (0, None));
    assert_eq!(fixture.message(5, LEADER, Message::Release { request: R1, view: PrefillView::Ended }), [], "once");
}

#[test]
fn a_pull_gets_the_blocks_the_steps_and_a_confirmation() {
    let mut fixture = Fixture::offered(Direction::Pull);
    let open = fixture.open(0, H1, Direction::Pull);
    let opened = Message::Opened(OpenedFetch { handover: H1, source: fixture.tables(), ready: 1 });
    assert_eq!(fixture.message(1, READERS[0], open.clone()), [send(READERS[0], opened)]);
    assert_eq!(fixture.message(1, READERS[0], open), [], "the same again changes nothing");
    let commands = fixture.engine(2, EngineEvent::Ready { request: R1, steps: 2 });
    assert_eq!(
        commands,
        [
            send(READERS[0], Message::StepsReady { handover: H1, ready: 2 }),
            send(LEADER, Message::RankReady { request: R1, at: at(2) })
        ]
    );
    assert_eq!(
        fixture.message(3, READERS[0], Message::Fetched { handover: H1 }),
        [send(READERS[0], Message::Confirmed { handover: H1 })]
    );
    assert_eq!(fixture.rank.offers(), 1, "the offer stands until it is released");
}

#[test]
fn a_push_waits_for_the_reader_and_then_follows_the_watermark() {
    let mut fixture = Fixture::new();
    let profile = worker(Role::Decode, 0, &fixture.destination, Some(Direction::Push));
    let layout = Arc::clone(&profile.layout);
    fixture.rank.handle_peer(at(0), NodeId(READERS[0]), profile);
    let (address, keys) = (nic(crate::TransportKind::Sim).address, nic(crate::TransportKind::Sim).keys);
    let connect = NicCommand::Connect { node: NodeId(READERS[0]), address, keys, layout };
    assert_eq!(commands(fixture.rank.outbox()), [Command::Nic { nic: 0, command: connect }]);

    let mut fixture = Fixture::offered(Direction::Push);
    let open = fixture.open(0, H1, Direction::Push);
    let opened = Message::Opened(OpenedFetch { handover: H1, source: fixture.tables().shapes(), ready: 1 });
    assert_eq!(fixture.message(1, READERS[0], open), [send(READERS[0], opened)], "block numbers stay with the writer");
    let first = fixture.message(1, READERS[0], Message::Expecting { handover: H1 });
    let id = |step| TransferId::of(H1, Rank(0), Rank(0), step);
    assert_eq!(posts(&first), [(READERS[0], id(0))]);
    let second = fixture.engine(2, EngineEvent::Ready { request: R1, steps: 2 });
    assert_eq!(posts(&second), [(READERS[0], id(1))]);
    let [
        told,
        Command::Nic { command: NicCommand::Post { program, direction: Direction::Push, .. }, .. },
        Command::Send { message: Message::RankReady { .. }, .. },
    ] = second.as_slice()
    else {
        panic!("a push was posted: {second:?}");
    };
    // The reader's deadline depends on whether it waits for bytes or for layers.
    assert_eq!(*told, send(READERS[0], Message::StepsReady { handover: H1, ready: 2 }));
    // Half the layers and half the heads; the destination's blocks are for the destination to know.
    assert_eq!(program.bytes() * 4, fixture.source.bytes_expected(TOKENS, 0));
    assert!(program.sources[0].is_some() && program.destinations[0].is_none());
    assert_eq!(fixture.nic(done(id(0))), []);
    assert_eq!(fixture.nic(done(id(1))), []);
    assert_eq!(
        fixture.message(3, LEADER, Message::Release { request: R1, view: PrefillView::Confirmed }),
        [release(PrefillView::Confirmed)]
    );
}

#[test]
fn what_the_engine_says_must_make_sense() {
    let mut fixture = Fixture::new();
    let rejected = |refusal| [engine(EngineCall::Rejected { request: R1, refusal })];
    let opened = fixture.opened();
    assert_eq!(fixture.engine(0, opened.clone()), rejected(Refusal::UnknownRequest(R1)));
    assert_eq!(fixture.engine(0, EngineEvent::Ready { request: R1, steps: 1 }), rejected(Refusal::UnknownRequest(R1)));
    fixture.message(0, LEADER, job(1));
    for steps in [vec![], vec![0, 4], vec![2, 2, 4], vec![2, 3], vec![2, 5]] {
        let commands =
            fixture.engine(0, EngineEvent::Opened { request: R1, tables: Tables::default(), steps: steps.clone() });
        assert!(
            matches!(
                commands.as_slice(),
                [Command::Engine(EngineCall::Rejected { refusal: Refusal::BadTables(_), .. })]
            ),
            "steps {steps:?}: {commands:?}"
        );
    }
    fixture.engine(0, opened.clone());
    assert_eq!(fixture.engine(0, opened), rejected(Refusal::Duplicate(R1)));
    let commands = fixture.engine(0, EngineEvent::Ready { request: R1, steps: 3 });
    assert!(
        matches!(commands.as_slice(), [Command::Engine(EngineCall::Rejected { refusal: Refusal::BadTables(_), .. })]),
        "{commands:?}"
    );
    assert_eq!(fixture.message(0, LEADER, job(1)), [rank_failed(FailReason::Refused(Refusal::Duplicate(R1)))]);
}

#[test]
fn an_open_that_does_not_fit_is_refused() {
    let mut fixture = Fixture::offered(Direction::Pull);
    let open = fixture.open(0, H1, Direction::Pull);
    let stranger = fixture.message(1, 99, open.clone());
    assert!(matches!(
        stranger.as_slice(),
        [Command::Send { message: Message::Refused { refusal: Refusal::Mismatch(_), .. }, .. }]
    ));
    let push = fixture.open(0, H1, Direction::Push);
    let turned = fixture.message(1, READERS[0], push);
    assert!(matches!(
        turned.as_slice(),
        [Command::Send { message: Message::Refused { refusal: Refusal::Mismatch(_), .. }, .. }]
    ));
    let Message::Open(open) = open else { panic!("an open") };
    let other = OpenFetch { request: RequestId(9), ..open.clone() };
    assert_eq!(
        fixture.message(1, READERS[0], Message::Open(other)),
        [refused(READERS[0], H1, Refusal::UnknownRequest(RequestId(9)))]
    );
    let short = OpenFetch { destination: Tables::default(), ..open };
    let commands = fixture.message(1, READERS[0], Message::Open(short));
    assert!(matches!(
        commands.as_slice(),
        [Command::Send { message: Message::Refused { refusal: Refusal::BadTables(_), .. }, .. }]
    ));
    fixture.message(1, LEADER, job(2));
    let early = OpenFetch { request: RequestId(2), ..open_of(fixture.open(0, H1, Direction::Pull)) };
    assert_eq!(
        fixture.message(1, READERS[0], Message::Open(early)),
        [refused(READERS[0], H1, Refusal::UnknownRequest(RequestId(2)))]
    );
    fixture.drain();
    let commands = fixture.message(1, READERS[0], Message::Confirmed { handover: H1 });
    assert_eq!(commands, []);
    assert!(matches!(events(fixture.rank.outbox()).as_slice(), [Event::Ignored { from: NodeId(20), .. }]));
}

#[test]
fn a_peer_of_another_model_is_told_why() {
    let mut fixture = Fixture::offered(Direction::Pull);
    let mut other = (*fixture.destination).clone();
    other.model.groups[0].tensors[0].elements = 64;
    fixture.rank.handle_peer(at(0), NodeId(READERS[0]), worker(Role::Decode, 0, &Arc::new(other), None));
    let open = fixture.open(0, H1, Direction::Pull);
    let commands = fixture.message(1, READERS[0], open);
    let [Command::Send { message: Message::Refused { refusal: Refusal::Mismatch(why), .. }, .. }] = commands.as_slice()
    else {
        panic!("refused: {commands:?}");
    };
    assert!(why.contains("elements"), "{why}");
}

#[test]
fn a_fetch_is_confirmed_only_to_a_reader() {
    let mut fixture = Fixture::offered(Direction::Pull);
    let open = fixture.open(0, H1, Direction::Pull);
    fixture.message(1, READERS[0], open);
    let fetched = Message::Fetched { handover: H1 };
    assert_eq!(
        fixture.message(2, READERS[1], fetched.clone()),
        [refused(READERS[1], H1, Refusal::UnknownHandover(H1))]
    );
    let fetched_other = Message::Fetched { handover: H2 };
    assert_eq!(fixture.message(2, READERS[0], fetched_other), [refused(READERS[0], H2, Refusal::UnknownHandover(H2))]);
    assert_eq!(fixture.message(2, READERS[0], fetched), [send(READERS[0], Message::Confirmed { handover: H1 })]);
}

#[test]
fn a_reader_of_an_older_handover_has_not_fetched_the_newer_one() {
    let mut fixture = Fixture::offered(Direction::Pull);
    for (reader, handover) in [(0, H1), (1, H2)] {
        let open = fixture.open(reader, handover, Direction::Pull);
        fixture.message(1, READERS[reader], open);
    }
    let fetched = Message::Fetched { handover: H2 };
    let refusal = Refusal::UnknownHandover(H2);
    assert_eq!(fixture.message(2, READERS[0], fetched.clone()), [refused(READERS[0], H2, refusal)]);
    assert_eq!(fixture.message(2, READERS[1], fetched), [send(READERS[1], Message::Confirmed { handover: H2 })]);
}

fn open_of(message: Message) -> OpenFetch {
    match message {
        Message::Open(open) => open,
        other => panic!("{other:?} is no open"),
    }
}
