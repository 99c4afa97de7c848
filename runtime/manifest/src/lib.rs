//! Kubernetes manifests of disaggregated serving: typed, generated, read back without loss.
//!
//! [`generate`] makes the documents of a deployment from [`Settings`], with comments where what works differs from what pages say; [`text`]
//! writes them. [`Manifest`] reads anybody's: what the types do not know is kept.
#![forbid(unsafe_code)]

mod crds;
mod generate;
mod kubernetes;
mod manifest;
mod pods;
mod settings;

pub use crds::{
    Channel, ClaimTemplate, ComputeDomainSpec, DynamoService, DynamoSpec, Endpoint, LeaderWorkerSetSpec,
    LeaderWorkerTemplate, MainPodSpec, Multinode, ServiceMonitorSpec, SharedMemory,
};
pub use generate::{Document, GenerateError, generate, text};
pub use kubernetes::{
    Claim, ClaimReference, Container, DeploymentSpec, EmptyDir, EnvVar, Extra, HostPath, Metadata, PodSpec,
    PodTemplate, Port, Resources, SecurityContext, Selector, ServicePort, ServiceSpec, StatefulSetSpec, Volume,
    VolumeMount,
};
pub use manifest::{Manifest, Object};
pub use settings::{Architecture, Form, Library, Settings, SettingsError, Side};
