//! Finds the GPUs of this host, and opens them.

use std::sync::atomic::AtomicU64;

use kvferry_core::{PoolId, PoolLayout};
use kvferry_local::host;
use kvferry_transport::{Device, NicInfo, OpenError, Options, Pool, PoolError, Provider, Transport, TransportKind};

use crate::allocation::Allocate;
use crate::backend::GpuPools;
use crate::copy::Pace;
use crate::gpu::{Gpu, find, label};
use crate::launch::Launcher;
use crate::memory::allocate;
use crate::paths;

/// Opens GPUs: `gpu0` is the first that this process may use (`CUDA_VISIBLE_DEVICES`).
#[derive(Clone, Copy, Debug, Default)]
pub struct CudaProvider {
    allocate: Allocate,
    by_turns: bool,
    timed: Option<&'static AtomicU64>,
}

impl CudaProvider {
    /// How pools are allocated.
    pub fn with_memory(self, allocate: Allocate) -> CudaProvider {
        CudaProvider { allocate, ..self }
    }

    /// Has every launch move no more than [`Options::poll_bytes_max`], as transports do that copy by the processor: large transfers are then
    /// seen under way.
    pub fn by_turns(self) -> CudaProvider {
        CudaProvider { by_turns: true, ..self }
    }

    /// Has CUDA events taken around every launch, and the time between them, in nanoseconds, added to `total` before its transfer ends. The
    /// events cost every launch a few microseconds.
    pub fn timed(self, total: &'static AtomicU64) -> CudaProvider {
        CudaProvider { timed: Some(total), ..self }
    }

    fn ordinal(device: &Device) -> Option<u32> {
        let number = device.name.strip_prefix("gpu")?.parse().ok()?;
        (device.kind == TransportKind::Cuda && label(number) == device.name).then_some(number)
    }
}

impl Provider for CudaProvider {
    fn kind(&self) -> TransportKind {
        TransportKind::Cuda
    }

    fn discover(&self) -> Vec<Device> {
        let device = |ordinal, unavailable| Device { kind: TransportKind::Cuda, name: label(ordinal), unavailable };
        let none = |reason| vec![device(0, Some(reason))];
        match host().and_then(|_| find()) {
            Ok(found) if found.is_empty() => none("no GPU is visible here; see CUDA_VISIBLE_DEVICES".to_owned()),
            Ok(found) => found.into_iter().map(|gpu| device(gpu.ordinal, gpu.unavailable)).collect(),
            Err(reason) => none(reason),
        }
    }

    fn allocate(&self, device: &Device, id: PoolId, layout: PoolLayout, _: &str) -> Result<Pool, PoolError> {
        let unknown = || PoolError::Device { device: device.name.clone(), reason: UNKNOWN.to_owned() };
        allocate(CudaProvider::ordinal(device).ok_or_else(unknown)?, id, layout, self.allocate)
    }

    fn open(&self, device: &Device, options: &Options) -> Result<Box<dyn Transport>, OpenError> {
        let unavailable = |reason: String| OpenError::Unavailable { device: device.name.clone(), reason };
        let ordinal = CudaProvider::ordinal(device).ok_or_else(|| unavailable(UNKNOWN.to_owned()))?;
        let host = host().map_err(unavailable)?;
        let gpu = Gpu::open(ordinal).map_err(unavailable)?;
        let version = gpu.driver_version;
        let uuid: String = gpu.uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        let library = format!(
            "libcuda, CUDA {}.{}, {} {uuid}; {}; {}",
            version / 1000,
            version % 1000 / 10,
            gpu.name,
            gpu.sharing(),
            paths::describe(&gpu)
        );
        let launcher = Launcher::new(&gpu, options.thread_blocks, self.timed).map_err(unavailable)?;
        let info = NicInfo {
            kind: TransportKind::Cuda,
            device: gpu.label(),
            host,
            library: Some(library),
            bits_per_second: None,
        };
        let pace = if self.by_turns { Pace::Turn } else { Pace::Whole };
        Ok(Box::new(kvferry_local::open(GpuPools::new(launcher, pace), info, options)?))
    }
}

const UNKNOWN: &str = "GPUs are called gpu0, gpu1 and so on";
