//! Pools that only a device touches: copies that fail, peers that do not read, ends that wait for what is under way.

use std::time::{Duration, Instant};

use kvferry_core::{End, PoolId};
use kvferry_transport::conformance::OnDevice;
use kvferry_transport::{Device, Direction, Event, Options, Provider, Stage, TransferError, TransportKind};

use super::{Party, id, layout, program, until};
use crate::TcpProvider;

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
fn no_end_is_told_while_a_copy_touches_the_pool() {
    let provider = on_device(8);
    let mut source = Party::new(&provider, 1, 16, &Options::default());
    let mut destination = Party::new(&provider, 2, 16, &Options::default());
    source.fill();
    for round in 0..60 {
        let to = destination.reach(&source);
        destination.events.clear();
        let pulled = destination.pull(round, to);
        for _ in 0..round * 2 {
            source.poll();
            destination.poll();
        }
        match round % 3 {
            0 => destination.transport.cancel(pulled),
            1 => destination.transport.fence(to.0),
            _ => destination.transport.disconnect(to.0),
        }
        let fenced = |party: &Party| party.events.iter().any(|event| matches!(event, Event::Fenced { .. }));
        until(&mut [&mut destination], "it ends", |parties| {
            (parties[0].failed(pulled) || parties[0].completed(pulled)) && (round % 3 != 1 || fenced(parties[0]))
        });
        // Nothing is written any more: a copy of this device writes at its very end.
        for (plane, block) in super::places(&destination.pool) {
            destination.pool.fill(plane, block, 0xee).unwrap();
        }
        let still = destination.snapshot();
        for _ in 0..50 {
            destination.poll();
            source.poll();
        }
        assert!(destination.snapshot() == still, "round {round}");
    }
}
