//! The README shows code and commands that exist.

const README: &str = include_str!("../README.md");

#[test]
fn the_snippet_is_the_example() {
    let example = include_str!("../examples/embed.rs").trim();
    assert!(README.contains(example), "README.md does not hold examples/embed.rs as it is");
    assert!(example.lines().count() <= 80, "examples/embed.rs has grown beyond 80 lines");
}

#[test]
fn the_commands_run() {
    let commands = README.lines().filter_map(|line| line.strip_prefix("cargo run --release --example cluster -- "));
    let mut tried = 0;
    for options in commands.filter(|options| !options.contains("--help")) {
        tried += 1;
        let options: Vec<&str> = options.split_whitespace().collect();
        // Commands that say how much they do are quick as they stand.
        let mut extra = Vec::new();
        for quick in [["--requests", "3"], ["--isl", "40"]] {
            if !options.contains(&quick[0]) {
                extra.extend(quick);
            }
        }
        // Ranks to hurt must be processes.
        if !["--kill", "--drain", "--stop", "--pause"].iter().any(|fault| options.contains(fault)) {
            extra.push("--in-process");
        }
        let run = std::process::Command::new(cluster()).args(&options).args(&extra).output();
        let run = run.expect("the cluster example is built beside the tests");
        let said = String::from_utf8_lossy(&run.stderr);
        // Where there are no GPUs it has to say so.
        let lacks_gpus = options.contains(&"cuda") && (said.contains("no CUDA driver") || said.contains("no GPU"));
        assert!(run.status.success() || lacks_gpus, "{options:?}: {said}");
    }
    assert!(tried >= 2, "the README has lost its examples");
    assert!(!README.contains("@@"));
}

/// `target/<profile>/examples/cluster`, beside this test's own directory.
fn cluster() -> std::path::PathBuf {
    let test = std::env::current_exe().expect("a test knows where it is");
    let profile = test.parent().and_then(|deps| deps.parent()).expect("tests lie in target/<profile>/deps");
    profile.join("examples/cluster")
}

#[test]
fn linked_files_exist() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let links =
        README.split("](").skip(1).filter_map(|rest| rest.split(')').next()).filter(|link| !link.starts_with("http"));
    for link in links {
        assert!(root.join(link).exists(), "README.md links to {link}, which is not there");
    }
}
