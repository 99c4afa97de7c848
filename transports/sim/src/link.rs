//! A connection between two NICs.

use kvferry_core::FenceProof;
use kvferry_transport::{Event, PeerId, TransferError};

use crate::due::Due;
use crate::fabric::NicId;
use crate::state::State;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LinkId(pub(crate) u64);

/// Posts travel from the side that dialed to the side that accepted.
pub(crate) struct Link {
    pub(crate) dialer: (NicId, PeerId),
    /// Without a number until it has accepted.
    pub(crate) acceptor: (NicId, Option<PeerId>),
    /// What the dialer believes to be the acceptor's key.
    pub(crate) key: u128,
}

impl Link {
    pub(crate) fn joins(&self, one: NicId, other: NicId) -> bool {
        let ends = (self.dialer.0, self.acceptor.0);
        ends == (one, other) || ends == (other, one)
    }
}

/// How links come and go.
impl State {
    pub(crate) fn dial(&mut self, nic: NicId, remote: NicId, key: u128) -> Option<PeerId> {
        let link = LinkId(self.number());
        let peer = self.nics.get_mut(&nic)?.add_peer(remote, link);
        self.links.insert(link, Link { dialer: (nic, peer), acceptor: (remote, None), key });
        self.later(Due::Hello { link });
        Some(peer)
    }

    /// Ends a link: `by` knows, the other end hears of it.
    pub(crate) fn close(&mut self, id: LinkId, by: NicId, error: &TransferError, reason: &str) {
        let Some(link) = self.links.remove(&id) else { return };
        for (nic, peer) in [(link.dialer.0, Some(link.dialer.1)), link.acceptor] {
            let (Some(peer), Some(state)) = (peer, self.nics.get_mut(&nic)) else { continue };
            state.close_peer(peer);
            if nic != by {
                self.later(Due::Report { nic, event: Event::PeerLost { peer, reason: reason.to_owned() } });
            }
        }
        for flow in self.flows_where(|flow| flow.link == id) {
            self.stop(flow, by, error.clone(), error.clone());
        }
    }

    pub(crate) fn fence(&mut self, nic: NicId, peer: PeerId) {
        let Some(remote) = self.nics.get(&nic).and_then(|state| state.peers.get(&peer)).map(|peer| peer.nic) else {
            // It was never connected: nothing of it was ever let in.
            let proof = FenceProof::EndpointDestroyed;
            return self.later(Due::Report { nic, event: Event::Fenced { peer, proof } });
        };
        let error = TransferError::PeerLost("it was fenced here".to_owned());
        for link in self.links_where(|link| link.joins(nic, remote)) {
            self.close(link, nic, &error, "the peer fenced this NIC");
        }
        self.later(Due::Fenced { nic, remote, peer });
    }

    /// A dial has reached its NIC, or where one should be.
    pub(crate) fn hello(&mut self, id: LinkId) {
        let Some(link) = self.links.get_mut(&id) else { return };
        let (nic, key) = (link.acceptor.0, link.key);
        match self.nics.get_mut(&nic).filter(|nic| nic.key == key) {
            Some(state) => {
                link.acceptor.1 = Some(state.add_peer(link.dialer.0, id));
                self.later(Due::Welcome { link: id });
            }
            None => {
                let reason = "nobody answers there to that key";
                // A loop to one's own NIC has no other end that could tell it.
                let dialer = link.dialer;
                self.close(id, nic, &TransferError::PeerLost(reason.to_owned()), reason);
                if dialer.0 == nic {
                    self.later(Due::Report {
                        nic,
                        event: Event::PeerLost { peer: dialer.1, reason: reason.to_owned() },
                    });
                }
            }
        }
    }

    pub(crate) fn welcome(&mut self, id: LinkId) {
        if let Some((nic, peer)) = self.links.get(&id).map(|link| link.dialer) {
            self.report(nic, Event::Connected { peer });
        }
    }

    pub(crate) fn links_where(&self, which: impl Fn(&Link) -> bool) -> Vec<LinkId> {
        self.links.iter().filter(|(_, link)| which(link)).map(|(id, _)| *id).collect()
    }
}
