//! Puts one node together from its seams: the same code in production and in the simulator.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use kvferry_core::protocol::{
    self, DeadlineTerms, DecodeLeader, DecodeRank, Directory, EngineCall, Event, Identity, LeaseTerms, Member, Place,
    Policy, PrefillLeader, PrefillRank, Profile, Protocols, QuarantineTerms, RailTerms, Role, SchedulerTerms,
    SessionTerms, WorkerProfile,
};
use kvferry_core::{Direction, Epoch, GroupGeometry, GroupId, NodeId, Rank};
use kvferry_transport::Pool;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use crate::group_leader::{GroupLeader, LeaderCore};
use crate::mesh::{Linked, Mesh, MeshConfig, PeerDown};
use crate::nic::{NicReport, NicStartError};
use crate::router::{Incoming, Router};
use crate::scheduler::{DirectoryActor, Scheduler};
use crate::seams::{Environment, ListenError, NicPort, OpenNic};
use crate::shell::{Inspect, Observer, Shell};
use crate::supervise::{self, OnEnd};
use crate::watch::Watch;
use crate::worker::{Answer, DecodeWorker, PrefillWorker};

/// Sessions that a node makes before anything needs them: the first handover between two ranks then does not wait for a handshake.
pub const SESSIONS_EAGER_MAX: usize = 512;

/// What every node needs to know of itself.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Who it is, in which incarnation, with which secret.
    pub identity: Identity,
    /// Where its control listener is, such as `127.0.0.1:0`.
    pub listen: String,
    /// The address that peers are told to dial, where it is not the one listened on.
    pub advertise: Option<String>,
    /// How sessions wait.
    pub session: SessionTerms,
    /// Peers with whom a session is made as soon as they are known, [`SESSIONS_EAGER_MAX`] by default; with further ones it is made when a
    /// handover needs it. The scheduler and the ranks of the own group are not counted.
    pub sessions_eager_max: usize,
    /// How long KV is held for others; the same on every node of a deployment, the scheduler's terms included.
    pub leases: LeaseTerms,
    /// How long transfers may take.
    pub deadlines: DeadlineTerms,
    /// How long blocks that somebody may still touch are waited for.
    pub quarantine: QuarantineTerms,
    /// How several NICs share what a decode rank reads, or a prefill rank pushes to one that can expect it; one NIC for each peer by default.
    pub rails: RailTerms,
    /// Who watches it; nobody by default.
    pub watchers: Vec<Arc<dyn Watch>>,
    /// How long the node's own thread polls on after every input before it sleeps; zero by default. Being woken takes tens of microseconds on
    /// many machines, and a handover takes several turns; only with cores to spare.
    pub linger: Duration,
}

impl NodeConfig {
    /// A node that listens on any port of the loopback, without a secret, with default terms.
    pub fn new(node: NodeId, epoch: Epoch) -> Self {
        NodeConfig {
            identity: Identity { node, epoch, secret: None, protocols: Protocols::default() },
            listen: "127.0.0.1:0".to_owned(),
            advertise: None,
            session: SessionTerms::default(),
            sessions_eager_max: SESSIONS_EAGER_MAX,
            leases: LeaseTerms::default(),
            deadlines: DeadlineTerms::default(),
            quarantine: QuarantineTerms::default(),
            rails: RailTerms::default(),
            watchers: Vec::new(),
            linger: Duration::ZERO,
        }
    }
}

/// What a worker node needs besides.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// Which side.
    pub role: Role,
    /// Which group.
    pub group: GroupId,
    /// Which rank of it.
    pub rank: Rank,
    /// What the group serves, and how it is cut.
    pub geometry: Arc<GroupGeometry>,
    /// Blocks of the pool, per layer group.
    pub blocks: Vec<u32>,
    /// Handovers that the group takes at once.
    pub handovers_max: u32,
    /// Who initiates transfers; `None` leaves it to the peer.
    pub direction: Option<Direction>,
    /// Between hosts KV goes by RDMA or not at all; memory of one host is as good. Otherwise it is a warning where RDMA was expected: where one
    /// side has opened an RDMA device. Whoever initiates a transfer judges its lanes, so every rank is to be told.
    pub require_rdma: bool,
    /// Tells hosts apart that the operating system calls one: added to the host identity of every NIC that reaches peers by memory, so that
    /// only ranks with equal labels share it.
    pub host: Option<String>,
    /// The scheduler's node and control address.
    pub scheduler: (NodeId, String),
}

impl WorkerConfig {
    /// Rank `rank` of a group, with a pool of `blocks` blocks per layer group.
    pub fn new(
        role: Role,
        group: GroupId,
        rank: Rank,
        geometry: Arc<GroupGeometry>,
        blocks: Vec<u32>,
        scheduler: (NodeId, String),
    ) -> Self {
        WorkerConfig {
            role,
            group,
            rank,
            geometry,
            blocks,
            handovers_max: 8,
            direction: None,
            require_rdma: false,
            host: None,
            scheduler,
        }
    }
}

/// Why a node did not start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NodeError {
    /// The control listener.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A NIC.
    #[error("NIC {nic} of this node did not start: {source}")]
    Nic {
        /// Which.
        nic: usize,
        /// Why.
        #[source]
        source: NicStartError,
    },
    /// The geometry or the pool make no sense.
    #[error("this worker cannot be: {0}")]
    Config(String),
    /// The node's thread did not start or ended early.
    #[error("the node's thread {0}")]
    Thread(String),
}

/// A worker node that runs.
pub struct WorkerParts {
    /// What the serving engine must do.
    pub calls: mpsc::UnboundedReceiver<EngineCall>,
    /// Keeps `calls` from ending: to be dropped only when nothing of the node touches memory any more.
    pub keep: mpsc::UnboundedSender<EngineCall>,
    /// Where the engine answers.
    pub answers: Recipient<Answer>,
    /// The control address that peers dial.
    pub address: String,
    /// Its protocol actors, to be asked what they have in hand.
    pub inspect: Vec<Recipient<Inspect>>,
}

/// A scheduler node that runs.
pub struct SchedulerParts {
    /// The scheduler.
    pub scheduler: Addr<Scheduler>,
    /// The control address that workers dial.
    pub address: String,
}

/// What a node is assembled in.
#[derive(Clone)]
pub struct Surroundings {
    /// The four seams.
    pub environment: Environment,
    /// Where events go.
    pub observer: Observer,
    /// Told why the node's incarnation is over; it is to be taken down then.
    pub on_end: OnEnd,
}

impl Surroundings {
    fn shell(&self, router: &Router) -> Shell {
        Shell::new(self.environment.clock.clone(), router.clone(), self.observer.clone())
    }

    /// The same for one node, whose end is an event.
    fn of(&self, node: NodeId) -> Surroundings {
        let (observer, on_end) = (self.observer.clone(), self.on_end.clone());
        let told: OnEnd = Rc::new(move |why| {
            observer(Event::NodeLost { node, cause: why.to_owned() });
            on_end(why);
        });
        Surroundings { on_end: told, ..self.clone() }
    }
}

/// Starts a worker's actors on the current thread. `pool` must be laid out as [`Shard::layout`](kvferry_core::Shard::layout) says.
pub async fn assemble_worker(
    around: &Surroundings,
    node: NodeConfig,
    config: WorkerConfig,
    pool: Pool,
    nics: Vec<OpenNic>,
) -> Result<WorkerParts, NodeError> {
    let around = &around.of(node.identity.node);
    config.geometry.validate().map_err(|error| NodeError::Config(error.to_string()))?;
    let shard = config.geometry.shard(config.rank).map_err(|error| NodeError::Config(error.to_string()))?;
    if config.blocks.len() != config.geometry.model.groups.len() {
        let (given, groups) = (config.blocks.len(), config.geometry.model.groups.len());
        return Err(NodeError::Config(format!("{given} pool sizes for {groups} layer groups")));
    }
    if shard.layout(&config.blocks) != *pool.layout() {
        return Err(NodeError::Config(
            "the pool is not laid out as Shard::layout says for this rank and these blocks".to_owned(),
        ));
    }
    let require_rdma = config.require_rdma;
    match config.role {
        Role::Prefill => {
            let (here, leases, quarantine, rails) = (node.identity.node, node.leases, node.quarantine, node.rails);
            let make = move |group, profile: WorkerProfile, shell: Shell| {
                let leads = profile.rank == Rank(0);
                let core = PrefillRank::new(profile, leases, quarantine);
                let mut core = core.with_rdma_required(require_rdma).with_rails(rails);
                if leads {
                    // There is no session with a leader on the same node that would introduce it.
                    core.handle_leader_up(shell.now(), here);
                }
                PrefillWorker::new(core, shell, group)
            };
            run_worker(around, node, config, pool, nics, make).await
        }
        Role::Decode => {
            let (leases, deadlines, quarantine, rails) = (node.leases, node.deadlines, node.quarantine, node.rails);
            let make = move |group, profile, shell| {
                let core = DecodeRank::new(profile, leases, deadlines, quarantine);
                let core = core.with_rdma_required(require_rdma).with_rails(rails);
                DecodeWorker::new(core, shell, group)
            };
            run_worker(around, node, config, pool, nics, make).await
        }
    }
}

async fn run_worker<A>(
    around: &Surroundings,
    node: NodeConfig,
    config: WorkerConfig,
    pool: Pool,
    nics: Vec<OpenNic>,
    make: impl FnOnce(GroupId, WorkerProfile, Shell) -> A,
) -> Result<WorkerParts, NodeError>
where
    A: Actor<Context = Context<A>>
        + Handler<NicReport>
        + Handler<Answer>
        + Handler<Incoming>
        + Handler<PeerDown>
        + Handler<Inspect>,
{
    let router = Router::new(node.identity.node, config.scheduler.0).watched(&node.watchers);
    // NICs report to the worker, which cannot start before it knows them; its address can.
    let context = Context::<A>::new();
    let address = context.address();
    let (mut adverts, ports) = open_nics(around, &pool, nics, &address.clone().recipient()).await?;
    if let Some(label) = &config.host {
        for advert in adverts.iter_mut().filter(|advert| !advert.host.is_empty()) {
            advert.host = format!("{}/{label}", advert.host);
        }
    }
    let profile = WorkerProfile {
        role: config.role,
        group: config.group,
        rank: config.rank,
        geometry: Arc::clone(&config.geometry),
        layout: Arc::new(pool.layout().clone()),
        nics: adverts,
        direction: config.direction,
        rails: if node.rails.rails_max > 1 { node.rails.rails_max } else { 0 },
    };
    let (calls, engine_calls) = mpsc::unbounded_channel();
    let keep = calls.clone();
    let shell = around.shell(&router).with_worker(ports, calls);
    supervise::start("worker", &around.on_end, context, make(config.group, profile.clone(), shell));
    router.connect(|ports| ports.worker = Some(address.clone().recipient()));
    let mut listeners = vec![address.clone().recipient()];
    let mut inspect = vec![address.clone().recipient()];
    if config.rank == Rank(0) {
        let (group, geometry, scheduler) = (config.group, Arc::clone(&config.geometry), config.scheduler.0);
        let core = match config.role {
            Role::Prefill => {
                LeaderCore::Prefill(PrefillLeader::new(group, geometry, scheduler, node.deadlines.prefill))
            }
            Role::Decode => LeaderCore::Decode(DecodeLeader::new(group, geometry, scheduler, node.deadlines)),
        };
        let leader = GroupLeader::new(core, around.shell(&router), group);
        let leader = supervise::start("group leader", &around.on_end, Context::new(), leader);
        listeners.push(leader.clone().recipient());
        inspect.push(leader.clone().recipient());
        router.connect(|ports| ports.leader = Some(leader.recipient()));
    }
    let place = Place {
        role: config.role,
        group: config.group,
        rank: config.rank,
        geometry: config.geometry,
        blocks: config.blocks,
        handovers_max: config.handovers_max,
    };
    let profile = Profile { worker: Some(profile) };
    let dialed = start_mesh(around, node, Some(place), profile, Some(config.scheduler), listeners, &router)?;
    Ok(WorkerParts { calls: engine_calls, keep, answers: address.recipient(), address: dialed, inspect })
}

/// Starts a scheduler's actors on the current thread.
pub fn assemble_scheduler(
    around: &Surroundings,
    node: NodeConfig,
    terms: SchedulerTerms,
    policy: Box<dyn Policy>,
) -> Result<SchedulerParts, NodeError> {
    let around = &around.of(node.identity.node);
    let router = Router::new(node.identity.node, node.identity.node).watched(&node.watchers);
    // Handover numbers must ascend over restarts: the epoch stands in their upper half.
    let core = protocol::Scheduler::new(terms, policy, node.identity.epoch.0 << 32);
    let first = node.identity.epoch <= Epoch(1);
    let scheduler = Scheduler::new(core, around.shell(&router), first);
    let scheduler = supervise::start("scheduler", &around.on_end, Context::new(), scheduler);
    let directory = if first { Directory::default() } else { Directory::successor() };
    let directory = DirectoryActor::new(directory, around.shell(&router), scheduler.clone());
    let directory = supervise::start("directory", &around.on_end, Context::new(), directory);
    // The directory hands on what is the scheduler's, after the joins that came before it.
    let port = directory.clone().recipient();
    router.connect(|all| (all.scheduler, all.directory) = (Some(port.clone()), Some(port)));
    let listeners = vec![directory.recipient()];
    let address = start_mesh(around, node, None, Profile { worker: None }, None, listeners, &router)?;
    Ok(SchedulerParts { scheduler, address })
}

async fn open_nics(
    around: &Surroundings,
    pool: &Pool,
    nics: Vec<OpenNic>,
    reports: &Recipient<NicReport>,
) -> Result<(Vec<protocol::NicAdvert>, Vec<NicPort>), NodeError> {
    let mut waiting = Vec::with_capacity(nics.len());
    for (nic, open) in nics.into_iter().enumerate() {
        let (opened, answer) = oneshot::channel();
        around.environment.host.start_nic(nic, open, pool.clone(), opened, reports.clone());
        waiting.push(answer);
    }
    let (mut adverts, mut ports) = (Vec::with_capacity(waiting.len()), Vec::with_capacity(waiting.len()));
    for (nic, answer) in waiting.into_iter().enumerate() {
        let opened =
            answer.await.unwrap_or(Err(NicStartError::ThreadEnded)).map_err(|source| NodeError::Nic { nic, source })?;
        adverts.push(opened.advert);
        ports.push(opened.port);
    }
    Ok((adverts, ports))
}

fn start_mesh(
    around: &Surroundings,
    node: NodeConfig,
    place: Option<Place>,
    profile: Profile,
    scheduler: Option<(NodeId, String)>,
    listeners: Vec<Recipient<PeerDown>>,
    router: &Router,
) -> Result<String, NodeError> {
    let context = Context::<Mesh>::new();
    let mesh = context.address();
    let accept = {
        let mesh = mesh.clone();
        Box::new(move |link| mesh.do_send(Linked { link: Ok(link), dialed: None }))
    };
    if node.identity.epoch.0 > u64::from(u32::MAX) {
        return Err(NodeError::Config(format!("{} is too large; epochs end at 2^32", node.identity.epoch)));
    }
    let bound = around.environment.network.listen(&node.listen, accept)?;
    let address = match node.advertise {
        Some(advertise) => advertise,
        None if bound.parse::<SocketAddr>().is_ok_and(|bound| bound.ip().is_unspecified()) => {
            let why = format!("peers cannot dial {bound}; set NodeConfig::advertise to an address that they can");
            return Err(NodeError::Config(why));
        }
        None => bound,
    };
    let member = Member { node: node.identity.node, epoch: node.identity.epoch, address: address.clone(), place };
    let (identity, terms, eager_max) = (node.identity, node.session, node.sessions_eager_max);
    let config = MeshConfig { identity, terms, eager_max, member, profile, scheduler };
    let actor = Mesh::new(
        config,
        around.environment.clone(),
        router.clone(),
        listeners,
        around.observer.clone(),
        around.on_end.clone(),
    );
    supervise::start("mesh", &around.on_end, context, actor);
    router.connect(|ports| (ports.mesh, ports.meet) = (Some(mesh.clone().recipient()), Some(mesh.recipient())));
    Ok(address)
}
