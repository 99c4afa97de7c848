//! The actor that owns one opened device.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use actix::prelude::*;
use bytes::Bytes;
use kvferry_core::protocol::{NicAdvert, NicCommand, NicEvent};
use kvferry_core::{Moment, NodeId, PoolId, PoolLayout, TransferId};
use kvferry_transport::{
    BindError, Event, Expected, OpenError, PeerId, Pool, PoolKeys, PostError, RemotePool, Transfer, Transport, Wait,
};
use thiserror::Error;
use tokio::sync::Notify;

use crate::nic::absence::Absences;
use crate::seams::NicPort;

mod absence;

/// Posts and expectations that wait behind a full transport; what comes beyond fails at once.
const BACKLOG_MAX: usize = 65_536;

/// A command for a NIC.
#[derive(Debug)]
pub struct NicRequest(pub NicCommand);

impl Message for NicRequest {
    type Result = ();
}

/// What happened at a NIC since the last report: one message per batch, never one per piece.
#[derive(Debug)]
pub struct NicReport {
    /// Which NIC.
    pub nic: usize,
    /// What happened, in order.
    pub events: Vec<NicEvent>,
}

impl Message for NicReport {
    type Result = ();
}

/// A NIC that is ready to be used.
#[derive(Debug)]
pub struct NicOpened {
    /// What peers need to know.
    pub advert: NicAdvert,
    /// Where commands go.
    pub port: NicPort,
}

/// Why a NIC did not start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NicStartError {
    /// The device did not open.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The pool was not bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Its thread ended before it answered.
    #[error("the NIC's thread ended before the device was open")]
    ThreadEnded,
    /// Its thread did not start.
    #[error("the NIC's thread did not start: {0}")]
    Thread(#[source] std::io::Error),
}

/// The transport and what this node knows of its peers. Shared between the actor and its host's loop, on one thread.
pub struct Nic {
    index: usize,
    transport: Box<dyn Transport>,
    pool: PoolId,
    peers: BTreeMap<NodeId, (PeerId, RemotePool)>,
    /// How to reach every peer again whose connection broke while its control session lives on.
    known: BTreeMap<NodeId, Reach>,
    /// Peers that the worker does not want to be reached this way, and why.
    refused: BTreeMap<NodeId, String>,
    /// Peers whose fence is not proved yet; nothing is posted to their nodes until it is.
    fencing: BTreeMap<PeerId, Fencing>,
    backlog: VecDeque<NicCommand>,
    events: Vec<Event>,
    reports: Recipient<NicReport>,
    outgoing: Vec<NicEvent>,
    clock: Rc<dyn Fn() -> Moment>,
    /// Peers that could not be reached last time: they are tried again after a while.
    absences: Absences,
    /// Whether somebody wants to know how long it takes to take transfers.
    timed: bool,
    /// Transfers that it has not taken yet, and since when they are to be.
    untaken: BTreeMap<TransferId, Moment>,
    /// How long it took; told with whatever is told next, since nobody waits for it.
    taken: Vec<NicEvent>,
}

impl Nic {
    /// Binds the pool and says what peers need to know. `clock` tells the time, which only grows.
    pub fn new(
        index: usize,
        mut transport: Box<dyn Transport>,
        pool: &Pool,
        reports: Recipient<NicReport>,
        clock: Rc<dyn Fn() -> Moment>,
    ) -> Result<(Self, NicAdvert), NicStartError> {
        let keys = transport.bind(pool)?;
        let info = transport.info();
        let advert = NicAdvert {
            kind: info.kind,
            device: info.device.clone(),
            host: info.host.clone(),
            address: transport.address(),
            keys: keys.0,
            domain: transport.domain(),
            gpu: transport.gpu(),
        };
        let nic = Nic {
            index,
            transport,
            pool: pool.id(),
            peers: BTreeMap::new(),
            known: BTreeMap::new(),
            refused: BTreeMap::new(),
            fencing: BTreeMap::new(),
            backlog: VecDeque::new(),
            events: Vec::new(),
            reports,
            outgoing: Vec::new(),
            clock,
            absences: Absences::default(),
            timed: false,
            untaken: BTreeMap::new(),
            taken: Vec::new(),
        };
        Ok((nic, advert))
    }

    /// Tells of every transfer how long it took to be taken: [`NicEvent::Posted`].
    pub fn timed(self) -> Self {
        Nic { timed: true, ..self }
    }

    /// Makes progress: polls the transport once and reports. Says whether anything happened.
    pub fn pump(&mut self) -> bool {
        let mut events = std::mem::take(&mut self.events);
        self.transport.poll(&mut events);
        let progressed = !events.is_empty();
        for event in events.drain(..) {
            self.note(event);
        }
        self.events = events;
        for _ in 0..self.backlog.len() {
            let Some(command) = self.backlog.pop_front() else { break };
            self.command(command);
        }
        self.report();
        progressed
    }

    /// How to wait for the next event.
    pub fn arm(&mut self) -> Wait {
        // What is in the backlog waits for a transfer to end, which is an event; every pump tries again.
        self.transport.arm()
    }

    /// When it has to be pumped even if nothing happens: a peer is to be tried again that posts wait for.
    pub fn due(&self) -> Option<Moment> {
        let waiting = self.backlog.iter().filter_map(|command| match command {
            // What waits for a fence goes on with its proof, which is an event.
            NicCommand::Post { node, .. } if !self.is_fencing(*node) => self.absences.until(*node),
            _ => None,
        });
        if self.absences.is_empty() { None } else { waiting.min() }
    }

    fn report(&mut self) {
        if !self.outgoing.is_empty() {
            let mut events = std::mem::take(&mut self.taken);
            events.append(&mut self.outgoing);
            self.reports.do_send(NicReport { nic: self.index, events });
        }
    }

    fn note(&mut self, event: Event) {
        let node_of = |peer: PeerId| self.peers.iter().find(|(_, (known, _))| *known == peer).map(|(node, _)| *node);
        let noted = match event {
            Event::Connected { peer } => node_of(peer).map(|node| {
                self.absences.met(node);
                NicEvent::Connected { node }
            }),
            Event::Shown { peer, evidence } => node_of(peer).map(|node| NicEvent::Shown { node, evidence }),
            Event::Completed { id, bytes, pieces } | Event::Arrived { id, bytes, pieces } => {
                Some(NicEvent::Done { id, bytes, pieces })
            }
            Event::Failed { id, error } => Some(NicEvent::Failed { id, reason: error.to_string() }),
            Event::Fenced { peer, proof } => {
                self.fencing.remove(&peer).map(|Fencing { node, address, ticket }| {
                    // Whatever is posted to that node next connects anew.
                    self.transport.disconnect(peer);
                    NicEvent::Fenced { node, address, ticket, proof }
                })
            }
            Event::PeerLost { peer, reason } => {
                let node = node_of(peer);
                if let Some(node) = node {
                    self.peers.remove(&node);
                    self.absences.lost(node, (self.clock)());
                }
                node.map(|node| NicEvent::PeerLost { node, reason })
            }
            // The control plane confirms leases itself, so no notices are asked for.
            Event::Notice { .. } | Event::Unbound { .. } => None,
        };
        self.outgoing.extend(noted);
    }

    fn command(&mut self, command: NicCommand) {
        match command {
            NicCommand::Connect { node, address, keys, layout } => {
                self.refused.remove(&node);
                self.absences.forget(node);
                self.known.insert(node, Reach { address, keys: PoolKeys(keys), layout });
                if let Err(reason) = self.reach(node) {
                    self.outgoing.push(NicEvent::PeerLost { node, reason });
                }
            }
            NicCommand::Disconnect { node } => {
                self.known.remove(&node);
                self.refused.remove(&node);
                self.absences.forget(node);
                if let Some((peer, _)) = self.peers.remove(&node) {
                    self.transport.disconnect(peer);
                }
            }
            NicCommand::Refuse { node, reason } => {
                if let Some((peer, _)) = self.peers.remove(&node) {
                    self.transport.disconnect(peer);
                }
                self.refused.insert(node, reason.clone());
                self.outgoing.push(NicEvent::PeerLost { node, reason });
            }
            NicCommand::Fence { node, address, ticket } => {
                let is_same = |fencing: &Fencing| fencing.node == node && fencing.address == address;
                if let Some((peer, _)) = self.fencing.iter().find(|(_, fencing)| is_same(fencing)) {
                    // Its proof is still to come, unless it was lost with the device. It goes by the first ticket: what has come about since
                    // is asked for again.
                    self.transport.fence(*peer);
                    return;
                }
                // The node may have started over since: then it is not its present connection that has to be fenced.
                let present = self.known.get(&node).is_none_or(|reach| reach.address == address);
                let standing = if present { self.peers.remove(&node) } else { None };
                let peer = match standing {
                    Some((peer, _)) => Ok(peer),
                    None => self.transport.connect(&address),
                };
                match peer {
                    Ok(peer) => {
                        self.fencing.insert(peer, Fencing { node, address, ticket });
                        self.transport.fence(peer);
                    }
                    // It is asked for again.
                    Err(error) => tracing::warn!(%node, %error, "a peer cannot be fenced yet"),
                }
            }
            // What is posted now must not be taken for what the fence was asked for, nor be ended by it.
            NicCommand::Post { id, node, .. } if self.is_fencing(node) => {
                self.put_off(id, command, "too many transfers wait for the peer to be fenced");
            }
            NicCommand::Post { id, node, .. } if self.is_absent(node) => {
                self.put_off(id, command, "too many transfers wait for the peer to be tried again");
            }
            NicCommand::Post { id, node, direction, program, range } => {
                self.begin(id);
                let pair = match self.peers.get(&node).copied() {
                    Some(pair) => Ok(pair),
                    None => self.reach(node),
                };
                let (peer, remote) = match pair {
                    Ok(pair) => pair,
                    Err(reason) => {
                        self.untaken.remove(&id);
                        self.outgoing.push(NicEvent::Failed { id, reason });
                        return;
                    }
                };
                let transfer = Transfer {
                    id,
                    peer,
                    direction,
                    local: self.pool,
                    remote,
                    program: program.clone(),
                    range,
                    notice: None,
                };
                let posted = self.transport.post(transfer);
                self.accept(posted, id, NicCommand::Post { id, node, direction, program, range });
            }
            NicCommand::Expect { id, from, program, range } => {
                self.begin(id);
                let expected = self.transport.expect(Expected {
                    id,
                    from: Some(from.clone()),
                    pool: self.pool,
                    program: program.clone(),
                    range,
                });
                self.accept(expected, id, NicCommand::Expect { id, from, program, range });
            }
            NicCommand::Cancel { id } => {
                let waiting = self.backlog.len();
                self.backlog.retain(|command| !names(command, id));
                if self.backlog.len() < waiting {
                    self.untaken.remove(&id);
                    self.outgoing.push(NicEvent::Failed { id, reason: "cancelled".to_owned() });
                } else {
                    self.transport.cancel(id);
                }
            }
            _ => {}
        }
    }

    /// Keeps a transfer for later, as many as there is room for.
    fn put_off(&mut self, id: TransferId, command: NicCommand, full: &str) {
        self.begin(id);
        if self.backlog.len() < BACKLOG_MAX {
            self.backlog.push_back(command);
        } else {
            self.untaken.remove(&id);
            self.outgoing.push(NicEvent::Failed { id, reason: full.to_owned() });
        }
    }

    /// Whether a known peer that is not connected is to be left alone for a while yet.
    fn is_absent(&self, node: NodeId) -> bool {
        !self.peers.contains_key(&node)
            && self.known.contains_key(&node)
            && self.absences.until(node).is_some_and(|until| (self.clock)() < until)
    }

    fn is_fencing(&self, node: NodeId) -> bool {
        self.fencing.values().any(|fencing| fencing.node == node)
    }

    /// Connects to a known peer, anew if it was connected; posts queue until the connection is up.
    fn reach(&mut self, node: NodeId) -> Result<(PeerId, RemotePool), String> {
        if let Some((peer, _)) = self.peers.remove(&node) {
            self.transport.disconnect(peer);
        }
        if let Some(reason) = self.refused.get(&node) {
            return Err(reason.clone());
        }
        let reach = self.known.get(&node).ok_or_else(|| format!("{node} is not connected"))?;
        self.absences.tried(node);
        let peer = self.transport.connect(&reach.address).map_err(|error| {
            self.absences.lost(node, (self.clock)());
            error.to_string()
        })?;
        match self.transport.import(peer, &reach.keys, &reach.layout) {
            Ok(remote) => {
                self.peers.insert(node, (peer, remote));
                Ok((peer, remote))
            }
            Err(error) => {
                self.transport.disconnect(peer);
                self.absences.lost(node, (self.clock)());
                Err(error.to_string())
            }
        }
    }

    /// A transfer is to be taken; it may have been before, when there was no room.
    fn begin(&mut self, id: TransferId) {
        if self.timed {
            self.untaken.entry(id).or_insert_with(|| (self.clock)());
        }
    }

    fn accept(&mut self, result: Result<(), PostError>, id: TransferId, command: NicCommand) {
        match result {
            Err(PostError::Full) if self.backlog.len() < BACKLOG_MAX => {
                self.backlog.push_back(command);
                return;
            }
            Ok(()) => {
                if let Some(since) = self.untaken.get(&id) {
                    self.taken.push(NicEvent::Posted { id, took: (self.clock)().since(*since) });
                }
            }
            Err(error) => self.outgoing.push(NicEvent::Failed { id, reason: error.to_string() }),
        }
        self.untaken.remove(&id);
    }
}

/// A fence whose proof is awaited.
struct Fencing {
    node: NodeId,
    /// Where the node was: elsewhere, before or since, the proof says nothing.
    address: Bytes,
    ticket: u64,
}

/// What a connection to a peer takes.
struct Reach {
    address: Bytes,
    keys: PoolKeys,
    layout: Arc<PoolLayout>,
}

fn names(command: &NicCommand, wanted: TransferId) -> bool {
    matches!(command, NicCommand::Post { id, .. } | NicCommand::Expect { id, .. } if *id == wanted)
}

/// The actor: commands in, progress by whoever pumps.
pub struct NicActor {
    nic: Rc<RefCell<Nic>>,
    /// Wakes the host's loop.
    wake: Rc<Notify>,
}

impl NicActor {
    /// An actor over a NIC that its host pumps; `wake` is notified after every command.
    pub fn new(nic: Rc<RefCell<Nic>>, wake: Rc<Notify>) -> Self {
        NicActor { nic, wake }
    }
}

impl Drop for NicActor {
    fn drop(&mut self) {
        // Nobody commands it any more: its host need not wait until it looks by itself.
        self.wake.notify_one();
    }
}

impl Actor for NicActor {
    type Context = Context<Self>;
}

impl Handler<NicRequest> for NicActor {
    type Result = ();

    fn handle(&mut self, NicRequest(command): NicRequest, _: &mut Context<Self>) {
        let mut nic = self.nic.borrow_mut();
        nic.command(command);
        nic.report();
        self.wake.notify_one();
    }
}

#[cfg(test)]
mod tests;
