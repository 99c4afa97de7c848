//! One-sided operations between this process and UCX workers of other programs, for engines that speak protocols of their own.
//!
//! Nothing of kvferry's protocol is in it: no sessions, no credits, no fences. Whoever has a key of memory may read and write it for as long as it
//! is registered, and that is what the engine's peers expect. Addresses and keys come from peers that nobody vouches for, so their structure is
//! checked before UCX, which reads them without bounds, gets to see them: [`WorkerAddress`], [`PackedKey`]. What a transport of UCX's reads in its own
//! part of them is not; and where UCX emulates one-sided access, as over tcp, whoever reaches the worker may have it touch any address of this
//! process. Peers must be trusted, as NIXL's are, and more so where shared-memory transports are on.
//!
//! A [`RawWorker`] and everything of it stays on the thread that opened it.

mod address;
mod batch;
mod ending;
mod inbox;
mod key;
mod peer;
mod worker;

pub use address::WorkerAddress;
pub use ending::Ending;
pub use key::PackedKey;
pub use peer::{RawBegun, RawKey, RawPeer, RawPiece, RawRange, RawWay};
pub use worker::{RawEvent, RawMemory, RawSettings, RawWait, RawWorker};
