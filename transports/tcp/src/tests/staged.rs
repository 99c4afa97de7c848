//! Pools that only a device touches: copies that fail, peers that do not read, ends that wait for what is under way.

use std::io::Write;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::{End, PoolId};
use kvferry_transport::conformance::OnDevice;
use kvferry_transport::{Device, Direction, Event, Options, Provider, Stage, Staged, TransferError, TransportKind};

use super::{DEADLINE, Party, id, layout, program, until};
use crate::TcpProvider;
use crate::frame::{Kind, frame};
use crate::receiver::Sink;
use crate::share::Share;
use crate::stream::{Flow, Stream};

fn on_device(chunks: u32) -> OnDevice<TcpProvider> {
    fn all(_: PoolId) -> bool {
        true
    }
    OnDevice::new(TcpProvider::new(), all, 8 << 10, chunks)
}

#[test]
fn a_slot_is_free_when_nobody_has_it_and_no_copy_runs_in_it() {
    let device = Device { kind: TransportKind::Tcp, name: "lo".to_owned(), unavailable: None };
    let pool = on_device(4).allocate(&device, PoolId(1), layout(1), "test").unwrap();
    let options = Options { staged_chunk_bytes: 8 << 10, staged_chunks: 4, ..Options::default() };
    let (stage, program) = (Stage::open(&pool, &options).unwrap(), program(&pool));
    let mut strips = program.strips(program.whole());
    let slots = [(); 2].map(|()| stage.take(End::Source).unwrap());
    assert!(stage.take(End::Source).is_none(), "the other half is for the other way");
    for slot in &slots {
        assert_eq!(slot.start(&program, &mut strips, 0, usize::MAX), Ok(8 << 10));
    }
    let mark = stage.mark();
    assert!(!stage.is_past(mark) && slots[0].is_done() == Ok(false));
    drop(slots);
    assert!(stage.take(End::Source).is_none(), "copies still run in them");
    assert!(stage.take(End::Destination).is_some());
    while !stage.is_past(mark) {
        stage.poll();
    }
    assert_eq!((stage.left(End::Source), stage.left(End::Destination)), (2, 2));
}

#[test]
fn a_copy_that_fails_fails_its_transfer_only() {
    for direction in [Direction::Pull, Direction::Push] {
        for side in [0, 1] {
            let providers = [on_device(8), on_device(8)];
            let mut source = Party::new(&providers[0], 1, 8, &Options::default());
            let mut destination = Party::new(&providers[1], 2, 8, &Options::default());
            source.fill();
            let (to_source, to_destination) = (destination.reach(&source), source.reach(&destination));
            providers[side].faults().after(5);
            for (number, fails) in [(1, true), (2, false)] {
                let transfer = match direction {
                    Direction::Pull => destination.pull(number, to_source),
                    Direction::Push => {
                        destination.expect(number);
                        source.post(number, Direction::Push, to_destination)
                    }
                };
                until(&mut [&mut source, &mut destination], "the transfer ends", |parties| {
                    let ended =
                        |party: &Party| party.failed(transfer) || party.completed(transfer) || party.arrived(transfer);
                    ended(parties[1]) && (direction == Direction::Pull || ended(parties[0]))
                });
                assert_eq!(destination.failed(transfer), fails, "{direction:?}: {:?}", destination.events);
                assert!(direction == Direction::Pull || source.failed(transfer) == fails, "{:?}", source.events);
            }
            let here = [&source, &destination][side];
            let said = |event: &Event| match event {
                Event::Failed { error: TransferError::Io { message, .. }, .. } => message == "the test says so",
                _ => false,
            };
            // A pull's source has nobody to tell but its peer.
            assert!(here.events.iter().any(said) || (direction == Direction::Pull && side == 0));
            assert!(source.lost().is_empty() && destination.lost().is_empty());
            destination.verify();
        }
    }
}

#[test]
fn peers_that_do_not_read_keep_no_slot_that_another_needs() {
    let provider = on_device(4);
    let small = TcpProvider::new().with_socket_buffers(1);
    let mut source = Party::new(&provider, 1, 64, &Options::default());
    source.fill();
    let mut silent: Vec<_> = (2..5).map(|pool| Party::new(&small, pool, 64, &Options::default())).collect();
    for party in &mut silent {
        let to = party.reach(&source);
        party.pull(1, to);
        until(&mut [&mut source, party], "it is connected", |parties| {
            parties[1].events.iter().any(|event| matches!(event, Event::Connected { .. }))
        });
        party.poll();
    }
    // Their requests are served until nothing more goes; they never read again.
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(50) {
        source.poll();
    }
    let mut reader = Party::new(&TcpProvider::new(), 9, 64, &Options::default());
    let to = reader.reach(&source);
    let pulled = reader.pull(1, to);
    until(&mut [&mut source, &mut reader], "the pull", |parties| parties[1].completed(pulled));
    reader.verify();
    // What they were owed was not lost.
    for party in &mut silent {
        until(&mut [&mut source, party], "a late reader", |parties| parties[1].completed(id(1)));
        party.verify();
    }
}

#[test]
fn a_stream_that_stops_listening_keeps_no_slot() {
    let device = Device { kind: TransportKind::Tcp, name: "lo".to_owned(), unavailable: None };
    let pool = on_device(2).allocate(&device, PoolId(1), layout(1), "test").unwrap();
    let options = Options { staged_chunk_bytes: 8 << 10, staged_chunks: 2, ..Options::default() };
    let (stage, program) = (Stage::open(&pool, &options).unwrap(), Arc::new(program(&pool)));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (socket, _) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    let mut stream = Stream::new(socket);
    let left = program.bytes_in(program.whole());
    let staged = Staged::new(&stage, &program, program.whole());
    stream.add_sink((Flow::Push, 1), Sink::new(Share::Staged(staged), left));

    let bytes = frame(Kind::PushData, 1, &[7; 8000]);
    peer.write_all(&bytes[..5000]).unwrap();
    peer.shutdown(Shutdown::Write).unwrap();
    // The end of the stream is behind what is read now, so a short read does not say that nothing more is to be read.
    stream.ready(true, false, true);
    let mut signals = Vec::new();
    let start = Instant::now();
    while stage.left(End::Destination) > 0 {
        assert!(start.elapsed() < DEADLINE, "nothing came");
        stream.receive(1, &mut signals).unwrap();
    }
    // Nobody reads these, more than any socket takes.
    for _ in 0..8192 {
        stream.control(Kind::Refuse, 2, &[0; 4096]);
    }
    while stream.send(u64::MAX, &mut signals).unwrap() > 0 {}
    while stage.left(End::Destination) == 0 {
        assert!(start.elapsed() < DEADLINE, "the slot is kept");
        stage.poll();
        if stream.has_work() {
            stream.receive(1, &mut signals).unwrap();
        }
    }
    assert!(signals.is_empty() && !stream.has_work());
}

#[test]
fn what_an_unbound_pool_still_owes_keeps_nothing_of_it() {
    let provider = on_device(4);
    let small = TcpProvider::new().with_socket_buffers(1);
    let mut source = Party::new(&provider, 1, 64, &Options::default());
    source.fill();
    let one = Options { streams_per_peer: 1, ..Options::default() };
    let mut silent = Party::new(&small, 2, 64, &one);
    let to = silent.reach(&source);
    let pulled = silent.pull(1, to);
    until(&mut [&mut source, &mut silent], "it is connected", |parties| {
        parties[1].events.iter().any(|event| matches!(event, Event::Connected { .. }))
    });
    silent.poll();
    // Its request is served until nothing more goes.
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(50) {
        source.poll();
    }
    let pool = source.pool.id();
    source.transport.unbind(pool);
    until(&mut [&mut source], "it is unbound", |parties| parties[0].events.contains(&Event::Unbound { pool }));
    let memory = Arc::downgrade(source.pool.device().unwrap());
    let device = Device { kind: TransportKind::Tcp, name: "lo".to_owned(), unavailable: None };
    source.pool = provider.allocate(&device, PoolId(3), layout(1), "another").unwrap();
    assert!(memory.upgrade().is_none(), "something holds the device's memory");
    until(&mut [&mut source, &mut silent], "the pull is refused", |parties| parties[1].failed(pulled));
    assert!(silent.lost().is_empty());
}

/// How a transfer into a device's memory is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Cancel,
    Fence,
    Disconnect,
    Unbind,
    /// By the sender of a push.
    SenderCancel,
}

#[test]
fn no_end_is_told_while_a_copy_touches_the_pool() {
    let endings = [Ending::Cancel, Ending::Fence, Ending::Disconnect, Ending::Unbind];
    for round in 0..80 {
        ends_untouched(Direction::Pull, endings[round % 4], round);
    }
}

#[test]
fn no_end_of_a_push_is_told_while_a_copy_touches_the_pool() {
    let endings = [Ending::Cancel, Ending::Fence, Ending::Disconnect, Ending::Unbind, Ending::SenderCancel];
    for round in 0..100 {
        ends_untouched(Direction::Push, endings[round % 5], round);
    }
}

/// Ends a transfer after some polls; nothing may be written once that was told.
fn ends_untouched(direction: Direction, ending: Ending, round: usize) {
    let provider = on_device(8);
    let mut source = Party::new(&provider, 1, 16, &Options::default());
    let mut destination = Party::new(&provider, 2, 16, &Options::default());
    source.fill();
    let (transfer, pulls_from) = match direction {
        Direction::Pull => {
            let to = destination.reach(&source);
            (destination.pull(1, to), Some(to.0))
        }
        Direction::Push => {
            let to = source.reach(&destination);
            destination.expect(1);
            (source.post(1, Direction::Push, to), None)
        }
    };
    for _ in 0..round * 2 {
        source.poll();
        destination.poll();
    }
    let accepted = destination.events.iter().find_map(|event| match event {
        Event::Connected { peer } => Some(*peer),
        _ => None,
    });
    let (peer, pool) = (pulls_from.or(accepted), destination.pool.id());
    match (ending, peer) {
        (Ending::Fence, Some(peer)) => destination.transport.fence(peer),
        (Ending::Disconnect, Some(peer)) => destination.transport.disconnect(peer),
        (Ending::Unbind, _) => destination.transport.unbind(pool),
        (Ending::SenderCancel, _) => {
            source.transport.cancel(transfer);
            until(&mut [&mut source], "the sender gives up", |parties| {
                parties[0].failed(transfer) || parties[0].completed(transfer)
            });
            // Unless it was never heard of, it ends by itself.
            for _ in 0..500 {
                source.poll();
                destination.poll();
            }
        }
        _ => {}
    }
    // Also what was expected from nobody in particular.
    destination.transport.cancel(transfer);
    let said = |party: &Party| {
        let of = |event: &Event| match ending {
            Ending::Fence => matches!(event, Event::Fenced { .. }),
            Ending::Unbind => matches!(event, Event::Unbound { .. }),
            _ => true,
        };
        (peer.is_none() && ending == Ending::Fence) || party.events.iter().any(of)
    };
    let ended = |party: &Party| party.failed(transfer) || party.completed(transfer) || party.arrived(transfer);
    until(&mut [&mut destination], "it ends", |parties| ended(parties[0]) && said(parties[0]));
    // Nothing is written any more: a copy of this device writes at its very end.
    for (plane, block) in super::places(&destination.pool) {
        destination.pool.fill(plane, block, 0xee).unwrap();
    }
    let still = destination.snapshot();
    for _ in 0..50 {
        destination.poll();
        source.poll();
    }
    assert!(destination.snapshot() == still, "{direction:?}, {ending:?}, round {round}");
}
