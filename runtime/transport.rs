//! Which transports this build has, and how to open them.

use kvferry_actors::OpenNic;
use kvferry_core::{PoolId, PoolLayout, TransportKind};
pub use kvferry_transport::Provider;
pub use kvferry_transport::{Device, NicInfo, OpenError, Options, Transport};
use kvferry_transport::{Pool, PoolError};
use thiserror::Error;

/// What only GPUs have: pools over memory that a serving stack owns, and events of its streams.
pub mod cuda {
    pub use kvferry_cuda::{Allocate, GpuEvent, from_raw};
}

/// Every provider of this build, in order of preference.
pub fn providers() -> Vec<Box<dyn Provider>> {
    vec![
        Box::new(kvferry_shm::ShmProvider),
        Box::new(kvferry_ucx::UcxProvider::new()),
        Box::new(kvferry_libfabric::LibfabricProvider::new()),
        Box::new(kvferry_tcp::TcpProvider::default()),
        Box::new(kvferry_cuda::CudaProvider::default()),
    ]
}

/// Why no NIC can be opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SelectError {
    /// This build or host has no such transport.
    #[error("no {kind} device can be used: {reason}")]
    NoDevice {
        /// Which transport.
        kind: TransportKind,
        /// Why not.
        reason: String,
    },
    /// A device was named that is not there.
    #[error("there is no {kind} device {name:?}; there are {known}")]
    UnknownDevice {
        /// Which transport.
        kind: TransportKind,
        /// What was named.
        name: String,
        /// What is there.
        known: String,
    },
}

/// Why no pool was made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AllocateError {
    /// There is no such device.
    #[error(transparent)]
    Select(#[from] SelectError),
    /// It has no such memory.
    #[error(transparent)]
    Pool(#[from] PoolError),
}

/// How to open the best device of `kind`, or the one that is named (for TCP, an address of this host will do). The returned closure opens it on the thread that calls it.
pub fn select(kind: TransportKind, device: Option<&str>, options: &Options) -> Result<OpenNic, SelectError> {
    let (provider, device) = find(kind, device)?;
    let options = options.clone();
    Ok(Box::new(move || provider.open(&device, &options)))
}

/// Makes a pool in the memory that a device moves best, named as for [`select`]: a GPU's own for cuda, the host's for others.
pub fn allocate(
    kind: TransportKind,
    device: Option<&str>,
    id: PoolId,
    layout: PoolLayout,
    name: &str,
) -> Result<Pool, AllocateError> {
    let (provider, device) = find(kind, device)?;
    Ok(provider.allocate(&device, id, layout, name)?)
}

fn find(kind: TransportKind, device: Option<&str>) -> Result<(Box<dyn Provider>, Device), SelectError> {
    let no_device = |reason: String| SelectError::NoDevice { kind, reason };
    let provider = providers().into_iter().find(|provider| provider.kind() == kind);
    let provider = provider.ok_or_else(|| no_device("this build does not have it".to_owned()))?;
    let devices = || provider.discover();
    let device = match device {
        Some(name) => provider.named(name).ok_or_else(|| {
            let describe = |device: &Device| match &device.unavailable {
                None => device.name.clone(),
                Some(reason) => format!("{} ({reason})", device.name),
            };
            let known: Vec<String> = devices().iter().map(describe).collect();
            SelectError::UnknownDevice { kind, name: name.to_owned(), known: known.join(", ") }
        })?,
        None => {
            let devices = devices();
            let usable = devices.iter().find(|device| device.unavailable.is_none()).or(devices.first());
            usable.cloned().ok_or_else(|| no_device("none was found".to_owned()))?
        }
    };
    if let Some(reason) = &device.unavailable {
        return Err(no_device(format!("{}: {reason}", device.name)));
    }
    Ok((provider, device))
}
