//! Ports of RDMA devices.

use std::fs;
use std::path::Path;

use crate::Pci;
use crate::pci::MELLANOX;
use crate::sysfs::{names, text};

/// Who makes an RDMA device, as far as it matters to transports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Make {
    /// Amazon's EFA: scalable reliable datagrams.
    Efa,
    /// Mellanox' or NVIDIA's ConnectX and BlueField: InfiniBand or RoCE.
    Mlx5,
    /// Any other that speaks verbs.
    Verbs,
}

/// A port of an RDMA device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// The kernel's name of the device: `rdmap40s0`, `mlx5_0`.
    pub device: String,
    /// Which port of it; EFA's have one.
    pub number: u32,
    /// Its make.
    pub make: Make,
    /// Where it is on PCI, unless it is not there (software devices are not).
    pub pci: Option<Pci>,
    /// What it carries.
    pub bits_per_second: Option<u64>,
    /// As the kernel says it, such as `4: ACTIVE`.
    pub state: String,
    /// Network interfaces that are the same port, such as `ens1f0np0`. EFA's have none.
    pub interfaces: Vec<String>,
    /// Why a process here cannot use it, with the remedy.
    pub unusable: Option<String>,
}

impl Port {
    /// As UCX and device lists call it: `rdmap40s0:1`.
    pub fn name(&self) -> String {
        format!("{}:{}", self.device, self.number)
    }

    /// Whether its link is up, whoever may use it.
    pub fn is_active(&self) -> bool {
        self.state.starts_with("4:")
    }

    /// Whether a user's word means it: its device, its device with port, or an interface of it.
    pub fn is_called(&self, word: &str) -> bool {
        self.device == word || self.name() == word || self.interfaces.iter().any(|interface| interface == word)
    }

    /// Orders ports as their devices lie on PCI; those that do not come last.
    pub(crate) fn place(&self) -> (bool, Option<&str>, &str, u32) {
        let address = self.pci.as_ref().map(|pci| pci.address.as_str());
        (address.is_none(), address, &self.device, self.number)
    }
}

pub(crate) fn read(root: &Path, pci: &[Pci]) -> Vec<Port> {
    let class = root.join("sys/class/infiniband");
    let mut ports = Vec::new();
    for device in names(&class) {
        let folder = class.join(&device);
        let address = fs::canonicalize(folder.join("device")).ok();
        let address = address.and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
        let function = address.and_then(|address| pci.iter().find(|pci| pci.address == address));
        let make = match function {
            Some(pci) if pci.is_efa() => Make::Efa,
            Some(pci) if pci.vendor == MELLANOX => Make::Mlx5,
            _ => Make::Verbs,
        };
        let closed = closed(root, &device);
        let numbers: Vec<u32> = names(&folder.join("ports")).iter().filter_map(|name| name.parse().ok()).collect();
        for number in &numbers {
            let at = folder.join(format!("ports/{number}"));
            let mut port = Port {
                device: device.clone(),
                number: *number,
                make,
                pci: function.cloned(),
                bits_per_second: text(&at.join("rate")).as_deref().and_then(rate),
                state: text(&at.join("state")).unwrap_or_default(),
                interfaces: interfaces(&folder, *number, numbers.len()),
                unusable: closed.clone(),
            };
            if !port.is_active() && port.unusable.is_none() {
                port.unusable = Some(format!("its port is not active but {:?}; bring it up", port.state));
            }
            ports.push(port);
        }
    }
    ports.sort_by(|one, other| one.place().cmp(&other.place()));
    ports
}

/// Interfaces of one of a device's ports, which they count from 0.
fn interfaces(device: &Path, number: u32, ports: usize) -> Vec<String> {
    let folder = device.join("device/net");
    let port_of = |name: &String| text(&folder.join(name).join("dev_port"))?.parse::<u32>().ok();
    let is_its = |name: &String| ports == 1 || port_of(name).is_some_and(|port| port.checked_add(1) == Some(number));
    names(&folder).into_iter().filter(is_its).collect()
}

/// Why a process here cannot open an RDMA device: libraries would skip it without a word.
fn closed(root: &Path, device: &str) -> Option<String> {
    let class = root.join("sys/class/infiniband_verbs");
    let of = |node: &String| text(&class.join(node).join("ibdev")).as_deref() == Some(device);
    let Some(node) = names(&class).into_iter().find(of) else {
        return Some("the kernel has no uverbs node for it; load ib_uverbs".to_owned());
    };
    let path = root.join("dev/infiniband").join(&node);
    let opened = fs::OpenOptions::new().read(true).write(true).open(&path);
    opened.err().map(|error| {
        format!(
            "/dev/infiniband/{node} cannot be opened ({error}); give this container its device (for EFA: vpc.amazonaws.com/efa)"
        )
    })
}

/// Bits per second of `100 Gb/sec (4X EDR)`.
fn rate(text: &str) -> Option<u64> {
    let (number, rest) = text.split_once(' ')?;
    let gigabits: f64 = number.parse().ok()?;
    (rest.starts_with("Gb/sec") && gigabits.is_finite() && gigabits >= 0.0).then_some((gigabits * 1e9) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_or_left() {
        assert_eq!(rate("100 Gb/sec (4X EDR)"), Some(100_000_000_000));
        assert_eq!(rate("2.5 Gb/sec (1X SDR)"), Some(2_500_000_000));
        for wrong in ["", "fast", "-1 Gb/sec", "inf Gb/sec", "NaN Gb/sec", "100 Mb/sec"] {
            assert_eq!(rate(wrong), None, "{wrong}");
        }
    }
}
