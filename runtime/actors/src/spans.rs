//! `tracing` spans of what a node has in hand: requests, offers, fetches.
//!
//! A span lives from the moment at which something is taken in hand to its end. With a request that somebody submitted as part of a trace, its
//! `trace_id`, `span_id` and `parent_id` place it there; a layer that exports spans takes them from these fields.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use kvferry_core::protocol::{Begun, Event, FetchCourse, OfferCourse, Outcome, Part, RequestCourse};
use kvferry_core::{HandoverId, NodeId, RequestId};
use tracing::{Span, field};

/// The target of every span, for filters.
pub const SPAN_TARGET: &str = "kvferry::handover";

/// The spans of one node that are open. Those that are left end with it.
#[derive(Debug)]
pub(crate) struct Spans {
    node: NodeId,
    open: RefCell<BTreeMap<Key, Span>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Request(RequestId),
    Offer(RequestId),
    Fetch(HandoverId),
}

impl Spans {
    pub(crate) fn new(node: NodeId) -> Self {
        Spans { node, open: RefCell::default() }
    }

    /// Opens, annotates and ends spans.
    pub(crate) fn happened(&self, event: &Event) {
        match event {
            Event::Began(begun) => self.begin(begun),
            Event::OfferOpened { request } => self.note(Key::Offer(*request), "its blocks are allocated"),
            Event::LeaseExpired { request } => self.note(Key::Offer(*request), "its lease has expired"),
            Event::Paired { request, handover, group } => {
                if let Some(span) = self.open.borrow().get(&Key::Request(*request)) {
                    tracing::debug!(target: SPAN_TARGET, parent: span, handover = handover.0, group = group.0, "paired");
                }
            }
            Event::RequestEnded(course) => self.request_ended(course),
            Event::OfferEnded(course) => self.offer_ended(course),
            Event::FetchEnded(course) => self.fetch_ended(course),
            _ => {}
        }
    }

    fn begin(&self, begun: &Begun) {
        let (node, request) = (self.node.0, begun.request.0);
        // What is not there is not recorded; numbers of spans are written as traces write them.
        macro_rules! span {
            ($name:literal, $($measured:ident),*) => {
                tracing::info_span!(
                    target: SPAN_TARGET,
                    parent: None,
                    $name,
                    node,
                    request,
                    handover = field::Empty,
                    trace_id = field::Empty,
                    span_id = field::Empty,
                    parent_id = field::Empty,
                    sampled = field::Empty,
                    outcome = field::Empty,
                    $($measured = field::Empty,)*
                )
            };
        }
        let (key, span) = match begun.part {
            Part::Request => (Key::Request(begun.request), span!("request", queue_us)),
            Part::Offer => (Key::Offer(begun.request), span!("offer", open_us, compute_us, post_us)),
            Part::Fetch => {
                let key = Key::Fetch(begun.handover.unwrap_or_default());
                (key, span!("fetch", room_us, plan_us, post_us, wire_us, notice_us, bytes))
            }
        };
        if span.is_disabled() {
            return;
        }
        if let Some(handover) = begun.handover {
            span.record("handover", handover.0);
        }
        if let Some((own, parent)) = begun.trace {
            span.record("trace_id", field::display(format_args!("{:032x}", own.trace())));
            span.record("span_id", field::display(format_args!("{:016x}", own.span())));
            span.record("parent_id", field::display(format_args!("{:016x}", parent.span())));
            span.record("sampled", own.is_sampled());
        }
        self.open.borrow_mut().insert(key, span);
    }

    fn note(&self, key: Key, what: &'static str) {
        if let Some(span) = self.open.borrow().get(&key) {
            tracing::debug!(target: SPAN_TARGET, parent: span, "{what}");
        }
    }

    fn request_ended(&self, course: &RequestCourse) {
        let Some(span) = self.take(Key::Request(course.request)) else { return };
        if let Some(handover) = course.handover {
            span.record("handover", handover.0);
        }
        time(&span, "queue_us", course.queue());
        end(&span, &course.outcome);
    }

    fn offer_ended(&self, course: &OfferCourse) {
        let Some(span) = self.take(Key::Offer(course.request)) else { return };
        if let Some(handover) = course.handover {
            span.record("handover", handover.0);
        }
        let since = |from: Option<kvferry_core::Moment>, to: Option<kvferry_core::Moment>| Some(to?.since(from?));
        time(&span, "open_us", since(Some(course.asked), course.opened));
        time(&span, "compute_us", since(course.opened, course.ready));
        time(&span, "post_us", Some(course.posting).filter(|posting| !posting.is_zero()));
        span.record("outcome", field::debug(course.view));
    }

    fn fetch_ended(&self, course: &FetchCourse) {
        let Some(span) = self.take(Key::Fetch(course.handover)) else { return };
        time(&span, "room_us", course.room());
        time(&span, "plan_us", course.plan());
        time(&span, "post_us", Some(course.posting).filter(|posting| !posting.is_zero()));
        time(&span, "wire_us", course.wire());
        time(&span, "notice_us", course.notice());
        span.record("bytes", course.paths.iter().map(|path| path.bytes).sum::<u64>());
        end(&span, &course.outcome);
    }

    fn take(&self, key: Key) -> Option<Span> {
        self.open.borrow_mut().remove(&key)
    }
}

fn time(span: &Span, name: &'static str, time: Option<Duration>) {
    if let Some(time) = time {
        span.record(name, u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }
}

fn end(span: &Span, outcome: &Outcome) {
    match outcome {
        Outcome::Delivered => span.record("outcome", "delivered"),
        Outcome::Cancelled => span.record("outcome", "cancelled"),
        Outcome::Failed { reason } => span.record("outcome", field::display(format_args!("failed: {reason}"))),
    };
}
