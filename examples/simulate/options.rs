//! The command line.

use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Arg, CommandFactory, FromArgMatches, Parser, value_parser};
use kvferry_sim::{Config, FaultSet, Plant, Shape, ShapeError, SimError};
use thiserror::Error;

use crate::capacity::{CapacityError, Question};

/// Ranks of a side at most: every node knows every other one, which takes memory by the square.
const RANKS_MAX: i64 = 4096;
/// NICs of a node at most.
const NICS_MAX: i64 = 64;
/// Requests of a run at most.
const REQUESTS_MAX: u64 = 1_000_000;

/// Simulates a cluster: the production actors, wire codec and state machines on virtual time. Exits with 0 only if every invariant held,
/// with 1 if one did not, and with 2 if the options make no sense.
#[derive(Clone, Debug, Parser)]
#[command(name = "simulate")]
pub(crate) struct Options {
    /// Everything random follows from it.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Runs these seeds, `A..B`, on all cores, instead of one.
    #[arg(long, value_name = "A..B", conflicts_with_all = ["seed", "replay", "log", "timeline"])]
    pub(crate) seeds: Option<Seeds>,
    /// Prefill ranks, one node each.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = value_parser!(u32).range(1..=RANKS_MAX))]
    pub(crate) prefill: u32,
    /// Decode ranks, one node each.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = value_parser!(u32).range(1..=RANKS_MAX))]
    pub(crate) decode: u32,
    /// Ranks of a prefill group, 1, 2, 4 or 8; by default 4, 2 or 1, whichever divides.
    #[arg(long, value_name = "N")]
    pub(crate) prefill_tp: Option<u32>,
    /// Ranks of a decode group, 1, 2, 4 or 8; by default 4, 2 or 1, whichever divides.
    #[arg(long, value_name = "N")]
    pub(crate) decode_tp: Option<u32>,
    /// NICs of every node.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = value_parser!(u32).range(1..=NICS_MAX))]
    pub(crate) nics: u32,
    /// NICs that share what moves between a prefill and a decode rank, at most; by default the seed decides.
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=NICS_MAX))]
    pub(crate) rails: Option<u32>,
    /// Requests submitted while things go wrong; a quarter as many, at most 64, follow once all is mended.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = value_parser!(u64).range(1..=REQUESTS_MAX))]
    pub(crate) requests: u64,
    /// `all`, `none`, or kinds of fault, separated by commas. A seed switches about half of them off.
    #[arg(long, value_name = "LIST", default_value = "all")]
    pub(crate) faults: FaultSet,
    /// Prints one JSON object for every run.
    #[arg(long, conflicts_with_all = ["explain", "replay", "log"])]
    pub(crate) json: bool,
    /// Prints what is derived from the seed, and runs nothing.
    #[arg(long, conflicts_with_all = ["seeds", "replay", "log", "timeline", "thrice"])]
    pub(crate) explain: bool,
    /// Prints the story of one request of one seed.
    #[arg(long, requires_all = ["seed", "request"], conflicts_with = "log")]
    pub(crate) replay: bool,
    /// Which request `--replay` tells of, from 1; those that follow once all is mended have the numbers after `--requests`.
    #[arg(long, value_name = "N", requires = "replay", value_parser = value_parser!(u64).range(1..))]
    pub(crate) request: Option<u64>,
    /// Prints everything that happens, one line each.
    #[arg(long)]
    pub(crate) log: bool,
    /// Writes the run in Chrome's trace format, which Perfetto opens.
    #[arg(long, value_name = "FILE")]
    pub(crate) timeline: Option<PathBuf>,
    /// Runs the first so many of the seeds three times, twice in this process and once in another, and compares.
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    pub(crate) thrice: Option<u64>,
    /// Plants a bug, to see that an invariant finds it: tests/README.md says which.
    #[arg(long, value_name = "BUG")]
    pub(crate) plant: Option<Plant>,
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
    /// More seeds are to be run three times than there are.
    #[error("--thrice {0}: {1}")]
    Thrice(u64, String),
    /// No such cluster.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The request is not one of the run's.
    #[error(
        "--request {request}: there are {all}; give 1 to {first}, or up to {all} for those that follow once all is mended"
    )]
    NoSuchRequest {
        /// Which.
        request: u64,
        /// The last that is asked for while things go wrong.
        first: u64,
        /// The last.
        all: u64,
    },
    /// The cluster could not be set up.
    #[error(transparent)]
    Cluster(#[from] SimError),
    /// A capacity question has no answer.
    #[error(transparent)]
    Capacity(#[from] CapacityError),
    /// The timeline's file cannot be made; nothing was run.
    #[error("--timeline {}: {source}; name a file in a folder that can be written", path.display())]
    Timeline {
        /// Which.
        path: std::path::PathBuf,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
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
    /// What the process was started with; it ends here if that makes no sense.
    pub(crate) fn from_command_line() -> Self {
        // So that a number below 0 is told to be out of range, and not to be another option.
        let negative = |arg: Arg| if arg.get_action().takes_values() { arg.allow_negative_numbers(true) } else { arg };
        let matches = Options::command().mut_args(negative).get_matches();
        Options::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }

    /// What options say together that none says alone.
    pub(crate) fn check(&self) -> Result<(), SimulateError> {
        let seeds = self.seeds.as_ref().map_or(1, |Seeds(seeds)| seeds.end - seeds.start);
        match self.thrice.filter(|thrice| *thrice > seeds) {
            None => Ok(()),
            Some(thrice) if self.seeds.is_none() => {
                Err(SimulateError::Thrice(thrice, "there is one seed; give 1, or more seeds with --seeds".to_owned()))
            }
            Some(thrice) => Err(SimulateError::Thrice(thrice, format!("--seeds are {seeds}; give that or less"))),
        }
    }

    /// What is to be simulated.
    pub(crate) fn shape(&self) -> Shape {
        Shape {
            prefill: self.prefill,
            decode: self.decode,
            prefill_tp: self.prefill_tp,
            decode_tp: self.decode_tp,
            nics: self.nics,
            rails: self.rails,
            requests: self.requests,
            faults: self.faults.clone(),
            plant: self.plant,
        }
    }

    /// The run of one seed.
    pub(crate) fn config(&self, seed: u64) -> Result<Config, SimulateError> {
        Ok(Config::from_seed(seed, &self.shape())?)
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
        if let Some(rails) = self.rails {
            put("--rails", rails.to_string());
        }
        put("--requests", self.requests.to_string());
        put("--faults", self.faults.to_string());
        if let Some(plant) = self.plant {
            put("--plant", plant.name().to_owned());
        }
        arguments
    }

    /// The one command that makes a seed's run again.
    pub(crate) fn again(&self, seed: u64) -> String {
        format!("cargo run --release --example simulate -- --seed {seed} {}", self.arguments().join(" "))
    }
}
