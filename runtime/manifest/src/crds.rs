//! Custom resources: Dynamo's graph deployments, NVIDIA's compute domains, leader-worker sets, Prometheus's monitors.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::kubernetes::{ClaimReference, Container, EnvVar, Extra, PodTemplate, Resources, Selector, Volume};

/// `resource.nvidia.com/v1beta1`: nodes that share NVLink memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ComputeDomainSpec {
    /// Deprecated; 0 unless the driver's old gate is off, then the number of worker nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_nodes: Option<i64>,
    /// How pods get a channel of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel: Option<Channel>,
    /// What is not known here.
    #[serde(flatten)]
    pub extra: Extra,
}

/// A channel of a compute domain.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Channel {
    /// The template that the controller makes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_claim_template: Option<ClaimTemplate>,
    /// `Single` or `All` channels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation_mode: Option<String>,
    /// What is not known here.
    #[serde(flatten)]
    pub extra: Extra,
}

/// A claim template by name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClaimTemplate {
    /// Its name.
    pub name: String,
    /// What is not known here.
    #[serde(flatten)]
    pub extra: Extra,
}

/// `nvidia.com/v1alpha1` DynamoGraphDeployment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DynamoSpec {
    /// `trtllm` here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend_framework: Option<String>,
    /// Its parts by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub services: Option<BTreeMap<String, DynamoService>>,
    /// Variables of all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub envs: Option<Vec<EnvVar>>,
    /// What is not known here.
    #[serde(flatten)]
    pub extra: Extra,
}

/// A part of a graph.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DynamoService {
    /// `frontend` or `worker`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub component_type: Option<String>,
    /// `prefill` or `decode`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sub_component_type: Option<String>,
    /// How many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i64>,
    /// Over how many nodes each is spread.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multinode: Option<Multinode>,
    /// What each node's pod needs: cpu, memory, gpu, gpuType, and extended resources below `custom`, as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// Its environment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub envs: Option<Vec<EnvVar>>,
    /// Its /dev/shm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_memory: Option<SharedMemory>,
    /// The rest of the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extra_pod_spec: Option<MainPodSpec>,
    /// What is not known here.
    #[serde(flatten)]
    pub extra: Extra,
}

/// Over how many nodes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Multinode {
    /// Two or more.
    pub node_count: i64,
    /// What is not known here.
    #[serde(flatten)]
    pub extra: Extra,
}

/// /dev/shm.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SharedMemory {
    /// How large.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// Whether there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disabled: Option<bool>,
    /// What is not known here.
    #[serde(flatten)]
    pub extra: Extra,
}

/// A pod whose main container is apart. `containers` must be absent, not null.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MainPodSpec {
    /// Labels of the nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<BTreeMap<String, String>>,
    /// Whether it shares the host's shared memory.
    #[serde(rename = "hostIPC")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ipc: Option<bool>,
    /// What is mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volumes: Option<Vec<Volume>>,
    /// Devices that it claims.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_claims: Option<Vec<ClaimReference>>,
    /// The container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub main_container: Option<Container>,
    /// What is not known here.
    #[serde(flatten)]
    pub extra: Extra,
}

/// `leaderworkerset.x-k8s.io/v1`: groups of pods.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LeaderWorkerSetSpec {
    /// How many groups.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i64>,
    /// What a group is made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader_worker_template: Option<LeaderWorkerTemplate>,
    /// What is not known here.
    #[serde(flatten)]
    pub extra: Extra,
}

/// A group.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LeaderWorkerTemplate {
    /// Its pods, the leader included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<i64>,
    /// The leader, if it differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader_template: Option<PodTemplate>,
    /// Every other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker_template: Option<PodTemplate>,
    /// What is not known here.
    #[serde(flatten)]
    pub extra: Extra,
}

/// `monitoring.coreos.com/v1`: what Prometheus scrapes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceMonitorSpec {
    /// Which services.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<Selector>,
    /// Where.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoints: Option<Vec<Endpoint>>,
    /// What is not known here.
    #[serde(flatten)]
    pub extra: Extra,
}

/// Where Prometheus scrapes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// A port of the service by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
    /// Where in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// How often.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<String>,
    /// What is not known here.
    #[serde(flatten)]
    pub extra: Extra,
}
