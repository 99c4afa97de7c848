//! What a reader is told of a pool's memory, and how it reaches it.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use kvferry_core::PoolLayout;
use kvferry_core::limits::REGIONS_MAX;
use kvferry_local::wire::MemoryKind;
use kvferry_local::{Descriptor, Shared};
use kvferry_transport::Pool;
use serde::{Deserialize, Serialize};

use crate::allocation::{mapped, unmapped};
use crate::bounds::{fits, placed, total};
use crate::driver::{self, Physical};
use crate::gpu::Gpu;
use crate::memory::{BEYOND, GpuMemory};
use crate::paths;
use crate::planes::Planes;

/// Pieces of physical memory that one region may consist of.
const PARTS_MAX: usize = 65_536;
const LENGTH_MAX: usize = 3 << 20;

/// A pool's memory in words.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Described {
    /// Names the process while it lives; `None` if no random name could be drawn.
    pub(crate) process: Option<[u8; 16]>,
    /// The memory's name in that process.
    pub(crate) number: u64,
    /// What the GPU is called there, and what it is.
    pub(crate) gpu: String,
    pub(crate) uuid: [u8; 16],
    /// What its regions consist of; nothing for empty ones.
    pub(crate) regions: Vec<Vec<Part>>,
}

/// A piece of a region.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Part {
    /// Of the allocation that it belongs to.
    pub(crate) bytes: u64,
    pub(crate) how: How,
}

/// How a piece is reached from another process. The region begins `offset` bytes from the first piece's start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum How {
    /// The next descriptor stands for it.
    Descriptor { offset: u64 },
    /// A legacy CUDA IPC handle.
    Ipc { handle: Vec<u8>, offset: u64 },
    /// A fabric handle.
    Fabric { handle: Vec<u8>, offset: u64 },
}

impl How {
    fn offset(&self) -> u64 {
        let (How::Descriptor { offset } | How::Ipc { offset, .. } | How::Fabric { offset, .. }) = self;
        *offset
    }
}

fn handle_of(bytes: &[u8]) -> Result<[u8; 64], String> {
    bytes.try_into().map_err(|_| format!("its handle has {} bytes instead of 64", bytes.len()))
}

pub(crate) fn process() -> Option<[u8; 16]> {
    static NAME: OnceLock<Option<[u8; 16]>> = OnceLock::new();
    *NAME.get_or_init(|| {
        let mut name = [0; 16];
        getrandom::fill(&mut name).ok().map(|()| name)
    })
}

struct Exported(Arc<OwnedFd>);

impl Descriptor for Exported {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

/// What readers of a pool need: of this host, or beyond it.
pub(crate) fn share(pool: &Pool, is_beyond: bool) -> Result<Shared, String> {
    let memory = GpuMemory::of(pool).ok_or("its memory is no GPU's")?;
    let (mut regions, mut descriptors) = (Vec::new(), Vec::new());
    for (index, region) in pool.device_regions().iter().enumerate() {
        let mut parts = Vec::new();
        let exported = match (region.bytes, is_beyond) {
            (0, _) => Vec::new(),
            (_, false) => memory.export(index, *region)?,
            (_, true) => memory.export_beyond(index, *region)?,
        };
        for (part, descriptor) in exported {
            descriptors.extend(descriptor.map(|fd| Box::new(Exported(fd)) as Box<dyn Descriptor>));
            parts.push(part);
        }
        regions.push(parts);
    }
    let described = Described {
        process: process(),
        number: memory.number,
        gpu: paths::described(&memory.gpu.label(), &memory.gpu.name),
        uuid: memory.gpu.uuid,
        regions,
    };
    let words = postcard::to_allocvec(&described).map_err(|error| error.to_string())?;
    Ok(Shared { memory: MemoryKind::Opaque(Bytes::from(words)), descriptors })
}

/// A peer's pool, as kernels of one GPU here reach it. Closed when the last copy that reads it has let go.
pub(crate) struct Reached {
    pub(crate) planes: Planes,
    _mappings: Vec<Mapping>,
    /// Memory of this very process.
    _owner: Option<Arc<GpuMemory>>,
    /// Whether its owner is on another host.
    pub(crate) is_beyond: bool,
}

impl Reached {
    /// How it is reached, in words.
    pub(crate) fn how(&self) -> &'static str {
        match (&self._owner, self._mappings.first()) {
            (Some(_), _) => "memory of this process",
            (None, Some(Mapping::Ipc { .. })) => "legacy CUDA IPC handles",
            (None, Some(Mapping::Physical { is_fabric: true, .. })) if self.is_beyond => {
                "fabric handles of another host's memory, mapped on this GPU"
            }
            (None, Some(Mapping::Physical { is_fabric: true, .. })) => "fabric handles mapped on this GPU",
            (None, Some(Mapping::Physical { .. })) => "descriptors mapped on this GPU",
            (None, None) => "nothing, for it is empty",
        }
    }
}

enum Mapping {
    Ipc { gpu: Arc<Gpu>, address: u64 },
    Physical { gpu: Arc<Gpu>, address: u64, bytes: u64, is_fabric: bool },
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let (Mapping::Ipc { gpu, .. } | Mapping::Physical { gpu, .. }) = self;
        if gpu.enter().is_err() {
            return;
        }
        // SAFETY: opened by `reach`; copies hold what they read until their kernels have ended. A refusal leaves it mapped, which is safe.
        let _closed = unsafe {
            match self {
                Mapping::Ipc { address, .. } => driver::close_ipc(*address),
                Mapping::Physical { address, bytes, .. } => unmapped(*address, *bytes),
            }
        };
    }
}

/// Makes a peer's pool reachable for kernels of `gpu`. The layout is valid; the rest is the peer's word, which the driver checks: a reader maps
/// whole allocations and touches no more of them than the layout names.
pub(crate) fn reach(
    gpu: &Arc<Gpu>,
    layout: &PoolLayout,
    memory: &MemoryKind,
    descriptors: Vec<OwnedFd>,
    is_beyond: bool,
) -> Result<Reached, String> {
    let MemoryKind::Opaque(words) = memory else { return Err("its memory is no GPU's".to_owned()) };
    let described = decode(words, layout)?;
    let is_fabric = |part: &Part| matches!(part.how, How::Fabric { .. });
    if is_beyond && !described.regions.iter().flatten().all(is_fabric) {
        return Err(format!("its memory on {} stays with its host: {BEYOND}", described.gpu));
    }
    gpu.enter()?;
    // What is on another host is in no process of this one, whatever is said.
    let own = described.process.filter(|name| !is_beyond && Some(*name) == process());
    let own = own.and_then(|_| GpuMemory::find(described.number));
    if let Some(owner) = own {
        // Only the names are the peer's word, and they may be of any memory here: what it is, its owner knows.
        let lengths: Vec<u64> = owner.regions.iter().map(|region| region.bytes).collect();
        if !fits(&layout.regions, &lengths) {
            return Err(format!(
                "it names memory of this process with regions of {lengths:?} bytes where its layout has {:?}",
                layout.regions
            ));
        }
        // Plain memory is reached by enabling its GPU; memory behind descriptors is mapped once more, as from any other process.
        let reachable = Arc::ptr_eq(&owner.gpu, gpu)
            || (owner.is_plain() && gpu.can_reach(&owner.gpu) && gpu.reach(&owner.gpu).is_ok());
        gpu.enter()?;
        if reachable {
            let bases: Vec<u64> = owner.regions.iter().map(|region| region.address).collect();
            let planes = Planes::new(gpu, layout, &bases)?;
            return Ok(Reached { planes, _mappings: Vec::new(), _owner: Some(owner), is_beyond });
        }
    }
    paths::check(gpu, described.uuid, &described.gpu)?;
    let mut mapper = Mapper {
        gpu,
        from: &described.gpu,
        descriptors: descriptors.into_iter(),
        opened: BTreeMap::new(),
        mappings: Vec::new(),
    };
    let mut bases = Vec::with_capacity(described.regions.len());
    for (parts, &bytes) in described.regions.iter().zip(&layout.regions) {
        bases.push(if bytes == 0 { 0 } else { mapper.region(parts, bytes)? });
    }
    if mapper.descriptors.next().is_some() {
        return Err("it sent more descriptors than its memory has pieces".to_owned());
    }
    let mappings = mapper.mappings;
    Ok(Reached { planes: Planes::new(gpu, layout, &bases)?, _mappings: mappings, _owner: None, is_beyond })
}

fn decode(words: &Bytes, layout: &PoolLayout) -> Result<Described, String> {
    if words.len() > LENGTH_MAX {
        return Err(format!("its memory takes {} bytes to describe, at most {LENGTH_MAX} are read", words.len()));
    }
    let (described, rest): (Described, _) =
        postcard::take_from_bytes(words).map_err(|error| format!("its memory's description is malformed: {error}"))?;
    let regions = layout.regions.len();
    if !rest.is_empty() || regions > REGIONS_MAX {
        return Err("its memory's description is malformed".to_owned());
    }
    if described.regions.len() != regions {
        return Err(format!("it describes {} regions where its layout has {regions}", described.regions.len()));
    }
    Ok(described)
}

/// Opens what a peer shared.
struct Mapper<'a> {
    gpu: &'a Arc<Gpu>,
    from: &'a str,
    descriptors: std::vec::IntoIter<OwnedFd>,
    /// Legacy handles that are open and where: regions may share an allocation.
    opened: BTreeMap<[u8; 64], u64>,
    mappings: Vec<Mapping>,
}

impl Mapper<'_> {
    /// Where a region begins for our kernels.
    fn region(&mut self, parts: &[Part], bytes: u64) -> Result<u64, String> {
        let Some(first) = parts.first() else { return Err("it shared no memory for a region".to_owned()) };
        if parts.len() > PARTS_MAX {
            return Err(format!("its region consists of {} pieces, at most {PARTS_MAX} are mapped", parts.len()));
        }
        let offset = first.how.offset();
        let shared = total(parts.iter().map(|part| part.bytes), offset, bytes)?;
        match &first.how {
            How::Ipc { handle, .. } if parts.len() == 1 => {
                let address = self.ipc(handle_of(handle)?)?;
                // How long it really is the driver knows, for every region anew: they may share a handle.
                placed(address, offset, bytes, driver::allocation_of(address)?)
            }
            _ => {
                let address = self.physical(parts, shared)?;
                placed(address, offset, bytes, (address, shared))
            }
        }
    }

    fn ipc(&mut self, handle: [u8; 64]) -> Result<u64, String> {
        if let Some(&address) = self.opened.get(&handle) {
            return Ok(address);
        }
        let address = driver::open_ipc(handle).map_err(|error| {
            let (to, from) = (self.gpu.label(), self.from);
            format!("its memory on {from} cannot be opened on {to}: {error}; peer access (nvidia-smi topo -p2p r), the same IPC and PID namespaces are needed")
        })?;
        self.mappings.push(Mapping::Ipc { gpu: Arc::clone(self.gpu), address });
        self.opened.insert(handle, address);
        Ok(address)
    }

    /// `bytes` is the sum of the parts'.
    fn physical(&mut self, parts: &[Part], bytes: u64) -> Result<u64, String> {
        let (to, from) = (self.gpu.label(), self.from);
        let refused = |error: driver::CudaError| {
            format!(
                "its memory on {from} cannot be mapped on {to}: {error}; peer access (nvidia-smi topo -p2p r) is needed, and for fabric \
                 handles the same IMEX domain and channel"
            )
        };
        let mut pieces = Handles(Vec::with_capacity(parts.len()));
        for part in parts {
            let imported = match &part.how {
                How::Descriptor { .. } => {
                    let descriptor = self.descriptors.next();
                    let descriptor = descriptor.ok_or("it sent fewer descriptors than its memory has pieces")?;
                    driver::import(descriptor.as_fd())
                }
                How::Fabric { handle, .. } => driver::import_fabric(handle_of(handle)?),
                How::Ipc { .. } => return Err("its region mixes kinds of memory".to_owned()),
            };
            pieces.0.push((imported.map_err(refused)?, part.bytes));
        }
        // Read-only where the driver can: then not even a faulty kernel here could write it.
        let address = mapped(&pieces.0, self.gpu.ordinal, false)
            .or_else(|_| mapped(&pieces.0, self.gpu.ordinal, true))
            .map_err(refused)?;
        let is_fabric = parts.iter().any(|part| matches!(part.how, How::Fabric { .. }));
        self.mappings.push(Mapping::Physical { gpu: Arc::clone(self.gpu), address, bytes, is_fabric });
        Ok(address)
    }
}

/// Imported handles; the mappings keep the memory.
struct Handles(Vec<(Physical, u64)>);

impl Drop for Handles {
    fn drop(&mut self) {
        for (physical, _) in &self.0 {
            // SAFETY: imported once each, and used no more.
            let _released = unsafe { driver::release_physical(*physical) };
        }
    }
}
