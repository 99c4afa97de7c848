//! A peer's pool, as this process can read it.

use std::os::fd::OwnedFd;

use kvferry_core::Location;
use kvferry_local::check_sealed;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::process::Process;

/// Where a peer's bytes come from. Never writable.
#[derive(Debug)]
pub(crate) enum Memory {
    /// Its memfds, mapped here.
    Mapped(Vec<Mapping>),
    /// Addresses in its process, and the length of each region.
    Process { process: Process, regions: Vec<(u64, u64)> },
}

impl Memory {
    /// Maps descriptors that a peer sent: one for each region that is not empty.
    pub(crate) fn map(fds: Vec<OwnedFd>, regions: &[u64]) -> Result<Memory, String> {
        let filled = regions.iter().filter(|&&bytes| bytes > 0).count();
        if fds.len() != filled {
            return Err(format!("{} descriptors came for {filled} regions", fds.len()));
        }
        let mut fds = fds.into_iter();
        let map = |&bytes: &u64| match if bytes > 0 { fds.next() } else { None } {
            Some(fd) => Mapping::new(fd, bytes),
            None => Ok(Mapping::empty()),
        };
        Ok(Memory::Mapped(regions.iter().map(map).collect::<Result<_, _>>()?))
    }

    /// The address of a location here (mapped) or there (process), when the bytes lie inside their region.
    pub(crate) fn address(&self, at: Location, bytes: u64) -> Option<u64> {
        let index = usize::try_from(at.region).ok()?;
        let (base, length) = match self {
            Memory::Mapped(mappings) => mappings.get(index).map(|m| (m.base as u64, m.bytes))?,
            Memory::Process { regions, .. } => regions.get(index).copied()?,
        };
        let end = at.offset.checked_add(bytes)?;
        if end <= length { base.checked_add(at.offset) } else { None }
    }
}

/// One region of a peer, mapped read-only.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: *const u8,
    bytes: u64,
}

impl Mapping {
    fn empty() -> Mapping {
        Mapping { base: std::ptr::NonNull::<u128>::dangling().as_ptr().cast(), bytes: 0 }
    }

    /// Maps a memfd that is sealed well.
    fn new(fd: OwnedFd, bytes: u64) -> Result<Mapping, String> {
        check_sealed(&fd, bytes).map_err(|reason| format!("a region cannot be read: {reason}"))?;
        let length =
            usize::try_from(bytes).map_err(|_| format!("a region of {bytes} bytes does not fit the address space"))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice. It is only ever read through raw pointers; the seals keep its size.
        let base = unsafe {
            mmap(std::ptr::null_mut(), length, ProtFlags::READ, MapFlags::SHARED | MapFlags::NORESERVE, &fd, 0)
        }
        .map_err(|e| format!("a region of {bytes} bytes cannot be mapped: {e}"))?;
        Ok(Mapping { base: base.cast_const().cast(), bytes })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: made by `new` with this base and length; the memory owns it alone, and no copy runs once that is dropped.
            let unmapped = unsafe { munmap(self.base.cast_mut().cast(), self.bytes as usize) };
            debug_assert!(unmapped.is_ok());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

    fn memfd(bytes: u64, seals: SealFlags) -> OwnedFd {
        let fd = memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, bytes).unwrap();
        fcntl_add_seals(&fd, seals).unwrap();
        fd
    }

    #[test]
    fn only_sealed_memfds_of_the_right_size_are_mapped() {
        let all = SealFlags::FUTURE_WRITE | SealFlags::SHRINK | SealFlags::GROW;
        assert!(Memory::map(vec![memfd(8192, all)], &[0, 8192, 0]).is_ok());
        for (fd, what) in [
            (memfd(8192, SealFlags::FUTURE_WRITE | SealFlags::GROW), "lacks seals"),
            (memfd(8192, SealFlags::SHRINK | SealFlags::GROW), "lacks seals"),
            (memfd(4096, all), "4096 bytes"),
            (OwnedFd::from(std::fs::File::open("/proc/self/exe").unwrap()), "not a sealed memfd"),
        ] {
            let error = Memory::map(vec![fd], &[8192]).unwrap_err();
            assert!(error.contains(what), "{error}");
        }
        assert!(Memory::map(vec![], &[8192]).is_err());
        assert!(Memory::map(vec![memfd(1, all), memfd(1, all)], &[1]).is_err());
    }

    #[test]
    fn addresses_stay_inside_their_region() {
        let process = crate::process::tests::reused();
        let memory = Memory::Process { process, regions: vec![(1000, 10), (u64::MAX, 10)] };
        assert_eq!(memory.address(Location { region: 0, offset: 4 }, 6), Some(1004));
        assert_eq!(memory.address(Location { region: 0, offset: 4 }, 7), None);
        assert_eq!(memory.address(Location { region: 1, offset: 4 }, 1), None);
        assert_eq!(memory.address(Location { region: 2, offset: 0 }, 0), None);
        assert_eq!(memory.address(Location { region: 0, offset: u64::MAX }, 1), None);
    }
}
