//! What tests of real peers share: the ways to cross, turns, pools with a content that can be checked, transfers between two parties.
#![allow(dead_code, reason = "not every test that uses this module uses all of it")]

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvferry_core::{Direction, PoolId, PoolLayout, Program, TransferId};
use kvferry_transport::conformance::{Party, absent, block_planes, until, whole_blocks};
use kvferry_transport::{Expected, PackedBy, PeerId, Pool, PoolKeys, PoolOptions, Transfer};
use kvferry_ucx::UcxProvider;

pub(crate) const BLOCK_BYTES: u64 = 64 << 10;

/// A device and a method: what every peer has to survive over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    pub(crate) device: &'static str,
    pub(crate) two_sided: bool,
    /// Everything is packed, and read out of its source's staging where lanes can.
    pub(crate) packed_read: bool,
}

/// All of them that need no hardware.
pub(crate) const WAYS: [Way; 5] = [
    Way { device: "memory", two_sided: false, packed_read: false },
    Way { device: "lo", two_sided: false, packed_read: false },
    Way { device: "memory", two_sided: true, packed_read: false },
    Way { device: "lo", two_sided: true, packed_read: false },
    Way { device: "memory", two_sided: false, packed_read: true },
];

impl Way {
    pub(crate) fn provider(self) -> UcxProvider {
        let provider = UcxProvider::new().only(self.device);
        match self {
            Way { two_sided: true, .. } => provider.two_sided(),
            Way { packed_read: true, .. } => provider.packed(PackedBy::Read, u64::MAX),
            Way { .. } => provider,
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sides = if self.two_sided { "two-sided" } else { "one-sided" };
        write!(f, "{}, {sides}{}", self.device, if self.packed_read { ", packed and read" } else { "" })
    }
}

/// Tests take turns: some count what the process holds.
static TURN: Mutex<()> = Mutex::new(());

/// This test's turn; none without a UCX library, unless `KVFERRY_REQUIRE` names ucx.
pub(crate) fn turn() -> Option<MutexGuard<'static, ()>> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(reason) = UcxProvider::unavailable() else { return Some(turn) };
    absent("ucx", &reason);
    None
}

pub(crate) fn layout(blocks: u32) -> PoolLayout {
    block_planes(1, blocks, BLOCK_BYTES)
}

pub(crate) fn pool(id: u32, blocks: u32) -> Pool {
    let options = PoolOptions { huge_pages: false, ..PoolOptions::default() };
    Pool::allocate_with(PoolId(id), layout(blocks), "peers", &options).unwrap()
}

/// Block `i` of the source goes to block `blocks - 1 - i`.
pub(crate) fn program(blocks: u32) -> Arc<Program> {
    Arc::new(whole_blocks(1, 16, BLOCK_BYTES, 0..blocks, (0..blocks).rev()))
}

pub(crate) fn blocks(pool: &Pool) -> u32 {
    pool.layout().planes.first().unwrap().blocks
}

pub(crate) fn fill(pool: &Pool, salt: u8) {
    (0..blocks(pool)).for_each(|block| pool.fill(0, block, salt.wrapping_add(block as u8)).unwrap());
}

/// Whether every byte is what [`fill`] and [`program`] make of it.
pub(crate) fn verify(pool: &Pool, salt: u8) {
    let mut bytes = vec![0; BLOCK_BYTES as usize];
    let blocks = blocks(pool);
    for block in 0..blocks {
        pool.read(0, block, 0, &mut bytes).unwrap();
        let wanted = salt.wrapping_add((blocks - 1 - block) as u8);
        assert!(bytes.iter().all(|byte| *byte == wanted), "block {block}");
    }
}

/// A pool and what its peers need to reach it.
pub(crate) type Shared<'a> = (&'a Pool, &'a PoolKeys);

/// Has `a`, who holds the source, and `b` begin a transfer over a connection that its initiator opens: `a` a push, `b` a pull. Who initiates
/// gets the peer's number.
pub(crate) fn begin(
    a: &mut Party,
    b: &mut Party,
    source: Shared<'_>,
    destination: Shared<'_>,
    direction: Direction,
    id: TransferId,
) -> PeerId {
    let program = program(blocks(source.0));
    let range = program.whole();
    let push = direction == Direction::Push;
    if push {
        let expected = Expected { from: None, id, pool: destination.0.id(), program: program.clone(), range };
        b.transport.expect(expected).unwrap();
    }
    let ((from, to), local, (remote, keys)) =
        if push { ((a, b), source.0, destination) } else { ((b, a), destination.0, source) };
    let peer = from.connect(to);
    let remote = from.import(peer, keys, remote.layout());
    let transfer = Transfer { id, peer, direction, local: local.id(), remote, program, range, notice: None };
    from.transport.post(transfer).unwrap();
    peer
}

/// One transfer over a new connection, checked; then the connection is given up.
pub(crate) fn cycle(a: &mut Party, b: &mut Party, source: Shared<'_>, destination: Shared<'_>, number: u128) {
    assert!(try_cycle(a, b, source, destination, number), "{:?} {:?}", a.events, b.events);
}

/// As [`cycle`]; false where the connection broke, which both ends must hear.
pub(crate) fn try_cycle(
    a: &mut Party,
    b: &mut Party,
    source: Shared<'_>,
    destination: Shared<'_>,
    number: u128,
) -> bool {
    let (id, salt) = (TransferId(number), number as u8);
    let push = number % 2 == 1;
    fill(source.0, salt);
    let peer = begin(a, b, source, destination, if push { Direction::Push } else { Direction::Pull }, id);
    until(&mut [&mut *a, &mut *b], "a transfer ends", |parties| match parties {
        [a, b] => b.end(id).is_some() && (!push || a.end(id).is_some()),
        _ => false,
    });
    if a.failed(id) || b.failed(id) {
        until(&mut [a, b], "both ends hear of it", |parties| parties.iter().all(|party| party.lost_someone()));
        return false;
    }
    verify(destination.0, salt);
    let (initiator, other) = if push { (a, b) } else { (b, a) };
    initiator.transport.disconnect(peer);
    until(&mut [initiator, other], "the other end hears of it", |parties| match parties {
        [_, other] => other.lost_someone(),
        _ => false,
    });
    true
}

pub(crate) fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

pub(crate) fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
