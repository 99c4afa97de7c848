//! Ranks without their leader, and hardware that does not stop when it is told to: fences, quarantine, doubt.

use bytes::Bytes;

use super::kit::*;
use super::{decode, prefill};
use crate::protocol::{
    Command, DeadlineTerms, DecodeRank, EngineCall, EngineEvent, Event, FailReason, Message, NicCommand, NicEvent,
    Outcome, PrefillView, QuarantineTerms, Refusal, Role,
};
use crate::{Direction, FenceProof, HandoverId, NodeId, Rank};

fn fence(node: u64, ticket: u64) -> Command {
    fence_at(node, "a", ticket)
}

fn fence_at(node: u64, address: &'static str, ticket: u64) -> Command {
    let address = address.into();
    Command::Nic { nic: 0, command: NicCommand::Fence { node: NodeId(node), address, ticket } }
}

fn fenced(node: u64) -> NicEvent {
    fenced_at(node, "a", u64::MAX)
}

fn fenced_at(node: u64, address: &'static str, ticket: u64) -> NicEvent {
    NicEvent::Fenced { node: NodeId(node), address: address.into(), ticket, proof: FenceProof::EndpointDestroyed }
}

fn settle(handover: HandoverId, outcome: Outcome) -> Message {
    Message::Settled { handover, outcome }
}

fn returned(handover: HandoverId, proof: FenceProof) -> [Command; 2] {
    let freed = send(decode::LEADER, Message::Freed { handover });
    [engine(EngineCall::Returned { handover, proof }), freed]
}

fn health(trouble: Option<String>) -> Command {
    send(decode::LEADER, Message::Health { trouble })
}

/// A decode rank that takes no work while anything is quarantined.
fn cautious() -> decode::Fixture {
    let mut fixture = decode::Fixture::connected(Direction::Push);
    let local = worker(Role::Decode, 0, &fixture.destination, Some(Direction::Push));
    let terms = QuarantineTerms { share_max: 0, ..QuarantineTerms::default() };
    fixture.rank = DecodeRank::new(local, leases(), DeadlineTerms::default(), terms);
    fixture.members();
    fixture.peer(0);
    fixture.peer(1);
    fixture.fetch(H1, &[2, 4]);
    fixture.place(H1);
    fixture.opened(0, H1, 1);
    fixture.drain();
    fixture
}

#[test]
fn who_does_not_stop_writing_is_fenced_again_and_again() {
    let mut fixture = decode::Fixture::moving(Direction::Pull, 1);
    fixture.message(2, decode::LEADER, settle(H1, Outcome::Cancelled));
    let quarantined = events(fixture.rank.outbox());
    assert_eq!(quarantined, [Event::Quarantined { handover: H1 }]);
    assert_eq!(fixture.rank.poll_timeout(), Some(at(4)), "it is given a while to stop");
    fixture.rank.handle_timeout(at(3));
    assert_eq!(commands(fixture.rank.outbox()), []);
    fixture.rank.handle_timeout(at(4));
    assert_eq!(commands(fixture.rank.outbox()), [fence(1, 1), fence(2, 2)]);
    // One stops by itself; the other's fence got lost with its NIC.
    assert_eq!(fixture.nic(decode::failed(decode::id(0, 0))), []);
    assert_eq!(fixture.rank.poll_timeout(), Some(at(6)));
    fixture.rank.handle_timeout(at(6));
    assert_eq!(commands(fixture.rank.outbox()), [fence(2, 3)]);
    assert_eq!(fixture.nic(fenced(1)), [], "it is not the one");
    assert!(!fixture.rank.vitals().is_quiet() && !fixture.rank.vitals().is_stuck());
    assert_eq!(fixture.nic(fenced_at(2, "b", 3)), [], "it is where it was, or has been since");
    assert_eq!(fixture.nic(fenced_at(2, "a", 1)), [], "it was asked for before");
    assert_eq!(fixture.nic(fenced_at(2, "a", 2)), returned(H1, FenceProof::EndpointDestroyed));
    let drained = Event::Drained { handover: H1, proof: FenceProof::EndpointDestroyed };
    assert_eq!(events(fixture.rank.outbox()), [drained]);
    assert!(fixture.rank.vitals().is_quiet(), "{:?}", fixture.rank.vitals());
    assert_eq!((fixture.nic(fenced(2)), fixture.rank.poll_timeout()), (vec![], None), "once");
}

#[test]
fn a_peer_that_is_gone_is_fenced_by_the_address_that_it_had() {
    let mut fixture = decode::Fixture::moving(Direction::Push, 1);
    fixture.rank.handle_lost(at(2), &lost(1), None);
    fixture.message(2, decode::LEADER, settle(H1, Outcome::Cancelled));
    fixture.drain();
    fixture.rank.handle_timeout(at(4));
    assert_eq!(commands(fixture.rank.outbox()), [fence(1, 1), fence(2, 2)]);
}

#[test]
fn a_node_that_started_over_elsewhere_is_fenced_in_both_places() {
    let mut fixture = decode::Fixture::moving(Direction::Pull, 1);
    fixture.rank.handle_peer_down(at(2), NodeId(1), "it crashed");
    fixture.message(2, decode::LEADER, settle(H1, Outcome::Cancelled));
    let mut profile = worker(Role::Prefill, 0, &fixture.source, None);
    profile.nics[0].address = Bytes::from_static(b"b");
    fixture.rank.handle_peer(at(2), NodeId(1), profile);
    fixture.fetch(H2, &[2, 4]);
    fixture.place(H2);
    assert_eq!(posts(&fixture.opened(0, H2, 1)).len(), 1);
    fixture.message(2, decode::LEADER, settle(H2, Outcome::Cancelled));
    fixture.drain();
    fixture.rank.handle_timeout(at(4));
    assert_eq!(commands(fixture.rank.outbox()), [fence(1, 1), fence_at(1, "b", 2), fence(2, 3)]);
    let proof = FenceProof::EndpointDestroyed;
    assert_eq!(fixture.nic(fenced_at(2, "a", 3)), []);
    assert_eq!(fixture.nic(fenced_at(1, "b", 2)), returned(H2, proof), "and nothing of what it was up to before");
    assert_eq!(fixture.nic(fenced_at(1, "a", 1)), returned(H1, proof));
}

#[test]
fn a_quarantine_beyond_its_budget_keeps_new_work_away() {
    let mut fixture = cautious();
    let said = fixture.message(2, decode::LEADER, settle(H1, Outcome::Cancelled));
    let Some(Command::Send { message: Message::Health { trouble: Some(trouble) }, .. }) = said.last().cloned() else {
        panic!("{said:?}");
    };
    assert_eq!(said[said.len() - 2], settled(H1, Outcome::Cancelled, true));
    let seen = events(fixture.rank.outbox());
    assert_eq!(seen, [Event::Quarantined { handover: H1 }, Event::Health { trouble: Some(trouble.clone()) }]);
    // New work is placed and refused, so that it ends as every other.
    let refused = fixture.fetch(H2, &[4]);
    let unhealthy = Message::RankDone { handover: H2, result: Err(FailReason::Unhealthy(trouble.clone())) };
    assert_eq!(refused, [engine(EngineCall::Place { handover: H2, spec: spec(1) }), send(decode::LEADER, unhealthy)]);
    let ended = Outcome::Failed { reason: FailReason::Unhealthy(trouble.clone()) };
    let said = fixture.message(3, decode::LEADER, settle(H2, ended.clone()));
    assert_eq!(said, [settled(H2, ended, false), send(decode::LEADER, Message::Freed { handover: H2 })]);
    // A leader that comes back hears of it again.
    fixture.rank.handle_leader_up(at(3), NodeId(decode::LEADER));
    let holding = send(decode::LEADER, Message::Holding { handovers: vec![(H1, R1, TOKENS)] });
    assert_eq!(commands(fixture.rank.outbox()), [holding, health(Some(trouble))]);
    fixture.rank.handle_timeout(at(4));
    fixture.drain();
    let [freed, told] = returned(H1, FenceProof::EndpointDestroyed);
    assert_eq!(fixture.nic(fenced(1)), [freed, told, health(None)]);
    let drained = Event::Drained { handover: H1, proof: FenceProof::EndpointDestroyed };
    assert_eq!(events(fixture.rank.outbox()), [drained, Event::Health { trouble: None }]);
    let third = fixture.fetch(HandoverId(3), &[4]);
    assert_eq!(third, [engine(EngineCall::Place { handover: HandoverId(3), spec: spec(1) })], "work is welcome");
}

#[test]
fn a_decode_rank_without_its_leader_gives_up_what_it_has_not_reported() {
    let mut fixture = decode::Fixture::moving(Direction::Pull, 2);
    for source in 0..2 {
        fixture.nic(decode::done(decode::id(source, 0)));
        fixture.message(3, decode::SOURCES[source as usize], Message::Confirmed { handover: H1 });
    }
    fixture.fetch(H2, &[4]);
    fixture.drain();
    fixture.rank.handle_leader_down(at(4), NodeId(decode::LEADER), "the cable");
    let (role, group, rank, node) = (Role::Decode, DECODE, Rank(0), NodeId(decode::LEADER));
    let reason = FailReason::RankLost { role, group, rank, node, cause: "the cable".into() };
    let unheard = [
        send(decode::LEADER, Message::RankDone { handover: H2, result: Err(reason.clone()) }),
        settled(H2, Outcome::Failed { reason }, false),
        send(decode::LEADER, Message::Freed { handover: H2 }),
    ];
    assert_eq!(commands(fixture.rank.outbox()), unheard, "without this rank's word it cannot be delivered");
    assert_eq!(fixture.rank.fetches(), 1, "the other may have been");
    fixture.rank.handle_leader_up(at(5), NodeId(decode::LEADER));
    let holding = |handovers| send(decode::LEADER, Message::Holding { handovers });
    assert_eq!(commands(fixture.rank.outbox()), [holding(vec![(H1, R1, TOKENS)])]);
    let word = fixture.message(6, decode::LEADER, settle(H1, Outcome::Delivered));
    assert_eq!(word, [settled(H1, Outcome::Delivered, false)]);
    fixture.rank.handle_leader_down(at(7), NodeId(decode::LEADER), "the cable");
    fixture.rank.handle_leader_up(at(8), NodeId(decode::LEADER));
    assert_eq!(commands(fixture.rank.outbox()), [holding(vec![(H1, R1, TOKENS)])], "its blocks are out");
    assert_eq!(fixture.message(8, decode::LEADER, settle(H1, Outcome::Delivered)), [], "it is told again, in vain");
    let freed = send(decode::LEADER, Message::Freed { handover: H1 });
    assert_eq!(fixture.engine(EngineEvent::Freed { handover: H1 }), std::slice::from_ref(&freed));
    assert_eq!(fixture.engine(EngineEvent::Freed { handover: H1 }), [], "once");
    assert_eq!(fixture.message(9, decode::LEADER, settle(H1, Outcome::Delivered)), [freed], "nothing of it is here");
    assert!(fixture.rank.vitals().is_quiet(), "{:?}", fixture.rank.vitals());
}

#[test]
fn a_nic_that_goes_on_reading_an_offer_is_fenced() {
    let mut fixture = prefill::Fixture::offered(Direction::Push);
    let (one, _two) = (fixture.pushing(0, H1), fixture.pushing(1, H1));
    let ended = Message::Release { request: R1, view: PrefillView::Ended };
    fixture.message(1, prefill::LEADER, ended);
    fixture.rank.handle_timeout(at(2));
    assert_eq!(commands(fixture.rank.outbox()), []);
    assert_eq!(fixture.nic(prefill::failed(one)), [], "one stops when it is told to");
    for (ticket, seconds) in [(1, 3), (2, 5)] {
        assert_eq!(fixture.rank.poll_timeout(), Some(at(seconds)));
        fixture.rank.handle_timeout(at(seconds));
        assert_eq!(commands(fixture.rank.outbox()), [fence(prefill::READERS[1], ticket)]);
    }
    assert_eq!(fixture.nic(fenced(prefill::READERS[0])), []);
    assert_eq!(fixture.nic(fenced_at(prefill::READERS[1], "a", 0)), [], "asked for before");
    assert_eq!(fixture.nic(fenced_at(prefill::READERS[1], "b", 2)), [], "of where it is not");
    assert_eq!(fixture.nic(fenced(prefill::READERS[1])), [prefill::release(PrefillView::Ended)]);
    assert_eq!((fixture.rank.offers(), fixture.rank.poll_timeout()), (0, None));
}

#[test]
fn a_fence_that_was_not_asked_for_ends_no_push() {
    let mut fixture = prefill::Fixture::offered(Direction::Push);
    let (one, two) = (fixture.pushing(0, H1), fixture.pushing(1, H1));
    assert_eq!(fixture.nic(fenced(prefill::READERS[0])), [], "a push that it ended says so itself");
    let ended = Message::Release { request: R1, view: PrefillView::Ended };
    assert_eq!(fixture.message(1, prefill::LEADER, ended), [cancel(0, one), cancel(0, two)]);
    assert_eq!(fixture.nic(fenced(prefill::READERS[0])), []);
    assert_eq!(fixture.nic(prefill::failed(one)), []);
    assert_eq!(fixture.nic(prefill::done(two)), [prefill::release(PrefillView::Ended)]);
}

#[test]
fn an_offer_that_nobody_released_is_in_doubt_only_if_a_reader_has_everything() {
    let pull = |confirmed| {
        let mut fixture = prefill::Fixture::offered(Direction::Pull);
        let open = fixture.open(0, H1, Direction::Pull);
        fixture.message(0, prefill::READERS[0], open);
        if confirmed {
            fixture.message(0, prefill::READERS[0], Message::Fetched { handover: H1 });
        }
        fixture
    };
    let push = |steps: u32| {
        let mut fixture = prefill::Fixture::offered(Direction::Push);
        let first = fixture.pushing(0, H1);
        let ready = fixture.engine(0, EngineEvent::Ready { request: R1, steps: 2 });
        for (_, id) in [(0, first)].into_iter().chain(posts(&ready)).take(steps as usize) {
            fixture.nic(prefill::done(id));
        }
        fixture
    };
    let worlds = [
        (pull(false), PrefillView::Ended),
        (pull(true), PrefillView::InDoubt),
        (push(1), PrefillView::Ended),
        (push(2), PrefillView::InDoubt),
    ];
    for (number, (fixture, view)) in worlds.into_iter().enumerate() {
        let mut fixture = fixture;
        fixture.drain();
        match number % 2 {
            0 => fixture.rank.handle_leader_down(at(1)),
            _ => fixture.rank.handle_lost(at(1), &lost(2), true),
        }
        let mut said = commands(fixture.rank.outbox());
        // A push that still runs holds its blocks until it has ended.
        for id in said.clone() {
            if let Command::Nic { command: NicCommand::Cancel { id }, .. } = id {
                said.extend(fixture.nic(prefill::failed(id)));
            }
        }
        assert_eq!(said.last(), Some(&prefill::release(view)), "{number}");
    }
    // A leader that does not know asks this rank.
    for (mut fixture, view) in [(pull(false), PrefillView::Ended), (pull(true), PrefillView::InDoubt)] {
        fixture.drain();
        let unknown = Message::Release { request: R1, view: PrefillView::InDoubt };
        assert_eq!(fixture.message(1, prefill::LEADER, unknown).last(), Some(&prefill::release(view)));
    }
    // A lease that lapses leaves the same doubt, and does not tell a reader that it failed which knows better.
    let mut fixture = pull(true);
    fixture.drain();
    fixture.rank.handle_timeout(at(30));
    let lapsed = prefill::rank_failed(FailReason::Refused(Refusal::LeaseExpired(R1)));
    assert_eq!(commands(fixture.rank.outbox()), [lapsed, prefill::release(PrefillView::InDoubt)]);
}

#[test]
fn a_fence_says_nothing_of_what_was_posted_after_it() {
    let mut fixture = decode::Fixture::moving(Direction::Pull, 1);
    fixture.message(2, decode::LEADER, settle(H1, Outcome::Cancelled));
    fixture.rank.handle_timeout(at(4));
    assert_eq!(commands(fixture.rank.outbox()), [fence(1, 1), fence(2, 2)]);
    // The next handover of the same pair begins while the proof is awaited.
    fixture.fetch(H2, &[2, 4]);
    fixture.place(H2);
    assert_eq!(posts(&fixture.opened(0, H2, 1)).len(), 1);
    assert_eq!(fixture.nic(fenced(1)), [], "that one goes on");
    let said = fixture.message(5, decode::LEADER, settle(H2, Outcome::Cancelled));
    assert_eq!(said.last(), Some(&settled(H2, Outcome::Cancelled, true)), "its transfer has not ended");
}
