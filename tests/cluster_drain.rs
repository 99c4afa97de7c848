//! SIGTERM at a prefill rank that holds leases, watched from outside to its end: probes and metrics over HTTP meanwhile, the exit status and the
//! outcome in the object that `--json` prints. Nobody fetches at first: the decode rank is stopped when the signal comes.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code")]

#[allow(dead_code, reason = "these runs are watched while they go on")]
mod cluster;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::mpsc;
use std::time::Duration;

use serde_json::Value;

/// What was seen of a rank that drains.
struct Watched {
    /// Leases that it held, as often as it was asked.
    leases: Vec<u64>,
    /// What `--json` printed.
    json: Value,
    stderr: String,
}

impl Watched {
    /// Its one departure.
    fn departure(&self) -> &Value {
        let departures = self.json["departures"].as_array().unwrap();
        assert_eq!(departures.len(), 1, "{}", self.json);
        let departure = &departures[0];
        assert_eq!((&departure["rank"], &departure["exit_status"]), (&"prefill:0".into(), &0.into()), "{departure}");
        departure
    }

    fn number(&self, name: &str) -> u64 {
        self.json[name].as_u64().unwrap_or_else(|| panic!("no {name}: {}", self.json))
    }
}

/// Status line and body; `None` once nobody answers any more.
fn get(address: &str, path: &str) -> Option<(String, String)> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: k\r\nConnection: close\r\n\r\n").as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.lines().next()?.to_owned(), body.to_owned()))
}

/// Two prefill groups of one rank each, of which the first gets SIGTERM while the decode rank is stopped.
fn drain(options: &[&str]) -> Watched {
    let shape = "--model tiny --isl 200 --requests 1000 --concurrency 8 --prefill tp=1,groups=2 --decode tp=1 --json --deadline 120";
    // Nobody is declared lost meanwhile. Once nobody fetches, both groups fill up with offers; then comes the signal.
    let terms = "--silence 60000 --metrics 127.0.0.1:0 --drain prefill:0@500ms";
    let all: Vec<&str> = shape.split(' ').chain(terms.split(' ')).chain(options.iter().copied()).collect();
    let _turn = cluster::turn();
    let mut child = cluster::start(&all);
    let errors = BufReader::new(child.stderr.take().unwrap());
    let (say, said) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        for line in errors.lines().map_while(Result::ok) {
            if let Some(address) = line.strip_prefix("note: prefill:0 serves metrics at http://") {
                say.send(address.trim_end_matches("/metrics").to_owned()).unwrap();
            }
            text += &line;
            text.push('\n');
        }
        text
    });
    let address = said.recv_timeout(Duration::from_secs(120)).unwrap();
    let (mut leaves, mut leases) = (false, Vec::new());
    while let Some((ready, why)) = get(&address, "/readyz") {
        if leaves {
            assert!(ready.contains(" 503 "), "it leaves and is ready again: {ready} {why}");
        }
        // Before its node stands it is not ready either.
        leaves |= why == "it leaves and offers nothing new\n";
        let Some((health, why)) = get(&address, "/healthz") else { break };
        if leaves && ["its incarnation is over\n", "its actors have ended\n"].contains(&why.as_str()) {
            // Between its last word and the end of its process.
            break;
        }
        assert!(health.contains(" 200 "), "{health} {why}");
        let Some((_, metrics)) = get(&address, "/metrics") else { break };
        if leaves {
            let held: Option<u64> =
                metrics.lines().find_map(|line| line.strip_prefix("kvferry_leases_held ")?.parse().ok());
            leases.extend(held);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut json = String::new();
    child.stdout.take().unwrap().read_to_string(&mut json).unwrap();
    let (status, stderr) = (child.wait().unwrap(), reader.join().unwrap());
    assert_eq!(status.code(), Some(0), "{stderr}\n{json}");
    assert!(leaves, "nobody saw it leave: {stderr}");
    let watched = Watched { leases, json: serde_json::from_str(&json).unwrap(), stderr };
    // It held something when it was told, and offers nothing new.
    assert!(watched.leases.first().is_some_and(|first| *first > 0), "{:?}", watched.leases);
    assert!(watched.leases.is_sorted_by(|one, next| one >= next), "{:?}", watched.leases);
    for name in ["mismatched_bytes", "leaked_blocks", "quarantined_blocks"] {
        assert_eq!(watched.number(name), 0, "{name}: {}", watched.json);
    }
    assert_eq!(watched.number("delivered") + watched.number("failed"), 1000, "{}", watched.json);
    watched
}

#[test]
fn what_is_offered_is_fetched_before_it_leaves() {
    for direction in ["pull", "push"] {
        let watched = drain(&["--pause", "decode:0@50ms+2500", "--direction", direction]);
        let departure = watched.departure();
        assert_eq!(departure["left"], 0, "{departure}");
        // Until the decode rank went on.
        assert!(departure["seconds"].as_f64().unwrap() > 1.0, "{departure}");
        assert_eq!(watched.number("delivered"), 1000, "{}", watched.json);
        let note = "note: prefill:0 has left, and nothing was offered there any more";
        assert!(watched.stderr.lines().any(|line| line == note), "{}", watched.stderr);
    }
}

#[test]
fn leases_that_nobody_renews_expire_before_it_leaves() {
    // The scheduler would renew them, so it is stopped, too.
    let stopped = ["--pause", "decode:0@50ms+8000", "--pause", "scheduler@50ms+8000", "--lease", "1500"];
    let watched = drain(&stopped);
    let departure = watched.departure();
    assert_eq!(departure["left"], 0, "{departure}");
    let seconds = departure["seconds"].as_f64().unwrap();
    assert!(seconds < 7.5, "it waited for more than its leases: {departure}");
}

#[test]
fn the_wait_is_bounded_when_nobody_fetches() {
    let watched = drain(&["--pause", "decode:0@50ms+8000", "--drain-within", "1000"]);
    let departure = watched.departure();
    assert!(departure["left"].as_u64() > Some(0), "{departure}");
    let seconds = departure["seconds"].as_f64().unwrap();
    assert!((1.0..7.5).contains(&seconds), "{departure}");
    let left = format!("note: prefill:0 has left although {} requests were still offered there", departure["left"]);
    assert!(watched.stderr.lines().any(|line| line == left), "{}", watched.stderr);
}
