//! The `cluster` example when ranks die, options are wrong, and requests come from a trace.

mod cluster;

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cluster::{Case, Ran, run, run_bare, start, turn};
use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};

const TINY: [&str; 6] = ["--model", "tiny", "--isl", "200", "--requests", "12"];

fn processes(options: &[&str]) -> Ran {
    let case = Case { transport: "auto", direction: "auto", in_process: false };
    run(&case, &[&TINY[..], options].concat())
}

#[test]
fn a_killed_prefill_rank_fails_what_nobody_else_can_prefill() {
    for direction in ["pull", "push"] {
        for transport in ["shm", "tcp"] {
            let case = Case { transport, direction, in_process: false };
            let ran =
                run(&case, &[&TINY[..], &["--prefill", "tp=2", "--decode", "tp=4", "--kill", "prefill:1@3"]].concat());
            ran.check_sound();
            assert!(ran.number("failed") > 0, "{}", ran.stdout);
            for failure in ran.json()["failures"].as_array().unwrap() {
                assert!(failure["reason"].as_str().unwrap().contains("prefill"), "{failure}");
            }
        }
    }
}

#[test]
fn another_prefill_group_takes_over() {
    let ran = processes(&["--prefill", "tp=2,groups=2", "--decode", "tp=2", "--kill", "prefill:1@3"]);
    ran.check_sound();
    assert_eq!(ran.number("delivered"), 12, "{}", ran.stdout);
}

#[test]
fn a_killed_decode_rank_fails_what_nobody_else_can_decode() {
    for direction in ["pull", "push"] {
        let case = Case { transport: "auto", direction, in_process: false };
        let ran = run(&case, &[&TINY[..], &["--prefill", "tp=2", "--decode", "tp=2", "--kill", "decode:0@2"]].concat());
        ran.check_sound();
        assert!(ran.number("failed") > 0, "{}", ran.stdout);
    }
}

/// A real SIGTERM: nothing that was offered is lost, and nothing new is offered.
#[test]
fn a_prefill_rank_that_is_told_to_leave_takes_nothing_with_it() {
    for direction in ["pull", "push"] {
        let case = Case { transport: "auto", direction, in_process: false };
        let sides = ["--prefill", "tp=2,groups=2", "--decode", "tp=2", "--drain", "prefill:1@2"];
        let ran = run(&case, &[&TINY[..], &sides].concat());
        ran.check_delivered(&case);
        let left = "note: prefill:1 has left, and nothing was offered there any more";
        assert!(ran.stderr.lines().any(|line| line == left), "{}", ran.stderr);
        let paths = ran.paths();
        let of_its_group = paths.iter().filter(|path| path["from"] == "prefill:0");
        let bytes: u64 = of_its_group.filter_map(|path| path["bytes"].as_u64()).sum();
        assert!(bytes < ran.number("bytes") / 2, "the other group took over: {}", ran.stdout);
    }
}

/// Also when there is no other group, or both are away at once: requests wait for who comes back.
#[test]
fn a_prefill_rank_that_has_left_is_started_again() {
    for (prefill, second) in
        [("tp=2,groups=2", "prefill:3@4"), ("tp=2,groups=2", "prefill:3@2"), ("tp=2", "prefill:1@4")]
    {
        let drains = ["--drain", "prefill:0@2", "--drain", second, "--restart"];
        let ran = processes(&[&["--prefill", prefill, "--decode", "tp=2"][..], &drains].concat());
        ran.check_sound();
        assert_eq!(ran.number("delivered"), 12, "{}", ran.stdout);
    }
}

#[test]
fn a_timeline_has_every_request_at_every_rank() {
    let file = TraceFile::new("timeline", "");
    let case = Case { transport: "auto", direction: "auto", in_process: true };
    let ran = run(&case, &[&TINY[..], &["--prefill", "tp=2", "--decode", "tp=2", "--timeline", file.path()]].concat());
    ran.check_delivered(&case);
    let text = std::fs::read_to_string(file.path()).expect("it was written");
    let trace: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
    let events = trace["traceEvents"].as_array().expect("a Chrome trace");
    let names: Vec<&str> = events.iter().filter_map(|event| event["args"]["name"].as_str()).collect();
    assert_eq!(names, ["scheduler", "prefill:0", "prefill:1", "decode:0", "decode:1"]);
    for pid in 1..=5 {
        let of = |phase: &str| events.iter().filter(|event| event["pid"] == pid && event["ph"] == phase).count();
        assert_eq!(of("b"), of("e"), "what begins ends");
        let requests: std::collections::BTreeSet<u64> =
            events.iter().filter(|event| event["pid"] == pid).filter_map(|event| event["id"].as_u64()).collect();
        assert_eq!(requests.len(), 12, "of process {pid}");
    }
    for stage in ["queue", "handover", "room", "prefill", "offered", "plan", "wire", "notice"] {
        assert!(events.iter().any(|event| event["name"] == stage), "no {stage}");
    }
    assert!(events.iter().filter_map(|event| event["ts"].as_f64()).all(|ts| (0.0..60e6).contains(&ts)));
    let nowhere = run_bare(&[&TINY[..], &["--in-process", "--timeline", "/nowhere/at/all.json"]].concat());
    assert_eq!(nowhere.code, Some(1));
    assert!(nowhere.stderr.contains("/nowhere/at/all.json"), "{}", nowhere.stderr);
}

#[test]
fn a_wrong_byte_fails_the_run() {
    for in_process in [false, true] {
        let case = Case { transport: "auto", direction: "auto", in_process };
        let ran = run(&case, &[&TINY[..], &["--prefill", "tp=2", "--decode", "tp=2", "--corrupt", "1"]].concat());
        assert_eq!(ran.code, Some(1), "{}\n{}", ran.stderr, ran.stdout);
        assert!(ran.number("mismatched_bytes") > 0, "{}", ran.stdout);
        assert_eq!(ran.number("delivered"), 12, "the transfers themselves were sound: {}", ran.stdout);
    }
}

#[test]
fn a_decode_rank_dies_amid_steps() {
    for transport in ["shm", "tcp"] {
        for direction in ["pull", "push"] {
            let case = Case { transport, direction, in_process: false };
            let sides = ["--prefill", "tp=2", "--decode", "tp=2,groups=2", "--layers-per-step", "1"];
            let ran = run(&case, &[&TINY[..], &sides, &["--kill", "decode:1@2"]].concat());
            ran.check_sound();
            assert_eq!(ran.number("delivered"), 12, "{}", ran.stdout);
        }
    }
}

#[test]
fn another_decode_group_takes_over() {
    let ran = processes(&["--prefill", "tp=2", "--decode", "tp=2,groups=2", "--kill", "decode:0@2"]);
    ran.check_sound();
    assert_eq!(ran.number("delivered"), 12, "{}", ran.stdout);
    let ran = processes(&["--prefill", "tp=2", "--decode", "tp=2,groups=2", "--kill", "decode:3@2"]);
    ran.check_sound();
    assert_eq!(ran.number("delivered"), 12, "{}", ran.stdout);
}

#[test]
fn a_stopped_rank_is_lost_and_fenced() {
    for direction in ["pull", "push"] {
        let case = Case { transport: "auto", direction, in_process: false };
        let ran =
            run(&case, &[&TINY[..], &["--prefill", "tp=2", "--decode", "tp=2", "--stop", "prefill:0@2"]].concat());
        ran.check_sound();
        assert!(ran.number("failed") > 0, "{}", ran.stdout);
    }
    let ran = processes(&["--prefill", "tp=2", "--decode", "tp=2,groups=2", "--stop", "decode:1@2"]);
    ran.check_sound();
    assert_eq!(ran.number("delivered"), 12, "{}", ran.stdout);
}

/// Terms with which a lost peer is noticed within a second.
const BRISK: [&str; 4] = ["--silence", "900", "--lease", "3000"];

#[test]
fn a_killed_scheduler_comes_back_and_nothing_is_lost() {
    for transport in ["shm", "tcp"] {
        for fault in ["--kill", "--stop"] {
            let case = Case { transport, direction: "auto", in_process: false };
            let sides = ["--prefill", "tp=2", "--decode", "tp=2", fault, "scheduler@3"];
            run(&case, &[&TINY[..], &BRISK, &sides].concat()).check_sound();
        }
    }
}

#[test]
fn who_wakes_up_in_a_world_that_declared_it_lost_starts_anew() {
    for who in ["prefill:1@2", "decode:0@2", "scheduler@2", "decode:1@0ms+2000"] {
        for direction in ["pull", "push"] {
            let case = Case { transport: "auto", direction, in_process: false };
            let sides = ["--prefill", "tp=2", "--decode", "tp=2", "--pause", who];
            run(&case, &[&TINY[..], &BRISK, &sides].concat()).check_sound();
        }
    }
}

#[test]
fn a_short_pause_is_only_a_delay() {
    for who in ["prefill:1@2+300", "decode:0@2+300", "scheduler@2+300"] {
        let ran = processes(&["--prefill", "tp=2", "--decode", "tp=2", "--pause", who]);
        ran.check_sound();
        assert_eq!(ran.number("delivered"), 12, "{}", ran.stdout);
    }
}

#[test]
fn a_scheduler_that_slept_knows_that_it_was_not_the_others() {
    let sides = ["--prefill", "tp=2", "--decode", "tp=2", "--pause", "scheduler@3+4000"];
    let ran = processes(&[&BRISK[..], &sides].concat());
    ran.check_sound();
    assert_eq!(ran.number("delivered"), 12, "{}", ran.stdout);
}

#[test]
fn killed_ranks_are_a_group_again_once_they_are_back() {
    let sides = ["--prefill", "tp=2", "--decode", "tp=2", "--restart", "--kill", "prefill:1@2", "--kill", "decode:0@4"];
    processes(&[&BRISK[..], &sides].concat()).check_sound();
}

/// Ranks that are killed one by one leave nobody behind, and neither does the parent, whatever state its children are in.
#[test]
fn a_killed_parent_leaves_no_process_behind() {
    let _turn = turn();
    let options = ["--model", "tiny", "--requests", "200", "--isl", "4000", "--pause", "decode:1@1+600000"];
    let mut parent = start(&options);
    let group = Pid::from_child(&parent);
    // A rank that is stopped shows that all of them stand.
    let late = Instant::now() + Duration::from_secs(60);
    while !members(group).iter().any(|state| state == "T") {
        assert!(Instant::now() < late, "no rank was stopped");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(members(group).len() > 6, "the parent, the scheduler, and six ranks: {:?}", members(group));
    parent.kill().unwrap();
    parent.wait().unwrap();
    let late = Instant::now() + Duration::from_secs(10);
    while test_kill_process_group(group).is_ok() {
        if Instant::now() > late {
            let left = members(group);
            kill_process_group(group, Signal::KILL).unwrap();
            panic!("ten seconds after its parent's end the group had processes in states {left:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The states of all processes of a group, as the kernel writes them.
fn members(group: Pid) -> Vec<String> {
    let mut states = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc is mounted").flatten() {
        // Processes end while they are looked at.
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let mut words = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        if let (Some(state), Some(own)) = (words.next(), words.nth(1))
            && own == group.to_string()
        {
            states.push(state.to_owned());
        }
    }
    states
}

#[test]
fn bad_options_are_named() {
    let cases: &[(&[&str], &[&str])] = &[
        (&["--model", "gpt-9"], &["--model gpt-9", "llama-3.1-8b"]),
        (&["--geometry", "layers=2"], &["--geometry layers=2", "kv_heads"]),
        (&["--geometry", "layers=2,kv_heads=4,head_dim=8,dtype=fp3"], &["dtype=fp3", "bf16"]),
        (&["--model", "tiny", "--prefill", "tp=3"], &["--prefill tp=3", "4 heads"]),
        (&["--model", "tiny", "--prefill", "tp"], &["--prefill tp", "key=value"]),
        (&["--model", "tiny", "--decode", "to=2"], &["--decode to=2", "`to`"]),
        (&["--model", "tiny", "--decode", "tp=2,tp=4"], &["`tp`", "twice"]),
        (&["--model", "tiny", "--decode", "tp=0"], &["tp=0", "number from 1"]),
        (&["--model", "tiny", "--decode", "order=XYZ"], &["order=XYZ", "NHD or HND"]),
        (&["--model", "tiny", "--prefill", "pp=2,layers=3+2"], &["layers=3+2", "add up to 5", "has 4"]),
        (&["--model", "tiny", "--prefill", "pp=3,layers=3+1"], &["layers=3+1", "pp=3"]),
        (&["--model", "tiny", "--decode", "tp=4,adp=3"], &["--decode tp=4,adp=3", "adp=3"]),
        (&["--model", "tiny", "--decode", "tp=2,nodes=3"], &["nodes=3", "2 ranks"]),
        (&["--model", "tiny", "--decode", "tp=1,blocks=62"], &["blocks=62", "63 blocks", "--isl"]),
        (&["--model", "tiny", "--prefill", "tp=1,groups=300"], &["304 ranks", "groups"]),
        (&["--model", "llama-3.1-70b", "--isl", "9000000"], &["memory", "--isl"]),
        (&["--model", "tiny", "--isl", "0"], &["--isl 0", "from 1"]),
        (&["--model", "tiny", "--layers-per-step", "5"], &["--layers-per-step 5", "to 4"]),
        (&["--model", "tiny", "--transport", "verbs"], &["--transport verbs", "shm, ucx, libfabric, tcp"]),
        (&["--model", "tiny", "--transport", "cuda"], &["--transport cuda"]),
        (&["--model", "tiny", "--devices", "mlx5_0"], &["--devices mlx5_0", "shm:memory"]),
        (&["--model", "tiny", "--kill", "prefill:2@1"], &["--kill prefill:2@1", "0 to 1"]),
        (&["--model", "tiny", "--kill", "prefill:0"], &["--kill prefill:0", "ROLE:RANK@N"]),
        (&["--model", "tiny", "--stop", "scheduler:0@1"], &["--stop scheduler:0@1", "ROLE:RANK@N"]),
        (&["--model", "tiny", "--stop", "decode:0@1+5"], &["--stop decode:0@1+5", "ROLE:RANK@N"]),
        (&["--model", "tiny", "--kill", "decode:0@0"], &["--kill decode:0@0", "from 1"]),
        (&["--model", "tiny", "--pause", "decode:0@5s"], &["--pause decode:0@5s", "@250ms"]),
        (&["--model", "tiny", "--pause", "decode:9@5ms"], &["--pause decode:9@5ms", "0 to 3"]),
        (&["--model", "tiny", "--kill", "scheduler@1", "--in-process"], &["--kill scheduler@1", "--in-process"]),
        (&["--model", "tiny", "--silence", "5"], &["--silence 5", "from 120"]),
        (&["--model", "tiny", "--drain", "decode:0@1"], &["--drain decode:0@1", "only prefill ranks"]),
        (&["--model", "tiny", "--drain", "prefill:7@1"], &["--drain prefill:7@1", "0 to 1"]),
        (&["--model", "tiny", "--metrics", "here"], &["--metrics here", "127.0.0.1:9464"]),
        (&["--model", "tiny", "--metrics", "127.0.0.1:65535"], &["--metrics 127.0.0.1:65535", "7 free ports"]),
        (&["--model", "tiny", "--lease", "5"], &["--lease 5", "from 300"]),
        (&["--model", "tiny", "--kill", "decode:0@1", "--in-process"], &["--kill decode:0@1", "--in-process"]),
        (
            &["--model", "tiny", "--trace", "/nonexistent/trace.jsonl"],
            &["--trace /nonexistent/trace.jsonl", "cannot be read"],
        ),
        (&["--config", "cluster.yaml"], &["--config cluster.yaml", "cannot be read"]),
        (&["--role", "prefill"], &["--role prefill", "yet"]),
        (&["--requests", "many"], &["--requests", "many"]),
    ];
    for (options, words) in cases {
        let ran = run_bare(options);
        assert_eq!(ran.code, Some(2), "{options:?}\n{}\n{}", ran.stderr, ran.stdout);
        assert_eq!(ran.stdout, "", "{options:?}");
        for word in *words {
            assert!(ran.stderr.contains(word), "{options:?}: no {word:?} in {}", ran.stderr);
        }
    }
}

/// A file of its own for each test, removed at the end.
struct TraceFile(PathBuf);

impl TraceFile {
    fn new(name: &str, text: &str) -> TraceFile {
        let path = std::env::temp_dir().join(format!("kvferry-{}-{name}.jsonl", std::process::id()));
        let mut file = std::fs::File::create(&path).expect("a temporary file");
        file.write_all(text.as_bytes()).expect("a trace is written");
        TraceFile(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("the temporary directory is text")
    }
}

impl Drop for TraceFile {
    fn drop(&mut self) {
        // What is left in the temporary directory is nobody's loss.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Conversations that share a system prompt and grow by turns, as Mooncake writes them.
fn conversations(requests: u64) -> String {
    let mut text = String::new();
    for request in 0..requests {
        let (conversation, turn) = (request % 20, request / 20);
        let hashes: Vec<String> = std::iter::once(0)
            .chain((0..=turn % 5).map(|block| 1000 * (conversation + 1) + block))
            .map(|hash| hash.to_string())
            .collect();
        let tokens = 512 * hashes.len() as u64 - (37 * request) % 500;
        text += &format!(
            "{{\"timestamp\": {}, \"input_length\": {tokens}, \"output_length\": 20, \"hash_ids\": [{}]}}\n",
            request * 10,
            hashes.join(", ")
        );
    }
    text
}

#[test]
fn a_trace_with_and_without_reuse() {
    let file = TraceFile::new("conversations", &conversations(250));
    let model = "layers=2,kv_heads=2,head_dim=16,dtype=bf16";
    let case = Case { transport: "auto", direction: "auto", in_process: true };
    let options = [
        "--geometry",
        model,
        "--prefill",
        "tp=2",
        "--decode",
        "tp=1,groups=2,block=32,blocks=800",
        "--trace",
        file.path(),
    ];
    let options = [&options[..], &["--limit", "200"]].concat();
    let whole = run(&case, &options);
    whole.check_delivered(&case);
    assert_eq!(whole.number("requests"), 200);
    let reused = run(&case, &[&options[..], &["--reuse-prefix"]].concat());
    reused.check_delivered(&case);
    assert_eq!(reused.number("requests"), 200);
    assert!(
        reused.number("bytes") < whole.number("bytes") / 2,
        "{} of {}",
        reused.number("bytes"),
        whole.number("bytes")
    );
    // Pools that hold little beside the largest request evict.
    let tight = [
        "--geometry",
        model,
        "--prefill",
        "tp=1",
        "--decode",
        "tp=2,blocks=200",
        "--trace",
        file.path(),
        "--reuse-prefix",
    ];
    run(&case, &tight).check_delivered(&case);
}

#[test]
fn unreadable_lines_of_a_trace_are_named() {
    let good = "{\"timestamp\": 0, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [1, 2]}\n";
    for (name, bad, word) in [
        ("syntax", "{\"timestamp\": 0, \"input_le", "line 3"),
        ("missing", "{\"timestamp\": 0, \"input_length\": 5}", "hash_ids"),
        (
            "zero",
            "{\"timestamp\": 0, \"input_length\": 0, \"output_length\": 5, \"hash_ids\": []}",
            "input_length is 0",
        ),
        (
            "hashes",
            "{\"timestamp\": 0, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [1, 2, 3]}",
            "3 hash_ids",
        ),
    ] {
        let file = TraceFile::new(name, &format!("{good}{good}{bad}\n"));
        let ran = run_bare(&["--model", "tiny", "--trace", file.path()]);
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        for word in [word, "line 3", file.path()] {
            assert!(ran.stderr.contains(word), "no {word:?} in {}", ran.stderr);
        }
    }
    let file = TraceFile::new("empty", "\n");
    let ran = run_bare(&["--model", "tiny", "--trace", file.path()]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("no requests"), "{}", ran.stderr);
}
