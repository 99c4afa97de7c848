//! Peers that come and go, that stop answering, that withdraw what is read.
#![allow(clippy::unwrap_used, reason = "this is test code")]

mod support;

use std::sync::Arc;

use kvferry_core::{Direction, FenceProof, PoolId, Program, TransferId};
use kvferry_libfabric::LibfabricProvider;
use kvferry_transport::conformance::{Party, block_planes, until, whole_blocks};
use kvferry_transport::{
    BindError, DeviceMemory, DeviceRegion, Event, Expected, Options, PeerId, Pool, PoolKeys, PoolOptions, Provider,
    Transfer, TransferError, TransportKind,
};
use support::{DEVICES, turn};

const BLOCKS: u32 = 64;
const BLOCK_BYTES: u64 = 64 << 10;

fn open(device: &str, options: &Options) -> Party {
    Party::open(&LibfabricProvider::new().only(device), options)
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

fn bytes(pool: &Pool) -> Vec<u8> {
    let mut all = vec![0; (BLOCK_BYTES * u64::from(BLOCKS)) as usize];
    for (block, bytes) in (0..).zip(all.chunks_mut(BLOCK_BYTES as usize)) {
        pool.read(0, block, 0, bytes).unwrap();
    }
    all
}

fn verify(pool: &Pool, salt: u8) {
    for (block, bytes) in (0..BLOCKS).zip(bytes(pool).chunks(BLOCK_BYTES as usize)) {
        let wanted = salt.wrapping_add((BLOCKS - 1 - block) as u8);
        assert!(bytes.iter().all(|byte| *byte == wanted), "block {block}");
    }
}

fn pull(id: u128, peer: PeerId, local: &Pool, remote: kvferry_transport::RemotePool) -> Transfer {
    let program = program();
    let range = program.whole();
    let (id, local) = (TransferId(id), local.id());
    Transfer { id, peer, direction: Direction::Pull, local, remote, program, range, notice: None }
}

/// One transfer over a new connection, checked; then the connection is given up.
fn cycle(a: &mut Party, b: &mut Party, source: (&Pool, &PoolKeys), destination: (&Pool, &PoolKeys), number: u128) {
    let id = TransferId(number);
    let push = number % 2 == 1;
    let salt = number as u8;
    fill(source.0, salt);
    // `a` holds the source; who initiates connects.
    let (peer, from) = if push { (a.connect(b), &mut *a) } else { (b.connect(a), &mut *b) };
    let (local, keys, layout) = if push {
        (source.0, destination.1, destination.0.layout())
    } else {
        (destination.0, source.1, source.0.layout())
    };
    let remote = from.import(peer, keys, layout);
    let direction = if push { Direction::Push } else { Direction::Pull };
    let transfer = Transfer { direction, ..pull(number, peer, local, remote) };
    let (program, range) = (transfer.program.clone(), transfer.range);
    from.transport.post(transfer).unwrap();
    if push {
        b.transport.expect(Expected { from: None, id, pool: destination.0.id(), program, range }).unwrap();
    }
    until(&mut [&mut *a, &mut *b], "a transfer ends", |parties| match parties {
        [a, b] => b.end(id).is_some() && (!push || a.end(id).is_some()),
        _ => false,
    });
    assert!(!a.failed(id) && !b.failed(id), "{:?} {:?}", a.end(id), b.end(id));
    verify(destination.0, salt);
    let (initiator, other) = if push { (a, b) } else { (b, a) };
    initiator.transport.disconnect(peer);
    until(&mut [initiator, other], "the other end hears of it", |parties| match parties {
        [_, other] => other.lost_someone(),
        _ => false,
    });
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Connecting, moving and parting leaves nothing behind. `KVFERRY_CYCLES` makes it longer.
#[test]
fn cycles_leave_nothing_behind() {
    let Some(_turn) = turn() else { return };
    let cycles: u128 = std::env::var("KVFERRY_CYCLES").ok().and_then(|n| n.parse().ok()).unwrap_or(60);
    for device in DEVICES {
        let (mut a, mut b) = (open(device, &Options::default()), open(device, &Options::default()));
        let (source, destination) = (pool(1), pool(2));
        let (source_keys, destination_keys) = (a.bind(&source), b.bind(&destination));
        let mut before = 0;
        for number in 0..cycles {
            cycle(&mut a, &mut b, (&source, &source_keys), (&destination, &destination_keys), number);
            a.events.clear();
            b.events.clear();
            if number == 20 {
                before = descriptors();
            }
        }
        // A connection that the library is still closing counts for some.
        let after = descriptors();
        assert!(after <= before + 16, "{device}: {before} descriptors after twenty cycles, {after} after {cycles}");
    }
}

/// The owner does not poll: a fence is proved all the same, nothing is written after it, and another peer's transfer is not touched.
#[test]
fn a_peer_that_stops_polling_is_fenced() {
    let Some(_turn) = turn() else { return };
    for device in DEVICES {
        let slow = Options { poll_bytes_max: 64 << 10, ..Options::default() };
        let (mut reader, mut still, mut other) =
            (open(device, &slow), open(device, &slow), open(device, &Options::default()));
        let (source, source_of_other, destination, second) = (pool(1), pool(2), pool(3), pool(4));
        let (keys, keys_of_other) = (still.bind(&source), other.bind(&source_of_other));
        reader.bind(&destination);
        reader.bind(&second);
        fill(&source, 1);
        fill(&source_of_other, 9);
        let (to_still, to_other) = (reader.connect(&still), reader.connect(&other));
        let remote = reader.import(to_still, &keys, source.layout());
        let remote_of_other = reader.import(to_other, &keys_of_other, source_of_other.layout());
        reader.transport.post(pull(1, to_still, &destination, remote)).unwrap();
        let untouched = bytes(&destination);
        until(&mut [&mut reader, &mut still, &mut other], "the pull begins", |_| bytes(&destination) != untouched);
        // From here on `still` is not polled.
        reader.transport.post(pull(2, to_other, &second, remote_of_other)).unwrap();
        reader.transport.cancel(TransferId(1));
        reader.transport.fence(to_still);
        let fenced = |party: &Party| {
            party.events.iter().find_map(|event| match event {
                Event::Fenced { peer, proof } if *peer == to_still => Some(*proof),
                _ => None,
            })
        };
        until(&mut [&mut reader, &mut other], "the fence is proved", |parties| match parties {
            [reader, _] => fenced(reader).is_some() && reader.failed(TransferId(1)),
            _ => false,
        });
        let proof = fenced(&reader).unwrap();
        assert!(matches!(proof, FenceProof::EndpointDestroyed | FenceProof::OwnerCopies), "{proof:?}");
        let then = bytes(&destination);
        until(&mut [&mut reader, &mut other], "the other pull ends", |parties| match parties {
            [reader, _] => reader.end(TransferId(2)).is_some(),
            _ => false,
        });
        assert!(!reader.failed(TransferId(2)), "{:?}", reader.end(TransferId(2)));
        verify(&second, 9);
        // It wakes up, and what it still had to send goes nowhere.
        for _ in 0..200 {
            still.transport.poll(&mut still.events);
            reader.transport.poll(&mut reader.events);
        }
        assert!(bytes(&destination) == then, "bytes came after the proof");
        // And it can be connected anew.
        let again = reader.connect(&still);
        let remote = reader.import(again, &keys, source.layout());
        reader.transport.post(pull(3, again, &destination, remote)).unwrap();
        until(&mut [&mut reader, &mut still], "the pull ends", |parties| match parties {
            [reader, _] => reader.end(TransferId(3)).is_some(),
            _ => false,
        });
        assert!(!reader.failed(TransferId(3)), "{:?}", reader.end(TransferId(3)));
        verify(&destination, 1);
    }
}

/// Keys of a pool that was bound anew name nothing any more, and what is withdrawn while it is read does not count.
#[test]
fn stale_keys_and_withdrawn_pools_fail_their_transfers() {
    let Some(_turn) = turn() else { return };
    for device in DEVICES {
        let slow = Options { poll_bytes_max: 64 << 10, ..Options::default() };
        let (mut a, mut b) = (open(device, &slow), open(device, &slow));
        let (source, destination) = (pool(1), pool(2));
        let stale = a.bind(&source);
        a.transport.unbind(source.id());
        until(&mut [&mut a], "the pool is let go", |parties| match parties {
            [a] => a.saw(&Event::Unbound { pool: PoolId(1) }),
            _ => false,
        });
        let keys = a.bind(&source);
        b.bind(&destination);
        fill(&source, 3);
        let peer = b.connect(&a);
        let remote = b.import(peer, &stale, source.layout());
        b.transport.post(pull(1, peer, &destination, remote)).unwrap();
        until(&mut [&mut a, &mut b], "the stale key is refused", |parties| match parties {
            [_, b] => b.end(TransferId(1)).is_some(),
            _ => false,
        });
        let refused = |party: &Party, id| match party.end(TransferId(id)) {
            Some(Event::Failed { error: TransferError::Refused(reason), .. }) => Some(reason.clone()),
            _ => None,
        };
        assert!(refused(&b, 1).is_some_and(|reason| reason.contains("bound anew")), "{:?}", b.end(TransferId(1)));

        let remote = b.import(peer, &keys, source.layout());
        b.transport.post(pull(2, peer, &destination, remote)).unwrap();
        let before = bytes(&destination);
        until(&mut [&mut a, &mut b], "the pull begins", |_| bytes(&destination) != before);
        a.transport.unbind(source.id());
        until(&mut [&mut a, &mut b], "the pull ends", |parties| match parties {
            [_, b] => b.end(TransferId(2)).is_some(),
            _ => false,
        });
        assert!(b.failed(TransferId(2)), "{:?}", b.end(TransferId(2)));
    }
}

/// Memory that nobody can touch.
struct Gpu;

impl DeviceMemory for Gpu {
    fn device(&self) -> &str {
        "cuda:7"
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), String> {
        Err("there is no such device".to_owned())
    }

    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), String> {
        Err("there is no such device".to_owned())
    }

    fn fill(&self, _: u64, _: u8, _: u64) -> Result<(), String> {
        Err("there is no such device".to_owned())
    }
}

/// A GPU's memory is refused with what the provider offers, and what takes it; pools in host memory are bound beside it.
#[test]
fn memory_of_a_gpu_is_refused_with_the_reason() {
    let Some(_turn) = turn() else { return };
    for device in ["lo", "shm"] {
        let mut party = open(device, &Options::default());
        let layout = block_planes(1, BLOCKS, BLOCK_BYTES);
        let regions = layout.regions.iter().map(|&bytes| DeviceRegion { address: 1 << 40, bytes }).collect();
        // SAFETY: every access of that memory fails.
        let on_gpu = unsafe { Pool::on_device(PoolId(1), layout, regions, Arc::new(Gpu)) }.unwrap();
        let refused = party.transport.bind(&on_gpu).unwrap_err();
        assert!(matches!(refused, BindError::Unsupported { .. }), "{refused:?}");
        let said = refused.to_string();
        for word in ["cuda:7", "FI_HMEM", "tcp or ucx, which stage"] {
            assert!(said.contains(word), "{said}");
        }
        party.bind(&pool(1));
    }
}

/// What has no such provider or device, and what is of another transport, is refused with the reason.
#[test]
fn devices_that_are_not_there_are_refused() {
    let Some(_turn) = turn() else { return };
    for (name, reason) in [
        ("verbs/mlx5_0", "no provider"),
        ("rdmap7s0", "offers no such device"),
        ("tcp/nic7", "lo"),
        ("efa-direct/rdmap40s0", "take \"rdmap40s0\""),
    ] {
        let device = LibfabricProvider::new().named(name).unwrap();
        assert!(device.unavailable.as_ref().is_some_and(|said| said.contains(reason)), "{device:?}");
        let refused = LibfabricProvider::new().open(&device, &Options::default());
        assert!(refused.is_err_and(|error| error.to_string().contains(reason)));
    }
    let found = LibfabricProvider::new().discover();
    assert!(found.iter().all(|device| device.kind == TransportKind::Libfabric && device.unavailable.is_none()));
    assert!(found.iter().any(|device| device.name == "lo") && found.iter().any(|device| device.name == "shm"));
    let (tcp, rxm) = (open("lo", &Options::default()), open("tcp;ofi_rxm/lo", &Options::default()));
    assert!(tcp.transport.info().library.as_ref().is_some_and(|library| library.contains("tcp")));
    let mut rxm = rxm;
    let met = rxm.transport.connect(&tcp.transport.address());
    // Until 2.0 they are the same.
    assert_eq!(met.is_ok(), LibfabricProvider::version() < Some((2, 0)), "{met:?}");
}
