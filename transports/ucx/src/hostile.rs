//! Peers that break the protocol, and fences at moments at which reads are under way.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::{Direction, PoolId, TransferId};
use kvferry_transport::codec::encode;
use kvferry_transport::conformance::{apart, block_planes, whole_blocks};
use kvferry_transport::{Event, Options, PeerId, Pool, PoolOptions, Provider, Transfer, Transport};

use crate::UcxProvider;
use crate::device::{MEMORY, Method};
use crate::remote::LENT_AHEAD;
use crate::transport::UcxTransport;
use crate::wire::{Done, Header, Keys, Kind, Lend, Named, Refusal, Warmed};

const BLOCKS: u32 = 512;
const BLOCK_BYTES: u64 = 64 << 10;
const TIMELY: Duration = Duration::from_secs(20);

fn open(poll_bytes_max: u64) -> Option<UcxTransport> {
    if let Some(reason) = UcxProvider::unavailable() {
        kvferry_transport::conformance::absent("ucx", &reason);
        return None;
    }
    let provider = UcxProvider::new();
    let options = Options { poll_bytes_max, ..Options::default() };
    Some(provider.opened(&provider.named(MEMORY)?, &options).unwrap())
}

/// `here` pulls from `there`.
struct Pair {
    here: UcxTransport,
    there: UcxTransport,
    peer: PeerId,
    ours: Pool,
    /// Lives as long as it is read.
    _theirs: Pool,
}

impl Pair {
    /// Connected, with a pull posted. None where nothing is read of memory here: an old library, a bare container.
    fn pulling(blocks: u32, block_bytes: u64, poll_bytes_max: u64) -> Option<Pair> {
        let pool = |id| {
            let options = PoolOptions { huge_pages: false, ..PoolOptions::default() };
            Pool::allocate_with(PoolId(id), block_planes(1, blocks, block_bytes), "hostile", &options).unwrap()
        };
        let (mut here, mut there, ours, theirs) = (open(poll_bytes_max)?, open(poll_bytes_max)?, pool(1), pool(2));
        here.options.packed_below_bytes = Some(0);
        here.bind(&ours).unwrap();
        let keys = there.bind(&theirs).unwrap();
        let peer = here.connect(&there.address()).unwrap();
        let remote = here.import(peer, &keys, theirs.layout()).unwrap();
        let mut pair = Pair { here, there, peer, ours, _theirs: theirs };
        pair.until(|events| events.iter().any(|event| matches!(event, Event::Connected { .. })));
        let link = pair.here.sessions.get(&peer)?.link;
        if !pair.here.reads_memory(link) {
            // 1.13's lanes cannot; of a later one that is a container's doing, and not CI's.
            if UcxProvider::version().is_some_and(|version| version >= (1, 14, 0)) {
                kvferry_transport::conformance::absent("ucx", "UCX reads no memory of another process here");
            }
            return None;
        }
        let program = Arc::new(whole_blocks(1, 16, block_bytes, (0..blocks).rev(), 0..blocks));
        let (range, local) = (program.whole(), pair.ours.id());
        let (id, direction) = (TransferId(1), Direction::Pull);
        pair.here.post(Transfer { id, peer, direction, local, remote, program, range, notice: None }).unwrap();
        Some(pair)
    }

    /// With reads that UCX holds.
    fn reading() -> Option<Pair> {
        let mut pair = Pair::pulling(BLOCKS, BLOCK_BYTES, BLOCK_BYTES)?;
        let until = Instant::now() + TIMELY;
        while pair.in_flight() == 0 && Instant::now() < until {
            pair.here.poll(&mut Vec::new());
        }
        assert!(pair.in_flight() > 0, "nothing is being read");
        Some(pair)
    }

    fn in_flight(&self) -> usize {
        self.here.fetches.values().map(|fetch| fetch.in_flight).sum()
    }

    fn tag(&self) -> u64 {
        *self.here.sessions.get(&self.peer).unwrap().posts.keys().next().unwrap()
    }

    /// What happens until it does, which must be soon.
    fn until(&mut self, is_it: impl Fn(&[Event]) -> bool) -> Vec<Event> {
        let (mut events, until) = (Vec::new(), Instant::now() + TIMELY);
        while !is_it(&events) && Instant::now() < until {
            self.here.poll(&mut events);
            self.there.poll(&mut Vec::new());
        }
        assert!(is_it(&events), "{events:?}");
        events
    }

    /// Ends the link as whoever takes messages does when one breaks the rules.
    fn breach(&mut self, reason: &str) {
        let link = self.here.sessions.get(&self.peer).unwrap().link;
        self.here.lose_link(link, reason);
    }

    /// Waits for an event after which nothing may be written here; then nothing is.
    fn nothing_is_written_after(&mut self, is_it: impl Fn(&Event) -> bool) {
        self.until(|events| events.iter().any(&is_it));
        assert_eq!(self.in_flight(), 0);
        (0..BLOCKS).for_each(|block| self.ours.fill(0, block, 77).unwrap());
        let until = Instant::now() + Duration::from_millis(200);
        while Instant::now() < until {
            self.here.poll(&mut Vec::new());
            self.there.poll(&mut Vec::new());
        }
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        for block in 0..BLOCKS {
            self.ours.read(0, block, 0, &mut bytes).unwrap();
            assert!(bytes.iter().all(|byte| *byte == 77), "block {block} was written late");
        }
    }
}

fn is_fenced(event: &Event) -> bool {
    matches!(event, Event::Fenced { .. })
}

fn is_over(event: &Event) -> bool {
    matches!(event, Event::Failed { .. } | Event::Completed { .. })
}

#[test]
fn a_fence_after_the_peer_has_left_waits_for_what_is_read_of_it() {
    let Some(mut pair) = Pair::reading() else { return };
    pair.here.on_bye(pair.peer, b"bye");
    pair.here.fence(pair.peer);
    pair.nothing_is_written_after(is_fenced);
}

#[test]
fn a_fence_after_a_disconnect_waits_for_what_is_read() {
    let Some(mut pair) = Pair::reading() else { return };
    pair.here.disconnect(pair.peer);
    pair.here.fence(pair.peer);
    pair.nothing_is_written_after(is_fenced);
}

/// A device's reads that failed may be under way in it until its endpoint is gone and the worker flushed.
#[test]
fn a_fence_waits_for_the_endpoint_of_a_read_that_failed() {
    let Some(mut pair) = Pair::reading() else { return };
    // As a device reports it: over with an error, while nobody knows what it still does.
    let until = Instant::now() + TIMELY;
    let fail = |pair: &mut Pair| {
        pair.here.fetches.values_mut().for_each(|fetch| fetch.fail("Input/output error".to_owned()));
    };
    fail(&mut pair);
    while pair.in_flight() > 0 && Instant::now() < until {
        pair.here.progress_once();
    }
    pair.here.method = Method::Srd;
    pair.here.fence(pair.peer);
    assert!(!pair.here.closing.is_empty() && !pair.here.events.iter().any(is_fenced), "{:?}", pair.here.events);
    pair.until(|events| events.iter().any(is_fenced));
    assert!(pair.here.closing.is_empty());
    pair.here.method = Method::Memory;
}

#[test]
fn a_refusal_of_a_pull_that_is_read_ends_it_with_its_reads_only() {
    let Some(mut pair) = Pair::reading() else { return };
    let refused = pair.here.on_refuse(pair.peer, pair.tag(), &encode(&Refusal::text("no")));
    pair.breach(&refused.unwrap_err());
    pair.nothing_is_written_after(is_over);
}

#[test]
fn an_end_of_a_push_that_names_a_pull_loses_nothing() {
    let Some(mut pair) = Pair::reading() else { return };
    let ended = pair.here.on_done(pair.peer, pair.tag(), &encode(&Done { pieces: 1 }));
    pair.breach(&ended.unwrap_err());
    pair.nothing_is_written_after(is_over);
}

/// Every key that differs from an honest one by a byte, and every cut of it: refused, or harmless.
#[test]
fn changed_keys_that_come_unasked_do_no_harm() {
    let Some(mut pair) = Pair::reading() else { return };
    let lent: Vec<_> = pair.here.remotes.values().filter_map(|remote| remote.lent.clone()).collect();
    let (mut keys, layout): (Keys, _) = lent.first().unwrap().clone();
    let honest = keys.regions[0].rkey.clone();
    let cuts = (1..honest.len()).map(|length| honest[..length].to_vec());
    let changed = (0..honest.len()).flat_map(|at| {
        let honest = &honest;
        (0..=u8::MAX).map(move |byte| {
            let mut key = honest.clone();
            key[at] = byte;
            key
        })
    });
    let mut all: Vec<Vec<u8>> = cuts.chain(changed).collect();
    all.push([&[0; 8][..], &[0x0d]].concat());
    for rkey in all {
        keys.token += 1;
        keys.regions[0].rkey = rkey;
        let named = Named { pool: keys.pool, token: keys.token };
        let body = encode(&Lend { named, pool: Some((keys.clone(), layout.clone())) });
        if pair.here.remotes.len() > 32 {
            pair.here.remotes.retain(|_, remote| remote.named.token == 0);
        }
        let _refused_or_not = pair.here.on_lend(pair.peer, LENT_AHEAD, &body);
    }
}

#[test]
fn a_changed_key_of_what_is_read_at_join_does_no_harm() {
    let Some(mut pair) = Pair::reading() else { return };
    let mut sample = pair.here.remotes.values().find_map(|remote| remote.lent.clone()).unwrap().0.regions[0].clone();
    let link = pair.here.sessions.get(&pair.peer).unwrap().link;
    let honest = sample.rkey.clone();
    for length in 1..honest.len() {
        sample.rkey = honest[..length].to_vec();
        pair.here.links.get_mut(&link).unwrap().warmth = crate::warming::Warmth::default();
        let _refused_or_not = pair.here.on_warmed(link, &encode(&Warmed { sample: Some(sample.clone()) }));
    }
    sample.rkey = [&[0; 8][..], &[0x0d]].concat();
    pair.here.links.get_mut(&link).unwrap().warmth = crate::warming::Warmth::default();
    let _refused_or_not = pair.here.on_warmed(link, &encode(&Warmed { sample: Some(sample) }));
}

#[test]
fn parts_of_messages_are_bounded_however_short_they_are() {
    let Some(mut pair) = Pair::reading() else { return };
    let here = pair.here.sessions.get(&pair.peer).unwrap().here;
    let kept = |pair: &Pair| pair.here.sessions.get(&pair.peer).map_or(0, |session| session.parts.len());
    let mut most = 0;
    for tag in 1000..4000 {
        pair.here.message(Header { kind: Kind::Part, number: 0, session: here, tag }, vec![7]);
        most = most.max(kept(&pair));
    }
    assert!((1..100).contains(&most), "{most} messages in parts");
    pair.nothing_is_written_after(is_over);

    let Some(mut pair) = Pair::reading() else { return };
    let here = pair.here.sessions.get(&pair.peer).unwrap().here;
    pair.here.message(Header { kind: Kind::Part, number: 0, session: here, tag: 1000 }, Vec::new());
    assert_eq!(kept(&pair), 0, "a part without bytes");
}

#[test]
fn ucx_holds_a_bounded_number_of_reads_however_short_they_are() {
    let (blocks, block_bytes) = (1 << 15, 64);
    let Some(mut pair) = Pair::pulling(blocks, block_bytes, 64 << 20) else { return };
    let (mut events, mut most, until) = (Vec::new(), 0, Instant::now() + TIMELY);
    while !events.iter().any(is_over) && Instant::now() < until {
        pair.here.poll(&mut events);
        pair.there.poll(&mut Vec::new());
        most = most.max(pair.in_flight());
    }
    assert!(matches!(events.last(), Some(Event::Completed { .. })), "{events:?}");
    assert!((1..=crate::fetch::READS_MAX).contains(&most), "{most} reads");
}

#[test]
fn memory_of_a_device_is_refused_and_says_what_takes_it() {
    let Some(mut here) = open(1 << 20) else { return };
    let refused = here.bind(&apart(PoolId(3), block_planes(1, 4, 4096))).unwrap_err().to_string();
    assert!(refused.contains("pool-3"), "{refused}");
}
