//! The scheduler: what is tried again, what fails, and what a cancellation reaches.

use super::kit::*;
use super::scheduler::*;
use crate::protocol::{
    Awaited, Event, FailReason, LeastLoaded, Member, Message, OfferSummary, Outcome, PrefillView, Refusal, Role,
    SchedulerTerms,
};
use crate::{Epoch, GroupId, HandoverId, NodeId, Rank, RequestId};

fn engine_failure() -> FailReason {
    FailReason::Engine("no".into())
}

fn failed(reason: FailReason) -> Outcome {
    Outcome::Failed { reason }
}

fn rank_lost(role: Role, node: u64) -> FailReason {
    FailReason::RankLost {
        role,
        group: GroupId(node as u32),
        rank: Rank(0),
        node: NodeId(node),
        cause: "it crashed".into(),
    }
}

fn abort(to: u64, handover: u64, reason: Option<FailReason>) -> crate::protocol::Command {
    send(to, Message::Abort { handover: HandoverId(handover), reason })
}

/// One request, paired as handover 1 with decode node 10.
fn paired(prefill: u64, decode: u64) -> Fixture {
    let mut fixture = Fixture::new(prefill, decode);
    fixture.submit(1);
    assert_eq!(pairs(&fixture.offer(0, 1)), [(10, 1, 1)]);
    fixture
}

#[test]
fn a_failed_handover_is_paired_again_while_its_offer_stands() {
    let mut fixture = paired(1, 2);
    assert_eq!(pairs(&fixture.outcome(10, 1, failed(engine_failure()))), [(11, 2, 1)], "another group is tried first");
    fixture.scheduler.handle_lost(at(1), &lost(11));
    assert_eq!(pairs(&fixture.commands()), [(10, 3, 1)], "the leader is lost: nobody else would decide");
    assert_eq!(fixture.outcome(11, 2, Outcome::Delivered), [known(11, 2)], "a late word about an old handover");
    let commands = fixture.outcome(10, 3, failed(engine_failure()));
    assert_eq!(commands, [known(10, 3), released(0, 1, PrefillView::Ended)], "three attempts are enough");
    assert_eq!(fixture.finished(), [(1, failed(engine_failure()))]);
}

#[test]
fn a_handover_that_its_transport_failed_rests_before_the_next_attempt() {
    let mut fixture = paired(1, 2);
    let broken = FailReason::Transport { kind: crate::TransportKind::Sim, peer: NodeId(0), message: "reset".into() };
    let rests = fixture.outcome(10, 1, failed(broken.clone()));
    assert_eq!(rests, [known(10, 1)], "the directory may be about to tell of a loss");
    let due = fixture.scheduler.poll_timeout().expect("an attempt is due");
    assert!(due < at(3));
    fixture.scheduler.handle_timeout(due);
    assert_eq!(pairs(&fixture.commands()), [(11, 2, 1)]);
    // A loss that is told meanwhile ends the rest.
    assert_eq!(fixture.outcome(11, 2, failed(broken)), [known(11, 2)]);
    fixture.scheduler.handle_lost(at(4), &lost(0));
    let finished = fixture.finished();
    assert!(
        matches!(finished.as_slice(), [(1, Outcome::Failed { reason: FailReason::RankLost { .. } })]),
        "{finished:?}"
    );
    fixture.scheduler.handle_timeout(at(9));
    assert_eq!(pairs(&fixture.commands()), []);
}

#[test]
fn an_outcome_of_another_groups_handover_is_ignored() {
    let mut fixture = paired(1, 2);
    assert_eq!(fixture.outcome(11, 1, Outcome::Delivered), []);
    assert_eq!(fixture.finished(), []);
    fixture.outcome(10, 1, Outcome::Delivered);
    assert_eq!(fixture.finished(), [(1, Outcome::Delivered)]);
}

#[test]
fn a_refused_handover_is_prefilled_again() {
    let mut fixture = paired(2, 1);
    fixture.submit(2);
    let refused = FailReason::Refused(Refusal::LeaseExpired(R1));
    let commands = fixture.outcome(10, 1, failed(refused));
    assert_eq!(commands[..2], [known(10, 1), released(0, 1, PrefillView::Ended)]);
    assert_eq!(jobs(&commands), [(0, 1)], "the least loaded group");
    let mut fixture = paired(1, 1);
    let mismatch = FailReason::Mismatch("dtype".into());
    fixture.outcome(10, 1, failed(mismatch.clone()));
    assert_eq!(fixture.finished(), [(1, failed(mismatch))], "what does not fit will not fit next time");
}

/// Three groups that were rolled one after another made a request fail that nothing was wrong with.
#[test]
fn who_leaves_in_order_costs_no_attempt() {
    let leaves = FailReason::Unhealthy("it leaves and offers nothing new".into());
    let gives_back = |fixture: &mut Fixture, node| {
        let (request, reason) = (R1, leaves.clone());
        fixture.say(node, Message::Health { trouble: Some("it leaves".into()) });
        let said = fixture.say(node, Message::OfferFailed { request, reason });
        fixture.say(node, Message::Health { trouble: None });
        jobs(&said)
    };
    let mut fixture = Fixture::new(2, 1);
    assert_eq!(jobs(&fixture.submit(1)), [(0, 1)]);
    let turns: Vec<u64> = (0..4).map(|turn| gives_back(&mut fixture, turn % 2)[0].0).collect();
    assert_eq!(turns, [1, 0, 1, 0], "each time the other takes it");
    // From then on it does count: a group that gives everything back does not go on for ever.
    assert_eq!(gives_back(&mut fixture, 0), [(1, 1)]);
    assert_eq!(gives_back(&mut fixture, 1), [(0, 1)]);
    assert_eq!(gives_back(&mut fixture, 0), []);
    assert_eq!(fixture.finished(), [(1, failed(leaves))]);
}

#[test]
fn a_lost_prefill_group_is_replaced_or_named() {
    // Prefilling, and offered but not paired.
    for offered in [false, true] {
        let mut fixture = Fixture::new(2, 0);
        fixture.submit(1);
        if offered {
            fixture.offer(0, 1);
        }
        fixture.join(10, Role::Decode);
        let before = pairs(&fixture.commands());
        assert_eq!(before.len(), usize::from(offered));
        fixture.scheduler.handle_lost(at(1), &lost(0));
        let commands = fixture.commands();
        if offered {
            assert_eq!(commands, [abort(10, 1, Some(rank_lost(Role::Prefill, 0)))], "its leader decides first");
            assert_eq!(jobs(&fixture.outcome(10, 1, failed(rank_lost(Role::Prefill, 0)))), [(1, 1)]);
        } else {
            assert_eq!(jobs(&commands), [(1, 1)]);
        }
        assert_eq!(fixture.finished(), []);
    }
    // The last one.
    let mut fixture = Fixture::new(1, 1);
    fixture.submit(1);
    fixture.scheduler.handle_lost(at(1), &lost(0));
    assert_eq!(fixture.finished(), [(1, failed(rank_lost(Role::Prefill, 0)))]);
    fixture.submit(2);
    assert_eq!(fixture.finished(), [(2, failed(FailReason::NoGroup(Role::Prefill)))]);
}

#[test]
fn a_group_that_lacks_a_rank_does_not_get_the_request_again() {
    // Readers notice before the directory does, and so does the group's leader.
    let mut fixture = Fixture::new(2, 1);
    fixture.submit(1);
    fixture.offer(0, 1);
    fixture.commands();
    assert_eq!(jobs(&fixture.outcome(10, 1, failed(rank_lost(Role::Prefill, 0)))), [(1, 1)], "the other one");
    // The only one is tried all the same: it may be whole again.
    let mut fixture = Fixture::new(1, 1);
    fixture.submit(1);
    fixture.offer(0, 1);
    fixture.commands();
    assert_eq!(jobs(&fixture.outcome(10, 1, failed(rank_lost(Role::Prefill, 0)))), [(0, 1)]);
}

#[test]
fn the_last_decode_group_takes_waiting_requests_with_it() {
    let mut fixture = paired(1, 1);
    fixture.scheduler.handle_lost(at(1), &lost(10));
    assert_eq!(fixture.finished(), [(1, failed(rank_lost(Role::Decode, 10)))]);
    fixture.commands();
    fixture.submit(2);
    fixture.offer(0, 2);
    assert_eq!(fixture.finished(), [(2, failed(FailReason::NoGroup(Role::Decode)))]);
}

/// Where ranks are started again, requests that fall between two incarnations of the only group are not lost.
#[test]
fn requests_wait_for_a_group_that_may_be_back() {
    let within = core::time::Duration::from_secs(5);
    let terms = SchedulerTerms { regroup_within: within, ..SchedulerTerms::default() };
    let waiting = |prefill, decode| Fixture::with(prefill, decode, terms, Box::new(LeastLoaded));
    for node in [0, 10] {
        let mut fixture = waiting(1, 1);
        fixture.submit(1);
        fixture.offer(0, 1);
        fixture.commands();
        fixture.scheduler.handle_lost(at(1), &lost(node));
        if node == 0 {
            fixture.outcome(10, 1, failed(rank_lost(Role::Prefill, 0)));
        }
        fixture.submit(2);
        assert_eq!(fixture.finished(), []);
        assert_eq!(fixture.scheduler.poll_timeout().expect("it does not wait for ever"), at(1) + within);
        if node == 0 {
            fixture.join(0, Role::Prefill);
            assert_eq!(jobs(&fixture.commands()), [(0, 1), (0, 2)]);
        } else {
            fixture.offer(0, 2);
            assert_eq!((fixture.finished(), pairs(&fixture.commands())), (vec![], vec![]));
            fixture.join(10, Role::Decode);
            assert_eq!(pairs(&fixture.commands()), [(10, 2, 1), (10, 3, 2)]);
        }
        // It counts from the loss on, and anew after the next.
        fixture.scheduler.handle_timeout(at(1) + within);
        assert_eq!(fixture.finished(), []);
        fixture.scheduler.handle_lost(at(9), &lost(node));
        if node == 0 {
            fixture.submit(3);
            fixture.scheduler.handle_timeout(at(13));
            assert_eq!(fixture.finished(), []);
            fixture.scheduler.handle_timeout(at(14));
            let nobody = failed(FailReason::NoGroup(Role::Prefill));
            assert_eq!(fixture.finished().last(), Some(&(3, nobody)));
        }
    }
    // Another group is whole: what fits it goes on, what does not fails, and nobody waits.
    let mut fixture = waiting(2, 2);
    fixture.scheduler.handle_lost(at(1), &lost(0));
    assert_eq!(jobs(&fixture.submit(1)), [(1, 1)]);
    assert!(fixture.scheduler.poll_timeout().is_none_or(|due| due > at(1) + within));
}

/// A decode group of two ranks, nodes 10 and 11, that has handover 1.
fn pair_of_ranks() -> Fixture {
    let mut fixture = Fixture::new(1, 0);
    let pair = geometry(2);
    for rank in [0, 1] {
        fixture.scheduler.handle_member(at(0), &member(10 + u64::from(rank), Role::Decode, DECODE, rank, &pair));
    }
    fixture.submit(1);
    assert_eq!(pairs(&fixture.offer(0, 1)), [(10, 1, 1)]);
    fixture.events();
    fixture
}

#[test]
fn a_broken_group_still_owes_its_outcomes() {
    let mut fixture = pair_of_ranks();
    fixture.scheduler.handle_lost(at(1), &lost(11));
    assert_eq!(fixture.commands(), [], "its leader lives and decides");
    fixture.join(12, Role::Decode);
    fixture.commands();
    assert_eq!(pairs(&fixture.outcome(10, 1, failed(engine_failure()))), [(12, 2, 1)]);
    // And when the leader goes too, the scheduler decides.
    let mut fixture = pair_of_ranks();
    fixture.join(12, Role::Decode);
    fixture.scheduler.handle_lost(at(1), &lost(11));
    fixture.scheduler.handle_lost(at(2), &lost(10));
    assert_eq!(pairs(&fixture.commands()), [(12, 2, 1)]);
}

#[test]
fn a_group_that_forms_anew_owes_nothing_of_its_predecessor() {
    let mut fixture = pair_of_ranks();
    fixture.scheduler.handle_lost(at(1), &lost(11));
    let pair = geometry(2);
    let again = Member { epoch: Epoch(2), ..member(11, Role::Decode, DECODE, 1, &pair) };
    fixture.scheduler.handle_member(at(2), &again);
    assert_eq!(pairs(&fixture.commands()), [], "the leader, which survived, has yet to decide");
    // Its word comes when survivor and newcomer are a group again: no credit is given back twice.
    assert_eq!(pairs(&fixture.outcome(10, 1, failed(engine_failure()))), [], "it has yet to meet all its ranks");
    assert_eq!(pairs(&fixture.say(10, Message::Health { trouble: None })), [(10, 2, 1)]);
    fixture.freed(10, 1);
    assert_eq!(fixture.outcome(10, 2, Outcome::Delivered), [known(10, 2), released(0, 1, PrefillView::Confirmed)]);
    assert_eq!(fixture.finished(), [(1, Outcome::Delivered)]);
    fixture.freed(10, 2);
    assert!(fixture.scheduler.vitals().is_quiet(), "{:?}", fixture.scheduler.vitals());
}

#[test]
fn an_offer_of_a_prefill_group_that_formed_anew_does_not_stand() {
    let mut fixture = paired(1, 1);
    fixture.scheduler.handle_lost(at(1), &lost(0));
    fixture.join(0, Role::Prefill);
    fixture.commands();
    let commands = fixture.outcome(10, 1, failed(rank_lost(Role::Prefill, 0)));
    assert_eq!(
        (jobs(&commands), pairs(&commands)),
        (vec![(0, 1)], vec![]),
        "it is prefilled again, nothing is released twice"
    );
    assert_eq!(pairs(&fixture.offer(0, 1)), [(10, 2, 1)]);
}

#[test]
fn a_restart_that_nobody_noticed_is_a_loss() {
    let mut fixture = paired(2, 1);
    let again = Member { epoch: Epoch(2), ..member(10, Role::Decode, DECODE, 0, &geometry(1)) };
    fixture.scheduler.handle_member(at(1), &again);
    assert_eq!(pairs(&fixture.commands()), [], "the only group was gone for a moment");
    let finished = fixture.finished();
    assert!(
        matches!(finished.as_slice(), [(1, Outcome::Failed { reason: FailReason::RankLost { .. } })]),
        "{finished:?}"
    );
    fixture.submit(2);
    assert_eq!(pairs(&fixture.offer(1, 2)), [], "its job is at the other group");
    assert_eq!(pairs(&fixture.offer(0, 2)).len(), 1);
}

#[test]
fn an_offer_that_lapsed_is_made_again_and_not_paired_again() {
    let lapsed = FailReason::Refused(Refusal::LeaseExpired(R1));
    let withdraw = |reason| Message::OfferFailed { request: R1, reason };
    let mut fixture = paired(1, 1);
    assert_eq!(fixture.say(0, withdraw(engine_failure())), [abort(10, 1, Some(engine_failure()))]);
    let commands = fixture.outcome(10, 1, failed(engine_failure()));
    assert_eq!((jobs(&commands), pairs(&commands)), (vec![(0, 1)], vec![]), "there is no offer any more");
    let mut fixture = Fixture::new(1, 1);
    fixture.submit(1);
    assert_eq!(jobs(&fixture.say(0, withdraw(lapsed))), [(0, 1)]);
    assert_eq!(fixture.say(9, withdraw(engine_failure())), [], "not its leader");
    fixture.say(0, withdraw(engine_failure()));
    assert_eq!(fixture.finished(), [(1, failed(engine_failure()))], "another engine would refuse too");
}

#[test]
fn a_cancellation_reaches_every_stage() {
    let cancelled = [(1, Outcome::Cancelled)];
    let mut fixture = Fixture::new(0, 1);
    fixture.submit(1);
    fixture.scheduler.handle_cancel(at(1), R1);
    assert_eq!((fixture.finished(), fixture.commands()), (cancelled.to_vec(), vec![]));

    for offered in [false, true] {
        let mut fixture = Fixture::new(1, 0);
        fixture.submit(1);
        if offered {
            fixture.offer(0, 1);
        }
        fixture.scheduler.handle_cancel(at(1), R1);
        assert_eq!(
            (fixture.finished(), fixture.commands()),
            (cancelled.to_vec(), vec![released(0, 1, PrefillView::Ended)])
        );
        assert_eq!(fixture.offer(0, 1), [], "too late");
    }

    // Paired: the leader has the word, whatever it is.
    for word in [Outcome::Cancelled, Outcome::Delivered, failed(engine_failure())] {
        let mut fixture = paired(1, 1);
        fixture.events();
        fixture.scheduler.handle_cancel(at(1), R1);
        assert_eq!((fixture.finished(), fixture.commands()), (vec![], vec![abort(10, 1, None)]));
        fixture.outcome(10, 1, word.clone());
        let end = if word.is_delivered() { Outcome::Delivered } else { Outcome::Cancelled };
        assert_eq!(fixture.finished(), [(1, end)]);
        fixture.scheduler.handle_cancel(at(1), R1);
        assert_eq!((fixture.finished(), fixture.commands()), (vec![], vec![]));
    }
}

#[test]
fn every_stage_has_a_deadline() {
    let terms = SchedulerTerms::default();
    let late = |awaited: Awaited, waited: core::time::Duration| {
        let reason = FailReason::Deadline { awaited, waited_ms: waited.as_millis() as u64 };
        vec![(1, failed(reason))]
    };
    let mut fixture = Fixture::new(0, 0);
    fixture.submit(1);
    assert_eq!(fixture.scheduler.poll_timeout(), Some(at(0) + terms.queue_within));
    fixture.scheduler.handle_timeout(at(0) + terms.queue_within);
    assert_eq!(fixture.finished(), late(Awaited::Pairing, terms.queue_within));

    let mut fixture = Fixture::new(1, 0);
    fixture.submit(1);
    fixture.scheduler.handle_timeout(at(0) + terms.prefill_within);
    assert_eq!(fixture.finished(), late(Awaited::Offer, terms.prefill_within));

    let mut fixture = Fixture::new(1, 0);
    fixture.submit(1);
    fixture.offer(0, 1);
    fixture.scheduler.handle_timeout(at(1) + terms.pair_within);
    assert_eq!(fixture.finished(), late(Awaited::Pairing, terms.pair_within));

    let mut fixture = paired(1, 1);
    fixture.events();
    fixture.scheduler.handle_timeout(at(1) + terms.outcome_within);
    let reason = FailReason::Deadline { awaited: Awaited::Outcome, waited_ms: terms.outcome_within.as_millis() as u64 };
    let commands = fixture.commands();
    assert!(commands.contains(&abort(10, 1, Some(reason))), "{commands:?}");
    assert_eq!(fixture.finished(), late(Awaited::Outcome, terms.outcome_within));
    assert_eq!(fixture.outcome(10, 1, Outcome::Delivered), [known(10, 1)], "the answer was given");
    assert!(!fixture.scheduler.vitals().is_quiet(), "its blocks are still out");
    fixture.freed(10, 1);
    assert!(fixture.scheduler.vitals().is_quiet(), "{:?}", fixture.scheduler.vitals());
}

#[test]
fn leases_are_renewed_from_the_first_job_on() {
    let mut fixture = Fixture::with(1, 0, SchedulerTerms::default(), Box::new(LeastLoaded));
    fixture.submit(1);
    assert_eq!(fixture.scheduler.poll_timeout(), Some(at(10)), "ranks open at different times");
    fixture.scheduler.handle_timeout(at(10));
    assert_eq!(fixture.commands(), [send(0, Message::Renew { requests: vec![R1] })]);
    assert_eq!(fixture.scheduler.poll_timeout(), Some(at(20)));
}

#[test]
fn nonsense_is_ignored() {
    let mut fixture = paired(1, 1);
    fixture.events();
    let stranger = OfferSummary { request: RequestId(9), dp: 0, steps: vec![4] };
    assert_eq!(fixture.say(0, Message::Offered(stranger)), []);
    assert_eq!(fixture.say(10, Message::Started { handover: HandoverId(9) }), []);
    assert_eq!(fixture.outcome(10, 9, Outcome::Delivered), [known(10, 9)], "or its leader would tell it for ever");
    assert_eq!(fixture.say(99, Message::Holds { added: vec![1], removed: vec![] }), []);
    assert_eq!(fixture.events(), []);
    fixture.say(10, Message::Confirmed { handover: H1 });
    assert!(matches!(fixture.events().as_slice(), [Event::Ignored { from: NodeId(10), .. }]));
}

#[test]
fn a_leader_that_was_lost_is_forgotten_with_its_group() {
    let mut fixture = Fixture::new(1, 0);
    let join = |fixture: &mut Fixture, node, rank| {
        let member = member(node, Role::Decode, DECODE, rank, &geometry(2));
        fixture.scheduler.handle_member(at(0), &member);
    };
    join(&mut fixture, 20, 0);
    join(&mut fixture, 21, 1);
    fixture.scheduler.handle_lost(at(1), &lost(21));
    fixture.scheduler.handle_lost(at(1), &lost(20));
    // Other nodes are that group now, and the old leader's node serves as a prefill group.
    join(&mut fixture, 30, 0);
    join(&mut fixture, 31, 1);
    fixture.join(20, Role::Prefill);
    fixture.commands();
    fixture.submit(1);
    let said = fixture.offer(0, 1);
    let said = pairs(&said);
    assert_eq!(said.len(), 1);
    fixture.scheduler.handle_lost(at(2), &lost(20));
    fixture.scheduler.handle_timeout(at(5));
    let again = pairs(&fixture.commands());
    assert_eq!(again, [], "its group is whole and works on it");
}
