//! What a TensorRT-LLM cache transceiver configuration means for kvferry.
//!
//! [`TransceiverConfig::parse`] reads `cache_transceiver_config` from a TensorRT-LLM YAML, keeping positions and what it does not know;
//! [`resolve`] says which method, transport, devices, deadlines and credits follow from it and from the environment, each with its reason
//! and source. Nothing here reads a file, a variable or a device: text and environment are arguments.
#![forbid(unsafe_code)]

mod config;
mod contradiction;
mod effects;
mod environment;
mod finding;
mod follow;
mod peers;
mod plan;
mod resolve;
mod text;

pub use config::{Backend, ConfigError, Located, TransceiverConfig, TransceiverRuntime, UnknownKey};
pub use contradiction::{Claim, Contradiction};
pub use environment::{Environment, EnvironmentError, parse_environment};
pub use finding::{Finding, Severity, Source};
pub use follow::{Follow, UnknownRule};
pub use kvferry_yaml::{FILE_BYTES_MAX, Position, YamlError};
pub use peers::Peers;
pub use plan::{Carrier, Credits, Deadlines, Method, NixlBackend, Plan, Resolved};
pub use resolve::{Resolution, resolve};
pub use text::{NotText, text_of};
