//! The `cluster` example over two devices of UCX or libfabric at once, in a network namespace with interfaces of the test's own.
//!
//! Without a library, or where there may be no namespaces, the cases say so and pass, unless `KVFERRY_REQUIRE` names ucx, libfabric or netns.

#[allow(dead_code, reason = "of what other tests use")]
mod cluster;

use std::collections::BTreeMap;

use cluster::{Case, may_have_hosts, run_on_a_host};
use kvferry_transport::conformance::absent;

/// Two cables, both ends of each on the one host.
const CABLES: &str = "for i in 0 1; do ip link add rail$i type veth peer name end$i; ip addr add 10.78.$i.1/24 dev rail$i; \
                      ip link set rail$i up; ip link set end$i up; done";
/// 16 MiB a request: two rails share that.
const REQUESTS: [&str; 6] =
    ["--geometry", "layers=8,kv_heads=8,head_dim=128,dtype=bf16", "--isl", "512", "--requests", "4"];

/// Both devices carry something for every pair of ranks, and every byte comes once. How much of which
/// request is a matter of rates, which two busy processors make uneven.
fn over_both(transport: &'static str) {
    if !may_have_hosts() {
        return;
    }
    for direction in ["pull", "push"] {
        let case = Case { transport, direction, in_process: false };
        let rails = ["--devices", "rail0,rail1", "--rails", "2", "--transport", transport, "--direction", direction];
        let ran = run_on_a_host(CABLES, &[&["--json", "--deadline", "120"][..], &rails, &REQUESTS].concat());
        ran.check_delivered(&case);
        let mut carried: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
        for path in ran.json()["paths"].as_array().expect("paths") {
            let word = |key: &str| path[key].as_str().expect(key).to_owned();
            let pair = carried.entry(format!("{} to {}", word("from"), word("to"))).or_default();
            *pair.entry(word("device")).or_default() += path["bytes"].as_u64().expect("bytes");
        }
        let all: u64 = carried.values().flat_map(BTreeMap::values).sum();
        assert_eq!(all, 4 * (16 << 20), "{direction}: {carried:?}");
        // A rail that counted as silent while it was being wired carried nothing of a pair's.
        for (pair, rails) in &carried {
            assert_eq!(rails.keys().collect::<Vec<_>>(), ["rail0", "rail1"], "{pair}: {}", ran.stdout);
        }
        for device in ["rail0", "rail1"] {
            let its: u64 = carried.values().filter_map(|rails| rails.get(device)).sum();
            assert!(its * 16 >= all, "{direction}: {carried:?}");
        }
    }
}

#[test]
fn rails_of_ucx() {
    match kvferry_ucx::UcxProvider::unavailable() {
        Some(reason) => absent("ucx", &reason),
        None => over_both("ucx"),
    }
}

#[test]
fn rails_of_libfabric() {
    match kvferry_libfabric::LibfabricProvider::unavailable() {
        Some(reason) => absent("libfabric", &reason),
        None => over_both("libfabric"),
    }
}
