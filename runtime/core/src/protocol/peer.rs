//! What two workers make of each other's profiles: both sides compute the same answer.

use super::{FailReason, NicAdvert, Role, WorkerProfile};
use crate::{Direction, PairPlan, TransportKind};

/// A worker of the other role that this one can exchange KV with.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) profile: WorkerProfile,
    pub(crate) plan: PairPlan,
    pub(crate) direction: Direction,
    /// Index of the local NIC.
    pub(crate) nic: usize,
    pub(crate) remote_nic: usize,
}

impl Peer {
    /// Compares profiles: model, direction, NICs.
    pub(crate) fn meet(local: &WorkerProfile, remote: WorkerProfile) -> Result<Peer, FailReason> {
        let (source, destination) = match local.role {
            Role::Prefill => (local, &remote),
            Role::Decode => (&remote, local),
        };
        if source.role == destination.role {
            return Err(FailReason::Mismatch(format!("both are {} workers", local.role)));
        }
        remote
            .layout
            .validate()
            .map_err(|error| FailReason::Mismatch(format!("the peer's pool layout is impossible: {error}")))?;
        let plan = PairPlan::new(&source.geometry, source.rank, &destination.geometry, destination.rank)
            .map_err(|error| FailReason::Mismatch(error.to_string()))?;
        let direction = direction(source.direction, destination.direction)?;
        let lane = lane(source, destination);
        let (from, to) = path(&source.nics, &destination.nics, lane).ok_or_else(|| {
            FailReason::Mismatch(format!(
                "no transport reaches from {} to {}; open one kind on both sides",
                kinds(&local.nics),
                kinds(&remote.nics)
            ))
        })?;
        let (nic, remote_nic) = if local.role == Role::Prefill { (from, to) } else { (to, from) };
        Ok(Peer { profile: remote, plan, direction, nic, remote_nic })
    }

    /// Whether the local side initiates transfers.
    pub(crate) fn initiates(&self, local: Role) -> bool {
        matches!((local, self.direction), (Role::Decode, Direction::Pull) | (Role::Prefill, Direction::Push))
    }

    /// Whether the destination reads the source's memory: then what it read counts only if the source still held it afterwards. A push
    /// inside one host or through UCX is a doorbell to the destination, which may hear it late.
    pub(crate) fn destination_reads(&self) -> bool {
        self.direction == Direction::Pull
            || self.remote().is_some_and(|nic| is_local(nic.kind) || nic.kind == TransportKind::Ucx)
    }

    /// The peer's NIC that was chosen.
    pub(crate) fn remote(&self) -> Option<&NicAdvert> {
        self.profile.nics.get(self.remote_nic)
    }
}

/// Pull, unless a side asks otherwise; a contradiction is an error.
fn direction(prefill: Option<Direction>, decode: Option<Direction>) -> Result<Direction, FailReason> {
    match (prefill, decode) {
        (Some(prefill), Some(decode)) if prefill != decode => Err(FailReason::Mismatch(format!(
            "direction: the prefill side wants {prefill:?}, the decode side {decode:?}; leave one of them to auto"
        ))),
        (Some(wanted), _) | (_, Some(wanted)) => Ok(wanted),
        (None, None) => Ok(Direction::Pull),
    }
}

/// Spreads pairs of ranks over NICs: pairs that share an end and differ by one rank, or by one group, lie on neighbouring NICs.
fn lane(source: &WorkerProfile, destination: &WorkerProfile) -> u64 {
    let place = |profile: &WorkerProfile| u64::from(profile.group.0) + u64::from(profile.rank.0);
    place(source) + place(destination)
}

/// A pair of NICs of the best kind that both sides have: GPU and shared memory of one host before anything that crosses a network. Among several of
/// that kind the lane decides, and NICs of one index meet each other, as rails are wired; where one side has fewer, its NICs serve in turn.
fn path(source: &[NicAdvert], destination: &[NicAdvert], lane: u64) -> Option<(usize, usize)> {
    const PREFERENCE: [TransportKind; 5] =
        [TransportKind::Cuda, TransportKind::Shm, TransportKind::Sim, TransportKind::Ucx, TransportKind::Tcp];
    let of_kind = |nics: &[NicAdvert], meets: &dyn Fn(&NicAdvert) -> bool| -> Vec<usize> {
        nics.iter().enumerate().filter(|(_, nic)| meets(nic)).map(|(index, _)| index).collect()
    };
    let pick = |nics: &[usize], rail: u64| nics.get((rail % (nics.len() as u64).max(1)) as usize).copied();
    PREFERENCE.into_iter().find_map(|kind| {
        let joins = |one: &NicAdvert, other: &NicAdvert| one.kind == kind && other.kind == kind && reaches(one, other);
        let sources = of_kind(source, &|nic| destination.iter().any(|other| joins(nic, other)));
        let reachable = of_kind(destination, &|nic| source.iter().any(|other| joins(other, nic)));
        let rail = lane % (sources.len().max(reachable.len()) as u64).max(1);
        let from = pick(&sources, rail)?;
        let partner = source.get(from)?;
        let to = pick(&of_kind(destination, &|nic| joins(partner, nic)), rail)?;
        Some((from, to))
    })
}

/// A NIC that reaches by memory names its host; of UCX's, some do and others cross the network.
fn reaches(local: &NicAdvert, remote: &NicAdvert) -> bool {
    match local.kind {
        kind if is_local(kind) => !local.host.is_empty() && local.host == remote.host,
        TransportKind::Ucx => local.host == remote.host,
        _ => true,
    }
}

/// Whether the destination's own side copies from memory of the same host.
fn is_local(kind: TransportKind) -> bool {
    matches!(kind, TransportKind::Shm | TransportKind::Cuda)
}

fn kinds(nics: &[NicAdvert]) -> String {
    let names: Vec<String> = nics.iter().map(|nic| format!("{}:{}", nic.kind, nic.device)).collect();
    if names.is_empty() { "no NIC".to_owned() } else { names.join(",") }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn nic(kind: TransportKind, host: &str) -> NicAdvert {
        NicAdvert { kind, device: "d".into(), host: host.into(), address: Bytes::new(), keys: Bytes::new() }
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

    fn rails(count: usize) -> Vec<NicAdvert> {
        vec![nic(TransportKind::Tcp, ""); count]
    }

    #[test]
    fn pairs_are_spread_over_rails() {
        let lanes = |from: usize, to: usize| {
            let all = (0..8).map(|lane| path(&rails(from), &rails(to), lane).expect("a path"));
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

    fn profile(role: Role, group: u32, rank: u32, nics: usize) -> WorkerProfile {
        let model = crate::Model::preset("tiny").expect("a preset");
        let parallel = crate::Parallel { tp: 4, ..Default::default() };
        let geometry = std::sync::Arc::new(crate::GroupGeometry { model, format: Default::default(), parallel });
        let rank = crate::Rank(rank);
        let layout = std::sync::Arc::new(geometry.shard(rank).expect("a rank").layout(&[4]));
        WorkerProfile { role, group: crate::GroupId(group), rank, geometry, layout, nics: rails(nics), direction: None }
    }

    #[test]
    fn both_sides_choose_the_same_pair() {
        for (here, there) in [(1, 1), (4, 4), (8, 2), (3, 5)] {
            for (group, rank) in [(0, 0), (0, 3), (1, 2)] {
                let source = profile(Role::Prefill, group, rank, here);
                let destination = profile(Role::Decode, 7, 1, there);
                let pushes = Peer::meet(&source, destination.clone()).expect("they fit");
                let pulls = Peer::meet(&destination, source).expect("they fit");
                assert_eq!((pushes.nic, pushes.remote_nic), (pulls.remote_nic, pulls.nic));
            }
        }
        // One decode rank meets the four ranks of one group on four rails.
        let destination = profile(Role::Decode, 7, 0, 4);
        let nics = (0..4).map(|rank| Peer::meet(&destination, profile(Role::Prefill, 0, rank, 4)).expect("fit").nic);
        assert_eq!(nics.collect::<std::collections::BTreeSet<_>>().len(), 4);
    }

    #[test]
    fn direction_is_symmetric() {
        assert_eq!(direction(None, None), Ok(Direction::Pull));
        assert_eq!(direction(Some(Direction::Push), None), Ok(Direction::Push));
        assert_eq!(direction(None, Some(Direction::Push)), Ok(Direction::Push));
        assert!(direction(Some(Direction::Pull), Some(Direction::Push)).is_err());
    }
}
