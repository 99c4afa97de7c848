//! `kvferry config check` as scripts and people use it, and `cluster --config`. Tests named `page_…` are lines of NVIDIA Dynamo's page "KV
//! Cache Transfer"; the rules themselves are tested in engines/trtllm/tests/resolve.rs.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "this is test code")]

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

/// A folder of its own for each test, removed at the end; commands run in it, so that paths in their output are short.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("kvferry-config-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn with(self, name: &str, text: &str) -> Folder {
        std::fs::write(self.0.join(name), text).unwrap();
        self
    }

    fn check(&self, arguments: &str) -> Output {
        let arguments = arguments.split_whitespace();
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvferry"));
        command.args(["config", "check"]).args(arguments).current_dir(&self.0).env_clear().output().unwrap()
    }

    fn cluster(&self, arguments: &str, environment: &[(&str, &str)]) -> Output {
        let test = std::env::current_exe().unwrap();
        let example = test.parent().and_then(|deps| deps.parent()).unwrap().join("examples/cluster");
        let arguments = arguments.split_whitespace();
        let environment = environment.iter().copied();
        Command::new(example).args(arguments).current_dir(&self.0).env_clear().envs(environment).output().unwrap()
    }
}

impl Folder {
    /// One file and one rule mean the same to `config check` and to the cluster, which knows nothing of its caller's variables then.
    fn run_in_an_environment(&self, quick: &str) {
        let write = |name: &str, text: &str| std::fs::write(self.0.join(name), text).unwrap();
        write("mpi.env", "export TRTLLM_USE_MPI_KVCACHE='1'\n");
        write(
            "nowhere.env",
            "TRTLLM_NIXL_KVCACHE_BACKEND=LIBFABRIC\nKVFERRY_LIBFABRIC_LIBRARY=/nowhere/of/the/file.so.1\n",
        );
        write("bad.env", "A=1\nnonsense\n");
        for follow in ["trtllm", "dynamo"] {
            let arguments = format!("e.yaml --env-file mpi.env --follow {follow}");
            let refused = follow == "trtllm";
            assert_eq!(self.check(&arguments).status.code(), Some(if refused { 2 } else { 1 }), "{follow}");
            let ran = self.cluster(&format!("--config {arguments} --transport tcp {quick}"), &[]);
            let said = text(&ran.stderr);
            assert_eq!(ran.status.code(), Some(if refused { 2 } else { 0 }), "{follow}: {said}");
            let words = if refused {
                "the MPI backend is deprecated"
            } else {
                "TRTLLM_USE_MPI_KVCACHE=1 with `backend: DEFAULT`"
            };
            assert!(said.contains(words), "{follow}: {said}");
        }
        let caller =
            [("TRTLLM_NIXL_KVCACHE_BACKEND", "UCX"), ("KVFERRY_LIBFABRIC_LIBRARY", "/nowhere/of/the/caller.so.1")];
        for (arguments, words) in [
            ("--config e.yaml --env-file=nowhere.env", "/nowhere/of/the/file.so.1"),
            ("--env-file bad.env", "--env-file bad.env:2: `nonsense` is not NAME=value"),
            ("--env-file none.env", "--env-file none.env: nothing can be run with it: No such file"),
            ("--follow trtllm", "--config <FILE>"),
            ("--config e.yaml --follow nvidia", "[possible values: trtllm, dynamo]"),
        ] {
            let ran = self.cluster(&format!("{arguments} {quick}"), &caller);
            assert_eq!(ran.status.code(), Some(2), "{arguments}");
            assert!(text(&ran.stderr).contains(words), "{arguments}: no {words:?} in {}", text(&ran.stderr));
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn page_the_ignored_variable_golden() {
    let folder = Folder::new("golden")
        .with(
            "decode.yaml",
            "# decode\ncache_transceiver_config:\n  backend: DEFAULT\n  kv_transfer_timeout_ms: 120000\n",
        )
        .with("worker.env", "TRTLLM_USE_UCX_KVCACHE=1\n");
    let output = folder.check("decode.yaml --env-file worker.env");
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    let expected = "\
method               NIXL with UCX                decode.yaml:3: DEFAULT means NIXL, whatever the TRTLLM_USE_*_KVCACHE variables say; TRTLLM_NIXL_KVCACHE_BACKEND is not set, so NIXL uses UCX
transport            ucx                          decode.yaml:3: NIXL with UCX is carried by kvferry's ucx transport
library transports   all                          default: UCX chooses
devices              all                          default: every device that UCX finds
deadline at most     120000 ms                    decode.yaml:4: kv_transfer_timeout_ms
deadline at least    10000 ms                     default: kvferry's allowance for scheduling noise
decode handovers     the node's limit             default: kvferry needs no buffers per transfer; the node's own limit holds
prefill handovers    the node's limit             default: kvferry needs no buffers per transfer; the node's own limit holds

warning: TRTLLM_USE_UCX_KVCACHE=1 with `backend: DEFAULT` does not enable UCX (variable TRTLLM_USE_UCX_KVCACHE)
  do: set `backend: UCX` in the file; --follow trtllm applies TensorRT-LLM's own rule
  NVIDIA Dynamo 1.x, KV Cache Transfer page: the variable does not enable UCX, `backend: UCX` must be set
  TensorRT-LLM 1.3.0rc22, llm_args.py `_resolve_default_backend`: the first of NIXL, UCX, MOONCAKE, MPI whose variable is \"1\" is what DEFAULT means
note: NIXL with UCX: these are kvferry's own agents and not wire-compatible with NIXL agents (decode.yaml:3)
  do: run kvferry on both the prefill and the decode side; where the peer is a NIXL agent, --peers nixl tells what speaks to it
note: transceiver_runtime is not given: of no concern here, and decided by each TensorRT-LLM server for itself (default)
  TensorRT-LLM 1.3.0rc22, llm_args.py: auto: each server decides for itself, so prefill and decode may differ
  earlier TensorRT-LLM: the C++ runtime
";
    assert_eq!(text(&output.stdout), expected);
    let nixl = folder.check("decode.yaml --env-file worker.env --peers nixl");
    assert_eq!(nixl.status.code(), Some(1), "{}", text(&nixl.stderr));
    let spoken = "transport            nixl                         decode.yaml:3: the peer is a NIXL agent: kvferry's NIXL engine";
    assert!(text(&nixl.stdout).contains(spoken), "{}", text(&nixl.stdout));
    let ucx = folder.check("decode.yaml --env-file worker.env --follow trtllm");
    assert!(text(&ucx.stdout).starts_with("method               UCX  "), "{}", text(&ucx.stdout));
}

#[test]
fn the_contradictions_of_documents_and_code_are_listed() {
    let list = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvferry"));
        let output = command.args(["config", "contradictions"]).args(arguments).env_clear().output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    let said = list(&[]);
    for word in
        ["NVLink between pods", "VLLM_NIXL_ABORT_REQUEST_TIMEOUT", "decode pulls", "here: 60000", "--follow trtllm"]
    {
        assert!(said.contains(word), "no {word:?} in {said}");
    }
    let listed: Value = serde_json::from_str(&list(&["--json"])).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 8);
    assert!(listed.as_array().unwrap().iter().all(|one| one["claims"].as_array().unwrap().len() == 2));
}

#[test]
fn page_efa_environment_with_libfabric_as_json() {
    let folder = Folder::new("json").with("e.yaml", "cache_transceiver_config: {backend: NIXL, colour: red}\n").with(
        "e.env",
        "TRTLLM_NIXL_KVCACHE_BACKEND=LIBFABRIC\nFI_PROVIDER=efa\nFI_EFA_USE_DEVICE_RDMA=1\nFI_EFA_ENABLE_SHM_TRANSFER=0\n",
    );
    let output = folder.check("e.yaml --env-file e.env --json");
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&report["file"], &report["follow"], &report["status"]),
        (&"e.yaml".into(), &"dynamo".into(), &"warning".into())
    );
    let method = &report["plan"]["method"];
    assert_eq!((&method["value"]["name"], &method["value"]["backend"]), (&"NIXL".into(), &"LIBFABRIC".into()));
    assert_eq!(method["source"], "variable TRTLLM_NIXL_KVCACHE_BACKEND");
    assert_eq!(report["plan"]["transport"]["value"], "libfabric");
    assert_eq!(report["plan"]["library_transports"]["value"][0], "efa");
    let findings = report["findings"].as_array().unwrap();
    let unknown = findings.iter().find(|finding| finding["code"] == "unknown-key").unwrap();
    assert_eq!((&unknown["severity"], &unknown["source"]), (&"warning".into(), &"e.yaml:1".into()));
    assert!(findings.iter().any(|finding| finding["contradiction"]["about"] == "the NIXL backend for AWS EFA"));
}

#[test]
fn what_cannot_be_resolved_exits_with_two_and_says_where() {
    let folder = Folder::new("refused")
        .with("mpi.yaml", "cache_transceiver_config:\n  backend: MPI\n")
        .with("lower.yaml", "cache_transceiver_config:\n  backend: ucx\n")
        .with("marked.yaml", "\u{feff}cache_transceiver_config:\n  backend: ucx\n")
        .with("torn.yaml", "cache_transceiver_config: {backend: [\n")
        .with("bad.env", "A=1\nnonsense\n");
    for (arguments, words) in [
        ("mpi.yaml", ["the MPI backend is deprecated", "do: use `backend: UCX`"]),
        ("lower.yaml", ["lower.yaml:2:12: backend is `ucx`", "in capitals"]),
        ("marked.yaml", ["marked.yaml:2:12: backend is `ucx`", "in capitals"]),
        ("torn.yaml", ["torn.yaml:2:1: not YAML", "correct the line"]),
        ("none.yaml", ["none.yaml: it cannot be read", "readable file"]),
        ("mpi.yaml --env-file bad.env", ["bad.env:2: `nonsense`", "NAME=value"]),
    ] {
        let output = folder.check(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments}");
        let said = text(&output.stdout) + &text(&output.stderr);
        for word in words {
            assert!(said.contains(word), "{arguments}: no {word:?} in {said}");
        }
    }
}

#[test]
fn the_cluster_runs_the_plan_over_a_transport_that_it_has() {
    let folder = Folder::new("cluster")
        .with("e.yaml", "cache_transceiver_config: {backend: DEFAULT, kv_transfer_timeout_ms: 30000}\n")
        .with("off.yaml", "tensor_parallel_size: 2\n");
    let quick = "--model tiny --requests 3 --isl 40 --in-process --json";
    let ran = folder.cluster(&format!("--config e.yaml --transport tcp {quick}"), &[]);
    assert!(ran.status.success(), "{}", text(&ran.stderr));
    let report: Value = serde_json::from_slice(&ran.stdout).unwrap();
    assert_eq!((&report["delivered"], &report["mismatched_bytes"]), (&3.into(), &0.into()));
    assert!(report["paths"].as_array().unwrap().iter().all(|path| path["transport"] == "tcp"));
    let libfabric = [("TRTLLM_NIXL_KVCACHE_BACKEND", "LIBFABRIC")];
    let library = std::env::var("KVFERRY_LIBFABRIC_LIBRARY").unwrap_or_default();
    let here = [libfabric[0], ("KVFERRY_LIBFABRIC_LIBRARY", library.as_str())];
    let ran = folder.cluster(&format!("--config e.yaml {quick}"), &here);
    if kvferry_libfabric::LibfabricProvider::unavailable().is_none() {
        assert!(ran.status.success(), "{}", text(&ran.stderr));
        let report: Value = serde_json::from_slice(&ran.stdout).unwrap();
        assert!(report["paths"].as_array().unwrap().iter().all(|path| path["transport"] == "libfabric"));
    }
    let nowhere = [libfabric[0], ("KVFERRY_LIBFABRIC_LIBRARY", "/nowhere/libfabric.so.1")];
    let lacking = folder.cluster(&format!("--config e.yaml {quick}"), &nowhere);
    assert_eq!(lacking.status.code(), Some(2));
    for word in ["libfabric", "/nowhere/libfabric.so.1", "KVFERRY_LIBFABRIC_LIBRARY"] {
        assert!(text(&lacking.stderr).contains(word), "{}", text(&lacking.stderr));
    }
    folder.run_in_an_environment(quick);
    let off = folder.cluster(&format!("--config off.yaml {quick}"), &[]);
    assert_eq!(off.status.code(), Some(2));
    assert!(text(&off.stderr).contains("cache_transceiver_config is not in the file"), "{}", text(&off.stderr));
    std::fs::write(folder.0.join("no.text"), b"A=1\nB=\xff\n").unwrap();
    for arguments in ["--config no.text", "--config e.yaml --env-file no.text"] {
        let ran = folder.cluster(&format!("{arguments} {quick}"), &[]);
        assert_eq!(ran.status.code(), Some(2), "{arguments}");
        assert!(text(&ran.stderr).contains("line 2: byte 6 is not UTF-8 text"), "{arguments}: {}", text(&ran.stderr));
    }
    let missing = folder.cluster(&format!("--config none.yaml {quick}"), &[]);
    assert_eq!(missing.status.code(), Some(2));
    assert!(text(&missing.stderr).contains("--config none.yaml: it cannot be read"), "{}", text(&missing.stderr));
}
