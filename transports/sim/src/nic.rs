//! What the fabric knows of one NIC.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvferry_core::{PoolId, PoolLayout, TransferId};
use kvferry_transport::{Event, Expected, Options, PeerId, Pool, RemotePool, TransferError};

use crate::fabric::NicId;
use crate::flow::FlowId;
use crate::link::LinkId;

pub(crate) struct NicState {
    pub(crate) key: u128,
    pub(crate) options: Options,
    pub(crate) pools: BTreeMap<PoolId, Bound>,
    /// Closed ones too, so that fencing them is still answered.
    pub(crate) peers: BTreeMap<PeerId, Peer>,
    pub(crate) remotes: BTreeMap<RemotePool, Imported>,
    pub(crate) posted: BTreeMap<TransferId, FlowId>,
    pub(crate) expected: BTreeMap<TransferId, Expectation>,
    /// Pushes that nobody expects yet.
    pub(crate) waiting: BTreeMap<TransferId, FlowId>,
    /// When the wire is free, out and in.
    pub(crate) out_free_at: u64,
    pub(crate) in_free_at: u64,
    pub(crate) events: Vec<Event>,
    next_peer: u32,
    next_remote: u32,
}

pub(crate) struct Bound {
    pub(crate) pool: Pool,
    pub(crate) key: u128,
    pub(crate) going: bool,
}

pub(crate) struct Peer {
    pub(crate) nic: NicId,
    pub(crate) link: LinkId,
    pub(crate) open: bool,
}

pub(crate) struct Imported {
    pub(crate) peer: PeerId,
    pub(crate) pool: PoolId,
    pub(crate) key: u128,
    pub(crate) layout: Arc<PoolLayout>,
}

pub(crate) struct Expectation {
    pub(crate) expected: Expected,
    pub(crate) pool: Pool,
    pub(crate) flow: Option<FlowId>,
}

impl NicState {
    pub(crate) fn new(key: u128, options: Options) -> Self {
        NicState {
            key,
            options,
            pools: BTreeMap::new(),
            peers: BTreeMap::new(),
            remotes: BTreeMap::new(),
            posted: BTreeMap::new(),
            expected: BTreeMap::new(),
            waiting: BTreeMap::new(),
            out_free_at: 0,
            in_free_at: 0,
            events: Vec::new(),
            next_peer: 0,
            next_remote: 0,
        }
    }

    pub(crate) fn add_peer(&mut self, nic: NicId, link: LinkId) -> PeerId {
        let peer = PeerId(self.next_peer);
        self.next_peer += 1;
        self.peers.insert(peer, Peer { nic, link, open: true });
        peer
    }

    pub(crate) fn add_remote(&mut self, imported: Imported) -> RemotePool {
        let remote = RemotePool(self.next_remote);
        self.next_remote += 1;
        self.remotes.insert(remote, imported);
        remote
    }

    /// Ends a peer's use, not its record.
    pub(crate) fn close_peer(&mut self, peer: PeerId) {
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.open = false;
        }
        self.remotes.retain(|_, remote| remote.peer != peer);
    }

    pub(crate) fn open_peer(&self, peer: PeerId) -> Option<&Peer> {
        self.peers.get(&peer).filter(|peer| peer.open)
    }

    /// A pool that can be used.
    pub(crate) fn pool(&self, pool: PoolId) -> Option<&Bound> {
        self.pools.get(&pool).filter(|bound| !bound.going)
    }

    /// Ends expectations that no push has met.
    pub(crate) fn drop_unmet(&mut self, error: &TransferError, which: impl Fn(&Expectation) -> bool) {
        let gone: Vec<TransferId> =
            self.expected.iter().filter(|(_, unmet)| unmet.flow.is_none() && which(unmet)).map(|(id, _)| *id).collect();
        for id in gone {
            self.expected.remove(&id);
            self.events.push(Event::Failed { id, error: error.clone() });
        }
    }
}
