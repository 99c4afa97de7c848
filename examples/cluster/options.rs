//! The command line.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Parser, ValueEnum};
use kvferry::topology::Overrides;
use kvferry::{Direction, TraceContext};
use kvferry_trtllm::Follow;
use serde::{Deserialize, Serialize};

/// The first argument of a rank's process.
pub(crate) const RANK_WORKER: &str = "--rank-worker";
/// And of the scheduler's.
pub(crate) const SCHEDULER_WORKER: &str = "--scheduler-worker";

/// Hands over the KV of requests from prefill ranks to decode ranks, one OS process each, and checks every byte where it arrives.
///
/// Requests are submitted as fast as `--concurrency` allows. `seconds` counts from the first submission to the last outcome, the synthetic
/// prefill included.
#[derive(Debug, Parser)]
#[command(name = "cluster")]
pub(crate) struct Options {
    /// A model by name: llama-3.1-8b, llama-3.1-70b, qwen3-32b, qwen3-235b, deepseek-r1, gpt-oss-120b, qwen3-next or tiny
    /// [default: llama-3.1-8b]
    #[arg(long, value_name = "NAME", conflicts_with = "geometry")]
    pub(crate) model: Option<String>,
    /// A model by its KV: layers=..,kv_heads=..,head_dim=..,dtype=bf16|f16|f32|fp8|fp8_e5m2|int8|uint8,kv=separate|interleaved,
    /// planes=one|per-layer,window=..,latent=.. (instead of --model)
    #[arg(long, value_name = "LIST")]
    pub(crate) geometry: Option<String>,
    /// The prefill side: tp=2,pp=1,layers=3+2,cp=1,adp=1,groups=1,nodes=1,block=16,order=NHD|HND,kv=separate|interleaved,
    /// planes=one|per-layer,blocks=N. `layers` are those of each pipeline stage. With nodes=N the ranks of a group are spread over the
    /// simulated hosts 0 to N-1: under `--transport auto` only ranks of one host share memory. `blocks` are those of a rank's pool, per
    /// layer group (default: three of the largest requests)
    #[arg(long, value_name = "LIST", default_value = "tp=2")]
    pub(crate) prefill: String,
    /// The decode side, with the same keys
    #[arg(long, value_name = "LIST", default_value = "tp=4")]
    pub(crate) decode: String,
    /// How many requests [default: 16]
    #[arg(long, value_name = "N", conflicts_with = "trace")]
    pub(crate) requests: Option<u64>,
    /// Tokens of each prompt [default: 1000]
    #[arg(long, value_name = "N", conflicts_with = "trace")]
    pub(crate) isl: Option<u64>,
    /// Requests from a Mooncake trace, one JSON object per line: timestamp (ignored), input_length, output_length (ignored), hash_ids (one
    /// per 512 tokens)
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// Takes the first N requests of the trace only
    #[arg(long, value_name = "N", requires = "trace")]
    pub(crate) limit: Option<u64>,
    /// Decode ranks keep the prefixes of the trace and fetch only what they lack
    #[arg(long, requires = "trace")]
    pub(crate) reuse_prefix: bool,
    /// Which decode group gets a request [default: longest-prefix with --reuse-prefix, otherwise least-loaded]
    #[arg(long, value_name = "NAME")]
    pub(crate) policy: Option<PolicyName>,
    /// Requests in flight at once [default: 4 per decode group]
    #[arg(long, value_name = "N")]
    pub(crate) concurrency: Option<u64>,
    /// auto (with --gpus: cuda where these GPUs reach each other, tcp by way of host memory where they do not; shared memory where ranks share a host; otherwise TCP), shm, tcp, ucx, libfabric, or cuda (pools in GPU memory)
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub(crate) transport: String,
    /// Devices by name: memory,lo or shm:memory,tcp:eth0. One that is not there is a warning while others are. `near` (no device is called so), or
    /// KIND:near, stands for those near each rank's pool: near the GPU that it is on (--gpus), by PCI distance, nearest first, else all of this
    /// host in turn; --rails says how many of them, and where sysfs shows no NIC that the transport can use, it is the default [default: memory and lo]
    #[arg(long, value_name = "LIST")]
    pub(crate) devices: Option<String>,
    /// With --devices near: NICs of GPUs that are not left to PCI distance: 0=mlx5_0+mlx5_1,0000:45:00.0=mlx5_2. A GPU is named by its PCI address
    /// or its number in the order of those
    #[arg(long, value_name = "GPU=NIC+NIC", value_parser = |text: &str| text.parse::<Overrides>())]
    pub(crate) nic_map: Option<Overrides>,
    /// With --devices near: looks below this folder for sys and dev instead of at the live host's; which devices there are to open says this host
    /// all the same
    #[arg(long, value_name = "DIR")]
    pub(crate) root: Option<PathBuf>,
    /// NICs that share what moves between a prefill and a decode rank, of those that --devices names; 1 leaves one to each pair of ranks. With
    /// --devices near each rank opens so many near its pool [default: 1; with --devices near all of them]
    #[arg(long, value_name = "N")]
    pub(crate) rails: Option<u64>,
    /// With --transport ucx: active messages by rendezvous instead of remote access, as TensorRT-LLM's `backend: UCX` [default: what the
    /// method of --config says]
    #[arg(long)]
    pub(crate) two_sided: bool,
    /// With --transport cuda or auto: the GPUs, in place of --devices, dealt to the ranks in turn, prefill first: 0,1 [default: the first usable one].
    /// With --transport tcp or ucx: the same, for pools in GPU memory that is staged through host memory; with libfabric: that its NICs read and
    /// write themselves [default: host memory]
    #[arg(long, value_name = "LIST", value_parser = gpu_list)]
    pub(crate) gpus: Option<String>,
    /// KV between hosts goes by RDMA or not at all, with the reason; memory of one host is as good. Otherwise it is a warning where a side has an
    /// RDMA device
    #[arg(long)]
    pub(crate) require_rdma: bool,
    /// Who initiates transfers: pull = decode, push = prefill
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub(crate) direction: DirectionName,
    /// Layers that prefill makes ready at a time [default: all]
    #[arg(long, value_name = "N")]
    pub(crate) layers_per_step: Option<u32>,
    /// SIGKILL a rank when the Nth transfer starts: prefill:1@3. Ranks are counted over all groups of their side. scheduler@3 is the
    /// scheduler, which is started again at once, at the same address. @250ms is so long after the first submission. May repeat
    #[arg(long, value_name = "ROLE:RANK@N")]
    pub(crate) kill: Vec<String>,
    /// SIGSTOP a rank or the scheduler, in the same forms, and SIGKILL it once it is declared lost; may repeat
    #[arg(long, value_name = "ROLE:RANK@N")]
    pub(crate) stop: Vec<String>,
    /// SIGSTOP a rank or the scheduler, in the same forms, and SIGCONT it after MS milliseconds; without +MS it wakes up in a world that
    /// has declared it lost. May repeat
    #[arg(long, value_name = "ROLE:RANK@N+MS")]
    pub(crate) pause: Vec<String>,
    /// SIGTERM for a prefill rank, in the same forms: it drains (its group takes no new work, what is offered is fetched or expires) and leaves.
    /// May repeat
    #[arg(long, value_name = "prefill:RANK@N")]
    pub(crate) drain: Vec<String>,
    /// A rank that drains leaves after so many milliseconds, whatever is still offered [default: 30000]
    #[arg(long, value_name = "MS")]
    pub(crate) drain_within: Option<u64>,
    /// Serves Prometheus metrics and probes (/metrics, /healthz, /readyz): the scheduler there, the ranks at the ports that follow, prefill
    /// first; with port 0 everybody anywhere. Standard error says where
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) metrics: Option<String>,
    /// Keeps the last messages of every peer and the last events of every node, and writes them to DIR/NAME.jsonl when a deadline runs out, when
    /// blocks are quarantined, or at SIGUSR1
    #[arg(long, value_name = "DIR")]
    pub(crate) recorder: Option<PathBuf>,
    /// Writes when what happened to each request, at the scheduler and at each rank, as a Chrome trace: open it in Perfetto
    #[arg(long, value_name = "FILE")]
    pub(crate) timeline: Option<PathBuf>,
    /// The span that every request belongs to, as a W3C traceparent: 00-TRACE-SPAN-01. Every process then has spans of that trace; with
    /// RUST_LOG=kvferry::handover=info it logs each when it ends
    #[arg(long, value_name = "TRACEPARENT", value_parser = |text: &str| text.parse::<TraceContext>())]
    pub(crate) traceparent: Option<TraceContext>,
    /// Ranks that were killed or have left are started again at once, as the next incarnation of their node; requests for which no group is
    /// left wait 20 seconds for one that is whole again
    #[arg(long)]
    pub(crate) restart: bool,
    /// Nodes count a link as broken after so many milliseconds of silence, and the peer as lost a sixth of that later [default: 6000]
    #[arg(long, value_name = "MS")]
    pub(crate) silence: Option<u64>,
    /// KV is held for others for so many milliseconds after the last renewal [default: 30000]
    #[arg(long, value_name = "MS")]
    pub(crate) lease: Option<u64>,
    /// Overwrites a byte in every block of a decode rank after each delivery, before it is checked: a check of the checks, the run must fail
    #[arg(long, value_name = "RANK")]
    pub(crate) corrupt: Option<u64>,
    /// Every rank is a node of its own inside this process
    #[arg(long)]
    pub(crate) in_process: bool,
    /// Shuffles which blocks requests get
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Gives up after so long
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub(crate) deadline: u64,
    /// Prints one JSON object and nothing else on standard output
    #[arg(long)]
    pub(crate) json: bool,
    /// A TensorRT-LLM YAML: its cache_transceiver_config and the environment say which transport runs (--transport NAME overrides it), how
    /// long transfers may take and how many are under way; `kvferry config check FILE` explains
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Whose rule says what `backend: DEFAULT` of --config means, as for `kvferry config check`: trtllm, its code, where the first
    /// TRTLLM_USE_*_KVCACHE=1 chooses, or dynamo, its page, where DEFAULT is NIXL whatever variables say
    #[arg(long, value_name = "NAME", requires = "config", default_value_t = Follow::default(), value_parser = PossibleValuesParser::new(Follow::ALL.map(Follow::name)).try_map(|name| name.parse::<Follow>()))]
    pub(crate) follow: Follow,
    /// Runs everything in the environment that FILE holds as NAME=value lines, and in nothing of this process's own: what finds libraries
    /// (LD_LIBRARY_PATH, KVFERRY_UCX_LIBRARY) belongs in there, too. `kvferry config check` judges the same file
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Option<PathBuf>,
    /// Not in this build
    #[arg(long, value_name = "NAME", hide = true)]
    pub(crate) role: Option<String>,
    /// Not in this build
    #[arg(long, value_name = "ADDRESS", hide = true)]
    pub(crate) listen: Option<String>,
    /// Not in this build
    #[arg(long, value_name = "ADDRESS", hide = true)]
    pub(crate) join: Option<String>,
    /// Not in this build
    #[arg(long, value_name = "N", hide = true)]
    pub(crate) rank: Option<u32>,
}

/// Names of policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum PolicyName {
    LeastLoaded,
    LongestPrefix,
}

/// Names of directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DirectionName {
    Auto,
    Pull,
    Push,
}

/// A list of GPUs as it was given, if it is one. A GPU's number may be followed by the address at which other hosts of its domain reach it.
fn gpu_list(text: &str) -> Result<String, &'static str> {
    let is_gpu = |gpu: &str| {
        let number = gpu.trim().split('@').next().unwrap_or_default();
        !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    };
    if text.split(',').all(is_gpu) { Ok(text.to_owned()) } else { Err("write the numbers of GPUs, such as 0,1") }
}

impl DirectionName {
    /// What ranks are told.
    pub(crate) fn chosen(self) -> Option<Direction> {
        match self {
            DirectionName::Auto => None,
            DirectionName::Pull => Some(Direction::Pull),
            DirectionName::Push => Some(Direction::Push),
        }
    }
}
