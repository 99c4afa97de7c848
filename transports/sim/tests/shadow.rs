//! What the shadow of memory finds, and what it does not complain of.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod bed;

use bed::{BLOCK_BYTES, BLOCKS, Bed, LATENCY, blocks, id, options};
use kvferry_core::{Epoch, HandoverId, RequestId};
use kvferry_fabric_sim::{Breach, FabricOptions, Owner, Violation};

const REQUEST: RequestId = RequestId(70);
const HANDOVER: HandoverId = HandoverId(1);
const ALL: std::ops::Range<u32> = 0..BLOCKS;

fn all() -> Vec<u32> {
    ALL.collect()
}

/// The first node offers all its blocks; all of the second's are the handover's.
fn offered() -> Bed {
    let bed = Bed::watched(options(), 2);
    bed.fabric.claim(&bed.nodes[0].pool, 0, &all(), Owner::Offer(REQUEST));
    bed.fabric.claim(&bed.nodes[1].pool, 0, &all(), Owner::Handover(HANDOVER));
    bed
}

fn breaches(bed: &Bed) -> Vec<Breach> {
    let mut found: Vec<Breach> = bed.fabric.take_violations().into_iter().map(|violation| violation.breach).collect();
    found.dedup();
    found
}

#[test]
fn a_handover_by_the_rules_is_no_violation() {
    for push in [false, true] {
        let mut bed = offered();
        let (reader, program) = (bed.connect(1, 0), blocks(ALL, ALL));
        if push {
            let writer = bed.connect(0, 1);
            bed.push(writer, id(1), &program);
        } else {
            bed.pull(reader, id(1), &program);
        }
        let pool = bed.nodes[1].pool.clone();
        assert_eq!(bed.fabric.in_flight_to(HANDOVER), 1);
        assert!(bed.fabric.may_write(&pool, HANDOVER));
        bed.run();
        assert_eq!(bed.fabric.in_flight_to(HANDOVER), 0);
        assert!(!bed.fabric.may_write(&pool, HANDOVER));
        bed.fabric.delivered(&pool, 0, &all(), HANDOVER, REQUEST);
        bed.fabric.claim(&pool, 0, &all(), Owner::Nobody);
        bed.fabric.claim(&bed.nodes[0].pool, 0, &all(), Owner::Nobody);
        assert_eq!(bed.fabric.take_violations(), []);
    }
}

#[test]
fn blocks_that_are_let_go_under_a_write_are_found_twice() {
    let mut bed = offered();
    let path = bed.connect(0, 1);
    bed.push(path, id(1), &blocks(ALL, ALL));
    bed.pass(10 * LATENCY);
    let pool = bed.nodes[1].pool.clone();
    bed.fabric.claim(&pool, 0, &[63], Owner::Nobody);
    let wanted = Violation {
        at: bed.now,
        nic: None,
        handover: HANDOVER,
        pool: pool.id(),
        plane: 0,
        block: 63,
        breach: Breach::ReleasedUnderWrite,
    };
    assert_eq!(bed.fabric.take_violations(), [wanted]);
    bed.run();
    let found = bed.fabric.take_violations();
    let [late] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!((late.breach, late.block, late.nic), (Breach::ForeignWrite(Owner::Nobody), 63, Some(bed.nodes[1].nic)));
    assert!(late.at > wanted.at);
}

#[test]
fn an_expectation_that_nobody_met_may_still_be_written() {
    let mut bed = offered();
    bed.expect(1, id(1), &blocks(ALL, ALL));
    bed.fabric.claim(&bed.nodes[1].pool, 0, &[5], Owner::Nobody);
    assert_eq!(breaches(&bed), [Breach::ReleasedUnderWrite]);
    bed.transport(1).cancel(id(1));
    bed.fabric.claim(&bed.nodes[1].pool, 0, &[6], Owner::Nobody);
    assert_eq!(breaches(&bed), []);
}

#[test]
fn quarantined_blocks_may_be_written_by_their_handover_only() {
    let mut bed = offered();
    let path = bed.connect(0, 1);
    bed.push(path, id(1), &blocks(ALL, ALL));
    bed.pass(10 * LATENCY);
    let pool = bed.nodes[1].pool.clone();
    bed.fabric.claim(&pool, 0, &all(), Owner::Quarantined(HANDOVER));
    bed.run();
    assert_eq!(breaches(&bed), []);
    bed.fabric.delivered(&pool, 0, &all(), HANDOVER, REQUEST);
    assert_eq!(breaches(&bed), [Breach::NotItsOwn(Owner::Quarantined(HANDOVER))]);
    bed.push(path, id(2), &blocks(0..1, 0..1));
    bed.run();
    assert_eq!(breaches(&bed), [Breach::ForeignWrite(Owner::Quarantined(HANDOVER))]);
}

#[test]
fn no_block_has_two_handovers() {
    let bed = offered();
    let pool = &bed.nodes[1].pool;
    bed.fabric.claim(pool, 0, &[3], Owner::Handover(HandoverId(2)));
    assert_eq!(breaches(&bed), [Breach::ClaimedTwice(Owner::Handover(HANDOVER))]);
    bed.fabric.claim(pool, 0, &[4], Owner::Quarantined(HANDOVER));
    bed.fabric.claim(pool, 0, &[4], Owner::Handover(HandoverId(2)));
    assert_eq!(breaches(&bed), [Breach::ClaimedTwice(Owner::Quarantined(HANDOVER))]);
    bed.fabric.claim(&bed.nodes[0].pool, 0, &[4], Owner::Handover(HandoverId(2)));
    assert_eq!(breaches(&bed), [Breach::ClaimedTwice(Owner::Offer(REQUEST))]);
}

#[test]
fn what_is_read_after_release_is_garbage() {
    let mut bed = offered();
    let path = bed.connect(1, 0);
    bed.pull(path, id(1), &blocks(ALL, ALL));
    bed.pass(10 * LATENCY);
    bed.fabric.claim(&bed.nodes[0].pool, 0, &[60], Owner::Nobody);
    bed.run();
    assert_eq!(breaches(&bed), [], "reading it is allowed, believing it is not");
    let pool = bed.nodes[1].pool.clone();
    let others: Vec<u32> = ALL.filter(|block| *block != 60).collect();
    bed.fabric.delivered(&pool, 0, &others, HANDOVER, REQUEST);
    assert_eq!(breaches(&bed), []);
    bed.fabric.delivered(&pool, 0, &[60], HANDOVER, REQUEST);
    assert_eq!(breaches(&bed), [Breach::WrongContent]);
}

#[test]
fn blocks_that_another_request_has_taken_are_told() {
    let mut bed = offered();
    bed.fabric.claim(&bed.nodes[0].pool, 0, &[1], Owner::Nobody);
    bed.fabric.claim(&bed.nodes[0].pool, 0, &[1], Owner::Offer(RequestId(71)));
    let path = bed.connect(1, 0);
    bed.pull(path, id(1), &blocks(0..2, 0..2));
    bed.run();
    let pool = bed.nodes[1].pool.clone();
    bed.fabric.delivered(&pool, 0, &[0], HANDOVER, REQUEST);
    assert_eq!(breaches(&bed), []);
    bed.fabric.delivered(&pool, 0, &[1], HANDOVER, REQUEST);
    assert_eq!(breaches(&bed), [Breach::WrongContent]);
    bed.fabric.delivered(&pool, 0, &[2], HANDOVER, REQUEST);
    assert_eq!(breaches(&bed), [Breach::NothingCame]);
}

#[test]
fn a_slice_of_two_requests_is_garbage() {
    let mut bed = Bed::watched(FabricOptions { slice_bytes: 2 * BLOCK_BYTES, ..options() }, 2);
    bed.fabric.claim(&bed.nodes[0].pool, 0, &[0], Owner::Offer(REQUEST));
    bed.fabric.claim(&bed.nodes[0].pool, 0, &[1], Owner::Offer(RequestId(71)));
    bed.fabric.claim(&bed.nodes[1].pool, 0, &[0, 1], Owner::Handover(HANDOVER));
    let path = bed.connect(1, 0);
    bed.pull(path, id(1), &blocks(0..2, 0..2));
    bed.run();
    for request in [REQUEST, RequestId(71)] {
        bed.fabric.delivered(&bed.nodes[1].pool, 0, &[0, 1], HANDOVER, request);
        assert_eq!(breaches(&bed), [Breach::WrongContent]);
    }
}

#[test]
fn what_another_incarnation_offers_is_garbage_to_older_transfers() {
    let mut bed = offered();
    let path = bed.connect(1, 0);
    bed.pull(path, id(1), &blocks(ALL, ALL));
    bed.pass(10 * LATENCY);
    let pool = bed.nodes[0].pool.clone();
    bed.fabric.incarnate(&pool, Epoch(2), std::slice::from_ref(&(0..1)));
    bed.fabric.claim(&pool, 0, &all(), Owner::Offer(REQUEST));
    bed.run();
    bed.fabric.delivered(&bed.nodes[1].pool, 0, &[0], HANDOVER, REQUEST);
    assert_eq!(breaches(&bed), []);
    bed.fabric.delivered(&bed.nodes[1].pool, 0, &[63], HANDOVER, REQUEST);
    assert_eq!(breaches(&bed), [Breach::WrongContent]);
}

#[test]
fn writes_of_another_incarnation_are_told() {
    let mut bed = offered();
    let path = bed.connect(0, 1);
    bed.push(path, id(1), &blocks(ALL, ALL));
    bed.pass(10 * LATENCY);
    // The node came back on the same memory while its old NIC lives: that must never be.
    let pool = bed.nodes[1].pool.clone();
    bed.fabric.incarnate(&pool, Epoch(2), std::slice::from_ref(&(0..1)));
    bed.fabric.claim(&pool, 0, &all(), Owner::Handover(HANDOVER));
    bed.run();
    assert_eq!(breaches(&bed), [Breach::StaleWrite(Epoch(2))]);
}

#[test]
fn a_fence_makes_release_safe() {
    let mut bed = offered();
    let path = bed.connect(0, 1);
    bed.push(path, id(1), &blocks(ALL, ALL));
    bed.pass(10 * LATENCY);
    bed.fabric.cut(bed.nodes[1].nic, bed.nodes[0].nic, true);
    let peer = bed.dial(1, 0).peer;
    bed.transport(1).fence(peer);
    bed.pass(LATENCY);
    assert_eq!(bed.fenced(1).len(), 1);
    bed.fabric.claim(&bed.nodes[1].pool, 0, &all(), Owner::Nobody);
    bed.run();
    assert_eq!(breaches(&bed), []);
    assert!(bed.fabric.stats(bed.nodes[1].nic).slices_dropped > 0, "there was something to keep out");
}
