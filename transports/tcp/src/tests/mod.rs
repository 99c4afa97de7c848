//! Peers that do not keep to the protocol, and connections that end at the worst moment.

mod broken;
mod hostile;
mod staged;
mod wire;

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::{HandoverId, PoolId, PoolLayout, Program, Rank, TransferId};
use kvferry_transport::conformance::{block_planes, whole_blocks};
use kvferry_transport::{
    Device, Direction, Event, Expected, Options, PeerId, Pool, PoolKeys, Provider, RemotePool, Transfer, Transport,
    TransportKind,
};

/// No step takes longer on any machine that works.
const DEADLINE: Duration = Duration::from_secs(60);
const BLOCK_BYTES: u64 = 4096;
const BLOCKS: u32 = 64;

/// A transport and all its events.
struct Party {
    transport: Box<dyn Transport>,
    events: Vec<Event>,
    pool: Pool,
    keys: PoolKeys,
}

impl Party {
    fn new(provider: &dyn Provider, pool: u32, planes: u32, options: &Options) -> Party {
        let device = Device { kind: TransportKind::Tcp, name: "lo".to_owned(), unavailable: None };
        let mut transport = provider.open(&device, options).unwrap();
        let pool = provider.allocate(&device, PoolId(pool), layout(planes), "test").unwrap();
        let keys = transport.bind(&pool).unwrap();
        Party { transport, events: Vec::new(), pool, keys }
    }

    fn poll(&mut self) {
        self.transport.poll(&mut self.events);
    }

    fn fill(&self) {
        for (plane, block) in places(&self.pool) {
            self.pool.write(plane, block, 0, &pattern(plane, block)).unwrap();
        }
    }

    /// Checks that a transfer from a filled pool is here.
    fn verify(&self) {
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        for (plane, block) in places(&self.pool) {
            self.pool.read(plane, BLOCKS - 1 - block, 0, &mut bytes).unwrap();
            assert!(bytes == pattern(plane, block), "plane {plane}, block {block}");
        }
    }

    fn snapshot(&self) -> Vec<Vec<u8>> {
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        let read = |(plane, block)| {
            self.pool.read(plane, block, 0, &mut bytes).unwrap();
            bytes.clone()
        };
        places(&self.pool).map(read).collect()
    }

    fn failed(&self, id: TransferId) -> bool {
        self.events.iter().any(|event| matches!(event, Event::Failed { id: ended, .. } if *ended == id))
    }

    fn completed(&self, id: TransferId) -> bool {
        self.events.iter().any(|event| matches!(event, Event::Completed { id: ended, .. } if *ended == id))
    }

    fn arrived(&self, id: TransferId) -> bool {
        self.events.iter().any(|event| matches!(event, Event::Arrived { id: ended, .. } if *ended == id))
    }

    /// The peers that were reported lost, with the reasons.
    fn lost(&self) -> Vec<&str> {
        let mut reasons = Vec::new();
        for event in &self.events {
            if let Event::PeerLost { reason, .. } = event {
                reasons.push(reason.as_str());
            }
        }
        reasons
    }

    fn reach(&mut self, other: &Party) -> (PeerId, RemotePool) {
        let peer = self.transport.connect(&other.transport.address()).unwrap();
        let remote = self.transport.import(peer, &other.keys, other.pool.layout()).unwrap();
        (peer, remote)
    }

    fn pull(&mut self, number: u64, (peer, remote): (PeerId, RemotePool)) -> TransferId {
        self.post(number, Direction::Pull, (peer, remote))
    }

    fn post(&mut self, number: u64, direction: Direction, (peer, remote): (PeerId, RemotePool)) -> TransferId {
        let program = Arc::new(program(&self.pool));
        let range = program.whole();
        let transfer =
            Transfer { id: id(number), peer, direction, local: self.pool.id(), remote, program, range, notice: None };
        self.transport.post(transfer).unwrap();
        id(number)
    }

    fn expect(&mut self, number: u64) -> TransferId {
        let program = Arc::new(program(&self.pool));
        let range = program.whole();
        self.transport.expect(Expected { from: None, id: id(number), pool: self.pool.id(), program, range }).unwrap();
        id(number)
    }
}

fn until(parties: &mut [&mut Party], what: &str, mut done: impl FnMut(&[&mut Party]) -> bool) {
    let start = Instant::now();
    while !done(parties) {
        assert!(start.elapsed() < DEADLINE, "waited in vain: {what}");
        for party in parties.iter_mut() {
            party.poll();
        }
    }
}

fn id(number: u64) -> TransferId {
    TransferId::of(HandoverId(number), Rank(0), Rank(0), 0)
}

fn layout(planes: u32) -> PoolLayout {
    block_planes(planes, BLOCKS, BLOCK_BYTES)
}

/// Every block of a pool to the block as far from the other end.
fn program(pool: &Pool) -> Program {
    whole_blocks(pool.layout().planes.len() as u32, 4, BLOCK_BYTES, 0..BLOCKS, (0..BLOCKS).rev())
}

fn places(pool: &Pool) -> impl Iterator<Item = (u32, u32)> + use<> {
    let planes = pool.layout().planes.len() as u32;
    (0..planes).flat_map(|plane| (0..BLOCKS).map(move |block| (plane, block)))
}

fn pattern(plane: u32, block: u32) -> Vec<u8> {
    let seed = plane.wrapping_mul(977).wrapping_add(block.wrapping_mul(31));
    (0..BLOCK_BYTES as u32).map(|byte| (seed.wrapping_add(byte).wrapping_mul(0x9e37_79b9) >> 23) as u8).collect()
}
