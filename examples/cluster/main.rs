//! The main job: a scheduler and one OS process per rank hand over the KV of requests, and every byte is checked where it arrives.
//!
//! `cargo run --release --example cluster -- --help` lists the options. Exit status: 0 when nothing was mismatched or leaked on the
//! survivors, every request is accounted for, and none failed that no `--kill`, `--drain`, `--stop` or `--pause` explains; 1 otherwise; 2 for bad usage.

mod cluster;
mod config;
mod drive;
mod environment;
mod error;
mod fault;
mod harm;
mod launch;
mod near;
mod nics;
mod options;
mod paths;
mod progress;
mod rank;
mod record;
mod remains;
mod report;
mod scheduler;
mod setup;
mod share;
mod side;
mod terms;
mod timeline;
mod verdict;
mod worker;
mod workload;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use crate::options::{Options, RANK_WORKER, SCHEDULER_WORKER};

/// What `clap` exits with, too.
const BAD_USAGE: u8 = 2;

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| "error,kvferry_libfabric::provider=warn".into());
    let ends = tracing_subscriber::fmt::format::FmtSpan::CLOSE;
    tracing_subscriber::fmt().with_env_filter(filter).with_span_events(ends).with_writer(std::io::stderr).init();
    match std::env::args().nth(1).as_deref() {
        Some(RANK_WORKER) => return worker::process::<rank::RankWorker>(),
        Some(SCHEDULER_WORKER) => return worker::process::<scheduler::SchedulerWorker>(),
        _ => {}
    }
    let options = Options::parse();
    if let Some(file) = &options.env_file {
        let Err(error) = environment::enter(file);
        eprintln!("error: {error}");
        return ExitCode::from(BAD_USAGE);
    }
    let setup = match setup::Setup::check(&options) {
        Ok(setup) => setup,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(BAD_USAGE);
        }
    };
    for note in &setup.notes {
        eprintln!("note: {note}");
    }
    for warning in &setup.warnings {
        eprintln!("warning: {warning}");
    }
    match drive::run(&setup) {
        Ok(record) => {
            let verdict = verdict::Verdict::of(&setup, &record);
            let text = if options.json { format!("{}\n", verdict.json()) } else { report::table(&verdict) };
            let mut out = std::io::stdout().lock();
            let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
            for note in record.notes.iter().chain(&verdict.notes) {
                eprintln!("note: {note}");
            }
            for complaint in &verdict.complaints {
                eprintln!("error: {complaint}");
            }
            if let Err(error) = &written {
                eprintln!("error: the result cannot be written: {error}");
            }
            let drawn = setup.timeline.as_deref().map_or(Ok(()), |file| timeline::write(file, &setup, &record));
            if let Err(error) = &drawn {
                eprintln!("error: {error}");
            }
            if verdict.complaints.is_empty() && written.is_ok() && drawn.is_ok() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
