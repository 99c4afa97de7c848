//! Peers that break the rules, over raw sockets.

use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::{Direction, PoolId, PoolLayout, TransferId};
use kvferry_transport::conformance::{block_planes, whole_blocks};
use kvferry_transport::{Event, Options, Pool, PoolKeys, Provider, Transfer, TransferError, Transport, TransportKind};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::ShmProvider;
use kvferry_local::wire::{Address, Frame, Keys, MemoryKind, VERSION};

const ALL: SealFlags = SealFlags::FUTURE_WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW);
const SIZE: u64 = 1 << 16;

fn open() -> Box<dyn Transport> {
    ShmProvider.open(&ShmProvider.discover()[0], &Options::default()).unwrap()
}

fn name(socket: &[u8]) -> SocketAddr {
    let hex: String = socket.iter().map(|byte| format!("{byte:02x}")).collect();
    SocketAddr::from_abstract_name(format!("kvferry-{hex}")).unwrap()
}

fn until(transport: &mut dyn Transport, events: &mut Vec<Event>, mut done: impl FnMut(&[Event]) -> bool) {
    let start = Instant::now();
    while !done(events) {
        assert!(start.elapsed() < Duration::from_secs(30), "{events:?}");
        transport.poll(events);
        std::thread::yield_now();
    }
}

/// Whether the other end closed the connection.
fn closed(stream: &mut UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let mut bytes = [0; 256];
    match stream.read(&mut bytes) {
        Ok(0) => true,
        Ok(_) => false,
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    }
}

#[test]
fn strangers_cost_only_their_own_connection() {
    let mut victim = open();
    let address = Address::decode(TransportKind::Shm, &victim.address()).unwrap();
    let hello = |key| Frame::Hello { version: VERSION, key, instance: [9; 16] }.encode();
    let first_byte_of_push = [200, 0, 0, 0, 2];
    let greetings: Vec<Vec<u8>> = vec![
        hello([0; 16]),
        Frame::Hello { version: VERSION + 1, key: address.key, instance: [9; 16] }.encode(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0; 64],
        vec![0xff; 4096],
        [&u32::MAX.to_le_bytes()[..], &[2]].concat(),
        [&first_byte_of_push[..], &[7; 200]].concat(),
        Frame::Open { request: 1, pool: PoolId(1), token: 1 }.encode(),
        // Greeted well, then rubbish.
        [hello(address.key), vec![5, 0, 0, 0, 0xee, 1, 2, 3, 4]].concat(),
        [hello(address.key), hello(address.key)].concat(),
        [hello(address.key), Frame::Fds { request: 1, count: 3 }.encode()].concat(),
        [hello(address.key), u32::MAX.to_le_bytes().to_vec(), vec![2]].concat(),
    ];
    let mut silent = UnixStream::connect_addr(&name(&address.place)).unwrap();
    let mut events = Vec::new();
    for greeting in greetings {
        let mut stream = UnixStream::connect_addr(&name(&address.place)).unwrap();
        stream.write_all(&greeting).unwrap();
        let start = Instant::now();
        while !closed(&mut stream) {
            assert!(start.elapsed() < Duration::from_secs(30), "{greeting:?} was not refused");
            victim.poll(&mut events);
        }
    }
    assert!(!closed(&mut silent), "it still has time");
    let mut honest = open();
    let peer = honest.connect(&victim.address()).unwrap();
    until(honest.as_mut(), &mut Vec::new(), |seen| {
        victim.poll(&mut events);
        seen.contains(&Event::Connected { peer })
    });
}

#[test]
fn a_silent_stranger_is_dropped_in_time() {
    let mut victim = open();
    let mut silent =
        UnixStream::connect_addr(&name(&Address::decode(TransportKind::Shm, &victim.address()).unwrap().place))
            .unwrap();
    let start = Instant::now();
    while !closed(&mut silent) {
        assert!(start.elapsed() < Duration::from_secs(60));
        victim.poll(&mut Vec::new());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(start.elapsed() >= Duration::from_secs(4));
}

fn memfd(bytes: u64, seals: SealFlags) -> OwnedFd {
    let fd = memfd_create("hostile", MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fcntl_add_seals(&fd, seals).unwrap();
    fd
}

fn layout() -> PoolLayout {
    block_planes(1, 16, 4096)
}

/// Pulls from a peer that answers `Open` with these descriptors; returns how the pull ended.
fn pull_from(fds: Vec<OwnedFd>, announced: u32, served: PoolLayout, kind: MemoryKind) -> Event {
    let mut victim = open();
    let boot = Address::decode(TransportKind::Shm, &victim.address()).unwrap().boot;
    let mut socket = [0; 16];
    getrandom::fill(&mut socket).unwrap();
    let listener = UnixListener::bind_addr(&name(&socket)).unwrap();
    let peer = victim
        .connect(&Address::new(TransportKind::Shm, boot, socket.to_vec().into(), [3; 16], [4; 16]).encode())
        .unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(&Frame::Welcome { instance: [4; 16] }.encode()).unwrap();

    let pool = Pool::allocate(PoolId(1), layout(), "victim").unwrap();
    victim.bind(&pool).unwrap();
    let keys = PoolKeys(Keys::new(TransportKind::Shm, [4; 16], PoolId(9), 5, layout().regions).encode());
    let remote = victim.import(peer, &keys, &layout()).unwrap();
    let program = Arc::new(whole_blocks(1, 16, 4096, 0..16, 0..16));
    let (id, range) = (TransferId(1), program.whole());
    let pull =
        Transfer { id, peer, direction: Direction::Pull, local: PoolId(1), remote, program, range, notice: None };
    victim.post(pull).unwrap();

    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let borrowed: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
    if !borrowed.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)));
    }
    let mut events = Vec::new();
    until(victim.as_mut(), &mut events, |events| events.contains(&Event::Connected { peer }));
    let frame = Frame::Fds { request: remote.0, count: announced }.encode();
    sendmsg(&stream, &[IoSlice::new(&frame)], &mut ancillary, SendFlags::empty()).unwrap();
    stream.write_all(&Frame::Opened { request: remote.0, layout: served, memory: kind }.encode()).unwrap();
    let end = |e: &Event| matches!(e, Event::Failed { .. } | Event::Completed { .. });
    until(victim.as_mut(), &mut events, |events| events.iter().any(end));
    events.into_iter().find(end).unwrap()
}

#[test]
fn hostile_memory_is_refused() {
    let exe = || OwnedFd::from(std::fs::File::open("/proc/self/exe").unwrap());
    let cases: Vec<(Vec<OwnedFd>, &str)> = vec![
        (vec![memfd(SIZE, SealFlags::empty())], "lacks seals"),
        (vec![memfd(SIZE, SealFlags::SHRINK | SealFlags::GROW)], "lacks seals"),
        (vec![memfd(SIZE, SealFlags::FUTURE_WRITE | SealFlags::GROW)], "lacks seals"),
        (vec![memfd(SIZE - 4096, ALL)], "61440 bytes"),
        (vec![exe()], "not a sealed memfd"),
        (vec![memfd(SIZE, ALL), memfd(SIZE, ALL)], "2 descriptors came for 1"),
    ];
    for (fds, what) in cases {
        let count = fds.len() as u32;
        let end = pull_from(fds, count, layout(), MemoryKind::Shared);
        let Event::Failed { error: TransferError::Refused(reason), .. } = &end else {
            panic!("{end:?} where {what:?} was due")
        };
        assert!(reason.contains(what), "{reason}");
    }
    let honest = pull_from(vec![memfd(SIZE, ALL)], 1, layout(), MemoryKind::Shared);
    assert!(matches!(honest, Event::Completed { bytes: SIZE, .. }), "{honest:?}");
}

#[test]
fn hostile_answers_fail_the_pull() {
    let lost = pull_from(vec![], 2, layout(), MemoryKind::Shared);
    assert!(matches!(lost, Event::Failed { error: TransferError::PeerLost(_), .. }), "{lost:?}");
    let other = PoolLayout { regions: vec![SIZE * 2], ..layout() };
    let refused = pull_from(vec![memfd(SIZE * 2, ALL)], 1, other, MemoryKind::Shared);
    assert!(matches!(refused, Event::Failed { error: TransferError::Refused(_), .. }), "{refused:?}");
    let nowhere = pull_from(vec![], 0, layout(), MemoryKind::Addresses(vec![8]));
    assert!(matches!(nowhere, Event::Failed { error: TransferError::Io { .. }, .. }), "{nowhere:?}");
    let beyond = pull_from(vec![], 0, layout(), MemoryKind::Addresses(vec![u64::MAX - 8]));
    assert!(matches!(beyond, Event::Failed { .. }), "{beyond:?}");
}
