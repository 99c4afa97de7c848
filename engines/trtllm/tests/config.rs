//! Reading `cache_transceiver_config`: what is in it, where it stands, and what malformed or hostile text ends in.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code")]

use kvferry_trtllm::{
    Backend, ConfigError, FILE_BYTES_MAX, Position, TransceiverConfig, TransceiverRuntime, YamlError,
};
use proptest::prelude::*;

fn parse(text: &str) -> TransceiverConfig {
    TransceiverConfig::parse(text).unwrap()
}

fn refused(text: &str) -> ConfigError {
    TransceiverConfig::parse(text).unwrap_err()
}

#[test]
fn every_field_of_the_schema_is_read_with_its_place() {
    let config = parse(
        "tensor_parallel_size: 4\n\
         cache_transceiver_config:\n  \
           backend: NIXL\n  \
           transceiver_runtime: PYTHON\n  \
           max_tokens_in_buffer: 8448\n  \
           kv_transfer_timeout_ms: 600000\n  \
           kv_transfer_sender_future_timeout_ms: 1000\n  \
           kv_transfer_poll_interval_ms: 5000\n  \
           kv_cache_bounce_size_mb: 0\n  \
           enable_pipelined_transfer: False\n  \
           agent_buffer_size_mb: 64\n  \
           agent_bounce_params: {max_chunk_size: 33554432}\n",
    );
    assert_eq!(config.at, Some(Position { line: 2, column: 1 }));
    let backend = config.backend.unwrap();
    assert_eq!((backend.value, backend.at), (Some(Backend::Nixl), Position { line: 3, column: 12 }));
    assert_eq!(config.transceiver_runtime.unwrap().value, Some(TransceiverRuntime::Python));
    assert_eq!(config.max_tokens_in_buffer.unwrap().value, Some(8448));
    assert_eq!(config.kv_transfer_timeout_ms.unwrap().value, Some(600_000));
    assert_eq!(config.kv_transfer_sender_future_timeout_ms.unwrap().value, Some(1000));
    assert_eq!(config.kv_transfer_poll_interval_ms.unwrap().value, Some(5000));
    assert_eq!(config.kv_cache_bounce_size_mb.unwrap().value, Some(0));
    assert_eq!(config.enable_pipelined_transfer.unwrap().value, Some(false));
    assert_eq!(config.agent_buffer_size_mb.unwrap().value, Some(64));
    assert_eq!(config.agent_bounce_params.unwrap().at.line, 12);
    assert_eq!((config.unknown, config.repeated), (vec![], vec![]));
}

#[test]
fn unknown_keys_are_kept_and_a_misspelt_one_is_recognised() {
    let config = parse(
        "cache_transceiver_config:\n  backend: UCX\n  kv_transfer_timeout: 5\n  max-tokens-in-buffer: 1\n  colour: [red]\n",
    );
    let found: Vec<_> = config.unknown.iter().map(|key| (key.key.value.as_str(), key.key.at.line, key.meant)).collect();
    assert_eq!(
        found,
        [
            ("kv_transfer_timeout", 3, Some("kv_transfer_timeout_ms")),
            ("max-tokens-in-buffer", 4, Some("max_tokens_in_buffer")),
            ("colour", 5, None)
        ]
    );
    assert_eq!(config.unknown[2].value, "a list");
}

#[test]
fn a_file_without_the_section_and_one_with_nothing_in_it_are_told_apart() {
    assert_eq!(parse("").at, None);
    assert_eq!(parse("# nothing\n").at, None);
    assert_eq!(parse("tensor_parallel_size: 4\n").at, None);
    assert_eq!(parse("cache_transceiver_config:\n").at, Some(Position { line: 1, column: 1 }));
    assert_eq!(parse("cache_transceiver_config:\n  backend: null\n").backend.unwrap().value, None);
}

#[test]
fn anchors_merges_and_repeated_keys_mean_what_pyyaml_makes_of_them() {
    let config = parse(
        "base: &base {backend: UCX, kv_transfer_timeout_ms: 7}\n\
         cache_transceiver_config:\n  <<: *base\n  backend: NIXL\n",
    );
    assert_eq!(config.backend.unwrap().value, Some(Backend::Nixl));
    assert_eq!(config.kv_transfer_timeout_ms.unwrap().value, Some(7));
    let config = parse("cache_transceiver_config:\n  backend: UCX\n  backend: NIXL\n");
    assert_eq!(config.backend.unwrap().value, Some(Backend::Nixl));
    assert_eq!((config.repeated[0].value.as_str(), config.repeated[0].at.line), ("backend", 3));
    assert_eq!(config.unknown, []);
}

#[test]
fn wrong_values_are_named_with_line_column_and_remedy() {
    for (text, at, words) in [
        ("cache_transceiver_config:\n  backend: nixl\n", (2, 12), ["`nixl`", "NIXL or UCX, in capitals"]),
        ("cache_transceiver_config:\n  backend: [UCX]\n", (2, 12), ["a list", "DEFAULT"]),
        ("cache_transceiver_config:\n  kv_transfer_timeout_ms: 0\n", (2, 27), ["`0`", "from 1 on"]),
        ("cache_transceiver_config:\n  kv_transfer_timeout_ms: -5\n", (2, 27), ["`-5`", "from 1 on"]),
        ("cache_transceiver_config:\n  max_tokens_in_buffer: many\n", (2, 25), ["`many`", "whole number"]),
        ("cache_transceiver_config:\n  enable_pipelined_transfer: 2\n", (2, 30), ["`2`", "true or false"]),
        ("cache_transceiver_config:\n  transceiver_runtime: cpp\n", (2, 24), ["`cpp`", "CPP, PYTHON or auto"]),
        ("cache_transceiver_config: DEFAULT\n", (1, 27), ["`DEFAULT`", "not a mapping"]),
        ("- backend: UCX\n", (1, 1), ["a list", "engine configuration"]),
        ("cache_transceiver_config:\n  ? [a]\n  : 1\n", (2, 5), ["a list", "keys are words"]),
        (
            "context_servers:\n  cache_transceiver_config: {backend: UCX}\n",
            (2, 3),
            ["context_servers", "file of its own"],
        ),
    ] {
        let error = refused(text);
        let (line, column) = at;
        assert_eq!(error.at(), Some(Position { line, column }), "{text}: {error}");
        for word in words {
            assert!(error.to_string().contains(word), "{text}: no {word:?} in {error}");
        }
    }
}

#[test]
fn what_is_not_yaml_says_where() {
    for text in ["a: [1\n", "a: 'x\n", "\tb: 1\na", "a: *nowhere\n", "a: &x [*x]\n", "a: 1\n---\nb: 2\n", "{a: 1}}\n"] {
        let error = refused(text);
        assert!(error.at().is_some_and(|at| at.line >= 1 && at.column >= 1), "{text:?}: {error:?}");
    }
}

#[test]
fn hostile_text_is_refused_and_takes_no_memory() {
    assert!(matches!(refused(&"x".repeat(FILE_BYTES_MAX + 1)), ConfigError::Yaml(YamlError::TooLong { .. })));
    // The parser looks ahead for the end of what may be a key, and has a limit of its own.
    for deep in ["[".repeat(100_000), "{a: ".repeat(1000), "- ".repeat(100_000)] {
        let error = refused(&deep);
        assert!(error.at().is_some_and(|at| at.line == 1), "{error}");
    }
    let deep = format!("{}{}", "[".repeat(70), "]".repeat(70));
    assert!(matches!(refused(&deep), ConfigError::Yaml(YamlError::TooDeep { .. })));
    assert!(matches!(refused(&format!("[{}]", "1,".repeat(200_000))), ConfigError::Yaml(YamlError::TooMany { .. })));
    // A thousand million laughs: shared, so it costs what its text costs.
    let mut bomb = String::from("l0: &l0 [x, x]\n");
    for level in 1..60 {
        let below = level - 1;
        bomb.push_str(&format!("l{level}: &l{level} [*l{below}, *l{below}, *l{below}]\n"));
    }
    bomb.push_str("cache_transceiver_config: {backend: UCX, agent_bounce_params: *l59}\n");
    assert_eq!(parse(&bomb).backend.unwrap().value, Some(Backend::Ucx));
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "[ \\-:{}\\[\\]#&*!|>'\"%@`,?a-c0-9\n\t<]{0,200}") {
        let _ = TransceiverConfig::parse(&text);
        let _ = TransceiverConfig::parse(&format!("cache_transceiver_config:\n  {text}"));
    }

    #[test]
    fn no_cut_of_a_good_file_makes_it_panic(cut in 0usize..400) {
        let text = "cache_transceiver_config:\n  backend: \"NIXL\"\n  kv_transfer_timeout_ms: &t 5\n  agent_bounce_params: {a: [1, *t], b: |\n    x\n  }\n  max_tokens_in_buffer: 7 # é\n";
        let cut = text.char_indices().map(|(at, _)| at).take_while(|at| *at <= cut).last().unwrap_or(0);
        let _ = TransceiverConfig::parse(&text[..cut]);
    }
}
