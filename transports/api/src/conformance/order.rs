//! Transfers that follow a device's event.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvferry_core::TransferId;

use super::lane::Lane;
use crate::{DeviceEvent, Event, PostError, Provider, TransferError};

/// An event of no device at all: done, or failed, when the test says so.
#[derive(Debug, Default)]
struct Staged {
    done: AtomicBool,
    failed: AtomicBool,
}

impl DeviceEvent for Staged {
    fn device(&self) -> &str {
        "a test"
    }

    fn is_done(&self) -> Result<bool, String> {
        if self.failed.load(Ordering::Relaxed) {
            return Err("the test says so".to_owned());
        }
        Ok(self.done.load(Ordering::Relaxed))
    }
}

/// `false` where the transport says that it cannot wait.
fn waits(posted: Result<(), PostError>) -> bool {
    match posted {
        Ok(()) => true,
        Err(PostError::Unordered { .. }) => false,
        Err(error) => panic!("{error}"),
    }
}

/// What follows an event moves when the event is done, and not before.
pub fn a_transfer_follows_its_event(provider: &dyn Provider) {
    let mut lane = Lane::small(provider);
    let (whole, event) = (lane.whole(), Arc::new(Staged::default()));
    let pull = lane.pull_of(1, whole);
    if waits(lane.pair.b.transport.post_after(pull, event.clone())) {
        lane.pair.turns(500);
        assert_eq!(lane.pair.b.end(TransferId(1)), None, "it did not wait");
        lane.destination.verify_untouched();
    }
    lane.expect(2, whole).unwrap();
    let push = lane.push_of(2, whole);
    if waits(lane.pair.a.transport.post_after(push, event.clone())) {
        lane.pair.turns(500);
        assert_eq!((lane.pair.a.end(TransferId(2)), lane.pair.b.end(TransferId(2))), (None, None), "it did not wait");
        lane.destination.verify_untouched();
        // What the source produces before the event counts.
        lane.source.fill(5);
        event.done.store(true, Ordering::Relaxed);
        lane.pulled(1, lane.bytes);
        lane.pushed(2, lane.bytes);
        lane.destination.verify(5);
    }
    // Nobody has to wait for what is done.
    event.done.store(true, Ordering::Relaxed);
    lane.source.fill(6);
    let pull = lane.pull_of(3, whole);
    lane.pair.b.transport.post_after(pull, event).unwrap();
    lane.pulled(3, lane.bytes);
    lane.destination.verify(6);
}

/// An event that fails fails what waits for it, and nothing moves.
pub fn a_failed_event_fails_its_transfer(provider: &dyn Provider) {
    let mut lane = Lane::small(provider);
    let (whole, event) = (lane.whole(), Arc::new(Staged::default()));
    let pull = lane.pull_of(1, whole);
    if waits(lane.pair.b.transport.post_after(pull, event.clone())) {
        event.failed.store(true, Ordering::Relaxed);
        lane.pair.until("the pull fails", |_, b| b.failed(TransferId(1)));
    }
    event.failed.store(true, Ordering::Relaxed);
    lane.expect(2, whole).unwrap();
    let push = lane.push_of(2, whole);
    if waits(lane.pair.a.transport.post_after(push, event)) {
        lane.pair.until("the push fails", |a, _| a.failed(TransferId(2)));
    }
    lane.pair.turns(100);
    lane.destination.verify_untouched();
    assert_eq!(lane.pair.b.end(TransferId(2)), None, "the push was announced");
}

/// What waits for an event can be cancelled; the event then has no effect.
pub fn a_transfer_that_waits_for_an_event_is_cancelled(provider: &dyn Provider) {
    let mut lane = Lane::small(provider);
    let (whole, event) = (lane.whole(), Arc::new(Staged::default()));
    let cancelled = |id| Event::Failed { id, error: TransferError::Cancelled };
    let pull = lane.pull_of(1, whole);
    if waits(lane.pair.b.transport.post_after(pull, event.clone())) {
        lane.pair.b.transport.cancel(TransferId(1));
        lane.pair.until("the pull ends", |_, b| b.end(TransferId(1)).is_some());
        assert_eq!(lane.pair.b.end(TransferId(1)), Some(&cancelled(TransferId(1))));
    }
    lane.expect(2, whole).unwrap();
    let push = lane.push_of(2, whole);
    if waits(lane.pair.a.transport.post_after(push, event.clone())) {
        lane.pair.a.transport.cancel(TransferId(2));
        lane.pair.until("the push ends", |a, _| a.end(TransferId(2)).is_some());
        assert_eq!(lane.pair.a.end(TransferId(2)), Some(&cancelled(TransferId(2))));
    }
    event.done.store(true, Ordering::Relaxed);
    lane.pair.turns(100);
    lane.destination.verify_untouched();
    lane.expect(3, whole).unwrap();
    lane.push(3, whole).unwrap();
    lane.pushed(3, lane.bytes);
    lane.destination.verify(1);
}
