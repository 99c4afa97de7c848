//! Runs the `cluster` example as a script would.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};

use serde_json::Value;

/// One run at a time: each has threads or processes of its own, and machines are small.
static TURN: Mutex<()> = Mutex::new(());

/// For who starts a run by itself: held until that is over.
pub(crate) fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How ranks reach each other.
pub(crate) struct Case {
    pub(crate) transport: &'static str,
    pub(crate) direction: &'static str,
    pub(crate) in_process: bool,
}

/// What a run printed.
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) command: String,
}

/// Runs the example with a case's options and `--json`.
pub(crate) fn run(case: &Case, options: &[&str]) -> Ran {
    let mut all = vec!["--json", "--deadline", "120", "--transport", case.transport, "--direction", case.direction];
    if case.in_process {
        all.push("--in-process");
    }
    all.extend_from_slice(options);
    run_bare(&all)
}

/// Runs the example with these options only.
pub(crate) fn run_bare(options: &[&str]) -> Ran {
    let _turn = turn();
    run_now(options)
}

/// Whether a test may have hosts of its own, and cables between them.
#[allow(dead_code, reason = "not every test needs one")]
pub(crate) fn may_have_hosts() -> bool {
    let mut probe = Command::new("unshare");
    let script = "mount -t sysfs none /sys && ip link add rail0 type veth peer name end0";
    probe.args(["--net", "--mount", "sh", "-c", script]).stdout(Stdio::null()).stderr(Stdio::null());
    let may = probe.status().is_ok_and(|status| status.success());
    if !may {
        kvferry_transport::conformance::absent(
            "netns",
            "unshare --net --mount is not permitted, or ip is not there; it needs root",
        );
    }
    may
}

/// Runs the example on a host of its own: a network namespace that a shell script sets up first, with root, unshare and what the script calls.
#[allow(dead_code, reason = "not every test needs one")]
pub(crate) fn run_on_a_host(script: &str, options: &[&str]) -> Ran {
    let _turn = turn();
    // Interfaces are looked up in sysfs, which is a namespace's own only when it is mounted there.
    let script = format!("set -e; mount -t sysfs none /sys; ip link set lo up; {script}; exec \"$0\" \"$@\"");
    let mut unshare = Command::new("unshare");
    unshare.args(["--net", "--mount", "sh", "-c", &script]).arg(example());
    finish(spawn(unshare, options), options)
}

/// Runs the example where the loader looks for libraries in `folder` first, which these variables are for.
#[allow(dead_code, reason = "not every test needs it")]
pub(crate) fn run_with_libraries(folder: &Path, told: &[(&str, &str)], options: &[&str]) -> Ran {
    let _turn = turn();
    let mut command = Command::new(example());
    command.env("LD_LIBRARY_PATH", folder).envs(told.iter().copied());
    finish(spawn(command, options), options)
}

/// The same as [`run_bare`], whatever else runs.
pub(crate) fn run_now(options: &[&str]) -> Ran {
    finish(start(options), options)
}

/// Waits for what was started, and for all that it printed.
fn finish(mut child: Child, options: &[&str]) -> Ran {
    let (mut stdout, mut stderr) = (String::new(), String::new());
    let mut errors = child.stderr.take().expect("stderr is piped");
    let reader = std::thread::spawn(move || {
        // What is no text shows as missing.
        let _ = errors.read_to_string(&mut stderr);
        stderr
    });
    let mut output = child.stdout.take().expect("stdout is piped");
    let writer = std::thread::spawn(move || {
        let _ = output.read_to_string(&mut stdout);
        stdout
    });
    let group = Pid::from_child(&child);
    let status = wait(&mut child);
    // Whoever lives on after its parent has no right to.
    let orphans = test_kill_process_group(group).is_ok();
    if status.is_none() || orphans {
        // What is gone already needs no kill.
        let _ = kill_process_group(group, Signal::KILL);
    }
    let stdout = writer.join().expect("stdout is read");
    let stderr = reader.join().expect("stderr is read");
    let code = status.and_then(|status| status.code());
    let ran = Ran { code, stdout, stderr, command: options.join(" ") };
    assert!(status.is_some(), "did not end: cluster {}\n{}", ran.command, ran.stderr);
    assert!(!orphans, "left processes behind: cluster {}\n{}", ran.command, ran.stderr);
    ran
}

/// Starts the example, as the first of a process group of its own.
pub(crate) fn start(options: &[&str]) -> Child {
    spawn(Command::new(example()), options)
}

fn spawn(mut command: Command, options: &[&str]) -> Child {
    command
        .args(options)
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .expect("the example starts")
}

/// Waits for its end, which its own deadlines bound; `None` when it does not come.
fn wait(child: &mut Child) -> Option<ExitStatus> {
    let late = Instant::now() + Duration::from_secs(300);
    while Instant::now() < late {
        if let Some(status) = child.try_wait().expect("the example can be waited for") {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    None
}

/// Cargo builds examples beside the tests: `target/<profile>/deps/<test>` and `target/<profile>/examples/cluster`. On a machine where only
/// the two files are, `KVFERRY_CLUSTER` says where the example is.
fn example() -> PathBuf {
    if let Some(given) = std::env::var_os("KVFERRY_CLUSTER").map(PathBuf::from) {
        assert!(given.exists(), "KVFERRY_CLUSTER names {}, which is not there", given.display());
        return given;
    }
    let test = std::env::current_exe().expect("the test has a path");
    let profile = test.parent().and_then(|deps| deps.parent()).expect("the test lies in target/<profile>/deps");
    let example = profile.join("examples").join("cluster");
    assert!(example.exists(), "{} is not built: run `cargo build --example cluster`, or all tests", example.display());
    example
}

impl Ran {
    /// What `--json` printed: one object and nothing else.
    pub(crate) fn json(&self) -> Value {
        let object = serde_json::from_str(&self.stdout);
        assert!(object.is_ok(), "{}: {object:?}\n{}\n{}", self.command, self.stdout, self.stderr);
        object.unwrap_or_default()
    }

    /// The object's `paths`.
    pub(crate) fn paths(&self) -> Vec<Value> {
        self.json()["paths"].as_array().cloned().unwrap_or_default()
    }

    /// One of the object's numbers.
    pub(crate) fn number(&self, name: &str) -> u64 {
        let number = self.json()[name].as_u64();
        assert!(number.is_some(), "{}: no number {name}\n{}", self.command, self.stdout);
        number.unwrap_or_default()
    }

    /// Nothing was mismatched, leaked or quarantined on survivors, and every request is accounted for.
    pub(crate) fn check_sound(&self) {
        assert_eq!(self.code, Some(0), "{}\n{}\n{}", self.command, self.stderr, self.stdout);
        for name in ["mismatched_bytes", "leaked_blocks", "quarantined_blocks"] {
            assert_eq!(self.number(name), 0, "{}: {name}\n{}", self.command, self.stdout);
        }
        let ended = self.number("delivered") + self.number("failed") + self.number("cancelled");
        assert_eq!(ended, self.number("requests"), "{}", self.command);
        assert_eq!(self.json()["failures"].as_array().map(Vec::len), Some(self.number("failed") as usize));
    }

    /// All was delivered and verified, by the paths that the case asks for.
    pub(crate) fn check_delivered(&self, case: &Case) {
        self.check_sound();
        assert_eq!(self.number("delivered"), self.number("requests"), "{}\n{}", self.command, self.stdout);
        assert!(self.number("bytes") > 0, "{}", self.command);
        assert_eq!(self.number("verified_bytes"), self.number("bytes"), "{}", self.command);
        let paths = self.paths();
        assert!(!paths.is_empty(), "{}", self.command);
        let moved: u64 = paths.iter().filter_map(|path| path["bytes"].as_u64()).sum();
        assert_eq!(moved, self.number("bytes"), "{}: bytes of paths", self.command);
        for path in &paths {
            for (key, wanted) in [("transport", case.transport), ("direction", case.direction)] {
                assert!(wanted == "auto" || path[key] == wanted, "{}: {path}", self.command);
            }
            assert!(path["pieces"].as_u64() > Some(0), "{}: {path}", self.command);
            let grade = path["proof"]["grade"].as_str().unwrap_or_default();
            assert!(["E3", "E4", "E5"].contains(&grade), "{}: {path}", self.command);
            assert!(
                path["evidence"].as_str().is_some_and(|words| words.starts_with(grade)),
                "{}: {path}",
                self.command
            );
            let lanes = path["proof"]["lanes"].as_array().map_or(0, Vec::len);
            assert!(lanes > 0, "{}: {path}", self.command);
        }
    }
}

/// Four heads of three layers.
#[allow(dead_code, reason = "not every file that runs clusters needs it")]
pub(crate) const HEADS_4: &str = "layers=3,kv_heads=4,head_dim=16,dtype=bf16";

/// Six geometries of the matrix, a test each, given to `$everywhere` as the example's options.
#[allow(unused_macros, reason = "not every file that runs clusters needs it")]
macro_rules! geometries {
    ($everywhere:ident) => {
        #[test]
        fn tensor_parallel_ratios() {
            $everywhere(&[
                "--geometry",
                $crate::cluster::HEADS_4,
                "--prefill",
                "tp=4",
                "--decode",
                "tp=2",
                "--isl",
                "50",
                "--requests",
                "6",
            ]);
        }

        #[test]
        fn large_pieces() {
            let options = ["--geometry", "layers=2,kv_heads=8,head_dim=128,dtype=bf16", "--prefill", "block=64"];
            $everywhere(&[&options[..], &["--decode", "block=64", "--isl", "700", "--requests", "3"]].concat());
        }

        #[test]
        fn block_sizes() {
            let sides = ["--prefill", "block=24,tp=2", "--decode", "block=40"];
            $everywhere(
                &[&["--geometry", $crate::cluster::HEADS_4], &sides[..], &["--isl", "150", "--requests", "5"]].concat(),
            );
        }

        #[test]
        fn orders_and_placements() {
            let sides = ["--prefill", "kv=separate,planes=per-layer", "--decode", "kv=interleaved,order=HND,block=32"];
            $everywhere(
                &[&["--geometry", $crate::cluster::HEADS_4], &sides[..], &["--isl", "90", "--requests", "4"]].concat(),
            );
        }

        #[test]
        fn pipeline_stages() {
            let sides = ["--prefill", "pp=2,layers=3+2", "--decode", "tp=2,pp=2,layers=1+4"];
            let model = ["--geometry", "layers=5,kv_heads=4,head_dim=16,dtype=bf16"];
            $everywhere(&[&model, &sides[..], &["--isl", "50", "--requests", "5"]].concat());
        }

        #[test]
        fn latent_attention() {
            let sides = ["--prefill", "tp=2", "--decode", "adp=2,tp=2", "--isl", "60", "--requests", "2"];
            $everywhere(&[&["--model", "deepseek-r1"], &sides[..]].concat());
        }
    };
}
#[allow(unused_imports, reason = "as above")]
pub(crate) use geometries;
