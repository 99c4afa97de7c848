//! The decode side: finds blocks for handovers, and checks every byte of what was delivered.

use core::ops::Range;
use std::collections::{BTreeMap, VecDeque};

use kvferry_core::HandoverId;
use kvferry_core::protocol::{EngineCall, EngineEvent, Outcome, RequestSpec};
use kvferry_transport::Pool;

use crate::blocks::{Blocks, Census};
use crate::cache::{Chain, PrefixCache};
use crate::memory::{Memory, SLICE_BYTES};
use crate::prefill::never_fits;
use crate::shape::RankShape;
use crate::table::{Table, Walk, announce};
use crate::{Engine, EngineConfig, EngineError, EngineReport};

/// One rank of a decode instance. Handovers get blocks in the order of their calls.
///
/// A delivered handover is checked byte by byte, padding included; then its blocks are let go of or, with
/// [`EngineConfig::reuse_prefix`], its whole prefix blocks are kept for others. What its blocks held otherwise is poisoned before they are
/// used again, and the poison is checked when they are: a late write shows.
///
/// Ranks of a group decide on their own how much of a prefix they reuse: they may have evicted different blocks.
pub struct DecodeEngine {
    memory: Memory,
    blocks: Blocks,
    cache: PrefixCache,
    /// Tokens of a prefix stripe; `None` when prefixes are not reused.
    stripe_tokens: Option<u64>,
    queue: VecDeque<(HandoverId, RequestSpec)>,
    handovers: BTreeMap<HandoverId, Handover>,
    /// Those in that stage; and perhaps some that are gone.
    preparing: VecDeque<HandoverId>,
    verifying: VecDeque<HandoverId>,
    completed: u64,
    rejected: u64,
    last_rejection: Option<String>,
}

struct Handover {
    spec: RequestSpec,
    tables: Vec<Table>,
    chain: Chain,
    /// The stripes of its chain that it shares: these are pinned.
    reused: usize,
    /// Tokens in them.
    have: u64,
    stage: Stage,
    delivered: bool,
    /// Something may still write its blocks.
    quarantined: bool,
}

#[derive(Clone, Copy)]
enum Stage {
    /// Its blocks are checked to hold nothing.
    Preparing(Walk),
    /// They may be written.
    Placed,
    /// They are compared, and right so far or not.
    Verifying(Walk, bool),
    /// It is over, but its blocks may still be written.
    Quarantined,
}

impl DecodeEngine {
    /// Over a pool with the rank's own layout. The pool may hold anything; it is poisoned bit by bit.
    pub fn new(config: EngineConfig, pool: Pool) -> Result<DecodeEngine, EngineError> {
        let shape = RankShape::new(&config, &pool)?;
        let full = shape.groups.iter().find(|group| group.held && group.is_full());
        Ok(DecodeEngine {
            stripe_tokens: full.filter(|_| config.reuse_prefix).map(|group| group.stride()),
            blocks: Blocks::new(&shape, config.seed),
            memory: Memory::new(pool, shape),
            cache: PrefixCache::default(),
            queue: VecDeque::new(),
            handovers: BTreeMap::new(),
            preparing: VecDeque::new(),
            verifying: VecDeque::new(),
            completed: 0,
            rejected: 0,
            last_rejection: None,
        })
    }

    fn place(&mut self, handover: HandoverId, spec: RequestSpec, emit: &mut dyn FnMut(EngineEvent)) {
        if self.handovers.contains_key(&handover) || self.queue.iter().any(|(queued, _)| *queued == handover) {
            return;
        }
        match never_fits(&self.memory, &self.blocks, spec.tokens) {
            Some(reason) => emit(EngineEvent::NoRoom { handover, reason }),
            None => self.queue.push_back((handover, spec)),
        }
    }

    /// Gives queued handovers blocks as long as there are enough for the first.
    fn admit(&mut self, emit: &mut dyn FnMut(EngineEvent)) {
        while let Some((handover, spec)) = self.queue.front() {
            let (handover, spec) = (*handover, spec.clone());
            let chain = self.stripe_tokens.map_or_else(Chain::default, |stride| Chain::of(&spec, stride));
            // At least one token is fetched.
            let most = self.stripe_tokens.map_or(0, |stride| spec.tokens.saturating_sub(1) / stride.max(1));
            let keys = chain.keys.get(..(most as usize).min(chain.keys.len())).unwrap_or_default();
            let reused = self.cache.longest(keys);
            let shared = self.cache.pin(keys.get(..reused).unwrap_or_default());
            if !self.make_room(&spec, reused, emit) {
                self.cache.unpin(keys.get(..reused).unwrap_or_default(), false);
                return;
            }
            self.queue.pop_front();
            let mut tables = Vec::with_capacity(self.blocks.groups());
            for (group, own) in self.own_blocks(&spec).into_iter().enumerate() {
                let mine =
                    |stripe: &Vec<(usize, u32)>| stripe.iter().find(|(of, _)| *of == group).map(|(_, block)| *block);
                let mut blocks: Vec<u32> = shared.iter().filter_map(mine).collect();
                let shared = blocks.len();
                blocks.append(&mut self.blocks.take(group, ((own.end - own.start) as usize).saturating_sub(shared)));
                tables.push(Table { first: own.start, blocks, shared });
            }
            let have = self.stripe_tokens.unwrap_or(0).saturating_mul(reused as u64);
            let stage = Stage::Preparing(Walk::unshared());
            let placed = Handover { spec, tables, chain, reused, have, stage, delivered: false, quarantined: false };
            self.handovers.insert(handover, placed);
            self.preparing.push_back(handover);
        }
    }

    /// Whether blocks for a request are free, apart from `reused` stripes. Evicts prefixes if that helps.
    fn make_room(&mut self, spec: &RequestSpec, reused: usize, emit: &mut dyn FnMut(EngineEvent)) -> bool {
        let own = self.own_blocks(spec);
        let full: Vec<bool> = self.memory.shape().groups.iter().map(|group| group.held && group.is_full()).collect();
        let mut needs = Vec::with_capacity(own.len());
        for (own, full) in own.into_iter().zip(full) {
            let shared = if full { reused } else { 0 };
            needs.push((((own.end - own.start) as usize).saturating_sub(shared), full));
        }
        let mut shortest = 0;
        for (group, (need, full)) in needs.iter().enumerate() {
            let short = need.saturating_sub(self.blocks.unused(group));
            if short > if *full { self.cache.evictable() } else { 0 } {
                return false;
            }
            shortest = shortest.max(short);
        }
        let mut removed = Vec::new();
        for _ in 0..shortest {
            for (group, block) in self.cache.evict(&mut removed).unwrap_or_default() {
                self.blocks.give_back(group, [block]);
            }
        }
        if !removed.is_empty() {
            emit(EngineEvent::Holds { added: Vec::new(), removed });
        }
        needs.iter().enumerate().all(|(group, (need, _))| *need <= self.blocks.free(group))
    }

    fn own_blocks(&self, spec: &RequestSpec) -> Vec<Range<u64>> {
        self.memory.shape().groups.iter().map(|group| group.own_blocks(spec.tokens)).collect()
    }

    /// Checks that the oldest handover's blocks hold nothing. Returns whether there was one.
    fn prepare(&mut self, emit: &mut dyn FnMut(EngineEvent)) -> bool {
        let Some(handover) = self.preparing.front().copied() else {
            return false;
        };
        let placing = self.handovers.get_mut(&handover);
        let Some(Handover { stage: Stage::Preparing(walk), tables, have, .. }) = placing else {
            self.preparing.pop_front();
            return true;
        };
        let mut bytes = 0;
        while let Some(unit) = walk.peek(self.memory.shape(), tables) {
            if bytes >= SLICE_BYTES {
                self.memory.flush();
                return true;
            }
            self.memory.expect_poison(unit.plane, unit.block);
            walk.advance();
            bytes += self.memory.block_bytes(unit.plane).max(1);
        }
        // Nobody may write them before.
        self.memory.flush();
        emit(EngineEvent::Placed { handover, tables: announce(self.memory.shape(), tables), have: *have });
        if let Some(placed) = self.handovers.get_mut(&handover) {
            placed.stage = Stage::Placed;
        }
        self.preparing.pop_front();
        true
    }

    fn settled(&mut self, handover: HandoverId, outcome: &Outcome, quarantined: bool) {
        self.queue.retain(|(queued, _)| *queued != handover);
        let Some(held) = self.handovers.get_mut(&handover) else {
            return;
        };
        match held.stage {
            Stage::Preparing(_) | Stage::Placed => {}
            Stage::Verifying(..) | Stage::Quarantined => return,
        }
        held.quarantined = quarantined;
        if outcome.is_delivered() {
            held.delivered = true;
            held.stage = Stage::Verifying(Walk::default(), true);
            self.verifying.push_back(handover);
        } else if quarantined {
            held.stage = Stage::Quarantined;
        } else if let Some(held) = self.handovers.remove(&handover) {
            self.let_go(held);
        }
    }

    fn returned(&mut self, handover: HandoverId, emit: &mut dyn FnMut(EngineEvent)) {
        let Some(held) = self.handovers.get_mut(&handover) else {
            return;
        };
        held.quarantined = false;
        if matches!(held.stage, Stage::Quarantined)
            && let Some(held) = self.handovers.remove(&handover)
        {
            let delivered = held.delivered;
            self.let_go(held);
            if delivered {
                emit(EngineEvent::Freed { handover });
            }
        }
    }

    /// Compares a slice of the oldest delivered handover. Returns whether there was one.
    fn verify(&mut self, emit: &mut dyn FnMut(EngineEvent)) -> bool {
        let Some(handover) = self.verifying.front().copied() else {
            return false;
        };
        let checking = self.handovers.get_mut(&handover);
        let Some(Handover { stage: Stage::Verifying(walk, right), tables, spec, have, .. }) = checking else {
            self.verifying.pop_front();
            return true;
        };
        let mut bytes = 0;
        while let Some(unit) = walk.peek(self.memory.shape(), tables) {
            if bytes >= SLICE_BYTES {
                *right &= self.memory.flush();
                return true;
            }
            *right &= self.memory.verify(unit, spec, *have);
            walk.advance();
            bytes += self.memory.block_bytes(unit.plane).max(1);
        }
        *right &= self.memory.flush();
        let right = *right;
        self.verifying.pop_front();
        self.completed += 1;
        if let Some(held) = self.handovers.get_mut(&handover)
            && held.quarantined
        {
            held.stage = Stage::Quarantined;
        } else if let Some(held) = self.handovers.remove(&handover) {
            if right && !held.chain.keys.is_empty() {
                self.keep_prefix(held, emit);
            } else {
                self.let_go(held);
            }
            emit(EngineEvent::Freed { handover });
        }
        true
    }

    /// Gives a handover's blocks back, apart from those that it shares.
    fn let_go(&mut self, held: Handover) {
        self.cache.unpin(held.chain.keys.get(..held.reused).unwrap_or_default(), false);
        for (group, table) in held.tables.into_iter().enumerate() {
            self.blocks.give_back(group, table.blocks.into_iter().skip(table.shared));
        }
    }

    /// Keeps a verified handover's whole prefix blocks, and gives the others back.
    fn keep_prefix(&mut self, held: Handover, emit: &mut dyn FnMut(EngineEvent)) {
        let Handover { tables, chain: Chain { keys, hashes }, reused, .. } = held;
        let full: Vec<bool> = self.memory.shape().groups.iter().map(|group| group.held && group.is_full()).collect();
        let mut added = Vec::new();
        for (depth, (key, hashes)) in keys.iter().zip(hashes).enumerate().skip(reused) {
            let slots = tables.iter().zip(&full).enumerate().filter(|(_, (_, full))| **full);
            let blocks: Vec<(usize, u32)> =
                slots.filter_map(|(group, (table, _))| table.blocks.get(depth).map(|block| (group, *block))).collect();
            if !self.cache.insert(*key, depth, blocks.clone(), hashes, &mut added) {
                // Another request brought the same bytes meanwhile.
                self.cache.pin(core::slice::from_ref(key));
                for (group, block) in blocks {
                    self.blocks.give_back(group, [block]);
                }
            }
        }
        self.cache.unpin(&keys, true);
        for (group, (table, full)) in tables.into_iter().zip(full).enumerate() {
            let kept = if full { keys.len() } else { 0 };
            self.blocks.give_back(group, table.blocks.into_iter().skip(kept));
        }
        if !added.is_empty() {
            emit(EngineEvent::Holds { added, removed: Vec::new() });
        }
    }
}

impl Engine for DecodeEngine {
    fn handle(&mut self, call: EngineCall, emit: &mut dyn FnMut(EngineEvent)) {
        match call {
            EngineCall::Place { handover, spec } => self.place(handover, spec, emit),
            EngineCall::Settled { handover, outcome, quarantined, .. } => self.settled(handover, &outcome, quarantined),
            EngineCall::Returned { handover, .. } => self.returned(handover, emit),
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
        // Somebody waits for a placement; nobody waits for a check, but it sets blocks free.
        let clean_first = !self.queue.is_empty() && self.blocks.is_dirty();
        if !self.prepare(emit) && (clean_first || !self.verify(emit)) {
            self.blocks.clean(&mut self.memory);
        }
        self.admit(emit);
        !self.preparing.is_empty() || !self.verifying.is_empty() || self.blocks.is_dirty()
    }

    fn audit(&mut self) {
        self.blocks.audit(&mut self.memory);
    }

    fn report(&self) -> EngineReport {
        let mut report = EngineReport {
            completed_requests: self.completed,
            held_requests: self.handovers.len() as u64,
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
        report.cached_blocks = self.cache.blocks().filter(|(group, block)| census.mark(*group, *block)).count() as u64;
        for held in self.handovers.values() {
            let quarantined = held.quarantined && !matches!(held.stage, Stage::Verifying(..));
            let count = if quarantined { &mut report.quarantined_blocks } else { &mut report.held_blocks };
            for (group, table) in held.tables.iter().enumerate() {
                *count += table.blocks.iter().filter(|block| census.mark(group, **block)).count() as u64;
            }
        }
        report.leaked_blocks = census.unmarked();
        report
    }
}
