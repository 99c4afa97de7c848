//! Bindings of UCX's `ucp`, generated from the headers of 1.22 by `generate`, looked up at run time: nothing is linked.
//!
//! Every structure that the library reads carries a `field_mask`, so what an older library does not know is not read by it. A function
//! that the loaded library lacks is an `Err` in [`Ucp`]: check it before it is called.

#[expect(
    missing_docs,
    non_camel_case_types,
    clippy::all,
    unsafe_op_in_unsafe_fn,
    reason = "generated: see UCX's own documentation"
)]
#[rustfmt::skip]
mod bindings;

pub use bindings::*;
pub use libloading;
