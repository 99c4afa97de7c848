//! What the two sides of `doctor --verify` have in common: the KV that moves, the NICs, the secret, and the engine that is driven beside a rank.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use kvferry::topology::Topology;
use kvferry::transport::{self, providers};
use kvferry::{
    EngineCall, Epoch, Format, GroupGeometry, Model, NodeConfig, NodeId, OpenNic, Parallel, Pool, PoolId, PoolLayout,
    TransportKind, WorkerNode,
};
use kvferry_doctor::{End, SysRoot};
use kvferry_synthetic::{Engine, EngineConfig};

use crate::env_file;

/// The scheduler's node and the prefill rank's; the other side takes a number that nobody else has.
pub(super) const SCHEDULER: NodeId = NodeId(0);
pub(super) const PREFILL: NodeId = NodeId(1);
/// Handovers that one verification makes, one after another.
pub(super) const HANDOVERS: u32 = 5;
/// Of each of them: 32 MiB in 1,024 pieces of 32 KiB.
pub(super) const TOKENS: u64 = 1024;
/// Blocks of either pool, 80 MiB.
pub(super) const BLOCKS: u32 = 160;
const MODEL: &str = "layers=8,kv_heads=8,head_dim=128,dtype=bf16";
const SECRET_BYTES_MAX: u64 = 4096;
/// The shortest that is worth the name.
const SECRET_BYTES_MIN: usize = 8;

/// How the two sides meet.
#[derive(Clone, Debug, Args)]
pub(crate) struct Meeting {
    /// Move KV from a peer that runs `kvferry doctor --serve`, compare every byte, and grade what proves the way that it took: E1 device, E2
    /// provider, E3 lanes, E4 zero-copy, E5 the device's counters. Also tells how far the peer's clock is off, and
    /// whether both ends have EFA of one generation.
    #[arg(long, value_name = "HOST:PORT", group = "meeting", conflicts_with_all = ["role", "multinode", "backend", "expect", "env_file", "nic_map", "pid", "log", "manifest"])]
    pub(super) verify: Option<String>,

    /// Be the peer of whoever runs `kvferry doctor --verify` with this address, which they reach this host by: its port, the next one and those of the
    /// transport must be open, the first for UDP, too. Serves until it is ended.
    #[arg(long, value_name = "ADDRESS:PORT", group = "meeting", conflicts_with_all = ["role", "multinode", "backend", "expect", "env_file", "nic_map", "pid", "log", "manifest"])]
    pub(super) serve: Option<String>,

    /// How the bytes move. By default shared memory is opened, one RDMA device through UCX and through libfabric where there is one, and TCP, and the best
    /// that both sides have is taken.
    #[arg(long, value_name = "NAME", requires = "meeting", value_parser = PossibleValuesParser::new(providers().iter().map(|p| p.kind().name())).try_map(|word| word.parse::<TransportKind>()))]
    transport: Option<TransportKind>,

    /// The device of that transport. By default its first one; for TCP the address.
    #[arg(long, value_name = "NAME", requires = "meeting")]
    device: Option<String>,

    /// The secret that both sides share, in a file; required off loopback.
    #[arg(long, value_name = "FILE", requires = "meeting")]
    secret_file: Option<PathBuf>,

    /// Anything but RDMA, or memory of one host, is a failure.
    #[arg(long, requires = "verify", conflicts_with = "serve")]
    pub(super) require_rdma: bool,

    /// Give up, or stop serving, after so many seconds. [default: 60 to verify, never to serve]
    #[arg(long, value_name = "SECONDS", requires = "meeting", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    within: Option<u64>,
}

/// NICs that will be opened, and what was left out.
pub(super) struct Nics {
    /// Of one transport only, whose memory the pool is in.
    kind: Option<(TransportKind, Option<String>)>,
    pub(super) open: Vec<OpenNic>,
    /// As `shm:memory`.
    pub(super) names: Vec<String>,
    /// Each with why.
    pub(super) left_out: Vec<String>,
}

impl Meeting {
    pub(super) fn within(&self) -> Option<Duration> {
        self.within.map(Duration::from_secs)
    }

    /// The secret; `None` on loopback, where there need not be one.
    pub(super) fn secret(&self, address: SocketAddr) -> Result<Option<Arc<[u8]>>, String> {
        let Some(file) = &self.secret_file else {
            return match address.ip().is_loopback() {
                true => Ok(None),
                false => Err(format!("{address}: off loopback both sides need the same secret; give --secret-file")),
            };
        };
        let text = env_file::read(file, SECRET_BYTES_MAX).map_err(|error| error.to_string())?;
        let secret = text.trim().as_bytes();
        if secret.len() < SECRET_BYTES_MIN {
            return Err(format!(
                "{}: a secret of less than {SECRET_BYTES_MIN} bytes; give a longer one",
                file.display()
            ));
        }
        Ok(Some(Arc::from(secret)))
    }

    /// The NICs of this side, of which `ip` is the address.
    pub(super) fn nics(&self, ip: IpAddr) -> Result<Nics, String> {
        let options = transport::Options::default();
        if let Some(kind) = self.transport {
            let address = ip.to_string();
            let device = self.device.clone().or_else(|| (kind == TransportKind::Tcp).then_some(address));
            let nic = transport::select(kind, device.as_deref(), &options).map_err(|error| error.to_string())?;
            let name = format!("{kind}:{}", device.as_deref().unwrap_or("its first device"));
            return Ok(Nics { kind: Some((kind, device)), open: vec![nic], names: vec![name], left_out: Vec::new() });
        }
        if let Some(device) = &self.device {
            return Err(format!("--device {device}: of which transport? Give --transport, too"));
        }
        let mut nics = Nics { kind: None, open: Vec::new(), names: Vec::new(), left_out: Vec::new() };
        let ports = Topology::read(Path::new("/")).ports;
        for kind in [TransportKind::Shm, TransportKind::Ucx, TransportKind::Libfabric, TransportKind::Tcp] {
            let device = match kind {
                TransportKind::Shm => None,
                TransportKind::Tcp => Some(ip.to_string()),
                _ => match rdma_device(kind, &ports) {
                    Ok(device) => Some(device),
                    Err(why) => {
                        nics.left_out.push(format!("{kind} ({why})"));
                        continue;
                    }
                },
            };
            match transport::select(kind, device.as_deref(), &options) {
                Ok(nic) => {
                    nics.open.push(nic);
                    nics.names.push(device.map_or(kind.to_string(), |device| format!("{kind}:{device}")));
                }
                Err(error) => nics.left_out.push(format!("{kind} ({error})")),
            }
        }
        Ok(nics)
    }
}

/// The first RDMA port that a library can use. Without one its library is not loaded: what it had instead, kvferry's own transports do better.
fn rdma_device(kind: TransportKind, ports: &[kvferry::topology::Port]) -> Result<String, String> {
    if ports.is_empty() {
        return Err("this host has no RDMA device".to_owned());
    }
    let provider = providers().into_iter().find(|provider| provider.kind() == kind);
    let devices = provider.map(|provider| provider.discover()).unwrap_or_default();
    let of_port = |name: &str| ports.iter().any(|port| name == port.name() || name.starts_with(&port.device));
    let mut rdma = devices.iter().filter(|device| of_port(&device.name));
    match (rdma.clone().find(|device| device.unavailable.is_none()), rdma.next().or(devices.first())) {
        (Some(device), _) => Ok(device.name.clone()),
        (None, Some(device)) => Err(device.unavailable.clone().unwrap_or_else(|| "it knows no RDMA device".to_owned())),
        (None, None) => Err("it knows no device".to_owned()),
    }
}

/// Where to listen or whom to dial.
pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    let resolved = text.to_socket_addrs().map_err(|error| format!("{text}: {error}; give HOST:PORT"))?;
    let address = resolved.into_iter().next().ok_or_else(|| format!("{text}: it has no address; give HOST:PORT"))?;
    if address.ip().is_unspecified() {
        return Err(format!("{text}: give the address by which the peer reaches this host"));
    }
    Ok(address)
}

/// What this end has of EFA.
pub(super) fn end(root: &SysRoot) -> Result<End, String> {
    let environment = env_file::environment(None).map_err(|error| error.to_string())?;
    Ok(End::read(root, &environment))
}

/// A node of this process.
pub(super) fn node(node: NodeId, listen: SocketAddr, secret: &Option<Arc<[u8]>>) -> NodeConfig {
    let mut config = NodeConfig::new(node, Epoch(1));
    config.listen = listen.to_string();
    config.identity.secret.clone_from(secret);
    config
}

/// What moves, the same on both sides.
pub(super) fn geometry() -> Result<Arc<GroupGeometry>, String> {
    let model = Model::from_spec(MODEL).map_err(|error| error.to_string())?.model;
    Ok(Arc::new(GroupGeometry { model, format: Format::default(), parallel: Parallel::default() }))
}

/// What an engine is told.
pub(super) fn engine(geometry: &Arc<GroupGeometry>) -> EngineConfig {
    EngineConfig {
        geometry: Arc::clone(geometry),
        rank: kvferry::Rank(0),
        blocks: vec![BLOCKS],
        layers_per_step: None,
        reuse_prefix: false,
        seed: 1,
    }
}

/// The pool of this side, in memory that its NICs move.
pub(super) fn pool(geometry: &GroupGeometry, nics: &Nics) -> Result<Pool, String> {
    let shard = geometry.shard(kvferry::Rank(0)).map_err(|error| error.to_string())?;
    let (layout, id, name): (PoolLayout, _, _) = (shard.layout(&[BLOCKS]), PoolId(0), "kvferry-doctor");
    match &nics.kind {
        Some((kind, device)) => {
            transport::allocate(*kind, device.as_deref(), id, layout, name).map_err(|error| error.to_string())
        }
        None => Pool::allocate(id, layout, name).map_err(|error| error.to_string()),
    }
}

/// Lets an engine do all that its rank asks for now.
pub(super) async fn work(worker: &mut WorkerNode, engine: &mut dyn Engine) {
    let port = worker.port();
    loop {
        while let Some(call) = worker.try_next_call() {
            engine.handle(call, &mut |event| port.tell(event));
        }
        if !engine.work(&mut |event| port.tell(event)) {
            return;
        }
        // Others on this thread have their turn between two slices.
        tokio::task::yield_now().await;
    }
}

/// Gives an engine a call of its rank.
pub(super) fn give(worker: &WorkerNode, engine: &mut dyn Engine, call: EngineCall) {
    let port = worker.port();
    engine.handle(call, &mut |event| port.tell(event));
}
