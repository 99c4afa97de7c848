//! `kvferry bench --transport nixl`, between two of our agents and with a NIXL agent as the second process.
//!
//! `KVFERRY_NIXL_PYTHON` names a Python with a NIXL wheel; without it the cases say so and pass, unless `KVFERRY_REQUIRE` names nixl-agent.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "this is test code")]

use std::process::{Command, Output};

use serde_json::Value;

fn python() -> Option<String> {
    let python = std::env::var("KVFERRY_NIXL_PYTHON").ok().filter(|python| !python.is_empty());
    if python.is_none() {
        kvferry_transport::conformance::absent("nixl-agent", "KVFERRY_NIXL_PYTHON names no Python with a NIXL wheel");
    }
    python
}

fn bench(arguments: &str, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvferry"));
    command.args(["bench", "--transport", "nixl", "--json", "--deadline", "60"]);
    // Whatever UCX logs, stdout is the report's and the second process's words.
    command.env("UCX_LOG_LEVEL", "info").env_remove("UCX_LOG_FILE").env_remove("UCX_TLS");
    command.args(arguments.split_whitespace()).args(more).output().unwrap()
}

#[test]
fn both_directions_are_measured_and_verified_beside_either_agent() {
    let Some(python) = python() else { return };
    for op in ["pull", "push"] {
        for tls in [&["--tls", "tcp"][..], &[]] {
            for (is, lacks, peer) in
                [("an agent of kvferry's", 3, &[][..]), ("a NIXL agent", 4, &["--nixl-python", &python])]
            {
                // Also blocks whose bytes no word divides.
                for (layers, blocks, block_bytes) in [(3, 40, 4096), (2, 9, 1001)] {
                    let shape = format!("--layers {layers} --blocks {blocks} --block-bytes {block_bytes} --iters 2");
                    let output = bench(&format!("--op {op} {shape}"), &[tls, peer].concat());
                    let errors = String::from_utf8_lossy(&output.stderr);
                    assert!(output.status.success(), "{op} {tls:?} {peer:?}: {errors}");
                    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
                    assert_eq!((&report["transport"], &report["op"]), (&"nixl".into(), &op.into()));
                    assert_eq!(report["bytes"], 2 * layers * blocks * block_bytes);
                    assert_eq!((&report["verified"], &report["peer"]), (&true.into(), &is.into()));
                    assert_eq!(report["lacks"].as_array().unwrap().len(), lacks);
                    assert!(report["cpu_seconds"].as_f64().unwrap() > 0.0);
                }
            }
        }
    }
}

#[test]
fn programs_are_measured_and_verified_between_two_agents_of_ours() {
    let Some(python) = python() else { return };
    for op in ["pull", "push"] {
        for (device, tls) in [("memory", &[][..]), ("lo", &["--tls", "tcp"])] {
            for (layers, blocks, block_bytes) in [(3, 40, 4096), (2, 9, 1001)] {
                let shape = format!("--layers {layers} --blocks {blocks} --block-bytes {block_bytes} --iters 3");
                let output = bench(&format!("--op {op} --programs {device} {shape}"), tls);
                let errors = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "{op} {device}: {errors}");
                let report: Value = serde_json::from_slice(&output.stdout).unwrap();
                assert_eq!(
                    (&report["bytes"], &report["verified"]),
                    (&(2 * layers * blocks * block_bytes).into(), &true.into())
                );
                assert!(report["device"].as_str().unwrap().ends_with(&format!("programs by {device}")));
                // Only that nobody is authenticated.
                assert_eq!(report["lacks"].as_array().unwrap().len(), 1, "{report}");
            }
        }
    }
    let output = bench("--layers 1 --blocks 2 --programs memory", &["--nixl-python", &python]);
    assert_eq!(output.status.code(), Some(2), "NIXL's agents know no programs");
}

#[test]
fn a_python_without_nixl_is_an_error_that_says_so() {
    let Some(_) = python() else { return };
    let output = bench("--layers 1 --blocks 2", &["--nixl-python", "/bin/false"]);
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(errors.contains("peer process"), "{errors}");
}
