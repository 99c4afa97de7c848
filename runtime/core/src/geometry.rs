//! What a model's KV is and how a group of ranks holds it: described, never assumed.

mod dtype;
mod format;
mod group;
mod mismatch;
mod model;
mod presets;
mod shard;
mod spec;

pub use dtype::{Dtype, UnknownDtype};
pub use format::{Format, KvPlacement, Order, Parallel, PlanePlacement};
pub use group::{GeometryError, GroupGeometry, TableShape};
pub use mismatch::{FieldMismatch, ModelMismatch};
pub use model::{Extent, LayerGroup, Model, Sharding, Tensor};
pub use shard::{Coords, Shard, ShardGroup, ShardTensor};
pub use spec::{GeometrySpec, SpecError};
