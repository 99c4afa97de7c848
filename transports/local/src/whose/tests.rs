//! Peers that say they are somebody else, and memory that is open for one peer.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use kvferry_core::{FenceProof, PoolId, Program, TransferId};
use kvferry_transport::conformance::whole_blocks;
use kvferry_transport::{Direction, Event, Expected, Pool, PoolKeys, RemotePool, Transfer, TransferError, Transport};

use super::*;
use crate::draining::tests::{Stubborn, layout, open, start};
use crate::remote::Access;

type Local = LocalTransport<Stubborn>;

/// One that copies for as long as the first says, and others whose copies end at once.
fn bound(runs: &Rc<Cell<bool>>, pool: u32) -> (Local, PoolKeys) {
    let mut transport = open(runs);
    let keys = transport.bind(&Pool::allocate(PoolId(pool), layout(), "pool").unwrap()).unwrap();
    (transport, keys)
}

fn program() -> Arc<Program> {
    Arc::new(whole_blocks(1, 16, 4096, 0..16, 0..16))
}

fn poll(at: &mut Local, others: &mut [&mut Local]) -> Vec<Event> {
    let mut events = Vec::new();
    for _ in 0..8 {
        at.poll(&mut events);
        others.iter_mut().for_each(|other| other.poll(&mut Vec::new()));
    }
    events
}

fn post(from: &mut Local, (peer, remote): (PeerId, RemotePool), id: u128, direction: Direction) {
    let (program, local) = (program(), *from.pools.keys().next().unwrap());
    let (id, range) = (TransferId(id), program.whole());
    from.post(Transfer { id, peer, direction, local, remote, program, range, notice: None }).unwrap();
}

/// Calls, and rings for a push.
fn ring(from: &mut Local, to: &mut Local, keys: &PoolKeys, id: u128) -> PeerId {
    let peer = from.connect(&to.address()).unwrap();
    let remote = from.import(peer, keys, &layout()).unwrap();
    post(from, (peer, remote), id, Direction::Push);
    peer
}

fn expect(at: &mut Local, id: u128, from: Option<&Local>) {
    let (program, pool) = (program(), *at.pools.keys().next().unwrap());
    let (id, range, from) = (TransferId(id), program.whole(), from.map(Transport::address));
    at.expect(Expected { id, from, pool, program, range }).unwrap();
}

fn proof(peer: PeerId) -> Event {
    Event::Fenced { peer, proof: FenceProof::OwnerCopies }
}

/// The kernel says that it is of that process.
fn set_process(at: &mut Local, peer: PeerId, process: i32) {
    at.peers.get_mut(&peer).unwrap().identity.process = Pid::from_raw(process);
}

fn caller(at: &Local, called: &[PeerId]) -> PeerId {
    *at.peers.keys().find(|peer| !called.contains(peer)).unwrap()
}

#[test]
fn a_fence_is_about_all_connections_of_a_process_whatever_they_say() {
    let (runs, never) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(false)));
    let ((mut at, keys), (mut owner, _), (mut other, _)) = (bound(&runs, 1), bound(&never, 9), bound(&never, 8));
    let called = at.connect(&owner.address()).unwrap();
    poll(&mut at, &mut [&mut owner]);
    // It calls as another transport, and pushes.
    ring(&mut other, &mut at, &keys, 5);
    poll(&mut at, &mut [&mut owner, &mut other]);
    let lies = caller(&at, &[called]);
    [called, lies].into_iter().for_each(|peer| set_process(&mut at, peer, 1));
    expect(&mut at, 5, None);
    poll(&mut at, &mut [&mut owner, &mut other]);
    assert!(runs.get(), "it is copied");
    at.fence(called);
    let events = poll(&mut at, &mut [&mut owner, &mut other]);
    assert!(!events.contains(&proof(called)), "the copy still writes: {events:?}");
    runs.set(false);
    let events = poll(&mut at, &mut [&mut owner, &mut other]);
    let failed = Event::Failed { id: TransferId(5), error: TransferError::Cancelled };
    assert!(events.contains(&failed) && events.contains(&proof(called)), "{events:?}");
}

/// Several nodes of one process, this one among them, are not each other.
#[test]
fn a_fence_inside_a_process_is_about_one_transport() {
    let (runs, never) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(false)));
    let ((mut at, _), (mut owner, keys), (mut other, _)) = (bound(&runs, 1), bound(&never, 9), bound(&never, 8));
    start(&mut at, &mut owner, &keys);
    let peer = at.connect(&other.address()).unwrap();
    poll(&mut at, &mut [&mut owner, &mut other]);
    assert!(at.peers.values().all(|peer| peer.identity.process == Some(getpid())));
    at.fence(peer);
    assert!(poll(&mut at, &mut [&mut owner, &mut other]).contains(&proof(peer)));
    assert_eq!(at.posted.len(), 1, "that of the owner goes on");
    runs.set(false);
}

#[test]
fn nobody_says_that_it_is_a_transport_of_another_process() {
    let never = Rc::new(Cell::new(false));
    let ((mut at, _), (mut owner, _), (mut liar, _)) = (bound(&never, 1), bound(&never, 9), bound(&never, 8));
    let called = at.connect(&owner.address()).unwrap();
    poll(&mut at, &mut [&mut owner]);
    set_process(&mut at, called, 1);
    liar.instance = owner.instance;
    liar.connect(&at.address()).unwrap();
    let events = poll(&mut at, &mut [&mut owner, &mut liar]);
    assert_eq!((at.peers.keys().copied().collect::<Vec<_>>(), events), (vec![called], vec![]));
    assert!(liar.peers.is_empty());

    // The lie came first.
    let ((mut at, _), (mut owner, _)) = (bound(&never, 1), bound(&never, 9));
    liar.instance = owner.instance;
    liar.connect(&at.address()).unwrap();
    poll(&mut at, &mut [&mut liar]);
    let lies = caller(&at, &[]);
    set_process(&mut at, lies, 1);
    let called = at.connect(&owner.address()).unwrap();
    let events = poll(&mut at, &mut [&mut owner, &mut liar]);
    let lost = |event: &Event| matches!(event, Event::PeerLost { peer, .. } if *peer == lies);
    assert!(events.iter().any(lost) && events.contains(&Event::Connected { peer: called }), "{events:?}");
}

#[test]
fn a_push_is_taken_from_nobody_but_its_source() {
    for is_early in [false, true] {
        let never = Rc::new(Cell::new(false));
        let ((mut at, keys), (mut source, _), (mut liar, _)) = (bound(&never, 1), bound(&never, 9), bound(&never, 8));
        if !is_early {
            expect(&mut at, 5, Some(&source));
        }
        ring(&mut liar, &mut at, &keys, 5);
        let mut told = poll(&mut liar, &mut [&mut at]);
        if is_early {
            expect(&mut at, 5, Some(&source));
        }
        told.extend(poll(&mut liar, &mut [&mut at]));
        let refused = |event: &Event| matches!(event, Event::Failed { error: TransferError::Refused(reason), .. } if reason.contains("another transport"));
        assert!(told.iter().any(refused), "{told:?}");
        assert!(!never.get() && at.expecting.contains_key(&TransferId(5)), "the true one may still come");
        ring(&mut source, &mut at, &keys, 5);
        poll(&mut source, &mut [&mut at]);
        assert!(never.get(), "it is copied");
        never.set(false);
    }
}

#[test]
fn what_a_push_is_expected_from_has_to_be_an_address() {
    let never = Rc::new(Cell::new(false));
    let (mut at, _) = bound(&never, 1);
    let (program, range) = (program(), program().whole());
    let from = Some(b"nobody"[..].into());
    let refused = at.expect(Expected { id: TransferId(5), from, pool: PoolId(1), program, range });
    assert!(matches!(refused, Err(kvferry_transport::PostError::BadSource { .. })), "{refused:?}");
}

#[test]
fn memory_is_open_once_for_a_peer_and_closed_by_its_fence() {
    let (runs, never) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(false)));
    let ((mut at, own), (mut owner, keys)) = (bound(&runs, 1), bound(&never, 9));
    let called = start(&mut at, &mut owner, &keys);
    expect(&mut at, 5, Some(&owner));
    ring(&mut owner, &mut at, &own, 5);
    poll(&mut at, &mut [&mut owner]);
    assert_eq!((at.jobs.len(), at.peers.len()), (2, 2), "it is read over two connections");
    assert_eq!(at.backend.opened(), 1);
    at.fence(called);
    assert_eq!(at.backend.opened(), 1, "copies still read it");
    runs.set(false);
    let events = poll(&mut at, &mut [&mut owner]);
    assert!(events.contains(&proof(called)), "{events:?}");
    assert_eq!((at.backend.opened(), at.peers.len()), (0, 2), "the connections stand");

    // Whoever needs it again asks again.
    let remote = *at.remotes.iter().find(|(_, remote)| remote.peer == called).unwrap().0;
    post(&mut at, (called, remote), 6, Direction::Pull);
    poll(&mut at, &mut [&mut owner]);
    assert_eq!((at.jobs.len(), at.backend.opened()), (1, 1));
    runs.set(false);
}

#[test]
fn what_was_asked_for_before_a_fence_is_not_opened_after_it() {
    let never = Rc::new(Cell::new(false));
    let ((mut at, _), (mut owner, keys)) = (bound(&never, 1), bound(&never, 9));
    let peer = at.connect(&owner.address()).unwrap();
    let remote = at.import(peer, &keys, &layout()).unwrap();
    at.fence(peer);
    poll(&mut at, &mut [&mut owner]);
    assert!(matches!(at.remotes[&remote].access, Access::Closed));
    assert_eq!(at.backend.opened(), 0);
    post(&mut at, (peer, remote), 6, Direction::Pull);
    poll(&mut at, &mut [&mut owner]);
    assert_eq!((at.jobs.len(), at.backend.opened()), (1, 1));
    never.set(false);
}

/// A member may write another's name into its own profile, beside its own address.
#[test]
fn who_takes_the_name_of_another_does_not_lend_it_memory() {
    let never = Rc::new(Cell::new(false));
    let ((mut at, _), (mut owner, keys), (mut liar, _)) = (bound(&never, 1), bound(&never, 9), bound(&never, 9));
    liar.instance = owner.instance;
    liar.pools.get_mut(&PoolId(9)).unwrap().token = owner.pools[&PoolId(9)].token;
    let first = at.connect(&liar.address()).unwrap();
    at.import(first, &keys, &layout()).unwrap();
    poll(&mut at, &mut [&mut owner, &mut liar]);
    assert_eq!(at.backend.opened(), 1);
    set_process(&mut at, first, 1);
    let second = at.connect(&owner.address()).unwrap();
    let remote = at.import(second, &keys, &layout()).unwrap();
    assert!(matches!(at.remotes[&remote].access, Access::Asked(_)), "only who is there says what is open there");
    let events = poll(&mut at, &mut [&mut owner, &mut liar]);
    assert!(
        matches!(events[..], [Event::PeerLost { peer, .. }] if peer == second),
        "who was there first stays: {events:?}"
    );
    assert_eq!((at.peers.len(), at.backend.opened()), (1, 1));
}

/// What is open of one process is not taken for the memory of another, whatever both are called.
#[test]
fn memory_is_shared_between_connections_of_one_process_only() {
    for (process, opened) in [(getpid().as_raw_nonzero().get(), 1), (1, 2)] {
        let never = Rc::new(Cell::new(false));
        let ((mut at, _), (mut owner, keys)) = (bound(&never, 1), bound(&never, 9));
        let first = at.connect(&owner.address()).unwrap();
        at.import(first, &keys, &layout()).unwrap();
        poll(&mut at, &mut [&mut owner]);
        let second = at.connect(&owner.address()).unwrap();
        poll(&mut at, &mut [&mut owner]);
        set_process(&mut at, second, process);
        at.import(second, &keys, &layout()).unwrap();
        poll(&mut at, &mut [&mut owner]);
        assert_eq!(at.backend.opened(), opened);
    }
}
