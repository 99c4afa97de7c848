//! The `kvferry` command.

mod bench;
mod config;
mod doctor;
mod env_file;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Moves the KV cache of LLM requests from prefill ranks to decode ranks.
#[derive(Debug, Parser)]
#[command(name = "kvferry", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Bench(bench::Options),
    Config(config::Options),
    Doctor(doctor::Options),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Bench(options) => bench::run(&options),
        Command::Config(options) => config::run(&options),
        Command::Doctor(options) => doctor::run(&options),
    }
}
