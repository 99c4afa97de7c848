//! The scheduler beside books that are kept of everything it says: who works on which request, which credits are out, who was answered.

use std::collections::{BTreeMap, BTreeSet};

use kvferry_core::protocol::{
    Command, Event, FailReason, LeastLoaded, Message, OfferSummary, Outcome, OutcomeReport, PrefillView, Refusal, Role,
    Scheduler, SchedulerTerms,
};
use kvferry_core::{GroupId, HandoverId, NodeId, RequestId};
use proptest::prelude::*;

use super::kit::*;

/// Groups of one rank each: their node is their number.
const PREFILL: [u64; 2] = [0, 1];
const DECODE: [u64; 2] = [10, 11];
const JOBS_MAX: usize = 2;
/// As `place` says.
const HANDOVERS_MAX: usize = 3;
/// Blocks that every request takes of a decode group.
const REQUEST_BLOCKS: usize = 3;

#[derive(Clone, Debug)]
enum Operation {
    Submit(u64),
    Cancel(u64),
    /// A prefill group has its offer; whether it has the job or not.
    Offered(usize, u64),
    OfferFailed(usize, u64, u8),
    /// The how-many-th handover that is out somewhere is decided, by its own leader or by another.
    Decide(usize, u8, bool),
    Freed(usize, bool),
    Lose(usize),
    Join(usize),
    Health(usize, bool),
    Wait(u64),
    Nonsense(u64),
}

fn operation() -> impl Strategy<Value = Operation> {
    let (request, side, which) = (0..8_u64, 0..2_usize, 0..6_usize);
    let right = prop::bool::weighted(0.95);
    prop_oneof![
        10 => request.clone().prop_map(Operation::Submit),
        1 => request.clone().prop_map(Operation::Cancel),
        16 => (side.clone(), request.clone()).prop_map(|(group, r)| Operation::Offered(group, r)),
        2 => (side, request.clone(), 0..3_u8).prop_map(|(group, r, why)| Operation::OfferFailed(group, r, why)),
        14 => (which.clone(), 0..6_u8, right).prop_map(|(nth, how, right)| Operation::Decide(nth, how, right)),
        14 => (which, right).prop_map(|(nth, right)| Operation::Freed(nth, right)),
        1 => (0..4_usize).prop_map(Operation::Lose),
        3 => (0..4_usize).prop_map(Operation::Join),
        2 => (0..4_usize, any::<bool>()).prop_map(|(group, well)| Operation::Health(group, well)),
        3 => (0..5_000_u64).prop_map(Operation::Wait),
        1 => request.prop_map(Operation::Nonsense),
    ]
}

fn node(group: usize) -> u64 {
    [PREFILL[0], PREFILL[1], DECODE[0], DECODE[1]][group]
}

#[derive(Default)]
struct Books {
    live: BTreeSet<u64>,
    alive: BTreeSet<u64>,
    ill: BTreeSet<u64>,
    /// Requests whose prefill credit is out, by group.
    jobs: BTreeMap<u64, BTreeSet<u64>>,
    /// Of those, the ones that are offered.
    offered: BTreeSet<(u64, u64)>,
    /// Handovers whose credits are out, by group, and their requests.
    out: BTreeMap<u64, BTreeMap<u64, u64>>,
    undecided: BTreeSet<u64>,
    delivered: BTreeSet<u64>,
    last_handover: u64,
    epochs: u64,
}

impl Books {
    fn note(&mut self, command: Command) {
        let Command::Send { to: NodeId(to), message } = command else { panic!("a scheduler only talks") };
        assert!(self.alive.contains(&to), "{message:?} to {to}, which is gone");
        match message {
            Message::Prefill(job) => {
                let request = job.spec.request.0;
                assert!(self.live.contains(&request) && !self.ill.contains(&to), "{request} at {to}");
                assert!(self.jobs.values().all(|jobs| !jobs.contains(&request)), "{request} is prefilled already");
                let jobs = self.jobs.entry(to).or_default();
                jobs.insert(request);
                assert!(jobs.len() <= JOBS_MAX, "more jobs than credits");
            }
            Message::Release { request, .. } => {
                assert!(self.jobs.entry(to).or_default().remove(&request.0), "{request} was released before");
                self.offered.remove(&(to, request.0));
            }
            Message::Renew { requests } => {
                let jobs = self.jobs.entry(to).or_default();
                assert!(requests.iter().all(|request| jobs.contains(&request.0)), "renewed, but not wanted");
            }
            Message::Pair(pairing) => {
                let (handover, request) = (pairing.handover.0, pairing.spec.request.0);
                assert!(handover > self.last_handover && !self.ill.contains(&to), "{handover} at {to}");
                self.last_handover = handover;
                let source = u64::from(pairing.source.0);
                assert!(self.live.contains(&request) && self.offered.contains(&(source, request)), "no offer stands");
                let pending = |(other, theirs): (&u64, &u64)| *theirs == request && self.undecided.contains(other);
                assert!(!self.out.values().flatten().any(pending), "{request} has another handover");
                let out = self.out.entry(to).or_default();
                out.insert(handover, request);
                assert!(out.len() <= HANDOVERS_MAX, "more handovers than credits");
                self.undecided.insert(handover);
            }
            Message::Abort { .. } | Message::OutcomesKnown { .. } => {}
            other => panic!("{other:?}"),
        }
    }

    /// The how-many-th handover that is out, or of the undecided ones.
    fn nth(&self, nth: usize, undecided: bool) -> Option<(u64, u64, u64)> {
        let all = self.out.iter().flat_map(|(group, out)| out.iter().map(|(handover, r)| (*group, *handover, *r)));
        all.filter(|(_, handover, _)| self.undecided.contains(handover) == undecided).nth(nth)
    }

    fn lose(&mut self, group: u64) {
        self.alive.remove(&group);
        self.ill.remove(&group);
        self.jobs.remove(&group);
        self.offered.retain(|(theirs, _)| *theirs != group);
        for handover in self.out.remove(&group).unwrap_or_default().into_keys() {
            self.undecided.remove(&handover);
        }
    }
}

struct Subject {
    scheduler: Scheduler,
    books: Books,
    now: u64,
}

impl Subject {
    fn new() -> Self {
        let terms = SchedulerTerms { prefill_jobs_max: JOBS_MAX as u64, leases: leases(), ..SchedulerTerms::default() };
        let mut subject =
            Subject { scheduler: Scheduler::new(terms, Box::new(LeastLoaded), 1), books: Books::default(), now: 0 };
        (0..4).for_each(|group| subject.apply(&Operation::Join(group)));
        subject
    }

    fn apply(&mut self, operation: &Operation) {
        let now = millis(self.now);
        match *operation {
            Operation::Submit(request) => {
                let expected = self.books.live.insert(request);
                let result = self.scheduler.handle_submit(now, spec(request));
                assert_eq!(result.is_ok(), expected, "{result:?}");
                assert!(expected || result == Err(Refusal::Duplicate(RequestId(request))));
            }
            Operation::Cancel(request) => self.scheduler.handle_cancel(now, RequestId(request)),
            Operation::Offered(group, request) => {
                let group = PREFILL[group];
                if self.books.jobs.get(&group).is_some_and(|jobs| jobs.contains(&request)) {
                    self.books.offered.insert((group, request));
                }
                let offer = OfferSummary { request: RequestId(request), dp: 0, steps: vec![2, 4] };
                self.say(group, Message::Offered(offer));
            }
            Operation::OfferFailed(group, request, why) => {
                let group = PREFILL[group];
                self.books.offered.remove(&(group, request));
                let request = RequestId(request);
                let reason = match why {
                    0 => FailReason::Refused(Refusal::LeaseExpired(request)),
                    1 => FailReason::Unhealthy("stuck".into()),
                    _ => FailReason::Engine("full".into()),
                };
                self.say(group, Message::OfferFailed { request, reason });
            }
            Operation::Decide(nth, how, right) => self.decide(nth, how, right),
            Operation::Freed(nth, right) => {
                let Some((group, handover, _)) = self.books.nth(nth, false) else { return };
                let from = if right { group } else { group ^ 1 };
                if right {
                    self.books.out.entry(group).or_default().remove(&handover);
                }
                self.say(from, Message::Freed { handover: HandoverId(handover) });
            }
            Operation::Lose(group) => {
                let group = node(group);
                self.books.lose(group);
                self.scheduler.handle_lost(now, &lost(group, self.books.epochs));
            }
            Operation::Join(group) => {
                let role = if group < 2 { Role::Prefill } else { Role::Decode };
                let group = node(group);
                // One that is here already has started again.
                self.books.lose(group);
                self.books.alive.insert(group);
                self.books.epochs += 1;
                let place = place(role, group as u32, 0, &geometry(1));
                self.scheduler.handle_member(now, &member(group, self.books.epochs, Some(place)));
            }
            Operation::Health(group, well) => {
                let group = node(group);
                if self.books.alive.contains(&group) {
                    if well {
                        self.books.ill.remove(&group);
                    } else {
                        self.books.ill.insert(group);
                    }
                }
                self.say(group, Message::Health { trouble: (!well).then(|| "stuck".to_owned()) });
            }
            Operation::Wait(milliseconds) => {
                self.now += milliseconds;
                self.scheduler.handle_timeout(millis(self.now));
            }
            Operation::Nonsense(number) => {
                let handover = HandoverId(number + 1_000_000);
                let outcome = Outcome::Delivered;
                let report = OutcomeReport { handover, outcome, at: now, paths: vec![] };
                self.say(DECODE[0], Message::Freed { handover });
                self.say(PREFILL[0], Message::Release { request: RequestId(number), view: PrefillView::Ended });
                if self.books.alive.contains(&DECODE[0]) {
                    self.say(DECODE[0], Message::Outcome(report));
                }
            }
        }
        self.hear();
    }

    fn decide(&mut self, nth: usize, how: u8, right: bool) {
        let Some((group, handover, request)) = self.books.nth(nth, true) else { return };
        let outcome = match how {
            0..=2 => Outcome::Delivered,
            3 => Outcome::Failed { reason: FailReason::Engine("full".into()) },
            4 => Outcome::Failed { reason: FailReason::Refused(Refusal::LeaseExpired(RequestId(request))) },
            _ => Outcome::Cancelled,
        };
        let from = if right { group } else { group ^ 1 };
        if right {
            self.books.undecided.remove(&handover);
            if outcome.is_delivered() {
                self.books.delivered.insert(request);
            }
        }
        let report = OutcomeReport { handover: HandoverId(handover), outcome, at: millis(self.now), paths: vec![] };
        if self.books.alive.contains(&from) {
            self.say(from, Message::Outcome(report));
        }
    }

    fn say(&mut self, from: u64, message: Message) {
        self.scheduler.handle_message(millis(self.now), NodeId(from), message);
    }

    fn hear(&mut self) {
        // What a lost group is told is dropped with its session.
        for command in commands(self.scheduler.outbox()) {
            self.books.note(command);
        }
        for event in events(self.scheduler.outbox()) {
            if let Event::Finished(finished) = event {
                let request = finished.request.0;
                assert!(self.books.live.remove(&request), "{request} was answered before");
                let delivered = self.books.delivered.remove(&request);
                assert!(delivered || !finished.outcome.is_delivered(), "{request} was never delivered");
            }
        }
        self.check();
    }

    fn check(&self) {
        let books = &self.books;
        let vitals = self.scheduler.vitals();
        assert_eq!(vitals.waiting, [("requests", books.live.len() as u64)]);
        let jobs = books.jobs.values().map(BTreeSet::len).sum::<usize>() as u64;
        let out = books.out.values().map(BTreeMap::len).sum::<usize>() * (1 + REQUEST_BLOCKS);
        assert_eq!(vitals.credits, [("prefill", jobs), ("decode", out as u64)]);
        assert!(!vitals.is_stuck(), "{vitals:?}");
    }

    /// Everybody is well and does what is asked: whatever is asked for is answered.
    fn settle(&mut self) {
        for group in 0..4 {
            if self.books.alive.contains(&node(group)) {
                self.apply(&Operation::Health(group, true));
            } else {
                self.apply(&Operation::Join(group));
            }
        }
        for _ in 0..200 {
            for (group, node) in PREFILL.iter().enumerate() {
                for request in self.books.jobs.get(node).cloned().unwrap_or_default() {
                    self.apply(&Operation::Offered(group, request));
                }
            }
            self.apply(&Operation::Decide(0, 0, true));
            self.apply(&Operation::Freed(0, true));
            self.apply(&Operation::Wait(2_000));
        }
    }
}

proptest! {
    #[test]
    fn the_books_balance(operations in prop::collection::vec(operation(), 1..250)) {
        let mut subject = Subject::new();
        for operation in &operations {
            subject.apply(operation);
        }
        subject.settle();
        prop_assert!(subject.books.live.is_empty(), "unanswered: {:?}", subject.books.live);
        prop_assert!(subject.scheduler.vitals().is_quiet(), "{:?}", subject.scheduler.vitals());
        prop_assert!(subject.scheduler.ready_groups().contains(&GroupId(10)));
    }
}
