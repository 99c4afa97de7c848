//! What every form's worker pods have in common.

use std::collections::BTreeMap;

use kvferry_yaml::Value;

use crate::kubernetes::{
    Claim, ClaimReference, Container, EmptyDir, EnvVar, HostPath, Resources, SecurityContext, Volume, VolumeMount,
};
use crate::settings::{Architecture, Library, Settings, Side};

/// Kubernetes' name of EFA devices.
pub(crate) const EFA: &str = "vpc.amazonaws.com/efa";
const GPU: &str = "nvidia.com/gpu";
const SDK: &str = "/opt/amazon/efa";
/// The claim's name inside a pod.
const CHANNEL: &str = "compute-domain-channel";

/// Which side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Prefill,
    Decode,
}

impl Role {
    pub(crate) const ALL: [Role; 2] = [Role::Prefill, Role::Decode];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Role::Prefill => "prefill",
            Role::Decode => "decode",
        }
    }

    pub(crate) fn of(self, settings: &Settings) -> &Side {
        match self {
            Role::Prefill => &settings.prefill,
            Role::Decode => &settings.decode,
        }
    }
}

/// A variable, and why it is as it is.
pub(crate) struct Variable {
    pub(crate) name: &'static str,
    value: String,
    pub(crate) why: Option<&'static str>,
}

impl Variable {
    pub(crate) fn entry(&self) -> EnvVar {
        EnvVar { name: self.name.to_owned(), value: Some(self.value.clone()), ..EnvVar::default() }
    }
}

/// The environment of one side's workers.
pub(crate) fn environment(settings: &Settings, role: Role) -> Vec<Variable> {
    let mut variables = Vec::new();
    let mut set = |name, value: &str, why| variables.push(Variable { name, value: value.to_owned(), why });
    if settings.efa > 0 {
        set("FI_PROVIDER", "efa", Some("Whatever is not EFA is a failure instead of a silent fallback."));
        set("FI_EFA_USE_DEVICE_RDMA", "1", None);
        set(
            "FI_EFA_ENABLE_SHM_TRANSFER",
            "0",
            Some("Must be 0: shared memory between processes of one host breaks NIXL's registrations of GPU buffers."),
        );
        set("LD_LIBRARY_PATH", "/opt/amazon/efa/lib:/usr/local/lib:/usr/lib", None);
    }
    if settings.library == Library::Libfabric {
        set("TRTLLM_NIXL_KVCACHE_BACKEND", "LIBFABRIC", Some("Upper case: any other spelling is UCX without a word."));
    }
    if settings.gb200 {
        set("NCCL_MNNVL_ENABLE", "1", None);
        set("NCCL_CUMEM_ENABLE", "1", None);
        set("NCCL_NVLS_ENABLE", "1", None);
        set(
            "NVIDIA_GDRCOPY",
            "enabled",
            Some(
                "Not \"1\", as Dynamo's page has it: the container toolkit knows only `enabled`, and anything else has no effect.",
            ),
        );
    }
    if role == Role::Decode && settings.decode.nodes > 1 {
        set(
            "NIXL_PLUGIN_DIR",
            &settings.plugin_dir,
            Some(
                "On decode only: its workers on several nodes are started by mpirun and load TensorRT-LLM's own NIXL, which the image's plugins \
                 do not fit. Prefill loads the system's NIXL; `kvferry plugins` tells which fits which.",
            ),
        );
    }
    variables
}

/// Requests and limits, alike: extended resources must be in both.
pub(crate) fn resources(settings: &Settings) -> Resources {
    let mut amounts = BTreeMap::new();
    for (name, count) in [(GPU, settings.gpus), (EFA, settings.efa)] {
        if count > 0 {
            amounts.insert(name.to_owned(), Value::Text(count.to_string()));
        }
    }
    let amounts = Some(amounts).filter(|amounts| !amounts.is_empty());
    Resources { requests: amounts.clone(), limits: amounts, claims: claims(settings), ..Resources::default() }
}

/// The same for Dynamo, whose resource items have `gpu`, and everything else below `custom`, as text.
pub(crate) fn dynamo_resources(settings: &Settings) -> Resources {
    let mut amounts = BTreeMap::new();
    if settings.gpus > 0 {
        amounts.insert("gpu".to_owned(), Value::Text(settings.gpus.to_string()));
    }
    if settings.efa > 0 {
        amounts.insert("custom".to_owned(), Value::Map(vec![(EFA.to_owned(), Value::Text(settings.efa.to_string()))]));
    }
    let amounts = Some(amounts).filter(|amounts| !amounts.is_empty());
    Resources { requests: amounts.clone(), limits: amounts, claims: claims(settings), ..Resources::default() }
}

fn claims(settings: &Settings) -> Option<Vec<Claim>> {
    settings.gb200.then(|| vec![Claim { name: CHANNEL.to_owned(), ..Claim::default() }])
}

/// The pod's claim of a channel of the compute domain.
pub(crate) fn resource_claims(settings: &Settings) -> Option<Vec<ClaimReference>> {
    let reference = |template| ClaimReference {
        name: CHANNEL.to_owned(),
        resource_claim_template_name: Some(template),
        ..ClaimReference::default()
    };
    settings.gb200.then(|| vec![reference(channel(settings))])
}

/// The claim template that the compute domain's controller makes.
pub(crate) fn channel(settings: &Settings) -> String {
    format!("{}-channel", domain(settings))
}

/// The compute domain.
pub(crate) fn domain(settings: &Settings) -> String {
    format!("{}-compute-domain", settings.name)
}

pub(crate) fn container(settings: &Settings, role: Role, resources: Option<Resources>, env: bool) -> Container {
    let side = role.of(settings);
    let listed = |words: &[String]| Some(words.to_vec()).filter(|words| !words.is_empty());
    let variables = environment(settings, role).iter().map(Variable::entry).collect();
    let security = SecurityContext { privileged: Some(true), ..SecurityContext::default() };
    let mut mounts = Vec::new();
    if resources.is_some() {
        mounts.push(mount("shm", "/dev/shm"));
    }
    if settings.mounts_sdk() {
        mounts.push(mount("efa-sdk", SDK));
    }
    Container {
        image: Some(settings.workers_image().to_owned()),
        command: listed(&side.command),
        args: listed(&side.args),
        env: Some(variables).filter(|list: &Vec<EnvVar>| env && !list.is_empty()),
        resources,
        security_context: (settings.efa > 0).then_some(security),
        volume_mounts: Some(mounts).filter(|mounts| !mounts.is_empty()),
        ..Container::default()
    }
}

fn mount(name: &str, path: &str) -> VolumeMount {
    VolumeMount { name: name.to_owned(), mount_path: Some(path.to_owned()), ..VolumeMount::default() }
}

/// `shm`: with a /dev/shm of the pod's own, which Dynamo's operator makes itself.
pub(crate) fn volumes(settings: &Settings, shm: bool) -> Option<Vec<Volume>> {
    let mut volumes = Vec::new();
    if shm {
        let memory = EmptyDir { medium: Some("Memory".to_owned()), ..EmptyDir::default() };
        volumes.push(Volume { name: "shm".to_owned(), empty_dir: Some(memory), ..Volume::default() });
    }
    if settings.mounts_sdk() {
        let path = HostPath { path: SDK.to_owned(), ..HostPath::default() };
        volumes.push(Volume { name: "efa-sdk".to_owned(), host_path: Some(path), ..Volume::default() });
    }
    Some(volumes).filter(|volumes| !volumes.is_empty())
}

/// The nodes' processor, as Kubernetes labels it.
pub(crate) fn node_selector(settings: &Settings) -> Option<BTreeMap<String, String>> {
    let name = match settings.architecture() {
        Architecture::Amd64 => "amd64",
        Architecture::Arm64 => "arm64",
    };
    Some(BTreeMap::from([("kubernetes.io/arch".to_owned(), name.to_owned())]))
}
