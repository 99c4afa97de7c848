//! `kvferry manifest`, and `doctor --manifest` behind it: one test per line of Dynamo's page on KV transfer that is about manifests.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "this is test code")]

use std::io::Write;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn kvferry(arguments: &[&str], input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvferry"));
    command.args(arguments).env_clear().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A command that does not read ends first.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn manifest(arguments: &[&str]) -> String {
    let output = kvferry(&[&["manifest"], arguments].concat(), "");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Status and evidence of one check.
fn judged(yaml: &str, id: &str) -> (String, String) {
    let output = kvferry(&["doctor", "--manifest", "-", "--json"], yaml);
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    let checks = report["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["id"] == id).unwrap();
    (check["status"].as_str().unwrap().to_owned(), check["evidence"].to_string())
}

/// The lines stand there in this order, with nothing but indentation and dashes before them and nothing but comments between them.
fn has(yaml: &str, lines: &[&str]) -> bool {
    let bare: Vec<&str> = yaml
        .lines()
        .map(|line| line.trim_start_matches([' ', '-']).trim())
        .filter(|line| !line.starts_with('#'))
        .collect();
    bare.windows(lines.len()).any(|window| window == lines)
}

/// The part of one of Dynamo's services.
fn service<'a>(yaml: &'a str, name: &str) -> &'a str {
    let begins = yaml.find(&format!("    {name}:")).unwrap();
    let rest = &yaml[begins + 4..];
    let mut end = 0;
    for (index, line) in rest.split_inclusive('\n').enumerate() {
        if index > 0 && !line.starts_with("     ") {
            break;
        }
        end += line.len();
    }
    &rest[..end]
}

const PREFILL: &str = "TRTLLMPrefillWorker";
const DECODE: &str = "TRTLLMDecodeWorker";

/// "Pre-built EFA image (AMD64 only)"
#[test]
fn page_the_efa_image_is_for_amd64_only() {
    let amd64 = manifest(&[]);
    let image = "image: nvcr.io/nvidia/ai-dynamo/tensorrtllm-runtime:1.1.1-efa-amd64";
    assert!(has(service(&amd64, PREFILL), &[image]) && !amd64.contains("hostPath"));
    assert!(!manifest(&["--architecture", "arm64"]).contains("-efa-amd64"));
    let output = kvferry(&["manifest", "--gb200", "--image", "x:1-efa-amd64"], "");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("mounted from the host"));
    let theirs = amd64.replace("kubernetes.io/arch: amd64", "kubernetes.io/arch: arm64");
    assert_eq!(judged(&theirs, "manifest.efa-sdk").0, "fail");
}

/// "Host-mount approach (ARM64 / GB200)"
#[test]
fn page_arm64_mounts_the_hosts_sdk() {
    let yaml = manifest(&["--architecture", "arm64"]);
    for name in [PREFILL, DECODE] {
        let worker = service(&yaml, name);
        assert!(has(worker, &["volumeMounts:", "name: efa-sdk", "mountPath: /opt/amazon/efa"]), "{worker}");
        assert!(has(worker, &["volumes:", "name: efa-sdk", "hostPath:", "path: /opt/amazon/efa"]), "{worker}");
    }
    let theirs = yaml.replace("hostPath:", "emptyDir:").replace("  path: /opt/amazon/efa", "  medium: Memory");
    assert_eq!(judged(&theirs, "manifest.efa-sdk").0, "fail");
}

/// "EFA resource requests"
#[test]
fn page_efa_is_requested_and_limited_alike() {
    let plain = manifest(&["--form", "lws"]);
    let amount = "vpc.amazonaws.com/efa: \"4\"";
    assert!(has(&plain, &["requests:", "nvidia.com/gpu: \"4\"", amount, "limits:", "nvidia.com/gpu: \"4\"", amount]));
    assert_eq!(plain.matches(amount).count(), 4);
    // Dynamo's own schema knows it below `custom` only.
    assert!(has(&manifest(&["--efa", "8"]), &["custom:", "vpc.amazonaws.com/efa: \"8\""]));
    let theirs = plain.replacen(amount, "memory: 1Gi", 1);
    // Some editors begin a file with a mark.
    for theirs in [theirs.clone(), format!("\u{feff}{theirs}")] {
        let (status, evidence) = judged(&theirs, "manifest.efa-resources");
        assert_eq!(status, "fail");
        assert!(evidence.contains("limit 4 without a request"), "{evidence}");
    }
}

/// "Required environment variables for EFA workers (set on both prefill and decode)"
#[test]
fn page_efa_environment_on_both_sides() {
    let lines = [
        "name: FI_PROVIDER",
        "value: efa",
        "name: FI_EFA_USE_DEVICE_RDMA",
        "value: \"1\"",
        "name: FI_EFA_ENABLE_SHM_TRANSFER",
        "value: \"0\"",
        "name: LD_LIBRARY_PATH",
        "value: /opt/amazon/efa/lib:/usr/local/lib:/usr/lib",
    ];
    let yaml = manifest(&[]);
    for name in [PREFILL, DECODE] {
        assert!(has(service(&yaml, name), &lines), "{name}");
    }
    for form in ["lws", "statefulset"] {
        assert_eq!(manifest(&["--form", form]).matches("FI_EFA_USE_DEVICE_RDMA").count(), 2, "{form}");
    }
}

/// "FI_EFA_ENABLE_SHM_TRANSFER must be 0"
#[test]
fn page_shm_transfer_left_on_is_found() {
    let theirs = manifest(&[]).replace(
        "FI_EFA_ENABLE_SHM_TRANSFER\n          value: \"0\"",
        "FI_EFA_ENABLE_SHM_TRANSFER\n          value: \"1\"",
    );
    let (status, evidence) = judged(&theirs, "manifest.shm-transfer");
    assert_eq!(status, "fail");
    assert_eq!(evidence.matches("FI_EFA_ENABLE_SHM_TRANSFER=1").count(), 2, "{evidence}");
}

/// "AWS EFA currently requires privileged mode"
#[test]
fn page_workers_with_efa_are_privileged() {
    let yaml = manifest(&[]);
    for name in [PREFILL, DECODE] {
        assert!(has(service(&yaml, name), &["securityContext:", "privileged: true"]), "{name}");
    }
    assert!(!manifest(&["--efa", "0"]).contains("privileged"));
    assert_eq!(judged(&yaml.replace("privileged: true", "privileged: false"), "manifest.privileged").0, "warn");
}

/// "Override this on the decode service only", "Do not set this on prefill workers"
#[test]
fn page_plugin_dir_on_decode_of_several_nodes_only() {
    let set = [
        "name: NIXL_PLUGIN_DIR",
        "value: /opt/dynamo/venv/lib/python3.12/site-packages/tensorrt_llm/libs/nixl/plugins",
    ];
    let yaml = manifest(&["--decode-nodes", "2", "--prefill-nodes", "2"]);
    assert!(has(service(&yaml, DECODE), &set));
    assert!(!has(service(&yaml, PREFILL), &set[..1]));
    assert!(!has(&manifest(&[]), &set[..1]), "one node needs none");
    let on_prefill =
        service(&yaml, PREFILL).replace("envs:\n", &format!("envs:\n        - {}\n          {}\n", set[0], set[1]));
    let theirs = yaml.replace(service(&yaml, PREFILL), &on_prefill);
    let (status, evidence) = judged(&theirs, "manifest.plugin-dir");
    assert_eq!(status, "fail");
    assert!(evidence.contains("on prefill"), "{evidence}");
}

/// "NCCL requires a ComputeDomain CR"; `numNodes: 3` there is deprecated.
#[test]
fn page_compute_domain() {
    let yaml = manifest(&["--gb200", "--name", "my"]);
    assert!(has(
        &yaml,
        &["apiVersion: resource.nvidia.com/v1beta1", "kind: ComputeDomain", "metadata:", "name: my-compute-domain"]
    ));
    assert!(has(&yaml, &["numNodes: 0", "channel:", "resourceClaimTemplate:", "name: my-compute-domain-channel"]));
    assert!(yaml.contains("# Deprecated, and 0 where"), "it says why it is not the page's 3");
    assert!(!yaml.contains("kind: ResourceClaimTemplate"), "the controller makes it");
    let old = manifest(&["--gb200", "--prefill-replicas", "2", "--compute-domain-nodes", "3"]);
    assert!(has(&old, &["numNodes: 3"]));
    assert_eq!(judged(&old, "manifest.compute-domain").0, "ok");
}

/// "Both prefill and decode services must include ResourceClaims"
#[test]
fn page_both_sides_claim_the_channel() {
    let yaml = manifest(&["--gb200", "--name", "my"]);
    for name in [PREFILL, DECODE] {
        let worker = service(&yaml, name);
        assert!(has(worker, &["claims:", "name: compute-domain-channel"]), "{worker}");
        let claim =
            ["resourceClaims:", "name: compute-domain-channel", "resourceClaimTemplateName: my-compute-domain-channel"];
        assert!(has(worker, &claim), "{worker}");
    }
    let theirs = yaml.replacen(
        "resourceClaimTemplateName: my-compute-domain-channel",
        "resourceClaimTemplateName: other-channel",
        1,
    );
    let (status, evidence) = judged(&theirs, "manifest.compute-domain");
    assert_eq!(status, "fail");
    assert!(evidence.contains("`other-channel` is the template of no ComputeDomain"), "{evidence}");
}

/// "Required NCCL environment variables for GB200"; `NVIDIA_GDRCOPY: "1"` there has no effect.
#[test]
fn page_nccl_variables_and_gdrcopy_by_its_word() {
    let yaml = manifest(&["--gb200"]);
    let lines = [
        "name: NCCL_MNNVL_ENABLE",
        "value: \"1\"",
        "name: NCCL_CUMEM_ENABLE",
        "value: \"1\"",
        "name: NCCL_NVLS_ENABLE",
        "value: \"1\"",
        "name: NVIDIA_GDRCOPY",
        "value: enabled",
    ];
    for name in [PREFILL, DECODE] {
        assert!(has(service(&yaml, name), &lines), "{name}");
    }
    assert!(yaml.contains("# Not \"1\", as Dynamo's page has it"));
    let theirs = yaml.replace("value: enabled", "value: \"1\"");
    assert_eq!(judged(&theirs, "manifest.gdrcopy").0, "warn");
}

#[test]
fn what_it_prints_passes_the_doctor_whatever_the_form() {
    for form in ["dynamo", "lws", "statefulset"] {
        for more in [
            &[][..],
            &["--gb200", "--decode-nodes", "2"],
            &["--efa", "0"],
            &["--library", "libfabric", "--scheduler-image", "s:1"],
        ] {
            let yaml = manifest(&[&["--form", form], more].concat());
            let output = kvferry(&["doctor", "--manifest", "-"], &yaml);
            assert_eq!(output.status.code(), Some(0), "{form} {more:?}: {}", String::from_utf8_lossy(&output.stdout));
        }
    }
}

#[test]
fn the_scheduler_comes_with_probes_a_service_and_a_monitor() {
    let yaml = manifest(&["--scheduler-image", "registry/kvferry:1", "--namespace", "inference"]);
    for lines in [
        &["kind: Deployment"][..],
        &["kind: Service"],
        &["kind: ServiceMonitor"],
        &["image: registry/kvferry:1"],
        &["path: /healthz", "port: metrics"],
        &["path: /readyz", "port: metrics"],
        &["port: metrics", "path: /metrics"],
    ] {
        assert!(has(&yaml, lines), "no {lines:?} in\n{yaml}");
    }
    assert_eq!(yaml.matches("namespace: inference").count(), 4);
}

#[test]
fn settings_come_from_a_file_and_flags_win() {
    let toml = "name = \"llm\"\nform = \"lws\"\nefa = 16\ngpus = 8\n[decode]\nnodes = 2\nargs = [\"--flag\", \"1\"]\n";
    let output = kvferry(&["manifest", "--settings", "-", "--gpus", "2"], toml);
    let yaml = String::from_utf8(output.stdout).unwrap();
    assert!(
        has(&yaml, &["name: llm-decode"]) && has(&yaml, &["size: 2"]) && has(&yaml, &["\"--flag\"", "\"1\""]),
        "{yaml}"
    );
    assert!(has(&yaml, &["nvidia.com/gpu: \"2\"", "vpc.amazonaws.com/efa: \"16\""]), "{yaml}");
    for (arguments, input, words) in [
        (&["manifest", "--settings", "-"][..], "gpu = 8\n", ["-: ", "unknown field `gpu`"]),
        (&["manifest", "--name", "A"], "", ["name = A", "lower-case"]),
        (&["manifest", "--settings", "/nonexistent"], "", ["/nonexistent", "readable file"]),
        (&["doctor", "--manifest", "-"], "a: [1\nb: 2\n", ["-: 2:", "not YAML"]),
        (&["doctor", "--manifest", "-", "--role", "decode"], "", ["--manifest", "--role"]),
    ] {
        let output = kvferry(arguments, input);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        for word in words {
            assert!(text.contains(word), "{arguments:?}: no {word:?} in {text}");
        }
    }
}
