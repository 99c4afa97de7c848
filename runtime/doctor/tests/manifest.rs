//! Manifests with one mistake each: the one is found, at its place, and nothing else.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "this is test code")]

use kvferry_doctor::{Check, Expectations, Report, Status, read_manifest};
use kvferry_manifest::{Form, Settings, Side, generate, text};

fn judged(text: &str) -> Report {
    read_manifest(text, "deploy.yaml", &Expectations::default()).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn good(form: Form, gb200: bool) -> String {
    let decode = Side { nodes: 2, ..Side::default() };
    text(&generate(&Settings { form, gb200, decode, ..Settings::default() }).unwrap()).unwrap()
}

/// The ids that are not ok.
fn wrong(report: &Report) -> Vec<(&'static str, Status)> {
    report.checks.iter().filter(|check| check.status != Status::Ok).map(|check| (check.id, check.status)).collect()
}

fn check<'a>(report: &'a Report, id: &str) -> &'a Check {
    report.checks.iter().find(|check| check.id == id).unwrap()
}

#[test]
fn what_manifest_generates_has_none_of_them() {
    for form in [Form::Dynamo, Form::Lws, Form::Statefulset] {
        for gb200 in [false, true] {
            let text = good(form, gb200);
            let report = judged(&text);
            assert_eq!(wrong(&report), [], "{form:?}, {gb200}: {report:#?}\n{text}");
        }
    }
}

/// Replaces the first occurrence, which must be there; from `after` on.
fn with(text: &str, after: &str, from: &str, to: &str) -> String {
    let start = text.find(after).unwrap_or_else(|| panic!("no {after} in\n{text}"));
    let at = start + text[start..].find(from).unwrap_or_else(|| panic!("no {from} after {after} in\n{text}"));
    format!("{}{to}{}", &text[..at], &text[at + from.len()..])
}

#[test]
fn each_mistake_is_found_at_its_place_and_nothing_else_is() {
    let (dynamo, lws) = (good(Form::Dynamo, true), good(Form::Lws, true));
    let plugins = "- name: NIXL_PLUGIN_DIR";
    for (what, text, id, status, words) in [
        (
            "EFA limit without request",
            with(
                &lws,
                "kvferry-prefill",
                "requests:\n                nvidia.com/gpu: \"4\"\n                vpc.amazonaws.com/efa: \"4\"\n",
                "requests:\n                nvidia.com/gpu: \"4\"\n",
            ),
            "manifest.efa-resources",
            Status::Fail,
            "kvferry-prefill: limit 4 without a request",
        ),
        (
            "EFA request without limit",
            with(
                &lws,
                "kvferry-prefill",
                "limits:\n                nvidia.com/gpu: \"4\"\n                vpc.amazonaws.com/efa: \"4\"\n",
                "limits:\n                nvidia.com/gpu: \"4\"\n",
            ),
            "manifest.efa-resources",
            Status::Fail,
            "kvferry-prefill: request 4 without a limit",
        ),
        (
            "EFA request and limit differ",
            with(&dynamo, "TRTLLMPrefillWorker", "efa: \"4\"", "efa: \"2\""),
            "manifest.efa-resources",
            Status::Fail,
            "request 2 and limit 4 differ",
        ),
        (
            "EFA outside of custom in v1alpha1",
            with(
                &dynamo,
                "TRTLLMPrefillWorker",
                "          custom:\n            vpc.amazonaws.com/efa: \"4\"\n          gpu: \"4\"\n        limits",
                "          vpc.amazonaws.com/efa: \"4\"\n        limits",
            ),
            "manifest.efa-resources",
            Status::Fail,
            "it belongs below `custom`",
        ),
        (
            "SHM transfer left on",
            with(
                &dynamo,
                "TRTLLMPrefillWorker",
                "FI_EFA_ENABLE_SHM_TRANSFER\n          value: \"0\"",
                "FI_EFA_ENABLE_SHM_TRANSFER\n          value: \"1\"",
            ),
            "manifest.shm-transfer",
            Status::Fail,
            "FI_EFA_ENABLE_SHM_TRANSFER=1",
        ),
        (
            "SHM transfer not set, which is on",
            with(
                &dynamo,
                "TRTLLMPrefillWorker",
                "- name: FI_EFA_ENABLE_SHM_TRANSFER\n          value: \"0\"",
                "- name: ELSE\n          value: \"0\"",
            ),
            "manifest.shm-transfer",
            Status::Fail,
            "is not set, which means 1",
        ),
        (
            "a variable that ends processes",
            with(
                &dynamo,
                "TRTLLMPrefillWorker",
                "- name: FI_PROVIDER",
                "- name: FI_EFA_MTU_SIZE\n          value: \"1\"\n        - name: FI_PROVIDER",
            ),
            "manifest.variables",
            Status::Fail,
            "FI_EFA_MTU_SIZE ends every process",
        ),
        (
            "a variable that nobody reads",
            with(
                &dynamo,
                "TRTLLMPrefillWorker",
                "- name: FI_PROVIDER",
                "- name: FI_EFA_ENABLE_SHM\n          value: \"0\"\n        - name: FI_PROVIDER",
            ),
            "manifest.variables",
            Status::Warn,
            "FI_EFA_ENABLE_SHM_TRANSFER is meant",
        ),
        (
            "another provider",
            with(&dynamo, "TRTLLMDecodeWorker", "value: efa", "value: tcp"),
            "manifest.efa-environment",
            Status::Fail,
            "FI_PROVIDER=tcp",
        ),
        (
            "another libfabric first",
            with(&dynamo, "TRTLLMDecodeWorker", "value: /opt/amazon/efa/lib:", "value: "),
            "manifest.library-path",
            Status::Warn,
            "LD_LIBRARY_PATH begins with /usr/local/lib",
        ),
        (
            "the SDK is not mounted on arm64",
            with(&dynamo, "TRTLLMDecodeWorker", "mountPath: /opt/amazon/efa", "mountPath: /opt/elsewhere"),
            "manifest.efa-sdk",
            Status::Fail,
            "has no EFA SDK",
        ),
        (
            "an image for amd64 on arm64",
            with(&dynamo, "TRTLLMDecodeWorker", "tensorrtllm-runtime:1.1.1", "tensorrtllm-runtime:1.1.1-efa-amd64"),
            "manifest.efa-sdk",
            Status::Fail,
            "on arm64 nodes",
        ),
        (
            "not privileged",
            with(&dynamo, "TRTLLMDecodeWorker", "privileged: true", "privileged: false"),
            "manifest.privileged",
            Status::Warn,
            "neither privileged",
        ),
        (
            "plugin dir on prefill",
            with(
                &dynamo,
                "TRTLLMPrefillWorker",
                "      envs:\n",
                "      envs:\n        - name: NIXL_PLUGIN_DIR\n          value: /x/tensorrt_llm/libs/nixl/plugins\n",
            ),
            "manifest.plugin-dir",
            Status::Fail,
            "on prefill, which loads the system's NIXL",
        ),
        (
            "no plugin dir on decode of several nodes",
            with(&dynamo, "TRTLLMDecodeWorker", plugins, "- name: ELSE"),
            "manifest.plugin-dir",
            Status::Fail,
            "is not set on decode of several nodes",
        ),
        (
            "plugin dir on decode of one node",
            with(&lws, "kvferry-decode", "size: 2", "size: 1"),
            "manifest.plugin-dir",
            Status::Warn,
            "on decode of one node",
        ),
        (
            "the system's plugins on decode of several nodes",
            with(
                &dynamo,
                plugins,
                "value: /opt/dynamo/venv/lib/python3.12/site-packages/tensorrt_llm/libs/nixl/plugins",
                "value: /opt/nvidia/nvda_nixl/lib/plugins",
            ),
            "manifest.plugin-dir",
            Status::Fail,
            "does not name TensorRT-LLM's own plugins",
        ),
        (
            "a variable that selects nothing",
            with(
                &dynamo,
                "TRTLLMDecodeWorker",
                "      envs:\n",
                "      envs:\n        - name: TRTLLM_USE_UCX_KVCACHE\n          value: \"1\"\n",
            ),
            "manifest.kv-method",
            Status::Warn,
            "does not select UCX",
        ),
        (
            "a claim that the pod does not have",
            with(
                &dynamo,
                "TRTLLMPrefillWorker",
                "claims:\n          - name: compute-domain-channel",
                "claims:\n          - name: channel",
            ),
            "manifest.compute-domain",
            Status::Fail,
            "claims `channel`, and the pod has no such claim",
        ),
        (
            "a template that no domain has",
            with(
                &dynamo,
                "TRTLLMPrefillWorker",
                "resourceClaimTemplateName: kvferry-compute-domain-channel",
                "resourceClaimTemplateName: my-compute-domain-channel",
            ),
            "manifest.compute-domain",
            Status::Fail,
            "is the template of no ComputeDomain here",
        ),
        (
            "prefill without a channel",
            with(
                &with(
                    &dynamo,
                    "TRTLLMPrefillWorker",
                    "        claims:\n          - name: compute-domain-channel\n",
                    "",
                ),
                "TRTLLMPrefillWorker",
                "        resourceClaims:\n          - name: compute-domain-channel\n            resourceClaimTemplateName: kvferry-compute-domain-channel\n",
                "",
            ),
            "manifest.compute-domain",
            Status::Fail,
            "claims no channel of the ComputeDomain",
        ),
        (
            "another namespace",
            with(&dynamo, "ComputeDomain", "metadata:\n", "metadata:\n  namespace: other\n"),
            "manifest.compute-domain",
            Status::Fail,
            "lives in another namespace",
        ),
        (
            "a template of one's own",
            dynamo.clone()
                + "---\napiVersion: resource.k8s.io/v1\nkind: ResourceClaimTemplate\nmetadata:\n  name: kvferry-compute-domain-channel\n",
            "manifest.compute-domain",
            Status::Warn,
            "controller makes this ResourceClaimTemplate",
        ),
        (
            "numNodes of neither",
            with(&dynamo, "ComputeDomain", "numNodes: 0", "numNodes: 7"),
            "manifest.compute-domain",
            Status::Warn,
            "number of all nodes, 3",
        ),
        (
            "NCCL without multi-node NVLink",
            with(
                &dynamo,
                "TRTLLMPrefillWorker",
                "NCCL_MNNVL_ENABLE\n          value: \"1\"",
                "NCCL_MNNVL_ENABLE\n          value: \"0\"",
            ),
            "manifest.nccl",
            Status::Fail,
            "NCCL_MNNVL_ENABLE=0",
        ),
        (
            "GDRCopy by the page's word",
            with(&dynamo, "TRTLLMPrefillWorker", "value: enabled", "value: \"1\""),
            "manifest.gdrcopy",
            Status::Warn,
            "NVIDIA_GDRCOPY=1",
        ),
        (
            "a variable that is a number",
            with(&dynamo, "TRTLLMPrefillWorker", "RDMA\n          value: \"1\"", "RDMA\n          value: 1"),
            "manifest.shape",
            Status::Fail,
            "expected a string",
        ),
    ] {
        let report = judged(&text);
        assert_eq!(wrong(&report), [(id, status)], "{what}: {report:#?}\n{text}");
        let found = check(&report, id);
        let line = found.evidence.iter().find(|line| line.contains(words));
        let line = line.unwrap_or_else(|| panic!("{what}: no {words:?} in {:#?}", found.evidence));
        assert!(line.starts_with("deploy.yaml:"), "{what}: {line}");
        assert!(!found.fix.is_empty(), "{what}");
    }
}

#[test]
fn places_are_those_of_the_values() {
    let text = with(&good(Form::Dynamo, true), "TRTLLMPrefillWorker", "value: enabled", "value: \"1\"");
    let line = 1 + text.lines().position(|line| line.trim() == "value: \"1\"" && line.len() > 8).unwrap();
    let report = judged(&text);
    let evidence = &check(&report, "manifest.gdrcopy").evidence[1];
    let place: Vec<usize> = evidence.split(':').skip(1).take(2).map(|number| number.parse().unwrap()).collect();
    assert!(text.lines().nth(place[0] - 1).unwrap().contains("value: \"1\""), "{evidence}, first {line}");
    assert_eq!(place[1], 18, "{evidence}");
}

/// v1beta1's components, a Deployment in a list as `kubectl get -o yaml` prints it, and EFA that was only meant.
#[test]
fn other_kinds_are_understood() {
    let beta = "apiVersion: nvidia.com/v1beta1\nkind: DynamoGraphDeployment\nmetadata: {name: g}\nspec:\n  components:\n    - name: decode\n      type: worker\n      multinode: {nodeCount: 2}\n      podTemplate:\n        spec:\n          containers:\n            - name: main\n              image: i\n";
    let report = judged(beta);
    assert_eq!(wrong(&report), [("manifest.plugin-dir", Status::Fail)], "{report:#?}");
    let list = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: apps/v1\n  kind: Deployment\n  metadata: {name: w}\n  spec:\n    template:\n      spec:\n        containers:\n        - name: prefill\n          image: x-efa\n          args: [--disaggregation-mode, prefill]\n          env:\n          - {name: FI_PROVIDER, value: efa}\n          - {name: FI_EFA_USE_DEVICE_RDMA, value: \"1\"}\n          - {name: FI_EFA_ENABLE_SHM_TRANSFER, value: \"0\"}\n          - {name: LD_LIBRARY_PATH, value: /opt/amazon/efa/lib}\n";
    let report = judged(list);
    assert_eq!(wrong(&report), [("manifest.efa-resources", Status::Fail)], "{report:#?}");
    let expect: Expectations = "efa=8".parse().unwrap();
    let report = read_manifest(&good(Form::Lws, false), "-", &expect).unwrap();
    assert_eq!(wrong(&report), [("manifest.efa-resources", Status::Fail)], "{report:#?}");
    assert_eq!(wrong(&judged("kind: ConfigMap\n")), [("manifest.shape", Status::Warn)]);
    let error = read_manifest("a: [1\nb: 2\n", "-", &Expectations::default()).unwrap_err();
    assert!(error.at().is_some_and(|at| at.line == 2), "{error}");
}

/// Kinds of others that make pods are judged like those that are generated here; what is not known is said.
#[test]
fn job_sets_and_clique_sets_are_judged_and_what_is_not_known_is_said() {
    let pod = |indent: &str| {
        let lines = [
            "containers:",
            "- name: main",
            "  env: [{name: NIXL_PLUGIN_DIR, value: /a/tensorrt_llm/libs/nixl/plugins}]",
            "  resources: {limits: {vpc.amazonaws.com/efa: 4}}",
        ];
        lines.map(|line| format!("{indent}{line}\n")).concat()
    };
    let job_set = format!(
        "apiVersion: jobset.x-k8s.io/v1alpha2\nkind: JobSet\nmetadata: {{name: kv}}\nspec:\n  replicatedJobs:\n  - name: prefill\n    \
         replicas: 2\n    template:\n      spec:\n        template:\n          spec:\n{}",
        pod("            ")
    );
    let cliques = format!(
        "apiVersion: grove.io/v1alpha1\nkind: PodCliqueSet\nmetadata: {{name: kv}}\nspec:\n  template:\n    cliques:\n    - name: prefill\n      \
         spec:\n        podSpec:\n{}",
        pod("          ")
    );
    let cron = format!(
        "apiVersion: batch/v1\nkind: CronJob\nmetadata: {{name: prefill}}\nspec:\n  jobTemplate:\n    spec:\n      template:\n        spec:\n{}",
        pod("          ")
    );
    for text in [&job_set, &cliques, &cron] {
        let report = judged(text);
        let said = format!("{:?}", check(&report, "manifest.plugin-dir").evidence);
        assert!(said.contains("on prefill, which loads the system's NIXL"), "{text}\n{said}");
        assert!(
            check(&report, "manifest.efa-resources").evidence.iter().any(|line| line.contains("without a request"))
        );
    }
    let foreign = judged(&job_set.replace("kind: JobSet", "kind: Rollout"));
    let shape = check(&foreign, "manifest.shape");
    assert_eq!(shape.status, Status::Warn);
    assert!(shape.evidence[1].contains("Rollout has containers that are not looked at"), "{shape:?}");
    // Beside workers that are known, too; what has no containers is nobody's concern.
    let mixed = good(Form::Lws, false)
        + "---\nkind: Rollout\nspec: {containers: [{name: a}]}\n---\nkind: ConfigMap\ndata: {a: b}\n";
    let report = judged(&mixed);
    assert_eq!(wrong(&report), [("manifest.shape", Status::Warn)]);
    assert_eq!(check(&report, "manifest.shape").evidence.len(), 2);
}

/// Whoever forgets a claim is a node of the domain all the same.
#[test]
fn the_nodes_of_a_domain_are_those_of_prefill_and_decode() {
    let dynamo = with(&good(Form::Dynamo, true), "ComputeDomain", "numNodes: 0", "numNodes: 3");
    let old = format!("{:?}", check(&judged(&dynamo), "manifest.compute-domain").evidence);
    assert!(old.contains("numNodes: 3 is deprecated"), "{old}");
    let claims = "        claims:\n          - name: compute-domain-channel\n";
    let forgotten = format!(
        "{:?}",
        check(&judged(&with(&dynamo, "TRTLLMDecodeWorker", claims, "")), "manifest.compute-domain").evidence
    );
    assert!(forgotten.contains("numNodes: 3 is deprecated"), "{forgotten}");
}

/// A side that forgot the claim is in the domain all the same: what else it lacks is said, too.
#[test]
fn nccls_variables_are_missed_on_a_side_that_claims_nothing() {
    let text = "\
kind: ComputeDomain
metadata: {name: d}
spec: {channel: {resourceClaimTemplate: {name: c}}}
---
kind: DynamoGraphDeployment
metadata: {name: w}
spec: {services: {Prefill: {subComponentType: prefill}}}
";
    let report = judged(text);
    let nccl = check(&report, "manifest.nccl");
    assert_eq!(nccl.status, Status::Warn, "{report:#?}");
    assert!(nccl.evidence.iter().any(|line| line.contains("w/Prefill: NCCL_CUMEM_ENABLE is not set")), "{nccl:?}");
    let elsewhere = text.split("---\n").nth(1).unwrap();
    assert_eq!(check(&judged(elsewhere), "manifest.nccl").status, Status::Ok);
}
