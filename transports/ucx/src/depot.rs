//! Where a source puts packed chunks for one peer to read: buffers of one link, as many as there are credits, which nothing else ever uses.
//!
//! A peer that was told of a chunk may read it long after the link is lost here, and must then find the chunk or nothing: whatever it read
//! instead it would unpack and call delivered. A buffer is therefore written again only when its peer has given it back; and where a depot ends
//! with buffers that were not given back, it is withdrawn for good. Its memory is unregistered and its pages are replaced by ones that nobody
//! can read, at addresses that are never used again. A read that comes late fails at the device's key or at the page; one that is under way, or
//! goes by a registration that UCX still keeps in its cache, holds the old pages, which nobody has written since.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvferry_core::{Plane, PoolId, PoolLayout};
use kvferry_transport::{Lending, Pool};

use crate::context::{Context, Mapped};
use crate::link::{CREDITS, Source};
use crate::staging::{Budget, Share};
use crate::wire::{PARCEL_BYTES_MAX, Parcel, RegionKey};

/// Bytes of a depot.
pub(crate) const DEPOT_BYTES: u64 = PARCEL_BYTES_MAX as u64 * CREDITS as u64;
/// Where it begins: at a multiple of this, which is a huge page on most machines.
const ALIGNMENT: usize = 2 << 20;

/// The buffers of one link.
pub(crate) struct Depot {
    // Unregistered before its pages go.
    _mapped: Mapped,
    pages: Arc<Pages>,
    key: RegionKey,
    /// Buffers that the peer was told of and has not given back.
    lent: Lending,
    _share: Share,
}

impl Depot {
    /// Makes and registers one; `None` where the budget does not allow it.
    pub(crate) fn new(context: &Rc<Context>, budget: &Rc<Budget>) -> Result<Option<Depot>, String> {
        let Some(share) = budget.take(DEPOT_BYTES) else { return Ok(None) };
        let pages = Arc::new(Pages::new(DEPOT_BYTES as usize)?);
        let plane = Plane {
            region: 0,
            offset: 0,
            blocks: CREDITS,
            block_stride: PARCEL_BYTES_MAX as u64,
            block_bytes: PARCEL_BYTES_MAX as u64,
        };
        let layout = PoolLayout { regions: vec![DEPOT_BYTES], planes: vec![plane] };
        // SAFETY: the pages stay readable and writable while they are kept, and no reference is formed over them.
        let pool = unsafe { Pool::from_raw(PoolId(u32::MAX), layout, vec![(pages.base, DEPOT_BYTES)], pages.clone()) };
        let (mapped, keys) = Mapped::new(context, &pool.map_err(|error| error.to_string())?)?;
        let rkey = keys.into_iter().next().unwrap_or_default();
        let key = RegionKey { base: pages.base as u64, bytes: DEPOT_BYTES, rkey };
        Ok(Some(Depot { _mapped: mapped, pages, key, lent: Lending::new(CREDITS), _share: share }))
    }

    /// What its peer needs to read it.
    pub(crate) fn key(&self) -> &RegionKey {
        &self.key
    }

    /// A buffer that is free.
    pub(crate) fn idle(&self) -> Option<u32> {
        self.lent.idle()
    }

    /// How many are free.
    pub(crate) fn idle_count(&self) -> usize {
        self.lent.idle_count()
    }

    /// Copies a chunk into a free buffer, which is the peer's from now on. `None` where the buffer is not free, or too short.
    pub(crate) fn put(&mut self, buffer: u32, chunk: &[u8]) -> Option<Parcel> {
        let start = self.start(buffer).filter(|_| chunk.len() <= PARCEL_BYTES_MAX)?;
        // SAFETY: as much room in a buffer of ours that the peer has given back; the chunk is no memory of it.
        unsafe { std::ptr::copy_nonoverlapping(chunk.as_ptr(), start, chunk.len()) };
        self.lent.lend(buffer);
        Some(Parcel { buffer, bytes: u32::try_from(chunk.len()).ok()? })
    }

    /// The first byte of a buffer, if it is free.
    fn start(&self, buffer: u32) -> Option<*mut u8> {
        self.lent.is_idle(buffer).then(|| self.pages.base.wrapping_add(buffer as usize * PARCEL_BYTES_MAX))
    }

    /// Packs a transfer's next chunk into a free buffer, which is the peer's from now on. `None` where the buffer is not free, or the program
    /// ends before its bytes.
    pub(crate) fn load(&mut self, buffer: u32, source: &mut Source) -> Option<Parcel> {
        let start = self.start(buffer)?;
        let mut length = 0;
        let bytes = source.pack(PARCEL_BYTES_MAX, |from, bytes| {
            if bytes > PARCEL_BYTES_MAX - length {
                return false;
            }
            // SAFETY: a piece of a live pool, and as much room in a buffer of ours that the peer has given back.
            unsafe { std::ptr::copy_nonoverlapping(from, start.wrapping_add(length), bytes) };
            length += bytes;
            true
        })?;
        self.lent.lend(buffer);
        Some(Parcel { buffer, bytes: u32::try_from(bytes).ok()? })
    }

    /// Whether every buffer is free.
    #[cfg(test)]
    pub(crate) fn is_whole(&self) -> bool {
        self.lent.is_whole()
    }

    /// The peer gives buffers back, a bit each.
    pub(crate) fn give_back(&mut self, buffers: u64) -> Result<(), String> {
        self.lent.take_back(buffers)
    }
}

impl Drop for Depot {
    fn drop(&mut self) {
        if !self.lent.is_whole() {
            self.pages.is_withdrawn.store(true, Ordering::Relaxed);
        }
    }
}

/// Private memory of a depot.
struct Pages {
    base: *mut u8,
    bytes: usize,
    /// Its addresses are not given back.
    is_withdrawn: AtomicBool,
}

// SAFETY: an address range that this value owns; whoever uses it answers for that.
unsafe impl Send for Pages {}
// SAFETY: as for `Send`.
unsafe impl Sync for Pages {}

impl Pages {
    /// By the C library's functions: UCX watches those, and takes what they unmap out of its cache of registrations.
    fn new(bytes: usize) -> Result<Pages, String> {
        let failed = || format!("no {bytes} bytes of memory: {}", std::io::Error::last_os_error());
        let whole = bytes + ALIGNMENT;
        let (access, how) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), whole, access, how, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(failed());
        }
        let start = start.cast::<u8>();
        let before = start.align_offset(ALIGNMENT).min(ALIGNMENT);
        let pages = Pages { base: start.wrapping_add(before), bytes, is_withdrawn: AtomicBool::new(false) };
        for (at, bytes) in [(start, before), (pages.base.wrapping_add(bytes), ALIGNMENT - before)] {
            if bytes > 0 {
                // SAFETY: an end of the mapping that nothing uses.
                unsafe { libc::munmap(at.cast(), bytes) };
            }
        }
        // SAFETY: advice about our own mapping; refusal costs speed only.
        unsafe { libc::madvise(pages.base.cast(), bytes, libc::MADV_HUGEPAGE) };
        // SAFETY: our own writable mapping, which is touched now.
        let populated = unsafe { libc::madvise(pages.base.cast(), bytes, libc::MADV_POPULATE_WRITE) } == 0;
        // Kernels before 5.14 do not know it; pages then come at first touch.
        if !populated && std::io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL) {
            return Err(failed());
        }
        Ok(pages)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if !self.is_withdrawn.load(Ordering::Relaxed) {
            // SAFETY: mapped by us, of exactly this start and length; nothing uses it any more.
            unsafe { libc::munmap(self.base.cast(), self.bytes) };
            return;
        }
        let how = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: exactly our own mapping is replaced, which nothing here uses any more.
        let at = unsafe { libc::mmap(self.base.cast(), self.bytes, libc::PROT_NONE, how, -1, 0) };
        if at == libc::MAP_FAILED {
            // Nobody writes it any more: what is read of it is what was announced.
            let error = std::io::Error::last_os_error();
            tracing::warn!(%error, bytes = self.bytes, "staging that a lost peer may still read stays in memory");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proof::tests::open;

    fn depot(lent: &[u32]) -> Option<(Depot, Rc<Budget>)> {
        let transport = open()?;
        let budget = transport.staging.budget().clone();
        let mut depot = Depot::new(&transport.context, &budget).unwrap().unwrap();
        lent.iter().for_each(|buffer| depot.lent.lend(*buffer));
        Some((depot, budget))
    }

    /// As the kernel reads it for another process.
    fn read<const BYTES: usize>(at: u64) -> std::io::Result<[u8; BYTES]> {
        let mut bytes = [0u8; BYTES];
        let to = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: BYTES };
        let from = libc::iovec { iov_base: at as *mut _, iov_len: BYTES };
        // SAFETY: as many bytes of ours are written; the kernel checks what is read.
        let read = unsafe { libc::process_vm_readv(libc::getpid(), &to, 1, &from, 1, 0) };
        if read == BYTES as isize { Ok(bytes) } else { Err(std::io::Error::last_os_error()) }
    }

    #[test]
    fn what_a_lost_peer_may_still_read_is_gone_for_good_and_nothing_else_comes_there() {
        let Some((depot, budget)) = depot(&[3]) else { return };
        let (base, before) = (depot.key().base, budget.taken());
        assert_eq!((read(base).unwrap(), base % ALIGNMENT as u64), ([0], 0));
        drop(depot);
        assert_eq!(budget.taken(), before - DEPOT_BYTES);
        for offset in [0, DEPOT_BYTES / 2, DEPOT_BYTES - 1] {
            assert_eq!(read::<1>(base + offset).unwrap_err().raw_os_error(), Some(libc::EFAULT), "byte {offset}");
        }
        // What is mapped next goes elsewhere.
        let others: Vec<Pages> = (0..16).map(|_| Pages::new(DEPOT_BYTES as usize).unwrap()).collect();
        assert!(others.iter().all(|pages| (pages.base as u64).abs_diff(base) >= DEPOT_BYTES));
        assert!(read::<1>(base).is_err());
    }

    #[test]
    fn what_was_given_back_leaves_nothing() {
        let Some((mut depot, _)) = depot(&[0, 2]) else { return };
        assert_eq!(depot.idle(), Some(1));
        assert!(depot.give_back(0b1101).is_err(), "one of them was never lent");
        depot.give_back(0b101).unwrap();
        assert!(depot.give_back(1).is_err());
        let mark = *b"a chunk that was there before";
        let parcel = depot.put(1, &mark).unwrap();
        depot.give_back(1 << parcel.buffer).unwrap();
        let (pages, at) = (depot.pages.clone(), depot.key().base + PARCEL_BYTES_MAX as u64);
        drop(depot);
        assert!(!pages.is_withdrawn.load(Ordering::Relaxed));
        assert_eq!(read(at).unwrap(), mark);
        Arc::into_inner(pages).expect("nothing else keeps the pages");
        // Another thread's memory may be there by now, even withdrawn: only what was written here must be gone.
        assert_ne!(read(at).unwrap_or_default(), mark, "it is mapped still");
    }

    #[test]
    fn no_more_are_made_than_is_allowed() {
        let Some(transport) = open() else { return };
        let budget = transport.staging.budget();
        let mut made = Vec::new();
        while let Some(depot) = Depot::new(&transport.context, budget).unwrap() {
            made.push(depot);
        }
        assert_eq!(made.len() as u64, (transport.options.staging_bytes_max - (2 << 20)) / DEPOT_BYTES);
        made.pop();
        assert!(Depot::new(&transport.context, budget).unwrap().is_some());
    }
}
