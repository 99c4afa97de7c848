//! Fields and variables that change nothing here, and those that TensorRT-LLM itself does not take together.

use crate::config::TransceiverRuntime;
use crate::contradiction::Contradiction;
use crate::finding::{Severity, Source};
use crate::plan::Method;
use crate::resolve::Resolver;

/// Variables that steer what kvferry does otherwise, with the reason.
const WITHOUT_COUNTERPART: [(&str, &str); 20] = [
    (
        "TRTLLM_KVCACHE_TRANSFER_BUFFER_SIZE",
        "kvferry writes into KV blocks; what its transports stage has sizes of their own",
    ),
    ("TRTLLM_KVCACHE_TRANSFER_USE_ASYNC_BUFFER", "kvferry allocates nothing for a transfer"),
    ("TRTLLM_KVCACHE_TRANSFER_USE_SYNC_BUFFER", "kvferry allocates nothing for a transfer"),
    (
        "TRTLLM_TRY_ZCOPY_FOR_KVCACHE_TRANSFER",
        "kvferry stages only what a NIC does not reach, or what is quicker packed, whatever the layouts",
    ),
    ("TRTLLM_NIXL_ENABLE_COALESCE", "kvferry moves programs and always merges neighbouring pieces"),
    ("TRTLLM_ENABLE_KVCACHE_RECEIVE_PARALLEL", "kvferry always receives from all source ranks at once"),
    ("TRTLLM_PARALLEL_CACHE_SEND", "kvferry always serves all destination ranks at once"),
    ("TRTLLM_DISABLE_KV_CACHE_TRANSFER_OVERLAP", "kvferry never blocks generation"),
    ("TRTLLM_KV_TRANSFER_NUM_THREADS", "kvferry has one thread per NIC"),
    ("TRTLLM_KVCACHE_TRANSFER_ALL_BLOCKS_FOR_WINDOW", "kvferry moves exactly the tokens that the window needs"),
    ("TRTLLM_UCX_INTERFACE", LISTENS),
    ("TRTLLM_NIXL_INTERFACE", LISTENS),
    ("TRTLLM_MOONCAKE_INTERFACE", LISTENS),
    ("TRTLLM_NIXL_PORT", LISTENS),
    ("TRTLLM_DISAGG_LAYERWISE", "kvferry moves layers as soon as the engine marks them ready, always"),
    (
        "TRTLLM_DISAGG_ENABLE_INFLIGHT_CANCEL",
        "kvferry always cancels what is under way, and keeps its blocks until nothing writes them any more",
    ),
    ("TRTLLM_KVCACHE_TIME_OUTPUT_PATH", TIMES),
    ("TLLM_ENABLE_CACHE_TRANSFER_PERF_INFO", TIMES),
    ("TLLM_KV_TRANSFER_PERF_LOG_FILE", TIMES),
    ("NIXL_PLUGIN_DIR", "kvferry loads no NIXL plugins; TensorRT-LLM's own agents do"),
];
const LISTENS: &str = "kvferry's nodes listen where they are told to, and join at the scheduler's address";
const TIMES: &str = "kvferry's times are in /metrics, by stage, and in the timeline";

impl Resolver<'_> {
    /// Fields and variables that change nothing here.
    pub(crate) fn without_effect(&mut self) {
        let config = self.config;
        if let Some(runtime) = config.transceiver_runtime {
            let source = self.source(&runtime);
            let word = match runtime.value {
                Some(TransceiverRuntime::Cpp) => "CPP",
                Some(TransceiverRuntime::Python) => "PYTHON",
                Some(TransceiverRuntime::Auto) => "auto",
                None => "null",
            };
            let message = format!(
                "transceiver_runtime: {word} chooses between TensorRT-LLM's implementations; kvferry is a third"
            );
            self.say(Severity::Note, "without-effect", source, message, None);
            if matches!(runtime.value, Some(TransceiverRuntime::Auto) | None) {
                self.but(Contradiction::RUNTIME_DEFAULT);
            }
        } else {
            let message = "transceiver_runtime is not given: of no concern here, and decided by each TensorRT-LLM server for itself";
            self.say(Severity::Note, "runtime-default", Source::Default, message.to_owned(), None);
            self.but(Contradiction::RUNTIME_DEFAULT);
        }
        let polls = [
            ("kv_transfer_sender_future_timeout_ms", config.kv_transfer_sender_future_timeout_ms),
            ("kv_transfer_poll_interval_ms", config.kv_transfer_poll_interval_ms),
        ];
        for (field, value) in polls {
            if let Some((value, source)) = self.given(value) {
                let message = format!("{field}: {value} paces polling; kvferry is told when something happens");
                self.say(Severity::Note, "without-effect", source, message, None);
            }
        }
        let bounces = [
            ("kv_cache_bounce_size_mb", config.kv_cache_bounce_size_mb),
            ("agent_buffer_size_mb", config.agent_buffer_size_mb),
        ];
        for (field, value) in bounces {
            if let Some((value, source)) = self.given(value).filter(|(value, _)| *value > 0) {
                let message = format!("{field}: {value} is for bounce buffers; kvferry moves programs and has none");
                self.say(Severity::Note, "without-effect", source, message, None);
            }
        }
        if let Some(parameters) = &config.agent_bounce_params {
            let source = self.source(parameters);
            let message = "agent_bounce_params is for bounce buffers; kvferry moves programs and has none".to_owned();
            self.say(Severity::Note, "without-effect", source, message, None);
        }
        if let Some((true, source)) = self.given(config.enable_pipelined_transfer) {
            let message =
                "enable_pipelined_transfer: kvferry moves layers as soon as the engine marks them ready, always"
                    .to_owned();
            self.say(Severity::Note, "without-effect", source, message, None);
        }
        for (name, why) in WITHOUT_COUNTERPART {
            if let Some((value, source)) = self.variable(name) {
                let message = format!("{name}={value}: without effect here, {why}");
                self.say(Severity::Note, "without-effect", source, message, None);
            }
        }
    }

    /// What TensorRT-LLM refuses, or does otherwise than it reads.
    pub(crate) fn combinations(&mut self, method: Method) {
        let config = self.config;
        let nixl = matches!(method, Method::Nixl(_));
        let runtime = self.given(config.transceiver_runtime);
        let cpp = runtime.as_ref().is_some_and(|(runtime, _)| *runtime == TransceiverRuntime::Cpp);
        let endless = config.kv_transfer_timeout_ms.is_some_and(|timeout| timeout.value.is_none());
        if let Some((TransceiverRuntime::Python, source)) = runtime {
            if !nixl {
                let remedy = "set `backend: NIXL`, or `transceiver_runtime: CPP`";
                self.clash(source, "transceiver_runtime: PYTHON works with NIXL only, and the method is UCX", remedy);
            } else if endless {
                let remedy = "give kv_transfer_timeout_ms milliseconds, the same on both sides";
                self.clash(
                    source,
                    "transceiver_runtime: PYTHON needs a finite kv_transfer_timeout_ms, and it is null",
                    remedy,
                );
            }
        }
        let bounce = self.given(config.kv_cache_bounce_size_mb).filter(|(size, _)| *size > 0);
        if let Some((true, source)) = self.given(config.enable_pipelined_transfer) {
            let against = [
                (!nixl, "the method is UCX"),
                (cpp, "transceiver_runtime is CPP"),
                (endless, "kv_transfer_timeout_ms is null, with which the C++ runtime is taken"),
                (bounce.is_some(), "kv_cache_bounce_size_mb is not 0"),
            ];
            if let Some((_, why)) = against.into_iter().find(|(is, _)| *is) {
                let message = format!(
                    "enable_pipelined_transfer needs the Python runtime, NIXL and no bounce buffer in TensorRT-LLM, and {why}"
                );
                self.clash(source, &message, "remove it, or the field that contradicts it");
            }
        }
        if let Some((size, source)) = bounce.filter(|_| cpp || !nixl) {
            let message = format!("kv_cache_bounce_size_mb: {size} is the Python runtime's, which is not taken here");
            self.clash(source, &message, "remove it, or set `backend: NIXL` and `transceiver_runtime: PYTHON`");
        }
        if nixl && cpp && self.given(config.max_tokens_in_buffer).is_none() {
            let message = "max_tokens_in_buffer is not given: with NIXL TensorRT-LLM's C++ runtime fails requests that its buffer does not hold";
            let remedy = "set it to the longest prompt, rounded up to tokens_per_block";
            self.say(Severity::Note, "nixl-buffer", Source::Default, message.to_owned(), Some(remedy.to_owned()));
        }
    }

    fn clash(&mut self, source: Source, message: &str, remedy: &str) {
        self.say(Severity::Warning, "contradicting-fields", source, message.to_owned(), Some(remedy.to_owned()));
    }

    /// Variables of other engines, and what documents say of them.
    pub(crate) fn elsewhere(&mut self) {
        let rules: [(&str, &str, Contradiction); 5] = [
            ("NCCL_MNNVL_ENABLE", "NVLink between hosts is meant", Contradiction::NVLINK_BETWEEN_PODS),
            ("UCX_CUDA_IPC_ENABLE_MNNVL", "NVLink between hosts is meant", Contradiction::NVLINK_BETWEEN_PODS),
            ("VLLM_NIXL_ABORT_REQUEST_TIMEOUT", "vLLM's, and read by nobody here", Contradiction::ABORT_TIMEOUT),
            (
                "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT",
                "SGLang's, and read by nobody here",
                Contradiction::BOOTSTRAP_TIMEOUT,
            ),
            ("SGLANG_DISAGGREGATION_", "SGLang's, and read by nobody here", Contradiction::SGLANG_DIRECTION),
        ];
        for (name, what, contradiction) in rules {
            // Of a family, the first one stands for all.
            let is =
                |known: &&String| if name.ends_with('_') { known.starts_with(name) } else { known.as_str() == name };
            let Some(found) = self.environment.keys().find(is).cloned() else { continue };
            let message = format!("{found}: {what}; {}", contradiction.here);
            self.say(Severity::Note, "elsewhere", Source::Variable(found), message, None);
            self.but(contradiction);
        }
    }
}
