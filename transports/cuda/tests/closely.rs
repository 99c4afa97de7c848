//! Transfers that follow each other closely, some by launches that stood by for them: on a GPU that is the processor, and on a real one.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code")]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::{Direction, End, PoolId, Program, TransferId};
use kvferry_cuda::{Allocate, CudaProvider, allocate};
use kvferry_transport::conformance::{Pair, Party, block_planes, whole_blocks};
use kvferry_transport::{Event, Expected, Options, Pool, RemotePool, Transfer};
use support::{is_ready, moved, ordered, overlook, overlooked, refuse, refused};

const BLOCKS: u32 = 8;
const BLOCK_BYTES: u64 = 4096;
/// Longer than anything takes here.
const LONG_US: u32 = 100_000;

fn program() -> Program {
    whole_blocks(1, 16, BLOCK_BYTES, 0..BLOCKS, (0..BLOCKS).rev())
}

/// Two transports with a pool each.
struct Two {
    pair: Pair,
    source: Pool,
    destination: Pool,
    source_at_b: RemotePool,
    destination_at_a: RemotePool,
    number: u128,
}

impl Two {
    fn new(options: &Options) -> Two {
        let mut pair = Pair::open(&CudaProvider::default(), options);
        let pool = |id| allocate(0, PoolId(id), block_planes(1, BLOCKS, BLOCK_BYTES), Allocate::Best).unwrap();
        let (source, destination) = (pool(1), pool(2));
        let (source_keys, destination_keys) = (pair.a.bind(&source), pair.b.bind(&destination));
        let source_at_b = pair.b.import(pair.a_at_b, &source_keys, source.layout());
        let destination_at_a = pair.a.import(pair.b_at_a, &destination_keys, destination.layout());
        Two { pair, source, destination, source_at_b, destination_at_a, number: 0 }
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

    fn post(&mut self, direction: Direction) -> TransferId {
        self.number += 1;
        let (id, program) = (TransferId(self.number), program());
        let range = program.whole();
        let (initiator, peer, remote, local, program) = match direction {
            Direction::Pull => {
                (&mut self.pair.b, self.pair.a_at_b, self.source_at_b, self.destination.id(), Arc::new(program))
            }
            Direction::Push => {
                let (pool, due) = (self.destination.id(), Arc::new(program.without(End::Source)));
                let expected = Expected { from: None, id, pool, program: due, range };
                self.pair.b.transport.expect(expected).unwrap();
                let program = Arc::new(program.without(End::Destination));
                (&mut self.pair.a, self.pair.b_at_a, self.destination_at_a, self.source.id(), program)
            }
        };
        let transfer = Transfer { id, peer, direction, local, remote, program, range, notice: None };
        initiator.transport.post(transfer).unwrap();
        id
    }

    fn until_completed(&mut self, id: TransferId, direction: Direction) {
        let is_completed = |initiator: &Party| match initiator.end(id) {
            Some(Event::Completed { .. }) => true,
            Some(other) => panic!("{other:?}"),
            None => false,
        };
        self.pair.until("it completes", |a, b| is_completed(if direction == Direction::Push { a } else { b }));
    }

    fn move_once(&mut self, direction: Direction, byte: u8) {
        self.fill(byte);
        let id = self.post(direction);
        self.until_completed(id, direction);
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
            let posted = [Direction::Pull, Direction::Push, Direction::Pull].map(|way| (two.post(way), way));
            for (id, way) in posted {
                two.until_completed(id, way);
            }
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

    // One that is stopped then takes none: nothing of it is moved.
    let mut stopped = 0;
    for turn in 0..20u8 {
        two.fill(turn);
        let before = (moved(), overlooked());
        let id = two.post(Direction::Pull);
        two.pair.b.transport.cancel(id);
        two.pair.until("it ends", |_, b| b.end(id).is_some());
        if overlooked() > before.1 {
            assert_eq!(moved(), before.0, "a stopped transfer was started again");
            stopped += 1;
        }
        two.move_once(Direction::Pull, turn);
    }
    assert!(stopped > 5, "none was stopped after it was ordered: {stopped}");
    drop(two);
    overlook();

    // A driver that does not let them is not asked for ever, and nothing is lost.
    let mut two = with(LONG_US, 16);
    refuse();
    let before = (moved(), refused());
    in_turn(&mut two, 40);
    refuse();
    assert_eq!(moved() - before.0, 40);
    assert!((1..=3).contains(&(refused() - before.1)), "{}", refused() - before.1);
}

#[test]
#[ignore = "needs a GPU"]
fn launches_stand_by_on_a_gpu() {
    every_transfer_moves_what_is_there();
}
