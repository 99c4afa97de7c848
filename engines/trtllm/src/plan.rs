//! What was resolved.

use core::time::Duration;

use kvferry_core::protocol::DeadlineTerms;
use serde::Serialize;

use crate::finding::Source;

/// A value, why it is that, and where that comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Resolved<T> {
    /// The value.
    pub value: T,
    /// Why.
    pub reason: String,
    /// Where from.
    pub source: Source,
}

/// Which library NIXL would move bytes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum NixlBackend {
    /// UCX, the default.
    Ucx,
    /// libfabric.
    Libfabric,
}

/// How TensorRT-LLM would move the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE", tag = "name", content = "backend")]
pub enum Method {
    /// Through NIXL agents.
    Nixl(NixlBackend),
    /// Through UCX itself.
    Ucx,
}

impl Method {
    /// Its words.
    pub fn name(self) -> &'static str {
        match self {
            Method::Nixl(NixlBackend::Ucx) => "NIXL with UCX",
            Method::Nixl(NixlBackend::Libfabric) => "NIXL with LIBFABRIC",
            Method::Ucx => "UCX",
        }
    }

    /// The transport that carries it between kvferry's own nodes.
    pub fn carrier(self) -> Carrier {
        match self {
            Method::Nixl(NixlBackend::Libfabric) => Carrier::Libfabric,
            Method::Nixl(NixlBackend::Ucx) | Method::Ucx => Carrier::Ucx,
        }
    }
}

/// What of kvferry a method is carried by, whether a build has it or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Carrier {
    /// Contexts of our own over the UCX library.
    Ucx,
    /// Endpoints of our own over the libfabric library.
    Libfabric,
    /// NIXL's protocol over the UCX library, for peers that are NIXL agents.
    Nixl,
}

impl Carrier {
    /// Its name for `kvferry bench --transport`.
    pub fn name(self) -> &'static str {
        match self {
            Carrier::Ucx => "ucx",
            Carrier::Libfabric => "libfabric",
            Carrier::Nixl => "nixl",
        }
    }
}

/// How long transfers may take; becomes [`DeadlineTerms`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Deadlines {
    /// The most that anything is given, in milliseconds.
    pub cap_ms: Resolved<u64>,
    /// The least, in milliseconds.
    pub floor_ms: Resolved<u64>,
}

impl Deadlines {
    /// For a node's configuration.
    pub fn terms(&self) -> DeadlineTerms {
        DeadlineTerms {
            floor: Duration::from_millis(self.floor_ms.value),
            cap: Duration::from_millis(self.cap_ms.value),
            ..DeadlineTerms::default()
        }
    }
}

/// How much may be under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Credits {
    /// Handovers that a decode group takes at once; `None` leaves it to the node.
    pub decode_handovers: Resolved<Option<u32>>,
    /// Handovers that a prefill group takes part in at once; `None` leaves it to the node.
    pub prefill_handovers: Resolved<Option<u32>>,
}

/// Everything that follows from a configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// How TensorRT-LLM would move the KV cache.
    pub method: Resolved<Method>,
    /// What carries it here.
    pub transport: Resolved<Carrier>,
    /// Which of the library's own transports (UCX's lanes, libfabric's providers) it may use; empty for all that it finds.
    pub library_transports: Resolved<Vec<String>>,
    /// Devices by the names that the transport's library gives them; empty for all that are found.
    pub devices: Resolved<Vec<String>>,
    /// How long transfers may take.
    pub deadlines: Deadlines,
    /// How much may be under way.
    pub credits: Credits,
}
