//! The `cluster` example over UCX: geometries, directions, devices, and peers that die or stop in the middle.
//!
//! Without a UCX library the cases say so and pass, unless `KVFERRY_REQUIRE` names ucx.

mod cluster;

use cluster::{Case, HEADS_4, run, run_bare};

fn usable() -> bool {
    let Some(reason) = kvferry_ucx::UcxProvider::unavailable() else { return true };
    kvferry_transport::conformance::absent("ucx", &reason);
    false
}

/// Ranks inside one process, both ways, through memory and through tcp.
fn everywhere(options: &[&str]) {
    if !usable() {
        return;
    }
    for device in ["memory", "lo"] {
        for direction in ["pull", "push"] {
            let case = Case { transport: "ucx", direction, in_process: true };
            run(&case, &[options, &["--devices", device]].concat()).check_delivered(&case);
        }
    }
}

cluster::geometries!(everywhere);

#[test]
fn one_process_per_rank() {
    if !usable() {
        return;
    }
    for (device, direction) in [("memory", "pull"), ("lo", "push"), ("memory", "push"), ("lo", "pull")] {
        let case = Case { transport: "ucx", direction, in_process: false };
        for geometry in ["layers=4,kv_heads=8,head_dim=64,dtype=bf16", HEADS_4] {
            let options = ["--geometry", geometry, "--prefill", "tp=2", "--decode", "tp=2", "--isl", "300"];
            run(&case, &[&options[..], &["--requests", "5", "--devices", device]].concat()).check_delivered(&case);
        }
    }
}

#[test]
fn ranks_die_and_stop_in_the_middle() {
    if !usable() {
        return;
    }
    let sides = ["--model", "tiny", "--prefill", "tp=2,groups=2", "--decode", "tp=2,groups=2", "--requests", "12"];
    for (device, method) in [("memory", &[][..]), ("lo", &[]), ("memory", &["--two-sided"]), ("lo", &["--two-sided"])] {
        for direction in ["pull", "push"] {
            let case = Case { transport: "ucx", direction, in_process: false };
            for harm in [["--kill", "decode:1@2"], ["--kill", "prefill:1@2"], ["--stop", "prefill:0@2"]] {
                let devices = ["--devices", device, "--silence", "1200"];
                let all = [&sides[..], &devices, method, &harm].concat();
                let ran = run(&case, &all);
                ran.check_sound();
                assert_eq!(ran.number("delivered"), 12, "{harm:?} {device} {method:?} {direction}: {}", ran.stdout);
            }
        }
    }
}

/// TensorRT-LLM's `backend: UCX`: no remote keys.
#[test]
fn messages_of_both_sides() {
    let model = ["--geometry", "layers=2,kv_heads=8,head_dim=128,dtype=bf16", "--isl", "700", "--requests", "3"];
    everywhere(&[&model[..], &["--prefill", "tp=2", "--decode", "block=48", "--two-sided"]].concat());
    if !usable() {
        return;
    }
    let file = std::env::temp_dir().join(format!("kvferry-two-sided-{}.yaml", std::process::id()));
    std::fs::write(&file, "cache_transceiver_config:\n  backend: UCX\n").unwrap();
    let case = Case { transport: "auto", direction: "push", in_process: true };
    let ran = run(&case, &["--model", "tiny", "--config", file.to_str().unwrap()]);
    std::fs::remove_file(&file).unwrap();
    ran.check_sound();
    assert!(ran.stdout.contains("two-sided method"), "{}", ran.stdout);
}

#[test]
fn the_two_sided_method_is_of_ucx_only() {
    let ran = run_bare(&["--model", "tiny", "--transport", "tcp", "--two-sided"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("--transport ucx"), "{}", ran.stderr);
}

#[test]
fn a_device_that_is_not_there_is_named() {
    let ran = run_bare(&["--model", "tiny", "--transport", "ucx", "--devices", "rdmap9s0:1"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    for word in ["rdmap9s0:1", "ucx:memory", "ucx:lo"] {
        assert!(ran.stderr.contains(word), "no {word} in {}", ran.stderr);
    }
    if usable() {
        // What sysfs does not show, UCX itself is asked for.
        assert!(ran.stderr.contains("(UCX 1.") || ran.stderr.contains("show no such device; UCX 1."), "{}", ran.stderr);
    }
}
