//! The documents of a deployment.

use std::collections::BTreeMap;

use kvferry_yaml::{Comment, Value, ValueError, write};
use thiserror::Error;

use crate::crds::{
    Channel, ClaimTemplate, ComputeDomainSpec, DynamoService, DynamoSpec, Endpoint, LeaderWorkerSetSpec,
    LeaderWorkerTemplate, MainPodSpec, Multinode, ServiceMonitorSpec,
};
use crate::kubernetes::{
    Container, DeploymentSpec, Metadata, PodSpec, PodTemplate, Port, Selector, ServicePort, ServiceSpec,
    StatefulSetSpec,
};
use crate::manifest::{Manifest, Object};
use crate::pods::{
    Role, Variable, channel, container, domain, dynamo_resources, environment, node_selector, resource_claims,
    resources, volumes,
};
use crate::settings::{Form, Settings, SettingsError};

const NAME_LABEL: &str = "app.kubernetes.io/name";
const PART_LABEL: &str = "app.kubernetes.io/component";
const CONTROL_PORT: i64 = 7480;
const METRICS_PORT: i64 = 9480;

/// Why there are no documents.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The settings make no sense.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// A document has no YAML form.
    #[error(transparent)]
    Value(#[from] ValueError),
}

/// A manifest, and what is said in it.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// The manifest.
    pub manifest: Manifest,
    /// Why it is as it is.
    pub comments: Vec<Comment>,
}

/// Makes all documents of a deployment, in the order in which they are applied.
pub fn generate(settings: &Settings) -> Result<Vec<Document>, GenerateError> {
    settings.check()?;
    let mut documents = Vec::new();
    if settings.gb200 {
        documents.push(compute_domain(settings));
    }
    match settings.form {
        Form::Dynamo => documents.push(dynamo(settings)),
        Form::Lws => documents.extend(Role::ALL.map(|role| leader_worker_set(settings, role))),
        Form::Statefulset => {
            documents.extend(
                Role::ALL.into_iter().flat_map(|role| [headless(settings, role), stateful_set(settings, role)]),
            );
        }
    }
    if let Some(image) = &settings.scheduler_image {
        documents.extend(scheduler(settings, image));
    }
    Ok(documents)
}

/// All documents as one YAML text.
pub fn text(documents: &[Document]) -> Result<String, GenerateError> {
    let mut text = String::new();
    for document in documents {
        text.push_str("---\n");
        text.push_str(&write(&document.manifest.value()?, &document.comments));
    }
    Ok(text)
}

fn comment(path: impl Into<String>, text: impl Into<String>) -> Comment {
    Comment { path: path.into(), text: text.into() }
}

fn labels(settings: &Settings, part: &str) -> BTreeMap<String, String> {
    let label = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    BTreeMap::from([label(NAME_LABEL, &settings.name), label(PART_LABEL, part)])
}

fn object<S>(settings: &Settings, group: &str, kind: &str, name: String, part: Option<&str>, spec: S) -> Object<S> {
    let metadata = Metadata {
        name: Some(name),
        namespace: settings.namespace.clone(),
        labels: part.map(|part| labels(settings, part)),
        ..Metadata::default()
    };
    Object { api_version: group.to_owned(), kind: kind.to_owned(), metadata, spec, extra: BTreeMap::new() }
}

fn compute_domain(settings: &Settings) -> Document {
    let template = ClaimTemplate { name: channel(settings), ..ClaimTemplate::default() };
    let spec = ComputeDomainSpec {
        num_nodes: Some(settings.compute_domain_nodes.into()),
        channel: Some(Channel { resource_claim_template: Some(template), ..Channel::default() }),
        ..ComputeDomainSpec::default()
    };
    let nodes = match settings.compute_domain_nodes {
        0 => {
            "Deprecated, and 0 where the driver's gate IMEXDaemonsWithDNSNames is on (its default). Dynamo's page sets the number of nodes of \
             prefill and decode: that is right only where the gate is off."
        }
        _ => "All nodes of prefill and decode: for drivers whose gate IMEXDaemonsWithDNSNames is off.",
    };
    let object = object(settings, "resource.nvidia.com/v1beta1", "ComputeDomain", domain(settings), None, spec);
    let comments = vec![
        comment("/spec/numNodes", nodes),
        comment(
            "/spec/channel/resourceClaimTemplate",
            "The controller makes this ResourceClaimTemplate, in this namespace; one of your own would be in its way.",
        ),
    ];
    Document { manifest: Manifest::ComputeDomain(object), comments }
}

/// Comments of the variables, below the place of their list.
fn why(variables: &[Variable], path: &str) -> Vec<Comment> {
    let numbered = variables.iter().enumerate();
    numbered.filter_map(|(index, variable)| Some(comment(format!("{path}/{index}"), variable.why?))).collect()
}

fn privileged(settings: &Settings, path: &str) -> Option<Comment> {
    let text = "EFA on Dynamo's images needs a privileged container today; where the device plugin gives the devices, try IPC_LOCK instead.";
    (settings.efa > 0).then(|| comment(format!("{path}/securityContext"), text))
}

fn sdk(settings: &Settings, path: &str) -> Option<Comment> {
    let text = "No image for arm64 has the EFA SDK: it is the host's.";
    settings.mounts_sdk().then(|| comment(format!("{path}/volumes"), text))
}

fn dynamo(settings: &Settings) -> Document {
    let mut services = BTreeMap::new();
    let mut comments = Vec::new();
    let main = Container { image: Some(settings.workers_image().to_owned()), ..Container::default() };
    let frontend = DynamoService {
        component_type: Some("frontend".to_owned()),
        replicas: Some(1),
        extra_pod_spec: Some(MainPodSpec {
            node_selector: node_selector(settings),
            main_container: Some(main),
            ..MainPodSpec::default()
        }),
        ..DynamoService::default()
    };
    services.insert("Frontend".to_owned(), frontend);
    for role in Role::ALL {
        let side = role.of(settings);
        let name = match role {
            Role::Prefill => "TRTLLMPrefillWorker",
            Role::Decode => "TRTLLMDecodeWorker",
        };
        let variables = environment(settings, role);
        let node_count = i64::from(side.nodes);
        let service = DynamoService {
            component_type: Some("worker".to_owned()),
            sub_component_type: Some(role.name().to_owned()),
            replicas: Some(side.replicas.into()),
            multinode: (side.nodes > 1).then(|| Multinode { node_count, ..Multinode::default() }),
            resources: Some(dynamo_resources(settings)),
            envs: Some(variables.iter().map(Variable::entry).collect::<Vec<_>>()).filter(|envs| !envs.is_empty()),
            extra_pod_spec: Some(MainPodSpec {
                node_selector: node_selector(settings),
                volumes: volumes(settings, false),
                resource_claims: resource_claims(settings),
                main_container: Some(container(settings, role, None, false)),
                ..MainPodSpec::default()
            }),
            ..DynamoService::default()
        };
        services.insert(name.to_owned(), service);
        let path = format!("/spec/services/{name}");
        comments.extend(why(&variables, &format!("{path}/envs")));
        comments.extend(privileged(settings, &format!("{path}/extraPodSpec/mainContainer")));
        comments.extend(sdk(settings, &format!("{path}/extraPodSpec")));
        if settings.efa > 0 {
            let text = "Dynamo's v1alpha1 knows cpu, memory, gpu and gpuType; everything else belongs here, as text, and elsewhere is dropped.";
            comments.push(comment(format!("{path}/resources/requests/custom"), text));
        }
    }
    let spec =
        DynamoSpec { backend_framework: Some("trtllm".to_owned()), services: Some(services), ..DynamoSpec::default() };
    let object = object(settings, "nvidia.com/v1alpha1", "DynamoGraphDeployment", settings.name.clone(), None, spec);
    Document { manifest: Manifest::Dynamo(object), comments }
}

fn template(settings: &Settings, role: Role) -> PodTemplate {
    let mut main = container(settings, role, Some(resources(settings)), true);
    main.name = Some("main".to_owned());
    let spec = PodSpec {
        node_selector: node_selector(settings),
        containers: Some(vec![main]),
        volumes: volumes(settings, true),
        resource_claims: resource_claims(settings),
        ..PodSpec::default()
    };
    let metadata = Metadata { labels: Some(labels(settings, role.name())), ..Metadata::default() };
    PodTemplate { metadata: Some(metadata), spec: Some(spec), ..PodTemplate::default() }
}

fn pod_comments(settings: &Settings, role: Role, path: &str) -> Vec<Comment> {
    let main = format!("{path}/spec/containers/0");
    let mut comments = why(&environment(settings, role), &format!("{main}/env"));
    comments.extend(privileged(settings, &main));
    comments.extend(sdk(settings, &format!("{path}/spec")));
    comments
}

fn leader_worker_set(settings: &Settings, role: Role) -> Document {
    let side = role.of(settings);
    let spec = LeaderWorkerSetSpec {
        replicas: Some(side.replicas.into()),
        leader_worker_template: Some(LeaderWorkerTemplate {
            size: Some(side.nodes.into()),
            worker_template: Some(template(settings, role)),
            ..LeaderWorkerTemplate::default()
        }),
        ..LeaderWorkerSetSpec::default()
    };
    let name = format!("{}-{}", settings.name, role.name());
    let object = object(settings, "leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", name, Some(role.name()), spec);
    let comments = pod_comments(settings, role, "/spec/leaderWorkerTemplate/workerTemplate");
    Document { manifest: Manifest::LeaderWorkerSet(Box::new(object)), comments }
}

fn headless(settings: &Settings, role: Role) -> Document {
    let spec = ServiceSpec {
        cluster_ip: Some("None".to_owned()),
        publish_not_ready_addresses: Some(true),
        selector: Some(labels(settings, role.name())),
        ..ServiceSpec::default()
    };
    let name = format!("{}-{}", settings.name, role.name());
    let object = object(settings, "v1", "Service", name, Some(role.name()), spec);
    let text = "Ranks find each other before they are ready.";
    Document { manifest: Manifest::Service(object), comments: vec![comment("/spec/publishNotReadyAddresses", text)] }
}

fn stateful_set(settings: &Settings, role: Role) -> Document {
    let side = role.of(settings);
    let name = format!("{}-{}", settings.name, role.name());
    let spec = StatefulSetSpec {
        service_name: Some(name.clone()),
        replicas: Some((side.replicas * side.nodes).into()),
        pod_management_policy: Some("Parallel".to_owned()),
        selector: Some(Selector { match_labels: Some(labels(settings, role.name())), ..Selector::default() }),
        template: Some(template(settings, role)),
        ..StatefulSetSpec::default()
    };
    let object = object(settings, "apps/v1", "StatefulSet", name, Some(role.name()), spec);
    let mut comments = pod_comments(settings, role, "/spec/template");
    if side.nodes > 1 {
        let text = format!(
            "{} groups of {} nodes; a pod's number divided by {} is its group.",
            side.replicas, side.nodes, side.nodes
        );
        comments.push(comment("/spec/replicas", text));
    }
    comments.push(comment("/spec/podManagementPolicy", "A group starts only when all of its ranks are there."));
    Document { manifest: Manifest::StatefulSet(object), comments }
}

/// kvferry's scheduler: one, for pairings are decided in one place; it may start again and adopts what stands.
fn scheduler(settings: &Settings, image: &str) -> Vec<Document> {
    const PART: &str = "scheduler";
    let name = format!("{}-{PART}", settings.name);
    let port = |name: &str, number| Port {
        name: Some(name.to_owned()),
        container_port: Some(Value::Integer(number)),
        ..Port::default()
    };
    let probe = |path: &str, failures| {
        let get = Value::Map(vec![("path".to_owned(), path.into()), ("port".to_owned(), "metrics".into())]);
        Value::Map(vec![
            ("httpGet".to_owned(), get),
            ("periodSeconds".to_owned(), Value::Integer(5)),
            ("failureThreshold".to_owned(), Value::Integer(failures)),
        ])
    };
    let main = Container {
        name: Some(PART.to_owned()),
        image: Some(image.to_owned()),
        args: Some(vec![format!("--listen=0.0.0.0:{CONTROL_PORT}"), format!("--metrics=0.0.0.0:{METRICS_PORT}")]),
        ports: Some(vec![port("control", CONTROL_PORT), port("metrics", METRICS_PORT)]),
        liveness_probe: Some(probe("/healthz", 6)),
        readiness_probe: Some(probe("/readyz", 1)),
        ..Container::default()
    };
    let matched = labels(settings, PART);
    let template = PodTemplate {
        metadata: Some(Metadata { labels: Some(matched.clone()), ..Metadata::default() }),
        spec: Some(PodSpec { containers: Some(vec![main]), ..PodSpec::default() }),
        ..PodTemplate::default()
    };
    let selector = Selector { match_labels: Some(matched.clone()), ..Selector::default() };
    let deployment = DeploymentSpec {
        replicas: Some(1),
        selector: Some(selector.clone()),
        template: Some(template),
        extra: BTreeMap::from([("strategy".to_owned(), Value::Map(vec![("type".to_owned(), "Recreate".into())]))]),
    };
    let service_port = |name: &str, number| ServicePort {
        name: Some(name.to_owned()),
        port: number,
        target_port: Some(name.into()),
        ..ServicePort::default()
    };
    let service = ServiceSpec {
        selector: Some(matched),
        ports: Some(vec![service_port("control", CONTROL_PORT), service_port("metrics", METRICS_PORT)]),
        ..ServiceSpec::default()
    };
    let endpoint = Endpoint {
        port: Some("metrics".to_owned()),
        path: Some("/metrics".to_owned()),
        interval: Some("15s".to_owned()),
        ..Endpoint::default()
    };
    let monitor = ServiceMonitorSpec {
        selector: Some(selector),
        endpoints: Some(vec![endpoint]),
        ..ServiceMonitorSpec::default()
    };
    let why =
        "One, and never two at a time: pairings are decided in one place. It may start again; what stands is adopted.";
    let image_why = "A program that embeds kvferry's SchedulerNode; it takes these arguments and serves /metrics, /healthz and /readyz.";
    vec![
        Document {
            manifest: Manifest::Deployment(object(
                settings,
                "apps/v1",
                "Deployment",
                name.clone(),
                Some(PART),
                deployment,
            )),
            comments: vec![
                comment("/spec/replicas", why),
                comment("/spec/template/spec/containers/0/image", image_why),
            ],
        },
        Document {
            manifest: Manifest::Service(object(settings, "v1", "Service", name.clone(), Some(PART), service)),
            comments: Vec::new(),
        },
        Document {
            manifest: Manifest::ServiceMonitor(object(
                settings,
                "monitoring.coreos.com/v1",
                "ServiceMonitor",
                name,
                Some(PART),
                monitor,
            )),
            comments: Vec::new(),
        },
    ]
}
