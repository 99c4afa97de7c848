//! What `measure` prints where the rivals that it is to be compared with are not there.
#![allow(clippy::unwrap_used, reason = "this is test code")]

use std::process::Command;

#[test]
fn what_is_not_measured_says_so() {
    let folder = std::env::temp_dir().join(format!("kvferry-measure-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/measure"), folder.join("measure")).unwrap();
    let mut measure = Command::new("bash");
    measure.arg(folder.join("measure")).args(["limit", "nixl"]).env("OUT", folder.join("out"));
    let output = measure.output().unwrap();
    let summary = std::fs::read_to_string(folder.join("out/summary.txt"));
    std::fs::remove_dir_all(&folder).unwrap();
    let summary = summary.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for line in [
        "limit program: skipped, nvlink_program_limit.cu does not lie beside this script",
        "nixl: skipped, nixl_gpu.py does not lie beside this script",
    ] {
        assert!(summary.lines().any(|said| said == line), "{summary}");
    }
}
