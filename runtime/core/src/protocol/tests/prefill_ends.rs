//! The prefill rank: leases that lapse, readers that change or vanish, blocks that our own NIC still reads.

use super::kit::*;
use super::prefill::*;
use crate::protocol::{
    Command, EngineCall, EngineEvent, Event, FailReason, Message, NicCommand, NicEvent, PrefillJob, PrefillRank,
    PrefillView, Refusal, Role,
};
use crate::{Direction, NodeId, RequestId, TransportKind};

#[test]
fn a_lease_that_lapses_closes_the_offer_and_tells_its_reader() {
    let mut fixture = Fixture::offered(Direction::Pull);
    assert_eq!(fixture.rank.poll_timeout(), Some(at(30)));
    fixture.message(10, LEADER, Message::Renew { requests: vec![R1, RequestId(7)] });
    assert_eq!(fixture.rank.poll_timeout(), Some(at(40)));
    let open = fixture.open(0, H1, Direction::Pull);
    fixture.message(15, READERS[0], open.clone());
    assert_eq!(fixture.rank.poll_timeout(), Some(at(45)), "an open renews");
    fixture.message(20, READERS[0], Message::Reading { handovers: vec![H1] });
    assert_eq!(fixture.rank.poll_timeout(), Some(at(50)), "a reader renews");
    fixture.rank.handle_timeout(at(49));
    assert_eq!(commands(fixture.rank.outbox()), [], "an unexpired lease is never revoked");
    fixture.rank.handle_timeout(at(50));
    let lapsed = Refusal::LeaseExpired(R1);
    let ends = [
        refused(READERS[0], H1, lapsed.clone()),
        rank_failed(FailReason::Refused(lapsed)),
        release(PrefillView::Ended),
    ];
    assert_eq!(commands(fixture.rank.outbox()), ends, "it knows that nobody was told that the lease was good");
    let held = |seconds| Event::LeaseHeld { request: R1, until: at(seconds) };
    let closed = Event::OfferClosed { request: R1, view: PrefillView::Ended };
    assert_eq!(
        events(fixture.rank.outbox()),
        [held(40), held(45), held(50), Event::LeaseExpired { request: R1 }, closed]
    );
    assert_eq!(
        fixture.message(51, READERS[0], Message::Fetched { handover: H1 }),
        [refused(READERS[0], H1, Refusal::UnknownHandover(H1))]
    );
    assert_eq!(fixture.message(51, READERS[0], open), [refused(READERS[0], H1, Refusal::UnknownRequest(R1))]);
}

#[test]
fn a_late_open_or_fetch_is_refused_even_before_the_timer_ran() {
    let mut fixture = Fixture::offered(Direction::Push);
    let open = fixture.open(0, H1, Direction::Push);
    assert_eq!(fixture.message(30, READERS[0], open), [refused(READERS[0], H1, Refusal::LeaseExpired(R1))]);
    assert_eq!(fixture.message(30, READERS[0], Message::Expecting { handover: H1 }), [], "nothing is posted");
    let mut fixture = Fixture::offered(Direction::Pull);
    let open = fixture.open(0, H1, Direction::Pull);
    fixture.message(1, READERS[0], open);
    assert_eq!(
        fixture.message(31, READERS[0], Message::Reading { handovers: vec![H1] }),
        [],
        "an expired lease is not revived"
    );
    assert_eq!(
        fixture.message(31, READERS[0], Message::Fetched { handover: H1 }),
        [refused(READERS[0], H1, Refusal::LeaseExpired(R1))]
    );
}

#[test]
fn a_newer_handover_supersedes_an_older_one() {
    let mut fixture = Fixture::offered(Direction::Pull);
    let (first, second) = (fixture.open(0, H1, Direction::Pull), fixture.open(1, H2, Direction::Pull));
    fixture.message(1, READERS[0], first.clone());
    assert!(matches!(
        fixture.message(1, READERS[1], second).as_slice(),
        [Command::Send { message: Message::Opened(_), .. }]
    ));
    let superseded = Refusal::Superseded { request: R1, newer: H2 };
    assert_eq!(fixture.message(2, READERS[0], first), [refused(READERS[0], H1, superseded)]);
    assert_eq!(
        fixture.message(2, READERS[0], Message::Fetched { handover: H1 }),
        [refused(READERS[0], H1, Refusal::UnknownHandover(H1))]
    );
    let ready = fixture.engine(2, EngineEvent::Ready { request: R1, steps: 2 });
    assert_eq!(ready.first(), Some(&send(READERS[1], Message::StepsReady { handover: H2, ready: 2 })));
    assert!(
        !ready.iter().any(|command| matches!(command, Command::Send { to: NodeId(20), .. })),
        "the old reader hears nothing"
    );
}

#[test]
fn a_cancelled_push_of_an_old_handover_does_not_stop_the_new_one() {
    let mut fixture = Fixture::offered(Direction::Push);
    let old = fixture.pushing(0, H1);
    let open = fixture.open(0, H2, Direction::Push);
    let commands = fixture.message(1, READERS[0], open);
    assert_eq!(commands.first(), Some(&cancel(0, old)));
    assert_eq!(posts(&fixture.message(1, READERS[0], Message::Expecting { handover: H2 })).len(), 1);
    assert_eq!(fixture.nic(failed(old)), []);
    let ready = fixture.engine(2, EngineEvent::Ready { request: R1, steps: 2 });
    assert_eq!(posts(&ready).len(), 1, "the second step is pushed: {ready:?}");
}

#[test]
fn a_release_during_a_push_waits_for_the_nic() {
    let mut fixture = Fixture::offered(Direction::Push);
    let (one, two) = (fixture.pushing(0, H1), fixture.pushing(1, H1));
    let ended = Message::Release { request: R1, view: PrefillView::Ended };
    assert_eq!(fixture.message(1, LEADER, ended), [cancel(0, one), cancel(0, two)]);
    assert_eq!(
        fixture.rank.poll_timeout(),
        Some(at(3)),
        "a lease has no more to say, but a NIC that goes on is fenced"
    );
    assert_eq!(
        fixture.engine(1, EngineEvent::Ready { request: R1, steps: 2 }).len(),
        1,
        "nobody may read it any more: rejected"
    );
    assert_eq!(fixture.nic(failed(one)), []);
    assert_eq!(fixture.nic(done(two)), [release(PrefillView::Ended)]);
    assert_eq!(fixture.rank.offers(), 0);
    assert_eq!(fixture.nic(done(two)), [], "once");
}

#[test]
fn a_request_prefilled_anew_waits_until_its_old_offer_has_closed() {
    let mut fixture = Fixture::offered(Direction::Push);
    let id = fixture.pushing(0, H1);
    let ended = Message::Release { request: R1, view: PrefillView::Ended };
    fixture.message(1, LEADER, ended.clone());
    assert_eq!(fixture.message(1, LEADER, job(1)), []);
    assert_eq!(fixture.nic(failed(id)), [release(PrefillView::Ended)]);
    // What the engine said before it took the release is about the old offer.
    let opened = fixture.opened();
    assert_eq!(fixture.engine(1, opened), []);
    assert_eq!(fixture.engine(1, EngineEvent::Unable { request: R1, reason: "full".into() }), []);
    let again = engine(EngineCall::Prefill(PrefillJob { spec: spec(1), dp: 0, trace: None }));
    assert_eq!(fixture.engine(1, EngineEvent::Released { request: R1 }), [again]);
    let opened = fixture.opened();
    assert!(matches!(fixture.engine(1, opened).as_slice(), [Command::Send { .. }]), "the new offer opens");
    // And not at all when it is released before that.
    let mut fixture = Fixture::offered(Direction::Push);
    let id = fixture.pushing(0, H1);
    fixture.message(1, LEADER, ended.clone());
    fixture.message(1, LEADER, job(1));
    assert_eq!(fixture.message(1, LEADER, ended.clone()), []);
    assert_eq!(fixture.nic(failed(id)), [release(PrefillView::Ended)]);
    assert_eq!(fixture.rank.offers(), 0);
    // The same while only the engine's acknowledgement is awaited.
    assert_eq!(fixture.message(1, LEADER, job(1)), []);
    assert_eq!(fixture.message(1, LEADER, ended), []);
    assert_eq!(fixture.engine(1, EngineEvent::Released { request: R1 }), []);
    assert_eq!(fixture.rank.offers(), 0);
}

#[test]
fn a_reader_that_gives_up_is_no_longer_written_to() {
    let mut fixture = Fixture::offered(Direction::Push);
    let (one, _two) = (fixture.pushing(0, H1), fixture.pushing(1, H1));
    assert_eq!(fixture.message(1, READERS[0], Message::Abandon { handover: H1 }), [cancel(0, one)]);
    assert_eq!(fixture.message(1, READERS[0], Message::Abandon { handover: H1 }), []);
    let ready = fixture.engine(2, EngineEvent::Ready { request: R1, steps: 2 });
    assert_eq!(posts(&ready).iter().map(|(node, _)| *node).collect::<Vec<_>>(), [READERS[1]]);
}

#[test]
fn a_session_that_ends_cancels_on_the_nic_that_was_used() {
    // The first NIC reaches nobody, the second does.
    let (source, destination) = (geometry(1), geometry(2));
    let mut local = worker(Role::Prefill, 0, &source, Some(Direction::Push));
    local.nics = vec![nic(TransportKind::Tcp), nic(TransportKind::Sim)];
    let mut fixture = Fixture {
        rank: PrefillRank::new(local, leases(), crate::protocol::QuarantineTerms::default()),
        source,
        destination,
    };
    fixture.rank.handle_peer(at(0), NodeId(READERS[0]), worker(Role::Decode, 0, &fixture.destination, None));
    fixture.message(0, LEADER, job(1));
    let opened = fixture.opened();
    fixture.engine(0, opened);
    fixture.engine(0, EngineEvent::Ready { request: R1, steps: 1 });
    let id = fixture.pushing(0, H1);
    fixture.rank.handle_peer_down(at(1), NodeId(READERS[0]));
    let disconnect = Command::Nic { nic: 1, command: NicCommand::Disconnect { node: NodeId(READERS[0]) } };
    assert_eq!(commands(fixture.rank.outbox()), [cancel(1, id), disconnect]);
    fixture.message(2, LEADER, Message::Release { request: R1, view: PrefillView::InDoubt });
    // Its reader did not get everything: this rank knows better than its leader.
    assert_eq!(fixture.nic(failed(id)), [release(PrefillView::Ended)]);
}

#[test]
fn a_nic_that_loses_its_peer_stops_that_reader() {
    let mut fixture = Fixture::offered(Direction::Push);
    let id = fixture.pushing(0, H1);
    let gone = NicEvent::PeerLost { node: NodeId(READERS[0]), reason: "reset".into() };
    let refusal = Refusal::Transport("reset".into());
    assert_eq!(fixture.nic(gone), [cancel(0, id), send(READERS[0], Message::Refused { handover: H1, refusal })]);
    assert_eq!(fixture.nic(failed(id)), []);
    assert_eq!(posts(&fixture.engine(2, EngineEvent::Ready { request: R1, steps: 2 })), []);
    assert_eq!(fixture.rank.offers(), 1, "the offer is there for another handover");
}

#[test]
fn a_lost_rank_of_the_group_ends_every_offer() {
    let mut fixture = Fixture::offered(Direction::Pull);
    fixture.message(0, LEADER, job(2));
    fixture.rank.handle_lost(at(1), &lost(2), true);
    let waiting = engine(EngineCall::Release { request: RequestId(2), view: PrefillView::Ended });
    assert_eq!(commands(fixture.rank.outbox()), [release(PrefillView::Ended), waiting]);
    let opened = fixture.opened();
    assert_eq!(fixture.engine(2, opened.clone()), [], "the engine has not heard of the release yet");
    fixture.engine(2, EngineEvent::Released { request: R1 });
    assert_eq!(
        fixture.engine(2, opened),
        [engine(EngineCall::Rejected { request: R1, refusal: Refusal::UnknownRequest(R1) })]
    );
    let mut fixture = Fixture::offered(Direction::Pull);
    fixture.rank.handle_lost(at(1), &lost(READERS[0]), false);
    assert_eq!((commands(fixture.rank.outbox()), fixture.rank.offers()), (vec![], 1), "a reader's loss ends nothing");
}

#[test]
fn an_engine_that_cannot_says_so_before_or_after_it_opened() {
    let unable = EngineEvent::Unable { request: R1, reason: "out of memory".into() };
    let reason = || rank_failed(FailReason::Engine("out of memory".into()));
    let mut fixture = Fixture::new();
    fixture.message(0, LEADER, job(1));
    assert_eq!(fixture.engine(0, unable.clone()), [reason()], "it holds nothing that could be released");
    assert_eq!(fixture.rank.offers(), 0);
    let mut fixture = Fixture::offered(Direction::Push);
    let id = fixture.pushing(0, H1);
    assert_eq!(fixture.engine(1, unable.clone()), [reason(), cancel(0, id)]);
    assert_eq!(fixture.engine(1, unable), []);
    assert_eq!(fixture.nic(failed(id)), [release(PrefillView::Ended)]);
}
