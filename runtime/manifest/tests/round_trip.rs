//! What is generated comes back as it was; what others wrote loses nothing; settings that make no sense are refused.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "this is test code")]

use kvferry_manifest::{Form, Library, Manifest, Settings, Side, generate, text};
use kvferry_yaml::{Value, parse_all, read};
use proptest::prelude::*;

fn settings() -> impl Strategy<Value = Settings> {
    let form = prop_oneof![Just(Form::Dynamo), Just(Form::Lws), Just(Form::Statefulset)];
    let side = (1u32..4, 1u32..4).prop_map(|(replicas, nodes)| Side {
        replicas,
        nodes,
        args: vec!["--flag".to_owned(), "12".to_owned(), "on".to_owned()],
        ..Side::default()
    });
    let chosen = (form, any::<[bool; 4]>(), 0u32..33, side.clone(), side);
    chosen.prop_map(|(form, [gb200, fabric, scheduler, named], efa, prefill, decode)| Settings {
        form,
        gb200,
        efa,
        library: if fabric { Library::Libfabric } else { Library::Ucx },
        scheduler_image: scheduler.then(|| "registry/kvferry:1".to_owned()),
        namespace: named.then(|| "inference".to_owned()),
        prefill,
        decode,
        ..Settings::default()
    })
}

proptest! {
    #[test]
    fn what_is_generated_comes_back_typed_and_whole(settings in settings()) {
        let documents = generate(&settings).unwrap();
        let written = text(&documents).unwrap();
        let nodes = parse_all(&written).unwrap();
        prop_assert_eq!(nodes.len(), documents.len());
        for (node, document) in nodes.iter().zip(&documents) {
            let manifest = Manifest::read(node).unwrap();
            prop_assert!(!matches!(manifest, Manifest::Other(_)), "every kind is typed");
            prop_assert_eq!(&manifest, &document.manifest, "of\n{}", &written);
        }
        // Every comment's entry is there: none is dropped.
        for comment in documents.iter().flat_map(|document| &document.comments) {
            let first: Vec<&str> = comment.text.split_whitespace().take(3).collect();
            prop_assert!(written.contains(&format!("# {}", first.join(" "))), "{} is not written", comment.path);
        }
    }
}

/// Sorted, so that order does not matter.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Map(entries) => {
            let mut entries: Vec<_> = entries.iter().map(|(key, value)| (key.clone(), sorted(value))).collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Map(entries)
        }
        Value::List(items) => Value::List(items.iter().map(sorted).collect()),
        other => other.clone(),
    }
}

#[test]
fn nothing_of_somebody_elses_manifest_is_lost() {
    let theirs = "
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
metadata: {name: w, annotations: {a: b}, finalizers: [x], generation: 3}
spec:
  replicas: 2
  rolloutStrategy: {type: RollingUpdate, rollingUpdateConfiguration: {maxUnavailable: 1}}
  leaderWorkerTemplate:
    size: 2
    restartPolicy: RecreateGroupOnPodRestart
    workerTemplate:
      spec:
        hostIPC: true
        tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
        terminationGracePeriodSeconds: 1.5
        containers:
          - name: main
            image: i
            env:
              - name: A
                valueFrom: {fieldRef: {fieldPath: status.podIP}}
              - {name: B, value: \"1\", note: kept}
            resources: {limits: {cpu: 8, memory: 64Gi, vpc.amazonaws.com/efa: 4}, claims: [{name: c, request: r}]}
            securityContext: {capabilities: {add: [IPC_LOCK]}, runAsUser: 0}
            ports: [{containerPort: 80, protocol: TCP}]
            livenessProbe: {tcpSocket: {port: 80}}
        volumes:
          - {name: shm, emptyDir: {medium: Memory, sizeLimit: 16Gi}}
          - {name: e, emptyDir: {}}
          - {name: conf, configMap: {name: c, items: [{key: k, path: p}]}}
status: {replicas: 2}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: c}
data: {k: \"cache_transceiver_config:\\n  backend: DEFAULT\\n\"}
";
    let nodes = parse_all(theirs).unwrap();
    for node in &nodes {
        let manifest = Manifest::read(node).unwrap();
        assert_eq!(sorted(&manifest.value().unwrap()), sorted(&read::<Value>(node).unwrap()));
    }
    assert!(matches!(Manifest::read(&nodes[1]).unwrap(), Manifest::Other(_)));
}

#[test]
fn a_variable_that_is_a_number_is_refused_where_it_stands() {
    let wrong = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec:\n  containers:\n    - name: c\n      env:\n        - name: A\n          value: 1\n";
    let error = Manifest::read(&parse_all(wrong).unwrap()[0]).unwrap_err();
    assert_eq!((error.at.line, error.at.column), (9, 18), "{error}");
}

#[test]
fn settings_are_read_from_toml_and_those_that_make_no_sense_say_why() {
    let toml = "name = \"a\"\ngpus = 8\ngb200 = true\nform = \"lws\"\n[decode]\nnodes = 2\nargs = [\"x\"]\n";
    let settings = Settings::parse(toml).unwrap();
    assert_eq!((settings.gpus, settings.gb200, settings.form, settings.decode.nodes), (8, true, Form::Lws, 2));
    for (toml, words) in [
        ("gpu = 8\n", ["line 1", "unknown field `gpu`"]),
        ("gpus = \"8\"\n", ["line 1", "invalid type"]),
        ("gpus = \n", ["line 1", "--help"]),
    ] {
        let error = Settings::parse(toml).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "no {word:?} in {error}");
        }
    }
    for (toml, words) in [
        ("name = \"A b\"\n", ["name = A b", "lower-case"]),
        ("efa = 20000\n", ["efa = 20000", "0 to 10000"]),
        ("[decode]\nnodes = 0\n", ["decode.nodes = 0", "1 to 10000"]),
        ("gb200 = true\narchitecture = \"amd64\"\n", ["architecture = amd64", "arm64"]),
        ("compute-domain-nodes = 2\n", ["compute-domain-nodes = 2", "gb200"]),
        ("gb200 = true\ncompute-domain-nodes = 3\n", ["2 nodes of workers", "all nodes"]),
        ("gb200 = true\nimage = \"x:1-efa-amd64\"\n", ["image = x:1-efa-amd64", "mounted from the host"]),
    ] {
        let error = generate(&Settings::parse(toml).unwrap()).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "no {word:?} in {error}");
        }
    }
}
