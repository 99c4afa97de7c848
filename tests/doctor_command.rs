//! `kvferry doctor` as scripts use it: options, JSON, exit codes. What it finds is tested in runtime/doctor/tests.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "this is test code")]

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

const LOGS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/transports/ucx/text/tests/logs");

fn doctor(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvferry"));
    command.arg("doctor").args(arguments).env_clear().output().unwrap()
}

fn json(arguments: &[&str], code: i32) -> Value {
    let output = doctor(&[arguments, &["--json"]].concat());
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", String::from_utf8_lossy(&output.stdout));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn check<'a>(report: &'a Value, id: &str) -> &'a Value {
    report["checks"].as_array().unwrap().iter().find(|check| check["id"] == id).unwrap()
}

#[test]
fn this_host_is_told_truthfully_and_fails_only_what_was_expected() {
    // Nobody's build host has 97 EFA devices.
    let report = json(&["--expect", "efa=97"], 2);
    assert_eq!(report["status"], "fail");
    let devices = check(&report, "efa.devices");
    assert_eq!(devices["status"], "fail");
    assert!(devices["evidence"][0].as_str().unwrap().contains("97 expected"));
    assert!(devices["fix"].as_str().unwrap().contains("vpc.amazonaws.com/efa"));
}

#[test]
fn a_captured_host_and_an_environment_from_a_file() {
    let folder: PathBuf = std::env::temp_dir().join(format!("kvferry-doctor-command-{}", std::process::id()));
    std::fs::create_dir_all(folder.join("proc/self")).unwrap();
    std::fs::write(folder.join("proc/self/limits"), "Max locked memory unlimited unlimited bytes\n").unwrap();
    std::fs::write(folder.join("worker.env"), "FI_EFA_MTU_SIZE=4096\n").unwrap();
    let root = folder.to_str().unwrap();
    let environment = folder.join("worker.env");
    assert_eq!(json(&["--root", root], 0)["status"], "ok");
    let report = json(&["--root", root, "--env-file", environment.to_str().unwrap()], 2);
    assert_eq!(check(&report, "variables.aborting")["status"], "fail");
    std::fs::remove_dir_all(folder).unwrap();
}

/// "kubectl logs | grep": the worker's log, graded.
#[test]
fn logs_end_with_their_status() {
    let log = |name: &str| format!("{LOGS}/{name}.log");
    assert_eq!(json(&["--log", &log("ucx_srd_rails2")], 0)["status"], "ok");
    assert_eq!(json(&["--log", &log("ucx_fallback_tcp_no_uverbs")], 1)["status"], "warn");
    assert_eq!(json(&["--log", &log("ucx_fallback_tcp_no_uverbs"), "--expect", "efa=4"], 2)["status"], "fail");
    let output = doctor(&["--log", &log("ucx_srd_peer1_software_emulation")]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text.contains("fail  log.protocols") && text.contains("do: set UCX_RNDV_THRESH=inf"), "{text}");
    assert!(text.ends_with("6 ok, 0 warn, 1 fail\n"), "{text}");
}

#[test]
fn wrong_options_say_what_to_do() {
    for (arguments, words) in [
        (&["--expect", "nic=4"][..], ["nic=4", "efa=4,gpu=8"]),
        (&["--root", "/nonexistent"], ["--root /nonexistent", "sys, dev and proc"]),
        (&["--log", "/nonexistent"], ["/nonexistent", "readable file"]),
        (&["--log", "x", "--role", "decode"], ["--log", "--role"]),
        (&["--env-file", "/nonexistent"], ["/nonexistent", "readable file"]),
        (&["--pid", "4294967295"], ["--pid 4294967295", "--env-file"]),
    ] {
        let output = doctor(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        for word in words {
            assert!(text.contains(word), "{arguments:?}: no {word:?} in {text}");
        }
    }
}
