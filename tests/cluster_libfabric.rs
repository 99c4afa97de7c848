//! The `cluster` example over libfabric: geometries, directions, providers, and peers that die or stop in the middle.
//!
//! Without a library the cases say so and pass, unless `KVFERRY_REQUIRE` names libfabric.

mod cluster;

use cluster::{Case, HEADS_4, run, run_bare};
use kvferry_libfabric::LibfabricProvider;

/// Providers by device: the library's own tcp, tcp below its layer for datagrams, shared memory.
const DEVICES: [&str; 3] = ["lo", "tcp;ofi_rxm/lo", "shm"];

fn usable() -> bool {
    let Some(reason) = LibfabricProvider::unavailable() else { return true };
    kvferry_transport::conformance::absent("libfabric", &reason);
    false
}

/// Both ways over every provider; libfabric's shared memory between processes only.
fn everywhere(options: &[&str]) {
    if !usable() {
        return;
    }
    for device in DEVICES {
        let in_process = device != "shm";
        for direction in ["pull", "push"] {
            let case = Case { transport: "libfabric", direction, in_process };
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
    for device in DEVICES {
        for direction in ["pull", "push"] {
            let case = Case { transport: "libfabric", direction, in_process: false };
            let options = ["--geometry", HEADS_4, "--prefill", "tp=2", "--decode", "tp=2", "--isl", "300"];
            run(&case, &[&options[..], &["--requests", "5", "--devices", device]].concat()).check_delivered(&case);
        }
    }
}

/// Nothing is wrong or lost, and nobody's process ends or hangs, when a peer does.
#[test]
fn ranks_die_and_stop_in_the_middle() {
    if !usable() {
        return;
    }
    let is_native = LibfabricProvider::version() >= Some((2, 0));
    let harms = [["--kill", "decode:1@2"], ["--kill", "prefill:1@2"], ["--stop", "prefill:0@2"]];
    let all = ["pull", "push"].into_iter().flat_map(|direction| harms.map(|harm| (direction, harm)));
    // tcp;ofi_rxm takes seconds to wire all ways, longer than the census of descriptors before the fault waits; the example then waits a
    // minute for them to become fewer. So these are only a few, and what else is told of them counts.
    let some = [("pull", harms[0]), ("push", harms[2])];
    let runs: Vec<_> = if is_native { all.collect() } else { some.to_vec() };
    let sides = ["--model", "tiny", "--prefill", "tp=2,groups=2", "--decode", "tp=2,groups=2", "--requests", "12"];
    for (direction, harm) in runs {
        let case = Case { transport: "libfabric", direction, in_process: false };
        let ran = run(&case, &[&sides[..], &["--devices", "lo", "--silence", "1200"], &harm].concat());
        let has_grown = !is_native && ran.stderr.contains("before the first fault");
        if !has_grown {
            ran.check_sound();
        }
        assert_eq!(ran.number("delivered"), 12, "{harm:?} {direction}: {}", ran.stdout);
        for none in ["failed", "mismatched_bytes", "leaked_blocks", "quarantined_blocks"] {
            assert_eq!(ran.number(none), 0, "{harm:?} {direction}: {}", ran.stdout);
        }
    }
}

#[test]
fn a_device_that_is_not_there_is_named() {
    let ran = run_bare(&["--model", "tiny", "--transport", "libfabric", "--devices", "rdmap9s0"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("rdmap9s0"), "{}", ran.stderr);
    if usable() {
        assert!(ran.stderr.contains("offers no such device; there are"), "{}", ran.stderr);
    }
}
