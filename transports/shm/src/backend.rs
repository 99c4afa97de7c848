//! Host memory behind the protocol of one host.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use kvferry_core::{PoolId, PoolLayout, Program, UnitRange};
use kvferry_local::wire::MemoryKind;
use kvferry_local::{Backend, Copying, Descriptor, Owner, Shared, Sockets, Step};
use kvferry_transport::{Evidence, Grade, Pool, TransferError, TransportKind, Wait};

use crate::copy::Walk;
use crate::memory::Memory;
use crate::process::Process;

/// Why no path through memory is E5.
const NO_COUNTERS: &str = "counters, which memory has not";

/// Pools in host memory: memfds, or addresses of the owner's process.
pub(crate) struct HostMemory;

impl Backend for HostMemory {
    const KIND: TransportKind = TransportKind::Shm;
    type Carrier = Sockets;
    type Memory = Memory;
    type Copy = Walk;

    const RINGS: bool = true;

    fn bind(&mut self, pool: &Pool) -> Result<(), String> {
        pool.require_host()
    }

    fn unbind(&mut self, _: PoolId) {}

    fn share(&mut self, pool: &Pool, _: bool) -> Result<Shared, String> {
        if !pool.is_shared() {
            let bases = pool.regions().iter().map(|region| region.base() as u64).collect();
            return Ok(Shared { memory: MemoryKind::Addresses(bases), descriptors: Vec::new() });
        }
        let filled = pool.regions().iter().enumerate().filter(|(_, region)| region.bytes() > 0);
        let descriptor = |(region, _)| Box::new(RegionFd { pool: pool.clone(), region }) as Box<dyn Descriptor>;
        Ok(Shared { memory: MemoryKind::Shared, descriptors: filled.map(descriptor).collect() })
    }

    fn open(
        &mut self,
        owner: Owner<'_>,
        layout: &PoolLayout,
        memory: MemoryKind,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Memory, String> {
        match memory {
            MemoryKind::Shared => Memory::map(descriptors, &layout.regions),
            MemoryKind::Addresses(bases) if bases.len() == layout.regions.len() => {
                let regions = bases.into_iter().zip(layout.regions.iter().copied()).collect();
                let (pid, socket) =
                    owner.pid.zip(owner.socket).ok_or("its process is not visible here; share the PID namespace")?;
                Process::of_peer(&socket, pid).map(|process| Memory::Process { process, regions })
            }
            MemoryKind::Addresses(_) => Err("its addresses and its regions differ in number".into()),
            MemoryKind::Opaque(_) => Err("its memory is not the host's; run the same release on both".into()),
        }
    }

    fn reached(&self, memory: &Memory) -> Evidence {
        let (lane, how) = match memory {
            Memory::Mapped(_) => ("memfd/memory", "the peer's sealed memfds are mapped read-only here"),
            Memory::Process { .. } => ("process_vm_readv/memory", "the kernel reads the peer's process"),
        };
        let evidence = Evidence { grade: Grade::E4, ..Evidence::connected(vec![lane.to_owned()]) };
        evidence.seen(format!("{how}; the receiver copies each byte once")).unseen(NO_COUNTERS)
    }

    fn lent(&self, memory: &MemoryKind) -> Evidence {
        let (lane, how) = match memory {
            MemoryKind::Shared => ("memfd/memory", "the peer was given sealed memfds"),
            MemoryKind::Addresses(_) | MemoryKind::Opaque(_) => {
                ("process_vm_readv/memory", "the peer was told addresses of this process")
            }
        };
        let evidence = Evidence::connected(vec![lane.to_owned()]).seen(format!("{how}, which it reads by itself"));
        evidence.unseen("that it can, which only its side knows").unseen(NO_COUNTERS)
    }

    fn copy(
        &mut self,
        program: Arc<Program>,
        range: UnitRange,
        layout: Arc<PoolLayout>,
        memory: Rc<Memory>,
        pool: Pool,
    ) -> Result<Walk, TransferError> {
        Ok(Walk::new(program, range, layout, memory, pool))
    }

    fn wait(&self) -> Option<Wait> {
        Some(Wait::Busy)
    }
}

impl Copying for Walk {
    fn step(&mut self, budget: u64) -> Result<Step, TransferError> {
        let cost = if self.is_done() { 0 } else { self.advance(budget)? };
        Ok(if self.is_done() { Step::Done(cost) } else { Step::More(cost) })
    }

    fn bytes(&self) -> u64 {
        Walk::bytes(self)
    }

    fn pieces(&self) -> u64 {
        Walk::pieces(self)
    }

    fn is_running(&mut self) -> bool {
        false
    }
}

/// The memfd of one region.
struct RegionFd {
    pool: Pool,
    region: usize,
}

impl Descriptor for RegionFd {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.pool.regions().get(self.region).and_then(|region| region.fd())
    }
}
