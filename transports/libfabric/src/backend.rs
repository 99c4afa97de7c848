//! Registered memory behind the protocol, read by the destination.

use std::collections::BTreeMap;
use std::os::fd::{OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use kvferry_core::{End, FenceProof, PoolId, PoolLayout, Program, UnitRange};
use kvferry_local::wire::MemoryKind;
use kvferry_local::{Backend, Owner, Shared};
use kvferry_topology::{Counters, Way};
use kvferry_transport::{Evidence, Grade, LibraryName, PeerId, Pool, TransferError, TransportKind, Wait};
use libfabric_sys::FI_READ;

use crate::collecting::{Collecting, Readiness};
use crate::copy::{Fetch, Reads};
use crate::cutting::Cutting;
use crate::domain::Domain;
use crate::hmem::Reach;
use crate::memory::{Lent, Own};
use crate::messages::Messages;
use crate::packed::{Packed, Request};
use crate::packing::Packing;
use crate::reader::Reader;
use crate::serving::Serving;
use crate::slab::Slab;
use crate::wire;
use crate::words::{PROGRAM_BYTES_MAX, Word};

/// Why a peer's pool is not read over shared memory: this side would read it as the host's.
const ONE_SIDED: &str = "its memory is a GPU's, which libfabric's shared memory reads only where both sides were opened for such pools: open this side \
                         with Options::device_memory, too";

/// The pools of one device.
pub(crate) struct Fabric {
    packing: Packing,
    domain: Rc<Domain>,
    /// The well-known endpoint, through which peers read.
    name: Vec<u8>,
    /// What that endpoint may still send to peers that are gone.
    cutting: Cutting,
    bound: BTreeMap<PoolId, Rc<Own>>,
    readers: BTreeMap<PeerId, Rc<Reader>>,
    /// What peers pack for this side.
    collecting: BTreeMap<PeerId, Rc<Collecting>>,
    /// What this side packs for peers.
    serving: BTreeMap<PeerId, Serving>,
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
    /// For the well-known endpoint of that name, whose completion queue has that descriptor.
    pub(crate) fn new(
        domain: &Rc<Domain>,
        (name, queue): (&[u8], Option<RawFd>),
        emulates_reads: Option<bool>,
        counters: Counters,
        packing: Packing,
    ) -> Result<Fabric, String> {
        let scratch = Rc::new(Slab::new(domain, 1, 64, FI_READ)?);
        Ok(Fabric {
            packing,
            domain: domain.clone(),
            name: name.to_vec(),
            cutting: Cutting::of(&domain.info.provider(), queue),
            bound: BTreeMap::new(),
            readers: BTreeMap::new(),
            collecting: BTreeMap::new(),
            serving: BTreeMap::new(),
            scratch,
            emulates_reads,
            counters,
            proven: Vec::new(),
        })
    }

    /// The endpoint that reads a peer's memory, and what packs for it: opened when the first of its pools is.
    fn reader(&mut self, peer: PeerId, name: &[u8]) -> Result<(Rc<Reader>, bool), String> {
        if let Some(known) = self.readers.get(&peer) {
            return Ok((known.clone(), false));
        }
        let reader = Rc::new(Reader::open(&self.domain, name)?);
        if self.packing.collects() {
            match Collecting::ask(&self.domain, &reader, self.packing.staging_bytes_max) {
                Ok(Some(collecting)) => drop(self.collecting.insert(peer, Rc::new(collecting))),
                Ok(None) => tracing::info!(
                    limit = self.packing.staging_bytes_max,
                    "no staging is left for what a peer would pack: short pieces are read"
                ),
                Err(reason) => tracing::warn!(reason, "no staging for what a peer would pack: short pieces are read"),
            }
        }
        self.readers.insert(peer, reader.clone());
        Ok((reader, true))
    }

    /// Packs for peers, a chunk of each in turn, about so many bytes.
    fn pack(&mut self) {
        let mut left = self.packing.poll_bytes_max;
        while left > 0 {
            let mut has_packed = false;
            for serving in self.serving.values_mut() {
                let Some(bytes) = serving.pack_next() else { continue };
                has_packed = true;
                left = left.saturating_sub(bytes);
            }
            if !has_packed {
                return;
            }
        }
    }

    /// A program that is better packed, where its source packs.
    fn packed(
        &self,
        plan: (&Arc<Program>, UnitRange),
        layout: &PoolLayout,
        memory: &Lent,
        pool: &Pool,
    ) -> Option<Packed> {
        let (collecting, number) = memory.packer.as_ref().filter(|_| pool.device().is_none())?;
        let (program, range) = plan;
        if collecting.readiness() == Readiness::No || !self.packing.packs(program, range, layout, pool.layout()) {
            return None;
        }
        let mut encoded = Vec::new();
        program.encode_for(End::Source, &mut encoded);
        if encoded.len() > PROGRAM_BYTES_MAX {
            return None;
        }
        let units = program.units();
        let range = UnitRange { start: range.start.min(units), end: range.end.min(units) };
        let request = Request { pool: *number, range, program: encoded.into() };
        Some(Packed::new(collecting.clone(), request, program.clone(), pool.clone()))
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
        let reaches_devices = reader.reads_devices() || self.reach().is_some();
        let evidence = match self.packing.words().filter(|_| !reaches_devices) {
            Some(words) => evidence.seen(words),
            None => evidence,
        };
        let evidence = of_counters(of_reads(evidence, self.emulates_reads), reader.proven());
        // What this side has is told already.
        if reader.reads_devices() && self.reach().is_none() {
            return of_devices(evidence, self.domain.reach.as_ref().ok().copied());
        }
        evidence
    }

    /// How pools of this side in the memory of GPUs are reached, if there are any.
    fn reach(&self) -> Option<Reach> {
        self.bound.values().find_map(|own| own.reach())
    }

    fn evidence(&self) -> Evidence {
        let (info, library) = (&self.domain.info, self.domain.library);
        let lane = format!("{}/{}", info.provider(), info.domain());
        let library = LibraryName { path: library.path.clone(), version: library.version.to_string() };
        let evidence = Evidence { library: Some(library), ..Evidence::connected(vec![lane]) };
        match self.reach() {
            Some(reach) => of_devices(evidence, Some(reach)),
            None => evidence,
        }
    }
}

impl Backend for Fabric {
    const KIND: TransportKind = TransportKind::Libfabric;
    type Carrier = Messages;
    type Memory = Lent;
    type Copy = Fetch;

    // Shared memory of libfabric's reads what is at an address under any key, also one that was withdrawn.
    const CHECKS: bool = true;
    // An endpoint and its connection.
    const OFFERS: bool = true;
    const SPEAKS: bool = true;
    // A read that was begun is answered from memory whose registration is closed meanwhile.
    const OUTLASTS: bool = true;
    const SEVERED: FenceProof = FenceProof::EndpointDestroyed;

    fn bind(&mut self, pool: &Pool) -> Result<(), String> {
        self.bound.insert(pool.id(), Rc::new(Own::new(&self.domain, pool)?));
        Ok(())
    }

    fn unbind(&mut self, pool: PoolId) {
        if let Some(own) = self.bound.remove(&pool) {
            self.serving.values_mut().for_each(|serving| serving.unbound(own.number));
        }
    }

    fn share(&mut self, pool: &Pool, _: bool) -> Result<Shared, String> {
        let own = self.bound.get(&pool.id()).ok_or_else(|| format!("{} is not bound there", pool.id()))?;
        let memory = own.lend(&self.domain, &self.name).seal();
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
        if memory.is_on_device && self.domain.reach.is_err() && self.domain.info.provider() == "shm" {
            return Err(ONE_SIDED.to_owned());
        }
        let peer = owner.peer.ok_or("nobody owns it")?;
        let (reader, is_new) = self.reader(peer, &memory.name)?;
        if memory.is_on_device {
            reader.note_device();
        }
        let lent = Lent::new(reader.clone(), self.collecting.get(&peer).cloned(), &memory, layout)?;
        if is_new && let Some(byte) = lent.any_byte() {
            reader.warm(byte, &self.scratch);
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
    ) -> Result<Fetch, TransferError> {
        let own = self.bound.get(&pool.id()).cloned();
        let own = own.ok_or_else(|| TransferError::Refused(format!("{} is not bound here", pool.id())))?;
        let most = (self.domain.info.message_bytes_max(), self.domain.info.pieces_max());
        let packed = self.packed((&program, range), &layout, &memory, &pool);
        Ok(Fetch::new(Reads::new((program, range), layout, memory, (pool, own), most), packed))
    }

    fn sever(&mut self, peer: PeerId) {
        if let Some(reader) = self.readers.remove(&peer) {
            reader.cut();
        }
        self.collecting.remove(&peer);
        self.serving.remove(&peer);
    }

    fn rests(&mut self, peer: PeerId) -> bool {
        self.readers.get(&peer).is_none_or(|reader| reader.rests())
    }

    fn cut(&mut self) {
        self.cutting.begin(Instant::now());
    }

    fn is_cutting(&self) -> bool {
        self.cutting.is_under_way()
    }

    fn tend(&mut self) -> bool {
        self.cutting.go_on(Instant::now());
        let is_warming = self.readers.values().filter(|reader| reader.tend()).count() > 0;
        self.collecting.values().for_each(|collecting| collecting.progress());
        self.pack();
        self.prove(Instant::now()) || is_warming || self.cutting.is_under_way()
    }

    fn broken(&mut self) -> Vec<(PeerId, String)> {
        self.readers.iter().filter_map(|(peer, reader)| Some((*peer, reader.broke()?))).collect()
    }

    fn hear(&mut self, peer: PeerId, words: &[u8]) -> Result<(), String> {
        let word = Word::decode(words)?;
        match word {
            Word::Ask if self.packing.serves() => {
                self.serving.entry(peer).or_default().ask(&self.domain, self.packing.staging_bytes_max)
            }
            Word::Ask => self.serving.entry(peer).or_default().decline(),
            Word::Pack(pack) => {
                let own = self.bound.values().find(|own| own.number == pack.pool);
                self.serving.entry(peer).or_default().pack(pack, own.map(|own| &own.pool))
            }
            Word::Back { buffers } => self.serving.entry(peer).or_default().take_back(buffers),
            Word::Stop { serial } => {
                if let Some(serving) = self.serving.get_mut(&peer) {
                    serving.stop(serial);
                }
                Ok(())
            }
            Word::Staged(_) | Word::Parcel(_) | Word::Refused { .. } => match self.collecting.get(&peer) {
                Some(collecting) => collecting.hear(word),
                None => Err("it speaks of packed chunks that nobody asked for".to_owned()),
            },
        }
    }

    fn say(&mut self) -> Vec<(PeerId, Bytes)> {
        let mut said = Vec::new();
        let mut add = |peer: PeerId, words: Vec<Word>| said.extend(words.iter().map(|word| (peer, word.encode())));
        self.serving.iter_mut().for_each(|(peer, serving)| add(*peer, serving.take_said()));
        self.collecting.iter().for_each(|(peer, collecting)| add(*peer, collecting.take_said()));
        said
    }

    fn is_busy(&self) -> bool {
        self.serving.values().any(Serving::can_pack)
    }

    fn wait(&self) -> Option<Wait> {
        // Nothing tells when the library takes more.
        self.readers.values().any(|reader| reader.is_refused()).then_some(Wait::MustPoll)
    }
}

/// What is known of pools in the memory of GPUs, at either end.
fn of_devices(evidence: Evidence, reach: Option<Reach>) -> Evidence {
    match reach {
        Some(Reach::Copied) => Evidence { staged: true, ..evidence }
            .seen("GPU memory is copied through shared memory by CUDA's driver, on the threads that poll libfabric"),
        Some(Reach::Direct) => evidence
            .seen("GPU memory is registered with the NIC; copies through host memory are forbidden to the provider (FI_OPT_FI_HMEM_P2P)"),
        None => evidence.seen("the peer registered GPU memory with its NIC"),
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
