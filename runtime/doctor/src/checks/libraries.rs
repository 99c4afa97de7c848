//! Which libfabric and UCX would be loaded, and whether they can use EFA; NIXL's plugins; copies that get in each other's way.

use super::Subject;
use crate::library::{self, Found, Libfabric};
use crate::question::{Backend, Role};
use crate::report::Check;
use crate::root::names;

const AMAZON_FOLDER: &str = "/opt/amazon/efa/lib";

pub(super) fn checks(subject: &Subject<'_>) -> Vec<Check> {
    vec![libfabric(subject), ucx(subject), verbs(subject), nccl_plugin(subject), copies(subject), nixl_plugins(subject)]
}

fn shown(subject: &Subject<'_>, found: &[Found]) -> Vec<String> {
    let line = |(index, found): (usize, &Found)| {
        let verb = if index == 0 { "takes" } else { "shadows" };
        let (path, real) = (subject.root.shown(&found.path), subject.root.shown(&found.real));
        format!("the loader {verb} {path} -> {real} (by {})", found.by)
    };
    found.iter().enumerate().map(line).collect()
}

fn libfabric(subject: &Subject<'_>) -> Check {
    const ID: &str = "library.libfabric";
    let environment = &subject.question.environment;
    let found = library::find(subject.root, environment, "libfabric.so.1", "KVFERRY_LIBFABRIC_LIBRARY");
    let list = shown(subject, &found);
    let needed = subject.question.backend == Backend::Libfabric;
    let fix = format!("put {AMAZON_FOLDER} first: LD_LIBRARY_PATH={AMAZON_FOLDER}:/usr/local/lib:/usr/lib");
    if !needed && !subject.efa_matters() {
        return Check::ok(ID, "of no concern: UCX carries the KV cache, and there is no EFA").and(list);
    }
    let Some(first) = found.first() else {
        let install = format!("use the EFA image, or mount the host's /opt/amazon/efa into the container; then {fix}");
        return if needed {
            Check::fail(ID, "no libfabric.so.1 on the loader's path", install)
        } else {
            Check::ok(ID, "no libfabric.so.1 on the loader's path; UCX does not need it")
        };
    };
    let Some(library) = Libfabric::read(subject.root, &first.real) else {
        return Check::fail(ID, "the library cannot be read", fix).and(list);
    };
    let evidence = format!("its newest ABI is FABRIC_1.{}, which releases {} have", library.abi, library.releases());
    // NCCL's plugin uses it, too.
    let amazon = subject.root.at(AMAZON_FOLDER).join("libfabric.so.1");
    let shadowed = subject.root.real(&amazon).is_some_and(|amazon| amazon != first.real);
    if shadowed {
        return Check::fail(ID, format!("not Amazon's libfabric: {evidence}"), fix).and(list);
    }
    if !library.efa {
        return Check::fail(ID, format!("it has no efa provider: {evidence}"), fix).and(list);
    }
    if library.abi < 7 {
        return Check::fail(
            ID,
            format!("too old, at least 1.21 is needed: {evidence}"),
            "install a current EFA installer's libfabric",
        )
        .and(list);
    }
    if library.abi < 9 && subject.host.is_of_a_rack() {
        return Check::fail(
            ID,
            format!(
                "GB200 needs at least 2.5 (its pages of 64 KiB: earlier ones refuse GPU memory with EFAULT): {evidence}"
            ),
            "install an EFA installer newer than 1.48, whose libfabric is 2.4, and put its /opt/amazon/efa/lib first",
        )
        .and(list);
    }
    Check::ok(ID, format!("it has the efa provider; {evidence}")).and(list)
}

fn ucx(subject: &Subject<'_>) -> Check {
    const ID: &str = "library.ucx";
    let environment = &subject.question.environment;
    let found = library::find(subject.root, environment, "libucp.so.0", "KVFERRY_UCX_LIBRARY");
    let list = shown(subject, &found);
    if subject.question.backend != Backend::Ucx || !subject.efa_matters() {
        return Check::ok(ID, "of no concern: not UCX over EFA").and(list);
    }
    let fix = "use a UCX from 1.20 on that was built --with-verbs --with-efa against rdma-core 46 or newer (Dynamo's EFA image has one), and put \
               its folder first in LD_LIBRARY_PATH, or name it: KVFERRY_UCX_LIBRARY=/…/libucp.so.0";
    let Some(first) = found.first() else {
        return Check::fail(
            ID,
            "no libucp.so.0 on the loader's path; wheels bring one of their own, which only they load",
            fix,
        );
    };
    let version = library::packaged_version(subject.root, &first.real, "ucx");
    let said =
        version.map_or("of a version that no ucx.pc gives".to_owned(), |(major, minor)| format!("{major}.{minor}"));
    let modules = match environment.get("UCX_MODULE_DIR") {
        Some(folder) => subject.root.file(folder),
        None => subject.root.inside(&first.real.parent().map(|folder| folder.join("ucx")).unwrap_or_default()),
    };
    if !names(&modules).iter().any(|name| name.starts_with("libuct_ib_efa.so")) {
        let evidence =
            format!("UCX {said} has no EFA component: no libuct_ib_efa.so in {}", subject.root.shown(&modules));
        return Check::fail(ID, evidence, fix).and(list);
    }
    if version.is_some_and(|version| version < (1, 20)) {
        return Check::fail(ID, format!("UCX {said}: SRD is usable from 1.20 on"), fix).and(list);
    }
    let has_gpus = subject.host.gpus().next().is_some();
    if has_gpus && !names(&modules).iter().any(|name| name.starts_with("libuct_cuda.so")) {
        let evidence = format!(
            "UCX {said} was built without CUDA: no libuct_cuda.so in {}, so it takes GPU memory for host memory or refuses it",
            subject.root.shown(&modules)
        );
        let fix = "use a UCX that was built --with-cuda, too, and let its module find libcuda.so.1 (NVIDIA_DRIVER_CAPABILITIES=compute,utility)";
        return Check::fail(ID, evidence, fix).and(list);
    }
    Check::ok(ID, format!("UCX {said} has the EFA component")).and(list)
}

/// What UCX and libfabric open EFA devices through: without the provider of the library's own generation it lists none, without a word.
fn verbs(subject: &Subject<'_>) -> Check {
    const ID: &str = "library.verbs";
    if !subject.efa_matters() {
        return Check::ok(ID, "of no concern without EFA");
    }
    let find = |name: &str| library::find(subject.root, &subject.question.environment, name, "");
    let (verbs, efa) = (find("libibverbs.so.1"), find("libefa.so.1"));
    let list = shown(subject, &verbs).into_iter().chain(shown(subject, &efa));
    let fix = "install rdma-core with its efa provider (the EFA installer has both), from one source, and leave no other copy on the loader's path";
    let (Some(library), true) = (verbs.first(), !efa.is_empty()) else {
        let missing = if verbs.is_empty() { "libibverbs.so.1" } else { "libefa.so.1" };
        return Check::fail(ID, format!("no {missing} on the loader's path: no EFA device can be opened"), fix)
            .and(list);
    };
    let Some(generation) = library::verbs_generation(&library.real) else {
        return Check::ok(ID, "libibverbs and libefa are on the loader's path").and(list);
    };
    let folder = library.real.parent().map(|parent| parent.join("libibverbs")).unwrap_or_default();
    let shown_folder = subject.root.shown(&folder);
    let wanted = format!("libefa-rdmav{generation}.so");
    let providers = names(&subject.root.inside(&folder));
    if providers.contains(&wanted) {
        return Check::ok(ID, format!("libibverbs has its efa provider, {shown_folder}/{wanted}")).and(list);
    }
    match providers.iter().find(|name| name.starts_with("libefa-rdmav")) {
        Some(other) => {
            let evidence = format!(
                "libibverbs loads {wanted}, and {shown_folder} has {other}, of another rdma-core: it lists no EFA device"
            );
            Check::fail(ID, evidence, fix).and(list)
        }
        None => {
            let evidence =
                format!("no {wanted} in {shown_folder}: unless libibverbs finds it elsewhere, it lists no EFA device");
            Check::warn(ID, evidence, fix).and(list)
        }
    }
}

fn nccl_plugin(subject: &Subject<'_>) -> Check {
    const ID: &str = "library.nccl";
    if !subject.efa_matters() {
        return Check::ok(ID, "of no concern without EFA");
    }
    if let Some(net) = subject.question.variable("NCCL_NET").filter(|net| net.eq_ignore_ascii_case("socket")) {
        let evidence = format!("NCCL_NET={net} keeps NCCL to sockets, whatever plugin there is");
        return Check::warn(
            ID,
            evidence,
            "unset NCCL_NET, or NCCL_NET=\"AWS Libfabric\", which makes its absence an error",
        );
    }
    let environment = &subject.question.environment;
    let found = ["libnccl-net.so", "libnccl-net-ofi.so"]
        .into_iter()
        .find_map(|name| library::find(subject.root, environment, name, "").into_iter().next());
    let amazon = [
        "/opt/amazon/ofi-nccl/lib",
        "/opt/amazon/ofi-nccl/lib/x86_64-linux-gnu",
        "/opt/amazon/ofi-nccl/lib64",
        "/opt/aws-ofi-nccl/lib",
    ];
    let installed = amazon
        .into_iter()
        .find(|folder| names(&subject.root.file(folder)).iter().any(|name| name.starts_with("libnccl-net")));
    match (found, installed) {
        (Some(found), _) => Check::ok(ID, format!("{} is on the loader's path", subject.root.shown(&found.path))),
        (None, Some(folder)) => Check::warn(
            ID,
            format!("{folder} has NCCL's OFI plugin, and the loader does not look there: NCCL uses sockets"),
            format!("add {folder} to LD_LIBRARY_PATH"),
        ),
        (None, None) => Check::warn(
            ID,
            "no libnccl-net.so: NCCL between nodes uses sockets without a word",
            "install aws-ofi-nccl (the EFA installer has it) and check with NCCL_DEBUG=INFO for `AWS Libfabric`",
        ),
    }
}

/// Two copies of one library in a process, as maps show it.
fn copies(subject: &Subject<'_>) -> Check {
    const ID: &str = "library.copies";
    if subject.root.process == "self" {
        return Check::ok(ID, "not looked at: --pid names the worker whose loaded libraries are compared");
    }
    let twice: Vec<String> = subject
        .host
        .loaded
        .iter()
        .filter(|(_, files)| files.len() > 1)
        .map(|(name, files)| format!("{name}: {}", files.join(", ")))
        .collect();
    if twice.is_empty() {
        let known = subject.host.loaded.values().flatten().cloned();
        return Check::ok(ID, "no library is loaded twice").and(known);
    }
    let fix = "leave one copy: remove bundled libraries, or set LD_LIBRARY_PATH so that all find the same";
    Check::warn(ID, "several copies of a library in one process", fix).and(twice)
}

/// Decode workers that `mpirun` starts load TensorRT-LLM's own NIXL; all others load the system's.
fn nixl_plugins(subject: &Subject<'_>) -> Check {
    const ID: &str = "nixl.plugins";
    let folder = subject.question.variable("NIXL_PLUGIN_DIR");
    let bundled = folder.is_some_and(|folder| folder.contains("tensorrt_llm/libs/nixl"));
    let unset_fix = "unset NIXL_PLUGIN_DIR here, or leave the image's own value: this process loads the system's NIXL";
    let set_fix = "set NIXL_PLUGIN_DIR=/opt/dynamo/venv/lib/python3.12/site-packages/tensorrt_llm/libs/nixl/plugins on the decode service only";
    match (subject.question.role, folder) {
        (Some(Role::Prefill), Some(folder)) if bundled => Check::fail(
            ID,
            format!(
                "NIXL_PLUGIN_DIR={folder} on prefill: these plugins belong to TensorRT-LLM's NIXL, prefill loads the system's"
            ),
            unset_fix,
        ),
        (Some(Role::Decode), Some(folder)) if bundled && !subject.question.multinode => Check::warn(
            ID,
            format!("NIXL_PLUGIN_DIR={folder} on a decode group of one node, which loads the system's NIXL"),
            format!("{unset_fix}; say --multinode if the group spans several nodes"),
        ),
        (Some(Role::Decode), folder) if subject.question.multinode && !bundled => {
            let found =
                folder.map_or("NIXL_PLUGIN_DIR is not set".to_owned(), |folder| format!("NIXL_PLUGIN_DIR={folder}"));
            let why = "decode workers of several nodes are started by mpirun and load TensorRT-LLM's NIXL, whose ABI the system's plugins do not have";
            Check::fail(ID, format!("{found}: {why}"), set_fix)
        }
        (_, Some(folder)) => plugins_in(subject, folder),
        (_, None) => Check::ok(ID, "NIXL_PLUGIN_DIR is not set: NIXL looks beside its own library"),
    }
}

fn plugins_in(subject: &Subject<'_>, folder: &str) -> Check {
    const ID: &str = "nixl.plugins";
    let path = subject.root.file(folder);
    let wanted = format!("libplugin_{}.so", subject.question.backend.name());
    if subject.root.real(&path.join(&wanted)).is_some() {
        return Check::ok(
            ID,
            format!("{folder}/{wanted} is there; whether it fits the NIXL that loads it, `kvferry plugins` tells"),
        );
    }
    Check::fail(
        ID,
        format!("NIXL_PLUGIN_DIR={folder} has no {wanted}: NIXL says `unsupported backend`"),
        "name the folder that has it, or unset NIXL_PLUGIN_DIR",
    )
}
