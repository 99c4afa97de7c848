//! Which pair of NICs joins two ranks, and why no better one does.

use core::fmt;

use super::{NicAdvert, RailHealth, RdmaShortfall, Role, WorkerProfile};
use crate::{Direction, Evidence, GpuIdentity, GroupId, MemoryDomain, NodeId, Rank, TransportKind};

/// The best first: GPU and shared memory of one host before anything that crosses a network.
const PREFERENCE: [TransportKind; 6] = [
    TransportKind::Cuda,
    TransportKind::Shm,
    TransportKind::Sim,
    TransportKind::Ucx,
    TransportKind::Libfabric,
    TransportKind::Tcp,
];

/// A worker as logs name it: `prefill/group-0/rank-1/node-2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerName {
    /// Which side.
    pub role: Role,
    /// Which group.
    pub group: GroupId,
    /// Which rank of it.
    pub rank: Rank,
    /// Its node.
    pub node: NodeId,
}

impl PeerName {
    pub(super) fn of(profile: &WorkerProfile, node: NodeId) -> PeerName {
        PeerName { role: profile.role, group: profile.group, rank: profile.rank, node }
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}/{}", self.role, self.group, self.rank, self.node)
    }
}

/// The path to a peer as both ends chose it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChosenPath {
    /// To whom.
    pub peer: PeerName,
    /// By which transport.
    pub kind: TransportKind,
    /// Its device here.
    pub device: String,
    /// Its device at the peer.
    pub remote_device: String,
    /// Who initiates.
    pub direction: Direction,
    /// Better transports that one side has opened at least, best first.
    pub passed_over: Vec<PassedOver>,
    /// RDMA was expected, and this is not RDMA.
    pub shortfall: Option<RdmaShortfall>,
}

/// What a transport showed of the path to a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShownPath {
    /// To whom.
    pub peer: PeerName,
    /// By which transport.
    pub kind: TransportKind,
    /// Its device here.
    pub device: String,
    /// What is shown.
    pub evidence: Evidence,
    /// RDMA was expected, and this is not RDMA.
    pub shortfall: Option<RdmaShortfall>,
}

/// What became of one of several rails to a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RailTurn {
    /// To whom.
    pub peer: PeerName,
    /// By which transport.
    pub kind: TransportKind,
    /// Its device here.
    pub device: String,
    /// Its device at the peer.
    pub remote_device: String,
    /// What it is from now on.
    pub health: RailHealth,
    /// Why.
    pub reason: String,
}

/// A transport that would have been preferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassedOver {
    /// Which.
    pub kind: TransportKind,
    /// Why it was not taken.
    pub obstacle: Obstacle,
}

impl fmt::Display for PassedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.kind, self.obstacle)
    }
}

/// Why a transport does not join two ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Obstacle {
    /// Only one side has opened it.
    OpenedBy(Role),
    /// Both have, on different hosts.
    Apart,
    /// Both have, on different hosts that do not read each other's memory.
    OtherDomain,
    /// Both have, on GPUs of one host that do not read each other's memory.
    NoPeerAccess,
    /// Both have, and a MIG instance is among the two GPUs.
    Instance,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Obstacle::OpenedBy(role) => write!(f, "only the {role} side has opened it"),
            Obstacle::Apart => f.write_str("the two are on different hosts"),
            Obstacle::OtherDomain => f.write_str(
                "the two are on different hosts, and not in one NVLink domain with pools that fabric handles stand for",
            ),
            Obstacle::NoPeerAccess => f.write_str(
                "the two GPUs have no peer access to each other, neither by NVLink nor by PCIe: nvidia-smi topo -p2p r says what is in the way",
            ),
            Obstacle::Instance => f.write_str(
                "a MIG instance is among the two GPUs, which reaches nobody but itself: have both use the same one, or turn MIG off (nvidia-smi -mig 0)",
            ),
        }
    }
}

/// A pair of NICs of the best kind that both sides have.
pub(super) fn path(source: &[NicAdvert], destination: &[NicAdvert], lane: u64) -> Option<(usize, usize)> {
    PREFERENCE.into_iter().find_map(|kind| pair(kind, source, destination, lane))
}

/// Up to `most` pairs that join two ranks at once, no two of them at one NIC of the destination: the one that [`path`] chooses, its neighbours,
/// and then those of the next kinds that both sides have; each kind's from the lane's on, in the order of the lists.
pub(super) fn rails(source: &[NicAdvert], destination: &[NicAdvert], lane: u64, most: usize) -> Vec<(usize, usize)> {
    let mut found: Vec<(usize, usize)> = Vec::new();
    for kind in PREFERENCE {
        for step in 0..source.len().max(destination.len()) as u64 {
            let next = pair(kind, source, destination, lane.saturating_add(step));
            let is_new = |(_, to): &(usize, usize)| found.iter().all(|(_, taken)| taken != to);
            found.extend(next.filter(is_new).filter(|_| found.len() < most));
        }
    }
    found
}

/// Among several pairs of a kind the lane decides, and NICs of one index meet each other, as rails are wired; where one side has fewer, its NICs
/// serve in turn.
fn pair(kind: TransportKind, source: &[NicAdvert], destination: &[NicAdvert], lane: u64) -> Option<(usize, usize)> {
    let of_kind = |nics: &[NicAdvert], meets: &dyn Fn(&NicAdvert) -> bool| -> Vec<usize> {
        nics.iter().enumerate().filter(|(_, nic)| meets(nic)).map(|(index, _)| index).collect()
    };
    let pick = |nics: &[usize], rail: u64| nics.get((rail % (nics.len() as u64).max(1)) as usize).copied();
    let joins =
        |one: &NicAdvert, other: &NicAdvert| one.kind == kind && other.kind == kind && between(one, other).is_none();
    let sources = of_kind(source, &|nic| destination.iter().any(|other| joins(nic, other)));
    let reachable = of_kind(destination, &|nic| source.iter().any(|other| joins(other, nic)));
    let rail = lane % (sources.len().max(reachable.len()) as u64).max(1);
    let from = pick(&sources, rail)?;
    let partner = source.get(from)?;
    let to = pick(&of_kind(destination, &|nic| joins(partner, nic)), rail)?;
    Some((from, to))
}

/// What would have been preferred to `chosen`; every kind, where there is no path.
pub(super) fn passed_over(
    source: &[NicAdvert],
    destination: &[NicAdvert],
    chosen: Option<TransportKind>,
) -> Vec<PassedOver> {
    let better = PREFERENCE.into_iter().take_while(|kind| Some(*kind) != chosen);
    let obstacle = |kind| match (of_kind(source, kind), of_kind(destination, kind)) {
        (from, to) if from.is_empty() && to.is_empty() => None,
        (_, to) if to.is_empty() => Some(Obstacle::OpenedBy(Role::Prefill)),
        (from, _) if from.is_empty() => Some(Obstacle::OpenedBy(Role::Decode)),
        // Of several pairs, what keeps those apart that are closest.
        (from, to) => from.iter().flat_map(|one| to.iter().filter_map(|other| between(one, other))).max(),
    };
    better.filter_map(|kind| Some(PassedOver { kind, obstacle: obstacle(kind)? })).collect()
}

fn of_kind(nics: &[NicAdvert], kind: TransportKind) -> Vec<&NicAdvert> {
    nics.iter().filter(|nic| nic.kind == kind).collect()
}

/// Where the other side's NIC is found from a host that is not its own, in whose domain it is.
pub(super) fn beyond<'a>(local: &[NicAdvert], remote: &'a NicAdvert) -> Option<&'a MemoryDomain> {
    let mut alike = local.iter().filter(|nic| nic.kind == remote.kind).peekable();
    let is_here = alike.peek().is_none() || alike.any(|nic| nic.host == remote.host);
    remote.domain.as_ref().filter(|_| !is_here)
}

/// What keeps two NICs of a kind apart. One that reaches by memory names its host, and maybe a domain of hosts; of UCX's and libfabric's, some do and
/// others cross the network.
fn between(source: &NicAdvert, destination: &NicAdvert) -> Option<Obstacle> {
    let is_one_host = source.host == destination.host;
    match source.kind {
        TransportKind::Cuda | TransportKind::Shm => {
            let is_here = is_one_host && !source.host.is_empty();
            let domains = source.domain.as_ref().zip(destination.domain.as_ref());
            let apart = if source.kind == TransportKind::Cuda { Obstacle::OtherDomain } else { Obstacle::Apart };
            if !is_here && domains.is_none_or(|(one, other)| one.name != other.name) {
                return Some(apart);
            }
            let (from, to) = source.gpu.as_ref().zip(destination.gpu.as_ref())?;
            between_gpus(from, to, is_here)
        }
        TransportKind::Ucx | TransportKind::Libfabric => (!is_one_host).then_some(Obstacle::Apart),
        _ => None,
    }
}

/// What keeps the destination's GPU from reading the source's memory, where that is certain. What neither process sees, it has to try.
fn between_gpus(source: &GpuIdentity, destination: &GpuIdentity, is_here: bool) -> Option<Obstacle> {
    if is_here && source.uuid == destination.uuid {
        return None;
    }
    if source.is_instance || destination.is_instance {
        return Some(Obstacle::Instance);
    }
    let seen = destination.reaches(&source.uuid).or_else(|| source.reaches(&destination.uuid));
    (is_here && seen == Some(false)).then_some(Obstacle::NoPeerAccess)
}

/// Whether the destination's own side copies, from memory of the same host or domain.
pub(super) fn is_local(kind: TransportKind) -> bool {
    matches!(kind, TransportKind::Shm | TransportKind::Cuda)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn nic(kind: TransportKind, host: &str) -> NicAdvert {
        let (address, keys) = (Bytes::from_static(b"here"), Bytes::new());
        NicAdvert { kind, device: "d".into(), host: host.into(), address, keys, domain: None, gpu: None }
    }

    fn gpu(host: &str, domain: &str) -> NicAdvert {
        let domain = MemoryDomain { name: domain.into(), address: Bytes::from_static(b"beyond") };
        NicAdvert { domain: Some(domain), ..nic(TransportKind::Cuda, host) }
    }

    #[test]
    fn gpus_of_one_domain_meet_across_hosts() {
        let tcp = || nic(TransportKind::Tcp, "");
        let here = [tcp(), gpu("a", "rack-7/1")];
        for lane in 0..4 {
            assert_eq!(path(&here, &[gpu("b", "rack-7/1"), tcp()], lane), Some((1, 0)));
            // Another clique, another rack, and who is too old to say, or has a pool without handles.
            for other in [gpu("b", "rack-7/2"), gpu("b", "rack-8/1"), nic(TransportKind::Cuda, "b")] {
                assert_eq!(path(&here, &[other.clone(), tcp()], lane), Some((0, 1)), "{other:?}");
                assert_eq!(path(&[other, tcp()], &here, lane), Some((1, 0)));
            }
            // On one host that is nobody's business.
            assert_eq!(path(&here, &[nic(TransportKind::Cuda, "a"), tcp()], lane), Some((1, 0)));
        }
        let why = passed_over(&here, &[gpu("b", "rack-8/1"), tcp()], Some(TransportKind::Tcp));
        assert!(matches!(why[..], [PassedOver { kind: TransportKind::Cuda, obstacle: Obstacle::OtherDomain }]));
    }

    /// A GPU of one host that reaches some others, and sees some that it does not reach.
    fn of_host(number: u8, is_instance: bool, others: &[(u8, bool)]) -> NicAdvert {
        let others = others.iter().map(|(other, reached)| ([*other; 16], *reached)).collect();
        let gpu = GpuIdentity { uuid: [number; 16], is_instance, others };
        NicAdvert { gpu: Some(gpu), ..nic(TransportKind::Cuda, "a") }
    }

    /// Which obstacle has a pair of GPUs go through tcp in either direction; `None` where it goes through neither.
    fn obstacle(one: &NicAdvert, other: &NicAdvert) -> Option<Obstacle> {
        let with_tcp = |gpu: &NicAdvert| [gpu.clone(), nic(TransportKind::Tcp, "")];
        let (one, other) = (with_tcp(one), with_tcp(other));
        let found = [(&one, &other), (&other, &one)].map(|(from, to)| {
            let chosen = path(from, to, 0).expect("tcp reaches everybody");
            match passed_over(from, to, Some(from[chosen.0].kind))[..] {
                [] => {
                    assert_eq!(chosen, (0, 0));
                    None
                }
                [PassedOver { kind: TransportKind::Cuda, obstacle }] => {
                    assert_eq!(chosen, (1, 1));
                    Some(obstacle)
                }
                ref more => panic!("{more:?}"),
            }
        });
        assert_eq!(found[0], found[1], "both ways alike");
        found[0]
    }

    #[test]
    fn gpus_that_do_not_read_each_other_take_the_next_transport() {
        let (seen, unseen) = (of_host(0, false, &[(1, true), (2, false)]), of_host(3, false, &[]));
        assert_eq!(obstacle(&seen, &of_host(1, false, &[(0, true)])), None);
        // Either one's word is enough, where the other sees only itself.
        assert_eq!(obstacle(&seen, &of_host(2, false, &[(0, false)])), Some(Obstacle::NoPeerAccess));
        assert_eq!(obstacle(&seen, &of_host(2, false, &[])), Some(Obstacle::NoPeerAccess));
        // What nobody sees is tried, and so is what an older peer does not say.
        assert_eq!(obstacle(&seen, &unseen), None);
        assert_eq!(obstacle(&seen, &nic(TransportKind::Cuda, "a")), None);
        // The same GPU always, a MIG instance nothing else.
        assert_eq!(obstacle(&seen, &seen), None);
        let instance = of_host(4, true, &[]);
        assert_eq!(obstacle(&instance, &instance), None);
        for other in [&seen, &unseen, &of_host(5, true, &[])] {
            assert_eq!(obstacle(&instance, other), Some(Obstacle::Instance));
        }
        // Whose kernels it is that read decides, should the two see it differently.
        let (one, other) = ([of_host(1, false, &[(2, true)])], [of_host(2, false, &[(1, false)])]);
        assert_eq!((path(&one, &other, 0), path(&other, &one, 0)), (None, Some((0, 0))));
    }

    #[test]
    fn gpus_of_one_domain_need_no_peer_access() {
        let beyond = |number: u8, is_instance, host: &str| NicAdvert {
            gpu: of_host(number, is_instance, &[(0, false), (1, false)]).gpu,
            ..gpu(host, "rack-7/1")
        };
        assert_eq!(obstacle(&beyond(0, false, "a"), &beyond(1, false, "b")), None);
        assert_eq!(obstacle(&beyond(0, true, "a"), &beyond(1, false, "b")), Some(Obstacle::Instance));
        let elsewhere = NicAdvert { host: "b".into(), ..of_host(0, false, &[]) };
        assert_eq!(obstacle(&of_host(0, false, &[]), &elsewhere), Some(Obstacle::OtherDomain), "a name is no GPU");
    }

    #[test]
    fn of_several_gpus_those_meet_that_can_and_the_closest_say_why_not() {
        let lone = of_host(7, false, &[(1, false)]);
        let near = of_host(0, false, &[(1, true)]);
        let to = [of_host(1, false, &[(7, false), (0, true)])];
        for lane in 0..4 {
            assert_eq!(path(&[lone.clone(), near.clone()], &to, lane), Some((1, 0)));
        }
        let far = NicAdvert { host: "b".into(), ..of_host(9, false, &[]) };
        let why = passed_over(&[far, lone], &to, None);
        assert!(matches!(why[..], [PassedOver { obstacle: Obstacle::NoPeerAccess, .. }]), "{why:?}");
        assert!(why[0].to_string().contains("no peer access"), "{}", why[0]);
    }

    #[test]
    fn the_way_from_beyond_is_taken_from_beyond_only() {
        let found =
            |local: &[NicAdvert], remote: &NicAdvert| beyond(local, remote).map(|domain| domain.address.clone());
        let there = gpu("b", "rack-7/1");
        assert_eq!(found(&[gpu("a", "rack-7/1")], &there).as_deref(), Some(&b"beyond"[..]));
        assert_eq!(found(&[gpu("b", "rack-7/1")], &there), None);
        assert_eq!(found(&[nic(TransportKind::Tcp, "")], &there), None);
        assert_eq!(found(&[gpu("a", "rack-7/1")], &nic(TransportKind::Cuda, "b")), None);
    }

    #[test]
    fn shared_memory_only_on_one_host() {
        let here = [nic(TransportKind::Tcp, ""), nic(TransportKind::Shm, "a")];
        for lane in 0..4 {
            assert_eq!(path(&here, &[nic(TransportKind::Shm, "a"), nic(TransportKind::Tcp, "")], lane), Some((1, 0)));
            assert_eq!(path(&here, &[nic(TransportKind::Shm, "b"), nic(TransportKind::Tcp, "")], lane), Some((0, 1)));
            assert_eq!(path(&here, &[nic(TransportKind::Shm, "b")], lane), None);
        }
    }

    #[test]
    fn memory_of_ucx_does_not_meet_its_network() {
        let here = [nic(TransportKind::Ucx, "a"), nic(TransportKind::Ucx, "")];
        for lane in 0..4 {
            assert_eq!(path(&here, &[nic(TransportKind::Ucx, "b"), nic(TransportKind::Ucx, "")], lane), Some((1, 1)));
            assert_eq!(path(&here, &[nic(TransportKind::Ucx, "a")], lane), Some((0, 0)));
            assert_eq!(path(&here, &[nic(TransportKind::Ucx, "b")], lane), None);
        }
    }

    fn tcp(count: usize) -> Vec<NicAdvert> {
        vec![nic(TransportKind::Tcp, ""); count]
    }

    #[test]
    fn rails_begin_with_the_path_and_never_meet_at_the_destination() {
        for (from, to) in [(1, 1), (4, 4), (4, 2), (2, 4), (1, 3), (3, 5)] {
            for lane in 0..8 {
                for most in 1..6 {
                    let all = rails(&tcp(from), &tcp(to), lane, most);
                    assert_eq!(all.first().copied(), path(&tcp(from), &tcp(to), lane));
                    assert_eq!(all.len(), most.min(to), "{from} to {to}, lane {lane}: {all:?}");
                    let ends: std::collections::BTreeSet<usize> = all.iter().map(|(_, to)| *to).collect();
                    assert_eq!(ends.len(), all.len());
                    assert!(all.iter().all(|(a, b)| *a < from && *b < to));
                }
            }
        }
        // The best kind first, then whatever else joins the two; nothing of one side only.
        let here = [nic(TransportKind::Tcp, ""), nic(TransportKind::Shm, "a"), nic(TransportKind::Ucx, "")];
        let there = [nic(TransportKind::Shm, "a"), nic(TransportKind::Tcp, "")];
        assert_eq!(rails(&here, &there, 0, 4), [(1, 0), (0, 1)]);
        assert_eq!(rails(&here, &there, 3, 1), [(1, 0)]);
        assert_eq!(rails(&[nic(TransportKind::Shm, "a")], &[nic(TransportKind::Shm, "b")], 0, 4), []);
    }

    /// Ranks list NICs as they are near. Which one a pair begins with says its lane, or all pairs would begin with the nearest.
    #[test]
    fn rails_take_nics_in_the_order_of_the_lists() {
        let all = |from, to, lane, most| rails(&tcp(from), &tcp(to), lane, most);
        assert_eq!(all(4, 4, 0, 4), [(0, 0), (1, 1), (2, 2), (3, 3)]);
        assert_eq!(all(4, 4, 0, 2), [(0, 0), (1, 1)]);
        assert_eq!(all(4, 4, 6, 4), [(2, 2), (3, 3), (0, 0), (1, 1)]);
        // Where one side has fewer near it, they serve in turn.
        assert_eq!(all(2, 4, 0, 4), [(0, 0), (1, 1), (0, 2), (1, 3)]);
        assert_eq!(all(4, 2, 0, 4), [(0, 0), (1, 1)]);
        // What other kinds stand between does not matter.
        let kinds = [TransportKind::Tcp, TransportKind::Ucx, TransportKind::Tcp, TransportKind::Ucx];
        let mixed = kinds.map(|kind| nic(kind, ""));
        assert_eq!(rails(&mixed, &mixed, 0, 4), [(1, 1), (3, 3), (0, 0), (2, 2)]);
    }

    #[test]
    fn pairs_are_spread_over_rails() {
        let lanes = |from: usize, to: usize| {
            let all = (0..8).map(|lane| path(&tcp(from), &tcp(to), lane).expect("a path"));
            all.collect::<Vec<_>>()
        };
        assert_eq!(lanes(1, 1), [(0, 0); 8]);
        assert_eq!(lanes(4, 4)[..5], [(0, 0), (1, 1), (2, 2), (3, 3), (0, 0)]);
        assert_eq!(lanes(4, 2)[..5], [(0, 0), (1, 1), (2, 0), (3, 1), (0, 0)]);
        assert_eq!(lanes(1, 3)[..4], [(0, 0), (0, 1), (0, 2), (0, 0)]);
        // Nothing of a kind that only one side has, or of another host's memory, takes part.
        let mixed = [nic(TransportKind::Shm, "b"), nic(TransportKind::Tcp, ""), nic(TransportKind::Tcp, "")];
        let with = [nic(TransportKind::Tcp, ""), nic(TransportKind::Shm, "a"), nic(TransportKind::Tcp, "")];
        assert_eq!(path(&mixed, &with, 0), Some((1, 0)));
        assert_eq!(path(&mixed, &with, 1), Some((2, 2)));
    }

    #[test]
    fn what_was_passed_over_and_why() {
        let source = [nic(TransportKind::Cuda, "a"), nic(TransportKind::Shm, "a"), nic(TransportKind::Tcp, "")];
        let destination = [nic(TransportKind::Shm, "b"), nic(TransportKind::Ucx, ""), nic(TransportKind::Tcp, "")];
        let words = |chosen| {
            let all = passed_over(&source, &destination, Some(chosen));
            all.iter().map(PassedOver::to_string).collect::<Vec<_>>()
        };
        assert_eq!(
            words(TransportKind::Tcp),
            [
                "cuda (only the prefill side has opened it)",
                "shm (the two are on different hosts)",
                "ucx (only the decode side has opened it)"
            ]
        );
        assert_eq!(words(TransportKind::Cuda), [""; 0]);
    }
}
