//! PCI functions and the bridges above them.

use std::fs;
use std::path::Path;

use crate::sysfs::{hexadecimal, names, text};

const AMAZON: u32 = 0x1d0f;
const NVIDIA: u32 = 0x10de;
pub(crate) const MELLANOX: u32 = 0x15b3;

/// A PCI function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pci {
    /// Domain, bus, slot and function: `0000:45:00.0`.
    pub address: String,
    /// Names of what is above it, from the root: `pci0000:40`, `0000:40:01.0`.
    pub path: Vec<String>,
    /// Its NUMA node, where the machine says.
    pub numa: Option<u32>,
    /// The driver that has it.
    pub driver: Option<String>,
    /// Whose it is: `0x1d0f` is Amazon, `0x10de` NVIDIA, `0x15b3` Mellanox.
    pub vendor: u32,
    /// Which of the vendor's.
    pub device: u32,
    /// What it is, by PCI's list of classes.
    pub class: u32,
}

impl Pci {
    /// Amazon's 0xefa0 to 0xefaf, so that generations to come are known, too.
    pub fn is_efa(&self) -> bool {
        self.vendor == AMAZON && self.device & 0xfff0 == 0xefa0
    }

    /// A display controller of NVIDIA: 3D controllers are.
    pub fn is_gpu(&self) -> bool {
        self.vendor == NVIDIA && self.class >> 16 == 0x03
    }

    /// How many bridges and roots, from the top, two functions have in common.
    pub fn common(&self, other: &Pci) -> usize {
        self.path.iter().zip(&other.path).take_while(|(one, other)| one == other).count()
    }
}

pub(crate) fn read(sys: &Path) -> Vec<Pci> {
    let folder = sys.join("bus/pci/devices");
    let Ok(devices) = fs::canonicalize(sys.join("devices")) else { return Vec::new() };
    names(&folder).into_iter().filter_map(|address| function(&devices, &folder.join(&address), address)).collect()
}

fn function(devices: &Path, link: &Path, address: String) -> Option<Pci> {
    let real = fs::canonicalize(link).ok()?;
    let path = real.strip_prefix(devices).ok()?.parent()?;
    let driver = fs::read_link(link.join("driver")).ok();
    Some(Pci {
        path: path.iter().map(|part| part.to_string_lossy().into_owned()).collect(),
        // -1 where the machine does not say.
        numa: text(&link.join("numa_node")).and_then(|text| text.parse().ok()),
        driver: driver.and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned())),
        vendor: hexadecimal(&link.join("vendor"))?,
        device: hexadecimal(&link.join("device"))?,
        class: hexadecimal(&link.join("class")).unwrap_or(0),
        address,
    })
}
