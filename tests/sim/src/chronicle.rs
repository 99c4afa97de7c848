//! Everything that is worth judging or telling, in order.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;

use kvferry_core::protocol::{EngineCall, EngineEvent, Event, Finished, Refusal};
use kvferry_core::{Direction, HandoverId, RequestId, TransferId};
use kvferry_fabric_sim::Violation;

use crate::faults::Fault;
use crate::timeline::Life;
use crate::trace::{Tag, Trace, call_words, engine_words, event_words};

/// One thing that happened.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Nanoseconds since the world began.
    pub at: u64,
    /// On which node.
    pub node: usize,
    /// In which incarnation of it; 0 for what concerns no node.
    pub epoch: u64,
    /// What.
    pub what: What,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Entry { at, node, epoch, what } = self;
        write!(f, "{}.{:09} n{node}/{epoch} {what:?}", at / 1_000_000_000, at % 1_000_000_000)
    }
}

/// What happened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum What {
    /// An actor reported it.
    Observed(Event),
    /// A worker asked its engine.
    Called(EngineCall),
    /// An engine told its worker.
    Told(EngineEvent),
    /// An engine has really let a handover's blocks go.
    LetGo(HandoverId),
    /// A worker posted a transfer.
    Posted {
        /// Its name.
        id: TransferId,
        /// Who reads and who writes.
        direction: Direction,
        /// All that it moves.
        bytes: u64,
        /// The unit of its step at which that begins: rails may move the same more than once.
        first: u64,
    },
    /// A worker expects a push.
    Expected {
        /// Its name.
        id: TransferId,
        /// All that it moves.
        bytes: u64,
        /// The unit of its step at which that begins.
        first: u64,
    },
    /// A transfer that was posted or expected here ended, or not well.
    Landed {
        /// Its name.
        id: TransferId,
        /// Bytes that moved; `None` when it failed.
        bytes: Option<u64>,
    },
    /// A node came up.
    Started,
    /// A node died.
    Crashed,
    /// Its incarnation is over: an actor panicked, or others had declared it lost.
    Ended(String),
    /// A node did not come up.
    NoStart(String),
    /// A fault began or was mended.
    Fault(Fault, bool),
    /// Faults are over.
    Healed,
    /// A user asked for something.
    Submitted {
        /// Which request.
        request: RequestId,
        /// Tokens of its prompt.
        tokens: u64,
        /// Whether it was asked for before, of a scheduler that is gone.
        again: bool,
    },
    /// A user no longer wants it.
    CancelAsked(RequestId),
    /// A user was answered.
    Answered(RequestId, Result<Finished, Refusal>),
    /// The shadow of memory found something.
    Breach(Violation),
}

/// What happened since it was last taken; all of it goes into the trace as well.
#[derive(Clone, Default)]
pub(crate) struct Chronicle {
    entries: Rc<RefCell<Vec<Entry>>>,
    trace: Rc<RefCell<Trace>>,
}

impl Chronicle {
    pub(crate) fn put(&self, at: u64, life: Life, what: What) {
        let [kind, whom] = words(&what);
        self.trace.borrow_mut().put(at, Tag::Observed, [life.node as u64 | life.epoch << 32, kind, whom]);
        self.entries.borrow_mut().push(Entry { at, node: life.node, epoch: life.epoch, what });
    }

    pub(crate) fn take(&self) -> Vec<Entry> {
        std::mem::take(&mut self.entries.borrow_mut())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.borrow().is_empty()
    }

    pub(crate) fn trace(&self) -> &Rc<RefCell<Trace>> {
        &self.trace
    }
}

/// What of it goes into the trace.
fn words(what: &What) -> [u64; 2] {
    match what {
        What::Observed(event) => event_words(event),
        What::Called(call) => call_words(call),
        What::Told(event) => engine_words(event),
        What::LetGo(handover) => [0x2100, handover.0],
        What::Posted { id, .. } => [0x3000, id.0 as u64 ^ (id.0 >> 64) as u64],
        What::Expected { id, .. } => [0x3001, id.0 as u64 ^ (id.0 >> 64) as u64],
        What::Landed { id, bytes } => [0x3100 | u64::from(bytes.is_some()), id.0 as u64 ^ (id.0 >> 64) as u64],
        What::Started => [0x4000, 0],
        What::Crashed => [0x4001, 0],
        What::Ended(_) => [0x4002, 0],
        What::NoStart(_) => [0x4003, 0],
        What::Fault(_, on) => [0x4100 | u64::from(*on), 0],
        What::Healed => [0x4200, 0],
        What::Submitted { request, .. } => [0x5000, request.0],
        What::CancelAsked(request) => [0x5001, request.0],
        What::Answered(request, answer) => {
            let kind = match answer {
                Ok(finished) if finished.outcome.is_delivered() => 1,
                Ok(_) => 2,
                Err(_) => 3,
            };
            [0x5100 | kind, request.0]
        }
        What::Breach(violation) => [0x6000, violation.handover.0],
    }
}
