//! Peers that come and go, and bytes from them that were changed on the way.
#![allow(clippy::unwrap_used, reason = "this is test code")]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvferry_core::{Direction, FenceProof, PoolId, Program, TransferId};
use kvferry_transport::conformance::{Party, absent, block_planes, until, whole_blocks};
use kvferry_transport::{Event, Expected, ImportError, Options, Pool, PoolKeys, PoolOptions, Transfer};
use kvferry_ucx::UcxProvider;

const BLOCKS: u32 = 64;
const BLOCK_BYTES: u64 = 64 << 10;

/// Tests take turns: some count what the process holds.
static TURN: Mutex<()> = Mutex::new(());

/// This test's turn; none without a UCX library, unless `KVFERRY_REQUIRE` names ucx.
fn turn() -> Option<MutexGuard<'static, ()>> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(reason) = UcxProvider::unavailable() else { return Some(turn) };
    absent("ucx", &reason);
    None
}

fn pool(id: u32) -> Pool {
    let layout = block_planes(1, BLOCKS, BLOCK_BYTES);
    let options = PoolOptions { huge_pages: false, ..PoolOptions::default() };
    Pool::allocate_with(PoolId(id), layout, "peers", &options).unwrap()
}

/// Block `i` of the source goes to block `BLOCKS - 1 - i`.
fn program() -> Arc<Program> {
    Arc::new(whole_blocks(1, 16, BLOCK_BYTES, 0..BLOCKS, (0..BLOCKS).rev()))
}

fn fill(pool: &Pool, salt: u8) {
    (0..BLOCKS).for_each(|block| pool.fill(0, block, salt.wrapping_add(block as u8)).unwrap());
}

fn verify(pool: &Pool, salt: u8) {
    let mut bytes = vec![0; BLOCK_BYTES as usize];
    for block in 0..BLOCKS {
        pool.read(0, block, 0, &mut bytes).unwrap();
        let wanted = salt.wrapping_add((BLOCKS - 1 - block) as u8);
        assert!(bytes.iter().all(|byte| *byte == wanted), "block {block}");
    }
}

/// One transfer over a new connection, checked; then the connection is given up.
fn cycle(a: &mut Party, b: &mut Party, source: (&Pool, &PoolKeys), destination: (&Pool, &PoolKeys), number: u128) {
    assert!(try_cycle(a, b, source, destination, number), "{:?} {:?}", a.events, b.events);
}

/// As [`cycle`]; false where the connection broke, which both ends must hear.
fn try_cycle(
    a: &mut Party,
    b: &mut Party,
    source: (&Pool, &PoolKeys),
    destination: (&Pool, &PoolKeys),
    number: u128,
) -> bool {
    let id = TransferId(number);
    let push = number % 2 == 1;
    let salt = number as u8;
    fill(source.0, salt);
    let program = program();
    let range = program.whole();
    // `a` holds the source; who initiates connects.
    let (peer, from) = if push { (a.connect(b), &mut *a) } else { (b.connect(a), &mut *b) };
    let (local, keys, layout) = if push {
        (source.0.id(), destination.1, destination.0.layout())
    } else {
        (destination.0.id(), source.1, source.0.layout())
    };
    let direction = if push { Direction::Push } else { Direction::Pull };
    let remote = from.import(peer, keys, layout);
    let transfer = Transfer { id, peer, direction, local, remote, program: program.clone(), range, notice: None };
    from.transport.post(transfer).unwrap();
    if push {
        b.transport.expect(Expected { id, pool: destination.0.id(), program, range }).unwrap();
    }
    until(&mut [&mut *a, &mut *b], "a transfer ends", |parties| match parties {
        [a, b] => b.end(id).is_some() && (!push || a.end(id).is_some()),
        _ => false,
    });
    if a.failed(id) || b.failed(id) {
        until(&mut [a, b], "both ends hear of it", |parties| parties.iter().all(|party| party.lost_someone()));
        return false;
    }
    verify(destination.0, salt);
    if push {
        a.transport.disconnect(peer)
    } else {
        b.transport.disconnect(peer)
    }
    let (initiator, other) = if push { (a, b) } else { (b, a) };
    until(&mut [initiator, other], "the other end hears of it", |parties| match parties {
        [_, other] => other.lost_someone(),
        _ => false,
    });
    true
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// `KVFERRY_CYCLES` says how many; 10,000 take minutes.
#[test]
fn connecting_and_letting_go_holds_nothing() {
    let Some(_turn) = turn() else { return };
    let cycles: u128 = std::env::var("KVFERRY_CYCLES").map_or(300, |cycles| cycles.parse().unwrap());
    for (device, two_sided) in [("memory", false), ("lo", false), ("memory", true), ("lo", true)] {
        let provider = UcxProvider::new().only(device);
        let options = Options { two_sided, ..Options::default() };
        let mut a = Party::open(&provider, &options);
        let mut b = Party::open(&provider, &options);
        let (source, destination) = (pool(1), pool(2));
        let (source_keys, destination_keys) = (a.bind(&source), b.bind(&destination));
        let mut before = None;
        for number in 0..cycles {
            cycle(&mut a, &mut b, (&source, &source_keys), (&destination, &destination_keys), number);
            a.events.clear();
            b.events.clear();
            // What is kept for good is there by now.
            if number == cycles / 3 {
                until(&mut [&mut a, &mut b], "nothing", |_| true);
                before = Some((descriptors(), resident_kib()));
            }
        }
        let (fds, kib) = before.unwrap();
        let (fds_now, kib_now) = (descriptors(), resident_kib());
        println!(
            "{device}, two-sided {two_sided}: {cycles} cycles, descriptors {fds} to {fds_now}, resident {kib} to {kib_now} KiB"
        );
        assert!(fds_now <= fds + 8, "{device}: descriptors grew from {fds} to {fds_now}");
        assert!(kib_now <= kib + kib / 5 + 4096, "{device}: memory grew from {kib} to {kib_now} KiB");
    }
}

/// Every round a peer appears, moves something and goes: endpoints, workers and contexts come and go with it.
#[test]
fn transports_that_are_closed_hold_nothing() {
    let Some(_turn) = turn() else { return };
    for device in ["memory", "lo"] {
        let provider = UcxProvider::new().only(device);
        let mut a = Party::open(&provider, &Options::default());
        let (source, destination) = (pool(1), pool(2));
        let source_keys = a.bind(&source);
        let mut before = 0;
        for number in 0..24 {
            let mut b = Party::open(&provider, &Options::default());
            let destination_keys = b.bind(&destination);
            cycle(&mut a, &mut b, (&source, &source_keys), (&destination, &destination_keys), number);
            drop(b);
            a.events.clear();
            // Its endpoint here is closed as soon as UCX sees that the other is gone.
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(50) {
                a.transport.poll(&mut a.events);
            }
            if number == 8 {
                before = descriptors();
            }
        }
        let now = descriptors();
        println!("{device}: descriptors {before} to {now}");
        assert!(now <= before + 8, "{device}: descriptors grew from {before} to {now}");
    }
}

/// UCX itself would take most changed bytes, and end the process for some.
#[test]
fn changed_bytes_never_reach_ucx() {
    let Some(_turn) = turn() else { return };
    let provider = UcxProvider::new().only("memory");
    let mut a = Party::open(&provider, &Options::default());
    let mut b = Party::open(&provider, &Options::default());
    let address = b.transport.address();
    for (at, bit) in (0..address.len()).flat_map(|at| [(at, 1), (at, 0x80)]) {
        let mut changed = address.to_vec();
        changed[at] ^= bit;
        assert!(a.transport.connect(&changed).is_err(), "byte {at} of the address");
    }
    let source = pool(1);
    let keys = b.bind(&source);
    let peer = a.connect(&b);
    for (at, bit) in (0..keys.0.len()).flat_map(|at| [(at, 1), (at, 0x80)]) {
        let mut changed = keys.0.to_vec();
        changed[at] ^= bit;
        let result = a.transport.import(peer, &PoolKeys(changed.into()), source.layout());
        assert!(matches!(result, Err(ImportError::BadKeys { .. })), "byte {at} of the keys: {result:?}");
    }
    // Nor do another transport's keys.
    let foreign = a.bind(&pool(3));
    let result = a.transport.import(peer, &foreign, source.layout());
    assert!(matches!(result, Err(ImportError::BadKeys { .. })), "{result:?}");
}

#[test]
fn an_address_of_a_closed_transport_connects_to_nobody() {
    let Some(_turn) = turn() else { return };
    for device in ["memory", "lo"] {
        let provider = UcxProvider::new().only(device);
        let mut a = Party::open(&provider, &Options::default());
        let b = Party::open(&provider, &Options::default());
        let address = b.transport.address();
        drop(b);
        if let Ok(peer) = a.transport.connect(&address) {
            until(&mut [&mut a], "the call ends", |parties| parties.iter().all(|party| party.lost_someone()));
            assert!(!a.saw(&Event::Connected { peer }));
        }
        // The next one at that device is somebody else, and is reached.
        let c = Party::open(&provider, &Options::default());
        let peer = a.connect(&c);
        let mut c = c;
        until(&mut [&mut a, &mut c], "the next one answers", |parties| {
            parties.first().is_some_and(|a| a.saw(&Event::Connected { peer }))
        });
    }
}

#[test]
fn a_peer_of_another_device_is_refused_by_name() {
    let Some(_turn) = turn() else { return };
    let mut a = Party::open(&UcxProvider::new().only("memory"), &Options::default());
    let b = Party::open(&UcxProvider::new().only("lo"), &Options::default());
    let error = a.transport.connect(&b.transport.address()).unwrap_err();
    assert!(error.to_string().contains("memory"), "{error}");
}

/// Their contexts are configured differently: told at once, on either side.
#[test]
fn one_side_cannot_meet_two() {
    let Some(_turn) = turn() else { return };
    let mut one = Party::open(&UcxProvider::new().only("lo"), &Options::default());
    let mut two = Party::open(&UcxProvider::new().only("lo").two_sided(), &Options::default());
    let addresses = [two.transport.address(), one.transport.address()];
    for (here, there) in [&mut one, &mut two].into_iter().zip(addresses) {
        let error = here.transport.connect(&there).unwrap_err();
        assert!(error.to_string().contains("same UCX method"), "{error}");
    }
}

/// A fence is proved for peers that are up, that are gone, and that never answered; then they are reached again.
#[test]
fn fences_are_proved_whatever_the_peer_does() {
    let Some(_turn) = turn() else { return };
    for device in ["memory", "lo"] {
        let provider = UcxProvider::new().only(device);
        let mut a = Party::open(&provider, &Options::default());
        let mut b = Party::open(&provider, &Options::default());
        let (source, destination) = (pool(1), pool(2));
        let (source_keys, _) = (a.bind(&source), b.bind(&destination));
        fill(&source, 9);
        for round in 0..4u128 {
            let start = Instant::now();
            let peer = b.connect(&a);
            if round > 0 {
                let remote = b.import(peer, &source_keys, source.layout());
                let program = program();
                let range = program.whole();
                let (direction, local) = (Direction::Pull, destination.id());
                let transfer =
                    Transfer { id: TransferId(round), peer, direction, local, remote, program, range, notice: None };
                b.transport.post(transfer).unwrap();
                for _ in 0..(round - 1) * 40 {
                    a.transport.poll(&mut a.events);
                    b.transport.poll(&mut b.events);
                }
            }
            b.transport.fence(peer);
            until(&mut [&mut b], "the fence is proved, without the peer", |parties| {
                let proved = |event: &Event| {
                    let proof = [FenceProof::OwnerCopies, FenceProof::EndpointDestroyed];
                    matches!(event, Event::Fenced { peer: of, proof: by } if *of == peer && proof.contains(by))
                };
                parties.iter().all(|party| party.events.iter().any(proved))
            });
            assert!(start.elapsed() < Duration::from_secs(10));
            assert!(round == 0 || b.end(TransferId(round)).is_some(), "its transfers have ended: {:?}", b.events);
        }
        b.events.clear();
        a.events.clear();
        let destination_keys = {
            b.transport.unbind(destination.id());
            until(&mut [&mut a, &mut b], "it is let go", |parties| {
                parties.get(1).is_some_and(|b| b.saw(&Event::Unbound { pool: PoolId(2) }))
            });
            b.bind(&destination)
        };
        // The peer's endpoint may be one that the fence has closed here: that is heard at both ends, and the next one stands.
        for direction in 0..2 {
            let stands = (0..4).any(|attempt| {
                a.events.clear();
                b.events.clear();
                let number = 100 + 2 * attempt + direction;
                try_cycle(&mut a, &mut b, (&source, &source_keys), (&destination, &destination_keys), number)
            });
            assert!(stands, "{:?} {:?}", a.events, b.events);
        }
    }
}
