//! `kvferry bench` as scripts use it: its JSON, its exit codes, and what it does when its other process dies.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "this is test code")]

use std::fs;
use std::io::Read;
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);

fn bench(arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvferry"));
    command.arg("bench").args(arguments.split_whitespace());
    command
}

fn run(arguments: &str) -> Output {
    bench(arguments).output().unwrap()
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json(arguments: &str) -> Value {
    let output = run(&format!("{arguments} --json --deadline 60"));
    assert!(output.status.success(), "{arguments}: {}", errors(&output));
    assert!(output.stderr.is_empty(), "{}", errors(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn every_transport_and_direction_is_measured_and_verified() {
    let has_libfabric = kvferry_libfabric::LibfabricProvider::unavailable().is_none();
    for transport in ["shm", "tcp"].into_iter().chain(has_libfabric.then_some("libfabric")) {
        for op in ["pull", "push"] {
            // Blocks of whole tokens, a block that sixteen tokens cannot share, and one of a single byte.
            for (layers, blocks, block_bytes) in [(3, 40, 4096), (2, 9, 1000), (1, 5, 1)] {
                let shape = format!("--layers {layers} --blocks {blocks} --block-bytes {block_bytes} --iters 3");
                let report = json(&format!("--transport {transport} --op {op} {shape}"));
                let pieces = 2 * layers * blocks;
                assert_eq!(report["transport"], transport);
                assert_eq!(report["op"], op);
                assert_eq!(report["pieces"], pieces);
                assert_eq!(report["bytes"], pieces * block_bytes);
                assert_eq!(report["verified"], true);
                assert!(!report["device"].as_str().unwrap().is_empty());
                let seconds = ["min", "p50", "max"].map(|name| report["seconds"][name].as_f64().unwrap());
                assert!(0.0 < seconds[0] && seconds.is_sorted(), "{seconds:?}");
                let rate = (pieces * block_bytes) as f64 / seconds[1] / 1e9;
                let reported = report["gigabytes_per_second"].as_f64().unwrap();
                assert!((reported - rate).abs() <= rate * 1e-6, "{reported} where {rate} follows");
                assert!(report["plan_microseconds"].as_f64().unwrap() > 0.0);
                assert!(report["cpu_seconds"].as_f64().unwrap() > 0.0);
                let fields: Vec<&String> = report.as_object().unwrap().keys().collect();
                assert!(report["first_seconds"].as_f64().unwrap() > 0.0);
                assert!(report["rested_seconds"].as_f64().unwrap() > 0.0);
                // A native library is named.
                let expected = if transport == "libfabric" { 14 } else { 13 };
                assert_eq!(fields.len(), expected, "{fields:?}");
                let evidence = &report["evidence"];
                let grade = if transport == "shm" { "E4" } else { "E3" };
                assert_eq!(evidence["grade"], grade, "{evidence}");
                assert!(!evidence["lanes"].as_array().unwrap().is_empty(), "{evidence}");
            }
        }
    }
}

#[test]
fn streams_and_device_are_used() {
    let report = json("--transport tcp --device lo --streams 1 --layers 1 --blocks 64 --block-bytes 16384 --iters 2");
    assert_eq!(report["device"], "lo");
    let report = json("--transport tcp --device lo --streams 5 --op push --layers 1 --blocks 64 --iters 2");
    assert_eq!(report["verified"], true);
}

#[test]
fn rails_share_what_moves() {
    for op in ["pull", "push"] {
        // 32 MiB an iteration, to an address of the loopback for each rail.
        let shape = "--layers 8 --blocks 32 --block-bytes 65536 --iters 4";
        let devices = "--rails 3 --device 127.0.0.2,127.0.0.3,127.0.0.4";
        let report = json(&format!("--transport tcp --op {op} {shape} {devices}"));
        assert_eq!(report["verified"], true);
        assert_eq!(report["device"], "127.0.0.2,127.0.0.3,127.0.0.4");
        let rails = report["rails"].as_array().unwrap();
        let names: Vec<&str> = rails.iter().map(|rail| rail["device"].as_str().unwrap()).collect();
        assert_eq!(names, ["127.0.0.2", "127.0.0.3", "127.0.0.4"]);
        let carried: Vec<u64> = rails.iter().map(|rail| rail["bytes"].as_u64().unwrap()).collect();
        assert_eq!(carried.iter().sum::<u64>(), 4 * report["bytes"].as_u64().unwrap(), "each byte once: {carried:?}");
        assert!(carried.iter().all(|bytes| *bytes > 0), "{carried:?}");
    }
    let too_few = run("--transport tcp --rails 2 --device 127.0.0.2");
    assert_eq!(too_few.status.code(), Some(2), "{}", errors(&too_few));
    assert!(errors(&too_few).contains("--rails 2") && errors(&too_few).contains("127.0.0.2"), "{}", errors(&too_few));
}

#[test]
fn pieces_are_compared_with_what_is_contiguous() {
    for (transport, op) in [("shm", "pull"), ("tcp", "push")] {
        let report = json(&format!("--transport {transport} --op {op} --layers 2 --blocks 8 --iters 2 --contiguous"));
        assert_eq!(report["verified"], true, "{transport}: what it overwrote came again");
        let (pieces, large) = (report["seconds"]["p50"].as_f64(), report["contiguous_seconds"]["p50"].as_f64());
        let part = report["of_contiguous"].as_f64().unwrap();
        assert!((large.unwrap() / pieces.unwrap() - part).abs() < 1e-9, "{report}");
    }
    assert!(json("--transport shm --layers 1 --blocks 4 --iters 1").get("of_contiguous").is_none());
}

#[test]
fn people_get_a_table() {
    let output = run("--transport shm --layers 1 --blocks 4 --iters 1");
    assert!(output.status.success(), "{}", errors(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    for word in ["shm on memory", "pull", "2 planes × 4 blocks × 4096 bytes", "GB/s", "first ms", "every byte"] {
        assert!(text.contains(word), "no {word:?} in\n{text}");
    }
}

#[test]
fn options_without_sense_are_refused_with_two() {
    for (arguments, hint) in [
        ("", "--transport"),
        ("--transport carrier-pigeon", "shm, ucx, libfabric, tcp, cuda"),
        ("--transport sim", "shm, ucx, libfabric, tcp, cuda"),
        ("--transport shm --op shove", "pull, push"),
        ("--transport shm --layers 0", "--layers"),
        ("--transport shm --blocks 0", "--blocks"),
        ("--transport shm --block-bytes 0", "--block-bytes"),
        ("--transport shm --iters 0", "--iters"),
        ("--transport shm --deadline 0", "--deadline"),
        ("--transport shm --streams 2", "--streams"),
        ("--transport shm --device gpu9", "memory"),
        ("--transport tcp --device no-such-interface", "lo"),
        ("--transport ucx --tls tcp", "--transport nixl"),
        ("--transport shm --nixl-python python3", "--transport nixl"),
        ("--transport nixl --two-sided", "--transport ucx"),
        ("--transport shm --frobnicate", "--frobnicate"),
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments}: {}", errors(&output));
        assert!(errors(&output).contains(hint), "{arguments}: no {hint:?} in\n{}", errors(&output));
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn memory_that_nobody_has_is_an_error() {
    let output = run("--transport shm --layers 1024 --blocks 4194304 --block-bytes 1048576 --deadline 60");
    assert_eq!(output.status.code(), Some(1), "{}", errors(&output));
    assert!(errors(&output).contains("fewer blocks"), "{}", errors(&output));
}

/// More iterations than fit any deadline.
const ENDLESS: &str = "--layers 2 --blocks 64 --iters 1000000";

#[test]
fn a_deadline_ends_everything() {
    for transport in ["shm", "tcp"] {
        let (status, text, peer) = watched(&format!("--transport {transport} {ENDLESS} --deadline 5"), |_| {});
        assert_eq!(status.code(), Some(1), "{text}");
        assert!(text.contains("--deadline"), "{text}");
        assert!(!is_alive(peer), "the peer process is still there");
    }
}

#[test]
fn a_killed_peer_is_an_error() {
    for transport in ["shm", "tcp"] {
        for op in ["pull", "push"] {
            let arguments = format!("--transport {transport} --op {op} {ENDLESS} --deadline 50");
            let (status, text, peer) = watched(&arguments, |peer| signal("KILL", peer));
            assert_eq!(status.code(), Some(1), "{text}");
            assert!(text.contains("peer process ended early (signal: 9"), "{text}");
            assert!(!is_alive(peer));
        }
    }
}

#[test]
fn a_stopped_peer_is_killed_at_the_deadline() {
    let arguments = format!("--transport tcp --op push {ENDLESS} --deadline 5");
    let (status, text, peer) = watched(&arguments, |peer| signal("STOP", peer));
    assert_eq!(status.code(), Some(1), "{text}");
    assert!(text.contains("--deadline"), "{text}");
    assert!(!is_alive(peer));
}

#[test]
fn a_peer_does_not_outlive_its_initiator() {
    for transport in ["shm", "tcp"] {
        let mut initiator = bench(&format!("--transport {transport} {ENDLESS}")).stderr(Stdio::null()).spawn().unwrap();
        let peer = peer_of(initiator.id());
        std::thread::sleep(Duration::from_millis(300));
        initiator.kill().unwrap();
        initiator.wait().unwrap();
        let start = Instant::now();
        while is_alive(peer) {
            assert!(start.elapsed() < PATIENCE, "the peer process is still there");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Runs it, does something to its peer process in the middle, and waits: its status, what it said, and who the peer was.
fn watched(arguments: &str, then: impl FnOnce(u32)) -> (ExitStatus, String, u32) {
    let mut initiator = bench(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let peer = peer_of(initiator.id());
    // Any moment is a good one; this is most likely in the middle of the transfers.
    std::thread::sleep(Duration::from_millis(300));
    then(peer);
    let start = Instant::now();
    let status = loop {
        if let Some(status) = initiator.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > PATIENCE {
            initiator.kill().unwrap();
            panic!("{arguments}: it did not end");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let mut text = String::new();
    initiator.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    (status, text, peer)
}

fn peer_of(initiator: u32) -> u32 {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(process) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
            if parent_and_state(process).is_some_and(|(parent, _)| parent == initiator) {
                return process;
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("it has no child");
}

/// A zombie that its new parent has not reaped yet is dead.
fn is_alive(process: u32) -> bool {
    parent_and_state(process).is_some_and(|(_, state)| state != "Z" && state != "X")
}

fn parent_and_state(process: u32) -> Option<(u32, String)> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let mut after_name = stat.rsplit_once(')')?.1.split_whitespace();
    let state = after_name.next()?.to_owned();
    Some((after_name.next()?.parse().ok()?, state))
}

fn signal(name: &str, process: u32) {
    let status = Command::new("kill").args([format!("-{name}"), process.to_string()]).status().unwrap();
    assert!(status.success());
}
