//! Connections that end, are slow, or are shared, with real transports at both ends.

use std::time::Duration;

use kvferry_transport::{Direction, Event, Options};

use super::{Party, id, until};
use crate::TcpProvider;

/// So small that nearly every call moves less than it was asked to.
fn tiny() -> TcpProvider {
    TcpProvider::new().with_socket_buffers(1)
}

#[test]
fn tiny_buffers_cut_everything_and_nothing_is_lost() {
    for streams in [1, 3] {
        let options = Options { streams_per_peer: streams, poll_bytes_max: 10_000, ..Options::default() };
        let mut source = Party::new(&tiny(), 1, 8, &options);
        let mut destination = Party::new(&tiny(), 2, 8, &options);
        source.fill();
        let to = destination.reach(&source);
        let pulled = destination.pull(1, to);
        until(&mut [&mut source, &mut destination], "the pull", |parties| parties[1].completed(pulled));
        destination.verify();
        for (plane, block) in super::places(&destination.pool) {
            destination.pool.fill(plane, block, 0).unwrap();
        }
        let to = source.reach(&destination);
        destination.expect(2);
        let pushed = source.post(2, Direction::Push, to);
        until(&mut [&mut source, &mut destination], "the push", |parties| parties[0].completed(pushed));
        destination.verify();
    }
}

#[test]
fn a_peer_that_vanishes_fails_its_transfers_in_both_directions() {
    let options = Options { poll_bytes_max: 64 << 10, ..Options::default() };
    let mut here = Party::new(&tiny(), 1, 8, &options);
    let mut there = Party::new(&tiny(), 2, 8, &options);
    let to = here.reach(&there);
    let pulled = here.pull(1, to);
    let back = there.reach(&here);
    let expected = here.expect(2);
    there.post(2, Direction::Push, back);
    for _ in 0..200 {
        here.poll();
        there.poll();
    }
    assert!(
        here.events.iter().all(|event| matches!(event, Event::Connected { .. } | Event::Shown { .. })),
        "{:?}",
        here.events
    );
    drop(there);
    until(&mut [&mut here], "both fail", |parties| parties[0].failed(pulled) && parties[0].failed(expected));
    let still = here.snapshot();
    for _ in 0..100 {
        here.poll();
    }
    assert!(here.snapshot() == still);
    assert_eq!(here.lost().len(), 2);
}

#[test]
fn three_peers_share_one_source() {
    let options = Options { poll_bytes_max: 100_000, ..Options::default() };
    let mut source = Party::new(&TcpProvider::new(), 1, 16, &options);
    source.fill();
    let mut peers: Vec<_> = (2..5).map(|pool| Party::new(&TcpProvider::new(), pool, 16, &options)).collect();
    for peer in &mut peers {
        let to = peer.reach(&source);
        peer.pull(1, to);
    }
    let [a, b, c] = peers.as_mut_slice() else { panic!("three") };
    until(&mut [&mut source, a, b, c], "three pulls", |parties| parties[1..].iter().all(|peer| peer.completed(id(1))));
    peers.iter().for_each(Party::verify);
}

#[test]
fn nobody_listening_is_reported() {
    let gone = Party::new(&TcpProvider::new(), 1, 1, &Options::default());
    let mut here = Party::new(&TcpProvider::new(), 2, 1, &Options::default());
    let to = here.reach(&gone);
    let pulled = here.pull(1, to);
    drop(gone);
    until(&mut [&mut here], "the pull fails", |parties| parties[0].failed(pulled));
    assert_eq!(here.lost().len(), 1);
}

#[test]
fn a_listener_that_never_answers_is_given_up() {
    let silent = Party::new(&TcpProvider::new(), 1, 1, &Options::default());
    let mut here = Party::new(&TcpProvider::new(), 2, 1, &Options::default());
    let to = here.reach(&silent);
    let pulled = here.pull(1, to);
    // `silent` never polls. The descriptor must announce the deadline by itself.
    let start = std::time::Instant::now();
    while !here.failed(pulled) {
        assert!(start.elapsed() < super::DEADLINE, "it was never given up");
        here.poll();
        if !here.failed(pulled)
            && let kvferry_transport::Wait::Ready(fd) = here.transport.arm()
        {
            let interest = &mut [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
            let limit = rustix::event::Timespec { tv_sec: 60, tv_nsec: 0 };
            assert_eq!(rustix::event::poll(interest, Some(&limit)), Ok(1), "the deadline was not announced");
        }
    }
    assert!(start.elapsed() >= Duration::from_secs(4));
}

#[test]
fn a_cancelled_push_leaves_its_id_free_for_another() {
    let options = Options { poll_bytes_max: 32 << 10, ..Options::default() };
    let mut source = Party::new(&tiny(), 1, 8, &options);
    let mut destination = Party::new(&tiny(), 2, 8, &options);
    source.fill();
    let to = source.reach(&destination);
    for round in 0..20 {
        destination.expect(9);
        source.events.clear();
        destination.events.clear();
        let pushed = source.post(9, Direction::Push, to);
        for _ in 0..round * 7 {
            source.poll();
            destination.poll();
        }
        source.transport.cancel(pushed);
        // Whatever was announced is overwritten: nothing of the cancelled transfer may reach the other end afterwards.
        until(&mut [&mut source, &mut destination], "the cancel", |parties| parties[0].failed(pushed));
        for _ in 0..2000 {
            source.poll();
            destination.poll();
        }
        // The last byte may have been on its way when the source gave up: then the push has arrived all the same.
        if !destination.failed(pushed) && !destination.arrived(pushed) {
            destination.transport.cancel(pushed);
        }
        destination.poll();
        assert!(destination.failed(pushed) != destination.arrived(pushed), "{:?}", destination.events);
    }
    destination.expect(9);
    let pushed = source.post(9, Direction::Push, to);
    source.events.clear();
    until(&mut [&mut source, &mut destination], "the last push", |parties| parties[0].completed(pushed));
    destination.verify();
}

#[test]
fn an_unbound_source_is_never_read_again() {
    let options = Options { poll_bytes_max: 32 << 10, ..Options::default() };
    let mut source = Party::new(&tiny(), 1, 64, &options);
    let mut destination = Party::new(&tiny(), 2, 64, &options);
    source.fill();
    let to = destination.reach(&source);
    let pulled = destination.pull(1, to);
    for _ in 0..300 {
        source.poll();
        destination.poll();
    }
    source.transport.unbind(source.pool.id());
    until(&mut [&mut source, &mut destination], "the pull is refused", |parties| parties[1].failed(pulled));
    assert!(source.events.contains(&Event::Unbound { pool: source.pool.id() }));
    let keys = source.transport.bind(&source.pool).unwrap();
    assert_ne!(keys, source.keys);
    source.keys = keys;
    let peer = to.0;
    let remote = destination.transport.import(peer, &source.keys, source.pool.layout()).unwrap();
    let again = destination.pull(2, (peer, remote));
    until(&mut [&mut source, &mut destination], "another pull", |parties| parties[1].completed(again));
    destination.verify();
}
