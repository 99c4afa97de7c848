//! The decode rank: fetches that go well, by pull and by push, in steps and with parts that come late.

use std::sync::Arc;

use super::kit::*;
use crate::protocol::{
    Command, DeadlineTerms, DecodeRank, EngineCall, EngineEvent, Event, FailReason, FetchJob, MemberList, Message,
    NicAdvert, NicCommand, NicEvent, OpenFetch, OpenedFetch, Outcome, PathReport, QuarantineTerms, Refusal, Role,
    WorkerProfile,
};
use crate::{Direction, Evidence, GroupGeometry, HandoverId, NodeId, Rank, RequestId, TransferId, TransportKind};

pub(super) const LEADER: u64 = 20;
/// The nodes of the prefill group's two ranks.
pub(super) const SOURCES: [u64; 2] = [1, 2];

/// Decode rank 0 of tp=1, fed by the two ranks of a prefill group with tp=2.
pub(super) struct Fixture {
    pub(super) rank: DecodeRank,
    pub(super) source: Arc<GroupGeometry>,
    pub(super) destination: Arc<GroupGeometry>,
    pub(super) direction: Direction,
}

impl Fixture {
    pub(super) fn new(direction: Direction) -> Self {
        let (source, destination) = (geometry(2), geometry(1));
        let local = worker(Role::Decode, 0, &destination, Some(direction));
        let rank =
            DecodeRank::new(local, leases(), DeadlineTerms::default(), crate::protocol::QuarantineTerms::default());
        Fixture { rank, source, destination, direction }
    }

    /// With the members and both sources known.
    pub(super) fn connected(direction: Direction) -> Self {
        let mut fixture = Fixture::new(direction);
        fixture.members();
        fixture.peer(0);
        fixture.peer(1);
        fixture.drain();
        fixture
    }

    /// With both legs opened: transfers of `ready` steps run, of two.
    pub(super) fn moving(direction: Direction, ready: u32) -> Self {
        let mut fixture = Fixture::connected(direction);
        fixture.fetch(H1, &[2, 4]);
        fixture.place(H1);
        for source in 0..2 {
            fixture.opened(source, H1, ready);
        }
        fixture.drain();
        fixture
    }

    pub(super) fn members(&mut self) {
        let members =
            [0, 1].map(|rank| Arc::new(member(SOURCES[rank as usize], Role::Prefill, PREFILL, rank, &self.source)));
        let list = MemberList { whole: true, members: members.to_vec() };
        self.rank.handle_members(at(0), &list);
    }

    pub(super) fn peer(&mut self, source: usize) {
        let profile = worker(Role::Prefill, source as u32, &self.source, None);
        self.rank.handle_peer(at(0), NodeId(SOURCES[source]), profile);
    }

    pub(super) fn fetch(&mut self, handover: HandoverId, steps: &[u32]) -> Vec<Command> {
        self.message(0, LEADER, Message::Fetch(FetchJob { pairing: pairing(handover, steps), dp: 0 }))
    }

    pub(super) fn place(&mut self, handover: HandoverId) -> Vec<Command> {
        let tables = tables(&self.destination, 0, 7);
        self.engine(EngineEvent::Placed { handover, tables, have: 0 })
    }

    pub(super) fn opened(&mut self, source: usize, handover: HandoverId, ready: u32) -> Vec<Command> {
        let tables = tables(&self.source, source as u32, 5);
        let tables = if self.direction == Direction::Pull { tables } else { tables.shapes() };
        self.message(1, SOURCES[source], Message::Opened(OpenedFetch { handover, source: tables, ready }))
    }

    pub(super) fn message(&mut self, seconds: u64, from: u64, message: Message) -> Vec<Command> {
        self.rank.handle_message(at(seconds), NodeId(from), message);
        commands(self.rank.outbox())
    }

    pub(super) fn engine(&mut self, event: EngineEvent) -> Vec<Command> {
        self.rank.handle_engine(at(1), event);
        commands(self.rank.outbox())
    }

    pub(super) fn nic(&mut self, event: NicEvent) -> Vec<Command> {
        self.rank.handle_nic(at(2), 0, event);
        commands(self.rank.outbox())
    }

    pub(super) fn drain(&mut self) {
        commands(self.rank.outbox());
        events(self.rank.outbox());
    }
}

pub(super) fn id(source: u32, step: u32) -> TransferId {
    TransferId::of(H1, Rank(source), Rank(0), step)
}

pub(super) fn done(id: TransferId) -> NicEvent {
    NicEvent::Done { id, bytes: 100, pieces: 3 }
}

pub(super) fn failed(id: TransferId) -> NicEvent {
    NicEvent::Failed { id, reason: "the link broke".into() }
}

pub(super) fn rank_failed(reason: FailReason) -> Command {
    send(LEADER, Message::RankDone { handover: H1, result: Err(reason) })
}

pub(super) fn abandon(source: usize) -> Command {
    send(SOURCES[source], Message::Abandon { handover: H1 })
}

fn path(source: u32, direction: Direction, bytes: u64, pieces: u64) -> PathReport {
    PathReport {
        source_group: PREFILL,
        source: Rank(source),
        destination_group: DECODE,
        destination: Rank(0),
        kind: TransportKind::Sim,
        device: "sim0".into(),
        direction,
        bytes,
        pieces,
    }
}

#[test]
fn a_pull_goes_through_every_stage() {
    let mut fixture = Fixture::connected(Direction::Pull);
    assert_eq!(fixture.fetch(H1, &[4]), [engine(EngineCall::Place { handover: H1, spec: spec(1) })]);
    assert_eq!(fixture.fetch(H1, &[4]), [], "the same again changes nothing");
    let shapes = tables(&fixture.destination, 0, 7).shapes();
    let open = OpenFetch { handover: H1, request: R1, have: 0, direction: Direction::Pull, destination: shapes };
    let opens = [send(1, Message::Open(open.clone())), send(2, Message::Open(open))];
    assert_eq!(fixture.place(H1), opens);
    assert_eq!(fixture.place(H1), [], "placed once");
    let first = fixture.opened(0, H1, 1);
    assert_eq!(posts(&first), [(1, id(0, 0))]);
    assert_eq!(first.last(), Some(&send(LEADER, Message::Started { handover: H1 })));
    let Some(Command::Nic { command: NicCommand::Post { program, .. }, .. }) = first.first() else {
        panic!("{first:?}")
    };
    assert_eq!(program.bytes() * 2, fixture.destination.bytes_expected(TOKENS, 0), "half of the heads");
    assert!(program.sources[0].is_some() && program.destinations[0].is_some());
    assert_eq!(posts(&fixture.opened(1, H1, 1)), [(2, id(1, 0))]);
    assert_eq!(fixture.nic(done(id(0, 0))), [send(1, Message::Fetched { handover: H1 })]);
    assert_eq!(fixture.nic(done(id(0, 0))), [], "an event that comes twice counts once");
    assert_eq!(fixture.nic(done(id(1, 0))), [send(2, Message::Fetched { handover: H1 })]);
    assert_eq!(fixture.message(3, 1, Message::Confirmed { handover: H1 }), []);
    let paths = vec![path(0, Direction::Pull, 100, 3), path(1, Direction::Pull, 100, 3)];
    let done = send(LEADER, Message::RankDone { handover: H1, result: Ok(paths) });
    assert_eq!(fixture.message(3, 2, Message::Confirmed { handover: H1 }), [done]);
    assert_eq!(fixture.rank.fetches(), 1, "the leader has the last word");
    let word = Message::Settled { handover: H1, outcome: Outcome::Delivered };
    assert_eq!(fixture.message(4, LEADER, word.clone()), [settled(H1, Outcome::Delivered, false)]);
    assert_eq!((fixture.rank.fetches(), fixture.rank.poll_timeout()), (0, None));
    assert_eq!(fixture.message(4, LEADER, word), [], "once");
    assert_eq!(fixture.fetch(H1, &[4]), [], "its blocks are the engine's; they are not placed a second time");
    assert_eq!(fixture.engine(EngineEvent::Freed { handover: H1 }), [send(LEADER, Message::Freed { handover: H1 })]);
}

#[test]
fn a_pull_follows_the_steps() {
    let mut fixture = Fixture::connected(Direction::Pull);
    fixture.fetch(H1, &[1, 2, 4]);
    fixture.place(H1);
    assert_eq!(fixture.opened(0, H1, 0), [], "nothing is ready");
    let steps = |ready| Message::StepsReady { handover: H1, ready };
    assert_eq!(posts(&fixture.message(2, 1, steps(1))), [(1, id(0, 0))]);
    assert_eq!(fixture.nic(done(id(0, 0))), []);
    let rest = fixture.message(2, 1, steps(3));
    assert_eq!(posts(&rest), [(1, id(0, 1))], "two steps in one transfer");
    assert_eq!(fixture.message(2, 1, steps(2)), [], "the watermark never falls");
    assert_eq!(fixture.nic(done(id(0, 1))), [send(1, Message::Fetched { handover: H1 })]);
    assert_eq!(posts(&fixture.opened(1, H1, 9)), [(2, id(1, 0))], "more steps than there are make one transfer of all");
}

#[test]
fn a_push_is_expected_before_the_source_hears_of_it() {
    let mut fixture = Fixture::connected(Direction::Push);
    fixture.fetch(H1, &[2, 4]);
    fixture.place(H1);
    let opened = fixture.opened(0, H1, 1);
    assert_eq!(expects(&opened), [id(0, 0), id(0, 1)]);
    let place = |wanted: &Command| opened.iter().position(|command| command == wanted);
    let expecting = place(&send(1, Message::Expecting { handover: H1 })).expect("the source is told");
    assert!(expecting >= 2, "{opened:?}");
    assert_eq!(posts(&opened), []);
    let Some(Command::Nic { command: NicCommand::Expect { program, .. }, .. }) = opened.first() else {
        panic!("{opened:?}")
    };
    assert!(program.sources[0].is_none() && program.destinations[0].is_some(), "the reader's own blocks");
    fixture.opened(1, H1, 1);
    for (source, step) in [(0, 0), (1, 1), (1, 0)] {
        assert_eq!(fixture.nic(done(id(source, step))), []);
    }
    let paths = vec![path(0, Direction::Push, 200, 6), path(1, Direction::Push, 200, 6)];
    let reported = send(LEADER, Message::RankDone { handover: H1, result: Ok(paths) });
    assert_eq!(fixture.nic(done(id(0, 1))), [reported], "arrival is enough: the owner's NIC wrote it");
}

/// Found by `cluster --transport shm --direction push --pause decode:0@13+1534`: a rank that was stopped amid a copy went on with it when
/// its source had given the blocks to others, and had it delivered.
#[test]
fn a_push_through_shared_memory_is_confirmed_like_a_pull() {
    let mut fixture = Fixture::new(Direction::Push);
    let shm = |profile: WorkerProfile| WorkerProfile { nics: vec![nic(TransportKind::Shm)], ..profile };
    let local = shm(worker(Role::Decode, 0, &fixture.destination, Some(Direction::Push)));
    fixture.rank = DecodeRank::new(local, leases(), DeadlineTerms::default(), QuarantineTerms::default());
    fixture.members();
    for source in 0..2 {
        let profile = shm(worker(Role::Prefill, source, &fixture.source, None));
        fixture.rank.handle_peer(at(0), NodeId(SOURCES[source as usize]), profile);
    }
    fixture.fetch(H1, &[4]);
    fixture.place(H1);
    for source in 0..2 {
        fixture.opened(source, H1, 1);
    }
    fixture.drain();
    for source in 0..2 {
        let node = SOURCES[source as usize];
        assert_eq!(fixture.nic(done(id(source, 0))), [send(node, Message::Fetched { handover: H1 })]);
    }
    let refusal = Refusal::LeaseExpired(RequestId(1));
    assert_eq!(fixture.message(1, SOURCES[0], Message::Confirmed { handover: H1 }), []);
    let failed = fixture.message(1, SOURCES[1], Message::Refused { handover: H1, refusal: refusal.clone() });
    let reported = send(LEADER, Message::RankDone { handover: H1, result: Err(FailReason::Refused(refusal)) });
    assert!(failed.contains(&reported), "{failed:?}");
}

#[test]
fn members_and_sessions_may_come_late() {
    let mut fixture = Fixture::new(Direction::Pull);
    fixture.fetch(H1, &[4]);
    assert_eq!(fixture.place(H1), [], "nobody is known yet");
    fixture.peer(0);
    let connect = commands(fixture.rank.outbox());
    assert!(
        matches!(connect.as_slice(), [Command::Nic { nic: 0, command: NicCommand::Connect { node: NodeId(1), .. } }]),
        "{connect:?}"
    );
    fixture.members();
    let opens = commands(fixture.rank.outbox());
    let [Command::Send { to: NodeId(1), message: Message::Open(_) }, Command::Meet { node: NodeId(2) }] =
        opens.as_slice()
    else {
        panic!("the session with the second is asked for: {opens:?}");
    };
    fixture.peer(1);
    let opens = commands(fixture.rank.outbox());
    assert!(
        matches!(opens.as_slice(), [Command::Nic { .. }, Command::Send { to: NodeId(2), message: Message::Open(_) }]),
        "{opens:?}"
    );
    fixture.members();
    assert_eq!(commands(fixture.rank.outbox()), [], "opened once");
}

#[test]
fn what_is_held_already_does_not_move() {
    for direction in [Direction::Pull, Direction::Push] {
        let mut fixture = Fixture::connected(direction);
        fixture.fetch(H1, &[4]);
        let placed = EngineEvent::Placed { handover: H1, tables: tables(&fixture.destination, 0, 7), have: TOKENS };
        fixture.engine(placed);
        let commands = fixture.opened(0, H1, 1);
        assert_eq!((posts(&commands), expects(&commands)), (vec![], vec![]));
        let answer = match direction {
            Direction::Pull => Message::Fetched { handover: H1 },
            Direction::Push => Message::Expecting { handover: H1 },
        };
        assert_eq!(commands, [send(1, answer)]);
    }
}

#[test]
fn one_rank_speaks_for_the_prefixes_that_all_hold() {
    let holds = EngineEvent::Holds { added: vec![1], removed: vec![2] };
    let mut fixture = Fixture::moving(Direction::Pull, 0);
    assert_eq!(fixture.engine(holds.clone()), [send(LEADER, Message::Holds { added: vec![1], removed: vec![2] })]);
    let other = worker(Role::Decode, 1, &geometry(2), None);
    let mut rank =
        DecodeRank::new(other, leases(), DeadlineTerms::default(), crate::protocol::QuarantineTerms::default());
    let job = Message::Fetch(FetchJob { pairing: pairing(H1, &[4]), dp: 0 });
    rank.handle_message(at(0), NodeId(LEADER), job);
    commands(rank.outbox());
    rank.handle_engine(at(0), holds);
    assert_eq!(commands(rank.outbox()), []);
}

#[test]
fn nonsense_is_ignored() {
    let mut fixture = Fixture::moving(Direction::Pull, 1);
    for (from, message) in [
        (9, Message::Confirmed { handover: H1 }),
        (1, Message::Confirmed { handover: H1 }),
        (9, Message::StepsReady { handover: H1, ready: 2 }),
        (9, Message::Refused { handover: H1, refusal: crate::protocol::Refusal::UnknownRequest(R1) }),
        (1, Message::StepsReady { handover: H2, ready: 2 }),
    ] {
        assert_eq!(fixture.message(2, from, message.clone()), [], "{message:?}");
    }
    assert_eq!(fixture.opened(0, H1, 2), [], "opened once");
    assert_eq!(fixture.message(2, 1, Message::Freed { handover: H1 }), []);
    assert!(matches!(events(fixture.rank.outbox()).as_slice(), [Event::Ignored { from: NodeId(1), .. }]));
}

/// A fetcher over an RDMA device whose first source shows these lanes.
fn shown(required: bool, lanes: &[&str]) -> (Fixture, Vec<Command>, Vec<Event>) {
    let mut fixture = Fixture::new(Direction::Pull);
    let over_rdma = |profile: WorkerProfile| {
        let device = NicAdvert { device: "rdmap40s0:1".into(), host: String::new(), ..nic(TransportKind::Ucx) };
        WorkerProfile { nics: vec![device], ..profile }
    };
    let local = over_rdma(worker(Role::Decode, 0, &fixture.destination, None));
    fixture.rank = DecodeRank::new(local, leases(), DeadlineTerms::default(), QuarantineTerms::default())
        .with_rdma_required(required);
    fixture.members();
    for source in 0..2 {
        let profile = over_rdma(worker(Role::Prefill, source, &fixture.source, None));
        fixture.rank.handle_peer(at(0), NodeId(SOURCES[source as usize]), profile);
    }
    let chosen = events(fixture.rank.outbox());
    assert!(
        matches!(&chosen[..], [Event::PathChosen(one), Event::PathChosen(_)] if one.shortfall.is_none()),
        "{chosen:?}"
    );
    fixture.drain();
    let evidence = Box::new(Evidence::connected(lanes.iter().map(|lane| (*lane).to_owned()).collect()));
    let commands = fixture.nic(NicEvent::Shown { node: NodeId(SOURCES[0]), evidence });
    let told = events(fixture.rank.outbox());
    (fixture, commands, told)
}

#[test]
fn lanes_that_are_no_rdma_are_told_or_refused() {
    let (_, commands, told) = shown(false, &["tcp/eth0"]);
    assert_eq!(commands, [], "a warning only");
    assert!(matches!(&told[..], [Event::PathShown(path)] if path.shortfall.is_some()), "{told:?}");
    for lanes in [&["tcp/eth0"][..], &[]] {
        let (_, commands, _) = shown(true, lanes);
        let [Command::Nic { nic: 0, command: NicCommand::Refuse { node, reason } }] = &commands[..] else {
            panic!("{commands:?}");
        };
        assert_eq!(*node, NodeId(SOURCES[0]));
        assert!(reason.contains("rdmap40s0:1") && reason.contains("UCX_TLS"), "{reason}");
    }
    let (_, commands, told) = shown(true, &["srd/rdmap40s0:1"]);
    assert_eq!(commands, []);
    assert!(matches!(&told[..], [Event::PathShown(path)] if path.shortfall.is_none()), "{told:?}");
}

/// The NIC lets a refused peer go, which fails what was to come from it with the reason.
#[test]
fn a_refused_path_fails_its_handover_with_the_reason() {
    let (mut fixture, commands, _) = shown(true, &["tcp/eth0"]);
    let [Command::Nic { command: NicCommand::Refuse { node, reason }, .. }] = &commands[..] else {
        panic!("{commands:?}")
    };
    fixture.fetch(H1, &[4]);
    fixture.place(H1);
    let commands = fixture.nic(NicEvent::PeerLost { node: *node, reason: reason.clone() });
    let done = commands.iter().find_map(|command| match command {
        Command::Send {
            message: Message::RankDone { result: Err(FailReason::Transport { kind, message, .. }), .. },
            ..
        } => Some((*kind, message.clone())),
        _ => None,
    });
    assert_eq!(done, Some((TransportKind::Ucx, reason.clone())));
}

#[test]
fn a_drain_is_answered_at_once_with_what_is_under_way() {
    let within = core::time::Duration::from_secs(60);
    let drained = |left| engine(EngineCall::Drained { left });
    let mut fixture = Fixture::connected(Direction::Pull);
    assert_eq!(fixture.engine(EngineEvent::Drain { within }), [drained(0)]);
    fixture.fetch(H1, &[4]);
    fixture.drain();
    assert_eq!(fixture.engine(EngineEvent::Drain { within }), [drained(1)]);
}
