//! The records of what is over: when what happened.

use core::time::Duration;

use super::kit::*;
use super::{decode, prefill, scheduler};
use crate::protocol::{
    Begun, Command, EngineCall, EngineEvent, Event, Message, NicEvent, OfferCourse, OpenedFetch, Outbox, Outcome, Part,
    PrefillView, RequestCourse,
};
use crate::{Direction, Moment, TraceContext};

#[test]
fn a_fetch_tells_its_stages_apart() {
    let mut fixture = decode::Fixture::connected(Direction::Pull);
    fixture.fetch(H1, &[4]);
    fixture.place(H1);
    fixture.opened(0, H1, 1);
    let rank = &mut fixture.rank;
    rank.handle_nic(at(1), 0, NicEvent::Posted { id: decode::id(0, 0), took: Duration::from_millis(2) });
    rank.handle_nic(at(5), 0, decode::done(decode::id(0, 0)));
    commands(rank.outbox());
    let source = tables(&fixture.source, 1, 5);
    fixture.message(6, 2, Message::Opened(OpenedFetch { handover: H1, source, ready: 1 }));
    let rank = &mut fixture.rank;
    rank.handle_nic(at(6), 0, NicEvent::Posted { id: decode::id(1, 0), took: Duration::from_millis(3) });
    rank.handle_nic(at(9), 0, decode::done(decode::id(1, 0)));
    for source in [1, 2] {
        fixture.message(10, source, Message::Confirmed { handover: H1 });
    }
    assert_eq!(courses(fixture.rank.outbox()), [], "it is not decided");
    fixture.message(12, decode::LEADER, Message::Settled { handover: H1, outcome: Outcome::Delivered });
    let courses = courses(fixture.rank.outbox());
    let [Event::FetchEnded(course)] = courses.as_slice() else { panic!("{courses:?}") };
    let seconds = |seconds| Some(Duration::from_secs(seconds));
    assert_eq!((course.handover, course.request, &course.outcome), (H1, R1, &Outcome::Delivered));
    assert_eq!((course.room(), course.plan()), (seconds(1), seconds(5)), "placed at 1, the last tables at 6");
    assert_eq!((course.wire(), course.notice()), (seconds(8), seconds(3)), "posted at 1, moved at 9, settled at 12");
    assert_eq!(course.posting, Duration::from_millis(5));
    assert_eq!(course.paths.iter().map(|path| (path.bytes, path.pieces)).collect::<Vec<_>>(), [(100, 3), (100, 3)]);
}

#[test]
fn a_fetch_that_never_moved_has_no_times_for_that() {
    let mut fixture = decode::Fixture::connected(Direction::Pull);
    fixture.fetch(H1, &[4]);
    fixture.message(3, decode::LEADER, Message::Settled { handover: H1, outcome: Outcome::Cancelled });
    let courses = courses(fixture.rank.outbox());
    let [Event::FetchEnded(course)] = courses.as_slice() else { panic!("{courses:?}") };
    assert_eq!((course.room(), course.plan(), course.wire(), course.notice()), (None, None, None, None));
    assert_eq!((course.asked, course.settled, &course.outcome), (at(0), at(3), &Outcome::Cancelled));
}

#[test]
fn an_offer_tells_when_it_was_what() {
    let mut fixture = prefill::Fixture::new();
    fixture.message(1, prefill::LEADER, prefill::job(1));
    let opened = fixture.opened();
    fixture.engine(2, opened);
    fixture.engine(3, EngineEvent::Ready { request: R1, steps: 1 });
    fixture.engine(5, EngineEvent::Ready { request: R1, steps: 2 });
    fixture.message(8, prefill::LEADER, Message::Release { request: R1, view: PrefillView::Confirmed });
    let course = OfferCourse {
        request: R1,
        handover: None,
        asked: at(1),
        opened: Some(at(2)),
        ready: Some(at(5)),
        closed: at(8),
        posting: Duration::ZERO,
        view: PrefillView::Confirmed,
    };
    assert_eq!(courses(fixture.rank.outbox()), [Event::OfferEnded(Box::new(course))]);
}

#[test]
fn pushes_tell_how_long_the_nic_took_to_take_them() {
    let mut fixture = prefill::Fixture::offered(Direction::Push);
    let id = fixture.pushing(0, H1);
    fixture.nic(NicEvent::Posted { id, took: Duration::from_micros(7) });
    fixture.nic(prefill::done(id));
    fixture.message(8, prefill::LEADER, Message::Release { request: R1, view: PrefillView::Confirmed });
    let courses = courses(fixture.rank.outbox());
    let [Event::OfferEnded(course)] = courses.as_slice() else { panic!("{courses:?}") };
    assert_eq!((course.posting, course.handover), (Duration::from_micros(7), Some(H1)));
}

#[test]
fn a_request_tells_how_long_it_was_queued() {
    let mut fixture = scheduler::Fixture::new(1, 1);
    fixture.submit(1);
    fixture.offer(0, 1);
    fixture.outcome(10, 1, Outcome::Delivered);
    let courses = courses(fixture.scheduler.outbox());
    let [Event::RequestEnded(course)] = courses.as_slice() else { panic!("{courses:?}") };
    let expected = RequestCourse {
        request: R1,
        handover: Some(H1),
        submitted: Moment(0),
        paired: Some(at(1)),
        finished: at(1),
        outcome: Outcome::Delivered,
    };
    assert_eq!((**course).clone(), expected);
    assert_eq!(course.queue(), Some(Duration::from_secs(1)));
}

/// What a machine tells of beginnings since it was asked last.
fn begun(outbox: &mut Outbox) -> Vec<Begun> {
    let begun = |event| match event {
        Event::Began(begun) => Some(*begun),
        _ => None,
    };
    std::iter::from_fn(|| outbox.poll_event()).filter_map(begun).collect()
}

#[test]
fn what_is_done_for_a_traced_request_has_spans_below_its_own() {
    let parent: TraceContext = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().expect("parses");
    let mut fixture = scheduler::Fixture::new(1, 1);
    fixture.scheduler.handle_submit_traced(at(0), spec(1), Some(parent)).expect("a new request");
    let began = begun(fixture.scheduler.outbox());
    let [Begun { part: Part::Request, trace: Some((own, below)), .. }] = began.as_slice() else { panic!("{began:?}") };
    assert_eq!((*below, own.trace()), (parent, parent.trace()));
    let said = fixture.commands();
    let [Command::Send { message: job @ Message::Prefill(_), .. }] = said.as_slice() else { panic!("{said:?}") };
    assert_eq!(job.trace(), Some(*own));
    let said = fixture.offer(0, 1);
    let pair = said.iter().find_map(|command| match command {
        Command::Send { message: pair @ Message::Pair(_), .. } => Some(pair.trace()),
        _ => None,
    });
    assert_eq!(pair, Some(Some(*own)));

    let mut fixture = prefill::Fixture::new();
    let said = fixture.message(0, prefill::LEADER, job.clone());
    let began = begun(fixture.rank.outbox());
    let [Begun { part: Part::Offer, request: R1, trace: Some((offer, below)), .. }] = began.as_slice() else {
        panic!("{began:?}")
    };
    assert_eq!(below, own);
    // The engine goes on below the offer.
    let [Command::Engine(EngineCall::Prefill(told))] = said.as_slice() else { panic!("{said:?}") };
    assert_eq!(told.trace, Some(*offer));
    // Of a later prefill of the same request the span is another one.
    let mut later = prefill::Fixture::new();
    later.message(7, prefill::LEADER, job.clone());
    assert_ne!(begun(later.rank.outbox()), began);
    // Without a parent nobody has a place in a trace.
    let mut fixture = scheduler::Fixture::new(1, 1);
    let said = fixture.submit(1);
    assert!(matches!(begun(fixture.scheduler.outbox()).as_slice(), [Begun { trace: None, .. }]));
    assert!(matches!(said.as_slice(), [Command::Send { message, .. }] if message.trace().is_none()), "{said:?}");
}

/// An offer that the engine could not even begin is over, too: whoever opened something for it closes it.
#[test]
fn what_an_engine_cannot_begin_ends_as_it_began() {
    let mut fixture = prefill::Fixture::new();
    fixture.message(0, prefill::LEADER, prefill::job(1));
    assert_eq!(begun(fixture.rank.outbox()).len(), 1);
    fixture.engine(1, EngineEvent::Unable { request: R1, reason: "no memory".into() });
    let courses = courses(fixture.rank.outbox());
    let [Event::OfferEnded(course)] = courses.as_slice() else { panic!("{courses:?}") };
    assert_eq!((course.opened, course.view), (None, PrefillView::Ended));
}
