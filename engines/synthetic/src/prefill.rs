//! The prefill side: computes KV, layer after layer.

use std::collections::{BTreeMap, VecDeque};

use kvferry_core::RequestId;
use kvferry_core::protocol::{EngineCall, EngineEvent, PrefillJob, RequestSpec};
use kvferry_transport::Pool;

use crate::blocks::{Blocks, Census};
use crate::memory::{Memory, SLICE_BYTES};
use crate::shape::RankShape;
use crate::table::{Table, Walk, announce};
use crate::{Engine, EngineConfig, EngineError, EngineReport};

/// One rank of a prefill instance. Jobs get blocks in the order of their calls and are computed one after another.
///
/// A job whose request is queued or held already is ignored, like a release of one that is not.
///
/// A released request's blocks are poisoned before they are used again: who still reads them does not find its KV.
pub struct PrefillEngine {
    memory: Memory,
    blocks: Blocks,
    /// Model-layer ends.
    steps: Vec<u32>,
    queue: VecDeque<PrefillJob>,
    held: BTreeMap<RequestId, Held>,
    /// Those of `held` that are not computed yet; and perhaps some that are gone.
    computing: VecDeque<RequestId>,
    completed: u64,
    rejected: u64,
    last_rejection: Option<String>,
}

struct Held {
    spec: RequestSpec,
    tables: Vec<Table>,
    walk: Walk,
    ready: usize,
}

impl PrefillEngine {
    /// Over a pool with the rank's own layout. The pool may hold anything; it is poisoned bit by bit.
    pub fn new(config: EngineConfig, pool: Pool) -> Result<PrefillEngine, EngineError> {
        let shape = RankShape::new(&config, &pool)?;
        let layers = config.geometry.model.layers;
        let each = config.layers_per_step.unwrap_or(layers).clamp(1, layers.max(1));
        let steps = (1..=layers.div_ceil(each)).map(|step| step.saturating_mul(each).min(layers)).collect();
        Ok(PrefillEngine {
            blocks: Blocks::new(&shape, config.seed),
            memory: Memory::new(pool, shape),
            steps,
            queue: VecDeque::new(),
            held: BTreeMap::new(),
            computing: VecDeque::new(),
            completed: 0,
            rejected: 0,
            last_rejection: None,
        })
    }

    fn prefill(&mut self, job: PrefillJob, emit: &mut dyn FnMut(EngineEvent)) {
        let request = job.spec.request;
        if self.held.contains_key(&request) || self.queue.iter().any(|queued| queued.spec.request == request) {
            return;
        }
        match never_fits(&self.memory, &self.blocks, job.spec.tokens) {
            Some(reason) => emit(EngineEvent::Unable { request, reason }),
            None => self.queue.push_back(job),
        }
    }

    fn release(&mut self, request: RequestId) {
        self.queue.retain(|job| job.spec.request != request);
        if let Some(held) = self.held.remove(&request) {
            for (group, table) in held.tables.into_iter().enumerate() {
                self.blocks.give_back(group, table.blocks);
            }
        }
    }

    /// Opens queued jobs as long as there are blocks for the first.
    fn admit(&mut self, emit: &mut dyn FnMut(EngineEvent)) {
        while let Some(job) = self.queue.front() {
            let owns: Vec<_> =
                self.memory.shape().groups.iter().map(|group| group.own_blocks(job.spec.tokens)).collect();
            let fits =
                |(group, own): (usize, &core::ops::Range<u64>)| own.end - own.start <= self.blocks.free(group) as u64;
            if !owns.iter().enumerate().all(fits) {
                return;
            }
            let Some(PrefillJob { spec, .. }) = self.queue.pop_front() else {
                return;
            };
            let tables: Vec<Table> = owns
                .iter()
                .enumerate()
                .map(|(group, own)| Table {
                    first: own.start,
                    blocks: self.blocks.take(group, (own.end - own.start) as usize),
                    shared: 0,
                })
                .collect();
            let request = spec.request;
            emit(EngineEvent::Opened {
                request,
                tables: announce(self.memory.shape(), &tables),
                steps: self.steps.clone(),
            });
            self.held.insert(request, Held { spec, tables, walk: Walk::default(), ready: 0 });
            self.computing.push_back(request);
        }
    }

    /// Computes a slice of the oldest request. Returns whether there was one.
    fn compute(&mut self, emit: &mut dyn FnMut(EngineEvent)) -> bool {
        let Some(request) = self.computing.front().copied() else {
            return false;
        };
        let Some(held) = self.held.get_mut(&request).filter(|held| held.ready < self.steps.len()) else {
            self.computing.pop_front();
            return true;
        };
        let mut bytes = 0;
        loop {
            let unit = held.walk.peek(self.memory.shape(), &held.tables);
            let layer = unit.and_then(|unit| self.memory.shape().planes.get(unit.plane)).map(|plane| plane.layer);
            // Everything below the next layer is done; the walk goes up through the layers.
            let done = |end: &u32| layer.is_none_or(|layer| layer >= *end);
            if self.steps.get(held.ready).is_some_and(done) {
                self.memory.flush();
            }
            while self.steps.get(held.ready).is_some_and(done) {
                held.ready += 1;
                emit(EngineEvent::Ready { request, steps: held.ready as u32 });
            }
            let Some(unit) = unit else {
                self.completed += 1;
                self.computing.pop_front();
                return true;
            };
            if bytes >= SLICE_BYTES {
                self.memory.flush();
                return true;
            }
            self.memory.fill(unit, &held.spec);
            held.walk.advance();
            bytes += self.memory.block_bytes(unit.plane).max(1);
        }
    }
}

impl Engine for PrefillEngine {
    fn handle(&mut self, call: EngineCall, emit: &mut dyn FnMut(EngineEvent)) {
        match call {
            EngineCall::Prefill(job) => self.prefill(job, emit),
            EngineCall::Release { request, .. } => {
                self.release(request);
                emit(EngineEvent::Released { request });
            }
            // Whatever the worker does not know (any more), it has released or will release.
            EngineCall::Rejected { refusal, .. } => {
                self.rejected += 1;
                self.last_rejection = Some(refusal.to_string());
            }
            _ => {}
        }
        self.admit(emit);
    }

    fn work(&mut self, emit: &mut dyn FnMut(EngineEvent)) -> bool {
        self.admit(emit);
        if !self.compute(emit) && self.blocks.is_dirty() {
            self.blocks.clean(&mut self.memory);
            self.admit(emit);
        }
        !self.computing.is_empty() || self.blocks.is_dirty()
    }

    fn audit(&mut self) {
        self.blocks.audit(&mut self.memory);
    }

    fn report(&self) -> EngineReport {
        let mut report = EngineReport {
            completed_requests: self.completed,
            held_requests: self.held.len() as u64,
            queued_requests: self.queue.len() as u64,
            rejected: self.rejected,
            last_rejection: self.last_rejection.clone(),
            ..EngineReport::default()
        };
        self.memory.report(&mut report);
        let mut census = Census::new(&self.blocks);
        for group in 0..self.blocks.groups() {
            report.blocks += u64::from(self.blocks.total(group));
            report.free_blocks += self.blocks.unused(group) as u64;
        }
        for held in self.held.values() {
            for (group, table) in held.tables.iter().enumerate() {
                report.held_blocks += table.blocks.iter().filter(|block| census.mark(group, **block)).count() as u64;
            }
        }
        report.leaked_blocks = census.unmarked();
        report
    }
}

/// Why a request of that many tokens has no place even in an empty pool.
pub(crate) fn never_fits(memory: &Memory, blocks: &Blocks, tokens: u64) -> Option<String> {
    memory.shape().groups.iter().enumerate().find_map(|(index, group)| {
        let own = group.own_blocks(tokens);
        let (need, have) = (own.end - own.start, blocks.total(index));
        (need > u64::from(have)).then(|| {
            format!("{tokens} tokens take {need} blocks of group `{}`, the whole pool has {have}: give the rank more blocks", group.name)
        })
    })
}
