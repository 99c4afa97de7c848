//! GB200: the compute domain's channel and who claims it, and variables that are about it.

use std::rc::Rc;

use kvferry_yaml::Node;

use super::Findings;
use crate::manifest::Subject;
use crate::manifest::workload::{Domain, Workload, word};
use crate::report::{Check, Status};

pub(super) fn compute_domain(subject: &Subject<'_>) -> Check {
    let mut findings = Findings::new();
    let templates = subject.domains.iter().filter_map(|domain| domain.template.as_ref()?.text());
    let templates: Vec<&str> = templates.collect();
    for workload in &subject.workloads {
        claims(subject, workload, &templates, &mut findings);
    }
    for domain in &subject.domains {
        let name = &domain.name;
        if domain.template.is_none() {
            let line =
                format!("{}: {name}: spec.channel.resourceClaimTemplate.name is missing", subject.at(&domain.place));
            findings.add(Status::Fail, line);
        }
        numbers(subject, domain, &mut findings);
    }
    for template in &subject.templates {
        if template.text().is_some_and(|name| templates.contains(&name)) {
            let line = "the ComputeDomain's controller makes this ResourceClaimTemplate itself";
            findings.add(Status::Warn, format!("{}: {line}", subject.at(template)));
        }
    }
    let fix = "let prefill and decode claim it: resources.claims: [{name: compute-domain-channel}] and, in the pod, resourceClaims: [{name: \
               compute-domain-channel, resourceClaimTemplateName: <channel.resourceClaimTemplate.name of the ComputeDomain>}]; numNodes: 0";
    let good = match subject.domains.len() {
        0 => "no ComputeDomain and no claim of one".to_owned(),
        count => format!("{count} ComputeDomains, claimed by prefill and decode"),
    };
    findings.check(
        "manifest.compute-domain",
        good,
        "without its channel NCCL ends with `unhandled system error` while the model loads",
        fix,
    )
}

/// A worker's claims against its pod's, and those against the domains.
fn claims(subject: &Subject<'_>, workload: &Workload, templates: &[&str], findings: &mut Findings) {
    let (claims, references) = (workload.claims(), workload.references());
    let name = &workload.name;
    for claim in &claims {
        let wanted = word(claim, "name").unwrap_or_default();
        if !references.iter().any(|reference| word(reference, "name") == Some(wanted)) {
            findings.add(
                Status::Fail,
                format!("{}: {name}: claims `{wanted}`, and the pod has no such claim", subject.at(claim)),
            );
        }
    }
    let of_channel = |reference: &&Rc<Node>| {
        let template = word(reference, "resourceClaimTemplateName").unwrap_or_default();
        let named = word(reference, "name").unwrap_or_default();
        templates.contains(&template) || template.contains("compute-domain") || named.contains("compute-domain")
    };
    let channels: Vec<&Rc<Node>> = references.iter().filter(of_channel).collect();
    for reference in &channels {
        let named = word(reference, "name").unwrap_or_default();
        if !claims.iter().any(|claim| word(claim, "name") == Some(named)) {
            findings.add(
                Status::Fail,
                format!(
                    "{}: {name}: the pod claims `{named}`, and its container does not use it",
                    subject.at(reference)
                ),
            );
        }
        let template = word(reference, "resourceClaimTemplateName");
        match template {
            Some(template) if !subject.domains.is_empty() && !templates.contains(&template) => {
                let line = format!(
                    "`{template}` is the template of no ComputeDomain here; there is {}",
                    templates.iter().take(4).copied().collect::<Vec<_>>().join(", ")
                );
                findings.add(Status::Fail, format!("{}: {name}: {line}", subject.at(reference)));
            }
            Some(template) if subject.domains.is_empty() => {
                let line = format!("`{template}` belongs to a ComputeDomain that is not among these documents");
                findings.add(Status::Warn, format!("{}: {name}: {line}", subject.at(reference)));
            }
            Some(template) => {
                let of = |domain: &&Domain| domain.template.as_ref().and_then(|node| node.text()) == Some(template);
                let domain = subject.domains.iter().find(of);
                if domain.is_some_and(|domain| domain.namespace != workload.namespace) {
                    let line = "its ComputeDomain lives in another namespace";
                    findings.add(Status::Fail, format!("{}: {name}: {line}", subject.at(reference)));
                }
            }
            None => findings.add(
                Status::Fail,
                format!("{}: {name}: `{named}` names no resourceClaimTemplateName", subject.at(reference)),
            ),
        }
    }
    if workload.role.is_some() && !subject.domains.is_empty() && channels.is_empty() {
        findings.add(
            Status::Fail,
            format!("{}: {name}: claims no channel of the ComputeDomain", subject.at(&workload.place)),
        );
    }
}

/// `numNodes` is deprecated; where it is used, it is all nodes.
fn numbers(subject: &Subject<'_>, domain: &Domain, findings: &mut Findings) {
    let Some(node) = &domain.nodes else { return };
    let found = node.text().and_then(|text| text.parse::<u64>().ok());
    // Those that should claim a channel count, too.
    let in_it = |workload: &&Workload| workload.role.is_some() || !workload.claims().is_empty();
    let workers = subject.workloads.iter().filter(in_it);
    let nodes = workers
        .fold(0u64, |sum, workload| sum.saturating_add(workload.replicas.saturating_mul(workload.nodes.unwrap_or(1))));
    match found {
        Some(0) => {}
        Some(count) if count == nodes => findings.add(
            Status::Ok,
            format!(
                "{}: numNodes: {count} is deprecated: 0 but where the driver's gate IMEXDaemonsWithDNSNames is off",
                subject.at(node)
            ),
        ),
        _ => findings.add(
            Status::Warn,
            format!(
                "{}: numNodes: {}: write 0, or with the driver's old gate the number of all nodes, {nodes}",
                subject.at(node),
                node.text().unwrap_or("?")
            ),
        ),
    }
}

pub(super) fn nccl(subject: &Subject<'_>) -> Check {
    let mut findings = Findings::new();
    // Whoever forgot the claim is meant to be in it, too.
    let claimed = |workload: &Workload| !workload.claims().is_empty() || !subject.domains.is_empty();
    let in_domain = |workload: &&Workload| workload.role.is_some() && claimed(workload);
    for workload in subject.workloads.iter().filter(in_domain) {
        for name in ["NCCL_MNNVL_ENABLE", "NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"] {
            match workload.variable(name) {
                None => findings.add(
                    Status::Warn,
                    format!("{}: {}: {name} is not set", subject.at(&workload.place), workload.name),
                ),
                // 2 is NCCL's own choice, and finds the channel.
                Some(found)
                    if found
                        .value
                        .as_deref()
                        .is_none_or(|value| value == "1" || (value == "2" && name == "NCCL_MNNVL_ENABLE")) => {}
                Some(found) => findings.add(
                    Status::Fail,
                    format!(
                        "{}: {}: {name}={}",
                        subject.at(&found.place),
                        workload.name,
                        found.value.as_deref().unwrap_or_default()
                    ),
                ),
            }
        }
    }
    let fix = "set NCCL_MNNVL_ENABLE=1, NCCL_CUMEM_ENABLE=1 and NCCL_NVLS_ENABLE=1 on prefill and decode";
    findings.check(
        "manifest.nccl",
        "NCCL may use NVLink between nodes, where there is a compute domain",
        "NCCL is not told to use the NVLink domain",
        fix,
    )
}

pub(super) fn gdrcopy(subject: &Subject<'_>) -> Check {
    let mut findings = Findings::new();
    for workload in &subject.workloads {
        let Some(found) = workload.variable("NVIDIA_GDRCOPY") else { continue };
        if let Some(value) = found.value.as_deref().filter(|value| *value != "enabled") {
            findings
                .add(Status::Warn, format!("{}: {}: NVIDIA_GDRCOPY={value}", subject.at(&found.place), workload.name));
        }
    }
    let fix = "set NVIDIA_GDRCOPY=enabled, or leave it out";
    findings.check(
        "manifest.gdrcopy",
        "GDRCopy is asked for by the word that is known, or not at all",
        "the container toolkit knows only `enabled`; anything else has no effect",
        fix,
    )
}
