//! Two processes: pull, push, memory that was allocated elsewhere, and a peer that is killed.
#![allow(clippy::unwrap_used, reason = "this is test code")]

use std::io::{BufRead, BufReader, Lines, Write};
use std::os::fd::AsRawFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::{Direction, PoolId, PoolLayout, Program, TransferId};
use kvferry_shm::ShmProvider;
use kvferry_transport::conformance::{block_planes, whole_blocks};
use kvferry_transport::{Event, Expected, Options, Pool, PoolKeys, Provider, Transfer, TransferError, Transport, Wait};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const ROLE: &str = "KVFERRY_SHM_TEST_ROLE";
const BLOCKS: u32 = 4096;
const BLOCK_BYTES: u64 = 16 << 10;
const PUSH: TransferId = TransferId(77);

fn layout() -> PoolLayout {
    block_planes(1, BLOCKS, BLOCK_BYTES)
}

/// Block `i` of the source goes to block `BLOCKS - 1 - i`.
fn program() -> Arc<Program> {
    Arc::new(whole_blocks(1, 16, BLOCK_BYTES, 0..BLOCKS, (0..BLOCKS).rev()))
}

fn pattern(block: u32) -> Vec<u8> {
    (0..BLOCK_BYTES).map(|i| (i as u32 ^ block.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

fn verify(pool: &Pool) {
    let mut bytes = vec![0; BLOCK_BYTES as usize];
    for block in 0..BLOCKS {
        pool.read(0, block, 0, &mut bytes).unwrap();
        assert_eq!(bytes, pattern(BLOCKS - 1 - block), "block {block}");
    }
}

fn open(poll_bytes_max: u64) -> Box<dyn Transport> {
    ShmProvider.open(&ShmProvider.discover()[0], &Options { poll_bytes_max, ..Options::default() }).unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect()
}

/// What the other process runs: this test, started again with a role.
#[test]
fn peer_process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let pool = if role == "raw" {
        let memory = Arc::new(vec![0u64; (u64::from(BLOCKS) * BLOCK_BYTES / 8) as usize]);
        let base = memory.as_ptr() as *mut u8;
        // SAFETY: the vector is as long as the layout's region, lives through `keep_alive`, and is touched through the pool only.
        unsafe { Pool::from_raw(PoolId(1), layout(), vec![(base, u64::from(BLOCKS) * BLOCK_BYTES)], memory) }.unwrap()
    } else {
        Pool::allocate(PoolId(1), layout(), "peer").unwrap()
    };
    (0..BLOCKS).for_each(|block| pool.write(0, block, 0, &pattern(block)).unwrap());
    let mut transport = open(4 << 20);
    let keys = transport.bind(&pool).unwrap();
    println!("\n@ {} {}", hex(&transport.address()), hex(&keys.0));
    if role == "poor" {
        return without_descriptors(transport.as_mut());
    }
    let mut line = String::new();
    // The parent's address and keys come once it expects a push; polling goes on in the meantime, so the line is read elsewhere.
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let read = std::io::stdin().read_line(&mut line);
        if read.is_ok_and(|bytes| bytes > 0) { sender.send(line).is_ok() } else { std::process::exit(0) }
    });
    let start = Instant::now();
    let mut events = Vec::new();
    let mut idle = Vec::new();
    while start.elapsed() < Duration::from_secs(120) {
        transport.poll(&mut events);
        events.clear();
        idle.iter_mut().for_each(|other: &mut Box<dyn Transport>| other.poll(&mut events));
        if let Ok(line) = receiver.try_recv() {
            if role == "twice" {
                // From here on it is somebody else, as far as it says.
                idle.push(std::mem::replace(&mut transport, open(4 << 20)));
                transport.bind(&pool).unwrap();
            }
            let (address, keys) = line.trim().split_once(' ').unwrap();
            let peer = transport.connect(&unhex(address)).unwrap();
            let remote = transport.import(peer, &PoolKeys(unhex(keys).into()), &layout()).unwrap();
            let (program, range) = (program(), program().whole());
            let push = Transfer {
                id: PUSH,
                peer,
                direction: Direction::Push,
                local: PoolId(1),
                remote,
                program,
                range,
                notice: None,
            };
            transport.post(push).unwrap();
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Serves half a second without a descriptor left for the connection that waits, says how often it was woken meanwhile, and goes on
/// with descriptors.
fn without_descriptors(transport: &mut dyn Transport) {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let limit = getrlimit(Resource::Nofile);
    let next = std::fs::File::open("/dev/null").unwrap().as_raw_fd();
    setrlimit(Resource::Nofile, Rlimit { current: Some(next as u64), maximum: limit.maximum }).unwrap();
    let woken = serve(transport, Duration::from_millis(500));
    setrlimit(Resource::Nofile, limit).unwrap();
    println!("@ {woken}");
    serve(transport, Duration::from_secs(120));
}

/// Polls whenever the transport has anything to do. Returns how often that was.
fn serve(transport: &mut dyn Transport, time: Duration) -> u64 {
    let (start, mut events, mut woken) = (Instant::now(), Vec::new(), 0);
    while start.elapsed() < time {
        transport.poll(&mut events);
        woken += 1;
        if let Wait::Ready(fd) = transport.arm() {
            let timeout = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
            poll(&mut [PollFd::new(&*fd, PollFlags::IN)], Some(&timeout)).unwrap();
        }
    }
    woken
}

struct Peer {
    child: Child,
    stdin: ChildStdin,
    said: Lines<BufReader<ChildStdout>>,
    address: Vec<u8>,
    keys: PoolKeys,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _already_dead = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn spawn(role: &str) -> Peer {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "peer_process", "--nocapture"])
        .env(ROLE, role)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stdin = child.stdin.take().unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = next_word(&mut said);
    let (address, keys) = line.split_once(' ').unwrap();
    Peer { child, stdin, said, address: unhex(address), keys: PoolKeys(unhex(keys).into()) }
}

fn next_word(said: &mut Lines<BufReader<ChildStdout>>) -> String {
    said.find_map(|line| line.unwrap().strip_prefix("@ ").map(String::from)).unwrap()
}

fn until(transport: &mut dyn Transport, events: &mut Vec<Event>, done: impl Fn(&Event) -> bool) {
    let start = Instant::now();
    while !events.iter().any(&done) {
        assert!(start.elapsed() < Duration::from_secs(60), "{events:?}");
        transport.poll(events);
    }
}

fn pull_and_push(role: &str) {
    let mut peer = spawn(role);
    let mut transport = open(4 << 20);
    let pool = Pool::allocate(PoolId(5), layout(), "parent").unwrap();
    let own_keys = transport.bind(&pool).unwrap();
    let id = transport.connect(&peer.address).unwrap();
    let remote = transport.import(id, &peer.keys, &layout()).unwrap();
    let (program, range) = (program(), program().whole());
    let pull = Transfer {
        id: TransferId(1),
        peer: id,
        direction: Direction::Pull,
        local: PoolId(5),
        remote,
        program: Arc::clone(&program),
        range,
        notice: None,
    };
    transport.post(pull).unwrap();
    let mut events = Vec::new();
    until(transport.as_mut(), &mut events, |e| matches!(e, Event::Completed { .. } | Event::Failed { .. }));
    assert!(events.iter().any(|e| matches!(e, Event::Completed { id: TransferId(1), .. })), "{events:?}");
    verify(&pool);

    (0..BLOCKS).for_each(|block| pool.fill(0, block, 0).unwrap());
    transport.expect(Expected { from: None, id: PUSH, pool: PoolId(5), program, range }).unwrap();
    writeln!(peer.stdin, "{} {}", hex(&transport.address()), hex(&own_keys.0)).unwrap();
    until(transport.as_mut(), &mut events, |e| matches!(e, Event::Arrived { .. } | Event::Failed { .. }));
    assert!(events.iter().any(|e| matches!(e, Event::Arrived { id: PUSH, .. })), "{events:?}");
    verify(&pool);
}

#[test]
fn two_processes_pull_and_push() {
    pull_and_push("shared");
}

/// A process that calls as another transport than the one that is fenced.
#[test]
fn a_fence_is_about_every_connection_of_its_process() {
    let mut peer = spawn("twice");
    // Many turns for all of it.
    let mut transport = open(64 << 10);
    let pool = Pool::allocate(PoolId(5), layout(), "parent").unwrap();
    let own_keys = transport.bind(&pool).unwrap();
    let called = transport.connect(&peer.address).unwrap();
    let mut events = Vec::new();
    until(transport.as_mut(), &mut events, |e| *e == Event::Connected { peer: called });
    let (program, range) = (program(), program().whole());
    transport.expect(Expected { from: None, id: PUSH, pool: PoolId(5), program, range }).unwrap();
    writeln!(peer.stdin, "{} {}", hex(&transport.address()), hex(&own_keys.0)).unwrap();
    // It is copied, and far from its end.
    let start = Instant::now();
    let has_begun = || {
        let mut byte = [0];
        (0..BLOCKS).any(|block| pool.read(0, block, 1, &mut byte).is_ok() && byte != [0])
    };
    while !has_begun() {
        assert!(start.elapsed() < Duration::from_secs(60), "nothing moved: {events:?}");
        transport.poll(&mut events);
    }
    transport.fence(called);
    until(transport.as_mut(), &mut events, |e| matches!(e, Event::Arrived { .. } | Event::Failed { .. }));
    let cancelled = Event::Failed { id: PUSH, error: TransferError::Cancelled };
    assert!(events.contains(&cancelled), "{events:?}");
    until(transport.as_mut(), &mut events, |e| matches!(e, Event::Fenced { peer, .. } if *peer == called));
}

#[test]
fn memory_that_was_allocated_elsewhere_is_read_from_its_process() {
    pull_and_push("raw");
}

#[test]
fn a_killed_peer_fails_its_transfers() {
    for role in ["shared", "raw"] {
        let mut peer = spawn(role);
        let mut transport = open(64 << 10);
        let pool = Pool::allocate(PoolId(5), layout(), "parent").unwrap();
        transport.bind(&pool).unwrap();
        let id = transport.connect(&peer.address).unwrap();
        let remote = transport.import(id, &peer.keys, &layout()).unwrap();
        let (program, range) = (program(), program().whole());
        let pull = Transfer {
            id: TransferId(1),
            peer: id,
            direction: Direction::Pull,
            local: PoolId(5),
            remote,
            program,
            range,
            notice: None,
        };
        transport.post(pull).unwrap();
        let mut events = Vec::new();
        let mut byte = [0];
        let start = Instant::now();
        while byte == [0] {
            assert!(start.elapsed() < Duration::from_secs(60), "nothing moved");
            transport.poll(&mut events);
            pool.read(0, BLOCKS - 1, 1, &mut byte).unwrap();
        }
        peer.child.kill().unwrap();
        peer.child.wait().unwrap();
        until(transport.as_mut(), &mut events, |e| matches!(e, Event::PeerLost { .. }));
        let ends: Vec<_> =
            events.iter().filter(|e| matches!(e, Event::Completed { .. } | Event::Failed { .. })).collect();
        assert!(
            matches!(
                ends[..],
                [Event::Failed { id: TransferId(1), error: TransferError::PeerLost(_) | TransferError::Io { .. } }]
            ),
            "{ends:?}"
        );
    }
}

#[test]
fn a_listener_without_descriptors_sleeps_and_accepts_later() {
    let mut peer = spawn("poor");
    let mut transport = open(64 << 10);
    let id = transport.connect(&peer.address).unwrap();
    writeln!(peer.stdin, "a connection waits").unwrap();
    let woken: u64 = next_word(&mut peer.said).parse().unwrap();
    assert!((2..100).contains(&woken), "it was woken {woken} times in half a second");
    let mut events = Vec::new();
    until(transport.as_mut(), &mut events, |e| matches!(e, Event::Connected { .. } | Event::PeerLost { .. }));
    assert!(matches!(events[..], [Event::Connected { peer }] if peer == id), "{events:?}");
}
