//! `/metrics`, `/healthz` and `/readyz` of real nodes, over HTTP, read by a parser that is not ours; and what their flight recorders keep.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

#[allow(dead_code, reason = "its nodes are started with watchers here")]
mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry::{
    LeastLoaded, Metrics, MetricsServer, Recorder, RecorderOptions, Role, SchedulerNode, SchedulerTerms, ServeError,
    TransportKind, transport,
};
use openmetrics_parser::OpenMetricsType;
use openmetrics_parser::openmetrics::parse_openmetrics;
use support::{PATIENCE, Rig, geometry, node_config, pool, rank_over, submit};

const SPEC: &str = "layers=2,kv_heads=2,head_dim=16,dtype=bf16";
const REQUESTS: u64 = 3;

/// A scheduler, a prefill and a decode rank, each with a server of its own.
struct Nodes {
    scheduler: SchedulerNode,
    prefill: Rig,
    _decode: Rig,
    servers: Vec<MetricsServer>,
}

impl Nodes {
    async fn start() -> Nodes {
        let mut servers = Vec::new();
        let mut watched = |node| {
            let (metrics, mut config) = (Metrics::new(), node_config(node, &None));
            config.watchers.push(Arc::new(metrics.clone()));
            servers.push(MetricsServer::start(metrics, "127.0.0.1:0").unwrap());
            config
        };
        let scheduler =
            SchedulerNode::start(watched(0), SchedulerTerms::default(), Box::new(LeastLoaded)).await.unwrap();
        let mut rigs = Vec::new();
        for (node, role) in [(1, Role::Prefill), (2, Role::Decode)] {
            let geometry = geometry(SPEC);
            let pool = pool(&geometry);
            let nic = transport::select(TransportKind::Shm, None, &transport::Options::default()).unwrap();
            let address = scheduler.address();
            let rig = rank_over(watched(node), role, None, geometry, address, (pool, vec![nic]), Arc::default()).await;
            rigs.push(rig);
        }
        let (decode, prefill) = (rigs.pop().unwrap(), rigs.pop().unwrap());
        Nodes { scheduler, prefill, _decode: decode, servers }
    }

    fn address(&self, node: usize) -> SocketAddr {
        self.servers[node].address()
    }
}

/// Status line and headers, and the body.
fn ask(address: SocketAddr, request: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    (head.to_owned(), body.to_owned())
}

fn get(address: SocketAddr, path: &str) -> (String, String) {
    ask(address, &format!("GET {path} HTTP/1.1\r\nHost: kvferry\r\nConnection: close\r\n\r\n"))
}

/// Scrapes until the text has that line: what is asked of actors may be a moment away.
fn scrape_until(address: SocketAddr, line: &str) -> String {
    let late = Instant::now() + PATIENCE;
    loop {
        let (head, text) = get(address, "/metrics");
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(head.to_lowercase().contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
        if text.lines().any(|found| found == line) {
            return text;
        }
        assert!(Instant::now() < late, "no line {line:?} in\n{text}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The value of the one sample that begins so.
fn value(text: &str, sample: &str) -> f64 {
    let found: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix(sample)?.strip_prefix(' ')).collect();
    assert_eq!(found.len(), 1, "{sample} in\n{text}");
    found[0].parse().unwrap()
}

/// What Prometheus' conventions ask of names, units and help texts.
fn check_conventions(text: &str) {
    let exposition = parse_openmetrics(text).unwrap_or_else(|error| panic!("{error:?}\n{text}"));
    assert!(exposition.families.len() > 10, "{text}");
    for (name, family) in &exposition.families {
        assert!(name.starts_with("kvferry_"), "{name}");
        assert!(name.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{name}");
        assert!(family.help.len() > 10, "{name} has no help");
        assert_ne!(family.family_type, OpenMetricsType::Unknown, "{name} has no type");
        if !family.unit.is_empty() {
            assert!(["seconds", "bytes"].contains(&family.unit.as_str()), "{name} is in {}", family.unit);
            assert!(name.ends_with(&format!("_{}", family.unit)), "{name} is in {}", family.unit);
        }
        if family.family_type == OpenMetricsType::Histogram {
            assert!(name.ends_with("_seconds"), "{name} says no unit");
        }
        assert!(!name.ends_with("_total"), "{name}: samples of counters end so, families do not");
        for odd in ["_milliseconds", "_ms", "_microseconds", "_kilobytes"] {
            assert!(!name.contains(odd), "{name}: base units only");
        }
        if family.family_type == OpenMetricsType::Counter {
            let samples = text
                .lines()
                .filter(|line| line.strip_prefix(name.as_str()).is_some_and(|rest| rest.starts_with("_total")));
            assert!(samples.count() >= family.iter_samples().count(), "{name}: its samples do not end in _total");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handovers_are_counted_and_timed_by_stage() {
    let nodes = Nodes::start().await;
    for request in 0..REQUESTS {
        assert!(submit(&nodes.scheduler, request).await.unwrap().outcome.is_delivered());
    }
    let scheduler = scrape_until(nodes.address(0), "kvferry_credits_used{of=\"decode\"} 0");
    check_conventions(&scheduler);
    assert_eq!(value(&scheduler, "kvferry_requests_total{outcome=\"delivered\"}"), REQUESTS as f64);
    assert_eq!(value(&scheduler, "kvferry_handover_seconds_count{stage=\"queue\"}"), REQUESTS as f64);

    let prefill = scrape_until(nodes.address(1), "kvferry_offers_total{outcome=\"delivered\"} 3");
    check_conventions(&prefill);
    assert_eq!(value(&prefill, "kvferry_leases_held"), 0.0);

    let decode = scrape_until(nodes.address(2), "kvferry_fetches_total{outcome=\"delivered\"} 3");
    check_conventions(&decode);
    let bytes = geometry(SPEC).bytes_expected(40, 0) * REQUESTS;
    let carrier = "{transport=\"shm\",device=\"memory\",direction=\"pull\"}";
    assert_eq!(value(&decode, &format!("kvferry_transferred_bytes_total{carrier}")), bytes as f64);
    // 40 tokens are three blocks, of K and of V, in two layers.
    assert_eq!(value(&decode, &format!("kvferry_pieces_total{carrier}")), (3 * 2 * 2 * REQUESTS) as f64);
    for stage in ["room", "plan", "post", "wire", "notice"] {
        let count = value(&decode, &format!("kvferry_handover_seconds_count{{stage=\"{stage}\"}}"));
        assert_eq!(count, REQUESTS as f64, "{stage}");
        let sum = value(&decode, &format!("kvferry_handover_seconds_sum{{stage=\"{stage}\"}}"));
        assert!(sum > 0.0 && sum < 60.0, "{stage}: {sum} s");
    }
    assert_eq!(value(&decode, "kvferry_handover_seconds_count{stage=\"queue\"}"), 0.0, "that is the scheduler's");
    assert_eq!(value(&decode, "kvferry_quarantined_blocks"), 0.0);
    for text in [&scheduler, &prefill, &decode] {
        assert_eq!(value(text, "kvferry_up"), 1.0);
        assert_eq!(value(text, "kvferry_restarts_total"), 0.0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_say_whether_a_node_lives_and_takes_work() {
    let (metrics, late) = (Metrics::new(), Instant::now() + PATIENCE);
    let server = MetricsServer::start(metrics, "127.0.0.1:0").unwrap();
    let (head, body) = get(server.address(), "/readyz");
    assert!(head.starts_with("HTTP/1.1 503") && body == "it has not started\n", "{head}: {body}");
    assert!(get(server.address(), "/healthz").0.starts_with("HTTP/1.1 200"), "it may still be starting");

    let nodes = Nodes::start().await;
    assert!(submit(&nodes.scheduler, 1).await.unwrap().outcome.is_delivered());
    for node in 0..3 {
        for probe in ["/healthz", "/readyz"] {
            let (head, body) = get(nodes.address(node), probe);
            assert!(head.starts_with("HTTP/1.1 200") && body == "ok\n", "{probe} of {node}: {head}: {body}");
        }
    }
    nodes.prefill.port.drain(PATIENCE);
    while get(nodes.address(1), "/readyz").0.starts_with("HTTP/1.1 200") {
        assert!(Instant::now() < late, "it drains and is ready all the same");
    }
    let (_, body) = get(nodes.address(1), "/readyz");
    assert_eq!(body, "it leaves and offers nothing new\n");
    assert!(get(nodes.address(1), "/healthz").0.starts_with("HTTP/1.1 200"), "whoever drains is not to be killed");
    scrape_until(nodes.address(1), "kvferry_draining 1");

    // The end of the node is the end of its health, not of the server.
    let address = nodes.address(1);
    nodes.prefill.engine.abort();
    while get(address, "/healthz").1 != "its incarnation is over\n" {
        assert!(Instant::now() < late, "it is over, and nobody says so");
    }
    assert!(get(address, "/healthz").0.starts_with("HTTP/1.1 503"));
    assert!(get(address, "/metrics").1.lines().any(|line| line == "kvferry_up 0"));
}

#[test]
fn other_requests_are_refused_and_harm_nobody() {
    let server = MetricsServer::start(Metrics::new(), "127.0.0.1:0").unwrap();
    let address = server.address();
    assert!(get(address, "/").0.starts_with("HTTP/1.1 404"));
    let post = "POST /metrics HTTP/1.1\r\nHost: k\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let (head, _) = ask(address, post);
    assert!(head.starts_with("HTTP/1.1 405") && head.to_lowercase().contains("allow: get, head"), "{head}");
    assert!(ask(address, "\0\0\0\0 what\r\n\r\n").0.starts_with("HTTP/1.1 400"));
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(1 << 20));
    let mut stream = TcpStream::connect(address).unwrap();
    // The server may close before it has read all of it.
    let _ = stream.write_all(long.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"), "{}", String::from_utf8_lossy(&answer));
    // Whoever says nothing keeps nobody waiting.
    let _silent: Vec<TcpStream> = (0..8).map(|_| TcpStream::connect(address).unwrap()).collect();
    assert!(get(address, "/healthz").0.starts_with("HTTP/1.1 200"));
}

#[test]
fn an_address_that_cannot_be_served_is_named() {
    let wrong = MetricsServer::start(Metrics::new(), "localhost").unwrap_err();
    assert!(matches!(wrong, ServeError::BadAddress { .. }) && wrong.to_string().contains("\"localhost\""), "{wrong}");
    let first = MetricsServer::start(Metrics::new(), "127.0.0.1:0").unwrap();
    let taken = MetricsServer::start(Metrics::new(), &first.address().to_string()).unwrap_err();
    assert!(matches!(taken, ServeError::Listen { .. }) && taken.to_string().contains("free the port"), "{taken}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recorder_has_what_two_ranks_said_to_each_other() {
    let scheduler = support::scheduler(&None).await;
    let (mut rigs, mut recorders) = (Vec::new(), Vec::new());
    for (node, role) in [(1, Role::Prefill), (2, Role::Decode)] {
        let file = std::env::temp_dir().join(format!("kvferry-recorded-{}-{node}.jsonl", std::process::id()));
        let (recorder, mut config) = (Recorder::start(RecorderOptions::new(&file)).unwrap(), node_config(node, &None));
        config.watchers.push(Arc::new(recorder.clone()));
        let geometry = geometry(SPEC);
        let pool = pool(&geometry);
        let nic = transport::select(TransportKind::Shm, None, &transport::Options::default()).unwrap();
        let address = scheduler.address();
        rigs.push(rank_over(config, role, None, geometry, address, (pool, vec![nic]), Arc::default()).await);
        recorders.push((recorder, file));
    }
    assert!(submit(&scheduler, 5).await.unwrap().outcome.is_delivered());
    for (index, (recorder, file)) in recorders.into_iter().enumerate() {
        assert!(recorder.dump("the test asks"));
        recorder.flush();
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((&lines[0]["node"], &lines[0]["epoch"]), (&(index as u64 + 1).into(), &1.into()));
        let peer = 2 - index as u64;
        let said = lines.iter().filter(|line| line["peer"] == peer && !line["handover"].is_null());
        let said: Vec<String> =
            said.map(|line| format!("{} {}", line["what"], line["name"]).replace('"', "")).collect();
        let (asks, answers) = if index == 1 { ("sent", "heard") } else { ("heard", "sent") };
        let in_order = [(asks, "Open"), (answers, "Opened"), (asks, "Fetched"), (answers, "Confirmed")]
            .map(|(what, name)| said.iter().position(|line| *line == format!("{what} {name}")));
        assert!(in_order.iter().all(Option::is_some) && in_order.is_sorted(), "{said:?}");
        assert!(lines.iter().any(|line| line["what"] == "event" && line["name"] == "Met"), "{text}");
    }
}
