//! The leaders: ranks that cannot be reached for a while, ranks in trouble, and schedulers that know nothing.

use core::time::Duration;
use std::sync::Arc;

use super::kit::*;
use crate::protocol::{
    Command, DeadlineTerms, DecodeLeader, Event, FailReason, FetchJob, Message, Outbox, Outcome, OutcomeReport,
    PrefillJob, PrefillLeader, PrefillView, RequestSpec, Role, StandingHandovers, StandingOffer,
};
use crate::{HandoverId, NodeId, Rank, RequestId};

const SCHEDULER: u64 = 100;
const RANKS: [u64; 2] = [20, 21];
const H3: HandoverId = HandoverId(3);

fn prefill_leader() -> PrefillLeader {
    let mut leader = PrefillLeader::new(PREFILL, geometry(2), NodeId(SCHEDULER), Duration::from_secs(60));
    for (rank, node) in RANKS.into_iter().enumerate() {
        leader.handle_rank(Rank(rank as u32), NodeId(node));
        leader.handle_peer_up(NodeId(node));
    }
    commands(leader.outbox());
    events(leader.outbox());
    leader
}

fn decode_leader() -> DecodeLeader {
    let mut leader = DecodeLeader::new(DECODE, geometry(2), NodeId(SCHEDULER), DeadlineTerms::default());
    for (rank, node) in RANKS.into_iter().enumerate() {
        leader.handle_rank(Rank(rank as u32), NodeId(node));
        leader.handle_message(at(0), NodeId(node), Message::Holding { handovers: Vec::new() });
    }
    commands(leader.outbox());
    events(leader.outbox());
    leader
}

fn job(request: u64) -> Message {
    Message::Prefill(PrefillJob { spec: spec(request), dp: 0, trace: None })
}

fn parted(role: Role) -> FailReason {
    let group = if role == Role::Prefill { PREFILL } else { DECODE };
    FailReason::RankLost { role, group, rank: Rank(1), node: NodeId(21), cause: "the cable".into() }
}

fn health(trouble: Option<&str>) -> Command {
    send(SCHEDULER, Message::Health { trouble: trouble.map(str::to_owned) })
}

const UNMET: Option<&str> = Some("1 of 2 ranks are met");
const UNREACHED: Option<&str> = Some("rank-1 (node-21) cannot be reached: the cable");

fn troubles(outbox: &mut Outbox) -> Vec<Option<String>> {
    let trouble = |event| match event {
        Event::Health { trouble } => Some(trouble),
        _ => None,
    };
    events(outbox).into_iter().filter_map(trouble).collect()
}

#[test]
fn a_prefill_rank_that_cannot_be_reached_fails_what_was_offered_and_gets_nothing() {
    let mut leader = prefill_leader();
    leader.handle_message(at(0), NodeId(SCHEDULER), job(1));
    commands(leader.outbox());
    leader.handle_peer_down(at(1), NodeId(99), "the cable");
    assert_eq!(commands(leader.outbox()), [], "not one of ours");
    leader.handle_peer_down(at(1), NodeId(21), "the cable");
    let ended = |to| send(to, Message::Release { request: R1, view: PrefillView::InDoubt });
    let failed = |request, reason| send(SCHEDULER, Message::OfferFailed { request: RequestId(request), reason });
    let heard = commands(leader.outbox());
    assert_eq!(heard, [health(UNREACHED), ended(20), ended(21), failed(1, parted(Role::Prefill))]);
    assert_eq!(troubles(leader.outbox()), [UNREACHED.map(str::to_owned)]);
    assert!(leader.vitals().is_quiet(), "{:?}", leader.vitals());
    leader.handle_message(at(2), NodeId(SCHEDULER), job(2));
    assert_eq!(commands(leader.outbox()), [failed(2, parted(Role::Prefill))]);
    // Members are listed again and again; that does not make it reachable.
    leader.handle_rank(Rank(1), NodeId(21));
    leader.handle_message(at(2), NodeId(SCHEDULER), job(2));
    assert_eq!(commands(leader.outbox()), [failed(2, parted(Role::Prefill))]);
    leader.handle_peer_up(NodeId(99));
    assert_eq!(commands(leader.outbox()), []);
    leader.handle_peer_up(NodeId(21));
    assert_eq!(commands(leader.outbox()), [health(None)]);
    leader.handle_message(at(3), NodeId(SCHEDULER), job(2));
    assert_eq!(commands(leader.outbox()), [send(20, job(2)), send(21, job(2))]);
    // Another node in its place is not parted.
    leader.handle_peer_down(at(4), NodeId(21), "the cable");
    commands(leader.outbox());
    leader.handle_rank(Rank(1), NodeId(22));
    leader.handle_message(at(5), NodeId(SCHEDULER), job(3));
    assert_eq!(commands(leader.outbox()), [health(UNMET), send(20, job(3)), send(22, job(3))]);
}

#[test]
fn a_scheduler_that_is_met_hears_of_every_offer() {
    let mut leader = prefill_leader();
    leader.handle_scheduler();
    assert_eq!(commands(leader.outbox()), [health(None)], "there is nothing else to tell");
    for request in 1..=3 {
        leader.handle_message(at(0), NodeId(SCHEDULER), job(request));
    }
    let say = |leader: &mut PrefillLeader, from: u64, message| leader.handle_message(at(1), NodeId(from), message);
    let opened = |request| Message::RankOpened { request: RequestId(request), steps: vec![2, 4] };
    let ready = |request, seconds| Message::RankReady { request: RequestId(request), at: at(seconds) };
    say(&mut leader, 20, opened(1));
    for node in RANKS {
        say(&mut leader, node, opened(2));
        say(&mut leader, node, opened(3));
        say(&mut leader, node, ready(3, node));
    }
    say(&mut leader, 20, ready(2, 5));
    leader.handle_peer_down(at(2), NodeId(99), "the cable");
    commands(leader.outbox());
    leader.handle_scheduler();
    let offer =
        |request, steps: Option<Vec<u32>>, ready_at| StandingOffer { spec: spec(request), dp: 0, steps, ready_at };
    let all = vec![offer(1, None, None), offer(2, Some(vec![2, 4]), None), offer(3, Some(vec![2, 4]), Some(at(21)))];
    assert_eq!(commands(leader.outbox()), [send(SCHEDULER, Message::StandingOffers(all)), health(None)]);
    say(&mut leader, 21, Message::Health { trouble: Some("full".into()) });
    let trouble = Some("rank-1 (node-21): full");
    assert_eq!(commands(leader.outbox()), [health(trouble)]);
    for request in 1..=3 {
        let view = PrefillView::Ended;
        say(&mut leader, SCHEDULER, Message::Release { request: RequestId(request), view });
    }
    commands(leader.outbox());
    leader.handle_scheduler();
    assert_eq!(commands(leader.outbox()), [health(trouble)], "it knows nothing of that either");
}

#[test]
fn the_group_is_in_trouble_while_any_rank_is() {
    let mut leader = decode_leader();
    let say = |leader: &mut DecodeLeader, from, trouble: Option<&str>| {
        leader.handle_message(at(1), NodeId(from), Message::Health { trouble: trouble.map(str::to_owned) });
        commands(leader.outbox())
    };
    assert_eq!(say(&mut leader, 20, None), [], "no news");
    assert_eq!(say(&mut leader, 99, Some("full")), [], "a stranger");
    assert_eq!(say(&mut leader, 21, Some("full")), [health(Some("rank-1 (node-21): full"))]);
    assert_eq!(say(&mut leader, 21, Some("full")), [], "once");
    assert_eq!(say(&mut leader, 20, Some("stuck")), [health(Some("rank-0 (node-20): stuck"))]);
    assert_eq!(say(&mut leader, 20, None), [health(Some("rank-1 (node-21): full"))]);
    leader.handle_peer_down(at(2), NodeId(21), "the cable");
    assert_eq!(commands(leader.outbox()), [health(UNREACHED)]);
    leader.handle_message(at(2), NodeId(21), Message::Holding { handovers: vec![] });
    assert_eq!(commands(leader.outbox()), [health(None)], "it will say anew what troubles it");
    assert_eq!(troubles(leader.outbox()).len(), 5);
    say(&mut leader, 21, Some("full"));
    leader.handle_lost(at(3), &lost(21));
    assert_eq!(say(&mut leader, 20, None), [health(UNMET)], "whoever is lost is missing");
    leader.handle_rank(Rank(1), NodeId(21));
    assert_eq!(say(&mut leader, 20, None), [], "it has yet to say what it holds");
    leader.handle_message(at(4), NodeId(21), Message::Holding { handovers: vec![] });
    assert_eq!(commands(leader.outbox()), [health(None)]);
}

/// A handover whose rank 0 is done, and another on which both still work.
fn at_work() -> DecodeLeader {
    let mut leader = decode_leader();
    for handover in [H1, H2] {
        leader.handle_message(at(0), NodeId(SCHEDULER), Message::Pair(pairing(handover, &[4])));
    }
    let done = Message::RankDone { handover: H1, result: Ok(vec![]) };
    leader.handle_message(at(0), NodeId(21), done);
    commands(leader.outbox());
    leader
}

fn outcome(handover: HandoverId, seconds: u64, outcome: Outcome) -> Command {
    send(SCHEDULER, Message::Outcome(OutcomeReport { handover, outcome, at: at(seconds), paths: vec![] }))
}

fn settles(to: u64, handover: HandoverId, outcome: Outcome) -> Command {
    send(to, Message::Settled { handover, outcome })
}

#[test]
fn a_decode_rank_that_cannot_be_reached_fails_what_it_still_owes() {
    let mut leader = at_work();
    leader.handle_peer_down(at(1), NodeId(21), "the cable");
    let failed = || Outcome::Failed { reason: parted(Role::Decode) };
    let ends = [settles(20, H2, failed()), settles(21, H2, failed()), outcome(H2, 1, failed()), health(UNREACHED)];
    assert_eq!(commands(leader.outbox()), ends, "what it has done and said may still be delivered");
    leader.handle_message(at(2), NodeId(SCHEDULER), Message::Pair(pairing(H3, &[4])));
    let untold = [outcome(H3, 2, failed()), send(SCHEDULER, Message::Freed { handover: H3 })];
    assert_eq!(commands(leader.outbox()), untold, "no rank has heard of it");
    leader.handle_message(at(3), NodeId(20), Message::RankDone { handover: H1, result: Ok(vec![]) });
    let delivered = Outcome::Delivered;
    let ends =
        [settles(20, H1, delivered.clone()), settles(21, H1, delivered.clone()), outcome(H1, 3, delivered.clone())];
    assert_eq!(commands(leader.outbox()), ends);

    // Whatever was said last is said again once they meet.
    let unknown = HandoverId(77);
    leader.handle_message(
        at(4),
        NodeId(99),
        Message::Holding { handovers: vec![(H1, R1, TOKENS), (unknown, RequestId(7), 5)] },
    );
    assert_eq!(commands(leader.outbox()), [], "a stranger");
    leader.handle_message(at(4), NodeId(20), Message::Freed { handover: H2 });
    assert_eq!(commands(leader.outbox()), []);
    leader.handle_message(
        at(4),
        NodeId(21),
        Message::Holding { handovers: vec![(H1, R1, TOKENS), (unknown, RequestId(7), 5)] },
    );
    let nobody = Outcome::Failed { reason: FailReason::NoGroup(Role::Decode) };
    let foreign = RequestSpec { request: RequestId(7), tokens: 5, prefix: Arc::default(), prefix_tokens: 0 };
    let held = vec![(H1, spec(1), true), (unknown, foreign, true)];
    let standing = StandingHandovers { held, ..StandingHandovers::default() };
    let resumed = [
        send(SCHEDULER, Message::Freed { handover: H2 }),
        settles(21, H1, delivered),
        settles(21, unknown, nobody),
        send(SCHEDULER, Message::StandingHandovers(Box::new(standing))),
        health(None),
    ];
    assert_eq!(commands(leader.outbox()), resumed, "it has nothing of the second any more");
    for node in RANKS {
        leader.handle_message(at(5), NodeId(node), Message::Freed { handover: H1 });
    }
    assert_eq!(commands(leader.outbox()), [send(SCHEDULER, Message::Freed { handover: H1 })]);
    // An earlier leader's handover, of which this one tells the scheduler until its blocks are back.
    leader.handle_message(at(5), NodeId(21), Message::Freed { handover: unknown });
    assert_eq!(commands(leader.outbox()), [send(SCHEDULER, Message::Freed { handover: unknown })]);
    assert!(leader.vitals().is_quiet(), "{:?}", leader.vitals());
}

#[test]
fn a_scheduler_that_is_met_hears_of_every_handover() {
    let mut leader = at_work();
    leader.handle_message(at(1), NodeId(SCHEDULER), Message::Pair(pairing(H3, &[4])));
    for handover in [H2, H3] {
        leader.handle_message(at(1), NodeId(SCHEDULER), Message::Abort { handover, reason: None });
    }
    leader.handle_message(at(1), NodeId(SCHEDULER), Message::OutcomesKnown { handovers: vec![H2, HandoverId(77)] });
    for node in RANKS {
        leader.handle_message(at(1), NodeId(node), Message::Freed { handover: H3 });
    }
    commands(leader.outbox());
    leader.handle_scheduler();
    let report = OutcomeReport { handover: H3, outcome: Outcome::Cancelled, at: at(1), paths: vec![] };
    let standing = |under_way, decided, held| {
        send(SCHEDULER, Message::StandingHandovers(Box::new(StandingHandovers { under_way, decided, held })))
    };
    let decided = vec![(pairing(H3, &[4]), report)];
    let all = standing(vec![pairing(H1, &[4])], decided, vec![(H2, spec(1), false)]);
    assert_eq!(commands(leader.outbox()), [all, health(None)]);
    // Once everything is known and back there is nothing to tell.
    leader.handle_message(at(2), NodeId(20), Message::RankDone { handover: H1, result: Ok(vec![]) });
    commands(leader.outbox());
    leader.handle_scheduler();
    let report = |handover, outcome, seconds| OutcomeReport { handover, outcome, at: at(seconds), paths: vec![] };
    let decided = vec![
        (pairing(H1, &[4]), report(H1, Outcome::Delivered, 2)),
        (pairing(H3, &[4]), report(H3, Outcome::Cancelled, 1)),
    ];
    let held = vec![(H1, spec(1), true), (H2, spec(1), false)];
    assert_eq!(commands(leader.outbox()), [standing(vec![], decided, held), health(None)]);
    leader.handle_message(at(3), NodeId(SCHEDULER), Message::OutcomesKnown { handovers: vec![H1, H3] });
    for handover in [H1, H2] {
        for node in RANKS {
            leader.handle_message(at(3), NodeId(node), Message::Freed { handover });
        }
    }
    commands(leader.outbox());
    leader.handle_scheduler();
    assert_eq!(commands(leader.outbox()), [health(None)]);
    // An earlier scheduler's pairing that comes late is no second handover.
    leader.handle_message(at(4), NodeId(SCHEDULER), Message::Pair(pairing(H1, &[4])));
    assert_eq!(commands(leader.outbox()), []);
    let fetch = Message::Fetch(FetchJob { pairing: pairing(HandoverId(4), &[4]), dp: 0 });
    leader.handle_message(at(4), NodeId(SCHEDULER), Message::Pair(pairing(HandoverId(4), &[4])));
    assert_eq!(commands(leader.outbox()), [send(20, fetch.clone()), send(21, fetch)]);
}

#[test]
fn what_a_rank_had_reported_is_gone_with_the_incarnation_that_had_it() {
    let mut leader = decode_leader();
    leader.handle_message(at(0), NodeId(SCHEDULER), Message::Pair(pairing(H1, &[4])));
    leader.handle_message(at(1), NodeId(21), Message::RankDone { handover: H1, result: Ok(vec![]) });
    // Its process dies; its next incarnation is met before the directory tells of the loss, or without.
    leader.handle_peer_down(at(2), NodeId(21), "another session replaced it");
    leader.handle_rank(Rank(1), NodeId(21));
    events(leader.outbox());
    leader.handle_message(at(2), NodeId(21), Message::Holding { handovers: Vec::new() });
    let settled = events(leader.outbox());
    assert!(
        matches!(settled.as_slice(), [Event::Settled { report }, ..] if matches!(report.outcome, Outcome::Failed { .. })),
        "{settled:?}"
    );
    leader.handle_message(at(3), NodeId(20), Message::RankDone { handover: H1, result: Ok(vec![]) });
    assert_eq!(events(leader.outbox()), [], "it is decided");

    // The same incarnation still has it.
    let mut leader = decode_leader();
    leader.handle_message(at(0), NodeId(SCHEDULER), Message::Pair(pairing(H2, &[4])));
    leader.handle_message(at(1), NodeId(21), Message::RankDone { handover: H2, result: Ok(vec![]) });
    leader.handle_peer_down(at(2), NodeId(21), "the cable");
    leader.handle_rank(Rank(1), NodeId(21));
    leader.handle_message(at(2), NodeId(21), Message::Holding { handovers: vec![(H2, R1, TOKENS)] });
    leader.handle_message(at(3), NodeId(20), Message::RankDone { handover: H2, result: Ok(vec![]) });
    let settled = events(leader.outbox());
    let delivered = |event: &Event| matches!(event, Event::Settled { report } if report.outcome.is_delivered());
    assert!(settled.last().is_some_and(delivered), "{settled:?}");
}
