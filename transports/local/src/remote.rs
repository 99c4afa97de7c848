//! Peers' pools: asked for once, mapped, and looked after until withdrawn.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use kvferry_core::{PoolId, PoolLayout};
use kvferry_transport::{Event, ImportError, PeerId, PoolKeys, RemotePool, TransferError};

use crate::backend::{Backend, Shared};
use crate::carrier::Carrier;
use crate::transport::{Bound, LocalTransport};
use crate::wire::{FDS_PER_FRAME_MAX, Frame, Keys, MemoryKind};

/// A pool of a peer.
pub(crate) struct Remote<M> {
    pub(crate) peer: PeerId,
    pub(crate) pool: PoolId,
    pub(crate) token: u64,
    /// From the import, else from the owner.
    pub(crate) layout: Option<Arc<PoolLayout>>,
    pub(crate) access: Access<M>,
}

/// How far its memory is.
pub(crate) enum Access<M> {
    /// Asked for; descriptors so far.
    Asked(Vec<OwnedFd>),
    /// Readable.
    Ready(Rc<M>),
    /// Never.
    Refused(String),
    /// Closed by a fence: asked for again by whoever needs it.
    Closed,
    /// Asked for before a fence: what comes is not taken.
    Unwanted,
}

impl<B: Backend> LocalTransport<B> {
    pub(crate) fn import_pool(
        &mut self,
        id: PeerId,
        keys: &PoolKeys,
        layout: &PoolLayout,
    ) -> Result<RemotePool, ImportError> {
        let bad = |reason: String| ImportError::BadKeys { kind: B::KIND, reason };
        let instance = self.peers.get(&id).ok_or(ImportError::UnknownPeer(id))?.identity.instance;
        let keys = Keys::decode(B::KIND, &keys.0).map_err(bad)?;
        if keys.instance != instance {
            return Err(bad("they belong to another transport than this peer's".into()));
        }
        layout.validate().map_err(|e| ImportError::Layout(e.to_string()))?;
        if keys.regions != layout.regions {
            return Err(ImportError::Layout(
                "its regions have other sizes than the layout's; exchange both again".into(),
            ));
        }
        let remote = self.remote(id, keys.pool, keys.token);
        if B::OFFERS {
            let ours = self.pools.iter().filter(|(_, bound)| !bound.leaving);
            let offers: Vec<Frame> = ours.map(|(&pool, bound)| Frame::Offered { pool, token: bound.token }).collect();
            offers.iter().for_each(|frame| self.send(id, frame));
        }
        if let Some(found) = self.remotes.get_mut(&remote) {
            match &found.layout {
                Some(known) if **known != *layout => {
                    return Err(ImportError::Layout("its owner, or an earlier import, has another layout".into()));
                }
                Some(_) => {}
                None => found.layout = Some(Arc::new(layout.clone())),
            }
        }
        Ok(remote)
    }

    /// The record of a peer's pool, which is asked for when it is new: imports at join time are warm when the first transfer comes.
    pub(crate) fn remote(&mut self, peer: PeerId, pool: PoolId, token: u64) -> RemotePool {
        let known = self.remotes.iter().find(|(_, r)| r.peer == peer && r.pool == pool && r.token == token);
        if let Some((&id, _)) = known {
            return id;
        }
        let id = RemotePool(self.next_remote);
        self.next_remote = self.next_remote.wrapping_add(1);
        self.remotes.insert(id, Remote { peer, pool, token, layout: None, access: Access::Asked(Vec::new()) });
        self.send(peer, &Frame::Open { request: id.0, pool, token });
        id
    }

    /// The memory of a pool that its owner has just said over this connection to stand, where it is open over another connection to the same
    /// transport of the same process: a name alone does not make it the same memory.
    fn opened_before(&self, peer: PeerId, pool: PoolId, token: u64, layout: &PoolLayout) -> Option<Rc<B::Memory>> {
        let identity = self.identity(peer).filter(|identity| B::HANDLES && identity.process.is_some())?;
        let is_it = |remote: &&Remote<B::Memory>| {
            let is_same = self.peers.get(&remote.peer).is_some_and(|other| other.is_up() && other.identity == identity);
            is_same && remote.pool == pool && remote.token == token && remote.layout.as_deref() == Some(layout)
        };
        self.remotes.values().filter(is_it).find_map(|remote| match &remote.access {
            Access::Ready(memory) => Some(Rc::clone(memory)),
            _ => None,
        })
    }

    /// Tells how a pool is reached.
    fn show(&mut self, id: RemotePool) {
        if let Some(Remote { peer, access: Access::Ready(memory), .. }) = self.remotes.get(&id) {
            let evidence = Box::new(self.backend.reached(memory));
            self.events.push(Event::Shown { peer: *peer, evidence });
        }
    }

    /// Lets go of the memory of peers that are fenced: what copies of theirs hold goes when they have ended.
    pub(crate) fn close_memory(&mut self, whose: &BTreeSet<PeerId>) {
        for remote in self.remotes.values_mut().filter(|remote| whose.contains(&remote.peer)) {
            match remote.access {
                Access::Ready(_) => remote.access = Access::Closed,
                Access::Asked(_) => remote.access = Access::Unwanted,
                Access::Refused(_) | Access::Closed | Access::Unwanted => {}
            }
        }
    }

    /// Asks again for what a fence closed.
    pub(crate) fn reopen(&mut self, id: RemotePool) {
        let Some(remote) = self.remotes.get_mut(&id).filter(|remote| matches!(remote.access, Access::Closed)) else {
            return;
        };
        remote.access = Access::Asked(Vec::new());
        let (peer, pool, token) = (remote.peer, remote.pool, remote.token);
        self.send(peer, &Frame::Open { request: id.0, pool, token });
    }

    /// The owner's side.
    pub(crate) fn open_for(&mut self, id: PeerId, request: u32, pool: PoolId, token: u64) {
        let number = pool;
        let Some(Bound { pool, .. }) = self.pools.get(&pool).filter(|bound| bound.token == token && !bound.leaving)
        else {
            let reason = format!("{pool} is not bound there, or was bound anew; exchange keys again");
            return self.send(id, &Frame::NotOpened { request, reason });
        };
        let is_beyond = self.carrier.owner(id).is_beyond;
        let Shared { memory, descriptors } = match self.backend.share(pool, is_beyond) {
            Ok(shared) => shared,
            Err(reason) => return self.send(id, &Frame::NotOpened { request, reason }),
        };
        let mut descriptors = descriptors.into_iter();
        loop {
            let part: Vec<_> = descriptors.by_ref().take(FDS_PER_FRAME_MAX).collect();
            if part.is_empty() {
                break;
            }
            self.carrier.send(id, &Frame::Fds { request, count: part.len() as u32 }, part);
        }
        // A peer that reads several pools, or both ways, shows itself more by what is read from it.
        let reads = self.remotes.values().any(|remote| remote.peer == id && matches!(remote.access, Access::Ready(_)));
        if !reads {
            self.events.push(Event::Shown { peer: id, evidence: Box::new(self.backend.lent(&memory)) });
        }
        let layout = pool.layout().clone();
        self.send(id, &Frame::Opened { request, layout, memory });
        if B::OUTLASTS
            && let Some(bound) = self.pools.get_mut(&number)
        {
            bound.readers.insert(id);
        }
    }

    pub(crate) fn take_fds(&mut self, peer: PeerId, request: u32, fds: Vec<OwnedFd>) -> Result<(), String> {
        match self.remotes.get_mut(&RemotePool(request)) {
            Some(Remote { peer: owner, access: Access::Asked(waiting), .. }) if *owner == peer => {
                if waiting.len() + fds.len() > kvferry_core::limits::REGIONS_MAX {
                    return Err("it sent more descriptors than a pool has regions".into());
                }
                waiting.extend(fds);
            }
            Some(Remote { peer: owner, access: Access::Unwanted, .. }) if *owner == peer => {}
            _ => return Err("it sent descriptors that nobody asked for".into()),
        }
        Ok(())
    }

    pub(crate) fn opened(
        &mut self,
        peer: PeerId,
        request: u32,
        layout: PoolLayout,
        kind: MemoryKind,
    ) -> Result<(), String> {
        let id = RemotePool(request);
        let asked = self.remotes.get(&id).filter(|remote| remote.peer == peer);
        let before = asked.and_then(|remote| self.opened_before(peer, remote.pool, remote.token, &layout));
        let Some(remote) = self.remotes.get_mut(&id).filter(|remote| remote.peer == peer) else {
            return Err("it opened a pool that nobody asked for".into());
        };
        let fds = match &mut remote.access {
            Access::Asked(fds) => std::mem::take(fds),
            Access::Unwanted => {
                remote.access = Access::Closed;
                self.resume_pulls(id);
                self.resume_pushes(id);
                return Ok(());
            }
            _ => return Ok(()),
        };
        let known = remote.layout.as_deref();
        let memory = match (layout.validate(), kind) {
            (Err(error), _) => Err(format!("its layout is not valid: {error}")),
            _ if known.is_some_and(|known| *known != layout) => {
                Err("the pool's layout is not the one that was imported; exchange both again".into())
            }
            (Ok(()), kind) => match before {
                Some(memory) => Ok(memory),
                None => self.backend.open(self.carrier.owner(peer), &layout, kind, fds).map(Rc::new),
            },
        };
        match memory {
            Ok(memory) => {
                remote.access = Access::Ready(memory);
                if remote.layout.is_none() {
                    remote.layout = Some(Arc::new(layout));
                }
                self.show(id);
            }
            Err(reason) => remote.access = Access::Refused(reason),
        }
        self.resume_pulls(id);
        self.resume_pushes(id);
        Ok(())
    }

    pub(crate) fn not_opened(&mut self, peer: PeerId, request: u32, reason: String) {
        let id = RemotePool(request);
        if let Some(remote) = self.remotes.get_mut(&id).filter(|remote| remote.peer == peer) {
            remote.access = Access::Refused(reason);
            self.resume_pulls(id);
            self.resume_pushes(id);
        }
    }

    /// The owner's side of asking whether what was copied counts.
    pub(crate) fn check_for(&mut self, id: PeerId, serial: u64, pool: PoolId, token: u64) {
        let stood = self.pools.get(&pool).is_some_and(|bound| bound.token == token && !bound.leaving);
        self.send(id, &Frame::Checked { serial, stood });
    }

    pub(crate) fn withdrawn(&mut self, peer: PeerId, pool: PoolId, token: u64) -> Result<(), String> {
        let found = self.remotes.iter().find(|(_, r)| r.peer == peer && r.pool == pool && r.token == token);
        let Some((&id, _)) = found else { return Ok(()) };
        self.remotes.remove(&id);
        let reason = "its owner withdrew the pool";
        let error = TransferError::Refused(reason.into());
        self.fail_posted(|posted| posted.reads_from(id), &error);
        self.fail_arriving_from(id, &error, reason);
        if B::OUTLASTS { self.leave(peer, pool, token) } else { Ok(()) }
    }
}
