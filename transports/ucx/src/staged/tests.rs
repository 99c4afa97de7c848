//! Pools that only a device touches: ends that wait for what is under way, links that die, copies that fail, peers that stand still or cheat.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::{Direction, End, Grade, PoolId, Program, TransferId};
use kvferry_transport::conformance::{Faults, OnDevice, absent, block_planes, whole_blocks};
use kvferry_transport::{
    Event, Evidence, Expected, Options, PackedBy, PeerId, Pool, PoolKeys, Provider, RemotePool, Stage, Transfer,
    TransferError, Transport,
};

use crate::UcxProvider;
use crate::link::CREDITS;
use crate::transport::UcxTransport;
use crate::wire::PARCEL_BYTES_MAX;

const BLOCKS: u32 = 64;
const BLOCK_BYTES: u64 = 4096;
/// No step takes longer on any machine that works.
const TIMELY: Duration = Duration::from_secs(60);

/// Over which device, and how chunks come.
type Way = (&'static str, PackedBy);
const WAYS: [Way; 2] = [("lo", PackedBy::Message), ("memory", PackedBy::Read)];

fn usable() -> bool {
    let Some(reason) = UcxProvider::unavailable() else { return true };
    absent("ucx", &reason);
    false
}

fn all(_: PoolId) -> bool {
    true
}

/// A transport with a pool, which may be in a device's memory.
struct Party {
    transport: UcxTransport,
    pool: Pool,
    keys: PoolKeys,
    events: Vec<Event>,
    faults: Faults,
}

impl Party {
    fn new((device, by): Way, pool: u32, planes: u32, chunks: Option<(usize, u32)>) -> Party {
        let (bytes, count) = chunks.unwrap_or((8 << 10, 8));
        let provider = UcxProvider::new().packed(by, u64::MAX);
        let found = provider.named(device).unwrap();
        let options = Options { staged_chunk_bytes: bytes, staged_chunks: count, ..Options::default() };
        let mut transport = provider.opened(&found, &options).unwrap();
        let memory = OnDevice::new(provider, all, bytes, count);
        let layout = block_planes(planes, BLOCKS, BLOCK_BYTES);
        let pool = if chunks.is_some() {
            memory.allocate(&found, PoolId(pool), layout, "staged").unwrap()
        } else {
            Pool::allocate(PoolId(pool), layout, "staged").unwrap()
        };
        let keys = transport.bind(&pool).unwrap();
        Party { transport, pool, keys, events: Vec::new(), faults: memory.faults().clone() }
    }

    fn poll(&mut self) {
        self.transport.poll(&mut self.events);
    }

    fn places(&self) -> impl Iterator<Item = (u32, u32)> + use<> {
        let planes = self.pool.layout().planes.len() as u32;
        (0..planes).flat_map(|plane| (0..BLOCKS).map(move |block| (plane, block)))
    }

    fn fill(&self) {
        self.places().for_each(|(plane, block)| self.pool.write(plane, block, 0, &pattern(plane, block)).unwrap());
    }

    /// Checks that a transfer from a filled pool is here.
    fn verify(&self) {
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        for (plane, block) in self.places() {
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
        self.places().map(read).collect()
    }

    fn program(&self) -> Arc<Program> {
        let planes = self.pool.layout().planes.len() as u32;
        Arc::new(whole_blocks(planes, 4, BLOCK_BYTES, 0..BLOCKS, (0..BLOCKS).rev()))
    }

    fn reach(&mut self, other: &Party) -> (PeerId, RemotePool) {
        let peer = self.transport.connect(&other.transport.address()).unwrap();
        let remote = self.transport.import(peer, &other.keys, other.pool.layout()).unwrap();
        (peer, remote)
    }

    fn post(&mut self, number: u128, direction: Direction, (peer, remote): (PeerId, RemotePool)) -> TransferId {
        let (id, program, local) = (TransferId(number), self.program(), self.pool.id());
        let range = program.whole();
        self.transport.post(Transfer { id, peer, direction, local, remote, program, range, notice: None }).unwrap();
        id
    }

    fn expect(&mut self, number: u128) {
        let (id, program, pool) = (TransferId(number), self.program(), self.pool.id());
        let range = program.whole();
        self.transport.expect(Expected { from: None, id, pool, program, range }).unwrap();
    }

    fn any(&self, is_it: impl Fn(&Event) -> bool) -> bool {
        self.events.iter().any(is_it)
    }

    fn failed(&self, id: TransferId) -> bool {
        self.any(|event| matches!(event, Event::Failed { id: ended, .. } if *ended == id))
    }

    fn done(&self, id: TransferId) -> bool {
        self.any(|event| matches!(event, Event::Completed { id: of, .. } | Event::Arrived { id: of, .. } if *of == id))
    }

    fn ended(&self, id: TransferId) -> bool {
        self.failed(id) || self.done(id)
    }

    fn stage(&self) -> Stage {
        self.transport.pools.get(&self.pool.id()).unwrap().stage.clone().unwrap()
    }

    fn link(&self) -> u64 {
        *self.transport.links.keys().next().unwrap()
    }

    fn shown(&self) -> &Evidence {
        let mut shown = Vec::new();
        for event in &self.events {
            if let Event::Shown { evidence, .. } = event {
                shown.push(evidence);
            }
        }
        shown.pop().unwrap()
    }
}

fn pattern(plane: u32, block: u32) -> Vec<u8> {
    let seed = plane.wrapping_mul(977).wrapping_add(block.wrapping_mul(31));
    (0..BLOCK_BYTES as u32).map(|byte| (seed.wrapping_add(byte).wrapping_mul(0x9e37_79b9) >> 23) as u8).collect()
}

fn until(parties: &mut [&mut Party], what: &str, mut done: impl FnMut(&[&mut Party]) -> bool) {
    let start = Instant::now();
    while !done(parties) {
        let said: Vec<_> = parties.iter().map(|party| &party.events).collect();
        assert!(start.elapsed() < TIMELY, "waited in vain: {what}; {said:?}");
        parties.iter_mut().for_each(|party| party.poll());
    }
}

fn is_connected(event: &Event) -> bool {
    matches!(event, Event::Connected { .. })
}

/// How a transfer into a device's memory is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Cancel,
    Fence,
    Disconnect,
    Unbind,
    /// As where the device of the link fails.
    LinkDies,
    /// As where the peer breaks the rules, and at its own end.
    PeerLeaves,
}

const ENDINGS: [Ending; 6] =
    [Ending::Cancel, Ending::Fence, Ending::Disconnect, Ending::Unbind, Ending::LinkDies, Ending::PeerLeaves];

#[test]
fn no_end_is_told_while_a_copy_touches_the_pool() {
    if !usable() {
        return;
    }
    for way in WAYS {
        for direction in [Direction::Pull, Direction::Push] {
            for round in 0..36 {
                ends_untouched(way, direction, ENDINGS[round % 6], round);
            }
        }
    }
}

/// Ends a transfer after some polls; nothing may be written once that was told.
fn ends_untouched(way: Way, direction: Direction, ending: Ending, round: usize) {
    let mut source = Party::new(way, 1, 8, Some((8 << 10, 8)));
    let mut destination = Party::new(way, 2, 8, Some((8 << 10, 8)));
    source.fill();
    let id = match direction {
        Direction::Pull => {
            let to = destination.reach(&source);
            destination.post(1, Direction::Pull, to)
        }
        Direction::Push => {
            let to = source.reach(&destination);
            destination.expect(1);
            source.post(1, Direction::Push, to)
        }
    };
    until(&mut [&mut source, &mut destination], "both are connected", |parties| {
        parties.iter().all(|party| party.any(is_connected))
    });
    let told = |party: &Party| party.transport.sessions.keys().next().copied();
    let peer = told(&destination).unwrap();
    let stage = destination.stage();
    let is_under_way = |destination: &Party| destination.ended(id) || stage.is_busy().0;
    until(&mut [&mut source, &mut destination], "copies are under way", |parties| is_under_way(parties[1]));
    for _ in 0..round / 6 * 3 {
        source.poll();
        destination.poll();
    }
    let pool = destination.pool.id();
    match ending {
        Ending::Cancel => destination.transport.cancel(id),
        Ending::Fence => destination.transport.fence(peer),
        Ending::Disconnect => destination.transport.disconnect(peer),
        Ending::Unbind => destination.transport.unbind(pool),
        Ending::LinkDies => {
            let link = destination.link();
            destination.transport.lose_link(link, "its device failed");
        }
        Ending::PeerLeaves => {
            let peer = told(&source).unwrap();
            source.transport.disconnect(peer);
        }
    }
    let said = |party: &Party| match ending {
        Ending::Fence => party.any(|event| matches!(event, Event::Fenced { .. })),
        Ending::Unbind => party.any(|event| *event == Event::Unbound { pool }),
        _ => true,
    };
    // The source moves, too, for what its own end of it still does.
    until(&mut [&mut source, &mut destination], "it ends", |parties| parties[1].ended(id) && said(parties[1]));
    // Nothing is written any more: a copy of this device writes at its very end.
    destination.places().for_each(|(plane, block)| destination.pool.fill(plane, block, 0xee).unwrap());
    let still = destination.snapshot();
    for _ in 0..60 {
        destination.poll();
        source.poll();
    }
    assert!(destination.snapshot() == still, "{way:?}, {direction:?}, {ending:?}, round {round}");
    if ending != Ending::Unbind {
        until(&mut [&mut destination], "every slot is free", |_| {
            (stage.left(End::Source), stage.left(End::Destination)) == (4, 4)
        });
    }
}

#[test]
fn a_copy_that_fails_fails_its_transfer_only() {
    if !usable() {
        return;
    }
    for way in WAYS {
        for direction in [Direction::Pull, Direction::Push] {
            for side in [0, 1] {
                fails_alone(way, direction, side);
            }
        }
    }
}

fn fails_alone(way: Way, direction: Direction, side: usize) {
    let mut source = Party::new(way, 1, 4, Some((8 << 10, 8)));
    let mut destination = Party::new(way, 2, 4, Some((8 << 10, 8)));
    source.fill();
    let to = match direction {
        Direction::Pull => destination.reach(&source),
        Direction::Push => source.reach(&destination),
    };
    [&source, &destination][side].faults.after(5);
    for (number, fails) in [(1, true), (2, false)] {
        let id = match direction {
            Direction::Pull => destination.post(number, direction, to),
            Direction::Push => {
                destination.expect(number);
                source.post(number, direction, to)
            }
        };
        until(&mut [&mut source, &mut destination], "the transfer ends", |parties| {
            parties[1].ended(id) && (direction == Direction::Pull || parties[0].ended(id))
        });
        assert_eq!(destination.failed(id), fails, "{way:?}, {direction:?}: {:?}", destination.events);
        assert!(direction == Direction::Pull || source.failed(id) == fails, "{:?}", source.events);
    }
    let said = |event: &Event| match event {
        Event::Failed { error: TransferError::Io { message, .. }, .. } => message == "the test says so",
        _ => false,
    };
    // A pull's source has nobody to tell but its peer.
    assert!([&source, &destination][side].any(said) || (direction == Direction::Pull && side == 0));
    let lost = |event: &Event| matches!(event, Event::PeerLost { .. });
    assert!(!source.any(lost) && !destination.any(lost), "{way:?}, {direction:?}");
    destination.verify();
}

/// They ask for more than any window and then take nothing, so that what they are owed waits. With one slot for each direction.
#[test]
fn peers_that_stand_still_keep_no_slot_that_another_needs() {
    if !usable() {
        return;
    }
    for way in WAYS {
        let mut source = Party::new(way, 1, 16, Some((8 << 10, 2)));
        source.fill();
        let mut still: Vec<Party> = (2..5).map(|pool| Party::new(way, pool, 16, None)).collect();
        for party in &mut still {
            let to = party.reach(&source);
            until(&mut [&mut source, party], "it is connected", |parties| parties[1].any(is_connected));
            party.post(1, Direction::Pull, to);
            party.poll();
        }
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(50) {
            source.poll();
        }
        let mut reader = Party::new(way, 9, 16, None);
        let to = reader.reach(&source);
        let id = reader.post(1, Direction::Pull, to);
        until(&mut [&mut source, &mut reader], "the pull", |parties| parties[1].done(id));
        reader.verify();
        // What they were owed was not lost.
        for party in &mut still {
            until(&mut [&mut source, party], "a late reader", |parties| parties[1].done(TransferId(1)));
            party.verify();
        }
    }
}

/// A chunk that was filled for a peer to read, whose staging is full by then, goes as messages instead.
#[test]
fn chunks_are_cut_anew_where_nothing_is_left_to_read_them_from() {
    if !usable() {
        return;
    }
    let way = ("memory", PackedBy::Read);
    let mut source = Party::new(way, 1, 16, Some((PARCEL_BYTES_MAX, 8)));
    let mut destination = Party::new(way, 2, 16, None);
    source.fill();
    let to = destination.reach(&source);
    until(&mut [&mut source, &mut destination], "it is connected", |parties| parties[1].any(is_connected));
    let link = source.link();
    if source.transport.links.get(&link).unwrap().depot.is_none() {
        // An old library, or a bare container: nothing is read.
        return;
    }
    let id = destination.post(1, Direction::Pull, to);
    destination.poll();
    let is_ahead = |source: &Party| source.transport.links.get(&link).unwrap().outgoing.staged.ahead().count() > 0;
    until(&mut [&mut source], "a chunk is being filled", |parties| is_ahead(parties[0]));
    let depot = source.transport.links.get_mut(&link).unwrap().depot.as_mut().unwrap();
    // As where a peer gives credits back without the buffers.
    while let Some(idle) = depot.idle() {
        depot.put(idle, &[0; 9000]).unwrap();
    }
    until(&mut [&mut source, &mut destination], "the pull", |parties| parties[1].done(id));
    destination.verify();
    let depot = source.transport.links.get(&link).unwrap().depot.as_ref().unwrap();
    assert!(depot.idle_count() < CREDITS as usize, "they are still the peer's");
}

#[test]
fn what_goes_by_way_of_a_stage_is_shown_as_that_at_both_ends() {
    if !usable() {
        return;
    }
    for way in WAYS {
        for is_ours in [false, true] {
            let chunks = |is_staged: bool| is_staged.then_some((8 << 10, 8));
            let mut source = Party::new(way, 1, 1, chunks(!is_ours));
            let mut destination = Party::new(way, 2, 1, chunks(is_ours));
            source.fill();
            let to = destination.reach(&source);
            let id = destination.post(1, Direction::Pull, to);
            until(&mut [&mut source, &mut destination], "the pull", |parties| parties[1].done(id));
            destination.verify();
            let shown = destination.shown();
            assert_eq!(shown.grade, Grade::E3, "{way:?}: {shown}");
            // Where no pool is registered there is no telling where the peer's is.
            let knows = is_ours || way.0 == "memory";
            assert_eq!(destination.shown().staged, knows, "{way:?}, {is_ours}");
            let said = destination.shown().to_string().contains("staged through page-locked host memory");
            assert_eq!(said, is_ours, "{way:?}: {}", destination.shown());
        }
    }
}

/// No peer is told where a device's memory is, and what one says of it is not believed.
#[test]
fn keys_of_a_device_s_pool_say_nothing_that_could_be_read() {
    if !usable() {
        return;
    }
    let party = Party::new(("memory", PackedBy::Auto), 1, 2, Some((8 << 10, 8)));
    let bound = party.transport.pools.get(&party.pool.id()).unwrap();
    assert!(bound.mapped.is_none() && !bound.keys.are_readable());
    assert!(bound.keys.regions.iter().all(|region| region.base == 0 && region.rkey.is_empty()));
    assert_eq!(bound.keys.regions.iter().map(|region| region.bytes).collect::<Vec<_>>(), party.pool.layout().regions);
}
