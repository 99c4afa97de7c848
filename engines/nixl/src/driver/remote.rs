//! Peers: what they told of themselves, and the connections to them.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use bytes::Bytes;
use kvferry_ucx::raw::{PackedKey, RawKey, RawPeer, WorkerAddress};

use super::{Driver, OURS, Reply, UCX, VERSION};
use crate::AgentError;
use crate::agent::{Peer, PeerKind};
use crate::metadata::{AgentMetadata, MemoryKind, RANGES_MAX, Range, Section};

/// Peers of one agent.
const PEERS_MAX: usize = 4096;

/// A peer.
pub(crate) struct Remote {
    address: WorkerAddress,
    kind: PeerKind,
    sections: Vec<Section>,
    pub(super) link: Option<Link>,
    /// Transfers that have something to begin, in order.
    pub(super) waiting: VecDeque<u64>,
}

/// A connection.
pub(crate) struct Link {
    pub(super) number: u64,
    pub(super) raw: RawPeer,
    /// Operations that UCX holds.
    pub(super) in_flight: usize,
    /// By kind, device, address and length of their range.
    keys: BTreeMap<(MemoryKind, u64, u64, u64), Rc<RawKey>>,
}

impl Remote {
    /// The key of the range that has all these bytes; unpacked at its first use.
    pub(super) fn key(&mut self, memory: (MemoryKind, u64), address: u64, bytes: u64) -> Result<Rc<RawKey>, String> {
        let (kind, device) = memory;
        let range = self.sections.iter().filter(|section| section.kind == kind);
        let range = range.filter_map(|section| section.find(device, address, bytes)).next();
        let range = range.ok_or("the peer has not told of this memory")?;
        let link = self.link.as_mut().ok_or("there is no connection")?;
        let place = (kind, device, range.address, range.bytes);
        if let Some(key) = link.keys.get(&place) {
            return Ok(key.clone());
        }
        let key = link.raw.key(&PackedKey::check(&range.key)?)?;
        link.keys.insert(place, key.clone());
        Ok(key)
    }

    /// Whether the peer has told of all these bytes.
    pub(super) fn has(&self, (kind, device): (MemoryKind, u64), address: u64, bytes: u64) -> bool {
        let of_kind = self.sections.iter().filter(|section| section.kind == kind);
        of_kind.filter_map(|section| section.find(device, address, bytes)).next().is_some()
    }

    /// Adds ranges, each once. What is known with another key is refused, as NIXL does: its memory was registered anew.
    fn add(&mut self, sections: Vec<Section>) -> Result<(), String> {
        let claimed: usize = self.sections.iter().chain(&sections).map(|section| section.ranges.len()).sum();
        if claimed > 2 * RANGES_MAX {
            return Err(format!("{claimed} ranges; at most {RANGES_MAX} are kept of a peer"));
        }
        let mut merged = self.sections.clone();
        for section in sections {
            let same = |known: &&mut Section| known.kind == section.kind;
            let Some(known) = merged.iter_mut().find(same) else {
                merged.push(section);
                continue;
            };
            known.ranges.extend(section.ranges);
            known.ranges.sort();
            known.ranges.dedup();
            let place = |range: &Range| (range.device, range.address, range.bytes);
            let mut pairs = known.ranges.iter().zip(known.ranges.iter().skip(1));
            if let Some((range, _)) = pairs.find(|(one, other)| place(one) == place(other)) {
                return Err(format!(
                    "the range at {:#x} has another key now; remove the peer, then add it with all its metadata",
                    range.address
                ));
            }
        }
        let ranges: usize = merged.iter().map(|section| section.ranges.len()).sum();
        if ranges > RANGES_MAX {
            return Err(format!("{ranges} ranges; at most {RANGES_MAX} are kept of a peer"));
        }
        self.sections = merged;
        Ok(())
    }

    fn described(&self, name: &str) -> Peer {
        let ranges = self.sections.iter().map(|section| section.ranges.len()).sum();
        Peer { name: name.to_owned(), kind: self.kind.clone(), ranges }
    }
}

impl Driver {
    pub(super) fn add_peer(&mut self, metadata: Bytes) -> Result<Peer, AgentError> {
        let metadata = AgentMetadata::decode(metadata)?;
        let name = metadata.name.clone();
        let refuse = |reason: String| AgentError::Peer { name: name.clone(), reason };
        if name == self.name {
            return Err(refuse("that is this agent's own name; give each agent its own".to_owned()));
        }
        let address = metadata.connection(UCX).map(|connection| WorkerAddress::check(&connection.address));
        let address = address.transpose().map_err(&refuse)?;
        // An entry of another form is of a later kvferry, which speaks NIXL's protocol, too.
        let ours = metadata.connection(OURS).and_then(|connection| connection.address.strip_prefix(&[VERSION]));
        let extension = ours.map(Bytes::copy_from_slice);
        let sections: Vec<Section> = metadata.sections.into_iter().filter(|section| section.backend == UCX).collect();
        for range in sections.iter().flat_map(|section| &section.ranges) {
            PackedKey::check(&range.key)
                .map_err(|error| refuse(format!("the key of {:#x}: {error}", range.address)))?;
        }
        let full = self.peers.len() >= PEERS_MAX;
        match (self.peers.get_mut(&name), address) {
            (Some(known), Some(address)) if known.address != address => Err(refuse(
                "it is known by another address: it has started again; remove it first, or let it take a new name"
                    .to_owned(),
            )),
            (Some(known), _) => {
                known.add(sections).map_err(&refuse)?;
                Ok(known.described(&name))
            }
            (None, None) if metadata.connections.is_empty() => {
                Err(refuse("this is only a part, without how to reach it; add its whole metadata first".to_owned()))
            }
            (None, None) => {
                let others: Vec<&str> = metadata.connections.iter().map(|known| known.backend.as_str()).collect();
                Err(refuse(format!("it speaks {} and not UCX; start it with backend UCX", others.join(", "))))
            }
            (None, Some(_)) if full => {
                Err(refuse(format!("{PEERS_MAX} peers are known already; remove those that are gone")))
            }
            (None, Some(address)) => {
                let kind = extension.map_or(PeerKind::Nixl, PeerKind::Kvferry);
                let waiting = VecDeque::new();
                let mut remote = Remote { address, kind, sections: Vec::new(), link: None, waiting };
                remote.add(sections).map_err(&refuse)?;
                let described = remote.described(&name);
                self.peers.insert(name, remote);
                Ok(described)
            }
        }
    }

    /// The connection to a peer, made at its first use.
    pub(super) fn connect(&mut self, name: &str) -> Result<(), AgentError> {
        let number = self.number();
        let Some(remote) = self.peers.get_mut(name) else { return Err(unknown(name)) };
        if remote.link.is_none() {
            let raw = self.worker.connect(number, &remote.address);
            let raw = raw.map_err(|reason| AgentError::Failed { name: name.to_owned(), reason })?;
            remote.link = Some(Link { number, raw, in_flight: 0, keys: BTreeMap::new() });
            self.connections.insert(number, name.to_owned());
        }
        Ok(())
    }

    /// Closes the connection to a peer, if there is one: whatever is in flight ends, with this error.
    pub(super) fn disconnect(&mut self, name: &str, error: &AgentError) {
        let link = self.peers.get_mut(name).and_then(|remote| remote.link.take());
        if let Some(link) = link {
            self.connections.remove(&link.number);
            self.closing.insert(link.number);
            self.at_once.extend(link.raw.close());
        }
        let theirs = self.flights.iter().filter(|(_, flight)| flight.peer == name);
        let theirs: Vec<u64> = theirs.map(|(id, _)| *id).collect();
        for id in theirs {
            if let Some(flight) = self.flights.get_mut(&id) {
                flight.cut = true;
            }
            self.doom(id, error.clone());
        }
    }

    pub(super) fn remove_peer(&mut self, name: &str, reply: Reply<()>) {
        if !self.peers.contains_key(name) {
            return drop(reply.send(Err(unknown(name))));
        }
        let error = AgentError::Failed { name: name.to_owned(), reason: "it was removed".to_owned() };
        self.drop_peer(name, &error);
        // UCX gives an endpoint up at once, and what was in flight to it a little later.
        let theirs = self.flights.iter().filter(|(_, flight)| flight.peer == name).map(|(id, _)| *id);
        self.leaving.push((theirs.collect(), reply));
        self.let_go(0);
    }

    /// A transfer is over; peers that were removed and have none left are gone.
    pub(super) fn let_go(&mut self, flight: u64) {
        for (flights, _) in &mut self.leaving {
            flights.remove(&flight);
        }
        for (_, reply) in self.leaving.extract_if(.., |(flights, _)| flights.is_empty()) {
            let _nobody_waits = reply.send(Ok(()));
        }
    }

    pub(super) fn drop_peer(&mut self, name: &str, error: &AgentError) {
        self.disconnect(name, error);
        self.peers.remove(name);
    }
}

pub(super) fn unknown(name: &str) -> AgentError {
    AgentError::Peer {
        name: name.to_owned(),
        reason: "no such peer was added; pass its metadata to add_peer".to_owned(),
    }
}
