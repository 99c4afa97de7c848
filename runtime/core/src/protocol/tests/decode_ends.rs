//! The decode rank: fetches that fail, and blocks that stay quarantined until nothing can write them.

use super::decode::*;
use super::kit::*;
use crate::protocol::{
    Awaited, Command, DeadlineTerms, EngineCall, EngineEvent, FailReason, FetchJob, Message, NicCommand, NicEvent,
    Outcome, Refusal, Role,
};
use crate::{Direction, FenceProof, NodeId, Rank, TransportKind};

fn lost_source(source: usize) -> FailReason {
    let (role, group, rank) = (Role::Prefill, PREFILL, Rank(source as u32));
    FailReason::RankLost { role, group, rank, node: NodeId(SOURCES[source]), cause: "it crashed".into() }
}

fn outcome(outcome: Outcome) -> Message {
    Message::Settled { handover: H1, outcome }
}

/// The leader hears that the blocks are the engine's again.
fn freed() -> Command {
    send(LEADER, Message::Freed { handover: H1 })
}

fn returned(proof: FenceProof) -> Command {
    engine(EngineCall::Returned { handover: H1, proof })
}

#[test]
fn placement_and_transfer_have_deadlines() {
    let mut fixture = Fixture::connected(Direction::Pull);
    fixture.fetch(H1, &[4]);
    assert_eq!(fixture.rank.poll_timeout(), Some(at(10)));
    fixture.rank.handle_timeout(at(10));
    let late = |awaited, waited_ms| rank_failed(FailReason::Deadline { awaited, waited_ms });
    assert_eq!(commands(fixture.rank.outbox()), [late(Awaited::Placement, 10_000)]);
    assert_eq!(fixture.place(H1), [], "blocks that come after the end are not used");
    let cancelled = fixture.message(11, LEADER, outcome(Outcome::Cancelled));
    assert_eq!(cancelled, [settled(H1, Outcome::Cancelled, false), freed()], "but they are given back");

    let mut fixture = Fixture::moving(Direction::Pull, 0);
    fixture.message(2, 1, Message::StepsReady { handover: H1, ready: 1 });
    fixture.rank.handle_timeout(at(10));
    let reading = |to| send(to, Message::Reading { handovers: vec![H1] });
    assert_eq!(commands(fixture.rank.outbox()), [reading(1), reading(2)]);
    fixture.rank.handle_timeout(at(61));
    let commands = commands(fixture.rank.outbox());
    for wanted in [abandon(0), abandon(1), cancel(0, id(0, 0))] {
        assert!(commands.contains(&wanted), "{wanted:?} in {commands:?}");
    }
    let Some(Command::Send {
        message: Message::RankDone { result: Err(FailReason::Deadline { awaited, .. }), .. },
        ..
    }) = commands.last()
    else {
        panic!("{commands:?}");
    };
    assert_eq!(*awaited, Awaited::Transfer);
}

#[test]
fn a_refusal_fails_the_rank_once() {
    let mut fixture = Fixture::moving(Direction::Pull, 1);
    let refusal = Refusal::LeaseExpired(R1);
    let refused = Message::Refused { handover: H1, refusal: refusal.clone() };
    let commands = fixture.message(2, 1, refused.clone());
    let reason = rank_failed(FailReason::Refused(refusal));
    assert_eq!(commands, [abandon(0), cancel(0, id(0, 0)), abandon(1), cancel(0, id(1, 0)), reason]);
    assert_eq!(fixture.message(2, 2, refused), []);
    assert_eq!(fixture.opened(1, H1, 2), [], "it is over");
}

#[test]
fn a_failed_transfer_fails_the_rank_and_frees_the_blocks_last() {
    for direction in [Direction::Pull, Direction::Push] {
        let mut fixture = Fixture::moving(direction, 2);
        let failure = fixture.nic(failed(id(0, 0)));
        let (kind, peer, message) = (TransportKind::Sim, NodeId(1), "the link broke".to_owned());
        assert_eq!(failure.last(), Some(&rank_failed(FailReason::Transport { kind, peer, message })));
        let reason = FailReason::Engine("as the leader says".into());
        let word = Outcome::Failed { reason };
        assert_eq!(fixture.message(3, LEADER, outcome(word.clone())), [settled(H1, word, true)]);
        let open: Vec<_> = match direction {
            Direction::Pull => vec![id(1, 0)],
            Direction::Push => vec![id(0, 1), id(1, 0), id(1, 1)],
        };
        let (last, others) = open.split_last().expect("transfers");
        for other in others {
            assert_eq!(fixture.nic(failed(*other)), []);
        }
        let back = [returned(FenceProof::OwnerCopies), freed()];
        assert_eq!(fixture.nic(done(*last)), back, "done or failed: it has ended");
        assert_eq!(fixture.nic(failed(*last)), [], "once");
        assert_eq!(fixture.rank.fetches(), 0);
    }
}

#[test]
fn a_word_from_the_leader_stops_what_runs() {
    let mut fixture = Fixture::moving(Direction::Pull, 1);
    let commands = fixture.message(2, LEADER, outcome(Outcome::Cancelled));
    let stops =
        [abandon(0), cancel(0, id(0, 0)), abandon(1), cancel(0, id(1, 0)), settled(H1, Outcome::Cancelled, true)];
    assert_eq!(commands, stops, "this rank has nothing to report any more");
    assert_eq!(fixture.message(2, LEADER, outcome(Outcome::Delivered)), [], "the first word is the last");
    assert_eq!(fixture.message(2, 1, Message::StepsReady { handover: H1, ready: 2 }), [], "nothing is posted after it");
    assert_eq!(fixture.nic(failed(id(0, 0))), []);
    assert_eq!(fixture.nic(failed(id(1, 0))), [returned(FenceProof::OwnerCopies), freed()]);
    assert_eq!(fixture.rank.fetches(), 0);
}

#[test]
fn a_lost_source_matters_while_it_owes_something() {
    // Unopened: the session never stood.
    let mut fixture = Fixture::new(Direction::Pull);
    fixture.members();
    fixture.fetch(H1, &[4]);
    fixture.place(H1);
    fixture.rank.handle_peer_down(at(1), NodeId(1), "it crashed");
    assert_eq!(commands(fixture.rank.outbox()), [rank_failed(lost_source(0))]);

    // Moving.
    let mut fixture = Fixture::moving(Direction::Pull, 1);
    fixture.rank.handle_lost(at(1), &lost(1), None);
    let disconnect = Command::Nic { nic: 0, command: NicCommand::Disconnect { node: NodeId(1) } };
    let stops = [disconnect.clone(), cancel(0, id(0, 0)), abandon(1), cancel(0, id(1, 0)), rank_failed(lost_source(0))];
    assert_eq!(commands(fixture.rank.outbox()), stops);

    // Confirming: the bytes are here, but nobody says whether they were good.
    let mut fixture = Fixture::moving(Direction::Pull, 2);
    fixture.nic(done(id(0, 0)));
    fixture.rank.handle_peer_down(at(1), NodeId(1), "it crashed");
    let stops = commands(fixture.rank.outbox());
    assert_eq!(stops.last(), Some(&rank_failed(lost_source(0))), "{stops:?}");

    // Done: it owes nothing.
    fixture = Fixture::moving(Direction::Pull, 2);
    fixture.nic(done(id(0, 0)));
    fixture.message(1, 1, Message::Confirmed { handover: H1 });
    fixture.rank.handle_peer_down(at(1), NodeId(1), "it crashed");
    assert_eq!(commands(fixture.rank.outbox()), [disconnect]);
    fixture.nic(done(id(1, 0)));
    let finished = fixture.message(2, 2, Message::Confirmed { handover: H1 });
    let [Command::Send { message: Message::RankDone { result: Ok(paths), .. }, .. }] = finished.as_slice() else {
        panic!("{finished:?}")
    };
    assert_eq!(paths.len(), 2, "what it brought is still reported");
}

#[test]
fn a_nic_that_loses_its_peer_fails_a_pull() {
    let mut fixture = Fixture::moving(Direction::Pull, 1);
    let commands = fixture.nic(NicEvent::PeerLost { node: NodeId(2), reason: "reset".into() });
    let (kind, peer, message) = (TransportKind::Sim, NodeId(2), "reset".to_owned());
    assert_eq!(commands.last(), Some(&rank_failed(FailReason::Transport { kind, peer, message })));
    let mut fixture = Fixture::moving(Direction::Push, 1);
    assert_eq!(
        fixture.nic(NicEvent::PeerLost { node: NodeId(2), reason: "reset".into() }),
        [],
        "a push is the writer's affair"
    );
}

#[test]
fn a_confirmation_does_not_complete_what_has_failed() {
    let mut fixture = Fixture::moving(Direction::Pull, 2);
    fixture.nic(done(id(0, 0)));
    fixture.nic(done(id(1, 0)));
    fixture.message(2, 2, Message::Confirmed { handover: H1 });
    let lost = NicEvent::PeerLost { node: NodeId(1), reason: "reset".into() };
    assert_eq!(fixture.nic(lost).len(), 2, "the source is told to stop, the leader that this part failed");
    assert_eq!(fixture.message(3, 1, Message::Confirmed { handover: H1 }), []);
    assert_eq!(fixture.message(3, LEADER, outcome(Outcome::Delivered)), [], "this rank has reported a failure");
    let ends = fixture.message(4, LEADER, outcome(Outcome::Cancelled));
    assert_eq!(ends, [settled(H1, Outcome::Cancelled, false), freed()]);
}

#[test]
fn a_lost_rank_of_the_group_settles_everything_here() {
    let mut fixture = Fixture::moving(Direction::Pull, 1);
    fixture.rank.handle_lost(at(2), &lost(21), Some(Rank(1)));
    let (role, group, rank, node) = (Role::Decode, DECODE, Rank(1), NodeId(21));
    let reason = FailReason::RankLost { role, group, rank, node, cause: "it crashed".into() };
    let commands = commands(fixture.rank.outbox());
    assert_eq!(commands.last(), Some(&settled(H1, Outcome::Failed { reason }, true)), "{commands:?}");
    assert_eq!(fixture.message(3, LEADER, outcome(Outcome::Delivered)), [], "no other word counts");
}

#[test]
fn a_fence_proves_nothing_of_what_it_was_not_asked_for() {
    let mut fixture = Fixture::moving(Direction::Push, 2);
    let (address, proof) = (bytes::Bytes::from_static(b"a"), FenceProof::PeerProcessDead);
    let fenced = |node| NicEvent::Fenced { node: NodeId(node), address: address.clone(), ticket: u64::MAX, proof };
    assert_eq!(fixture.nic(fenced(1)), [], "whatever it ended says so itself");
    let ended = fixture.message(3, LEADER, outcome(Outcome::Cancelled));
    assert_eq!(ended.last(), Some(&settled(H1, Outcome::Cancelled, true)));
    assert_eq!(fixture.nic(fenced(1)), [], "it was asked for before");
    fixture.rank.handle_timeout(at(5));
    fixture.drain();
    assert_eq!(fixture.nic(fenced(1)), [], "the other source may still write");
    assert_eq!(fixture.nic(fenced(2)), [returned(FenceProof::PeerProcessDead), freed()]);
}

#[test]
fn a_reader_renews_and_stops_posting_when_it_was_too_late() {
    let mut fixture = Fixture::moving(Direction::Pull, 1);
    assert_eq!(fixture.rank.poll_timeout(), Some(at(10)));
    fixture.rank.handle_timeout(at(10));
    assert!(fixture.rank.poll_timeout().is_some_and(|timer| timer <= at(20)), "and again before the lease could lapse");
    fixture.drain();
    // Nobody ran for 29.98 s: a holder counts from sending, and allows for drift.
    let next = Message::StepsReady { handover: H1, ready: 2 };
    let commands = fixture.message(40, 1, next);
    assert_eq!(posts(&commands), []);
    assert_eq!(commands.last(), Some(&rank_failed(FailReason::Refused(Refusal::LeaseExpired(R1)))));
}

#[test]
fn an_expired_holder_does_not_revive_itself() {
    // A long deadline, so that only the lease is at stake.
    let mut fixture = Fixture::connected(Direction::Pull);
    let deadlines =
        crate::protocol::DeadlineTerms { floor: core::time::Duration::from_secs(600), ..Default::default() };
    let local = worker(Role::Decode, 0, &fixture.destination, Some(Direction::Pull));
    fixture.rank =
        crate::protocol::DecodeRank::new(local, leases(), deadlines, crate::protocol::QuarantineTerms::default());
    fixture.members();
    fixture.peer(0);
    fixture.peer(1);
    fixture.fetch(H1, &[2, 4]);
    fixture.place(H1);
    fixture.opened(0, H1, 1);
    fixture.drain();
    fixture.rank.handle_timeout(at(45));
    assert_eq!(commands(fixture.rank.outbox()), [], "no renewal of what has lapsed");
    let commands = fixture.message(45, 1, Message::StepsReady { handover: H1, ready: 2 });
    assert_eq!(posts(&commands), [], "a late fetch stops before it posts");
    assert_eq!(commands.last(), Some(&rank_failed(FailReason::Refused(Refusal::LeaseExpired(R1)))));
}

#[test]
fn an_engine_without_room_and_a_pairing_without_sense_fail() {
    let mut fixture = Fixture::connected(Direction::Pull);
    fixture.fetch(H1, &[4]);
    let full = fixture.engine(EngineEvent::NoRoom { handover: H1, reason: "full".into() });
    assert_eq!(full, [rank_failed(FailReason::Engine("full".into()))]);
    for steps in [&[][..], &[2], &[3, 2, 4], &[4, 9]] {
        let mut fixture = Fixture::connected(Direction::Pull);
        let job = Message::Fetch(FetchJob { pairing: pairing(H1, steps), dp: 0 });
        let commands = fixture.message(0, LEADER, job);
        assert!(
            matches!(
                commands.last(),
                Some(Command::Send {
                    message: Message::RankDone { result: Err(FailReason::Refused(Refusal::BadTables(_))), .. },
                    ..
                })
            ),
            "{steps:?}: {commands:?}"
        );
    }
    let mut fixture = Fixture::connected(Direction::Pull);
    fixture.fetch(H1, &[4]);
    let short = EngineEvent::Placed { handover: H1, tables: crate::Tables::default(), have: 0 };
    fixture.engine(short);
    let commands = fixture.opened(0, H1, 1);
    assert!(
        matches!(
            commands.last(),
            Some(Command::Send { message: Message::RankDone { result: Err(FailReason::Mismatch(_)), .. }, .. })
        ),
        "tables that are too short end in a mismatch: {commands:?}"
    );
}

#[test]
fn layers_that_are_not_computed_yet_are_waited_for_by_another_clock() {
    let terms = DeadlineTerms::default();
    let deadline = |fixture: &mut Fixture| {
        // Renewals come in between; only the last point in time matters here.
        let mut due = fixture.rank.poll_timeout();
        while let Some(at) = due.filter(|at| *at < self::at(1) + terms.floor) {
            fixture.rank.handle_timeout(at);
            fixture.drain();
            due = fixture.rank.poll_timeout();
        }
        due
    };
    for direction in [Direction::Pull, Direction::Push] {
        // One step of two is under way: bytes are awaited, and soon.
        let mut fixture = Fixture::moving(direction, 1);
        assert!(deadline(&mut fixture).is_some_and(|due| due < at(15)));
        // It is here; the next is still being computed, which may take minutes.
        for source in 0..2 {
            fixture.nic(done(id(source, 0)));
        }
        for seconds in [20, 40, 60, 80, 100, 200, 300, 400, 500, 600] {
            fixture.rank.handle_timeout(at(seconds));
            assert!(
                !commands(fixture.rank.outbox()).contains(&abandon(0)),
                "{direction:?}: given up after {seconds} s"
            );
        }
        fixture.rank.handle_timeout(at(2) + terms.prefill);
        let reported = commands(fixture.rank.outbox());
        let awaited = |command: &Command| {
            matches!(command, Command::Send { message: Message::RankDone { result: Err(FailReason::Deadline { awaited, .. }), .. }, .. }
                if *awaited == Awaited::Layers)
        };
        assert!(reported.iter().any(awaited), "{direction:?}: {reported:?}");
    }
}

#[test]
fn a_silent_leader_does_not_hold_blocks_for_ever() {
    let mut fixture = Fixture::moving(Direction::Pull, 2);
    for source in 0..2 {
        fixture.nic(done(id(source, 0)));
        fixture.message(3, SOURCES[source as usize], Message::Confirmed { handover: H1 });
    }
    fixture.rank.handle_timeout(at(60));
    assert_eq!(commands(fixture.rank.outbox()), []);
    fixture.rank.handle_timeout(at(3) + DeadlineTerms::default().backstop());
    let commands = commands(fixture.rank.outbox());
    let [Command::Engine(EngineCall::Settled { outcome: Outcome::Failed { reason }, quarantined: false, .. }), back] =
        commands.as_slice()
    else {
        panic!("{commands:?}");
    };
    assert_eq!(*back, freed());
    assert!(matches!(reason, FailReason::Deadline { awaited: Awaited::Outcome, .. }));
    assert_eq!(fixture.rank.fetches(), 0);
}
