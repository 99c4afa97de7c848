//! Bindings of libfabric, generated from the headers of 2.6 by `generate`, looked up at run time: nothing is linked.
//!
//! One binding serves every library from 1.17 on, because releases only ever added fields and functions at the end, and as long as callers
//! keep to this:
//! - [`fi_info`] and what hangs on it is made, and freed, by the library; a string put into it comes from `malloc`.
//! - Attributes that the library reads, and entries that it fills in, are [`Padded`]: zeroed, and longer than any version needs.
//! - The version that is asked for is [`asked_version`].
//! - What later versions added at the end of a structure is not read, and not called.
//!
//! The library exports a handful of functions ([`Fabric`]); one that it lacks is an `Err` there. Everything else the headers call through the
//! tables that objects carry: [`calls`].

#[expect(
    missing_docs,
    non_camel_case_types,
    clippy::all,
    unsafe_op_in_unsafe_fn,
    reason = "generated: see libfabric's own documentation"
)]
#[rustfmt::skip]
mod bindings;
pub mod calls;
mod padded;

pub use bindings::*;
pub use libloading;
pub use padded::Padded;

/// A version as the library counts them.
pub const fn version(major: u32, minor: u32) -> u32 {
    major << 16 | minor
}

/// The version of the interface to ask a library of version `loaded` for: no later than these bindings, no later than itself.
pub const fn asked_version(loaded: u32) -> u32 {
    let known = version(FI_MAJOR_VERSION, FI_MINOR_VERSION);
    if loaded < known { loaded } else { known }
}
