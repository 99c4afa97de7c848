//! Memory that one process writes and another only reads.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use kvferry_core::{PoolId, PoolLayout};
use kvferry_transport::Pool;
use rustix::fs::{SealFlags, fcntl_get_seals, fstat, fstatfs};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// `f_type` of memfds that are not of huge pages; reading those without a reserve would raise SIGBUS.
const TMPFS_MAGIC: i64 = 0x0102_1994;
const WORD_BYTES: u64 = size_of::<AtomicU64>() as u64;

/// Words of our own, zero at first. Nobody else can write them.
pub(crate) struct Board {
    pool: Pool,
    /// Of its only region, which does not move.
    base: *const AtomicU64,
    words: usize,
}

// SAFETY: the pointer is to the pool's memory, which any thread may use; words are atomics.
unsafe impl Send for Board {}

impl Board {
    /// So many words. An error says why there is no memory for them.
    pub(crate) fn new(words: u64) -> Result<Board, String> {
        let layout = PoolLayout { regions: vec![words * WORD_BYTES], planes: Vec::new() };
        let pool = Pool::allocate(PoolId(0), layout, "frames").map_err(|error| error.to_string())?;
        let region = pool.regions().first().ok_or("memory without a region")?;
        let (base, words) = (region.base().cast_const().cast(), (region.bytes() / WORD_BYTES) as usize);
        Ok(Board { pool, base, words })
    }

    /// The descriptor by which a peer reads them.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.pool.regions().first().and_then(|region| region.fd())
    }

    /// Changes a word; what is beyond the end is left alone. Relaxed: fences order it.
    pub(crate) fn set(&self, index: usize, value: u64) {
        if let Some(word) = self.words().get(index) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Changes words from `index` on, as little-endian bytes give them; what is beyond the end is left alone. Relaxed, too.
    pub(crate) fn set_all(&self, index: usize, values: &[[u8; 8]]) {
        let words = self.words().get(index..).unwrap_or_default();
        for (word, value) in words.iter().zip(values) {
            word.store(u64::from_le_bytes(*value), Ordering::Relaxed);
        }
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the region is page-aligned, that long, zeroed at first, and lives as long as the pool. Atomics may be shared with whoever reads
        // them; nobody else writes.
        unsafe { std::slice::from_raw_parts(self.base, self.words) }
    }
}

/// A peer's words, as they are now: it may change them at any time.
pub(crate) struct Foreign {
    base: *const AtomicU64,
    words: usize,
}

impl Foreign {
    /// Maps a peer's descriptor. An error says what is wrong with it; `None` is this process's own want of address space.
    pub(crate) fn map(fd: &OwnedFd, words: u64) -> Result<Option<Foreign>, String> {
        let bytes = words * WORD_BYTES;
        check_sealed(fd, bytes)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice; the seals keep its size.
        let base = unsafe { mmap(std::ptr::null_mut(), bytes as usize, ProtFlags::READ, MapFlags::SHARED, fd, 0) };
        match base {
            Ok(base) => Ok(Some(Foreign { base: base.cast_const().cast(), words: words as usize })),
            Err(error) => {
                tracing::warn!(%error, bytes, "a peer's memory cannot be mapped; frames do not go through it");
                Ok(None)
            }
        }
    }

    /// A word; zero beyond the end. Relaxed, as all loads from memory that cannot be written have to be: fences order it.
    pub(crate) fn get(&self, index: usize) -> u64 {
        if index >= self.words {
            return 0;
        }
        // SAFETY: inside the mapping, which is page-aligned and lives as long as `self`; it is only loaded from, as a whole.
        unsafe { (*self.base.add(index)).load(Ordering::Relaxed) }
    }

    /// Words from `index` on as little-endian bytes; zero beyond the end. Relaxed, too.
    pub(crate) fn get_all(&self, index: usize, out: &mut [[u8; 8]]) {
        for (index, word) in (index..).zip(out) {
            *word = self.get(index).to_le_bytes();
        }
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this base and length; nothing refers to it any more.
        let unmapped = unsafe { munmap(self.base.cast_mut().cast(), self.words * WORD_BYTES as usize) };
        debug_assert!(unmapped.is_ok());
    }
}

/// Whether a descriptor is a memfd of at least so many bytes that can never shrink and that nobody can write through: else its owner could
/// raise SIGBUS here, or a third process change what is read. An error says what is wrong.
pub fn check_sealed(fd: &OwnedFd, bytes: u64) -> Result<(), String> {
    let seals = fcntl_get_seals(fd).map_err(|e| format!("it is not a sealed memfd: {e}"))?;
    let needed = SealFlags::FUTURE_WRITE | SealFlags::SHRINK | SealFlags::GROW;
    if !seals.contains(needed) {
        return Err(format!("its memfd lacks seals: it has {seals:?}, {needed:?} are needed"));
    }
    let kind = fstatfs(fd).map_err(|e| format!("its memfd cannot be examined: {e}"))?.f_type as i64;
    if kind != TMPFS_MAGIC {
        return Err(format!("it lies on a file system of type {kind:#x}; only plain memfds are read"));
    }
    let size = fstat(fd).map_err(|e| format!("its memfd cannot be examined: {e}"))?.st_size;
    if u64::try_from(size).is_ok_and(|size| size < bytes) || size < 0 {
        return Err(format!("its memfd has {size} bytes where {bytes} are due"));
    }
    Ok(())
}
