//! What of a document makes pods, whichever kind it is.

use std::collections::BTreeMap;
use std::rc::Rc;

use kvferry_yaml::{Node, NodeValue};

use crate::question::Role;

/// Pods of one kind.
#[derive(Debug)]
pub(crate) struct Workload {
    pub(crate) name: String,
    pub(crate) place: Rc<Node>,
    pub(crate) namespace: Option<String>,
    pub(crate) role: Option<Role>,
    /// Nodes of a group, where the kind says so.
    pub(crate) nodes: Option<u64>,
    pub(crate) replicas: u64,
    env: Vec<Variable>,
    /// What a deployment gives to all of its workloads; their own count more.
    shared: Rc<BTreeMap<String, Variable>>,
    pub(crate) image: Option<Rc<Node>>,
    pub(crate) security: Option<Rc<Node>>,
    pub(crate) mounts: Vec<Rc<Node>>,
    /// Requests, limits and claims.
    pub(crate) resources: Option<Rc<Node>>,
    /// The pod: volumes, claims, selector.
    pub(crate) pod: Option<Rc<Node>>,
    /// Extended resources stand below `custom`.
    pub(crate) dynamo: bool,
}

/// A variable with its value's place.
#[derive(Clone, Debug)]
pub(crate) struct Variable {
    pub(crate) name: String,
    /// `None` when it comes from elsewhere.
    pub(crate) value: Option<String>,
    pub(crate) place: Rc<Node>,
}

/// A ComputeDomain.
#[derive(Debug)]
pub(crate) struct Domain {
    pub(crate) name: String,
    pub(crate) place: Rc<Node>,
    pub(crate) namespace: Option<String>,
    /// What its claim template is called.
    pub(crate) template: Option<Rc<Node>>,
    pub(crate) nodes: Option<Rc<Node>>,
}

impl Domain {
    pub(crate) fn of(document: &Rc<Node>) -> Option<Domain> {
        if word(document, "kind") != Some("ComputeDomain") {
            return None;
        }
        Some(Domain {
            name: name(document),
            place: Rc::clone(document),
            namespace: namespace(document),
            template: within(document, &["spec", "channel", "resourceClaimTemplate", "name"]),
            nodes: within(document, &["spec", "numNodes"]),
        })
    }
}

/// The name of a claim template that somebody wrote themselves.
pub(crate) fn claim_template(document: &Rc<Node>) -> Option<Rc<Node>> {
    (word(document, "kind") == Some("ResourceClaimTemplate")).then(|| within(document, &["metadata", "name"]))?
}

impl Workload {
    /// The names of all variables, its own and those that it shares.
    pub(crate) fn variables(&self) -> impl Iterator<Item = &Variable> {
        self.env.iter().chain(self.shared.values())
    }

    pub(crate) fn variable(&self, name: &str) -> Option<&Variable> {
        // The last one wins.
        self.env.iter().rev().find(|variable| variable.name == name).or_else(|| self.shared.get(name))
    }

    /// An amount in requests or limits, and where it stands.
    pub(crate) fn amount(&self, list: &str, resource: &str) -> Option<Rc<Node>> {
        let list = within(self.resources.as_ref()?, &[list])?;
        let list = if self.dynamo { within(&list, &["custom"])? } else { list };
        within(&list, &[resource])
    }
}

/// All workloads of a document.
pub(crate) fn of(document: &Rc<Node>) -> Vec<Workload> {
    let spec = || within(document, &["spec"]);
    match word(document, "kind") {
        Some("DynamoGraphDeployment") => dynamo(document),
        Some("Deployment" | "StatefulSet" | "DaemonSet" | "Job" | "ReplicaSet") => {
            let template = within(document, &["spec", "template"]);
            template
                .into_iter()
                .flat_map(|template| pods(document, &template, None, number(spec(), "replicas")))
                .collect()
        }
        Some("LeaderWorkerSet") => {
            let group = within(document, &["spec", "leaderWorkerTemplate"]);
            let size = Some(number(group.clone(), "size"));
            let templates =
                ["leaderTemplate", "workerTemplate"].into_iter().filter_map(|key| within(group.as_ref()?, &[key]));
            templates.flat_map(|template| pods(document, &template, size, number(spec(), "replicas"))).collect()
        }
        Some("CronJob") => {
            let template = within(document, &["spec", "jobTemplate", "spec", "template"]);
            template.into_iter().flat_map(|template| pods(document, &template, None, 1)).collect()
        }
        Some("Pod") => pods(document, document, None, 1),
        Some("JobSet") => parts(document, &["spec"], "replicatedJobs", &["template", "spec", "template", "spec"]),
        Some("PodCliqueSet") => parts(document, &["spec", "template"], "cliques", &["spec", "podSpec"]),
        _ => Vec::new(),
    }
}

/// Kinds whose pods are looked at.
pub(crate) const KINDS: &str = "DynamoGraphDeployment, LeaderWorkerSet, StatefulSet, Deployment, DaemonSet, ReplicaSet, Job, CronJob, JobSet, \
                                PodCliqueSet or Pod";

/// Whether there are containers somewhere in a document.
pub(crate) fn has_containers(document: &Rc<Node>) -> bool {
    // Anchors may repeat a part without end.
    const NODES_MAX: usize = 100_000;
    let mut open = vec![Rc::clone(document)];
    for _ in 0..NODES_MAX {
        let Some(node) = open.pop() else { return false };
        match &node.value {
            NodeValue::Mapping(entries) => {
                if entries.iter().any(|(key, value)| {
                    key.text() == Some("containers") && matches!(value.value, NodeValue::Sequence(_))
                }) {
                    return true;
                }
                open.extend(entries.iter().map(|(_, value)| Rc::clone(value)));
            }
            NodeValue::Sequence(items) => open.extend(items.iter().cloned()),
            _ => {}
        }
    }
    false
}

/// A list of named parts, each with a pod and a number of them.
fn parts(document: &Rc<Node>, above: &[&str], list: &str, pod: &[&str]) -> Vec<Workload> {
    let above = within(document, above);
    let parts = above.iter().flat_map(|above| items(above, list));
    let of = |part: &Rc<Node>| {
        let named = word(part, "name").unwrap_or_default().to_owned();
        let count = number(Some(Rc::clone(part)), "replicas");
        let made = within(part, pod).into_iter().flat_map(move |pod| containers(document, &pod, None, count));
        let part = Rc::clone(part);
        made.map(move |made| Workload {
            role: role(&[&named], &made.place, &part).or(made.role),
            name: format!("{}/{named}", made.name),
            ..made
        })
        .collect::<Vec<_>>()
    };
    parts.flat_map(of).collect()
}

/// The containers of a pod template that ask for devices or speak of transfers; a pod without any is no worker.
fn pods(document: &Rc<Node>, template: &Rc<Node>, nodes: Option<u64>, replicas: u64) -> Vec<Workload> {
    let pod = within(template, &["spec"]);
    pod.iter().flat_map(|pod| containers(document, pod, nodes, replicas)).collect()
}

fn containers(document: &Rc<Node>, pod: &Rc<Node>, nodes: Option<u64>, replicas: u64) -> Vec<Workload> {
    let containers: Vec<Rc<Node>> = items(pod, "containers").cloned().collect();
    let single = containers.len() == 1;
    let workload = |container: &Rc<Node>| {
        let inner = word(container, "name").unwrap_or("container");
        let outer = name(document);
        Workload {
            name: if single { outer.clone() } else { format!("{outer}/{inner}") },
            place: Rc::clone(container),
            namespace: namespace(document),
            role: role(&[&outer, inner], container, document),
            nodes,
            replicas,
            env: variables(container, "env"),
            shared: Rc::default(),
            image: within(container, &["image"]),
            security: within(container, &["securityContext"]),
            mounts: items(container, "volumeMounts").cloned().collect(),
            resources: within(container, &["resources"]),
            pod: Some(Rc::clone(pod)),
            dynamo: false,
        }
    };
    containers.iter().map(workload).collect()
}

/// Dynamo's services: v1alpha1 by name, v1beta1 as a list of components with pod templates.
fn dynamo(document: &Rc<Node>) -> Vec<Workload> {
    let mut workloads = Vec::new();
    for component in within(document, &["spec"]).iter().flat_map(|spec| items(spec, "components")) {
        let nodes = Some(number(within(component, &["multinode"]), "nodeCount"));
        let template = within(component, &["podTemplate"]);
        let made = template
            .iter()
            .flat_map(|template| pods(document, template, nodes, number(Some(Rc::clone(component)), "replicas")));
        let named = word(component, "name").unwrap_or_default();
        let kind = word(component, "type").unwrap_or_default();
        workloads.extend(made.map(|made| Workload {
            role: role(&[kind, named], &made.place, component).or(made.role),
            name: format!("{}/{named}", made.name),
            ..made
        }));
    }
    let shared = within(document, &["spec"]).map(|spec| variables(&spec, "envs")).unwrap_or_default();
    let shared =
        Rc::new(shared.into_iter().map(|variable| (variable.name.clone(), variable)).collect::<BTreeMap<_, _>>());
    let Some(services) = within(document, &["spec", "services"]) else { return workloads };
    let NodeValue::Mapping(entries) = &services.value else { return workloads };
    for (key, service) in entries {
        let named = key.text().unwrap_or("service");
        let pod = within(service, &["extraPodSpec"]);
        let main = pod.as_ref().and_then(|pod| within(pod, &["mainContainer"]));
        let of_main = |key: &str| within(main.as_ref()?, &[key]);
        let mut env = variables(service, "envs");
        env.extend(main.iter().flat_map(|main| variables(main, "env")));
        workloads.push(Workload {
            name: format!("{}/{named}", name(document)),
            place: Rc::clone(key),
            namespace: namespace(document),
            role: role(
                &[word(service, "subComponentType").unwrap_or_default(), named],
                main.as_ref().unwrap_or(service),
                service,
            ),
            nodes: Some(number(within(service, &["multinode"]), "nodeCount")),
            replicas: number(Some(Rc::clone(service)), "replicas"),
            env,
            shared: Rc::clone(&shared),
            image: of_main("image"),
            security: of_main("securityContext"),
            mounts: main.iter().flat_map(|main| items(main, "volumeMounts").cloned().collect::<Vec<_>>()).collect(),
            resources: within(service, &["resources"]),
            pod,
            dynamo: true,
        });
    }
    workloads
}

/// From its names, the labels, or what it is started with.
fn role(names: &[&str], container: &Node, object: &Rc<Node>) -> Option<Role> {
    let label = within(object, &["metadata", "labels", "app.kubernetes.io/component"]);
    let label = label.as_ref().and_then(|label| label.text()).unwrap_or_default();
    let words = ["command", "args"].into_iter().flat_map(|list| items(container, list)).filter_map(|word| word.text());
    let mode = words.skip_while(|word| !word.contains("--disaggregation-mode")).take(2).collect::<Vec<_>>().join(" ");
    let all: Vec<String> = names.iter().chain([&label, &mode.as_str()]).map(|name| name.to_lowercase()).collect();
    let has = |word: &str| all.iter().any(|name| name.contains(word));
    match (has("prefill"), has("decode")) {
        (true, false) => Some(Role::Prefill),
        (false, true) => Some(Role::Decode),
        _ => None,
    }
}

fn variables(node: &Node, key: &str) -> Vec<Variable> {
    let variable = |entry: &Rc<Node>| {
        let name = word(entry, "name")?.to_owned();
        let value = within(entry, &["value"]);
        let place = value.clone().unwrap_or_else(|| Rc::clone(entry));
        let elsewhere = entry.entry("valueFrom").is_some();
        let text = value.as_ref().and_then(|value| value.text()).map(str::to_owned);
        Some(Variable { name, value: text.or_else(|| (!elsewhere).then(String::new)), place })
    };
    items(node, key).filter_map(variable).collect()
}

/// The values of a list, if it is one.
pub(crate) fn items<'a>(node: &'a Node, key: &str) -> std::slice::Iter<'a, Rc<Node>> {
    match node.entry(key).map(|(_, list)| &list.value) {
        Some(NodeValue::Sequence(items)) => items.iter(),
        _ => [].iter(),
    }
}

/// What stands below these keys.
pub(crate) fn within(node: &Rc<Node>, keys: &[&str]) -> Option<Rc<Node>> {
    keys.iter().try_fold(Rc::clone(node), |node, key| node.entry(key).map(|(_, value)| Rc::clone(value)))
}

pub(crate) fn word<'a>(node: &'a Node, key: &str) -> Option<&'a str> {
    node.entry(key).and_then(|(_, value)| value.text())
}

/// A count; 1 when it is not there or no number.
fn number(node: Option<Rc<Node>>, key: &str) -> u64 {
    node.and_then(|node| word(&node, key)?.parse().ok()).unwrap_or(1)
}

fn name(document: &Rc<Node>) -> String {
    let named = within(document, &["metadata", "name"]);
    named.and_then(|name| name.text().map(str::to_owned)).unwrap_or_else(|| "unnamed".to_owned())
}

fn namespace(document: &Rc<Node>) -> Option<String> {
    within(document, &["metadata", "namespace"])?.text().map(str::to_owned)
}
