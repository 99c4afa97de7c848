//! Whether a NIXL plugin fits a NIXL core.
//!
//! NIXL checks a version number that has been 1 in every release, although the C++ interface behind it changed at least four times, and logs
//! the loader's refusals below its default level. [`Inspector`] reads both libraries' files instead: needs, symbols, versions and the vtable
//! through which the core calls the plugin; and takes what a process of its own ([`kvferry_plugin`]) saw on loading it. Nothing is loaded here.
#![forbid(unsafe_code)]

mod elf;
mod inspect;
mod linker;
mod report;
mod vtable;

pub use elf::{Elf, ElfError, Undefined, Vtable};
pub use inspect::{CoreError, Inspector, find_core, plugins_in};
pub use kvferry_plugin::Loaded;
pub use report::{Fingerprint, Need, PluginReport, Probe, Verdict};
