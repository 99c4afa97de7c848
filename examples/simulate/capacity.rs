//! Capacity questions: a trace instead of seeds, time instead of faults.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
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

/// What is asked, beside the shape of the cluster: every rank is a host that is a group of its own, with all its NICs.
#[derive(Args, Clone, Debug)]
pub(crate) struct Question {
    /// Asks a capacity question: requests arrive as in this Mooncake trace (one JSON object per line: timestamp in ms, input_length,
    /// output_length, hash_ids, one per 512 tokens), nothing goes wrong, and no bytes move
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// Takes the first N requests of the trace only
    #[arg(long, value_name = "N", requires = "trace", default_value_t = usize::MAX, hide_default_value = true)]
    pub(crate) limit: usize,
    /// Requests arrive so many times as fast as the trace says
    #[arg(long, value_name = "FACTOR", requires = "trace", default_value_t = 1.0)]
    pub(crate) speed: f64,
    /// What is served, by name
    #[arg(long, value_name = "NAME", requires = "trace", default_value = "llama-3.1-70b")]
    pub(crate) model: String,
    /// Of every NIC, in each direction
    #[arg(long, value_name = "GBPS", requires = "trace", default_value_t = 400.0)]
    pub(crate) nic_gbps: f64,
    /// least-loaded, prefix, or both, separated by a comma: one row each
    #[arg(long, value_name = "LIST", requires = "trace", value_delimiter = ',', default_value = "least-loaded")]
    pub(crate) policy: Vec<AskedPolicy>,
    /// Who initiates transfers
    #[arg(long, value_name = "NAME", requires = "trace", default_value = "pull")]
    pub(crate) direction: AskedDirection,
    /// Prompt tokens that a prefill rank computes in a second
    #[arg(long, value_name = "N", requires = "trace", default_value_t = 20_000.0)]
    pub(crate) prefill_tokens_per_second: f64,
    /// Tokens that are decoded of each sequence in a second
    #[arg(long, value_name = "N", requires = "trace", default_value_t = 50.0)]
    pub(crate) decode_tokens_per_second: f64,
    /// Layers that become ready together; all of them by default
    #[arg(long, value_name = "N", requires = "trace", default_value_t = u32::MAX, hide_default_value = true)]
    pub(crate) layers_per_step: u32,
    /// Blocks of 64 tokens of a prefill rank
    #[arg(long, value_name = "N", requires = "trace", default_value_t = 32_768)]
    pub(crate) prefill_blocks: u32,
    /// Blocks of 64 tokens of a decode rank
    #[arg(long, value_name = "N", requires = "trace", default_value_t = 32_768)]
    pub(crate) decode_blocks: u32,
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
    #[error(
        "--model {0} is not known; known are llama-3.1-8b, llama-3.1-70b, qwen3-32b, qwen3-235b, deepseek-r1, gpt-oss-120b, qwen3-next and tiny"
    )]
    Model(String),
    /// A rate that is none.
    #[error("--{0} is {1}; give a number above 0")]
    Rate(&'static str, f64),
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
    for (name, rate) in [
        ("speed", question.speed),
        ("nic-gbps", question.nic_gbps),
        ("prefill-tokens-per-second", question.prefill_tokens_per_second),
        ("decode-tokens-per-second", question.decode_tokens_per_second),
    ] {
        if !(rate.is_finite() && rate > 0.0) {
            return Err(CapacityError::Rate(name, rate).into());
        }
    }
    let text = std::fs::read_to_string(file).map_err(|source| CapacityError::File { file: file.clone(), source })?;
    let workload = parse_trace(&text, question.limit, question.speed)
        .map_err(|source| CapacityError::Trace { file: file.clone(), source })?;
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
    options.layers_per_step = question.layers_per_step;
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
    for (what, Quantiles { p50, p99, max }) in [
        ("queue", report.queue_ms),
        ("prefill", report.prefill_ms),
        ("room", report.room_ms),
        ("post", report.post_ms),
        ("wire", report.wire_ms),
        ("notice", report.notice_ms),
        ("first decode token", report.first_decode_token_ms),
    ] {
        say(format_args!("  {what:>18}: p50 {p50:10.3} ms, p99 {p99:10.3} ms, max {max:10.3} ms"))?;
    }
    let events = report.events as f64;
    say(format_args!("  {events} events in {wall_seconds:.1} s, {:.0} thousand a second", events / wall_seconds / 1e3))
}
