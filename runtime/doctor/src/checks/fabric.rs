//! NVLink between hosts: are the GPUs registered with the fabric, in one domain, and may this process use it?

use super::Subject;
use crate::library;
use crate::question::{Backend, DriverSaid, SMI_FILE};
use crate::report::Check;
use crate::root::DeviceNode;
use crate::smi::{self, Gpu, Smi};

pub(super) fn checks(subject: &Subject<'_>) -> Vec<Check> {
    let smi = told(subject).map(smi::read);
    vec![state(subject, smi.as_ref()), imex(subject, smi.as_ref()), daemon(subject), nccl(subject), kv(subject)]
}

fn told<'a>(subject: &'a Subject<'_>) -> Option<&'a str> {
    match (&subject.question.driver, &subject.host.smi) {
        (DriverSaid::Told(text), _) | (_, Some(text)) => Some(text.as_str()),
        _ => None,
    }
}

/// Why NVLink between hosts must work here; the GPUs' kind alone is none, for there are smaller machines with them.
fn demanded(subject: &Subject<'_>) -> Option<&'static str> {
    if subject.question.expect.imex.is_some_and(|count| count > 0) {
        return Some("--expect asks for IMEX channels");
    }
    (subject.question.variable("NCCL_MNNVL_ENABLE") == Some("1")).then_some("NCCL_MNNVL_ENABLE=1 forces it")
}

/// By PCI or, where a container does not show that, by what the driver says.
fn of_a_rack(subject: &Subject<'_>, smi: Option<&Smi>) -> bool {
    subject.host.is_of_a_rack() || smi.is_some_and(|smi| smi.gpus.iter().any(Gpu::is_of_a_rack))
}

fn state(subject: &Subject<'_>, smi: Option<&Smi>) -> Check {
    const ID: &str = "fabric.state";
    let rack = of_a_rack(subject, smi);
    let demanded = demanded(subject).or(rack.then_some("GB200 and GB300 are made for it"));
    let Some(smi) = smi else { return untold(subject, demanded) };
    let driver = smi.driver.as_deref().unwrap_or("of an unknown version");
    if smi.gpus.is_empty() {
        let evidence = format!("driver {driver} lists no GPU");
        return match demanded {
            None => Check::ok(ID, evidence),
            Some(why) => Check::fail(
                ID,
                format!("{evidence}; NVLink between hosts is wanted: {why}"),
                "give the container its GPUs (resources.limits \"nvidia.com/gpu\"); below --root, save what `nvidia-smi -q` prints, without -x",
            ),
        };
    }
    let lines = || smi.gpus.iter().filter(|gpu| gpu.fabric.is_some()).map(Gpu::line);
    let silent = smi.gpus.iter().filter(|gpu| gpu.fabric.is_none()).count();
    match (silent, demanded) {
        (0, _) => {}
        (_, Some(why)) if silent == smi.gpus.len() => {
            return Check::fail(
                ID,
                format!(
                    "driver {driver} is too old to tell a GPU's fabric state; NVLink between hosts is wanted: {why}"
                ),
                "install a driver of branch 570 or newer, the first for GB200, and the IMEX package of the same version",
            );
        }
        (_, None) if silent == smi.gpus.len() => {
            return Check::ok(ID, format!("driver {driver} tells nothing of a fabric, and none is expected"));
        }
        _ => {
            let evidence = format!("{silent} of {} GPUs have no section `Fabric`: the text is cut", smi.gpus.len());
            return Check::warn(ID, evidence, "save all that `nvidia-smi -q` prints").and(lines());
        }
    }
    match fault(&smi.gpus, demanded, rack) {
        Some(check) => check.and(lines()),
        None if smi.gpus.iter().any(Gpu::is_registered) => {
            Check::ok(ID, format!("{} GPUs are registered in one NVLink domain", smi.gpus.len())).and(lines())
        }
        None if smi.gpus.iter().any(Gpu::has_fabric) => {
            Check::ok(ID, "registered with this host's own NVLink fabric, and no other is expected").and(lines())
        }
        None => Check::ok(ID, "no GPU has an NVLink fabric, and none is expected"),
    }
}

/// Where the driver was not asked.
fn untold(subject: &Subject<'_>, demanded: Option<&str>) -> Check {
    const ID: &str = "fabric.state";
    match (&subject.question.driver, demanded) {
        (DriverSaid::Refused(reason), Some(why)) => Check::warn(
            ID,
            format!("the driver cannot be asked ({reason}), and NVLink between hosts is wanted: {why}"),
            "start the container with NVIDIA's runtime and NVIDIA_DRIVER_CAPABILITIES=compute,utility, or name the library: KVFERRY_NVML_LIBRARY=/…/libnvidia-ml.so.1",
        ),
        (DriverSaid::Refused(reason), None) => Check::ok(ID, format!("the driver cannot be asked: {reason}")),
        _ if subject.host.gpus().next().is_none() => Check::ok(ID, "of no concern without a GPU"),
        _ => Check::ok(
            ID,
            format!("not looked at: below --root, {SMI_FILE} with what `nvidia-smi -q` printed would tell"),
        ),
    }
}

/// What is wrong with GPUs that all have the section.
fn fault(gpus: &[Gpu], demanded: Option<&str>, rack: bool) -> Option<Check> {
    const ID: &str = "fabric.state";
    let control = if rack {
        "bring up the NVLink domain's control plane (NMX-C and the fabric manager on the switch trays), then reset the GPUs: nvidia-smi -r"
    } else {
        "start NVIDIA's fabric manager of the driver's very version on the host: systemctl enable --now nvidia-fabricmanager"
    };
    let count = |is: fn(&&Gpu) -> bool| gpus.iter().filter(is).count();
    let unfinished = count(|gpu| gpu.has_fabric() && !gpu.fabric("State").eq_ignore_ascii_case("completed"));
    if unfinished > 0 {
        let evidence = format!(
            "{unfinished} of {} GPUs are not registered with the NVLink fabric yet: CUDA says `system not yet initialized`",
            gpus.len()
        );
        return Some(Check::fail(ID, evidence, control));
    }
    let refused = count(|gpu| gpu.has_fabric() && !gpu.fabric("Status").eq_ignore_ascii_case("success"));
    if refused > 0 {
        let evidence =
            format!("registration with the NVLink fabric ended in an error on {refused} of {} GPUs", gpus.len());
        return Some(Check::fail(ID, evidence, format!("{control}; dmesg has the driver's Xid beside it")));
    }
    if let Some(check) = membership(gpus, demanded, control) {
        return Some(check);
    }
    let unwell: Vec<String> = gpus.iter().flat_map(unwell).collect();
    let fatal =
        unwell.iter().any(|line| ["Unhealthy", "Incorrect", "Partition"].iter().any(|word| line.contains(word)));
    let fix = "look at the GPU's NVLinks (nvidia-smi nvlink -s) and at the switch trays' fabric manager; take the host out of the domain until then";
    match (unwell.is_empty(), fatal) {
        (true, _) => None,
        (_, true) => Some(Check::fail(ID, "the NVLink fabric is not healthy", fix).and(unwell)),
        (_, false) => Some(Check::warn(ID, "the NVLink fabric is degraded", fix).and(unwell)),
    }
}

/// Whether all are in one clique of one cluster.
fn membership(gpus: &[Gpu], demanded: Option<&str>, control: &str) -> Option<Check> {
    const ID: &str = "fabric.state";
    let outside = gpus.iter().filter(|gpu| !gpu.is_registered()).count();
    let of = gpus.len();
    if outside > 0 && (outside < of || demanded.is_some()) {
        let why = demanded.unwrap_or("others of this host are");
        let evidence = format!(
            "{outside} of {of} GPUs are in no NVLink domain (no cluster, or no clique); NVLink between hosts is wanted: {why}"
        );
        return Some(Check::fail(
            ID,
            evidence,
            format!("{control}; a GPU without a partition belongs to no clique: give it one in NMX-C"),
        ));
    }
    let place = |gpu: &Gpu| (gpu.fabric("ClusterUUID").to_ascii_lowercase(), gpu.fabric("CliqueId").to_owned());
    let first = gpus.first().map(place)?;
    if outside == 0 && gpus.iter().any(|gpu| place(gpu) != first) {
        let evidence = "the GPUs of this host are in different NVLink domains or cliques: they do not reach each other";
        let fix = "put all GPUs of a host into one partition (NMX-C), or run one worker for each partition";
        return Some(Check::fail(ID, evidence, fix));
    }
    None
}

/// Lines of the health's that are not as they should be.
fn unwell(gpu: &Gpu) -> Vec<String> {
    let well = [
        ("Summary", "healthy"),
        ("Bandwidth", "full"),
        ("Route Recovery in progress", "false"),
        ("Route Unhealthy", "false"),
        ("Access Timeout Recovery", "false"),
        ("Incorrect Configuration", "none"),
        ("Partition Assigned", "true"),
    ];
    let is_well = |name: &str, good: &str| {
        let value = gpu.fabric(name).to_ascii_lowercase();
        value == good || matches!(value.as_str(), "" | "n/a" | "not supported")
    };
    let bad = well.into_iter().filter(|(name, good)| !is_well(name, good));
    bad.map(|(name, _)| format!("GPU {}: {name} is {}", gpu.address, gpu.fabric(name))).collect()
}

fn imex(subject: &Subject<'_>, smi: Option<&Smi>) -> Check {
    const ID: &str = "fabric.imex";
    let expected = subject.question.expect.imex;
    let mnnvl = subject.question.variable("NCCL_MNNVL_ENABLE");
    let channels = &subject.host.imex_channels;
    let usable = channels.iter().filter(|(_, node)| *node == DeviceNode::Usable).count() as u32;
    let list = channels.iter().map(|(name, node)| match node {
        DeviceNode::Usable => format!("/dev/nvidia-caps-imex-channels/{name} opens"),
        other => format!("/dev/nvidia-caps-imex-channels/{name}: {other:?}"),
    });
    let driver = match (subject.host.imex_driver, subject.host.imex_count) {
        _ if !channels.is_empty() => None,
        (_, Some(0)) => Some(
            "/proc/driver/nvidia/params has ImexChannelCount: 0: the driver was loaded without channels (NVreg_ImexChannelCount)",
        ),
        (Some(true), _) => Some(
            "/proc/devices has nvidia-caps-imex-channels: the driver could, no channel was given to this container",
        ),
        (Some(false), _) => Some("/proc/devices has no nvidia-caps-imex-channels: the driver does not know them"),
        (None, _) => None,
    };
    let list = list.chain(driver.map(str::to_owned));
    let fix = "create a ComputeDomain and claim its channel: resources.claims: [{name: compute-domain-channel}] and resourceClaims: [{name: \
               compute-domain-channel, resourceClaimTemplateName: <channel.resourceClaimTemplate.name of the ComputeDomain>}] on prefill and decode; \
               outside Kubernetes load the driver with NVreg_CreateImexChannel0=1";
    let registered = smi.is_some_and(|smi| smi.gpus.iter().any(Gpu::is_registered));
    match expected {
        Some(count) if count != usable => {
            Check::fail(ID, format!("{usable} usable IMEX channels, {count} expected"), fix).and(list)
        }
        None if mnnvl == Some("1") && usable == 0 => Check::fail(
            ID,
            "NCCL_MNNVL_ENABLE=1 forces multi-node NVLink and there is no usable IMEX channel: NCCL ends with `unhandled system error`",
            format!("{fix}; on hosts without NVLink between nodes unset NCCL_MNNVL_ENABLE"),
        )
        .and(list),
        None if registered && usable == 0 && mnnvl != Some("0") => Check::fail(
            ID,
            "the GPUs are in an NVLink domain and there is no usable IMEX channel: NCCL finds the domain and ends with `unhandled system error`, and \
             no memory can be shared with other hosts",
            format!("{fix}; where the domain is not to be used, set NCCL_MNNVL_ENABLE=0"),
        )
        .and(list),
        // Whether they are in a domain was not told.
        None if subject.host.is_of_a_rack() && smi.is_none() && usable == 0 && mnnvl != Some("0") => Check::warn(
            ID,
            "GB200 or GB300 without a usable IMEX channel: in an NVLink domain NCCL ends with `unhandled system error`",
            format!("{fix}; where there is no domain, set NCCL_MNNVL_ENABLE=0"),
        )
        .and(list),
        _ if channels.is_empty() => Check::ok(ID, "no IMEX channel, and none expected"),
        _ if usable == 0 => Check::warn(ID, "IMEX channels that cannot be used", fix).and(list),
        _ => Check::ok(ID, format!("{usable} IMEX channels")).and(list),
    }
}

/// The daemon, where a host runs one of its own: a ComputeDomain starts it in a pod, which other pods do not see.
fn daemon(subject: &Subject<'_>) -> Check {
    const ID: &str = "fabric.daemon";
    let daemon = &subject.host.imex_daemon;
    let fix = "list every node of the domain there, one address a line and the same on all, then systemctl enable --now nvidia-imex; where \
               ComputeDomains are used, which start daemons of their own, leave the list empty and the service off";
    match (daemon.running, &daemon.nodes) {
        (false, None) => Check::ok(ID, "no IMEX daemon of this host's own; a ComputeDomain runs one in a pod"),
        (false, Some((file, nodes))) if nodes.is_empty() => {
            Check::ok(ID, format!("{file} lists no node and no nvidia-imex runs; a ComputeDomain runs one in a pod"))
        }
        (false, Some((file, nodes))) => Check::warn(
            ID,
            format!(
                "{file} lists {} nodes, and no nvidia-imex runs among the processes that are seen here",
                nodes.len()
            ),
            fix,
        ),
        (true, Some((file, nodes))) if !nodes.is_empty() => {
            Check::ok(ID, format!("nvidia-imex runs; {file} lists {}", nodes.join(", ")))
        }
        (true, nodes) => {
            let file =
                nodes.as_ref().map_or("/etc/nvidia-imex/config.cfg is missing", |_| "its list of nodes is empty");
            Check::warn(ID, format!("nvidia-imex runs and knows no node: {file}"), fix)
        }
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

/// Whether the KV cache may take the domain, too.
fn kv(subject: &Subject<'_>) -> Check {
    const ID: &str = "fabric.kv";
    let question = subject.question;
    if !subject.host.imex_channels.iter().any(|(_, node)| *node == DeviceNode::Usable) {
        return Check::ok(ID, "of no concern without an IMEX channel");
    }
    if question.backend == Backend::Libfabric {
        return Check::ok(ID, "LIBFABRIC carries the KV cache over its NICs; only UCX takes the NVLink domain");
    }
    let is_no = |value: &str| matches!(value.to_ascii_lowercase().as_str(), "n" | "no" | "0" | "off" | "false");
    let mut wrong = Vec::new();
    for (name, what) in [
        ("UCX_CUDA_IPC_ENABLE_MNNVL", "UCX leaves the domain alone"),
        (
            "TRTLLM_KVCACHE_POOL_USE_FABRIC_MEMORY",
            "the KV pool gets no fabric handle, without which no other host can map it",
        ),
    ] {
        if let Some(value) = question.variable(name).filter(|value| is_no(value)) {
            wrong.push(format!("{name}={value}: {what}"));
        }
    }
    let transports: Vec<&str> = question.variable("UCX_TLS").unwrap_or_default().split(',').map(str::trim).collect();
    let given = transports.iter().any(|word| !word.is_empty());
    let excludes = transports.first().is_some_and(|first| first.starts_with('^'));
    let named = transports.iter().any(|word| matches!(word.trim_start_matches('^'), "cuda_ipc" | "cuda" | "all"));
    if given && named == excludes {
        wrong.push(format!("UCX_TLS={} leaves cuda_ipc out, by which UCX uses NVLink", transports.join(",")));
    }
    let found = library::find(subject.root, &question.environment, "libucp.so.0", "KVFERRY_UCX_LIBRARY");
    let version = found.first().and_then(|first| library::packaged_version(subject.root, &first.real, "ucx"));
    if let Some((major, minor)) = version.filter(|version| *version < (1, 18)) {
        wrong.push(format!("UCX {major}.{minor}: NVLink between hosts from 1.18 on"));
    }
    if wrong.is_empty() {
        return Check::ok(
            ID,
            "nothing keeps UCX from the NVLink domain; that a pool has fabric handles, only a transfer shows",
        );
    }
    let fix = "unset these variables, or UCX_TLS=srd,cuda_copy,cuda_ipc,sm,self; use UCX 1.18 or newer (1.20 for EFA)";
    Check::warn(ID, "the KV cache is kept from the NVLink domain", fix).and(wrong)
}
