//! One NIC of a fabric, as a transport.

use std::sync::Arc;

use bytes::Bytes;
use kvferry_core::{Direction, End, PoolId, PoolLayout, TransferId};
use kvferry_transport::{
    BindError, ConnectError, Event, Expected, ImportError, NicInfo, Options, PeerId, Pool, PoolKeys, PostError,
    RemotePool, Transfer, TransferError, Transport, TransportKind, Wait,
};

use crate::address::{decode_address, decode_keys, encode_address, encode_keys};
use crate::fabric::{Fabric, NicId, Pacing};
use crate::flow::{INITIATOR, OWNER};
use crate::nic::{Bound, Expectation, Health, Imported, NicState};
use crate::state::nanos;

/// Dropping it is the end of the NIC: peers lose it, nothing of it reaches anybody's memory any more.
///
/// As with real one-sided hardware, a peer's writes land without the owner's doing: [`Transport::cancel`] of an expected push asks the
/// writer's NIC, and only [`Transport::fence`] keeps out a writer that does not answer.
pub(crate) struct SimTransport {
    fabric: Fabric,
    nic: NicId,
    address: Bytes,
    info: NicInfo,
}

impl SimTransport {
    pub(crate) fn open(fabric: Fabric, device: String, options: &Options) -> Self {
        let (nic, key, bytes_per_second) = {
            let mut state = fabric.state();
            let (nic, key) = state.add_nic(options.clone());
            (nic, key, state.options.bytes_per_second)
        };
        let bits_per_second = Some(bytes_per_second.saturating_mul(8));
        let info = NicInfo { kind: TransportKind::Sim, device, host: String::new(), library: None, bits_per_second };
        SimTransport { fabric, nic, address: encode_address(nic, key), info }
    }
}

impl Transport for SimTransport {
    fn info(&self) -> &NicInfo {
        &self.info
    }

    fn address(&self) -> Bytes {
        self.address.clone()
    }

    fn bind(&mut self, pool: &Pool) -> Result<PoolKeys, BindError> {
        let id = pool.id();
        pool.require_host().map_err(|reason| BindError::Unsupported { pool: id, reason })?;
        let mut state = self.fabric.state();
        let key = state.fresh_key();
        let up = |nic: &&mut NicState| !matches!(nic.health, Health::Gone | Health::Dead);
        let Some(nic) = state.nic_mut(self.nic).filter(up) else {
            return Err(BindError::Unsupported { pool: id, reason: "the NIC is down".to_owned() });
        };
        if nic.pools.contains_key(&id) {
            return Err(BindError::Duplicate(id));
        }
        nic.pools.insert(id, Bound { pool: pool.clone(), key });
        if let Some(shadow) = &mut state.shadow {
            shadow.bind(pool, self.nic);
        }
        Ok(PoolKeys(encode_keys(self.nic, id, key)))
    }

    fn unbind(&mut self, pool: PoolId) {
        self.fabric.state().unbind(self.nic, pool);
    }

    fn connect(&mut self, address: &[u8]) -> Result<PeerId, ConnectError> {
        let bad = |reason: String| ConnectError::BadAddress { kind: TransportKind::Sim, reason };
        let (remote, key) = decode_address(address).map_err(bad)?;
        self.fabric.state().dial(self.nic, remote, key).ok_or_else(|| bad("this NIC is down".to_owned()))
    }

    fn import(&mut self, peer: PeerId, keys: &PoolKeys, layout: &PoolLayout) -> Result<RemotePool, ImportError> {
        let bad = |reason: String| ImportError::BadKeys { kind: TransportKind::Sim, reason };
        let mut state = self.fabric.state();
        let nic = state.nic_mut(self.nic).ok_or(ImportError::UnknownPeer(peer))?;
        let remote = nic.open_peer(peer).ok_or(ImportError::UnknownPeer(peer))?.nic;
        let (owner, pool, key) = decode_keys(&keys.0).map_err(bad)?;
        if owner != remote {
            return Err(bad("they name another NIC's pool".to_owned()));
        }
        layout.validate().map_err(|error| ImportError::Layout(error.to_string()))?;
        Ok(nic.add_remote(Imported { peer, pool, key, layout: Arc::new(layout.clone()) }))
    }

    fn expect(&mut self, expected: Expected) -> Result<(), PostError> {
        let mut state = self.fabric.state();
        let depth = state.options.depth;
        let nic = state.nic_mut(self.nic).ok_or(PostError::UnknownPool(expected.pool))?;
        let id = expected.id;
        if nic.expected.contains_key(&id) {
            return Err(PostError::Duplicate(id));
        }
        if nic.expected.len() >= nic.options.transfers_max.min(depth) {
            nic.stats.turned_away += 1;
            return Err(PostError::Full);
        }
        let pool = nic.pools.get(&expected.pool).ok_or(PostError::UnknownPool(expected.pool))?.pool.clone();
        expected
            .program
            .validate(End::Destination, pool.layout())
            .map_err(|source| PostError::Program { id, source })?;
        if nic.health == Health::Dead {
            let error = TransferError::Io { context: "the NIC", message: "the NIC is dead".to_owned() };
            nic.events.push(Event::Failed { id, error });
            state.wake(self.nic);
            return Ok(());
        }
        nic.expected.insert(id, Expectation { expected, pool, flow: None });
        if let Some(flow) = nic.waiting.remove(&id) {
            state.meet(flow);
        }
        Ok(())
    }

    fn post(&mut self, transfer: Transfer) -> Result<(), PostError> {
        let mut state = self.fabric.state();
        let depth = state.options.depth;
        let nic = state.nic_mut(self.nic).ok_or(PostError::UnknownPeer(transfer.peer))?;
        let id = transfer.id;
        if nic.posted.contains_key(&id) {
            return Err(PostError::Duplicate(id));
        }
        if nic.posted.len() >= nic.options.transfers_max.min(depth) {
            nic.stats.turned_away += 1;
            return Err(PostError::Full);
        }
        let peer = nic.open_peer(transfer.peer).ok_or(PostError::UnknownPeer(transfer.peer))?;
        let local = nic.pools.get(&transfer.local).ok_or(PostError::UnknownPool(transfer.local))?.pool.clone();
        let remote = nic.remotes.get(&transfer.remote).filter(|remote| remote.peer == transfer.peer);
        let remote = remote.ok_or(PostError::UnknownRemote(transfer.remote))?;
        let check =
            |end, layout| transfer.program.validate(end, layout).map_err(|source| PostError::Program { id, source });
        match transfer.direction {
            Direction::Pull => {
                check(End::Destination, local.layout())?;
                check(End::Source, &remote.layout)?;
            }
            Direction::Push => check(End::Source, local.layout())?,
        }
        let (owner, link, remote) = (peer.nic, peer.link, (remote.pool, remote.key));
        state.request([self.nic, owner], link, remote, local, transfer);
        Ok(())
    }

    fn cancel(&mut self, id: TransferId) {
        self.fabric.state().cancel(self.nic, id);
    }

    fn fence(&mut self, peer: PeerId) {
        self.fabric.state().fence(self.nic, peer);
    }

    fn disconnect(&mut self, peer: PeerId) {
        let mut state = self.fabric.state();
        let Some(link) = state.nic(self.nic).and_then(|nic| nic.open_peer(peer)).map(|peer| peer.link) else { return };
        let error = TransferError::PeerLost("it was disconnected here".to_owned());
        for side in [INITIATOR, OWNER] {
            let here = state
                .links
                .get(link.0)
                .is_some_and(|link| link.sides[side].nic == self.nic && link.sides[side].peer == Some(peer));
            if here {
                state.close_side(link, side, &error, Some("the peer disconnected"));
            }
        }
    }

    fn poll(&mut self, events: &mut Vec<Event>) {
        let mut state = self.fabric.state();
        if let Pacing::Stepped(step) = state.options.pacing {
            let now = state.now.saturating_add(nanos(step));
            state.advance(now);
        }
        if let Some(nic) = state.nic_mut(self.nic) {
            events.append(&mut nic.events);
        }
    }

    fn arm(&mut self) -> Wait {
        let state = self.fabric.state();
        let reports = state.nic(self.nic).is_some_and(|nic| !nic.events.is_empty());
        let moves = state.options.pacing != Pacing::Driven && state.next_at().is_some();
        if reports || moves { Wait::Busy } else { Wait::MustPoll }
    }
}

impl Drop for SimTransport {
    fn drop(&mut self) {
        self.fabric.state().remove_nic(self.nic);
    }
}
