//! The kernel: nodes, time, and what happens.

use std::cell::{Ref, RefCell};
use std::rc::Rc;
use std::time::Duration;

use kvferry_actors::{Environment, Inspect, Observer, OnPanic, Surroundings};
use kvferry_core::Epoch;
use kvferry_core::protocol::Vitals;
use kvferry_fabric_sim::{Fabric, FabricOptions, NicId, OnTheWire, Pacing};
use kvferry_synthetic::EngineReport;
use tokio::sync::mpsc;
use tokio::task::LocalSet;

use crate::chronicle::{Chronicle, Entry, What};
use crate::desk::Desk;
use crate::dice::Dice;
use crate::host::{Nics, SimHost};
use crate::network::{ClockRate, Latency, Listeners, SimClock, SimNetwork};
use crate::node::{Seat, SimNode, Woken};
use crate::panics;
use crate::plant::{self, Plant};
use crate::timeline::{Happening, Life, Timeline};
use crate::trace::{Tag, Trace, hash_bytes};
use crate::weather::{Skies, Weather};
use crate::wires::Wires;

/// After how long a dial is given up that nobody answers.
const NO_ANSWER: Duration = Duration::from_millis(500);

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
    /// How far clocks are from the world's rate at most, in parts per million.
    pub clock_drift_ppm: u32,
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
            plant: None,
        }
    }
}

/// Told of a node that has ended by itself.
type OnEnd = Rc<dyn Fn(&mut World, usize)>;

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
    chronicle: Chronicle,
    skies: Skies,
    /// Incarnations that an actor has ended, and its name.
    ended: Rc<RefCell<Vec<(Life, &'static str)>>>,
    on_end: Option<OnEnd>,
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
            clock: Rc::new(SimClock { timeline: timeline.clone(), life, rate: node.clock, plant }),
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
        let observer: Observer = Rc::new(move |event| {
            let at = timeline.now();
            if plant == Some(Plant::TwoOutcomes)
                && let Some(other) = plant::other_outcome(&event)
            {
                chronicle.put(at, life, What::Observed(other));
            }
            chronicle.put(at, life, What::Observed(event));
        });
        let ended = Rc::clone(&self.ended);
        let on_panic: OnPanic = Rc::new(move |name| ended.borrow_mut().push((life, name)));
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
    pub(crate) fn on_end(&mut self, on_end: OnEnd) {
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

    /// Polls whoever was woken, in any order, until nobody is.
    fn settle(&mut self) {
        for _ in 0..ROUNDS_MAX {
            let mut woken = self.woken.take();
            match self.options.plant {
                Some(Plant::RandomOrder) => plant::random_order(&mut woken),
                _ => self.schedule.shuffle(&mut woken),
            }
            for index in &woken {
                if let Some(node) = self.nodes.get_mut(*index) {
                    node.poll();
                }
                self.send();
                if self.nodes.get_mut(*index).is_some_and(|node| !node.paused && node.hand_over_calls()) {
                    self.engage(*index);
                }
            }
            self.bury();
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

    /// Crashes the nodes whose actors have ended their incarnation.
    fn bury(&mut self) {
        let ended = std::mem::take(&mut *self.ended.borrow_mut());
        for (life, name) in ended {
            if self.lives(life) {
                self.chronicle.put(self.timeline.now(), life, What::Ended(name));
                self.crash(life.node);
                if let Some(on_end) = self.on_end.clone() {
                    on_end(self, life.node);
                }
            }
        }
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
                let found = self.listeners.at(&address);
                let passes = |(to, _): &(Life, _)| {
                    !self.skies.is_cut(dialer.node, to.node) && !self.skies.is_cut(to.node, dialer.node)
                };
                if !found.as_ref().is_none_or(passes) {
                    let result = Err(format!("{address}: no answer"));
                    let wait = u64::try_from(NO_ANSWER.as_nanos()).unwrap_or(u64::MAX);
                    self.timeline.after(wait, Happening::Answered { dialer, result, answer });
                    return;
                }
                let result = match found {
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
            let (link, to) = (said.link, said.from.other());
            let way = match self.wires.ends(link, said.from) {
                Some((from, to)) => self.skies.way(from, to),
                None => self.skies.way(usize::MAX, usize::MAX),
            };
            let Some(way) = way else { continue };
            let at = self.timeline.now().saturating_add(self.latency.draw()).saturating_add(way.late);
            let at = if way.overtaken { at } else { self.wires.arrival(link, said.from, at) };
            match said.frame {
                Some(frame) => {
                    if let Some(later) = way.again {
                        let frame = frame.clone();
                        self.timeline.at(at.saturating_add(later), Happening::Frame { link, to, frame });
                    }
                    self.timeline.at(at, Happening::Frame { link, to, frame });
                }
                None => self.timeline.at(at, Happening::Closed { link, to }),
            }
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
        self.chronicle.trace().borrow_mut().put(self.timeline.now(), tag, words);
    }
}
