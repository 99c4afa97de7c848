use std::sync::Arc;

use kvferry_core::{Direction, PoolId, TransferId};
use kvferry_transport::conformance::{Party, absent, block_planes, until, whole_blocks};
use kvferry_transport::{Event, PeerId, Pool, PoolOptions, RemotePool, Transfer};

use super::*;

const BLOCKS: u32 = 64;
const BLOCK_BYTES: u64 = 64 << 10;
const DEVICES: [&str; 2] = ["lo", "tcp;ofi_rxm/lo"];

fn pool(id: u32) -> Pool {
    let options = PoolOptions { huge_pages: false, ..PoolOptions::default() };
    Pool::allocate_with(PoolId(id), block_planes(1, BLOCKS, BLOCK_BYTES), "faults", &options).unwrap()
}

/// The first byte of each block.
fn bytes(pool: &Pool) -> Vec<u8> {
    let read = |block| {
        let mut byte = [0];
        pool.read(0, block, 0, &mut byte).unwrap();
        byte[0]
    };
    (0..BLOCKS).map(read).collect()
}

fn verify(pool: &Pool, byte: u8) {
    for block in 0..BLOCKS {
        let mut all = vec![0; BLOCK_BYTES as usize];
        pool.read(0, block, 0, &mut all).unwrap();
        assert!(all.iter().all(|found| *found == byte), "block {block}");
    }
}

/// Reads from the source, with a pool of its own.
struct Reads {
    party: Party,
    /// Its well-known endpoint.
    queues: Queues,
    peer: PeerId,
    remote: RemotePool,
    into: Pool,
}

/// A source, and two that read from it.
struct Three {
    source: Party,
    one: Reads,
    other: Reads,
    from: Pool,
}

impl Three {
    fn new(device: &'static str) -> Three {
        let slow = Options { poll_bytes_max: 64 << 10, ..Options::default() };
        let mut source = Party::open(&Faulty(device), &slow);
        let from = pool(1);
        (0..BLOCKS).for_each(|block| from.fill(0, block, 7).unwrap());
        let keys = source.bind(&from);
        let reads = |number| {
            let mut party = Party::open(&Faulty(device), &slow);
            let (queues, into) = (newest(), pool(number));
            party.bind(&into);
            let peer = party.connect(&source);
            let remote = party.import(peer, &keys, from.layout());
            Reads { party, queues, peer, remote, into }
        };
        let (one, other) = (reads(2), reads(3));
        Three { source, one, other, from }
    }

    fn poll(&mut self, what: &str, mut done: impl FnMut(&Party, &Party) -> bool) {
        let Three { source, one, other, .. } = self;
        until(&mut [source, &mut one.party, &mut other.party], what, |parties| match parties {
            [_, one, other] => done(one, other),
            _ => false,
        });
    }

    /// Both are in the midst of it.
    fn begin(&mut self) {
        self.one.post(1);
        self.other.post(2);
        let into = self.one.into.clone();
        self.poll("the pull begins", |_, _| bytes(&into).contains(&7));
        assert_eq!(self.one.party.end(TransferId(1)), None);
    }

    /// One's transfer failed with those words, the other's did not.
    fn ended(&mut self, words: &str) {
        self.poll("both pulls end", |one, other| {
            one.end(TransferId(1)).is_some() && other.end(TransferId(2)).is_some()
        });
        let why = match self.one.party.end(TransferId(1)) {
            Some(Event::Failed { error, .. }) => error.to_string(),
            other => panic!("{other:?}"),
        };
        assert!(why.contains(words), "{why}");
        assert_eq!(reported(), 1);
        assert!(!self.other.party.failed(TransferId(2)), "{:?}", self.other.party.end(TransferId(2)));
        assert!(!self.other.party.lost_someone() && !self.source_failed());
        verify(&self.other.into, 7);
    }

    fn source_failed(&self) -> bool {
        self.source.events.iter().any(|event| matches!(event, Event::Failed { .. }))
    }

    /// A transfer more by one, which goes well.
    fn goes_on(&mut self) {
        self.one.post(3);
        self.poll("the next pull ends", |one, _| one.end(TransferId(3)).is_some());
        assert!(!self.one.party.failed(TransferId(3)), "{:?}", self.one.party.end(TransferId(3)));
        verify(&self.one.into, 7);
    }

    /// The same over a new connection.
    fn goes_on_anew(&mut self) {
        self.poll("the peer is lost", |one, _| one.lost_someone());
        let keys = {
            self.source.transport.unbind(self.from.id());
            let (source, id) = (&mut self.source, self.from.id());
            until(&mut [source, &mut self.one.party, &mut self.other.party], "it is let go", |parties| {
                parties.first().is_some_and(|source| source.saw(&Event::Unbound { pool: id }))
            });
            self.source.bind(&self.from)
        };
        let one = &mut self.one;
        one.peer = one.party.connect(&self.source);
        one.remote = one.party.import(one.peer, &keys, self.from.layout());
        self.goes_on();
    }
}

impl Reads {
    fn post(&mut self, id: u128) {
        let program = Arc::new(whole_blocks(1, 16, BLOCK_BYTES, 0..BLOCKS, 0..BLOCKS));
        let range = program.whole();
        let (peer, remote, local) = (self.peer, self.remote, self.into.id());
        let id = TransferId(id);
        let direction = Direction::Pull;
        let transfer = Transfer { id, peer, direction, local, remote, program, range, notice: None };
        self.party.transport.post(transfer).unwrap();
    }
}

/// Without a library the case says so and passes.
fn all(case: impl Fn(Three)) {
    match Library::find() {
        Ok(_) => DEVICES.into_iter().for_each(|device| {
            FAULTS.take();
            case(Three::new(device));
        }),
        Err(reason) => absent("libfabric", &reason),
    }
}

#[test]
fn an_error_event_of_an_endpoint_that_reads_ends_what_it_reads() {
    all(|mut three| {
        three.begin();
        fail(newest_beside(three.one.queues), Fault::Event);
        three.ended("4111");
        three.goes_on_anew();
    });
}

#[test]
fn an_error_event_of_the_well_known_endpoint_lets_its_peers_go() {
    all(|mut three| {
        three.begin();
        fail(three.one.queues, Fault::Event);
        three.ended("4111");
        three.goes_on_anew();
    });
}

#[test]
fn a_completion_in_error_ends_the_transfer_that_asked() {
    all(|mut three| {
        // The way is wired, so what comes next is of the transfer.
        three.one.post(9);
        three.poll("a pull ends", |one, _| one.end(TransferId(9)).is_some());
        fail(newest_beside(three.one.queues), Fault::Completion);
        three.one.post(1);
        three.other.post(2);
        three.ended("4111");
        assert!(!three.one.party.lost_someone());
        three.goes_on();
    });
}

#[test]
fn a_queue_that_cannot_be_read_ends_its_endpoint() {
    all(|mut three| {
        three.begin();
        fail(newest_beside(three.one.queues), Fault::Queue);
        three.ended("fi_cq_read");
        three.goes_on_anew();
    });
}

#[test]
fn a_message_in_error_lets_its_peer_go() {
    all(|mut three| {
        three.begin();
        fail(three.one.queues, Fault::Completion);
        three.poll("the error is reported", |_, _| reported() == 1);
        three.poll("the others go on", |_, other| other.end(TransferId(2)).is_some());
        assert!(!three.other.party.failed(TransferId(2)));
        verify(&three.other.into, 7);
    });
}
