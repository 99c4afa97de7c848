//! Everything again with pools that only a device's functions reach, so that blocks are written and compared there.

#![allow(clippy::unwrap_used, clippy::panic)]
#![allow(clippy::duplicate_mod, reason = "both bring what they have in common")]

#[path = "engine.rs"]
mod engine;
#[path = "handover.rs"]
mod handover;
