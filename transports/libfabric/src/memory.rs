//! Pools: our own, registered; peers', with what it takes to read them.

use std::rc::Rc;

use kvferry_core::{Location, PoolLayout};
use kvferry_transport::Pool;
use kvferry_transport::codec::random;
use libfabric_sys::{FI_READ, FI_REMOTE_READ};

use crate::collecting::Collecting;
use crate::domain::{Domain, Registered};
use crate::reader::{Reader, Source};
use crate::wire;

/// A pool of our own: what its regions are registered as; nothing where there are no bytes.
pub(crate) struct Own {
    pub(crate) pool: Pool,
    /// By which peers name it where they ask for packed chunks.
    pub(crate) number: u64,
    regions: Vec<Option<Rc<Registered<Pool>>>>,
}

impl Own {
    /// Registers every region that has bytes: to be read by peers, and to read into.
    pub(crate) fn new(domain: &Rc<Domain>, pool: &Pool) -> Result<Own, String> {
        let register = |base: *mut u8, bytes: u64| {
            if bytes == 0 {
                return Ok(None);
            }
            let bytes = usize::try_from(bytes).map_err(|_| "a region is larger than the address space".to_owned())?;
            Registered::new(domain, base, bytes, FI_READ | FI_REMOTE_READ, pool.clone())
                .map(|region| Some(Rc::new(region)))
        };
        let regions = pool.regions().iter().map(|region| register(region.base(), region.bytes()));
        let regions = regions.collect::<Result<_, String>>()?;
        let drawn = random::<8>().map_err(|error| format!("no random number could be drawn: {error}"))?;
        Ok(Own { pool: pool.clone(), number: u64::from_le_bytes(drawn), regions })
    }

    /// What peers need to read it through the endpoint of that name.
    pub(crate) fn lend(&self, domain: &Domain, name: &[u8]) -> wire::Memory {
        let regions = self.pool.regions().iter().zip(&self.regions).map(|(region, registered)| {
            let base = if domain.mode.addresses { region.base() as u64 } else { 0 };
            registered.as_ref().map_or((0, 0), |registered| (base, registered.key()))
        });
        wire::Memory { name: name.to_vec(), number: self.number, regions: regions.collect() }
    }

    /// The registration of one region.
    pub(crate) fn region(&self, region: u32) -> Option<&Rc<Registered<Pool>>> {
        self.regions.get(region as usize)?.as_ref()
    }
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
            None => Ok(Lent { reader, packer: collecting.map(|collecting| (collecting, memory.number)), regions }),
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
            let memory = wire::Memory { name: vec![1], number: 2, regions };
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
