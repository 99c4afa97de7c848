//! The kernel: nodes, time, and what happens.

use std::cell::{Ref, RefCell};
use std::rc::Rc;
use std::time::Duration;

use kvferry_actors::{Environment, Observer, OnPanic, Surroundings};
use kvferry_core::Epoch;
use kvferry_core::protocol::Event;
use kvferry_fabric_sim::{Fabric, FabricOptions, NicId, OnTheWire, Pacing};
use kvferry_synthetic::{Engine, EngineReport};
use tokio::task::LocalSet;

use crate::dice::Dice;
use crate::host::{Nics, SimHost};
use crate::network::{Latency, Listeners, SimClock, SimNetwork};
use crate::node::{Seat, SimNode, Woken};
use crate::panics;
use crate::timeline::{Happening, Life, Timeline};
use crate::trace::{Tag, Trace, event_words, hash_bytes};
use crate::wires::Wires;

/// Rounds of polling at one instant after which it is taken for a loop that never ends.
const ROUNDS_MAX: u32 = 100_000;

/// What a world is like.
#[derive(Clone, Debug)]
pub struct WorldOptions {
    /// Everything random follows from it.
    pub seed: u64,
    /// Of control links, one way, at least.
    pub link_latency: Duration,
    /// Added to it, at most.
    pub link_jitter: Duration,
    /// The data fabric.
    pub fabric: FabricOptions,
    /// What becomes of bytes that had left a node's NICs when it crashes.
    pub crash_leaves: OnTheWire,
    /// What a slice of an engine's work takes, at least and at most.
    pub engine_slice: (Duration, Duration),
}

impl Default for WorldOptions {
    fn default() -> Self {
        WorldOptions {
            seed: 0,
            link_latency: Duration::from_micros(20),
            link_jitter: Duration::from_micros(30),
            fabric: FabricOptions::default(),
            crash_leaves: OnTheWire::Lands,
            engine_slice: (Duration::from_micros(20), Duration::from_micros(200)),
        }
    }
}

/// Something that an actor reported.
#[derive(Clone, Debug)]
pub struct Observed {
    /// Nanoseconds since the world began.
    pub at: u64,
    /// On which node.
    pub node: usize,
    /// What.
    pub event: Event,
}

/// One simulated world: a discrete-event kernel over the actors of its nodes. Runs on the thread that made it.
pub struct World {
    options: WorldOptions,
    timeline: Timeline,
    fabric: Fabric,
    fabric_due: Option<u64>,
    wires: Wires,
    listeners: Listeners,
    latency: Latency,
    nics: Nics,
    schedule: Dice,
    compute: Dice,
    nodes: Vec<SimNode>,
    woken: Woken,
    trace: Rc<RefCell<Trace>>,
    observed: Rc<RefCell<Vec<Observed>>>,
    happened: u64,
    panics_before: u64,
    stuck: bool,
}

impl World {
    /// A world without nodes.
    pub fn new(options: WorldOptions) -> Self {
        panics::watch();
        let seed = options.seed;
        let latency = Latency::new(options.link_latency, options.link_jitter, Dice::new(seed, "network", 0));
        let fabric = FabricOptions {
            seed: Dice::new(seed, "fabric", 0).word(),
            pacing: Pacing::Driven,
            ..options.fabric.clone()
        };
        World {
            timeline: Timeline::default(),
            fabric: Fabric::new(fabric),
            fabric_due: None,
            wires: Wires::default(),
            listeners: Listeners::default(),
            latency,
            nics: Nics::default(),
            schedule: Dice::new(seed, "schedule", 0),
            compute: Dice::new(seed, "compute", 0),
            nodes: Vec::new(),
            woken: Woken::default(),
            trace: Rc::default(),
            observed: Rc::default(),
            happened: 0,
            panics_before: panics::seen(),
            stuck: false,
            options,
        }
    }

    /// Adds a node, which is down, and returns its number.
    pub fn add_node(&mut self) -> usize {
        let node = self.nodes.len();
        let offset = Dice::new(self.options.seed, "clock", node as u64).below(1 << 50);
        self.nodes.push(SimNode::new(node, offset, self.woken.clone()));
        node
    }

    /// Brings a node up, in its next incarnation, without anything on it. A node that is up stays as it is.
    pub fn start(&mut self, node: usize) -> Epoch {
        let now = self.timeline.now();
        let Some(node) = self.nodes.get_mut(node) else { return Epoch(0) };
        if node.local.is_none() {
            node.life.epoch += 1;
            node.local = Some(LocalSet::new());
            node.paused = false;
            self.trace.borrow_mut().put(now, Tag::Start, [node.life.node as u64, node.life.epoch, 0]);
        }
        Epoch(node.life.epoch)
    }

    /// The seams for actors of a node in its present incarnation.
    pub fn surroundings(&self, node: usize) -> Option<Surroundings> {
        let node = self.nodes.get(node)?;
        let (life, timeline) = (node.life, self.timeline.clone());
        let nonces = RefCell::new(Dice::new(self.options.seed, "nonce", (life.node as u64) << 32 | life.epoch));
        let environment = Environment {
            clock: Rc::new(SimClock { timeline: timeline.clone(), life, offset: node.clock_offset }),
            network: Rc::new(SimNetwork {
                timeline: timeline.clone(),
                listeners: self.listeners.clone(),
                latency: self.latency.clone(),
                life,
            }),
            host: Rc::new(SimHost { fabric: self.fabric.clone(), nics: self.nics.clone(), life }),
            nonce: Rc::new(move || nonces.borrow_mut().nonce()),
        };
        let (trace, observed) = (Rc::clone(&self.trace), Rc::clone(&self.observed));
        let observer: Observer = Rc::new(move |event| {
            let at = timeline.now();
            let [what, whom] = event_words(&event);
            trace.borrow_mut().put(at, Tag::Observed, [life.node as u64, what, whom]);
            observed.borrow_mut().push(Observed { at, node: life.node, event });
        });
        // The panic itself is counted by the hook.
        let on_panic: OnPanic = Rc::new(|_| {});
        Some(Surroundings { environment, observer, on_panic })
    }

    /// Runs `body` as if it were called on that node, so that actors start there. `None` when it is down.
    pub fn on<R>(&mut self, node: usize, body: impl FnOnce() -> R) -> Option<R> {
        let node = self.nodes.get(node)?;
        let local = node.local.as_ref()?;
        let _entered = local.enter();
        node.wake();
        Some(body())
    }

    /// Puts an engine beside the worker whose parts will be put into the returned seat.
    pub(crate) fn seat(&mut self, node: usize, engine: Box<dyn Engine>) -> Seat {
        let seat = Seat::default();
        if let Some(node) = self.nodes.get_mut(node) {
            (node.seat, node.engine) = (Rc::clone(&seat), Some(engine));
            (node.engine_busy, node.engine_stalled) = (false, false);
        }
        self.engage(node);
        seat
    }

    /// The end of a node's incarnation, without any farewell: its tasks are gone, its links and its NICs with them.
    pub fn crash(&mut self, node: usize) {
        let now = self.timeline.now();
        let Some(node) = self.nodes.get_mut(node) else { return };
        let Some(local) = node.local.take() else { return };
        self.trace.borrow_mut().put(now, Tag::Crash, [node.life.node as u64, node.life.epoch, 0]);
        self.listeners.remove(node.life);
        for nic in self.nics.remove(node.life) {
            self.fabric.process_died(nic, self.options.crash_leaves);
        }
        drop(local);
        (node.seat, node.engine) = (Seat::default(), None);
        node.unheard.clear();
        self.wires.cut(node.life);
        self.send();
    }

    /// Stops polling a node: it hears and says nothing, while its NICs go on.
    pub fn pause(&mut self, node: usize) {
        let now = self.timeline.now();
        if let Some(node) = self.nodes.get_mut(node) {
            node.paused = true;
            self.trace.borrow_mut().put(now, Tag::Pause, [node.life.node as u64, node.life.epoch, 0]);
        }
    }

    /// Polls a node again, which finds everything that came meanwhile.
    pub fn resume(&mut self, index: usize) {
        let now = self.timeline.now();
        let Some(node) = self.nodes.get_mut(index).filter(|node| node.paused) else { return };
        node.paused = false;
        node.wake();
        let unheard = std::mem::take(&mut node.unheard);
        let stalled = std::mem::take(&mut node.engine_stalled);
        self.trace.borrow_mut().put(now, Tag::Resume, [index as u64, 0, 0]);
        for nic in unheard {
            self.pump(nic);
        }
        if stalled {
            self.engage(index);
        }
    }

    /// Lets `script` change the world at a time (nanoseconds since the world began).
    pub fn at(&mut self, at: u64, script: impl FnOnce(&mut World) + 'static) {
        self.timeline.at(at, Happening::Script(Box::new(script)));
    }

    /// Runs until `done` or until nothing more happens by `limit` (nanoseconds since the world began). Says whether it was done.
    ///
    /// `done` is asked whenever everybody is quiet, before time moves.
    pub fn run(&mut self, limit: u64, mut done: impl FnMut(&mut World) -> bool) -> bool {
        loop {
            self.settle();
            if done(self) {
                return true;
            }
            if self.stuck {
                return false;
            }
            let Some(happening) = self.timeline.next(limit) else { return false };
            self.happened += 1;
            self.happen(happening);
        }
    }

    /// Nanoseconds since the world began.
    pub fn now(&self) -> u64 {
        self.timeline.now()
    }

    /// What actors have reported since this was last asked.
    pub fn take_observed(&mut self) -> Vec<Observed> {
        std::mem::take(&mut self.observed.borrow_mut())
    }

    /// Everything that has happened, as a hash and in part.
    pub fn trace(&self) -> Ref<'_, Trace> {
        self.trace.borrow()
    }

    /// Events of the kernel and of the fabric so far.
    pub fn events(&self) -> u64 {
        self.happened + self.fabric.digest().1
    }

    /// Panics on this thread since the world began.
    pub fn panics(&self) -> u64 {
        panics::seen() - self.panics_before
    }

    /// Whether nodes woke each other without end at one instant.
    pub fn is_stuck(&self) -> bool {
        self.stuck
    }

    /// The data fabric.
    pub fn fabric(&self) -> &Fabric {
        &self.fabric
    }

    /// The NICs of a node's present incarnation, in the order of opening: what faults of [`World::fabric`] name.
    pub fn nics(&self, node: usize) -> Vec<NicId> {
        self.nodes.get(node).map(|node| self.nics.of(node.life)).unwrap_or_default()
    }

    /// Whether a node is up, paused or not.
    pub fn is_up(&self, node: usize) -> bool {
        self.nodes.get(node).is_some_and(|node| node.local.is_some())
    }

    /// What a node's engine has found; `None` for a node without one, or that is down.
    pub fn engine_report(&self, node: usize) -> Option<EngineReport> {
        self.nodes.get(node)?.engine.as_ref().map(|engine| engine.report())
    }

    /// Polls whoever was woken, in any order, until nobody is.
    fn settle(&mut self) {
        for _ in 0..ROUNDS_MAX {
            let mut woken = self.woken.take();
            self.schedule.shuffle(&mut woken);
            for index in &woken {
                if let Some(node) = self.nodes.get_mut(*index) {
                    node.poll();
                }
                self.send();
                if self.nodes.get_mut(*index).is_some_and(|node| !node.paused && node.hand_over_calls()) {
                    self.engage(*index);
                }
            }
            let ready = self.fabric.take_ready();
            if woken.is_empty() && ready.is_empty() {
                return self.arm_fabric();
            }
            for nic in ready {
                self.pump(nic);
            }
        }
        self.stuck = true;
    }

    fn happen(&mut self, happening: Happening) {
        let now = self.timeline.now();
        self.fabric.advance(now);
        match happening {
            Happening::Tick { life, to } => {
                if self.lives(life) {
                    self.put(Tag::Tick, [life.node as u64, 0, 0]);
                    to.do_send(kvferry_actors::Tick);
                }
            }
            Happening::Dialed { dialer, address, answer } => {
                self.put(Tag::Dial, [dialer.node as u64, hash_bytes(address.as_bytes()), 0]);
                let result = match self.listeners.at(&address) {
                    Some((acceptor, accept)) => {
                        let (near, far) = self.wires.join(dialer, acceptor);
                        accept(far);
                        Ok(near)
                    }
                    None => Err(format!("{address}: nobody listens there")),
                };
                self.timeline.after(self.latency.draw(), Happening::Answered { dialer, result, answer });
            }
            Happening::Answered { dialer, result, answer } => {
                if self.lives(dialer) {
                    answer(result);
                } else {
                    // Its end of the link was made after it had died.
                    self.wires.cut(dialer);
                    self.send();
                }
            }
            Happening::Frame { link, to, frame } => {
                self.put(Tag::Frame, [link.0 << 1 | to as u64, frame.len() as u64, hash_bytes(&frame)]);
                self.wires.deliver(link, to, &frame);
            }
            Happening::Closed { link, to } => {
                self.put(Tag::Closed, [link.0 << 1 | to as u64, 0, 0]);
                self.wires.break_off(link, to);
            }
            Happening::Fabric => {
                self.fabric_due = None;
                let (hash, happened) = self.fabric.digest();
                self.put(Tag::Fabric, [hash, happened, 0]);
            }
            Happening::Engine { life } => self.work(life),
            Happening::Script(script) => script(self),
        }
    }

    /// Puts what was said on the links on its way.
    fn send(&mut self) {
        for said in self.wires.take_said() {
            let at = self.timeline.now().saturating_add(self.latency.draw());
            let at = self.wires.arrival(said.link, said.from, at);
            let (link, to) = (said.link, said.from.other());
            let happening = match said.frame {
                Some(frame) => Happening::Frame { link, to, frame },
                None => Happening::Closed { link, to },
            };
            self.timeline.at(at, happening);
        }
    }

    fn pump(&mut self, nic: NicId) {
        let Some((life, found)) = self.nics.find(nic) else { return };
        let Some(node) = self.nodes.get_mut(life.node) else { return };
        if node.paused {
            node.unheard.insert(nic);
            return;
        }
        self.put(Tag::Pump, [life.node as u64, 0, 0]);
        found.borrow_mut().pump();
    }

    fn arm_fabric(&mut self) {
        if let Some(at) = self.fabric.next_event_at()
            && self.fabric_due.is_none_or(|due| at < due)
        {
            self.fabric_due = Some(at);
            self.timeline.at(at, Happening::Fabric);
        }
    }

    /// Schedules the next slice of an engine's work, unless one is scheduled.
    fn engage(&mut self, index: usize) {
        let (least, most) = self.options.engine_slice;
        let nanos = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        if let Some(node) = self.nodes.get_mut(index).filter(|node| !node.engine_busy) {
            node.engine_busy = true;
            let takes = self.compute.within(nanos(least)..nanos(most).saturating_add(1));
            self.timeline.after(takes, Happening::Engine { life: node.life });
        }
    }

    fn work(&mut self, life: Life) {
        if !self.lives(life) {
            return;
        }
        self.put(Tag::Engine, [life.node as u64, 0, 0]);
        let Some(node) = self.nodes.get_mut(life.node) else { return };
        node.engine_busy = false;
        if node.paused {
            node.engine_stalled = true;
        } else if node.work() {
            self.engage(life.node);
        }
    }

    fn lives(&self, life: Life) -> bool {
        self.nodes.get(life.node).is_some_and(|node| node.local.is_some() && node.life == life)
    }

    fn put(&self, tag: Tag, words: [u64; 3]) {
        self.trace.borrow_mut().put(self.timeline.now(), tag, words);
    }
}
