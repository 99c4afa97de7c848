//! How links are closed, and what proves that nothing of a peer can write here any more.

use std::time::{Duration, Instant};

use kvferry_core::FenceProof;
use kvferry_transport::{Event, PeerId};

use crate::device::Method;
use crate::endpoint::Operation;
use crate::link::Outgoing;
use crate::request::Begun;
use crate::transport::UcxTransport;
use crate::wire::KEY_BYTES;

/// How long a transport that is dropped waits for its last words to be out and for UCX to let go.
const SHUT_DOWN_WAIT: Duration = Duration::from_secs(1);

/// A link whose endpoint is being destroyed.
pub(crate) struct Closing {
    pub(crate) instance: [u8; KEY_BYTES],
    /// Its device may still write what was asked for over it, until the worker is flushed after the endpoint is gone.
    by_device: bool,
    over: bool,
}

/// A fence whose proof is to come.
pub(crate) struct Fence {
    peer: PeerId,
    links: Vec<u64>,
}

impl UcxTransport {
    /// Destroys a link's endpoint, whatever is in flight over it.
    pub(crate) fn close_link(&mut self, id: u64) {
        let Some(link) = self.links.remove(&id) else { return };
        self.numbers.retain(|_, (_, over)| *over != id);
        // The kernel's copies are made by this thread, inside UCX's progress, and are over when that returns.
        let by_device = matches!(self.method, Method::Srd | Method::Verbs)
            && self.fetches.values().any(|fetch| fetch.link == id && fetch.in_flight > 0);
        self.closing.insert(id, Closing { instance: link.instance, by_device, over: false });
        if let Begun::Over(operation, _) = link.endpoint.close(id) {
            self.closed(operation);
        }
    }

    /// An endpoint is gone, or the flush after it is done.
    pub(crate) fn closed(&mut self, operation: Operation) {
        match operation {
            Operation::Closed { link, .. } => {
                let Some(closing) = self.closing.get_mut(&link) else { return };
                if !closing.by_device {
                    closing.over = true;
                    return;
                }
                // Only where it proves something: UCX 1.22 flushes endpoints of its own, too, and was seen to read one that had failed and
                // been freed meanwhile.
                if let Begun::Over(operation, _) = self.worker.flush(link) {
                    self.closed(operation);
                }
            }
            Operation::Flushed { link } => {
                if let Some(closing) = self.closing.get_mut(&link) {
                    closing.over = true;
                }
            }
            Operation::Sent { .. } | Operation::Received { .. } | Operation::Got { .. } => {}
        }
    }

    /// Ends everything with a peer's transport. Only this side ever writes its pools: by copies of its own, which have stopped, or by reads
    /// that UCX was given, whose end is the proof.
    pub(crate) fn fence_peer(&mut self, peer: PeerId) {
        let instance = self.sessions.get(&peer).and_then(|session| self.links.get(&session.link)).map(|l| l.instance);
        let of_peer: Vec<u64> = self.fetches.values().filter(|fetch| fetch.peer == peer).map(|f| f.link).collect();
        let live: Vec<u64> =
            self.links.iter().filter(|(_, link)| Some(link.instance) == instance).map(|(id, _)| *id).collect();
        let closing =
            self.closing.iter().filter(|(id, closing)| Some(closing.instance) == instance || of_peer.contains(id));
        let mut links: Vec<u64> = closing.map(|(id, _)| *id).chain(live.iter().copied()).collect();
        links.retain(|link| self.fetches.values().any(|fetch| fetch.link == *link && fetch.in_flight > 0));
        for link in live {
            let others: Vec<PeerId> =
                self.links.get(&link).map_or_else(Vec::new, |l| l.sessions.iter().copied().collect());
            self.drop_link(link, "fenced");
            let others = others.into_iter().filter(|other| *other != peer);
            let reason = "its transport was fenced here".to_owned();
            self.events.extend(others.map(|peer| Event::PeerLost { peer, reason: reason.clone() }));
        }
        if links.is_empty() {
            self.events.push(Event::Fenced { peer, proof: FenceProof::OwnerCopies });
        } else {
            self.fences.push(Fence { peer, links });
        }
    }

    /// Lets go of what is over: closed links, fences with their proof.
    pub(crate) fn settle_links(&mut self) {
        let fetches = &self.fetches;
        self.closing.retain(|id, closing| {
            !closing.over || fetches.values().any(|fetch| fetch.link == *id && fetch.in_flight > 0)
        });
        let (links, closing) = (&self.links, &self.closing);
        self.receiving.settle(|link| links.contains_key(&link) || closing.contains_key(&link));
        self.end_stopped_fetches();
        let (closing, events) = (&self.closing, &mut self.events);
        self.fences.retain(|fence| {
            let proved = !fence.links.iter().any(|link| closing.contains_key(link));
            if proved {
                events.push(Event::Fenced { peer: fence.peer, proof: FenceProof::EndpointDestroyed });
            }
            !proved
        });
    }

    /// Says goodbye to every peer and gives UCX a bounded time to let go of all that it holds.
    pub(crate) fn shut_down(&mut self) {
        let until = Instant::now() + SHUT_DOWN_WAIT;
        let peers: Vec<PeerId> = self.sessions.keys().copied().collect();
        for peer in peers {
            self.hang_up(peer, "its transport was closed");
        }
        // Chunks that peers were offered may never be fetched; closing the endpoints ends them.
        let speaks = |out: &Outgoing| !out.messages.is_empty() || out.in_flight > out.offered;
        while self.links.values().any(|link| speaks(&link.outgoing)) && Instant::now() < until {
            self.progress_once();
            let links: Vec<u64> = self.links.keys().copied().collect();
            links.into_iter().for_each(|link| self.send_messages(link));
        }
        let links: Vec<u64> = self.links.keys().copied().collect();
        for link in links {
            self.close_link(link);
        }
        let until = Instant::now() + SHUT_DOWN_WAIT;
        while (self.worker.operations.in_flight() > 0 || self.worker.operations.has_done()) && Instant::now() < until {
            self.progress_once();
        }
        // What UCX still holds keeps its own memory alive.
        self.fetches.clear();
        self.remotes.clear();
    }
}
