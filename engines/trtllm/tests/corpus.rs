//! The fuzz target of configurations over its corpus, and over what nearly is one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "this is test code")]

use proptest::prelude::*;

include!("../../../fuzz/checks/config.rs");
include!("../../../fuzz/checks/corpus.rs");

#[test]
fn the_corpus_is_survived() {
    survive("config", config);
}

proptest! {
    #[test]
    fn any_configuration_is_resolved_or_refused(text in "cache_transceiver_config:\n(  (backend|transceiver_runtime|kv_transfer_timeout_ms|max_tokens_in_buffer|kv_cache_bounce_size_mb|enable_pipelined_transfer|colour): (DEFAULT|UCX|NIXL|MPI|PYTHON|CPP|auto|null|true|[0-9]{1,22}|-1|1.5|\\[\\]|\\{a: b\\}|\"\")\n){0,6}(%env\n((TRTLLM_USE_(UCX|NIXL|MPI)_KVCACHE|TRTLLM_NIXL_KVCACHE_BACKEND|TRTLLM_KVCACHE_SEND_MAX_CONCURRENCY_NUM|UCX_TLS|FI_PROVIDER)=(1|0|UCX|LIBFABRIC|x,|)\n){0,4})?") {
        config(text.as_bytes());
    }
}
