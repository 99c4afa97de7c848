//! What UCX prints of itself, read back: the lanes of an endpoint, and how it moves how many bytes over them. Pure text, UCX 1.13 to 1.23.
//!
//! The line that operators look for, `… rma_am(srd/rdmap40s0:1)  am(…)`, is a [`LaneLine`]: it names lanes (evidence E3). It shows neither that
//! reads and writes are zero-copy (a [`ProtocolRow`] and an [`EndpointLane`] do, E4) nor that bytes went over the device (its counters do, E5):
//! srd is always under `rma_am`, emulated or not, and the line of an endpoint to oneself looks the same.
#![forbid(unsafe_code)]

mod endpoint;
mod lane;
mod lanes;
mod protocols;

pub use endpoint::EndpointLane;
pub use lane::Lane;
pub use lanes::{LaneLine, Locality};
pub use protocols::{ProtocolReader, ProtocolRow};
