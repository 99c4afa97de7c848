//! `simulate`: whole clusters of the production actors in virtual time, with every fault, from one seed.
//!
//! `cargo run --release --example simulate -- --seed 7 --prefill 64 --decode 64 --nics 8 --requests 2000 --faults all`

mod capacity;
mod many;
mod memory;
mod one;
mod options;
mod say;

use std::process::ExitCode;

use kvferry_sim::SimError;

use crate::options::{Options, SimulateError};
use crate::say::warn;

fn main() -> ExitCode {
    let options = Options::from_command_line();
    let held = options.check().and_then(|()| match options.seeds {
        _ if options.question.trace.is_some() => capacity::run(&options),
        Some(_) => many::run(&options),
        None => one::run(&options),
    });
    match held {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            warn(format_args!("simulate: {error}"));
            ExitCode::from(match error {
                SimulateError::Cluster(SimError::TooSmall { .. }) => 2,
                SimulateError::Cluster(_) | SimulateError::Io { .. } => 1,
                _ => 2,
            })
        }
    }
}
