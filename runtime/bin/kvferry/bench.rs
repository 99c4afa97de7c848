//! `kvferry bench`: the KV blocks of one request, moved between two processes of this host.

mod caches;
mod error;
mod initiator;
mod kv;
mod nic;
mod nixl;
mod peer;
mod process;
mod report;
mod way;
mod words;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use kvferry::transport::{self, providers, select};
use kvferry::{Direction, TransportKind};
use kvferry_core::limits::{LAYERS_MAX, TABLE_BLOCKS_MAX};

use error::{BenchError, explain};
use kv::Holds;
use way::Way;

/// Measure a transport: move the KV blocks of one request between two processes of this host, then verify every byte.
///
/// This process starts a second one. Each has a pool of 2·LAYERS planes (K and V of every layer) with 2·BLOCKS blocks of BLOCK_BYTES
/// bytes; the request has BLOCKS blocks in random order on either side, so 2·LAYERS·BLOCKS pieces move. This process initiates: it is
/// the destination of a pull and the source of a push.
///
/// Every iteration plans the request anew and then moves it. `seconds` runs from the post to the completion (for a push: every byte is
/// visible at the peer), without the planning, which is `plan_microseconds`. `cpu_seconds` is the processor time of both processes in
/// that while. One iteration more comes first, right after the connection stands; it counts as `first_seconds` only. Afterwards every
/// block of the destination's pool is compared; then it is overwritten, both processes fill their processors' caches with other memory,
/// the request is moved once more (`rested_seconds`: what the first one compares with, since all of its memory is in no cache either), and
/// everything is compared again: blocks that are not the request's must be untouched.
///
/// `evidence` is what the destination knows of the path, else the initiator: how far it is proven, over which lanes, and where pieces may
/// come in two ways, from which length on they are read and why.
///
/// With `--rails N` the request moves through N devices of each process at once; `rails` says which carried how much of it.
///
/// With `--transport nixl` the first process is an agent that speaks NIXL's protocol over UCX, and pulls by READ and pushes by WRITE, each followed by a
/// notification; the second is another one, or with `--nixl-python` NIXL's own. `peer` says what it is, `lacks` what NIXL's protocol does not have.
/// Two agents of kvferry's also know programs: with `--programs` one message asks for the whole request.
///
/// Exits with 0 when every byte was right, with 1 when one was not or something failed, with 2 when the options make no sense.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// How the bytes move: a transport of kvferry's, or NIXL's protocol.
    #[arg(long, value_parser = PossibleValuesParser::new(Way::words()).try_map(|word| Way::parse(&word)))]
    transport: Way,

    /// Who initiates: the destination (pull) or the source (push).
    #[arg(long, value_enum, default_value_t = Op::Pull)]
    op: Op,

    /// Layers of the model; each has a plane for K and one for V.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=i64::from(LAYERS_MAX)))]
    layers: u32,

    /// Blocks of the request in every plane; the pools have twice as many.
    #[arg(long, default_value_t = 160, value_parser = clap::value_parser!(u32).range(1..=TABLE_BLOCKS_MAX as i64))]
    blocks: u32,

    /// Bytes of one block in one plane.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..))]
    block_bytes: u32,

    /// Timed iterations.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    iters: u32,

    /// The device that both processes open: a network interface or an address for tcp; what UCX's NET_DEVICES takes for nixl. By default the first
    /// usable one. With --rails several, separated by commas.
    #[arg(long)]
    device: Option<String>,

    /// Devices that share the transfer, each opened by both processes. A pull is shared out by what each was seen to carry, a push evenly;
    /// `rails` says which carried how much.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    rails: u32,

    /// After each timed iteration, also move as many bytes as contiguous as the pools allow, between the same processes over the same connections:
    /// `contiguous_seconds`, and how near the request's pieces come to that, `of_contiguous`.
    #[arg(long)]
    contiguous: bool,

    /// TCP streams between the two processes. By default what the transport thinks best.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64))]
    streams: Option<u32>,

    /// Whose memory the bytes come from (cuda, tcp, ucx, libfabric): the number of a GPU, in both processes the same. With tcp and ucx it is staged
    /// through host memory, with libfabric its NICs have to reach it themselves (FI_HMEM); without, the pool is in host memory.
    #[arg(long, value_name = "N")]
    from_gpu: Option<u32>,

    /// Whose memory they go to (cuda, tcp, ucx, libfabric).
    #[arg(long, value_name = "N")]
    to_gpu: Option<u32>,

    /// Bytes of one chunk of a GPU's memory that is staged (tcp, ucx). By default what the transport thinks best.
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(4096..=64 << 20))]
    staged_chunk: Option<u32>,

    /// How many such chunks there are. By default what the transport thinks best.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=4096))]
    staged_chunks: Option<u32>,

    /// Thread blocks that a launch occupies at most (cuda). By default what the transport thinks best.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    thread_blocks: Option<u32>,

    /// How long a launch stands by for the next transfer after two that were close, in microseconds (cuda); 0: none does. By default what the transport
    /// thinks best.
    #[arg(long, value_name = "MICROSECONDS", value_parser = clap::value_parser!(u32).range(0..=10_000))]
    standby_us: Option<u32>,

    /// Active messages by rendezvous instead of remote access (ucx).
    #[arg(long)]
    two_sided: bool,

    /// Have the source pack pieces shorter than this, and read longer ones one by one (ucx, where memory can be read; libfabric). By default what earlier
    /// transfers took decides, for libfabric the provider.
    #[arg(long, value_name = "BYTES")]
    packed_below: Option<u64>,

    /// UCX's transports, as its TLS lists them (nixl). By default all that it finds; UCX_TLS counts more.
    #[arg(long, value_name = "LIST")]
    tls: Option<String>,

    /// A Python with a NIXL wheel and numpy: the second process is then NIXL's agent instead of kvferry's (nixl).
    #[arg(long, value_name = "PROGRAM")]
    nixl_python: Option<PathBuf>,

    /// Move the request as one program, by this device of kvferry's ucx transport (such as memory or lo), instead of piece by piece (nixl, between two
    /// agents of kvferry's).
    #[arg(long, value_name = "DEVICE", conflicts_with = "nixl_python")]
    programs: Option<String>,

    /// Also take the GPU's time of every transfer by CUDA events (cuda), which costs each a few microseconds: `gpu_seconds`.
    #[arg(long)]
    gpu_times: bool,

    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,

    /// Give up and end both processes when everything together has taken longer than this many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    deadline: u64,

    /// Be the second process: answer on stdin and stdout.
    #[arg(long, hide = true)]
    peer: bool,
}

impl Options {
    /// Refuses what would be ignored.
    fn check(&self) -> Result<(), BenchError> {
        let is = |kind| self.transport.is(kind);
        if self.streams.is_some() && !is(TransportKind::Tcp) {
            return Err(BenchError::NoStreams);
        }
        if (self.gpu_times || self.thread_blocks.is_some() || self.standby_us.is_some()) && !is(TransportKind::Cuda) {
            return Err(BenchError::NoLaunches);
        }
        let stages = is(TransportKind::Tcp) || is(TransportKind::Ucx);
        if self.beside().is_some() && !stages && !is(TransportKind::Libfabric) {
            return Err(BenchError::NoGpus);
        }
        if (self.staged_chunk, self.staged_chunks) != (None, None) && !stages {
            return Err(BenchError::NoStages);
        }
        if self.two_sided && !is(TransportKind::Ucx) {
            return Err(BenchError::NoTwoSides);
        }
        if self.packed_below.is_some() && !is(TransportKind::Ucx) && !is(TransportKind::Libfabric) {
            return Err(BenchError::NoChoice);
        }
        let nixl = self.tls.is_some() || self.nixl_python.is_some() || self.programs.is_some();
        if nixl && self.transport != Way::Nixl {
            return Err(BenchError::NoNixl);
        }
        if self.rails > 1 && (self.transport == Way::Nixl || is(TransportKind::Cuda)) {
            return Err(BenchError::NoRails);
        }
        if self.contiguous && self.transport == Way::Nixl {
            return Err(BenchError::NoContiguous);
        }
        // Before a process is started that would only say that it failed.
        for (option, gpu) in [("--from-gpu", self.from_gpu), ("--to-gpu", self.to_gpu)] {
            let Some(gpu) = gpu else { continue };
            let found = select(TransportKind::Cuda, Some(&format!("gpu{gpu}")), &transport::Options::default());
            drop(found.map_err(|source| BenchError::NoSuchGpu { option, gpu, source })?);
        }
        Ok(())
    }

    /// The devices that a side opens, each with its name if it has one.
    fn devices_of(&self, kind: TransportKind, holds: Holds) -> Result<Vec<Option<String>>, BenchError> {
        let rails = self.rails as usize;
        let named = self.device_of(holds);
        if rails == 1 {
            return Ok(vec![named]);
        }
        let list: Vec<String> = match named {
            Some(named) => named.split(',').map(|name| name.trim().to_owned()).collect(),
            None => {
                let provider = providers().into_iter().find(|provider| provider.kind() == kind);
                let devices = provider.map(|provider| provider.discover()).unwrap_or_default();
                devices.into_iter().filter(|device| device.unavailable.is_none()).map(|device| device.name).collect()
            }
        };
        if list.len() < rails {
            return Err(BenchError::TooFewDevices { rails: self.rails, devices: list.join(",") });
        }
        Ok(list.into_iter().take(rails).map(Some).collect())
    }

    /// The GPU in whose memory a side's pool is to be, if one is named.
    fn gpu_of(&self, holds: Holds) -> Option<String> {
        let gpu = match holds {
            Holds::Source => self.from_gpu,
            Holds::Destination => self.to_gpu,
        };
        gpu.map(|gpu| format!("gpu{gpu}"))
    }

    /// The device that a side opens, if one is named.
    fn device_of(&self, holds: Holds) -> Option<String> {
        let gpu = if self.transport.is(TransportKind::Cuda) { self.gpu_of(holds) } else { None };
        gpu.or_else(|| self.device.clone())
    }

    /// What a side's pool is allocated by: the transport that moves such memory best, and its device.
    fn memory_of(&self, kind: TransportKind, holds: Holds) -> Result<(TransportKind, Option<String>), BenchError> {
        match self.gpu_of(holds) {
            Some(gpu) => Ok((TransportKind::Cuda, Some(gpu))),
            None => Ok((kind, self.devices_of(kind, holds)?.into_iter().next().flatten())),
        }
    }

    /// Where the bytes come from and go to, where another transport than the GPUs' own carries a GPU's.
    fn beside(&self) -> Option<String> {
        if self.transport.is(TransportKind::Cuda) || (self.from_gpu, self.to_gpu) == (None, None) {
            return None;
        }
        let place = |holds| self.gpu_of(holds).unwrap_or_else(|| "host memory".to_owned());
        Some(format!("{} to {}", place(Holds::Source), place(Holds::Destination)))
    }
}

/// Who initiates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Op {
    /// The destination reads.
    Pull,
    /// The source writes.
    Push,
}

impl Op {
    fn name(self) -> &'static str {
        match self {
            Op::Pull => "pull",
            Op::Push => "push",
        }
    }

    /// What the process that initiates holds.
    fn here(self) -> Holds {
        match self {
            Op::Pull => Holds::Destination,
            Op::Push => Holds::Source,
        }
    }

    /// What the other one holds.
    fn there(self) -> Holds {
        match self {
            Op::Pull => Holds::Source,
            Op::Push => Holds::Destination,
        }
    }

    fn direction(self) -> Direction {
        match self {
            Op::Pull => Direction::Pull,
            Op::Push => Direction::Push,
        }
    }
}

/// When everything has to be over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    at: Instant,
    seconds: u64,
}

impl Deadline {
    fn of(options: &Options) -> Deadline {
        Deadline { at: Instant::now() + Duration::from_secs(options.deadline), seconds: options.deadline }
    }

    /// What is left, or an error that says what was under way.
    fn left(self, during: &'static str) -> Result<Duration, BenchError> {
        let left = self.at.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(self.late(during)) } else { Ok(left) }
    }

    fn late(self, during: &'static str) -> BenchError {
        BenchError::Late { seconds: self.seconds, during }
    }
}

/// Runs it and prints the result.
pub(crate) fn run(options: &Options) -> ExitCode {
    if options.peer {
        return peer::run(options);
    }
    let measured = options.check().and_then(|()| match options.transport {
        Way::Transport(kind) => initiator::measure(options, kind),
        Way::Nixl => nixl::measure(options),
    });
    let report = match measured {
        Ok(report) => report,
        Err(error) => {
            eprintln!("kvferry bench: {}", explain(&error));
            return ExitCode::from(if error.is_usage() { 2 } else { 1 });
        }
    };
    let text = if options.json { report.json() } else { report.table() };
    if let Err(error) = writeln!(std::io::stdout(), "{text}") {
        eprintln!("kvferry bench: the result cannot be written: {error}");
        return ExitCode::FAILURE;
    }
    match &report.mismatch {
        None => ExitCode::SUCCESS,
        Some(mismatch) => {
            eprintln!("kvferry bench: wrong bytes at the destination: {mismatch}");
            ExitCode::FAILURE
        }
    }
}
