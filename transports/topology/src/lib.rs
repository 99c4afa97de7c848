//! RDMA devices and GPUs of a host as sysfs shows them, and which NICs serve which GPU.
//!
//! Everything is read below one folder, so that a captured or a simulated host is read like this one. Nothing here opens a device, or knows what a
//! transport calls it: that is kvferry's `transport::Nearby`, which the ranks' NICs come from.
//!
//! ```
//! use std::path::Path;
//! use kvferry_topology::{Overrides, Topology};
//!
//! let host = Topology::read(Path::new("/"));
//! let affinity = host.affinity(&Overrides::default());
//! for gpu in &affinity.gpus {
//!     println!("{}: {:?} ({})", gpu.gpu, gpu.nics, gpu.nearness);
//! }
//! ```
#![forbid(unsafe_code)]

mod affinity;
mod counters;
mod overrides;
mod pci;
mod rdma;
#[cfg(feature = "simulated")]
pub mod simulated;
pub mod sysfs;

pub use affinity::{Affinity, GpuNics, Nearness};
pub use counters::{Counters, Way};
pub use overrides::{BadOverride, Overrides};
pub use pci::Pci;
pub use rdma::{Make, Port};

use std::path::Path;

/// The PCI functions and RDMA ports of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// All PCI functions, by address.
    pub pci: Vec<Pci>,
    /// All ports of RDMA devices: by the PCI address of the device, then by name.
    pub ports: Vec<Port>,
}

impl Topology {
    /// Reads `sys` and `dev` below a root. What is not there or does not read as it should is left out.
    pub fn read(root: &Path) -> Topology {
        let pci = pci::read(&root.join("sys"));
        let ports = rdma::read(root, &pci);
        Topology { pci, ports }
    }

    /// NVIDIA's GPUs, by PCI address: the order of `CUDA_DEVICE_ORDER=PCI_BUS_ID`, and CUDA's own where all GPUs are alike.
    pub fn gpus(&self) -> impl Iterator<Item = &Pci> {
        self.pci.iter().filter(|pci| pci.is_gpu())
    }

    /// Amazon's EFA devices on PCI, whether a driver has them or not.
    pub fn efa_on_pci(&self) -> impl Iterator<Item = &Pci> {
        self.pci.iter().filter(|pci| pci.is_efa())
    }
}
