//! What NVIDIA's driver says of GPUs' NVLink fabric, through NVML, which is found when it is needed and never linked.
//!
//! [`query`] writes what `nvidia-smi -q` writes of it, in the same form, so that one reader serves the live host and a captured one. Loading NVML
//! runs the driver's code: it belongs into a process of its own, or into one that has loaded it anyway ([`place`]).

mod library;
mod text;

/// What the loader is asked for.
pub const LIBRARY: &str = "libnvidia-ml.so.1";
/// Names another one.
pub const NAMED_BY: &str = "KVFERRY_NVML_LIBRARY";

pub use library::{FabricPlace, NvmlError, place, query};
