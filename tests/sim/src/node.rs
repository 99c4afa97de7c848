//! One simulated node.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Wake, Waker};

use kvferry_actors::{Answer, WorkerParts};
use kvferry_core::protocol::EngineEvent;
use kvferry_fabric_sim::NicId;
use tokio::task::LocalSet;

use crate::desk::Desk;
use crate::network::ClockRate;
use crate::timeline::Life;

/// Nodes that want to be polled, each once.
#[derive(Clone, Default)]
pub(crate) struct Woken {
    nodes: Arc<Mutex<Vec<usize>>>,
}

impl Woken {
    pub(crate) fn take(&self) -> Vec<usize> {
        std::mem::take(&mut self.nodes.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

struct Alarm {
    node: usize,
    rung: AtomicBool,
    woken: Woken,
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.rung.swap(true, Ordering::Relaxed) {
            self.woken.nodes.lock().unwrap_or_else(PoisonError::into_inner).push(self.node);
        }
    }
}

/// Where a worker's parts appear once it stands.
pub(crate) type Seat = Rc<RefCell<Option<WorkerParts>>>;

/// A node: its tasks while it is up, and the engine beside its worker.
pub(crate) struct SimNode {
    pub(crate) life: Life,
    pub(crate) clock: ClockRate,
    pub(crate) local: Option<LocalSet>,
    pub(crate) paused: bool,
    /// NICs that had something to say while it was paused.
    pub(crate) unheard: BTreeSet<NicId>,
    pub(crate) seat: Seat,
    pub(crate) engine: Option<Desk>,
    /// Whether its engine is to work at some time that is scheduled, or after the pause.
    pub(crate) engine_busy: bool,
    pub(crate) engine_stalled: bool,
    alarm: Arc<Alarm>,
    waker: Waker,
}

impl SimNode {
    pub(crate) fn new(node: usize, clock: ClockRate, woken: Woken) -> Self {
        let alarm = Arc::new(Alarm { node, rung: AtomicBool::new(false), woken });
        SimNode {
            life: Life { node, epoch: 0 },
            clock,
            local: None,
            paused: false,
            unheard: BTreeSet::new(),
            seat: Seat::default(),
            engine: None,
            engine_busy: false,
            engine_stalled: false,
            waker: Waker::from(Arc::clone(&alarm)),
            alarm,
        }
    }

    pub(crate) fn wake(&self) {
        self.waker.wake_by_ref();
    }

    /// Lets its tasks run until each waits for something.
    pub(crate) fn poll(&mut self) {
        self.alarm.rung.store(false, Ordering::Relaxed);
        if self.paused {
            return;
        }
        if let Some(local) = &mut self.local {
            // Ready means that it has no tasks; it may get some.
            let _ = Future::poll(Pin::new(local), &mut Context::from_waker(&self.waker));
        }
    }

    /// Hands the worker's calls to the engine. Says whether there were any.
    pub(crate) fn hand_over_calls(&mut self) -> bool {
        let mut seat = self.seat.borrow_mut();
        let (Some(parts), Some(engine)) = (seat.as_mut(), self.engine.as_mut()) else { return false };
        let answers = parts.answers.clone();
        let mut emit = |event: EngineEvent| answers.do_send(Answer(event));
        let mut any = false;
        while let Ok(call) = parts.calls.try_recv() {
            engine.handle(call, &mut emit);
            any = true;
        }
        any
    }

    /// Whether its worker has said that it may leave.
    pub(crate) fn has_drained(&self) -> bool {
        self.local.is_some() && self.engine.as_ref().is_some_and(Desk::has_drained)
    }

    /// Tells its worker something in the engine's name. Says whether it stands.
    pub(crate) fn tell(&self, event: EngineEvent) -> bool {
        self.seat.borrow().as_ref().map(|parts| parts.answers.do_send(Answer(event))).is_some()
    }

    /// Lets the engine work for a slice. Says whether it has more to do.
    pub(crate) fn work(&mut self) -> bool {
        let seat = self.seat.borrow();
        let Some(engine) = self.engine.as_mut() else { return false };
        let Some(parts) = seat.as_ref() else { return true };
        engine.work(&mut |event| parts.answers.do_send(Answer(event)))
    }
}
