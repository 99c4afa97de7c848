//! Command-vector tests: inputs in, exact commands and events out.

mod adoption;
mod courses;
mod decode;
mod decode_ends;
mod directory;
mod drain;
mod fences;
mod kit;
mod leaders;
mod leaders_apart;
mod prefill;
mod prefill_ends;
mod pushes;
mod rails;
mod scheduler;
mod scheduler_adopt;
mod scheduler_faults;
