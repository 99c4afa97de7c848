//! What was seen of a run.

use std::collections::BTreeMap;

use kvferry::{Finished, Refusal, RequestId};
use serde::Serialize;

use crate::paths::Paths;
use crate::rank::RankReport;
use crate::timeline::Course;
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
    /// Ranks that were told to leave and have left, in that order.
    pub(crate) departures: Vec<Departure>,
    /// When what happened to requests, by rank; `None` is the scheduler. Empty unless a timeline is wanted.
    pub(crate) courses: Vec<(Option<usize>, Course)>,
}

/// How a rank has left that got SIGTERM.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Departure {
    pub(crate) rank: String,
    /// Requests that were still offered there; 0 if all were fetched, or their leases had expired.
    pub(crate) left: u64,
    /// From the signal to the end of its wait.
    pub(crate) seconds: f64,
    /// Of its process; `None` if a signal ended it.
    pub(crate) exit_status: Option<i32>,
}

/// What is known of one rank.
#[derive(Debug, Default)]
pub(crate) struct RankRecord {
    /// It was killed or stopped, and does not come back.
    pub(crate) gone: bool,
    pub(crate) ended: bool,
    /// It was killed, stopped, paused or lost: perhaps it has not checked, or not told, all that it got.
    pub(crate) hurt: bool,
    /// It was told to leave.
    pub(crate) leaving: bool,
    /// With how many requests still offered it leaves, and after how many seconds.
    pub(crate) left: Option<(u64, f64)>,
    /// The last that it said.
    pub(crate) report: RankReport,
    /// The last that its earlier processes said.
    pub(crate) before: Vec<RankReport>,
    /// What it has told of its paths.
    pub(crate) paths: Paths,
    /// The last census.
    pub(crate) census: Option<Census>,
    /// Its descriptors before the first fault.
    pub(crate) baseline: Option<u64>,
    pub(crate) failed: Option<String>,
    pub(crate) life: u32,
}
