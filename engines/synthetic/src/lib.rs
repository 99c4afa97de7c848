//! Prefill and decode engines without a model: their KV is a function of its coordinates, so that every byte can be checked.
//!
//! Nothing here knows the planner or its programs. Where an element lies is worked out from the definitions of
//! [`kvferry_core::GroupGeometry`] alone, so a wrong plan shows as wrong bytes. Blocks that hold no KV hold a poison byte, which is
//! checked before they are used again: what is written where it must not be shows too.
#![forbid(unsafe_code)]

mod blocks;
mod cache;
mod config;
mod decode;
mod engine;
mod memory;
mod pattern;
mod prefill;
mod report;
mod shape;
mod table;

pub use config::{EngineConfig, EngineError};
pub use decode::DecodeEngine;
pub use engine::Engine;
pub use prefill::PrefillEngine;
pub use report::EngineReport;
