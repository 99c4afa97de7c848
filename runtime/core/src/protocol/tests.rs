//! Command-vector tests: inputs in, exact commands and events out.

mod decode;
mod decode_ends;
mod directory;
mod kit;
mod leaders;
mod prefill;
mod prefill_ends;
mod scheduler;
mod scheduler_adopt;
mod scheduler_faults;
