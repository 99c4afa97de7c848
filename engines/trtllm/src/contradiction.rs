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
    /// What kvferry does.
    pub here: &'static str,
}

impl Contradiction {
    /// Every one that is known.
    pub const ALL: [Contradiction; 8] = [
        Contradiction::DEFAULT_AND_VARIABLES,
        Contradiction::EFA_BACKEND,
        Contradiction::NVLINK_BETWEEN_PODS,
        Contradiction::BOOTSTRAP_TIMEOUT,
        Contradiction::ABORT_TIMEOUT,
        Contradiction::TIMEOUT_DEFAULT,
        Contradiction::RUNTIME_DEFAULT,
        Contradiction::SGLANG_DIRECTION,
    ];

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
        here: "the page's rule: DEFAULT is NIXL; `--follow trtllm` applies the other",
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
        here: "either, as the configuration says; measure both, and `kvferry doctor --verify` shows which device carried the bytes",
    };

    /// What an absent `kv_transfer_timeout_ms` means.
    pub const TIMEOUT_DEFAULT: Contradiction = Contradiction {
        about: "the default of kv_transfer_timeout_ms",
        claims: [
            Claim { by: "TensorRT-LLM 1.3.0rc22, llm_args.py", says: "60000" },
            Claim { by: "earlier TensorRT-LLM", says: "none: transfers wait for ever" },
        ],
        here: "60000: every wait has a deadline",
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
        here: "nothing follows from it: kvferry is a runtime of its own on both sides",
    };

    /// Whether NVLink reaches from pod to pod.
    pub const NVLINK_BETWEEN_PODS: Contradiction = Contradiction {
        about: "NVLink between pods",
        claims: [
            Claim {
                by: "NVIDIA Dynamo, disagg-communication-guide.md",
                says: "NVLink works within one pod: Kubernetes isolates processes and IPC",
            },
            Claim {
                by: "NVIDIA Dynamo, PR 10440",
                says: "across pods of an NVL72, too, with fabric handles and an IMEX channel",
            },
        ],
        here: "`kvferry doctor` says whether GPUs are in one NVLink domain and a channel is there; the path that carries the bytes is printed for each peer",
    };

    /// Whether SGLang's NIXL connector gives up waiting for a peer.
    pub const BOOTSTRAP_TIMEOUT: Contradiction = Contradiction {
        about: "SGLang's bootstrap timeout with NIXL",
        claims: [
            Claim { by: "llm-d, operations-sglang.md", says: "it is not enforced with NIXL" },
            Claim { by: "SGLang 0.5.23, common sender", says: "it holds for every backend: 300 s" },
        ],
        here: "every wait has a deadline that names what was awaited, whatever the transport",
    };

    /// How long vLLM's prefill side keeps blocks that nobody fetches.
    pub const ABORT_TIMEOUT: Contradiction = Contradiction {
        about: "how long vLLM keeps blocks that nobody fetches",
        claims: [
            Claim { by: "vLLM's older documents", says: "VLLM_NIXL_ABORT_REQUEST_TIMEOUT, 480 s" },
            Claim { by: "vLLM 0.33, NIXL connector", says: "a lease of 30 s that the decode side renews every 5 s" },
        ],
        here: "a lease, renewed while a pairing lives; after it ends a reader's confirmation is refused",
    };

    /// Who moves the bytes under SGLang.
    pub const SGLANG_DIRECTION: Contradiction = Contradiction {
        about: "who moves the bytes under SGLang",
        claims: [
            Claim { by: "llm-d, the diagram for SGLang", says: "decode pulls" },
            Claim { by: "SGLang 0.5.23; llm-d 0.8, its text", says: "prefill pushes" },
        ],
        here: "either, chosen for each pair of ranks and printed",
    };
}
