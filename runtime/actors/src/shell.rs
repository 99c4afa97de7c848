//! What every protocol actor does around its core: run commands, pass events on, arm one timer.

use std::collections::BTreeMap;
use std::rc::Rc;

use actix::prelude::*;
use kvferry_core::protocol::{Command, EngineCall, Event, Outbox, Vitals};
use kvferry_core::{Moment, NodeId};
use tokio::sync::mpsc;

use crate::nic::NicRequest;
use crate::router::Router;
use crate::seams::{Clock, NicPort, Tick};

/// Where events of a node go.
pub type Observer = Rc<dyn Fn(Event)>;

/// Asks an actor what it has in hand.
#[derive(Debug)]
pub struct Inspect {
    /// Where the answer goes.
    pub to: mpsc::UnboundedSender<Vitals>,
}

impl Message for Inspect {
    type Result = ();
}

impl Inspect {
    pub(crate) fn answer(self, vitals: Vitals) {
        // Whoever asked may have gone.
        let _ = self.to.send(vitals);
    }
}

/// The effects side of an actor.
pub(crate) struct Shell {
    clock: Rc<dyn Clock>,
    router: Router,
    nics: Vec<NicPort>,
    engine: Option<mpsc::UnboundedSender<EngineCall>>,
    observer: Observer,
    /// In which conversation this actor has heard something of a node: what it says is meant for that one. The mesh is ahead of it.
    heard: BTreeMap<NodeId, u64>,
    armed: Option<Moment>,
}

impl Shell {
    /// A shell for an actor without NICs or engine.
    pub(crate) fn new(clock: Rc<dyn Clock>, router: Router, observer: Observer) -> Self {
        Shell { clock, router, nics: Vec::new(), engine: None, observer, heard: BTreeMap::new(), armed: None }
    }

    /// With the NICs and the engine of a worker.
    pub(crate) fn with_worker(mut self, nics: Vec<NicPort>, engine: mpsc::UnboundedSender<EngineCall>) -> Self {
        self.nics = nics;
        self.engine = Some(engine);
        self
    }

    /// Now, on the node's clock.
    pub(crate) fn now(&self) -> Moment {
        self.clock.now()
    }

    /// The node's router.
    pub(crate) fn router(&self) -> &Router {
        &self.router
    }

    /// The actor hears something of a node in this conversation; 0 of its own node.
    pub(crate) fn hear(&mut self, from: NodeId, talk: u64) {
        if talk > 0 {
            self.heard.insert(from, talk);
        }
    }

    /// The actor hears that the conversation with a node is over.
    pub(crate) fn part(&mut self, node: NodeId) {
        self.heard.remove(&node);
    }

    /// Tells whoever watches.
    pub(crate) fn observe(&self, event: Event) {
        (self.observer)(event);
    }

    /// Runs everything in the outbox, handing each event to `each` first.
    pub(crate) fn run(&mut self, outbox: &mut Outbox, mut each: impl FnMut(&Event)) {
        self.clock.stir();
        while let Some(command) = outbox.poll_command() {
            match command {
                Command::Send { to, message } => self.router.send_within(to, self.heard.get(&to).copied(), message),
                Command::Meet { node } => self.router.meet(node),
                Command::Engine(call) => {
                    if let Some(engine) = &self.engine {
                        // An engine that is gone needs no calls; its node is being shut down.
                        let _ = engine.send(call);
                    }
                }
                Command::Nic { nic, command } => {
                    if let Some(port) = self.nics.get(nic) {
                        port.do_send(NicRequest(command));
                    }
                }
                _ => {}
            }
        }
        while let Some(event) = outbox.poll_event() {
            each(&event);
            (self.observer)(event);
        }
    }

    /// Arms the actor's one timer, if `due` is earlier than what is armed.
    pub(crate) fn arm(&mut self, due: Option<Moment>, to: impl FnOnce() -> Recipient<Tick>) {
        if let Some(due) = due
            && self.armed.is_none_or(|armed| due < armed)
        {
            self.armed = Some(due);
            self.clock.wake(due, to());
        }
    }

    /// A tick came, now. One of a timer that was superseded arms nothing anew: each that did would double the timers.
    pub(crate) fn ticked(&mut self) -> Moment {
        let now = self.clock.now();
        self.armed = self.armed.filter(|armed| now < *armed);
        now
    }
}
