//! When things happen: wires, windows, order, and what stays the same from run to run.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod bed;

use std::time::Duration;

use bed::{BLOCK_BYTES, BLOCKS, Bed, LATENCY, blocks, id, options};
use kvferry_core::{Direction, Plane, PoolId, PoolLayout};
use kvferry_fabric_sim::{Delivery, FabricOptions, Timing};
use kvferry_transport::{Options, Pool, PoolOptions};

/// Of the sizes in this file, on one wire.
const BLOCK_NS: u64 = 1_000;

fn wide(options: FabricOptions) -> FabricOptions {
    FabricOptions { window: 64, ..options }
}

#[test]
fn a_transfer_takes_its_latencies_and_its_bytes() {
    for (direction, latencies) in [(Direction::Pull, 2), (Direction::Push, 3)] {
        let mut bed = Bed::new(wide(options()), 2);
        let path = bed.connect(0, 1);
        let (start, program) = (bed.now, blocks(0..BLOCKS, 0..BLOCKS));
        bed.expect(1, id(1), &program);
        bed.post(path, direction, id(1), &program).unwrap();
        bed.run();
        let receiver = if direction == Direction::Pull { 0 } else { 1 };
        let took = bed.end(receiver, id(1)).unwrap().0 - start;
        assert_eq!(took, latencies * LATENCY + u64::from(BLOCKS) * BLOCK_NS, "{direction:?}");
    }
}

#[test]
fn transfers_are_timed() {
    let mut bed = Bed::new(wide(options()), 2);
    bed.fabric.time_transfers();
    let path = bed.connect(0, 1);
    let (start, nics) = (bed.now, [bed.nodes[0].nic, bed.nodes[1].nic]);
    bed.pull(path, id(1), &blocks(0..10, 0..10));
    bed.push(path, id(2), &blocks(0..10, 0..10));
    bed.run();
    let wire = 10 * BLOCK_NS;
    let timing = |transfer, direction, left_at, landed_at, ended_at| Timing {
        id: id(transfer),
        direction,
        nics,
        bytes: 10 * BLOCK_BYTES,
        posted_at: start,
        left_at: start + left_at,
        landed_at: start + landed_at,
        ended_at: start + ended_at,
    };
    let push_lands = 3 * LATENCY + wire;
    let wanted = [
        timing(1, Direction::Pull, LATENCY, 2 * LATENCY + wire, 2 * LATENCY + wire),
        timing(2, Direction::Push, 2 * LATENCY, push_lands, push_lands + LATENCY),
    ];
    assert_eq!(bed.fabric.take_timings(), wanted);
    assert_eq!(bed.fabric.take_timings(), []);
}

#[test]
fn a_narrow_window_waits_for_every_landing() {
    let mut bed = Bed::new(FabricOptions { window: 1, ..options() }, 2);
    let path = bed.connect(0, 1);
    let start = bed.now;
    bed.pull(path, id(1), &blocks(0..10, 0..10));
    bed.run();
    assert_eq!(bed.end(0, id(1)).unwrap().0 - start, LATENCY + 10 * (LATENCY + BLOCK_NS));
}

#[test]
fn transfers_share_a_source_fairly() {
    let mut bed = Bed::new(wide(options()), 3);
    let (one, other) = (bed.connect(1, 0), bed.connect(2, 0));
    let start = bed.now;
    bed.pull(one, id(1), &blocks(0..32, 0..32));
    bed.pull(other, id(2), &blocks(0..32, 0..32));
    bed.run();
    let ends = [1, 2].map(|node: usize| bed.end(node, id(node as u64)).unwrap().0 - start);
    let all = 2 * LATENCY + 64 * BLOCK_NS;
    assert!(ends[0] >= all - 2 * BLOCK_NS && ends[1] <= all, "{ends:?}: they end together, after both");
}

#[test]
fn transfers_share_a_destination_and_keep_their_sources_free() {
    let mut bed = Bed::new(options(), 4);
    // Three pull from one node each; two of them into one NIC.
    let (first, second) = (bed.connect(0, 1), bed.connect(0, 2));
    let third = bed.connect(3, 1);
    let start = bed.now;
    bed.pull(first, id(1), &blocks(0..32, 0..32));
    bed.pull(second, id(2), &blocks(0..32, 32..64));
    bed.pull(third, id(3), &blocks(0..8, 0..8));
    bed.run();
    let took = |node, transfer| bed.end(node, id(transfer)).unwrap().0 - start;
    let all = 2 * LATENCY + 64 * BLOCK_NS;
    assert!(took(0, 1).max(took(0, 2)) >= all - BLOCK_NS, "one wire takes 64 blocks");
    assert!(took(0, 1).min(took(0, 2)) >= all / 2, "neither was served alone");
    assert!(took(3, 3) <= 2 * LATENCY + 17 * BLOCK_NS, "a crowded destination does not block others of its source");
}

#[test]
fn a_slow_nic_slows_what_it_takes_part_in() {
    let took = |factor| {
        let mut bed = Bed::new(wide(options()), 2);
        bed.fabric.slow(bed.nodes[1].nic, factor);
        let path = bed.connect(0, 1);
        let start = bed.now;
        bed.pull(path, id(1), &blocks(0..32, 0..32));
        bed.push(path, id(2), &blocks(0..32, 32..64));
        bed.run();
        let stats = bed.fabric.stats(bed.nodes[1].nic);
        assert_eq!(
            (stats.busy_out_ns, stats.busy_in_ns),
            (32 * BLOCK_NS * u64::from(factor), 32 * BLOCK_NS * u64::from(factor))
        );
        bed.end(0, id(1)).unwrap().0 - start
    };
    assert_eq!(took(1), 2 * LATENCY + 32 * BLOCK_NS);
    assert_eq!(took(5), 2 * LATENCY + 5 * 32 * BLOCK_NS);
}

/// In which order blocks become visible.
fn order(options: FabricOptions) -> Vec<u32> {
    let mut bed = Bed::new(options, 2);
    bed.fill(0, 1);
    bed.fill(1, 0);
    let path = bed.connect(0, 1);
    bed.push(path, id(1), &blocks(0..BLOCKS, 0..BLOCKS));
    let mut order = Vec::new();
    while !bed.completed(1, id(1)) {
        bed.pass(100);
        let bytes = bed.bytes(1);
        order.extend(
            (0..BLOCKS).filter(|block| bytes[*block as usize] == 1 && !order.contains(block)).collect::<Vec<_>>(),
        );
    }
    assert_eq!(order.len(), BLOCKS as usize, "it arrives with its last byte, not before");
    order
}

#[test]
fn slices_overtake_each_other_where_delivery_is_unordered() {
    let jitter = Duration::from_micros(20);
    let options = FabricOptions { window: 16, jitter, ..options() };
    let sorted: Vec<u32> = (0..BLOCKS).collect();
    assert_eq!(order(options.clone()), sorted);
    let unordered = FabricOptions { delivery: Delivery::Unordered, ..options };
    assert_ne!(order(unordered.clone()), sorted);
    assert_eq!(order(unordered.clone()), order(unordered.clone()), "the seed decides");
    assert_ne!(order(unordered.clone()), order(FabricOptions { seed: 5, ..unordered }));
}

#[test]
fn one_seed_has_one_history() {
    let run = |seed| {
        let jitter = Duration::from_micros(20);
        let mut bed = Bed::new(FabricOptions { seed, jitter, delivery: Delivery::Unordered, ..options() }, 3);
        bed.fabric.fail_completions(200_000);
        let (one, other) = (bed.connect(0, 1), bed.connect(2, 1));
        for transfer in 0..20 {
            bed.push(one, id(2 * transfer), &blocks(0..3, 0..3));
            bed.pull(other, id(2 * transfer + 1), &blocks(0..3, 8..11));
            bed.pass(2_000);
        }
        bed.run();
        bed.fabric.digest()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1).0, run(2).0);
}

/// Terabytes that nobody has.
#[test]
fn phantom_bytes_take_time_and_no_memory() {
    let slice_bytes = 64 << 20;
    let bytes_per_second = 50_000_000_000;
    let options = FabricOptions { move_bytes: false, slice_bytes, bytes_per_second, ..options() };
    let mut bed = Bed::new(options, 0);
    let block_bytes = 1 << 30;
    let plane = Plane { region: 0, offset: 0, blocks: 64, block_stride: block_bytes, block_bytes };
    for number in 0..2 {
        let layout = PoolLayout { regions: vec![64 << 30], planes: vec![plane] };
        let sparse = PoolOptions { populate: false, huge_pages: false };
        let pool = Pool::allocate_with(PoolId(number), layout, "phantom", &sparse).unwrap();
        bed.open_with(pool, Options { poll_bytes_max: u64::MAX, ..Options::default() });
    }
    let path = bed.connect(0, 1);
    let mut program = (*blocks(0..64, 0..64)).clone();
    for segment in &mut program.segments {
        segment.run_bytes = block_bytes as u32;
        for side in [&mut segment.source, &mut segment.destination] {
            (side.token_pitch, side.head_pitch) = (block_bytes, block_bytes);
        }
    }
    let (start, before) = (bed.now, bed.fabric.digest().1);
    bed.pull(path, id(1), &std::sync::Arc::new(program));
    bed.run();
    let took = bed.end(0, id(1)).unwrap().0 - start;
    let wire = (64u64 << 30) / (bytes_per_second / 1_000_000_000);
    assert!(took >= wire && took < wire + wire / 100, "{took} of {wire} ns");
    assert!(bed.fabric.digest().1 - before < 200, "one slice is a block: a few events each");
    assert_eq!(bed.fabric.stats(bed.nodes[0].nic).bytes_in, 64 << 30);
}
