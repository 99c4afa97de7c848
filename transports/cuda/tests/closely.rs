//! Transfers that follow each other closely, some by launches that stood by for them: on a GPU that is the processor, and on a real one.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code")]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::{Direction, End, PoolId, Program, TransferId};
use kvferry_cuda::CudaProvider;
use kvferry_transport::conformance::{block_planes, whole_blocks};
use kvferry_transport::{
    Device, Event, Expected, Options, PeerId, Pool, Provider, RemotePool, Transfer, Transport, TransportKind,
};
use support::{is_ready, moved, ordered, overlook, overlooked, refuse, refused};

const BLOCKS: u32 = 8;
const BLOCK_BYTES: u64 = 4096;
/// Longer than anything takes here.
const LONG_US: u32 = 100_000;

/// Two transports with a pool each.
struct Two {
    source: Pool,
    destination: Pool,
    a: Box<dyn Transport>,
    b: Box<dyn Transport>,
    a_at_b: (PeerId, RemotePool),
    b_at_a: (PeerId, RemotePool),
    events: Vec<Event>,
    number: u64,
}

fn program() -> Program {
    whole_blocks(1, 16, BLOCK_BYTES, 0..BLOCKS, (0..BLOCKS).rev())
}

impl Two {
    fn new(options: &Options) -> Two {
        let device = Device { kind: TransportKind::Cuda, name: "gpu0".into(), unavailable: None };
        let provider = CudaProvider::default();
        let pool =
            |id| provider.allocate(&device, PoolId(id), block_planes(1, BLOCKS, BLOCK_BYTES), "closely").unwrap();
        let (source, destination) = (pool(1), pool(2));
        let (mut a, mut b) = (provider.open(&device, options).unwrap(), provider.open(&device, options).unwrap());
        let (source_keys, destination_keys) = (a.bind(&source).unwrap(), b.bind(&destination).unwrap());
        let (to_a, to_b) = (b.connect(&a.address()).unwrap(), a.connect(&b.address()).unwrap());
        let a_at_b = (to_a, b.import(to_a, &source_keys, source.layout()).unwrap());
        let b_at_a = (to_b, a.import(to_b, &destination_keys, destination.layout()).unwrap());
        Two { source, destination, a, b, a_at_b, b_at_a, events: Vec::new(), number: 0 }
    }

    fn fill(&self, byte: u8) {
        for block in 0..BLOCKS {
            self.source.fill(0, block, byte).unwrap();
            self.destination.fill(0, block, 0xee).unwrap();
        }
    }

    /// Whether the destination has nothing else than this byte.
    fn is_moved(&self, byte: u8) -> bool {
        let mut all = vec![0; BLOCK_BYTES as usize];
        (0..BLOCKS).all(|block| {
            self.destination.read(0, block, 0, &mut all).unwrap();
            all.iter().all(|is| *is == byte)
        })
    }

    fn post(&mut self, direction: Direction) {
        self.number += 1;
        let (id, program) = (TransferId(self.number.into()), program());
        let range = program.whole();
        if direction == Direction::Pull {
            let ((peer, remote), local) = (self.a_at_b, self.destination.id());
            let program = Arc::new(program);
            return self.b.post(Transfer { id, peer, direction, local, remote, program, range, notice: None }).unwrap();
        }
        let due = Arc::new(program.without(End::Source));
        self.b.expect(Expected { from: None, id, pool: self.destination.id(), program: due, range }).unwrap();
        let ((peer, remote), local) = (self.b_at_a, self.source.id());
        let program = Arc::new(program.without(End::Destination));
        self.a.post(Transfer { id, peer, direction, local, remote, program, range, notice: None }).unwrap();
    }

    /// Until so many posts have ended well.
    fn until_completed(&mut self, mut left: usize) {
        let start = Instant::now();
        while left > 0 {
            self.a.poll(&mut self.events);
            self.b.poll(&mut self.events);
            for event in self.events.drain(..) {
                match event {
                    Event::Completed { .. } => left -= 1,
                    Event::Failed { .. } => panic!("{event:?}"),
                    _ => {}
                }
            }
            assert!(start.elapsed() < Duration::from_secs(60), "{left} are left");
        }
    }

    /// Until one that was cancelled has ended, either way.
    fn until_stopped(&mut self) {
        let start = Instant::now();
        loop {
            self.a.poll(&mut self.events);
            self.b.poll(&mut self.events);
            let is_end = |event: &Event| matches!(event, Event::Completed { .. } | Event::Failed { .. });
            if self.events.drain(..).filter(is_end).count() > 0 {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "it does not end");
        }
    }

    fn move_once(&mut self, direction: Direction, byte: u8) {
        self.fill(byte);
        self.post(direction);
        self.until_completed(1);
        assert!(self.is_moved(byte), "{direction:?} {}", self.number);
    }
}

/// Every transfer moves what its source holds then, whatever stood by since when, and however long.
fn every_transfer_moves_what_is_there() {
    for standby_us in [LONG_US, 0, 1, 40] {
        let mut two = Two::new(&Options { standby_us, ..Options::default() });
        for turn in 0..60u8 {
            two.move_once(if turn % 3 == 0 { Direction::Push } else { Direction::Pull }, turn);
        }
        // Several at once, of which one at most finds a launch that stands by; and one more behind them.
        for turn in 100..130 {
            two.fill(turn);
            for direction in [Direction::Pull, Direction::Push, Direction::Pull] {
                two.post(direction);
            }
            two.until_completed(3);
            assert!(two.is_moved(turn), "{turn}");
            two.move_once(Direction::Pull, turn + 1);
        }
        // Nobody waits long for one that stands by when all of it goes.
        let start = Instant::now();
        drop(two);
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}

fn in_turn(two: &mut Two, transfers: u8) {
    for turn in 0..transfers {
        two.move_once(if turn % 2 == 0 { Direction::Push } else { Direction::Pull }, turn);
    }
}

/// One test: what the driver counts, it counts for the whole process.
#[test]
fn launches_stand_by_on_the_processor() {
    if !is_ready() {
        return;
    }
    every_transfer_moves_what_is_there();
    assert!(ordered() > 10, "no launch stands by: {}", ordered());

    let with = |standby_us, thread_blocks| Two::new(&Options { standby_us, thread_blocks, ..Options::default() });
    // Each transfer moves once, by a launch of its own or by one that stood by.
    let mut two = with(LONG_US, 16);
    let before = (moved(), ordered());
    in_turn(&mut two, 60);
    assert_eq!(moved() - before.0, 60);
    assert!((10..60).contains(&(ordered() - before.1)), "{}", ordered() - before.1);

    // Nobody stands by who is not to.
    let before = ordered();
    in_turn(&mut with(0, 16), 20);
    assert_eq!(ordered(), before);

    // All orders come too late: each transfer takes a launch of its own then, and only one.
    let mut two = with(LONG_US, 3);
    overlook();
    let before = (moved(), ordered());
    in_turn(&mut two, 60);
    assert_eq!((moved() - before.0, ordered() - before.1), (60, 0));
    assert!(overlooked() > 10, "none was overlooked: {}", overlooked());

    // One that is stopped before it begins after all moves nothing: neither then nor when its fence is proved.
    let before = moved();
    for turn in 0..20u8 {
        two.fill(turn);
        two.post(Direction::Pull);
        two.b.cancel(TransferId(two.number.into()));
        two.until_stopped();
        let moved_now = moved();
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(moved(), moved_now, "something is moved behind the end");
        two.move_once(Direction::Pull, turn);
    }
    assert!(moved() - before <= 40, "a stopped transfer was started again");
    drop(two);
    overlook();

    // A driver that does not let them is not asked for ever, and nothing is lost.
    let mut two = with(LONG_US, 16);
    refuse();
    let before = (moved(), refused());
    in_turn(&mut two, 40);
    refuse();
    assert_eq!(moved() - before.0, 40);
    // Three by either end, which both receive.
    assert!((1..=6).contains(&(refused() - before.1)), "{}", refused() - before.1);
}

#[test]
#[ignore = "needs a GPU"]
fn launches_stand_by_on_a_gpu() {
    every_transfer_moves_what_is_there();
}
