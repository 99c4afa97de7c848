//! The scheduler that has started again: what leaders announce to it, in every order, and the clients that ask again.

use super::kit::*;
use super::scheduler::*;
use crate::protocol::{
    Command, Event, FailReason, LeastLoaded, Message, OfferSummary, Outcome, OutcomeReport, Pairing, PrefillView,
    Refusal, RequestSpec, Role, Scheduler, SchedulerTerms, StandingHandovers, StandingOffer, Submitted,
};
use crate::{GroupId, HandoverId, RequestId};

/// The first handover of the new scheduler.
const NEW: u64 = 1_000;

fn restarted(prefill: u64, decode: u64) -> Fixture {
    let scheduler = Scheduler::new(SchedulerTerms::default(), Box::new(LeastLoaded), NEW);
    let mut fixture = Fixture { scheduler };
    for node in 0..prefill {
        fixture.join(node, Role::Prefill);
    }
    for node in 10..10 + decode {
        fixture.join(node, Role::Decode);
    }
    fixture.commands();
    fixture.events();
    fixture
}

fn offers(request: u64, steps: Option<Vec<u32>>) -> Message {
    let ready_at = steps.as_ref().map(|_| at(3));
    Message::StandingOffers(vec![StandingOffer { spec: spec(request), dp: 0, steps, ready_at }])
}

fn pairing_of(handover: u64, request: u64, source: u32) -> Pairing {
    let (handover, source) = (HandoverId(handover), GroupId(source));
    Pairing { handover, spec: spec(request), source, source_dp: 0, steps: vec![4], trace: None }
}

fn under_way(handover: u64, request: u64, source: u32) -> Message {
    let under_way = vec![pairing_of(handover, request, source)];
    Message::StandingHandovers(Box::new(StandingHandovers { under_way, ..StandingHandovers::default() }))
}

fn report(handover: u64, outcome: Outcome) -> OutcomeReport {
    OutcomeReport { handover: HandoverId(handover), outcome, at: at(1), paths: vec![] }
}

/// A decided handover of request 1, and whether its blocks are out.
fn decided(handover: u64, source: u32, outcome: Outcome, out: bool) -> Message {
    let delivered = outcome.is_delivered();
    let decided = vec![(pairing_of(handover, 1, source), report(handover, outcome))];
    let held = if out { vec![(HandoverId(handover), spec(1), delivered)] } else { Vec::new() };
    Message::StandingHandovers(Box::new(StandingHandovers { under_way: Vec::new(), decided, held }))
}

fn superseded(to: u64, handover: u64, newer: u64) -> Command {
    let reason = Some(FailReason::Refused(Refusal::Superseded { request: R1, newer: HandoverId(newer) }));
    send(to, Message::Abort { handover: HandoverId(handover), reason })
}

fn renewed(to: u64, request: u64) -> Command {
    send(to, Message::Renew { requests: vec![RequestId(request)] })
}

fn assert_quiet(fixture: &Fixture) {
    assert!(fixture.scheduler.vitals().is_quiet(), "{:?}", fixture.scheduler.vitals());
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    Offers,
    Handovers,
    Client,
}

#[test]
fn a_handover_under_way_is_adopted_in_every_order() {
    use Step::{Client, Handovers, Offers};
    for order in [
        &[Offers, Handovers][..],
        &[Handovers, Offers],
        &[Handovers],
        &[Client, Offers, Handovers],
        &[Client, Handovers, Offers],
        &[Offers, Client, Handovers],
        &[Handovers, Client, Offers],
        &[Offers, Handovers, Client],
        &[Handovers, Offers, Client],
    ] {
        let mut fixture = restarted(1, 2);
        let mut said = Vec::new();
        for step in order {
            said.extend(match step {
                Offers => fixture.say(0, offers(1, Some(vec![4]))),
                Handovers => fixture.say(10, under_way(7, 1, 0)),
                Client => {
                    let taken = fixture.scheduler.handle_submit(at(1), spec(1));
                    assert_eq!(taken, Ok(Submitted::Taken), "{order:?}");
                    fixture.commands()
                }
            });
        }
        fixture.scheduler.handle_timeout(at(8));
        said.extend(fixture.commands());
        assert_eq!(pairs(&said), [], "{order:?}: it is paired already");
        assert!(!said.iter().any(|command| matches!(command, Command::Send { message: Message::Abort { .. }, .. })));
        let known_at_once = fixture.outcome(10, 7, Outcome::Delivered).contains(&known(10, 7));
        assert_eq!(known_at_once, order.contains(&Client), "{order:?}: its leader keeps what nobody has asked for");
        assert_eq!(fixture.finished(), [(1, Outcome::Delivered)], "{order:?}");
        let again = fixture.scheduler.handle_submit(at(9), spec(1));
        match order.contains(&Client) {
            true => assert_eq!(again, Ok(Submitted::Taken), "{order:?}: answered once, so this is another one"),
            false => {
                let Ok(Submitted::Ended(finished)) = again else { panic!("{order:?}: {again:?}") };
                assert_eq!((finished.request, finished.outcome), (R1, Outcome::Delivered), "{order:?}");
                assert_eq!(fixture.commands(), [known(10, 7)], "{order:?}: now it need not");
                fixture.freed(10, 7);
                assert_quiet(&fixture);
            }
        }
    }
}

#[test]
fn an_adopted_offer_rests_until_somebody_asks_for_it_and_is_then_paired() {
    let adopt_after = SchedulerTerms::default().adopt_after;
    for asks_late in [false, true] {
        let mut fixture = restarted(1, 1);
        let said = fixture.say(0, offers(1, Some(vec![4])));
        assert_eq!(said, [renewed(0, 1)], "its lease has run since its last scheduler's time");
        let ask = |fixture: &mut Fixture, now| {
            assert_eq!(fixture.scheduler.handle_submit(now, spec(1)), Ok(Submitted::Taken), "this is who asked for it");
            assert_eq!(fixture.scheduler.handle_submit(now, spec(1)), Err(Refusal::Duplicate(R1)), "and this is not");
            pairs(&fixture.commands())
        };
        if !asks_late {
            assert_eq!(ask(&mut fixture, at(1)), [], "its decode leader may be about to announce it");
            assert_eq!(fixture.scheduler.poll_timeout(), Some(at(1)), "it is wanted");
            fixture.scheduler.handle_timeout(at(1));
            assert_eq!(fixture.commands(), [renewed(0, 1)]);
            assert_eq!(fixture.scheduler.poll_timeout(), Some(at(1) + adopt_after));
        }
        fixture.scheduler.handle_timeout(at(1) + adopt_after);
        let rested = pairs(&fixture.commands());
        assert_eq!(rested, if asks_late { vec![] } else { vec![(10, NEW, 1)] });
        if asks_late {
            assert_eq!(ask(&mut fixture, at(5)), [(10, NEW, 1)]);
        }
        fixture.outcome(10, NEW, Outcome::Delivered);
        assert_eq!(fixture.finished(), [(1, Outcome::Delivered)]);
    }
    let mut fixture = restarted(1, 1);
    fixture.say(0, offers(2, Some(vec![4])));
    let other = RequestSpec { tokens: TOKENS + 1, ..spec(2) };
    let refused = fixture.scheduler.handle_submit(at(5), other);
    assert_eq!(refused, Err(Refusal::Duplicate(RequestId(2))), "another request under the same number");
}

#[test]
fn an_adopted_offer_that_nobody_asks_for_is_left_to_its_lease() {
    // Its request may have been answered long ago. What nobody asked for leaves nothing behind: whoever comes later begins anew.
    let lapsed = FailReason::Refused(Refusal::LeaseExpired(R1));
    for how in 0..4 {
        let mut fixture = restarted(1, 1);
        fixture.say(0, offers(1, (how != 3).then(|| vec![4])));
        if how == 3 {
            let offered = Message::Offered(OfferSummary { request: R1, dp: 0, steps: vec![4] });
            assert_eq!(fixture.say(0, offered), []);
        }
        for second in 1..=90 {
            fixture.scheduler.handle_timeout(at(second));
        }
        assert_eq!(fixture.commands(), [], "neither paired nor renewed");
        match how {
            1 => fixture.scheduler.handle_lost(at(91), &lost(0)),
            2 => fixture.scheduler.handle_timeout(at(3600)),
            _ => drop(fixture.say(0, Message::OfferFailed { request: R1, reason: lapsed.clone() })),
        }
        assert_eq!((fixture.finished(), fixture.scheduler.unfinished()), (vec![], 0));
        assert_quiet(&fixture);
        if how != 1 {
            fixture.commands();
            assert_eq!(jobs(&fixture.submit(1)), [(0, 1)]);
        }
    }
}

#[test]
fn an_adopted_handover_that_nobody_asked_for_is_not_begun_again() {
    let mut fixture = restarted(1, 2);
    fixture.say(0, offers(1, Some(vec![4])));
    fixture.say(10, under_way(7, 1, 0));
    fixture.outcome(10, 7, Outcome::Failed { reason: FailReason::Engine("no".into()) });
    fixture.freed(10, 7);
    fixture.scheduler.handle_timeout(at(5));
    assert_eq!(pairs(&fixture.commands()), []);
    assert_eq!(fixture.finished(), []);
    assert_eq!(fixture.scheduler.handle_submit(at(6), spec(1)), Ok(Submitted::Taken));
    assert_eq!(pairs(&fixture.commands()), [(11, NEW, 1)], "its offer still stands");
}

#[test]
fn a_prefill_under_way_is_adopted_and_paired_as_soon_as_it_is_offered() {
    let mut fixture = restarted(1, 1);
    assert_eq!(fixture.say(0, offers(1, None)), [renewed(0, 1)]);
    assert_eq!(fixture.scheduler.handle_submit(at(1), spec(1)), Ok(Submitted::Taken));
    let offered = Message::Offered(OfferSummary { request: R1, dp: 0, steps: vec![4] });
    assert_eq!(pairs(&fixture.say(0, offered)), [(10, NEW, 1)], "nobody can have it yet");
    fixture.outcome(10, NEW, Outcome::Delivered);
    assert_eq!(fixture.finished(), [(1, Outcome::Delivered)]);
    fixture.freed(10, NEW);
    assert_quiet(&fixture);
}

#[test]
fn an_offer_that_nobody_needs_is_released() {
    let mut fixture = restarted(2, 1);
    fixture.submit(1);
    assert_eq!(fixture.say(1, offers(1, Some(vec![4]))), [released(1, 1, PrefillView::Ended)], "another group has it");
    fixture.offer(0, 1);
    fixture.outcome(10, NEW, Outcome::Delivered);
    assert_eq!(fixture.say(1, offers(1, Some(vec![4]))), [released(1, 1, PrefillView::Ended)], "it has ended");
    fixture.freed(10, NEW);
    assert_quiet(&fixture);
    fixture.events();
    assert_eq!(fixture.say(10, offers(2, None)), [], "no prefill leader");
    assert_eq!(fixture.say(1, under_way(7, 2, 0)), [], "no decode leader");
    let ignored = fixture.events();
    assert!(matches!(ignored.as_slice(), [Event::Ignored { .. }, Event::Ignored { .. }]), "{ignored:?}");
    assert_quiet(&fixture);
}

#[test]
fn of_two_handovers_the_newer_is_kept() {
    for newer_first in [false, true] {
        let mut fixture = restarted(1, 2);
        let mut said = Vec::new();
        for (from, handover) in if newer_first { [(11, 7), (10, 5)] } else { [(10, 5), (11, 7)] } {
            said.extend(fixture.say(from, under_way(handover, 1, 0)));
        }
        assert_eq!(said, [superseded(10, 5, 7)], "newer first: {newer_first}");
        assert_eq!(fixture.outcome(10, 5, Outcome::Cancelled), [known(10, 5)]);
        assert_eq!(fixture.finished(), []);
        fixture.outcome(11, 7, Outcome::Delivered);
        assert_eq!(fixture.finished(), [(1, Outcome::Delivered)]);
        fixture.freed(10, 5);
        assert!(!fixture.scheduler.vitals().is_quiet(), "the newer one's blocks are out");
        fixture.freed(11, 7);
        assert_quiet(&fixture);
    }
}

#[test]
fn credits_that_are_out_are_out_for_the_new_scheduler_too() {
    let mut fixture = restarted(1, 1);
    let large = |request| RequestSpec { tokens: 40 * 16, ..spec(request) };
    let held = vec![(HandoverId(3), large(3), true), (HandoverId(4), large(4), false)];
    let standing = StandingHandovers { held, ..StandingHandovers::default() };
    assert_eq!(fixture.say(10, Message::StandingHandovers(Box::new(standing))), []);
    fixture.scheduler.handle_submit(at(1), large(1)).expect("a new request");
    fixture.commands();
    assert_eq!(fixture.offer(0, 1), [], "80 of 64 blocks are out");
    assert_eq!(fixture.freed(10, 4), [], "and 40");
    assert_eq!(pairs(&fixture.freed(10, 3)), [(10, NEW, 1)]);
    let freed: Vec<Event> = fixture.events().into_iter().filter(|event| matches!(event, Event::Freed { .. })).collect();
    assert_eq!(freed, [Event::Freed { request: RequestId(3) }], "what was not delivered is no news");
}

#[test]
fn an_outcome_that_no_scheduler_has_heard_of_is_told_once() {
    // Whether the engine has let its blocks go already or not: its credits come back.
    for out in [true, false] {
        let mut fixture = restarted(1, 1);
        let said = fixture.say(10, decided(7, 0, Outcome::Delivered, out));
        assert_eq!(said, [], "no offer of it is known here yet, and its leader keeps what nobody has asked for");
        assert_eq!(fixture.finished(), [(1, Outcome::Delivered)]);
        assert_eq!(fixture.scheduler.vitals().is_quiet(), !out, "{:?}", fixture.scheduler.vitals());
        assert_eq!(fixture.say(10, decided(7, 0, Outcome::Delivered, out)), [], "said twice");
        assert_eq!(fixture.finished(), []);
        assert_eq!(fixture.say(0, offers(1, Some(vec![4]))), [released(0, 1, PrefillView::Ended)]);
        let late = fixture.scheduler.handle_submit(at(2), spec(1));
        assert!(matches!(late, Ok(Submitted::Ended(ref finished)) if finished.outcome.is_delivered()), "{late:?}");
        assert_eq!(fixture.commands(), [known(10, 7)], "now it need not");
        if out {
            fixture.freed(10, 7);
        }
        assert_quiet(&fixture);
    }
    // What was not delivered is tried again if anybody wants it.
    let mut fixture = restarted(1, 1);
    let failed = Outcome::Failed { reason: FailReason::Engine("no".into()) };
    assert_eq!(fixture.say(10, decided(7, 0, failed, false)), [known(10, 7)]);
    assert_eq!(fixture.finished(), []);
    assert_quiet(&fixture);
}

#[test]
fn an_outcome_that_comes_before_its_handover_is_announced_stays_with_its_leader() {
    let mut fixture = restarted(1, 1);
    fixture.submit(1);
    assert_eq!(fixture.outcome(10, 7, Outcome::Delivered), [], "nobody here knows of what it is");
    assert_eq!(fixture.finished(), []);
    let said = fixture.say(10, decided(7, 0, Outcome::Delivered, true));
    assert!(said.contains(&known(10, 7)), "{said:?}");
    assert_eq!(fixture.finished(), [(1, Outcome::Delivered)]);
    fixture.freed(10, 7);
    assert_quiet(&fixture);
    // One of its own is known, whatever has become of it.
    assert_eq!(fixture.outcome(10, NEW + 5, Outcome::Cancelled), [known(10, NEW + 5)]);
}

#[test]
fn a_leader_keeps_an_outcome_until_somebody_has_it() {
    // The next scheduler hears of it, too, should this one be gone before anybody asks; asked too late, it need not be kept any longer.
    let lease = SchedulerTerms::default().leases.duration;
    for late in [false, true] {
        let mut fixture = restarted(1, 1);
        fixture.say(10, under_way(7, 1, 0));
        assert!(!fixture.outcome(10, 7, Outcome::Delivered).contains(&known(10, 7)));
        let now = if late { at(1) + lease * 2 } else { at(1) };
        let taken = fixture.scheduler.handle_submit(now, spec(1));
        assert_eq!(matches!(taken, Ok(Submitted::Ended(_))), !late, "{taken:?}");
        assert!(fixture.commands().contains(&known(10, 7)), "late: {late}");
    }
}

#[test]
fn a_request_that_was_asked_for_again_is_not_prefilled_for_nothing() {
    // Its group is given it anew before its delivery, or the handover under way, is announced.
    for delivered in [true, false] {
        let mut fixture = restarted(2, 1);
        assert_eq!(jobs(&fixture.submit(1)), [(0, 1)]);
        let announced = if delivered { decided(7, 1, Outcome::Delivered, true) } else { under_way(7, 1, 1) };
        let said = fixture.say(10, announced);
        assert_eq!(said[0], released(0, 1, PrefillView::Ended), "{said:?}");
        if !delivered {
            fixture.outcome(10, 7, Outcome::Delivered);
        }
        assert_eq!(fixture.finished(), [(1, Outcome::Delivered)]);
        assert_eq!(fixture.offer(0, 1), [], "too late");
        fixture.freed(10, 7);
        assert_quiet(&fixture);
    }
    // Even another handover is stopped for one that was delivered.
    let mut fixture = restarted(1, 2);
    fixture.submit(1);
    assert_eq!(pairs(&fixture.offer(0, 1)), [(10, NEW, 1)]);
    let said = fixture.say(11, decided(7, 0, Outcome::Delivered, true));
    assert_eq!(said, [superseded(10, NEW, 7), known(11, 7), released(0, 1, PrefillView::Confirmed)]);
    assert_eq!(fixture.finished(), [(1, Outcome::Delivered)]);
    assert_eq!(fixture.outcome(10, NEW, Outcome::Delivered), [known(10, NEW)], "answered once");
    fixture.freed(11, 7);
    fixture.freed(10, NEW);
    assert_eq!(fixture.finished(), []);
    assert_quiet(&fixture);
}

#[test]
fn a_handover_that_was_delivered_before_it_heard_of_a_newer_one_counts() {
    let mut fixture = restarted(1, 2);
    fixture.submit(1);
    assert_eq!(pairs(&fixture.offer(0, 1)), [(10, NEW, 1)]);
    assert_eq!(fixture.say(11, under_way(7, 1, 0)), [superseded(11, 7, NEW)]);
    assert_eq!(fixture.outcome(10, 7, Outcome::Delivered), [known(10, 7)], "not its leader");
    let said = fixture.outcome(11, 7, Outcome::Delivered);
    assert_eq!(said, [known(11, 7), superseded(10, NEW, 7), released(0, 1, PrefillView::Confirmed)]);
    assert_eq!(fixture.finished(), [(1, Outcome::Delivered)]);
    assert_eq!(fixture.outcome(10, NEW, Outcome::Cancelled), [known(10, NEW)]);
    assert_eq!(fixture.finished(), []);
    fixture.freed(10, NEW);
    fixture.freed(11, 7);
    assert_quiet(&fixture);
}

#[test]
fn a_group_that_is_not_complete_again_is_heard_already() {
    let mut fixture = restarted(1, 0);
    let pair = geometry(2);
    fixture.scheduler.handle_member(at(0), &member(10, Role::Decode, DECODE, 0, &pair));
    assert_eq!(fixture.say(10, under_way(7, 1, 0)), []);
    fixture.outcome(10, 7, Outcome::Delivered);
    assert_eq!(fixture.finished(), [(1, Outcome::Delivered)]);
    fixture.submit(2);
    assert_eq!(fixture.offer(0, 2), [], "but it gets nothing before");
    fixture.scheduler.handle_member(at(0), &member(11, Role::Decode, DECODE, 1, &pair));
    assert_eq!(pairs(&fixture.commands()), [(10, NEW, 2)]);
    for handover in [7, NEW] {
        fixture.outcome(10, handover, Outcome::Delivered);
        fixture.freed(10, handover);
    }
    assert_quiet(&fixture);
    // The same for offers: they wait for their decode side only.
    let mut fixture = restarted(0, 1);
    fixture.scheduler.handle_member(at(0), &member(0, Role::Prefill, GroupId(0), 0, &pair));
    assert_eq!(fixture.say(0, offers(1, Some(vec![4]))), [renewed(0, 1)]);
    fixture.scheduler.handle_submit(at(1), spec(1)).expect("it is wanted");
    fixture.scheduler.handle_lost(at(2), &lost(0));
    assert_eq!(fixture.finished(), [], "groups may still be about to join");
    fixture.join(1, Role::Prefill);
    assert_eq!(jobs(&fixture.commands()), [(1, 1)]);
    fixture.scheduler.handle_lost(at(3), &lost(1));
    assert!(
        matches!(fixture.finished().as_slice(), [(1, Outcome::Failed { .. })]),
        "the last one that was there is gone"
    );
    assert_quiet(&fixture);
}

#[test]
fn a_scheduler_that_has_met_no_decode_group_yet_gives_no_request_up() {
    // The delivery comes to light when its leader finds the new scheduler, long after the lease of the offer.
    let mut fixture = restarted(1, 0);
    fixture.scheduler.expect_announcements(at(0));
    fixture.submit(1);
    fixture.say(0, offers(1, Some(vec![4])));
    let reason = FailReason::Refused(Refusal::LeaseExpired(R1));
    fixture.say(0, Message::OfferFailed { request: R1, reason });
    assert_eq!(fixture.finished(), []);
    fixture.join(10, Role::Decode);
    fixture.say(10, decided(7, 0, Outcome::Delivered, false));
    assert_eq!(fixture.finished(), [(1, Outcome::Delivered)]);
    assert_quiet(&fixture);
}

#[test]
fn a_request_that_ended_does_not_end_again_however_late_its_delivery_is_announced() {
    let mut fixture = restarted(1, 0);
    fixture.submit(1);
    let reason = FailReason::Engine("no".into());
    fixture.say(0, Message::OfferFailed { request: R1, reason });
    assert!(matches!(fixture.finished().as_slice(), [(1, Outcome::Failed { .. })]));
    fixture.scheduler.handle_timeout(at(3600));
    fixture.join(10, Role::Decode);
    assert_eq!(fixture.say(10, decided(7, 0, Outcome::Delivered, false)), [known(10, 7)]);
    assert_eq!(fixture.finished(), []);
    assert_quiet(&fixture);
}

#[test]
fn a_decode_group_that_comes_late_takes_nothing_before_its_leader_has_said_what_it_holds() {
    // Its leader starts again while there is no scheduler, and comes back last: the other rank still holds what the earlier leader gave it.
    let pair = geometry(2);
    let mut fixture = restarted(1, 0);
    fixture.scheduler.expect_announcements(at(0));
    fixture.submit(1);
    fixture.scheduler.handle_member(at(0), &member(11, Role::Decode, GroupId(10), 1, &pair));
    fixture.scheduler.handle_timeout(at(8));
    fixture.commands();
    fixture.offer(0, 1);
    fixture.scheduler.handle_member(at(9), &member(10, Role::Decode, GroupId(10), 0, &pair));
    assert_eq!(pairs(&fixture.commands()), []);
    assert_eq!(pairs(&fixture.say(10, Message::Health { trouble: Some("1 of 2 ranks are met".into()) })), []);
    let held = vec![(HandoverId(7), spec(9), true)];
    let standing = StandingHandovers { held, ..StandingHandovers::default() };
    assert_eq!(pairs(&fixture.say(10, Message::StandingHandovers(Box::new(standing)))), []);
    assert_eq!(pairs(&fixture.say(10, Message::Health { trouble: None })), [(10, NEW, 1)]);
}

#[test]
fn a_scheduler_that_listens_does_not_take_a_cancel_at_its_word() {
    let cancelled = || {
        let mut fixture = restarted(1, 1);
        fixture.scheduler.expect_announcements(at(0));
        fixture.submit(1);
        fixture.scheduler.handle_cancel(at(0), R1);
        assert_eq!(fixture.finished(), []);
        fixture
    };
    // Its leader may have delivered it;
    let mut fixture = cancelled();
    fixture.say(10, decided(7, 0, Outcome::Delivered, false));
    assert_eq!(fixture.finished(), [(1, Outcome::Delivered)]);
    assert_quiet(&fixture);
    let mut fixture = cancelled();
    fixture.say(0, offers(1, Some(vec![4])));
    let reason = FailReason::Refused(Refusal::LeaseExpired(R1));
    fixture.say(0, Message::OfferFailed { request: R1, reason });
    fixture.say(10, decided(7, 0, Outcome::Delivered, false));
    assert_eq!(fixture.finished(), [(1, Outcome::Delivered)]);
    assert_quiet(&fixture);
    // or be about to;
    let mut fixture = cancelled();
    let abort = send(10, Message::Abort { handover: HandoverId(7), reason: None });
    assert!(fixture.say(10, under_way(7, 1, 0)).contains(&abort));
    fixture.say(10, Message::Outcome(report(7, Outcome::Cancelled)));
    assert_eq!(fixture.finished(), [(1, Outcome::Cancelled)]);
    // or nobody has it.
    let mut fixture = cancelled();
    fixture.say(0, offers(1, Some(vec![4])));
    fixture.commands();
    fixture.scheduler.handle_timeout(at(4));
    assert!(fixture.commands().contains(&send(0, Message::Release { request: R1, view: PrefillView::Ended })));
    assert_eq!(fixture.finished(), [(1, Outcome::Cancelled)]);
    assert_quiet(&fixture);
}
