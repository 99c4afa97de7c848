//! A few NICs with a pool each, one fabric, and time that the test drives.
#![allow(dead_code, clippy::unwrap_used, clippy::panic, reason = "test code; no test file uses all of it")]

use std::sync::Arc;
use std::time::Duration;

use kvferry_core::{Direction, End, Epoch, HandoverId, PoolId, Program, Rank, TransferId};
use kvferry_fabric_sim::{Fabric, FabricOptions, NicId, SimProvider};
use kvferry_transport::conformance::{block_planes, whole_blocks};
use kvferry_transport::{
    Device, Event, Expected, Notice, Options, PeerId, Pool, PoolKeys, PostError, Provider, RemotePool, Transfer,
    TransferError, Transport, TransportKind,
};

pub(crate) const BLOCKS: u32 = 64;
pub(crate) const BLOCK_BYTES: u64 = 4096;
pub(crate) const LATENCY: u64 = 1_000;

/// One NIC, its pool, and what it has reported.
pub(crate) struct Node {
    pub(crate) transport: Option<Box<dyn Transport>>,
    pub(crate) nic: NicId,
    pub(crate) pool: Pool,
    pub(crate) keys: PoolKeys,
    /// With the time at which it was polled.
    pub(crate) events: Vec<(u64, Event)>,
}

pub(crate) struct Bed {
    pub(crate) fabric: Fabric,
    pub(crate) nodes: Vec<Node>,
    pub(crate) now: u64,
}

/// A connection from one node to another's pool.
#[derive(Clone, Copy)]
pub(crate) struct Path {
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) peer: PeerId,
    pub(crate) remote: RemotePool,
}

/// 1 µs away, a block takes 1 µs, a slice is a block, 4 on their way.
pub(crate) fn options() -> FabricOptions {
    FabricOptions {
        bytes_per_second: 4_096_000_000,
        latency: Duration::from_nanos(LATENCY),
        slice_bytes: BLOCK_BYTES,
        retry_for: Duration::from_micros(400),
        ..FabricOptions::default()
    }
}

pub(crate) fn id(handover: u64) -> TransferId {
    TransferId::of(HandoverId(handover), Rank(0), Rank(0), 0)
}

pub(crate) fn notice(id: TransferId) -> Notice {
    Notice { epoch: Epoch(1), transfer: id, chunk: 0 }
}

impl Bed {
    pub(crate) fn new(options: FabricOptions, nodes: usize) -> Bed {
        let fabric = Fabric::new(options);
        let mut bed = Bed { fabric, nodes: Vec::new(), now: 0 };
        (0..nodes).for_each(|_| bed.open(Options::default()));
        bed
    }

    /// With a shadow, every pool in its first incarnation.
    pub(crate) fn watched(options: FabricOptions, nodes: usize) -> Bed {
        let mut bed = Bed { fabric: Fabric::new(options), nodes: Vec::new(), now: 0 };
        bed.fabric.watch();
        for node in 0..nodes {
            bed.open(Options::default());
            bed.fabric.incarnate(&bed.nodes[node].pool, Epoch(1), std::slice::from_ref(&(0..1)));
        }
        bed
    }

    pub(crate) fn open(&mut self, options: Options) {
        let number = self.nodes.len() as u32;
        let layout = block_planes(1, BLOCKS, BLOCK_BYTES);
        let pool = Pool::allocate(PoolId(number), layout, "bed").unwrap();
        self.open_with(pool, options);
    }

    pub(crate) fn open_with(&mut self, pool: Pool, options: Options) {
        let device = Device { kind: TransportKind::Sim, name: "bed".to_owned(), unavailable: None };
        let mut transport = SimProvider::new(self.fabric.clone()).open(&device, &options).unwrap();
        let nic = self.fabric.nic_at(&transport.address()).unwrap();
        let keys = transport.bind(&pool).unwrap();
        self.nodes.push(Node { transport: Some(transport), nic, pool, keys, events: Vec::new() });
    }

    pub(crate) fn transport(&mut self, node: usize) -> &mut dyn Transport {
        &mut **self.nodes[node].transport.as_mut().unwrap()
    }

    /// Connects, and imports the pool with the keys that it has now, without waiting.
    pub(crate) fn dial(&mut self, from: usize, to: usize) -> Path {
        let address = self.transport(to).address();
        let (keys, layout) = (self.nodes[to].keys.clone(), self.nodes[to].pool.layout().clone());
        let peer = self.transport(from).connect(&address).unwrap();
        let remote = self.transport(from).import(peer, &keys, &layout).unwrap();
        Path { from, to, peer, remote }
    }

    /// [`Bed::dial`], and waits for it.
    pub(crate) fn connect(&mut self, from: usize, to: usize) -> Path {
        let path = self.dial(from, to);
        self.pass(3 * LATENCY);
        assert!(self.saw(from, &Event::Connected { peer: path.peer }));
        path
    }

    /// Lets so many nanoseconds pass; every NIC that has something to report is polled at once.
    pub(crate) fn pass(&mut self, nanos: u64) {
        let until = self.now + nanos;
        while let Some(at) = self.fabric.next_event_at().filter(|at| *at <= until) {
            self.now = self.now.max(at);
            self.fabric.advance(self.now);
            self.poll();
        }
        self.now = until;
        self.fabric.advance(until);
        self.poll();
    }

    /// Until nothing more will happen; returns when the last thing did.
    pub(crate) fn run(&mut self) -> u64 {
        self.poll();
        while let Some(at) = self.fabric.next_event_at() {
            self.pass(at.saturating_sub(self.now));
        }
        self.now
    }

    pub(crate) fn poll(&mut self) {
        let now = self.now;
        for nic in self.fabric.take_ready() {
            let Some(node) = self.nodes.iter_mut().find(|node| node.nic == nic) else { continue };
            let mut events = Vec::new();
            if let Some(transport) = &mut node.transport {
                transport.poll(&mut events);
            }
            node.events.extend(events.into_iter().map(|event| (now, event)));
        }
    }

    pub(crate) fn expect(&mut self, node: usize, id: TransferId, program: &Arc<Program>) {
        let expected = Expected {
            from: None,
            id,
            pool: self.nodes[node].pool.id(),
            program: Arc::new(program.without(End::Source)),
            range: program.whole(),
        };
        self.transport(node).expect(expected).unwrap();
    }

    /// Pushes or pulls, and says whether it was taken.
    pub(crate) fn post(
        &mut self,
        path: Path,
        direction: Direction,
        id: TransferId,
        program: &Arc<Program>,
    ) -> Result<(), PostError> {
        let transfer = Transfer {
            id,
            peer: path.peer,
            direction,
            local: self.nodes[path.from].pool.id(),
            remote: path.remote,
            program: Arc::clone(program),
            range: program.whole(),
            notice: Some(notice(id)),
        };
        self.transport(path.from).post(transfer)
    }

    /// A push that is expected.
    pub(crate) fn push(&mut self, path: Path, id: TransferId, program: &Arc<Program>) {
        self.expect(path.to, id, program);
        self.post(path, Direction::Push, id, program).unwrap();
    }

    pub(crate) fn pull(&mut self, path: Path, id: TransferId, program: &Arc<Program>) {
        self.post(path, Direction::Pull, id, program).unwrap();
    }

    /// How a transfer ended at a node, and when.
    pub(crate) fn end(&self, node: usize, id: TransferId) -> Option<(u64, &Event)> {
        let of = |event: &Event| match event {
            Event::Completed { id: ended, .. } | Event::Arrived { id: ended, .. } | Event::Failed { id: ended, .. } => {
                *ended == id
            }
            _ => false,
        };
        let mut ends = self.nodes[node].events.iter().filter(|(_, event)| of(event));
        let end = ends.next();
        assert!(ends.next().is_none(), "{id} ended twice");
        end.map(|(at, event)| (*at, event))
    }

    pub(crate) fn error(&self, node: usize, id: TransferId) -> Option<&TransferError> {
        match self.end(node, id)?.1 {
            Event::Failed { error, .. } => Some(error),
            _ => None,
        }
    }

    pub(crate) fn completed(&self, node: usize, id: TransferId) -> bool {
        matches!(self.end(node, id), Some((_, Event::Completed { .. } | Event::Arrived { .. })))
    }

    pub(crate) fn saw(&self, node: usize, event: &Event) -> bool {
        self.nodes[node].events.iter().any(|(_, seen)| seen == event)
    }

    pub(crate) fn lost(&self, node: usize) -> usize {
        self.nodes[node].events.iter().filter(|(_, event)| matches!(event, Event::PeerLost { .. })).count()
    }

    pub(crate) fn fenced(&self, node: usize) -> Vec<kvferry_core::FenceProof> {
        let proof = |(_, event): &(u64, Event)| match event {
            Event::Fenced { proof, .. } => Some(*proof),
            _ => None,
        };
        self.nodes[node].events.iter().filter_map(proof).collect()
    }

    pub(crate) fn fill(&self, node: usize, byte: u8) {
        (0..BLOCKS).for_each(|block| self.nodes[node].pool.fill(0, block, byte).unwrap());
    }

    /// The first byte of every block.
    pub(crate) fn bytes(&self, node: usize) -> Vec<u8> {
        let read = |block| {
            let mut byte = [0];
            self.nodes[node].pool.read(0, block, 0, &mut byte).unwrap();
            byte[0]
        };
        (0..BLOCKS).map(read).collect()
    }

    /// How many blocks begin with that byte.
    pub(crate) fn count(&self, node: usize, byte: u8) -> usize {
        self.bytes(node).iter().filter(|seen| **seen == byte).count()
    }
}

/// Copies the blocks of one pool to those of another, in that order.
pub(crate) fn blocks(from: impl IntoIterator<Item = u32>, to: impl IntoIterator<Item = u32>) -> Arc<Program> {
    Arc::new(whole_blocks(1, 1, BLOCK_BYTES, from, to))
}
