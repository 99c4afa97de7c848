//! Chunks that are put, that wait and that are not wanted any more.

use std::sync::Arc;

use kvferry_core::{End, PoolId, TransportKind};
use kvferry_transport::conformance::{OnDevice, block_planes, whole_blocks};
use kvferry_transport::{Cursor, Device, Options, Pool, PoolOptions, Provider, Stage, Staged};

use super::*;
use crate::sink::EARLY_MAX;

const KEY: Key = Key { session: 5, flow: Flow::Pull, tag: 9 };

/// Two blocks of 32 bytes, and a cursor over both.
fn cursor() -> (Pool, Share) {
    let layout = block_planes(1, 2, 32);
    let options = PoolOptions { huge_pages: false, ..PoolOptions::default() };
    let pool = Pool::allocate_with(PoolId(1), layout.clone(), "inbox", &options).unwrap();
    let program = whole_blocks(1, 16, 32, 0..2, 0..2);
    let range = program.whole();
    let cursor = Cursor::new(pool.clone(), Arc::new(layout), Arc::new(program), End::Destination, range);
    (pool, Share::Direct(Box::new(cursor)))
}

fn header(number: u32) -> Header {
    Header { kind: Kind::PullData, number, session: KEY.session, tag: KEY.tag }
}

/// In which buffer each was, and how many transfers are whole.
fn chunks(inbox: &Inbox) -> (Vec<Option<u32>>, usize) {
    let (mut places, mut whole) = (Vec::new(), 0);
    for arrival in inbox.take() {
        match arrival {
            Arrival::Chunk { place, .. } => places.push(place),
            Arrival::Whole { .. } => whole += 1,
            _ => {}
        }
    }
    (places, whole)
}

#[test]
fn a_chunk_keeps_its_place_on_the_link_until_it_is_put() {
    let inbox = Inbox::default();
    let (pool, cursor) = cursor();
    inbox.add_sink(KEY, cursor, 64);
    inbox.brought(header(1), vec![2; 32].into(), Some(5));
    assert_eq!((chunks(&inbox), inbox.take_bytes()), ((Vec::new(), 0), 0));
    inbox.brought(header(0), vec![1; 32].into(), None);
    assert_eq!((chunks(&inbox), inbox.take_bytes()), ((vec![None, Some(5)], 1), 64));
    let mut bytes = [0; 32];
    for block in 0..2 {
        pool.read(0, block, 0, &mut bytes).unwrap();
        assert_eq!(bytes, [1 + block as u8; 32]);
    }
}

#[test]
fn what_came_early_for_a_transfer_that_ends_frees_its_place() {
    for of_session in [false, true] {
        let inbox = Inbox::default();
        inbox.add_sink(KEY, cursor().1, 64);
        inbox.brought(header(1), vec![2; 16].into(), Some(0));
        inbox.brought(header(2), vec![3; 16].into(), Some(7));
        if of_session {
            inbox.remove_session(KEY.session)
        } else {
            inbox.remove_sink(KEY)
        }
        assert_eq!(chunks(&inbox), (vec![Some(0), Some(7)], 0));
        inbox.brought(header(0), vec![1; 32].into(), Some(3));
        assert_eq!((chunks(&inbox), inbox.take_bytes()), ((vec![Some(3)], 0), 0), "nobody waits for it");
    }
}

fn all(_: PoolId) -> bool {
    true
}

/// Two blocks of 32 KiB in a device's memory, with one slot of a page for what comes.
fn staged() -> (Pool, Stage, Share) {
    let device = Device { kind: TransportKind::Ucx, name: "memory".to_owned(), unavailable: None };
    let memory = OnDevice::new(crate::UcxProvider::new(), all, 4096, 2);
    let pool = memory.allocate(&device, PoolId(1), block_planes(1, 2, BLOCK), "inbox").unwrap();
    let options = Options { staged_chunk_bytes: 4096, staged_chunks: 2, ..Options::default() };
    let stage = Stage::open(&pool, &options).unwrap();
    let program = Arc::new(whole_blocks(1, 16, BLOCK, 0..2, 0..2));
    let share = Share::Staged(Staged::new(&stage, &program, program.whole()));
    (pool, stage, share)
}

const BLOCK: u64 = 32 << 10;

fn breaches(inbox: &Inbox) -> usize {
    inbox.take().iter().filter(|arrival| matches!(arrival, Arrival::Breach { .. })).count()
}

#[test]
fn a_chunk_that_lacks_room_keeps_its_place_until_the_device_has_emptied_slots() {
    let inbox = Inbox::default();
    let (pool, stage, share) = staged();
    inbox.add_sink(KEY, share, 2 * BLOCK);
    inbox.brought(header(1), vec![2; BLOCK as usize].into(), Some(1));
    inbox.brought(header(0), vec![1; BLOCK as usize].into(), Some(0));
    assert_eq!((chunks(&inbox), inbox.take_bytes()), ((Vec::new(), 0), 4096), "one slot is there");
    let (mut places, mut whole, mut bytes) = (Vec::new(), 0, 4096);
    while whole == 0 {
        stage.poll();
        inbox.settle();
        let (more, is_whole) = chunks(&inbox);
        places.extend(more);
        bytes += inbox.take_bytes();
        whole += is_whole;
        assert!(whole == 0 || !stage.is_busy().0, "whole before the last copy's end");
        // Whoever sleeps while no copy runs would sleep for ever.
        assert!(whole > 0 || stage.is_busy().0 || inbox.can_settle());
    }
    assert_eq!((places, bytes), (vec![Some(0), Some(1)], 2 * BLOCK));
    let mut bytes = vec![0; BLOCK as usize];
    for block in 0..2 {
        pool.read(0, block, 0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 1 + block as u8));
    }
}

#[test]
fn a_peer_that_sends_what_it_has_no_place_for_is_a_breach_while_slots_lack_too() {
    let again = |inbox: &Inbox| inbox.brought(header(0), vec![1; BLOCK as usize].into(), None);
    let far = |inbox: &Inbox| inbox.brought(header(EARLY_MAX as u32), vec![1; 10].into(), None);
    let none = |inbox: &Inbox| {
        inbox.brought(header(1), Vec::new().into(), None);
    };
    let long = |inbox: &Inbox| inbox.brought(header(1), vec![1; BLOCK as usize + 1].into(), None);
    for (what, act) in [again as fn(&Inbox), far, none, long].into_iter().enumerate() {
        let inbox = Inbox::default();
        let (_pool, stage, share) = staged();
        inbox.add_sink(KEY, share, 2 * BLOCK);
        inbox.brought(header(0), vec![1; BLOCK as usize].into(), None);
        act(&inbox);
        let mut found = breaches(&inbox);
        while found == 0 {
            stage.poll();
            inbox.settle();
            found = breaches(&inbox);
            assert!(found > 0 || inbox.has_sinks(), "act {what} passed");
        }
        assert!(!inbox.has_sinks(), "act {what}");
        while stage.left(End::Destination) == 0 {
            stage.poll();
        }
    }
}

#[test]
fn what_came_for_a_device_and_is_not_wanted_any_more_frees_its_places_and_slots() {
    let inbox = Inbox::default();
    let (_pool, stage, share) = staged();
    inbox.add_sink(KEY, share, 2 * BLOCK);
    inbox.brought(header(0), vec![1; BLOCK as usize].into(), Some(4));
    inbox.settle();
    inbox.remove_sink(KEY);
    assert_eq!(chunks(&inbox), (vec![Some(4)], 0));
    assert!(stage.left(End::Destination) == 0 && stage.is_busy().0, "a copy runs in it");
    while stage.left(End::Destination) == 0 {
        stage.poll();
    }
    inbox.settle();
    assert_eq!(chunks(&inbox), (Vec::new(), 0));
}
