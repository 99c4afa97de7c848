//! Pools: our own while peers may read them, and peers' for as long as they are not withdrawn.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::limits::NAMED_MAX;
use kvferry_core::{PoolId, PoolLayout, TransferId};
use kvferry_transport::codec::{decode, encode};
use kvferry_transport::{Event, ImportError, PeerId, Pool, PoolKeys, RemotePool, Stage, TransferError, TransportKind};

use crate::context::Mapped;
use crate::endpoint::RemoteKeys;
use crate::link::Session;
use crate::transport::UcxTransport;
use crate::wire::{Keys, Kind, Lend, Named, Refusal};

/// The tag of keys that come before they are asked for: no record of a pool has this number.
pub(crate) const LENT_AHEAD: u64 = 0;

/// Pools of a peer, and bytes of one's keys, that are kept unasked; others are asked for when they are pushed from.
pub(crate) const AHEAD_MAX: usize = 256;
const AHEAD_BYTES_MAX: usize = 1 << 20;

/// How long readers of a pool that is withdrawn may take to say that they have stopped.
const WITHDRAW_WAIT: Duration = Duration::from_secs(5);

/// A pool of our own.
#[derive(Clone)]
pub(crate) struct Bound {
    pub(crate) pool: Pool,
    pub(crate) layout: Arc<PoolLayout>,
    pub(crate) keys: Rc<Keys>,
    /// Where the method lets peers read it.
    pub(crate) mapped: Option<Rc<Mapped>>,
    /// For a pool in a device's memory: nobody reads it, what moves is packed by way of this.
    pub(crate) stage: Option<Stage>,
    /// Withdrawn, but something has not ended.
    pub(crate) leaving: Option<Leaving>,
}

/// Who has not yet said that it reads a withdrawn pool no more.
#[derive(Clone)]
pub(crate) struct Leaving {
    pub(crate) readers: BTreeSet<PeerId>,
    pub(crate) until: Instant,
}

impl Bound {
    pub(crate) fn new(pool: Pool, keys: Keys, mapped: Option<Rc<Mapped>>, stage: Option<Stage>) -> Bound {
        let layout = Arc::new(pool.layout().clone());
        Bound { pool, layout, keys: Rc::new(keys), mapped, stage, leaving: None }
    }

    pub(crate) fn named(&self) -> Named {
        Named { pool: self.pool.id(), token: self.keys.token }
    }
}

/// A pool of a peer.
pub(crate) struct Remote {
    pub(crate) peer: PeerId,
    pub(crate) named: Named,
    /// From the import, or lent by the owner.
    pub(crate) lent: Option<(Keys, Arc<PoolLayout>)>,
    /// Unpacked as soon as they are here and the link is wired.
    pub(crate) unpacked: Option<Rc<RemoteKeys>>,
}

/// A peer's pool that it withdrew while it was being read here.
pub(crate) struct Withdrawing {
    pub(crate) peer: PeerId,
    pub(crate) named: Named,
}

impl UcxTransport {
    pub(crate) fn import_pool(
        &mut self,
        peer: PeerId,
        keys: &PoolKeys,
        layout: &PoolLayout,
    ) -> Result<RemotePool, ImportError> {
        let bad = |reason: String| ImportError::BadKeys { kind: TransportKind::Ucx, reason };
        let session = self.sessions.get(&peer).ok_or(ImportError::UnknownPeer(peer))?;
        let Some(secret) = session.secret else {
            return Err(bad("this side was called and has not the peer's address; connect to it first".to_owned()));
        };
        let instance = self.links.get(&session.link).map(|link| link.instance);
        let keys = Keys::open(&keys.0, &secret).map_err(bad)?;
        if Some(keys.instance) != instance {
            return Err(bad("they belong to another transport than this peer's".to_owned()));
        }
        layout.validate().map_err(|error| ImportError::Layout(error.to_string()))?;
        check_regions(&keys, layout).map_err(ImportError::Layout)?;
        let named = Named { pool: keys.pool, token: keys.token };
        let id = self.remote(peer, named);
        if let Some(remote) = self.remotes.get_mut(&id) {
            remote.lent = Some((keys, Arc::new(layout.clone())));
        }
        if self.sessions.get(&peer).is_some_and(Session::is_up) {
            self.unpack(id);
            if self.remotes.get(&id).is_some_and(|remote| self.is_unread(remote)) {
                self.show(peer);
            }
        }
        Ok(id)
    }

    /// Unpacks the keys of a peer's pool where its memory is read: when they come, not when it is.
    pub(crate) fn unpack(&mut self, id: RemotePool) {
        let link = self.remotes.get(&id).and_then(|remote| self.sessions.get(&remote.peer)).map(|session| session.link);
        let Some(link) = link.filter(|link| self.reads_memory(*link)) else { return };
        let (Some(remote), Some(link)) = (self.remotes.get_mut(&id), self.links.get(&link)) else { return };
        let Some((keys, _)) = remote.lent.as_ref().filter(|(keys, _)| remote.unpacked.is_none() && keys.are_readable())
        else {
            return;
        };
        match RemoteKeys::unpack(&link.endpoint, keys.regions.iter().map(|region| region.rkey.as_slice())) {
            Ok(unpacked) => remote.unpacked = Some(Rc::new(unpacked)),
            Err(reason) => tracing::warn!(reason, "a peer's memory cannot be read; its owner sends it"),
        }
    }

    /// The record of a peer's pool.
    pub(crate) fn remote(&mut self, peer: PeerId, named: Named) -> RemotePool {
        let known = self.remotes.iter().find(|(_, remote)| remote.peer == peer && remote.named == named);
        if let Some((id, _)) = known {
            return *id;
        }
        let id = RemotePool(self.new_number() as u32);
        self.remotes.insert(id, Remote { peer, named, lent: None, unpacked: None });
        id
    }

    /// The record of a pool that a peer's push comes from; its keys are asked for when they are not here.
    pub(crate) fn borrow_pool(&mut self, peer: PeerId, named: Named) -> RemotePool {
        let id = self.remote(peer, named);
        if self.remotes.get(&id).is_some_and(|remote| remote.lent.is_none()) {
            self.say(peer, Kind::Borrow, 0, u64::from(id.0), &encode(&named));
        }
        id
    }

    /// A destination asks for the keys of a pool of ours.
    pub(crate) fn on_borrow(&mut self, peer: PeerId, tag: u64, body: &[u8]) -> Result<(), String> {
        let named: Named = decode(body).map_err(|error| format!("a request for keys: {error}"))?;
        let bound = self.pools.get(&named.pool).filter(|bound| bound.leaving.is_none() && bound.named() == named);
        let pool = bound.map(|bound| (Keys::clone(&bound.keys), bound.layout.clone()));
        self.say(peer, Kind::Lend, 0, tag, &encode(&Lend { named, pool }));
        Ok(())
    }

    /// Gives the destination of a push the keys of its source ahead of it, once: they need not be asked for.
    pub(crate) fn lend_ahead(&mut self, peer: PeerId, push: TransferId) {
        let Some(posted) = self.posts.get(&push) else { return };
        let (named, keys, layout) = (posted.local.named(), posted.local.keys.clone(), posted.local.layout.clone());
        let Some(session) = self.sessions.get_mut(&peer) else { return };
        if session.lent.insert(named.token) {
            let pool = Some((Keys::clone(&keys), layout));
            self.say(peer, Kind::Lend, 0, LENT_AHEAD, &encode(&Lend { named, pool }));
        }
    }

    pub(crate) fn on_lend(&mut self, peer: PeerId, tag: u64, body: &[u8]) -> Result<(), String> {
        let lend: Lend = decode(body).map_err(|error| format!("keys: {error}"))?;
        let Ok(number) = u32::try_from(tag) else { return Err("keys that nobody asked for".to_owned()) };
        let id = if tag == LENT_AHEAD && lend.pool.is_some() {
            let kept = self.remotes.values().filter(|remote| remote.peer == peer).count();
            if body.len() > AHEAD_BYTES_MAX || kept >= AHEAD_MAX {
                return Ok(());
            }
            self.remote(peer, lend.named)
        } else {
            RemotePool(number)
        };
        let Some(remote) = self.remotes.get_mut(&id).filter(|r| r.peer == peer && r.named == lend.named) else {
            // Withdrawn, or the transfer has ended.
            return Ok(());
        };
        if let Some((keys, layout)) = lend.pool {
            keys.check()?;
            let owner = self.sessions.get(&peer).and_then(|session| self.links.get(&session.link));
            if owner.is_none_or(|link| link.instance != keys.instance)
                || (keys.pool, keys.token) != (lend.named.pool, lend.named.token)
            {
                return Err("keys of another pool than was asked for".to_owned());
            }
            layout.validate().map_err(|error| error.to_string())?;
            check_regions(&keys, &layout)?;
            if remote.lent.is_none() {
                remote.lent = Some((keys, layout));
            }
            self.unpack(id);
            self.resume_arriving(id);
        } else {
            self.remotes.remove(&id);
            self.fail_arriving_from(id, "its source was withdrawn");
        }
        Ok(())
    }

    /// Ends everything that uses a pool of ours, here and at the peers.
    pub(crate) fn withdraw(&mut self, pool: PoolId) {
        let Some(bound) = self.pools.get(&pool).filter(|bound| bound.leaving.is_none()) else { return };
        let (named, readable) = (bound.named(), bound.mapped.is_some());
        let posts: Vec<TransferId> =
            self.posts.iter().filter(|(_, p)| p.local.pool.id() == pool).map(|(id, _)| *id).collect();
        for id in posts {
            self.end_posted(id, TransferError::Unbound);
        }
        let expected: Vec<TransferId> =
            self.expected.iter().filter(|(_, e)| e.local.pool.id() == pool).map(|(id, _)| *id).collect();
        for id in expected {
            self.end_expected(id, TransferError::Unbound, "the destination pool was withdrawn");
        }
        self.stop_serving(pool);
        for session in self.sessions.values_mut() {
            session.lent.remove(&named.token);
        }
        let readers: BTreeSet<PeerId> = if readable {
            self.sessions.iter().filter(|(_, session)| session.there.is_some()).map(|(peer, _)| *peer).collect()
        } else {
            BTreeSet::new()
        };
        for peer in &readers {
            self.say(*peer, Kind::Withdraw, 0, 0, &encode(&named));
        }
        let until = Instant::now() + WITHDRAW_WAIT;
        if let Some(bound) = self.pools.get_mut(&pool) {
            bound.leaving = Some(Leaving { readers, until });
        }
        self.note_deadline(until);
        self.settle_pools(Instant::now());
    }

    /// A peer withdraws a pool that may be being read here.
    pub(crate) fn on_withdraw(&mut self, peer: PeerId, body: &[u8]) -> Result<(), String> {
        let named: Named = decode(body).map_err(|error| format!("a withdrawal: {error}"))?;
        let error = TransferError::Refused("the source pool was withdrawn".to_owned());
        let of = |remote: &Remote| remote.peer == peer && remote.named == named;
        let ids: Vec<RemotePool> = self.remotes.iter().filter(|(_, r)| of(r)).map(|(id, _)| *id).collect();
        for id in ids {
            self.fail_arriving_from(id, "its source was withdrawn");
        }
        self.stop_fetches(|fetch| fetch.peer == peer && fetch.named == named, &error);
        self.remotes.retain(|_, remote| !of(remote));
        if self.withdrawing.len() < NAMED_MAX {
            self.withdrawing.push(Withdrawing { peer, named });
        }
        self.answer_withdrawals();
        Ok(())
    }

    /// Tells owners of withdrawn pools that nothing here reads them any more.
    pub(crate) fn answer_withdrawals(&mut self) {
        let fetches = &self.fetches;
        let reads = |w: &Withdrawing| fetches.values().any(|fetch| fetch.peer == w.peer && fetch.named == w.named);
        let (wait, done): (Vec<_>, Vec<_>) = std::mem::take(&mut self.withdrawing).into_iter().partition(reads);
        self.withdrawing = wait;
        for Withdrawing { peer, named } in done {
            self.say(peer, Kind::Withdrawn, 0, 0, &encode(&named));
        }
    }

    pub(crate) fn on_withdrawn(&mut self, peer: PeerId, body: &[u8]) -> Result<(), String> {
        let named: Named = decode(body).map_err(|error| format!("an end of reading: {error}"))?;
        if let Some(bound) = self.pools.get_mut(&named.pool).filter(|bound| bound.named() == named)
            && let Some(leaving) = &mut bound.leaving
        {
            leaving.readers.remove(&peer);
        }
        Ok(())
    }

    /// Lets withdrawn pools go that nothing touches any more.
    pub(crate) fn settle_pools(&mut self, now: Instant) {
        let late = |bound: &Bound| bound.leaving.as_ref().is_some_and(|leaving| leaving.until <= now);
        let idle: Vec<PoolId> = self
            .pools
            .iter()
            .filter(|(id, bound)| {
                // Whoever has not answered by then reads what is not registered any more, and is told so by its device.
                let read = bound.leaving.as_ref().is_some_and(|leaving| leaving.readers.is_empty()) || late(bound);
                read && self.is_unused(**id)
            })
            .map(|(id, _)| *id)
            .collect();
        for pool in idle {
            let stage = self.pools.remove(&pool).and_then(|bound| bound.stage);
            self.report(stage.as_slice(), Event::Unbound { pool });
        }
    }

    /// Whether a withdrawn pool can be let go.
    pub(crate) fn is_idle(&self, pool: PoolId) -> bool {
        let leaving = self.pools.get(&pool).and_then(|bound| bound.leaving.as_ref());
        leaving.is_some_and(|leaving| leaving.readers.is_empty()) && self.is_unused(pool)
    }

    fn is_unused(&self, pool: PoolId) -> bool {
        !self.fetches.values().any(|fetch| fetch.local.pool.id() == pool)
            && !self.posts.values().any(|posted| posted.local.pool.id() == pool)
    }

    fn stop_serving(&mut self, pool: PoolId) {
        let mut refused = Vec::new();
        for (peer, session) in &mut self.sessions {
            let tags: Vec<u64> = session.reads.iter().filter(|(_, r)| r.pool == pool).map(|(tag, _)| *tag).collect();
            for tag in tags {
                session.reads.remove(&tag);
                refused.push((*peer, tag));
            }
        }
        for (peer, tag) in refused {
            self.stop_source(peer, crate::inbox::Flow::Pull, tag);
            self.refuse(peer, tag, &Refusal::text("the source pool was withdrawn"));
        }
    }
}

fn check_regions(keys: &Keys, layout: &PoolLayout) -> Result<(), String> {
    if keys.regions.iter().map(|region| region.bytes).ne(layout.regions.iter().copied()) {
        return Err("its regions have other sizes than the layout's; exchange both again".to_owned());
    }
    Ok(())
}
