//! Whose a connection is: which opened transport of which process.

use std::collections::BTreeSet;

use kvferry_transport::PeerId;
use rustix::process::{Pid, getpid};

use crate::backend::Backend;
use crate::peer::Peer;
use crate::transport::LocalTransport;

/// Who is at the other end of a connection, as far as is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// Which opened transport: by the address that this side called, or by its own word, if it called.
    pub(crate) instance: [u8; 16],
    /// Which process, as the kernel says; `None` where it does not connect the two.
    pub(crate) process: Option<Pid>,
}

impl Identity {
    /// Whether a fence of one is about the other, too: whatever else a process says of its connections, they are all its own.
    pub(crate) fn is_same(&self, other: &Identity) -> bool {
        // This process has nothing to hide from itself, and may be several nodes.
        let process = self.process.filter(|process| *process != getpid());
        self.instance == other.instance || (process.is_some() && process == other.process)
    }

    /// Whether the two say that they are the same transport, and are not.
    fn contradicts(&self, other: &Identity) -> bool {
        let processes = self.process.zip(other.process);
        self.instance == other.instance && processes.is_some_and(|(one, other)| one != other)
    }
}

impl<B: Backend> LocalTransport<B> {
    /// Whose a connection is, or was.
    pub(crate) fn identity(&self, id: PeerId) -> Option<Identity> {
        self.peers.get(&id).map(|peer| peer.identity).or_else(|| self.gone.get(&id).copied())
    }

    /// All connections that a fence of one is about.
    pub(crate) fn same_as(&self, id: PeerId, identity: &Identity) -> BTreeSet<PeerId> {
        let same = self.peers.iter().filter(|(_, peer)| peer.identity.is_same(identity) && !peer.is_stranger());
        same.map(|(&id, _)| id).chain([id]).collect()
    }

    /// Whether a caller says that it is a transport of which another process is known to be at the other end.
    pub(crate) fn is_taken(&self, identity: &Identity) -> bool {
        self.peers.values().any(|peer| !peer.is_stranger() && peer.identity.contradicts(identity))
    }

    /// Whether another process answered before where this side called that transport. Addresses are members' own words: who was there first stays.
    pub(crate) fn is_called_elsewhere(&self, identity: &Identity) -> bool {
        self.peers.values().any(|peer| peer.is_called && peer.is_up() && peer.identity.contradicts(identity))
    }

    /// Whom this side called at its own address is what it says: callers that said so before, from other processes, lied.
    pub(crate) fn expose(&mut self, identity: &Identity) {
        let lies = |peer: &Peer| !peer.is_stranger() && !peer.is_called && peer.identity.contradicts(identity);
        let liars: Vec<PeerId> = self.peers.iter().filter(|(_, peer)| lies(peer)).map(|(&id, _)| id).collect();
        for id in liars {
            self.lose(id, "it said that it is a transport of another process");
        }
    }
}

#[cfg(test)]
mod tests;
