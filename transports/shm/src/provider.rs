//! Finds the one device there is, and opens it.

use kvferry_local::host;
use kvferry_transport::{Device, NicInfo, OpenError, Options, Provider, Transport, TransportKind};

use crate::backend::HostMemory;

const DEVICE: &str = "memory";

/// Opens the memory of this host.
#[derive(Clone, Copy, Debug, Default)]
pub struct ShmProvider;

impl Provider for ShmProvider {
    fn kind(&self) -> TransportKind {
        TransportKind::Shm
    }

    fn discover(&self) -> Vec<Device> {
        vec![Device { kind: TransportKind::Shm, name: DEVICE.into(), unavailable: host().err() }]
    }

    fn open(&self, device: &Device, options: &Options) -> Result<Box<dyn Transport>, OpenError> {
        let unavailable = |reason: String| OpenError::Unavailable { device: device.name.clone(), reason };
        if device.kind != TransportKind::Shm || device.name != DEVICE {
            return Err(unavailable(format!("shared memory has one device, called {DEVICE}")));
        }
        let host = host().map_err(unavailable)?;
        let info =
            NicInfo { kind: TransportKind::Shm, device: DEVICE.into(), host, library: None, bits_per_second: None };
        Ok(Box::new(kvferry_local::open(HostMemory, info, options)?))
    }
}
