//! What an engine is told about its rank.

use std::sync::Arc;

use kvferry_core::{GeometryError, GroupGeometry, Rank};
use thiserror::Error;

/// One rank of a synthetic model instance.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// What the group serves, and how it is cut.
    pub geometry: Arc<GroupGeometry>,
    /// Which of its ranks this is.
    pub rank: Rank,
    /// Blocks of this rank's pool, per layer group of the model.
    pub blocks: Vec<u32>,
    /// Prefill: model layers that become ready together; `None` for all at once.
    pub layers_per_step: Option<u32>,
    /// Decode: keep the prefix blocks of delivered requests, and use them for requests that begin alike.
    pub reuse_prefix: bool,
    /// Shuffles which blocks a request gets. The KV does not depend on it.
    pub seed: u64,
}

/// Why there is no engine.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The geometry is impossible.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// Not one number of blocks per layer group.
    #[error("{given} numbers of blocks for {groups} layer groups: give one per group")]
    BlockCounts {
        /// Numbers given.
        given: usize,
        /// Layer groups of the model.
        groups: usize,
    },
    /// The pool has another number of planes.
    #[error("the pool has {have} planes where the rank needs {need}: allocate it from the rank's own layout")]
    PlaneCount {
        /// Planes of the pool.
        have: usize,
        /// Planes that the rank's layers take.
        need: usize,
    },
    /// A plane of the pool has another shape.
    #[error(
        "plane {plane} of the pool has {have_blocks} blocks of {have_bytes} bytes where {need_blocks} of {need_bytes} are needed: \
         allocate it from the rank's own layout and the same numbers of blocks"
    )]
    Plane {
        /// Which plane.
        plane: u32,
        /// Its blocks.
        have_blocks: u32,
        /// Bytes of each.
        have_bytes: u64,
        /// Blocks that the configuration names.
        need_blocks: u32,
        /// Bytes that a block takes.
        need_bytes: u64,
    },
}
