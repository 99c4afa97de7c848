//! GPU memory behind the protocol of one host, or of one NVLink domain.

use std::any::Any;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use kvferry_core::{GpuIdentity, PoolId, PoolLayout, Program, UnitRange};
use kvferry_local::wire::MemoryKind;
use kvferry_local::{Backend, Owner, Shared, Sockets};
use kvferry_transport::{DeviceEvent, Evidence, Grade, Pool, TransferError, TransportKind, Wait};

use crate::copy::{Kernels, Pace};
use crate::event::GpuEvent;
use crate::launch::Launcher;
use crate::memory::GpuMemory;
use crate::paths;
use crate::planes::Planes;
use crate::shared::{Reached, reach, share};

/// So long after a launch, or a push's announcement, its end is looked for all the time; later, now and then.
const SPIN: Duration = Duration::from_millis(2);

/// The same after the last expectation or arrival, while more is expected: its doorbell is mostly close.
const EXPECT_SPIN: Duration = Duration::from_micros(500);

/// Pools on one GPU.
pub(crate) struct GpuPools {
    launcher: Rc<RefCell<Launcher>>,
    pace: Pace,
    bound: BTreeMap<PoolId, Bound>,
    /// The hosts from which this GPU's memory can be read, if there are others.
    domain: Option<String>,
}

struct Bound {
    planes: Rc<Planes>,
    /// Whether fabric handles stand for all of it.
    is_fabric: bool,
}

impl GpuPools {
    pub(crate) fn new(launcher: Launcher, pace: Pace, domain: Option<String>) -> GpuPools {
        GpuPools { launcher: Rc::new(RefCell::new(launcher)), pace, bound: BTreeMap::new(), domain }
    }
}

impl Backend for GpuPools {
    const KIND: TransportKind = TransportKind::Cuda;
    type Carrier = Sockets;
    type Memory = Reached;
    type Copy = Kernels;

    const PUSH_SPIN: Duration = SPIN;
    const EXPECT_SPIN: Duration = EXPECT_SPIN;
    const RINGS: bool = true;
    const HANDLES: bool = true;

    fn bind(&mut self, pool: &Pool) -> Result<(), String> {
        let gpu = Arc::clone(self.launcher.borrow().gpu());
        let memory = GpuMemory::of(pool).ok_or_else(|| {
            format!("its memory is not on {}; allocate it there, or use another transport", gpu.label())
        })?;
        if !Arc::ptr_eq(&memory.gpu, &gpu) {
            return Err(format!(
                "its memory is on {}, this transport is {}; open that one",
                memory.gpu.label(),
                gpu.label()
            ));
        }
        let bases: Vec<u64> = pool.device_regions().iter().map(|region| region.address).collect();
        // What cannot be shared is known now, not at the first transfer.
        share(pool, false)?;
        let beyond = self.domain.as_ref().map(|_| share(pool, true).map(drop));
        if let Some(Err(reason)) = &beyond {
            tracing::info!(pool = %pool.id(), reason, "peers of other hosts do not reach it through cuda");
        }
        let planes = Rc::new(Planes::new(&gpu, pool.layout(), &bases)?);
        self.bound.insert(pool.id(), Bound { planes, is_fabric: beyond.is_some_and(|shared| shared.is_ok()) });
        Ok(())
    }

    fn unbind(&mut self, pool: PoolId) {
        self.bound.remove(&pool);
    }

    fn share(&mut self, pool: &Pool, is_beyond: bool) -> Result<Shared, String> {
        share(pool, is_beyond)
    }

    fn domain(&self) -> Option<String> {
        self.domain.clone().filter(|_| self.bound.values().all(|bound| bound.is_fabric))
    }

    fn gpu(&self) -> Option<GpuIdentity> {
        Some(paths::identity(self.launcher.borrow().gpu()))
    }

    fn open(
        &mut self,
        owner: Owner<'_>,
        layout: &PoolLayout,
        memory: MemoryKind,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Reached, String> {
        let gpu = Arc::clone(self.launcher.borrow().gpu());
        reach(&gpu, layout, &memory, descriptors, owner.is_beyond)
    }

    fn reached(&self, memory: &Reached) -> Evidence {
        let device = self.launcher.borrow().gpu().label();
        let how = memory.how();
        let evidence = Evidence { grade: Grade::E4, ..Evidence::connected(vec![format!("cuda/{device}")]) };
        let unseen = if memory.is_beyond {
            "NVLink's counters (nvidia-smi nvlink -gt d); PCIe does not lead there"
        } else {
            "whether NVLink or PCIe carries it (nvidia-smi topo -m, nvidia-smi nvlink -gt d)"
        };
        evidence
            .seen(format!("the peer's memory is reached as {how}; kernels of the receiver's GPU read it"))
            .unseen(unseen)
    }

    fn lent(&self, _: &MemoryKind) -> Evidence {
        let device = self.launcher.borrow().gpu().label();
        let evidence = Evidence::connected(vec![format!("cuda/{device}")]);
        evidence
            .seen("the peer was given handles of this GPU's memory, which it reads by itself")
            .unseen("that it can, which only its side knows")
    }

    fn copy(
        &mut self,
        program: Arc<Program>,
        range: UnitRange,
        _: Arc<PoolLayout>,
        memory: Rc<Reached>,
        pool: Pool,
    ) -> Result<Kernels, TransferError> {
        let planes = self.bound.get(&pool.id()).map(|bound| Rc::clone(&bound.planes));
        let planes = planes.ok_or_else(|| TransferError::Refused(format!("{} is not bound here", pool.id())))?;
        Ok(Kernels::new(&self.launcher, self.pace, (program, range), memory, (pool, planes)))
    }

    fn order(&mut self, copy: &mut Kernels, after: &dyn DeviceEvent) -> Result<bool, TransferError> {
        let after: &dyn Any = after;
        after.downcast_ref::<GpuEvent>().map_or(Ok(false), |event| copy.hold_back(event).map(|()| true))
    }

    fn wait(&self) -> Option<Wait> {
        let recent = self.launcher.borrow().launched.is_some_and(|at| at.elapsed() < SPIN);
        Some(if recent { Wait::Busy } else { Wait::MustPoll })
    }
}
