//! The leaders: a group speaks when all its ranks have, and fails when one does.

use core::time::Duration;
use std::sync::Arc;

use super::kit::*;
use crate::protocol::{
    Awaited, Command, DeadlineTerms, DecodeLeader, Event, FailReason, FetchJob, Message, OfferSummary, Outbox, Outcome,
    OutcomeReport, PathReport, PrefillJob, PrefillLeader, PrefillView, Refusal, RequestSpec, Role,
};
use crate::{Direction, GroupGeometry, HandoverId, NodeId, Parallel, Rank, RequestId, TransportKind};

const SCHEDULER: u64 = 100;
const RANKS: [u64; 2] = [20, 21];

fn prefill_leader(geometry: Arc<GroupGeometry>) -> PrefillLeader {
    let mut leader = PrefillLeader::new(PREFILL, geometry, NodeId(SCHEDULER), Duration::from_secs(60));
    for (rank, node) in RANKS.into_iter().enumerate() {
        leader.handle_rank(Rank(rank as u32), NodeId(node));
        leader.handle_peer_up(NodeId(node));
    }
    commands(leader.outbox());
    events(leader.outbox());
    leader
}

fn decode_leader(geometry: Arc<GroupGeometry>) -> DecodeLeader {
    let mut leader = DecodeLeader::new(DECODE, geometry, NodeId(SCHEDULER), DeadlineTerms::default());
    for (rank, node) in RANKS.into_iter().enumerate() {
        leader.handle_rank(Rank(rank as u32), NodeId(node));
        leader.handle_message(at(0), NodeId(node), Message::Holding { handovers: Vec::new() });
    }
    commands(leader.outbox());
    events(leader.outbox());
    leader
}

/// Probes ask a leader that has just met the scheduler; it had told nobody that its group was never whole.
#[test]
fn a_group_that_was_never_whole_says_so_to_whoever_watches() {
    let health = |trouble: Option<&str>| Event::Health { trouble: trouble.map(str::to_owned) };
    let mut leader = PrefillLeader::new(PREFILL, geometry(2), NodeId(SCHEDULER), Duration::from_secs(60));
    leader.handle_rank(Rank(0), NodeId(RANKS[0]));
    leader.handle_scheduler();
    assert_eq!(events(leader.outbox()), [health(Some("1 of 2 ranks are met"))]);
    leader.handle_scheduler();
    assert_eq!(events(leader.outbox()), [], "once");
    leader.handle_rank(Rank(1), NodeId(RANKS[1]));
    leader.handle_peer_up(NodeId(RANKS[1]));
    assert_eq!(events(leader.outbox()), [health(None)]);
}

/// Two attention-data-parallel parts of one rank each.
fn divided() -> Arc<GroupGeometry> {
    let parallel = Parallel { tp: 2, adp: 2, ..Parallel::default() };
    Arc::new(GroupGeometry { parallel, ..(*geometry(2)).clone() })
}

fn job(request: u64) -> Message {
    Message::Prefill(PrefillJob { spec: spec(request), dp: 0, trace: None })
}

fn opened() -> Message {
    Message::RankOpened { request: R1, steps: vec![4] }
}

fn path(source: u32) -> PathReport {
    PathReport {
        source_group: PREFILL,
        source: Rank(source),
        destination_group: DECODE,
        destination: Rank(0),
        kind: TransportKind::Sim,
        device: String::new(),
        direction: Direction::Pull,
        bytes: 1,
        pieces: 1,
    }
}

fn report(outcome: Outcome, seconds: u64, paths: Vec<PathReport>) -> OutcomeReport {
    OutcomeReport { handover: H1, outcome, at: at(seconds), paths }
}

/// What a decided handover costs in messages: the ranks and the scheduler. Its credit comes back with the ranks' blocks.
fn decided(outcome: Outcome, seconds: u64, paths: Vec<PathReport>) -> Vec<Command> {
    let word = |to| send(to, Message::Settled { handover: H1, outcome: outcome.clone() });
    let mut commands: Vec<Command> = RANKS.into_iter().map(word).collect();
    commands.push(send(SCHEDULER, Message::Outcome(report(outcome.clone(), seconds, paths))));
    commands
}

/// Whatever the outcome was, the credit is the scheduler's again once both ranks' blocks are their engines'.
fn comes_back(leader: &mut DecodeLeader) {
    let freed = Message::Freed { handover: H1 };
    for from in [RANKS[0], RANKS[0], 99, RANKS[1]] {
        assert_eq!(commands(leader.outbox()), [], "a rank has yet to give its blocks back");
        leader.handle_message(at(9), NodeId(from), freed.clone());
    }
    assert_eq!(commands(leader.outbox()), [send(SCHEDULER, freed)]);
    assert!(leader.vitals().is_quiet(), "{:?}", leader.vitals());
}

fn outcomes(outbox: &mut Outbox) -> usize {
    events(outbox).iter().filter(|event| matches!(event, Event::Settled { .. })).count()
}

#[test]
fn a_group_offers_when_every_rank_does() {
    let mut leader = prefill_leader(geometry(2));
    let say = |leader: &mut PrefillLeader, from, message| {
        leader.handle_message(at(1), NodeId(from), message);
        commands(leader.outbox())
    };
    assert_eq!(say(&mut leader, SCHEDULER, job(1)), [send(20, job(1)), send(21, job(1))]);
    assert_eq!(leader.poll_timeout(), Some(at(61)));
    assert_eq!(say(&mut leader, 20, opened()), []);
    assert_eq!(say(&mut leader, 20, opened()), [], "one rank does not speak for two");
    assert_eq!(say(&mut leader, 99, opened()), [], "a stranger does not either");
    let summary = OfferSummary { request: R1, dp: 0, steps: vec![4] };
    assert_eq!(say(&mut leader, 21, opened()), [send(SCHEDULER, Message::Offered(summary))]);
    assert_eq!(leader.poll_timeout(), None);
    let ready = |seconds| Message::RankReady { request: R1, at: at(seconds) };
    assert_eq!(say(&mut leader, 21, ready(9)), []);
    assert_eq!(say(&mut leader, 20, ready(5)), [send(SCHEDULER, Message::OfferReady { request: R1, at: at(9) })]);
    let renew = Message::Renew { requests: vec![R1, RequestId(7)] };
    let renewed = |to| send(to, Message::Renew { requests: vec![R1] });
    assert_eq!(say(&mut leader, SCHEDULER, renew), [renewed(20), renewed(21)]);
    let release = Message::Release { request: R1, view: PrefillView::Confirmed };
    assert_eq!(say(&mut leader, SCHEDULER, release.clone()), [send(20, release.clone()), send(21, release.clone())]);
    assert_eq!(say(&mut leader, SCHEDULER, release), [], "once");
}

/// Offers of one part would be lost with a rank of another part that leaves.
#[test]
fn a_rank_may_leave_once_its_group_offers_nothing() {
    let mut leader = prefill_leader(divided());
    let say = |leader: &mut PrefillLeader, from, message| {
        leader.handle_message(at(1), NodeId(from), message);
        commands(leader.outbox())
    };
    let trouble = Message::Health { trouble: Some("it leaves".into()) };
    let may_leave = || send(21, Message::Renew { requests: Vec::new() });
    say(&mut leader, SCHEDULER, job(1));
    let said = say(&mut leader, 21, trouble.clone());
    assert!(
        matches!(said.as_slice(), [Command::Send { message: Message::Health { trouble: Some(_) }, .. }]),
        "{said:?}"
    );
    // The scheduler may not have heard of it.
    let refused = say(&mut leader, SCHEDULER, job(2));
    assert!(
        matches!(
            refused.as_slice(),
            [Command::Send { message: Message::OfferFailed { reason: FailReason::Unhealthy(_), .. }, .. }]
        ),
        "{refused:?}"
    );
    let release = Message::Release { request: R1, view: PrefillView::Confirmed };
    assert_eq!(say(&mut leader, SCHEDULER, release.clone()), [send(20, release), may_leave()]);
    // The scheduler has been told already; who asks again is answered.
    assert_eq!(say(&mut leader, 21, trouble.clone()), [may_leave()]);
    // Where no rank has a part of its own, nothing is to be said: every offer is one of the leaving rank's, too.
    let mut leader = prefill_leader(geometry(2));
    assert_eq!(say(&mut leader, 21, trouble).len(), 1);
}

#[test]
fn one_rank_that_fails_fails_the_offer_once() {
    let ended = |to| send(to, Message::Release { request: R1, view: PrefillView::InDoubt });
    let failed = |reason| send(SCHEDULER, Message::OfferFailed { request: R1, reason });
    let start = || {
        let mut leader = prefill_leader(geometry(2));
        leader.handle_message(at(0), NodeId(SCHEDULER), job(1));
        commands(leader.outbox());
        leader
    };
    let mut leader = start();
    let reason = FailReason::Engine("no".into());
    for _ in 0..2 {
        leader.handle_message(at(0), NodeId(21), Message::RankFailed { request: R1, reason: reason.clone() });
    }
    assert_eq!(commands(leader.outbox()), [ended(20), ended(21), failed(reason)]);

    let mut leader = start();
    leader.handle_message(at(0), NodeId(20), opened());
    leader.handle_message(at(0), NodeId(21), Message::RankOpened { request: R1, steps: vec![2, 4] });
    let answer = commands(leader.outbox());
    assert!(matches!(
        answer.last(),
        Some(Command::Send { message: Message::OfferFailed { reason: FailReason::Mismatch(_), .. }, .. })
    ));

    let mut leader = start();
    leader.handle_timeout(at(59));
    assert_eq!(commands(leader.outbox()), []);
    leader.handle_timeout(at(60));
    let late = FailReason::Deadline { awaited: Awaited::Offer, waited_ms: 60_000 };
    assert_eq!(commands(leader.outbox()), [ended(20), ended(21), failed(late)]);

    let mut leader = start();
    leader.handle_lost(at(0), &lost(99));
    assert_eq!(commands(leader.outbox()), [], "not one of ours");
    leader.handle_lost(at(0), &lost(21));
    let (role, group, rank, node) = (Role::Prefill, PREFILL, Rank(1), NodeId(21));
    let reason = FailReason::RankLost { role, group, rank, node, cause: "it crashed".into() };
    let unmet = send(SCHEDULER, Message::Health { trouble: Some("1 of 2 ranks are met".into()) });
    assert_eq!(commands(leader.outbox()), [unmet, ended(20), failed(reason)], "or it would get the request again");
    leader.handle_message(at(1), NodeId(SCHEDULER), job(1));
    assert_eq!(commands(leader.outbox()), [failed(FailReason::NoGroup(Role::Prefill))]);
}

#[test]
fn requests_go_to_the_least_loaded_part() {
    let mut leader = prefill_leader(divided());
    let mut chosen = Vec::new();
    for request in 1..=3 {
        leader.handle_message(at(0), NodeId(SCHEDULER), job(request));
        for command in commands(leader.outbox()) {
            if let Command::Send { to, message: Message::Prefill(job) } = command {
                chosen.push((job.dp, to.0));
            }
        }
        if request == 2 {
            leader.handle_message(
                at(0),
                NodeId(SCHEDULER),
                Message::Release { request: RequestId(2), view: PrefillView::Ended },
            );
            commands(leader.outbox());
        }
    }
    assert_eq!(chosen, [(0, 20), (1, 21), (1, 21)]);
    leader.handle_message(at(0), NodeId(SCHEDULER), job(1));
    assert_eq!(commands(leader.outbox()), [], "a new scheduler asks for what the old one had asked for");
    for node in [20, 20] {
        leader.handle_message(at(0), NodeId(node), opened());
    }
    let offered = send(SCHEDULER, Message::Offered(OfferSummary { request: R1, dp: 0, steps: vec![4] }));
    assert_eq!(commands(leader.outbox()), std::slice::from_ref(&offered));
    leader.handle_message(at(0), NodeId(SCHEDULER), job(1));
    assert_eq!(commands(leader.outbox()), [offered], "and is told what that was");
    let other = RequestSpec { tokens: TOKENS + 1, ..spec(1) };
    leader.handle_message(at(0), NodeId(SCHEDULER), Message::Prefill(PrefillJob { spec: other, dp: 0, trace: None }));
    let reason = FailReason::Refused(Refusal::Duplicate(R1));
    assert_eq!(commands(leader.outbox()), [send(SCHEDULER, Message::OfferFailed { request: R1, reason })]);
}

#[test]
fn a_handover_is_delivered_when_every_rank_has_its_part() {
    let mut leader = decode_leader(geometry(2));
    let say = |leader: &mut DecodeLeader, from, message| {
        leader.handle_message(at(1), NodeId(from), message);
        commands(leader.outbox())
    };
    let fetch = FetchJob { pairing: pairing(H1, &[4]), dp: 0 };
    let fetches = [send(20, Message::Fetch(fetch.clone())), send(21, Message::Fetch(fetch))];
    assert_eq!(say(&mut leader, SCHEDULER, Message::Pair(pairing(H1, &[4]))), fetches);
    assert_eq!(say(&mut leader, SCHEDULER, Message::Pair(pairing(H1, &[4]))), [], "the same again changes nothing");
    let started = Message::Started { handover: H1 };
    assert_eq!(say(&mut leader, 20, started.clone()), [send(SCHEDULER, started.clone())]);
    assert_eq!(say(&mut leader, 21, started), [], "the first transfer starts it");
    let rank_done = |source| Message::RankDone { handover: H1, result: Ok(vec![path(source)]) };
    assert_eq!(say(&mut leader, 20, rank_done(0)), []);
    assert_eq!(say(&mut leader, 20, rank_done(0)), [], "one rank does not speak for two");
    assert_eq!(say(&mut leader, 99, rank_done(0)), []);
    assert_eq!(say(&mut leader, 21, rank_done(1)), decided(Outcome::Delivered, 1, vec![path(0), path(1)]));
    assert_eq!((outcomes(leader.outbox()), leader.poll_timeout()), (1, None));
    for late in [
        rank_done(0),
        Message::RankDone { handover: H1, result: Err(FailReason::NoGroup(Role::Decode)) },
        Message::Abort { handover: H1, reason: None },
        Message::Pair(pairing(H1, &[4])),
    ] {
        assert_eq!(say(&mut leader, 20, late.clone()), [], "decided once: {late:?}");
    }
    let freed = Message::Freed { handover: H1 };
    assert_eq!(say(&mut leader, 20, freed.clone()), []);
    assert_eq!(say(&mut leader, 20, freed.clone()), []);
    assert_eq!(say(&mut leader, 21, freed.clone()), [send(SCHEDULER, freed)]);
    let holds = Message::Holds { added: vec![1], removed: vec![] };
    assert_eq!(say(&mut leader, 20, holds.clone()), [send(SCHEDULER, holds)]);
}

#[test]
fn every_other_end_is_decided_once_too() {
    let start = || {
        let mut leader = decode_leader(geometry(2));
        leader.handle_message(at(0), NodeId(SCHEDULER), Message::Pair(pairing(H1, &[4])));
        commands(leader.outbox());
        leader
    };
    let reason = FailReason::Engine("no".into());
    let failed = Outcome::Failed { reason: reason.clone() };

    let mut leader = start();
    leader.handle_message(at(1), NodeId(20), Message::RankDone { handover: H1, result: Ok(vec![path(0)]) });
    for _ in 0..2 {
        leader.handle_message(at(1), NodeId(21), Message::RankDone { handover: H1, result: Err(reason.clone()) });
    }
    assert_eq!(commands(leader.outbox()), decided(failed.clone(), 1, vec![path(0)]));
    assert_eq!(outcomes(leader.outbox()), 1);
    comes_back(&mut leader);

    let mut leader = start();
    leader.handle_message(at(1), NodeId(SCHEDULER), Message::Abort { handover: H1, reason: None });
    leader.handle_message(at(1), NodeId(SCHEDULER), Message::Abort { handover: H1, reason: Some(reason.clone()) });
    assert_eq!(commands(leader.outbox()), decided(Outcome::Cancelled, 1, vec![]));
    comes_back(&mut leader);

    let mut leader = start();
    leader.handle_message(at(1), NodeId(SCHEDULER), Message::Abort { handover: H1, reason: Some(reason) });
    assert_eq!(commands(leader.outbox()), decided(failed, 1, vec![]));

    let mut leader = start();
    let deadline = leader.poll_timeout().expect("every wait has one");
    leader.handle_timeout(at(1));
    assert_eq!(commands(leader.outbox()), []);
    leader.handle_timeout(deadline);
    let seconds = deadline.0 / 1_000_000_000;
    let late = FailReason::Deadline { awaited: Awaited::Transfer, waited_ms: seconds * 1_000 };
    assert_eq!(commands(leader.outbox()), decided(Outcome::Failed { reason: late }, seconds, vec![]));
}

#[test]
fn a_lost_rank_fails_what_is_open_and_frees_what_is_held() {
    let mut leader = decode_leader(geometry(2));
    leader.handle_message(at(0), NodeId(SCHEDULER), Message::Pair(pairing(H1, &[4])));
    for node in RANKS {
        leader.handle_message(at(0), NodeId(node), Message::RankDone { handover: H1, result: Ok(vec![]) });
    }
    leader.handle_message(at(0), NodeId(20), Message::Freed { handover: H1 });
    leader.handle_message(at(0), NodeId(SCHEDULER), Message::Pair(pairing(H2, &[4])));
    commands(leader.outbox());
    leader.handle_lost(at(1), &lost(21));
    let (role, group, rank, node) = (Role::Decode, DECODE, Rank(1), NodeId(21));
    let outcome =
        Outcome::Failed { reason: FailReason::RankLost { role, group, rank, node, cause: "it crashed".into() } };
    let expected = [
        send(20, Message::Settled { handover: H2, outcome: outcome.clone() }),
        send(SCHEDULER, Message::Outcome(OutcomeReport { handover: H2, outcome, at: at(1), paths: vec![] })),
        send(SCHEDULER, Message::Freed { handover: H1 }),
        send(SCHEDULER, Message::Health { trouble: Some("1 of 2 ranks are met".into()) }),
    ];
    assert_eq!(commands(leader.outbox()), expected);
    let third = HandoverId(3);
    leader.handle_message(at(2), NodeId(SCHEDULER), Message::Pair(pairing(third, &[4])));
    let outcome = Outcome::Failed { reason: FailReason::NoGroup(Role::Decode) };
    let untold = [
        send(SCHEDULER, Message::Outcome(OutcomeReport { handover: third, outcome, at: at(2), paths: vec![] })),
        send(SCHEDULER, Message::Freed { handover: third }),
    ];
    assert_eq!(commands(leader.outbox()), untold, "no rank has heard of it");
    leader.handle_message(at(3), NodeId(20), Message::Freed { handover: H2 });
    assert_eq!(commands(leader.outbox()), [send(SCHEDULER, Message::Freed { handover: H2 })]);
    assert!(leader.vitals().is_quiet(), "{:?}", leader.vitals());
}

#[test]
fn handovers_go_to_the_least_loaded_part_of_the_group() {
    let mut leader = decode_leader(divided());
    let mut parts = Vec::new();
    for handover in [H1, H2] {
        leader.handle_message(at(0), NodeId(SCHEDULER), Message::Pair(pairing(handover, &[4])));
        for command in commands(leader.outbox()) {
            if let Command::Send { to, message: Message::Fetch(job) } = command {
                parts.push((job.dp, to.0));
            }
        }
    }
    assert_eq!(parts, [(0, 20), (1, 21)]);
    leader.handle_message(at(1), NodeId(20), Message::RankDone { handover: H1, result: Ok(vec![]) });
    let answer = commands(leader.outbox());
    let word = Message::Settled { handover: H1, outcome: Outcome::Delivered };
    assert_eq!(answer.first(), Some(&send(20, word)), "the owner alone decides: {answer:?}");
    assert_eq!(answer.len(), 2);
}
