//! Words that the core and every transport share.

use core::fmt;
use core::str::FromStr;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize};

use crate::limits;
use crate::protocol::capped;

/// The kinds of transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum TransportKind {
    /// Shared memory of one host; the destination copies.
    Shm,
    /// TCP streams; each owner copies.
    Tcp,
    /// The simulated fabric.
    Sim,
    /// GPU memory of one host, or of one NVLink domain, over NVLink or PCIe; the destination's kernel copies.
    Cuda,
    /// UCX, a context per device.
    Ucx,
    /// libfabric, a domain per device.
    Libfabric,
}

impl TransportKind {
    /// The word used in command lines and reports.
    pub fn name(self) -> &'static str {
        match self {
            TransportKind::Shm => "shm",
            TransportKind::Tcp => "tcp",
            TransportKind::Sim => "sim",
            TransportKind::Cuda => "cuda",
            TransportKind::Ucx => "ucx",
            TransportKind::Libfabric => "libfabric",
        }
    }
}

impl fmt::Display for TransportKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for TransportKind {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "shm" => Ok(TransportKind::Shm),
            "tcp" => Ok(TransportKind::Tcp),
            "sim" => Ok(TransportKind::Sim),
            "cuda" => Ok(TransportKind::Cuda),
            "ucx" => Ok(TransportKind::Ucx),
            "libfabric" => Ok(TransportKind::Libfabric),
            other => Err(format!("no transport is called {other:?}; there are shm, tcp, ucx, libfabric and cuda")),
        }
    }
}

/// Who initiates a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Direction {
    /// The destination reads: `local` is written.
    Pull,
    /// The source writes: `local` is read.
    Push,
}

/// Hosts whose devices read each other's memory without a network between them, as GPUs of one NVLink domain do, and where a device is found
/// from the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryDomain {
    /// Equal on all of them, and on no others.
    pub name: String,
    /// What `Transport::connect` needs on another one of them.
    pub address: Bytes,
}

/// A GPU, as its peers need to know it: whether kernels of one read the memory of the other is judged by both ends before anybody tries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuIdentity {
    /// Its UUID; a MIG instance has one of its own.
    pub uuid: [u8; 16],
    /// Whether it is a MIG instance: those reach themselves only.
    pub is_instance: bool,
    /// The other GPUs of its host that its process sees, and whether its kernels reach their memory. Nothing is known of the rest.
    #[serde(deserialize_with = "gpus")]
    pub others: Vec<([u8; 16], bool)>,
}

impl GpuIdentity {
    /// Whether its kernels reach another GPU's memory, where it sees that one.
    pub fn reaches(&self, other: &[u8; 16]) -> Option<bool> {
        self.others.iter().find(|(uuid, _)| uuid == other).map(|(_, reached)| *reached)
    }
}

fn gpus<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<([u8; 16], bool)>, D::Error> {
    capped::<_, _, { limits::GPUS_MAX }>(deserializer)
}

/// How it is known that no foreign write can reach a block any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FenceProof {
    /// Only the owner's own thread ever writes its pool, and it has stopped (shm, tcp, cuda).
    OwnerCopies,
    /// The writing process has ended (pidfd).
    PeerProcessDead,
    /// The endpoint was destroyed and the library says that nothing is outstanding.
    EndpointDestroyed,
    /// The memory was registered anew: old keys are refused. Peers that were not meant lose their connections, too, and get the new keys
    /// when they connect again.
    PoolRekeyed,
}
