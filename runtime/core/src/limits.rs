//! A named limit on everything that a peer can make us hold. Units stand last in the names.

/// Ranks of one group.
pub const RANKS_MAX: u32 = 4096;
/// Members in one list of the directory.
pub const MEMBERS_MAX: usize = 65_536;
/// Different geometries among them.
pub const GEOMETRIES_MAX: usize = 4096;
/// Layers of one model.
pub const LAYERS_MAX: u32 = 1024;
/// Layer groups of one model.
pub const LAYER_GROUPS_MAX: usize = 64;
/// Tensors of one layer group.
pub const TENSORS_MAX: usize = 16;
/// Planes of one pool.
pub const PLANES_MAX: usize = 65_536;
/// Regions of one pool.
pub const REGIONS_MAX: usize = 65_536;
/// Blocks of one plane.
pub const BLOCKS_MAX: u32 = 1 << 28;
/// Blocks in one request's table, per layer group.
pub const TABLE_BLOCKS_MAX: usize = 1 << 22;
/// Tokens of one request.
pub const TOKENS_MAX: u64 = 1 << 28;
/// Prefix hashes of one request.
pub const PREFIX_HASHES_MAX: usize = 1 << 20;
/// Requests or handovers that one message names.
pub const NAMED_MAX: usize = 1 << 20;
/// Offers or handovers that one message describes.
pub const STANDING_MAX: usize = 1 << 16;
/// Steps in which one offer becomes ready.
pub const STEPS_MAX: u32 = LAYERS_MAX;
/// Other GPUs of its host that one GPU's NIC tells of.
pub const GPUS_MAX: usize = 128;
/// Shares in which rails push one step.
pub const SHARES_MAX: usize = 256;
/// Segments of one program.
pub const SEGMENTS_MAX: usize = 4096;
/// Planes of all segments of one program together.
pub const SEGMENT_PLANES_MAX: u64 = 1 << 20;
/// Bytes of one control frame, its header included.
pub const FRAME_BYTES_MAX: usize = 64 << 20;
/// Bytes of a name that crosses the wire.
pub const NAME_BYTES_MAX: usize = 256;
