//! The parent's work: starts everything, submits requests, hurts ranks as asked, and collects what ranks have checked.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use kvferry::{
    Epoch, Event, Finished, GroupId, Handover, HandoverError, NodeConfig, NodeError, NodeId, RequestId, SchedulerNode,
    SchedulerTerms,
};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::fault::{Action, Fault};
use crate::launch::{FromRank, LaunchError, Launched};
use crate::progress::Progress;
use crate::rank::{Order, RankReport, Said};
use crate::setup::Setup;

/// From the start of the ranks until every group is complete: pools are populated meanwhile.
const START_WITHIN: Duration = Duration::from_secs(120);
/// From the last outcome until every survivor has checked what it got and holds nothing: longer than a lease.
const SETTLE_WITHIN: Duration = Duration::from_secs(60);
/// From the order to stop to the end of a rank.
const STOP_WITHIN: Duration = Duration::from_secs(10);
const ASK_EVERY: Duration = Duration::from_millis(20);
const SHOW_EVERY: Duration = Duration::from_millis(200);

/// Why there is nothing to report.
#[derive(Debug, Error)]
#[non_exhaustive]
pub(crate) enum DriveError {
    #[error("the parent has no runtime: {0}")]
    Runtime(std::io::Error),
    #[error(transparent)]
    Scheduler(#[from] NodeError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error("{rank} ended before the cluster stood: {reason}")]
    RankEnded { rank: String, reason: String },
    #[error("the cluster did not stand within {seconds} s; {missing}; lower the number of ranks or the size of pools")]
    NotReady { seconds: u64, missing: String },
}

/// What was seen.
#[derive(Debug, Default)]
pub(crate) struct Record {
    pub(crate) finished: BTreeMap<RequestId, Result<Finished, HandoverError>>,
    /// From the first submission to the last outcome.
    pub(crate) seconds: f64,
    /// In the order of the setup.
    pub(crate) ranks: Vec<RankRecord>,
    /// What did not come in time, or should not have happened.
    pub(crate) complaints: Vec<String>,
    /// What is worth knowing, and no failure.
    pub(crate) notes: Vec<String>,
}

/// What is known of one rank.
#[derive(Debug, Default)]
pub(crate) struct RankRecord {
    /// It was killed, stopped or lost.
    pub(crate) gone: bool,
    pub(crate) ended: bool,
    /// The last that it said.
    pub(crate) report: RankReport,
    failed: Option<String>,
}

/// Runs the whole job.
pub(crate) fn run(setup: &Setup) -> Result<Record, DriveError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().map_err(DriveError::Runtime)?;
    runtime.block_on(drive(setup))
}

async fn drive(setup: &Setup) -> Result<Record, DriveError> {
    let began = Instant::now();
    let scheduler =
        SchedulerNode::start(NodeConfig::new(NodeId(0), Epoch(1)), SchedulerTerms::default(), setup.make_policy())
            .await?;
    let (_keep, nothing) = mpsc::unbounded_channel();
    let events = scheduler.events().unwrap_or(nothing);
    let (inbox, said) = mpsc::unbounded_channel();
    let mut cluster = Cluster {
        setup,
        events,
        said,
        ranks: Vec::with_capacity(setup.ranks.len()),
        record: Record::default(),
        groups: BTreeSet::new(),
        faults: setup.faults.clone(),
        started: 0,
        progress: Progress::new(setup.requests.len()),
        bytes: 0,
        phase: "the groups to stand",
    };
    for (index, config) in setup.ranks.iter().enumerate() {
        let config = crate::rank::RankConfig { scheduler: scheduler.address().to_owned(), ..config.clone() };
        let launched = match setup.in_process {
            true => Launched::thread(index, config, inbox.clone())?,
            false => Launched::process(index, &config, inbox.clone())?,
        };
        cluster.ranks.push(launched);
        cluster.record.ranks.push(RankRecord::default());
    }
    let within = START_WITHIN.min(setup.deadline);
    match tokio::time::timeout(within, cluster.stand()).await {
        Ok(stood) => stood?,
        Err(_) => return Err(DriveError::NotReady { seconds: within.as_secs(), missing: cluster.missing() }),
    }
    let left = setup.deadline.saturating_sub(began.elapsed());
    if tokio::time::timeout(left, cluster.work(&scheduler)).await.is_err() {
        let late = format!(
            "--deadline {} ran out while waiting for {}; {}",
            setup.deadline.as_secs(),
            cluster.phase,
            cluster.missing()
        );
        cluster.record.complaints.push(late);
    }
    cluster.progress.clear();
    if let Some(late) = cluster.faults.iter().map(|fault| fault.at).min() {
        let note =
            format!("a --kill or --stop at transfer {late} did not happen: only {} transfers started", cluster.started);
        cluster.record.notes.push(note);
    }
    cluster.end().await;
    if tokio::time::timeout(STOP_WITHIN, scheduler.shutdown()).await.is_err() {
        cluster.record.complaints.push("the scheduler did not stop".to_owned());
    }
    Ok(cluster.record)
}

struct Cluster<'a> {
    setup: &'a Setup,
    events: mpsc::UnboundedReceiver<Event>,
    said: mpsc::UnboundedReceiver<(usize, FromRank)>,
    ranks: Vec<Launched>,
    record: Record,
    /// Groups that were complete once.
    groups: BTreeSet<GroupId>,
    /// Those that are still to come.
    faults: Vec<Fault>,
    /// Transfers that have started.
    started: u64,
    progress: Progress,
    /// Of delivered requests.
    bytes: u64,
    /// What is waited for.
    phase: &'static str,
}

impl Cluster<'_> {
    /// Waits until every group is complete and every engine has been over its pool: what is measured later is handovers.
    async fn stand(&mut self) -> Result<(), DriveError> {
        self.progress.say("starting ranks");
        while self.groups.len() < self.setup.groups() || self.record.ranks.iter().any(|rank| !rank.report.idle) {
            self.step().await;
            if let Some(index) = self.record.ranks.iter().position(|rank| rank.ended) {
                return Err(DriveError::RankEnded { rank: self.name(index), reason: self.why_ended(index) });
            }
        }
        Ok(())
    }

    /// Submits every request, and waits until survivors have checked and released everything.
    async fn work(&mut self, scheduler: &SchedulerNode) {
        self.phase = "the outcomes of all requests";
        let began = Instant::now();
        let mut show = tokio::time::interval(SHOW_EVERY);
        let mut waiting = self.setup.requests.iter();
        let mut handovers: JoinSet<(RequestId, Result<Finished, HandoverError>)> = JoinSet::new();
        loop {
            while handovers.len() < self.setup.concurrency
                && let Some(request) = waiting.next()
            {
                let handover: Handover = scheduler.submit(request.clone()).await;
                handovers.spawn(async move { (handover.request(), handover.await) });
            }
            if handovers.is_empty() {
                break;
            }
            tokio::select! {
                Some(Ok((request, finished))) = handovers.join_next() => {
                    self.bytes += finished.iter().flat_map(|finished| &finished.paths).map(|path| path.bytes).sum::<u64>();
                    self.record.finished.insert(request, finished);
                    self.record.seconds = began.elapsed().as_secs_f64();
                }
                () = self.step() => {}
                _ = show.tick() => self.progress.show(self.record.finished.len(), handovers.len(), self.bytes, began.elapsed().as_secs_f64()),
            }
        }
        self.phase = "survivors to release all blocks";
        self.progress.say("checking what is left");
        if tokio::time::timeout(SETTLE_WITHIN, self.settle()).await.is_err() {
            let complaint = format!("after {} s {}", SETTLE_WITHIN.as_secs(), self.missing());
            self.record.complaints.push(complaint);
        }
    }

    /// Asks survivors until each of them is idle and holds nothing. Two answers must agree: a call may be on its way to a rank.
    async fn settle(&mut self) {
        let mut quiet = 0;
        while quiet < 2 {
            self.ask(Order::Report).await;
            quiet = if self.survivors().all(|index| self.holds(index).is_none()) { quiet + 1 } else { 0 };
            let pause = tokio::time::sleep(ASK_EVERY);
            tokio::pin!(pause);
            loop {
                tokio::select! {
                    () = &mut pause => break,
                    () = self.step() => {}
                }
            }
        }
        // Everything has ended: whoever writes now, or wrote meanwhile where nothing was to come, is caught.
        self.ask(Order::Audit).await;
    }

    /// Gives every survivor an order and waits for all their answers.
    async fn ask(&mut self, order: Order) {
        let asked: Vec<(usize, u64)> = self
            .survivors()
            .map(|index| (index, self.record.ranks.get(index).map_or(0, |rank| rank.report.answered)))
            .collect();
        for (index, _) in &asked {
            if let Some(rank) = self.ranks.get_mut(*index) {
                rank.tell(order);
            }
        }
        let answered =
            |rank: Option<&RankRecord>, before: u64| rank.is_none_or(|rank| rank.gone || rank.report.answered > before);
        while !asked.iter().all(|(index, before)| answered(self.record.ranks.get(*index), *before)) {
            self.step().await;
        }
    }

    /// Takes one event or one word of a rank.
    async fn step(&mut self) {
        tokio::select! {
            Some(event) = self.events.recv() => self.happened(event),
            Some((index, from)) = self.said.recv() => self.heard(index, from),
        }
    }

    fn happened(&mut self, event: Event) {
        match event {
            Event::GroupReady { group } => {
                self.groups.insert(group);
            }
            Event::Started { .. } => {
                self.started += 1;
                let due: Vec<Fault> = self.faults.iter().copied().filter(|fault| fault.at <= self.started).collect();
                self.faults.retain(|fault| fault.at > self.started);
                for fault in due {
                    self.hurt(fault);
                }
            }
            Event::NodeLost { node, cause } => {
                let Some(index) = self.setup.ranks.iter().position(|rank| rank.node == node) else { return };
                if !self.record.ranks.get(index).is_some_and(|rank| rank.gone || rank.ended) {
                    self.record
                        .complaints
                        .push(format!("{} was lost, which nobody had asked for: {cause}", self.name(index)));
                }
                self.gone(index);
                // The fence: nothing of it writes anywhere after this.
                if let Some(rank) = self.ranks.get_mut(index) {
                    rank.kill();
                }
            }
            _ => {}
        }
    }

    fn hurt(&mut self, fault: Fault) {
        let target = self.setup.ranks.iter().position(|rank| rank.role == fault.role && rank.number == fault.rank);
        let Some(index) = target else { return };
        self.gone(index);
        if let Some(rank) = self.ranks.get_mut(index) {
            match fault.action {
                Action::Kill => rank.kill(),
                Action::Stop => rank.stop(),
            }
        }
    }

    fn heard(&mut self, index: usize, from: FromRank) {
        let Some(rank) = self.record.ranks.get_mut(index) else { return };
        match from {
            FromRank::Said(Said::Report(report)) => {
                // Only answers look at what is mapped.
                let mapped =
                    if report.mapped.is_empty() { std::mem::take(&mut rank.report.mapped) } else { Vec::new() };
                rank.report = *report;
                rank.report.mapped.extend(mapped);
            }
            FromRank::Said(Said::Failed(reason)) => rank.failed = Some(reason),
            FromRank::Ended => {
                rank.ended = true;
                if !rank.gone && self.groups.len() == self.setup.groups() {
                    let complaint = format!("{} ended by itself: {}", self.name(index), self.why_ended(index));
                    self.record.complaints.push(complaint);
                    self.gone(index);
                }
            }
        }
    }

    /// Stops every rank and waits for its end.
    async fn end(&mut self) {
        let survivors: Vec<usize> = self.survivors().collect();
        for index in &survivors {
            // Whatever ends from now on was told to.
            self.gone(*index);
            if let Some(rank) = self.ranks.get_mut(*index) {
                rank.tell(Order::Stop);
            }
        }
        let ended = async {
            while survivors.iter().any(|index| self.record.ranks.get(*index).is_some_and(|rank| !rank.ended)) {
                self.step().await;
            }
        };
        let in_time = tokio::time::timeout(STOP_WITHIN, ended).await.is_ok();
        for index in survivors {
            let rank = self.record.ranks.get_mut(index);
            if let Some(rank) = rank {
                rank.gone = false;
                if !in_time && !rank.ended {
                    let complaint = format!("{} did not stop within {} s", self.name(index), STOP_WITHIN.as_secs());
                    self.record.complaints.push(complaint);
                }
            }
        }
        for rank in &mut self.ranks {
            rank.kill();
        }
    }

    fn gone(&mut self, index: usize) {
        if let Some(rank) = self.record.ranks.get_mut(index) {
            rank.gone = true;
        }
    }

    fn survivors(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.record.ranks.len()).filter(|index| self.record.ranks.get(*index).is_some_and(|rank| !rank.gone))
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

    /// What is not as it has to be at the end, in words.
    fn missing(&self) -> String {
        if self.groups.len() < self.setup.groups() {
            return format!("{} of {} groups were complete", self.groups.len(), self.setup.groups());
        }
        let open = self.setup.requests.len() - self.record.finished.len();
        let held: Vec<String> = self.survivors().filter_map(|index| self.holds(index)).collect();
        format!(
            "{open} requests had no outcome; {}",
            if held.is_empty() { "no rank held anything".to_owned() } else { held.join("; ") }
        )
    }

    fn name(&self, index: usize) -> String {
        self.setup.ranks.get(index).map(crate::rank::RankConfig::name).unwrap_or_default()
    }

    fn why_ended(&mut self, index: usize) -> String {
        let said = self.record.ranks.get(index).and_then(|rank| rank.failed.clone());
        said.unwrap_or_else(|| self.ranks.get_mut(index).map(Launched::ending).unwrap_or_default())
    }
}
