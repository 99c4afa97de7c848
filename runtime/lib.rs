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

pub mod transport;

pub use kvferry_actors::{
    EnginePort, Handover, HandoverError, NodeConfig, NodeError, OpenNic, SchedulerNode, ThreadOptions, WorkerConfig,
    WorkerNode,
};
pub use kvferry_core::protocol::{
    DeadlineTerms, EngineCall, EngineEvent, Event, FailReason, Finished, GroupView, Identity, LeaseTerms, LeastLoaded,
    LongestHeldPrefix, Outcome, PathReport, Policy, PrefillJob, PrefillView, Refusal, RequestSpec, Role,
    SchedulerTerms, SessionTerms,
};
pub use kvferry_core::{
    BlockTable, Direction, Dtype, Epoch, Extent, FenceProof, Format, GeometryError, GeometrySpec, GroupGeometry,
    GroupId, HandoverId, KvPlacement, LayerGroup, Model, Moment, NodeId, Order, PairPlan, Parallel, PlanRequest, Plane,
    PlanePlacement, PoolId, PoolLayout, Program, Rank, RequestId, Shard, Sharding, SpecError, TableBlocks, TableShape,
    Tables, Tensor, TransportKind, destinations, sources,
};
pub use kvferry_transport::{Pool, PoolError, PoolOptions};
