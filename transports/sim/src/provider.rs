//! Opens NICs of one fabric.

use kvferry_transport::{Device, OpenError, Options, Provider, Transport, TransportKind};

use crate::fabric::Fabric;
use crate::transport::SimTransport;

/// Opens NICs on one fabric: as many as are wanted, by any name.
#[derive(Clone)]
pub struct SimProvider {
    fabric: Fabric,
}

impl SimProvider {
    /// A provider of that fabric's NICs.
    pub fn new(fabric: Fabric) -> Self {
        SimProvider { fabric }
    }
}

impl Provider for SimProvider {
    fn kind(&self) -> TransportKind {
        TransportKind::Sim
    }

    fn discover(&self) -> Vec<Device> {
        vec![Device { kind: TransportKind::Sim, name: "fabric".to_owned(), unavailable: None }]
    }

    fn open(&self, device: &Device, options: &Options) -> Result<Box<dyn Transport>, OpenError> {
        if device.kind != TransportKind::Sim {
            let reason = format!("it is a {} device; a simulated fabric opens sim devices", device.kind);
            return Err(OpenError::Unavailable { device: device.name.clone(), reason });
        }
        Ok(Box::new(SimTransport::open(self.fabric.clone(), device.name.clone(), options)))
    }
}
