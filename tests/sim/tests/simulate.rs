//! The `simulate` example as its users meet it: a process with options, output and an exit status.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

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

/// What a user may mistake: every error names the value and what to do instead, nothing runs, and nothing panics.
#[test]
fn options_that_make_no_sense_are_told() {
    for (options, words) in [
        ("--prefill 0", "'0' for '--prefill <N>': 0 is not in 1..=4096"),
        ("--decode 5000", "5000 is not in 1..=4096"),
        ("--nics 0", "0 is not in 1..=64"),
        ("--rails 0", "0 is not in 1..=64"),
        ("--nics -1", "-1 is not in 1..=64"),
        ("--requests 0", "0 is not in 1..=1000000"),
        ("--requests 99999999999999999999", "number too large"),
        (
            "--prefill-tp 0",
            "--prefill-tp 0: the simulated model has 4 heads, which 0 ranks cannot share evenly; give 1, 2, 4 or 8",
        ),
        (
            "--decode 6 --decode-tp 4",
            "6 decode ranks make no whole groups of 4; give a multiple of 4, or another --decode-tp",
        ),
        ("--faults loss,,delay", "no fault called \"\"; there are all, none, or a list of loss,"),
        ("--seeds 5..5", "\"5..5\" holds no seed"),
        ("--seeds 0..2 --seed 1", "'--seeds <A..B>' cannot be used with '--seed <SEED>'"),
        ("--seeds 0..2 --log", "cannot be used with '--log'"),
        ("--seeds 0..2 --timeline x", "cannot be used with '--timeline <FILE>'"),
        ("--replay --request 1", "--seed <SEED>"),
        ("--replay --seed 1", "--request <N>"),
        ("--seed 1 --request 1", "--replay"),
        (
            "--replay --seed 1 --request 251",
            "--request 251: there are 250; give 1 to 200, or up to 250 for those that follow",
        ),
        ("--replay --seed 1 --requests 1 --request 3", "--request 3: there are 2; give 1 to 1, or up to 2"),
        ("--replay --seed 1 --request 0", "0 is not in 1.."),
        ("--replay --seed 1 --request 1 --json", "'--replay' cannot be used with '--json'"),
        ("--replay --seed 1 --request 1 --log", "cannot be used with '--log'"),
        ("--log --json", "'--log' cannot be used with '--json'"),
        ("--explain --json", "cannot be used with '--json'"),
        ("--explain --timeline x", "cannot be used with '--timeline <FILE>'"),
        ("--thrice 0", "0 is not in 1.."),
        ("--thrice 2", "--thrice 2: there is one seed; give 1, or more seeds with --seeds"),
        ("--thrice 3 --seeds 0..2", "--thrice 3: --seeds are 2; give that or less"),
        ("--plant moth", "no bug called \"moth\" to plant; there are hasty-engine, half-nic,"),
        ("--trace FILE --plant half-nic", "cannot be used with '--plant <BUG>'"),
        ("--nic-gbps 100", "--trace <FILE>"),
        ("--model tiny", "--trace <FILE>"),
        ("--trace FILE --faults all", "'--trace <FILE>' cannot be used with '--faults <LIST>'"),
        ("--trace FILE --requests 5", "cannot be used with '--requests <N>'"),
        ("--trace FILE --seeds 0..2", "cannot be used with '--seeds <A..B>'"),
        ("--trace FILE --prefill-tp 2", "cannot be used with '--prefill-tp <N>'"),
        ("--trace FILE --log", "cannot be used with '--log'"),
        ("--trace FILE --timeline x", "cannot be used with '--timeline <FILE>'"),
        ("--trace FILE --thrice 1", "cannot be used with '--thrice <N>'"),
        ("--trace FILE --limit 0", "0 is not in 1.."),
        ("--trace FILE --nic-gbps 0", "'0' for '--nic-gbps <GBPS>': give a number from 0.001 to 1000000"),
        ("--trace FILE --nic-gbps nan", "give a number from"),
        ("--trace FILE --speed -3", "'-3' for '--speed <FACTOR>': give a number from"),
        ("--trace FILE --decode-tokens-per-second 1e-300", "give a number from 0.01"),
        ("--trace FILE --prefill-tokens-per-second inf", "give a number from 1"),
        ("--trace FILE --layers-per-step 0", "0 is not in 1.."),
        ("--trace FILE --decode-blocks 4294967295", "4294967295 is not in 1..=1048576"),
        (
            "--trace FILE --decode-blocks 2",
            "request 1 of 1000 tokens takes 16 blocks, and a decode rank has 2; give --decode-blocks 16 or more",
        ),
        ("--trace FILE --prefill-blocks 2", "give --prefill-blocks 16 or more"),
        ("--trace FILE --model gpt-5", "possible values: llama-3.1-8b"),
        ("--trace FILE --policy best", "possible values: least-loaded, prefix"),
        ("--trace nowhere", "--trace nowhere: No such file"),
        ("--trace /dev/null", "--trace /dev/null holds no request; give"),
        ("--trace /dev/zero", "--trace /dev/zero has more than 256 MiB; give"),
    ] {
        let file = trace("nonsense.jsonl", 1);
        let options: Vec<&str> = options.split(' ').map(|word| if word == "FILE" { &*file } else { word }).collect();
        let run = simulate(&options).output().expect("runs");
        let error = text(&run.stderr);
        assert!(run.status.code() == Some(2) && error.contains(words), "{options:?}: {:?} {error}", run.status);
        assert!(run.stdout.is_empty(), "{options:?}: nothing runs");
    }
}

/// Where every number is as extreme as it may be, there is an answer all the same.
#[test]
fn extremes_are_answered() {
    let file = trace("extremes.jsonl", 3);
    for options in [
        "--speed 0.000001 --nic-gbps 1 --prefill-tokens-per-second 1 --decode-tokens-per-second 0.01",
        "--speed 1000000 --nic-gbps 1000000 --prefill-tokens-per-second 1000000000 --decode-tokens-per-second 1000000",
        "--prefill 1 --decode 1 --nics 64 --layers-per-step 1 --prefill-blocks 1048576 --decode-blocks 1048576 --limit 1",
        "--policy prefix,least-loaded --direction push --model tiny",
    ] {
        let run = simulate(&["--trace", &file, "--json"]).args(options.split(' ')).output().expect("runs");
        assert!(run.status.success(), "{options}: {}{}", text(&run.stdout), text(&run.stderr));
        let answer: Value = serde_json::from_slice(&run.stdout).expect("one JSON object");
        for policy in answer["policies"].as_array().expect("a list") {
            assert_eq!(policy["requests"], policy["delivered"], "{options}: {policy}");
        }
    }
    let run = simulate(&["--prefill", "1", "--decode", "1", "--nics", "64", "--requests", "1"]).output().expect("runs");
    assert!(run.status.success(), "{}", text(&run.stderr));
}

#[test]
fn a_capacity_question_is_answered_in_quantiles() {
    let file = trace("capacity.jsonl", 50);
    let options = [
        "--trace",
        &file,
        "--model",
        "llama-3.1-70b",
        "--prefill",
        "8",
        "--decode",
        "4",
        "--nics",
        "8",
        "--nic-gbps",
        "400",
        "--policy",
        "least-loaded,prefix",
    ];
    let run = simulate(&options).arg("--json").output().expect("runs");
    assert!(run.status.success(), "{}", text(&run.stderr));
    let answer: Value = serde_json::from_slice(&run.stdout).expect("one JSON object");
    let policies = answer["policies"].as_array().expect("a list");
    let names: Vec<_> = policies.iter().map(|row| row["policy"].as_str()).collect();
    assert_eq!(names, [Some("least-loaded"), Some("prefix")]);
    for row in policies {
        assert_eq!((&row["requests"], &row["delivered"], &row["unfinished"]), (&50.into(), &50.into(), &0.into()));
        for stage in ["queue_ms", "post_ms", "wire_ms", "notice_ms", "first_decode_token_ms"] {
            let at = |quantile: &str| row[stage][quantile].as_f64().expect("a number");
            assert!(at("p50") > 0.0 && at("p50") <= at("p99") && at("p99") <= at("max"), "{stage}: {row}");
        }
        assert!(row["events_per_second"].as_f64() > Some(0.0), "{row}");
    }
    assert!(answer["peak_memory_bytes"].as_u64() > Some(0), "{answer}");
    let told = simulate(&options).output().expect("runs");
    let told = text(&told.stdout);
    for words in
        ["8 prefill and 4 decode ranks with 8 NICs of 400 Gb/s each, pull; 50 requests", "wire: p50", "peak memory"]
    {
        assert!(told.contains(words), "{words}: {told}");
    }
}

#[test]
fn the_story_of_a_request_has_a_beginning_and_an_end() {
    let tell = |request: &str| {
        let run =
            simulate(&["--seed", "8", "--requests", "40", "--replay", "--request", request]).output().expect("runs");
        assert!(run.status.success(), "{}", text(&run.stderr));
        text(&run.stdout)
    };
    // The last of the first wave, and of the second, which is a quarter as many.
    for request in ["40", "41", "50"] {
        let story = tell(request);
        let lines: Vec<&str> = story.lines().collect();
        assert!(lines[0].starts_with(&format!("request {request} of seed 8; n0 schedules, n1..n8 prefill")), "{story}");
        assert!(lines[1].starts_with("from the beginning to the end: ") && lines[1].contains("late-alarms"), "{story}");
        assert!(lines[2].contains("submitted: "), "{story}");
        let at = |words: &str| lines.iter().position(|line| line.contains(words));
        let (paired, told) =
            (at("paired with").expect("a pairing"), at("the engine is told: delivered").expect("an end"));
        assert!(paired < told && at("answered").is_some() && at("its blocks are free") > Some(told), "{story}");
        assert!(lines.last().expect("a sum").starts_with("seed 8: 50 requests"), "{story}");
    }
    assert!(!tell("41").contains("~ since before"), "all is mended before the second wave");
}

/// What two runs of one process cannot show: an order that follows from the process, as of addresses or of keys drawn once.
#[test]
fn another_process_shows_what_this_one_cannot() {
    let run = |plant: &[&str]| {
        let options =
            ["--seed", "0", "--prefill", "4", "--decode", "4", "--requests", "40", "--faults", "none", "--thrice", "1"];
        let run = simulate(&options).args(plant).output().expect("runs");
        (run.status.code(), text(&run.stderr))
    };
    assert_eq!(run(&[]), (Some(0), String::new()), "a seed is the same run in every process");
    let (code, error) = run(&["--plant", "process-order"]);
    assert!(code == Some(1) && error.contains("seed 0: I8: another process runs it otherwise"), "{error}");
    assert!(error.contains("--plant process-order --thrice 1") && !error.contains("two runs differ"), "{error}");
    let (code, error) = run(&["--plant", "random-order"]);
    assert!(code == Some(1) && error.contains("seed 0: I8: two runs differ from record"), "{error}");
}

/// Every command that the documentation gives runs, shortened, and ends as it should.
#[test]
fn the_documented_commands_run() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(folder.join("target")).expect("the target folder takes folders");
    let file = trace("documented.jsonl", 20);
    let documents = [
        include_str!("../../../README.md"),
        include_str!("../../README.md"),
        include_str!("../../../examples/README.md"),
    ];
    let commands = documents.iter().flat_map(|text| text.split("cargo run --release --example simulate -- ").skip(1));
    let (mut kinds, mut tried) = (BTreeSet::new(), 0);
    for command in commands {
        let options = command.split(['\n', '`', '#']).next().unwrap_or_default();
        let options: Vec<&str> =
            options.split_whitespace().map(|word| if word == "TRACE.jsonl" { &*file } else { word }).collect();
        let short: &[&str] =
            if ["--trace", "--requests"].iter().any(|own| options.contains(own)) { &[] } else { &["--requests", "20"] };
        let run = simulate(&options).args(short).current_dir(folder).output().expect("runs");
        let code = i32::from(options.contains(&"--plant"));
        assert_eq!(run.status.code(), Some(code), "{options:?}: {}{}", text(&run.stdout), text(&run.stderr));
        if let Some(at) = options.iter().position(|option| *option == "--timeline") {
            let drawn = std::fs::read(folder.join(options[at + 1])).expect("it is written");
            let drawn: Value = serde_json::from_slice(&drawn).expect("JSON");
            assert!(drawn["traceEvents"].as_array().is_some_and(|events| !events.is_empty()), "{options:?}");
        }
        kinds.extend(options.iter().filter(|option| option.starts_with("--")).map(|option| (*option).to_owned()));
        tried += 1;
    }
    for kind in ["--seeds", "--replay", "--timeline", "--trace", "--plant"] {
        assert!(kinds.contains(kind), "no document shows {kind}: {kinds:?}");
    }
    assert!(tried >= 6, "the documents have lost their commands");
}

/// A trace of so many requests, one every 50 ms, in a file of that name.
fn trace(name: &str, requests: u64) -> String {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let line = |request: u64| {
        let (at, tokens) = (request * 50, 1000 + request * 10);
        format!(
            "{{\"timestamp\": {at}, \"input_length\": {tokens}, \"output_length\": 9, \"hash_ids\": [{}, 7]}}\n",
            request % 4
        )
    };
    std::fs::write(&file, (0..requests).map(line).collect::<String>()).expect("the target folder takes files");
    file.to_str().expect("a path in UTF-8").to_owned()
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
