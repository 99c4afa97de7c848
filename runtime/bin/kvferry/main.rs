//! The `kvferry` command.

mod bench;
mod child;
mod config;
mod doctor;
mod env_file;
mod manifest;
mod plugins;

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
    Manifest(manifest::Options),
    Plugins(plugins::Options),
    #[command(hide = true)]
    LoadPlugin(plugins::Child),
    #[command(hide = true)]
    LoadNvml(doctor::Child),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Bench(options) => bench::run(&options),
        Command::Config(options) => config::run(&options),
        Command::Doctor(options) => doctor::run(&options),
        Command::Manifest(options) => manifest::run(&options),
        Command::Plugins(options) => plugins::run(&options),
        Command::LoadPlugin(child) => child.run(),
        Command::LoadNvml(child) => child.run(),
    }
}
