//! kvferry's pure core. No clock, socket, thread, task, lock or `async`: time and randomness are arguments.
#![forbid(unsafe_code)]

mod evidence;
mod geometry;
mod ids;
mod layout;
pub mod limits;
mod plan;
mod program;
pub mod protocol;
mod time;
mod trace;
mod transport;
pub mod wire;

pub use evidence::{Evidence, Grade, LibraryName};
pub use geometry::{
    Coords, Dtype, Extent, FieldMismatch, Format, GeometryError, GeometrySpec, GroupGeometry, KvPlacement, LayerGroup,
    Model, ModelMismatch, Order, Parallel, PlanePlacement, Shard, ShardGroup, ShardTensor, Sharding, SpecError,
    TableShape, Tensor, UnknownDtype,
};
pub use ids::{Epoch, GroupId, HandoverId, NodeId, PoolId, Rank, RequestId, TransferId};
pub use layout::{LayoutError, Plane, PoolLayout};
pub use plan::{BlockTable, PairPlan, PlanError, PlanRequest, TableBlocks, Tables, destinations, sources};
pub use program::{
    Copies, Copy, End, Location, Program, ProgramError, Segment, Side, Span, Spans, Strip, Strips, Tile, Tiles,
    UnitRange,
};
pub use time::Moment;
pub use trace::{TraceContext, TraceError};
pub use transport::{Direction, FenceProof, GpuIdentity, MemoryDomain, TransportKind};
