//! Which GPUs reach which, and why not.

use kvferry_core::GpuIdentity;
use kvferry_core::limits::GPUS_MAX;

use crate::driver::{self, DeviceHandle, Driver};
use crate::gpu::{Gpu, label};

/// How kernels of one GPU reach the memory of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    NvLink,
    Pcie,
    /// Not at all.
    None,
}

/// What is known of the two ends of a path.
#[derive(Clone, Copy, Debug)]
struct Ends<'a> {
    /// Our GPU, as the driver calls it.
    name: &'a str,
    label: &'a str,
    is_same: bool,
    /// What the peer calls its GPU, and what it is.
    there: &'a str,
    /// `None` where this process does not see it.
    link: Option<Reach>,
}

/// Says why a peer's GPU is out of reach for ours, where that is certain. What this process does not see, it has to try.
pub(crate) fn check(gpu: &Gpu, uuid: [u8; 16], there: &str) -> Result<(), String> {
    let is_same = gpu.uuid == uuid;
    let link = if is_same { None } else { visible(uuid).map(|ordinal| reach(gpu, ordinal)) };
    refuse(Ends { name: &gpu.name, label: &gpu.label(), is_same, there, link })
}

/// How kernels of one GPU of this process reach the memory of another: "NVLink", "PCIe", or "itself"; else why not. Opens neither.
pub fn reaches(from: u32, to: u32) -> Result<&'static str, String> {
    let driver = driver::driver()?;
    let [here, other] = [from, to].map(|ordinal| driver::device(driver, ordinal));
    let (here, other) = (here?, other?);
    let link = (from != to).then(|| link(here, other));
    let there = described(&label(to), &driver::device_name(other)?);
    let ends =
        Ends { name: &driver::device_name(here)?, label: &label(from), is_same: from == to, there: &there, link };
    refuse(ends)?;
    Ok(match link {
        None | Some(Reach::None) => "itself",
        Some(Reach::NvLink) => "NVLink",
        Some(Reach::Pcie) => "PCIe",
    })
}

/// A GPU in words, from which a peer sees what it is.
pub(crate) fn described(label: &str, name: &str) -> String {
    format!("{label} ({name})")
}

/// Its own name is all that the driver says of an instance.
fn is_mig(name: &str) -> bool {
    name.contains(" MIG ")
}

fn refuse(ends: Ends<'_>) -> Result<(), String> {
    let Ends { name, label, is_same, there, link } = ends;
    if is_same {
        return Ok(());
    }
    let instance = if is_mig(name) { Some(described(label, name)) } else { None };
    if let Some(instance) = instance.as_deref().or(is_mig(there).then_some(there)) {
        return Err(format!(
            "{instance} is a MIG instance, which reaches neither other GPUs nor other instances, and is not reached by them: have both sides use the \
             same instance, turn MIG off (nvidia-smi -mig 0), or use another transport"
        ));
    }
    if link == Some(Reach::None) {
        return Err(format!(
            "{label} has no peer access to the peer's {there}, neither by NVLink nor by PCIe (nvidia-smi topo -p2p r says what is in the way; in \
             virtual machines often the IOMMU): use another transport for this pair"
        ));
    }
    Ok(())
}

/// The other GPUs that this process sees, and how they are reached, for people.
pub(crate) fn describe(gpu: &Gpu) -> String {
    let count = driver::driver().and_then(|driver| Ok(driver::device_count(driver)?)).unwrap_or(0);
    let words = |ordinal| match reach(gpu, ordinal) {
        Reach::NvLink => format!("{} by NVLink", label(ordinal)),
        Reach::Pcie => format!("{} by PCIe", label(ordinal)),
        Reach::None => format!("not {}", label(ordinal)),
    };
    let others: Vec<String> = (0..count).filter(|ordinal| *ordinal != gpu.ordinal).map(words).collect();
    if others.is_empty() { "sees no other GPU".to_owned() } else { format!("reaches {}", others.join(", ")) }
}

/// What peers need to judge which path they take; as [`check`] judges it.
pub(crate) fn identity(gpu: &Gpu) -> GpuIdentity {
    let driver = driver::driver().ok();
    let count = driver.and_then(|driver| driver::device_count(driver).ok()).unwrap_or(0);
    let others = (0..count).filter(|ordinal| *ordinal != gpu.ordinal).take(GPUS_MAX);
    let other = |ordinal| Some((device_uuid(driver?, ordinal)?, reach(gpu, ordinal) != Reach::None));
    GpuIdentity { uuid: gpu.uuid, is_instance: is_mig(&gpu.name), others: others.filter_map(other).collect() }
}

/// The number that a GPU has in this process, if it is visible here.
fn visible(uuid: [u8; 16]) -> Option<u32> {
    let driver = driver::driver().ok()?;
    let is_it = |ordinal: &u32| device_uuid(driver, *ordinal).is_some_and(|found| found == uuid);
    (0..driver::device_count(driver).ok()?).find(is_it)
}

fn device_uuid(driver: Driver, ordinal: u32) -> Option<[u8; 16]> {
    driver::device(driver, ordinal).and_then(driver::device_uuid).ok()
}

fn reach(gpu: &Gpu, ordinal: u32) -> Reach {
    let Some(other) = driver::driver().ok().and_then(|driver| driver::device(driver, ordinal).ok()) else {
        return Reach::None;
    };
    link(gpu.device(), other)
}

fn link(from: DeviceHandle, to: DeviceHandle) -> Reach {
    if !driver::can_access(from, to).unwrap_or(false) {
        Reach::None
    } else if driver::is_nvlink(from, to).unwrap_or(false) {
        Reach::NvLink
    } else {
        Reach::Pcie
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: Ends<'static> =
        Ends { name: "NVIDIA H200", label: "gpu0", is_same: false, there: "gpu1", link: Some(Reach::NvLink) };

    #[test]
    fn what_is_certainly_out_of_reach_says_why() {
        assert_eq!(refuse(H200), Ok(()));
        assert_eq!(refuse(Ends { link: Some(Reach::Pcie), ..H200 }), Ok(()));
        let reason = refuse(Ends { link: Some(Reach::None), ..H200 }).unwrap_err();
        assert!(reason.contains("gpu0 has no peer access to the peer's gpu1"), "{reason}");
    }

    #[test]
    fn what_is_not_seen_is_tried() {
        assert_eq!(refuse(Ends { link: None, ..H200 }), Ok(()));
    }

    #[test]
    fn a_mig_instance_reaches_itself_only() {
        let mig = Ends { name: "NVIDIA A100-SXM4-40GB MIG 1g.5gb", link: None, ..H200 };
        let reason = refuse(mig).unwrap_err();
        assert!(reason.starts_with("gpu0 (NVIDIA A100-SXM4-40GB MIG 1g.5gb) is a MIG instance"), "{reason}");
        assert_eq!(refuse(Ends { is_same: true, ..mig }), Ok(()));
    }

    #[test]
    fn nobody_else_reaches_a_mig_instance() {
        let there = described("gpu1", "NVIDIA H200 MIG 3g.71gb");
        // Seen or not, and even if the driver claimed a link.
        for link in [None, Some(Reach::None), Some(Reach::NvLink)] {
            let reason = refuse(Ends { there: &there, link, ..H200 }).unwrap_err();
            assert!(reason.starts_with("gpu1 (NVIDIA H200 MIG 3g.71gb) is a MIG instance"), "{reason}");
        }
        assert_eq!(refuse(Ends { name: "NVIDIA H200 MIG 3g.71gb", is_same: true, there: &there, ..H200 }), Ok(()));
    }
}
