//! Finds the GPUs of this host, and opens them.

use std::net::{IpAddr, TcpListener};
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use kvferry_core::{PoolId, PoolLayout};
use kvferry_local::host;
use kvferry_transport::{Device, NicInfo, OpenError, Options, Pool, PoolError, Provider, Transport, TransportKind};

use crate::allocation::Allocate;
use crate::backend::GpuPools;
use crate::copy::Pace;
use crate::domain;
use crate::driver::release;
use crate::gpu::{Gpu, find, label};
use crate::launch::Launcher;
use crate::memory::allocate;
use crate::paths;

/// Opens GPUs: `gpu0` is the first that this process may use (`CUDA_VISIBLE_DEVICES`). Where it is in an NVLink domain of several hosts, and makes
/// fabric handles, peers of the others come in at the address from which this host reaches others, or at the one that is named: `gpu0@10.0.0.3`.
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
}

/// A device's name, read: `gpu0`, or `gpu0@10.0.0.3` with the address of this host at which peers of other hosts come in.
struct Named {
    ordinal: u32,
    ip: Option<IpAddr>,
}

impl Named {
    fn of(device: &Device) -> Option<Named> {
        let (gpu, ip) = match device.name.split_once('@') {
            Some((gpu, ip)) => (gpu, Some(ip.parse().ok()?)),
            None => (device.name.as_str(), None),
        };
        let ordinal = gpu.strip_prefix("gpu")?.parse().ok()?;
        (device.kind == TransportKind::Cuda && label(ordinal) == gpu).then_some(Named { ordinal, ip })
    }

    /// The domain of hosts in which a GPU is, and the address for them. An error says why it is for its own host only.
    fn beyond(&self, gpu: &Gpu) -> Result<(String, IpAddr), String> {
        let domain = domain::of(gpu)?;
        Ok((domain, self.ip.map_or_else(domain::own_address, Ok)?))
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

    /// Also one with the address at which peers of other hosts come in; in no list.
    fn named(&self, name: &str) -> Option<Device> {
        let device = Device { kind: TransportKind::Cuda, name: name.to_owned(), unavailable: None };
        let named = Named::of(&device)?;
        let listed = self.discover().into_iter().find(|device| device.name == label(named.ordinal))?;
        let refused = |ip: IpAddr| match TcpListener::bind((ip, 0)) {
            Ok(_) if ip.is_unspecified() => Some("peers cannot connect to it; name a concrete address".to_owned()),
            Ok(_) => None,
            Err(error) => Some(format!("this host does not listen on {ip}: {error}")),
        };
        let unavailable = listed.unavailable.or_else(|| named.ip.and_then(refused));
        Some(Device { unavailable, ..device })
    }

    fn allocate(&self, device: &Device, id: PoolId, layout: PoolLayout, _: &str) -> Result<Pool, PoolError> {
        let unknown = || PoolError::Device { device: device.name.clone(), reason: UNKNOWN.to_owned() };
        allocate(Named::of(device).ok_or_else(unknown)?.ordinal, id, layout, self.allocate)
    }

    fn open(&self, device: &Device, options: &Options) -> Result<Box<dyn Transport>, OpenError> {
        let unavailable = |reason: String| OpenError::Unavailable { device: device.name.clone(), reason };
        let named = Named::of(device).ok_or_else(|| unavailable(UNKNOWN.to_owned()))?;
        let host = host().map_err(unavailable)?;
        let gpu = Gpu::open(named.ordinal).map_err(unavailable)?;
        let beyond = named.beyond(&gpu);
        let reached = match &beyond {
            Ok((domain, ip)) => format!("reached at {ip} from all of NVLink domain {domain}"),
            // Whoever names an address counts on it.
            Err(reason) if named.ip.is_some() => {
                return Err(unavailable(format!("peers of other hosts do not reach it: {reason}")));
            }
            Err(reason) => format!("for peers of this host ({reason})"),
        };
        let version = release(gpu.driver_version);
        let uuid: String = gpu.uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        let library = format!(
            "libcuda, CUDA {version}, {} {uuid}; {}; {}; {reached}",
            gpu.name,
            gpu.sharing(),
            paths::describe(&gpu)
        );
        let standby = Duration::from_micros(options.standby_us.min(STANDBY_US_MAX).into());
        let launcher = Launcher::new(&gpu, options.thread_blocks, standby, self.timed).map_err(unavailable)?;
        let info = NicInfo {
            kind: TransportKind::Cuda,
            device: gpu.label(),
            host,
            library: Some(library),
            bits_per_second: None,
        };
        let pace = if self.by_turns { Pace::Turn } else { Pace::Whole };
        let pools = |domain| GpuPools::new(launcher, pace, domain);
        Ok(Box::new(match beyond {
            Ok((domain, ip)) => kvferry_local::open_beyond(pools(Some(domain)), info, options, ip)?,
            Err(_) => kvferry_local::open(pools(None), info, options)?,
        }))
    }
}

/// Kernels that stand by hold up whoever waits for the GPU.
const STANDBY_US_MAX: u32 = 100_000;

const UNKNOWN: &str = "GPUs are called gpu0, gpu1 and so on; gpu0@10.0.0.3 is found at that address from other hosts of its NVLink domain";
