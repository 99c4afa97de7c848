//! Which transports this build has, and how to open them.

use kvferry_actors::OpenNic;
use kvferry_core::{PoolId, PoolLayout, TransportKind};
pub use kvferry_transport::Provider;
pub use kvferry_transport::{Device, NicInfo, OpenError, Options, Transport};
use kvferry_transport::{Pool, PoolError};
use thiserror::Error;

mod near;

pub use near::{Memory, Near, Nearby};

/// What only GPUs have: pools over memory that a serving stack owns, and events of its streams.
pub mod cuda {
    pub use kvferry_cuda::{Allocate, GpuEvent, from_raw};

    /// How KV gets between these GPUs (`gpu0`, `gpu1` and so on, as this process sees them) without a NIC, in words; else why not: no driver, no such
    /// GPU, a MIG instance, no peer access.
    pub fn joined(gpus: &[&str]) -> Result<String, String> {
        let cuda = kvferry_cuda::CudaProvider::default();
        let found = super::Provider::discover(&cuda);
        let ordinal = |name: &str| {
            let device = found.iter().find(|device| device.name == name);
            match device.or(found.iter().find(|device| device.unavailable.is_some())) {
                Some(super::Device { name, unavailable: Some(reason), .. }) => Err(format!("{name}: {reason}")),
                Some(device) => {
                    let number = device.name.strip_prefix("gpu").and_then(|number| number.parse::<u32>().ok());
                    number.ok_or_else(|| format!("{name} is no GPU's name"))
                }
                None => {
                    let known: Vec<&str> = found.iter().map(|device| device.name.as_str()).collect();
                    Err(format!("there is no {name} here; there are {}", known.join(", ")))
                }
            }
        };
        super::joined(gpus, |from, to| kvferry_cuda::reaches(ordinal(from)?, ordinal(to)?))
    }

    /// Where a GPU (`gpu0`, or `gpu0@10.0.0.3`) is on PCI, such as `0000:45:00.0`; else why the driver does not say.
    pub fn pci_address(gpu: &str) -> Result<String, String> {
        let number = gpu.split('@').next().and_then(|name| name.strip_prefix("gpu")?.parse().ok());
        kvferry_cuda::pci_address(number.ok_or_else(|| format!("{gpu} is no GPU's name"))?)
    }
}

/// Every one has to reach every other.
fn joined(gpus: &[&str], reaches: impl Fn(&str, &str) -> Result<&'static str, String>) -> Result<String, String> {
    let mut ways: Vec<&str> = Vec::new();
    for from in gpus {
        for to in gpus {
            let way = reaches(from, to)?;
            if from != to && !ways.contains(&way) {
                ways.push(way);
            }
        }
    }
    match (gpus, ways.as_slice()) {
        ([], _) => Err("no GPU is named".to_owned()),
        (_, []) => Ok(format!("all of it stays on {}", gpus.first().copied().unwrap_or_default())),
        (_, ways) => Ok(format!("{} are joined by {}", gpus.join(", "), ways.join(" and "))),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Two islands of NVLink joined by PCIe, and a GPU that nobody reaches.
    fn reaches(from: &str, to: &str) -> Result<&'static str, String> {
        let island = |gpu: &str| match gpu {
            "gpu0" | "gpu1" => Some(0),
            "gpu2" | "gpu3" => Some(1),
            _ => None,
        };
        match (island(from), island(to)) {
            _ if from == to => Ok("itself"),
            (Some(one), Some(other)) if one == other => Ok("NVLink"),
            (Some(_), Some(_)) => Ok("PCIe"),
            _ => Err(format!("{from} has no peer access to {to}")),
        }
    }

    #[test]
    fn gpus_are_joined_if_every_pair_of_them_is() {
        assert_eq!(joined(&["gpu0", "gpu1"], reaches).unwrap(), "gpu0, gpu1 are joined by NVLink");
        assert_eq!(
            joined(&["gpu0", "gpu1", "gpu2"], reaches).unwrap(),
            "gpu0, gpu1, gpu2 are joined by NVLink and PCIe"
        );
        assert_eq!(joined(&["gpu3", "gpu3"], reaches).unwrap(), "all of it stays on gpu3");
        assert_eq!(joined(&["gpu0", "gpu9"], reaches).unwrap_err(), "gpu0 has no peer access to gpu9");
        assert_eq!(joined(&["gpu9", "gpu0"], reaches).unwrap_err(), "gpu9 has no peer access to gpu0");
        assert!(joined(&[], reaches).is_err());
    }
}
