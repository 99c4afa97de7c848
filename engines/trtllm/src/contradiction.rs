//! Where the field's documents and code contradict each other about what is resolved here.

use serde::Serialize;

/// What one source says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Claim {
    /// Who.
    pub by: &'static str,
    /// What.
    pub says: &'static str,
}

/// Sources that disagree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Contradiction {
    /// About what.
    pub about: &'static str,
    /// What they say.
    pub claims: [Claim; 2],
}

impl Contradiction {
    /// Whether `TRTLLM_USE_UCX_KVCACHE=1` and its like choose what DEFAULT means.
    pub const DEFAULT_AND_VARIABLES: Contradiction = Contradiction {
        about: "TRTLLM_USE_*_KVCACHE with backend DEFAULT",
        claims: [
            Claim {
                by: "NVIDIA Dynamo 1.x, KV Cache Transfer page",
                says: "the variable does not enable UCX, `backend: UCX` must be set",
            },
            Claim {
                by: "TensorRT-LLM 1.3.0rc22, llm_args.py `_resolve_default_backend`",
                says: "the first of NIXL, UCX, MOONCAKE, MPI whose variable is \"1\" is what DEFAULT means",
            },
        ],
    };

    /// Which NIXL backend belongs to EFA.
    pub const EFA_BACKEND: Contradiction = Contradiction {
        about: "the NIXL backend for AWS EFA",
        claims: [
            Claim { by: "NVIDIA Dynamo 1.x, KV Cache Transfer page", says: "UCX with SRD is tested and recommended" },
            Claim {
                by: "TensorRT-LLM, disagg-serving-aws-efa.md; Dynamo's EKS EFA page from 1.4 on",
                says: "LIBFABRIC (TRTLLM_NIXL_KVCACHE_BACKEND=LIBFABRIC)",
            },
        ],
    };

    /// What an absent `kv_transfer_timeout_ms` means.
    pub const TIMEOUT_DEFAULT: Contradiction = Contradiction {
        about: "the default of kv_transfer_timeout_ms",
        claims: [
            Claim { by: "TensorRT-LLM 1.3.0rc22, llm_args.py", says: "60000" },
            Claim { by: "earlier TensorRT-LLM", says: "none: transfers wait for ever" },
        ],
    };

    /// What an absent `transceiver_runtime` means.
    pub const RUNTIME_DEFAULT: Contradiction = Contradiction {
        about: "the default of transceiver_runtime",
        claims: [
            Claim {
                by: "TensorRT-LLM 1.3.0rc22, llm_args.py",
                says: "auto: each server decides for itself, so prefill and decode may differ",
            },
            Claim { by: "earlier TensorRT-LLM", says: "the C++ runtime" },
        ],
    };
}
