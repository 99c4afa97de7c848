//! One run: safety under faults, then everything is mended and must end, and a second wave must be delivered.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use kvferry_core::RequestId;
use kvferry_core::protocol::{Outcome, Vitals};

use crate::chronicle::{Entry, What};
use crate::cluster::{Cluster, SimError};
use crate::config::Config;
use crate::dice::Dice;
use crate::invariants::{Broken, Judge, Scene};
use crate::storm;
use crate::trace::Record;

/// How often in the first phase all actors are asked what they have in hand.
const LOOKS: u32 = 8;

/// The requests that follow once all is mended have no deadline to wait for: whatever takes this long stands still.
const SECOND_WAVE: Duration = Duration::from_secs(20);
/// From the end of a node's incarnation to its next one's place in its group.
const REJOIN: Duration = Duration::from_secs(4);

/// A simulated run.
pub struct Run {
    config: Config,
    cluster: Cluster,
    judge: Judge,
    /// What users were answered.
    answers: BTreeMap<RequestId, Outcome>,
    unmet: Vec<String>,
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct RunReport {
    /// Its seed.
    pub seed: u64,
    /// Requests of both waves.
    pub requests: u64,
    /// Of these, delivered.
    pub delivered: u64,
    /// Failed.
    pub failed: u64,
    /// Cancelled.
    pub cancelled: u64,
    /// How requests failed, and how often.
    pub reasons: BTreeMap<String, u64>,
    /// Time that passed in the world.
    pub virtual_seconds: f64,
    /// Pops of the heaps of kernel and fabric.
    pub events: u64,
    /// Of everything that happened.
    pub trace_hash: u64,
    /// The hash after every [`CHECKPOINT_EVERY`](crate::CHECKPOINT_EVERY) records.
    pub checkpoints: Vec<u64>,
    /// Records that were to be kept in full.
    pub text: Vec<Record>,
    /// The last things that happened.
    pub recent: Vec<Record>,
    /// What the invariants do not allow.
    pub broken: Vec<Broken>,
}

impl Run {
    /// Puts a cluster up, with everything that is to happen to it.
    pub fn new(config: Config) -> Result<Run, SimError> {
        let mut cluster = Cluster::new(config.cluster.clone())?;
        let judge = Judge::new(cluster.yard());
        let (yard, back) = (cluster.yard().clone(), cluster.bring_back());
        storm::brew(cluster.world(), &yard, &config.plan, config.heal_at, &back);
        let mut dice = Dice::new(config.seed, "cancels", 0);
        let (ppm, within) = (u64::from(config.cancelled_ppm), nanos(config.cancelled_within));
        cluster.submit_each(config.shape.requests, config.spread, |cluster, request, at| {
            if dice.below(1_000_000) < ppm {
                cluster.cancel_at(request, at.saturating_add(dice.below(within)));
            }
        });
        Ok(Run { config, cluster, judge, answers: BTreeMap::new(), unmet: Vec::new() })
    }

    /// Keeps the records with these numbers in full.
    pub fn keep(&mut self, numbers: Range<u64>) {
        self.cluster.world().keep_records(numbers);
    }

    /// Runs to the end, and lets `each` see everything that happens.
    pub fn to_end(mut self, mut each: impl FnMut(&Entry)) -> RunReport {
        for _ in 0..LOOKS {
            self.pass(self.config.heal_at / LOOKS, false, &mut each);
            self.look_in();
        }
        let (plan, back) = (std::mem::take(&mut self.config.plan), self.cluster.bring_back());
        storm::heal(self.cluster.world(), &plan, &*back);
        self.cluster.yard().make_room();
        self.config.plan = plan;
        let bound = self.config.bound;
        let mut vitals = self.end_of("the first wave", bound, &mut each);
        if self.unmet.is_empty() {
            // Whoever was taken for lost learns it, ends, and comes back.
            let session = self.config.cluster.session;
            self.pass(session.silence_max * 2 + session.handshake_within + REJOIN, false, &mut each);
            let first = self.answers.len();
            let second = self.config.shape.second_wave();
            self.cluster.submit(second, Duration::from_millis(second));
            vitals = self.end_of("the second wave", SECOND_WAVE, &mut each);
            let late = self.answers.iter().skip(first).filter(|(_, outcome)| !outcome.is_delivered());
            let undelivered: Vec<String> =
                late.map(|(request, outcome)| format!("{request} without any fault: {outcome:?}")).collect();
            self.unmet.extend(undelivered);
        }
        self.judge_all(&vitals);
        self.report()
    }

    /// Waits until all are answered and everything is back.
    fn end_of(&mut self, what: &str, bound: Duration, each: &mut impl FnMut(&Entry)) -> Vec<(usize, Vitals)> {
        if !self.pass(bound, true, each) {
            let waiting = self.cluster.waiting();
            self.unmet.push(format!("{what} did not end within {bound:?}: {waiting:?} are not answered"));
        }
        let mut waited = Duration::ZERO;
        let mut step = Duration::from_millis(20);
        loop {
            let vitals = self.look_in();
            if self.is_quiet(&vitals) || waited > bound {
                return vitals;
            }
            self.pass(step, false, each);
            waited += step;
            step = (step * 2).min(Duration::from_secs(4));
        }
    }

    fn is_quiet(&mut self, vitals: &[(usize, Vitals)]) -> bool {
        if !vitals.iter().all(|(_, vitals)| vitals.is_quiet()) || self.cluster.world().fabric().in_flight() > 0 {
            return false;
        }
        let report = self.cluster.report();
        report.ranks.iter().all(|rank| rank.engine.as_ref().is_some_and(|engine| engine.free_blocks == engine.blocks))
            && vitals.len() >= report.ranks.len()
    }

    /// Lets time pass, until all are answered if that is what is waited for. Says whether they are.
    fn pass(&mut self, time: Duration, until_answered: bool, each: &mut impl FnMut(&Entry)) -> bool {
        let Run { cluster, judge, answers, .. } = self;
        cluster.watch(
            time,
            |world, entry| {
                judge.see(world, entry);
                if let What::Answered(request, answer) = &entry.what {
                    let outcome = match answer {
                        Ok(finished) => finished.outcome.clone(),
                        Err(refusal) => Outcome::from(refusal.clone()),
                    };
                    answers.insert(*request, outcome);
                }
                each(entry);
            },
            |answered, submitted, _| until_answered && answered == submitted,
        )
    }

    fn look_in(&mut self) -> Vec<(usize, Vitals)> {
        let vitals = self.cluster.vitals();
        let now = self.cluster.world().now();
        self.judge.look_in(now, &vitals);
        vitals
    }

    fn judge_all(&mut self, vitals: &[(usize, Vitals)]) {
        self.cluster.world().audit();
        let ranks = self.cluster.report().ranks;
        let world = &*self.cluster.world();
        let scene = Scene { world, ranks: &ranks, vitals, unmet: std::mem::take(&mut self.unmet) };
        self.judge.look_around(&scene);
    }

    fn report(mut self) -> RunReport {
        let mut reasons = BTreeMap::new();
        let count = |which: fn(&Outcome) -> bool| self.answers.values().filter(|outcome| which(outcome)).count() as u64;
        for outcome in self.answers.values() {
            if let Outcome::Failed { reason } = outcome {
                *reasons.entry(reason.to_string()).or_default() += 1;
            }
        }
        let (delivered, failed, cancelled) = (
            count(Outcome::is_delivered),
            count(|outcome| matches!(outcome, Outcome::Failed { .. })),
            count(|outcome| matches!(outcome, Outcome::Cancelled)),
        );
        let requests = self.cluster.submitted();
        let world = &*self.cluster.world();
        let trace = world.trace();
        RunReport {
            seed: self.config.seed,
            requests,
            delivered,
            failed,
            cancelled,
            reasons,
            virtual_seconds: world.now() as f64 / 1e9,
            events: world.events(),
            trace_hash: trace.hash(),
            checkpoints: trace.checkpoints().to_vec(),
            text: trace.text().to_vec(),
            recent: trace.recent().copied().collect(),
            broken: self.judge.broken().to_vec(),
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
