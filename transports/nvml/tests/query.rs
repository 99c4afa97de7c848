//! NVML's calls, of a library with their layouts that a C compiler makes here: what each generation of them tells.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code")]

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use kvferry_nvml::{NvmlError, place, query};
use kvferry_transport::conformance::absent;

/// Compiled with a definition, for whoever asks; `None` without a compiler.
fn library(definition: &str) -> Option<PathBuf> {
    static MADE: AtomicU32 = AtomicU32::new(0);
    let number = MADE.fetch_add(1, Ordering::Relaxed);
    let file = std::env::temp_dir().join(format!("kvferry-nvml-{}-{number}-{definition}.so", std::process::id()));
    let mut compiler = Command::new("c++");
    compiler.args(["-x", "c", "-shared", "-fPIC", "-w", concat!(env!("CARGO_MANIFEST_DIR"), "/tests/nvml.c"), "-o"]);
    match compiler.arg(&file).arg(format!("-D{definition}")).output() {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => {
            absent("c++", &format!("no library to ask: c++ does not start ({error})"));
            return None;
        }
    }
    Some(file)
}

fn said(definition: &str) -> Option<Result<String, NvmlError>> {
    let file = library(definition)?;
    let said = query(file.as_os_str());
    std::fs::remove_file(file).unwrap();
    Some(said)
}

const FIRST: &str = "\
Driver Version                            : 570.124.06
Attached GPUs                             : 2
GPU 00000008:01:00.0
    Product Name                          : NVIDIA GB200
    Fabric
        State                             : Completed
        Status                            : Success
        CliqueId                          : 32766
        ClusterUUID                       : 5b1c0102-0304-0506-0708-090a0b0c0d0e
";
const HEALTH: &str = "            Bandwidth                     : Full
            Route Recovery in progress    : False
            Route Unhealthy               : False
            Access Timeout Recovery       : False
            Incorrect Configuration       : None
            Partition Assigned            : True
GPU 00000009:01:00.0
";

/// Line by line what `nvidia-smi -q` has of these GPUs.
#[test]
fn each_generation_of_the_call_tells_what_it_knows() {
    let Some(newest) = said("NEWEST") else { return };
    let newest = newest.unwrap();
    let summary = "        Health\n            Summary                       : Healthy\n";
    assert!(newest.starts_with(&[FIRST, summary, HEALTH].concat()), "{newest}");
    assert!(newest.contains("Status                            : Insufficient Resources"), "{newest}");
    assert!(newest.contains("Summary                       : Unhealthy"), "{newest}");
    assert!(newest.contains("Route Unhealthy               : True"), "{newest}");
    let second = said("SECOND").unwrap().unwrap();
    assert!(second.starts_with(&[FIRST, "        Health\n", HEALTH].concat()), "{second}");
    let first = said("FIRST").unwrap().unwrap();
    assert!(first.starts_with(&[FIRST, "GPU 00000009:01:00.0\n"].concat()), "{first}");
    let old = said("OLD").unwrap().unwrap();
    assert!(old.contains("GPU 00000009:01:00.0") && !old.contains("Fabric"), "{old}");
}

#[test]
fn a_gpu_is_found_in_its_domain_or_why_it_is_in_none() {
    let gpu = |number| [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, number];
    for generation in ["NEWEST", "SECOND", "FIRST"] {
        let Some(file) = library(generation) else { return };
        let first = place(file.as_os_str(), &gpu(0)).unwrap();
        assert_eq!(first.to_string(), "5b1c0102-0304-0506-0708-090a0b0c0d0e/32766");
        // It did not get what it takes, and the other is nobody's.
        let second = place(file.as_os_str(), &gpu(1)).unwrap_err();
        assert!(matches!(&second, NvmlError::Unregistered { status, .. } if status == "Insufficient Resources"));
        assert!(place(file.as_os_str(), &[0; 16]).is_err());
        std::fs::remove_file(file).unwrap();
    }
    let Some(old) = library("OLD") else { return };
    let none = place(old.as_os_str(), &gpu(0)).unwrap_err();
    assert!(matches!(&none, NvmlError::Unregistered { state, .. } if state == "N/A"), "{none}");
    std::fs::remove_file(old).unwrap();
}

#[test]
fn what_does_not_load_or_start_says_why() {
    let missing = query("libnvidia-ml-of-nobody.so.1".as_ref()).unwrap_err().to_string();
    assert!(missing.contains("libnvidia-ml-of-nobody.so.1") && missing.contains("utility"), "{missing}");
    let Some(nothing) = said("NOTHING") else { return };
    let nothing = nothing.unwrap_err().to_string();
    assert_eq!(nothing, "nvmlInit_v2 says `Driver Not Loaded` (9)");
}
