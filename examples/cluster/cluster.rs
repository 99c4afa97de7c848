//! The processes of a run: started, hurt as asked, started again, and what is known of each.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kvferry::{Epoch, GroupId, RequestId, RequestSpec};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::fault::{Fault, Target, When};
use crate::harm::Deed;
use crate::launch::{LaunchError, Launched, Word};
use crate::options::{RANK_WORKER, SCHEDULER_WORKER};
use crate::rank::{self, RankConfig, RankWorker};
use crate::record::{RankRecord, Record};
use crate::scheduler::{self, SchedulerConfig, SchedulerWorker};
use crate::setup::Setup;
use crate::worker::Census;

/// What came from one of the processes, and from which of its lives.
pub(crate) enum Heard {
    Scheduler(u32, Word<scheduler::Said>),
    Rank(usize, u32, Word<rank::Said>),
}

/// Everything that runs.
pub(crate) struct Cluster<'a> {
    pub(crate) setup: &'a Setup,
    pub(crate) record: Record,
    /// Requests that were submitted and are not over.
    pub(crate) open: BTreeMap<RequestId, RequestSpec>,
    /// Of delivered requests.
    pub(crate) bytes: u64,
    /// Every group was complete once, and ranks have no excuse to end.
    pub(crate) stood: bool,
    /// Everybody was told to stop.
    ending: bool,
    /// Groups that are complete, as the scheduler sees it.
    pub(crate) standing: BTreeSet<GroupId>,
    pub(crate) scheduler: Option<Launched<scheduler::Order>>,
    pub(crate) scheduler_life: u32,
    pub(crate) scheduler_census: Option<Census>,
    pub(crate) scheduler_baseline: Option<u64>,
    /// It ended by itself, or could not be started again.
    pub(crate) scheduler_failed: Option<String>,
    /// Where it listens, once it does.
    pub(crate) address: Option<String>,
    pub(crate) ranks: Vec<Launched<rank::Order>>,
    pub(crate) heard: mpsc::UnboundedReceiver<Heard>,
    pub(crate) inbox: mpsc::UnboundedSender<Heard>,
    /// Those by transfers that are still to come.
    pub(crate) faults: Vec<Fault>,
    /// Transfers that have started.
    pub(crate) started: u64,
    pub(crate) timers: Vec<(Instant, Deed)>,
}

impl<'a> Cluster<'a> {
    /// Starts the scheduler, waits until it listens, and starts all ranks.
    pub(crate) async fn start(setup: &'a Setup) -> Result<Cluster<'a>, LaunchError> {
        let (inbox, heard) = mpsc::unbounded_channel();
        let mut cluster = Cluster {
            setup,
            record: Record::default(),
            open: BTreeMap::new(),
            bytes: 0,
            stood: false,
            ending: false,
            standing: BTreeSet::new(),
            scheduler: None,
            scheduler_life: 0,
            scheduler_census: None,
            scheduler_baseline: None,
            scheduler_failed: None,
            address: None,
            ranks: Vec::with_capacity(setup.ranks.len()),
            heard,
            inbox,
            faults: setup.faults.iter().copied().filter(|fault| matches!(fault.at, When::Transfer(_))).collect(),
            started: 0,
            timers: Vec::new(),
        };
        cluster.scheduler = Some(cluster.launch_scheduler()?);
        while cluster.address.is_none() && cluster.scheduler_failed.is_none() {
            cluster.step().await;
        }
        for index in 0..setup.ranks.len() {
            let launched = cluster.launch_rank(index, 0)?;
            cluster.ranks.push(launched);
            cluster.record.ranks.push(RankRecord::default());
        }
        Ok(cluster)
    }

    pub(crate) fn launch_scheduler(&self) -> Result<Launched<scheduler::Order>, LaunchError> {
        let life = self.scheduler_life;
        let config = SchedulerConfig {
            epoch: Epoch(u64::from(life) + 1),
            listen: self.address.clone().unwrap_or_else(|| "127.0.0.1:0".to_owned()),
            policy: self.setup.policy,
            traceparent: self.setup.traceparent.map(|trace| trace.to_string()),
            terms: self.setup.terms,
            restart: self.setup.restart,
            metrics: self.setup.metrics.map(|address| address.to_string()),
            recorder: self.setup.recorder.as_ref().map(|dir| (dir.join("scheduler.jsonl"), !self.setup.in_process)),
            timeline: self.setup.timeline.is_some(),
        };
        let inbox = self.inbox.clone();
        // Whoever collects may be done.
        let hear = move |word| drop(inbox.send(Heard::Scheduler(life, word)));
        match self.setup.in_process {
            true => Launched::thread::<SchedulerWorker>("scheduler", config, hear),
            false => Launched::process::<SchedulerWorker>("scheduler", SCHEDULER_WORKER, &config, hear),
        }
    }

    pub(crate) fn launch_rank(&self, index: usize, life: u32) -> Result<Launched<rank::Order>, LaunchError> {
        let scheduler = self.address.clone().unwrap_or_default();
        let Some(config) = self.setup.ranks.get(index) else { return Ok(Launched::nothing()) };
        let config = RankConfig { scheduler, life, ..config.clone() };
        let (inbox, name) = (self.inbox.clone(), config.name());
        let hear = move |word| drop(inbox.send(Heard::Rank(index, life, word)));
        match self.setup.in_process {
            true => Launched::thread::<RankWorker>(&name, config, hear),
            false => Launched::process::<RankWorker>(&name, RANK_WORKER, &config, hear),
        }
    }

    /// Takes one word, or does what is due.
    pub(crate) async fn step(&mut self) {
        let due = self.timers.iter().map(|(at, _)| *at).min();
        tokio::select! {
            biased;
            () = async { tokio::time::sleep_until(due.unwrap_or_else(Instant::now)).await }, if due.is_some() => {
                let now = Instant::now();
                for (_, deed) in self.timers.extract_if(.., |(at, _)| *at <= now).collect::<Vec<_>>() {
                    match deed {
                        Deed::Hurt(fault) => self.hurt(fault),
                        Deed::Continue(target) => self.go_on(target),
                        Deed::Fence(target) => self.fence(target),
                    }
                }
            }
            Some(heard) = self.heard.recv() => match heard {
                Heard::Scheduler(life, word) if life == self.scheduler_life => self.scheduler_said(word),
                Heard::Rank(index, life, word)
                    if self.record.ranks.get(index).is_some_and(|rank| rank.life == life) =>
                {
                    self.rank_said(index, word);
                }
                // Of an earlier life.
                _ => {}
            },
        }
    }

    /// Steps for so long.
    pub(crate) async fn step_for(&mut self, pause: Duration) {
        let until = tokio::time::sleep(pause);
        tokio::pin!(until);
        loop {
            tokio::select! {
                () = &mut until => break,
                () = self.step() => {}
            }
        }
    }

    /// Gives the scheduler a request; again, when it is started again before it said how that ended.
    pub(crate) fn submit(&mut self, spec: &RequestSpec) {
        self.open.insert(spec.request, spec.clone());
        self.tell_scheduler(scheduler::Order::Submit(spec.clone()));
    }

    fn tell_scheduler(&self, order: scheduler::Order) {
        if let Some(scheduler) = &self.scheduler {
            scheduler.tell(order);
        }
    }

    fn scheduler_said(&mut self, word: Word<scheduler::Said>) {
        match word {
            Word::Said(scheduler::Said::Listening { address }) => {
                self.address = Some(address);
                let open: Vec<RequestSpec> = self.open.values().cloned().collect();
                for spec in open {
                    self.tell_scheduler(scheduler::Order::Submit(spec));
                }
            }
            Word::Said(scheduler::Said::GroupReady { group }) => {
                tracing::debug!(%group, "ready");
                self.standing.insert(group);
            }
            Word::Said(scheduler::Said::Started) => {
                self.started += 1;
                let started = self.started;
                for fault in self.faults.extract_if(.., |fault| fault.is_due(started)).collect::<Vec<_>>() {
                    self.hurt(fault);
                }
            }
            Word::Said(scheduler::Said::NodeLost { node, cause }) => {
                tracing::debug!(%node, cause, "lost");
                if let Some(index) = self.setup.ranks.iter().position(|rank| rank.node == node) {
                    self.rank_lost(index, &cause);
                }
            }
            Word::Said(scheduler::Said::Finished { request, end }) => {
                if self.open.remove(&request).is_some() {
                    let paths = end.iter().flat_map(|finished| &finished.paths);
                    self.bytes += paths.map(|path| path.bytes).sum::<u64>();
                    self.record.finished.insert(request, end);
                }
            }
            Word::Said(scheduler::Said::Serving(address)) => say_where("the scheduler", &address),
            Word::Said(scheduler::Said::Course(course)) => self.record.courses.push((None, course)),
            Word::Said(scheduler::Said::Report { census }) => self.scheduler_census = Some(census),
            // Its next incarnation learns from the ranks what stands.
            Word::Said(scheduler::Said::Away(why)) if !self.ending => {
                if self.setup.faults.is_empty() {
                    self.record.complaints.push(format!("the scheduler was away, which nobody had asked for: {why}"));
                }
                self.record.scheduler_hurt = true;
                self.fence(Target::Scheduler);
            }
            Word::Said(scheduler::Said::Away(why)) => self.scheduler_failed = Some(why),
            Word::Said(scheduler::Said::Failed(reason)) => self.scheduler_failed = Some(reason),
            Word::Ended => {
                let how = self.scheduler.as_mut().map(Launched::ending).unwrap_or_default();
                self.scheduler_failed.get_or_insert(how);
            }
        }
    }

    fn rank_said(&mut self, index: usize, word: Word<rank::Said>) {
        let Some(rank) = self.record.ranks.get_mut(index) else { return };
        match word {
            Word::Said(rank::Said::Report(mut report)) => {
                rank.hurt |= report.restarts > rank.report.restarts;
                // Only answers look at what the kernel shows.
                rank.census = report.census.take().or(rank.census.take());
                rank.paths.extend(std::mem::take(&mut report.paths));
                rank.report = *report;
            }
            Word::Said(rank::Said::Lost(cause)) => self.complain(index, &cause),
            Word::Said(rank::Said::Failed(reason)) => rank.failed = Some(reason),
            Word::Said(rank::Said::Serving(address)) => say_where(&self.name(index), &address),
            Word::Said(rank::Said::Course(course)) => self.record.courses.push((Some(index), course)),
            Word::Said(rank::Said::Left { left, seconds }) => {
                // Whoever sent the signal.
                (rank.leaving, rank.hurt, rank.left) = (true, true, Some((left, seconds)));
                let name = self.name(index);
                self.record.notes.push(match left {
                    0 => format!("{name} has left, and nothing was offered there any more"),
                    left => format!("{name} has left although {left} requests were still offered there"),
                });
            }
            Word::Ended if rank.leaving && !rank.gone && !self.ending => self.has_left(index),
            Word::Ended => {
                rank.ended = true;
                if !rank.gone && self.stood {
                    let complaint = format!("{} ended by itself: {}", self.name(index), self.why_ended(index));
                    self.record.complaints.push(complaint);
                    self.set_gone(index);
                }
            }
        }
    }

    /// The scheduler declared a rank lost. One that lives hears of it, and starts its node again by itself.
    fn rank_lost(&mut self, index: usize, cause: &str) {
        if let Some(config) = self.setup.ranks.get(index) {
            self.standing.remove(&config.group);
        }
        let Some(rank) = self.record.ranks.get_mut(index) else { return };
        if rank.gone {
            // At the end ranks leave because they were told to.
            if !self.ending {
                self.fence(self.target(index));
            }
            return;
        }
        self.complain(index, cause);
    }

    /// An incarnation of a rank that lives is over.
    fn complain(&mut self, index: usize, cause: &str) {
        let Some(rank) = self.record.ranks.get_mut(index) else { return };
        if !rank.hurt && !self.record.scheduler_hurt && self.stood {
            rank.hurt = true;
            let complaint = format!("{} was lost, which nobody had asked for: {cause}", self.name(index));
            self.record.complaints.push(complaint);
        }
    }

    /// Gives every survivor an order and waits for all their answers, the scheduler's included.
    pub(crate) async fn ask(&mut self, order: rank::Order) {
        let asked: Vec<(usize, u32, u64)> = self
            .survivors()
            .filter_map(|index| self.record.ranks.get(index).map(|rank| (index, rank.life, rank.report.answered)))
            .collect();
        for (index, ..) in &asked {
            if let Some(rank) = self.ranks.get(*index) {
                rank.tell(order);
            }
        }
        self.scheduler_census = None;
        let life = self.scheduler_life;
        self.tell_scheduler(scheduler::Order::Report);
        // Whoever was replaced meanwhile answers the next time.
        let answered = |rank: Option<&RankRecord>, life: u32, before: u64| {
            rank.is_none_or(|rank| rank.gone || rank.life != life || rank.report.answered > before)
        };
        while !asked.iter().all(|(index, life, before)| answered(self.record.ranks.get(*index), *life, *before))
            || (self.scheduler_census.is_none() && self.scheduler_life == life && self.scheduler_failed.is_none())
        {
            self.step().await;
        }
    }

    /// Stops every rank and the scheduler, and waits for their end.
    pub(crate) async fn end(&mut self, within: Duration) {
        let survivors: Vec<usize> = self.survivors().collect();
        self.ending = true;
        for index in &survivors {
            // Whatever ends from now on was told to.
            self.set_gone(*index);
            if let Some(rank) = self.ranks.get(*index) {
                rank.tell(rank::Order::Stop);
            }
        }
        let ended = async {
            while survivors.iter().any(|index| self.record.ranks.get(*index).is_some_and(|rank| !rank.ended)) {
                self.step().await;
            }
            let failed = self.scheduler_failed.take();
            self.tell_scheduler(scheduler::Order::Stop);
            while failed.is_none() && self.scheduler_failed.is_none() {
                self.step().await;
            }
            failed
        };
        let scheduler = tokio::time::timeout(within, ended).await;
        for index in survivors {
            if let Some(rank) = self.record.ranks.get_mut(index) {
                rank.gone = false;
                if !rank.ended {
                    let complaint = format!("{} did not stop within {} s", self.name(index), within.as_secs());
                    self.record.complaints.push(complaint);
                }
            }
        }
        match scheduler {
            Ok(None) => {}
            Ok(Some(reason)) => self.record.complaints.push(format!("the scheduler ended by itself: {reason}")),
            Err(_) => self.record.complaints.push("the scheduler did not stop".to_owned()),
        }
        self.ranks.iter_mut().for_each(Launched::kill);
        self.scheduler.iter_mut().for_each(Launched::kill);
    }

    pub(crate) fn set_gone(&mut self, index: usize) {
        if let Some(rank) = self.record.ranks.get_mut(index) {
            rank.gone = true;
        }
    }

    pub(crate) fn survivors(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.record.ranks.len()).filter(|index| self.record.ranks.get(*index).is_some_and(|rank| !rank.gone))
    }

    pub(crate) fn name(&self, index: usize) -> String {
        self.setup.ranks.get(index).map(RankConfig::name).unwrap_or_default()
    }

    pub(crate) fn why_ended(&mut self, index: usize) -> String {
        let said = self.record.ranks.get(index).and_then(|rank| rank.failed.clone());
        said.unwrap_or_else(|| self.ranks.get_mut(index).map(Launched::ending).unwrap_or_default())
    }
}

fn say_where(name: &str, address: &str) {
    eprintln!("note: {name} serves metrics at http://{address}/metrics");
}
