//! Connections: greeting, frames, loss.

use std::time::{Duration, Instant};

use kvferry_transport::{ConnectError, Event, PeerId, TransferError};

use crate::backend::Backend;
use crate::carrier::{Carried, Carrier};
use crate::transport::LocalTransport;
use crate::whose::Identity;
use crate::wire::{Address, Frame, VERSION, same_key};

/// How long a greeting may take.
const GREETING: Duration = Duration::from_secs(5);

/// Connections that are gone and of which is still known whose they were.
const GONE_MAX: usize = 4096;

/// Pools of one peer that are known: those that it offers beside those that are imported here.
const REMOTES_PER_PEER_MAX: usize = 4096;

/// Who is at the other end of one connection.
pub(crate) struct Peer {
    pub(crate) stage: Stage,
    /// Two connections to the same one are the same for a fence.
    pub(crate) identity: Identity,
    /// This side called it, at the address that it is to have.
    pub(crate) is_called: bool,
}

pub(crate) enum Stage {
    /// We called and wait for its welcome.
    Calling { until: Instant },
    /// It called and has to show the key.
    Stranger { until: Instant },
    /// Greeted.
    Up,
}

impl Peer {
    pub(crate) fn is_stranger(&self) -> bool {
        matches!(self.stage, Stage::Stranger { .. })
    }

    pub(crate) fn is_up(&self) -> bool {
        matches!(self.stage, Stage::Up)
    }

    /// When something has to be done about it though it says nothing.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match self.stage {
            Stage::Calling { until } | Stage::Stranger { until } => Some(until),
            Stage::Up => None,
        }
    }
}

impl<B: Backend> LocalTransport<B> {
    pub(crate) fn dial(&mut self, address: &[u8]) -> Result<PeerId, ConnectError> {
        let bad = |reason| ConnectError::BadAddress { kind: B::KIND, reason };
        let address = Address::decode(B::KIND, address).map_err(bad)?;
        if address.boot != self.info.host && !self.carrier.is_beyond(&address.place) {
            return Err(bad(format!(
                "it is on another host (boot id {}, here {}); use a network transport",
                address.boot, self.info.host
            )));
        }
        let peer = self.carrier.dial(&address.place)?;
        let stage = Stage::Calling { until: Instant::now() + GREETING };
        let identity = Identity { instance: address.instance, process: self.carrier.owner(peer).pid };
        self.peers.insert(peer, Peer { stage, identity, is_called: true });
        self.send(peer, &Frame::Hello { version: VERSION, key: address.key, instance: self.instance });
        Ok(peer)
    }

    /// Drops who did not greet in time.
    pub(crate) fn check_greetings(&mut self, now: Instant) {
        let late = |peer: &Peer| peer.deadline().is_some_and(|until| now >= until);
        let late: Vec<PeerId> = self.peers.iter().filter(|(_, peer)| late(peer)).map(|(&id, _)| id).collect();
        for id in late {
            self.lose(id, "it did not greet in time");
        }
    }

    pub(crate) fn send(&mut self, id: PeerId, frame: &Frame) {
        self.carrier.send(id, frame, Vec::new());
    }

    /// Passes on what backends say to each other.
    pub(crate) fn speak(&mut self) {
        if B::SPEAKS {
            for (peer, words) in self.backend.say() {
                self.send(peer, &Frame::Own(words));
            }
        }
    }

    /// Takes what has come.
    pub(crate) fn take_frames(&mut self) {
        while let Some(carried) = self.carrier.next() {
            match carried {
                Carried::Called(id) => {
                    let stage = Stage::Stranger { until: Instant::now() + GREETING };
                    let identity = Identity { instance: [0; 16], process: self.carrier.owner(id).pid };
                    self.peers.insert(id, Peer { stage, identity, is_called: false });
                }
                Carried::Frame(id, frame) => {
                    if let Err(reason) = self.handle(id, frame) {
                        self.lose(id, &reason);
                    }
                }
                Carried::Lost(id, reason) => self.lose(id, &reason),
            }
        }
    }

    fn handle(&mut self, id: PeerId, frame: Frame) -> Result<(), String> {
        let Some(peer) = self.peers.get_mut(&id) else { return Ok(()) };
        match (&peer.stage, frame) {
            (Stage::Stranger { .. }, Frame::Hello { version, key, instance }) => {
                if !same_key(&key, &self.key) {
                    return Err("it showed a wrong key".into());
                }
                if version != VERSION {
                    return Err(format!(
                        "it speaks version {version}, this side {VERSION}; run the same release on both"
                    ));
                }
                let identity = Identity { instance, ..peer.identity };
                if self.is_taken(&identity) {
                    return Err("it says that it is a transport of another process".into());
                }
                if let Some(peer) = self.peers.get_mut(&id) {
                    (peer.stage, peer.identity) = (Stage::Up, identity);
                }
                self.carrier.trust(id);
                self.send(id, &Frame::Welcome { instance: self.instance });
                self.events.push(Event::Connected { peer: id });
            }
            (Stage::Calling { .. }, Frame::Welcome { instance }) => {
                if instance != peer.identity.instance {
                    return Err("another transport answers at its address".into());
                }
                // It may not have been connected yet when it was called.
                peer.identity.process = self.carrier.owner(id).pid;
                let identity = peer.identity;
                if self.is_called_elsewhere(&identity) {
                    return Err("another process answers at another address of that transport".into());
                }
                if let Some(peer) = self.peers.get_mut(&id) {
                    peer.stage = Stage::Up;
                }
                self.expose(&identity);
                self.events.push(Event::Connected { peer: id });
            }
            (Stage::Up, Frame::Push(doorbell)) => self.doorbell(id, doorbell),
            (Stage::Up, Frame::Open { request, pool, token }) => self.open_for(id, request, pool, token),
            (Stage::Up, Frame::Fds { request, count }) => {
                let fds = self.carrier.take_fds(id, count as usize)?;
                self.take_fds(id, request, fds)?;
            }
            (Stage::Up, Frame::Opened { request, layout, memory }) => self.opened(id, request, layout, memory)?,
            (Stage::Up, Frame::NotOpened { request, reason }) => self.not_opened(id, request, reason),
            (Stage::Up, Frame::PushEnd { id: transfer, serial, outcome }) => {
                self.push_ended(id, transfer, serial, outcome)
            }
            (Stage::Up, Frame::PushCancel { id: transfer, serial }) => self.push_cancelled(id, transfer, serial),
            (Stage::Up, Frame::Notice(notice)) => self.events.push(Event::Notice { notice }),
            (Stage::Up, Frame::Withdrawn { pool, token }) => self.withdrawn(id, pool, token)?,
            (Stage::Up, Frame::LetGo { pool, token }) if B::OUTLASTS => self.was_let_go(id, pool, token),
            (Stage::Up, Frame::Offered { pool, token }) if B::OFFERS => {
                if self.remotes.values().filter(|remote| remote.peer == id).count() >= REMOTES_PER_PEER_MAX {
                    return Err("it offers more pools than a node has".into());
                }
                self.remote(id, pool, token);
            }
            (Stage::Up, Frame::Check { serial, pool, token }) if B::CHECKS => self.check_for(id, serial, pool, token),
            (Stage::Up, Frame::Checked { serial, stood }) => self.checked(id, serial, stood),
            (Stage::Up, Frame::Own(words)) if B::SPEAKS => self.backend.hear(id, &words)?,
            _ => return Err("it sent a frame that is not due".into()),
        }
        Ok(())
    }

    /// Ends everything with a connection that is of no further use.
    pub(crate) fn lose(&mut self, id: PeerId, reason: &str) {
        let Some(peer) = self.forget(id, &TransferError::PeerLost(reason.into())) else { return };
        if peer.is_stranger() {
            tracing::debug!(reason, "a connection ended before it was greeted");
        } else {
            self.events.push(Event::PeerLost { peer: id, reason: reason.into() });
        }
    }

    /// Fails the transfers of a connection that is gone, and lets its memory go.
    pub(crate) fn forget(&mut self, id: PeerId, error: &TransferError) -> Option<Peer> {
        if !self.peers.contains_key(&id) {
            return None;
        }
        // Copies that run on are told by whose they are.
        self.fail_posted(|posted| posted.transfer.peer == id, error);
        self.fail_arriving(|peer| peer == id, error, None);
        // Its reads end first: then the peer may take goodbye for that.
        self.backend.sever(id);
        self.carrier.close(id);
        self.leaving.retain(|leaving| !leaving.is_of(id));
        self.reader_is_gone(id);
        self.remotes.retain(|_, remote| remote.peer != id);
        let peer = self.peers.remove(&id)?;
        // A caller that never greeted had no transfers, and may not push out who had.
        if !peer.is_stranger() {
            self.gone.insert(id, peer.identity);
        }
        if self.gone.len() > GONE_MAX {
            self.gone.pop_first();
        }
        Some(peer)
    }
}

#[cfg(test)]
mod tests;
