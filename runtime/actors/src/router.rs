//! Who gets a message: a local actor, or the session to another node.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use actix::prelude::*;
use dashmap::{DashMap, DashSet};
use kvferry_core::protocol::{Conversation, Message as Wire};
use kvferry_core::{Epoch, NodeId};

use crate::mesh::Meet;
use crate::peer_session::{PeerSession, Speak};
use crate::watch::Watch;

/// Messages that may wait for a first session with one node.
const WAITING_MAX: usize = 4096;

/// A message for a local actor, and who said it.
#[derive(Debug)]
pub(crate) struct Incoming {
    /// The sender; authenticated by its session, or this node itself.
    pub from: NodeId,
    /// In which conversation it was said; 0 on this node itself.
    pub talk: u64,
    /// What it said.
    pub message: Wire,
}

impl Message for Incoming {
    type Result = ();
}

/// Local actors by what they take.
#[derive(Clone, Default)]
pub(crate) struct Ports {
    /// The prefill or decode worker.
    pub worker: Option<Recipient<Incoming>>,
    /// The group leader.
    pub leader: Option<Recipient<Incoming>>,
    /// The scheduler.
    pub scheduler: Option<Recipient<Incoming>>,
    /// The directory.
    pub directory: Option<Recipient<Incoming>>,
    /// The mesh of sessions.
    pub mesh: Option<Recipient<Incoming>>,
    /// The same, for sessions that somebody waits for.
    pub meet: Option<Recipient<Meet>>,
}

/// Shared by all actors of one node, on one thread. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Router {
    node: NodeId,
    /// Whose word on membership and pairing counts.
    scheduler: NodeId,
    ports: Rc<RefCell<Ports>>,
    talks: Rc<DashMap<NodeId, Talk>>,
    /// For nodes whose first session is still to come: a group may get work before all its ranks have met.
    waiting: Rc<DashMap<NodeId, VecDeque<Wire>>>,
    /// Nodes that had a session: what was meant for one that ended is dropped.
    met: Rc<DashSet<NodeId>>,
    watchers: Rc<[Arc<dyn Watch>]>,
}

/// What this node and one incarnation of another have to say to each other.
struct Talk {
    name: u64,
    epoch: Epoch,
    conversation: Conversation,
    /// The session over the present link.
    session: Option<Addr<PeerSession>>,
    /// It knows that there is something to say.
    told: bool,
}

impl Router {
    /// A router without ports or sessions.
    pub(crate) fn new(node: NodeId, scheduler: NodeId) -> Self {
        Router {
            node,
            scheduler,
            ports: Rc::default(),
            talks: Rc::default(),
            waiting: Rc::default(),
            met: Rc::default(),
            watchers: Rc::new([]),
        }
    }

    /// With watchers, who see what is said to other nodes and heard of them.
    pub(crate) fn watched(self, watchers: &[Arc<dyn Watch>]) -> Self {
        Router { watchers: watchers.into(), ..self }
    }

    /// This node.
    pub(crate) fn node(&self) -> NodeId {
        self.node
    }

    /// Connects local actors.
    pub(crate) fn connect(&self, change: impl FnOnce(&mut Ports)) {
        change(&mut self.ports.borrow_mut());
    }

    /// Begins a conversation with an incarnation of a node.
    pub(crate) fn begin(&self, node: NodeId, epoch: Epoch, name: u64) {
        self.met.insert(node);
        let conversation = Conversation::new(name);
        self.talks.insert(node, Talk { name, epoch, conversation, session: None, told: false });
    }

    /// The session over which a node is reached from now on; `None` until there is another.
    pub(crate) fn link(&self, node: NodeId, session: Option<Addr<PeerSession>>) {
        if let Some(mut talk) = self.talks.get_mut(&node) {
            talk.conversation.handle_link_down();
            (talk.session, talk.told) = (session, false);
        }
    }

    /// Ends the conversation with a node.
    pub(crate) fn end(&self, node: NodeId) {
        self.talks.remove(&node);
    }

    /// Lets a session go on with the conversation; `None` when it is no longer the one over which the node is reached.
    pub(crate) fn converse<R>(
        &self,
        node: NodeId,
        session: &Addr<PeerSession>,
        go_on: impl FnOnce(&mut Conversation) -> R,
    ) -> Option<R> {
        let mut talk = self.talks.get_mut(&node).filter(|talk| talk.session.as_ref() == Some(session))?;
        talk.told = false;
        Some(go_on(&mut talk.conversation))
    }

    /// Whether a later incarnation of a node is talked to already.
    pub(crate) fn is_newer(&self, node: NodeId, epoch: Epoch) -> bool {
        self.talks.get(&node).is_some_and(|talk| talk.epoch > epoch)
    }

    /// Sends what waited for a node's first session.
    pub(crate) fn flush(&self, node: NodeId) {
        for message in self.waiting.remove(&node).into_iter().flat_map(|(_, waiting)| waiting) {
            self.send(node, message);
        }
    }

    /// Has a session with a node made, if there is none.
    pub(crate) fn meet(&self, node: NodeId) {
        if let Some(mesh) = &self.ports.borrow().meet {
            mesh.do_send(Meet(node));
        }
    }

    /// A node is lost: its next incarnation is met anew.
    pub(crate) fn forget(&self, node: NodeId) {
        self.waiting.remove(&node);
        self.met.remove(&node);
    }

    /// Sends to a node as long as the conversation is the one in which the sender has heard it, if it has. In a later one there may be another
    /// incarnation, for which this was not meant; the sender is about to hear that the peer is down.
    pub(crate) fn send_within(&self, to: NodeId, talk: Option<u64>, message: Wire) {
        let goes_on = |talk| self.talks.get(&to).is_some_and(|current| current.name == talk);
        if talk.is_none_or(goes_on) {
            self.send(to, message);
        } else {
            tracing::debug!(%to, "the conversation is over; a message is dropped");
        }
    }

    /// Sends to a node; to this one, without a session. A message for a node that had a conversation and has none is dropped: whoever waits
    /// for its answer hears that the peer is down.
    pub(crate) fn send(&self, to: NodeId, message: Wire) {
        if to == self.node {
            self.deliver(to, message);
            return;
        }
        self.watchers.iter().for_each(|watcher| watcher.said(to, true, &message));
        if let Some(mut talk) = self.talks.get_mut(&to) {
            if let Err(error) = talk.conversation.say(message) {
                tracing::warn!(%to, %error, "the conversation ends");
            }
            if !talk.told
                && let Some(session) = talk.session.clone()
            {
                talk.told = true;
                session.do_send(Speak);
            }
        } else if !self.met.contains(&to) && self.waiting.get(&to).is_none_or(|waiting| waiting.len() < WAITING_MAX) {
            self.waiting.entry(to).or_default().push_back(message);
        } else {
            tracing::debug!(%to, "no session; a message is dropped");
        }
    }

    /// This incarnation was told that it is over.
    pub(crate) fn refuse(&self, from: NodeId, message: Wire, dialed: bool) {
        if dialed || from == self.scheduler {
            // It is no part of any conversation.
            if let Some(mesh) = &self.ports.borrow().mesh {
                mesh.do_send(Incoming { from, talk: 0, message });
            }
        } else {
            tracing::warn!(%from, "a node that was not asked says that this incarnation is over; ignored");
        }
    }

    /// Gives a message to the local actors that it concerns.
    pub(crate) fn deliver(&self, from: NodeId, message: Wire) {
        if from != self.node {
            self.watchers.iter().for_each(|watcher| watcher.said(from, false, &message));
        }
        let ports = self.ports.borrow();
        let talk = self.talks.get(&from).map_or(0, |talk| talk.name);
        let give = |port: &Option<Recipient<Incoming>>, from, message| match port {
            Some(port) => port.do_send(Incoming { from, talk, message }),
            None => tracing::debug!(%from, "nobody here takes that message"),
        };
        let from_scheduler = from == self.scheduler || from == self.node;
        match &message {
            // Of a loss that an earlier scheduler had declared.
            Wire::Lost(_) if !from_scheduler && ports.directory.is_some() => give(&ports.directory, from, message),
            Wire::Members(_) | Wire::Lost(_) | Wire::Pair(_) | Wire::Abort { .. } | Wire::OutcomesKnown { .. }
                if !from_scheduler =>
            {
                tracing::warn!(%from, "only the scheduler says that; ignored");
            }
            Wire::Join(_) => give(&ports.directory, from, message),
            Wire::Members(_) | Wire::Lost(_) => {
                // The leader before the worker, the mesh last: it dials, and what it dials asks the others.
                for port in [&ports.leader, &ports.worker, &ports.mesh] {
                    give(port, from, message.clone());
                }
            }
            // The scheduler talks to leaders, leaders to ranks; a leader hands on what it decided under the same names.
            Wire::Prefill(_) | Wire::Renew { .. } | Wire::Release { .. } => {
                let for_leader = ports.leader.is_some() && from == self.scheduler;
                give(if for_leader { &ports.leader } else { &ports.worker }, from, message);
            }
            Wire::RankOpened { .. }
            | Wire::RankReady { .. }
            | Wire::RankFailed { .. }
            | Wire::RankDone { .. }
            | Wire::Holding { .. } => give(&ports.leader, from, message),
            Wire::Pair(_) | Wire::Abort { .. } | Wire::OutcomesKnown { .. } => give(&ports.leader, from, message),
            Wire::Started { .. } | Wire::Freed { .. } | Wire::Holds { .. } | Wire::Health { .. } => {
                give(if ports.leader.is_some() { &ports.leader } else { &ports.scheduler }, from, message);
            }
            Wire::Offered(_)
            | Wire::OfferReady { .. }
            | Wire::OfferFailed { .. }
            | Wire::Outcome(_)
            | Wire::StandingOffers(_)
            | Wire::StandingHandovers(_) => give(&ports.scheduler, from, message),
            // A leader knows by it that a rank can be reached.
            Wire::Profile(_) => {
                for port in [&ports.leader, &ports.worker] {
                    give(port, from, message.clone());
                }
            }
            _ => give(&ports.worker, from, message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: NodeId = NodeId(1);
    const RANK: NodeId = NodeId(2);

    fn said(router: &Router) -> usize {
        router.talks.get(&RANK).map_or(0, |talk| talk.conversation.unacknowledged())
    }

    /// A leader that had not heard yet that a rank was lost gave it work, which waited for the rank's next incarnation: that held blocks for it, unknown to
    /// the leader.
    #[test]
    fn what_was_meant_for_one_incarnation_is_not_said_to_the_next() {
        let router = Router::new(HERE, NodeId(3));
        let word = || Wire::Health { trouble: None };
        router.begin(RANK, Epoch(1), 1);
        router.send_within(RANK, Some(1), word());
        assert_eq!(said(&router), 1);
        // The mesh has heard of the loss; whoever speaks has not.
        router.end(RANK);
        router.forget(RANK);
        router.send_within(RANK, Some(1), word());
        router.begin(RANK, Epoch(2), 2);
        router.flush(RANK);
        router.send_within(RANK, Some(1), word());
        assert_eq!(said(&router), 0);
        router.send_within(RANK, Some(2), word());
        assert_eq!(said(&router), 1);
    }

    /// A group may get work before all its ranks have met.
    #[test]
    fn what_is_said_before_anything_was_heard_waits() {
        let router = Router::new(HERE, NodeId(3));
        router.send_within(RANK, None, Wire::Health { trouble: None });
        router.begin(RANK, Epoch(1), 1);
        router.flush(RANK);
        assert_eq!(said(&router), 1);
    }
}
