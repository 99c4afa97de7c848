//! Capacity questions: a trace instead of seeds, time instead of faults.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum, value_parser};
use kvferry_core::{Direction, Model};
use kvferry_sim::{CapacityOptions, PolicyName, PolicyReport, Quantiles, SimError, TraceError, capacity, parse_trace};
use serde::Serialize;
use serde_json::json;
use thiserror::Error;

use crate::memory::peak_bytes;
use crate::options::{Options, SimulateError};
use crate::say::say;

/// Virtual time after which whatever is not finished is reported as it is, counted from the start of the trace.
const LIMIT: Duration = Duration::from_secs(48 * 3600);

/// Bytes of a trace at most: more are no trace.
const TRACE_BYTES_MAX: u64 = 256 << 20;
/// Blocks of a rank at most.
const BLOCKS_MAX: i64 = 1 << 20;

/// What is asked, beside the shape of the cluster: every rank is a host that is a group of its own, with all its NICs.
#[derive(Args, Clone, Debug)]
pub(crate) struct Question {
    /// Asks a capacity question: requests arrive as in this Mooncake trace (one JSON object per line: timestamp in ms, input_length,
    /// output_length, hash_ids, one per 512 tokens), nothing goes wrong, and no bytes move. Exits with 0 only if all is delivered
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "seeds", "prefill_tp", "decode_tp", "requests", "faults", "explain", "replay", "request", "log", "timeline", "thrice", "plant",
    ])]
    pub(crate) trace: Option<PathBuf>,
    /// Takes the first N requests of the trace only
    #[arg(long, value_name = "N", requires = "trace", value_parser = value_parser!(u64).range(1..))]
    pub(crate) limit: Option<u64>,
    /// Requests arrive so many times as fast as the trace says
    #[arg(long, value_name = "FACTOR", requires = "trace", default_value_t = 1.0, value_parser = within(1e-6, 1e6))]
    pub(crate) speed: f64,
    /// What is served, by name
    #[arg(long, value_name = "NAME", requires = "trace", default_value = "llama-3.1-70b", value_parser = Model::PRESETS)]
    pub(crate) model: String,
    /// Of every NIC, in each direction
    #[arg(long, value_name = "GBPS", requires = "trace", default_value_t = 400.0, value_parser = within(0.001, 1e6))]
    pub(crate) nic_gbps: f64,
    /// least-loaded, prefix, or both, separated by a comma: one row each
    #[arg(long, value_name = "LIST", requires = "trace", value_delimiter = ',', default_value = "least-loaded")]
    pub(crate) policy: Vec<AskedPolicy>,
    /// Who initiates transfers
    #[arg(long, value_name = "NAME", requires = "trace", default_value = "pull")]
    pub(crate) direction: AskedDirection,
    /// Prompt tokens that a prefill rank computes in a second
    #[arg(long, value_name = "N", requires = "trace", default_value_t = 20_000.0, value_parser = within(1.0, 1e9))]
    pub(crate) prefill_tokens_per_second: f64,
    /// Tokens that are decoded of each sequence in a second
    #[arg(long, value_name = "N", requires = "trace", default_value_t = 50.0, value_parser = within(0.01, 1e6))]
    pub(crate) decode_tokens_per_second: f64,
    /// Layers that become ready together; all of them by default
    #[arg(long, value_name = "N", requires = "trace", value_parser = value_parser!(u32).range(1..))]
    pub(crate) layers_per_step: Option<u32>,
    /// Blocks of 64 tokens of a prefill rank
    #[arg(long, value_name = "N", requires = "trace", default_value_t = 32_768, value_parser = value_parser!(u32).range(1..=BLOCKS_MAX))]
    pub(crate) prefill_blocks: u32,
    /// Blocks of 64 tokens of a decode rank
    #[arg(long, value_name = "N", requires = "trace", default_value_t = 32_768, value_parser = value_parser!(u32).range(1..=BLOCKS_MAX))]
    pub(crate) decode_blocks: u32,
}

/// Takes numbers from one to another, both included.
fn within(least: f64, most: f64) -> impl Fn(&str) -> Result<f64, String> + Clone {
    move |word| {
        let number: f64 = word.parse().map_err(|_| format!("give a number from {least} to {most}"))?;
        // Not a number is in no range.
        if (least..=most).contains(&number) { Ok(number) } else { Err(format!("give a number from {least} to {most}")) }
    }
}

/// A policy by its name.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum AskedPolicy {
    LeastLoaded,
    Prefix,
}

/// A direction by its name.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum AskedDirection {
    Pull,
    Push,
}

/// Why there is no answer.
#[derive(Debug, Error)]
pub(crate) enum CapacityError {
    /// No such model.
    #[error("--model {0} is not known; known are {known}", known = Model::PRESETS.join(", "))]
    Model(String),
    /// There is nothing to ask about.
    #[error("--trace {} holds no request; give a file with one JSON object per line", .0.display())]
    Empty(PathBuf),
    /// The trace cannot be one.
    #[error("--trace {} has more than {} MiB; give its beginning only", .0.display(), TRACE_BYTES_MAX >> 20)]
    Large(PathBuf),
    /// The trace cannot be read.
    #[error("--trace {}: {source}", file.display())]
    File {
        /// Which.
        file: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The trace makes no sense.
    #[error("--trace {}: {source}", file.display())]
    Trace {
        /// Which.
        file: PathBuf,
        /// Why.
        #[source]
        source: TraceError,
    },
}

/// Answers, one row per policy. Says whether every request was delivered.
pub(crate) fn run(asked: &Options) -> Result<bool, SimulateError> {
    let question = &asked.question;
    let Some(file) = &question.trace else { return Ok(true) };
    let model = Model::preset(&question.model).ok_or_else(|| CapacityError::Model(question.model.clone()))?;
    let unread = |source| CapacityError::File { file: file.clone(), source };
    let mut text = String::new();
    let read = File::open(file).and_then(|opened| opened.take(TRACE_BYTES_MAX + 1).read_to_string(&mut text));
    if read.map_err(unread)? as u64 > TRACE_BYTES_MAX {
        return Err(CapacityError::Large(file.clone()).into());
    }
    let limit = question.limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
    let workload = parse_trace(&text, limit, question.speed)
        .map_err(|source| CapacityError::Trace { file: file.clone(), source })?;
    if workload.is_empty() {
        return Err(CapacityError::Empty(file.clone()).into());
    }
    let mut options = CapacityOptions::new(model);
    (options.prefill_ranks, options.decode_ranks, options.nics) = (asked.prefill, asked.decode, asked.nics);
    options.seed = asked.seed;
    options.nic_bytes_per_second = (question.nic_gbps * 1e9 / 8.0) as u64;
    options.direction = Some(match question.direction {
        AskedDirection::Pull => Direction::Pull,
        AskedDirection::Push => Direction::Push,
    });
    options.prefill_tokens_per_second = question.prefill_tokens_per_second;
    options.decode_tokens_per_second = question.decode_tokens_per_second;
    options.layers_per_step = question.layers_per_step.unwrap_or(u32::MAX);
    options.blocks = [question.prefill_blocks, question.decode_blocks];
    let mut rows = Vec::new();
    for policy in &question.policy {
        let policy = match policy {
            AskedPolicy::LeastLoaded => PolicyName::LeastLoaded,
            AskedPolicy::Prefix => PolicyName::Prefix,
        };
        rows.push(timed(|| capacity(&options, policy, &workload, LIMIT))?);
    }
    let direction = format!("{:?}", question.direction).to_lowercase();
    let complete = rows.iter().all(|(report, _)| report.delivered == report.requests);
    if asked.json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(report, seconds)| Row {
                report,
                wall_seconds: *seconds,
                events_per_second: report.events as f64 / seconds,
            })
            .collect();
        say(json!({
            "model": question.model,
            "prefill": asked.prefill,
            "decode": asked.decode,
            "nics": asked.nics,
            "nic_gbps": question.nic_gbps,
            "direction": direction,
            "speed": question.speed,
            "policies": rows,
            "peak_memory_bytes": peak_bytes(),
        }))?;
    } else {
        let Options { prefill, decode, nics, .. } = asked;
        let Question { model, nic_gbps, speed, .. } = question;
        say(format_args!(
            "{model}: {prefill} prefill and {decode} decode ranks with {nics} NICs of {nic_gbps} Gb/s each, {direction}; {} requests at {speed} x \
             the speed of the trace",
            workload.len()
        ))?;
        rows.iter().try_for_each(|(report, seconds)| tell(report, *seconds))?;
        if let Some(bytes) = peak_bytes() {
            say(format_args!("peak memory of this process: {:.2} GiB", bytes as f64 / f64::from(1 << 30)))?;
        }
    }
    Ok(complete)
}

/// An answer as it is printed.
#[derive(Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    report: &'a PolicyReport,
    wall_seconds: f64,
    events_per_second: f64,
}

/// An answer, and how long it took.
#[allow(clippy::disallowed_types, reason = "speed is measured, and nothing follows from it")]
fn timed(ask: impl FnOnce() -> Result<PolicyReport, SimError>) -> Result<(PolicyReport, f64), SimError> {
    let since = std::time::Instant::now();
    ask().map(|report| (report, since.elapsed().as_secs_f64()))
}

fn tell(report: &PolicyReport, wall_seconds: f64) -> Result<(), SimulateError> {
    say(format_args!(
        "{}: {} of {} delivered in {:.1} s ({:.2} a second, {:.2} GB/s), prefix hits {:.1} %",
        report.policy,
        report.delivered,
        report.requests,
        report.seconds,
        report.requests_per_second,
        report.gigabytes_per_second,
        report.prefix_hit_rate * 100.0
    ))?;
    if let Some(failure) = &report.first_failure {
        say(format_args!("  {} failed; the first: {failure}", report.failed))?;
    }
    if report.unfinished > 0 {
        say(format_args!(
            "  {} were not finished after {} h of virtual time",
            report.unfinished,
            LIMIT.as_secs() / 3600
        ))?;
    }
    for (side, nics) in [("prefill, out", report.prefill_nics), ("decode, in", report.decode_nics)] {
        say(format_args!(
            "  NICs ({side}): busy {:.2} % of the time, the busiest {:.2} %",
            nics.mean_utilisation * 100.0,
            nics.max_utilisation * 100.0
        ))?;
    }
    for (what, times) in [
        ("queue", report.queue_ms),
        ("prefill", report.prefill_ms),
        ("room", report.room_ms),
        ("post", report.post_ms),
        ("wire", report.wire_ms),
        ("notice", report.notice_ms),
        ("first decode token", report.first_decode_token_ms),
    ] {
        match times {
            Some(Quantiles { p50, p99, max }) => {
                say(format_args!("  {what:>18}: p50 {p50:10.3} ms, p99 {p99:10.3} ms, max {max:10.3} ms"))?;
            }
            None => say(format_args!("  {what:>18}: nothing was delivered"))?,
        }
    }
    let events = report.events as f64;
    say(format_args!("  {events} events in {wall_seconds:.1} s, {:.0} thousand a second", events / wall_seconds / 1e3))
}
