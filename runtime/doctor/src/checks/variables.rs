//! Variables: those that must be set, those that end the process, those that nobody reads.

use super::Subject;
use super::gpu::kernel;
use crate::question::Backend;
use crate::report::Check;

/// libfabric's efa provider ends the process when it sees them.
pub(crate) const ABORTING: [&str; 3] = ["FI_EFA_MTU_SIZE", "FI_EFA_TX_IOV_LIMIT", "FI_EFA_RX_IOV_LIMIT"];
/// No release that matters reads them.
pub(crate) const UNREAD: [(&str, &str); 8] = [
    ("FI_EFA_ENABLE_SHM", "FI_EFA_ENABLE_SHM_TRANSFER"),
    ("FI_EFA_SET_CUDA_SYNC_MEMOPS", ""),
    ("FI_EFA_SHM_MAX_MEDIUM_SIZE", ""),
    ("FI_EFA_ZCPY_RX_SEED", ""),
    ("UCX_TL", "UCX_TLS"),
    ("UCX_NET_DEVICE", "UCX_NET_DEVICES"),
    ("NIXL_PLUGINS_DIR", "NIXL_PLUGIN_DIR"),
    ("TRTLLM_NIXL_KV_CACHE_BACKEND", "TRTLLM_NIXL_KVCACHE_BACKEND"),
];

pub(super) fn checks(subject: &Subject<'_>) -> Vec<Check> {
    vec![
        shm_transfer(subject),
        provider(subject),
        device_rdma(subject),
        interfaces(subject),
        aborting(subject),
        unread(subject),
        ucx(subject),
    ]
}

fn shm_transfer(subject: &Subject<'_>) -> Check {
    const ID: &str = "variables.shm-transfer";
    const NAME: &str = "FI_EFA_ENABLE_SHM_TRANSFER";
    let value = subject.question.variable(NAME);
    let found = value.map_or(format!("{NAME} is not set, which means 1"), |value| format!("{NAME}={value}"));
    let fix = format!("set {NAME}=0 on prefill and decode");
    let off = value.is_some_and(|value| matches!(value, "0" | "false" | "no" | "off"));
    match (subject.question.backend, value) {
        _ if off => Check::ok(ID, found),
        (Backend::Libfabric, _) => {
            let why = "between processes of one host the efa provider would use shared memory, which breaks registrations of GPU buffers";
            Check::fail(ID, format!("{found}: {why}"), fix)
        }
        (Backend::Ucx, None) => Check::ok(ID, format!("{NAME} is not set; UCX never loads libfabric")),
        (Backend::Ucx, Some(_)) => {
            Check::warn(ID, format!("{found}: without effect under UCX, and wrong as soon as LIBFABRIC is chosen"), fix)
        }
    }
}

fn provider(subject: &Subject<'_>) -> Check {
    const ID: &str = "variables.provider";
    let value = subject.question.variable("FI_PROVIDER");
    if !subject.efa_matters() {
        return Check::ok(ID, "of no concern without EFA");
    }
    let fix = "set FI_PROVIDER=efa";
    match (subject.question.backend, value) {
        (_, Some("efa")) => Check::ok(ID, "FI_PROVIDER=efa: whatever is not EFA is a failure instead of a fallback"),
        (_, Some(value)) => Check::fail(ID, format!("FI_PROVIDER={value} keeps libfabric from EFA"), fix),
        (Backend::Libfabric, None) => Check::warn(
            ID,
            "FI_PROVIDER is not set: where EFA cannot be used, libfabric falls back to TCP without a word",
            fix,
        ),
        (Backend::Ucx, None) => Check::ok(ID, "FI_PROVIDER is not set; UCX never loads libfabric"),
    }
}

fn device_rdma(subject: &Subject<'_>) -> Check {
    const ID: &str = "variables.device-rdma";
    const NAME: &str = "FI_EFA_USE_DEVICE_RDMA";
    let has_efa = subject.host.efa_on_pci().next().is_some();
    match subject.question.variable(NAME) {
        None => Check::ok(ID, format!("{NAME} is not set: current libfabric uses what the hardware has")),
        Some("1") if has_efa || subject.question.backend == Backend::Ucx => {
            let first = subject.host.efa_on_pci().any(|pci| pci.device == 0xefa0);
            let note = "device 0xefa0: where it cannot read (instances older than p4d), this ends the process; unset, it does not";
            Check::ok(ID, format!("{NAME}=1")).and(first.then(|| note.to_owned()))
        }
        Some("1") => Check::fail(
            ID,
            format!("{NAME}=1 without an EFA device ends every process that opens the efa provider"),
            format!("unset {NAME} on hosts without EFA"),
        ),
        Some("0") => Check::fail(
            ID,
            format!("{NAME}=0: reads and writes are emulated with messages"),
            format!("set {NAME}=1, or unset it"),
        ),
        Some(value) => Check::fail(
            ID,
            format!("{NAME}={value}: any value but 0 and 1 ends the process"),
            format!("set {NAME}=1, or unset it"),
        ),
    }
}

/// Which devices libfabric's efa provider may take.
fn interfaces(subject: &Subject<'_>) -> Check {
    const ID: &str = "variables.interfaces";
    let value = subject.question.variable("FI_EFA_IFACE").unwrap_or_default();
    let names = value.split(',').map(str::trim).filter(|name| !name.is_empty() && *name != "all");
    let known = |name: &&str| subject.host.rdma.iter().any(|device| device == name);
    let absent: Vec<&str> = names.filter(|name| !known(name)).collect();
    if absent.is_empty() || !subject.efa_matters() {
        return Check::ok(ID, "FI_EFA_IFACE names no device that is not there");
    }
    let evidence =
        format!("FI_EFA_IFACE: there is no device {}; there are {}", absent.join(", "), subject.host.rdma.join(" "));
    let fix = "name devices as /sys/class/infiniband has them, without a port, or `all`";
    match subject.question.backend {
        Backend::Libfabric => Check::fail(ID, evidence, fix),
        Backend::Ucx => Check::warn(ID, format!("{evidence}; UCX does not read it, NCCL's plugin does"), fix),
    }
}

fn aborting(subject: &Subject<'_>) -> Check {
    const ID: &str = "variables.aborting";
    let question = subject.question;
    let mut found: Vec<String> = ABORTING
        .into_iter()
        .filter_map(|name| {
            question.variable(name).map(|value| format!("{name}={value}: its presence ends the process"))
        })
        .collect();
    if question.variable("FI_EFA_IFACE") == Some("") {
        found.push("FI_EFA_IFACE is empty: that ends the process; `all` is the word".to_owned());
    }
    if question
        .variable("FI_EFA_TX_MIN_CREDITS")
        .is_some_and(|value| value.parse::<i64>().is_ok_and(|value| value <= 0))
    {
        found.push("FI_EFA_TX_MIN_CREDITS is not above 0: that ends the process".to_owned());
    }
    if found.is_empty() {
        return Check::ok(ID, "no variable that ends processes");
    }
    Check::fail(ID, "libfabric's efa provider, which NCCL's plugin uses, too, ends the process", "unset them")
        .and(found)
}

fn unread(subject: &Subject<'_>) -> Check {
    const ID: &str = "variables.unread";
    let question = subject.question;
    let found: Vec<String> = UNREAD
        .into_iter()
        .filter(|(name, _)| question.variable(name).is_some())
        .map(|(name, meant)| match meant {
            "" => format!("{name} is read by no current libfabric"),
            meant => format!("{name} is no parameter; {meant} is"),
        })
        .chain(fork_safe(subject))
        .collect();
    if !found.is_empty() {
        return Check::warn(ID, "variables that nobody reads", "unset them, or use the name that is read").and(found);
    }
    let prefix = match question.backend {
        Backend::Ucx => "FI_",
        Backend::Libfabric => "UCX_",
    };
    let idle: Vec<&str> =
        question.environment.keys().map(String::as_str).filter(|name| name.starts_with(prefix)).collect();
    if idle.is_empty() {
        return Check::ok(ID, "no variable without effect");
    }
    let carrier = question.backend.name();
    Check::ok(ID, format!("without effect on the KV cache, which {carrier} carries: {}", idle.join(", ")))
}

/// Newer kernels copy what was registered for a child by themselves; on older ones it turns huge pages off.
fn fork_safe(subject: &Subject<'_>) -> Option<String> {
    subject.question.variable("FI_EFA_FORK_SAFE")?;
    let newer = kernel(&subject.host.kernel) >= (5, 13);
    newer.then(|| format!("FI_EFA_FORK_SAFE has no effect on Linux {}", subject.host.kernel))
}

fn ucx(subject: &Subject<'_>) -> Check {
    const ID: &str = "variables.ucx";
    let question = subject.question;
    if question.backend != Backend::Ucx {
        return Check::ok(ID, "of no concern: UCX does not carry the KV cache");
    }
    let list = |name: &str| -> Vec<&str> {
        question.variable(name).unwrap_or_default().split(',').map(str::trim).filter(|word| !word.is_empty()).collect()
    };
    let mut wrong = Vec::new();
    let transports = list("UCX_TLS");
    let efa = subject.efa_matters();
    if transports.contains(&"efa") {
        wrong.push("UCX_TLS has `efa`, which is no transport; EFA's is `srd`".to_owned());
    }
    let excludes = transports.first().is_some_and(|first| first.starts_with('^'));
    if efa && excludes && transports.iter().any(|word| matches!(word.trim_start_matches('^'), "ib" | "srd")) {
        wrong.push(format!("UCX_TLS={} excludes EFA", transports.join(",")));
    }
    let reaches_efa = |word: &&str| matches!(*word, "srd" | "ib" | "all" | "efa");
    if efa && !transports.is_empty() && !excludes && !transports.iter().any(reaches_efa) {
        wrong.push(format!("UCX_TLS={} leaves EFA out", transports.join(",")));
    }
    for device in list("UCX_NET_DEVICES").into_iter().filter(|device| *device != "all" && !device.contains('[')) {
        let (name, port) = device.split_once(':').unwrap_or((device, ""));
        match subject.host.rdma.iter().any(|known| known == name) {
            true if port.is_empty() => {
                wrong.push(format!("UCX_NET_DEVICES: `{device}` lacks its port, write {name}:1"))
            }
            false if name.starts_with("rdmap") || name.starts_with("efa_") => {
                wrong.push(format!(
                    "UCX_NET_DEVICES: there is no device `{name}`; there are {}",
                    subject.host.rdma.join(" ")
                ));
            }
            _ => {}
        }
    }
    let components = question.variable("UCX_MAX_COMPONENT_MDS").and_then(|value| value.parse::<usize>().ok());
    if components.is_some_and(|limit| limit < subject.host.efa.len()) {
        let devices = subject.host.efa.len();
        wrong.push(format!("UCX_MAX_COMPONENT_MDS leaves some of the {devices} EFA devices out of every context"));
    }
    if efa && question.variable("UCX_RNDV_THRESH").is_some_and(|value| value != "inf") {
        wrong.push(
            "UCX_RNDV_THRESH is not `inf`: with error handling SRD then emulates put and get in software".to_owned(),
        );
    }
    if wrong.is_empty() {
        return Check::ok(ID, "UCX's variables leave EFA as it is");
    }
    let fix = "unset them, or UCX_TLS=srd,cuda_copy,cuda_ipc,sm,self, UCX_NET_DEVICES=<device>:1 and UCX_RNDV_THRESH=inf; \
               UCX_PROTO_EMULATION_ENABLE=n (from 1.22 on) makes emulation an error";
    Check::fail(ID, "UCX is kept from EFA", fix).and(wrong)
}
