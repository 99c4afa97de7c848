//! What has to be refused, and how.

use std::sync::Arc;

use bytes::Bytes;
use kvferry_core::{End, PoolId, Program, TransferId, UnitRange};

use super::case::{Format, Shape};
use super::harness::{Pair, Party, until};
use super::lane::Lane;
use super::moves::without_own_table;
use crate::{BindError, Event, ImportError, Options, PeerId, PoolKeys, PostError, Provider, RemotePool, TransferError};

/// A push that nobody expects is refused after the wait, and the connection goes on.
pub fn an_unexpected_push_is_refused(provider: &dyn Provider) {
    let shape = Shape { layers: 2, heads: 2, run_bytes: 128, start: 0, end: 512 };
    let options = Options { unexpected_wait_ms: 50, ..Options::default() };
    let mut lane = Lane::open(provider, &options, &shape, Format::plain(16), Format::plain(16));
    lane.push(1, lane.whole()).unwrap();
    lane.pair.until("the push is refused", |a, _| a.end(TransferId(1)).is_some());
    let end = lane.pair.a.end(TransferId(1));
    assert!(matches!(end, Some(Event::Failed { error: TransferError::Refused(_), .. })), "{end:?}");
    lane.destination.verify_untouched();
    lane.expect(2, lane.whole()).unwrap();
    lane.push(2, lane.whole()).unwrap();
    lane.pushed(2, lane.bytes);
    lane.destination.verify(1);
}

/// Both ends hear of it when they planned different programs, and the connection goes on.
pub fn plans_that_differ_fail_at_both_ends(provider: &dyn Provider) {
    let mut lane = Lane::small(provider);
    let mut other = Program::clone(&lane.program);
    other.segments.truncate(1);
    let (here, there) = (lane.program.fingerprint(), other.fingerprint());
    let mut expected = lane.expected(1, other.whole());
    expected.program = Arc::new(other.without(End::Source));
    lane.pair.b.transport.expect(expected).unwrap();
    lane.push(1, lane.whole()).unwrap();
    lane.pair.until("both fail", |a, b| a.failed(TransferId(1)) && b.failed(TransferId(1)));
    for (party, local, remote) in [(&lane.pair.a, here, there), (&lane.pair.b, there, here)] {
        let wanted = Event::Failed { id: TransferId(1), error: TransferError::Mismatch { local, remote } };
        assert_eq!(party.end(TransferId(1)), Some(&wanted));
    }
    lane.destination.verify_untouched();
    lane.pull(2, lane.whole()).unwrap();
    lane.pulled(2, lane.bytes);
}

/// The same program but another part of it is no match either.
pub fn ranges_that_differ_fail_at_both_ends(provider: &dyn Provider) {
    let mut lane = Lane::small(provider);
    let mut half = lane.whole();
    half.end /= 2;
    lane.expect(1, half).unwrap();
    lane.push(1, lane.whole()).unwrap();
    lane.pair.until("both fail", |a, b| a.failed(TransferId(1)) && b.failed(TransferId(1)));
    lane.pair.turns(100);
    lane.destination.verify_untouched();
}

fn with_block(program: &Program, end: End, block: u32) -> Arc<Program> {
    let raise = |table: &Option<Arc<[u32]>>| {
        table.as_ref().map(|blocks| {
            let mut blocks = blocks.to_vec();
            if let Some(last) = blocks.last_mut() {
                *last = block;
            }
            Arc::from(blocks)
        })
    };
    let tables = program.tables(end).iter().map(raise).collect();
    Arc::new(program.clone().with_tables(end, tables))
}

/// Whatever would leave the local pool, or lacks the own table, is not even posted.
pub fn programs_outside_the_local_pool_are_not_posted(provider: &dyn Provider) {
    let mut lane = Lane::small(provider);
    let whole = lane.whole();
    let refused =
        |result: Result<(), PostError>| assert!(matches!(result, Err(PostError::Program { .. })), "{result:?}");
    for program in [with_block(&lane.program, End::Destination, 1_000_000), without_own_table(&lane, End::Destination)]
    {
        let mut pull = lane.pull_of(1, whole);
        pull.program = Arc::clone(&program);
        refused(lane.pair.b.transport.post(pull));
        let mut expected = lane.expected(1, whole);
        expected.program = program;
        refused(lane.pair.b.transport.expect(expected));
    }
    for program in [with_block(&lane.program, End::Source, 1_000_000), without_own_table(&lane, End::Source)] {
        let mut push = lane.push_of(1, whole);
        push.program = program;
        refused(lane.pair.a.transport.post(push));
    }
    lane.pair.turns(50);
    assert!(lane.pair.b.end(TransferId(1)).is_none() && lane.pair.a.end(TransferId(1)).is_none());
    lane.destination.verify_untouched();
    lane.pull(1, whole).unwrap();
    lane.pulled(1, lane.bytes);
}

/// Whatever would leave the peer's pool is refused, here or there, and the peer's other transfers go on.
pub fn programs_outside_the_remote_pool_are_refused(provider: &dyn Provider) {
    let mut lane = Lane::slow(provider);
    lane.pull(1, lane.whole()).unwrap();
    let mut pull = lane.pull_of(2, lane.whole());
    pull.program = with_block(&lane.program, End::Source, 1_000_000);
    match lane.pair.b.transport.post(pull.clone()) {
        Err(error) => assert!(matches!(error, PostError::Program { .. }), "{error}"),
        Ok(()) => lane.pair.until("the owner refuses", |_, b| b.failed(TransferId(2))),
    }

    // The layout lies: the owner knows better.
    let mut layout = lane.source.pool.layout().clone();
    layout.regions.iter_mut().for_each(|bytes| *bytes *= 1 << 12);
    for region in 0..layout.regions.len() as u32 {
        let mut next = 0;
        for plane in layout.planes.iter_mut().filter(|plane| plane.region == region) {
            plane.offset = next;
            plane.blocks = 1_000_001;
            plane.block_stride = plane.block_bytes;
            next += plane.block_bytes * 1_000_001;
        }
        if let Some(bytes) = layout.regions.get_mut(region as usize) {
            *bytes = (*bytes).max(next);
        }
    }
    let keys = lane.pair.a.bind(
        &super::case::Holding::new(
            provider,
            77,
            &Shape { layers: 4, heads: 4, run_bytes: 256, start: 0, end: 64 },
            Format::plain(16),
            1,
        )
        .pool,
    );
    match lane.pair.b.transport.import(lane.pair.a_at_b, &keys, &layout) {
        Err(error) => assert!(matches!(error, ImportError::Layout(_)), "{error}"),
        Ok(remote) => {
            pull.id = TransferId(3);
            pull.remote = remote;
            match lane.pair.b.transport.post(pull) {
                Err(error) => assert!(matches!(error, PostError::Program { .. }), "{error}"),
                Ok(()) => lane.pair.until("the owner refuses", |_, b| b.failed(TransferId(3))),
            }
        }
    }
    lane.pulled(1, lane.bytes);
    lane.destination.verify(1);
}

/// Peers, pools and transfers that are not there, or twice.
pub fn unknown_names_are_typed_errors(provider: &dyn Provider) {
    let mut lane = Lane::slow(provider);
    let whole = lane.whole();
    let pull = lane.pull_of(1, whole);
    let b = &mut lane.pair.b.transport;

    let mut wrong = pull.clone();
    wrong.peer = PeerId(4_000_000);
    assert!(matches!(b.post(wrong), Err(PostError::UnknownPeer(_))));
    let mut wrong = pull.clone();
    wrong.local = PoolId(99);
    assert!(matches!(b.post(wrong), Err(PostError::UnknownPool(PoolId(99)))));
    let mut wrong = pull.clone();
    wrong.remote = RemotePool(4_000_000);
    assert!(matches!(b.post(wrong), Err(PostError::UnknownRemote(_))));
    assert!(matches!(b.bind(&lane.destination.pool), Err(BindError::Duplicate(_))));
    let layout = lane.source.pool.layout();
    assert!(matches!(b.import(PeerId(4_000_000), &PoolKeys(Bytes::new()), layout), Err(ImportError::UnknownPeer(_))));
    b.cancel(TransferId(12345));

    b.post(pull.clone()).unwrap();
    assert!(matches!(b.post(pull), Err(PostError::Duplicate(_))));
    lane.expect(2, whole).unwrap();
    let twice = lane.expect(2, whole);
    assert!(matches!(twice, Err(PostError::Duplicate(_))));
    lane.pulled(1, lane.bytes);
    lane.pull(1, whole).unwrap();
    lane.pair.until("an ended transfer's id can be used again", |_, b| {
        b.events.iter().filter(|e| matches!(e, Event::Completed { id: TransferId(1), .. })).count() == 2
    });
}

/// Cut or random bytes are never an address.
pub fn bad_addresses_are_refused(provider: &dyn Provider) {
    let mut pair = Pair::open(provider, &Options::default());
    let address = pair.b.transport.address();
    for cut in 0..address.len() {
        assert!(pair.a.transport.connect(&address[..cut]).is_err(), "{cut} of {} bytes were taken", address.len());
    }
    for bytes in noise() {
        assert!(pair.a.transport.connect(&bytes).is_err());
    }
    pair.turns(10);
    assert!(!pair.a.lost_someone() && !pair.b.lost_someone());
}

/// Cut or random bytes, and another pool's keys, name no pool.
pub fn bad_keys_are_refused(provider: &dyn Provider) {
    let mut lane = Lane::small(provider);
    let spare = super::case::Holding::new(
        provider,
        50,
        &Shape { layers: 1, heads: 1, run_bytes: 8, start: 0, end: 8 },
        Format::plain(4),
        1,
    );
    let keys = lane.pair.a.bind(&spare.pool);
    let peer = lane.pair.a_at_b;
    for cut in 0..keys.0.len() {
        let result = lane.pair.b.transport.import(peer, &PoolKeys(keys.0.slice(..cut)), spare.pool.layout());
        assert!(matches!(result, Err(ImportError::BadKeys { .. })), "{cut} of {} bytes: {result:?}", keys.0.len());
    }
    for bytes in noise() {
        let result = lane.pair.b.transport.import(peer, &PoolKeys(bytes.into()), spare.pool.layout());
        assert!(matches!(result, Err(ImportError::BadKeys { .. })), "{result:?}");
    }
    lane.pull(1, lane.whole()).unwrap();
    lane.pulled(1, lane.bytes);
}

/// Of the bytes that differ from one opened transport to the next (keys among them) most are checked: changing one connects to nobody.
pub fn a_wrong_session_key_is_refused(provider: &dyn Provider) {
    let mut pair = Pair::open(provider, &Options::default());
    let (one, other) = (pair.a.transport.address(), pair.b.transport.address());
    let mut refused = 0;
    let mut calls = Vec::new();
    for (at, (x, y)) in one.iter().zip(&other).enumerate().filter(|(_, (x, y))| x != y) {
        let mut changed = other.to_vec();
        changed[at] = *x;
        assert_ne!(x, y);
        match pair.a.transport.connect(&changed) {
            Ok(peer) => calls.push(peer),
            Err(_) => refused += 1,
        }
    }
    let over = |party: &Party, peer: PeerId| {
        let lost = party.events.iter().any(|e| matches!(e, Event::PeerLost { peer: lost, .. } if *lost == peer));
        (lost, party.saw(&Event::Connected { peer }))
    };
    pair.until("every call ends", |a, _| calls.iter().all(|&peer| matches!(over(a, peer), (true, _) | (_, true))));
    refused += calls.iter().filter(|&&peer| over(&pair.a, peer).0).count();
    assert!(refused >= 12, "only {refused} of {} changed addresses were refused", calls.len());
}

/// A full transport says so, and takes more once it was polled.
pub fn queues_push_back(provider: &dyn Provider) {
    let shape = Shape { layers: 2, heads: 2, run_bytes: 128, start: 0, end: 512 };
    let options = Options { transfers_max: 8, ..Options::default() };
    let mut lane = Lane::open(provider, &options, &shape, Format::plain(16), Format::plain(16));
    let parts: Vec<UnitRange> = lane.program.split(100);
    let (mut next, mut full) = (0, 0);
    while let Some(part) = parts.get(next) {
        match lane.pull(next as u128, *part) {
            Ok(()) => next += 1,
            Err(PostError::Full) => {
                full += 1;
                assert!(full < 1_000_000, "it stays full");
                until(&mut [&mut lane.pair.a, &mut lane.pair.b], "some transfer ends", |parties| {
                    parties
                        .iter()
                        .any(|p| (0..next).filter(|&id| p.end(TransferId(id as u128)).is_some()).count() + 8 > next)
                });
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(full > 0, "a hundred transfers fitted a queue of eight");
    for (id, part) in (0..).zip(&parts) {
        lane.pulled(id, lane.program.bytes_in(*part));
    }
    lane.destination.verify(1);
}

/// Bytes of many lengths that nobody encoded.
fn noise() -> Vec<Vec<u8>> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut byte = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..200).map(|length| (0..length).map(|_| byte()).collect()).collect()
}
