//! What the engines notice, and what becomes of blocks.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Bench, Setup, freed, opened, placed, spec};
use kvferry_core::protocol::{EngineCall, EngineEvent, Outcome, PrefillView};
use kvferry_core::{Format, HandoverId, Parallel, RequestId, TableBlocks, Tables};
use kvferry_synthetic::Engine;
use kvferry_transport::Pool;

fn block(tables: &Tables, slot: usize) -> u32 {
    let TableBlocks::Known(blocks) = &tables.groups[0].blocks else { panic!("no blocks") };
    blocks[slot]
}

fn flip(pool: &Pool, plane: u32, block: u32, offset: u64) {
    let mut byte = [0];
    pool.read(plane, block, offset, &mut byte).unwrap();
    pool.write(plane, block, offset, &[byte[0] ^ 1]).unwrap();
}

#[test]
fn one_wrong_byte_is_one_mismatch() {
    let mut bench = Bench::new(&Setup::tiny());
    let spec = spec(5, 100, 0, &[]);
    bench.prefill(&spec);
    bench.place(1, &spec);
    bench.copy(1, &spec);
    // V of layer 2, token 16 * 3 + 2, head 1, byte 9.
    let block = block(placed(&bench.decode[0].events, 1).unwrap().0, 3);
    flip(&bench.decode[0].pool, 5, block, (2 * 4 + 1) * 64 + 9);
    bench.settled(1, &spec, Outcome::Delivered, false);
    let report = bench.report();
    assert_eq!((report.mismatched_bytes, report.stray_bytes), (1, 0));
    let text = report.first_mismatch.unwrap();
    assert!(text.contains("layer 2, tensor 1, head 1, token 50, byte 9"), "{text}");
    assert_eq!(report.verified_bytes, bench.destination.bytes_expected(100, 0));
}

#[test]
fn swapped_tokens_are_a_mismatch() {
    let mut bench = Bench::new(&Setup::tiny());
    let spec = spec(5, 32, 0, &[]);
    bench.prefill(&spec);
    bench.place(1, &spec);
    bench.copy(1, &spec);
    let pool = bench.decode[0].pool.clone();
    let block = block(placed(&bench.decode[0].events, 1).unwrap().0, 1);
    let (mut one, mut other) = ([0; 256], [0; 256]);
    pool.read(0, block, 0, &mut one).unwrap();
    pool.read(0, block, 256, &mut other).unwrap();
    pool.write(0, block, 0, &other).unwrap();
    pool.write(0, block, 256, &one).unwrap();
    bench.settled(1, &spec, Outcome::Delivered, false);
    let wrong = bench.report().mismatched_bytes;
    assert!((480..=512).contains(&wrong), "{wrong}");
}

#[test]
fn what_never_came_is_a_mismatch() {
    let mut bench = Bench::new(&Setup::tiny());
    let spec = spec(5, 20, 0, &[]);
    bench.place(1, &spec);
    bench.settled(1, &spec, Outcome::Delivered, false);
    let report = bench.report();
    let expected = bench.destination.bytes_expected(20, 0);
    assert_eq!(report.verified_bytes, expected);
    assert!(report.mismatched_bytes > expected * 9 / 10);
}

#[test]
fn written_padding_and_free_blocks_show() {
    let mut bench = Bench::new(&Setup::tiny());
    let first = spec(5, 20, 0, &[]);
    bench.prefill(&first);
    bench.place(1, &first);
    bench.copy(1, &first);
    let last = block(placed(&bench.decode[0].events, 1).unwrap().0, 1);
    flip(&bench.decode[0].pool, 0, last, 4 * 256);
    bench.settled(1, &first, Outcome::Delivered, false);
    let report = bench.report();
    assert_eq!((report.mismatched_bytes, report.stray_bytes), (1, 1));
    assert!(report.first_mismatch.unwrap().contains("padding"));

    // A late write into blocks that have been let go.
    for block in 0..24 {
        flip(&bench.decode[0].pool, 7, block, 17);
    }
    bench.place(2, &spec(6, 24 * 16, 0, &[]));
    assert_eq!(bench.report().stray_bytes, 1 + 24);
}

#[test]
fn an_audit_finds_what_nobody_would_have_used_again() {
    let mut bench = Bench::new(&Setup::tiny());
    flip(&bench.decode[0].pool, 3, 11, 5);
    assert_eq!(bench.report().stray_bytes, 0, "the block was not taken since");
    bench.decode[0].engine.audit();
    assert_eq!(bench.report().stray_bytes, 1);
}

#[test]
fn released_kv_is_gone() {
    let mut bench = Bench::new(&Setup::tiny());
    let spec = spec(5, 20, 0, &[]);
    bench.prefill(&spec);
    bench.place(1, &spec);
    bench.release(&spec);
    bench.copy(1, &spec);
    bench.settled(1, &spec, Outcome::Delivered, false);
    assert!(bench.report().mismatched_bytes > 0);
}

#[test]
fn prefixes_are_reused() {
    for (block_tokens, cp) in [(16, 1), (24, 1), (16, 2)] {
        let mut setup = Setup { reuse_prefix: true, ..Setup::tiny() };
        setup.destination.format = Format { block_tokens, ..Format::default() };
        setup.destination.parallel = Parallel { tp: 2, cp, ..Parallel::default() };
        let mut bench = Bench::new(&setup);
        let (first, second) = (spec(1, 120, 32, &[11, 12, 13, 14]), spec(2, 150, 32, &[11, 12, 99]));
        bench.hand_over(1, &first);
        assert_eq!(bench.held_hashes(0), [11, 12, 13]);
        let before = bench.report();
        assert!(before.cached_blocks > 0);

        let moved = bench.hand_over(2, &second);
        // 64 tokens have equal hashes: in stripes of 16, 24 or 32 tokens.
        let stripe = u64::from(block_tokens * cp);
        let have = 64 / stripe * stripe;
        for node in &bench.decode {
            assert_eq!(placed(&node.events, 2).unwrap().1, have);
        }
        let report = bench.report();
        assert_eq!(moved, bench.destination.bytes_expected(150, have));
        assert_eq!(report.verified_bytes - before.verified_bytes, moved);
        assert_eq!(report.reused_bytes, bench.destination.bytes_expected(have, 0));
        assert_eq!(bench.held_hashes(1), [11, 12, 13, 99]);

        // The same prompt again: at least its last token is fetched.
        let again = spec(3, 96, 32, &[11, 12, 13]);
        let moved = bench.hand_over(3, &again);
        assert!(moved > 0);
        bench.assert_quiet();
    }
}

#[test]
fn concurrent_requests_keep_one_copy() {
    let mut bench = Bench::new(&Setup { reuse_prefix: true, ..Setup::tiny() });
    let (one, other) = (spec(1, 64, 32, &[1, 2]), spec(2, 80, 32, &[1, 2]));
    for (handover, spec) in [(1, &one), (2, &other)] {
        bench.prefill(spec);
        bench.place(handover, spec);
        bench.copy(handover, spec);
    }
    bench.settled(2, &other, Outcome::Delivered, false);
    bench.settled(1, &one, Outcome::Delivered, false);
    bench.release(&one);
    bench.release(&other);
    assert_eq!(bench.report().cached_blocks, 4);
    assert_eq!(bench.held_hashes(0), [1, 2]);
    bench.assert_quiet();
}

#[test]
fn prefixes_give_way() {
    let mut bench = Bench::new(&Setup { reuse_prefix: true, ..Setup::tiny() });
    bench.hand_over(1, &spec(1, 160, 16, &(100..110).collect::<Vec<_>>()));
    bench.hand_over(2, &spec(2, 160, 16, &(200..210).collect::<Vec<_>>()));
    assert_eq!(bench.report().cached_blocks, 20);
    // 24 blocks: the older prefix loses its last six blocks.
    bench.hand_over(3, &spec(3, 160, 16, &[]));
    let held: Vec<u64> = (100..104).chain(200..210).collect();
    assert_eq!(bench.held_hashes(0), held);
    // What is left of it is still reused.
    let moved = bench.hand_over(4, &spec(4, 160, 16, &(100..110).collect::<Vec<_>>()));
    assert_eq!(moved, bench.destination.bytes_expected(160, 64));
    // Everything goes for a request that needs the whole pool.
    bench.hand_over(5, &spec(5, 24 * 16, 0, &[]));
    assert_eq!(bench.held_hashes(0), [0u64; 0]);
    bench.assert_quiet();
}

#[test]
fn quarantined_blocks_stay_away() {
    let mut bench = Bench::new(&Setup::tiny());
    let (lost, waiting) = (spec(1, 15 * 16, 0, &[]), spec(2, 12 * 16, 0, &[]));
    bench.place(1, &lost);
    bench.settled(1, &lost, Outcome::Cancelled, true);
    let report = bench.report();
    assert_eq!((report.quarantined_blocks, report.leaked_blocks), (15, 0));
    bench.place(2, &waiting);
    assert!(placed(&bench.decode[0].events, 2).is_none());
    // A late write is nobody's business yet.
    let late = block(placed(&bench.decode[0].events, 1).unwrap().0, 3);
    flip(&bench.decode[0].pool, 0, late, 0);
    bench.returned(1);
    bench.returned(1);
    assert_eq!(bench.report().quarantined_blocks, 0);
    bench.prefill(&waiting);
    bench.copy(2, &waiting);
    bench.release(&waiting);
    bench.settled(2, &waiting, Outcome::Delivered, false);
    assert!(!freed(&bench.decode[0].events, 1));
    bench.assert_quiet();
}

#[test]
fn requests_wait_for_blocks_in_order() {
    let mut bench = Bench::new(&Setup::tiny());
    let specs: Vec<_> = [20, 10, 4, 4].into_iter().zip(1..).map(|(blocks, id)| spec(id, blocks * 16, 0, &[])).collect();
    specs.iter().for_each(|spec| bench.prefill(spec));
    let offered = |bench: &Bench| -> Vec<u64> {
        let offered = |event: &EngineEvent| match event {
            EngineEvent::Opened { request, .. } => Some(request.0),
            _ => None,
        };
        bench.prefill[0].events.iter().filter_map(offered).collect()
    };
    // The third would fit, but the second was there before.
    assert_eq!(offered(&bench), [1]);
    assert_eq!(bench.prefill[0].engine.report().queued_requests, 3);
    bench.release(&specs[2]);
    bench.release(&specs[0]);
    assert_eq!(offered(&bench), [1, 2, 4]);
    bench.release(&specs[0]);
    bench.release(&specs[1]);
    bench.release(&specs[3]);
    bench.assert_quiet();

    for (spec, handover) in specs.iter().zip(1..) {
        bench.place(handover, spec);
    }
    assert!(placed(&bench.decode[0].events, 2).is_none());
    bench.settled(3, &specs[2], Outcome::Cancelled, false);
    bench.settled(1, &specs[0], Outcome::Cancelled, false);
    assert!(placed(&bench.decode[0].events, 2).is_some());
    assert!(placed(&bench.decode[0].events, 3).is_none());
    assert!(placed(&bench.decode[0].events, 4).is_some());
    bench.settled(2, &specs[1], Outcome::Cancelled, false);
    bench.settled(4, &specs[3], Outcome::Cancelled, false);
    bench.settled(4, &specs[3], Outcome::Cancelled, false);
    bench.assert_quiet();
}

#[test]
fn what_can_never_fit_is_refused() {
    let mut bench = Bench::new(&Setup::tiny());
    let huge = spec(1, 24 * 16 + 1, 0, &[]);
    bench.prefill(&huge);
    bench.place(9, &huge);
    let Some(EngineEvent::Unable { request: RequestId(1), reason }) = bench.prefill[0].events.last() else {
        panic!("{:?}", bench.prefill[0].events)
    };
    assert!(reason.contains("385 tokens take 25 blocks") && reason.contains("has 24"), "{reason}");
    let last = bench.decode[0].events.last();
    assert!(matches!(last, Some(EngineEvent::NoRoom { handover: HandoverId(9), .. })), "{last:?}");
    bench.prefill(&spec(2, u64::MAX, 0, &[]));
    bench.place(10, &spec(2, u64::MAX, u32::MAX, &[1]));
    bench.assert_quiet();
}

#[test]
fn what_is_not_released_is_held() {
    let mut bench = Bench::new(&Setup::tiny());
    let spec = spec(1, 40, 0, &[]);
    bench.prefill(&spec);
    let report = bench.prefill[0].engine.report();
    assert_eq!((report.held_requests, report.held_blocks, report.leaked_blocks), (1, 3, 0));
    assert_eq!(report.free_blocks, 21);
    bench.release(&spec);
    bench.assert_quiet();
}

#[test]
fn steps_become_ready_one_by_one() {
    let mut bench = Bench::new(&Setup { layers_per_step: Some(3), ..Setup::tiny() });
    let spec = spec(1, 40, 0, &[]);
    bench.prefill(&spec);
    let (_, steps) = opened(&bench.prefill[0].events, spec.request).unwrap();
    assert_eq!(steps, [3, 4]);
    let ready = |event: &EngineEvent| match event {
        EngineEvent::Ready { steps, .. } => Some(*steps),
        _ => None,
    };
    let ready: Vec<u32> = bench.prefill[0].events.iter().filter_map(ready).collect();
    assert_eq!(ready, [1, 2]);
}

#[test]
fn a_release_stops_the_computation() {
    let mut bench = Bench::new(&Setup::tiny());
    let spec = spec(1, 24 * 16, 0, &[]);
    let mut events = Vec::new();
    let job = kvferry_core::protocol::PrefillJob { spec: spec.clone(), dp: 0, trace: None };
    let engine = &mut bench.prefill[0].engine;
    for _ in 0..3 {
        engine.handle(EngineCall::Prefill(job.clone()), &mut |event| events.push(event));
        let release = EngineCall::Release { request: spec.request, view: PrefillView::Ended };
        engine.handle(release, &mut |event| events.push(event));
        while engine.work(&mut |event| events.push(event)) {}
    }
    // No layer becomes ready, and every release is acknowledged after what was said before it.
    let in_turn =
        events.chunks(2).all(|pair| matches!(pair, [EngineEvent::Opened { .. }, EngineEvent::Released { .. }]));
    assert!(in_turn && events.len() == 6, "{events:?}");
    bench.assert_quiet();
}
