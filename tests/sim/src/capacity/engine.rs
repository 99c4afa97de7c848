//! Engines that only take time: a rank that prefills at a rate, and one that holds blocks while it decodes.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use kvferry_actors::{Answer, Clock, Tick};
use kvferry_core::protocol::{EngineCall, EngineEvent, Outcome, PrefillJob, RequestSpec, Role};
use kvferry_core::{GroupGeometry, HandoverId, Moment, Rank, RequestId};

use super::ledger::{Ledger, Stage};
use super::stock::{Holding, Stock};

/// A call of the worker.
pub(super) struct Call(pub(super) EngineCall);

impl Message for Call {
    type Result = ();
}

/// What an engine needs to know.
pub(super) struct EngineTerms {
    pub(super) role: Role,
    pub(super) geometry: Arc<GroupGeometry>,
    pub(super) rank: Rank,
    pub(super) blocks: Vec<u32>,
    /// Blocks per prefix hash, 0 to keep no prefixes.
    pub(super) stripe_blocks: usize,
    /// Of a whole group.
    pub(super) prefill_tokens_per_second: f64,
    /// Of one request.
    pub(super) decode_tokens_per_second: f64,
    pub(super) layers_per_step: u32,
}

/// One rank's engine, beside its worker.
pub(super) struct TimingEngine {
    terms: EngineTerms,
    clock: Rc<dyn Clock>,
    /// The world's time when the node's clock showed the second.
    epoch: (u64, Moment),
    answers: Recipient<Answer>,
    ledger: Rc<RefCell<Ledger>>,
    stock: Stock,
    /// Prefill: jobs, the first of which is computed once there are blocks.
    jobs: VecDeque<PrefillJob>,
    computing: Option<Computing>,
    offers: BTreeMap<RequestId, Holding>,
    /// Decode: handovers without blocks.
    waiting: VecDeque<(HandoverId, RequestSpec)>,
    placed: BTreeMap<HandoverId, (RequestSpec, Holding)>,
    /// Sequences that end, by when.
    decoding: BTreeSet<(Moment, HandoverId)>,
    armed: Option<Moment>,
}

struct Computing {
    request: RequestId,
    began: Moment,
    takes: Duration,
    /// Model-layer ends of its steps, and how many are computed.
    steps: Vec<u32>,
    done: usize,
}

impl TimingEngine {
    pub(super) fn new(
        terms: EngineTerms,
        clock: Rc<dyn Clock>,
        epoch: (u64, Moment),
        answers: Recipient<Answer>,
        ledger: Rc<RefCell<Ledger>>,
    ) -> Self {
        TimingEngine {
            stock: Stock::new(&terms.blocks, terms.stripe_blocks),
            epoch,
            terms,
            clock,
            answers,
            ledger,
            jobs: VecDeque::new(),
            computing: None,
            offers: BTreeMap::new(),
            waiting: VecDeque::new(),
            placed: BTreeMap::new(),
            decoding: BTreeSet::new(),
            armed: None,
        }
    }

    fn say(&self, event: EngineEvent) {
        self.answers.do_send(Answer(event));
    }

    fn note(&self, request: RequestId, stage: Stage, at: Moment) {
        let since = u64::try_from(at.since(self.epoch.1).as_nanos()).unwrap_or(u64::MAX);
        self.ledger.borrow_mut().note(request, stage, self.epoch.0.saturating_add(since));
    }

    /// Begins the next prefill, if there are blocks for it: one at a time, in the order of arrival.
    fn begin(&mut self, now: Moment) {
        while self.computing.is_none()
            && let Some(PrefillJob { spec, .. }) = self.jobs.front()
        {
            let (geometry, rank) = (Arc::clone(&self.terms.geometry), self.terms.rank);
            let Some(holding) = self.stock.take(&geometry, rank, spec.tokens, &[], &mut Vec::new()) else { return };
            let (request, tokens) = (spec.request, spec.tokens);
            self.jobs.pop_front();
            let layers = geometry.model.layers;
            let each = self.terms.layers_per_step.clamp(1, layers.max(1));
            let steps: Vec<u32> =
                (1..=layers.div_ceil(each)).map(|step| step.saturating_mul(each).min(layers)).collect();
            self.note(request, Stage::Begun, now);
            self.say(EngineEvent::Opened { request, tables: self.stock.tables(&holding), steps: steps.clone() });
            self.offers.insert(request, holding);
            let takes = Duration::from_secs_f64(tokens as f64 / self.terms.prefill_tokens_per_second);
            self.computing = Some(Computing { request, began: now, takes, steps, done: 0 });
        }
    }

    fn compute(&mut self, now: Moment) {
        while let Some(computing) = &mut self.computing {
            let before = computing.done;
            while computing.due().is_some_and(|due| due <= now) {
                computing.done += 1;
            }
            let (request, done, all) = (computing.request, computing.done, computing.steps.len());
            if done > before {
                self.say(EngineEvent::Ready { request, steps: done as u32 });
            }
            if done < all {
                return;
            }
            self.note(request, Stage::Ready, now);
            self.computing = None;
            self.begin(now);
        }
    }

    /// Gives waiting handovers blocks, in the order of their calls.
    fn place(&mut self, now: Moment) {
        while let Some((handover, spec)) = self.waiting.front() {
            let (handover, mut evicted) = (*handover, Vec::new());
            let (geometry, rank) = (Arc::clone(&self.terms.geometry), self.terms.rank);
            let holding = self.stock.take(&geometry, rank, spec.tokens, &spec.prefix, &mut evicted);
            if !evicted.is_empty() {
                self.say(EngineEvent::Holds { added: Vec::new(), removed: evicted });
            }
            let (Some(holding), Some((_, spec))) = (holding, self.waiting.front().cloned()) else { return };
            self.waiting.pop_front();
            let have = holding.shared_stripes() as u64 * u64::from(spec.prefix_tokens);
            self.note(spec.request, Stage::Placed, now);
            self.ledger.borrow_mut().held(spec.request, handover, have);
            self.say(EngineEvent::Placed { handover, tables: self.stock.tables(&holding), have });
            self.placed.insert(handover, (spec, holding));
        }
    }

    fn settled(&mut self, now: Moment, handover: HandoverId, outcome: &Outcome) {
        self.waiting.retain(|(waiting, _)| *waiting != handover);
        let Some((spec, _)) = self.placed.get(&handover) else { return };
        if outcome.is_delivered() {
            let request = spec.request;
            self.note(request, Stage::Settled, now);
            let tokens = self.ledger.borrow().output_tokens(request);
            let decodes = Duration::from_secs_f64(tokens as f64 / self.terms.decode_tokens_per_second);
            self.decoding.insert((now + decodes, handover));
        } else if let Some((_, holding)) = self.placed.remove(&handover) {
            self.stock.give_back(holding, &[]);
        }
    }

    fn finish_decoding(&mut self, now: Moment) {
        while let Some((_, handover)) = self.decoding.first().copied().filter(|(at, _)| *at <= now) {
            self.decoding.pop_first();
            let Some((spec, holding)) = self.placed.remove(&handover) else { continue };
            let added = self.stock.give_back(holding, &spec.prefix);
            if !added.is_empty() {
                self.say(EngineEvent::Holds { added, removed: Vec::new() });
            }
            self.say(EngineEvent::Freed { handover });
        }
    }

    fn turn(&mut self, ctx: &mut Context<Self>) {
        let now = self.clock.now();
        match self.terms.role {
            Role::Prefill => {
                self.begin(now);
                self.compute(now);
            }
            Role::Decode => {
                self.finish_decoding(now);
                self.place(now);
            }
        }
        let computed = self.computing.as_ref().and_then(Computing::due);
        let due = computed.into_iter().chain(self.decoding.first().map(|(at, _)| *at)).min();
        if let Some(due) = due.filter(|due| self.armed.is_none_or(|armed| *due < armed)) {
            self.armed = Some(due);
            self.clock.wake(due, ctx.address().recipient());
        }
    }
}

impl Computing {
    /// When its next step is computed: layers take equal times.
    fn due(&self) -> Option<Moment> {
        let (end, all) = (self.steps.get(self.done)?, self.steps.last()?);
        Some(self.began + self.takes.mul_f64(f64::from(*end) / f64::from((*all).max(1))))
    }
}

impl Actor for TimingEngine {
    type Context = Context<Self>;
}

impl Handler<Call> for TimingEngine {
    type Result = ();

    fn handle(&mut self, Call(call): Call, ctx: &mut Context<Self>) {
        let now = self.clock.now();
        match call {
            EngineCall::Prefill(job) => self.jobs.push_back(job),
            EngineCall::Release { request, .. } => {
                self.jobs.retain(|job| job.spec.request != request);
                self.computing.take_if(|computing| computing.request == request);
                if let Some(holding) = self.offers.remove(&request) {
                    self.stock.give_back(holding, &[]);
                }
                self.say(EngineEvent::Released { request });
            }
            EngineCall::Place { handover, spec } => self.waiting.push_back((handover, spec)),
            EngineCall::Settled { handover, outcome, .. } => self.settled(now, handover, &outcome),
            _ => {}
        }
        self.turn(ctx);
    }
}

impl Handler<Tick> for TimingEngine {
    type Result = ();

    fn handle(&mut self, _: Tick, ctx: &mut Context<Self>) {
        let now = self.clock.now();
        self.armed = self.armed.filter(|armed| now < *armed);
        self.turn(ctx);
    }
}
