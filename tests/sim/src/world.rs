//! The kernel: nodes, time, and what happens.

use std::cell::{Ref, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use kvferry_actors::{Environment, Inspect, Observer, OnEnd, Surroundings};
use kvferry_core::Epoch;
use kvferry_core::protocol::{EngineEvent, Vitals};
use kvferry_fabric_sim::{Fabric, FabricOptions, NicId, OnTheWire, Pacing};
use kvferry_synthetic::EngineReport;
use tokio::sync::mpsc;
use tokio::task::LocalSet;

use crate::chronicle::{Chronicle, Entry, What};
use crate::desk::Desk;
use crate::dice::Dice;
use crate::host::{Nics, SimHost};
use crate::network::{ClockRate, Late, Latency, Listeners, SimClock, SimNetwork};
use crate::node::{Seat, SimNode, Woken};
use crate::panics;
use crate::plant::{self, Plant, SecondConsumers};
use crate::timeline::{Happening, Life, Timeline};
use crate::trace::{Tag, Trace};
use crate::weather::{Skies, Weather};
use crate::wires::Wires;

mod steps;

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
    /// How far clocks are from the world's rate at most, in parts per million.
    pub clock_drift_ppm: u32,
    /// By how much alarms ring late, at most.
    pub alarms_late_by: Duration,
    /// A bug, to see that it is found.
    pub plant: Option<Plant>,
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
            clock_drift_ppm: 0,
            alarms_late_by: Duration::ZERO,
            plant: None,
        }
    }
}

/// Something that is done with a node.
pub(crate) type WithNode = Rc<dyn Fn(&mut World, usize)>;

/// One simulated world: a discrete-event kernel over the actors of its nodes. Runs on the thread that made it.
pub struct World {
    options: WorldOptions,
    timeline: Timeline,
    fabric: Fabric,
    fabric_due: Option<u64>,
    nics_due: BTreeMap<NicId, u64>,
    wires: Wires,
    listeners: Listeners,
    latency: Latency,
    nics: Nics,
    schedule: Dice,
    compute: Dice,
    nodes: Vec<SimNode>,
    woken: Woken,
    chronicle: Chronicle,
    skies: Skies,
    /// Incarnations that are over, and why.
    ended: Rc<RefCell<Vec<(Life, String)>>>,
    on_end: Option<WithNode>,
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
            nics_due: BTreeMap::new(),
            wires: Wires::default(),
            listeners: Listeners::default(),
            latency,
            nics: Nics::default(),
            schedule: Dice::new(seed, "schedule", 0),
            compute: Dice::new(seed, "compute", 0),
            nodes: Vec::new(),
            woken: Woken::default(),
            chronicle: Chronicle::default(),
            skies: Skies::new(Dice::new(seed, "weather", 0)),
            ended: Rc::default(),
            on_end: None,
            happened: 0,
            panics_before: panics::seen(),
            stuck: false,
            options,
        }
    }

    /// Adds a node, which is down, and returns its number.
    pub fn add_node(&mut self) -> usize {
        let node = self.nodes.len();
        let mut dice = Dice::new(self.options.seed, "clock", node as u64);
        let offset = dice.below(1 << 50);
        let drift = u64::from(self.options.clock_drift_ppm);
        let mut ppm = dice.below(2 * drift + 1) as i64 - drift as i64;
        if self.options.plant == Some(Plant::RacingClock) {
            ppm = plant::racing_ppm(node);
        }
        self.nodes.push(SimNode::new(node, ClockRate { offset, ppm }, self.woken.clone()));
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
            self.chronicle.put(now, node.life, What::Started);
        }
        match self.options.plant {
            Some(Plant::OldEpoch) => Epoch(node.life.epoch.saturating_sub(1).max(1)),
            _ => Epoch(node.life.epoch),
        }
    }

    /// The seams for actors of a node in its present incarnation.
    pub fn surroundings(&self, node: usize) -> Option<Surroundings> {
        let node = self.nodes.get(node)?;
        let (life, timeline, plant) = (node.life, self.timeline.clone(), self.options.plant);
        let nonces = RefCell::new(Dice::new(self.options.seed, "nonce", (life.node as u64) << 32 | life.epoch));
        let environment = Environment {
            clock: Rc::new(SimClock {
                timeline: timeline.clone(),
                life,
                rate: node.clock,
                late: Late::new(
                    self.options.alarms_late_by,
                    Dice::new(self.options.seed, "alarms", (life.node as u64) << 32 | life.epoch),
                ),
                plant,
            }),
            network: Rc::new(SimNetwork {
                timeline: timeline.clone(),
                listeners: self.listeners.clone(),
                latency: self.latency.clone(),
                life,
            }),
            host: Rc::new(SimHost {
                fabric: self.fabric.clone(),
                nics: self.nics.clone(),
                life,
                timeline: timeline.clone(),
                chronicle: self.chronicle.clone(),
                plant,
            }),
            nonce: Rc::new(move || nonces.borrow_mut().nonce()),
        };
        let chronicle = self.chronicle.clone();
        let second_consumers = RefCell::new(SecondConsumers::default());
        let observer: Observer = Rc::new(move |event| {
            let at = timeline.now();
            if plant == Some(Plant::TwoConsumers)
                && let Some(again) = second_consumers.borrow_mut().pair(&event)
            {
                chronicle.put(at, life, What::Observed(again));
            }
            if plant == Some(Plant::TwoOutcomes)
                && let Some(other) = plant::other_outcome(&event)
            {
                chronicle.put(at, life, What::Observed(other));
            }
            chronicle.put(at, life, What::Observed(event));
        });
        let ended = Rc::clone(&self.ended);
        let on_end: OnEnd = Rc::new(move |why| ended.borrow_mut().push((life, why.to_owned())));
        Some(Surroundings { environment, observer, on_end })
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
    pub(crate) fn seat(&mut self, node: usize, engine: Desk) -> Seat {
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
        self.kill(node, self.options.crash_leaves);
    }

    /// As [`World::crash`]; what has left its NICs lands or not.
    pub fn kill(&mut self, index: usize, on_the_wire: OnTheWire) {
        let now = self.timeline.now();
        let Some(node) = self.nodes.get_mut(index) else { return };
        let Some(local) = node.local.take() else { return };
        let life = node.life;
        self.chronicle.put(now, life, What::Crashed);
        for (_, nic) in self.nics.of(index) {
            self.fabric.process_died(nic, on_the_wire);
        }
        self.listeners.remove(life);
        self.nics.remove(life);
        drop(local);
        (node.seat, node.engine) = (Seat::default(), None);
        node.unheard.clear();
        self.wires.cut(life);
        self.send();
    }

    /// Tells a worker's node to leave: it ends once nothing is offered there any more, or after so long.
    pub(crate) fn drain(&mut self, node: usize, within: Duration) {
        let said = EngineEvent::Drain { within };
        let told = self.nodes.get(node).filter(|node| node.local.is_some()).is_some_and(|node| node.tell(said.clone()));
        if told {
            self.note_of(node, What::Told(said));
        }
    }

    /// Stops polling a node: it hears and says nothing, while its NICs go on.
    pub fn pause(&mut self, node: usize) {
        let now = self.timeline.now();
        if let Some(node) = self.nodes.get_mut(node) {
            node.paused = true;
            self.chronicle.trace().borrow_mut().put(now, Tag::Pause, [node.life.node as u64, node.life.epoch, 0]);
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
        self.chronicle.trace().borrow_mut().put(now, Tag::Resume, [index as u64, 0, 0]);
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

    /// What has happened since this was last asked.
    pub fn take_entries(&mut self) -> Vec<Entry> {
        for violation in self.fabric.take_violations() {
            self.chronicle.put(self.timeline.now(), Life::default(), What::Breach(violation));
        }
        self.chronicle.take()
    }

    /// Whether anything has.
    pub(crate) fn has_entries(&self) -> bool {
        !self.chronicle.is_empty() || self.fabric.has_violations()
    }

    /// Takes a note of something that happened to no node.
    pub(crate) fn note(&self, what: What) {
        self.chronicle.put(self.timeline.now(), Life::default(), what);
    }

    /// Takes a note of something that happened to a node.
    pub(crate) fn note_of(&self, node: usize, what: What) {
        let life = self.nodes.get(node).map_or(Life::default(), |node| node.life);
        self.chronicle.put(self.timeline.now(), life, what);
    }

    /// What desks and others need to take notes themselves.
    pub(crate) fn chronicle(&self) -> (Life, Timeline, Chronicle) {
        (Life::default(), self.timeline.clone(), self.chronicle.clone())
    }

    /// A node's present incarnation.
    pub(crate) fn life(&self, node: usize) -> Life {
        self.nodes.get(node).map_or(Life::default(), |node| node.life)
    }

    /// Who is told of nodes that end by themselves, after they have been crashed.
    pub(crate) fn on_end(&mut self, on_end: WithNode) {
        self.on_end = Some(on_end);
    }

    /// Changes what control frames meet with.
    pub fn change_weather(&mut self, weather: Weather) {
        self.skies.change(weather);
    }

    /// Lets no control frame pass from one node to another, or all again.
    pub fn cut(&mut self, from: usize, to: usize, on: bool) {
        self.skies.cut(from, to, on);
    }

    /// Mends all ways of control frames.
    pub fn clear_skies(&mut self) {
        self.skies.clear();
    }

    /// The NICs of a node's present incarnation, each with its index.
    pub fn nics_of(&self, node: usize) -> Vec<(usize, NicId)> {
        self.nics.of(node)
    }

    /// The NICs of a node's present incarnation, in the order of opening: what faults of [`World::fabric`] name.
    pub fn nics(&self, node: usize) -> Vec<NicId> {
        self.nics.of(node).into_iter().map(|(_, nic)| nic).collect()
    }

    /// How many nodes there are.
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Everything that has happened, as a hash and in part.
    pub fn trace(&self) -> Ref<'_, Trace> {
        self.chronicle.trace().borrow()
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

    /// Whether a node is up, paused or not.
    pub fn is_up(&self, node: usize) -> bool {
        self.nodes.get(node).is_some_and(|node| node.local.is_some())
    }

    /// Lets all engines check that nobody has written a block that holds nothing.
    pub(crate) fn audit(&mut self) {
        self.nodes.iter_mut().filter_map(|node| node.engine.as_mut()).for_each(Desk::audit);
    }

    /// Keeps the records with these numbers in full from now on.
    pub(crate) fn keep_records(&mut self, numbers: std::ops::Range<u64>) {
        self.chronicle.trace().borrow_mut().keep(numbers);
    }

    /// Asks a worker's actors what they have in hand. Says whether the node runs.
    pub(crate) fn inspect(&self, node: usize, to: &mpsc::UnboundedSender<Vitals>) -> bool {
        let Some(node) = self.nodes.get(node).filter(|node| node.local.is_some() && !node.paused) else { return false };
        for actor in node.seat.borrow().iter().flat_map(|parts| &parts.inspect) {
            actor.do_send(Inspect { to: to.clone() });
        }
        true
    }

    /// What a node's engine has found; `None` for a node without one, or that is down.
    pub fn engine_report(&self, node: usize) -> Option<EngineReport> {
        self.nodes.get(node)?.engine.as_ref().map(|engine| engine.report())
    }
}
