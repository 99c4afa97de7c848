//! Registered memory behind the protocol, read by the destination.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use kvferry_core::{FenceProof, PoolId, PoolLayout, Program, UnitRange};
use kvferry_local::wire::MemoryKind;
use kvferry_local::{Backend, Owner, Shared};
use kvferry_topology::{Counters, Way};
use kvferry_transport::{Evidence, Grade, LibraryName, PeerId, Pool, TransferError, TransportKind, Wait};
use libfabric_sys::FI_READ;

use crate::copy::Reads;
use crate::domain::Domain;
use crate::memory::{Lent, Own};
use crate::messages::Messages;
use crate::reader::Reader;
use crate::slab::Slab;
use crate::wire;

/// The pools of one device.
pub(crate) struct Fabric {
    domain: Rc<Domain>,
    /// The well-known endpoint, through which peers read.
    name: Vec<u8>,
    bound: BTreeMap<PoolId, Rc<Own>>,
    readers: BTreeMap<PeerId, Rc<Reader>>,
    /// Where bytes go that nobody needs.
    scratch: Rc<Slab>,
    /// Whether the provider emulates reads, where it tells.
    emulates_reads: Option<bool>,
    /// The port's, where there is one.
    counters: Counters,
    /// Of whom they have shown that they were read from, since it was last asked.
    proven: Vec<PeerId>,
}

impl Fabric {
    pub(crate) fn new(
        domain: &Rc<Domain>,
        name: &[u8],
        emulates_reads: Option<bool>,
        counters: Counters,
    ) -> Result<Fabric, String> {
        let scratch = Rc::new(Slab::new(domain, 1, 64, FI_READ)?);
        let (bound, readers) = (BTreeMap::new(), BTreeMap::new());
        let (domain, name, proven) = (domain.clone(), name.to_vec(), Vec::new());
        Ok(Fabric { domain, name, bound, readers, scratch, emulates_reads, counters, proven })
    }

    /// Whether the device's counters are worth another look soon.
    fn prove(&mut self, now: Instant) -> bool {
        for reader in self.readers.values() {
            let moved = reader.take_moved();
            if moved > 0 && !reader.is_proven() {
                self.counters.note(Way::Read, moved, now);
            }
        }
        if self.counters.look(now) && self.counters.covers(Way::Read) {
            let words = || self.counters.words(Way::Read);
            self.proven.extend(self.readers.iter().filter(|(_, reader)| reader.prove(words)).map(|(peer, _)| *peer));
        }
        self.counters.due().is_some()
    }

    fn of(&self, reader: &Reader) -> Evidence {
        let evidence = self.evidence().seen("the receiver reads the peer's registered memory");
        of_counters(of_reads(evidence, self.emulates_reads), reader.proven())
    }

    fn evidence(&self) -> Evidence {
        let (info, library) = (&self.domain.info, self.domain.library);
        let lane = format!("{}/{}", info.provider(), info.domain());
        let library = LibraryName { path: library.path.clone(), version: library.version.to_string() };
        Evidence { library: Some(library), ..Evidence::connected(vec![lane]) }
    }
}

impl Backend for Fabric {
    const KIND: TransportKind = TransportKind::Libfabric;
    type Carrier = Messages;
    type Memory = Lent;
    type Copy = Reads;

    // Shared memory of libfabric's reads what is at an address under any key, also one that was withdrawn.
    const CHECKS: bool = true;
    // An endpoint and its connection.
    const OFFERS: bool = true;
    const SEVERED: FenceProof = FenceProof::EndpointDestroyed;

    fn bind(&mut self, pool: &Pool) -> Result<(), String> {
        pool.require_host()?;
        self.bound.insert(pool.id(), Rc::new(Own::new(&self.domain, pool)?));
        Ok(())
    }

    fn unbind(&mut self, pool: PoolId) {
        self.bound.remove(&pool);
    }

    fn share(&mut self, pool: &Pool, _: bool) -> Result<Shared, String> {
        let own = self.bound.get(&pool.id()).ok_or_else(|| format!("{} is not bound there", pool.id()))?;
        let memory = own.lend(&self.domain, pool, &self.name).seal();
        Ok(Shared { memory: MemoryKind::Opaque(memory), descriptors: Vec::new() })
    }

    fn open(
        &mut self,
        owner: Owner<'_>,
        layout: &PoolLayout,
        memory: MemoryKind,
        _: Vec<OwnedFd>,
    ) -> Result<Lent, String> {
        let MemoryKind::Opaque(memory) = memory else {
            return Err("its memory is not registered with libfabric; run the same release on both".to_owned());
        };
        let memory = wire::Memory::open(&memory, layout.regions.len())?;
        let peer = owner.peer.ok_or("nobody owns it")?;
        let known = self.readers.get(&peer).cloned();
        let reader = known.clone().map_or_else(|| Reader::open(&self.domain, &memory.name).map(Rc::new), Ok)?;
        let lent = Lent::new(reader.clone(), &memory, layout)?;
        if known.is_none() {
            if let Some(byte) = lent.any_byte() {
                reader.warm(byte, &self.scratch);
            }
            self.readers.insert(peer, reader);
        }
        Ok(lent)
    }

    fn reached(&self, memory: &Lent) -> Evidence {
        self.of(&memory.reader)
    }

    fn shown(&mut self) -> Vec<(PeerId, Evidence)> {
        let proven = std::mem::take(&mut self.proven);
        proven.into_iter().filter_map(|peer| Some((peer, self.of(self.readers.get(&peer)?)))).collect()
    }

    fn lent(&self, _: &MemoryKind) -> Evidence {
        self.evidence()
            .seen("the peer was given keys of this side's registered memory, which it reads by itself")
            .unseen("that it can, which only its side knows")
    }

    fn copy(
        &mut self,
        program: Arc<Program>,
        range: UnitRange,
        layout: Arc<PoolLayout>,
        memory: Rc<Lent>,
        pool: Pool,
    ) -> Result<Reads, TransferError> {
        let own = self.bound.get(&pool.id()).cloned();
        let own = own.ok_or_else(|| TransferError::Refused(format!("{} is not bound here", pool.id())))?;
        let most = (self.domain.info.message_bytes_max(), self.domain.info.pieces_max());
        Ok(Reads::new((program, range), layout, memory, (pool, own), most))
    }

    fn sever(&mut self, peer: PeerId) {
        if let Some(reader) = self.readers.remove(&peer) {
            reader.cut();
        }
    }

    fn tend(&mut self) -> bool {
        let is_warming = self.readers.values().filter(|reader| reader.tend()).count() > 0;
        self.prove(Instant::now()) || is_warming
    }

    fn broken(&mut self) -> Vec<(PeerId, String)> {
        self.readers.iter().filter_map(|(peer, reader)| Some((*peer, reader.broke()?))).collect()
    }

    fn wait(&self) -> Option<Wait> {
        // Nothing tells when the library takes more.
        self.readers.values().any(|reader| reader.is_refused()).then_some(Wait::MustPoll)
    }
}

/// What is known of who does the reading. Only EFA's provider tells.
fn of_reads(evidence: Evidence, emulates_reads: Option<bool>) -> Evidence {
    match emulates_reads {
        Some(false) => {
            Evidence { grade: Grade::E4, ..evidence }.seen("the device reads (FI_OPT_EFA_EMULATED_READ is 0)")
        }
        Some(true) => Evidence { emulated: true, ..evidence }
            .unseen("reads by the device, which has none: the provider emulates them by messages"),
        None => evidence.unseen("that a device does so without a processor, which this provider does not tell"),
    }
}

/// What the device's counters add to that: the last grade where the device reads by itself.
fn of_counters(evidence: Evidence, proven: Option<String>) -> Evidence {
    match proven {
        Some(counted) if evidence.grade == Grade::E4 => Evidence { grade: Grade::E5, ..evidence }.seen(counted),
        Some(counted) => evidence.seen(counted),
        None => evidence.unseen("counters of a device"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_device_that_reads_by_itself_is_zero_copy() {
        let of = |emulates_reads| {
            let evidence = of_reads(Evidence::connected(vec!["efa/rdmap40s0-rdm".to_owned()]), emulates_reads);
            (evidence.grade, evidence.emulated, evidence.unseen.len())
        };
        assert_eq!(of(Some(false)), (Grade::E4, false, 0));
        assert_eq!(of(Some(true)), (Grade::E3, true, 1));
        assert_eq!(of(None), (Grade::E3, false, 1));
    }

    #[test]
    fn counters_prove_the_reads_of_a_device_only() {
        let of = |emulates_reads, proven: Option<&str>| {
            let evidence = of_reads(Evidence::connected(vec!["efa/rdmap40s0-rdm".to_owned()]), emulates_reads);
            of_counters(evidence, proven.map(str::to_owned)).grade
        };
        assert_eq!(of(Some(false), Some("rdma_read_bytes +1 for 1 bytes moved")), Grade::E5);
        assert_eq!(of(Some(false), None), Grade::E4);
        assert_eq!(of(Some(true), Some("rdma_read_bytes +1 for 1 bytes moved")), Grade::E3);
    }
}
