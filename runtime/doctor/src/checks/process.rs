//! What the process may do: locked memory, huge pages, privileges, other processes' memory.

use super::Subject;
use super::gpu::kernel;
use crate::report::Check;

const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;

pub(super) fn checks(subject: &Subject<'_>) -> Vec<Check> {
    vec![memlock(subject), hugepages(subject), privileges(subject), ptrace(subject)]
}

fn memlock(subject: &Subject<'_>) -> Check {
    const ID: &str = "process.memlock";
    let rdma = !subject.host.rdma.is_empty() || subject.efa_matters();
    let fix = "docker: --ulimit memlock=-1; Kubernetes: securityContext.capabilities.add: [IPC_LOCK]; host: `* - memlock unlimited` in \
               /etc/security/limits.d";
    match subject.host.memlock {
        Some(None) => Check::ok(ID, "Max locked memory is unlimited"),
        Some(Some(bytes)) if subject.host.can(CAP_IPC_LOCK) && !subject.host.rootless => {
            Check::ok(ID, format!("Max locked memory is {bytes} bytes, which CAP_IPC_LOCK overrides"))
        }
        Some(Some(bytes)) if !rdma => {
            Check::ok(ID, format!("Max locked memory is {bytes} bytes; there is no RDMA device that would need more"))
        }
        Some(Some(bytes)) if subject.host.can(CAP_IPC_LOCK) => Check::fail(
            ID,
            format!(
                "Max locked memory is {bytes} bytes, and CAP_IPC_LOCK is that of a user namespace (/proc/self/uid_map), which drivers do not heed"
            ),
            "raise the limit of whoever starts the rootless container: `* - memlock unlimited` in /etc/security/limits.d, LimitMEMLOCK=infinity",
        ),
        Some(Some(bytes)) => Check::fail(
            ID,
            format!("Max locked memory is {bytes} bytes and there is no CAP_IPC_LOCK: memory cannot be registered"),
            fix,
        ),
        None if !rdma => Check::ok(ID, "/proc/self/limits does not say; there is no RDMA device that would need any"),
        None => Check::warn(ID, "/proc/self/limits does not say how much memory may be locked", fix),
    }
}

fn hugepages(subject: &Subject<'_>) -> Check {
    const ID: &str = "process.hugepages";
    if !subject.efa_matters() {
        return Check::ok(ID, "of no concern without EFA");
    }
    let asked = subject.question.variable("FI_EFA_USE_HUGE_PAGE").is_some_and(|value| value != "0");
    let fix = "request hugepages-2Mi for the pod and mount an emptyDir with medium: HugePages; host: vm.nr_hugepages";
    match subject.host.hugepages {
        Some(_)
            if subject.question.variable("FI_EFA_FORK_SAFE").is_some() && kernel(&subject.host.kernel) < (5, 13) =>
        {
            let evidence =
                format!("FI_EFA_FORK_SAFE turns libfabric's huge pages off on Linux {}", subject.host.kernel);
            Check::warn(ID, evidence, "unset FI_EFA_FORK_SAFE, or run Linux 5.13 or newer, which needs it no more")
        }
        Some((total, free)) if free > 0 => Check::ok(ID, format!("{free} of {total} huge pages are free")),
        Some((total, _)) if asked => {
            Check::fail(ID, format!("FI_EFA_USE_HUGE_PAGE asks for huge pages, 0 of {total} are free"), fix)
        }
        Some((total, _)) => Check::warn(
            ID,
            format!(
                "0 of {total} huge pages are free: host memory beyond 4 GiB cannot be one region for remote writes"
            ),
            fix,
        ),
        None => Check::warn(ID, "/proc/meminfo has no HugePages_Total", fix),
    }
}

fn privileges(subject: &Subject<'_>) -> Check {
    const ID: &str = "process.privileges";
    let Some(bits) = subject.host.capabilities else {
        return Check::ok(ID, "/proc/self/status does not say");
    };
    let seccomp = match subject.host.seccomp {
        None => String::new(),
        Some(0) => ", no seccomp filter".to_owned(),
        Some(mode) => format!(", seccomp mode {mode}"),
    };
    let evidence = format!("CapEff {bits:016x}{seccomp}");
    if !subject.efa_matters() || subject.host.can(CAP_SYS_ADMIN) {
        return Check::ok(ID, evidence);
    }
    let fix = "securityContext.privileged: true, as Dynamo's page requires for EFA; AWS's own samples run with the device plugin and IPC_LOCK \
               only, so leave it if efa.nodes and process.memlock are ok";
    Check::warn(ID, format!("{evidence}: the process is not privileged"), fix)
}

fn ptrace(subject: &Subject<'_>) -> Check {
    const ID: &str = "process.ptrace";
    if subject.host.rdma.is_empty() && subject.host.gpus().next().is_none() && !subject.efa_matters() {
        return Check::ok(ID, "of no concern without a GPU or an RDMA device: nothing here runs workers");
    }
    match subject.host.ptrace_scope {
        None | Some(0) => Check::ok(ID, "processes of one user may read each other's memory"),
        Some(scope) if scope < 3 && subject.host.can(CAP_SYS_PTRACE) => {
            Check::ok(ID, format!("ptrace_scope is {scope}, which CAP_SYS_PTRACE overrides"))
        }
        Some(scope) => Check::warn(
            ID,
            format!(
                "/proc/sys/kernel/yama/ptrace_scope is {scope}: memory that another process allocated cannot be read through CMA"
            ),
            "kernel.yama.ptrace_scope=0 on the host, or securityContext.capabilities.add: [SYS_PTRACE]; kvferry's own pools do not need it",
        ),
    }
}
