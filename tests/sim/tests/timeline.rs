//! What `simulate --timeline` writes is what Chrome's trace format asks for, and what happened.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};

use kvferry_sim::{Config, Fault, Run, RunReport, Shape, Timeline, What};
use serde_json::Value;

/// Faults that began, in words, with the nodes that they hit.
type Hits = Vec<(String, Vec<usize>)>;

fn drawn(seed: u64) -> (Vec<Value>, RunReport, Hits, Config) {
    let config = Config::from_seed(seed, &Shape { requests: 60, ..Shape::default() }).unwrap();
    let (mut timeline, mut hits) = (Timeline::new(&config), Vec::new());
    let report = Run::new(config.clone()).unwrap().to_end(|entry| {
        timeline.take_in(entry);
        if let What::Fault(fault, true) = &entry.what {
            let nodes = match fault {
                Fault::Down { node, .. }
                | Fault::Pause { node }
                | Fault::Drain { node, .. }
                | Fault::NicDead { node, .. }
                | Fault::NicSlow { node, .. } => vec![*node],
                Fault::DataCut { from, to } => vec![*from, *to],
                Fault::Partition { from, to, .. } => from.iter().chain(to).copied().collect(),
                // The process after those of the nodes.
                _ => vec![config.nodes()],
            };
            hits.push((fault.to_string(), nodes));
        }
    });
    let document: Value = serde_json::from_str(&timeline.to_json()).unwrap();
    (document["traceEvents"].as_array().unwrap().clone(), report, hits, config)
}

fn is(event: &Value, phase: &str) -> bool {
    event["ph"] == phase
}

fn row(event: &Value) -> (u64, u64) {
    (event["pid"].as_u64().unwrap(), event["tid"].as_u64().unwrap())
}

/// Nanoseconds: the format counts microseconds.
fn nanos(value: &Value) -> u64 {
    (value.as_f64().unwrap() * 1e3).round() as u64
}

#[test]
fn every_row_is_named_and_nothing_overlaps_on_it() {
    for seed in 0..12 {
        let (events, report, _, config) = drawn(seed);
        let (mut processes, mut threads, mut used) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
        let mut spans: BTreeMap<(u64, u64), Vec<(u64, u64)>> = BTreeMap::new();
        for event in &events {
            let name = event["name"].as_str().unwrap();
            match event["ph"].as_str().unwrap() {
                "M" => {
                    let named = event["args"]["name"].as_str().map(str::to_owned);
                    match name {
                        "process_name" => assert_eq!(processes.insert(row(event).0, named.unwrap()), None),
                        "thread_name" => assert!(threads.insert(row(event)), "seed {seed}: {event} twice"),
                        _ => assert!(name.ends_with("_sort_index") && event["args"]["sort_index"].is_u64(), "{event}"),
                    }
                }
                "X" => {
                    let since = nanos(&event["ts"]);
                    spans.entry(row(event)).or_default().push((since, since + nanos(&event["dur"])));
                    used.insert(row(event));
                }
                "i" => {
                    assert!(event["s"] == "t" && event["ts"].is_f64(), "{event}");
                    used.insert(row(event));
                }
                other => panic!("seed {seed}: {other} is no kind of event that is drawn"),
            }
        }
        // Every node, and what happens everywhere.
        assert_eq!(processes.len(), config.nodes() + 1);
        assert_eq!(processes[&1], "n0 scheduler");
        assert!(processes[&2].starts_with("n1 prefill group 0 rank 0"), "{processes:?}");
        assert!(processes[&(config.nodes() as u64)].contains("decode group"), "{processes:?}");
        assert!(used.is_subset(&threads), "seed {seed}: rows without a name: {:?}", used.difference(&threads));
        for (row, spans) in &mut spans {
            spans.sort_unstable();
            for pair in spans.windows(2) {
                assert!(pair[0].1 <= pair[1].0, "seed {seed}: {row:?}: {pair:?} overlap");
            }
        }
        let end = spans.values().flatten().map(|(_, until)| *until).max().unwrap();
        assert!(end as f64 <= report.virtual_seconds * 1e9 + 1.0, "seed {seed}");
    }
}

#[test]
fn everything_that_happened_is_drawn_where_it_happened() {
    let (mut hit, mut gone) = (0, 0);
    for seed in 0..12 {
        let (events, report, hits, config) = drawn(seed);
        let named =
            |name: &str| events.iter().filter(|event| event["name"].as_str().unwrap().starts_with(name)).count() as u64;
        assert_eq!(named("answered: delivered"), report.delivered, "seed {seed}");
        assert_eq!(named("answered: not delivered"), report.failed + report.cancelled, "seed {seed}");
        assert!(named("placement") >= report.delivered && named("fetch") >= report.delivered, "seed {seed}");
        assert!(named("read") + named("write") >= report.delivered, "seed {seed}");
        for (fault, nodes) in &hits {
            for node in nodes {
                let on_it =
                    |event: &&Value| is(event, "X") && row(event).0 == *node as u64 + 1 && event["name"] == **fault;
                assert!(events.iter().any(|event| on_it(&event)), "seed {seed}: {fault} is not drawn on n{node}");
                hit += u64::from(*node < config.nodes());
            }
        }
        let spans =
            events.iter().filter(|event| is(event, "X") && hits.iter().any(|(fault, _)| event["name"] == **fault));
        assert_eq!(
            spans.count(),
            hits.iter().map(|(_, nodes)| nodes.len()).sum::<usize>(),
            "seed {seed}: one for each"
        );
        gone += named("dies");
    }
    assert!(hit > 0 && gone > 0, "no seed had a fault of a node: {hit} {gone}");
}
