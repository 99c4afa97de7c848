//! Engines that keep the rules, over hardware that keeps none: nothing is ever written where it must not be, every end ends once, and
//! when all is well again everything is over.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod bed;

use std::collections::BTreeMap;
use std::time::Duration;

use bed::{BLOCKS, Bed, LATENCY, Path, blocks, id, options};
use kvferry_core::{Direction, HandoverId, RequestId};
use kvferry_fabric_sim::{Delivery, FabricOptions, NicDeath, OnTheWire, Owner};
use kvferry_transport::{Event, Options, PeerId};

const NODES: usize = 4;
const SEEDS: u64 = 300;
const STEPS: u64 = 400;

struct Dice(u64);

impl Dice {
    fn below(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (word ^ (word >> 31)) % below
    }

    fn node(&mut self) -> usize {
        self.below(NODES as u64) as usize
    }
}

struct Handover {
    number: u64,
    source: usize,
    destination: usize,
    direction: Direction,
    from: Vec<u32>,
    to: Vec<u32>,
    /// The source, as its destination knows it.
    peer: PeerId,
    /// Waits for this fence.
    fencing: bool,
}

#[derive(Default)]
struct Seen {
    delivered: u64,
    failed: u64,
    fenced: u64,
    dropped: u64,
    died: u64,
}

struct Chaos {
    bed: Bed,
    dice: Dice,
    free: Vec<Vec<u32>>,
    paths: BTreeMap<(usize, usize), Path>,
    peers: BTreeMap<(usize, usize), PeerId>,
    under_way: Vec<Handover>,
    heard: Vec<usize>,
    numbers: u64,
    seen: Seen,
}

impl Chaos {
    fn new(seed: u64) -> Chaos {
        let mut dice = Dice(seed);
        let delivery = if dice.below(2) == 0 { Delivery::Ordered } else { Delivery::Unordered };
        let jitter = Duration::from_nanos(dice.below(30_000));
        let window = 1 + dice.below(6) as u32;
        let bed = Bed::watched(FabricOptions { seed, delivery, jitter, window, ..options() }, NODES);
        bed.fabric.fail_completions(dice.below(3) as u32 * 50_000);
        Chaos {
            bed,
            dice,
            free: vec![(0..BLOCKS).collect(); NODES],
            paths: BTreeMap::new(),
            peers: BTreeMap::new(),
            under_way: Vec::new(),
            heard: vec![0; NODES],
            numbers: 0,
            seen: Seen::default(),
        }
    }

    fn path(&mut self, from: usize, to: usize) -> Path {
        if let Some(path) = self.paths.get(&(from, to)) {
            return *path;
        }
        let path = self.bed.dial(from, to);
        self.paths.insert((from, to), path);
        self.peers.insert((from, to), path.peer);
        path
    }

    fn begin(&mut self) {
        let (source, destination) = (self.dice.node(), self.dice.node());
        let count = 1 + self.dice.below(6) as usize;
        let room = |free: &Vec<u32>| free.len() >= count;
        if source == destination || !room(&self.free[source]) || !room(&self.free[destination]) {
            return;
        }
        let mut take = |node: usize| {
            let free = &mut self.free[node];
            let at = self.dice.below((free.len() - count + 1) as u64) as usize;
            free.drain(at..at + count).collect::<Vec<u32>>()
        };
        let (from, to) = (take(source), take(destination));
        let direction = if self.dice.below(2) == 0 { Direction::Pull } else { Direction::Push };
        self.numbers += 1;
        let number = self.numbers;
        let fabric = self.bed.fabric.clone();
        fabric.claim(&self.bed.nodes[source].pool, 0, &from, Owner::Offer(RequestId(number)));
        fabric.claim(&self.bed.nodes[destination].pool, 0, &to, Owner::Handover(HandoverId(number)));
        let program = blocks(from.clone(), to.clone());
        let peer = self.path(destination, source).peer;
        let handover = Handover { number, source, destination, direction, from, to, peer, fencing: false };
        let (poster, named) = match direction {
            Direction::Pull => (destination, source),
            Direction::Push => (source, destination),
        };
        let path = self.path(poster, named);
        if direction == Direction::Push {
            self.bed.expect(destination, id(number), &program);
        }
        match self.bed.post(path, direction, id(number), &program) {
            Ok(()) => self.under_way.push(handover),
            Err(_) => {
                self.paths.remove(&(poster, named));
                if direction == Direction::Push {
                    // It stays expected until that is cancelled.
                    self.under_way.push(handover);
                } else {
                    self.finish(&handover);
                }
            }
        }
    }

    fn finish(&mut self, handover: &Handover) {
        let fabric = &self.bed.fabric;
        fabric.claim(&self.bed.nodes[handover.destination].pool, 0, &handover.to, Owner::Nobody);
        fabric.claim(&self.bed.nodes[handover.source].pool, 0, &handover.from, Owner::Nobody);
        self.free[handover.destination].extend(&handover.to);
        self.free[handover.source].extend(&handover.from);
    }

    /// What NICs have said since last time.
    fn listen(&mut self) {
        self.bed.poll();
        for node in 0..NODES {
            let events: Vec<Event> =
                self.bed.nodes[node].events[self.heard[node]..].iter().map(|(_, event)| event.clone()).collect();
            self.heard[node] += events.len();
            for event in events {
                match event {
                    Event::PeerLost { peer, .. } => {
                        self.paths.retain(|(from, _), path| *from != node || path.peer != peer)
                    }
                    Event::Fenced { .. } => {
                        self.seen.fenced += 1;
                        // All that was fenced has failed before.
                        assert!(!self.under_way.iter().any(|h| h.destination == node && h.fencing), "not yet ended");
                    }
                    Event::Completed { id, .. } | Event::Arrived { id, .. } => self.ended(node, id.handover().0, true),
                    Event::Failed { id, .. } => self.ended(node, id.handover().0, false),
                    _ => {}
                }
            }
        }
    }

    fn ended(&mut self, node: usize, number: u64, good: bool) {
        let Some(at) = self.under_way.iter().position(|h| h.number == number && h.destination == node) else { return };
        let handover = self.under_way.swap_remove(at);
        let pool = self.bed.nodes[node].pool.clone();
        if good {
            self.seen.delivered += 1;
            self.bed.fabric.delivered(&pool, 0, &handover.to, HandoverId(number), RequestId(number));
        } else {
            self.seen.failed += 1;
        }
        self.finish(&handover);
    }

    fn fence(&mut self, destination: usize, source: usize) {
        let peer = self.peers.get(&(destination, source)).copied();
        let peer = peer.unwrap_or_else(|| self.path(destination, source).peer);
        self.paths.remove(&(destination, source));
        for handover in &mut self.under_way {
            // What nobody has met belongs to no peer.
            let touched = self.bed.fabric.in_flight_to(HandoverId(handover.number)) > 0;
            // A source that has died since is another peer, and lost in any case.
            let other = handover.direction == Direction::Push || handover.from.is_empty();
            handover.fencing |= handover.destination == destination && handover.source == source && !other && touched;
        }
        self.bed.transport(destination).fence(peer);
    }

    fn misbehave(&mut self) {
        let (node, other) = (self.dice.node(), self.dice.node());
        let (nic, remote) = (self.bed.nodes[node].nic, self.bed.nodes[other].nic);
        match self.dice.below(9) {
            0 => self.bed.fabric.kill(nic, NicDeath::Error),
            1 => self.bed.fabric.kill(nic, NicDeath::BlackHole),
            2 | 3 => self.bed.fabric.revive(nic),
            4 => self.bed.fabric.cut(nic, remote, true),
            5 | 6 => self.bed.fabric.cut(nic, remote, false),
            7 => self.bed.fabric.slow(nic, 1 + self.dice.below(4) as u32),
            _ => {
                let wire = if self.dice.below(2) == 0 { OnTheWire::Lands } else { OnTheWire::Lost };
                self.reopen(node, wire);
            }
        }
    }

    /// The process dies, and its next incarnation comes with new memory.
    fn reopen(&mut self, node: usize, wire: OnTheWire) {
        self.seen.died += 1;
        self.bed.fabric.process_died(self.bed.nodes[node].nic, wire);
        self.bed.nodes[node].transport = None;
        self.bed.open(Options::default());
        let fresh = self.bed.nodes.pop().unwrap();
        self.bed.nodes[node] = fresh;
        let pool = &self.bed.nodes[node].pool;
        self.bed.fabric.incarnate(pool, kvferry_core::Epoch(2), std::slice::from_ref(&(0..1)));
        self.heard[node] = 0;
        self.paths.retain(|(from, to), _| *from != node && *to != node);
        self.peers.retain(|(from, to), _| *from != node && *to != node);
        // What it held is gone; what others hold for it is theirs to end.
        let (gone, left) = std::mem::take(&mut self.under_way).into_iter().partition(|h| h.destination == node);
        self.under_way = left;
        for handover in gone {
            let _: &Handover = &handover;
            self.bed.fabric.claim(&self.bed.nodes[handover.source].pool, 0, &handover.from, Owner::Nobody);
            self.free[handover.source].extend(&handover.from);
        }
        self.free[node] = (0..BLOCKS).collect();
        for handover in &mut self.under_way {
            if handover.source == node {
                handover.from.clear();
            }
        }
    }

    fn step(&mut self) {
        match self.dice.below(20) {
            0..=9 => self.begin(),
            10 | 11 => self.misbehave(),
            12 => {
                let (destination, source) = (self.dice.node(), self.dice.node());
                if destination != source {
                    self.fence(destination, source);
                }
            }
            13 | 14 => {
                let at = self.dice.below(self.under_way.len().max(1) as u64) as usize;
                if let Some((node, number)) = self.under_way.get(at).map(|h| (h.destination, h.number)) {
                    self.bed.transport(node).cancel(id(number));
                }
            }
            _ => {}
        }
        let nanos = self.dice.below(8 * LATENCY);
        self.bed.pass(nanos);
        self.listen();
    }

    fn heal(&mut self) {
        self.bed.fabric.fail_completions(0);
        let nics: Vec<_> = self.bed.nodes.iter().map(|node| node.nic).collect();
        for nic in &nics {
            self.bed.fabric.revive(*nic);
            nics.iter().for_each(|other| self.bed.fabric.cut(*nic, *other, false));
        }
        self.bed.run();
        self.listen();
        // Only pushes whose writer went away are left: they end when they are given up.
        for (node, number) in self.under_way.iter().map(|h| (h.destination, h.number)).collect::<Vec<_>>() {
            self.bed.transport(node).cancel(id(number));
        }
        self.bed.run();
        self.listen();
        for (node, peer) in self.under_way.iter().map(|h| (h.destination, h.peer)).collect::<Vec<_>>() {
            self.bed.transport(node).fence(peer);
        }
        self.bed.run();
        self.listen();
    }
}

#[test]
fn engines_that_keep_the_rules_are_safe() {
    let mut all = Seen::default();
    for seed in 0..SEEDS {
        let run = || {
            let mut chaos = Chaos::new(seed);
            for _ in 0..STEPS {
                chaos.step();
                let found = chaos.bed.fabric.take_violations();
                assert!(found.is_empty(), "seed {seed}: {found:?}");
            }
            chaos.heal();
            let left: Vec<u64> = chaos.under_way.iter().map(|h| h.number).collect();
            assert!(left.is_empty(), "seed {seed}: never ended: {left:?}");
            assert_eq!(chaos.bed.fabric.in_flight(), 0, "seed {seed}");
            for node in &chaos.bed.nodes {
                let stats = chaos.bed.fabric.stats(node.nic);
                assert_eq!((stats.in_flight_in, stats.in_flight_out), (0, 0), "seed {seed}");
                chaos.seen.dropped += stats.slices_dropped;
            }
            assert_eq!(chaos.bed.fabric.take_violations(), [], "seed {seed}");
            (chaos.bed.fabric.digest(), chaos.seen)
        };
        let (digest, seen) = run();
        if seed % 10 == 0 {
            assert_eq!(digest, run().0, "seed {seed} differs from itself");
        }
        all.delivered += seen.delivered;
        all.failed += seen.failed;
        all.fenced += seen.fenced;
        all.dropped += seen.dropped;
        all.died += seen.died;
    }
    let Seen { delivered, failed, fenced, dropped, died } = all;
    println!("{delivered} delivered, {failed} failed, {fenced} fenced, {dropped} dropped, {died} died");
    assert!(delivered > 1000 && failed > 1000 && fenced > 100 && dropped > 10 && died > 20);
}
