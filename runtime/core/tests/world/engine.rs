//! Serving engines that hand out blocks and count what comes back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kvferry_core::protocol::{EngineCall, EngineEvent, Outcome, RequestSpec};
use kvferry_core::{BlockTable, GroupGeometry, HandoverId, Rank, RequestId, Tables};

use super::BLOCKS;
use super::random::Random;

/// The engine of one rank, of either role.
pub(super) struct Engine {
    geometry: Arc<GroupGeometry>,
    rank: Rank,
    pub(super) steps: Vec<u32>,
    free: BTreeSet<u32>,
    jobs: BTreeMap<RequestId, Job>,
    places: BTreeMap<HandoverId, Placement>,
    /// Every handover that was settled here: nothing of it may be posted afterwards.
    settled: BTreeSet<HandoverId>,
    /// Releases that the core has not heard of.
    taken: Vec<RequestId>,
}

struct Job {
    spec: RequestSpec,
    blocks: Option<Vec<u32>>,
    ready: u32,
    unable: bool,
}

struct Placement {
    spec: RequestSpec,
    blocks: Option<Vec<u32>>,
    state: PlacementState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PlacementState {
    Open,
    Refused,
    Delivered,
    Quarantined,
}

impl Engine {
    pub(super) fn new(geometry: &Arc<GroupGeometry>, rank: Rank, steps: u32) -> Self {
        let mut engine = Engine {
            geometry: Arc::clone(geometry),
            rank,
            steps: Vec::new(),
            free: (0..BLOCKS).collect(),
            jobs: BTreeMap::new(),
            places: BTreeMap::new(),
            settled: BTreeSet::new(),
            taken: Vec::new(),
        };
        engine.agree(steps);
        engine
    }

    /// Computes in this many steps.
    pub(super) fn agree(&mut self, steps: u32) {
        let layers = self.geometry.model.layers;
        self.steps = (1..=steps).map(|step| step * layers / steps).collect();
    }

    /// Whether its blocks hold this request's KV.
    pub(super) fn holds(&self, request: RequestId) -> bool {
        self.jobs.get(&request).is_some_and(|job| job.blocks.is_some())
    }

    pub(super) fn has_settled(&self, handover: HandoverId) -> bool {
        self.settled.contains(&handover)
    }

    pub(super) fn can_act(&self) -> bool {
        let job = |job: &Job| {
            !job.unable && (job.ready as usize) < self.steps.len() && (job.blocks.is_some() || self.fits(&job.spec))
        };
        let place = |place: &Placement| match place.state {
            PlacementState::Open => place.blocks.is_none() && self.fits(&place.spec),
            PlacementState::Delivered => true,
            PlacementState::Refused | PlacementState::Quarantined => false,
        };
        !self.taken.is_empty() || self.jobs.values().any(job) || self.places.values().any(place)
    }

    pub(super) fn is_busy(&self) -> bool {
        !self.jobs.is_empty() || !self.places.is_empty()
    }

    /// A call of the core; an error when it breaks the contract.
    pub(super) fn call(&mut self, call: EngineCall) -> Result<(), String> {
        match call {
            EngineCall::Prefill(job) => {
                let request = job.spec.request;
                let job = Job { spec: job.spec, blocks: None, ready: 0, unable: false };
                self.jobs.insert(request, job).map_or(Ok(()), |_| Err(format!("{request} was prefilled twice at once")))
            }
            EngineCall::Release { request, .. } => {
                let job =
                    self.jobs.remove(&request).ok_or_else(|| format!("{request} was released, but is not here"))?;
                self.free.extend(job.blocks.into_iter().flatten());
                self.taken.push(request);
                Ok(())
            }
            EngineCall::Place { handover, spec } => {
                let place = Placement { spec, blocks: None, state: PlacementState::Open };
                self.places.insert(handover, place).map_or(Ok(()), |_| Err(format!("{handover} was placed twice")))
            }
            EngineCall::Settled { handover, outcome, quarantined, .. } => self.settle(handover, &outcome, quarantined),
            EngineCall::Returned { handover, .. } => {
                let place = self.places.remove(&handover).filter(|place| place.state == PlacementState::Quarantined);
                let place = place.ok_or_else(|| format!("{handover} was returned, but is not quarantined"))?;
                self.free.extend(place.blocks.into_iter().flatten());
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn settle(&mut self, handover: HandoverId, outcome: &Outcome, quarantined: bool) -> Result<(), String> {
        self.settled.insert(handover);
        let place = self.places.get_mut(&handover).ok_or_else(|| format!("{handover} was settled, but is not here"))?;
        if !matches!(place.state, PlacementState::Open | PlacementState::Refused) {
            return Err(format!("{handover} was settled twice"));
        }
        if outcome.is_delivered() {
            place.state = PlacementState::Delivered;
            return if quarantined || place.blocks.is_none() {
                Err(format!("{handover} was delivered into nothing"))
            } else {
                Ok(())
            };
        }
        if quarantined {
            place.state = PlacementState::Quarantined;
        } else if let Some(place) = self.places.remove(&handover) {
            self.free.extend(place.blocks.into_iter().flatten());
        }
        Ok(())
    }

    /// One piece of work, and what the core hears of it.
    pub(super) fn act(&mut self, random: &mut Random, faulty: bool) -> Option<EngineEvent> {
        if let Some(request) = self.taken.pop() {
            return Some(EngineEvent::Released { request });
        }
        let jobs: Vec<RequestId> = self.jobs.keys().copied().collect();
        let places: Vec<HandoverId> = self.places.keys().copied().collect();
        let choice = random.below((jobs.len() + places.len()) as u64) as usize;
        match jobs.get(choice) {
            Some(request) => self.compute(*request, random, faulty),
            None => self.place(*places.get(choice - jobs.len())?, random, faulty),
        }
    }

    fn compute(&mut self, request: RequestId, random: &mut Random, faulty: bool) -> Option<EngineEvent> {
        let unable = || EngineEvent::Unable { request, reason: "by chance".to_owned() };
        let job = self.jobs.get(&request).filter(|job| !job.unable && (job.ready as usize) < self.steps.len())?;
        let Some(_) = &job.blocks else {
            if faulty && random.one_in(60) {
                self.jobs.remove(&request);
                return Some(unable());
            }
            let (tables, blocks) = self.allocate(&job.spec.clone())?;
            self.jobs.get_mut(&request)?.blocks = Some(blocks);
            return Some(EngineEvent::Opened { request, tables, steps: self.steps.clone() });
        };
        let job = self.jobs.get_mut(&request)?;
        if faulty && random.one_in(120) {
            job.unable = true;
            return Some(unable());
        }
        job.ready += 1;
        Some(EngineEvent::Ready { request, steps: job.ready })
    }

    fn place(&mut self, handover: HandoverId, random: &mut Random, faulty: bool) -> Option<EngineEvent> {
        let place = self.places.get_mut(&handover)?;
        match place.state {
            PlacementState::Open if place.blocks.is_none() => {
                if faulty && random.one_in(40) {
                    place.state = PlacementState::Refused;
                    return Some(EngineEvent::NoRoom { handover, reason: "by chance".to_owned() });
                }
                let spec = place.spec.clone();
                let (tables, blocks) = self.allocate(&spec)?;
                self.places.get_mut(&handover)?.blocks = Some(blocks);
                Some(EngineEvent::Placed { handover, tables, have: 0 })
            }
            PlacementState::Delivered => {
                let place = self.places.remove(&handover)?;
                self.free.extend(place.blocks.into_iter().flatten());
                Some(EngineEvent::Freed { handover })
            }
            _ => None,
        }
    }

    fn fits(&self, spec: &RequestSpec) -> bool {
        self.geometry.blocks_for(0, spec.tokens, self.rank).blocks as usize <= self.free.len()
    }

    fn allocate(&mut self, spec: &RequestSpec) -> Option<(Tables, Vec<u32>)> {
        let shape = self.geometry.blocks_for(0, spec.tokens, self.rank);
        if !self.fits(spec) {
            return None;
        }
        let blocks: Vec<u32> = (0..shape.blocks).filter_map(|_| self.free.pop_first()).collect();
        Some((Tables { groups: vec![BlockTable::known(shape.first_token, blocks.clone())] }, blocks))
    }

    /// What is not back although all is quiet.
    pub(super) fn leak(&self) -> Option<String> {
        let (jobs, places) = (self.jobs.keys().collect::<Vec<_>>(), self.places.keys().collect::<Vec<_>>());
        (self.free.len() != BLOCKS as usize || self.is_busy()).then(|| {
            format!("{} of {BLOCKS} blocks are free, offers {jobs:?}, handovers {places:?} are held", self.free.len())
        })
    }
}
