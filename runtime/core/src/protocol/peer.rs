//! What two workers make of each other's profiles: both sides compute the same answer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;

use super::flight::Attempt;
use super::path::{beyond, is_local, passed_over, path, rails};
use super::{
    ChosenPath, Event, FailReason, NicAdvert, NicCommand, Outbox, PassedOver, PeerName, RailHealth, RailTerms,
    RailTurn, Rails, RdmaShortfall, Role, ShownPath, WorkerProfile, rdma,
};
use crate::{Direction, Evidence, Moment, NodeId, PairPlan, TransportKind};

/// A worker of the other role that this one can exchange KV with.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) profile: WorkerProfile,
    pub(crate) plan: PairPlan,
    pub(crate) direction: Direction,
    /// Index of the local NIC.
    pub(crate) nic: usize,
    /// All pairs of NICs, the local one first, that move what is exchanged; the first is the one above. Where this side is read from, that one.
    pub(crate) pairs: Vec<(usize, usize)>,
    /// Who of them carries how much of what this side initiates.
    pub(crate) rails: Rails,
    /// Pushes are shared out, and announced: both sides have said over how many rails.
    pub(crate) shares_pushes: bool,
    /// Which conversation it is, of those that the rank has had.
    pub(crate) conversation: u64,
    passed_over: Vec<PassedOver>,
}

impl Peer {
    /// Compares profiles: model, direction, NICs. Where RDMA is required, no path without it is taken.
    pub(crate) fn meet(
        local: &WorkerProfile,
        mut remote: WorkerProfile,
        require_rdma: bool,
    ) -> Result<Peer, FailReason> {
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
            let why: Vec<String> =
                passed_over(&source.nics, &destination.nics, None).iter().map(PassedOver::to_string).collect();
            FailReason::Mismatch(format!(
                "no transport reaches from {} to {}; open one kind on both sides that does: {}",
                kinds(&local.nics),
                kinds(&remote.nics),
                why.join(", ")
            ))
        })?;
        let (nic, remote_nic) = if local.role == Role::Prefill { (from, to) } else { (to, from) };
        if let Some(short) = shortfall(require_rdma, local, &remote, (nic, remote_nic)).filter(|_| require_rdma) {
            return Err(FailReason::Mismatch(short.to_string()));
        }
        let chosen = local.nics.get(nic).map(|nic| nic.kind);
        let passed_over = passed_over(&source.nics, &destination.nics, chosen);
        for nic in &mut remote.nics {
            if let Some(domain) = beyond(&local.nics, nic) {
                nic.address = domain.address.clone();
            }
        }
        let (pairs, rails) = (vec![(nic, remote_nic)], Rails::new([nic], RailTerms::default()));
        let (shares_pushes, conversation) = (false, 0);
        Ok(Peer { profile: remote, plan, direction, nic, pairs, rails, shares_pushes, conversation, passed_over })
    }

    /// With as many rails as these terms allow where this side reads: then nobody else has to know how it shares its work out. Where it pushes, or
    /// is pushed to, with as many as both sides allow: then no two of them meet at a NIC of the source either.
    pub(crate) fn over_rails(mut self, local: &WorkerProfile, terms: RailTerms, require_rdma: bool) -> Peer {
        let (source, destination) = match local.role {
            Role::Prefill => (local, &self.profile),
            Role::Decode => (&self.profile, local),
        };
        let most = match (self.direction, local.role) {
            (Direction::Pull, Role::Decode) => terms.rails_max,
            (Direction::Pull, Role::Prefill) => return self,
            (Direction::Push, _) => terms.rails_max.min(self.profile.rails),
        };
        self.shares_pushes = self.direction == Direction::Push && most > 1;
        if self.direction == Direction::Push && !self.shares_pushes {
            return self;
        }
        let most = most.max(1) as usize;
        let all = if self.shares_pushes { usize::MAX } else { most };
        let mut pairs = rails(&source.nics, &destination.nics, lane(source, destination), all);
        if self.shares_pushes {
            let mut taken = BTreeSet::new();
            pairs.retain(|(from, _)| taken.insert(*from));
            pairs.truncate(most);
        }
        let pairs =
            pairs.into_iter().map(|(from, to)| if local.role == Role::Prefill { (from, to) } else { (to, from) });
        let fits =
            |pair: &(usize, usize)| !require_rdma || shortfall(require_rdma, local, &self.profile, *pair).is_none();
        self.pairs = pairs.filter(fits).collect();
        self.rails = Rails::new(self.pairs.iter().map(|(nic, _)| *nic), terms);
        self
    }

    /// As it is met in that conversation.
    pub(crate) fn of_conversation(mut self, conversation: u64) -> Peer {
        self.conversation = conversation;
        self
    }

    /// Connects every NIC that moves what this side initiates.
    pub(crate) fn connect(&self, node: NodeId, local: Role, outbox: &mut Outbox) {
        for (nic, _) in self.pairs.iter().filter(|_| self.initiates(local)) {
            self.connect_at(node, *nic, outbox);
        }
    }

    /// Connects one of them, anew if it was.
    pub(crate) fn connect_at(&self, node: NodeId, nic: usize, outbox: &mut Outbox) {
        let Some(remote) = self.remote_of(nic) else { return };
        let (address, keys) = (remote.address.clone(), remote.keys.clone());
        let layout = Arc::clone(&self.profile.layout);
        outbox.nic(nic, NicCommand::Connect { node, address, keys, layout });
    }

    /// Lets it go at every NIC that was connected.
    pub(crate) fn disconnect(&self, node: NodeId, local: Role, outbox: &mut Outbox) {
        for (nic, _) in self.pairs.iter().filter(|_| self.initiates(local)) {
            outbox.nic(*nic, NicCommand::Disconnect { node });
        }
    }

    /// Of the peer's NIC that each NIC of this side is joined to.
    pub(crate) fn addresses(&self) -> BTreeMap<usize, Bytes> {
        self.pairs.iter().map(|(nic, _)| (*nic, self.address_of(*nic))).collect()
    }

    /// The peer's NIC that a NIC of this side is joined to.
    pub(crate) fn remote_of(&self, nic: usize) -> Option<&NicAdvert> {
        let (_, remote) = self.pairs.iter().find(|(local, _)| *local == nic)?;
        self.profile.nics.get(*remote)
    }

    /// Where that is.
    pub(crate) fn address_of(&self, nic: usize) -> Bytes {
        self.remote_of(nic).map(|nic| nic.address.clone()).unwrap_or_default()
    }

    /// One of several rails is something else than before, for whoever watches.
    pub(crate) fn tell_turn(
        &self,
        node: NodeId,
        local: &WorkerProfile,
        (nic, health): (usize, RailHealth),
        reason: &str,
        outbox: &mut Outbox,
    ) {
        let (Some(here), Some(there)) = (local.nics.get(nic), self.remote_of(nic)) else { return };
        if self.rails.are_several() {
            outbox.event(Event::RailTurned(Box::new(RailTurn {
                peer: PeerName::of(&self.profile, node),
                kind: here.kind,
                device: here.device.clone(),
                remote_device: there.device.clone(),
                health,
                reason: reason.to_owned(),
            })));
        }
    }

    /// A rail failed, or fell silent.
    pub(crate) fn blame(
        &mut self,
        now: Moment,
        (node, nic): (NodeId, usize),
        local: &WorkerProfile,
        reason: &str,
        outbox: &mut Outbox,
    ) {
        if let Some(health) = self.rails.failed(now, nic) {
            self.tell_turn(node, local, (nic, health), reason, outbox);
        }
    }

    /// Whether the local side initiates transfers.
    pub(crate) fn initiates(&self, local: Role) -> bool {
        matches!((local, self.direction), (Role::Decode, Direction::Pull) | (Role::Prefill, Direction::Push))
    }

    /// Whether the destination reads the source's memory: then what it read counts only if the source still held it afterwards. A push
    /// inside one host, through UCX or libfabric is a doorbell to the destination, which may hear it late.
    pub(crate) fn destination_reads(&self) -> bool {
        let reads =
            |nic: &NicAdvert| is_local(nic.kind) || matches!(nic.kind, TransportKind::Ucx | TransportKind::Libfabric);
        let mut ends = self.pairs.iter().filter_map(|(_, remote)| self.profile.nics.get(*remote));
        self.direction == Direction::Pull || ends.any(reads)
    }

    /// The path, and what was better, for whoever watches.
    pub(crate) fn tell_path(&self, node: NodeId, local: &WorkerProfile, require_rdma: bool, outbox: &mut Outbox) {
        for pair in &self.pairs {
            if let Some(chosen) = self.chosen(node, local, *pair, require_rdma) {
                outbox.event(Event::PathChosen(Box::new(chosen)));
            }
        }
    }

    /// A NIC shows more of the path. What falls short of RDMA is told, and refused where that is required: says whether it was.
    pub(crate) fn show_path(
        &self,
        node: NodeId,
        local: &WorkerProfile,
        (nic, evidence): (usize, Evidence),
        require_rdma: bool,
        outbox: &mut Outbox,
    ) -> bool {
        let Some(advert) = local.nics.get(nic) else { return false };
        let shortfall = rdma::of_lanes(advert, &evidence);
        let refused = shortfall.as_ref().filter(|_| require_rdma);
        if let Some(short) = refused {
            outbox.nic(nic, NicCommand::Refuse { node, reason: short.to_string() });
        }
        let is_refused = refused.is_some();
        let (peer, kind, device) = (PeerName::of(&self.profile, node), advert.kind, advert.device.clone());
        outbox.event(Event::PathShown(Box::new(ShownPath { peer, kind, device, evidence, shortfall })));
        is_refused
    }

    fn chosen(
        &self,
        node: NodeId,
        local: &WorkerProfile,
        pair: (usize, usize),
        require_rdma: bool,
    ) -> Option<ChosenPath> {
        let (here, there) = (local.nics.get(pair.0)?, self.profile.nics.get(pair.1)?);
        Some(ChosenPath {
            peer: PeerName::of(&self.profile, node),
            kind: here.kind,
            device: here.device.clone(),
            remote_device: there.device.clone(),
            direction: self.direction,
            passed_over: self.passed_over.clone(),
            shortfall: shortfall(require_rdma, local, &self.profile, pair),
        })
    }
}

/// The peer, where it is still the one whose rails a transfer was posted on.
pub(super) fn posted_by<'peers>(
    peers: &'peers mut BTreeMap<NodeId, Result<Peer, FailReason>>,
    node: NodeId,
    attempt: &Attempt,
) -> Option<&'peers mut Peer> {
    let peer = peers.get_mut(&node)?.as_mut().ok()?;
    (attempt.conversation == Some(peer.conversation)).then_some(peer)
}

/// What a pair of NICs, the local one first, falls short of.
fn shortfall(
    required: bool,
    local: &WorkerProfile,
    remote: &WorkerProfile,
    (nic, remote_nic): (usize, usize),
) -> Option<RdmaShortfall> {
    let (here, there) = (local.nics.get(nic)?, remote.nics.get(remote_nic)?);
    rdma::of_path(required, (&local.nics, here), (&remote.nics, there))
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

fn kinds(nics: &[NicAdvert]) -> String {
    let names: Vec<String> = nics.iter().map(|nic| format!("{}:{}", nic.kind, nic.device)).collect();
    if names.is_empty() { "no NIC".to_owned() } else { names.join(",") }
}

#[cfg(test)]
mod tests {

    use super::*;

    fn nic(kind: TransportKind, host: &str) -> NicAdvert {
        let (address, keys, domain) = (Bytes::new(), Bytes::new(), None);
        NicAdvert { kind, device: "d".into(), host: host.into(), address, keys, domain, gpu: None }
    }

    fn tcp(count: usize) -> Vec<NicAdvert> {
        vec![nic(TransportKind::Tcp, ""); count]
    }

    fn profile(role: Role, group: u32, rank: u32, nics: usize) -> WorkerProfile {
        let model = crate::Model::preset("tiny").expect("a preset");
        let parallel = crate::Parallel { tp: 4, ..Default::default() };
        let geometry = std::sync::Arc::new(crate::GroupGeometry { model, format: Default::default(), parallel });
        let rank = crate::Rank(rank);
        let layout = std::sync::Arc::new(geometry.shard(rank).expect("a rank").layout(&[4]));
        WorkerProfile {
            role,
            group: crate::GroupId(group),
            rank,
            geometry,
            layout,
            nics: tcp(nics),
            direction: None,
            rails: 0,
        }
    }

    #[test]
    fn both_sides_choose_the_same_pair() {
        for (here, there) in [(1, 1), (4, 4), (8, 2), (3, 5)] {
            for (group, rank) in [(0, 0), (0, 3), (1, 2)] {
                let source = profile(Role::Prefill, group, rank, here);
                let destination = profile(Role::Decode, 7, 1, there);
                let pushes = Peer::meet(&source, destination.clone(), false).expect("they fit");
                let pulls = Peer::meet(&destination, source, false).expect("they fit");
                let [(from, to)] = pulls.pairs[..] else { panic!("{pulls:?}") };
                assert_eq!((pushes.nic, &pushes.pairs[..]), (to, &[(to, from)][..]));
            }
        }
        // One decode rank meets the four ranks of one group on four rails.
        let destination = profile(Role::Decode, 7, 0, 4);
        let nics =
            (0..4).map(|rank| Peer::meet(&destination, profile(Role::Prefill, 0, rank, 4), false).expect("fit").nic);
        assert_eq!(nics.collect::<std::collections::BTreeSet<_>>().len(), 4);
    }

    #[test]
    fn who_reads_has_as_many_rails_as_it_may() {
        let terms = RailTerms { rails_max: 3, ..RailTerms::default() };
        let meet = |local: &WorkerProfile, remote: &WorkerProfile, required| {
            let met = Peer::meet(local, remote.clone(), required);
            met.map(|peer| peer.over_rails(local, terms, required).pairs)
        };
        let (source, destination) = (profile(Role::Prefill, 0, 1, 4), profile(Role::Decode, 7, 0, 4));
        assert_eq!(meet(&destination, &source, false), Ok(vec![(0, 0), (1, 1), (2, 2)]));
        assert_eq!(meet(&source, &destination, false).map(|pairs| pairs.len()), Ok(1), "it is read");
        let pushed = WorkerProfile { direction: Some(Direction::Push), ..destination.clone() };
        assert_eq!(
            meet(&pushed, &source, false).map(|pairs| pairs.len()),
            Ok(1),
            "the source does not say that it can"
        );
        // Where RDMA is required no rail goes without.
        let mixed = |role| {
            let nics = vec![nic(TransportKind::Tcp, ""), nic(TransportKind::Shm, "a")];
            WorkerProfile { nics, ..profile(role, 0, 0, 0) }
        };
        assert_eq!(meet(&mixed(Role::Decode), &mixed(Role::Prefill), false), Ok(vec![(1, 1), (0, 0)]));
        assert_eq!(meet(&mixed(Role::Decode), &mixed(Role::Prefill), true), Ok(vec![(1, 1)]));
    }

    #[test]
    fn both_sides_push_over_the_same_rails() {
        for (here, there) in [(1, 1), (4, 4), (8, 2), (2, 4), (3, 5)] {
            for (ours, theirs) in [(0, 4), (1, 4), (2, 4), (4, 3), (8, 8)] {
                let pushes = |role, group, nics, rails| WorkerProfile {
                    direction: Some(Direction::Push),
                    rails,
                    ..profile(role, group, 1, nics)
                };
                let source = pushes(Role::Prefill, 0, here, ours);
                let destination = pushes(Role::Decode, 7, there, theirs);
                let meet = |local: &WorkerProfile, remote: &WorkerProfile| {
                    let terms = RailTerms { rails_max: local.rails, ..RailTerms::default() };
                    Peer::meet(local, remote.clone(), false).expect("they fit").over_rails(local, terms, false)
                };
                let (from, to) = (meet(&source, &destination), meet(&destination, &source));
                let turned: Vec<(usize, usize)> = to.pairs.iter().map(|(to, from)| (*from, *to)).collect();
                assert_eq!((&from.pairs, from.shares_pushes), (&turned, to.shares_pushes));
                assert_eq!(from.pairs[0], (from.nic, to.nic), "the path is the first");
                let ends: BTreeSet<usize> = from.pairs.iter().map(|(from, _)| *from).collect();
                let most = if from.shares_pushes { ours.min(theirs) as usize } else { 1 };
                assert_eq!((from.shares_pushes, ends.len()), (ours.min(theirs) > 1, from.pairs.len()));
                assert!(from.pairs.len() <= most && (most > here.min(there) || from.pairs.len() == most), "{from:?}");
            }
        }
    }

    #[test]
    fn who_is_beyond_is_called_at_its_other_address() {
        let of = |role, host: &str| {
            let name = "rack-7/1".to_owned();
            let domain = Some(crate::MemoryDomain { name, address: Bytes::from(format!("{host} from beyond")) });
            let address = Bytes::from(format!("{host} from here"));
            let nics = vec![NicAdvert { domain, address, ..nic(TransportKind::Cuda, host) }];
            WorkerProfile { nics, ..profile(role, 0, 0, 0) }
        };
        for (there, due) in [("a", "a from here"), ("b", "b from beyond")] {
            let met = Peer::meet(&of(Role::Decode, "a"), of(Role::Prefill, there), false).expect("they fit");
            assert_eq!(met.addresses(), BTreeMap::from([(0, Bytes::from(due))]));
            assert!(met.destination_reads(), "what is read counts only once the source confirms it");
            assert!(
                Peer::meet(&of(Role::Decode, "a"), of(Role::Prefill, there), true).is_ok(),
                "no network is crossed"
            );
        }
    }

    #[test]
    fn direction_is_symmetric() {
        assert_eq!(direction(None, None), Ok(Direction::Pull));
        assert_eq!(direction(Some(Direction::Push), None), Ok(Direction::Push));
        assert_eq!(direction(None, Some(Direction::Push)), Ok(Direction::Push));
        assert!(direction(Some(Direction::Pull), Some(Direction::Push)).is_err());
    }

    #[test]
    fn required_rdma_refuses_a_network_and_names_it() {
        let (source, destination) = (profile(Role::Prefill, 0, 0, 1), profile(Role::Decode, 7, 0, 1));
        let met = Peer::meet(&source, destination.clone(), false).expect("a path");
        assert_eq!(shortfall(false, &source, &met.profile, met.pairs[0]), None, "nobody expects RDMA");
        let refused = Peer::meet(&source, destination, true).expect_err("no RDMA").to_string();
        assert!(refused.contains("through tcp on d") && refused.contains("require_rdma"), "{refused}");
        // On one host nothing crosses a network.
        let shared = |role| {
            let nics = vec![nic(TransportKind::Shm, "a"), nic(TransportKind::Tcp, "")];
            WorkerProfile { nics, ..profile(role, 0, 0, 0) }
        };
        assert!(Peer::meet(&shared(Role::Prefill), shared(Role::Decode), true).is_ok());
    }
}
