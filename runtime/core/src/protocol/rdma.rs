//! Whether KV that should go by RDMA does.
//!
//! RDMA is expected between two ranks when it is required, or when one of them has opened an RDMA device. Memory of one host (shared memory,
//! NVLink, UCX's `memory`, libfabric's `shm`) is as good: nothing crosses a network. What falls short is told once per peer; where RDMA is required it is refused.

use thiserror::Error;

use super::NicAdvert;
use crate::{Evidence, TransportKind};

/// Lanes over RDMA devices begin with one of these: UCX's transports, libfabric's provider.
const RDMA_LANES: [&str; 7] = ["srd", "rc", "dc", "ud", "gga", "gda", "efa/"];
/// What EFA devices are called; libfabric names them without a port.
const EFA_NAMES: [&str; 2] = ["rdmap", "efa_"];

/// What carries the bytes of a NIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carrier {
    /// Memory of one host, or of one NVLink domain.
    Memory,
    /// A device that reads and writes remote memory.
    Rdma,
    /// A network that processors serve.
    Network,
}

/// UCX names RDMA devices with their port; its other devices that cross a network are interfaces. libfabric's may be `PROVIDER/DEVICE`.
fn carrier(nic: &NicAdvert) -> Carrier {
    let has_port = nic.device.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u8>().is_ok());
    let plain = nic.device.rsplit_once('/').map_or(nic.device.as_str(), |(_, plain)| plain);
    let is_efa = EFA_NAMES.iter().any(|name| plain.starts_with(name));
    match nic.kind {
        TransportKind::Shm | TransportKind::Cuda => Carrier::Memory,
        TransportKind::Ucx | TransportKind::Libfabric if !nic.host.is_empty() => Carrier::Memory,
        TransportKind::Ucx if has_port => Carrier::Rdma,
        TransportKind::Libfabric if is_efa => Carrier::Rdma,
        // The simulated fabric is one of one-sided NICs.
        TransportKind::Sim => Carrier::Rdma,
        TransportKind::Ucx | TransportKind::Libfabric | TransportKind::Tcp => Carrier::Network,
    }
}

/// Why KV does not go by RDMA between two ranks though it was expected to.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RdmaShortfall {
    /// The best path that both sides have crosses a network without RDMA.
    #[error(
        "the path through {kind} on {device} is not RDMA ({}); open a UCX device such as rdmap40s0:1 on both sides (kvferry doctor says what \
         hinders), or allow other paths by leaving require_rdma out",
        devices(.here, .there)
    )]
    Path {
        /// The transport that was chosen.
        kind: TransportKind,
        /// Its device here.
        device: String,
        /// RDMA devices that this side has opened.
        here: Vec<String>,
        /// RDMA devices that the peer has opened.
        there: Vec<String>,
    },
    /// The device is RDMA's, the lanes that UCX chose are not.
    #[error(
        "{device} is an RDMA device, but its lanes are {lanes}; check UCX_TLS and that this UCX was built with the device's transport (kvferry \
         doctor), or leave require_rdma out"
    )]
    Lanes {
        /// The device here.
        device: String,
        /// The lanes.
        lanes: String,
    },
    /// The lanes are RDMA's, but reads over them are emulated.
    #[error(
        "{device} reads no remote memory over its lanes {lanes}: messages that processors unpack would carry the KV; leave UCX_RNDV_THRESH and \
         UCX_PROTO_EMULATION_ENABLE to kvferry, check the memory's registration (kvferry doctor), or leave require_rdma out"
    )]
    Emulated {
        /// The device here.
        device: String,
        /// The lanes.
        lanes: String,
    },
    /// The lanes are RDMA's, but a pool is in a device's memory, which they are not given.
    #[error(
        "{device} moves a device's memory by way of host memory over its lanes {lanes}: processors and copies of the device carry the KV beside it; \
         open cuda on both sides where GPUs reach each other, put pools in host memory, or leave require_rdma out"
    )]
    Staged {
        /// The device here.
        device: String,
        /// The lanes.
        lanes: String,
    },
}

fn devices(here: &[String], there: &[String]) -> String {
    let list = |names: &[String]| if names.is_empty() { "none".to_owned() } else { names.join(",") };
    format!("RDMA devices here: {}, at the peer: {}", list(here), list(there))
}

/// What the choice of a pair of NICs falls short of.
pub(super) fn of_path(
    required: bool,
    (here, nic): (&[NicAdvert], &NicAdvert),
    (there, remote): (&[NicAdvert], &NicAdvert),
) -> Option<RdmaShortfall> {
    if carrier(nic) != Carrier::Network && carrier(remote) != Carrier::Network {
        return None;
    }
    let of = |nics: &[NicAdvert]| -> Vec<String> {
        nics.iter().filter(|nic| carrier(nic) == Carrier::Rdma).map(|nic| nic.device.clone()).collect()
    };
    let (here, there) = (of(here), of(there));
    let expected = required || !here.is_empty() || !there.is_empty();
    expected.then(|| RdmaShortfall::Path { kind: nic.kind, device: nic.device.clone(), here, there })
}

/// What the lanes to a peer fall short of. An RDMA device was opened: RDMA is expected.
pub(super) fn of_lanes(nic: &NicAdvert, evidence: &Evidence) -> Option<RdmaShortfall> {
    if !matches!(nic.kind, TransportKind::Ucx | TransportKind::Libfabric) || carrier(nic) != Carrier::Rdma {
        return None;
    }
    let device = nic.device.clone();
    let lanes = if evidence.lanes.is_empty() { "unknown".to_owned() } else { evidence.lanes.join(",") };
    let is_rdma = |lane: &String| RDMA_LANES.iter().any(|name| lane.starts_with(name));
    if !evidence.lanes.iter().any(is_rdma) {
        return Some(RdmaShortfall::Lanes { device, lanes });
    }
    match evidence {
        Evidence { emulated: true, .. } => Some(RdmaShortfall::Emulated { device, lanes }),
        Evidence { staged: true, .. } => Some(RdmaShortfall::Staged { device, lanes }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn nic(kind: TransportKind, device: &str, host: &str) -> NicAdvert {
        let (address, keys, domain) = (Bytes::new(), Bytes::new(), None);
        NicAdvert { kind, device: device.into(), host: host.into(), address, keys, domain, gpu: None }
    }

    fn path(required: bool, here: &[NicAdvert], there: &[NicAdvert]) -> Option<RdmaShortfall> {
        of_path(required, (here, here.last()?), (there, there.last()?))
    }

    #[test]
    fn one_host_and_rdma_are_good_enough() {
        for kind in [TransportKind::Shm, TransportKind::Cuda, TransportKind::Ucx, TransportKind::Libfabric] {
            let memory = [nic(kind, "memory", "host")];
            assert_eq!(path(true, &memory, &memory), None, "{kind}");
        }
        for device in ["rdmap40s0:1", "mlx5_0:1", "efa_0:1"] {
            let rdma = [nic(TransportKind::Ucx, device, "")];
            assert_eq!(path(true, &rdma, &rdma), None, "{device}");
        }
        for device in ["rdmap40s0", "efa/rdmap40s0", "efa_0"] {
            let rdma = [nic(TransportKind::Libfabric, device, "")];
            assert_eq!(path(true, &rdma, &rdma), None, "{device}");
        }
        for device in ["eth0", "tcp;ofi_rxm/eth0"] {
            let network = [nic(TransportKind::Libfabric, device, "")];
            assert!(path(true, &network, &network).is_some(), "{device}");
        }
        let simulated = [nic(TransportKind::Sim, "n", "")];
        assert_eq!(path(true, &simulated, &simulated), None);
    }

    #[test]
    fn a_network_falls_short_where_rdma_is_expected() {
        let (tcp, eth) = (nic(TransportKind::Tcp, "eth0", ""), nic(TransportKind::Ucx, "eth0", ""));
        let rdma = nic(TransportKind::Ucx, "rdmap40s0:1", "");
        assert_eq!(path(false, std::slice::from_ref(&tcp), std::slice::from_ref(&tcp)), None, "nobody asked for RDMA");
        for plain in [&tcp, &eth] {
            let plain = std::slice::from_ref(plain);
            assert!(path(true, plain, plain).is_some(), "required");
        }
        // One side has opened an RDMA device: it should be known that it carries nothing.
        let both = [rdma, tcp.clone()];
        let found = path(false, &both, std::slice::from_ref(&tcp));
        let Some(RdmaShortfall::Path { here, there, .. }) = &found else { panic!("{found:?}") };
        assert_eq!((here.as_slice(), there.len()), (["rdmap40s0:1".to_owned()].as_slice(), 0));
        assert!(path(false, &[tcp], &both).is_some(), "told at both ends");
        let words = found.map(|short| short.to_string()).unwrap_or_default();
        assert!(words.contains("tcp on eth0") && words.contains("here: rdmap40s0:1, at the peer: none"), "{words}");
    }

    #[test]
    fn lanes_are_judged_on_rdma_devices_only() {
        let rdma = nic(TransportKind::Ucx, "rdmap40s0:1", "");
        let lanes = |names: &[&str]| Evidence::connected(names.iter().map(|name| (*name).to_owned()).collect());
        assert_eq!(of_lanes(&rdma, &lanes(&["srd/rdmap40s0:1"])), None);
        assert_eq!(
            of_lanes(&nic(TransportKind::Ucx, "mlx5_0:1", ""), &lanes(&["rc_mlx5/mlx5_0:1", "ud_mlx5/mlx5_0:1"])),
            None
        );
        let fallen = of_lanes(&rdma, &lanes(&["tcp/eth0", "tcp/lo"]));
        assert_eq!(
            fallen,
            Some(RdmaShortfall::Lanes { device: "rdmap40s0:1".into(), lanes: "tcp/eth0,tcp/lo".into() })
        );
        assert!(matches!(of_lanes(&rdma, &lanes(&[])), Some(RdmaShortfall::Lanes { .. })), "nothing shown is no proof");
        let emulated = Evidence { emulated: true, ..lanes(&["srd/rdmap40s0:1"]) };
        let found = of_lanes(&rdma, &emulated);
        assert!(matches!(found, Some(RdmaShortfall::Emulated { .. })), "{found:?}");
        let words = found.map(|short| short.to_string()).unwrap_or_default();
        assert!(words.contains("rdmap40s0:1") && words.contains("UCX_RNDV_THRESH"), "{words}");
        let staged = Evidence { staged: true, ..lanes(&["srd/rdmap40s0:1"]) };
        let found = of_lanes(&rdma, &staged);
        assert!(matches!(found, Some(RdmaShortfall::Staged { .. })), "{found:?}");
        for other in [
            nic(TransportKind::Ucx, "eth0", ""),
            nic(TransportKind::Ucx, "memory", "h"),
            nic(TransportKind::Tcp, "eth0:1", ""),
        ] {
            assert_eq!(of_lanes(&other, &lanes(&["tcp/eth0"])), None, "{other:?}");
        }
    }
}
