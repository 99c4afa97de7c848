//! What a run comes to: the object that `--json` prints, and what is wrong with it.

use std::collections::BTreeMap;

use kvferry::{Direction, Evidence, FailReason, Finished, Outcome, PathReport, Role, TransportKind};
use kvferry_synthetic::EngineReport;
use serde::Serialize;

use crate::paths::Known;
use crate::rank::{RankConfig, name, pool_name};
use crate::record::{Departure, Record};
use crate::setup::Setup;

/// What `--json` prints.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Verdict {
    pub(crate) requests: u64,
    pub(crate) delivered: u64,
    pub(crate) failed: u64,
    pub(crate) cancelled: u64,
    /// What delivered requests had to bring to all decode ranks that took part.
    pub(crate) bytes: u64,
    pub(crate) verified_bytes: u64,
    pub(crate) mismatched_bytes: u64,
    /// Blocks of survivors that belong to nobody, or to requests that are over.
    pub(crate) leaked_blocks: u64,
    pub(crate) quarantined_blocks: u64,
    /// From the first submission to the last outcome.
    pub(crate) seconds: f64,
    pub(crate) gigabytes_per_second: f64,
    pub(crate) handover_ms: Quantiles,
    pub(crate) paths: Vec<Path>,
    pub(crate) failures: Vec<Failure>,
    /// Prefill ranks that were told to leave.
    pub(crate) departures: Vec<Departure>,
    /// What of the NICs was not as it was asked for.
    pub(crate) warnings: Vec<String>,
    /// What is worth knowing besides, and no reason to fail.
    #[serde(skip)]
    pub(crate) notes: Vec<String>,
    /// Why this is no success.
    #[serde(skip)]
    pub(crate) complaints: Vec<String>,
}

/// From the last prefill rank's readiness to the decode leader's decision, of delivered requests.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Quantiles {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

/// What moved between a pair of ranks in delivered requests.
#[derive(Debug, Serialize)]
pub(crate) struct Path {
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) transport: &'static str,
    pub(crate) device: String,
    pub(crate) direction: &'static str,
    pub(crate) bytes: u64,
    pub(crate) pieces: u64,
    /// In short: how far it is proven, over which lanes, and what was counted.
    pub(crate) evidence: String,
    /// What the initiator's transport shows and does not show; `None` if it was killed before it could say.
    pub(crate) proof: Option<Evidence>,
    /// Transports that would have been preferred, each with why it was not taken.
    pub(crate) passed_over: Vec<String>,
    /// Why it is no RDMA though that was expected.
    pub(crate) rdma_shortfall: Option<String>,
}

/// A request that was not delivered.
#[derive(Debug, Serialize)]
pub(crate) struct Failure {
    pub(crate) request: u64,
    pub(crate) reason: String,
}

impl Verdict {
    /// Judges a run.
    pub(crate) fn of(setup: &Setup, record: &Record) -> Verdict {
        let mut verdict = Verdict {
            requests: setup.requests.len() as u64,
            seconds: record.seconds,
            departures: record.departures.clone(),
            warnings: setup.warnings.clone(),
            ..Verdict::default()
        };
        let mut complaints = record.complaints.clone();
        let mut waits = Vec::new();
        let mut paths: BTreeMap<PathKey, (u64, u64)> = BTreeMap::new();
        let mut needed = 0u64;
        for spec in &setup.requests {
            let request = spec.request.0;
            match record.finished.get(&spec.request) {
                Some(Ok(Finished { outcome: Outcome::Delivered, ready_at, settled_at, paths: moved, .. })) => {
                    verdict.delivered += 1;
                    needed = needed.saturating_add(setup.decode.geometry.bytes_expected(spec.tokens, 0));
                    if let (Some(ready), Some(settled)) = (ready_at, settled_at) {
                        waits.push(settled.since(*ready).as_secs_f64() * 1e3);
                    }
                    for path in moved {
                        let sums = paths.entry(PathKey::of(setup, path)).or_default();
                        *sums = (sums.0 + path.bytes, sums.1 + path.pieces);
                    }
                }
                Some(Ok(Finished { outcome: Outcome::Cancelled, .. })) => verdict.cancelled += 1,
                Some(Ok(Finished { outcome: Outcome::Failed { reason }, .. })) => {
                    verdict.failed += 1;
                    verdict.failures.push(Failure { request, reason: describe(setup, reason) });
                }
                Some(Err(refusal)) => {
                    verdict.failed += 1;
                    verdict.failures.push(Failure { request, reason: format!("refused: {refusal}") });
                }
                None => {}
            }
        }
        let moved: u64 = paths.values().map(|(bytes, _)| *bytes).fold(0, u64::saturating_add);
        // Decode ranks that have perhaps not checked, or not told, all that they got.
        let (mut expected, mut hurt) = (0u64, Vec::new());
        for (config, rank) in setup.ranks.iter().zip(&record.ranks) {
            for report in rank.before.iter().chain([&rank.report]) {
                let engine = &report.engine;
                verdict.verified_bytes += engine.verified_bytes;
                verdict.mismatched_bytes += engine.mismatched_bytes;
                expected += report.expected_bytes;
                if let Some(first) = &engine.first_mismatch {
                    complaints.push(format!("{}: {first}", config.name()));
                }
            }
            if rank.hurt && config.role == Role::Decode {
                hurt.push(config.name());
            }
            if rank.gone {
                continue;
            }
            let engine = &rank.report.engine;
            verdict.leaked_blocks += engine.leaked_blocks + engine.held_blocks;
            verdict.quarantined_blocks += engine.quarantined_blocks;
            complaints.extend(unlike(&config.name(), rank.report.expected_bytes, engine));
        }
        verdict.bytes = if setup.reuse_prefix { expected } else { needed };
        verdict.gigabytes_per_second =
            if record.seconds > 0.0 { verdict.bytes as f64 / record.seconds / 1e9 } else { 0.0 };
        waits.sort_by(f64::total_cmp);
        verdict.handover_ms =
            Quantiles { p50: quantile(&waits, 50), p99: quantile(&waits, 99), max: quantile(&waits, 100) };
        verdict.paths = paths.into_iter().map(|(key, sums)| key.path(sums, setup, record)).collect();
        let mut sums = Vec::new();
        if hurt.is_empty() && !record.scheduler_hurt {
            sums.extend([("were verified", verdict.verified_bytes), ("were asked for", expected)]);
        } else if verdict.verified_bytes < verdict.bytes {
            let missing = verdict.bytes - verdict.verified_bytes;
            if hurt.is_empty() {
                complaints.push(format!("{missing} of {} delivered bytes were not checked by anybody", verdict.bytes));
            }
            verdict.notes.push(format!(
                "{missing} of {} delivered bytes were on {}, which did not live to tell that they were checked",
                verdict.bytes,
                hurt.join(", ")
            ));
        }
        // What moved is known from the decode leaders' reports, whoever died afterwards.
        if (hurt.is_empty() && !record.scheduler_hurt) || !setup.reuse_prefix {
            sums.push(("were moved", moved));
        }
        for (what, bytes) in sums {
            if bytes != verdict.bytes {
                complaints.push(format!("{bytes} bytes {what}, delivered requests need {}", verdict.bytes));
            }
        }
        if verdict.failed > 0 && setup.faults.is_empty() && record.departures.is_empty() {
            complaints.push(format!(
                "{} requests failed, and no --kill, --drain, --stop or --pause explains it",
                verdict.failed
            ));
        }
        if verdict.mismatched_bytes > 0 {
            complaints.push(format!("{} bytes are not what they have to be", verdict.mismatched_bytes));
        }
        if verdict.leaked_blocks > 0 {
            complaints.push(format!("{} blocks of survivors did not come back", verdict.leaked_blocks));
        }
        let accounted = verdict.delivered + verdict.failed + verdict.cancelled;
        if accounted != verdict.requests {
            complaints.push(format!(
                "{} of {} requests have no outcome",
                verdict.requests - accounted,
                verdict.requests
            ));
        }
        verdict.complaints = complaints;
        verdict
    }

    /// One line.
    pub(crate) fn json(&self) -> String {
        serde_json::to_string(self).unwrap_or_else(|error| format!("{{\"error\":{:?}}}", error.to_string()))
    }
}

/// What is wrong with a survivor's own account.
fn unlike(name: &str, expected: u64, engine: &EngineReport) -> Option<String> {
    if engine.verified_bytes != expected {
        return Some(format!("{name} verified {} bytes where {expected} were to come", engine.verified_bytes));
    }
    let rejection = engine.last_rejection.as_ref().filter(|_| engine.rejected > 0)?;
    // A release that crossed the engine's answer is no mistake.
    tracing::info!(name, rejection, "an answer of the engine was rejected");
    None
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct PathKey {
    from: u64,
    to: u64,
    transport: TransportKind,
    device: String,
    pushed: bool,
}

impl PathKey {
    fn of(setup: &Setup, path: &PathReport) -> PathKey {
        PathKey {
            from: setup.number(Role::Prefill, path.source_group, path.source),
            to: setup.number(Role::Decode, path.destination_group, path.destination),
            transport: path.kind,
            device: path.device.clone(),
            pushed: path.direction == Direction::Push,
        }
    }

    fn path(self, (bytes, pieces): (u64, u64), setup: &Setup, record: &Record) -> Path {
        let known = self.known(setup, record);
        let counted = self.counted(pieces, setup, record);
        let evidence = match known.evidence.as_ref() {
            Some(proof) => format!("{} {}; {counted}", proof.grade, proof.lanes.join(",")),
            None => format!("no proof, for its initiator is gone; {counted}"),
        };
        Path {
            evidence,
            proof: known.evidence,
            passed_over: known.passed_over,
            rdma_shortfall: known.shortfall,
            from: name(Role::Prefill, self.from),
            to: name(Role::Decode, self.to),
            transport: self.transport.name(),
            device: self.device,
            direction: if self.pushed { "push" } else { "pull" },
            bytes,
            pieces,
        }
    }

    /// What the initiator told of it.
    fn known(&self, setup: &Setup, record: &Record) -> Known {
        let (source, destination) = (setup.index(Role::Prefill, self.from), setup.index(Role::Decode, self.to));
        let (here, there) = if self.pushed { (source, destination) } else { (destination, source) };
        let (Some(here), Some(there)) = (here, there) else { return Known::default() };
        let (rank, peer) = (record.ranks.get(here), setup.ranks.get(there));
        let known = rank.zip(peer).and_then(|(rank, peer)| rank.paths.find(peer.node, self.transport, &self.device));
        known.cloned().unwrap_or_default()
    }

    /// What the destination's transport counted, and for shared memory what its kernel shows.
    fn counted(&self, pieces: u64, setup: &Setup, record: &Record) -> String {
        if self.transport == TransportKind::Cuda {
            return format!("{pieces} pieces moved by kernels of the destination's {}", self.device);
        }
        if self.transport != TransportKind::Shm {
            return format!(
                "{pieces} spans counted by the destination's {} transport on {}",
                self.transport, self.device
            );
        }
        let pool = pool_name(Role::Prefill, self.from);
        let destination = setup.index(Role::Decode, self.to);
        let mapped = destination
            .and_then(|index| record.ranks.get(index))
            .and_then(|rank| rank.census.as_ref())
            .is_some_and(|census| census.mapped.contains(&pool));
        let seen = if mapped {
            format!("memfd:{pool} is mapped read-only at the destination")
        } else {
            "memfd no longer mapped".to_owned()
        };
        format!("{pieces} copies counted by the destination; {seen}")
    }
}

/// A reason, with ranks as the command line numbers them.
fn describe(setup: &Setup, reason: &FailReason) -> String {
    match reason {
        FailReason::RankLost { role, group, rank, cause, .. } => {
            format!("{} was lost: {cause}", name(*role, setup.number(*role, *group, *rank)))
        }
        FailReason::Transport { kind, peer, message } => {
            let rank =
                setup.ranks.iter().find(|rank| rank.node == *peer).map_or_else(|| peer.to_string(), RankConfig::name);
            format!("the {kind} transfer with {rank} failed: {message}")
        }
        other => other.to_string(),
    }
}

/// The smallest value that at least `percent` of the sorted ones do not exceed.
fn quantile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(0.0)
}
