//! Transfers that do not reach their end: cancelled, fenced, cut off.

use std::sync::Arc;

use kvferry_core::{Direction, FenceProof, TransferId};

use super::case::{Format, Holding, Shape, program};
use super::harness::{Party, turns, until};
use super::lane::{Lane, notice};
use crate::{Event, Options, PostError, Provider, Transfer, TransferError};

fn cancelled(id: u128) -> Event {
    Event::Failed { id: TransferId(id), error: TransferError::Cancelled }
}

/// A pull that is cancelled midway ends once, and no byte is written after it said so.
pub fn a_cancelled_pull_touches_nothing_more(provider: &dyn Provider) {
    let mut lane = Lane::slow(provider);
    lane.pull(1, lane.whole()).unwrap();
    lane.until_midway();
    lane.pair.b.transport.cancel(TransferId(1));
    lane.pair.b.transport.cancel(TransferId(1));
    lane.pair.until("the pull ends", |_, b| b.end(TransferId(1)).is_some());
    assert_eq!(lane.pair.b.end(TransferId(1)), Some(&cancelled(1)));
    lane.verify_still();
    assert!(!lane.pair.a.saw(&Event::Notice { notice: notice(1) }), "a notice of a cancelled pull");
    lane.pull(2, lane.whole()).unwrap();
    lane.pulled(2, lane.bytes);
    lane.destination.verify(1);
    assert_eq!(lane.pair.b.end(TransferId(1)), Some(&cancelled(1)));
}

/// The receiver cancels a push midway: it ends once at each end, and no byte is written after the receiver heard so.
pub fn a_cancelled_expectation_touches_nothing_more(provider: &dyn Provider) {
    let mut lane = Lane::slow(provider);
    lane.expect(1, lane.whole()).unwrap();
    lane.push(1, lane.whole()).unwrap();
    lane.until_midway();
    lane.pair.b.transport.cancel(TransferId(1));
    lane.pair.until("the expectation ends", |_, b| b.end(TransferId(1)).is_some());
    assert_eq!(lane.pair.b.end(TransferId(1)), Some(&cancelled(1)));
    lane.verify_still();
    lane.pair.until("the push fails", |a, _| a.failed(TransferId(1)));
    assert!(!lane.pair.b.saw(&Event::Notice { notice: notice(1) }), "a notice of a cancelled push");
    lane.expect(2, lane.whole()).unwrap();
    lane.push(2, lane.whole()).unwrap();
    lane.pushed(2, lane.bytes);
    lane.destination.verify(1);
}

/// The source cancels a push midway: it ends once at the source, and the receiver's expectation does not succeed.
pub fn a_cancelled_push_ends_once(provider: &dyn Provider) {
    let mut lane = Lane::slow(provider);
    lane.expect(1, lane.whole()).unwrap();
    lane.push(1, lane.whole()).unwrap();
    lane.until_midway();
    lane.pair.a.transport.cancel(TransferId(1));
    lane.pair.until("the push ends", |a, _| a.end(TransferId(1)).is_some());
    assert_eq!(lane.pair.a.end(TransferId(1)), Some(&cancelled(1)));
    lane.pair.b.transport.cancel(TransferId(1));
    lane.pair.until("the expectation ends", |_, b| b.end(TransferId(1)).is_some());
    assert!(lane.pair.b.failed(TransferId(1)));
    lane.verify_still();
}

/// An expectation that no push came for is cancelled at once, and the push that comes too late is refused.
pub fn unmatched_expectations_can_be_cancelled(provider: &dyn Provider) {
    let shape = Shape { layers: 1, heads: 2, run_bytes: 128, start: 0, end: 64 };
    let options = Options { unexpected_wait_ms: 50, ..Options::default() };
    let mut lane = Lane::open(provider, &options, &shape, Format::plain(16), Format::plain(16));
    lane.expect(1, lane.whole()).unwrap();
    lane.pair.b.transport.cancel(TransferId(1));
    lane.pair.until("the expectation ends", |_, b| b.end(TransferId(1)).is_some());
    assert_eq!(lane.pair.b.end(TransferId(1)), Some(&cancelled(1)));
    lane.push(1, lane.whole()).unwrap();
    lane.pair.until("the push is refused", |a, _| a.failed(TransferId(1)));
    lane.destination.verify_untouched();
}

/// After the proof nothing of that peer is written.
pub fn a_fence_ends_everything_with_a_peer(provider: &dyn Provider) {
    let mut lane = Lane::slow(provider);
    let parts = lane.program.split(2);
    lane.pull(1, parts[0]).unwrap();
    lane.until_midway();
    let peer = lane.pair.a_at_b;
    lane.pair.b.transport.fence(peer);
    lane.pair.until("the fence is proved", |_, b| b.events.iter().any(|e| matches!(e, Event::Fenced { .. })));
    let proved = |e: &Event| matches!(e, Event::Fenced { peer: fenced, .. } if *fenced == peer);
    let at = lane.pair.b.events.iter().position(proved).unwrap();
    assert!(
        !matches!(lane.pair.b.events.get(at), Some(Event::Fenced { proof: FenceProof::PeerProcessDead, .. })),
        "the peer lives"
    );
    lane.pair.until("the pull fails", |_, b| b.failed(TransferId(1)));
    lane.verify_still();
}

/// Letting a peer go fails transfers at both ends, and names it lost at the other.
pub fn a_disconnect_fails_both_ends(provider: &dyn Provider) {
    let mut lane = Lane::slow(provider);
    lane.pull(1, lane.whole()).unwrap();
    lane.expect(2, lane.whole()).unwrap();
    lane.until_midway();
    let peer = lane.pair.a_at_b;
    lane.pair.b.transport.disconnect(peer);
    lane.pair.until("the pull fails and the peer is lost", |a, b| b.failed(TransferId(1)) && a.lost_someone());
    lane.verify_still();
    let after = lane.pull(3, lane.whole());
    assert!(matches!(after, Err(PostError::UnknownPeer(_) | PostError::UnknownRemote(_))), "{after:?}");
    lane.pair.b.transport.disconnect(peer);
    assert!(lane.pair.b.end(TransferId(2)).is_none(), "an expectation that nobody met outlives connections");
}

/// A peer that goes away fails its transfers and nobody else's.
pub fn a_dropped_peer_fails_its_transfers_only(provider: &dyn Provider) {
    let shape = Shape { layers: 4, heads: 4, run_bytes: 256, start: 0, end: 2048 };
    let options = Options { poll_bytes_max: 64 << 10, ..Options::default() };
    let mut hub = Party::open(provider, &options);
    let mut others: Vec<Party> = (0..2).map(|_| Party::open(provider, &options)).collect();
    let mut destinations = Vec::new();
    for (i, other) in (0u32..).zip(&mut others) {
        let source = Holding::new(provider, 10 + i, &shape, Format::plain(16), 3 + u64::from(i));
        let destination = Holding::new(provider, 20 + i, &shape, Format::plain(32), 5 + u64::from(i));
        source.fill(u64::from(i));
        let program = Arc::new(program(&source, &destination));
        let peer = hub.connect(other);
        let keys = other.bind(&source.pool);
        hub.bind(&destination.pool);
        let remote = hub.import(peer, &keys, source.pool.layout());
        let range = program.whole();
        let (id, local) = (TransferId(u128::from(i)), destination.pool.id());
        let pull = Transfer { id, peer, direction: Direction::Pull, local, remote, program, range, notice: None };
        hub.transport.post(pull).unwrap();
        destinations.push(destination);
    }
    let second = others.pop().unwrap();
    let mut first = others.pop().unwrap();
    let mut second = Some(second);
    for _ in 0..2000 {
        let Some(going) = second.as_mut() else { break };
        turns(&mut [&mut hub, &mut first, going], 1);
        let moved = destinations
            .get(1)
            .is_some_and(|d| d.snapshot().iter().flatten().any(|&byte| byte != super::case::SENTINEL));
        if moved {
            second = None;
        }
    }
    assert!(second.is_none(), "nothing moved");
    until(&mut [&mut hub, &mut first], "one fails, the other completes", |parties| {
        let hub = parties.first();
        hub.is_some_and(|hub| hub.lost_someone() && hub.failed(TransferId(1)) && hub.end(TransferId(0)).is_some())
    });
    assert!(matches!(hub.end(TransferId(0)), Some(Event::Completed { .. })), "{:?}", hub.events);
    assert!(
        matches!(hub.end(TransferId(1)), Some(Event::Failed { error: TransferError::PeerLost(_), .. })),
        "{:?}",
        hub.events
    );
    destinations.first().unwrap().verify(0);
}

/// A pool that is withdrawn at either end: every transfer ends, then the pool is let go, and it can be bound anew.
pub fn an_unbound_pool_is_let_go(provider: &dyn Provider) {
    let mut lane = Lane::slow(provider);
    let (source, destination) = (lane.source.pool.id(), lane.destination.pool.id());
    lane.pull(1, lane.whole()).unwrap();
    lane.until_midway();
    lane.pair.b.transport.unbind(destination);
    lane.pair.until("it is let go", |_, b| b.saw(&Event::Unbound { pool: destination }));
    let events = &lane.pair.b.events;
    let end = events.iter().position(|e| matches!(e, Event::Completed { .. } | Event::Failed { .. }));
    let unbound = events.iter().position(|e| matches!(e, Event::Unbound { .. }));
    assert!(end.is_some() && end < unbound, "transfers end first: {events:?}");
    lane.verify_still();
    let gone = lane.pull(2, lane.whole());
    assert!(matches!(gone, Err(PostError::UnknownPool(_))), "{gone:?}");

    lane.pair.b.bind(&lane.destination.pool);
    lane.pull(3, lane.whole()).unwrap();
    lane.until_midway();
    lane.pair.a.transport.unbind(source);
    lane.pair.until("the source is let go, the pull ends", |a, b| {
        a.saw(&Event::Unbound { pool: source }) && b.end(TransferId(3)).is_some()
    });
    let keys = lane.pair.a.bind(&lane.source.pool);
    lane.source_at_b = lane.pair.b.import(lane.pair.a_at_b, &keys, lane.source.pool.layout());
    lane.destination.clear();
    lane.pull(4, lane.whole()).unwrap();
    lane.pulled(4, lane.bytes);
    lane.destination.verify(1);
}

/// The transport keeps what it still needs.
pub fn a_pool_outlives_its_user(provider: &dyn Provider) {
    let mut lane = Lane::slow(provider);
    lane.pull(1, lane.whole()).unwrap();
    lane.until_midway();
    let spare = Shape { layers: 1, heads: 1, run_bytes: 1, start: 0, end: 1 };
    lane.source = Holding::new(provider, 70, &spare, Format::plain(1), 1);
    lane.pulled(1, lane.bytes);
    lane.destination.verify(1);
    lane.pull(2, lane.whole()).unwrap();
    lane.destination = Holding::new(provider, 71, &spare, Format::plain(1), 1);
    lane.pulled(2, lane.bytes);
}
