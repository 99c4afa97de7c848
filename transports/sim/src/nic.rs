//! What the fabric knows of one NIC.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use kvferry_core::{HandoverId, PoolId, PoolLayout, TransferId};
use kvferry_transport::{Event, Expected, Options, PeerId, Pool, RemotePool, TransferError};

use crate::fabric::NicId;
use crate::flow::FlowId;
use crate::link::LinkId;

pub(crate) struct NicState {
    pub(crate) key: u128,
    pub(crate) options: Options,
    pub(crate) health: Health,
    /// Its process is known to be dead.
    pub(crate) process_died: bool,
    /// How many times longer its bytes take.
    pub(crate) slowness: u32,
    pub(crate) pools: BTreeMap<PoolId, Bound>,
    /// How often all pools were registered anew.
    pub(crate) registration: u64,
    /// Closed ones too, so that fencing them is still answered.
    pub(crate) peers: BTreeMap<PeerId, Peer>,
    pub(crate) remotes: BTreeMap<RemotePool, Imported>,
    /// Links of which one side is here and some side is open.
    pub(crate) links: BTreeSet<LinkId>,
    pub(crate) posted: BTreeMap<TransferId, FlowId>,
    pub(crate) expected: BTreeMap<TransferId, Expectation>,
    /// Pushes that nobody expects yet.
    pub(crate) waiting: BTreeMap<TransferId, FlowId>,
    /// Flows that wait for the wire: they take turns.
    pub(crate) egress: VecDeque<FlowId>,
    pub(crate) egress_armed: bool,
    /// When the wire is free, out and in.
    pub(crate) out_free_at: u64,
    pub(crate) in_free_at: u64,
    pub(crate) events: Vec<Event>,
    /// What software is to hear once a black hole is over.
    pub(crate) withheld: Vec<Event>,
    pub(crate) is_ready: bool,
    pub(crate) stats: NicStats,
    next_peer: u32,
    next_remote: u32,
}

/// Whether a NIC does what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    Up,
    /// It says that it is dead.
    Dead,
    /// It says nothing.
    BlackHole,
    /// It was let go.
    Gone,
}

/// What one NIC has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NicStats {
    /// Bytes that left it.
    pub bytes_out: u64,
    /// Bytes that landed in its memory.
    pub bytes_in: u64,
    /// Nanoseconds for which its wire was busy, outwards.
    pub busy_out_ns: u64,
    /// Nanoseconds for which its wire was busy, inwards.
    pub busy_in_ns: u64,
    /// Bytes that have left it and not landed.
    pub in_flight_out: u64,
    /// Bytes on their way to it.
    pub in_flight_in: u64,
    /// Transfers that it had posted at once, at most.
    pub posted_max: u64,
    /// Posts and expectations that were turned away because the queue was full.
    pub turned_away: u64,
    /// Slices that came for an end that was over, and were dropped.
    pub slices_dropped: u64,
}

pub(crate) struct Bound {
    pub(crate) pool: Pool,
    pub(crate) key: u128,
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
            health: Health::Up,
            process_died: false,
            slowness: 1,
            pools: BTreeMap::new(),
            registration: 0,
            peers: BTreeMap::new(),
            remotes: BTreeMap::new(),
            links: BTreeSet::new(),
            posted: BTreeMap::new(),
            expected: BTreeMap::new(),
            waiting: BTreeMap::new(),
            egress: VecDeque::new(),
            egress_armed: false,
            out_free_at: 0,
            in_free_at: 0,
            events: Vec::new(),
            withheld: Vec::new(),
            is_ready: false,
            stats: NicStats::default(),
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

    /// Ends expectations that no push has met.
    pub(crate) fn drop_unmet(&mut self, error: &TransferError, which: impl Fn(&Expectation) -> bool) {
        let gone: Vec<TransferId> =
            self.expected.iter().filter(|(_, unmet)| unmet.flow.is_none() && which(unmet)).map(|(id, _)| *id).collect();
        for id in gone {
            self.expected.remove(&id);
            self.events.push(Event::Failed { id, error: error.clone() });
        }
    }

    /// Transfers of a handover that are expected here, in their order.
    pub(crate) fn expected_of(&self, handover: HandoverId) -> impl Iterator<Item = &Expectation> {
        self.expected.range(of(handover)).map(|(_, expectation)| expectation)
    }

    /// Transfers of a handover that were posted here, in their order.
    pub(crate) fn posted_of(&self, handover: HandoverId) -> impl Iterator<Item = FlowId> {
        self.posted.range(of(handover)).map(|(_, flow)| *flow)
    }
}

fn of(handover: HandoverId) -> std::ops::RangeInclusive<TransferId> {
    let first = u128::from(handover.0) << 64;
    TransferId(first)..=TransferId(first | u128::from(u64::MAX))
}
