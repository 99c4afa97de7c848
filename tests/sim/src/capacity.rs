//! Capacity questions: how many NICs, which policy, pull or push, what tail?
//!
//! The production actors and cores run over engines that only take time and a fabric that moves no bytes, without faults. A rank here is a
//! host: one group of one rank with all its NICs, so that a pair of ranks uses one NIC of each side, and different pairs different ones.
//! All ranks of a side share the addresses of one pool, which nobody touches: only its layout counts.

mod engine;
mod ledger;
mod report;
mod stock;
mod trace;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, Addr};
use kvferry_actors::{
    NodeConfig, OpenNic, SESSIONS_EAGER_MAX, Scheduler, Submit, Surroundings, WorkerConfig, WorkerParts,
    assemble_scheduler, assemble_worker,
};
use kvferry_core::protocol::{
    Event, LeastLoaded, LongestHeldPrefix, Policy, RequestSpec, Role, SchedulerTerms, SessionTerms,
};
use kvferry_core::{
    Direction, Epoch, Extent, Format, GroupGeometry, GroupId, Model, Parallel, PoolId, Rank, RequestId,
};
use kvferry_fabric_sim::{FabricOptions, SimProvider};
use kvferry_transport::{Device, Options, Pool, PoolOptions, Provider, TransportKind};
use tokio::sync::oneshot;

use crate::chronicle::What;
use crate::cluster::SimError;
use crate::world::{World, WorldOptions};
use crate::yard::{SECRET, address, node_id};
use engine::{Call, EngineTerms, TimingEngine};
use ledger::Ledger;

pub use report::{NicUse, PolicyReport, Quantiles};
pub use trace::{TraceError, parse_trace};

/// Tokens per prefix hash of a trace.
const HASH_TOKENS: u32 = 512;
/// How long nodes get to find each other before the first request arrives.
const MEETING: Duration = Duration::from_secs(2);

/// Up to so many sessions of decode with prefill ranks are all made before the first request; where there would be more, each is made when a
/// handover needs it. A handshake takes some latencies of the control links, and passes while the prompt is computed.
const SESSIONS_MAX: u64 = 1 << 14;

/// One request of a workload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CapacityRequest {
    /// When it arrives, after the first.
    pub after: Duration,
    /// Tokens of its prompt.
    pub input_tokens: u64,
    /// Tokens that are decoded: for so long its blocks are held.
    pub output_tokens: u64,
    /// Hashes of its prefix, one per 512 tokens.
    pub prefix: Arc<Vec<u64>>,
}

/// What is asked about.
#[derive(Clone, Debug)]
pub struct CapacityOptions {
    /// What is served.
    pub model: Model,
    /// Prefill ranks, each a group of its own.
    pub prefill_ranks: u32,
    /// Decode ranks, each a group of its own.
    pub decode_ranks: u32,
    /// NICs of a rank.
    pub nics: u32,
    /// Bytes per second of a NIC, in each direction.
    pub nic_bytes_per_second: u64,
    /// Who initiates transfers.
    pub direction: Option<Direction>,
    /// Prompt tokens per second that a prefill rank computes, one prompt after another.
    pub prefill_tokens_per_second: f64,
    /// Tokens per second of each sequence that is decoded.
    pub decode_tokens_per_second: f64,
    /// Model layers that become ready together.
    pub layers_per_step: u32,
    /// Tokens per block, on both sides.
    pub block_tokens: u32,
    /// Blocks of a prefill rank's pool, and of a decode rank's.
    pub blocks: [u32; 2],
    /// Handovers that a decode rank works on at once, from pairing until its blocks are free again.
    pub handovers_max: u32,
    /// How much of a transfer travels as one.
    pub slice_bytes: u64,
    /// Everything random follows from it.
    pub seed: u64,
}

impl CapacityOptions {
    /// Hosts that prefill 20,000 tokens and decode 50 per sequence in a second, eight NICs of 400 Gb/s each, and blocks for 2 million tokens.
    pub fn new(model: Model) -> Self {
        CapacityOptions {
            model,
            prefill_ranks: 64,
            decode_ranks: 32,
            nics: 8,
            nic_bytes_per_second: 50_000_000_000,
            direction: None,
            prefill_tokens_per_second: 20_000.0,
            decode_tokens_per_second: 50.0,
            layers_per_step: u32::MAX,
            block_tokens: 64,
            blocks: [32_768; 2],
            handovers_max: 256,
            slice_bytes: 16 << 20,
            seed: 1,
        }
    }

    fn sessions_eager(&self) -> usize {
        let all = u64::from(self.prefill_ranks) * u64::from(self.decode_ranks);
        if all <= SESSIONS_MAX { SESSIONS_EAGER_MAX } else { 0 }
    }
}

/// A policy that can be asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyName {
    /// [`LeastLoaded`].
    LeastLoaded,
    /// [`LongestHeldPrefix`]; decode ranks keep prefixes.
    Prefix,
}

impl PolicyName {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            PolicyName::LeastLoaded => "least-loaded",
            PolicyName::Prefix => "prefix",
        }
    }

    fn policy(self) -> Box<dyn Policy> {
        match self {
            PolicyName::LeastLoaded => Box::new(LeastLoaded),
            PolicyName::Prefix => Box::new(LongestHeldPrefix::default()),
        }
    }
}

/// A node's surroundings; of what it reports only the end of requests is of interest.
fn surroundings(world: &World, node: usize) -> Result<Surroundings, SimError> {
    let mut around = world.surroundings(node).ok_or(SimError::NoSuchNode(node))?;
    let observe = around.observer;
    around.observer = Rc::new(move |event| {
        if matches!(event, Event::Finished(_)) {
            observe(event);
        }
    });
    Ok(around)
}

/// Links beat so seldom that an hour of trace is not an hour of beats.
fn node_config(node: usize, epoch: Epoch) -> NodeConfig {
    let mut config = NodeConfig::new(node_id(node), epoch);
    config.identity.secret = Some(Arc::from(SECRET));
    config.listen = address(node);
    config.session = SessionTerms {
        beat_every: Duration::from_secs(30),
        silence_max: Duration::from_secs(120),
        ..SessionTerms::default()
    };
    config
}

/// Runs a workload under one policy until its last request is finished, or for `limit` of virtual time.
///
/// Decode ranks keep prefixes under either policy, so that the policies differ in nothing but their choices.
pub fn capacity(
    options: &CapacityOptions,
    policy: PolicyName,
    workload: &[CapacityRequest],
    limit: Duration,
) -> Result<PolicyReport, SimError> {
    let sides = [Side::new(Role::Prefill, options)?, Side::new(Role::Decode, options)?];
    sides.iter().try_for_each(|side| side.holds(workload))?;
    let mut cluster = CapacityCluster::new(options.clone(), policy, &sides)?;
    cluster.run(workload, limit);
    if let Some(failure) = cluster.failures.borrow().first() {
        return Err(SimError::Start(failure.clone()));
    }
    let ledger = cluster.ledger.borrow();
    Ok(PolicyReport { events: cluster.world.events(), ..ledger.report(policy.name(), options, cluster.world.fabric()) })
}

/// What all ranks of a side have in common.
struct Side {
    role: Role,
    ranks: u32,
    geometry: Arc<GroupGeometry>,
    blocks: Vec<u32>,
    pool: Pool,
}

impl Side {
    fn new(role: Role, options: &CapacityOptions) -> Result<Self, SimError> {
        let geometry = Arc::new(GroupGeometry {
            model: options.model.clone(),
            format: Format { block_tokens: options.block_tokens, ..Format::default() },
            parallel: Parallel::default(),
        });
        geometry.validate()?;
        let (ranks, blocks) = match role {
            Role::Prefill => (options.prefill_ranks, options.blocks[0]),
            Role::Decode => (options.decode_ranks, options.blocks[1]),
        };
        let blocks = vec![blocks; geometry.model.groups.len()];
        let layout = geometry.shard(Rank(0))?.layout(&blocks);
        let pool_options = PoolOptions { populate: false, huge_pages: false };
        let pool = Pool::allocate_with(PoolId(1), layout, "kvferry-capacity", &pool_options)?;
        Ok(Side { role, ranks, geometry, blocks, pool })
    }

    /// Every request must fit a rank that has nothing else.
    fn holds(&self, workload: &[CapacityRequest]) -> Result<(), SimError> {
        let side = if self.role == Role::Prefill { "prefill" } else { "decode" };
        for (index, CapacityRequest { input_tokens: tokens, .. }) in workload.iter().enumerate() {
            for (group, blocks) in self.blocks.iter().copied().enumerate() {
                let need = self.geometry.blocks_for(group, *tokens, Rank(0)).blocks;
                if need > blocks {
                    return Err(SimError::TooSmall { side, blocks, request: index + 1, tokens: *tokens, need });
                }
            }
        }
        Ok(())
    }
}

struct CapacityCluster {
    world: World,
    options: CapacityOptions,
    scheduler: Addr<Scheduler>,
    ledger: Rc<RefCell<Ledger>>,
    failures: Rc<RefCell<Vec<String>>>,
}

impl CapacityCluster {
    fn new(options: CapacityOptions, policy: PolicyName, sides: &[Side]) -> Result<Self, SimError> {
        let fabric = FabricOptions {
            bytes_per_second: options.nic_bytes_per_second,
            slice_bytes: options.slice_bytes,
            move_bytes: false,
            ..FabricOptions::default()
        };
        let mut world = World::new(WorldOptions { seed: options.seed, fabric, ..WorldOptions::default() });
        world.fabric().time_transfers();
        let node = world.add_node();
        let epoch = world.start(node);
        let around = surroundings(&world, node)?;
        let terms = SchedulerTerms { prefill_jobs_max: 64, ..SchedulerTerms::default() };
        let config = node_config(node, epoch);
        let parts = world.on(node, || assemble_scheduler(&around, config, terms, policy.policy()));
        let scheduler = parts.ok_or(SimError::NoSuchNode(node))??.scheduler;
        let (ledger, failures) = (Rc::default(), Rc::default());
        let mut cluster = CapacityCluster { world, options, scheduler, ledger, failures };
        let mut group = 0;
        for side in sides {
            for _ in 0..side.ranks {
                cluster.start_worker(side, GroupId(group))?;
                group += 1;
            }
        }
        Ok(cluster)
    }

    fn start_worker(&mut self, side: &Side, group: GroupId) -> Result<(), SimError> {
        let (options, role) = (&self.options, side.role);
        let (geometry, blocks, pool) = (Arc::clone(&side.geometry), side.blocks.clone(), side.pool.clone());
        let full = geometry.model.groups.iter().all(|group| group.extent == Extent::Full);
        let keeps = role == Role::Decode && full && HASH_TOKENS.is_multiple_of(options.block_tokens);
        let terms = EngineTerms {
            role,
            geometry: Arc::clone(&geometry),
            rank: Rank(0),
            blocks: blocks.clone(),
            stripe_blocks: if keeps { (HASH_TOKENS / options.block_tokens) as usize } else { 0 },
            prefill_tokens_per_second: options.prefill_tokens_per_second,
            decode_tokens_per_second: options.decode_tokens_per_second,
            layers_per_step: options.layers_per_step,
        };
        let node = self.world.add_node();
        let epoch = self.world.start(node);
        let around = surroundings(&self.world, node)?;
        let mut config = WorkerConfig::new(role, group, Rank(0), geometry, blocks, (node_id(0), address(0)));
        (config.handovers_max, config.direction) = (options.handovers_max, options.direction);
        let nics = (0..options.nics).map(|nic| {
            let provider = SimProvider::new(self.world.fabric().clone());
            let device = Device { kind: TransportKind::Sim, name: format!("node-{node}-nic-{nic}"), unavailable: None };
            // The fabric, not the NIC, says how much travels as one.
            let queue = Options { poll_bytes_max: options.slice_bytes, ..Options::default() };
            let open: OpenNic = Box::new(move || provider.open(&device, &queue));
            open
        });
        let (nics, mut identity) = (nics.collect(), node_config(node, epoch));
        identity.sessions_eager_max = options.sessions_eager();
        let (ledger, failures, now) = (Rc::clone(&self.ledger), Rc::clone(&self.failures), self.world.now());
        let start = async move {
            let clock = Rc::clone(&around.environment.clock);
            let shown = clock.now();
            match assemble_worker(&around, identity, config, pool, nics).await {
                Ok(WorkerParts { mut calls, keep, answers, .. }) => {
                    let engine = TimingEngine::new(terms, clock, (now, shown), answers, ledger).start();
                    while let Some(call) = calls.recv().await {
                        engine.do_send(Call(call));
                    }
                    drop(keep);
                }
                Err(error) => failures.borrow_mut().push(error.to_string()),
            }
        };
        self.world.on(node, || tokio::task::spawn_local(start)).ok_or(SimError::NoSuchNode(node))?;
        Ok(())
    }

    fn run(&mut self, workload: &[CapacityRequest], limit: Duration) {
        let nanos = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        for (index, request) in workload.iter().enumerate() {
            let (id, request) = (RequestId(index as u64), request.clone());
            let scheduler = self.scheduler.clone();
            let at = nanos(MEETING.saturating_add(request.after));
            let spec = RequestSpec {
                request: id,
                tokens: request.input_tokens,
                prefix: Arc::clone(&request.prefix),
                prefix_tokens: HASH_TOKENS,
            };
            // Whatever is still to arrive when time is up counts, too.
            self.ledger.borrow_mut().arrive(id, request, at);
            self.world.at(at, move |_| {
                // How it ended is heard of as an event.
                scheduler.do_send(Submit { spec, trace: None, ticket: 0, answer: oneshot::channel().0 });
            });
        }
        let (ledger, all) = (Rc::clone(&self.ledger), workload.len());
        self.world.run(nanos(limit), move |world| {
            let mut ledger = ledger.borrow_mut();
            ledger.take_in(world.fabric().take_timings());
            for entry in world.take_entries() {
                if let What::Observed(Event::Finished(finished)) = entry.what {
                    ledger.finish(finished.request, finished.outcome);
                }
            }
            ledger.finished() == all
        });
    }
}
