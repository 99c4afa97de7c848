//! Peers that come and go, and bytes from them that were changed on the way.
#![allow(clippy::unwrap_used, reason = "this is test code")]

mod support;

use std::io::Write;
use std::time::{Duration, Instant};

use kvferry_core::{Direction, FenceProof, PoolId, TransferId};
use kvferry_transport::conformance::{Party, until};
use kvferry_transport::{Event, ImportError, Options, PackedBy, PoolKeys, Transfer};
use kvferry_ucx::UcxProvider;
use support::{
    BLOCK_BYTES, WAYS, Way, begin, cycle, descriptors, fill, pool, program, resident_kib, try_cycle, turn, verify,
};

const BLOCKS: u32 = 64;

/// `KVFERRY_CYCLES` says how many; 10,000 take minutes.
#[test]
fn connecting_and_letting_go_holds_nothing() {
    let Some(_turn) = turn() else { return };
    let cycles: u128 = std::env::var("KVFERRY_CYCLES").map_or(300, |cycles| cycles.parse().unwrap());
    for way in WAYS {
        // As `Options` say it, for once.
        let provider = UcxProvider::new().only(way.device);
        let (packed_by, packed_below_bytes) =
            if way.packed_read { (PackedBy::Read, Some(u64::MAX)) } else { (PackedBy::Auto, None) };
        let options = Options { two_sided: way.two_sided, packed_by, packed_below_bytes, ..Options::default() };
        let mut a = Party::open(&provider, &options);
        let mut b = Party::open(&provider, &options);
        let (source, destination) = (pool(1, BLOCKS), pool(2, BLOCKS));
        let (source_keys, destination_keys) = (a.bind(&source), b.bind(&destination));
        // What is kept for good is there by then.
        let early = (cycles / 3).min(1000);
        let mut before = None;
        for number in 0..cycles {
            cycle(&mut a, &mut b, (&source, &source_keys), (&destination, &destination_keys), number);
            a.events.clear();
            b.events.clear();
            if number == early {
                before = Some((descriptors(), resident_kib()));
            }
            if number % 1000 == 0 && cycles > 1000 {
                tell(&format!(
                    "{way}: {number} cycles, descriptors {}, resident {} KiB",
                    descriptors(),
                    resident_kib()
                ));
            }
        }
        let (fds, kib) = before.unwrap();
        let (fds_now, kib_now) = (descriptors(), resident_kib());
        println!("{way}: {early} to {cycles} cycles, descriptors {fds} to {fds_now}, resident {kib} to {kib_now} KiB");
        assert!(fds_now <= fds + 8, "{way}: descriptors grew from {fds} to {fds_now}");
        assert!(kib_now <= kib + kib / 5 + 4096, "{way}: memory grew from {kib} to {kib_now} KiB");
    }
}

/// Writes a line at once: what the harness keeps back is lost with a process that UCX or the kernel ends.
fn tell(line: &str) {
    // A closed stderr is no reason to stop.
    let _unread = writeln!(std::io::stderr(), "{line}");
}

/// Connections are made when peers join: the first transfer opens no descriptor, in either direction.
#[test]
fn the_first_transfer_makes_no_connection() {
    let Some(_turn) = turn() else { return };
    for way in WAYS {
        for direction in [Direction::Pull, Direction::Push] {
            let (mut a, mut b) =
                (Party::open(&way.provider(), &Options::default()), Party::open(&way.provider(), &Options::default()));
            let (source, destination) = (pool(1, BLOCKS), pool(2, BLOCKS));
            let (source_keys, destination_keys) = (a.bind(&source), b.bind(&destination));
            fill(&source, 5);
            // As nodes that join do; what is posted goes over the same link.
            let _session = a.connect(&b);
            until(&mut [&mut a, &mut b], "both are connected", |parties| parties.iter().all(has_met));
            let joined = descriptors();
            let id = TransferId(1);
            begin(&mut a, &mut b, (&source, &source_keys), (&destination, &destination_keys), direction, id);
            until(&mut [&mut a, &mut b], "it ends", |parties| match parties {
                [_, b] => b.end(id).is_some(),
                _ => false,
            });
            assert!(!b.failed(id), "{way}: {:?}", b.events);
            verify(&destination, 5);
            assert_eq!(descriptors(), joined, "{way}, {direction:?}");
        }
    }
}

fn has_met(party: &&mut Party) -> bool {
    party.events.iter().any(|event| matches!(event, Event::Connected { .. }))
}

/// Every round a peer appears, moves something and goes: endpoints, workers and contexts come and go with it.
#[test]
fn transports_that_are_closed_hold_nothing() {
    let Some(_turn) = turn() else { return };
    for way in WAYS {
        let provider = way.provider();
        let mut a = Party::open(&provider, &Options::default());
        let (source, destination) = (pool(1, BLOCKS), pool(2, BLOCKS));
        let source_keys = a.bind(&source);
        let mut before = 0;
        for number in 0..24 {
            let mut b = Party::open(&provider, &Options::default());
            let destination_keys = b.bind(&destination);
            cycle(&mut a, &mut b, (&source, &source_keys), (&destination, &destination_keys), number);
            drop(b);
            a.events.clear();
            // Its endpoint here is closed as soon as UCX sees that the other is gone.
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(50) {
                a.transport.poll(&mut a.events);
            }
            if number == 8 {
                before = descriptors();
            }
        }
        let now = descriptors();
        println!("{way}: descriptors {before} to {now}");
        assert!(now <= before + 8, "{way}: descriptors grew from {before} to {now}");
    }
}

/// Either end of either direction is dropped at several moments. The other ends its transfer, once, and meets the next transport; nothing is
/// written any more for the one that is gone.
#[test]
fn closing_with_transfers_under_way_ends_them_at_both_ends() {
    let Some(_turn) = turn() else { return };
    for way in WAYS {
        for direction in [Direction::Pull, Direction::Push] {
            for source_goes in [false, true] {
                for polls in [0, 1, 3, 8, 20] {
                    close_under_way(way, direction, source_goes, polls);
                }
            }
        }
    }
}

fn close_under_way(way: Way, direction: Direction, source_goes: bool, polls: usize) {
    let what = format!("{way}, {direction:?}, the source goes: {source_goes}, after {polls} polls");
    // Small slices, so that something is left to move.
    let options = Options { poll_bytes_max: BLOCK_BYTES, ..Options::default() };
    let open = || Party::open(&way.provider(), &options);
    let (mut a, mut b) = (open(), open());
    let (source, destination) = (pool(1, BLOCKS), pool(2, BLOCKS));
    let (source_keys, destination_keys) = (a.bind(&source), b.bind(&destination));
    fill(&source, 1);
    let id = TransferId(1);
    begin(&mut a, &mut b, (&source, &source_keys), (&destination, &destination_keys), direction, id);
    until(&mut [&mut a, &mut b], "both are connected", |parties| parties.iter().all(has_met));
    for _ in 0..polls {
        a.transport.poll(&mut a.events);
        b.transport.poll(&mut b.events);
    }
    let (gone, mut stays) = if source_goes { (a, b) } else { (b, a) };
    drop(gone);
    // The pool of who is gone is its owner's again.
    let kept = if source_goes { &source } else { &destination };
    fill(kept, 77);
    // A pull is known to its destination only.
    let ends = direction == Direction::Push || source_goes;
    until(&mut [&mut stays], &what, |parties| {
        parties.iter().all(|party| party.lost_someone() && (!ends || party.end(id).is_some()))
    });
    assert!(ends || stays.end(id).is_none(), "{what}: {:?}", stays.events);
    let mut bytes = vec![0; BLOCK_BYTES as usize];
    for block in 0..BLOCKS {
        kept.read(0, block, 0, &mut bytes).unwrap();
        let wanted = 77u8.wrapping_add(block as u8);
        assert!(bytes.iter().all(|byte| *byte == wanted), "{what}: block {block} was written");
    }
    // The next one at that device is met, and the pools move again.
    stays.events.clear();
    let mut next = open();
    if source_goes {
        let keys = next.bind(&source);
        cycle(&mut next, &mut stays, (&source, &keys), (&destination, &destination_keys), 2);
    } else {
        let keys = next.bind(&destination);
        cycle(&mut stays, &mut next, (&source, &source_keys), (&destination, &keys), 2);
    }
}

/// UCX itself would take most changed bytes, and end the process for some.
#[test]
fn changed_bytes_never_reach_ucx() {
    let Some(_turn) = turn() else { return };
    let changed = |bytes: &[u8]| {
        let flipped = (0..bytes.len()).flat_map(|at| [(at, 1), (at, 0x80)]).map(|(at, bit)| {
            let mut changed = bytes.to_vec();
            changed[at] ^= bit;
            changed
        });
        let cut = (0..bytes.len()).map(|length| bytes[..length].to_vec());
        flipped.chain(cut).collect::<Vec<_>>()
    };
    for way in WAYS {
        let mut a = Party::open(&way.provider(), &Options::default());
        let mut b = Party::open(&way.provider(), &Options::default());
        for address in changed(&b.transport.address()) {
            assert!(a.transport.connect(&address).is_err(), "{way}: {address:02x?}");
        }
        let source = pool(1, BLOCKS);
        let keys = b.bind(&source);
        let peer = a.connect(&b);
        // Nor do another transport's keys.
        let foreign = a.bind(&pool(3, BLOCKS));
        for keys in changed(&keys.0).into_iter().chain([foreign.0.to_vec()]) {
            let result = a.transport.import(peer, &PoolKeys(keys.into()), source.layout());
            assert!(matches!(result, Err(ImportError::BadKeys { .. })), "{way}: {result:?}");
        }
        assert!(a.transport.import(peer, &keys, source.layout()).is_ok(), "{way}");
    }
}

#[test]
fn an_address_of_a_closed_transport_connects_to_nobody() {
    let Some(_turn) = turn() else { return };
    for way in WAYS {
        let provider = way.provider();
        let mut a = Party::open(&provider, &Options::default());
        let b = Party::open(&provider, &Options::default());
        let address = b.transport.address();
        drop(b);
        let mut early = 0;
        for round in 0..12 {
            // As of a peer that was killed: over tcp its port is closed. Nothing is waited for in the call, and nothing is left of it.
            match a.transport.connect(&address) {
                Ok(peer) => {
                    until(&mut [&mut a], "the call ends", |parties| parties.iter().all(|party| party.lost_someone()));
                    assert!(!a.saw(&Event::Connected { peer }), "{way}");
                }
                Err(error) => assert_ne!(way.device, "lo", "{way}: {error}"),
            }
            a.events.clear();
            if round == 3 {
                early = descriptors();
            }
        }
        let mut now = descriptors();
        let until_then = Instant::now() + Duration::from_secs(20);
        while now > early && Instant::now() < until_then {
            a.transport.poll(&mut a.events);
            now = descriptors();
        }
        assert!(now <= early, "{way}: {early} descriptors after 4 calls, {now} after 12");
        a.events.clear();
        // The next one at that device is somebody else, and is reached.
        let c = Party::open(&provider, &Options::default());
        let peer = a.connect(&c);
        let mut c = c;
        until(&mut [&mut a, &mut c], "the next one answers", |parties| {
            parties.first().is_some_and(|a| a.saw(&Event::Connected { peer }))
        });
    }
}

#[test]
fn a_peer_of_another_device_is_refused_by_name() {
    let Some(_turn) = turn() else { return };
    for (here, there) in [(WAYS[0], WAYS[1]), (WAYS[2], WAYS[3])] {
        let mut a = Party::open(&here.provider(), &Options::default());
        let b = Party::open(&there.provider(), &Options::default());
        let error = a.transport.connect(&b.transport.address()).unwrap_err();
        assert!(error.to_string().contains("memory"), "{error}");
    }
}

/// Their contexts are configured differently: told at once, on either side.
#[test]
fn one_side_cannot_meet_two() {
    let Some(_turn) = turn() else { return };
    for (one, two) in [(WAYS[0], WAYS[2]), (WAYS[1], WAYS[3])] {
        let mut one = Party::open(&one.provider(), &Options::default());
        let mut two = Party::open(&two.provider(), &Options::default());
        let addresses = [two.transport.address(), one.transport.address()];
        for (here, there) in [&mut one, &mut two].into_iter().zip(addresses) {
            let error = here.transport.connect(&there).unwrap_err();
            assert!(error.to_string().contains("same UCX method"), "{error}");
        }
    }
}

/// A fence is proved for peers that are up, that are gone, and that never answered; then they are reached again.
#[test]
fn fences_are_proved_whatever_the_peer_does() {
    let Some(_turn) = turn() else { return };
    for way in WAYS {
        let provider = way.provider();
        let mut a = Party::open(&provider, &Options::default());
        let mut b = Party::open(&provider, &Options::default());
        let (source, destination) = (pool(1, BLOCKS), pool(2, BLOCKS));
        let (source_keys, _) = (a.bind(&source), b.bind(&destination));
        fill(&source, 9);
        for round in 0..4u128 {
            let start = Instant::now();
            let peer = b.connect(&a);
            if round > 0 {
                let remote = b.import(peer, &source_keys, source.layout());
                let program = program(BLOCKS);
                let range = program.whole();
                let (direction, local) = (Direction::Pull, destination.id());
                let transfer =
                    Transfer { id: TransferId(round), peer, direction, local, remote, program, range, notice: None };
                b.transport.post(transfer).unwrap();
                for _ in 0..(round - 1) * 40 {
                    a.transport.poll(&mut a.events);
                    b.transport.poll(&mut b.events);
                }
            }
            b.transport.fence(peer);
            until(&mut [&mut b], "the fence is proved, without the peer", |parties| {
                let proved = |event: &Event| {
                    let proof = [FenceProof::OwnerCopies, FenceProof::EndpointDestroyed];
                    matches!(event, Event::Fenced { peer: of, proof: by } if *of == peer && proof.contains(by))
                };
                parties.iter().all(|party| party.events.iter().any(proved))
            });
            assert!(start.elapsed() < Duration::from_secs(10), "{way}");
            assert!(
                round == 0 || b.end(TransferId(round)).is_some(),
                "{way}: its transfers have ended: {:?}",
                b.events
            );
        }
        b.events.clear();
        a.events.clear();
        let destination_keys = {
            b.transport.unbind(destination.id());
            until(&mut [&mut a, &mut b], "it is let go", |parties| {
                parties.get(1).is_some_and(|b| b.saw(&Event::Unbound { pool: PoolId(2) }))
            });
            b.bind(&destination)
        };
        // The peer's endpoint may be one that the fence has closed here: that is heard at both ends, and the next one stands.
        for direction in 0..2 {
            let stands = (0..4).any(|attempt| {
                a.events.clear();
                b.events.clear();
                let number = 100 + 2 * attempt + direction;
                try_cycle(&mut a, &mut b, (&source, &source_keys), (&destination, &destination_keys), number)
            });
            assert!(stands, "{way}: {:?} {:?}", a.events, b.events);
        }
    }
}
