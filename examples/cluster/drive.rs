//! The parent's work, phase by phase: everything stands, all requests end, all blocks come back, everything ends.

use std::time::{Duration, Instant};

use thiserror::Error;

use crate::cluster::Cluster;
use crate::launch::LaunchError;
use crate::progress::Progress;
use crate::rank::Order;
use crate::record::Record;
use crate::setup::Setup;

/// From the start of the ranks until every group is complete: pools are populated meanwhile.
const START_WITHIN: Duration = Duration::from_secs(120);
/// From the last outcome until every survivor has checked what it got and holds nothing: longer than a lease.
const SETTLE_WITHIN: Duration = Duration::from_secs(60);
/// From the order to stop to the end of everybody.
const STOP_WITHIN: Duration = Duration::from_secs(15);
const ASK_EVERY: Duration = Duration::from_millis(20);
/// Counts of descriptors one after the other that must be as the one before, until all connections are taken to be made.
const COUNTS_ALIKE: u32 = 6;
const SHOW_EVERY: Duration = Duration::from_millis(200);

/// Why there is nothing to report.
#[derive(Debug, Error)]
#[non_exhaustive]
pub(crate) enum DriveError {
    #[error("the parent has no runtime: {0}")]
    Runtime(std::io::Error),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error("the scheduler ended before the cluster stood: {0}")]
    SchedulerEnded(String),
    #[error("{rank} ended before the cluster stood: {reason}")]
    RankEnded { rank: String, reason: String },
    #[error("the cluster did not stand within {seconds} s; {missing}; lower the number of ranks or the size of pools")]
    NotReady { seconds: u64, missing: String },
}

/// Runs the whole job.
pub(crate) fn run(setup: &Setup) -> Result<Record, DriveError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().map_err(DriveError::Runtime)?;
    runtime.block_on(drive(setup))
}

async fn drive(setup: &Setup) -> Result<Record, DriveError> {
    let began = Instant::now();
    let mut progress = Progress::new(setup.requests.len());
    progress.say("starting ranks");
    let within = START_WITHIN.min(setup.deadline);
    let not_ready = |missing| DriveError::NotReady { seconds: within.as_secs(), missing };
    let mut cluster = match tokio::time::timeout(within, Cluster::start(setup)).await {
        Ok(started) => started?,
        Err(_) => return Err(not_ready("the scheduler does not listen".to_owned())),
    };
    match tokio::time::timeout(within.saturating_sub(began.elapsed()), stand(&mut cluster)).await {
        Ok(stood) => stood?,
        Err(_) => return Err(not_ready(missing(&cluster))),
    }
    let mut phase = "the outcomes of all requests";
    let left = setup.deadline.saturating_sub(began.elapsed());
    let job = async {
        work(&mut cluster, &mut progress).await;
        phase = "survivors to release all blocks";
        progress.say("checking what is left");
        if tokio::time::timeout(SETTLE_WITHIN, settle(&mut cluster)).await.is_err() {
            let complaint = format!("after {} s {}", SETTLE_WITHIN.as_secs(), missing(&cluster));
            cluster.record.complaints.push(complaint);
        }
    };
    if tokio::time::timeout(left, job).await.is_err() {
        let seconds = setup.deadline.as_secs();
        let late = format!("--deadline {seconds} ran out while waiting for {phase}; {}", missing(&cluster));
        cluster.record.complaints.push(late);
    }
    progress.clear();
    cluster.end(STOP_WITHIN).await;
    Ok(cluster.record)
}

/// Waits until every group is complete and every engine has been over its pool: what is measured later is handovers.
async fn stand(cluster: &mut Cluster<'_>) -> Result<(), DriveError> {
    while cluster.groups_missing() > 0 || cluster.record.ranks.iter().any(|rank| !rank.report.idle) {
        if let Some(reason) = cluster.scheduler_failed.clone() {
            return Err(DriveError::SchedulerEnded(reason));
        }
        if let Some(index) = cluster.record.ranks.iter().position(|rank| rank.ended) {
            return Err(DriveError::RankEnded { rank: cluster.name(index), reason: cluster.why_ended(index) });
        }
        cluster.step().await;
    }
    cluster.stood = true;
    if !cluster.setup.faults.is_empty() {
        // Connections between ranks are made meanwhile, on a busy machine with pauses: two counts that are alike prove nothing.
        let mut alike = 0;
        while alike < COUNTS_ALIKE {
            cluster.ask(Order::Report).await;
            alike = if cluster.take_baseline() { alike + 1 } else { 0 };
            cluster.step_for(ASK_EVERY * 5).await;
        }
    }
    Ok(())
}

/// Submits every request and waits for all outcomes.
async fn work(cluster: &mut Cluster<'_>, progress: &mut Progress) {
    let began = Instant::now();
    let mut show = tokio::time::interval(SHOW_EVERY);
    let mut waiting = cluster.setup.requests.iter();
    cluster.begin();
    while cluster.scheduler_failed.is_none() {
        while cluster.open.len() < cluster.setup.concurrency
            && let Some(request) = waiting.next()
        {
            cluster.submit(request);
        }
        if cluster.open.is_empty() {
            break;
        }
        tokio::select! {
            () = cluster.step() => cluster.record.seconds = began.elapsed().as_secs_f64(),
            _ = show.tick() => {
                let (finished, open) = (cluster.record.finished.len(), cluster.open.len());
                progress.show(finished, open, cluster.bytes, began.elapsed().as_secs_f64());
            }
        }
    }
    cluster.calm();
}

/// Asks survivors until each of them is idle and holds nothing. Two answers must agree: a call may be on its way to a rank.
async fn settle(cluster: &mut Cluster<'_>) {
    let mut quiet = 0;
    while quiet < 2 && cluster.scheduler_failed.is_none() {
        cluster.ask(Order::Report).await;
        quiet = if cluster.rest().is_empty() { quiet + 1 } else { 0 };
        cluster.step_for(ASK_EVERY).await;
    }
    // Everything has ended: whoever writes now, or wrote meanwhile where nothing was to come, is caught.
    cluster.ask(Order::Audit).await;
}

/// What is not as it has to be at the end, in words.
fn missing(cluster: &Cluster<'_>) -> String {
    let open = cluster.setup.requests.len() - cluster.record.finished.len();
    let rest = cluster.rest();
    let rest = if rest.is_empty() { "nobody held anything".to_owned() } else { rest.join("; ") };
    format!("{open} requests had no outcome; {rest}")
}
