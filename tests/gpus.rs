//! Pools in GPU memory as users have them, where no GPU is: the `cluster` example and `kvferry bench` on a driver whose one device is the processor
//! (`transports/cuda/tests/driver.cpp`). What it cannot show is a second GPU, NVLink, and time.
//!
//! Without a C++ compiler the cases say so and pass, unless `KVFERRY_REQUIRE` names c++.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "this is test code")]

#[allow(dead_code, reason = "every run here is on the driver")]
mod cluster;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use cluster::{Case, HEADS_4, Ran, run_with_libraries};
use kvferry_topology::simulated::{Host, Nic};
use kvferry_transport::conformance::absent;
use serde_json::Value;

/// Where the driver is, and NVML for it; made once.
fn driver() -> Option<&'static Path> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOLDER.get_or_init(make).as_deref()
}

fn make() -> Option<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("driver-of-none");
    std::fs::create_dir_all(&folder).unwrap();
    let sources = concat!(env!("CARGO_MANIFEST_DIR"), "/transports");
    let driver = (&["-std=c++17", "-O1", "-x", "c++"][..], "cuda/tests/driver.cpp", "libcuda.so.1");
    let nvml = (&["-x", "c", "-DNEWEST"][..], "nvml/tests/nvml.c", "libnvidia-ml.so.1");
    for (options, source, name) in [driver, nvml] {
        let mut compiler = Command::new("c++");
        compiler.args(["-shared", "-fPIC", "-w", &format!("-Wl,-soname,{name}")]).args(options);
        match compiler.arg(format!("{sources}/{source}")).arg("-o").arg(folder.join(name)).output() {
            Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
            Err(error) => {
                absent("c++", &format!("there is no GPU's driver to test with: c++ does not start ({error})"));
                return None;
            }
        }
    }
    Some(folder)
}

/// Runs a case's options with pools on the device.
fn run(driver: &Path, case: &Case, options: &[&str]) -> Ran {
    run_with(driver, &[], case, options)
}

/// The same, where the driver is told what it is to be.
fn run_with(driver: &Path, told: &[(&str, &str)], case: &Case, options: &[&str]) -> Ran {
    let first = ["--json", "--deadline", "120", "--transport", case.transport, "--direction", case.direction];
    let in_process: &[&str] = if case.in_process { &["--in-process"] } else { &[] };
    run_with_libraries(driver, told, &[&first, in_process, options].concat())
}

/// By kernels, and staged through TCP; both ways.
fn everywhere(options: &[&str]) {
    let Some(driver) = driver() else { return };
    for (transport, on) in [("cuda", &["--gpus", "0"][..]), ("tcp", &["--gpus", "0", "--devices", "lo"])] {
        for direction in ["pull", "push"] {
            let case = Case { transport, direction, in_process: transport == "tcp" };
            run(driver, &case, &[options, on].concat()).check_delivered(&case);
        }
    }
}

cluster::geometries!(everywhere);

/// Paths say that staging is in between.
#[test]
fn what_is_staged_says_so() {
    let Some(driver) = driver() else { return };
    let ucx = kvferry_ucx::UcxProvider::unavailable().is_none().then_some(("ucx", "lo"));
    for (transport, device) in [Some(("tcp", "lo")), ucx].into_iter().flatten() {
        let case = Case { transport, direction: "pull", in_process: false };
        let sides = ["--geometry", HEADS_4, "--prefill", "tp=2", "--decode", "tp=2", "--isl", "90", "--requests", "4"];
        let ran = run(driver, &case, &[&sides[..], &["--gpus", "0,0", "--devices", device]].concat());
        ran.check_delivered(&case);
        assert!(ran.paths().iter().all(|path| path["proof"]["staged"] == true), "{}", ran.stdout);
    }
}

/// Ranks open the NICs near the GPU that their pools are on: where that is says the driver.
#[test]
fn nics_near_the_device_are_taken() {
    let Some(driver) = driver() else { return };
    let host = Host::mlx5("near-gpu").unwrap();
    let below = "pci0001:00/0001:00:01.0";
    // What the driver says of its device.
    host.gpu(below, "0001:01:01.0", "0x2330", Some(1)).unwrap();
    for (name, slot) in [("mlx5_20", "02"), ("mlx5_21", "03")] {
        let nic = Nic { name, vendor: "0x15b3", device: "0x1021", driver: "mlx5_core", gigabits: 400 };
        host.nic(below, &format!("0001:01:{slot}.0"), nic, Some(1)).unwrap();
    }
    host.write("sys/class/infiniband/mlx5_20/device/net/lo/dev_port", "0").unwrap();
    host.write("sys/class/infiniband/mlx5_21/device/net/nosuch0/dev_port", "0").unwrap();
    let case = Case { transport: "tcp", direction: "pull", in_process: true };
    let sides = ["--geometry", HEADS_4, "--isl", "60", "--requests", "3", "--gpus", "0", "--devices", "near"];
    let ran = run(driver, &case, &[&sides[..], &["--root", host.path().to_str().unwrap()]].concat());
    ran.check_delivered(&case);
    let ranks = "prefill:0,prefill:1,decode:0,decode:1,decode:2,decode:3";
    let note = format!("note: --devices near: {ranks} tcp:lo (GPU 0001:01:01.0, below one switch)");
    assert!(ran.stderr.lines().any(|line| line == note), "{}", ran.stderr);
    let report = ran.json();
    let [warning] = &report["warnings"].as_array().unwrap()[..] else { panic!("{}", ran.stdout) };
    assert!(warning.as_str().unwrap().contains("mlx5_21:1: it is on this host (mlx5, PCI 0001:01:03.0)"), "{warning}");
}

#[test]
fn auto_takes_the_device_or_says_why_not() {
    let Some(driver) = driver() else { return };
    for (gpus, transport, note) in [
        ("0", "cuda", "note: pools are on GPUs"),
        ("0,99", "shm", "note: pools are in host memory, not on --gpus 0,99: "),
    ] {
        let case = Case { transport: "auto", direction: "pull", in_process: false };
        let sides = ["--geometry", HEADS_4, "--isl", "60", "--requests", "3", "--gpus", gpus];
        let ran = run(driver, &case, &sides);
        ran.check_delivered(&case);
        assert!(ran.paths().iter().all(|path| path["transport"] == transport), "{}", ran.stdout);
        assert!(ran.stderr.contains(note), "{}", ran.stderr);
    }
}

/// Pairs of ranks on GPUs that do not reach each other take the next transport, and say why; those on one GPU keep to it.
#[test]
fn gpus_that_do_not_reach_each_other_are_passed_over() {
    let Some(driver) = driver() else { return };
    let apart = [("DRIVER_OF_NONE_APART", "no peer access"), ("DRIVER_OF_NONE_MIG", "MIG instance")];
    for (variable, reason) in apart {
        for direction in ["pull", "push"] {
            let case = Case { transport: "auto", direction, in_process: false };
            let sides = ["--geometry", HEADS_4, "--prefill", "tp=2", "--decode", "tp=1", "--isl", "60"];
            // Named devices that cannot reach a GPU's memory are left out.
            let devices = if direction == "pull" { "memory,lo" } else { "memory" };
            let named: &[&str] = if variable == "DRIVER_OF_NONE_APART" { &["--devices", devices] } else { &[] };
            let sides = [&sides[..], &["--requests", "4", "--gpus", "0,1"], named].concat();
            let ran = run_with(driver, &[("DRIVER_OF_NONE_GPUS", "2"), (variable, "1")], &case, &sides);
            ran.check_delivered(&case);
            assert!(ran.stderr.contains("pools are on GPUs; where they do not reach"), "{}", ran.stderr);
            let paths = ran.paths();
            assert_eq!(paths.len(), 2, "{}", ran.stdout);
            // The decode rank is on gpu0, with the first of the others.
            for path in paths {
                let (transport, passed_over) = (&path["transport"], path["passed_over"].to_string());
                if path["from"] == "prefill:0" {
                    assert_eq!((transport, passed_over.as_str()), (&Value::from("cuda"), "[]"), "{path}");
                } else {
                    assert_eq!(transport, "tcp", "{path}");
                    assert!(passed_over.contains("cuda") && passed_over.contains(reason), "{path}");
                    assert_eq!(path["proof"]["staged"], true, "{path}");
                }
            }
        }
    }
}

#[test]
fn bench_moves_gpu_memory() {
    let Some(driver) = driver() else { return };
    for (transport, device) in [("cuda", ""), ("tcp", "--device lo")] {
        for (op, from, to) in [("pull", true, true), ("push", true, true), ("pull", true, false), ("push", false, true)]
        {
            if transport == "cuda" && !(from && to) {
                continue;
            }
            let gpus = [from.then_some("--from-gpu 0"), to.then_some("--to-gpu 0")].into_iter().flatten();
            let options = gpus.fold(format!("--transport {transport} --op {op} {device}"), |all, gpu| all + " " + gpu);
            let options = options + " --layers 3 --blocks 40 --block-bytes 4096 --iters 2 --json --deadline 60";
            let mut bench = Command::new(env!("CARGO_BIN_EXE_kvferry"));
            bench.arg("bench").args(options.split_whitespace()).env("LD_LIBRARY_PATH", driver);
            let output = bench.output().unwrap();
            assert!(output.status.success(), "{options}: {}", String::from_utf8_lossy(&output.stderr));
            let report: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!((&report["verified"], &report["pieces"]), (&Value::Bool(true), &Value::from(240)), "{options}");
            // The destination is whom it asks.
            assert_eq!(report["evidence"]["staged"], Value::Bool(transport == "tcp" && to), "{options}: {report}");
        }
    }
}

#[test]
fn bench_names_a_gpu_that_is_not_there() {
    let Some(driver) = driver() else { return };
    for transport in ["cuda", "tcp"] {
        for (option, op) in [("--from-gpu", "pull"), ("--to-gpu", "pull"), ("--from-gpu", "push"), ("--to-gpu", "push")]
        {
            let mut bench = Command::new(env!("CARGO_BIN_EXE_kvferry"));
            bench.args(["bench", "--transport", transport, "--op", op, option, "1"]).env("LD_LIBRARY_PATH", driver);
            let output = bench.output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{transport} {option} {op}: {said}");
            assert!(said.contains(&format!("{option} 1: there is no cuda device")) && said.contains("gpu0"), "{said}");
        }
    }
}

/// GPUs' own times need a call that the oldest drivers do not have.
#[test]
fn an_old_driver_measures_without_gpu_times() {
    let Some(driver) = driver() else { return };
    let bench = |options: &str| {
        let mut bench = Command::new(env!("CARGO_BIN_EXE_kvferry"));
        bench.args("bench --transport cuda --layers 1 --blocks 4 --iters 1 --deadline 60".split_whitespace());
        bench.args(options.split_whitespace()).env("LD_LIBRARY_PATH", driver).env("DRIVER_OF_NONE_VERSION", "12020");
        bench.output().unwrap()
    };
    assert!(bench("").status.success());
    let refused = bench("--gpu-times");
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("the driver has CUDA 12.2, and GPU times need 12.8"), "{said}");
    assert!(refused.status.code().is_some_and(|code| code == 1 || code == 2), "{said}");
}

#[test]
fn what_is_no_number_of_a_gpu_is_refused() {
    for given in ["x", "", "0,,0", "-1"] {
        let ran = cluster::run_bare(&["--transport", "auto", &format!("--gpus={given}")]);
        assert_eq!(ran.code, Some(2), "{given:?}: {}", ran.stderr);
        assert!(ran.stderr.contains("--gpus") && ran.stderr.contains("such as 0,1"), "{}", ran.stderr);
    }
}
