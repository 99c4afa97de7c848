//! The `simulate` example as its users meet it: a process with options, output and an exit status.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

#[test]
fn whoever_has_read_enough_misses_no_verdict() {
    let quick = ["--seed", "7", "--requests", "20", "--log"];
    let mut run = simulate(&quick).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    drop(run.stdout.take());
    let run = run.wait_with_output().expect("ends");
    assert_eq!((run.status.code(), &*text(&run.stderr)), (Some(0), ""), "its output is closed, as by head");

    let full = File::create("/dev/full").expect("Linux has a full device");
    let run = simulate(&quick).stdout(full).output().expect("runs");
    let error = text(&run.stderr);
    assert!(run.status.code() == Some(1) && error.contains("writing to standard output"), "{error}");
}

fn simulate(options: &[&str]) -> Command {
    let mut command = Command::new(example());
    command.args(options);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `target/<profile>/examples/simulate`, beside this test's own directory.
fn example() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows where it is");
    let profile = test.parent().and_then(Path::parent).expect("tests lie in target/<profile>/deps");
    profile.join("examples/simulate")
}
