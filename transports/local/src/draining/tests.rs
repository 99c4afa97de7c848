//! A backend whose copies run on after they were stopped.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use kvferry_core::{PoolLayout, Program, TransportKind, UnitRange};
use kvferry_transport::conformance::{block_planes, whole_blocks};
use kvferry_transport::{Direction, Evidence, NicInfo, Options, Pool, PoolKeys, Transfer, Transport, Wait};

use super::*;
use crate::backend::{Shared, Step};
use crate::carrier::Owner;
use crate::sockets::Sockets;
use crate::wire::MemoryKind;

/// What becomes of its copies, and what it is told.
#[derive(Clone, Default)]
pub(crate) struct Stubborn {
    /// Its copies run.
    pub(crate) runs: Rc<Cell<bool>>,
    /// How often it was to cut what is sent to peers that are gone, and whether it is about it.
    pub(crate) cuts: Rc<Cell<u32>>,
    pub(crate) is_cutting: Rc<Cell<bool>>,
    /// As many holders as there are pieces of peers' memory that it has open, beside itself.
    holders: Rc<()>,
}

impl Stubborn {
    /// Pieces of peers' memory that are open.
    pub(crate) fn opened(&self) -> usize {
        Rc::strong_count(&self.holders) - 1
    }
}

/// A piece of a peer's memory that is open.
pub(crate) struct Opened(#[expect(dead_code, reason = "it is only held")] Rc<()>);

/// A copy, and what it reads.
pub(crate) struct Launched(Rc<Cell<bool>>, #[expect(dead_code, reason = "it is only held")] Rc<Opened>);

impl Backend for Stubborn {
    const KIND: TransportKind = TransportKind::Shm;
    const HANDLES: bool = true;
    type Carrier = Sockets;
    type Memory = Opened;
    type Copy = Launched;

    const OUTLASTS: bool = true;

    fn bind(&mut self, _: &Pool) -> Result<(), String> {
        Ok(())
    }

    fn unbind(&mut self, _: PoolId) {}

    fn share(&mut self, _: &Pool, _: bool) -> Result<Shared, String> {
        Ok(Shared { memory: MemoryKind::Opaque(Bytes::new()), descriptors: Vec::new() })
    }

    fn open(&mut self, _: Owner<'_>, _: &PoolLayout, _: MemoryKind, _: Vec<OwnedFd>) -> Result<Opened, String> {
        Ok(Opened(Rc::clone(&self.holders)))
    }

    fn reached(&self, _: &Opened) -> Evidence {
        Evidence::connected(Vec::new())
    }

    fn lent(&self, _: &MemoryKind) -> Evidence {
        Evidence::connected(Vec::new())
    }

    fn copy(
        &mut self,
        _: Arc<Program>,
        _: UnitRange,
        _: Arc<PoolLayout>,
        memory: Rc<Opened>,
        _: Pool,
    ) -> Result<Launched, TransferError> {
        self.runs.set(true);
        Ok(Launched(Rc::clone(&self.runs), memory))
    }

    fn cut(&mut self) {
        self.cuts.set(self.cuts.get() + 1);
    }

    fn is_cutting(&self) -> bool {
        self.is_cutting.get()
    }

    fn wait(&self) -> Option<Wait> {
        None
    }
}

impl Copying for Launched {
    fn step(&mut self, _: u64) -> Result<Step, TransferError> {
        Ok(Step::Waiting)
    }

    fn bytes(&self) -> u64 {
        0
    }

    fn pieces(&self) -> u64 {
        0
    }

    fn is_running(&mut self) -> bool {
        self.0.get()
    }
}

pub(crate) fn open(runs: &Rc<Cell<bool>>) -> LocalTransport<Stubborn> {
    over(Stubborn { runs: Rc::clone(runs), ..Stubborn::default() })
}

pub(crate) fn over(backend: Stubborn) -> LocalTransport<Stubborn> {
    let info = NicInfo {
        kind: TransportKind::Shm,
        device: "memory".into(),
        host: "here".into(),
        library: None,
        bits_per_second: None,
    };
    crate::open(backend, info, &Options::default()).unwrap()
}

pub(crate) fn layout() -> PoolLayout {
    block_planes(1, 16, 4096)
}

/// A connection, and a pull over it that runs.
pub(crate) fn start(
    at: &mut LocalTransport<Stubborn>,
    owner: &mut LocalTransport<Stubborn>,
    keys: &PoolKeys,
) -> PeerId {
    let peer = at.connect(&owner.address()).unwrap();
    let remote = at.import(peer, keys, &layout()).unwrap();
    let program = Arc::new(whole_blocks(1, 16, 4096, 0..16, 0..16));
    let (id, range) = (TransferId(1), program.whole());
    let pull =
        Transfer { id, peer, direction: Direction::Pull, local: PoolId(1), remote, program, range, notice: None };
    at.post(pull).unwrap();
    while at.jobs.is_empty() {
        at.poll(&mut Vec::new());
        owner.poll(&mut Vec::new());
    }
    peer
}

#[test]
fn a_new_connection_is_fenced_when_copies_of_the_old_one_have_stopped() {
    for is_lost in [false, true] {
        let (runs, never) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(false)));
        let (mut at, mut owner) = (open(&runs), open(&never));
        at.bind(&Pool::allocate(PoolId(1), layout(), "at").unwrap()).unwrap();
        let keys = owner.bind(&Pool::allocate(PoolId(9), layout(), "owner").unwrap()).unwrap();
        let old = start(&mut at, &mut owner, &keys);
        if is_lost {
            at.lose(old, "it broke");
        } else {
            at.disconnect(old);
        }
        let other = at.connect(&open(&never).address()).unwrap();
        let new = at.connect(&owner.address()).unwrap();
        at.fence(other);
        at.fence(new);
        let mut events = Vec::new();
        for _ in 0..3 {
            at.poll(&mut events);
            owner.poll(&mut Vec::new());
        }
        let fenced = |peer| Event::Fenced { peer, proof: FenceProof::OwnerCopies };
        assert!(events.contains(&fenced(other)), "that is another transport: {events:?}");
        assert!(!events.contains(&fenced(new)), "the copy still writes: {events:?}");
        runs.set(false);
        events.clear();
        at.poll(&mut events);
        let failed = |event: &Event| matches!(event, Event::Failed { id: TransferId(1), .. });
        assert!(events.iter().any(failed) && events.contains(&fenced(new)), "{events:?}");
    }
}

/// The fence is asked for again, by the name of a connection that is gone, while a copy of another connection runs that is gone, too.
#[test]
fn a_fence_of_a_connection_that_is_gone_waits_for_all_copies_of_its_transport() {
    for forgets in [false, true] {
        let (runs, never) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(false)));
        let (mut at, mut owner) = (open(&runs), open(&never));
        at.bind(&Pool::allocate(PoolId(1), layout(), "at").unwrap()).unwrap();
        let keys = owner.bind(&Pool::allocate(PoolId(9), layout(), "owner").unwrap()).unwrap();
        let copying = start(&mut at, &mut owner, &keys);
        let idle = at.connect(&owner.address()).unwrap();
        let other = at.connect(&open(&never).address()).unwrap();
        [idle, copying, other].into_iter().for_each(|peer| at.lose(peer, "it broke"));
        if forgets {
            at.gone.clear();
        }
        at.fence(idle);
        at.fence(other);
        let mut events = Vec::new();
        at.poll(&mut events);
        let fenced = |peer| Event::Fenced { peer, proof: FenceProof::OwnerCopies };
        assert!(!events.contains(&fenced(idle)), "the copy still writes: {events:?}");
        assert_eq!(
            events.contains(&fenced(other)),
            !forgets,
            "another transport's, as long as that is known: {events:?}"
        );
        runs.set(false);
        at.poll(&mut events);
        assert!(events.contains(&fenced(idle)) && events.contains(&fenced(other)), "{events:?}");
    }
}

/// Who never greeted had no transfers, and pushes nobody out of what is remembered.
#[test]
fn callers_that_never_greeted_are_not_remembered() {
    let never = Rc::new(Cell::new(false));
    let (mut at, mut caller) = (open(&never), open(&never));
    let _calling = caller.connect(&at.address()).unwrap();
    // Its greeting is not sent yet: the socket alone has called.
    while at.peers.is_empty() {
        at.poll(&mut Vec::new());
    }
    let called = *at.peers.keys().next().unwrap();
    assert!(at.peers[&called].is_stranger());
    at.lose(called, "it did not greet in time");
    assert!(at.gone.is_empty());
}
