//! Transfers between GPUs of one host: one kernel launch walks a whole program.

mod ptx;
