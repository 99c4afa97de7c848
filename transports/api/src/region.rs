//! One allocation of a pool.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::pool::{PoolError, PoolOptions, refused};

/// What a huge page of the kernel begins at, on most machines.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// One allocation of a pool: mapped writable here and nowhere else.
pub struct Region {
    base: *mut u8,
    bytes: u64,
    fd: Option<OwnedFd>,
    /// What is unmapped at the end: base and bytes, more than the region's where it had to be aligned. None for memory of others.
    mapping: Option<(*mut u8, usize)>,
}

// SAFETY: a region is an address range and a descriptor; it hands out raw pointers only, and whoever uses them answers for it.
unsafe impl Send for Region {}
// SAFETY: as for `Send`; nothing in it changes after construction.
unsafe impl Sync for Region {}

impl Region {
    /// Its first byte. No reference may be formed over its memory: peers read it at any time.
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The sealed memfd, where [`Pool::allocate`](crate::Pool::allocate) made it and it is not empty.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    pub(crate) fn foreign(base: *mut u8, bytes: u64) -> Region {
        Region { base, bytes, fd: None, mapping: None }
    }

    /// Memory that no other process can map, from the start of a huge page on where it is as long as one.
    pub(crate) fn private(bytes: u64, options: &PoolOptions) -> Result<Region, PoolError> {
        if bytes == 0 {
            return Ok(Region::empty());
        }
        let length = usize::try_from(bytes).map_err(|_| refused("size", bytes, Errno::NOMEM))?;
        let slack = if options.huge_pages && length >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { 0 };
        let whole = length.checked_add(slack).ok_or_else(|| refused("size", bytes, Errno::NOMEM))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice; nothing else refers to it.
        let start: *mut u8 = unsafe {
            let how = MapFlags::PRIVATE | MapFlags::NORESERVE;
            mmap_anonymous(std::ptr::null_mut(), whole, ProtFlags::READ | ProtFlags::WRITE, how)
        }
        .map_err(|e| refused("mmap", bytes, e))?
        .cast();
        let skip = if slack > 0 { start.align_offset(HUGE_PAGE_BYTES).min(slack) } else { 0 };
        let region = Region { base: start.wrapping_add(skip), bytes, fd: None, mapping: Some((start, whole)) };
        region.prepare(length, options)?;
        Ok(region)
    }

    fn empty() -> Region {
        Region::foreign(NonNull::<u128>::dangling().as_ptr().cast(), 0)
    }

    /// Asks for huge pages and touches every page, as the options say.
    fn prepare(&self, length: usize, options: &PoolOptions) -> Result<(), PoolError> {
        if options.huge_pages {
            // SAFETY: advice about our own mapping does not change its contents. Refusal costs speed only.
            let _best_effort = unsafe { madvise(self.base.cast(), length, Advice::LinuxHugepage) };
        }
        if options.populate {
            // SAFETY: populating our own writable mapping does not change its contents.
            match unsafe { madvise(self.base.cast(), length, Advice::LinuxPopulateWrite) } {
                // Kernels before 5.14 do not know it; pages then come at first touch.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(e) => return Err(refused("populating", self.bytes, e)),
            }
        }
        Ok(())
    }

    pub(crate) fn allocate(bytes: u64, name: &str, options: &PoolOptions) -> Result<Region, PoolError> {
        if bytes == 0 {
            return Ok(Region::empty());
        }
        let length = usize::try_from(bytes).map_err(|_| refused("size", bytes, Errno::NOMEM))?;
        // A name is for people only; cut it to what the kernel takes.
        let name: String = name.chars().filter(|c| c.is_ascii_graphic()).take(128).collect();
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|e| refused("memfd_create", bytes, e))?;
        ftruncate(&fd, bytes).map_err(|e| refused("ftruncate", bytes, e))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice; nothing else refers to it.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &fd,
                0,
            )
        }
        .map_err(|e| refused("mmap", bytes, e))?;
        let base: *mut u8 = base.cast();
        let region = Region { base, bytes, fd: Some(fd), mapping: Some((base, length)) };
        region.prepare(length, options)?;
        // Our writable mapping exists; from here on every other one, by anyone, is read-only, and the size is fixed.
        let seals = SealFlags::FUTURE_WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        if let Some(fd) = region.fd() {
            fcntl_add_seals(fd, seals).map_err(|e| refused("sealing", bytes, e))?;
        }
        Ok(region)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if let Some((start, bytes)) = self.mapping {
            // SAFETY: mapped by us, of exactly this start and length, and nothing uses it after the last `Pool`.
            let unmapped = unsafe { munmap(start.cast(), bytes) };
            debug_assert!(unmapped.is_ok());
        }
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region").field("base", &self.base).field("bytes", &self.bytes).field("fd", &self.fd).finish()
    }
}
