//! What a transfer with a peer showed, judged.

use crate::ends::{self, End};
use crate::report::{Check, Report};

/// Clocks that differ by more make logs of two hosts misleading.
const OFFSET_MAX_NS: u64 = 50_000_000;

/// What lanes over RDMA devices begin with.
pub(crate) const RDMA_LANES: [&str; 7] = ["srd", "rc", "dc", "ud_", "gga", "gda", "efa/"];

/// What a transfer with a peer showed. Whoever made it fills this in; nothing here transfers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transferred {
    /// Handovers that were to be made.
    pub wanted: u32,
    /// Those that were delivered, one after another.
    pub delivered: u32,
    /// Bytes that they brought.
    pub bytes: u64,
    /// From the first transfer of each to its last byte, all together, in nanoseconds.
    pub wire_ns: u64,
    /// Bytes that were compared, and those that were wrong.
    pub verified_bytes: u64,
    /// Wrong bytes.
    pub mismatched_bytes: u64,
    /// Why others failed, or why there were none.
    pub failures: Vec<String>,
    /// The way that was chosen, once the peers had met.
    pub path: Option<PathSeen>,
    /// What the transport showed of it.
    pub proof: Option<Proof>,
    /// The peer's clock, if it answered.
    pub clock: Option<ClockSeen>,
    /// The two ends refused each other.
    pub misfit: Option<Misfit>,
    /// What this end has of EFA.
    pub here: End,
    /// What the peer says that it has, if it does.
    pub there: Option<End>,
}

/// Why two ends refuse each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misfit {
    /// RDMA is required, and the way has none.
    NoRdma,
    /// They have no transport or no devices in common.
    Ends,
}

/// The way that both ends chose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PathSeen {
    /// `shm`, `ucx`, ….
    pub transport: String,
    /// The device here.
    pub device: String,
    /// The device there.
    pub peer_device: String,
    /// Better ones, each with why it was not taken.
    pub passed_over: Vec<String>,
    /// Why it is no RDMA, where that was expected.
    pub shortfall: Option<String>,
    /// RDMA was asked for.
    pub rdma_required: bool,
}

/// What the transport showed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proof {
    /// From 1 (the device is there) to 5 (its counters cover the bytes); each includes those below it.
    pub grade: u8,
    /// As `transport/device`.
    pub lanes: Vec<String>,
    /// Path and version of the native library, if there is one.
    pub library: Option<(String, String)>,
    /// What was seen besides.
    pub seen: Vec<String>,
    /// What was not shown, and why.
    pub unseen: Vec<String>,
    /// Reads were emulated by messages.
    pub emulated: bool,
}

/// The peer's clock, by the fastest of several questions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockSeen {
    /// How far it is ahead of the clock here; within half of `round_trip_ns`.
    pub offset_ns: i64,
    /// Of the fastest question.
    pub round_trip_ns: u64,
    /// Questions that were answered.
    pub answers: u32,
}

/// What moves the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carrier {
    /// Memory of one host, or NVLink.
    Memory,
    Tcp,
    Rdma,
}

impl Transferred {
    fn carrier(&self) -> Carrier {
        let transport = self.path.as_ref().map(|path| path.transport.as_str()).unwrap_or_default();
        let lanes = self.proof.as_ref().map(|proof| proof.lanes.as_slice()).unwrap_or_default();
        let any = |names: &[&str]| lanes.iter().any(|lane| names.iter().any(|name| lane.starts_with(name)));
        match transport {
            "shm" | "cuda" => Carrier::Memory,
            "tcp" => Carrier::Tcp,
            _ if lanes.is_empty() || any(&RDMA_LANES) => Carrier::Rdma,
            _ if any(&["tcp", "sockets", "net", "udp"]) => Carrier::Tcp,
            _ => Carrier::Memory,
        }
    }
}

/// Judges what a transfer showed.
pub fn judge_transfer(transferred: &Transferred) -> Report {
    let mut checks = vec![moved(transferred)];
    if let Some(path) = &transferred.path {
        checks.push(way(path));
        checks.push(device(path));
    }
    if let Some(proof) = &transferred.proof {
        let carrier = transferred.carrier();
        checks.extend([provider(proof), lanes(proof, carrier), zero_copy(proof, carrier), counters(proof, carrier)]);
    } else if transferred.path.is_some() {
        let fix = "see verify.transfer; the transport shows what it knows once a connection stands";
        checks.push(Check::fail("verify.lanes", "E3: no connection of the transport stood", fix));
    }
    checks.push(ends::generations(&transferred.here, transferred.there.as_ref()));
    checks.push(clock(transferred.clock));
    Report::of(checks)
}

fn moved(transferred: &Transferred) -> Check {
    const ID: &str = "verify.transfer";
    let Transferred { wanted, delivered, bytes, wire_ns, verified_bytes, mismatched_bytes, failures, .. } = transferred;
    let rate = if *wire_ns == 0 { 0.0 } else { *bytes as f64 / *wire_ns as f64 };
    let evidence = format!(
        "{delivered} of {wanted} handovers, {bytes} bytes, {rate:.2} GB/s from the first transfer of each to its last byte"
    );
    if *mismatched_bytes > 0 {
        let fix = "do not use this path; run it again with --transport tcp to see whether memory or the device is at fault, and report it";
        return Check::fail(ID, format!("{mismatched_bytes} of {verified_bytes} bytes are wrong; {evidence}"), fix)
            .and(failures.iter().cloned());
    }
    if verified_bytes < bytes {
        let fix = "run it again, with a larger --within: what is not compared is not verified";
        return Check::fail(ID, format!("{verified_bytes} of {bytes} bytes were compared; {evidence}"), fix)
            .and(failures.iter().cloned());
    }
    if let Some(misfit) = transferred.misfit {
        let fix = match misfit {
            Misfit::NoRdma => {
                "RDMA is required, and this way has none: run kvferry doctor on both hosts (efa.nodes, library.ucx, variables.ucx) and name the \
                 device on both sides, or do without --require-rdma"
            }
            Misfit::Ends => {
                "give the same --transport on both sides, and devices that reach each other, as the lines below say"
            }
        };
        return Check::fail(ID, evidence, fix).and(failures.iter().cloned());
    }
    if delivered < wanted || !failures.is_empty() {
        let fix = "see that the peer runs `kvferry doctor --serve` of the same build with the same secret, that its port, the next one and those of the \
                   transport are open both ways, and what kvferry doctor says on either host";
        return Check::fail(ID, evidence, fix).and(failures.iter().cloned());
    }
    Check::ok(ID, format!("{evidence}; every one of {verified_bytes} bytes was compared"))
}

/// Which way, and why no better one.
fn way(path: &PathSeen) -> Check {
    const ID: &str = "verify.path";
    let evidence = format!("{} from {} to {}", path.transport, path.peer_device, path.device);
    let passed = path.passed_over.iter().map(|better| format!("passed over: {better}"));
    let Some(shortfall) = &path.shortfall else { return Check::ok(ID, evidence).and(passed) };
    let fix = "run kvferry doctor on both hosts (efa.nodes, library.ucx, variables.ucx), or name the device on both sides: --transport, --device";
    let check = match path.rdma_required {
        true => Check::fail(ID, evidence, fix),
        false => Check::warn(ID, evidence, fix),
    };
    check.and([shortfall.clone()]).and(passed)
}

fn device(path: &PathSeen) -> Check {
    Check::ok(
        "verify.device",
        format!("E1: both ends have opened their device, {} here and {} there", path.device, path.peer_device),
    )
}

fn provider(proof: &Proof) -> Check {
    let evidence = match &proof.library {
        Some((file, version)) => format!("E2: opened through {file}, version {version}"),
        None => "E2: opened by kvferry itself; no native library is part of it".to_owned(),
    };
    Check::ok("verify.provider", evidence)
}

fn lanes(proof: &Proof, carrier: Carrier) -> Check {
    const ID: &str = "verify.lanes";
    if proof.lanes.is_empty() {
        let fix = "use a library that says which lanes it has chosen (UCX from 1.14 on)";
        return Check::warn(ID, "E3: a connection stands, and nobody says over which lanes", fix);
    }
    let by = match carrier {
        Carrier::Memory => "memory of one host",
        Carrier::Tcp => "TCP",
        Carrier::Rdma => "RDMA",
    };
    Check::ok(ID, format!("E3: a connection stands over {} ({by})", proof.lanes.join(", ")))
        .and(proof.seen.iter().cloned())
}

fn zero_copy(proof: &Proof, carrier: Carrier) -> Check {
    const ID: &str = "verify.zero-copy";
    let unseen = proof.unseen.iter().map(|what| format!("not shown: {what}"));
    if proof.emulated {
        let fix = "set UCX_RNDV_THRESH=inf and leave UCX_PROTO_EMULATION_ENABLE alone; for libfabric leave FI_EFA_USE_DEVICE_RDMA unset; see gpu.direct \
                   of kvferry doctor";
        return Check::fail(ID, "E4 is not reached: reads are emulated by messages that a processor unpacks", fix)
            .and(unseen);
    }
    match carrier {
        _ if proof.grade >= 4 => {
            Check::ok(ID, "E4: bytes move from where they lie to where they belong without a copy between")
        }
        Carrier::Tcp => Check::ok(ID, "E4 is not to be had over TCP: processors copy at both ends"),
        Carrier::Memory | Carrier::Rdma => {
            let fix = "let the library say it: UCX from 1.14 on, libfabric's efa provider from 1.21 on; UCX_PROTO_INFO=used prints which protocol ran";
            Check::warn(ID, "E4 is not shown: whether there is a copy on the way is not known", fix).and(unseen)
        }
    }
}

fn counters(proof: &Proof, carrier: Carrier) -> Check {
    const ID: &str = "verify.counters";
    match carrier {
        _ if proof.grade >= 5 => {
            Check::ok(ID, "E5: the device's own counters grew by at least the bytes that were transferred")
        }
        Carrier::Memory => Check::ok(ID, "E5 is not to be had: memory has no counters"),
        Carrier::Tcp => Check::ok(ID, "E5 is not to be had over TCP: no RDMA device carries it"),
        Carrier::Rdma => {
            let fix = "look at /sys/class/infiniband/<device>/ports/1/hw_counters (rdma_read_bytes here, rdma_read_resp_bytes there) before and after; \
                       a container needs /sys, and counters that stand still mean that something else carried the bytes";
            Check::warn(ID, "E5 is not reached: the device's counters do not cover the bytes", fix)
                .and(proof.unseen.iter().map(|what| format!("not shown: {what}")))
        }
    }
}

fn clock(clock: Option<ClockSeen>) -> Check {
    const ID: &str = "verify.clock";
    let Some(ClockSeen { offset_ns, round_trip_ns, answers }) = clock else {
        let fix = "open the peer's port for UDP, too, or compare the hosts' clocks by other means (chronyc tracking)";
        return Check::warn(ID, "the peer answered no question about its clock", fix);
    };
    let milliseconds = |ns: f64| ns / 1e6;
    let evidence = format!(
        "the peer's clock is {:+.3} ms from this one, within {:.3} ms (the fastest of {answers} answers)",
        milliseconds(offset_ns as f64),
        milliseconds(round_trip_ns as f64 / 2.0)
    );
    if offset_ns.unsigned_abs().saturating_sub(round_trip_ns / 2) > OFFSET_MAX_NS {
        let fix = "synchronise both hosts with one source (chronyd; on AWS server 169.254.169.123): logs and timelines of the two cannot be laid side by \
                   side; kvferry's leases and deadlines do not depend on it";
        return Check::warn(ID, evidence, fix);
    }
    Check::ok(ID, evidence)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;

    /// A transfer over EFA with everything shown.
    fn proven() -> Transferred {
        Transferred {
            wanted: 5,
            delivered: 5,
            bytes: 5 << 20,
            wire_ns: 1_000_000,
            verified_bytes: 5 << 20,
            path: Some(PathSeen {
                transport: "ucx".into(),
                device: "rdmap65s0:1".into(),
                peer_device: "rdmap66s0:1".into(),
                ..PathSeen::default()
            }),
            proof: Some(Proof {
                grade: 5,
                lanes: vec!["srd/rdmap65s0:1".into()],
                library: Some(("/usr/local/lib/libucp.so.0".into(), "1.20.0".into())),
                ..Proof::default()
            }),
            clock: Some(ClockSeen { offset_ns: -40_000_000, round_trip_ns: 80_000, answers: 16 }),
            ..Transferred::default()
        }
    }

    fn wrong(transferred: &Transferred) -> Vec<(&'static str, Status)> {
        let report = judge_transfer(transferred);
        assert!(report.checks.iter().all(|check| check.fix.is_empty() == (check.status == Status::Ok)), "{report:#?}");
        report.checks.iter().filter(|check| check.status != Status::Ok).map(|check| (check.id, check.status)).collect()
    }

    type Break = fn(&mut Transferred);
    type Found = &'static [(&'static str, Status)];

    /// What is broken, and what is found.
    const BROKEN: &[(&str, Break, Found)] = &[
        ("a wrong byte", |t| t.mismatched_bytes = 1, &[("verify.transfer", Status::Fail)]),
        ("a byte that was not compared", |t| t.verified_bytes -= 1, &[("verify.transfer", Status::Fail)]),
        ("one handover less", |t| t.delivered = 4, &[("verify.transfer", Status::Fail)]),
        ("one that failed first", |t| t.failures = vec!["no".into()], &[("verify.transfer", Status::Fail)]),
        ("counters that stand still", |t| grade(t, 4), &[("verify.counters", Status::Warn)]),
        ("copies", |t| grade(t, 3), &[("verify.zero-copy", Status::Warn), ("verify.counters", Status::Warn)]),
        (
            "emulation",
            |t| {
                grade(t, 3);
                t.proof.iter_mut().for_each(|proof| proof.emulated = true);
            },
            &[("verify.zero-copy", Status::Fail), ("verify.counters", Status::Warn)],
        ),
        ("no lanes", |t| t.proof.iter_mut().for_each(|proof| proof.lanes.clear()), &[("verify.lanes", Status::Warn)]),
        ("no connection", |t| t.proof = None, &[("verify.lanes", Status::Fail)]),
        ("not RDMA", |t| shortfall(t, false), &[("verify.path", Status::Warn)]),
        ("refused", |t| (t.delivered, t.misfit) = (0, Some(Misfit::NoRdma)), &[("verify.transfer", Status::Fail)]),
        ("apart", |t| (t.delivered, t.misfit) = (0, Some(Misfit::Ends)), &[("verify.transfer", Status::Fail)]),
        ("not RDMA where it must be", |t| shortfall(t, true), &[("verify.path", Status::Fail)]),
        ("no clock", |t| t.clock = None, &[("verify.clock", Status::Warn)]),
        (
            "a clock that is off",
            |t| t.clock.iter_mut().for_each(|clock| clock.offset_ns = 51_000_000),
            &[("verify.clock", Status::Warn)],
        ),
    ];

    fn grade(transferred: &mut Transferred, grade: u8) {
        transferred.proof.iter_mut().for_each(|proof| proof.grade = grade);
    }

    fn shortfall(transferred: &mut Transferred, required: bool) {
        if let Some(path) = &mut transferred.path {
            (path.shortfall, path.rdma_required) = (Some("only TCP".into()), required);
        }
    }

    #[test]
    fn each_grade_that_is_missing_is_named_and_nothing_else() {
        assert_eq!(wrong(&proven()), []);
        let report = judge_transfer(&proven());
        for (id, word) in [
            ("verify.transfer", "5.24 GB/s"),
            ("verify.device", "E1"),
            ("verify.provider", "1.20.0"),
            ("verify.lanes", "E3: a connection stands over srd/rdmap65s0:1 (RDMA)"),
            ("verify.zero-copy", "E4"),
            ("verify.counters", "E5"),
            ("verify.clock", "-40.000 ms"),
        ] {
            let check = report.checks.iter().find(|check| check.id == id);
            assert!(check.is_some_and(|check| check.evidence[0].contains(word)), "{id}: {check:?}");
        }
        for (name, break_it, found) in BROKEN {
            let mut transferred = proven();
            break_it(&mut transferred);
            assert_eq!(wrong(&transferred), *found, "{name}");
        }
    }

    #[test]
    fn of_a_path_is_asked_what_it_can_show() {
        for (transport, lane, grade) in [
            ("shm", "memfd/memory", 4),
            ("tcp", "tcp/192.0.2.1:4000", 3),
            ("ucx", "tcp/eth0", 3),
            ("ucx", "cma/memory", 4),
            ("libfabric", "tcp/lo", 3),
        ] {
            let mut transferred = proven();
            transferred.path.iter_mut().for_each(|path| path.transport = transport.into());
            transferred.proof = Some(Proof { grade, lanes: vec![lane.into()], ..Proof::default() });
            assert_eq!(wrong(&transferred), [], "{transport} {lane}");
        }
    }

    #[test]
    fn nothing_at_all_is_a_failure_with_its_reason() {
        let nothing = Transferred { wanted: 5, failures: vec!["connection refused".into()], ..Transferred::default() };
        let report = judge_transfer(&nothing);
        assert_eq!(report.status, Status::Fail);
        assert!(report.checks[0].evidence.contains(&"connection refused".to_owned()), "{report:#?}");
    }
}
