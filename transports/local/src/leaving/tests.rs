use kvferry_transport::{Event, Pool, PoolKeys, Transport};

use super::*;
use crate::draining::tests::{Stubborn, layout, over, start};

const POOL: PoolId = PoolId(9);

/// A reader whose copy from a pool runs, and the pool's owner.
struct Two {
    at: LocalTransport<Stubborn>,
    owner: LocalTransport<Stubborn>,
    reader: Stubborn,
    lender: Stubborn,
    events: Vec<Event>,
    keys: PoolKeys,
}

impl Two {
    fn start() -> Two {
        let (reader, lender) = (Stubborn::default(), Stubborn::default());
        let (mut at, mut owner) = (over(reader.clone()), over(lender.clone()));
        at.bind(&Pool::allocate(PoolId(1), layout(), "at").unwrap()).unwrap();
        let keys = owner.bind(&Pool::allocate(POOL, layout(), "owner").unwrap()).unwrap();
        start(&mut at, &mut owner, &keys);
        Two { at, owner, reader, lender, events: Vec::new(), keys }
    }

    fn poll(&mut self) {
        for _ in 0..4 {
            self.at.poll(&mut Vec::new());
            self.owner.poll(&mut self.events);
        }
    }

    fn is_unbound(&self) -> bool {
        self.events.contains(&Event::Unbound { pool: POOL })
    }

    fn is_lost(&self) -> bool {
        self.events.iter().any(|event| matches!(event, Event::PeerLost { .. }))
    }
}

#[test]
fn a_pool_is_let_go_when_its_reader_reads_no_more() {
    let mut two = Two::start();
    two.owner.unbind(POOL);
    two.poll();
    assert!(!two.is_unbound(), "its reader's copy runs");
    two.reader.runs.set(false);
    two.poll();
    assert!(two.is_unbound() && !two.is_lost());
    assert_eq!(two.lender.cuts.get(), 0);
}

#[test]
fn a_pool_that_nobody_was_lent_is_let_go_at_once() {
    let mut two = Two::start();
    let other = PoolId(8);
    two.owner.bind(&Pool::allocate(other, layout(), "other").unwrap()).unwrap();
    two.owner.unbind(other);
    two.owner.poll(&mut two.events);
    assert!(two.events.contains(&Event::Unbound { pool: other }));
}

/// What is sent to a reader that is gone has to end first, whoever let whom go.
#[test]
fn a_reader_that_is_gone_is_cut_off() {
    for is_silent in [false, true] {
        let mut two = Two::start();
        two.owner.unbind(POOL);
        two.lender.is_cutting.set(true);
        if is_silent {
            two.owner.check_readers(Instant::now() + LET_GO_WITHIN + READS_WITHIN);
        } else {
            let peers: Vec<PeerId> = two.at.peers.keys().copied().collect();
            peers.into_iter().for_each(|peer| two.at.disconnect(peer));
        }
        two.poll();
        assert_eq!(two.lender.cuts.get(), 1);
        assert!(two.is_lost() && !two.is_unbound());
        two.lender.is_cutting.set(false);
        two.poll();
        assert!(two.is_unbound());
    }
}

/// It may have been stopped only, and may begin reads as long as the pool is bound; others are not disturbed until then.
#[test]
fn a_reader_that_goes_before_a_pool_is_withdrawn_is_cut_off_then() {
    let mut two = Two::start();
    let peers: Vec<PeerId> = two.at.peers.keys().copied().collect();
    peers.into_iter().for_each(|peer| two.at.disconnect(peer));
    two.poll();
    assert!(two.is_lost());
    assert_eq!(two.lender.cuts.get(), 0, "the pool stays");
    two.lender.is_cutting.set(true);
    two.owner.unbind(POOL);
    assert_eq!(two.lender.cuts.get(), 1);
    two.poll();
    assert!(!two.is_unbound());
    two.lender.is_cutting.set(false);
    two.poll();
    assert!(two.is_unbound());
    assert_eq!(two.lender.cuts.get(), 1);
}

/// A copy that does not end loses its connection, and with that what it reads.
#[test]
fn a_reader_cuts_what_does_not_end() {
    let mut two = Two::start();
    two.owner.unbind(POOL);
    two.poll();
    assert_eq!(two.at.leaving.len(), 1);
    two.at.settle_leaving(Instant::now() + READS_WITHIN);
    assert!(two.at.leaving.is_empty() && two.at.peers.is_empty());
    two.poll();
    assert!(two.is_unbound() && two.is_lost());
}

/// Until then it may begin to read.
#[test]
fn a_reader_that_is_gone_is_cut_off_after_the_others_have_let_go() {
    let mut two = Two::start();
    let mut third = over(Stubborn::default());
    third.bind(&Pool::allocate(PoolId(1), layout(), "third").unwrap()).unwrap();
    let peer = start(&mut third, &mut two.owner, &two.keys);
    third.disconnect(peer);
    two.poll();
    two.owner.unbind(POOL);
    two.poll();
    assert_eq!(two.lender.cuts.get(), 0, "another one still reads");
    two.reader.runs.set(false);
    two.poll();
    assert_eq!(two.lender.cuts.get(), 1);
    assert!(two.is_unbound());
}
