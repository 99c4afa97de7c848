//! EFA devices: there, driven, active, reachable from the container, and not visibly in trouble.

use super::Subject;
use crate::report::Check;
use crate::root::DeviceNode;

pub(super) fn checks(subject: &Subject<'_>) -> Vec<Check> {
    let mut checks = vec![devices(subject)];
    if subject.efa_matters() {
        checks.extend([driver(subject), ports(subject), rate(subject), nodes(subject), counters(subject)]);
    }
    checks
}

fn devices(subject: &Subject<'_>) -> Check {
    const ID: &str = "efa.devices";
    let found = subject.host.efa_on_pci().count() as u32;
    let list = subject.host.efa.iter();
    let list =
        list.map(|efa| format!("{} at {}, device {:#06x}, {}", efa.name, efa.pci.address, efa.pci.device, efa.rate));
    match subject.question.expect.efa {
        Some(expected) if expected != found => {
            let fix = format!(
                "ask for them: resources.requests and resources.limits \"vpc.amazonaws.com/efa\": \"{expected}\", and choose an instance that \
                 has as many"
            );
            Check::fail(ID, format!("{found} EFA devices on PCI, {expected} expected"), fix).and(list)
        }
        None if found == 0 => Check::ok(ID, "no EFA device on PCI, and none expected: EFA is of no concern here"),
        _ => Check::ok(ID, format!("{found} EFA devices on PCI")).and(list),
    }
}

fn driver(subject: &Subject<'_>) -> Check {
    const ID: &str = "efa.driver";
    let undriven: Vec<String> = subject
        .host
        .efa_on_pci()
        .filter(|pci| pci.driver.as_deref() != Some("efa"))
        .map(|pci| format!("{}: driver {}", pci.address, pci.driver.as_deref().unwrap_or("none")))
        .collect();
    let module = if subject.host.efa_module { "/sys/module/efa is there" } else { "/sys/module/efa is not there" };
    if undriven.is_empty() && subject.host.efa_module {
        return Check::ok(ID, module);
    }
    let fix = "install the EFA driver on the host and load it: modprobe efa (the EFA installer does both)";
    Check::fail(ID, module, fix).and(undriven)
}

fn ports(subject: &Subject<'_>) -> Check {
    const ID: &str = "efa.ports";
    let down: Vec<String> = subject
        .host
        .efa
        .iter()
        .filter(|efa| efa.state != "4: ACTIVE")
        .map(|efa| format!("/sys/class/infiniband/{}/ports/1/state = {}", efa.name, efa.state))
        .collect();
    if down.is_empty() {
        return Check::ok(ID, "every port is ACTIVE");
    }
    Check::fail(
        ID,
        format!("{} ports are not ACTIVE", down.len()),
        "attach the EFA to its network interface again, then reboot the node",
    )
    .and(down)
}

/// What all ports carry together, as the driver says.
fn rate(subject: &Subject<'_>) -> Check {
    const ID: &str = "efa.rate";
    let active = subject.host.efa.iter().filter(|efa| efa.state == "4: ACTIVE");
    let gigabits = |rate: &str| rate.split_whitespace().next().and_then(|number| number.parse::<f64>().ok());
    let together: f64 = active.filter_map(|efa| gigabits(&efa.rate)).sum();
    let evidence = format!("{together} Gb/s over all active ports");
    match subject.question.expect.gbps {
        Some(expected) if (together - f64::from(expected)).abs() >= 1.0 => Check::fail(
            ID,
            format!("{evidence}, {expected} expected"),
            "compare with the instance's type: a port that is down, a device that was not attached or an older generation carries less",
        ),
        _ => Check::ok(ID, evidence),
    }
}

/// What a process opens to use a device; without it UCX skips the device silently.
fn nodes(subject: &Subject<'_>) -> Check {
    const ID: &str = "efa.nodes";
    let mut refused = false;
    let unusable: Vec<String> = subject
        .host
        .efa
        .iter()
        .filter_map(|efa| {
            let path = efa
                .verbs
                .as_ref()
                .map_or("no uverbs entry in /sys".to_owned(), |verbs| format!("/dev/infiniband/{verbs}"));
            match &efa.node {
                DeviceNode::Usable => None,
                DeviceNode::Missing => Some(format!("{}: {path} is missing", efa.name)),
                DeviceNode::NotDevice => Some(format!("{}: {path} is no device", efa.name)),
                DeviceNode::Refused(reason) => {
                    refused = true;
                    Some(format!("{}: {path} cannot be opened: {reason}", efa.name))
                }
            }
        })
        .collect();
    let total = subject.host.efa.len();
    if unusable.is_empty() {
        let how = if subject.root.captured {
            "are there; a copy cannot show that they open"
        } else {
            "open for reading and writing"
        };
        return Check::ok(ID, format!("all {total} device nodes {how}"));
    }
    let fix = if refused {
        "let the device plugin give the devices (vpc.amazonaws.com/efa in requests and limits); securityContext.privileged: true as last resort"
            .to_owned()
    } else {
        format!(
            "request all of them: \"vpc.amazonaws.com/efa\": \"{total}\" in requests and limits, with aws-efa-k8s-device-plugin on the node; in \
             docker: --device /dev/infiniband/uverbsN"
        )
    };
    Check::fail(
        ID,
        format!("{} of {total} devices cannot be used; UCX and libfabric skip them silently", unusable.len()),
        fix,
    )
    .and(unusable)
}

/// Counters that rise when a security group drops what is sent.
fn counters(subject: &Subject<'_>) -> Check {
    const ID: &str = "efa.peers";
    let suspicious: Vec<String> = subject
        .host
        .efa
        .iter()
        .filter_map(|efa| {
            let count = |name: &str| efa.counters.get(name).copied().unwrap_or(0);
            let (silent, timeouts) = (count("unresponsive_remote_events"), count("retrans_timeout_events"));
            let deaf = count("tx_pkts") > 0 && efa.counters.contains_key("rx_pkts") && count("rx_pkts") == 0;
            (silent > 0 || timeouts > 0 || deaf).then(|| {
                format!(
                    "{}: unresponsive_remote_events {silent}, retrans_timeout_events {timeouts}, tx_pkts {}, rx_pkts {}",
                    efa.name,
                    count("tx_pkts"),
                    count("rx_pkts")
                )
            })
        })
        .collect();
    if suspicious.is_empty() {
        return Check::ok(ID, "no device counts unresponsive peers");
    }
    let fix = "let the security group allow all traffic from and to itself, inbound and outbound, and put peers into one subnet";
    Check::warn(ID, "packets went unanswered since the driver was loaded", fix).and(suspicious)
}
