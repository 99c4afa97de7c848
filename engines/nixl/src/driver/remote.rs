//! Peers: what they told of themselves, and the connections to them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use bytes::Bytes;
use kvferry_core::PoolId;
use kvferry_ucx::raw::{PackedKey, RawKey, RawPeer, WorkerAddress};

use super::{Driver, Reply, UCX};
use crate::agent::{Peer, PeerKind};
use crate::metadata::{AgentMetadata, MemoryKind, RANGES_MAX, Range, Section};
use crate::ours::{OURS, Ours, ToldNic, ToldPool};
use crate::{AgentError, Piece, Ticket};

/// Peers of one agent.
const PEERS_MAX: usize = 4096;
/// What the allocator and UCX's view of it add to a range's own bytes, about.
const BESIDE_BYTES: usize = 64;

/// A peer.
pub(crate) struct Remote {
    address: WorkerAddress,
    pub(super) kind: PeerKind,
    sections: Vec<Section>,
    /// What a peer of ours told beside NIXL's protocol.
    told: Option<Ours>,
    /// Where its pools begin, where they end, and their tickets.
    grounds: BTreeMap<u64, (u64, Option<Ticket>)>,
    pub(super) link: Option<Link>,
    /// Transfers that have something to begin, in order.
    pub(super) waiting: VecDeque<u64>,
    /// Bytes of all that, about.
    bytes: usize,
}

/// A connection.
pub(crate) struct Link {
    pub(super) number: u64,
    pub(super) raw: RawPeer,
    /// Operations that UCX holds.
    pub(super) in_flight: usize,
    /// By kind, device, address and length of their range.
    keys: BTreeMap<(MemoryKind, u64, u64, u64), Rc<RawKey>>,
    /// Of the peer's tickets.
    board: Option<Rc<RawKey>>,
}

/// Memory of a peer that is looked into again and again.
pub(super) struct Known<'a> {
    sections: &'a [Section],
    memory: (MemoryKind, u64),
    /// Where the last piece lay: the next one mostly does, too.
    last: Option<&'a Range>,
}

impl Known<'_> {
    /// Whether the peer has told of all these bytes, as one range.
    pub(super) fn has(&mut self, address: u64, bytes: u64) -> bool {
        if self.last.is_none_or(|last| !last.holds(self.memory.1, address, bytes)) {
            self.last = find(self.sections, self.memory, address, bytes);
        }
        self.last.is_some()
    }
}

fn find(sections: &[Section], (kind, device): (MemoryKind, u64), address: u64, bytes: u64) -> Option<&Range> {
    let of_kind = sections.iter().filter(|section| section.kind == kind);
    of_kind.filter_map(|section| section.find(device, address, bytes)).next()
}

impl Remote {
    fn new(address: WorkerAddress) -> Remote {
        Remote {
            address,
            kind: PeerKind::Nixl,
            sections: Vec::new(),
            told: None,
            grounds: BTreeMap::new(),
            link: None,
            waiting: VecDeque::new(),
            bytes: 0,
        }
    }

    /// The range that has all these bytes, and its key; unpacked at its first use.
    pub(super) fn key(
        &mut self,
        memory: (MemoryKind, u64),
        address: u64,
        bytes: u64,
    ) -> Result<(Rc<RawKey>, Range), String> {
        let range = find(&self.sections, memory, address, bytes).ok_or("the peer has not told of this memory")?;
        let link = self.link.as_mut().ok_or("there is no connection")?;
        let place = (memory.0, range.device, range.address, range.bytes);
        if let Some(key) = link.keys.get(&place) {
            return Ok((key.clone(), range.clone()));
        }
        let key = link.raw.key(&PackedKey::check(&range.key)?)?;
        link.keys.insert(place, key.clone());
        Ok((key, range.clone()))
    }

    /// Where its tickets stand, and their key; unpacked at its first use.
    pub(super) fn board(&mut self) -> Result<(u64, Rc<RawKey>), String> {
        let told = self.told.as_ref().ok_or("it confirms nothing")?;
        let link = self.link.as_mut().ok_or("there is no connection")?;
        if let Some(key) = &link.board {
            return Ok((told.board.address, key.clone()));
        }
        let key = link.raw.key(&PackedKey::check(&told.board.key)?)?;
        link.board = Some(key.clone());
        Ok((told.board.address, key))
    }

    /// What the peer has told of a device's memory.
    pub(super) fn known(&self, memory: (MemoryKind, u64)) -> Known<'_> {
        Known { sections: &self.sections, memory, last: None }
    }

    /// The peer's device for programs.
    pub(super) fn nic(&self) -> Option<&ToldNic> {
        self.told.as_ref()?.nic.as_ref()
    }

    /// Why a ticket is none of this peer's.
    pub(super) fn refuses(&self, ticket: Ticket) -> Option<String> {
        match &self.told {
            None => Some("it is no agent of kvferry's and confirms no lease; read without one".to_owned()),
            Some(told) if ticket.slot >= told.board.slots => Some(format!(
                "the ticket is of slot {}, and it has {}; it is another agent's",
                ticket.slot, told.board.slots
            )),
            Some(_) => None,
        }
    }

    /// What a pool's registration is confirmed by.
    pub(super) fn ticket_of(&self, pool: PoolId) -> Option<Ticket> {
        self.told.as_ref()?.pools.iter().find(|told| told.id == pool)?.ticket
    }

    /// What the registrations of all pieces are confirmed by; whether that is all of them.
    pub(super) fn tickets(&self, pieces: &[Piece]) -> (Vec<Ticket>, bool) {
        let (mut tickets, mut all) = (BTreeSet::new(), self.told.is_some());
        let mut last = 0..0;
        for piece in pieces {
            if last.contains(&piece.address) {
                continue;
            }
            match self.grounds.range(..=piece.address).next_back() {
                Some((base, (end, Some(ticket)))) if piece.address < *end => {
                    tickets.insert(*ticket);
                    last = *base..*end;
                }
                _ => all = false,
            }
        }
        (tickets.into_iter().collect(), all)
    }

    /// Adds what a later word says, unless the peer then takes more than `room` bytes.
    fn add(&mut self, sections: Vec<Section>, told: Option<Ours>, room: usize) -> Result<(), String> {
        // Of two words of one agent of ours, which may overtake each other, the later counts.
        let stale = |told: &Ours, known: &Ours| told.edition < known.edition;
        let (sections, told) = match (told, &self.told) {
            (Some(told), Some(known)) if stale(&told, known) => return Ok(()),
            (Some(told), _) if told.whole => (sections, Some(told)),
            (Some(told), known) => (self.merged(sections)?, Some(joined(told, known.as_ref()))),
            (None, known) => (self.merged(sections)?, known.clone()),
        };
        let bytes = footprint(&self.address, &sections, told.as_ref());
        if bytes > room {
            return Err(format!(
                "it takes {bytes} bytes and there is room for {room}; remove peers that are gone, or raise AgentConfig::peers_bytes_max"
            ));
        }
        self.bytes = bytes;
        // Keys may be of other registrations now; what is in flight keeps its own.
        if let (Some(link), Some(_)) = (&mut self.link, &told) {
            (link.keys, link.board) = (BTreeMap::new(), None);
        }
        self.sections = sections;
        self.grounds = told.iter().flat_map(|told| &told.pools).flat_map(grounds).collect();
        self.told = told;
        Ok(())
    }

    /// What is known with more ranges, each once. What is known with another key is refused, as NIXL does: its memory was registered anew.
    fn merged(&self, sections: Vec<Section>) -> Result<Vec<Section>, String> {
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
        Ok(merged)
    }
}

/// A part's word beside what is known.
fn joined(told: Ours, known: Option<&Ours>) -> Ours {
    let others = known.iter().flat_map(|known| &known.pools);
    let others = others.filter(|other| told.pools.iter().all(|pool| pool.id != other.id));
    Ours { pools: told.pools.iter().chain(others).cloned().collect(), ..told.clone() }
}

fn grounds(pool: &ToldPool) -> impl Iterator<Item = (u64, (u64, Option<Ticket>))> {
    let regions = pool.bases.iter().zip(&pool.layout.regions);
    // Ends were found inside the address space.
    regions.map(|(base, bytes)| (*base, (base.saturating_add(*bytes), pool.ticket)))
}

/// What is kept of a peer, about, in bytes.
fn footprint(address: &WorkerAddress, sections: &[Section], told: Option<&Ours>) -> usize {
    let ranges = sections.iter().flat_map(|section| &section.ranges);
    let ranges: usize = ranges.map(|range| size_of::<Range>() + range.key.len() + BESIDE_BYTES).sum();
    let pool = |pool: &ToldPool| {
        let planes = size_of_val(pool.layout.planes.as_slice());
        // Regions and their beginnings are kept three times; all of it stands in the kind, too.
        2 * (planes + pool.keys.as_ref().map_or(0, Bytes::len) + BESIDE_BYTES) + 64 * pool.bases.len()
    };
    let told = told.map_or(0, |told| told.pools.iter().map(pool).sum::<usize>() + 2 * told.extension.len());
    address.bytes().len() + ranges + told
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
        let told = metadata.connection(OURS).map(|connection| Ours::decode(&connection.address));
        let told = told.transpose().map_err(&refuse)?.flatten();
        let sections: Vec<Section> = metadata.sections.into_iter().filter(|section| section.backend == UCX).collect();
        for range in sections.iter().flat_map(|section| &section.ranges) {
            PackedKey::check(&range.key)
                .map_err(|error| refuse(format!("the key of {:#x}: {error}", range.address)))?;
        }
        if let (Some(known), Some(address)) = (self.peers.get(&name), &address)
            && known.address != *address
        {
            let incarnation = |told: &Option<Ours>| told.as_ref().map(|told| told.incarnation);
            match (incarnation(&known.told), incarnation(&told)) {
                (Some(old), Some(new)) if new > old => {
                    let reason = "it has started again, and was added anew".to_owned();
                    self.drop_peer(&name, &AgentError::Failed { name: name.clone(), reason });
                }
                (Some(old), Some(new)) if new < old => {
                    return Err(refuse("this is of an earlier incarnation of it; pass what it says now".to_owned()));
                }
                _ => {
                    return Err(refuse(
                        "it is known by another address: it has started again; remove it first, or let it take a new name"
                            .to_owned(),
                    ));
                }
            }
        }
        let others = self.peers.iter().filter(|(other, _)| **other != name);
        let others: usize = others.map(|(other, remote)| other.len() + remote.bytes).sum();
        let room = self.peers_bytes_max.saturating_sub(others + name.len());
        let full = self.peers.len() >= PEERS_MAX;
        match (self.peers.get_mut(&name), address) {
            (Some(known), _) => known.add(sections, told, room).map_err(&refuse)?,
            (None, None) if metadata.connections.is_empty() => {
                return Err(refuse(
                    "this is only a part, without how to reach it; add its whole metadata first".to_owned(),
                ));
            }
            (None, None) => {
                let others: Vec<&str> = metadata.connections.iter().map(|known| known.backend.as_str()).collect();
                return Err(refuse(format!("it speaks {} and not UCX; start it with backend UCX", others.join(", "))));
            }
            (None, Some(_)) if full => {
                return Err(refuse(format!("{PEERS_MAX} peers are known already; remove those that are gone")));
            }
            (None, Some(address)) => {
                let mut remote = Remote::new(address);
                remote.add(sections, told, room).map_err(&refuse)?;
                self.peers.insert(name.clone(), remote);
            }
        }
        Ok(self.described(&name))
    }

    /// What is said of a peer; its kind is found anew.
    fn described(&mut self, name: &str) -> Peer {
        let Some(remote) = self.peers.get_mut(name) else {
            return Peer { name: name.to_owned(), kind: PeerKind::Nixl, ranges: 0 };
        };
        if let Some(told) = &remote.told {
            let programs = match (&self.ferry, &told.nic) {
                (None, _) => Err("this agent has no device for them".to_owned()),
                (_, None) => Err("the peer has no device for them".to_owned()),
                (Some(ferry), Some(nic)) => ferry.reaches(nic),
            };
            remote.kind = told.kind(programs);
        }
        let ranges = remote.sections.iter().map(|section| section.ranges.len()).sum();
        Peer { name: name.to_owned(), kind: remote.kind.clone(), ranges }
    }

    /// The connection to a peer, made at its first use.
    pub(super) fn connect(&mut self, name: &str) -> Result<(), AgentError> {
        let number = self.number();
        let Some(remote) = self.peers.get_mut(name) else { return Err(unknown(name)) };
        if remote.link.is_none() {
            let raw = self.worker.connect(number, &remote.address);
            let raw = raw.map_err(|reason| AgentError::Failed { name: name.to_owned(), reason })?;
            remote.link = Some(Link { number, raw, in_flight: 0, keys: BTreeMap::new(), board: None });
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
            self.stop_ferried(id);
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
        if let Some(ferry) = &mut self.ferry {
            ferry.disconnect(name);
        }
        self.peers.remove(name);
    }
}

pub(super) fn unknown(name: &str) -> AgentError {
    AgentError::Peer {
        name: name.to_owned(),
        reason: "no such peer was added; pass its metadata to add_peer".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ours::ToldBoard;
    use kvferry_core::PoolLayout;

    fn address() -> WorkerAddress {
        let metadata = AgentMetadata::decode(include_bytes!("../../tests/captured/agent-1.5.1.bin").as_slice().into());
        WorkerAddress::check(&metadata.unwrap().connection(UCX).unwrap().address).unwrap()
    }

    fn section(addresses: &[u64], key: &'static str) -> Section {
        let range =
            |address: &u64| Range { device: 0, address: *address, bytes: 64, key: Bytes::from_static(key.as_bytes()) };
        Section::new(UCX, MemoryKind::Dram, addresses.iter().map(range).collect()).unwrap()
    }

    fn pool(id: u32, base: u64, slot: u32) -> ToldPool {
        let layout = PoolLayout { regions: vec![64], planes: Vec::new() };
        let ticket = Some(Ticket { slot, value: 1 });
        ToldPool { id: PoolId(id), ticket, bases: vec![base], layout, keys: None }
    }

    fn told(edition: u64, whole: bool, pools: Vec<ToldPool>) -> Ours {
        let board = ToldBoard { address: 0, slots: 4, key: Bytes::new() };
        Ours { incarnation: 1, edition, whole, board, nic: None, pools, extension: Bytes::new() }
    }

    fn ranges(remote: &Remote) -> Vec<u64> {
        remote.sections.iter().flat_map(|section| &section.ranges).map(|range| range.address).collect()
    }

    #[test]
    fn whole_words_of_ours_replace_parts_add_and_earlier_ones_do_nothing() {
        let mut remote = Remote::new(address());
        remote.add(vec![section(&[0], "a")], Some(told(1, true, vec![pool(0, 0, 0)])), 1 << 20).unwrap();
        remote.add(vec![section(&[64], "b")], Some(told(2, false, vec![pool(1, 64, 1)])), 1 << 20).unwrap();
        assert_eq!(ranges(&remote), [0, 64]);
        assert_eq!((remote.ticket_of(PoolId(0)).unwrap().slot, remote.ticket_of(PoolId(1)).unwrap().slot), (0, 1));
        remote.add(vec![section(&[0], "a")], Some(told(1, true, vec![pool(0, 0, 0)])), 1 << 20).unwrap();
        assert_eq!(ranges(&remote), [0, 64], "it was said earlier");
        // Registered anew, with another key and ticket.
        remote.add(vec![section(&[64], "c")], Some(told(3, true, vec![pool(1, 64, 2)])), 1 << 20).unwrap();
        assert_eq!(ranges(&remote), [64]);
        assert_eq!((remote.ticket_of(PoolId(0)), remote.ticket_of(PoolId(1)).unwrap().slot), (None, 2));
        // NIXL's parts say nothing of that, and keep to NIXL's rules.
        remote.add(vec![section(&[128], "d")], None, 1 << 20).unwrap();
        assert!(remote.add(vec![section(&[64], "d")], None, 1 << 20).unwrap_err().contains("another key"));
        assert_eq!(ranges(&remote), [64, 128]);
    }

    #[test]
    fn registrations_of_pieces_are_known_by_where_they_lie() {
        let mut remote = Remote::new(address());
        let pools = vec![pool(0, 0, 0), pool(1, 64, 1), pool(2, 256, 2)];
        let sections = vec![section(&[0, 64, 256, 512], "a")];
        remote.add(sections, Some(told(1, true, pools)), 1 << 20).unwrap();
        let piece = |address| Piece { region: 0, offset: 0, address, bytes: 1 };
        let slots = |pieces: &[Piece]| {
            let (tickets, all) = remote.tickets(pieces);
            (tickets.iter().map(|ticket| ticket.slot).collect::<Vec<_>>(), all)
        };
        assert_eq!(slots(&[piece(63), piece(0), piece(64), piece(1)]), (vec![0, 1], true));
        assert_eq!(slots(&[piece(256), piece(512)]), (vec![2], false), "nobody told of that");
        assert_eq!(slots(&[piece(128)]), (vec![], false));
        let nixl = Remote::new(address());
        assert_eq!(nixl.tickets(&[piece(0)]), (vec![], false));
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        let mut remote = Remote::new(address());
        remote.add(vec![section(&[0, 64], "a")], None, 4096).unwrap();
        let many: Vec<u64> = (2..100).map(|index| index * 64).collect();
        let error = remote.add(vec![section(&many, "a")], None, 4096).unwrap_err();
        assert!(error.contains("room for 4096") && error.contains("peers_bytes_max"), "{error}");
        assert_eq!((ranges(&remote).len(), remote.bytes < 4096), (2, true));
    }
}
