//! GPU memory that this process allocated.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::driver::{self, CudaError, HandleKind, Physical};
use crate::gpu::Gpu;

/// Plain allocations are whole pages of this, so that an exported one shows nothing else.
const PLAIN_BYTES: u64 = 2 << 20;

/// One allocation. Freed when it is dropped: whoever touches it holds it.
pub(crate) struct Allocation {
    gpu: Arc<Gpu>,
    pub(crate) address: u64,
    /// What it takes, at least what was asked for.
    bytes: u64,
    backing: Backing,
}

enum Backing {
    /// By `cuMemAlloc`.
    Plain,
    /// Physical memory under a reserved range.
    Physical { physical: Physical, handle: Handle },
}

/// What stands for an allocation in other processes.
#[derive(Clone)]
pub(crate) enum Handle {
    Descriptor(Arc<OwnedFd>),
    Fabric([u8; 64]),
}

/// How memory is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Allocate {
    /// Physical memory that a fabric handle stands for (where there is IMEX), else one that a descriptor stands for, else plain memory.
    #[default]
    Best,
    /// Physical memory that a descriptor stands for. It outlives its owner for as long as a reader has it mapped.
    Descriptor,
    /// Plain memory (`cuMemAlloc`), shared by legacy CUDA IPC.
    Plain,
}

impl Allocation {
    pub(crate) fn new(gpu: &Arc<Gpu>, bytes: u64, how: Allocate) -> Result<Allocation, CudaError> {
        gpu.enter()?;
        match (how, &gpu.physical) {
            (Allocate::Best, Ok(memory)) => match Allocation::physical(gpu, bytes, memory.kind, memory.granularity) {
                Err(error) if !error.is_exhaustion() => {
                    tracing::info!(gpu = gpu.ordinal, %error, "memory is allocated plainly: handles are refused");
                    Allocation::plain(gpu, bytes)
                }
                other => other,
            },
            (Allocate::Descriptor, memory) => {
                let granularity = memory.as_ref().map_or(PLAIN_BYTES, |memory| memory.granularity);
                Allocation::physical(gpu, bytes, HandleKind::Descriptor, granularity)
            }
            (Allocate::Best | Allocate::Plain, _) => Allocation::plain(gpu, bytes),
        }
    }

    fn plain(gpu: &Arc<Gpu>, bytes: u64) -> Result<Allocation, CudaError> {
        let bytes = bytes.next_multiple_of(PLAIN_BYTES);
        let address = driver::allocate(bytes as usize)?;
        Ok(Allocation { gpu: Arc::clone(gpu), address, bytes, backing: Backing::Plain })
    }

    fn physical(gpu: &Arc<Gpu>, bytes: u64, kind: HandleKind, granularity: u64) -> Result<Allocation, CudaError> {
        let bytes = bytes.next_multiple_of(granularity);
        let physical = driver::create_physical(gpu.ordinal, kind, bytes)?;
        // SAFETY: the handle was just made; it is released here unless the allocation takes it.
        let exported = unsafe {
            match kind {
                HandleKind::Descriptor => driver::export(physical).map(|fd| Handle::Descriptor(Arc::new(fd))),
                HandleKind::Fabric => driver::export_fabric(physical).map(Handle::Fabric),
            }
        };
        let made = exported
            .and_then(|handle| mapped(&[(physical, bytes)], gpu.ordinal, true).map(|address| (handle, address)));
        match made {
            Ok((handle, address)) => {
                Ok(Allocation { gpu: Arc::clone(gpu), address, bytes, backing: Backing::Physical { physical, handle } })
            }
            Err(error) => {
                // SAFETY: as above.
                let _released = unsafe { driver::release_physical(physical) };
                Err(error)
            }
        }
    }

    /// The handle that stands for it, and how long the memory is that it stands for.
    pub(crate) fn handle(&self) -> Option<(Handle, u64)> {
        match &self.backing {
            Backing::Plain => None,
            Backing::Physical { handle, .. } => Some((handle.clone(), self.bytes)),
        }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.gpu.enter().is_err() {
            return;
        }
        // SAFETY: made by `new`; everybody who touches it holds it, so nobody does any more. A refusal leaves it allocated, which is safe.
        let _freed = unsafe {
            match &self.backing {
                Backing::Plain => driver::free(self.address),
                Backing::Physical { physical, .. } => driver::unmap(self.address, self.bytes)
                    .and_then(|()| driver::unreserve(self.address, self.bytes))
                    .and_then(|()| driver::release_physical(*physical)),
            }
        };
    }
}

/// Maps physical memory, one piece behind the other, where a GPU can reach it. [`unmapped`] undoes it.
pub(crate) fn mapped(pieces: &[(Physical, u64)], ordinal: u32, write: bool) -> Result<u64, CudaError> {
    let bytes = pieces.iter().map(|piece| piece.1).fold(0, u64::saturating_add);
    let address = driver::reserve(bytes)?;
    let mut done = 0;
    let mut map = || {
        for (physical, bytes) in pieces {
            // SAFETY: the range was just reserved and is filled from its start; the handles are the caller's and as long as it says, which the
            // driver checks.
            unsafe { driver::map(address + done, *bytes, *physical)? };
            done += bytes;
        }
        // SAFETY: all of it is mapped now.
        unsafe { driver::allow(address, bytes, ordinal, write) }
    };
    map().map(|()| address).inspect_err(|_| {
        // SAFETY: what was mapped above, and nobody knows of it.
        let _undone = unsafe {
            if done > 0 { driver::unmap(address, done) } else { Ok(()) }
                .and_then(|()| driver::unreserve(address, bytes))
        };
    })
}

/// # Safety
/// The range came from [`mapped`], and nothing touches it any more.
pub(crate) unsafe fn unmapped(address: u64, bytes: u64) -> Result<(), CudaError> {
    // SAFETY: the caller's promise.
    unsafe { driver::unmap(address, bytes).and_then(|()| driver::unreserve(address, bytes)) }
}
