//! An object of any kind, typed where the kind is known.

use kvferry_yaml::{Node, ReadError, Value, ValueError, read, to_value};
use serde::{Deserialize, Serialize};

use crate::crds::{ComputeDomainSpec, DynamoSpec, LeaderWorkerSetSpec, ServiceMonitorSpec};
use crate::kubernetes::{DeploymentSpec, Extra, Metadata, PodSpec, ServiceSpec, StatefulSetSpec};

/// An object with a specification.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Object<S> {
    /// Group and version.
    pub api_version: String,
    /// Which kind.
    pub kind: String,
    /// Its name and marks.
    pub metadata: Metadata,
    /// What it shall be.
    pub spec: S,
    /// What is not known here.
    #[serde(flatten)]
    pub extra: Extra,
}

/// A manifest.
#[derive(Clone, Debug, PartialEq)]
pub enum Manifest {
    /// NVIDIA's nodes that share NVLink memory.
    ComputeDomain(Object<ComputeDomainSpec>),
    /// Dynamo's deployment, v1alpha1.
    Dynamo(Object<DynamoSpec>),
    /// Groups of pods.
    LeaderWorkerSet(Box<Object<LeaderWorkerSetSpec>>),
    /// Pods with numbers.
    StatefulSet(Object<StatefulSetSpec>),
    /// Pods that are alike.
    Deployment(Object<DeploymentSpec>),
    /// One pod.
    Pod(Object<PodSpec>),
    /// A name for pods.
    Service(Object<ServiceSpec>),
    /// What Prometheus scrapes.
    ServiceMonitor(Object<ServiceMonitorSpec>),
    /// Anything else, as it is.
    Other(Value),
}

impl Manifest {
    /// Reads one document.
    pub fn read(node: &Node) -> Result<Manifest, ReadError> {
        let word = |key: &str| node.entry(key).and_then(|(_, value)| value.text()).unwrap_or_default();
        Ok(match (word("apiVersion"), word("kind")) {
            ("resource.nvidia.com/v1beta1", "ComputeDomain") => Manifest::ComputeDomain(read(node)?),
            ("nvidia.com/v1alpha1", "DynamoGraphDeployment") => Manifest::Dynamo(read(node)?),
            ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet") => Manifest::LeaderWorkerSet(read(node)?),
            ("apps/v1", "StatefulSet") => Manifest::StatefulSet(read(node)?),
            ("apps/v1", "Deployment") => Manifest::Deployment(read(node)?),
            ("v1", "Pod") => Manifest::Pod(read(node)?),
            ("v1", "Service") => Manifest::Service(read(node)?),
            ("monitoring.coreos.com/v1", "ServiceMonitor") => Manifest::ServiceMonitor(read(node)?),
            _ => Manifest::Other(read(node)?),
        })
    }

    /// As a tree to write.
    pub fn value(&self) -> Result<Value, ValueError> {
        match self {
            Manifest::ComputeDomain(object) => to_value(object),
            Manifest::Dynamo(object) => to_value(object),
            Manifest::LeaderWorkerSet(object) => to_value(object),
            Manifest::StatefulSet(object) => to_value(object),
            Manifest::Deployment(object) => to_value(object),
            Manifest::Pod(object) => to_value(object),
            Manifest::Service(object) => to_value(object),
            Manifest::ServiceMonitor(object) => to_value(object),
            Manifest::Other(value) => Ok(value.clone()),
        }
    }
}
