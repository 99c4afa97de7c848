//! GPUs: reachable by RDMA, near their NICs.

use kvferry_topology::{GpuNics, Nearness, Overrides};

use super::Subject;
use crate::report::Check;
use crate::root::DeviceNode;

pub(super) fn checks(subject: &Subject<'_>) -> Vec<Check> {
    vec![count(subject), direct(subject), affinity(subject), gdrcopy(subject)]
}

fn count(subject: &Subject<'_>) -> Check {
    const ID: &str = "gpu.devices";
    let found = subject.host.gpus().count() as u32;
    match subject.question.expect.gpu {
        Some(expected) if expected != found => Check::fail(
            ID,
            format!("{found} NVIDIA GPUs on PCI, {expected} expected"),
            format!("request them: resources.limits \"nvidia.com/gpu\": \"{expected}\""),
        ),
        _ => Check::ok(ID, format!("{found} NVIDIA GPUs on PCI")),
    }
}

/// Whether RDMA devices can reach GPU memory: a peer-memory module, or dma-buf.
fn direct(subject: &Subject<'_>) -> Check {
    const ID: &str = "gpu.direct";
    let host = subject.host;
    if host.gpus().next().is_none() || (host.rdma.is_empty() && !subject.efa_matters()) {
        return Check::ok(ID, "of no concern without both a GPU and an RDMA device");
    }
    if !host.peer_memory.is_empty() {
        return Check::ok(ID, format!("peer memory: {}", host.peer_memory.join(", ")));
    }
    let driver = host.nvidia_driver.as_deref().unwrap_or("no /proc/driver/nvidia/version");
    let driver = driver.lines().next().unwrap_or_default();
    let evidence = format!("no peer-memory module; kernel {}; {driver}", host.kernel);
    if driver.contains("Open Kernel Module") && kernel(&host.kernel) >= (5, 12) {
        return Check::ok(ID, format!("{evidence}: dma-buf can do it; only a transfer proves that it does"));
    }
    let fix = "modprobe efa_nv_peermem (or nvidia_peermem) on the host, or use NVIDIA's open kernel modules on Linux 5.12 or newer; the container \
               needs /sys/module to see it";
    Check::fail(ID, format!("{evidence}: GPU memory would be copied through the host"), fix)
}

/// Major and minor.
pub(super) fn kernel(release: &str) -> (u32, u32) {
    let mut numbers = release.split(['.', '-']).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Which NICs are nearest to every GPU.
fn affinity(subject: &Subject<'_>) -> Check {
    const ID: &str = "gpu.affinity";
    let chosen = &subject.question.nic_map;
    if *chosen == Overrides::default() && (subject.host.rdma.is_empty() || subject.host.gpus().next().is_none()) {
        return Check::ok(ID, "of no concern without both a GPU and an RDMA device");
    }
    // Where they lie, whatever else is wrong with them: other checks say that.
    let mut host = subject.host.topology.clone();
    host.ports.iter_mut().for_each(|port| port.unusable = None);
    let affinity = host.affinity(chosen);
    let far = affinity.gpus.iter().any(|gpu| gpu.nearness == Nearness::Far);
    let line = |gpu: &GpuNics| format!("GPU {}: {} ({})", gpu.gpu, gpu.nics.join(" "), gpu.nearness);
    let spare = (!affinity.spare.is_empty()).then(|| format!("near no GPU: {}", affinity.spare.join(" ")));
    let lines = affinity.gpus.iter().map(line).chain(spare);
    if !affinity.warnings.is_empty() {
        let fix = "name GPUs by their PCI addresses or their numbers in the order of those, and NICs as sysfs does: --nic-map 0=mlx5_0+mlx5_1";
        return Check::warn(ID, affinity.warnings.join("; "), fix).and(lines);
    }
    if far {
        let fix = "give the container the RDMA devices that belong to its GPUs (topology manager policy single-numa-node), or let the pod have \
                   the whole node";
        return Check::warn(
            ID,
            "a GPU has no RDMA device on its PCI root or NUMA node: its traffic crosses sockets",
            fix,
        )
        .and(lines);
    }
    Check::ok(ID, "every GPU has RDMA devices near it").and(lines)
}

fn gdrcopy(subject: &Subject<'_>) -> Check {
    const ID: &str = "gpu.gdrcopy";
    match subject.question.variable("NVIDIA_GDRCOPY") {
        None => Check::ok(ID, "NVIDIA_GDRCOPY is not set: nobody asks for it"),
        Some("enabled") if subject.host.gdr_node == DeviceNode::Missing => Check::warn(
            ID,
            "NVIDIA_GDRCOPY=enabled, but /dev/gdrdrv is missing",
            "install the gdrdrv kernel module on the host",
        ),
        Some("enabled") => Check::ok(ID, "NVIDIA_GDRCOPY=enabled and /dev/gdrdrv is there"),
        Some(value) => Check::warn(
            ID,
            format!("NVIDIA_GDRCOPY={value} has no effect: the container toolkit knows only `enabled`"),
            "set NVIDIA_GDRCOPY=enabled",
        ),
    }
}
