//! The scheduler: who gets what, in which order, within which credits.

use std::sync::Arc;

use super::kit::*;
use crate::protocol::{
    Command, Event, FailReason, Finished, LeastLoaded, LongestHeldPrefix, Message, OfferSummary, Outcome,
    OutcomeReport, Pairing, Policy, PrefillView, Refusal, RequestSpec, Role, Scheduler, SchedulerTerms,
};
use crate::{GroupId, HandoverId, NodeId, RequestId};

/// Groups of one rank each: prefill group `n` is node `n`, decode group `10 + n` is node `10 + n`.
pub(super) struct Fixture {
    pub(super) scheduler: Scheduler,
}

impl Fixture {
    pub(super) fn new(prefill: u64, decode: u64) -> Self {
        Fixture::with(prefill, decode, SchedulerTerms::default(), Box::new(LeastLoaded))
    }

    pub(super) fn with(prefill: u64, decode: u64, terms: SchedulerTerms, policy: Box<dyn Policy>) -> Self {
        let mut fixture = Fixture { scheduler: Scheduler::new(terms, policy, 1) };
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

    pub(super) fn join(&mut self, node: u64, role: Role) {
        let member = member(node, role, GroupId(node as u32), 0, &geometry(1));
        self.scheduler.handle_member(at(0), &member);
    }

    pub(super) fn commands(&mut self) -> Vec<Command> {
        commands(self.scheduler.outbox())
    }

    pub(super) fn events(&mut self) -> Vec<Event> {
        events(self.scheduler.outbox())
    }

    pub(super) fn submit(&mut self, request: u64) -> Vec<Command> {
        self.scheduler.handle_submit(at(0), spec(request)).expect("a new request");
        self.commands()
    }

    pub(super) fn say(&mut self, from: u64, message: Message) -> Vec<Command> {
        self.scheduler.handle_message(at(1), NodeId(from), message);
        self.commands()
    }

    pub(super) fn offer(&mut self, from: u64, request: u64) -> Vec<Command> {
        self.say(from, Message::Offered(OfferSummary { request: RequestId(request), dp: 0, steps: vec![4] }))
    }

    pub(super) fn outcome(&mut self, from: u64, handover: u64, outcome: Outcome) -> Vec<Command> {
        self.say(
            from,
            Message::Outcome(OutcomeReport { handover: HandoverId(handover), outcome, at: at(1), paths: vec![] }),
        )
    }

    pub(super) fn freed(&mut self, from: u64, handover: u64) -> Vec<Command> {
        self.say(from, Message::Freed { handover: HandoverId(handover) })
    }

    pub(super) fn finished(&mut self) -> Vec<(u64, Outcome)> {
        let finished = |event| match event {
            Event::Finished(Finished { request, outcome, .. }) => Some((request.0, outcome)),
            _ => None,
        };
        self.events().into_iter().filter_map(finished).collect()
    }
}

/// `(decode node, handover, request)` of every pairing.
pub(super) fn pairs(commands: &[Command]) -> Vec<(u64, u64, u64)> {
    let pair = |command: &Command| match command {
        Command::Send { to, message: Message::Pair(Pairing { handover, spec, .. }) } => {
            Some((to.0, handover.0, spec.request.0))
        }
        _ => None,
    };
    commands.iter().filter_map(pair).collect()
}

/// `(prefill node, request)` of every job.
pub(super) fn jobs(commands: &[Command]) -> Vec<(u64, u64)> {
    let job = |command: &Command| match command {
        Command::Send { to, message: Message::Prefill(job) } => Some((to.0, job.spec.request.0)),
        _ => None,
    };
    commands.iter().filter_map(job).collect()
}

/// The leader need not tell that outcome again.
pub(super) fn known(to: u64, handover: u64) -> Command {
    send(to, Message::OutcomesKnown { handovers: vec![HandoverId(handover)] })
}

pub(super) fn released(to: u64, request: u64, view: PrefillView) -> Command {
    send(to, Message::Release { request: RequestId(request), view })
}

#[test]
fn a_request_goes_through_every_stage() {
    let mut fixture = Fixture::new(1, 1);
    assert_eq!(jobs(&fixture.submit(1)), [(0, 1)]);
    assert_eq!(pairs(&fixture.offer(0, 1)), [(10, 1, 1)]);
    assert_eq!(fixture.offer(0, 1), [], "offered once");
    assert_eq!(fixture.say(0, Message::OfferReady { request: R1, at: at(7) }), []);
    assert_eq!(fixture.say(10, Message::Started { handover: H1 }), []);
    assert_eq!(fixture.outcome(10, 1, Outcome::Delivered), [known(10, 1), released(0, 1, PrefillView::Confirmed)]);
    let finished = Finished {
        request: R1,
        outcome: Outcome::Delivered,
        attempts: 1,
        ready_at: Some(at(7)),
        settled_at: Some(at(1)),
        paths: vec![],
    };
    let paired = Event::Paired { request: R1, handover: H1, group: GroupId(10) };
    assert_eq!(fixture.events(), [paired, Event::Started { handover: H1 }, Event::Finished(finished)]);
    assert_eq!(fixture.scheduler.unfinished(), 0);
    assert_eq!(fixture.outcome(10, 1, Outcome::Cancelled), [known(10, 1)], "decided once");
    assert!(!fixture.scheduler.vitals().is_quiet(), "its blocks are out");
    fixture.freed(10, 1);
    fixture.freed(10, 1);
    assert_eq!(fixture.events(), [Event::Freed { request: R1 }]);
    assert!(fixture.scheduler.vitals().is_quiet(), "{:?}", fixture.scheduler.vitals());
}

#[test]
fn offers_are_paired_oldest_first_and_nothing_overtakes() {
    let mut fixture = Fixture::new(1, 0);
    for request in 1..=3 {
        fixture.submit(request);
    }
    for request in [3, 1, 2] {
        assert_eq!(fixture.offer(0, request), [], "nobody is there");
    }
    fixture.join(10, Role::Decode);
    assert_eq!(pairs(&fixture.commands()), [(10, 1, 3), (10, 2, 1), (10, 3, 2)], "in the order of their offers");
}

#[test]
fn an_incomplete_group_takes_nothing() {
    let mut fixture = Fixture::new(0, 1);
    let pair = geometry(2);
    fixture.scheduler.handle_member(at(0), &member(1, Role::Prefill, GroupId(0), 1, &pair));
    assert_eq!(fixture.submit(1), []);
    assert!(fixture.scheduler.ready_groups().contains(&GroupId(10)) && fixture.scheduler.ready_groups().len() == 1);
    fixture.scheduler.handle_member(at(0), &member(0, Role::Prefill, GroupId(0), 0, &pair));
    assert_eq!(jobs(&fixture.commands()), [(0, 1)], "rank 0 leads");
    assert_eq!(fixture.events(), [Event::GroupReady { group: GroupId(0) }]);
}

#[test]
fn credits_bound_the_work_and_all_come_back() {
    let terms = SchedulerTerms { prefill_jobs_max: 6, ..SchedulerTerms::default() };
    let mut fixture = Fixture::with(1, 1, terms, Box::new(LeastLoaded));
    let (mut working, mut queued, mut delivered) = (0, 0, 0);
    let mut inbox = Vec::new();
    for request in 1..=40 {
        inbox.extend(fixture.submit(request));
    }
    let mut freed = Vec::new();
    while delivered < 40 || !inbox.is_empty() {
        let batch = std::mem::take(&mut inbox);
        assert!(!batch.is_empty(), "{delivered} of 40 delivered, then nothing moved");
        for command in batch {
            match command {
                Command::Send { message: Message::Prefill(job), .. } => {
                    working += 1;
                    assert!(working <= 6, "prefill jobs stay within their credit");
                    inbox.extend(fixture.offer(0, job.spec.request.0));
                }
                Command::Send { message: Message::Release { .. }, .. } => working -= 1,
                Command::Send { message: Message::OutcomesKnown { .. }, .. } => {}
                Command::Send { message: Message::Pair(pairing), .. } => {
                    queued += 1;
                    assert!(queued <= 4, "handovers stay within their credit");
                    delivered += 1;
                    inbox.extend(fixture.outcome(10, pairing.handover.0, Outcome::Delivered));
                    freed.push(pairing.handover.0);
                }
                other => panic!("{other:?}"),
            }
        }
        // The engine keeps what was delivered until there is no room for more.
        if inbox.is_empty() {
            for handover in freed.drain(..) {
                queued -= 1;
                inbox.extend(fixture.freed(10, handover));
            }
        }
    }
    assert_eq!((working, fixture.scheduler.unfinished()), (0, 0));
    for handover in freed {
        fixture.freed(10, handover);
    }
    // Everything is back: the whole pool is there for one request.
    let whole = RequestSpec { tokens: u64::from(BLOCKS) * 16, ..spec(41) };
    fixture.scheduler.handle_submit(at(2), whole).expect("a new request");
    fixture.commands();
    assert_eq!(pairs(&fixture.offer(0, 41)).len(), 1);
}

#[test]
fn blocks_are_credits_too() {
    let mut fixture = Fixture::new(1, 1);
    let large = |request| RequestSpec { tokens: 40 * 16, ..spec(request) };
    for request in [1, 2] {
        fixture.scheduler.handle_submit(at(0), large(request)).expect("a new request");
    }
    fixture.commands();
    assert_eq!(pairs(&fixture.offer(0, 1)).len(), 1);
    assert_eq!(fixture.offer(0, 2), [], "40 of 64 blocks are taken");
    fixture.outcome(10, 1, Outcome::Delivered);
    assert_eq!(pairs(&fixture.freed(10, 1)), [(10, 2, 2)]);
}

#[test]
fn a_request_that_fits_nowhere_fails_at_once() {
    let mut fixture = Fixture::new(1, 2);
    let huge = RequestSpec { tokens: u64::from(BLOCKS) * 16 + 1, ..spec(1) };
    fixture.scheduler.handle_submit(at(0), huge).expect("a new request");
    fixture.submit(2);
    assert_eq!(fixture.offer(0, 1), [released(0, 1, PrefillView::Ended)]);
    assert_eq!(fixture.finished(), [(1, Outcome::Failed { reason: FailReason::NoGroup(Role::Decode) })]);
    assert_eq!(pairs(&fixture.offer(0, 2)).len(), 1, "and blocks nobody");
}

#[test]
fn a_duplicate_is_refused_while_the_first_lives() {
    let mut fixture = Fixture::new(1, 1);
    fixture.submit(1);
    assert_eq!(fixture.scheduler.handle_submit(at(0), spec(1)), Err(Refusal::Duplicate(R1)));
    fixture.scheduler.handle_cancel(at(0), R1);
    fixture.commands();
    assert_eq!(jobs(&fixture.submit(1)), [(0, 1)], "afterwards it is a new one");
}

#[test]
fn load_and_held_prefixes_choose_the_group() {
    let mut fixture = Fixture::new(2, 2);
    let chosen: Vec<u64> = (1..=4).map(|request| jobs(&fixture.submit(request))[0].0).collect();
    assert_eq!(chosen, [0, 1, 0, 1]);
    let policy = Box::new(LongestHeldPrefix::default());
    let mut fixture = Fixture::with(1, 2, SchedulerTerms::default(), policy);
    let prefixed = |request| RequestSpec { prefix: Arc::new(vec![7, 8]), ..spec(request) };
    fixture.say(11, Message::Holds { added: vec![7], removed: vec![] });
    fixture.say(10, Message::Holds { added: vec![8], removed: vec![] });
    for (request, expected) in [(1, 11), (2, 11)] {
        fixture.scheduler.handle_submit(at(0), prefixed(request)).expect("a new request");
        fixture.commands();
        assert_eq!(pairs(&fixture.offer(0, request))[0].0, expected, "a prefix counts from its start");
    }
    fixture.say(11, Message::Holds { added: vec![], removed: vec![7] });
    fixture.scheduler.handle_submit(at(0), prefixed(3)).expect("a new request");
    fixture.commands();
    assert_eq!(pairs(&fixture.offer(0, 3))[0].0, 10);
}
