//! What a host is examined for.

use std::collections::BTreeMap;

use kvferry_topology::Overrides;

use crate::Expectations;

/// Variables by name.
pub type Environment = BTreeMap<String, String>;

/// Which side the process is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It computes KV and gives it away.
    Prefill,
    /// It takes KV.
    Decode,
}

impl Role {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Role::Prefill => "prefill",
            Role::Decode => "decode",
        }
    }
}

/// Which library carries the KV cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// UCX, the default.
    #[default]
    Ucx,
    /// libfabric.
    Libfabric,
}

impl Backend {
    /// What `TRTLLM_NIXL_KVCACHE_BACKEND` selects; the words are case-sensitive there, too.
    pub fn of(environment: &Environment) -> Backend {
        match environment.get("TRTLLM_NIXL_KVCACHE_BACKEND").map(String::as_str) {
            Some("LIBFABRIC") => Backend::Libfabric,
            _ => Backend::Ucx,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Backend::Ucx => "UCX",
            Backend::Libfabric => "LIBFABRIC",
        }
    }
}

/// What NVIDIA's driver said of the GPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DriverSaid {
    /// Nobody asked it. Of a captured host, [`SMI_FILE`] tells.
    #[default]
    Nothing,
    /// What `nvidia-smi -q` prints.
    Told(String),
    /// It could not be asked, for this reason.
    Refused(String),
}

/// The file of a captured host with what `nvidia-smi -q` printed there.
pub const SMI_FILE: &str = "nvidia-smi-q.txt";

/// Everything besides the host.
#[derive(Clone, Debug, Default)]
pub struct Question {
    /// The process's environment.
    pub environment: Environment,
    /// Which library carries the KV cache.
    pub backend: Backend,
    /// Which side it is on, if that is to be judged.
    pub role: Option<Role>,
    /// Whether its group spans several nodes, so that workers are started through `mpirun`.
    pub multinode: bool,
    /// What the host must have.
    pub expect: Expectations,
    /// What the driver said of the GPUs.
    pub driver: DriverSaid,
    /// NICs of GPUs that are not left to the topology.
    pub nic_map: Overrides,
}

impl Question {
    pub(crate) fn variable(&self, name: &str) -> Option<&str> {
        self.environment.get(name).map(String::as_str)
    }
}
