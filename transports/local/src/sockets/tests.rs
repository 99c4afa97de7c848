//! Two ends, and the ways between them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

use super::*;
use crate::ring::RING_WORDS;

fn frame(serial: u64, is_large: bool) -> Frame {
    let reason = "-".repeat(if is_large { 100_000 } else { 10 });
    Frame::NotOpened { request: serial as u32, reason }
}

fn frames(sockets: &mut Sockets) -> Vec<(PeerId, Frame)> {
    sockets.look(Instant::now());
    let carried = std::iter::from_fn(|| sockets.next()).collect::<Vec<_>>();
    sockets.flush();
    let frame = |carried| match carried {
        Carried::Frame(peer, frame) => Some((peer, frame)),
        Carried::Called(_) => None,
        Carried::Lost(_, reason) => panic!("{reason}"),
    };
    carried.into_iter().filter_map(frame).collect()
}

/// Two that have greeted and have a way through memory, and what each calls the other.
fn pair() -> (Sockets, PeerId, Sockets, PeerId) {
    let open = || Sockets::open(TransportKind::Shm, "memory", true).unwrap();
    let (mut caller, mut called) = (open(), open());
    let there = caller.dial(&called.place()).unwrap();
    caller.send(there, &Frame::Welcome { instance: [1; 16] }, Vec::new());
    caller.flush();
    let here = loop {
        if let [(peer, _)] = frames(&mut called)[..] {
            break peer;
        }
    };
    called.trust(here);
    called.flush();
    while called.connections[&here].ring.is_none() || caller.connections[&there].ring.is_none() {
        assert!(frames(&mut caller).is_empty() && frames(&mut called).is_empty());
    }
    (caller, there, called, here)
}

#[test]
fn frames_stay_in_order_whichever_way_they_go() {
    let (mut from, to, mut at, _) = pair();
    let (mut due, mut sent) = (0, 0);
    let before = from.connections[&to].queued;
    for round in 0..2000u64 {
        // Now and then it sleeps, as far as its peer knows; now and then a frame is too large for memory.
        if round % 5 == 3 {
            let _woken_by_nobody = at.wait(None, Instant::now());
        }
        for _ in 0..round % 4 {
            from.send(to, &frame(sent, sent % 7 == 3), Vec::new());
            sent += 1;
        }
        from.flush();
        for (_, came) in frames(&mut at) {
            assert_eq!(came, frame(due, due % 7 == 3));
            due += 1;
        }
    }
    while due < sent {
        from.flush();
        for (_, came) in frames(&mut at) {
            assert_eq!(came, frame(due, due % 7 == 3));
            due += 1;
        }
    }
    let by_socket = from.connections[&to].queued - before;
    assert!(by_socket > sent / 7 && by_socket < sent * 2 / 3, "{by_socket} of {sent} by the socket");
}

#[test]
fn who_waits_is_woken_by_what_comes_through_memory() {
    let (mut from, to, mut at, _) = pair();
    assert!(frames(&mut at).is_empty());
    let before = from.connections[&to].queued;
    from.send(to, &frame(1, false), Vec::new());
    assert_eq!(from.connections[&to].queued, before, "it went through memory");
    assert!(matches!(at.wait(None, Instant::now()), Wait::Busy), "it is there");
    assert_eq!(frames(&mut at).len(), 1);
    let Wait::Ready(fd) = at.wait(None, Instant::now()) else { panic!("nothing is there") };
    from.send(to, &frame(2, false), Vec::new());
    from.flush();
    let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut fds, None), Ok(1));
    assert_eq!(frames(&mut at).len(), 1);
}

#[test]
fn what_was_said_in_memory_counts_though_the_connection_has_ended() {
    let (mut from, to, mut at, here) = pair();
    assert!(frames(&mut at).is_empty());
    from.send(to, &frame(1, false), Vec::new());
    from.close(to);
    let mut heard = Vec::new();
    while !matches!(heard.last(), Some(Carried::Lost(..))) {
        at.look(Instant::now());
        heard.extend(std::iter::from_fn(|| at.next()));
    }
    assert!(
        matches!(&heard[..], [Carried::Frame(peer, came), Carried::Lost(..)] if *peer == here && *came == frame(1, false))
    );
}

#[test]
fn a_ring_is_taken_from_whoever_has_one_and_only_once() {
    let (mut from, to, mut at, _) = pair();
    from.send(to, &Frame::Ring, Vec::new());
    from.flush();
    let lost = loop {
        at.look(Instant::now());
        if let Some(Carried::Lost(_, reason)) = std::iter::from_fn(|| at.next()).next() {
            break reason;
        }
    };
    assert!(lost.contains("descriptors"), "{lost}");
    // One that uses none takes it for any other frame, which is not due.
    let mut plain = Sockets::open(TransportKind::Shm, "memory", false).unwrap();
    let peer = from.dial(&plain.place()).unwrap();
    from.send(peer, &Frame::Ring, Vec::new());
    from.flush();
    let got = loop {
        if let Some((_, got)) = frames(&mut plain).pop() {
            break got;
        }
    };
    assert_eq!(got, Frame::Ring);
}

#[test]
fn a_peer_that_never_stops_lets_others_have_a_turn() {
    let (mut from, to, mut at, _) = pair();
    assert!(frames(&mut at).is_empty());
    // Something is there when it looks, else it takes nothing.
    from.send(to, &frame(0, false), Vec::new());
    at.look(Instant::now());
    let mut came = 0;
    for _ in 0..10_000 {
        match at.next() {
            Some(Carried::Frame(_, got)) => assert_eq!(got, frame(came, false)),
            Some(other) => panic!("{other:?}"),
            None => break,
        }
        came += 1;
        from.send(to, &frame(came, false), Vec::new());
    }
    assert!(came > 0 && came < 10_000, "it took {came} frames at once");
    assert!(matches!(at.wait(None, Instant::now()), Wait::Busy));
    assert_eq!(frames(&mut at), [(frames_of(&at), frame(came, false))]);
}

/// So long at most what comes by sockets waits behind what is in memory.
const SOCKETS_WAIT: Duration = Duration::from_micros(50);

/// A look at sockets is in the way of what is in memory; but not for ever.
#[test]
fn what_is_in_memory_does_not_wait_for_sockets_and_sockets_do_not_wait_for_long() {
    let (mut from, to, mut at, here) = pair();
    // Both have settled; nothing is there.
    while at.quiet_since.is_none() {
        assert!(frames(&mut at).is_empty());
    }
    let quiet = at.quiet_since.unwrap();
    let socket = from.connections.get_mut(&to).unwrap();
    socket.queue(frame(0, false).encode(), Vec::new());
    socket.connection.flush().unwrap();
    let (mut now, mut taken) = (quiet, 0);
    while at.connections[&here].came == from.connections[&to].queued - 1 {
        // Due without the socket's frame, which was sent before them and to which they say nothing.
        let body = frame(taken, false).encode().split_off(4);
        let ring = from.connections.get_mut(&to).unwrap().ring.as_mut().unwrap();
        assert_eq!(ring.write(0, &body), Written::Seen);
        now += Duration::from_micros(1);
        at.look(now);
        assert!(matches!(at.next(), Some(Carried::Frame(_, got)) if got == frame(taken, false)));
        while at.next().is_some() {}
        taken += 1;
        assert!(now - quiet <= SOCKETS_WAIT, "the socket was not looked at");
    }
    assert_eq!(now - quiet, SOCKETS_WAIT, "{taken} frames were taken before");
}

#[test]
fn who_has_nothing_in_memory_is_heard_beside_one_who_never_stops() {
    let (mut from, to, mut at, _) = pair();
    let mut third = Sockets::open(TransportKind::Shm, "memory", false).unwrap();
    let there = third.dial(&at.place()).unwrap();
    third.flush();
    while at.connections.len() < 2 || at.quiet_since.is_none() {
        assert!(frames(&mut at).is_empty());
    }
    let quiet = at.quiet_since.unwrap();
    let said = Frame::Welcome { instance: [9; 16] };
    third.send(there, &said, Vec::new());
    third.flush();
    let (mut now, mut heard) = (quiet, Vec::new());
    while !heard.iter().any(|came| matches!(came, Carried::Frame(_, came) if *came == said)) {
        from.send(to, &frame(0, false), Vec::new());
        now += Duration::from_micros(1);
        assert!(now - quiet <= SOCKETS_WAIT, "it is not heard");
        at.look(now);
        heard.extend(std::iter::from_fn(|| at.next()));
    }
    assert_eq!(now - quiet, SOCKETS_WAIT);
}

fn frames_of(sockets: &Sockets) -> PeerId {
    *sockets.connections.keys().next().unwrap()
}

/// Writes frames to memory until it is full, all of them due after `before` frames of the socket.
fn fill_ring(ring: &mut Ring, before: u64) {
    let body = frame(0, false).encode().split_off(4);
    while ring.write(before, &body) == Written::Seen {}
}

/// Looks until the connection is lost, while `meanwhile` does its worst before every frame that is taken. Why it was lost.
fn until_lost(at: &mut Sockets, mut meanwhile: impl FnMut(&mut Sockets)) -> String {
    for _ in 0..8 {
        at.look(Instant::now());
        loop {
            meanwhile(at);
            match at.next() {
                Some(Carried::Lost(_, reason)) => return reason,
                Some(_) => {}
                None => break,
            }
        }
        at.flush();
    }
    panic!("it is still connected")
}

#[test]
fn memory_that_is_always_full_does_not_hide_what_the_socket_brings() {
    let (mut from, to, mut at, here) = pair();
    assert!(frames(&mut at).is_empty());
    let mut most = 0;
    let reason = until_lost(&mut at, |at| {
        let socket = from.connections.get_mut(&to).unwrap();
        fill_ring(socket.ring.as_mut().unwrap(), 0);
        if !socket.connection.is_backed_up() {
            socket.queue(frame(1, true).encode(), Vec::new());
        }
        // It may find that it was closed.
        let _gone = socket.connection.flush();
        most = most.max(at.connections.get(&here).map_or(0, |socket| socket.connection.unread()));
    });
    assert!(reason.contains("ahead of a frame"), "{reason}");
    assert!(most > 0 && most <= 2 << 20, "{most} bytes");
}

#[test]
fn what_waits_behind_memory_stays_with_the_kernel() {
    let (mut from, to, mut at, here) = pair();
    assert!(frames(&mut at).is_empty());
    let mut most = 0;
    for _ in 0..100 {
        at.look(Instant::now());
        loop {
            // Memory is never empty, and waits for one frame of the socket at a time: no rule is broken.
            let came = at.connections[&here].came;
            let socket = from.connections.get_mut(&to).unwrap();
            fill_ring(socket.ring.as_mut().unwrap(), came + 1);
            while !socket.connection.is_backed_up() {
                socket.queue(frame(1, true).encode(), Vec::new());
                socket.connection.flush().unwrap();
            }
            socket.connection.flush().unwrap();
            most = most.max(at.connections[&here].connection.unread());
            match at.next() {
                Some(Carried::Frame(..)) => {}
                Some(other) => panic!("{other:?}"),
                None => break,
            }
        }
    }
    assert!(most > 0 && most <= 1 << 20, "{most} bytes");
}

#[test]
fn who_has_gone_is_lost_however_full_its_memory_is() {
    // It closes its socket, and keeps what it maps.
    let (mut from, to, mut at, _) = pair();
    assert!(frames(&mut at).is_empty());
    let mut ring = from.connections.remove(&to).unwrap().ring.unwrap();
    let reason = until_lost(&mut at, |_| fill_ring(&mut ring, 0));
    assert!(reason.contains("closed"), "{reason}");

    // Writing to it fails first.
    let (mut from, to, mut at, here) = pair();
    assert!(frames(&mut at).is_empty());
    let mut ring = from.connections.remove(&to).unwrap().ring.unwrap();
    at.send(here, &frame(1, true), Vec::new());
    at.flush();
    let socket = &at.connections[&here];
    let (queued, waiting) = (socket.queued, socket.connection.is_backed_up());
    assert!(socket.broken.is_some() && waiting);
    let mut taken = 0;
    let reason = until_lost(&mut at, |at| {
        fill_ring(&mut ring, 0);
        at.send(here, &frame(1, true), Vec::new());
        if let Some(socket) = at.connections.get(&here) {
            assert_eq!(socket.queued, queued, "nothing is kept for it");
            taken = socket.ring.as_ref().unwrap().taken();
        }
    });
    assert!(reason.contains("writing to its socket failed"), "{reason}");
    assert!(taken <= 2 * RING_WORDS, "{taken} words");
}

#[test]
fn who_reads_nothing_is_lost_though_it_never_stops_talking() {
    let (mut from, to, mut at, here) = pair();
    assert!(frames(&mut at).is_empty());
    rustix::net::shutdown(from.connections[&to].connection.fd(), rustix::net::Shutdown::Read).unwrap();
    at.send(here, &frame(1, true), Vec::new());
    at.flush();
    let reason = until_lost(&mut at, |at| {
        // One frame of the socket for each ring.
        let came = at.connections[&here].came;
        let socket = from.connections.get_mut(&to).unwrap();
        fill_ring(socket.ring.as_mut().unwrap(), came + 1);
        if !socket.connection.is_backed_up() {
            socket.queue(frame(1, true).encode(), Vec::new());
        }
        let _gone = socket.connection.flush();
    });
    assert!(reason.contains("writing to its socket failed"), "{reason}");
}

/// A random number below a bound.
fn below(state: &mut u64, bound: u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state % bound
}

#[test]
fn whoever_falls_asleep_misses_nothing() {
    const FRAMES: u64 = 20_000;
    const LONG: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };
    let came = AtomicU64::new(0);
    let (tell, told) = mpsc::channel();
    std::thread::scope(|scope| {
        let sleeper = scope.spawn(|| {
            let mut at = Sockets::open(TransportKind::Shm, "memory", true).unwrap();
            tell.send(at.place()).unwrap();
            let (mut state, mut due) = (7, 0);
            while due < FRAMES {
                for _ in 0..=below(&mut state, 8) {
                    at.look(Instant::now());
                    while let Some(carried) = at.next() {
                        match carried {
                            Carried::Frame(peer, Frame::Welcome { .. }) => at.trust(peer),
                            Carried::Frame(_, got) => {
                                assert_eq!(got, frame(due, false));
                                due += 1;
                                came.store(due, Ordering::Release);
                            }
                            Carried::Called(_) => {}
                            Carried::Lost(_, reason) => panic!("{reason}"),
                        }
                    }
                    at.flush();
                }
                if due == FRAMES {
                    break;
                }
                if let Wait::Ready(fd) = at.wait(None, Instant::now()) {
                    let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
                    let woken = rustix::event::poll(&mut fds, Some(&LONG));
                    assert_eq!(woken, Ok(1), "frame {due} woke nobody");
                }
            }
        });
        let mut from = Sockets::open(TransportKind::Shm, "memory", true).unwrap();
        let to = from.dial(&told.recv().unwrap()).unwrap();
        from.send(to, &Frame::Welcome { instance: [1; 16] }, Vec::new());
        from.flush();
        while from.connections[&to].ring.is_none() && !sleeper.is_finished() {
            assert!(frames(&mut from).is_empty());
        }
        let mut state = 11;
        for sent in 0..FRAMES {
            let most = 1 << below(&mut state, 10);
            for _ in 0..below(&mut state, most) {
                std::hint::spin_loop();
            }
            from.send(to, &frame(sent, false), Vec::new());
            from.flush();
            // The next one would wake it, too.
            while came.load(Ordering::Acquire) <= sent && !sleeper.is_finished() {
                std::thread::yield_now();
            }
        }
    });
    assert_eq!(came.into_inner(), FRAMES);
}
