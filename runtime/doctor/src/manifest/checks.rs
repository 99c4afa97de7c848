//! The rules, each over all workers.

mod gb200;

use std::rc::Rc;

use kvferry_yaml::Node;

use super::Subject;
use super::workload::{Workload, items, within, word};
use crate::checks::variables::{ABORTING, UNREAD};
use crate::question::Role;
use crate::report::{Check, Status};

const EFA: &str = "vpc.amazonaws.com/efa";
const SDK: &str = "/opt/amazon/efa";
const BUNDLED: &str = "tensorrt_llm/libs/nixl";
/// Of no use as a value, and of much as a mistake.
const PLUGINS: &str = "/opt/dynamo/venv/lib/python3.12/site-packages/tensorrt_llm/libs/nixl/plugins";

pub(crate) fn all(subject: &Subject<'_>) -> Vec<Check> {
    vec![
        efa_resources(subject),
        efa_environment(subject),
        shm_transfer(subject),
        variables(subject),
        library_path(subject),
        efa_sdk(subject),
        privileged(subject),
        plugin_dir(subject),
        kv_method(subject),
        gb200::compute_domain(subject),
        gb200::nccl(subject),
        gb200::gdrcopy(subject),
    ]
}

/// Lines of evidence that one check has at most, and their length: manifests may be hostile.
pub(super) const LINES_MAX: usize = 100;
const LINE_CHARS_MAX: usize = 500;

fn shortened(line: String) -> String {
    match line.char_indices().nth(LINE_CHARS_MAX) {
        Some((end, _)) => format!("{}…", line.get(..end).unwrap_or_default()),
        None => line,
    }
}

/// What is wrong, gathered: the check is as bad as its worst line.
struct Findings {
    status: Status,
    lines: Vec<String>,
    more: usize,
}

impl Findings {
    fn new() -> Findings {
        Findings { status: Status::Ok, lines: Vec::new(), more: 0 }
    }

    fn add(&mut self, status: Status, line: String) {
        self.status = self.status.max(status);
        if self.lines.len() < LINES_MAX {
            self.lines.push(shortened(line));
        } else {
            self.more += 1;
        }
    }

    fn check(mut self, id: &'static str, good: impl Into<String>, bad: &str, fix: &str) -> Check {
        let check = match self.status {
            Status::Ok => Check::ok(id, good),
            Status::Warn => Check::warn(id, bad, fix),
            Status::Fail => Check::fail(id, bad, fix),
        };
        if self.more > 0 {
            self.lines.push(format!("and {} more", self.more));
        }
        check.and(self.lines)
    }
}

impl Workload {
    fn asks_for_efa(&self) -> bool {
        let asked = ["requests", "limits"].into_iter().filter_map(|list| within(self.resources.as_ref()?, &[list]));
        let custom = |list: &Rc<Node>| within(list, &["custom", EFA]).is_some();
        asked.into_iter().any(|list| list.entry(EFA).is_some() || custom(&list))
    }

    /// It speaks of EFA in one way or another.
    fn means_efa(&self) -> bool {
        let image = self.image.as_ref().and_then(|image| image.text()).unwrap_or_default();
        self.asks_for_efa()
            || (self.role.is_some() && image.contains("-efa"))
            || self.variable("FI_PROVIDER").is_some_and(|found| found.value.as_deref() == Some("efa"))
    }

    fn claims(&self) -> Vec<Rc<Node>> {
        self.resources.iter().flat_map(|resources| items(resources, "claims").cloned().collect::<Vec<_>>()).collect()
    }

    fn references(&self) -> Vec<Rc<Node>> {
        self.pod.iter().flat_map(|pod| items(pod, "resourceClaims").cloned().collect::<Vec<_>>()).collect()
    }

    fn is_arm64(&self) -> bool {
        let selector = self.pod.as_ref().and_then(|pod| within(pod, &["nodeSelector", "kubernetes.io/arch"]));
        selector.is_some_and(|arch| arch.text() == Some("arm64"))
    }
}

fn efa_resources(subject: &Subject<'_>) -> Check {
    let mut findings = Findings::new();
    for workload in &subject.workloads {
        let raw = |list: &str| within(workload.resources.as_ref()?, &[list, EFA]);
        if workload.dynamo
            && let Some(place) = raw("limits").or_else(|| raw("requests"))
        {
            let line = "Dynamo's v1alpha1 drops it here: it belongs below `custom`, as text";
            findings.add(Status::Fail, format!("{}: {}: {EFA}: {line}", subject.at(&place), workload.name));
            continue;
        }
        let (request, limit) = (workload.amount("requests", EFA), workload.amount("limits", EFA));
        let amount = |node: &Rc<Node>| node.text().unwrap_or("?").to_owned();
        match (&request, &limit) {
            (None, Some(limit)) => findings.add(
                Status::Fail,
                format!("{}: {}: limit {} without a request", subject.at(limit), workload.name, amount(limit)),
            ),
            (Some(request), None) => findings.add(
                Status::Fail,
                format!("{}: {}: request {} without a limit", subject.at(request), workload.name, amount(request)),
            ),
            (Some(request), Some(limit)) if amount(request) != amount(limit) => findings.add(
                Status::Fail,
                format!(
                    "{}: {}: request {} and limit {} differ",
                    subject.at(request),
                    workload.name,
                    amount(request),
                    amount(limit)
                ),
            ),
            (Some(request), Some(_)) => {
                if let Some(expected) = subject.expect.efa
                    && amount(request).parse() != Ok(expected)
                {
                    let line = format!("{} EFA devices, {expected} expected", amount(request));
                    findings.add(Status::Fail, format!("{}: {}: {line}", subject.at(request), workload.name));
                }
            }
            (None, None)
                if workload.role.is_some()
                    && (workload.means_efa() || subject.expect.efa.is_some_and(|count| count > 0)) =>
            {
                let line = "EFA is meant, and no device is asked for: UCX falls back to TCP without a word";
                findings.add(Status::Fail, format!("{}: {}: {line}", subject.at(&workload.place), workload.name));
            }
            _ => {}
        }
    }
    let fix = "give the same number in resources.requests and resources.limits: vpc.amazonaws.com/efa: \"4\" (Dynamo's v1alpha1: below `custom`)";
    findings.check(
        "manifest.efa-resources",
        "EFA devices are asked for alike in requests and limits, or not at all",
        "Kubernetes takes extended resources only when request and limit are there and the same",
        fix,
    )
}

fn efa_environment(subject: &Subject<'_>) -> Check {
    let mut findings = Findings::new();
    for workload in subject.workloads.iter().filter(|workload| workload.means_efa()) {
        for (name, wanted, missing) in
            [("FI_PROVIDER", "efa", Status::Warn), ("FI_EFA_USE_DEVICE_RDMA", "1", Status::Warn)]
        {
            match workload.variable(name) {
                None => findings
                    .add(missing, format!("{}: {}: {name} is not set", subject.at(&workload.place), workload.name)),
                Some(found) if found.value.as_deref().is_some_and(|value| value != wanted) => findings.add(
                    Status::Fail,
                    format!(
                        "{}: {}: {name}={}",
                        subject.at(&found.place),
                        workload.name,
                        found.value.as_deref().unwrap_or_default()
                    ),
                ),
                Some(_) => {}
            }
        }
    }
    let fix = "set FI_PROVIDER=efa and FI_EFA_USE_DEVICE_RDMA=1 on prefill and decode";
    findings.check(
        "manifest.efa-environment",
        "workers with EFA say so to libfabric",
        "libfabric is not told to use EFA's RDMA, and nothing else",
        fix,
    )
}

fn shm_transfer(subject: &Subject<'_>) -> Check {
    const NAME: &str = "FI_EFA_ENABLE_SHM_TRANSFER";
    let mut findings = Findings::new();
    for workload in &subject.workloads {
        match workload.variable(NAME) {
            Some(found)
                if found.value.as_deref().is_some_and(|value| !matches!(value, "0" | "false" | "no" | "off")) =>
            {
                findings.add(
                    Status::Fail,
                    format!(
                        "{}: {}: {NAME}={}",
                        subject.at(&found.place),
                        workload.name,
                        found.value.as_deref().unwrap_or_default()
                    ),
                )
            }
            None if workload.means_efa() => findings.add(
                Status::Fail,
                format!("{}: {}: {NAME} is not set, which means 1", subject.at(&workload.place), workload.name),
            ),
            _ => {}
        }
    }
    let fix = "set FI_EFA_ENABLE_SHM_TRANSFER=\"0\" on prefill and decode";
    findings.check(
        "manifest.shm-transfer",
        "libfabric's shared memory is off where EFA is used",
        "shared memory between processes of one host breaks NIXL's registrations of GPU buffers",
        fix,
    )
}

/// Variables that end processes, or that nobody reads.
fn variables(subject: &Subject<'_>) -> Check {
    let mut findings = Findings::new();
    for workload in &subject.workloads {
        for found in workload.variables() {
            let line = |what: &str| format!("{}: {}: {} {what}", subject.at(&found.place), workload.name, found.name);
            if ABORTING.contains(&found.name.as_str()) {
                findings
                    .add(Status::Fail, line("ends every process that opens the efa provider, by its mere presence"));
            } else if found.name == "FI_EFA_IFACE" && found.value.as_deref() == Some("") {
                findings.add(Status::Fail, line("is empty: that ends the process; `all` is the word"));
            } else if let Some((_, meant)) = UNREAD.iter().find(|(name, _)| *name == found.name) {
                let meant = if meant.is_empty() { String::new() } else { format!("; {meant} is meant") };
                findings.add(Status::Warn, line(&format!("is read by nobody{meant}")));
            }
        }
    }
    findings.check(
        "manifest.variables",
        "no variable that ends processes, and none that nobody reads",
        "libfabric's efa provider, which NCCL's plugin uses, too, ends the process, or ignores the variable",
        "remove it",
    )
}

fn library_path(subject: &Subject<'_>) -> Check {
    let mut findings = Findings::new();
    for workload in subject.workloads.iter().filter(|workload| workload.means_efa()) {
        let found = workload.variable("LD_LIBRARY_PATH");
        let first = found.and_then(|found| found.value.as_deref()).and_then(|path| path.split(':').next());
        match (found, first) {
            (Some(found), Some(first)) if !first.starts_with(SDK) => findings.add(
                Status::Warn,
                format!("{}: {}: LD_LIBRARY_PATH begins with {first}", subject.at(&found.place), workload.name),
            ),
            (None, _) => findings.add(
                Status::Warn,
                format!("{}: {}: LD_LIBRARY_PATH is not set", subject.at(&workload.place), workload.name),
            ),
            _ => {}
        }
    }
    let fix = "set LD_LIBRARY_PATH=/opt/amazon/efa/lib:/usr/local/lib:/usr/lib on prefill and decode";
    findings.check(
        "manifest.library-path",
        "the EFA SDK's libraries are found first where EFA is used",
        "another libfabric may be found than the EFA SDK's",
        fix,
    )
}

fn efa_sdk(subject: &Subject<'_>) -> Check {
    let mut findings = Findings::new();
    for workload in &subject.workloads {
        let volumes: Vec<Rc<Node>> =
            workload.pod.iter().flat_map(|pod| items(pod, "volumes").cloned().collect::<Vec<_>>()).collect();
        let volume = |name: &str| volumes.iter().find(|volume| word(volume, "name") == Some(name));
        let mut mounted = false;
        for mount in
            workload.mounts.iter().filter(|mount| word(mount, "mountPath").is_some_and(|path| path.starts_with(SDK)))
        {
            let name = word(mount, "name").unwrap_or_default();
            let from = volume(name).and_then(|volume| within(volume, &["hostPath", "path"]));
            match from.as_ref().and_then(|path| path.text()) {
                Some(path) if path.starts_with(SDK) => mounted = true,
                Some(path) => findings
                    .add(Status::Fail, format!("{}: {}: {SDK} is the host's {path}", subject.at(mount), workload.name)),
                None => findings.add(
                    Status::Fail,
                    format!(
                        "{}: {}: {SDK} is mounted from volume `{name}`, which is no folder of the host",
                        subject.at(mount),
                        workload.name
                    ),
                ),
            }
        }
        let image = workload.image.as_ref().and_then(|image| Some((image, image.text()?)));
        match image {
            Some((place, image)) if workload.is_arm64() && image.ends_with("-amd64") => findings.add(
                Status::Fail,
                format!(
                    "{}: {}: {image} on arm64 nodes: there is no EFA image for them",
                    subject.at(place),
                    workload.name
                ),
            ),
            Some((place, image)) if workload.asks_for_efa() && !image.contains("-efa") && !mounted => {
                let status = if workload.is_arm64() { Status::Fail } else { Status::Warn };
                findings.add(
                    status,
                    format!(
                        "{}: {}: {image} has no EFA SDK, and the host's is not mounted",
                        subject.at(place),
                        workload.name
                    ),
                );
            }
            _ => {}
        }
    }
    let fix = "on amd64 take an image with the EFA SDK (…-efa-amd64); on arm64 mount the host's: volumes hostPath /opt/amazon/efa, mountPath /opt/amazon/efa";
    findings.check(
        "manifest.efa-sdk",
        "the EFA SDK is in the image or mounted from the host, where EFA is asked for",
        "the EFA SDK is not where the workers look for it",
        fix,
    )
}

fn privileged(subject: &Subject<'_>) -> Check {
    let mut findings = Findings::new();
    for workload in subject.workloads.iter().filter(|workload| workload.asks_for_efa()) {
        let is = |key: &str| workload.security.as_ref().is_some_and(|security| word(security, key) == Some("true"));
        let added = workload.security.as_ref().and_then(|security| within(security, &["capabilities"]));
        let locks = added.is_some_and(|added| items(&added, "add").any(|name| name.text() == Some("IPC_LOCK")));
        if !is("privileged") && !locks {
            findings.add(
                Status::Warn,
                format!("{}: {}: neither privileged nor with IPC_LOCK", subject.at(&workload.place), workload.name),
            );
        }
    }
    let fix = "set securityContext.privileged: true (Dynamo's images need it today), or capabilities.add: [IPC_LOCK] where the device plugin suffices";
    findings.check(
        "manifest.privileged",
        "workers with EFA may lock memory",
        "registering memory with EFA fails without the right to lock it",
        fix,
    )
}

fn plugin_dir(subject: &Subject<'_>) -> Check {
    const NAME: &str = "NIXL_PLUGIN_DIR";
    let mut findings = Findings::new();
    for workload in &subject.workloads {
        let found = workload.variable(NAME);
        let bundled = found.and_then(|found| found.value.as_deref()).is_some_and(|folder| folder.contains(BUNDLED));
        match (workload.role, found) {
            (Some(Role::Prefill), Some(found)) => {
                let status = if bundled { Status::Fail } else { Status::Warn };
                let line = "on prefill, which loads the system's NIXL and finds its plugins itself";
                findings.add(status, format!("{}: {}: {NAME} {line}", subject.at(&found.place), workload.name));
            }
            (Some(Role::Decode), Some(found)) if workload.nodes == Some(1) && bundled => {
                let line = "on decode of one node, which loads the system's NIXL";
                findings.add(Status::Warn, format!("{}: {}: {NAME} {line}", subject.at(&found.place), workload.name));
            }
            (Some(Role::Decode), Some(found)) if workload.nodes > Some(1) && !bundled => {
                let line = "on decode of several nodes does not name TensorRT-LLM's own plugins";
                findings.add(Status::Fail, format!("{}: {}: {NAME} {line}", subject.at(&found.place), workload.name));
            }
            (Some(Role::Decode), None) if workload.nodes > Some(1) => {
                let line = "is not set on decode of several nodes: mpirun's workers load TensorRT-LLM's NIXL with the image's plugins";
                findings
                    .add(Status::Fail, format!("{}: {}: {NAME} {line}", subject.at(&workload.place), workload.name));
            }
            _ => {}
        }
    }
    let fix = format!("set NIXL_PLUGIN_DIR={PLUGINS} on decode of several nodes, and nowhere else");
    findings.check(
        "manifest.plugin-dir",
        "NIXL's plugins are named where they must be, and only there",
        "plugins of one NIXL for another have another ABI",
        &fix,
    )
}

fn kv_method(subject: &Subject<'_>) -> Check {
    const NAME: &str = "TRTLLM_NIXL_KVCACHE_BACKEND";
    let mut findings = Findings::new();
    for workload in &subject.workloads {
        if let Some(found) =
            workload.variable("TRTLLM_USE_UCX_KVCACHE").filter(|found| found.value.as_deref() == Some("1"))
        {
            let line =
                "TRTLLM_USE_UCX_KVCACHE=1 does not select UCX while cache_transceiver_config has backend: DEFAULT";
            findings.add(Status::Warn, format!("{}: {}: {line}", subject.at(&found.place), workload.name));
        }
        if let Some(found) = workload.variable(NAME)
            && let Some(value) = found.value.as_deref().filter(|value| !matches!(*value, "UCX" | "LIBFABRIC"))
        {
            findings.add(
                Status::Warn,
                format!("{}: {}: {NAME}={value} is UCX without a word", subject.at(&found.place), workload.name),
            );
        }
    }
    let fix = "set backend: UCX in cache_transceiver_config to use UCX directly; TRTLLM_NIXL_KVCACHE_BACKEND is UCX or LIBFABRIC";
    findings.check(
        "manifest.kv-method",
        "no variable about the KV cache's method is ignored",
        "a variable is ignored",
        fix,
    )
}
