//! One run, and what is printed of it.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use kvferry_core::RequestId;
use kvferry_sim::{Config, FaultKind, GroupOptions, Run, RunReport, Story, Timeline};
use serde_json::json;

use crate::options::{Options, SimulateError};
use crate::say::{say, warn};

/// Records of the end of a run that are printed when it is wrong.
const LAST: usize = 24;

/// Runs one seed. Says whether every invariant held.
pub(crate) fn run(options: &Options) -> Result<bool, SimulateError> {
    let config = options.config(options.seed)?;
    if options.explain {
        say(format_args!("{config:#?}"))?;
        return Ok(true);
    }
    let (first, all) = (options.requests, options.requests + config.shape.second_wave());
    if let Some(request) = options.request.filter(|request| *request > all) {
        return Err(SimulateError::NoSuchRequest { request, first, all });
    }
    let mut story = options.request.map(|request| Story::new(RequestId(request)));
    if let Some(request) = options.request {
        say(format_args!("request {request} of seed {}; {}", options.seed, places(&config)))?;
        let always: Vec<&str> = FaultKind::ALL
            .iter()
            .filter(|kind| kind.is_lasting() && config.faults.has(**kind))
            .map(|kind| kind.name())
            .collect();
        if !always.is_empty() {
            say(format_args!("from the beginning to the end: {}", always.join(", ")))?;
        }
    }
    let writing = |path: &Path| {
        let what = format!("writing {}", path.display());
        move |source| SimulateError::Io { what: what.clone(), source }
    };
    // Where it cannot be written, that is told before the run.
    let create =
        |path: &Path| File::create(path).map_err(|source| SimulateError::Timeline { path: path.to_owned(), source });
    let file = options.timeline.as_deref().map(create).transpose()?;
    let mut timeline = file.is_some().then(|| Timeline::new(&config));
    // A run does not stop half-way; what cannot be printed is told at its end.
    let mut said = Ok(());
    let (mut report, seconds) = timed(|| {
        Ok(Run::new(config)?.to_end(|entry| {
            let line = story.as_mut().and_then(|story| story.tell(entry));
            let log = options.log.then(|| entry.to_string());
            for line in line.into_iter().chain(log) {
                if said.is_ok() {
                    said = say(line);
                }
            }
            if let Some(timeline) = &mut timeline {
                timeline.take_in(entry);
            }
        }))
    })?;
    said?;
    if let (Some(request), Some(false)) = (options.request, story.map(|story| story.is_told())) {
        say(format_args!(
            "request {request} was never asked for: it belongs to those that follow once requests 1 to {first} have ended, which they did not"
        ))?;
    }
    if options.thrice.is_some() {
        crate::many::compare_thrice(options, &mut report)?;
    }
    tell(options, &report, seconds)?;
    if let (Some(timeline), Some(path), Some(mut file)) = (timeline, &options.timeline, file) {
        file.write_all(timeline.to_json().as_bytes()).map_err(writing(path))?;
    }
    Ok(report.broken.is_empty())
}

/// Which nodes are what.
fn places(config: &Config) -> String {
    let mut first = 1;
    let mut side = |name: &str, GroupOptions { groups, tp, .. }: &GroupOptions| {
        let last = first + groups * tp - 1;
        let place = format!("n{first}..n{last} {name} in groups of {tp}");
        first = last + 1;
        place
    };
    format!("n0 schedules, {}, {}", side("prefill", &config.cluster.prefill), side("decode", &config.cluster.decode))
}

/// Runs a configuration and says how long that took, in seconds of the wall clock.
#[allow(clippy::disallowed_types, reason = "speed is measured, and nothing follows from it")]
pub(crate) fn timed(run: impl FnOnce() -> Result<RunReport, SimulateError>) -> Result<(RunReport, f64), SimulateError> {
    let since = std::time::Instant::now();
    let report = run()?;
    Ok((report, since.elapsed().as_secs_f64()))
}

/// Runs a configuration to its end.
pub(crate) fn simulate(config: Config) -> Result<(RunReport, f64), SimulateError> {
    timed(|| Ok(Run::new(config)?.to_end(|_| {})))
}

/// Prints what came of a run.
pub(crate) fn tell(options: &Options, report: &RunReport, seconds: f64) -> Result<(), SimulateError> {
    let RunReport { seed, requests, delivered, failed, cancelled, virtual_seconds, events, trace_hash, .. } = report;
    let events_per_second = *events as f64 / seconds;
    if options.json {
        let violations: Vec<String> = report.broken.iter().map(ToString::to_string).collect();
        let object = json!({
            "seed": seed,
            "requests": requests,
            "delivered": delivered,
            "failed": failed,
            "cancelled": cancelled,
            "virtual_seconds": virtual_seconds,
            "events": events,
            "events_per_second": events_per_second,
            "trace_hash": format!("{trace_hash:016x}"),
            "violations": violations,
        });
        say(object)?;
    } else {
        say(format_args!(
            "seed {seed}: {requests} requests: {delivered} delivered, {failed} failed, {cancelled} cancelled in {virtual_seconds:.3} virtual \
             seconds; {events} events, {:.0} thousand a second; trace {trace_hash:016x}",
            events_per_second / 1e3
        ))?;
        if options.seeds.is_none() {
            for (reason, times) in &report.reasons {
                say(format_args!("  {times} failed: {reason}"))?;
            }
        }
    }
    if !report.broken.is_empty() {
        accuse(options, report);
    }
    Ok(())
}

fn accuse(options: &Options, report: &RunReport) {
    warn(format_args!("seed {}: invariants are broken:", report.seed));
    for broken in &report.broken {
        warn(format_args!("  {broken}"));
    }
    warn(format_args!("  the last events:"));
    for record in report.recent.iter().skip(report.recent.len().saturating_sub(LAST)) {
        warn(format_args!("    {record}"));
    }
    warn(format_args!("  again: {}", options.again(report.seed)));
}
