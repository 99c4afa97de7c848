//! `doctor --verify`: a decode rank that joins a peer's scheduler, takes what it is given, compares it, and reports what was seen of the way.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use kvferry::{
    Direction, Event, Evidence, FailReason, FetchCourse, Grade, GroupId, NodeId, Outcome, Rank, Role, ThreadOptions,
    WorkerConfig, WorkerNode,
};
use kvferry_doctor::{End, Misfit, PathSeen, Proof, Report, SysRoot, Transferred, judge_transfer};
use kvferry_synthetic::{DecodeEngine, Engine};
use tokio::sync::mpsc;

use super::meeting::{self, BLOCKS, HANDOVERS, Meeting, PREFILL, SCHEDULER};
use super::{clock, ends};

const WITHIN: Duration = Duration::from_secs(60);
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// Moves KV from the peer and judges what was seen.
pub(super) fn run(meeting: &Meeting, peer: &str, root: &SysRoot) -> Result<Report, String> {
    let peer = meeting::address(peer)?;
    let secret = meeting.secret(peer)?;
    let mut seen = Seen::new(meeting.require_rdma, meeting::end(root)?);
    // Otherwise nothing would say why nobody comes.
    if let Err(error) = TcpStream::connect_timeout(&peer, CONNECT_WITHIN) {
        seen.failures.push(format!("{peer}: {error}; is `kvferry doctor --serve` there, and its port open?"));
        return Ok(judge_transfer(&seen.transferred(0)));
    }
    let local = UdpSocket::bind(SocketAddr::new(any(peer), 0)).map_err(|error| format!("no UDP socket: {error}"))?;
    let here = local.connect(peer).and_then(|()| local.local_addr());
    let here = here.map_err(|error| format!("{peer}: no way there: {error}"))?;
    drop(local);
    let asker = UdpSocket::bind(SocketAddr::new(here.ip(), 0)).map_err(|error| format!("no UDP socket: {error}"))?;
    (seen.clock, seen.there) = (clock::ask(&asker, peer), ends::ask(&asker, peer));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("it has no runtime: {error}"))?;
    runtime.block_on(async {
        let nics = meeting.nics(here.ip())?;
        let geometry = meeting::geometry()?;
        let pool = meeting::pool(&geometry, &nics)?;
        let mut engine =
            DecodeEngine::new(meeting::engine(&geometry), pool.clone()).map_err(|error| error.to_string())?;
        let (node, group) = names();
        let config = meeting::node(node, SocketAddr::new(here.ip(), 0), &secret);
        let scheduler = (SCHEDULER, peer.to_string());
        let mut rank = WorkerConfig::new(Role::Decode, group, Rank(0), geometry, vec![BLOCKS], scheduler);
        (rank.direction, rank.require_rdma) = (Some(Direction::Pull), meeting.require_rdma);
        let threads = ThreadOptions::for_nic_threads(nics.open.len());
        let worker = WorkerNode::start(config, rank, pool, nics.open, threads).await;
        let mut worker = worker.map_err(|error| error.to_string())?;
        let mut events = worker.events().ok_or("its events are taken")?;
        let within = meeting.within().unwrap_or(WITHIN);
        let taken = take(&mut worker, &mut engine, &mut events, &mut seen, node);
        if tokio::time::timeout(within, taken).await.is_err() {
            seen.failures.push(seen.late(within));
        }
        // What it had verified by then counts; a thread that hangs does not keep the report.
        let _ = tokio::time::timeout(CONNECT_WITHIN, worker.shutdown()).await;
        while let Ok(event) = events.try_recv() {
            seen.note(&event, node);
        }
        while engine.work(&mut |_| {}) {}
        let report = engine.report();
        seen.failures.extend(report.first_mismatch.clone().filter(|_| report.mismatched_bytes > 0));
        let transferred =
            Transferred { mismatched_bytes: report.mismatched_bytes, ..seen.transferred(report.verified_bytes) };
        Ok(judge_transfer(&transferred))
    })
}

/// Until everything has come and was compared, or the node has stopped.
async fn take(
    worker: &mut WorkerNode,
    engine: &mut DecodeEngine,
    events: &mut mpsc::UnboundedReceiver<Event>,
    seen: &mut Seen,
    node: NodeId,
) {
    loop {
        meeting::work(worker, engine).await;
        while let Ok(event) = events.try_recv() {
            seen.note(&event, node);
        }
        // The last one is compared, too.
        if !seen.failures.is_empty() || engine.report().completed_requests >= u64::from(HANDOVERS) {
            return;
        }
        tokio::select! {
            biased;
            event = events.recv() => match event {
                Some(event) => seen.note(&event, node),
                None => return,
            },
            call = worker.next_call() => match call {
                Some(call) => meeting::give(worker, engine, call),
                None => return,
            },
        }
    }
}

/// Names that no other verifying process has: as many bits as names have, from what the operating system gives every process.
fn names() -> (NodeId, GroupId) {
    let bits = || std::collections::hash_map::RandomState::new().build_hasher().finish();
    (NodeId(bits() | 1 << 63), GroupId(bits() as u32 | 1))
}

/// Any address of the peer's family.
fn any(peer: SocketAddr) -> std::net::IpAddr {
    match peer {
        SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// What events told.
struct Seen {
    rdma_required: bool,
    met: BTreeMap<NodeId, ()>,
    path: Option<PathSeen>,
    evidence: Option<Evidence>,
    courses: Vec<FetchCourse>,
    failures: Vec<String>,
    misfit: Option<Misfit>,
    clock: Option<kvferry_doctor::ClockSeen>,
    here: End,
    there: Option<End>,
}

impl Seen {
    fn new(rdma_required: bool, here: End) -> Seen {
        let (met, courses, failures) = Default::default();
        Seen {
            rdma_required,
            met,
            path: None,
            evidence: None,
            courses,
            failures,
            misfit: None,
            clock: None,
            here,
            there: None,
        }
    }

    fn note(&mut self, event: &Event, own: NodeId) {
        match event {
            Event::Met { node, .. } => drop(self.met.insert(*node, ())),
            Event::PathChosen(chosen) => {
                self.path = Some(PathSeen {
                    transport: chosen.kind.to_string(),
                    device: chosen.device.clone(),
                    peer_device: chosen.remote_device.clone(),
                    passed_over: chosen.passed_over.iter().map(ToString::to_string).collect(),
                    shortfall: chosen.shortfall.as_ref().map(ToString::to_string),
                    rdma_required: self.rdma_required,
                });
            }
            Event::PathShown(shown) => {
                self.evidence = Some(shown.evidence.clone());
                if let (Some(path), Some(shortfall)) = (&mut self.path, &shown.shortfall) {
                    path.shortfall = Some(shortfall.to_string());
                }
            }
            Event::FetchEnded(course) => {
                if let Outcome::Failed { reason } = &course.outcome {
                    if let FailReason::Mismatch(words) = reason {
                        self.misfit = Some(match words.contains("require_rdma") {
                            true => Misfit::NoRdma,
                            false => Misfit::Ends,
                        });
                    }
                    self.failures.push(format!("{}: {reason}", course.handover));
                }
                self.courses.push(FetchCourse::clone(course));
            }
            Event::NodeLost { node, cause } if *node == own || *node == SCHEDULER || *node == PREFILL => {
                self.failures.push(format!("{} is over: {cause}", if *node == own { "this rank" } else { "the peer" }));
            }
            _ => {}
        }
    }

    /// Why nothing more came.
    fn late(&self, within: Duration) -> String {
        let seconds = within.as_secs();
        if !self.met.contains_key(&SCHEDULER) {
            return format!(
                "nobody there was met in {seconds} s, though the port is open: something else listens, it is of another build, or its secret differs"
            );
        }
        if !self.met.contains_key(&PREFILL) {
            return format!("the peer's rank was not met in {seconds} s: is the port after the given one open?");
        }
        format!(
            "{seconds} s were not enough; the peer may be serving somebody else, or nothing comes through: see verify.lanes"
        )
    }

    fn transferred(self, verified_bytes: u64) -> Transferred {
        let delivered = || self.courses.iter().filter(|course| course.outcome.is_delivered());
        let wire = delivered().filter_map(FetchCourse::wire).map(|wire| wire.as_nanos() as u64).sum();
        Transferred {
            wanted: HANDOVERS,
            delivered: delivered().count() as u32,
            bytes: delivered().flat_map(|course| &course.paths).map(|path| path.bytes).sum(),
            wire_ns: wire,
            verified_bytes,
            mismatched_bytes: 0,
            proof: self.evidence.map(proof),
            failures: self.failures,
            path: self.path,
            clock: self.clock,
            misfit: self.misfit,
            here: self.here,
            there: self.there,
        }
    }
}

fn proof(evidence: Evidence) -> Proof {
    Proof {
        grade: match evidence.grade {
            Grade::E1 => 1,
            Grade::E2 => 2,
            Grade::E3 => 3,
            Grade::E4 => 4,
            Grade::E5 => 5,
        },
        lanes: evidence.lanes,
        library: evidence.library.map(|library| (library.path, library.version)),
        seen: evidence.seen,
        unseen: evidence.unseen,
        emulated: evidence.emulated,
    }
}
