//! Virtual time, and what is to happen in it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use actix::Recipient;
use bytes::Bytes;
use kvferry_actors::{LinkUp, Tick};
use kvferry_fabric_sim::NicId;

use crate::wires::{LinkId, Side};
use crate::world::World;

/// A node of the world and its incarnation: what is meant for an older one is dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Life {
    pub(crate) node: usize,
    pub(crate) epoch: u64,
}

/// The end of a dial.
pub(crate) type Answer = Box<dyn FnOnce(Result<LinkUp, String>)>;

/// Something to happen.
pub(crate) enum Happening {
    /// A timer runs out.
    Tick { life: Life, to: Recipient<Tick> },
    /// A dial arrives.
    Dialed { dialer: Life, address: String, answer: Answer },
    /// Its answer is back.
    Answered { dialer: Life, result: Result<LinkUp, String>, answer: Answer },
    /// A frame arrives at a link's end.
    Frame { link: LinkId, to: Side, frame: Bytes },
    /// A link's end learns that the other is gone.
    Closed { link: LinkId, to: Side },
    /// The fabric wants to be advanced.
    Fabric,
    /// A NIC has waited long enough for a peer.
    Nic(NicId),
    /// An engine has worked long enough on a slice.
    Engine { life: Life },
    /// Whatever the simulation's author wanted.
    Script(Box<dyn FnOnce(&mut World)>),
}

/// Shared by the kernel and the seams of its nodes. Things that happen at the same time happen in the order of being scheduled.
#[derive(Clone, Default)]
pub(crate) struct Timeline {
    inner: Rc<RefCell<Inner>>,
}

#[derive(Default)]
struct Inner {
    now: u64,
    scheduled: u64,
    happenings: BTreeMap<(u64, u64), Happening>,
}

impl Timeline {
    /// Nanoseconds since the world began.
    pub(crate) fn now(&self) -> u64 {
        self.inner.borrow().now
    }

    /// Schedules something, now if `at` has passed.
    pub(crate) fn at(&self, at: u64, happening: Happening) {
        let mut inner = self.inner.borrow_mut();
        let key = (at.max(inner.now), inner.scheduled);
        inner.scheduled += 1;
        inner.happenings.insert(key, happening);
    }

    pub(crate) fn after(&self, nanos: u64, happening: Happening) {
        self.at(self.now().saturating_add(nanos), happening);
    }

    /// The next thing that happens by `limit`, having moved time there; without one, moves time to `limit`.
    pub(crate) fn next(&self, limit: u64) -> Option<Happening> {
        let mut inner = self.inner.borrow_mut();
        match inner.happenings.first_key_value().map(|((at, _), _)| *at) {
            Some(at) if at <= limit => {
                inner.now = at;
                inner.happenings.pop_first().map(|(_, happening)| happening)
            }
            _ => {
                inner.now = inner.now.max(limit);
                None
            }
        }
    }
}
