//! Memory for packed chunks: so many buffers in one piece, out of which a peer reads, or into which this side reads.
//!
//! A provider may still be answering a read when the session that it belonged to is over. So the pages stay mapped until the domain is closed:
//! they go back to it, for the next link. What a late read finds there counts for nothing: whoever asked can no longer ask over its session
//! whether the source stood, and without that answer no transfer succeeds.

use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::rc::Rc;

use libfabric_sys::{FI_READ, FI_REMOTE_READ};

use crate::domain::{Domain, Registered};

/// Bytes of a buffer, and so of a chunk: between two of these caches' sizes, so that what was packed or read is still there when it goes on.
pub(crate) const CHUNK_BYTES: usize = 256 << 10;
/// Buffers of one link in one direction: enough for chunks to be packed, told of, read, unpacked and given back at once.
pub(crate) const BUFFERS: u32 = 8;
/// Bytes of all of them.
pub(crate) const STAGING_BYTES: u64 = CHUNK_BYTES as u64 * BUFFERS as u64;

/// Buffers of one link, registered as far as their use needs it.
pub(crate) struct Staging {
    base: *mut u8,
    memory: Memory,
}

enum Memory {
    Registered(Registered<Pages>),
    Plain(#[expect(dead_code, reason = "kept until the buffers go")] Pages),
}

impl Staging {
    /// Buffers that a peer reads. `None` where the limit, in bytes, is reached.
    pub(crate) fn depot(domain: &Rc<Domain>, bytes_max: u64) -> Result<Option<Staging>, String> {
        Staging::new(domain, bytes_max, Some(FI_READ | FI_REMOTE_READ))
    }

    /// Buffers that this side reads into.
    pub(crate) fn landing(domain: &Rc<Domain>, bytes_max: u64) -> Result<Option<Staging>, String> {
        Staging::new(domain, bytes_max, domain.mode.local.then_some(FI_READ))
    }

    fn new(domain: &Rc<Domain>, bytes_max: u64, access: Option<u32>) -> Result<Option<Staging>, String> {
        let Some(pages) = Pages::take(domain, bytes_max)? else { return Ok(None) };
        let Some(base) = pages.mapped.as_ref().map(|mapped| mapped.0) else { return Ok(None) };
        let memory = match access {
            Some(access) => Memory::Registered(Registered::new(domain, base, STAGING_BYTES as usize, access, pages)?),
            None => Memory::Plain(pages),
        };
        Ok(Some(Staging { base, memory }))
    }

    /// A buffer's first byte.
    pub(crate) fn buffer(&self, number: u32) -> Option<*mut u8> {
        (number < BUFFERS).then(|| self.base.wrapping_add(number as usize * CHUNK_BYTES))
    }

    /// What a peer needs to read it: its beginning as the provider counts, its key.
    pub(crate) fn lend(&self, domain: &Domain) -> Option<(u64, u64)> {
        let Memory::Registered(registered) = &self.memory else { return None };
        let base = if domain.mode.addresses { self.base as u64 } else { 0 };
        Some((base, registered.key()))
    }

    pub(crate) fn desc(&self) -> *mut c_void {
        match &self.memory {
            Memory::Registered(registered) => registered.desc(),
            Memory::Plain(_) => std::ptr::null_mut(),
        }
    }
}

/// A domain's pages for staging.
#[derive(Default)]
pub(crate) struct Arena {
    idle: RefCell<Vec<Mapped>>,
    /// Bytes that are in use.
    taken: Cell<u64>,
}

/// Pages of one staging, which go back to their domain.
struct Pages {
    domain: Rc<Domain>,
    mapped: Option<Mapped>,
}

impl Pages {
    fn take(domain: &Rc<Domain>, bytes_max: u64) -> Result<Option<Pages>, String> {
        let arena = &domain.arena;
        let taken = arena.taken.get().saturating_add(STAGING_BYTES);
        if taken > bytes_max {
            return Ok(None);
        }
        let idle = arena.idle.borrow_mut().pop();
        let mapped = Some(idle.map_or_else(Mapped::new, Ok)?);
        arena.taken.set(taken);
        Ok(Some(Pages { domain: domain.clone(), mapped }))
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let arena = &self.domain.arena;
        arena.taken.set(arena.taken.get().saturating_sub(STAGING_BYTES));
        arena.idle.borrow_mut().extend(self.mapped.take());
    }
}

/// Private memory, unmapped with this.
struct Mapped(*mut u8);

impl Mapped {
    fn new() -> Result<Mapped, String> {
        let bytes = STAGING_BYTES as usize;
        let (access, how) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, how, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(format!("no {bytes} bytes of memory: {}", std::io::Error::last_os_error()));
        }
        // SAFETY: advice about our own mapping; refusal costs speed only.
        unsafe { libc::madvise(base, bytes, libc::MADV_HUGEPAGE) };
        Ok(Mapped(base.cast()))
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped by us, of exactly this length; the domain, whose last objects held it, is closed.
        unsafe { libc::munmap(self.0.cast(), STAGING_BYTES as usize) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device;
    use crate::library::Library;

    #[test]
    fn pages_stay_with_their_domain_and_within_the_limit() {
        let library = match Library::find() {
            Ok(library) => library,
            Err(reason) => return kvferry_transport::conformance::absent("libfabric", &reason),
        };
        let domain = Domain::open(library, device::find(library, "lo").unwrap(), false).unwrap();
        let most = 2 * STAGING_BYTES + STAGING_BYTES / 2;
        let depot = Staging::depot(&domain, most).unwrap().unwrap();
        let landing = Staging::landing(&domain, most).unwrap().unwrap();
        assert!(Staging::depot(&domain, most).unwrap().is_none(), "the limit is reached");
        assert!(depot.lend(&domain).is_some() && depot.buffer(BUFFERS).is_none());
        let (first, last) = (depot.buffer(0).unwrap(), depot.buffer(BUFFERS - 1).unwrap());
        // SAFETY: inside the depot, which nobody else uses.
        unsafe { last.add(CHUNK_BYTES - 1).write(7) };
        drop(depot);
        // SAFETY: the pages are the domain's still.
        assert_eq!(unsafe { last.add(CHUNK_BYTES - 1).read() }, 7);
        let again = Staging::depot(&domain, most).unwrap().unwrap();
        assert_eq!(again.buffer(0), Some(first), "the next link has them");
        drop((again, landing));
        assert!(domain.arena.taken.get() == 0 && domain.arena.idle.borrow().len() == 2);
    }
}
