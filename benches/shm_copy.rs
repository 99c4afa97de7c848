//! Scattered blocks through the shm transport, beside a plain scattered memcpy of the same shape on the same core, in turn.
//!
//! `cargo bench -p kvferry-shm --bench shm_copy`

use std::sync::Arc;
use std::time::Instant;

use kvferry_core::{Direction, PoolId, TransferId};
use kvferry_shm::ShmProvider;
use kvferry_transport::conformance::{block_planes, whole_blocks};
use kvferry_transport::{Event, Expected, Options, Pool, Provider, RemotePool, Transfer, Transport};

const ROUNDS: usize = 12;

fn main() {
    for (blocks, block_bytes) in [(10_240, 4 << 10), (10_240, 16 << 10), (8_192, 64 << 10)] {
        let ids = shuffled(2 * blocks);
        let mut plain = Plain::new(blocks, block_bytes, &ids);
        let mut lane = Lane::open(blocks, block_bytes, &ids);
        let (mut reference, mut pull, mut push) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..=ROUNDS {
            let seconds = [plain.copy(), lane.pull(2 * round as u128), lane.push(2 * round as u128 + 1)];
            // The first round touches pages.
            if round > 0 {
                reference.push(seconds[0]);
                pull.push(seconds[1]);
                push.push(seconds[2]);
            }
        }
        let bytes = blocks as f64 * block_bytes as f64;
        let (reference, pull, push) =
            (bytes / median(reference) / 1e9, bytes / median(pull) / 1e9, bytes / median(push) / 1e9);
        println!(
            "{blocks} x {} KiB: memcpy {reference:.2} GB/s, pull {pull:.2} GB/s ({:.2}), push {push:.2} GB/s ({:.2})",
            block_bytes >> 10,
            pull / reference,
            push / reference
        );
    }
}

/// The limit: one thread, one memcpy a block.
struct Plain {
    source: Vec<u8>,
    destination: Vec<u8>,
    pairs: Vec<(usize, usize)>,
    block_bytes: usize,
}

impl Plain {
    fn new(blocks: usize, block_bytes: usize, ids: &[u32]) -> Plain {
        let pairs = (0..blocks).map(|i| (ids[i] as usize, ids[2 * blocks - 1 - i] as usize)).collect();
        Plain {
            source: vec![5; 2 * blocks * block_bytes],
            destination: vec![1; 2 * blocks * block_bytes],
            pairs,
            block_bytes,
        }
    }

    fn copy(&mut self) -> f64 {
        let n = self.block_bytes;
        let start = Instant::now();
        for &(to, from) in &self.pairs {
            self.destination[to * n..(to + 1) * n].copy_from_slice(&self.source[from * n..(from + 1) * n]);
        }
        start.elapsed().as_secs_f64()
    }
}

/// The same through the transport.
struct Lane {
    source: Box<dyn Transport>,
    destination: Box<dyn Transport>,
    pull: Transfer,
    push: Transfer,
    pools: (Pool, Pool),
    pairs: Vec<(u32, u32)>,
}

impl Lane {
    fn open(blocks: usize, block_bytes: usize, ids: &[u32]) -> Lane {
        let open = || {
            let device = ShmProvider.discover().remove(0);
            ShmProvider.open(&device, &Options::default()).expect("shared memory opens")
        };
        let (mut source, mut destination) = (open(), open());
        let layout = block_planes(1, 2 * blocks as u32, block_bytes as u64);
        let pool = |id| Pool::allocate(PoolId(id), layout.clone(), "bench").expect("there is memory");
        let pools = (pool(1), pool(2));
        (0..2 * blocks as u32)
            .for_each(|block| pools.0.fill(0, block, block as u8 ^ 0x5a).expect("the block is there"));
        let pairs: Vec<(u32, u32)> = (0..blocks).map(|i| (ids[i], ids[2 * blocks - 1 - i])).collect();

        let source_at_destination = destination.connect(&source.address()).expect("it listens");
        let destination_at_source = source.connect(&destination.address()).expect("it listens");
        let keys = (source.bind(&pools.0).expect("binds"), destination.bind(&pools.1).expect("binds"));
        let mut events = Vec::new();
        while events.iter().filter(|e| matches!(e, Event::Connected { .. })).count() < 4 {
            source.poll(&mut events);
            destination.poll(&mut events);
        }
        let pull_from: RemotePool = destination.import(source_at_destination, &keys.0, &layout).expect("imports");
        let push_to = source.import(destination_at_source, &keys.1, &layout).expect("imports");

        let (to, from): (Vec<u32>, Vec<u32>) = pairs.iter().copied().unzip();
        let program = Arc::new(whole_blocks(1, 16, block_bytes as u64, from, to));
        let range = program.whole();
        let pull = Transfer {
            id: TransferId(0),
            peer: source_at_destination,
            direction: Direction::Pull,
            local: PoolId(2),
            remote: pull_from,
            program: Arc::clone(&program),
            range,
            notice: None,
        };
        let push = Transfer {
            peer: destination_at_source,
            direction: Direction::Push,
            local: PoolId(1),
            remote: push_to,
            ..pull.clone()
        };
        Lane { source, destination, pull, push, pools, pairs }
    }

    fn pull(&mut self, id: u128) -> f64 {
        let transfer = Transfer { id: TransferId(id), ..self.pull.clone() };
        let start = Instant::now();
        self.destination.post(transfer).expect("posts");
        self.until(id, start)
    }

    fn push(&mut self, id: u128) -> f64 {
        let id = TransferId(id);
        let start = Instant::now();
        self.destination
            .expect(Expected {
                from: None,
                id,
                pool: PoolId(2),
                program: Arc::clone(&self.push.program),
                range: self.push.range,
            })
            .expect("expects");
        self.source.post(Transfer { id, ..self.push.clone() }).expect("posts");
        self.source.poll(&mut Vec::new());
        self.until(id.0, start)
    }

    /// Waits for the destination, then checks and clears it.
    fn until(&mut self, id: u128, start: Instant) -> f64 {
        let mut events = Vec::new();
        while events.is_empty() {
            self.destination.poll(&mut events);
            self.source.poll(&mut Vec::new());
        }
        let seconds = start.elapsed().as_secs_f64();
        let ok = events
            .iter()
            .any(|e| matches!(e, Event::Completed { id: done, .. } | Event::Arrived { id: done, .. } if done.0 == id));
        assert!(ok, "{events:?}");
        self.source.poll(&mut events);
        for &(to, from) in &self.pairs {
            let mut bytes = vec![0; self.pools.1.layout().planes[0].block_bytes as usize];
            self.pools.1.read(0, to, 0, &mut bytes).expect("the block is there");
            assert!(bytes.iter().all(|&byte| byte == from as u8 ^ 0x5a), "block {to} is wrong");
            self.pools.1.fill(0, to, 0).expect("the block is there");
        }
        seconds
    }
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

fn shuffled(n: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..n as u32).collect();
    let mut state = 1u64;
    for i in (1..n).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ids.swap(i, (state >> 33) as usize % (i + 1));
    }
    ids
}
