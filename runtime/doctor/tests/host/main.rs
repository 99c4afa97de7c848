//! A healthy p5 (32 EFA devices, 8 GPUs) and hosts with one thing wrong each: exactly that is found. The environment is the one that NVIDIA
//! Dynamo's page "KV Cache Transfer" requires of EFA workers.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code")]

mod broken;
mod captured;
mod expected;
mod healthy;
mod kit;
mod page;
#[path = "../tree/mod.rs"]
mod tree;
