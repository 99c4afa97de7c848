//! How bytes move: the seam between the runtime and every transport.

pub mod codec;
#[cfg(feature = "conformance")]
pub mod conformance;
mod cursor;
mod device;
mod event;
mod info;
mod known;
pub mod native;
mod part;
mod pool;
mod region;
mod stage;
mod transport;

pub use cursor::{Cursor, Piece};
pub use device::{Copier, DeviceMemory, DeviceRegion};
pub use event::{Event, TransferError};
pub use info::{Device, NicInfo, Options, PackedBy, PoolKeys, Wait};
pub use known::{DeviceBlock, KnownBlocks, KnownRun, known_word, write_known};
pub use kvferry_core::{Direction, Evidence, FenceProof, Grade, LibraryName, MemoryDomain, TransportKind};
pub use part::first_part;
pub use pool::{Pool, PoolError, PoolOptions};
pub use region::Region;
pub use stage::{Slot, Stage};
pub use transport::{
    BindError, ConnectError, DeviceEvent, Expected, ImportError, Notice, OpenError, PeerId, PostError, Provider,
    RemotePool, Transfer, Transport,
};
