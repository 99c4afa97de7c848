//! Pools: our own, registered; peers', with what it takes to read them.

use std::rc::Rc;

use kvferry_core::{Location, PoolLayout};
use kvferry_transport::codec::random;
use kvferry_transport::{DeviceMemory, DeviceRegion, Pool, TransferError};
use libfabric_sys::{FI_READ, FI_REMOTE_READ};

use crate::collecting::Collecting;
use crate::domain::{Domain, Registered};
use crate::hmem::{self, Reach};
use crate::reader::{Reader, Source};
use crate::wire;

/// A pool of our own, registered.
pub(crate) struct Own {
    pub(crate) pool: Pool,
    /// By which peers name it where they ask for packed chunks.
    pub(crate) number: u64,
    regions: Vec<Region>,
    /// How a GPU's memory is reached, where it is that.
    reach: Option<Reach>,
}

/// A region of a pool of our own. What it lies in the processor may not reach.
struct Region {
    base: *mut u8,
    bytes: u64,
    /// None where there are no bytes.
    registered: Option<Rc<Registered<Pool>>>,
}

const ACCESS: u32 = FI_READ | FI_REMOTE_READ;

impl Own {
    /// Registers every region that has bytes: to be read by peers, and to read into.
    pub(crate) fn new(domain: &Rc<Domain>, pool: &Pool) -> Result<Own, String> {
        if let Some(memory) = pool.device() {
            let refused = |why: String| hmem::refusal(domain, memory.device(), &why);
            let reach = domain.reach.clone().map_err(refused)?;
            return Own::on_device(domain, pool, memory.as_ref(), reach).map_err(refused);
        }
        let register = |base: *mut u8, bytes: u64| Registered::new(domain, base, length(bytes)?, ACCESS, pool.clone());
        Own::of(pool, None, pool.regions().iter().map(|region| (region.base(), region.bytes())), register)
    }

    fn on_device(domain: &Rc<Domain>, pool: &Pool, memory: &dyn DeviceMemory, reach: Reach) -> Result<Own, String> {
        let device = memory.cuda_device()?;
        memory.settles(reach.writer())?;
        if reach == Reach::Copied {
            tracing::warn!(
                gpu = memory.device(),
                "libfabric's shared memory moves GPU memory one read after the other, by copies of CUDA's driver: cuda is faster by far"
            );
        }
        let register = |base: *mut u8, bytes: u64| {
            let region = DeviceRegion { address: base as u64, bytes };
            let place = (region.address, length(bytes)?);
            let by = |dmabuf| Registered::on_device(domain, place, (device, dmabuf), ACCESS, pool.clone());
            let by_dmabuf = if reach.takes_dmabuf(domain.library) {
                memory.dmabuf(region).and_then(|dmabuf| by(Some(dmabuf)))
            } else {
                Err("not tried".to_owned())
            };
            by_dmabuf.or_else(|dmabuf| {
                by(None).map_err(|address| {
                    format!("it cannot register {bytes} bytes, by address: {address}; by dma-buf: {dmabuf}")
                })
            })
        };
        let regions = pool.device_regions().iter();
        let regions = regions.map(|region| (std::ptr::without_provenance_mut(region.address as usize), region.bytes));
        Own::of(pool, Some(reach), regions, register)
    }

    fn of(
        pool: &Pool,
        reach: Option<Reach>,
        regions: impl Iterator<Item = (*mut u8, u64)>,
        register: impl Fn(*mut u8, u64) -> Result<Registered<Pool>, String>,
    ) -> Result<Own, String> {
        let regions = regions.map(|(base, bytes)| {
            let registered = if bytes == 0 { None } else { Some(Rc::new(register(base, bytes)?)) };
            Ok(Region { base, bytes, registered })
        });
        let regions = regions.collect::<Result<_, String>>()?;
        let drawn = random::<8>().map_err(|error| format!("no random number could be drawn: {error}"))?;
        Ok(Own { pool: pool.clone(), number: u64::from_le_bytes(drawn), regions, reach })
    }

    /// What peers need to read it through the endpoint of that name.
    pub(crate) fn lend(&self, domain: &Domain, name: &[u8]) -> wire::Memory {
        let regions = self.regions.iter().map(|region| {
            let base = if domain.mode.addresses { region.base as u64 } else { 0 };
            region.registered.as_ref().map_or((0, 0), |registered| (base, registered.key()))
        });
        let is_on_device = self.reach.is_some();
        wire::Memory { name: name.to_vec(), number: self.number, regions: regions.collect(), is_on_device }
    }

    /// Where `bytes` bytes lie that are inside one region, for the library only: the processor may not reach them. And what they are registered as.
    pub(crate) fn place(&self, at: Location, bytes: u64) -> Option<(*mut u8, &Rc<Registered<Pool>>)> {
        let region = self.regions.get(at.region as usize)?;
        let end = at.offset.checked_add(bytes)?;
        let inside = (end <= region.bytes).then(|| region.base.wrapping_add(at.offset as usize));
        inside.zip(region.registered.as_ref())
    }

    /// How a GPU's memory is reached, where it is that.
    pub(crate) fn reach(&self) -> Option<Reach> {
        self.reach
    }

    /// Makes what was read into it visible to a GPU's kernels, where it is in such memory.
    pub(crate) fn settle(&self) -> Result<(), TransferError> {
        let Some((memory, reach)) = self.pool.device().zip(self.reach) else { return Ok(()) };
        let context = "making visible to kernels what was read into the GPU's memory";
        memory.settle(reach.writer()).map_err(|message| TransferError::Io { context, message })
    }
}

fn length(bytes: u64) -> Result<usize, String> {
    usize::try_from(bytes).map_err(|_| "a region is larger than the address space".to_owned())
}

/// A peer's pool.
pub(crate) struct Lent {
    pub(crate) reader: Rc<Reader>,
    /// What packs short pieces of it, if anything does, and the number that it is asked for by.
    pub(crate) packer: Option<(Rc<Collecting>, u64)>,
    /// Of each region: its first byte, its key, its bytes as its layout says.
    regions: Vec<(u64, u64, u64)>,
}

impl Lent {
    /// As a peer describes it; its layout is valid.
    pub(crate) fn new(
        reader: Rc<Reader>,
        collecting: Option<Rc<Collecting>>,
        memory: &wire::Memory,
        layout: &PoolLayout,
    ) -> Result<Lent, String> {
        let regions: Vec<(u64, u64, u64)> =
            memory.regions.iter().zip(&layout.regions).map(|(&(base, key), &bytes)| (base, key, bytes)).collect();
        match regions.iter().position(|(base, _, bytes)| base.checked_add(*bytes).is_none()) {
            Some(region) => Err(format!("region {region} reaches beyond the address space")),
            None => {
                // No processor packs out of a GPU's memory.
                let collecting = collecting.filter(|_| !memory.is_on_device);
                let packer = collecting.map(|collecting| (collecting, memory.number));
                Ok(Lent { reader, packer, regions })
            }
        }
    }

    /// Any byte of it, if it has one.
    pub(crate) fn any_byte(&self) -> Option<Source> {
        let (address, key, _) = *self.regions.iter().find(|(.., bytes)| *bytes > 0)?;
        Some(Source { address, key, bytes: 1 })
    }

    /// Where bytes lie that are inside one region.
    pub(crate) fn source(&self, at: Location, bytes: usize) -> Option<Source> {
        let (base, key, length) = *self.regions.get(at.region as usize)?;
        let end = at.offset.checked_add(bytes as u64)?;
        (end <= length).then_some(Source { address: base.wrapping_add(at.offset), key, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_outside_a_region_is_asked_for() {
        let lent = |regions: Vec<(u64, u64)>, bytes: Vec<u64>| {
            let memory = wire::Memory { name: vec![1], number: 2, regions, is_on_device: false };
            let layout = PoolLayout { regions: bytes, planes: vec![] };
            Lent::new(Rc::new(Reader::closed()), None, &memory, &layout)
        };
        let pool = lent(vec![(4096, 7), (0, 0)], vec![100, 0]).unwrap();
        let at = |region, offset| Location { region, offset };
        let source = pool.source(at(0, 60), 40).unwrap();
        assert_eq!((source.address, source.key, source.bytes), (4156, 7, 40));
        for (at, bytes) in [(at(0, 61), 40), (at(0, u64::MAX), 2), (at(1, 0), 1), (at(2, 0), 0)] {
            assert!(pool.source(at, bytes).is_none(), "{at:?}");
        }
        assert!(lent(vec![(u64::MAX, 7)], vec![100]).is_err());
        let byte = lent(vec![(0, 0), (64, 9)], vec![0, 5]).unwrap().any_byte().unwrap();
        assert_eq!((byte.address, byte.key, byte.bytes), (64, 9, 1));
    }
}
