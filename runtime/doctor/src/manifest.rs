//! Kubernetes manifests, judged: the mistakes that Dynamo's page on KV transfer warns of, and those that it makes.

mod checks;
mod workload;

use std::rc::Rc;

use kvferry_manifest::Manifest;
use kvferry_yaml::{Node, YamlError, parse_all};

use crate::expectations::Expectations;
use crate::report::{Check, Report};
use workload::{Domain, Workload};

/// Bytes of manifests that are read at most.
pub const MANIFEST_BYTES_MAX: usize = kvferry_yaml::FILE_BYTES_MAX;

/// What the documents say, each with its place.
pub(crate) struct Subject<'a> {
    /// As the caller named the file.
    pub(crate) file: &'a str,
    pub(crate) expect: &'a Expectations,
    pub(crate) workloads: Vec<Workload>,
    pub(crate) domains: Vec<Domain>,
    /// Names of the claim templates that are among the documents.
    pub(crate) templates: Vec<Rc<Node>>,
}

impl Subject<'_> {
    /// `file:line:column`.
    pub(crate) fn at(&self, node: &Node) -> String {
        format!("{}:{}", self.file, node.at)
    }
}

/// Judges Kubernetes YAML. `file` is how its text is called in the evidence; an error is no YAML, with its place.
pub fn read_manifest(text: &str, file: &str, expect: &Expectations) -> Result<Report, YamlError> {
    let mut documents = parse_all(text)?;
    // What `kubectl get -o yaml` prints is one list.
    let lists: Vec<Rc<Node>> = documents
        .iter()
        .filter(|node| {
            node.entry("kind").is_some_and(|(_, kind)| kind.text().is_some_and(|kind| kind.ends_with("List")))
        })
        .flat_map(|list| workload::items(list, "items").cloned().collect::<Vec<_>>())
        .collect();
    documents.extend(lists);
    let subject = Subject {
        file,
        expect,
        workloads: documents.iter().flat_map(workload::of).collect(),
        domains: documents.iter().filter_map(Domain::of).collect(),
        templates: documents.iter().filter_map(workload::claim_template).collect(),
    };
    let mut checks = vec![shape(&documents, &subject)];
    checks.extend(checks::all(&subject));
    Ok(Report::of(checks))
}

/// Whether Kubernetes could read them at all.
fn shape(documents: &[Rc<Node>], subject: &Subject<'_>) -> Check {
    const ID: &str = "manifest.shape";
    let wrong: Vec<String> = documents
        .iter()
        .filter_map(|document| Manifest::read(document).err())
        .map(|error| format!("{}:{}: {}", subject.file, error.at, kvferry_yaml::shorten(&error.reason)))
        .collect();
    let count = documents.len();
    if !wrong.is_empty() {
        let fix = "correct the values; those of variables and of `custom` resources are text: value: \"1\"";
        return Check::fail(ID, format!("{} of {count} documents are not what their kind says", wrong.len()), fix)
            .and(wrong);
    }
    let fix = format!("give it the workers' manifests as a kind that is known: {}", workload::KINDS);
    let foreign = |document: &&Rc<Node>| workload::of(document).is_empty() && workload::has_containers(document);
    let foreign: Vec<String> = documents
        .iter()
        // The parts of a list are among the documents.
        .filter(|document| document.entry("items").is_none())
        .filter(foreign)
        .take(checks::LINES_MAX)
        .map(|document| {
            let kind = kvferry_yaml::shorten(workload::word(document, "kind").unwrap_or("no kind"));
            format!("{}: {kind} has containers that are not looked at", subject.at(document))
        })
        .collect();
    if !foreign.is_empty() {
        let evidence = format!("{} of {count} documents are of kinds that are not known here", foreign.len());
        return Check::warn(ID, evidence, fix).and(foreign);
    }
    if subject.workloads.is_empty() {
        return Check::warn(ID, format!("{count} documents, and no workers in them: there is nothing to judge"), fix);
    }
    let names = subject.workloads.iter().take(checks::LINES_MAX).map(|workload| match workload.role {
        Some(role) => format!("{} at {}: {}", workload.name, subject.at(&workload.place), role.name()),
        None => format!("{} at {}: neither prefill nor decode", workload.name, subject.at(&workload.place)),
    });
    Check::ok(ID, format!("{count} documents")).and(names.collect::<Vec<_>>())
}
