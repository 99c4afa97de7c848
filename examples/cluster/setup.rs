//! Options, checked: what will run.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kvferry::{
    GroupGeometry, GroupId, KvPlacement, Model, NodeId, PairPlan, PlanePlacement, Rank, RequestSpec, Role,
    TraceContext, TransportKind,
};
use kvferry_trtllm::Method;

use crate::config;
use crate::error::UsageError;
use crate::fault::{Action, Fault};
use crate::near;
use crate::nics::{self, Wanted};
use crate::options::{Options, PolicyName};
use crate::rank::{RankConfig, name};
use crate::side::Side;
use crate::terms::Terms;
use crate::workload::{self, number};

const DEFAULT_MODEL: &str = "llama-3.1-8b";
const RANKS_MAX: u64 = 256;
/// Of the largest request, when `blocks` is not given.
const REQUESTS_PER_POOL: u64 = 3;
const CONCURRENCY_PER_GROUP: u64 = 4;
/// Less than this is scheduling noise.
const SILENCE_MIN: u64 = 120;
const LEASE_MIN: u64 = 300;
const MILLISECONDS_MAX: u64 = 600_000;
const DRAIN_WITHIN: u64 = 30_000;
/// More NICs than any host has.
const RAILS_MAX: u64 = 64;

/// A cluster that can be.
pub(crate) struct Setup {
    /// Prefill ranks before decode ranks, group by group; the scheduler is node 0, these follow.
    pub(crate) ranks: Vec<RankConfig>,
    pub(crate) requests: Vec<RequestSpec>,
    pub(crate) prefill: Side,
    pub(crate) decode: Side,
    pub(crate) faults: Vec<Fault>,
    /// Ranks that were killed come back.
    pub(crate) restart: bool,
    pub(crate) terms: Terms,
    pub(crate) policy: PolicyName,
    pub(crate) traceparent: Option<TraceContext>,
    pub(crate) concurrency: usize,
    pub(crate) in_process: bool,
    pub(crate) reuse_prefix: bool,
    pub(crate) deadline: Duration,
    /// Where the scheduler serves metrics.
    pub(crate) metrics: Option<SocketAddr>,
    /// Where flight recorders write.
    pub(crate) recorder: Option<PathBuf>,
    /// Where the timeline goes.
    pub(crate) timeline: Option<PathBuf>,
    /// Which NICs ranks take where nobody has named them.
    pub(crate) notes: Vec<String>,
    /// What of the NICs is not as it was asked for.
    pub(crate) warnings: Vec<String>,
}

impl Setup {
    /// Checks everything that can be known before anything starts.
    pub(crate) fn check(options: &Options) -> Result<Setup, UsageError> {
        refuse_what_is_not_there(options)?;
        let plan = options.config.as_deref().map(|file| config::plan(file, options.follow)).transpose()?;
        let (model, kv, planes) = model(options)?;
        let prefill = Side::parse(Role::Prefill, &options.prefill, &model, kv, planes)?;
        let decode = Side::parse(Role::Decode, &options.decode, &model, kv, planes)?;
        let ranks = prefill.ranks() + decode.ranks();
        if ranks > RANKS_MAX {
            return Err(UsageError::TooManyRanks { ranks, limit: RANKS_MAX });
        }
        if let Err(error) = PairPlan::new(&prefill.geometry, Rank(0), &decode.geometry, Rank(0)) {
            return Err(UsageError::Pair { reason: error.to_string() });
        }
        let requests = workload::requests(options)?;
        let lengths: BTreeSet<u64> = requests.iter().map(|request| request.tokens).collect();
        let tokens_option = if options.trace.is_some() { "--limit" } else { "--isl" };
        let prefill_blocks = blocks(&prefill, &lengths, tokens_option)?;
        let decode_blocks = blocks(&decode, &lengths, tokens_option)?;
        let each = u64::from(decode.groups) * CONCURRENCY_PER_GROUP;
        let concurrency = number("concurrency", options.concurrency, each, 1, 4096)?;
        let deadline = Duration::from_secs(number("deadline", Some(options.deadline), 600, 1, 1 << 20)?);
        let layers = u64::from(model.layers);
        let steps = options
            .layers_per_step
            .map(|step| number("layers-per-step", Some(u64::from(step)), layers, 1, layers))
            .transpose()?;
        let transport = match &plan {
            Some(plan) if options.transport == "auto" => plan.transport.value.name(),
            _ => &options.transport,
        };
        let is_planned = transport != options.transport;
        let Wanted { transport, devices, has_carrier } =
            nics::wanted(options, transport, prefill.nodes.max(decode.nodes))?;
        let planned: String = plan.as_ref().map(|plan| plan.devices.value.join(",")).unwrap_or_default();
        // Devices and method of the plan belong to its transport.
        let of_plan = (is_planned && !planned.is_empty()).then_some(planned.as_str());
        let mut chosen = nics::choose(options, transport, devices.as_deref().or(of_plan)).map_err(|error| {
            match (error, options.config.as_deref().filter(|_| is_planned)) {
                (UsageError::UnknownTransport { name, known }, Some(file)) => {
                    UsageError::PlannedTransport { file: file.to_owned(), name, known }
                }
                (error, _) => error,
            }
        })?;
        let is_two_sided = is_planned && plan.as_ref().is_some_and(|plan| plan.method.value == Method::Ucx);
        if options.two_sided || is_two_sided {
            chosen.check_two_sided()?;
        }
        let of_gpus = chosen.slots.iter().any(|slot| slot.kind() == TransportKind::Cuda);
        let memories = nics::memories(options, transport)?;
        if has_carrier {
            chosen.append(nics::carriers(options)?);
        }
        let rails = options.rails.map(|rails| number("rails", Some(rails), rails, 1, RAILS_MAX)).transpose()?;
        let names: Vec<String> = [&prefill, &decode]
            .into_iter()
            .flat_map(|side| (0..side.ranks()).map(|number| name(side.role, number)))
            .collect();
        let gpus = chosen.every().filter(|nic| nic.kind == TransportKind::Cuda).map(|nic| nic.device.clone());
        let gpus: Vec<String> = gpus.collect();
        let pools = if of_gpus { &gpus } else { &memories };
        let mut given = near::give(&chosen.slots, &names, pools, rails.unwrap_or(0) as usize);
        for (index, nics) in given.nics.iter_mut().enumerate() {
            *nics = nics::of_rank(nics, index);
            for nic in nics {
                nic.device_memory = !pools.is_empty() && nic.kind != TransportKind::Cuda;
                nic.two_sided = options.two_sided || is_two_sided;
            }
        }
        let nic_threads = given.nics.iter().map(Vec::len).sum();
        let rails_max = rails.unwrap_or((given.near_max as u64).clamp(1, RAILS_MAX));
        let counts = (prefill.ranks(), decode.ranks());
        let faults = [
            (Action::Kill, &options.kill),
            (Action::Drain, &options.drain),
            (Action::Stop, &options.stop),
            (Action::Pause(None), &options.pause),
        ]
        .into_iter()
        .flat_map(|(action, values)| values.iter().map(move |value| (action, value)))
        .map(|(action, value)| Fault::parse(action, value, counts, options.in_process))
        .collect::<Result<Vec<_>, _>>()?;
        let milliseconds = |option, given: Option<u64>, least| {
            given.map(|given| number(option, Some(given), given, least, MILLISECONDS_MAX)).transpose()
        };
        let terms = Terms {
            silence_ms: milliseconds("silence", options.silence, SILENCE_MIN)?,
            lease_ms: milliseconds("lease", options.lease, LEASE_MIN)?,
            deadlines: plan.as_ref().map(|plan| plan.deadlines.terms()),
            rails_max: u32::try_from(rails_max).ok(),
        };
        let drain_within = milliseconds("drain-within", options.drain_within, 0)?.unwrap_or(DRAIN_WITHIN);
        let metrics = options.metrics.as_deref().map(|value| metrics(value, ranks)).transpose()?;
        let handovers = |role: Role| {
            let credits = plan.as_ref().and_then(|plan| match role {
                Role::Prefill => plan.credits.prefill_handovers.value,
                Role::Decode => plan.credits.decode_handovers.value,
            });
            credits.unwrap_or(u32::try_from(concurrency).unwrap_or(u32::MAX))
        };

        if let Some(rank) = options.corrupt.filter(|rank| *rank >= counts.1) {
            let (value, last) = (rank.to_string(), counts.1.saturating_sub(1));
            return Err(UsageError::FaultRank { option: "corrupt", value, role: Role::Decode, last });
        }

        let mut configs = Vec::with_capacity(ranks as usize);
        let mut group = GroupId(0);
        for (side, blocks) in [(&prefill, prefill_blocks), (&decode, decode_blocks)] {
            let mut number = 0;
            for _ in 0..side.groups {
                for rank in 0..side.geometry.ranks() {
                    let host = u64::from(rank) * u64::from(side.nodes) / u64::from(side.geometry.ranks());
                    configs.push(RankConfig {
                        node: NodeId(configs.len() as u64 + 1),
                        life: 0,
                        role: side.role,
                        group,
                        rank: Rank(rank),
                        number,
                        geometry: Arc::clone(&side.geometry),
                        blocks: blocks.clone(),
                        nics: given.nics.get(configs.len()).cloned().unwrap_or_default(),
                        gpu: memories.get(configs.len() % memories.len().max(1)).cloned(),
                        host: (transport == "auto" && host > 0).then(|| format!("simulated host {host}")),
                        direction: options.direction.chosen(),
                        require_rdma: options.require_rdma,
                        handovers_max: handovers(side.role),
                        layers_per_step: steps.map(|steps| steps as u32),
                        reuse_prefix: options.reuse_prefix && side.role == Role::Decode,
                        corrupt: side.role == Role::Decode && options.corrupt == Some(number),
                        seed: options.seed,
                        nic_threads,
                        terms,
                        may_leave: !options.in_process,
                        drain_within: Duration::from_millis(drain_within),
                        metrics: metrics.map(|first| port_of(first, configs.len() as u16 + 1).to_string()),
                        recorder: options
                            .recorder
                            .as_ref()
                            .map(|dir| dir.join(format!("{}-{number}.jsonl", side.role))),
                        timeline: options.timeline.is_some(),
                        scheduler: String::new(),
                    });
                    number += 1;
                }
                group = GroupId(group.0 + 1);
            }
        }
        // GPUs say for themselves when they are full.
        if !of_gpus && memories.is_empty() {
            let remedy = if options.trace.is_some() { "blocks or --limit" } else { "blocks, --isl, tp or groups" };
            fits_memory(&configs, remedy)?;
        }
        let policy = options.policy.unwrap_or(if options.reuse_prefix {
            PolicyName::LongestPrefix
        } else {
            PolicyName::LeastLoaded
        });
        Ok(Setup {
            ranks: configs,
            requests,
            prefill,
            decode,
            faults,
            restart: options.restart,
            terms,
            policy,
            traceparent: options.traceparent,
            concurrency: concurrency as usize,
            in_process: options.in_process,
            reuse_prefix: options.reuse_prefix,
            deadline,
            metrics,
            recorder: options.recorder.clone(),
            timeline: options.timeline.clone(),
            notes: chosen.notes.into_iter().chain(given.notes).collect(),
            warnings: chosen.warnings.into_iter().chain(given.warnings).collect(),
        })
    }

    /// Groups of both sides.
    pub(crate) fn groups(&self) -> usize {
        self.prefill.groups as usize + self.decode.groups as usize
    }

    /// The place of a rank in `ranks`, by its number in reports.
    pub(crate) fn index(&self, role: Role, number: u64) -> Option<usize> {
        self.ranks.iter().position(|rank| rank.role == role && rank.number == number)
    }

    /// A rank of a group as reports number it.
    pub(crate) fn number(&self, role: Role, group: GroupId, rank: Rank) -> u64 {
        let (side, first) = match role {
            Role::Prefill => (&self.prefill, 0),
            Role::Decode => (&self.decode, self.prefill.groups),
        };
        u64::from(group.0.saturating_sub(first)) * u64::from(side.geometry.ranks()) + u64::from(rank.0)
    }
}

/// The address of the scheduler's metrics; those of `ranks` ranks follow.
fn metrics(value: &str, ranks: u64) -> Result<SocketAddr, UsageError> {
    let wrong = |reason: String| UsageError::Metrics { value: value.to_owned(), reason, ports: ranks + 1 };
    let first: SocketAddr = value.parse().map_err(|error: std::net::AddrParseError| wrong(error.to_string()))?;
    if u64::from(first.port()) + ranks > u64::from(u16::MAX) {
        return Err(wrong("there are not enough ports after it".to_owned()));
    }
    Ok(first)
}

/// The port of the process with that number, the scheduler's being 0; any, if the first is any.
fn port_of(first: SocketAddr, number: u16) -> SocketAddr {
    let port = if first.port() == 0 { 0 } else { first.port().saturating_add(number) };
    SocketAddr::new(first.ip(), port)
}

fn refuse_what_is_not_there(options: &Options) -> Result<(), UsageError> {
    let not_yet = |option, value: String, remedy| Err(UsageError::NotYet { option, value, remedy });
    let remote = "all ranks are started on this machine, leave --role, --rank, --listen and --join out";
    if let Some(role) = &options.role {
        return not_yet("role", role.clone(), remote);
    }
    if let Some(address) = &options.listen {
        return not_yet("listen", address.clone(), remote);
    }
    if let Some(address) = &options.join {
        return not_yet("join", address.clone(), remote);
    }
    if let Some(rank) = options.rank {
        return not_yet("rank", rank.to_string(), remote);
    }
    Ok(())
}

fn model(options: &Options) -> Result<(Model, KvPlacement, PlanePlacement), UsageError> {
    if let Some(value) = &options.geometry {
        let spec = Model::from_spec(value).map_err(|source| UsageError::Geometry { value: value.clone(), source })?;
        return Ok((spec.model, spec.kv, spec.planes));
    }
    let name = options.model.as_deref().unwrap_or(DEFAULT_MODEL);
    let unknown = || UsageError::UnknownModel { name: name.to_owned(), known: Model::PRESETS.join(", ") };
    Ok((Model::preset(name).ok_or_else(unknown)?, KvPlacement::default(), PlanePlacement::default()))
}

/// Blocks of a rank's pool per layer group: what was asked for, or enough for a few of the largest requests.
fn blocks(side: &Side, lengths: &BTreeSet<u64>, tokens_option: &'static str) -> Result<Vec<u32>, UsageError> {
    let GroupGeometry { model, .. } = &*side.geometry;
    // The largest request, and what it takes, per layer group.
    let mut needs: Vec<(u64, u64)> = Vec::with_capacity(model.groups.len());
    for group in 0..model.groups.len() {
        let take = |tokens: u64| {
            (0..side.geometry.ranks()).map(|rank| side.geometry.blocks_for(group, tokens, Rank(rank)).blocks).max()
        };
        needs.push(
            lengths.iter().map(|tokens| (u64::from(take(*tokens).unwrap_or(0)), *tokens)).max().unwrap_or((0, 0)),
        );
    }
    let paged = |group: usize| side.geometry.block_tokens(group) > 1 || side.geometry.format.block_tokens == 1;
    // State takes a slot per request: as many as the paged layers have room for requests.
    let largest = needs
        .iter()
        .enumerate()
        .filter(|(group, _)| paged(*group))
        .map(|(_, (need, _))| *need)
        .max()
        .unwrap_or(1)
        .max(1);
    let requests = side.blocks.map_or(REQUESTS_PER_POOL, |blocks| (u64::from(blocks) / largest).max(1));
    let mut blocks = Vec::with_capacity(needs.len());
    for (index, (need, tokens)) in needs.into_iter().enumerate() {
        let given = match side.blocks {
            Some(blocks) if paged(index) => u64::from(blocks),
            _ => need.saturating_mul(requests),
        };
        if given < need {
            return Err(UsageError::Blocks {
                side: side.role,
                value: side.value.clone(),
                tokens,
                need,
                group: model.groups.get(index).map(|group| group.name.clone()).unwrap_or_default(),
                blocks: given,
                tokens_option,
            });
        }
        blocks.push(u32::try_from(given).unwrap_or(u32::MAX));
    }
    for rank in 0..side.geometry.ranks() {
        let shape = |source| UsageError::Shape { side: side.role, value: side.value.clone(), source };
        let layout = side.geometry.shard(Rank(rank)).map_err(shape)?.layout(&blocks);
        let (side, value) = (side.role, side.value.clone());
        layout.validate().map_err(|error| UsageError::Layout {
            side,
            value,
            reason: error.to_string(),
            tokens_option,
        })?;
    }
    Ok(blocks)
}

/// All ranks share one machine: their pools may not take more than 60 % of it.
fn fits_memory(ranks: &[RankConfig], options: &'static str) -> Result<(), UsageError> {
    let pool = |rank: &RankConfig| rank.geometry.shard(rank.rank).map_or(0, |shard| shard.layout(&rank.blocks).bytes());
    let needed = ranks.iter().map(pool).fold(0, u64::saturating_add);
    let limit = memory_bytes().map_or(u64::MAX, |bytes| bytes / 10 * 6);
    if needed <= limit {
        return Ok(());
    }
    Err(UsageError::Memory { needed_mib: needed >> 20, limit_mib: limit >> 20, options })
}

/// Memory of this machine, or of the control group that we are in.
fn memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let machine = total.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)?;
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    Some(group.map_or(machine, |group: u64| group.min(machine)))
}
