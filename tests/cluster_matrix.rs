//! The `cluster` example over many geometries, transports and directions: every byte arrives, nothing is left behind.

mod cluster;

use cluster::{Case, run};

/// What every geometry must satisfy over every transport and direction: ranks inside one process, to be quick.
fn everywhere(options: &[&str]) {
    for transport in ["shm", "tcp"] {
        for direction in ["pull", "push"] {
            let case = Case { transport, direction, in_process: true };
            run(&case, options).check_delivered(&case);
        }
    }
}

const HEADS_4: &str = "layers=3,kv_heads=4,head_dim=16,dtype=bf16";
const HEADS_24: &str = "layers=3,kv_heads=24,head_dim=16,dtype=f16";

#[test]
fn tensor_parallel_ratios() {
    for (prefill, decode) in [("tp=1", "tp=1"), ("tp=2", "tp=4"), ("tp=4", "tp=2"), ("tp=2", "tp=2")] {
        everywhere(&[
            "--geometry",
            HEADS_4,
            "--prefill",
            prefill,
            "--decode",
            decode,
            "--isl",
            "50",
            "--requests",
            "6",
        ]);
    }
}

#[test]
fn uneven_tensor_parallel_ratios() {
    for (prefill, decode) in [("tp=3", "tp=6"), ("tp=6", "tp=4"), ("tp=8", "tp=1")] {
        everywhere(&[
            "--geometry",
            HEADS_24,
            "--prefill",
            prefill,
            "--decode",
            decode,
            "--isl",
            "50",
            "--requests",
            "5",
        ]);
    }
}

#[test]
fn duplicated_heads() {
    everywhere(&["--geometry", HEADS_4, "--prefill", "tp=8", "--decode", "tp=8", "--isl", "40", "--requests", "4"]);
    everywhere(&["--geometry", HEADS_4, "--prefill", "tp=8", "--decode", "tp=2", "--isl", "40", "--requests", "4"]);
}

#[test]
fn pipeline_stages() {
    let model = "layers=5,kv_heads=4,head_dim=16,dtype=bf16";
    for (prefill, decode) in [
        ("pp=2", "pp=1"),
        ("pp=1", "pp=3,layers=1+3+1"),
        ("tp=2,pp=2", "tp=4"),
        ("pp=2,layers=3+2", "tp=2,pp=2,layers=1+4"),
    ] {
        everywhere(&["--geometry", model, "--prefill", prefill, "--decode", decode, "--isl", "50", "--requests", "5"]);
    }
}

#[test]
fn block_sizes() {
    for (prefill, decode) in [
        ("block=16", "block=64"),
        ("block=64", "block=16"),
        ("block=32", "block=48"),
        ("block=24,tp=2", "block=40"),
        ("block=1", "block=16"),
    ] {
        everywhere(&[
            "--geometry",
            HEADS_4,
            "--prefill",
            prefill,
            "--decode",
            decode,
            "--isl",
            "150",
            "--requests",
            "5",
        ]);
    }
}

#[test]
fn orders_and_placements() {
    for (prefill, decode) in [
        ("order=NHD,tp=2", "order=HND"),
        ("order=HND", "order=NHD,tp=2"),
        ("kv=interleaved", "kv=separate"),
        ("kv=separate,planes=per-layer", "kv=interleaved,order=HND,block=32"),
        ("cp=2", "tp=2"),
        ("tp=2", "cp=2,block=32"),
    ] {
        everywhere(&[
            "--geometry",
            HEADS_4,
            "--prefill",
            prefill,
            "--decode",
            decode,
            "--isl",
            "70",
            "--requests",
            "4",
        ]);
    }
}

#[test]
fn kinds_of_layers() {
    let latent = "layers=3,latent=36,dtype=bf16";
    everywhere(&["--geometry", latent, "--prefill", "tp=4", "--decode", "tp=2", "--isl", "50", "--requests", "5"]);
    let window = "layers=3,kv_heads=4,head_dim=16,dtype=fp8,window=40";
    everywhere(&[
        "--geometry",
        window,
        "--prefill",
        "tp=2",
        "--decode",
        "tp=4,block=32",
        "--isl",
        "150",
        "--requests",
        "5",
    ]);
    // Window and full layers side by side, then full layers and recurrent state.
    everywhere(&[
        "--model",
        "gpt-oss-120b",
        "--prefill",
        "tp=2",
        "--decode",
        "tp=1",
        "--isl",
        "150",
        "--requests",
        "2",
    ]);
    everywhere(&[
        "--model",
        "qwen3-next",
        "--prefill",
        "tp=2,blocks=5",
        "--decode",
        "tp=4,blocks=5",
        "--isl",
        "70",
        "--requests",
        "2",
    ]);
}

#[test]
fn groups_and_attention_data_parallelism() {
    everywhere(&[
        "--geometry",
        HEADS_4,
        "--prefill",
        "tp=2,adp=2",
        "--decode",
        "tp=1",
        "--isl",
        "50",
        "--requests",
        "8",
    ]);
    everywhere(&[
        "--geometry",
        HEADS_4,
        "--prefill",
        "tp=2",
        "--decode",
        "tp=4,adp=2,groups=2",
        "--isl",
        "50",
        "--requests",
        "8",
    ]);
}

#[test]
fn layers_become_ready_in_steps() {
    let model = "layers=10,kv_heads=4,head_dim=16,dtype=bf16";
    for step in ["1", "4", "10"] {
        let options =
            ["--geometry", model, "--prefill", "pp=2", "--decode", "tp=2", "--layers-per-step", step, "--isl", "50"];
        everywhere(&[&options[..], &["--requests", "6"]].concat());
    }
}

#[test]
fn prompts_of_any_length() {
    for isl in ["1", "15", "16", "17", "127"] {
        everywhere(&[
            "--geometry",
            HEADS_4,
            "--prefill",
            "tp=2",
            "--decode",
            "block=64",
            "--isl",
            isl,
            "--requests",
            "4",
        ]);
    }
}

/// Rank r of a group over two hosts is on host r / (ranks / 2); only ranks of one host share memory.
#[test]
fn groups_over_several_hosts() {
    for direction in ["pull", "push"] {
        let case = Case { transport: "auto", direction, in_process: true };
        let options = [
            "--geometry",
            HEADS_4,
            "--prefill",
            "tp=4,nodes=2",
            "--decode",
            "tp=4,nodes=2,groups=2,block=32",
            "--requests",
            "8",
        ];
        let outcome = run(&case, &[&options[..], &["--isl", "50"]].concat());
        outcome.check_delivered(&case);
        for path in outcome.paths() {
            let host = |rank: &str| {
                rank.split_once(':').and_then(|(_, number)| number.parse::<u32>().ok()).map(|number| number % 4 / 2)
            };
            let (from, to) = (path["from"].as_str().unwrap(), path["to"].as_str().unwrap());
            let expected = if host(from) == host(to) { "shm" } else { "tcp" };
            assert_eq!(path["transport"], expected, "{from} to {to}");
        }
        // Equal ranks meet here: crossing hosts takes another tp.
        let crossing =
            ["--geometry", HEADS_4, "--prefill", "tp=4,nodes=2", "--decode", "tp=1", "--requests", "4", "--isl", "50"];
        let outcome = run(&case, &crossing);
        outcome.check_delivered(&case);
        let transports: Vec<_> =
            outcome.paths().iter().map(|path| path["transport"].as_str().unwrap().to_owned()).collect();
        assert_eq!(transports, ["shm", "shm", "tcp", "tcp"]);
    }
}

#[test]
fn groups_over_two_nodes() {
    everywhere(&[
        "--geometry",
        HEADS_4,
        "--prefill",
        "tp=4,nodes=2",
        "--decode",
        "tp=2,nodes=2,groups=2,block=32",
        "--requests",
        "8",
        "--isl",
        "50",
    ]);
}

#[test]
fn ranks_as_processes() {
    for transport in ["shm", "tcp", "auto"] {
        for direction in ["pull", "push"] {
            let case = Case { transport, direction, in_process: false };
            run(
                &case,
                &["--model", "tiny", "--prefill", "tp=2", "--decode", "tp=4", "--isl", "100", "--requests", "6"],
            )
            .check_delivered(&case);
        }
    }
}

#[test]
fn the_direction_is_pull_unless_asked_otherwise() {
    let case = Case { transport: "auto", direction: "auto", in_process: true };
    let outcome = run(&case, &["--model", "tiny", "--isl", "100", "--requests", "4", "--seed", "7"]);
    outcome.check_delivered(&case);
    assert!(outcome.paths().iter().all(|path| path["direction"] == "pull" && path["transport"] == "shm"));
}

/// One decode rank pulls through two devices at once, of one transport or of two.
#[test]
fn several_devices_share_what_is_pulled() {
    let sides =
        ["--geometry", "layers=4,kv_heads=4,head_dim=128", "--prefill", "tp=2", "--isl", "2000", "--requests", "6"];
    for (transport, devices, names) in
        [("tcp", "127.0.0.2,127.0.0.3", ["127.0.0.2", "127.0.0.3"]), ("auto", "shm:memory,tcp:lo", ["memory", "lo"])]
    {
        let case = Case { transport, direction: "pull", in_process: false };
        let ran = run(&case, &[&sides[..], &["--devices", devices, "--rails", "2"]].concat());
        ran.check_delivered(&case);
        for from in 0..2 {
            let paths = ran.paths();
            let of_rank = paths
                .iter()
                .filter(|path| path["from"] == format!("prefill:{from}") && path["bytes"].as_u64() > Some(0));
            let used: Vec<&str> = of_rank.filter_map(|path| path["device"].as_str()).collect();
            assert!(names.iter().all(|name| used.contains(name)), "{names:?}: {paths:?}");
        }
    }
}

#[test]
fn a_pool_for_one_request_is_enough() {
    everywhere(&[
        "--model",
        "tiny",
        "--prefill",
        "tp=2,blocks=7",
        "--decode",
        "tp=1,blocks=7",
        "--isl",
        "100",
        "--requests",
        "10",
    ]);
}

/// Ranks on two simulated hosts: those of one host share memory, those of two say why they do not.
#[test]
fn paths_say_how_they_are_known_and_what_was_passed_over() {
    let case = Case { transport: "auto", direction: "pull", in_process: false };
    let sides = ["--model", "tiny", "--prefill", "tp=2,nodes=2", "--decode", "tp=2", "--isl", "50", "--requests", "3"];
    let ran = run(&case, &sides);
    ran.check_delivered(&case);
    let words = |value: &serde_json::Value| value.to_string();
    for path in ran.paths() {
        let (evidence, passed) = (words(&path["evidence"]), words(&path["passed_over"]));
        if path["transport"] == "shm" {
            assert!(evidence.contains("E4 memfd/memory") && evidence.contains("mapped read-only"), "{path}");
            assert_eq!(passed, "[]", "{path}");
        } else {
            assert!(evidence.contains("E3 tcp/127.0.0.1:"), "{path}");
            assert!(words(&path["proof"]["unseen"]).contains("zero-copy"), "{path}");
            assert!(passed.contains("shm (the two are on different hosts)"), "{path}");
        }
        assert!(path["rdma_shortfall"].is_null(), "nobody expects RDMA: {path}");
    }
    let kinds: Vec<String> = ran.paths().iter().map(|path| words(&path["transport"])).collect();
    assert!(kinds.contains(&"\"shm\"".to_owned()) && kinds.contains(&"\"tcp\"".to_owned()), "{kinds:?}");
}

#[test]
fn required_rdma_refuses_a_network_and_takes_memory_of_one_host() {
    let small = ["--model", "tiny", "--isl", "50", "--requests", "2", "--require-rdma"];
    for direction in ["pull", "push"] {
        let case = Case { transport: "shm", direction, in_process: true };
        run(&case, &small).check_delivered(&case);
        let ran = run(&Case { transport: "tcp", ..case }, &small);
        assert_eq!((ran.code, ran.number("failed"), ran.number("delivered")), (Some(1), 2, 0), "{}", ran.stderr);
        let reason = ran.json()["failures"][0]["reason"].to_string();
        assert!(reason.contains("through tcp on lo is not RDMA") && reason.contains("require_rdma"), "{reason}");
    }
}
