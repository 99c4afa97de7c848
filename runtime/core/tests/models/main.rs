//! Every state machine against a model that is obvious and slow, under random operations that include nonsense.

#![allow(clippy::panic, reason = "that is how a model says that its subject is wrong")]

mod credit;
mod deadline;
mod decode_leader;
mod decode_rank;
mod directory;
mod kit;
mod lease;
mod policy;
mod prefill_leader;
mod prefill_rank;
mod scheduler;
mod session;
