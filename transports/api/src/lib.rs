//! How bytes move: the seam between the runtime and every transport.

pub mod codec;
#[cfg(feature = "conformance")]
pub mod conformance;
mod cursor;
mod device;
mod event;
mod info;
mod known;
mod lending;
pub mod native;
mod part;
mod pool;
mod region;
mod stage;
mod staged_events;
mod staged_in;
mod staged_out;
mod staged_shown;
mod transport;

pub use cursor::{Cursor, Piece};
pub use device::{Copier, DeviceMemory, DeviceRegion, Dmabuf, Writer};
pub use event::{Event, TransferError};
pub use info::{Device, NicInfo, Options, PackedBy, PoolKeys, Wait};
pub use known::{DeviceBlock, KnownBlocks, KnownRun, known_word, write_known};
pub use kvferry_core::{Direction, Evidence, FenceProof, Grade, LibraryName, MemoryDomain, TransportKind};
pub use lending::{Borrowing, Lending};
pub use part::first_part;
pub use pool::{Pool, PoolError, PoolOptions};
pub use region::Region;
pub use stage::{Slot, Stage};
pub use staged_events::StagedEvents;
pub use staged_in::StagedIn;
pub use staged_out::{STAGED_AHEAD, Staged, StagedChunk, StagedOut};
pub use staged_shown::StagedShown;
pub use transport::{
    BindError, ConnectError, DeviceEvent, Expected, ImportError, Notice, OpenError, PeerId, PostError, Provider,
    RemotePool, Transfer, Transport,
};
