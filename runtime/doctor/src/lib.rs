//! Checks of one host, and of workers' logs.
//!
//! [`examine`] reads what Linux shows below a [`SysRoot`] (the live host, or a captured tree) once and judges it together with an
//! environment: every [`Check`] is ok, a warning or a failure, with its evidence and the exact fix. [`read_log`] says what the lines of a
//! worker's log prove, and what they do not. [`judge_transfer`] judges what a transfer showed that somebody else made. Nothing is loaded, sent or
//! changed.
#![forbid(unsafe_code)]

mod checks;
mod ends;
mod expectations;
mod host;
mod library;
mod log;
mod manifest;
mod plain;
mod question;
mod report;
mod root;
mod smi;
mod verify;

pub use checks::examine;
pub use ends::{EfaKind, End, EndError};
pub use expectations::{ExpectationError, Expectations};
pub use library::{Found as FoundLibrary, find as find_library};
pub use log::read_log;
pub use manifest::{MANIFEST_BYTES_MAX, read_manifest};
pub use plain::plain;
pub use question::{Backend, DriverSaid, Environment, Question, Role, SMI_FILE};
pub use report::{Check, Report, Status};
pub use root::SysRoot;
pub use verify::{ClockSeen, Misfit, PathSeen, Proof, Transferred, judge_transfer};
