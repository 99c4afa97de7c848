//! What stands between a worker and its engine: it takes notes, keeps the shadow of memory, and is slow or unable when it is told to be.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use kvferry_core::protocol::{EngineCall, EngineEvent, Outcome};
use kvferry_core::{Epoch, GroupGeometry, HandoverId, Rank, RequestId, TableBlocks, Tables};
use kvferry_fabric_sim::{Fabric, Owner};
use kvferry_synthetic::{Engine, EngineReport};
use kvferry_transport::Pool;

use crate::chronicle::{Chronicle, What};
use crate::dice::Dice;
use crate::plant::Plant;
use crate::timeline::{Life, Timeline};

/// How an engine's room for handovers is withheld.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoomTrouble {
    /// Of a million placements, so many are refused.
    pub refused_ppm: u32,
    /// Of a million placements, so many wait, for some of the engine's slices.
    pub slow_ppm: u32,
}

/// What a desk needs to know.
pub(crate) struct DeskOptions {
    pub(crate) life: Life,
    pub(crate) timeline: Timeline,
    pub(crate) chronicle: Chronicle,
    pub(crate) fabric: Fabric,
    pub(crate) pool: Pool,
    pub(crate) trouble: Rc<Cell<RoomTrouble>>,
    pub(crate) dice: Dice,
    pub(crate) plant: Option<Plant>,
}

/// An engine with its desk.
pub(crate) struct Desk {
    engine: Box<dyn Engine>,
    options: DeskOptions,
    /// First plane of each layer group that the rank holds.
    planes: Vec<Option<u32>>,
    offers: BTreeMap<RequestId, Tables>,
    placed: BTreeMap<HandoverId, Placement>,
    /// Whose blocks were asked for.
    asked: BTreeMap<HandoverId, RequestId>,
    /// Calls that wait, and for how many slices of work.
    waiting: VecDeque<(EngineCall, u32)>,
    /// Its worker leaves.
    drained: bool,
}

struct Placement {
    request: RequestId,
    tables: Tables,
    delivered: bool,
}

impl Desk {
    pub(crate) fn new(engine: Box<dyn Engine>, geometry: &GroupGeometry, rank: Rank, options: DeskOptions) -> Self {
        let mut planes = Vec::new();
        let mut ranges = Vec::new();
        for group in geometry.shard(rank).map(|shard| shard.groups).unwrap_or_default() {
            let count = group.layers.len() as u32 * group.plane_bytes.len() as u32;
            planes.push((count > 0).then_some(group.first_plane));
            ranges.push(group.first_plane..group.first_plane + count);
        }
        options.fabric.incarnate(&options.pool, Epoch(options.life.epoch), &ranges);
        Desk {
            engine,
            options,
            planes,
            offers: BTreeMap::new(),
            placed: BTreeMap::new(),
            asked: BTreeMap::new(),
            waiting: VecDeque::new(),
            drained: false,
        }
    }

    pub(crate) fn report(&self) -> EngineReport {
        self.engine.report()
    }

    /// Whether its worker has said that it may leave.
    pub(crate) fn has_drained(&self) -> bool {
        self.drained
    }

    pub(crate) fn audit(&mut self) {
        self.engine.audit();
    }

    pub(crate) fn handle(&mut self, call: EngineCall, emit: &mut dyn FnMut(EngineEvent)) {
        self.note(What::Called(call.clone()));
        match call {
            EngineCall::Place { handover, spec } => {
                self.asked.insert(handover, spec.request);
                let RoomTrouble { refused_ppm, slow_ppm } = self.options.trouble.get();
                if self.comes_true(refused_ppm) {
                    let event = EngineEvent::NoRoom { handover, reason: "the simulated engine has no room".to_owned() };
                    self.say(event, emit);
                } else if self.comes_true(slow_ppm) {
                    let slices = 1 + self.options.dice.below(400) as u32;
                    self.waiting.push_back((EngineCall::Place { handover, spec }, slices));
                } else {
                    self.forward(EngineCall::Place { handover, spec }, emit);
                }
            }
            EngineCall::Settled { handover, request, outcome, quarantined } => {
                self.asked.remove(&handover);
                self.waiting
                    .retain(|(call, _)| !matches!(call, EngineCall::Place { handover: of, .. } if *of == handover));
                let quarantined = quarantined && self.options.plant != Some(Plant::HastyEngine);
                self.settled(handover, &outcome, quarantined);
                let held = self.placed.contains_key(&handover);
                let overbooked = self.options.plant == Some(Plant::OverbookedEngine) && outcome.is_delivered() && held;
                let call = EngineCall::Settled { handover, request, outcome, quarantined };
                if overbooked {
                    self.waiting.push_back((call, 400));
                    self.note(What::Told(EngineEvent::Freed { handover }));
                    emit(EngineEvent::Freed { handover });
                } else {
                    self.forward(call, emit);
                }
            }
            EngineCall::Returned { handover, proof } => {
                // Blocks of a delivered handover are its own until it has been verified.
                if self.placed.get(&handover).is_some_and(|placed| !placed.delivered) {
                    self.let_go(handover);
                }
                self.forward(EngineCall::Returned { handover, proof }, emit);
            }
            EngineCall::Release { request, view } => {
                if let Some(tables) = self.offers.remove(&request) {
                    self.claim(&tables, Owner::Nobody);
                }
                self.forward(EngineCall::Release { request, view }, emit);
            }
            EngineCall::Drained { .. } => self.drained = true,
            call => self.forward(call, emit),
        }
    }

    /// Lets the engine work for a slice. Says whether there is more to do.
    pub(crate) fn work(&mut self, emit: &mut dyn FnMut(EngineEvent)) -> bool {
        for index in (0..self.waiting.len()).rev() {
            if let Some((_, slices)) = self.waiting.get_mut(index) {
                *slices = slices.saturating_sub(1);
                if *slices == 0
                    && let Some((call, _)) = self.waiting.remove(index)
                {
                    self.forward(call, emit);
                }
            }
        }
        let mut said = Vec::new();
        let more = self.engine.work(&mut |event| said.push(event));
        for event in said {
            self.pass_on(event, emit);
        }
        more || !self.waiting.is_empty()
    }

    fn forward(&mut self, call: EngineCall, emit: &mut dyn FnMut(EngineEvent)) {
        let mut said = Vec::new();
        self.engine.handle(call, &mut |event| said.push(event));
        for event in said {
            self.pass_on(event, emit);
        }
    }

    /// Says what the engine says, or what the plant makes of it.
    fn pass_on(&mut self, event: EngineEvent, emit: &mut dyn FnMut(EngineEvent)) {
        match (self.options.plant, event) {
            (Some(Plant::SilentEngine), EngineEvent::Freed { handover }) if handover.0.is_multiple_of(5) => {}
            (Some(Plant::OverbookedEngine), EngineEvent::Freed { handover }) => {
                // It was said before.
                self.let_go(handover);
            }
            (Some(Plant::DoubleBooking), EngineEvent::Placed { handover, tables, have }) => {
                let tables = self.elsewhere(&tables).unwrap_or(tables);
                self.say(EngineEvent::Placed { handover, tables, have }, emit);
            }
            (_, event) => self.say(event, emit),
        }
    }

    /// Tables of another handover of the same shape.
    fn elsewhere(&self, tables: &Tables) -> Option<Tables> {
        let shape = tables.shapes();
        self.placed.values().find(|placed| placed.tables.shapes() == shape).map(|placed| placed.tables.clone())
    }

    fn say(&mut self, event: EngineEvent, emit: &mut dyn FnMut(EngineEvent)) {
        match &event {
            EngineEvent::Opened { request, tables, .. } => {
                self.claim(tables, Owner::Offer(*request));
                self.offers.insert(*request, tables.clone());
            }
            EngineEvent::Placed { handover, tables, .. } => {
                self.claim(tables, Owner::Handover(*handover));
                let request = self.asked.remove(handover).unwrap_or_default();
                let placed = Placement { request, tables: tables.clone(), delivered: false };
                self.placed.insert(*handover, placed);
            }
            EngineEvent::Freed { handover } => self.let_go(*handover),
            _ => {}
        }
        self.note(What::Told(event.clone()));
        emit(event);
    }

    fn settled(&mut self, handover: HandoverId, outcome: &Outcome, quarantined: bool) {
        let Some(placed) = self.placed.get_mut(&handover) else { return };
        placed.delivered = outcome.is_delivered();
        if outcome.is_delivered() {
            let (request, tables) = (placed.request, placed.tables.clone());
            self.check_delivered(&tables, handover, request);
        } else if quarantined {
            let tables = placed.tables.clone();
            self.claim(&tables, Owner::Quarantined(handover));
        } else {
            self.let_go(handover);
        }
    }

    fn let_go(&mut self, handover: HandoverId) {
        if let Some(placed) = self.placed.remove(&handover) {
            self.claim(&placed.tables, Owner::Nobody);
            self.note(What::LetGo(handover));
        }
    }

    fn claim(&self, tables: &Tables, owner: Owner) {
        self.each_table(tables, |plane, blocks| {
            self.options.fabric.claim(&self.options.pool, plane, blocks, owner);
        });
    }

    fn check_delivered(&self, tables: &Tables, handover: HandoverId, request: RequestId) {
        self.each_table(tables, |plane, blocks| {
            self.options.fabric.delivered(&self.options.pool, plane, blocks, handover, request);
        });
    }

    fn each_table(&self, tables: &Tables, each: impl Fn(u32, &[u32])) {
        for (table, plane) in tables.groups.iter().zip(&self.planes) {
            if let (TableBlocks::Known(blocks), Some(plane)) = (&table.blocks, plane) {
                each(*plane, blocks);
            }
        }
    }

    fn note(&self, what: What) {
        self.options.chronicle.put(self.options.timeline.now(), self.options.life, what);
    }

    fn comes_true(&mut self, ppm: u32) -> bool {
        ppm > 0 && self.options.dice.below(1_000_000) < u64::from(ppm)
    }
}
