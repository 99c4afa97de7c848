//! kvferry moves the KV cache of LLM requests from the ranks that prefilled it to the ranks that will decode it.
//!
//! Three types matter:
//! - [`SchedulerNode`] pairs prefill outputs with decode consumers; [`SchedulerNode::submit`] returns a [`Handover`] to await.
//! - [`WorkerNode`] is one prefill or decode rank. It tells the serving engine what to do ([`EngineCall`]) and is told what was done
//!   through an [`EnginePort`].
//! - [`Pool`] is the memory that holds the rank's KV blocks, laid out as [`Shard::layout`] says.
//!
//! Everything else describes: what a model's KV looks like ([`GroupGeometry`]), which transport to open ([`transport`]), how long to wait.
//! See `ARCHITECTURE.md` for the life of one handover and the invariants that hold in it.

//! # A group of several ranks
//!
//! Every rank runs a [`WorkerNode`] with a [`NodeId`] of its own, the group's [`GroupId`] and the same [`GroupGeometry`]; the order in
//! which nodes start does not matter. Group numbers are unique over both sides. A request belongs to the ranks of one attention-dp part
//! ([`GroupGeometry::owners`]); each of them gets its own [`EngineCall::Prefill`] or [`EngineCall::Place`] and answers with its own
//! tables. Steps are given as ends of model layers and are the same on every rank, also where a pipeline stage holds none of a
//! step's layers. A node that restarts comes back with a larger [`Epoch`]; its group is whole again once it has joined.
//!
//! # What an engine owes
//!
//! - `Prefill` → [`EnginePort::opened`] with blocks, then [`EnginePort::ready`] as steps are computed; layers that are ready do not change.
//!   If it cannot be done, [`EngineEvent::Unable`].
//! - `Release` → the blocks are the engine's again; [`EnginePort::released`].
//! - `Place` → [`EnginePort::placed`] with blocks, or [`EngineEvent::NoRoom`].
//! - `Settled` → delivered: the blocks hold the KV, [`EnginePort::freed`] once they are let go. Otherwise they are free, unless
//!   `quarantined`: then only after `Returned`.
//!
//! # To leave
//!
//! A prefill rank that is to end says [`EnginePort::drain`]: its group gets no work any more, what is offered goes on until it was fetched or
//! its lease expires. [`EngineCall::Drained`] says that it can be shut down.
//!
//! # To be watched
//!
//! [`NodeConfig::watchers`] see everything that a node does. [`Metrics`] is one; [`MetricsServer`] shows it to Prometheus and to probes.

pub mod transport;

/// An agent that speaks to NIXL agents, over UCX and without libnixl.
pub mod nixl {
    pub use kvferry_core::End;
    pub use kvferry_nixl::{
        Agent, AgentConfig, AgentError, AgentMetadata, Connection, EXCHANGE_PORT, Exchange, ExchangeError, Expect,
        Fetch, Kvferry, Lease, MemoryKind, Met, MetadataServer, Moved, Notification, Notifications, OpenNic, Operation,
        Peer, PeerKind, PeerPool, Piece, Push, Range, Section, ServerConfig, Ticket, Transfer, WireError, pieces,
    };
}

/// NICs and GPUs of this host, and which NICs serve which GPU.
pub mod topology {
    pub use kvferry_topology::{Affinity, BadOverride, GpuNics, Make, Nearness, Overrides, Pci, Port, Topology};
}

pub use kvferry_actors::{
    EnginePort, Handover, HandoverError, ListenError, MonotonicClock, NicStartError, NodeConfig, NodeError, OpenNic,
    SPAN_TARGET, SchedulerNode, Standing, ThreadOptions, Watch, WorkerConfig, WorkerNode,
};
pub use kvferry_core::protocol::{
    Away, Begun, ChosenPath, DeadlineTerms, EngineCall, EngineEvent, Event, FailReason, FetchCourse, Finished,
    GroupView, Identity, LeaseTerms, LeastLoaded, LongestHeldPrefix, Message as ControlMessage, Obstacle, OfferCourse,
    Outcome, Part, PassedOver, PathReport, PeerName, Policy, PrefillJob, PrefillView, Protocols, QuarantineTerms,
    RailHealth, RailTerms, RailTurn, RdmaShortfall, Refusal, RequestCourse, RequestSpec, Role, SchedulerTerms,
    SessionTerms, ShownPath, Vitals,
};
pub use kvferry_core::{
    BlockTable, Direction, Dtype, Epoch, Evidence, Extent, FenceProof, Format, GeometryError, GeometrySpec, Grade,
    GroupGeometry, GroupId, HandoverId, KvPlacement, LayerGroup, LibraryName, Model, Moment, NodeId, Order, PairPlan,
    Parallel, PlanRequest, Plane, PlanePlacement, PoolId, PoolLayout, Program, Rank, RequestId, Shard, Sharding,
    SpecError, TableBlocks, TableShape, Tables, Tensor, TraceContext, TraceError, TransportKind, destinations, sources,
};
pub use kvferry_metrics::{Metrics, MetricsServer, Recorder, RecorderOptions, ServeError};
pub use kvferry_transport::{Pool, PoolError, PoolOptions};
