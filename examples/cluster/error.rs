//! What is wrong with a command line.

use std::path::PathBuf;

use kvferry::transport::SelectError;
use kvferry::{GeometryError, Role, SpecError, TransportKind};
use kvferry_trtllm::EnvironmentError;
use thiserror::Error;

/// Everything is checked before anything starts; each message names the option, its value and a remedy.
#[derive(Debug, Error)]
#[non_exhaustive]
pub(crate) enum UsageError {
    #[error("--model {name}: there is no such model; use {known}, or describe it with --geometry")]
    UnknownModel { name: String, known: String },
    #[error("--geometry {value}: {source}")]
    Geometry { value: String, source: SpecError },
    #[error("--{side} {value}: `{part}` is not key=value; write for example tp=2,block=16")]
    SidePart { side: Role, value: String, part: String },
    #[error("--{side} {value}: there is no key `{key}`; use {known}")]
    SideKey { side: Role, value: String, key: String, known: &'static str },
    #[error("--{side} {value}: `{key}` stands there twice; keep one")]
    SideTwice { side: Role, value: String, key: String },
    #[error("--{side} {value}: `{key}={given}` is not allowed; use {allowed}")]
    SideValue { side: Role, value: String, key: &'static str, given: String, allowed: &'static str },
    #[error("--{side} {value}: layers={given} are {stages} stages, but pp={pp}; give one number per stage")]
    StageCount { side: Role, value: String, given: String, stages: usize, pp: u32 },
    #[error("--{side} {value}: layers={given} add up to {sum}, the model has {layers}; correct the stages")]
    StageSum { side: Role, value: String, given: String, sum: u64, layers: u32 },
    #[error("--{side} {value}: {source}")]
    Shape { side: Role, value: String, source: GeometryError },
    #[error("--{side} {value}: nodes={nodes} for the {ranks} ranks of a group; use at most one node per rank")]
    Nodes { side: Role, value: String, nodes: u32, ranks: u32 },
    #[error("--prefill and --decode cannot exchange this KV: {reason}; choose parallelism that both sides allow")]
    Pair { reason: String },
    #[error(
        "--prefill and --decode make {ranks} ranks, at most {limit} are allowed on one machine; lower tp, pp, cp or groups"
    )]
    TooManyRanks { ranks: u64, limit: u64 },
    #[error(
        "--{side} {value}: a request of {tokens} tokens takes {need} blocks of layer group `{group}`, a pool has blocks={blocks}; raise blocks, or lower {tokens_option}"
    )]
    Blocks {
        side: Role,
        value: String,
        tokens: u64,
        need: u64,
        group: String,
        blocks: u64,
        tokens_option: &'static str,
    },
    #[error("--{side} {value}: the pool of a rank is not possible: {reason}; lower blocks or {tokens_option}")]
    Layout { side: Role, value: String, reason: String, tokens_option: &'static str },
    #[error(
        "the pools of all ranks take {needed_mib} MiB, at most 60 % of this machine's memory ({limit_mib} MiB) is used; lower {options}"
    )]
    Memory { needed_mib: u64, limit_mib: u64, options: &'static str },
    #[error("--{option} {value}: {reason}; use a number from {least} to {most}")]
    Number { option: &'static str, value: u64, reason: &'static str, least: u64, most: u64 },
    #[error("--env-file {}: nothing can be run with it: {source}; name a readable file", file.display())]
    EnvironmentFile { file: PathBuf, source: std::io::Error },
    #[error("--env-file {}:{source}", file.display())]
    Environment { file: PathBuf, source: EnvironmentError },
    #[error("--trace {}: it cannot be read: {source}; name a readable file", file.display())]
    TraceFile { file: PathBuf, source: std::io::Error },
    #[error("--trace {}: line {line}: {reason}; correct the line{}", file.display(), if *before > 0 { format!(" or use --limit {before}") } else { String::new() })]
    TraceLine { file: PathBuf, line: u64, reason: String, before: usize },
    #[error("--trace {}: it has no requests; name a Mooncake trace", file.display())]
    TraceEmpty { file: PathBuf },
    #[error("--transport {name}: this build has no such transport; use {known}")]
    UnknownTransport { name: String, known: String },
    #[error("--transport {transport}: {source}; choose another transport or device")]
    Transport { transport: String, source: SelectError },
    #[error("--devices {value}: there is no device {entry} for --transport {transport}; there are {known}")]
    UnknownDevice { value: String, entry: String, transport: String, known: String },
    #[error(
        "--{option}: it says what `near` is, and --devices does not name that; say --devices near, or leave it out"
    )]
    WithoutNear { option: &'static str },
    #[error("--root {}: it has no folder sys: it is no host's; name a folder with a host's sys and dev in it", root.display())]
    Root { root: PathBuf },
    #[error(
        "--{option} {value}: it is not ROLE:RANK@N; write for example prefill:1@3 (N counts transfers from 1), prefill:1@250ms or scheduler@3"
    )]
    Fault { option: &'static str, value: String },
    #[error("--{option} {value}: there is no such rank; the {role} side has ranks 0 to {last}")]
    FaultRank { option: &'static str, value: String, role: Role, last: u64 },
    #[error("--drain {value}: only prefill ranks drain; write for example prefill:1@3")]
    DrainTarget { value: String },
    #[error(
        "--metrics {value}: {reason}; give an address such as 127.0.0.1:9464, with {ports} free ports from it on, or port 0"
    )]
    Metrics { value: String, reason: String, ports: u64 },
    #[error("--{option} {value}: nothing inside this process can be killed, stopped or paused; leave --in-process out")]
    FaultInProcess { option: &'static str, value: String },
    #[error("--two-sided: it is a method of ucx, and {transport} has none; say --transport ucx, or leave it out")]
    TwoSidedWithoutUcx { transport: TransportKind },
    #[error(
        "--gpus {value}: --transport {transport} uses no GPUs; say --transport cuda, auto, tcp, ucx or libfabric, or leave --gpus out"
    )]
    GpusWithoutCuda { value: String, transport: String },
    #[error("--config {}: it cannot be read: {source}; name a readable file", file.display())]
    ConfigFile { file: PathBuf, source: std::io::Error },
    #[error("--config {}:{source}", file.display())]
    Config { file: PathBuf, source: kvferry_trtllm::ConfigError },
    #[error(
        "--config {}: it resolves to the transport {name}, which this build does not have; override it, for example with --transport tcp (there are {known})",
        file.display()
    )]
    PlannedTransport { file: PathBuf, name: String, known: String },
    #[error("--config {}: {reason}; {remedy}", file.display())]
    NoPlan { file: PathBuf, reason: String, remedy: String },
    #[error("--{option} {value}: this build cannot do that yet; {remedy}")]
    NotYet { option: &'static str, value: String, remedy: &'static str },
}
