//! GPUs: reachable by RDMA, near their NICs, in an NVLink domain if one is expected.

use kvferry_topology::{GpuNics, Nearness, Overrides};

use super::Subject;
use crate::report::Check;
use crate::root::DeviceNode;

pub(super) fn checks(subject: &Subject<'_>) -> Vec<Check> {
    vec![count(subject), direct(subject), affinity(subject), imex(subject), nccl(subject), gdrcopy(subject)]
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
    if subject.host.efa.is_empty() || subject.host.gpus().next().is_none() {
        return Check::ok(ID, "of no concern without both a GPU and an EFA device");
    }
    // Where they lie, whatever else is wrong with them: other checks say that.
    let mut host = subject.host.topology.clone();
    host.ports.iter_mut().for_each(|port| port.unusable = None);
    let affinity = host.affinity(&Overrides::default());
    let far = affinity.gpus.iter().any(|gpu| gpu.nearness == Nearness::Far);
    let line = |gpu: &GpuNics| format!("GPU {}: {} ({})", gpu.gpu, gpu.nics.join(" "), gpu.nearness);
    let spare = (!affinity.spare.is_empty()).then(|| format!("near no GPU: {}", affinity.spare.join(" ")));
    let lines = affinity.gpus.iter().map(line).chain(spare);
    if far {
        let fix = "give the container the EFA devices that belong to its GPUs (topology manager policy single-numa-node), or let the pod have \
                   the whole node";
        return Check::warn(
            ID,
            "a GPU has no EFA device on its PCI root or NUMA node: its traffic crosses sockets",
            fix,
        )
        .and(lines);
    }
    Check::ok(ID, "every GPU has EFA devices near it").and(lines)
}

fn imex(subject: &Subject<'_>) -> Check {
    const ID: &str = "fabric.imex";
    let expected = subject.question.expect.imex;
    let forced = subject.question.variable("NCCL_MNNVL_ENABLE") == Some("1");
    let channels = &subject.host.imex_channels;
    let usable = channels.iter().filter(|(_, node)| *node == DeviceNode::Usable).count() as u32;
    let list = channels.iter().map(|(name, node)| match node {
        DeviceNode::Usable => format!("/dev/nvidia-caps-imex-channels/{name} opens"),
        other => format!("/dev/nvidia-caps-imex-channels/{name}: {other:?}"),
    });
    let driver = match subject.host.imex_driver {
        _ if !channels.is_empty() => None,
        Some(true) => Some(
            "/proc/devices has nvidia-caps-imex-channels: the driver could, no channel was given to this container",
        ),
        Some(false) => Some("/proc/devices has no nvidia-caps-imex-channels: the driver does not know them"),
        None => None,
    };
    let list = list.chain(driver.map(str::to_owned));
    let fix = "create a ComputeDomain and claim its channel: resources.claims: [{name: compute-domain-channel}] and resourceClaims: [{name: \
               compute-domain-channel, resourceClaimTemplateName: <channel.resourceClaimTemplate.name of the ComputeDomain>}] on prefill and decode";
    match expected {
        Some(count) if count != usable => {
            Check::fail(ID, format!("{usable} usable IMEX channels, {count} expected"), fix).and(list)
        }
        None if forced && usable == 0 => Check::fail(
            ID,
            "NCCL_MNNVL_ENABLE=1 forces multi-node NVLink and there is no usable IMEX channel: NCCL ends with `unhandled system error`",
            format!("{fix}; on hosts without NVLink between nodes unset NCCL_MNNVL_ENABLE"),
        )
        .and(list),
        _ if channels.is_empty() => Check::ok(ID, "no IMEX channel, and none expected"),
        _ if usable == 0 => Check::warn(ID, "IMEX channels that cannot be used", fix).and(list),
        _ => Check::ok(ID, format!("{usable} IMEX channels")).and(list),
    }
}

/// What the page for GB200 requires, where there is a channel.
fn nccl(subject: &Subject<'_>) -> Check {
    const ID: &str = "fabric.nccl";
    if subject.host.imex_channels.is_empty() && subject.question.expect.imex.is_none_or(|count| count == 0) {
        return Check::ok(ID, "of no concern without an IMEX channel");
    }
    let wrong: Vec<String> = ["NCCL_MNNVL_ENABLE", "NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"]
        .into_iter()
        .filter_map(|name| match subject.question.variable(name) {
            Some("1") => None,
            // 2 is NCCL's own choice, and finds the channel.
            Some("2") if name == "NCCL_MNNVL_ENABLE" => None,
            Some(value) => Some(format!("{name}={value}")),
            None => Some(format!("{name} is not set")),
        })
        .collect();
    if wrong.is_empty() {
        return Check::ok(ID, "NCCL may use multi-node NVLink");
    }
    let fix = "set NCCL_MNNVL_ENABLE=1, NCCL_CUMEM_ENABLE=1 and NCCL_NVLS_ENABLE=1 on prefill and decode";
    Check::warn(ID, "NCCL is not told to use the NVLink domain", fix).and(wrong)
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
