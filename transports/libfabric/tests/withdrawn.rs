//! Memory that an owner takes back while it is read: once it is told so, nobody reads it any more.
#![allow(clippy::unwrap_used, reason = "this is test code")]

mod support;

use std::ptr;
use std::sync::Arc;

use kvferry_core::{Direction, PoolId, TransferId};
use kvferry_libfabric::LibfabricProvider;
use kvferry_transport::conformance::{Party, block_planes, until, whole_blocks};
use kvferry_transport::{Event, Options, Pool, PoolOptions, Transfer};
use support::{DEVICES, turn};

/// More than a reader has under way at once: it is not over while nobody polls.
const BLOCKS: u32 = 128;
const BLOCK_BYTES: u64 = 1 << 20;
const BYTES: usize = (BLOCKS as usize) << 20;
const PULL: TransferId = TransferId(1);
const WIRES: TransferId = TransferId(2);
/// Of each connection: the library, not the kernel, keeps what is under way.
static BUFFER_BYTES: libc::c_int = 256 << 10;
/// What the source holds while it is lent, and afterwards.
const LENT: u8 = 0x11;
const TAKEN_BACK: u8 = 0xee;

/// Pages of the user's own.
struct Pages(usize);

impl Pages {
    fn new() -> Arc<Pages> {
        let (both, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe { libc::mmap(ptr::null_mut(), BYTES, both, flags, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        Arc::new(Pages(base as usize))
    }

    fn base(&self) -> *mut u8 {
        ptr::with_exposed_provenance_mut(self.0)
    }

    /// Nobody may touch them any more.
    fn close(&self) {
        // SAFETY: the mapping is ours, of that length.
        assert_eq!(unsafe { libc::mprotect(self.base().cast(), BYTES, libc::PROT_NONE) }, 0);
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, of that length.
        unsafe { libc::munmap(self.base().cast(), BYTES) };
    }
}

/// The first byte of each block, and the last.
fn ends(pool: &Pool) -> Vec<u8> {
    let read = |block, at| {
        let mut byte = [0];
        pool.read(0, block, at, &mut byte).unwrap();
        byte[0]
    };
    (0..BLOCKS).flat_map(|block| [read(block, 0), read(block, BLOCK_BYTES - 1)]).collect()
}

fn poll(party: &mut Party, times: usize) {
    (0..times).for_each(|_| party.transport.poll(&mut party.events));
}

fn count(pool: &Pool, byte: u8) -> usize {
    let mut all = vec![0; BLOCK_BYTES as usize];
    let mut found = 0;
    for block in 0..BLOCKS {
        pool.read(0, block, 0, &mut all).unwrap();
        found += all.iter().filter(|there| **there == byte).count();
    }
    found
}

/// Has every connection of this process keep little; how many there are.
fn shrink_buffers() -> usize {
    let open =
        std::fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let shrink = |number: &libc::c_int| {
        let set = |option| {
            let bytes = size_of_val(&BUFFER_BYTES) as libc::socklen_t;
            // SAFETY: changes an option of what has that number, if it is a socket; the value is read during the call.
            unsafe { libc::setsockopt(*number, libc::SOL_SOCKET, option, (&raw const BUFFER_BYTES).cast(), bytes) == 0 }
        };
        set(libc::SO_SNDBUF) && set(libc::SO_RCVBUF)
    };
    open.filter(shrink).count()
}

/// An owner, a reader that is in the midst of much, and whether that is polled while the owner takes its memory back.
fn taken_back(device: &str, is_polled: bool, closes: bool) {
    let open = || Party::open(&LibfabricProvider::new().only(device), &Options::default());
    let (mut owner, mut reader) = (open(), open());
    let pages = Pages::new();
    let layout = block_planes(1, BLOCKS, BLOCK_BYTES);
    let regions = vec![(pages.base(), BYTES as u64)];
    // SAFETY: the pages stay mapped as long as they are kept, and nobody forms references over them.
    let source = unsafe { Pool::from_raw(PoolId(1), layout.clone(), regions, pages.clone()) }.unwrap();
    let options = PoolOptions { huge_pages: false, ..PoolOptions::default() };
    let into = Pool::allocate_with(PoolId(2), layout, "withdrawn", &options).unwrap();
    (0..BLOCKS).for_each(|block| source.fill(0, block, LENT).unwrap());
    let keys = owner.bind(&source);
    reader.bind(&into);
    let peer = reader.connect(&owner);
    let remote = reader.import(peer, &keys, source.layout());
    let pull = |id, blocks: u32| {
        let program = Arc::new(whole_blocks(1, 16, BLOCK_BYTES, 0..blocks, 0..blocks));
        let (range, local, direction) = (program.whole(), into.id(), Direction::Pull);
        Transfer { id, peer, direction, local, remote, program, range, notice: None }
    };
    reader.transport.post(pull(WIRES, 1)).unwrap();
    until(&mut [&mut reader, &mut owner], "the way is wired", |parties| parties[0].end(WIRES).is_some());
    assert_ne!(shrink_buffers(), 0, "there are connections");
    reader.transport.post(pull(PULL, BLOCKS)).unwrap();
    until(&mut [&mut reader, &mut owner], "the pull begins", |_| ends(&into)[2..].contains(&LENT));
    assert_eq!(reader.end(PULL), None, "it is not over yet");
    owner.transport.unbind(source.id());
    let unbound = |parties: &[&mut Party]| parties[0].saw(&Event::Unbound { pool: PoolId(1) });
    match is_polled {
        true => until(&mut [&mut owner, &mut reader], "the pool is let go", unbound),
        false => until(&mut [&mut owner], "the pool is let go", unbound),
    }
    if closes {
        pages.close();
    } else {
        (0..BLOCKS).for_each(|block| source.fill(0, block, TAKEN_BACK).unwrap());
    }
    until(&mut [&mut owner, &mut reader], "the pull ends", |parties| parties[1].end(PULL).is_some());
    assert!(reader.failed(PULL), "{:?}", reader.end(PULL));
    for _ in 0..2_000 {
        poll(&mut owner, 1);
        poll(&mut reader, 1);
    }
    assert_eq!(count(&into, TAKEN_BACK), 0, "{device}: memory was read after it was let go");
    assert!(is_polled || owner.lost_someone(), "its reader said nothing");
}

#[test]
fn a_pool_is_let_go_when_its_readers_have_ended_their_reads() {
    let Some(_turn) = turn() else { return };
    for device in DEVICES {
        taken_back(device, true, false);
        taken_back(device, true, true);
    }
}

/// It costs the time after which a reader that says nothing is cut off.
#[test]
fn a_reader_that_stands_still_is_cut_off_before_a_pool_is_let_go() {
    let Some(_turn) = turn() else { return };
    for device in DEVICES {
        taken_back(device, false, false);
    }
}

/// Its owner may unmap it.
#[test]
fn memory_that_is_closed_is_not_touched_for_a_reader_that_stands_still() {
    let Some(_turn) = turn() else { return };
    taken_back(DEVICES[0], false, true);
}
