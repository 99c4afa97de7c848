//! `kvferry doctor` as scripts use it: options, JSON, exit codes. What it finds is tested in runtime/doctor/tests.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "this is test code")]

use std::path::PathBuf;
use std::process::{Command, Output};

use kvferry_transport::conformance::absent;
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
    // Where nothing of all that is there, nothing is wrong with what is not expected.
    let bare = |report: &Value| {
        let nothing = |id: &str, words: &str| check(report, id)["evidence"][0].as_str().unwrap().contains(words);
        nothing("gpu.devices", "0 NVIDIA GPUs") && nothing("gpu.affinity", "of no concern")
    };
    if bare(&report) && !std::path::Path::new("/sys/class/infiniband").exists() {
        assert_eq!(json(&[], 0)["status"], "ok");
    }
}

#[test]
fn a_captured_host_and_an_environment_from_a_file() {
    let folder: PathBuf = std::env::temp_dir().join(format!("kvferry-doctor-command-{}", std::process::id()));
    std::fs::create_dir_all(folder.join("proc/self")).unwrap();
    std::fs::create_dir_all(folder.join("sys/class/net")).unwrap();
    std::fs::write(folder.join("proc/self/limits"), "Max locked memory unlimited unlimited bytes\n").unwrap();
    std::fs::write(folder.join("worker.env"), "FI_EFA_MTU_SIZE=4096\n").unwrap();
    let root = folder.to_str().unwrap();
    let environment = folder.join("worker.env");
    assert_eq!(json(&["--root", root], 0)["status"], "ok");
    let report = json(&["--root", root, "--env-file", environment.to_str().unwrap()], 2);
    assert_eq!(check(&report, "variables.aborting")["status"], "fail");
    std::fs::remove_dir_all(folder).unwrap();
}

/// What NVML says, asked by a process of its own: a library with its calls stands for the driver's.
#[test]
fn nvml_is_asked_of_the_fabric_and_may_die_of_it() {
    let folder: PathBuf = std::env::temp_dir().join(format!("kvferry-doctor-nvml-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let state = |definition: &str| {
        let (library, file) = (folder.join(format!("{definition}.so")), folder.join("worker.env"));
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/transports/nvml/tests/nvml.c");
        let mut compiler = Command::new("c++");
        compiler.args(["-x", "c", "-shared", "-fPIC", "-w", source, "-o"]).arg(&library);
        match compiler.arg(format!("-D{definition}")).output() {
            Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
            Err(error) => {
                absent("c++", &format!("no library to ask: c++ does not start ({error})"));
                return None;
            }
        }
        std::fs::write(&file, format!("KVFERRY_NVML_LIBRARY={}\nNCCL_MNNVL_ENABLE=1\n", library.display())).unwrap();
        let report = json(&["--env-file", file.to_str().unwrap()], 2);
        Some(check(&report, "fabric.state").clone())
    };
    let words = |check: &Value| check["evidence"].as_array().unwrap().iter().map(Value::to_string).collect::<String>();
    if let Some(newest) = state("NEWEST") {
        // One of its two GPUs has registered with an error.
        assert_eq!(newest["status"], "fail");
        assert!(words(&newest).contains("ended in an error on 1 of 2 GPUs"), "{newest}");
        assert!(newest["fix"].as_str().unwrap().contains("NMX-C"), "{newest}");
        assert!(words(&newest).contains("GPU 00000009:01:00.0: Completed, Insufficient Resources"), "{newest}");
        let old = state("OLD").unwrap();
        assert!(old["status"] == "fail" && words(&old).contains("570.124.06 is too old"), "{old}");
        let deadly = state("DEADLY").unwrap();
        assert!(deadly["status"] == "warn" && words(&deadly).contains("is ended by signal 6"), "{deadly}");
    }
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
    let image = std::env::temp_dir().join(format!("kvferry-doctor-{}-image", std::process::id()));
    std::fs::write(&image, b"a: \n\xff").unwrap();
    for (arguments, words) in [
        (&["--expect", "nic=4"][..], ["nic=4", "efa=4,gpu=8"]),
        (&["--root", "/nonexistent"], ["--root /nonexistent", "sys, dev and proc"]),
        (&["--root", "/usr/share"], ["--root /usr/share", "it is no host's"]),
        // It has a folder `sys`, of another kind.
        (&["--root", "/proc"], ["--root /proc", "it is no host's"]),
        (&["--log", "/nonexistent"], ["/nonexistent", "readable file"]),
        (
            &["--log", "/dev/zero"],
            ["more than 268435456 bytes", "head -c 268435456 /dev/zero | kvferry doctor --log -"],
        ),
        (&["--manifest", image.to_str().unwrap()], ["image:2: byte 4 is not UTF-8 text", "name another file"]),
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
    std::fs::remove_file(image).unwrap();
}
