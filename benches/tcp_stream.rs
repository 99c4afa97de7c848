//! Pull and push of scattered blocks over TCP loopback: two threads, a transport each, every byte verified afterwards.
//!
//! `cargo bench -p kvferry-tcp --bench tcp_stream [-- BLOCKS BLOCK_BYTES [STREAMS]]`; the limit to compare with is `writev`/`readv` of the same
//! blocks on one bare socket.
#![allow(clippy::panic, reason = "a bench that cannot go on stops")]

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use kvferry_core::{HandoverId, PoolId, PoolLayout, Program, Rank, TransferId};
use kvferry_tcp::TcpProvider;
use kvferry_transport::conformance::{block_planes, whole_blocks};
use kvferry_transport::{
    Device, Direction, Event, Expected, Options, Pool, PoolKeys, Provider, Transfer, Transport, TransportKind, Wait,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const ITERATIONS: u32 = 12;
const BLOCKS_PER_PLANE: u32 = 128;
const PATIENCE: Duration = Duration::from_secs(60);

/// What the threads tell each other; in production the control link does.
enum Word {
    Hello(bytes::Bytes, PoolKeys),
    Expecting,
    Done,
}

fn main() {
    let numbers: Vec<u64> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    let streams = numbers.get(2).map(|streams| *streams as u32);
    let shapes = match numbers.as_slice() {
        [blocks, bytes, ..] => vec![(*blocks as u32, *bytes)],
        _ => vec![(10_240, 4 << 10), (10_240, 16 << 10), (8_192, 64 << 10)],
    };
    for (blocks, block_bytes) in shapes {
        for direction in [Direction::Pull, Direction::Push] {
            let mut seconds = run(direction, blocks, block_bytes, streams);
            seconds.sort_by(f64::total_cmp);
            let bytes = f64::from(blocks) * block_bytes as f64;
            let rate = |index: usize| seconds.get(index).map_or(0.0, |s| bytes / s / 1e9);
            println!(
                "{direction:?} {blocks} x {block_bytes}: best {:.2} median {:.2} worst {:.2} GB/s",
                rate(0),
                rate(seconds.len() / 2),
                rate(seconds.len() - 1)
            );
        }
    }
}

/// The initiator's seconds for each iteration but the first.
fn run(direction: Direction, blocks: u32, block_bytes: u64, streams: Option<u32>) -> Vec<f64> {
    let planes = (blocks / BLOCKS_PER_PLANE).max(1);
    let layout = layout(planes, block_bytes);
    let program = Arc::new(program(planes, block_bytes));
    let pools = [0, 1].map(|id| Pool::allocate(PoolId(id), layout.clone(), "bench").expect("memory for a pool"));
    let [source, destination] = &pools;
    for plane in 0..planes {
        for block in 0..BLOCKS_PER_PLANE * 2 {
            source.write(plane, block, 0, &pattern(plane, block, block_bytes)).expect("inside the pool");
        }
    }
    let (initiator, responder) = match direction {
        Direction::Pull => (destination.clone(), source.clone()),
        Direction::Push => (source.clone(), destination.clone()),
    };
    let (to_responder, from_initiator) = channel();
    let (to_initiator, from_responder) = channel();
    let other = program.clone();
    let layout_there = responder.layout().clone();
    let thread = std::thread::spawn(move || {
        respond(direction, &responder, &other, streams, &to_initiator, &from_initiator);
    });
    let seconds = initiate(direction, &initiator, &layout_there, &program, streams, &to_responder, &from_responder);
    thread.join().expect("the responder ended well");
    verify(destination, &program, planes, block_bytes);
    seconds
}

fn open(streams: Option<u32>) -> Box<dyn Transport> {
    let mut options = Options::default();
    if let Some(streams) = streams {
        options.streams_per_peer = streams;
    }
    let device = Device { kind: TransportKind::Tcp, name: "lo".to_owned(), unavailable: None };
    TcpProvider::new().open(&device, &options).expect("loopback opens")
}

fn initiate(
    direction: Direction,
    pool: &Pool,
    layout_there: &PoolLayout,
    program: &Arc<Program>,
    streams: Option<u32>,
    to: &Sender<Word>,
    from: &Receiver<Word>,
) -> Vec<f64> {
    let mut transport = open(streams);
    transport.bind(pool).expect("the pool binds");
    let Ok(Word::Hello(address, keys)) = from.recv() else { panic!("no hello") };
    let peer = transport.connect(&address).expect("a good address");
    let remote = transport.import(peer, &keys, layout_there).expect("good keys");
    wait(transport.as_mut(), &mut |event| matches!(event, Event::Connected { .. }));
    let mut seconds = Vec::new();
    for iteration in 0..ITERATIONS {
        if direction == Direction::Push {
            let Ok(Word::Expecting) = from.recv() else { panic!("nothing expected") };
        }
        let start = Instant::now();
        let transfer = Transfer {
            id: id(iteration),
            peer,
            direction,
            local: pool.id(),
            remote,
            program: program.clone(),
            range: program.whole(),
            notice: None,
        };
        transport.post(transfer).expect("there is room");
        wait(transport.as_mut(), &mut |event| matches!(event, Event::Completed { .. }));
        if iteration > 0 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    to.send(Word::Done).expect("the responder lives");
    seconds
}

fn respond(
    direction: Direction,
    pool: &Pool,
    program: &Arc<Program>,
    streams: Option<u32>,
    to: &Sender<Word>,
    from: &Receiver<Word>,
) {
    let mut transport = open(streams);
    let keys = transport.bind(pool).expect("the pool binds");
    to.send(Word::Hello(transport.address(), keys)).expect("the initiator lives");
    if direction == Direction::Push {
        for iteration in 0..ITERATIONS {
            let expected = Expected {
                from: None,
                id: id(iteration),
                pool: pool.id(),
                program: program.clone(),
                range: program.whole(),
            };
            transport.expect(expected).expect("there is room");
            to.send(Word::Expecting).expect("the initiator lives");
            wait(transport.as_mut(), &mut |event| matches!(event, Event::Arrived { .. }));
        }
    }
    let mut events = Vec::new();
    while !matches!(from.try_recv(), Ok(Word::Done)) {
        turn(transport.as_mut(), &mut events, Duration::from_millis(5));
    }
}

fn wait(transport: &mut dyn Transport, found: &mut dyn FnMut(&Event) -> bool) {
    let start = Instant::now();
    let mut events = Vec::new();
    loop {
        turn(transport, &mut events, Duration::from_millis(100));
        for event in events.drain(..) {
            if found(&event) {
                return;
            }
            assert!(!matches!(event, Event::Failed { .. } | Event::PeerLost { .. }), "{event:?}");
        }
        assert!(start.elapsed() < PATIENCE, "nothing happened");
    }
}

fn turn(transport: &mut dyn Transport, events: &mut Vec<Event>, patience: Duration) {
    transport.poll(events);
    if !events.is_empty() {
        return;
    }
    if let Wait::Ready(fd) = transport.arm() {
        let timeout = Timespec { tv_sec: 0, tv_nsec: patience.subsec_nanos().into() };
        let _ = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout));
    }
}

fn id(iteration: u32) -> TransferId {
    TransferId::of(HandoverId(u64::from(iteration)), Rank(0), Rank(0), 0)
}

fn layout(planes: u32, block_bytes: u64) -> PoolLayout {
    block_planes(planes, 2 * BLOCKS_PER_PLANE, block_bytes)
}

fn program(planes: u32, block_bytes: u64) -> Program {
    let table = |seed: u64| {
        let mut state = seed;
        let mut blocks: Vec<u32> = (0..BLOCKS_PER_PLANE * 2).collect();
        for index in (1..blocks.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            blocks.swap(index, (state >> 33) as usize % (index + 1));
        }
        blocks.truncate(BLOCKS_PER_PLANE as usize);
        blocks
    };
    whole_blocks(planes, 16, block_bytes, table(1), table(2))
}

fn pattern(plane: u32, block: u32, bytes: u64) -> Vec<u8> {
    let seed = plane.wrapping_mul(31).wrapping_add(block.wrapping_mul(7));
    (0..bytes as u32).map(|byte| (seed.wrapping_add(byte).wrapping_mul(0x9e37_79b9) >> 24) as u8).collect()
}

fn verify(destination: &Pool, program: &Program, planes: u32, block_bytes: u64) {
    let [Some(sources)] = program.sources.as_slice() else { panic!("one table") };
    let [Some(destinations)] = program.destinations.as_slice() else { panic!("one table") };
    let mut bytes = vec![0; block_bytes as usize];
    for plane in 0..planes {
        for (from, to) in sources.iter().zip(destinations.iter()) {
            destination.read(plane, *to, 0, &mut bytes).expect("inside the pool");
            assert!(bytes == pattern(plane, *from, block_bytes), "plane {plane} block {to} is wrong");
        }
    }
}
