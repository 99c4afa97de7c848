//! What is known of a device, and how it is opened and waited for.

use std::fmt;
use std::os::fd::OwnedFd;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use kvferry_core::TransportKind;
use serde::{Deserialize, Serialize};

/// A device that a provider found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its kind.
    pub kind: TransportKind,
    /// Its name: a network interface or address for tcp, `memory` for shm.
    pub name: String,
    /// Why it cannot be used, if it cannot.
    pub unavailable: Option<String>,
}

/// How to open a device. Every field has a default that is right for most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Streams per peer (tcp).
    pub streams_per_peer: u32,
    /// Transfers that may be in flight at once before [`PostError::Full`](crate::PostError::Full).
    pub transfers_max: usize,
    /// Bytes that one `poll` may copy.
    pub poll_bytes_max: u64,
    /// Thread blocks of 1024 threads that one launch occupies at most (cuda): few leave the GPU to the model.
    pub thread_blocks: u32,
    /// How long a launch stands by for another transfer after one that soon followed another, in microseconds, at most 100,000 (cuda). It holds as many thread
    /// blocks as the launch before it meanwhile (after one of more than 16 none stands by), and spares transfers of up to 1 GiB that come in that time about
    /// 5 µs of a launch's 7 to 11. Zero: none does.
    pub standby_us: u32,
    /// Pieces that are shorter than this on average, in bytes, are packed by their source where the destination could also read them one by
    /// one (ucx, libfabric). By default what earlier transfers took decides, for libfabric its provider.
    pub packed_below_bytes: Option<u64>,
    /// How packed pieces come (ucx; libfabric knows no messages: there that word means that nothing is packed). The destination's word counts, unless its source says [`PackedBy::Message`].
    pub packed_by: PackedBy,
    /// Bytes of memory that are registered with the device for packed chunks, at most (ucx, libfabric). With ucx, what goes beyond is registered
    /// as it comes, and links that it leaves without staging of their own have their chunks sent as messages; with libfabric they read pieces.
    pub staging_bytes_max: u64,
    /// Bytes of one chunk of a device's memory that is staged through page-locked host memory (tcp, ucx), rounded to whole pages.
    /// Between two H200, pulls of 10,240 × 16 KiB went at 4.4 GB/s by 16 chunks of 512 KiB and at 4.8 GB/s by 16 of 1 MiB, which is also the most
    /// that one data frame carries.
    pub staged_chunk_bytes: usize,
    /// Such chunks of one pool at once, half of them on their way out and half on their way in. Their memory is page-locked when the pool is bound.
    pub staged_chunks: u32,
    /// How long a push that nobody expects may wait, in milliseconds.
    pub unexpected_wait_ms: u64,
    /// Both sides move the bytes, by messages with rendezvous, and neither reads the other's memory (ucx: TensorRT-LLM's `backend: UCX`).
    /// Both ends must say so.
    pub two_sided: bool,
    /// Pools in GPU memory will be bound, for the NIC to read and write by itself (libfabric: `FI_HMEM`). Its providers take other ways with such
    /// memory, also for pools of the host's, so it is asked for only where it is wanted. Where a provider cannot, the device opens for host memory
    /// all the same, and says why when a pool is bound. Other transports need not be told.
    pub device_memory: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            streams_per_peer: 2,
            transfers_max: 1024,
            poll_bytes_max: 4 << 20,
            thread_blocks: 16,
            standby_us: 100,
            packed_below_bytes: None,
            packed_by: PackedBy::Auto,
            staging_bytes_max: 64 << 20,
            staged_chunk_bytes: 1 << 20,
            staged_chunks: 16,
            unexpected_wait_ms: 5_000,
            two_sided: false,
            device_memory: false,
        }
    }
}

/// How pieces that their source packs come to their destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PackedBy {
    /// As suits the lanes: by reads where a device reads remote memory by itself, else by messages.
    #[default]
    Auto,
    /// As messages.
    Message,
    /// The destination reads each chunk out of the source's staging, wherever its lanes can read remote memory, a host's shared memory included.
    Read,
}

impl PackedBy {
    /// All of them.
    pub const ALL: [PackedBy; 3] = [PackedBy::Auto, PackedBy::Message, PackedBy::Read];

    /// Its name in options: `auto`, `message` or `read`.
    pub fn name(self) -> &'static str {
        match self {
            PackedBy::Auto => "auto",
            PackedBy::Message => "message",
            PackedBy::Read => "read",
        }
    }
}

impl fmt::Display for PackedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for PackedBy {
    type Err = String;

    fn from_str(word: &str) -> Result<PackedBy, String> {
        let found = PackedBy::ALL.into_iter().find(|by| by.name() == word);
        found.ok_or_else(|| format!("{word:?} is none of {}", PackedBy::ALL.map(PackedBy::name).join(", ")))
    }
}

/// What one opened device is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicInfo {
    /// Its kind.
    pub kind: TransportKind,
    /// Its name.
    pub device: String,
    /// Identity of the host that it reaches by memory; equal strings share one. Boot id for shm, empty where it does not matter.
    pub host: String,
    /// Native library in use, with path and version, if any.
    pub library: Option<String>,
    /// Nominal speed in bits per second, if known.
    pub bits_per_second: Option<u64>,
}

/// What a peer needs to name a pool in its posts. Opaque; travels on the authenticated control link only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolKeys(pub Bytes);

/// How to wait for a transport that has nothing to report.
#[derive(Clone, Debug)]
pub enum Wait {
    /// Wait until this descriptor is readable. It is the same one at every call, shared so that a waiter never holds a closed one.
    Ready(Arc<OwnedFd>),
    /// There is more to do at once: poll again.
    Busy,
    /// Nothing announces progress: poll again within a short time.
    MustPoll,
}
