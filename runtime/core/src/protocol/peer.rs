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
        let (nic, remote_nic) = path(&local.nics, &remote.nics).ok_or_else(|| {
            FailReason::Mismatch(format!(
                "no transport reaches from {} to {}; open one kind on both sides",
                kinds(&local.nics),
                kinds(&remote.nics)
            ))
        })?;
        Ok(Peer { profile: remote, plan, direction, nic, remote_nic })
    }

    /// Whether the local side initiates transfers.
    pub(crate) fn initiates(&self, local: Role) -> bool {
        matches!((local, self.direction), (Role::Decode, Direction::Pull) | (Role::Prefill, Direction::Push))
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

/// The best pair of NICs: shared memory of one host before anything that crosses a network.
fn path(local: &[NicAdvert], remote: &[NicAdvert]) -> Option<(usize, usize)> {
    const PREFERENCE: [TransportKind; 3] = [TransportKind::Shm, TransportKind::Sim, TransportKind::Tcp];
    PREFERENCE.into_iter().find_map(|kind| {
        local.iter().enumerate().filter(|(_, nic)| nic.kind == kind).find_map(|(here, nic)| {
            let there = remote.iter().position(|other| other.kind == kind && reaches(nic, other))?;
            Some((here, there))
        })
    })
}

fn reaches(local: &NicAdvert, remote: &NicAdvert) -> bool {
    local.kind != TransportKind::Shm || (!local.host.is_empty() && local.host == remote.host)
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
        assert_eq!(path(&here, &[nic(TransportKind::Shm, "a"), nic(TransportKind::Tcp, "")]), Some((1, 0)));
        assert_eq!(path(&here, &[nic(TransportKind::Shm, "b"), nic(TransportKind::Tcp, "")]), Some((0, 1)));
        assert_eq!(path(&here, &[nic(TransportKind::Shm, "b")]), None);
    }

    #[test]
    fn direction_is_symmetric() {
        assert_eq!(direction(None, None), Ok(Direction::Pull));
        assert_eq!(direction(Some(Direction::Push), None), Ok(Direction::Push));
        assert_eq!(direction(None, Some(Direction::Push)), Ok(Direction::Push));
        assert!(direction(Some(Direction::Pull), Some(Direction::Push)).is_err());
    }
}
