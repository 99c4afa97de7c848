//! Many runs, on all cores.

use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use kvferry_sim::{Broken, RunReport, rerun};
use serde_json::Value;

use crate::one::{simulate, tell};
use crate::options::{Options, Seeds, SimulateError};
use crate::say::{say, warn};

/// Runs a range of seeds. Says whether every invariant held in all of them.
pub(crate) fn run(options: &Options) -> Result<bool, SimulateError> {
    let Some(Seeds(seeds)) = &options.seeds else { return Ok(true) };
    // Options that make no sense are told once.
    options.config(seeds.start)?;
    let next = AtomicU64::new(seeds.start);
    let sum = Mutex::new(Sum::default());
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let work = || -> Result<(), SimulateError> {
        loop {
            let taken = |seed: u64| (seed < seeds.end).then(|| seed + 1);
            let Ok(seed) = next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken) else { return Ok(()) };
            let (mut report, seconds) = simulate(options.config(seed)?)?;
            let thrice = options.thrice.is_some_and(|thrice| seed - seeds.start < thrice);
            if thrice {
                compare_thrice(options, &mut report)?;
            }
            let mut sum = sum.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if options.json || !report.broken.is_empty() {
                tell(options, &report, seconds)?;
            }
            sum.add(&report, seconds);
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| {
            // A panic outside the simulated nodes is a bug of the simulator: it goes on.
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })?;
    let sum = sum.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    if !options.json {
        sum.tell()?;
    }
    Ok(sum.broken.is_empty())
}

/// Runs a seed again here, and in a process of its own. Unless all three are the same run, the report breaks I8.
pub(crate) fn compare_thrice(options: &Options, report: &mut RunReport) -> Result<(), SimulateError> {
    if let Some(what) = difference(options, report)? {
        let seed = report.seed;
        warn(format_args!("seed {seed}: I8: {what}\n  again: {} --thrice 1", options.again(seed)));
        let at = (report.virtual_seconds * 1e9) as u64;
        report.broken.push(Broken { invariant: "I8", at, what });
    }
    Ok(())
}

fn difference(options: &Options, report: &RunReport) -> Result<Option<String>, SimulateError> {
    let seed = report.seed;
    if let Some(divergence) = rerun(&options.config(seed)?, report)? {
        return Ok(Some(divergence.to_string()));
    }
    let failed = |source| SimulateError::Io { what: "starting another process".to_owned(), source };
    let binary = std::env::current_exe().map_err(failed)?;
    let mut command = Command::new(binary);
    command.args(["--json", "--seed", &seed.to_string()]).args(options.arguments());
    let output = command.output().map_err(failed)?;
    let theirs: Value = serde_json::from_slice(&output.stdout).map_err(|error| SimulateError::Io {
        what: format!("reading another process's report, {:?}", String::from_utf8_lossy(&output.stderr)),
        source: error.into(),
    })?;
    let hash = format!("{:016x}", report.trace_hash);
    let same = theirs["trace_hash"] == *hash && theirs["events"] == report.events;
    Ok((!same).then(|| "another process runs it otherwise".to_owned()))
}

#[derive(Default)]
struct Sum {
    runs: u64,
    requests: u64,
    delivered: u64,
    failed: u64,
    cancelled: u64,
    events: u64,
    seconds: f64,
    broken: Vec<u64>,
}

impl Sum {
    fn add(&mut self, report: &RunReport, seconds: f64) {
        self.runs += 1;
        self.requests += report.requests;
        self.delivered += report.delivered;
        self.failed += report.failed;
        self.cancelled += report.cancelled;
        self.events += report.events;
        self.seconds += seconds;
        if !report.broken.is_empty() {
            self.broken.push(report.seed);
        }
    }

    fn tell(&self) -> Result<(), SimulateError> {
        let Sum { runs, requests, delivered, failed, cancelled, events, seconds, broken } = self;
        say(format_args!(
            "{runs} runs, {requests} requests: {delivered} delivered, {failed} failed, {cancelled} cancelled; {events} events in {seconds:.1} s \
             of the cores, {:.0} thousand a second and core",
            *events as f64 / seconds / 1e3
        ))?;
        if broken.is_empty() {
            say("every invariant held")
        } else {
            say(format_args!("{} runs broke an invariant: seeds {broken:?}", broken.len()))
        }
    }
}
