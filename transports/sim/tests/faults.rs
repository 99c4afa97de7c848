//! Everything that may go wrong with hardware, and what each end may know of it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod bed;

use std::time::Duration;

use bed::{BLOCK_BYTES, BLOCKS, Bed, LATENCY, blocks, id, notice, options};
use kvferry_core::{Direction, FenceProof};
use kvferry_fabric_sim::{FabricOptions, FenceBy, NicDeath, OnTheWire};
use kvferry_transport::{Event, Options, PostError, TransferError};

const ALL: std::ops::Range<u32> = 0..BLOCKS;

/// Two nodes; the first, full of ones, pushes all its blocks to the second, full of zeros, and some have landed.
fn pushing(options: FabricOptions) -> (Bed, bed::Path) {
    let mut bed = Bed::new(options, 2);
    bed.fill(0, 1);
    bed.fill(1, 0);
    let path = bed.connect(0, 1);
    bed.push(path, id(1), &blocks(ALL, ALL));
    bed.pass(12 * LATENCY);
    let landed = bed.count(1, 1);
    assert!(landed > 0 && landed < BLOCKS as usize, "{landed} have landed");
    (bed, path)
}

#[test]
fn a_cancelled_expectation_waits_for_the_writer() {
    let (mut bed, _) = pushing(options());
    let (asked, landed) = (bed.now, bed.count(1, 1));
    bed.transport(1).cancel(id(1));
    bed.run();
    let (at, end) = bed.end(1, id(1)).unwrap();
    assert_eq!(*end, Event::Failed { id: id(1), error: TransferError::Cancelled });
    assert!(at >= asked + 2 * LATENCY, "the writer cannot have answered yet");
    assert!(bed.count(1, 1) > landed, "what was on its way lands all the same");
    assert!(matches!(bed.error(0, id(1)), Some(TransferError::Refused(_))));
    assert!(!bed.saw(1, &Event::Notice { notice: notice(id(1)) }));
    let landed = bed.count(1, 1);
    assert!(landed < BLOCKS as usize, "the writer stops");
    assert_eq!(bed.fabric.in_flight(), 0);
}

#[test]
fn without_the_writers_answer_only_a_fence_ends_an_expectation() {
    for black_hole in [false, true] {
        let (mut bed, _) = pushing(options());
        let (writer, receiver) = (bed.nodes[0].nic, bed.nodes[1].nic);
        if black_hole {
            bed.fabric.kill(writer, NicDeath::BlackHole);
        } else {
            bed.fabric.cut(receiver, writer, true);
        }
        let landed = bed.count(1, 1);
        bed.transport(1).cancel(id(1));
        bed.run();
        assert!(bed.count(1, 1) > landed, "what had left lands");
        if black_hole {
            assert_eq!(bed.end(1, id(1)), None, "nobody has answered");
            let peer = bed.dial(1, 0).peer;
            bed.transport(1).fence(peer);
            bed.run();
            assert_eq!(bed.fenced(1), [FenceProof::EndpointDestroyed]);
            assert!(matches!(bed.error(1, id(1)), Some(TransferError::PeerLost(_))));
        } else {
            // Bytes still pass that way: all of them came, though the writer will never know.
            assert!(bed.completed(1, id(1)));
            assert!(matches!(bed.error(0, id(1)), Some(TransferError::PeerLost(_))));
        }
    }
}

#[test]
fn a_fence_drops_what_comes_later_without_asking_anybody() {
    let (mut bed, _) = pushing(options());
    let (writer, receiver) = (bed.nodes[0].nic, bed.nodes[1].nic);
    bed.fabric.cut(receiver, writer, true);
    let peer = bed.dial(1, 0).peer;
    let (fenced_at, before) = (bed.now, bed.bytes(1));
    bed.transport(1).fence(peer);
    bed.run();
    assert_eq!(bed.fenced(1), [FenceProof::EndpointDestroyed]);
    let at = bed.nodes[1].events.iter().find(|(_, event)| matches!(event, Event::Fenced { .. })).unwrap().0;
    assert!(at <= fenced_at + LATENCY, "it waits for nobody");
    assert_eq!(bed.bytes(1), before, "nothing is written after a fence");
    assert!(bed.fabric.stats(receiver).slices_dropped > 0);
    assert!(matches!(bed.error(0, id(1)), Some(TransferError::PeerLost(_))), "the writer finds out by itself");
    assert_eq!(bed.fabric.in_flight(), 0);
}

#[test]
fn a_fence_of_a_reader_ends_its_reads() {
    let mut bed = Bed::new(options(), 2);
    let path = bed.connect(1, 0);
    bed.pull(path, id(1), &blocks(ALL, ALL));
    bed.pass(8 * LATENCY);
    let peer = bed.dial(0, 1).peer;
    bed.transport(0).fence(peer);
    let left = bed.fabric.stats(bed.nodes[0].nic).bytes_out;
    bed.run();
    assert_eq!(bed.fabric.stats(bed.nodes[0].nic).bytes_out, left, "nothing more is read");
    assert_eq!(bed.fenced(0), [FenceProof::EndpointDestroyed]);
    assert!(matches!(bed.error(1, id(1)), Some(TransferError::PeerLost(_))));
}

#[test]
fn a_fence_waits_for_its_own_nic() {
    let (mut bed, _) = pushing(options());
    let receiver = bed.nodes[1].nic;
    let peer = bed.dial(1, 0).peer;
    bed.fabric.kill(receiver, NicDeath::BlackHole);
    bed.transport(1).fence(peer);
    bed.run();
    assert!(bed.fenced(1).is_empty(), "a black hole proves nothing");
    bed.fabric.revive(receiver);
    bed.run();
    assert_eq!(bed.fenced(1), [FenceProof::EndpointDestroyed]);
    assert!(bed.error(1, id(1)).is_some());
}

#[test]
fn new_keys_shut_everybody_out() {
    let mut bed = Bed::new(FabricOptions { fence_by: FenceBy::Rekeying, ..options() }, 3);
    bed.fill(0, 1);
    bed.fill(1, 0);
    bed.fill(2, 2);
    let (path, other) = (bed.connect(0, 1), bed.connect(2, 1));
    bed.push(path, id(1), &blocks(0..32, 0..32));
    bed.pass(8 * LATENCY);
    let before = bed.bytes(1);
    let peer = bed.dial(1, 0).peer;
    bed.transport(1).fence(peer);
    bed.run();
    assert_eq!(bed.fenced(1), [FenceProof::PoolRekeyed]);
    assert_eq!(bed.bytes(1), before);
    assert!(bed.error(0, id(1)).is_some() && bed.error(1, id(1)).is_some());
    // The other peer was meant no harm, and has to connect again all the same.
    assert_eq!(bed.lost(2), 1);
    let again = bed.connect(2, 1);
    assert_ne!(again.peer, other.peer);
    bed.push(again, id(2), &blocks(0..4, 40..44));
    bed.run();
    assert!(matches!(bed.end(2, id(2)), Some((_, Event::Completed { .. }))), "{:?}", bed.end(2, id(2)));
}

#[test]
fn what_was_posted_by_an_old_key_never_arrives() {
    let mut bed = Bed::new(FabricOptions { fence_by: FenceBy::Rekeying, ..options() }, 3);
    bed.fill(1, 0);
    bed.fill(2, 2);
    let other = bed.connect(2, 1);
    let peer = bed.dial(1, 0).peer;
    bed.transport(1).fence(peer);
    bed.push(other, id(2), &blocks(0..4, 40..44));
    bed.run();
    let Some(error) = bed.error(2, id(2)) else { panic!("{:?}", bed.end(2, id(2))) };
    assert!(error.to_string().contains("new keys"), "{error}");
    assert_eq!((bed.lost(2), bed.count(1, 2)), (1, 0));
    // Through a connection that begins after that it does.
    let again = bed.connect(2, 1);
    bed.push(again, id(3), &blocks(0..4, 40..44));
    bed.run();
    assert!(matches!(bed.end(2, id(3)), Some((_, Event::Completed { .. }))), "{:?}", bed.end(2, id(3)));
}

#[test]
fn slices_of_a_dead_process_land_unless_they_are_fenced_off() {
    for (on_the_wire, fence) in [(OnTheWire::Lands, false), (OnTheWire::Lands, true), (OnTheWire::Lost, false)] {
        let (mut bed, _) = pushing(FabricOptions { jitter: Duration::from_micros(5), ..options() });
        let (writer, before) = (bed.nodes[0].nic, bed.bytes(1));
        let peer = bed.dial(1, 0).peer;
        bed.fabric.process_died(writer, on_the_wire);
        bed.nodes[0].transport = None;
        if fence {
            bed.transport(1).fence(peer);
        }
        bed.run();
        let late = bed.bytes(1) != before;
        assert_eq!(late, on_the_wire == OnTheWire::Lands && !fence, "{on_the_wire:?}, fenced: {fence}");
        assert_eq!(bed.fenced(1), if fence { vec![FenceProof::PeerProcessDead] } else { vec![] });
        assert!(bed.error(1, id(1)).is_some(), "the receiver learns of it");
        assert_eq!(bed.fabric.in_flight(), 0);
    }
}

#[test]
fn a_dead_process_can_be_fenced_when_everything_was_over() {
    let mut bed = Bed::new(options(), 2);
    let path = bed.connect(1, 0);
    bed.fabric.process_died(bed.nodes[0].nic, OnTheWire::Lands);
    bed.nodes[0].transport = None;
    bed.run();
    assert_eq!(bed.lost(1), 1, "its peers notice");
    bed.transport(1).fence(path.peer);
    bed.run();
    assert_eq!(bed.fenced(1), [FenceProof::PeerProcessDead]);
}

#[test]
fn a_nic_goes_on_while_nobody_polls_it() {
    let (mut bed, _) = pushing(options());
    let paused = bed.nodes[1].transport.take();
    bed.run();
    assert_eq!(bed.count(1, 1), BLOCKS as usize, "one-sided writes need nobody at the target");
    assert!(bed.completed(0, id(1)));
    bed.nodes[1].transport = paused;
    let mut events = Vec::new();
    bed.transport(1).poll(&mut events);
    assert!(matches!(events.as_slice(), [Event::Arrived { .. }, Event::Notice { .. }]), "{events:?}");
}

#[test]
fn a_nic_that_dies_with_errors_fails_both_ends() {
    for victim in [0, 1] {
        let (mut bed, path) = pushing(options());
        let nic = bed.nodes[victim].nic;
        bed.fabric.kill(nic, NicDeath::Error);
        bed.run();
        let local = bed.error(victim, id(1));
        assert!(matches!(local, Some(TransferError::Io { .. })), "{local:?}");
        assert!(matches!(bed.error(1 - victim, id(1)), Some(TransferError::PeerLost(_))));
        assert_eq!((bed.lost(0), bed.lost(1)), (1, 1));
        let posted = bed.post(path, Direction::Push, id(2), &blocks(0..1, 0..1));
        assert!(matches!(posted, Err(PostError::UnknownPeer(_))), "{posted:?}");
        bed.dial(victim, 1 - victim);
        bed.run();
        assert_eq!(bed.lost(victim), 2, "it connects to nobody");

        bed.fabric.revive(nic);
        let path = bed.connect(0, 1);
        bed.push(path, id(3), &blocks(ALL, ALL));
        bed.run();
        assert!(bed.completed(0, id(3)) && bed.completed(1, id(3)));
    }
}

#[test]
fn a_black_hole_says_nothing_until_it_is_reset() {
    let mut bed = Bed::new(options(), 1);
    bed.open(Options { transfers_max: 3, ..Options::default() });
    let path = bed.connect(1, 0);
    bed.pull(path, id(1), &blocks(ALL, ALL));
    bed.pass(8 * LATENCY);
    let (nic, before) = (bed.nodes[1].nic, bed.nodes[1].events.len());
    bed.fabric.kill(nic, NicDeath::BlackHole);
    bed.pull(path, id(2), &blocks(0..1, 0..1));
    bed.pull(path, id(3), &blocks(0..1, 0..1));
    assert!(matches!(bed.post(path, Direction::Pull, id(4), &blocks(0..1, 0..1)), Err(PostError::Full)));
    let bytes = bed.bytes(1);
    bed.transport(1).cancel(id(2));
    bed.run();
    assert_eq!(bed.nodes[1].events.len(), before, "{:?}", bed.nodes[1].events);
    assert_eq!(bed.bytes(1), bytes, "nothing arrives");

    bed.fabric.revive(nic);
    bed.run();
    for transfer in [1, 2, 3] {
        assert!(matches!(bed.error(1, id(transfer)), Some(TransferError::Io { .. })), "{transfer}");
    }
    assert_eq!(bed.lost(1), 1);
    let path = bed.connect(1, 0);
    bed.pull(path, id(5), &blocks(ALL, ALL));
    bed.run();
    assert!(bed.completed(1, id(5)));
    assert_eq!(bed.fabric.in_flight(), 0);
}

#[test]
fn whoever_waits_for_a_black_hole_gives_up() {
    for direction in [Direction::Pull, Direction::Push] {
        let mut bed = Bed::new(options(), 2);
        let path = bed.connect(0, 1);
        let program = blocks(ALL, ALL);
        bed.expect(1, id(1), &program);
        bed.post(path, direction, id(1), &program).unwrap();
        bed.pass(8 * LATENCY);
        let killed = bed.now;
        bed.fabric.kill(bed.nodes[1].nic, NicDeath::BlackHole);
        bed.run();
        let (at, _) = bed.end(0, id(1)).unwrap();
        assert!(at >= killed + 300_000, "{direction:?}: hardware tries for a while, not only until {at}");
        assert!(matches!(bed.error(0, id(1)), Some(TransferError::PeerLost(_))));
        assert_eq!(bed.lost(0), 1);
        assert_eq!(bed.end(1, id(1)), None);
    }
}

#[test]
fn a_short_cut_only_costs_time() {
    for (from, to) in [(0, 1), (1, 0)] {
        for direction in [Direction::Pull, Direction::Push] {
            let mut bed = Bed::new(options(), 2);
            bed.fill(0, 1);
            let (one, other) = (bed.nodes[from].nic, bed.nodes[to].nic);
            bed.fabric.cut(one, other, true);
            let path = bed.dial(0, 1);
            let program = blocks(ALL, ALL);
            bed.expect(1, id(1), &program);
            bed.post(path, direction, id(1), &program).unwrap();
            bed.pass(150_000);
            assert_eq!(bed.end(0, id(1)), None);
            bed.fabric.cut(one, other, false);
            bed.run();
            assert!(bed.completed(0, id(1)), "{direction:?} {from}>{to}: {:?}", bed.nodes[0].events);
            assert_eq!((bed.lost(0), bed.lost(1)), (0, 0));
        }
    }
}

#[test]
fn a_long_cut_is_known_to_the_initiator_only() {
    // The way of the bytes.
    let (mut bed, _) = pushing(options());
    bed.fabric.cut(bed.nodes[0].nic, bed.nodes[1].nic, true);
    bed.run();
    assert!(matches!(bed.error(0, id(1)), Some(TransferError::PeerLost(_))));
    assert_eq!(bed.end(1, id(1)), None, "the receiver cannot know");
    // The receiver asks, and is answered once the way is mended.
    bed.fabric.cut(bed.nodes[0].nic, bed.nodes[1].nic, false);
    bed.transport(1).cancel(id(1));
    bed.run();
    assert_eq!(bed.error(1, id(1)), Some(&TransferError::Cancelled));

    // The way of the answers: all bytes are there, and only the receiver knows.
    let (mut bed, _) = pushing(options());
    bed.fabric.cut(bed.nodes[1].nic, bed.nodes[0].nic, true);
    bed.run();
    assert!(bed.completed(1, id(1)));
    assert!(matches!(bed.error(0, id(1)), Some(TransferError::PeerLost(_))));
    assert_eq!(bed.fabric.in_flight(), 0);
}

#[test]
fn a_push_with_a_gap_never_arrives() {
    let mut bed = Bed::new(FabricOptions { window: 64, ..options() }, 2);
    bed.fill(0, 1);
    bed.fill(1, 0);
    let path = bed.connect(0, 1);
    bed.push(path, id(1), &blocks(0..4, 0..4));
    bed.pass(5 * LATENCY);
    bed.fabric.cut(bed.nodes[0].nic, bed.nodes[1].nic, true);
    bed.run();
    assert!((1..4).contains(&bed.count(1, 1)), "all slices had left, and some were lost");
    assert_eq!(bed.end(1, id(1)), None);
    assert!(matches!(bed.error(0, id(1)), Some(TransferError::PeerLost(_))));
}

#[test]
fn completions_fail_after_some_or_all_bytes() {
    let (mut parts, mut whole, mut arrived) = (0, 0, 0);
    for seed in 0..40 {
        for direction in [Direction::Pull, Direction::Push] {
            let mut bed = Bed::new(FabricOptions { seed, ..options() }, 2);
            bed.fabric.fail_completions(1_000_000);
            let (reads, writes) = if direction == Direction::Pull { (1, 0) } else { (0, 1) };
            bed.fill(reads, 1);
            bed.fill(writes, 0);
            let path = bed.connect(0, 1);
            let program = blocks(0..4, 0..4);
            bed.expect(1, id(1), &program);
            bed.post(path, direction, id(1), &program).unwrap();
            bed.run();
            assert!(matches!(bed.error(0, id(1)), Some(TransferError::Io { .. })), "{:?}", bed.end(0, id(1)));
            match bed.count(writes, 1) {
                0 => panic!("seed {seed}: nothing had landed"),
                4 => whole += 1,
                _ => parts += 1,
            }
            arrived += usize::from(bed.completed(1, id(1)));
            bed.fabric.fail_completions(0);
            bed.push(path, id(2), &program);
            bed.run();
            assert!(bed.completed(0, id(2)) && bed.completed(1, id(2)));
        }
    }
    assert!(parts > 0 && whole > 0 && arrived > 0, "{parts} in part, {whole} whole, {arrived} arrived");
}

#[test]
fn old_keys_and_addresses_are_refused() {
    let mut bed = Bed::new(options(), 2);
    let path = bed.connect(1, 0);
    let pool = bed.nodes[0].pool.clone();
    bed.transport(0).unbind(pool.id());
    let stale = bed.nodes[0].keys.clone();
    bed.nodes[0].keys = bed.transport(0).bind(&pool).unwrap();
    bed.pull(path, id(1), &blocks(0..1, 0..1));
    bed.run();
    assert!(matches!(bed.error(1, id(1)), Some(TransferError::Refused(_))));

    let address = bed.transport(0).address();
    bed.nodes[0].transport = None;
    bed.run();
    assert_eq!(bed.lost(1), 1);
    bed.open_with(pool.clone(), Options::default());
    let peer = bed.transport(1).connect(&address).unwrap();
    bed.run();
    assert_eq!(bed.lost(1), 2, "nobody answers to an old address");
    assert!(!bed.saw(1, &Event::Connected { peer }));
    let fresh = bed.connect(1, 2);
    assert!(bed.transport(1).import(fresh.peer, &stale, pool.layout()).is_err(), "keys of the NIC that was");
}

#[test]
fn a_withdrawn_pool_takes_nothing_more() {
    let (mut bed, _) = pushing(options());
    let (pool, before) = (bed.nodes[1].pool.id(), bed.bytes(1));
    bed.transport(1).unbind(pool);
    bed.run();
    assert!(bed.saw(1, &Event::Unbound { pool }));
    assert_eq!(bed.bytes(1), before);
    assert_eq!(bed.error(1, id(1)), Some(&TransferError::Unbound));
    assert!(matches!(bed.error(0, id(1)), Some(TransferError::Refused(_))));
    assert!(bed.fabric.stats(bed.nodes[1].nic).slices_dropped > 0);
}

#[test]
fn queues_have_a_depth() {
    let mut bed = Bed::new(FabricOptions { depth: 2, ..options() }, 2);
    let path = bed.connect(1, 0);
    let program = blocks(0..1, 0..1);
    bed.pull(path, id(1), &program);
    bed.pull(path, id(2), &program);
    assert!(matches!(bed.post(path, Direction::Pull, id(3), &program), Err(PostError::Full)));
    bed.run();
    bed.pull(path, id(3), &program);
    bed.run();
    let stats = bed.fabric.stats(bed.nodes[1].nic);
    assert_eq!((stats.posted_max, stats.turned_away), (2, 1));
    assert_eq!((stats.bytes_in, stats.in_flight_in), (3 * BLOCK_BYTES, 0));
}
