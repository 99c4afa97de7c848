//! The command line.

use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Parser;
use kvferry_sim::{Config, FaultSet, Shape, ShapeError, SimError, UnknownFault};
use thiserror::Error;

use crate::capacity::{CapacityError, Question};

/// Simulates a cluster: the production actors, wire codec and state machines on virtual time. Exits with 0 only if every invariant held,
/// with 1 if one did not, and with 2 if the options make no sense.
#[derive(Clone, Debug, Parser)]
#[command(name = "simulate")]
pub(crate) struct Options {
    /// Everything random follows from it.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Runs these seeds, `A..B`, on all cores, instead of one.
    #[arg(long, value_name = "A..B", conflicts_with_all = ["seed", "replay", "timeline"])]
    pub(crate) seeds: Option<Seeds>,
    /// Prefill ranks, one node each.
    #[arg(long, default_value_t = 8)]
    pub(crate) prefill: u32,
    /// Decode ranks, one node each.
    #[arg(long, default_value_t = 8)]
    pub(crate) decode: u32,
    /// Ranks of a prefill group; by default 4, 2 or 1, whichever divides.
    #[arg(long)]
    pub(crate) prefill_tp: Option<u32>,
    /// Ranks of a decode group; by default 4, 2 or 1, whichever divides.
    #[arg(long)]
    pub(crate) decode_tp: Option<u32>,
    /// NICs of every node.
    #[arg(long, default_value_t = 2)]
    pub(crate) nics: u32,
    /// Requests submitted while things go wrong; a quarter as many, at most 64, follow once all is mended.
    #[arg(long, default_value_t = 200)]
    pub(crate) requests: u64,
    /// `all`, `none`, or kinds of fault, separated by commas. A seed switches about half of them off.
    #[arg(long, default_value = "all")]
    pub(crate) faults: String,
    /// Prints one JSON object for every run.
    #[arg(long)]
    pub(crate) json: bool,
    /// Prints what is derived from the seed, and runs nothing.
    #[arg(long)]
    pub(crate) explain: bool,
    /// Prints the story of one request.
    #[arg(long, requires = "request")]
    pub(crate) replay: bool,
    /// Which request `--replay` tells of.
    #[arg(long)]
    pub(crate) request: Option<u64>,
    /// Prints everything that happens, one line each.
    #[arg(long)]
    pub(crate) log: bool,
    /// Writes the run in Chrome's trace format, which Perfetto opens.
    #[arg(long, value_name = "FILE")]
    pub(crate) timeline: Option<PathBuf>,
    /// Runs so many of the seeds three times, twice in this process and once in another, and compares.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) thrice: u64,
    /// A capacity question instead.
    #[command(flatten)]
    pub(crate) question: Question,
}

/// A range of seeds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seeds(pub(crate) Range<u64>);

/// Something that is no range of seeds.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum BadSeeds {
    /// Not two numbers.
    #[error("{0:?} is no range of seeds; give two numbers, as in 0..100")]
    Malformed(String),
    /// None.
    #[error("{0:?} holds no seed; the second number is the first seed that does not run, as in 5..6")]
    Empty(String),
}

impl FromStr for Seeds {
    type Err = BadSeeds;

    fn from_str(word: &str) -> Result<Self, BadSeeds> {
        let bad = || BadSeeds::Malformed(word.to_owned());
        let (from, to) = word.split_once("..").ok_or_else(bad)?;
        let (from, to) = (from.parse().map_err(|_| bad())?, to.parse().map_err(|_| bad())?);
        if from >= to {
            return Err(BadSeeds::Empty(word.to_owned()));
        }
        Ok(Seeds(from..to))
    }
}

/// Why nothing was simulated.
#[derive(Debug, Error)]
pub(crate) enum SimulateError {
    /// No such fault.
    #[error(transparent)]
    Faults(#[from] UnknownFault),
    /// No such cluster.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The request is not one of the run's.
    #[error("--request {0}: requests are numbered from 1 to {1}")]
    NoSuchRequest(u64, u64),
    /// The cluster could not be set up.
    #[error(transparent)]
    Cluster(#[from] SimError),
    /// A capacity question has no answer.
    #[error(transparent)]
    Capacity(#[from] CapacityError),
    /// A file or a process.
    #[error("{what}: {source}")]
    Io {
        /// What was done.
        what: String,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
}

impl Options {
    /// What is to be simulated.
    pub(crate) fn shape(&self) -> Result<Shape, SimulateError> {
        Ok(Shape {
            prefill: self.prefill,
            decode: self.decode,
            prefill_tp: self.prefill_tp,
            decode_tp: self.decode_tp,
            nics: self.nics,
            requests: self.requests,
            faults: self.faults.parse::<FaultSet>()?,
            plant: None,
        })
    }

    /// The run of one seed.
    pub(crate) fn config(&self, seed: u64) -> Result<Config, SimulateError> {
        Ok(Config::from_seed(seed, &self.shape()?)?)
    }

    /// The options, other than the seed, that make the same run again.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        let mut put = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        put("--prefill", self.prefill.to_string());
        put("--decode", self.decode.to_string());
        for (name, tp) in [("--prefill-tp", self.prefill_tp), ("--decode-tp", self.decode_tp)] {
            if let Some(tp) = tp {
                put(name, tp.to_string());
            }
        }
        put("--nics", self.nics.to_string());
        put("--requests", self.requests.to_string());
        put("--faults", self.faults.clone());
        arguments
    }

    /// The one command that makes a seed's run again.
    pub(crate) fn command(&self, seed: u64) -> String {
        format!("cargo run --release --example simulate -- --seed {seed} {}", self.arguments().join(" "))
    }
}
