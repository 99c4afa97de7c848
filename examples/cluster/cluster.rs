//! The processes of a run: started, hurt as asked, started again, and what is known of each.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kvferry::{Epoch, Finished, GroupId, Refusal, RequestId, RequestSpec};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::fault::{Action, Fault, Target, When};
use crate::launch::{LaunchError, Launched, Word};
use crate::options::{RANK_WORKER, SCHEDULER_WORKER};
use crate::rank::{self, RankConfig, RankReport, RankWorker};
use crate::scheduler::{self, SchedulerConfig, SchedulerWorker};
use crate::setup::Setup;
use crate::worker::Census;

/// What was seen.
#[derive(Debug, Default)]
pub(crate) struct Record {
    pub(crate) finished: BTreeMap<RequestId, Result<Finished, Refusal>>,
    /// From the first submission to the last outcome.
    pub(crate) seconds: f64,
    /// In the order of the setup.
    pub(crate) ranks: Vec<RankRecord>,
    /// The scheduler was killed, stopped or paused: outcomes may have been lost with it.
    pub(crate) scheduler_hurt: bool,
    /// What did not come in time, or should not have happened.
    pub(crate) complaints: Vec<String>,
    /// What is worth knowing, and no failure.
    pub(crate) notes: Vec<String>,
}

/// What is known of one rank.
#[derive(Debug, Default)]
pub(crate) struct RankRecord {
    /// It was killed or stopped, and does not come back.
    pub(crate) gone: bool,
    pub(crate) ended: bool,
    /// It was killed, stopped, paused or lost: perhaps it has not checked, or not told, all that it got.
    pub(crate) hurt: bool,
    /// The last that it said.
    pub(crate) report: RankReport,
    /// The last that its earlier processes said.
    pub(crate) before: Vec<RankReport>,
    /// The last census.
    pub(crate) census: Option<Census>,
    /// Its descriptors before the first fault.
    baseline: Option<u64>,
    failed: Option<String>,
    life: u32,
}

/// What came from one of the processes, and from which of its lives.
pub(crate) enum Heard {
    Scheduler(u32, Word<scheduler::Said>),
    Rank(usize, u32, Word<rank::Said>),
}

/// What is done when its time comes.
#[derive(Clone, Copy, Debug)]
enum Deed {
    Hurt(Fault),
    Continue(Target),
    /// Who was stopped is killed, though perhaps nobody could say that it was lost.
    Fence(Target),
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
    /// Groups that are complete, as the scheduler sees it.
    standing: BTreeSet<GroupId>,
    scheduler: Option<Launched<scheduler::Order>>,
    scheduler_life: u32,
    scheduler_census: Option<Census>,
    scheduler_baseline: Option<u64>,
    /// It ended by itself, or could not be started again.
    pub(crate) scheduler_failed: Option<String>,
    /// Where it listens, once it does.
    address: Option<String>,
    ranks: Vec<Launched<rank::Order>>,
    heard: mpsc::UnboundedReceiver<Heard>,
    inbox: mpsc::UnboundedSender<Heard>,
    /// Those by transfers that are still to come.
    faults: Vec<Fault>,
    /// Transfers that have started.
    started: u64,
    timers: Vec<(Instant, Deed)>,
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

    fn launch_scheduler(&self) -> Result<Launched<scheduler::Order>, LaunchError> {
        let life = self.scheduler_life;
        let config = SchedulerConfig {
            epoch: Epoch(u64::from(life) + 1),
            listen: self.address.clone().unwrap_or_else(|| "127.0.0.1:0".to_owned()),
            policy: self.setup.policy,
            terms: self.setup.terms,
        };
        let inbox = self.inbox.clone();
        // Whoever collects may be done.
        let hear = move |word| drop(inbox.send(Heard::Scheduler(life, word)));
        match self.setup.in_process {
            true => Launched::thread::<SchedulerWorker>("scheduler", config, hear),
            false => Launched::process::<SchedulerWorker>("scheduler", SCHEDULER_WORKER, &config, hear),
        }
    }

    fn launch_rank(&self, index: usize, life: u32) -> Result<Launched<rank::Order>, LaunchError> {
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

    /// From now on, faults by time are counted.
    pub(crate) fn begin(&mut self) {
        let now = Instant::now();
        for fault in &self.setup.faults {
            if let When::After(after) = fault.at {
                self.timers.push((now + after, Deed::Hurt(*fault)));
            }
        }
    }

    /// Faults that have not happened do not any more.
    pub(crate) fn calm(&mut self) {
        let late = self.timers.extract_if(.., |(_, deed)| matches!(deed, Deed::Hurt(_))).count() + self.faults.len();
        self.faults.clear();
        if late > 0 {
            self.record.notes.push(format!(
                "{late} of {} faults did not happen: only {} transfers started before all requests were over",
                self.setup.faults.len(),
                self.started
            ));
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
            Word::Said(scheduler::Said::Report { census }) => self.scheduler_census = Some(census),
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
                rank.report = *report;
            }
            Word::Said(rank::Said::Failed(reason)) => rank.failed = Some(reason),
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
            return self.fence(self.target(index));
        }
        if !rank.hurt && !self.record.scheduler_hurt && self.stood {
            rank.hurt = true;
            let complaint = format!("{} was lost, which nobody had asked for: {cause}", self.name(index));
            self.record.complaints.push(complaint);
        }
    }

    fn hurt(&mut self, fault: Fault) {
        let target = fault.target;
        match self.index(target) {
            Some(index) => match self.record.ranks.get_mut(index) {
                // It is not there any more.
                None | Some(RankRecord { gone: true, .. }) => return,
                Some(rank) => rank.hurt = true,
            },
            None => self.record.scheduler_hurt = true,
        }
        let lost_after = self.setup.terms.lost_after();
        match fault.action {
            Action::Kill => self.fence(target),
            Action::Stop => {
                self.stop(target);
                if let Some(index) = self.index(target) {
                    self.set_gone(index);
                }
                // The scheduler tells of a rank before; nobody tells of the scheduler.
                let at = if target == Target::Scheduler { lost_after } else { lost_after * 3 };
                self.timers.push((Instant::now() + at, Deed::Fence(target)));
            }
            Action::Pause(length) => {
                self.stop(target);
                let length = length.unwrap_or(lost_after * 2);
                self.timers.push((Instant::now() + length, Deed::Continue(target)));
            }
        }
    }

    fn stop(&mut self, target: Target) {
        match self.index(target) {
            Some(index) => self.ranks.get_mut(index).into_iter().for_each(Launched::stop),
            None => self.scheduler.iter_mut().for_each(Launched::stop),
        }
    }

    fn go_on(&mut self, target: Target) {
        match self.index(target) {
            Some(index) => self.ranks.get_mut(index).into_iter().for_each(Launched::go_on),
            None => self.scheduler.iter_mut().for_each(Launched::go_on),
        }
    }

    /// Nothing of it writes anywhere after this. What is to come back is started again.
    fn fence(&mut self, target: Target) {
        // It is killed once, however many say that it is lost.
        self.timers.retain(|(_, deed)| !matches!(deed, Deed::Fence(other) if *other == target));
        let again = match self.index(target) {
            Some(index) => self.replace_rank(index),
            None => self.replace_scheduler(),
        };
        if let Err(error) = again {
            self.record.complaints.push(error.to_string());
        }
    }

    fn replace_rank(&mut self, index: usize) -> Result<(), LaunchError> {
        let (Some(launched), Some(rank)) = (self.ranks.get_mut(index), self.record.ranks.get_mut(index)) else {
            return Ok(());
        };
        if rank.ended && rank.gone {
            return Ok(());
        }
        launched.kill();
        rank.ended = true;
        rank.gone = true;
        if self.setup.restart {
            let life = rank.life + 1;
            let launched = self.launch_rank(index, life)?;
            if let (Some(slot), Some(rank)) = (self.ranks.get_mut(index), self.record.ranks.get_mut(index)) {
                *slot = launched;
                let RankRecord { report, mut before, baseline, .. } = std::mem::take(rank);
                before.push(report);
                *rank = RankRecord { hurt: true, before, baseline, life, ..RankRecord::default() };
            }
        }
        Ok(())
    }

    fn replace_scheduler(&mut self) -> Result<(), LaunchError> {
        self.scheduler.iter_mut().for_each(Launched::kill);
        self.scheduler_life += 1;
        self.standing.clear();
        self.scheduler_census = None;
        match self.launch_scheduler() {
            Ok(launched) => self.scheduler = Some(launched),
            Err(error) => {
                self.scheduler_failed = Some(error.to_string());
                return Err(error);
            }
        }
        Ok(())
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

    /// Notes how many descriptors everybody has before anything is done to anybody. Says whether that is what was noted last.
    pub(crate) fn take_baseline(&mut self) -> bool {
        let now = self.scheduler_census.as_ref().map(|census| census.descriptors);
        let mut same = self.scheduler_baseline == now;
        self.scheduler_baseline = now;
        for rank in &mut self.record.ranks {
            let now = rank.census.as_ref().map(|census| census.descriptors);
            same &= rank.baseline == now;
            rank.baseline = now;
        }
        same
    }

    /// Stops every rank and the scheduler, and waits for their end.
    pub(crate) async fn end(&mut self, within: Duration) {
        let survivors: Vec<usize> = self.survivors().collect();
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

    fn set_gone(&mut self, index: usize) {
        if let Some(rank) = self.record.ranks.get_mut(index) {
            rank.gone = true;
        }
    }

    pub(crate) fn survivors(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.record.ranks.len()).filter(|index| self.record.ranks.get(*index).is_some_and(|rank| !rank.gone))
    }

    /// Everything that is not as it has to be when all is over and quiet.
    pub(crate) fn rest(&self) -> Vec<String> {
        let mut rest: Vec<String> = self.survivors().filter_map(|index| self.holds(index)).collect();
        let missing = self.groups_missing();
        if missing > 0 {
            rest.push(format!("{missing} groups whose ranks all live are not complete"));
        }
        if !self.setup.faults.is_empty() {
            rest.extend(self.survivors().filter_map(|index| self.traces(index)));
            let census = self.scheduler_census.as_ref().map(|census| census.descriptors);
            rest.extend(grown("the scheduler", census, self.scheduler_baseline));
        }
        rest
    }

    /// Groups that could be complete, and are not.
    pub(crate) fn groups_missing(&self) -> usize {
        let gone = |group: GroupId| {
            let ranks = self.setup.ranks.iter().zip(&self.record.ranks);
            ranks.filter(|(config, _)| config.group == group).any(|(_, rank)| rank.gone)
        };
        let groups = (0..self.setup.groups()).map(|group| GroupId(group as u32));
        groups.filter(|group| !self.standing.contains(group) && !gone(*group)).count()
    }

    /// What a rank still has, in words.
    fn holds(&self, index: usize) -> Option<String> {
        let report = &self.record.ranks.get(index)?.report;
        let engine = &report.engine;
        if engine.blocks == 0 {
            return Some(format!("{} has not reported", self.name(index)));
        }
        let rest = engine.held_requests + engine.queued_requests + engine.held_blocks + engine.quarantined_blocks;
        if report.idle && rest == 0 {
            return None;
        }
        let busy = if report.idle { "is idle" } else { "is at work" };
        Some(format!(
            "{} {busy} with {} requests in {} blocks, {} quarantined blocks and {} requests that wait for blocks",
            self.name(index),
            engine.held_requests,
            engine.held_blocks,
            engine.quarantined_blocks,
            engine.queued_requests
        ))
    }

    /// What the kernel shows of a rank that it should not have (any more): descriptors, and pools of others that are gone.
    fn traces(&self, index: usize) -> Option<String> {
        let rank = self.record.ranks.get(index)?;
        let census = rank.census.as_ref()?;
        if let Some(grown) = grown(&self.name(index), Some(census.descriptors), rank.baseline) {
            return Some(grown);
        }
        for (config, other) in self.setup.ranks.iter().zip(&self.record.ranks) {
            let pool = config.pool_name();
            let there = census.mapped.iter().filter(|mapped| **mapped == pool).count();
            let most = if other.gone { 0 } else { config.regions() };
            if there > most {
                let name = self.name(index);
                return Some(format!("{name} has {there} regions of {pool} mapped, of which {most} can be alive"));
            }
        }
        None
    }

    pub(crate) fn name(&self, index: usize) -> String {
        self.setup.ranks.get(index).map(RankConfig::name).unwrap_or_default()
    }

    pub(crate) fn why_ended(&mut self, index: usize) -> String {
        let said = self.record.ranks.get(index).and_then(|rank| rank.failed.clone());
        said.unwrap_or_else(|| self.ranks.get_mut(index).map(Launched::ending).unwrap_or_default())
    }

    /// Which rank is meant; `None` for the scheduler.
    fn index(&self, target: Target) -> Option<usize> {
        let Target::Rank { role, rank } = target else { return None };
        self.setup.ranks.iter().position(|config| config.role == role && config.number == rank)
    }

    fn target(&self, index: usize) -> Target {
        let config = self.setup.ranks.get(index);
        config.map_or(Target::Scheduler, |config| Target::Rank { role: config.role, rank: config.number })
    }
}

/// Whether somebody has more descriptors than at first, in words.
fn grown(name: &str, now: Option<u64>, before: Option<u64>) -> Option<String> {
    let (now, before) = (now?, before?);
    (now > before).then(|| format!("{name} has {now} descriptors, {before} before the first fault"))
}
