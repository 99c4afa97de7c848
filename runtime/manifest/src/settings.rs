//! What is deployed.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The newest image of Dynamo's page that has the EFA SDK in it; there is none for arm64.
const IMAGE_AMD64: &str = "nvcr.io/nvidia/ai-dynamo/tensorrtllm-runtime:1.1.1-efa-amd64";
/// The same without the SDK, for all processors.
const IMAGE: &str = "nvcr.io/nvidia/ai-dynamo/tensorrtllm-runtime:1.1.1";
/// TensorRT-LLM's own NIXL plugins in that image.
const PLUGIN_DIR: &str = "/opt/dynamo/venv/lib/python3.12/site-packages/tensorrt_llm/libs/nixl/plugins";
const COUNT_MAX: u32 = 10_000;
const NAME_BYTES_MAX: usize = 40;

/// Which objects run the workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// Dynamo's operator (DynamoGraphDeployment, v1alpha1).
    #[default]
    Dynamo,
    /// A LeaderWorkerSet per side.
    Lws,
    /// A StatefulSet per side.
    Statefulset,
}

/// The processor of the nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// x86-64.
    #[default]
    Amd64,
    /// Arm, as in GB200.
    Arm64,
}

/// What carries the KV cache below NIXL.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Library {
    /// UCX, the default.
    #[default]
    Ucx,
    /// libfabric.
    Libfabric,
}

/// One side's workers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Side {
    /// Groups of workers.
    pub replicas: u32,
    /// Nodes over which each group is spread.
    pub nodes: u32,
    /// What is started; the image's own when empty.
    pub command: Vec<String>,
    /// With which arguments.
    pub args: Vec<String>,
}

impl Default for Side {
    fn default() -> Side {
        Side { replicas: 1, nodes: 1, command: Vec::new(), args: Vec::new() }
    }
}

/// A deployment, from flags or a TOML file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// Begins the names of all objects.
    pub name: String,
    /// Where they live; that of whoever applies them when absent.
    pub namespace: Option<String>,
    /// Which objects run the workers.
    pub form: Form,
    /// The workers' image; Dynamo's for the processor when absent.
    pub image: Option<String>,
    /// The nodes' processor; arm64 with a compute domain.
    pub architecture: Option<Architecture>,
    /// What carries the KV cache.
    pub library: Library,
    /// EFA devices per pod.
    pub efa: u32,
    /// GPUs per pod.
    pub gpus: u32,
    /// Whether the nodes are GB200's and share NVLink memory by a compute domain.
    pub gb200: bool,
    /// `numNodes` of the compute domain: 0 but for drivers whose gate IMEXDaemonsWithDNSNames is off.
    pub compute_domain_nodes: u32,
    /// NIXL's plugins for decode workers of several nodes.
    pub plugin_dir: String,
    /// The image of a program that runs kvferry's scheduler; none is deployed without.
    pub scheduler_image: Option<String>,
    /// Prefill workers.
    pub prefill: Side,
    /// Decode workers.
    pub decode: Side,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            name: "kvferry".to_owned(),
            namespace: None,
            form: Form::default(),
            image: None,
            architecture: None,
            library: Library::default(),
            efa: 4,
            gpus: 4,
            gb200: false,
            compute_domain_nodes: 0,
            plugin_dir: PLUGIN_DIR.to_owned(),
            scheduler_image: None,
            prefill: Side::default(),
            decode: Side::default(),
        }
    }
}

/// Settings of which no deployment follows.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// The file is not these settings.
    #[error("{reason}; `kvferry manifest --help` names what may be in it")]
    Toml {
        /// What the parser says, with its place.
        reason: String,
    },
    /// A value that makes no sense.
    #[error("{field} = {found}: {allowed}")]
    Value {
        /// Which.
        field: &'static str,
        /// What it is.
        found: String,
        /// What it may be.
        allowed: &'static str,
    },
}

impl Settings {
    /// Reads a TOML file's text.
    pub fn parse(text: &str) -> Result<Settings, SettingsError> {
        toml::from_str(text)
            .map_err(|error| SettingsError::Toml { reason: error.to_string().trim_end().replace('\n', " ") })
    }

    /// Refuses what makes no sense.
    pub fn check(&self) -> Result<(), SettingsError> {
        let names = [("name", Some(&self.name)), ("namespace", self.namespace.as_ref())];
        for (field, name) in names.into_iter().filter_map(|(field, name)| Some((field, name?))) {
            if !is_label(name) {
                let allowed = "at most 40 lower-case letters, digits and dashes, a letter first and no dash last";
                return Err(SettingsError::Value { field, found: name.clone(), allowed });
            }
        }
        for (field, count, least) in [
            ("gpus", self.gpus, 0),
            ("efa", self.efa, 0),
            ("prefill.replicas", self.prefill.replicas, 1),
            ("prefill.nodes", self.prefill.nodes, 1),
            ("decode.replicas", self.decode.replicas, 1),
            ("decode.nodes", self.decode.nodes, 1),
        ] {
            if count < least || count > COUNT_MAX {
                let allowed = if least == 0 { "0 to 10000" } else { "1 to 10000" };
                return Err(SettingsError::Value { field, found: count.to_string(), allowed });
            }
        }
        if self.gb200 && self.architecture == Some(Architecture::Amd64) {
            let allowed = "GB200's processor is arm64: leave it out";
            return Err(SettingsError::Value { field: "architecture", found: "amd64".to_owned(), allowed });
        }
        if self.compute_domain_nodes > 0 && !self.gb200 {
            let found = self.compute_domain_nodes.to_string();
            let allowed = "there is a compute domain with gb200 only";
            return Err(SettingsError::Value { field: "compute-domain-nodes", found, allowed });
        }
        let nodes = self.prefill.replicas * self.prefill.nodes + self.decode.replicas * self.decode.nodes;
        if self.compute_domain_nodes > 0 && self.compute_domain_nodes != nodes {
            let found = format!("{}, with {nodes} nodes of workers", self.compute_domain_nodes);
            let allowed = "0, or all nodes of prefill and decode together";
            return Err(SettingsError::Value { field: "compute-domain-nodes", found, allowed });
        }
        match &self.image {
            Some(image) if self.architecture() == Architecture::Arm64 && image.ends_with("-amd64") => {
                let allowed = "the nodes are arm64: name an image for them; the EFA SDK is mounted from the host";
                Err(SettingsError::Value { field: "image", found: image.clone(), allowed })
            }
            _ => Ok(()),
        }
    }

    /// The nodes' processor.
    pub fn architecture(&self) -> Architecture {
        self.architecture.unwrap_or(if self.gb200 { Architecture::Arm64 } else { Architecture::Amd64 })
    }

    /// The workers' image.
    pub(crate) fn workers_image(&self) -> &str {
        match (&self.image, self.architecture()) {
            (Some(image), _) => image,
            (None, Architecture::Amd64) if self.efa > 0 => IMAGE_AMD64,
            (None, _) => IMAGE,
        }
    }

    /// Whether the EFA SDK comes from the host: no image for arm64 has it.
    pub(crate) fn mounts_sdk(&self) -> bool {
        self.efa > 0 && self.architecture() == Architecture::Arm64
    }
}

fn is_label(name: &str) -> bool {
    name.len() <= NAME_BYTES_MAX
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && !name.ends_with('-')
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}
