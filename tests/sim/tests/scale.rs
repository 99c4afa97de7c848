//! Many nodes: sessions that are made when they are needed, and capacity questions.

use std::sync::Arc;
use std::time::Duration;

use kvferry_core::{Direction, Model};
use kvferry_sim::{CapacityOptions, CapacityRequest, Cluster, ClusterOptions, PolicyName, SimError, capacity};

#[test]
fn sessions_are_made_when_handovers_need_them() {
    let run = |eager: usize, direction| {
        let mut options = ClusterOptions::tiny(5);
        (options.prefill.groups, options.decode.groups) = (6, 4);
        (options.sessions_eager_max, options.direction) = (eager, direction);
        let mut cluster = Cluster::new(options).expect("starts");
        cluster.rest(Duration::from_millis(500));
        let met = cluster.world().events();
        cluster.submit(40, Duration::from_millis(100));
        assert!(cluster.run(Duration::from_secs(60)), "every request ends");
        // The last bytes are still being compared.
        cluster.rest(Duration::from_secs(1));
        let report = cluster.report();
        assert_eq!((report.delivered, report.verified_bytes), (40, report.bytes), "every byte is checked");
        met
    };
    for direction in [Direction::Pull, Direction::Push] {
        let (all, few, none) = (run(512, Some(direction)), run(3, Some(direction)), run(0, Some(direction)));
        assert!(none < few && few < all, "fewer sessions at first: {none} {few} {all}");
    }
}

fn workload(requests: u64) -> Vec<CapacityRequest> {
    let request = |index: u64| CapacityRequest {
        after: Duration::from_millis(20 * index),
        input_tokens: 2048 + 64 * (index % 7),
        output_tokens: 20,
        // Four conversations, each of which comes back with what it had and more.
        prefix: Arc::new((0..4).map(|hash| 100 * (index % 4) + hash).collect()),
    };
    (0..requests).map(request).collect()
}

fn options() -> CapacityOptions {
    let mut options = CapacityOptions::new(Model::preset("llama-3.1-8b").expect("a preset"));
    (options.prefill_ranks, options.decode_ranks, options.nics) = (4, 4, 2);
    options
}

#[test]
fn capacity_is_answered_in_times_that_add_up() {
    for direction in [Direction::Pull, Direction::Push] {
        let options = CapacityOptions { direction: Some(direction), ..options() };
        let one = capacity(&options, PolicyName::LeastLoaded, &workload(1), Duration::from_secs(100)).expect("runs");
        assert_eq!((one.delivered, one.failed), (1, 0), "{one:?}");
        let parts = [one.queue_ms, one.prefill_ms, one.room_ms, one.post_ms, one.wire_ms, one.notice_ms];
        let sum: f64 = parts.iter().map(|part| part.unwrap().p50).sum();
        assert!((sum + 20.0 - one.first_decode_token_ms.unwrap().p50).abs() < 1e-6, "{one:?}");
        // 2,048 tokens at 20,000 a second; 128 KiB a token at 50 GB/s.
        assert!((one.prefill_ms.unwrap().p50 - 102.4).abs() < 0.01, "{one:?}");
        let wire = 2048.0 * 131_072.0 / 50e6;
        assert_eq!(one.bytes, 2048 * 131_072);
        assert!(one.wire_ms.unwrap().p50 > wire && one.wire_ms.unwrap().p50 < wire * 1.1, "{one:?}");
    }
}

#[test]
fn policies_differ_in_what_they_find() {
    let ask = |policy| capacity(&options(), policy, &workload(200), Duration::from_secs(100)).expect("runs");
    let (least, prefix) = (ask(PolicyName::LeastLoaded), ask(PolicyName::Prefix));
    assert_eq!((least.delivered, prefix.delivered), (200, 200), "{least:?} {prefix:?}");
    assert!(prefix.prefix_hit_rate > least.prefix_hit_rate, "{least:?} {prefix:?}");
    assert!(prefix.bytes < least.bytes, "what is held does not move");
    let again = ask(PolicyName::Prefix);
    assert_eq!((again.events, again.seconds), (prefix.events, prefix.seconds), "the same question, the same answer");
}

/// Every rank once had a pool of its own: 700 GB of address space and a descriptor each, which a few hundred ranks exhaust.
#[test]
fn ranks_by_the_thousand_share_what_nobody_touches() {
    let model = Model::preset("llama-3.1-70b").expect("a preset");
    let options = CapacityOptions { prefill_ranks: 600, decode_ranks: 600, nics: 1, ..CapacityOptions::new(model) };
    let report = capacity(&options, PolicyName::LeastLoaded, &workload(20), Duration::from_secs(100)).expect("runs");
    assert_eq!((report.delivered, report.unfinished), (20, 0), "{report:?}");
}

#[test]
fn what_no_rank_can_hold_is_told_before_the_run() {
    for (side, blocks) in [("prefill", [31, 1000]), ("decode", [1000, 31])] {
        let options = CapacityOptions { blocks, ..options() };
        let error =
            capacity(&options, PolicyName::Prefix, &workload(2), Duration::from_secs(1)).expect_err("too small");
        // 2,048 tokens in blocks of 64.
        assert!(matches!(error, SimError::TooSmall { request: 1, need: 32, .. }), "{error}");
        assert!(error.to_string().contains(&format!("--{side}-blocks 32")), "{error}");
    }
}

#[test]
fn what_is_not_finished_in_time_is_counted() {
    let report =
        capacity(&options(), PolicyName::LeastLoaded, &workload(50), Duration::from_millis(2_500)).expect("runs");
    assert!(report.delivered > 0 && report.unfinished > 0 && report.failed == 0, "{report:?}");
    assert_eq!(report.delivered + report.unfinished, 50, "{report:?}");
}
