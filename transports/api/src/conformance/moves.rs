//! Bytes that move: shapes, parts, numbers, notices.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::{Direction, End, TransferId, UnitRange};

use super::case::{Format, Holding, Shape, program};
use super::harness::{Party, turn, until};
use super::lane::{Lane, notice};
use crate::{Event, Evidence, Expected, Grade, Options, PeerId, Provider, Transfer};

/// What the shapes have to cover: other block sizes and orders, nothing, single bytes, odd sizes, tens of thousands of pieces.
fn shapes() -> Vec<(Shape, Format, Format)> {
    let shape = |layers, heads, run_bytes, start, end| Shape { layers, heads, run_bytes, start, end };
    let heads_first = |block_tokens| Format { heads_first: true, ..Format::plain(block_tokens) };
    let interleaved = |block_tokens| Format { interleaved: true, ..Format::plain(block_tokens) };
    vec![
        (shape(3, 4, 64, 0, 200), Format::plain(16), Format::plain(16)),
        (shape(3, 4, 64, 0, 203), Format::plain(16), Format::plain(64)),
        (shape(2, 2, 128, 0, 241), Format::plain(24), Format::plain(40)),
        (shape(2, 4, 64, 0, 100), Format::plain(16), heads_first(16)),
        (shape(2, 4, 64, 0, 100), heads_first(32), Format::plain(48)),
        (shape(2, 4, 64, 0, 96), heads_first(16), heads_first(16)),
        (shape(2, 4, 64, 0, 100), heads_first(16), heads_first(64)),
        (shape(3, 2, 32, 0, 90), interleaved(16), Format::plain(16)),
        (shape(3, 2, 32, 0, 90), Format::plain(8), interleaved(32)),
        (shape(2, 2, 32, 37, 37), Format::plain(16), Format::plain(16)),
        (shape(2, 3, 1, 0, 77), Format::plain(7), heads_first(5)),
        (shape(1, 1, 1, 0, 1), Format::plain(1), Format::plain(1)),
        (shape(3, 3, 37, 19, 120), Format::plain(11), interleaved(13)),
        (shape(5, 8, 16, 3, 403), Format::plain(16), heads_first(16)),
        (shape(2, 8, 1024, 0, 1024), Format::plain(64), Format::plain(64)),
    ]
}

/// Every shape, pulled.
pub fn pulls_every_shape(provider: &dyn Provider) {
    for (shape, from, to) in shapes() {
        let mut lane = Lane::open(provider, &Options::default(), &shape, from, to);
        lane.pull(1, lane.whole()).unwrap();
        lane.pulled(1, lane.bytes);
        lane.destination.verify(1);
        lane.source.verify(1);
    }
}

/// Every shape, pushed.
pub fn pushes_every_shape(provider: &dyn Provider) {
    for (shape, from, to) in shapes() {
        let mut lane = Lane::open(provider, &Options::default(), &shape, from, to);
        lane.expect(1, lane.whole()).unwrap();
        lane.push(1, lane.whole()).unwrap();
        lane.pushed(1, lane.bytes);
        lane.destination.verify(1);
        lane.source.verify(1);
    }
}

/// Three parts of one program, last first.
pub fn pulls_parts_in_any_order(provider: &dyn Provider) {
    let mut lane = Lane::small(provider);
    let parts = lane.program.split(3);
    for (id, part) in [0, 1, 2].into_iter().zip(&parts).rev() {
        lane.pull(id, *part).unwrap();
    }
    for (part, id) in parts.iter().zip(0..) {
        lane.pulled(id, lane.program.bytes_in(*part));
    }
    lane.destination.verify(1);
}

/// Three parts of one program, expected in one order and pushed in another.
pub fn pushes_parts_in_any_order(provider: &dyn Provider) {
    let mut lane = Lane::small(provider);
    let parts: Vec<(u128, UnitRange)> = (0..).zip(lane.program.split(3)).collect();
    for (id, part) in &parts {
        lane.expect(*id, *part).unwrap();
    }
    for (id, part) in parts.iter().rev() {
        lane.push(*id, *part).unwrap();
    }
    for (id, part) in &parts {
        lane.pushed(*id, lane.program.bytes_in(*part));
    }
    lane.destination.verify(1);
}

/// Two hundred small pulls and pushes at once, all parts of one program.
pub fn many_transfers_are_in_flight(provider: &dyn Provider) {
    let mut lane = Lane::small(provider);
    let parts: Vec<(u128, UnitRange)> = (0..).zip(lane.program.split(200)).collect();
    for (id, part) in &parts {
        if id % 2 == 0 {
            lane.pull(*id, *part).unwrap();
        } else {
            lane.expect(*id, *part).unwrap();
            lane.push(*id, *part).unwrap();
        }
    }
    for (id, part) in &parts {
        let bytes = lane.program.bytes_in(*part);
        if id % 2 == 0 { lane.pulled(*id, bytes) } else { lane.pushed(*id, bytes) }
    }
    lane.destination.verify(1);
}

/// One party pulls from two others while it is pushed to by a third.
pub fn several_peers_at_once(provider: &dyn Provider) {
    let shape = Shape { layers: 2, heads: 4, run_bytes: 64, start: 0, end: 1000 };
    let options = Options { poll_bytes_max: 64 << 10, ..Options::default() };
    let mut hub = Party::open(provider, &options);
    let mut others: Vec<Party> = (0..3).map(|_| Party::open(provider, &options)).collect();
    let mut lanes = Vec::new();
    for (i, other) in (0u32..).zip(&mut others) {
        let source = Holding::new(provider, 10 + i, &shape, Format::plain(16), 3 + u64::from(i));
        let destination = Holding::new(provider, 20 + i, &shape, Format::plain(32), 5 + u64::from(i));
        source.fill(u64::from(i));
        let program = Arc::new(program(&source, &destination));
        let (other_at_hub, hub_at_other) = (hub.connect(other), other.connect(&hub));
        let (source_keys, destination_keys) = (other.bind(&source.pool), hub.bind(&destination.pool));
        let id = TransferId(u128::from(i));
        let (local, transport) =
            if i < 2 { (destination.pool.id(), &mut hub.transport) } else { (source.pool.id(), &mut other.transport) };
        let (peer, direction) = if i < 2 { (other_at_hub, Direction::Pull) } else { (hub_at_other, Direction::Push) };
        let (keys, layout) =
            if i < 2 { (source_keys, source.pool.layout()) } else { (destination_keys, destination.pool.layout()) };
        let remote = transport.import(peer, &keys, layout).unwrap();
        let range = program.whole();
        let notice = Some(notice(u128::from(i)));
        let posted = Transfer { id, peer, direction, local, remote, program: Arc::clone(&program), range, notice };
        transport.post(posted).unwrap();
        if i == 2 {
            hub.transport.expect(Expected { from: None, id, pool: destination.pool.id(), program, range }).unwrap();
        }
        lanes.push((i, destination));
    }
    let [x, y, z] = others.as_mut_slice() else { panic!("three others") };
    until(&mut [&mut hub, x, y, z], "all three transfers end at the hub", |parties| {
        (0..3).all(|id| parties.first().is_some_and(|hub| hub.end(TransferId(id)).is_some()))
    });
    for (i, destination) in lanes {
        assert!(!hub.failed(TransferId(u128::from(i))), "{:?}", hub.events);
        destination.verify(u64::from(i));
    }
}

/// A push's notice comes when every byte is visible, a pull's when every byte is placed; epoch, id and chunk arrive intact.
pub fn notices_follow_the_bytes(provider: &dyn Provider) {
    let mut lane = Lane::slow(provider);
    lane.pull(1, lane.whole()).unwrap();
    lane.pair.until("the pull's notice comes", |a, _| a.saw(&Event::Notice { notice: notice(1) }));
    lane.destination.verify(1);
    lane.pulled(1, lane.bytes);

    lane.destination.clear();
    lane.source.fill(2);
    lane.expect(2, lane.whole()).unwrap();
    lane.push(2, lane.whole()).unwrap();
    lane.pair.until("the push's notice comes", |_, b| b.saw(&Event::Notice { notice: notice(2) }));
    lane.destination.verify(2);
    let b = &lane.pair.b.events;
    let arrived = b.iter().position(|e| matches!(e, Event::Arrived { .. }));
    assert!(
        arrived < b.iter().position(|e| matches!(e, Event::Notice { .. })),
        "it arrives before it is noticed: {b:?}"
    );
    lane.pushed(2, lane.bytes);
}

/// The doorbell or the bytes come first, the expectation after.
pub fn a_push_may_come_before_it_is_expected(provider: &dyn Provider) {
    let mut lane = Lane::small(provider);
    lane.push(1, lane.whole()).unwrap();
    lane.pair.turns(200);
    assert!(
        lane.pair.a.end(TransferId(1)).is_none()
            && lane.pair.b.events.iter().all(|e| !matches!(e, Event::Notice { .. }))
    );
    lane.destination.verify_untouched();
    lane.expect(1, lane.whole()).unwrap();
    lane.pushed(1, lane.bytes);
    lane.destination.verify(1);
}

/// A small transfer that is posted behind a large one ends first.
pub fn a_small_transfer_overtakes_a_large_one(provider: &dyn Provider) {
    let mut lane = Lane::slow(provider);
    lane.pull(1, lane.whole()).unwrap();
    lane.until_midway();
    let small = UnitRange { start: 0, end: 16 };
    lane.pull(2, small).unwrap();
    lane.pulled(2, lane.program.bytes_in(small));
    assert!(lane.pair.b.end(TransferId(1)).is_none(), "the large one was first");
    lane.pulled(1, lane.bytes);
    lane.destination.verify(1);
}

/// Whoever sleeps on the descriptors of `arm` wakes up for every step: no step is left to a timeout.
pub fn sleeping_on_the_descriptor_misses_nothing(provider: &dyn Provider) {
    let mut lane = Lane::small(provider);
    for id in 0..20 {
        lane.expect(2 * id, lane.whole()).unwrap();
        lane.push(2 * id, lane.whole()).unwrap();
        lane.pull(2 * id + 1, lane.whole()).unwrap();
        let start = Instant::now();
        let done = |lane: &Lane| {
            let (a, b) = (&lane.pair.a, &lane.pair.b);
            let ends = [b.end(TransferId(2 * id)), a.end(TransferId(2 * id)), b.end(TransferId(2 * id + 1))];
            ends.iter().all(Option::is_some) && a.saw(&Event::Notice { notice: notice(2 * id + 1) })
        };
        while !done(&lane) {
            assert!(start.elapsed() < Duration::from_secs(60));
            let woken = turn(&mut [&mut lane.pair.a, &mut lane.pair.b], Duration::from_secs(20));
            assert!(woken || done(&lane), "both slept though a transfer was under way");
        }
    }
    lane.destination.verify(1);
}

/// Both ends' tables are needed to pull, the own one to push.
pub(super) fn without_own_table(lane: &Lane, end: End) -> Arc<kvferry_core::Program> {
    Arc::new(lane.program.without(end))
}

/// Whoever initiates transfers knows what carries them: after a pull and after a push, but not again for each.
pub fn the_way_to_a_peer_is_shown(provider: &dyn Provider) {
    let shown = |party: &Party, of: PeerId| -> Vec<Evidence> {
        let one = |event: &Event| match event {
            Event::Shown { peer, evidence } if *peer == of => Some((**evidence).clone()),
            _ => None,
        };
        party.events.iter().filter_map(one).collect()
    };
    let mut lane = Lane::small(provider);
    for id in 0..8 {
        lane.pull(id, lane.whole()).unwrap();
        lane.pulled(id, lane.bytes);
        lane.expect(100 + id, lane.whole()).unwrap();
        lane.push(100 + id, lane.whole()).unwrap();
        lane.pushed(100 + id, lane.bytes);
    }
    let ways = [shown(&lane.pair.b, lane.pair.a_at_b), shown(&lane.pair.a, lane.pair.b_at_a)];
    for evidence in &ways {
        assert!((1..=3).contains(&evidence.len()), "told {} times", evidence.len());
        let last = evidence.last().unwrap();
        assert!(last.grade >= Grade::E3 && !last.lanes.is_empty(), "{last:?}");
        assert!(last.lanes.iter().all(|lane| lane.contains('/')), "{last:?}");
        assert!(last.grade == Grade::E5 || !last.unseen.is_empty(), "what is not proven is said: {last:?}");
    }
}
