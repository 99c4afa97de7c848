use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::{Direction, PoolId, TransferId};
use kvferry_transport::conformance::{absent, block_planes, whole_blocks};
use kvferry_transport::{
    Event, Expected, Options, PeerId, Pool, PoolOptions, Provider, RemotePool, Transfer, Transport,
};
use ucx_sys::UCS_ERR_IO_ERROR;

use super::*;
use crate::UcxProvider;
use crate::device::{MEMORY, Method};

const BLOCKS: u32 = 1024;
const BLOCK_BYTES: u64 = 4 << 10;
const TIMELY: Duration = Duration::from_secs(20);

fn open(by: PackedBy) -> Option<UcxTransport> {
    if let Some(reason) = UcxProvider::unavailable() {
        absent("ucx", &reason);
        return None;
    }
    let provider = UcxProvider::new().packed(by, u64::MAX);
    let options = Options { poll_bytes_max: 1 << 20, ..Options::default() };
    Some(provider.opened(&provider.named(MEMORY)?, &options).unwrap())
}

/// `here` has connected to `there`; each has a pool.
struct Pair {
    here: UcxTransport,
    there: UcxTransport,
    peer: PeerId,
    remote: RemotePool,
    ours: Pool,
    theirs: Pool,
    events: [Vec<Event>; 2],
}

impl Pair {
    /// None where no memory is read here: an old library, a bare container.
    fn new(ours: PackedBy, theirs: PackedBy) -> Option<Pair> {
        let (mut here, mut there) = (open(ours)?, open(theirs)?);
        let pool = |id| {
            let options = PoolOptions { huge_pages: false, ..PoolOptions::default() };
            Pool::allocate_with(PoolId(id), block_planes(1, BLOCKS, BLOCK_BYTES), "collecting", &options).unwrap()
        };
        let (ours, theirs) = (pool(1), pool(2));
        here.bind(&ours).unwrap();
        let keys = there.bind(&theirs).unwrap();
        let peer = here.connect(&there.address()).unwrap();
        let remote = here.import(peer, &keys, theirs.layout()).unwrap();
        let mut pair = Pair { here, there, peer, remote, ours, theirs, events: [Vec::new(), Vec::new()] };
        let connected = |events: &[Event]| events.iter().any(|event| matches!(event, Event::Connected { .. }));
        pair.until(|pair| pair.events.iter().all(|events| connected(events)));
        let link = pair.link();
        if !pair.here.reads_memory(link) {
            // 1.13's lanes cannot; of a later one that is a container's doing, and not CI's.
            if UcxProvider::version().is_some_and(|version| version >= (1, 14, 0)) {
                absent("ucx", "UCX reads no memory of another process here");
            }
            return None;
        }
        // Each end waits for the other's answer.
        pair.until(|pair| [&pair.here, &pair.there].iter().all(|end| end.links.values().all(|l| l.warmth.is_whole())));
        Some(pair)
    }

    fn link(&self) -> u64 {
        self.here.sessions.get(&self.peer).unwrap().link
    }

    fn poll(&mut self) {
        self.here.poll(&mut self.events[0]);
        self.there.poll(&mut self.events[1]);
    }

    fn until(&mut self, is_it: impl Fn(&Pair) -> bool) {
        let until = Instant::now() + TIMELY;
        while !is_it(self) && Instant::now() < until {
            self.poll();
        }
        assert!(is_it(self), "{:?}", self.events);
    }

    fn post(&mut self, number: u128, direction: Direction) {
        let (id, program) =
            (TransferId(number), Arc::new(whole_blocks(1, 16, BLOCK_BYTES, 0..BLOCKS, (0..BLOCKS).rev())));
        let (peer, remote, local, range) = (self.peer, self.remote, self.ours.id(), program.whole());
        if direction == Direction::Push {
            let expected = Expected { from: None, id, pool: self.theirs.id(), program: program.clone(), range };
            self.there.expect(expected).unwrap();
        }
        self.here.post(Transfer { id, peer, direction, local, remote, program, range, notice: None }).unwrap();
    }

    /// One transfer of every block, checked.
    fn run(&mut self, number: u128, direction: Direction) {
        let (source, destination) = match direction {
            Direction::Pull => (&self.theirs, &self.ours),
            Direction::Push => (&self.ours, &self.theirs),
        };
        let (source, destination, salt) = (source.clone(), destination.clone(), number as u8);
        (0..BLOCKS).for_each(|block| source.fill(0, block, salt.wrapping_add(block as u8)).unwrap());
        self.post(number, direction);
        let id = TransferId(number);
        self.until(|pair| {
            pair.events[0].iter().any(|event| matches!(event, Event::Completed { id: of, .. } if *of == id))
        });
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        for block in 0..BLOCKS {
            destination.read(0, block, 0, &mut bytes).unwrap();
            let wanted = salt.wrapping_add((BLOCKS - 1 - block) as u8);
            assert!(bytes.iter().all(|byte| *byte == wanted), "{direction:?}, block {block}");
        }
    }

    /// A pull whose chunks `there` has named, and `here` has not heard of.
    fn named(&mut self) {
        (0..BLOCKS).for_each(|block| self.theirs.fill(0, block, 7).unwrap());
        self.post(1, Direction::Pull);
        let until = Instant::now() + TIMELY;
        // Its request goes out; then only its source moves.
        self.here.poll(&mut self.events[0]);
        let lent = |pair: &Pair| pair.there.links.values().any(|link| link.depot.as_ref().unwrap().idle() != Some(0));
        while !lent(self) && Instant::now() < until {
            self.there.poll(&mut self.events[1]);
        }
        assert!(lent(self), "nothing was named");
    }
}

fn ends_of(pair: &Pair) -> [&crate::link::Link; 2] {
    [&pair.here, &pair.there].map(|end| end.links.values().next().unwrap())
}

#[test]
fn packed_chunks_are_read_both_ways_and_their_buffers_come_back() {
    let Some(mut pair) = Pair::new(PackedBy::Read, PackedBy::Read) else { return };
    for (number, direction) in [(1, Direction::Pull), (2, Direction::Push), (3, Direction::Pull), (4, Direction::Push)]
    {
        pair.here.links.values_mut().chain(pair.there.links.values_mut()).for_each(|link| link.moved = None);
        pair.run(number, direction);
        let [here, there] = ends_of(&pair);
        let destination = if direction == Direction::Pull { here } else { there };
        assert_eq!(destination.moved, Some(Way::Read), "{direction:?}: nothing was read");
    }
    let whole = |link: &crate::link::Link| {
        link.outgoing.credits == CREDITS
            && link.supply.as_ref().is_some_and(|supply| supply.borrowed.is_whole())
            && link.depot.as_ref().is_some_and(Depot::is_whole)
            && link.collecting == 0
    };
    pair.until(|pair| ends_of(pair).into_iter().all(whole));
    let link = pair.link();
    let words = pair.here.evidence(link).unwrap().to_string();
    assert!(
        words.contains("packed chunks are read 1 MiB at a time (rma_bw#) here, at the peer they are read"),
        "{words}"
    );
}

#[test]
fn either_end_can_have_them_sent() {
    for (ours, theirs) in
        [(PackedBy::Message, PackedBy::Read), (PackedBy::Read, PackedBy::Message), (PackedBy::Auto, PackedBy::Auto)]
    {
        let Some(mut pair) = Pair::new(ours, theirs) else { return };
        pair.run(1, Direction::Pull);
        pair.run(2, Direction::Push);
        for link in ends_of(&pair) {
            assert!(link.supply.is_none() && link.depot.is_none() && link.moved.is_none(), "{ours} {theirs}");
        }
    }
}

/// Its sessions were over when it was asked: the next one answers.
#[test]
fn who_asked_when_nobody_stood_is_answered_by_the_next_session() {
    let Some(mut pair) = Pair::new(PackedBy::Read, PackedBy::Read) else { return };
    let (link, theirs) = (pair.link(), *pair.there.links.keys().next().unwrap());
    pair.here.links.get_mut(&link).unwrap().supply = None;
    pair.there.links.get_mut(&theirs).unwrap().depot = None;
    for session in pair.there.sessions.keys().copied().collect::<Vec<_>>() {
        pair.there.lose_session(session, "over");
    }
    pair.here.ask_for_staging(link);
    assert!(pair.here.links.get(&link).unwrap().warmth.asking);
    pair.until(|pair| ends_of(pair)[1].owes_staging);
    let begun = Instant::now();
    pair.events[0].clear();
    pair.here.connect(&pair.there.address()).unwrap();
    let connected = |event: &Event| matches!(event, Event::Connected { .. });
    pair.until(|pair| pair.events[0].iter().any(connected));
    assert!(begun.elapsed() < Duration::from_secs(3), "it waited for an answer that nobody owed any more");
    assert!(ends_of(&pair)[0].supply.is_some() && ends_of(&pair)[1].depot.is_some());
}

/// Of a budget that does not allow them: chunks are sent, and nothing is lost.
#[test]
fn without_staging_they_are_sent() {
    let Some(mut pair) = Pair::new(PackedBy::Read, PackedBy::Read) else { return };
    let (link, theirs) = (pair.link(), *pair.there.links.keys().next().unwrap());
    pair.here.links.get_mut(&link).unwrap().supply = None;
    pair.there.links.get_mut(&theirs).unwrap().depot = None;
    let left = pair.there.options.staging_bytes_max - pair.there.staging.budget().taken();
    let taken = pair.there.staging.budget().take(left);
    assert!(taken.is_some());
    pair.here.ask_for_staging(link);
    pair.until(|pair| ends_of(pair)[0].warmth.is_whole());
    assert!(ends_of(&pair)[0].supply.is_none() && ends_of(&pair)[1].depot.is_none());
    pair.run(1, Direction::Pull);
}

#[test]
fn what_peers_say_of_staging_is_checked_and_ends_their_link_only() {
    type Breach = fn(&mut Pair, u64) -> Result<(), String>;
    let breaches: [(&str, Breach); 10] = [
        ("nobody asked for", |pair, link| pair.here.on_staged(link, &encode(&Staged { staging: None }))),
        ("are due", |pair, link| staged(pair, link, |region| region.bytes -= 1)),
        ("are due", |pair, link| staged(pair, link, |region| region.rkey.clear())),
        ("no address", |pair, link| staged(pair, link, |region| region.base = u64::MAX)),
        ("key is cut", |pair, link| staged(pair, link, |region| region.rkey.truncate(8))),
        ("its staging has not", |pair, link| parcel(pair, link, CREDITS, 1)),
        ("its staging has not", |pair, link| parcel(pair, link, 0, 0)),
        ("its staging has not", |pair, link| parcel(pair, link, 0, PARCEL_BYTES_MAX as u32 + 1)),
        ("was not given back", |pair, link| parcel(pair, link, 3, 9).and_then(|()| parcel(pair, link, 3, 9))),
        ("was not shown", |pair, link| {
            pair.here.links.get_mut(&link).unwrap().supply = None;
            parcel(pair, link, 0, 1)
        }),
    ];
    for (words, breach) in breaches {
        let Some(mut pair) = Pair::new(PackedBy::Read, PackedBy::Read) else { return };
        let link = pair.link();
        let reason = breach(&mut pair, link).unwrap_err();
        assert!(reason.contains(words), "{reason:?} says nothing of {words:?}");
        assert_eq!(pair.here.links.get(&link).unwrap().collecting, 0, "{words}: it was read");
    }
    let Some(mut pair) = Pair::new(PackedBy::Read, PackedBy::Read) else { return };
    let link = pair.link();
    assert!(pair.here.on_ask(link).unwrap_err().contains("a second time"));
    let here = pair.here.sessions.get(&pair.peer).unwrap().here;
    pair.here.message(Header { kind: Kind::Credit, number: 0, session: here, tag: 1 }, Vec::new());
    let lost = |event: &Event| matches!(event, Event::PeerLost { reason, .. } if reason.contains("not told of"));
    pair.until(|pair| pair.events[0].iter().any(lost));
}

fn staged(pair: &mut Pair, link: u64, change: impl Fn(&mut RegionKey)) -> Result<(), String> {
    let mut region = pair.there.links.values().next().unwrap().depot.as_ref().unwrap().key().clone();
    change(&mut region);
    pair.here.links.get_mut(&link).unwrap().warmth.asking = true;
    pair.here.on_staged(link, &encode(&Staged { staging: Some(region) }))
}

/// Of a transfer that nobody waits for.
fn parcel(pair: &mut Pair, link: u64, buffer: u32, bytes: u32) -> Result<(), String> {
    let session = pair.here.sessions.get(&pair.peer).unwrap().here;
    let header = Header { kind: Kind::PullParcel, number: 0, session, tag: 99 };
    pair.here.on_parcel(link, header, &encode(&Parcel { buffer, bytes }))
}

/// Every byte of a key changed, as far as UCX sees them: refused, or harmless.
#[test]
fn changed_keys_of_staging_do_no_harm() {
    let Some(mut pair) = Pair::new(PackedBy::Read, PackedBy::Read) else { return };
    let link = pair.link();
    let bytes = pair.there.links.values().next().unwrap().depot.as_ref().unwrap().key().rkey.len();
    for (at, bit) in (0..bytes).flat_map(|at| [(at, 1), (at, 0x80)]) {
        let _refused_or_not = staged(&mut pair, link, |region| region.rkey[at] ^= bit);
    }
}

/// Chunks of a transfer that has ended, or never was, free their places and are not read.
#[test]
fn what_nobody_waits_for_is_given_back_unread() {
    let Some(mut pair) = Pair::new(PackedBy::Read, PackedBy::Read) else { return };
    let link = pair.link();
    pair.named();
    pair.here.cancel(TransferId(1));
    pair.until(|pair| ends_of(pair)[1].outgoing.credits == CREDITS);
    assert_eq!(ends_of(&pair)[1].depot.as_ref().unwrap().idle(), Some(0));
    assert_eq!(pair.here.links.get(&link).unwrap().moved, None);
    pair.run(2, Direction::Pull);
}

/// Its source has lost the link and lives on, with other things where the chunk was.
#[test]
fn a_chunk_of_a_link_that_its_source_has_lost_is_never_delivered_as_something_else() {
    let Some(mut pair) = Pair::new(PackedBy::Read, PackedBy::Read) else { return };
    pair.named();
    let (theirs, base) = {
        let (id, link) = pair.there.links.iter().next().unwrap();
        (*id, link.depot.as_ref().unwrap().key().base)
    };
    pair.there.lose_link(theirs, "lost");
    // Memory that the kernel would put into the hole.
    let fill = |_| {
        let options = PoolOptions { huge_pages: true, ..PoolOptions::default() };
        let pool = Pool::allocate_private(PoolId(9), block_planes(1, 8, 1 << 20), &options).unwrap();
        (0..8).for_each(|block| pool.fill(0, block, 0xee).unwrap());
        pool
    };
    let others: Vec<Pool> = (0..4).map(fill).collect();
    let near = |pool: &Pool| (pool.regions()[0].base() as u64).abs_diff(base) < DEPOT_BYTES;
    assert!(!others.iter().any(near), "its addresses were used again");
    let over = |event: &Event| matches!(event, Event::Failed { .. } | Event::Completed { .. });
    pair.until(|pair| pair.events[0].iter().any(over));
    assert!(!pair.events[0].iter().any(|event| matches!(event, Event::Completed { .. })), "{:?}", pair.events[0]);
    let mut bytes = vec![0; BLOCK_BYTES as usize];
    for block in 0..BLOCKS {
        pair.ours.read(0, block, 0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| [0, 7].contains(byte)), "block {block} holds what was never sent");
    }
}

/// A device's read that failed may be under way in it until its endpoint is gone and the worker flushed.
#[test]
fn a_buffer_whose_read_failed_is_kept_until_the_endpoint_is_gone() {
    let Some(mut pair) = Pair::new(PackedBy::Read, PackedBy::Read) else { return };
    let link = pair.link();
    let mut buffer = pair.here.landing.buffer();
    let at = buffer.lay_open(100).unwrap();
    pair.here.links.get_mut(&link).unwrap().collecting = 1;
    let session = pair.here.sessions.get(&pair.peer).unwrap().here;
    let header = Header { kind: Kind::PullData, number: 0, session, tag: 1 };
    pair.here.method = Method::Srd;
    pair.here.collected(link, header, 0, buffer, UCS_ERR_IO_ERROR);
    assert!(!pair.here.links.contains_key(&link) && pair.here.closing.contains_key(&link));
    let is_free = |pair: &Pair| {
        let mut idle = Vec::new();
        std::iter::repeat_with(|| pair.here.landing.buffer())
            .take(CREDITS as usize)
            .for_each(|buffer| idle.push(buffer));
        idle.iter_mut().any(|buffer| buffer.lay_open(1) == Some(at))
    };
    assert!(!is_free(&pair), "it may be written still");
    pair.until(|pair| !pair.here.closing.contains_key(&link));
    pair.poll();
    assert!(is_free(&pair));
    pair.here.method = Method::Memory;
}

/// A peer that begins anew gets staging anew, and what its earlier end was told of is withdrawn.
#[test]
fn a_peer_that_begins_anew_finds_other_staging() {
    let Some(mut pair) = Pair::new(PackedBy::Read, PackedBy::Read) else { return };
    pair.named();
    let theirs = *pair.there.links.keys().next().unwrap();
    assert!(pair.there.links.get(&theirs).unwrap().depot.is_some());
    let hello = crate::wire::Hello {
        to: pair.there.own.instance,
        from: pair.here.own.instance,
        link: 0,
        session: 99,
        worker: pair.here.own.worker.clone(),
        process: None,
    };
    pair.there.links.get_mut(&theirs).unwrap().theirs = Some(9);
    let secret = pair.there.own.secret;
    pair.there.on_hello(&hello.seal(&secret)).unwrap();
    let link = pair.there.links.get(&theirs).unwrap();
    assert!(link.depot.is_none() && link.supply.is_none());
}
