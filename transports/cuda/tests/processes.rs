//! Two processes, on two GPUs where there are two: pull, push, every kind of memory, and peers that are killed or stopped.
//! `cargo test -p kvferry-cuda -- --ignored`.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code")]

use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::{Direction, Plane, PoolId, PoolLayout, Program, TransferId};
use kvferry_cuda::{Allocate, CudaProvider, check_blocks, fill_blocks, free_bytes, from_raw};
use kvferry_tcp::TcpProvider;
use kvferry_transport::conformance::whole_blocks;
use kvferry_transport::{
    Device, Event, Expected, Options, PackedBy, Pool, PoolKeys, Provider, Transfer, TransferError, Transport,
    TransportKind,
};
use kvferry_ucx::UcxProvider;
use rustix::process::{Pid, Signal, kill_process};

const ROLE: &str = "KVFERRY_CUDA_TEST_ROLE";
const PLANES: u32 = 8;
const BLOCKS: u32 = 4096;
const BLOCK_BYTES: u64 = 16 << 10;
const PUSH: TransferId = TransferId(77);
/// The roles of peers whose pools on GPUs go through TCP, and through UCX as messages and read.
const STAGED: [&str; 3] = ["staged", "staged ucx lo", "staged ucx memory"];

/// The role of a peer that pulls from us.
const READS: &str = "reads";

/// The processes' GPUs: the first, and the last.
fn gpu(is_peer: bool) -> u32 {
    let usable = CudaProvider::default().discover().iter().filter(|device| device.unavailable.is_none()).count();
    if is_peer { usable.saturating_sub(1) as u32 } else { 0 }
}

fn device(gpu: u32) -> Device {
    Device { kind: TransportKind::Cuda, name: format!("gpu{gpu}"), unavailable: None }
}

fn layout() -> PoolLayout {
    let plane_bytes = u64::from(BLOCKS) * BLOCK_BYTES;
    let plane = |index| Plane {
        region: index / 4,
        offset: u64::from(index % 4) * plane_bytes,
        blocks: BLOCKS,
        block_stride: BLOCK_BYTES,
        block_bytes: BLOCK_BYTES,
    };
    PoolLayout { regions: vec![4 * plane_bytes; 2], planes: (0..PLANES).map(plane).collect() }
}

/// Block `i` of the source goes to block `BLOCKS - 1 - i`.
fn program() -> Arc<Program> {
    Arc::new(whole_blocks(PLANES, 16, BLOCK_BYTES, 0..BLOCKS, (0..BLOCKS).rev()))
}

/// What each block of the source is, or of the destination afterwards.
fn labels(is_source: bool) -> Vec<u64> {
    (0..u64::from(BLOCKS)).map(|block| if is_source { block } else { u64::from(BLOCKS) - 1 - block }).collect()
}

fn open(gpu: u32, by_turns: bool) -> Box<dyn Transport> {
    let provider = if by_turns { CudaProvider::default().by_turns() } else { CudaProvider::default() };
    let options = Options { poll_bytes_max: if by_turns { 256 << 10 } else { 4 << 20 }, ..Options::default() };
    provider.open(&device(gpu), &options).unwrap()
}

fn open_staged(role: &str) -> Box<dyn Transport> {
    let Some(name) = role.strip_prefix("staged ucx ") else {
        let device = Device { kind: TransportKind::Tcp, name: "lo".into(), unavailable: None };
        return TcpProvider::new().open(&device, &Options::default()).unwrap();
    };
    let by = if name == "memory" { PackedBy::Read } else { PackedBy::Message };
    let device = Device { kind: TransportKind::Ucx, name: name.into(), unavailable: None };
    UcxProvider::new().packed(by, u64::MAX).open(&device, &Options::default()).unwrap()
}

fn pool(gpu: u32, id: u32, role: &str) -> Pool {
    let of = |allocate, id| {
        CudaProvider::default().with_memory(allocate).allocate(&device(gpu), PoolId(id), layout(), "test").unwrap()
    };
    match role {
        "best" => of(Allocate::Best, id),
        staged if STAGED.contains(&staged) => of(Allocate::Best, id),
        "plain" => of(Allocate::Plain, id),
        // As memory of a serving stack, which only lends it.
        "raw plain" | "raw best" => {
            let lent = of(if role == "raw plain" { Allocate::Plain } else { Allocate::Best }, id + 100);
            let regions = lent.device_regions().to_vec();
            // SAFETY: the lent pool keeps the memory for as long as the other one has it.
            unsafe { from_raw(gpu, PoolId(id), layout(), regions, Arc::new(lent)) }.unwrap()
        }
        other => panic!("no such role: {other}"),
    }
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
    if role == READS {
        return reading_process();
    }
    let gpu = gpu(true);
    let pool = pool(gpu, 1, &role);
    fill_blocks(&pool, &labels(true), 0).unwrap();
    let mut transport = if STAGED.contains(&role.as_str()) { open_staged(&role) } else { open(gpu, false) };
    let keys = transport.bind(&pool).unwrap();
    println!("\n@ {} {}", hex(&transport.address()), hex(&keys.0));
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = std::io::stdin().read_line(&mut line);
        if read.is_ok_and(|bytes| bytes > 0) { sender.send(line).is_ok() } else { std::process::exit(0) }
    });
    let start = Instant::now();
    let mut events = Vec::new();
    while start.elapsed() < Duration::from_secs(120) {
        transport.poll(&mut events);
        events.clear();
        if let Ok(line) = receiver.try_recv() {
            let (address, keys) = line.trim().split_once(' ').unwrap();
            let peer = transport.connect(&unhex(address)).unwrap();
            let remote = transport.import(peer, &PoolKeys(unhex(keys).into()), &layout()).unwrap();
            let (program, range) = (program(), program().whole());
            let (direction, local) = (Direction::Push, PoolId(1));
            transport
                .post(Transfer { id: PUSH, peer, direction, local, remote, program, range, notice: None })
                .unwrap();
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Pulls once from whom it is told, says when it has begun to, and in the end whether every byte is right.
fn reading_process() {
    let mut transport = open(gpu(true), true);
    let pool = pool(gpu(true), 5, "best");
    let keys = transport.bind(&pool).unwrap();
    println!("\n@ {} {}", hex(&transport.address()), hex(&keys.0));
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let (address, lent) = line.trim().split_once(' ').unwrap();
    let mut reader = connected(transport, (pool, keys), &unhex(address), &PoolKeys(unhex(lent).into()));
    let mut events = Vec::new();
    reader.transport.post(reader.pull.clone()).unwrap();
    until_moving(&mut reader, &mut events);
    println!("@ moving");
    until(reader.transport.as_mut(), &mut events, |e| matches!(e, Event::Completed { .. } | Event::Failed { .. }));
    println!("@ right {}", check_blocks(&reader.pool, &labels(false)).unwrap().is_none());
    let _until_it_is_closed = std::io::stdin().read_line(&mut line);
}

struct Peer {
    child: Child,
    stdin: ChildStdin,
    said: Option<Lines<BufReader<ChildStdout>>>,
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
    let line = said.find_map(|line| line.unwrap().strip_prefix("@ ").map(String::from)).unwrap();
    let (address, keys) = line.split_once(' ').unwrap();
    Peer { child, stdin, address: unhex(address), keys: PoolKeys(unhex(keys).into()), said: Some(said) }
}

fn until(transport: &mut dyn Transport, events: &mut Vec<Event>, done: impl Fn(&Event) -> bool) {
    let start = Instant::now();
    while !events.iter().any(&done) {
        assert!(start.elapsed() < Duration::from_secs(60), "{events:?}");
        transport.poll(events);
    }
}

/// A transport with a destination, connected to a peer.
struct Reader {
    transport: Box<dyn Transport>,
    pool: Pool,
    keys: PoolKeys,
    pull: Transfer,
}

fn read(peer: &Peer, by_turns: bool) -> Reader {
    let mut transport = open(gpu(false), by_turns);
    let pool = pool(gpu(false), 5, "best");
    let keys = transport.bind(&pool).unwrap();
    connected(transport, (pool, keys), &peer.address, &peer.keys)
}

fn connected(
    mut transport: Box<dyn Transport>,
    (pool, keys): (Pool, PoolKeys),
    address: &[u8],
    lent: &PoolKeys,
) -> Reader {
    // Everything but what is due.
    fill_blocks(&pool, &labels(false), u64::MAX).unwrap();
    let id = transport.connect(address).unwrap();
    let remote = transport.import(id, lent, &layout()).unwrap();
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
    Reader { transport, pool, keys, pull }
}

fn pull_and_push(role: &str) {
    let mut peer = spawn(role);
    let Reader { mut transport, pool, keys, pull } = read(&peer, false);
    assert!(check_blocks(&pool, &labels(false)).unwrap().is_some_and(|wrong| wrong.bytes > 0));
    let (program, range) = (Arc::clone(&pull.program), pull.range);
    transport.post(pull).unwrap();
    let mut events = Vec::new();
    until(transport.as_mut(), &mut events, |e| matches!(e, Event::Completed { .. } | Event::Failed { .. }));
    let bytes = u64::from(PLANES * BLOCKS) * BLOCK_BYTES;
    let done = Event::Completed { id: TransferId(1), bytes, pieces: u64::from(PLANES * BLOCKS) };
    assert!(events.contains(&done), "{events:?}");
    assert_eq!(check_blocks(&pool, &labels(false)).unwrap(), None);

    fill_blocks(&pool, &labels(false), u64::MAX).unwrap();
    transport.expect(Expected { from: None, id: PUSH, pool: PoolId(5), program, range }).unwrap();
    writeln!(peer.stdin, "{} {}", hex(&transport.address()), hex(&keys.0)).unwrap();
    until(transport.as_mut(), &mut events, |e| matches!(e, Event::Arrived { .. } | Event::Failed { .. }));
    assert!(events.iter().any(|e| matches!(e, Event::Arrived { id: PUSH, .. })), "{events:?}");
    assert_eq!(check_blocks(&pool, &labels(false)).unwrap(), None);
}

#[test]
#[ignore = "needs a GPU"]
fn two_processes_pull_and_push() {
    pull_and_push("best");
}

#[test]
#[ignore = "needs a GPU"]
fn plain_memory_is_pulled_and_pushed() {
    pull_and_push("plain");
}

#[test]
#[ignore = "needs a GPU"]
fn memory_of_a_serving_stack_is_pulled_and_pushed() {
    pull_and_push("raw plain");
    pull_and_push("raw best");
}

fn is_moving(reader: &Reader) -> bool {
    // Half of what is due or more, but not all of it: the destination began as the complement of it.
    let wrong = check_blocks(&reader.pool, &labels(false)).unwrap().map_or(0, |wrong| wrong.bytes);
    (1..u64::from(PLANES * BLOCKS) * BLOCK_BYTES).contains(&wrong)
}

fn until_moving(reader: &mut Reader, events: &mut Vec<Event>) {
    let start = Instant::now();
    while !is_moving(reader) {
        assert!(start.elapsed() < Duration::from_secs(60), "nothing moved");
        (0..4).for_each(|_| reader.transport.poll(events));
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_killed_peer_fails_its_transfers_and_nothing_else() {
    for role in ["best", "plain", "raw best", "raw plain"] {
        let mut peer = spawn(role);
        let mut reader = read(&peer, true);
        let mut events = Vec::new();
        reader.transport.post(reader.pull.clone()).unwrap();
        until_moving(&mut reader, &mut events);
        peer.child.kill().unwrap();
        peer.child.wait().unwrap();
        let over = |e: &Event| matches!(e, Event::Completed { .. } | Event::Failed { .. });
        until(reader.transport.as_mut(), &mut events, over);
        let ends: Vec<_> = events.iter().filter(|e| over(e)).collect();
        assert!(matches!(ends[..], [Event::Failed { error: TransferError::PeerLost(_), .. }]), "{role}: {ends:?}");
        // The same transport goes on with another peer.
        let next = spawn(role);
        let id = reader.transport.connect(&next.address).unwrap();
        let remote = reader.transport.import(id, &next.keys, &layout()).unwrap();
        let again = Transfer { id: TransferId(2), peer: id, remote, ..reader.pull.clone() };
        reader.transport.post(again).unwrap();
        events.clear();
        until(reader.transport.as_mut(), &mut events, over);
        assert!(events.iter().any(|e| matches!(e, Event::Completed { id: TransferId(2), .. })), "{role}: {events:?}");
        assert_eq!(check_blocks(&reader.pool, &labels(false)).unwrap(), None, "{role}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_stopped_peer_is_read_nevertheless_and_can_be_fenced() {
    let peer = spawn("best");
    let mut reader = read(&peer, true);
    let mut events = Vec::new();
    reader.transport.post(reader.pull.clone()).unwrap();
    until_moving(&mut reader, &mut events);
    let pid = Pid::from_child(&peer.child);
    kill_process(pid, Signal::STOP).unwrap();
    until(reader.transport.as_mut(), &mut events, |e| matches!(e, Event::Completed { .. }));
    assert_eq!(check_blocks(&reader.pool, &labels(false)).unwrap(), None);
    let again = Transfer { id: TransferId(2), ..reader.pull.clone() };
    reader.transport.post(again).unwrap();
    reader.transport.fence(reader.pull.peer);
    until(reader.transport.as_mut(), &mut events, |e| matches!(e, Event::Fenced { .. }));
    let failed = events.iter().position(|e| matches!(e, Event::Failed { id: TransferId(2), .. }));
    let fenced = events.iter().position(|e| matches!(e, Event::Fenced { .. }));
    assert!(failed.is_some() && failed < fenced, "{events:?}");
    kill_process(pid, Signal::CONT).unwrap();
}

/// The process whose kernels run is killed, or stopped and killed, while it reads: its source goes on, lets go of its memory, and serves others.
#[test]
#[ignore = "needs a GPU"]
fn killed_readers_leave_nothing_behind() {
    let mut transport = open(gpu(false), false);
    let first = pool(gpu(false), 1, "best");
    fill_blocks(&first, &labels(true), 0).unwrap();
    let mut events = Vec::new();
    let read_by = |transport: &mut Box<dyn Transport>, keys: &PoolKeys, word: &'static str, events: &mut Vec<Event>| {
        let mut peer = spawn(READS);
        let said = peer.said.take().unwrap();
        writeln!(peer.stdin, "{} {}", hex(&transport.address()), hex(&keys.0)).unwrap();
        let heard = std::thread::spawn(move || said.map_while(Result::ok).find(|line| line.starts_with(word)));
        while !heard.is_finished() {
            transport.poll(events);
            if let Ok(Some(status)) = peer.child.try_wait() {
                panic!("the reader ended: {status}");
            }
        }
        (peer, heard.join().unwrap().unwrap())
    };
    let cycles = cycles_wanted();
    let mut before = None;
    for cycle in 0..cycles + cycles.div_ceil(10) {
        if cycle == cycles.div_ceil(10) {
            before = Some(held());
        }
        let keys = transport.bind(&first).unwrap();
        let (mut peer, _) = read_by(&mut transport, &keys, "@ moving", &mut events);
        if cycle % 3 == 2 {
            kill_process(Pid::from_child(&peer.child), Signal::STOP).unwrap();
            // Who only reads needs no word of its to be proven harmless.
            (0..2000).for_each(|_| transport.poll(&mut events));
        }
        peer.child.kill().unwrap();
        peer.child.wait().unwrap();
        until(transport.as_mut(), &mut events, |e| matches!(e, Event::PeerLost { .. }));
        transport.unbind(PoolId(1));
        until(transport.as_mut(), &mut events, |e| matches!(e, Event::Unbound { pool: PoolId(1) }));
        events.clear();
    }
    settles(transport.as_mut(), before.unwrap(), 0, cycles);
    let keys = transport.bind(&first).unwrap();
    let (_peer, said) = read_by(&mut transport, &keys, "@ right", &mut events);
    assert_eq!(said, "@ right true");
}

#[test]
#[ignore = "needs a GPU"]
fn killed_and_restarted_peers_leave_nothing_behind() {
    cycles(open(gpu(false), true), &["best", "plain"], 37..4000);
}

#[test]
#[ignore = "needs a GPU"]
fn killed_peers_of_staged_transfers_leave_nothing_behind() {
    cycles(open_staged(STAGED[0]), &STAGED[..1], 997..150_000);
}

#[test]
#[ignore = "needs a GPU and UCX"]
fn killed_peers_of_transfers_staged_by_ucx_leave_nothing_behind() {
    for role in STAGED.iter().skip(1) {
        cycles(open_staged(role), &[role], 997..150_000);
    }
}

/// Pulls from peers, and has them push, which are killed, or stopped and killed, a little later each time: by the range's start in microseconds, from
/// zero again at its end. `KVFERRY_CUDA_CYCLES` sets how often; a tenth of it comes first, so that what is kept for later is there.
fn cycles(mut transport: Box<dyn Transport>, roles: &[&str], later: std::ops::Range<u64>) {
    let cycles = cycles_wanted();
    let pool = pool(gpu(false), 5, "best");
    let keys = transport.bind(&pool).unwrap();
    // UCX closes some of its own when it likes.
    let spare = if transport.info().kind == TransportKind::Ucx { 8 } else { 0 };
    let mut before = None;
    for cycle in 0..cycles + cycles.div_ceil(10) {
        if cycle == cycles.div_ceil(10) {
            before = Some(held());
        }
        let mut peer = spawn(roles[cycle % roles.len()]);
        let id = transport.connect(&peer.address).unwrap();
        let (program, range) = (program(), program().whole());
        if cycle % 4 == 3 {
            transport.expect(Expected { from: None, id: PUSH, pool: PoolId(5), program, range }).unwrap();
            writeln!(peer.stdin, "{} {}", hex(&transport.address()), hex(&keys.0)).unwrap();
        } else {
            let remote = transport.import(id, &peer.keys, &layout()).unwrap();
            let (transfer, direction, local) = (TransferId(1000 + cycle as u128), Direction::Pull, PoolId(5));
            let pull = Transfer { id: transfer, peer: id, direction, local, remote, program, range, notice: None };
            transport.post(pull).unwrap();
        }
        let mut events = Vec::new();
        // Now and then before anything was mapped, mostly in the middle.
        until(transport.as_mut(), &mut events, |e| matches!(e, Event::Connected { .. }));
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(cycle as u64 * later.start % later.end) {
            transport.poll(&mut events);
        }
        if cycle % 3 == 2 {
            // It stands still for a while first, which stops nothing here.
            kill_process(Pid::from_child(&peer.child), Signal::STOP).unwrap();
            for _ in 0..2000 {
                transport.poll(&mut events);
            }
        }
        peer.child.kill().unwrap();
        peer.child.wait().unwrap();
        until(transport.as_mut(), &mut events, |e| matches!(e, Event::PeerLost { .. }));
        if cycle % 4 == 3 {
            // Of a push that never began nothing is told.
            transport.cancel(PUSH);
        }
        let over = |e: &Event| matches!(e, Event::Completed { .. } | Event::Arrived { .. } | Event::Failed { .. });
        until(transport.as_mut(), &mut events, over);
    }
    settles(transport.as_mut(), before.unwrap(), spare, cycles);
}

fn cycles_wanted() -> usize {
    std::env::var("KVFERRY_CUDA_CYCLES").ok().and_then(|n| n.parse().ok()).unwrap_or(20)
}

/// Free bytes of both GPUs, and this process's descriptors.
fn held() -> (u64, u64, usize) {
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
    (free_bytes(gpu(false)).unwrap(), free_bytes(gpu(true)).unwrap(), descriptors)
}

/// Everything is given back, but for some descriptors.
fn settles(transport: &mut dyn Transport, before: (u64, u64, usize), spare: usize, cycles: usize) {
    // The driver gives a dead process's memory back in its own time.
    let start = Instant::now();
    let whole = |now: (u64, u64, usize)| {
        now.0 + (8 << 20) >= before.0 && now.1 + (8 << 20) >= before.1 && now.2 <= before.2 + spare
    };
    while !whole(held()) {
        assert!(start.elapsed() < Duration::from_secs(10), "{before:?} before, {:?} after {cycles} cycles", held());
        transport.poll(&mut Vec::new());
        std::thread::sleep(Duration::from_millis(50));
    }
}
