//! A connection between two NICs.

use std::collections::BTreeSet;

use kvferry_core::FenceProof;
use kvferry_transport::{Event, Evidence, PeerId, TransferError};

use crate::due::Due;
use crate::fabric::{FenceBy, NicId};
use crate::flow::{FlowId, INITIATOR, OWNER};
use crate::nic::Health;
use crate::state::State;

/// What those hear that hold old keys.
pub(crate) const STALE: &str = "the pools there have new keys; connect again";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LinkId(pub(crate) u64);

/// Posts travel from the side that dialed to the side that accepted. Each side knows only of its own whether it is open.
pub(crate) struct Link {
    /// The dialer and the acceptor.
    pub(crate) sides: [Side; 2],
    /// What the dialer believes to be the acceptor's key.
    pub(crate) key: u128,
    /// The acceptor's [`NicState::registration`](crate::nic::NicState) when it let the dialer in: which keys it handed over.
    pub(crate) registration: u64,
    pub(crate) flows: BTreeSet<FlowId>,
}

#[derive(Clone, Copy)]
pub(crate) struct Side {
    pub(crate) nic: NicId,
    /// None before it has accepted.
    pub(crate) peer: Option<PeerId>,
    pub(crate) open: bool,
}

/// How links come and go.
impl State {
    pub(crate) fn dial(&mut self, nic: NicId, remote: NicId, key: u128) -> Option<PeerId> {
        if self.nic(nic)?.health == Health::Gone {
            return None;
        }
        let dialer = Side { nic, peer: None, open: true };
        let acceptor = Side { nic: remote, peer: None, open: false };
        let link =
            LinkId(self.links.insert(Link { sides: [dialer, acceptor], key, registration: 0, flows: BTreeSet::new() }));
        let state = self.nic_mut(nic)?;
        let peer = state.add_peer(remote, link);
        state.links.insert(link);
        let health = state.health;
        if let Some(link) = self.links.get_mut(link.0) {
            link.sides[INITIATOR].peer = Some(peer);
        }
        if health == Health::Dead {
            self.later(Due::GiveUp { link });
        } else {
            self.send(nic, Due::Hello { link });
        }
        Some(peer)
    }

    /// Ends one side of a link: what of it is not over there fails, and what still comes is dropped. The other side is told `farewell`.
    pub(crate) fn close_side(
        &mut self,
        id: LinkId,
        side: usize,
        error: &TransferError,
        farewell: Option<&'static str>,
    ) {
        let Some(link) = self.links.get_mut(id.0) else { return };
        let (Some(here), Some(there)) = (link.sides.get_mut(side), 1usize.checked_sub(side)) else { return };
        if !std::mem::replace(&mut here.open, false) {
            return;
        }
        let (nic, peer) = (here.nic, here.peer);
        let flows: Vec<FlowId> = link.flows.iter().copied().collect();
        let both = link.sides.map(|side| side.nic);
        let closed = !link.sides[there].open;
        if let (Some(peer), Some(state)) = (peer, self.nic_mut(nic)) {
            state.close_peer(peer);
        }
        for flow in flows {
            self.fail_end(flow, side, error);
        }
        if closed {
            self.links.remove(id.0);
            for nic in both {
                if let Some(state) = self.nic_mut(nic) {
                    state.links.remove(&id);
                }
            }
        } else if let Some(reason) = farewell {
            self.send(nic, Due::Farewell { link: id, side: there, reason });
        }
    }

    /// One side hears that the link is no more.
    pub(crate) fn hear_farewell(&mut self, id: LinkId, side: usize, reason: &'static str) {
        let Some(here) = self.links.get(id.0).and_then(|link| link.sides.get(side)).copied() else { return };
        if here.open {
            self.close_side(id, side, &TransferError::PeerLost(reason.to_owned()), None);
            if let Some(peer) = here.peer {
                self.report(here.nic, Event::PeerLost { peer, reason: reason.to_owned() });
            }
        }
    }

    /// The dialer has waited in vain for an answer.
    pub(crate) fn break_off(&mut self, id: LinkId) {
        let Some(dialer) = self.links.get(id.0).map(|link| link.sides[INITIATOR]) else { return };
        if dialer.open {
            let reason = "it does not answer";
            self.close_side(id, INITIATOR, &TransferError::PeerLost(reason.to_owned()), Some("the peer gave up"));
            if let Some(peer) = dialer.peer {
                self.report(dialer.nic, Event::PeerLost { peer, reason: reason.to_owned() });
            }
        }
    }

    /// Closes a NIC's sides of all its links to one NIC, or to everybody.
    pub(crate) fn close_all(
        &mut self,
        nic: NicId,
        remote: Option<NicId>,
        error: &TransferError,
        farewell: Option<&'static str>,
    ) {
        let links: Vec<LinkId> = self.nic(nic).map(|state| state.links.iter().copied().collect()).unwrap_or_default();
        for id in links {
            for side in [INITIATOR, OWNER] {
                let Some(sides) = self.links.get(id.0).map(|link| link.sides) else { continue };
                if sides[side].nic == nic && remote.is_none_or(|remote| sides[1 - side].nic == remote) {
                    self.close_side(id, side, error, farewell);
                }
            }
        }
    }

    /// A local act: whatever comes from that NIC later finds no way in.
    pub(crate) fn fence(&mut self, nic: NicId, peer: PeerId) {
        let remote = self.nic(nic).and_then(|state| state.peers.get(&peer)).map(|peer| peer.nic);
        let mut proof = FenceProof::EndpointDestroyed;
        // A peer that was never connected was never let in.
        if let Some(remote) = remote {
            let error = TransferError::PeerLost("it was fenced here".to_owned());
            if self.nic(remote).is_some_and(|remote| remote.process_died) {
                proof = FenceProof::PeerProcessDead;
                self.close_all(nic, Some(remote), &error, None);
            } else if self.options.fence_by == FenceBy::Rekeying {
                proof = FenceProof::PoolRekeyed;
                self.rekey(nic, remote, &error);
            } else {
                self.close_all(nic, Some(remote), &error, Some("the peer fenced this NIC"));
            }
        }
        self.later(Due::Report { nic, event: Box::new(Event::Fenced { peer, proof }) });
    }

    /// Registers a NIC's pools anew: whatever reads or writes them by the old keys ends and is refused from now on, and so does everything with
    /// `remote`. Keys are handed over where connections begin: peers that were meant no harm connect again.
    fn rekey(&mut self, nic: NicId, remote: NicId, error: &TransferError) {
        let stale = TransferError::Refused(STALE.to_owned());
        for id in self.flows_of(nic) {
            let Some(flow) = self.flows.get(id.0) else { continue };
            let ends = flow.nics;
            for end in [INITIATOR, OWNER] {
                if ends[end] == nic && (end == OWNER || ends[OWNER] == remote) {
                    self.fail_end(id, end, if ends[1 - end] == remote { error } else { &stale });
                    self.tell(id, 1 - end, stale.clone());
                }
            }
        }
        let Some(state) = self.nic_mut(nic) else { return };
        state.registration += 1;
        let links: Vec<LinkId> = state.links.iter().copied().collect();
        for link in links {
            let accepted = |link: &Link| link.sides[OWNER].nic == nic && link.sides[OWNER].open;
            if self.links.get(link.0).is_some_and(accepted) {
                self.send(nic, Due::Rekeyed { link });
            }
        }
    }

    /// Whether the dialer was let in before the pools there got new keys.
    pub(crate) fn is_stale(&self, id: LinkId) -> bool {
        let Some(link) = self.links.get(id.0) else { return true };
        self.nic(link.sides[OWNER].nic).is_none_or(|owner| owner.registration != link.registration)
    }

    /// The dialer's keys are refused: it ends the link, and comes back for new ones.
    pub(crate) fn hear_of_new_keys(&mut self, id: LinkId) {
        let Some(dialer) = self.links.get(id.0).map(|link| link.sides[INITIATOR]).filter(|side| side.open) else {
            return;
        };
        self.close_side(id, INITIATOR, &TransferError::PeerLost(STALE.to_owned()), Some("the peer connects again"));
        if let Some(peer) = dialer.peer {
            self.report(dialer.nic, Event::PeerLost { peer, reason: STALE.to_owned() });
        }
    }

    /// A dial has reached its NIC, or where one should be.
    pub(crate) fn hello(&mut self, id: LinkId) {
        let Some(link) = self.links.get(id.0) else { return };
        let (dialer, nic, key) = (link.sides[INITIATOR].nic, link.sides[OWNER].nic, link.key);
        let answers = |state: &&mut crate::nic::NicState| state.health == Health::Up && state.key == key;
        match self.nic_mut(nic).filter(answers) {
            Some(state) => {
                let peer = state.add_peer(dialer, id);
                state.links.insert(id);
                let registration = state.registration;
                if let Some(link) = self.links.get_mut(id.0) {
                    link.registration = registration;
                    link.sides[OWNER] = Side { nic, peer: Some(peer), open: true };
                }
                self.send(nic, Due::Welcome { link: id });
            }
            None => self.later(Due::Farewell { link: id, side: INITIATOR, reason: "nobody answers there to that key" }),
        }
    }

    pub(crate) fn welcome(&mut self, id: LinkId) {
        let Some(dialer) = self.links.get(id.0).map(|link| link.sides[INITIATOR]) else { return };
        if let Some(peer) = dialer.peer.filter(|_| dialer.open) {
            self.report(dialer.nic, Event::Connected { peer });
            let evidence =
                Evidence::connected(vec!["sim/fabric".to_owned()]).unseen("anything real: the fabric is simulated");
            self.report(dialer.nic, Event::Shown { peer, evidence: Box::new(evidence) });
        }
    }

    /// Flows with an end at that NIC, of links that are open there.
    pub(crate) fn flows_of(&self, nic: NicId) -> Vec<FlowId> {
        let links = self.nic(nic).into_iter().flat_map(|state| &state.links);
        links.filter_map(|id| self.links.get(id.0)).flat_map(|link| link.flows.iter().copied()).collect()
    }
}
