//! A source at one party, a destination at the other, and the program between them.

use std::sync::Arc;

use kvferry_core::{Direction, End, Epoch, Program, TransferId, UnitRange};

use super::case::{Format, Holding, SENTINEL, Shape, bytes, program};
use super::harness::Pair;
use crate::{Event, Expected, Notice, Options, PostError, Provider, RemotePool, Transfer};

/// `a` holds what `b` wants.
pub(super) struct Lane {
    pub(super) pair: Pair,
    pub(super) source: Holding,
    pub(super) destination: Holding,
    pub(super) source_at_b: RemotePool,
    pub(super) destination_at_a: RemotePool,
    pub(super) program: Arc<Program>,
    pub(super) bytes: u64,
}

impl Lane {
    pub(super) fn open(provider: &dyn Provider, options: &Options, shape: &Shape, from: Format, to: Format) -> Lane {
        let mut pair = Pair::open(provider, options);
        let source = Holding::new(provider, 1, shape, from, 7);
        let destination = Holding::new(provider, 2, shape, to, 8);
        source.fill(1);
        let source_keys = pair.a.bind(&source.pool);
        let destination_keys = pair.b.bind(&destination.pool);
        let source_at_b = pair.b.import(pair.a_at_b, &source_keys, source.pool.layout());
        let destination_at_a = pair.a.import(pair.b_at_a, &destination_keys, destination.pool.layout());
        let program = Arc::new(program(&source, &destination));
        Lane { pair, source, destination, source_at_b, destination_at_a, program, bytes: bytes(shape) }
    }

    /// Half a megabyte in pieces of 4 KiB.
    pub(super) fn small(provider: &dyn Provider) -> Lane {
        let shape = Shape { layers: 2, heads: 2, run_bytes: 128, start: 0, end: 512 };
        Lane::open(provider, &Options::default(), &shape, Format::plain(16), Format::plain(16))
    }

    /// 32 MiB, moved 64 KiB a poll: many polls pass before it ends.
    pub(super) fn slow(provider: &dyn Provider) -> Lane {
        let shape = Shape { layers: 4, heads: 4, run_bytes: 256, start: 0, end: 4096 };
        let options = Options { poll_bytes_max: 64 << 10, ..Options::default() };
        Lane::open(provider, &options, &shape, Format::plain(16), Format::plain(32))
    }

    pub(super) fn pull(&mut self, id: u128, range: UnitRange) -> Result<(), PostError> {
        let transfer = self.pull_of(id, range);
        self.pair.b.transport.post(transfer)
    }

    pub(super) fn pull_of(&self, id: u128, range: UnitRange) -> Transfer {
        Transfer {
            id: TransferId(id),
            peer: self.pair.a_at_b,
            direction: Direction::Pull,
            local: self.destination.pool.id(),
            remote: self.source_at_b,
            program: Arc::clone(&self.program),
            range,
            notice: Some(notice(id)),
        }
    }

    pub(super) fn push(&mut self, id: u128, range: UnitRange) -> Result<(), PostError> {
        let transfer = self.push_of(id, range);
        self.pair.a.transport.post(transfer)
    }

    pub(super) fn push_of(&self, id: u128, range: UnitRange) -> Transfer {
        Transfer {
            id: TransferId(id),
            peer: self.pair.b_at_a,
            direction: Direction::Push,
            local: self.source.pool.id(),
            remote: self.destination_at_a,
            program: Arc::new(self.program.without(End::Destination)),
            range,
            notice: Some(notice(id)),
        }
    }

    pub(super) fn expect(&mut self, id: u128, range: UnitRange) -> Result<(), PostError> {
        let expected = self.expected(id, range);
        self.pair.b.transport.expect(expected)
    }

    pub(super) fn expected(&self, id: u128, range: UnitRange) -> Expected {
        let program = Arc::new(self.program.without(End::Source));
        Expected { from: None, id: TransferId(id), pool: self.destination.pool.id(), program, range }
    }

    /// Waits until a pull is over at both ends and checks what was reported.
    pub(super) fn pulled(&mut self, id: u128, bytes: u64) {
        self.pair.until("a pull completes and is noticed", |a, b| {
            b.end(TransferId(id)).is_some() && a.saw(&Event::Notice { notice: notice(id) })
        });
        check_end(self.pair.b.end(TransferId(id)), bytes);
        assert!(self.pair.a.end(TransferId(id)).is_none(), "a pull ends at its initiator only");
    }

    /// Waits until a push is over at both ends and checks what was reported.
    pub(super) fn pushed(&mut self, id: u128, bytes: u64) {
        let noticed = Event::Notice { notice: notice(id) };
        self.pair.until("a push completes, arrives and is noticed", |a, b| {
            // The notice follows visibility: whenever it is there, so is every byte.
            a.end(TransferId(id)).is_some() && b.end(TransferId(id)).is_some() && b.saw(&noticed)
        });
        check_end(self.pair.a.end(TransferId(id)), bytes);
        check_end(self.pair.b.end(TransferId(id)), bytes);
    }

    /// Lets time pass until some bytes, but not all, are in place.
    pub(super) fn until_midway(&mut self) {
        let sentinels =
            |lane: &Lane| lane.destination.snapshot().iter().flatten().filter(|&&byte| byte == SENTINEL).count();
        let before = sentinels(self);
        for _ in 0..10_000 {
            self.pair.turns(4);
            if sentinels(self) < before {
                return;
            }
        }
        panic!("nothing moved");
    }

    /// Writes sentinels over the whole destination, lets everybody go on, and checks that nothing was written since.
    pub(super) fn verify_still(&mut self) {
        self.destination.clear();
        self.pair.turns(500);
        self.destination.verify_untouched();
    }

    pub(super) fn whole(&self) -> UnitRange {
        self.program.whole()
    }
}

fn check_end(end: Option<&Event>, wanted: u64) {
    match end {
        Some(Event::Completed { bytes, .. } | Event::Arrived { bytes, .. }) => assert_eq!(*bytes, wanted),
        other => panic!("{other:?} where success was due"),
    }
}

/// The notice of a transfer, no two alike.
pub(super) fn notice(id: u128) -> Notice {
    Notice { epoch: Epoch(1000 + id as u64), transfer: TransferId(id), chunk: 3 + id as u32 }
}
