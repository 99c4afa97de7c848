//! How links are closed, and what proves that nothing of a peer can write here any more.

use std::time::{Duration, Instant};

use kvferry_core::FenceProof;
use kvferry_transport::{Event, PeerId};

use crate::endpoint::{Endpoint, Operation};
use crate::link::Outgoing;
use crate::request::Begun;
use crate::transport::UcxTransport;
use crate::wire::KEY_BYTES;

/// How long a transport that is dropped waits for its last words to be out and for UCX to let go.
const SHUT_DOWN_WAIT: Duration = Duration::from_secs(1);

/// Endpoints that are kept open until their bytes are out. Nothing here waits for them, and their peers end that by taking the bytes or by dying;
/// from UCX 1.22 on the kernel gives up who does neither. Beyond so many, the oldest is closed by force.
const DRAINING_MAX: usize = 64;

/// A link whose endpoint is being destroyed.
pub(crate) struct Closing {
    pub(crate) instance: [u8; KEY_BYTES],
    /// Its device may still write what was asked for over it, until the worker is flushed after the endpoint is gone.
    by_device: bool,
    /// Its endpoint, while UCX still has bytes to send over it.
    draining: Option<Endpoint>,
    over: bool,
}

impl Closing {
    /// Whether it waits for its peer, and for nothing here.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.is_some()
    }
}

/// A fence whose proof is to come.
pub(crate) struct Fence {
    peer: PeerId,
    links: Vec<u64>,
}

impl UcxTransport {
    /// Destroys a link's endpoint, whatever is asked for over it. What only goes out may take its time: UCX's tcp (up to 1.22 at least) uses an
    /// endpoint after it has freed it where one was closed by force with bytes still to send, a peer that had stopped takes them, and closes
    /// its own end in the same moment.
    pub(crate) fn close_link(&mut self, id: u64) {
        let Some(mut link) = self.links.remove(&id) else { return };
        // Its keys go before its endpoint; reads that are under way keep them.
        link.supply = None;
        self.numbers.retain(|_, (_, over)| *over != id);
        let reads = link.warmth.is_trying()
            || link.collecting > 0
            || self.fetches.values().any(|fetch| fetch.link == id && fetch.holds_endpoint());
        // The kernel's copies are made by this thread, inside UCX's progress, and are over when that returns.
        let is_device = self.method.is_rdma();
        let closing = Closing {
            instance: link.instance,
            by_device: is_device && (reads || link.receiving > 0),
            draining: None,
            over: false,
        };
        self.closing.insert(id, closing);
        // A peer that never answered was sent nothing that could fill a socket.
        if is_device || reads || link.theirs.is_none() {
            return self.destroy(id, link.endpoint);
        }
        let mut draining = self.closing.iter().filter(|(_, closing)| closing.is_draining()).map(|(id, _)| *id);
        let oldest = draining.next();
        if let Some(oldest) = oldest.filter(|_| draining.count() + 1 >= DRAINING_MAX) {
            self.force(oldest);
        }
        self.drain(id, link.endpoint);
    }

    /// Destroys an endpoint at a moment at which UCX has nothing to send over it. A flush that is over in a step of UCX's says nothing of the
    /// step's end: the peer may have asked for more bytes in it, as a rendezvous does. One that is over at once does.
    fn drain(&mut self, link: u64, endpoint: Endpoint) {
        match endpoint.flush(link) {
            Begun::InFlight => {
                if let Some(closing) = self.closing.get_mut(&link) {
                    closing.draining = Some(endpoint);
                }
            }
            Begun::Over(..) => self.destroy(link, endpoint),
        }
    }

    /// Everything that was to go out over a link is out, or never will be.
    fn drained(&mut self, link: u64) {
        if let Some(endpoint) = self.closing.get_mut(&link).and_then(|closing| closing.draining.take()) {
            self.drain(link, endpoint);
        }
    }

    /// Destroys an endpoint that UCX still has bytes to send over.
    fn force(&mut self, link: u64) {
        if let Some(endpoint) = self.closing.get_mut(&link).and_then(|closing| closing.draining.take()) {
            self.destroy(link, endpoint);
        }
    }

    fn destroy(&mut self, link: u64, endpoint: Endpoint) {
        if let Begun::Over(operation, _) = endpoint.close(link) {
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
            Operation::Drained { link } => self.drained(link),
            Operation::Sent { .. }
            | Operation::Received { .. }
            | Operation::Got { .. }
            | Operation::Collected { .. }
            | Operation::Tried { .. } => {}
        }
    }

    /// Ends everything with a peer's transport. Only this side ever writes its pools: by copies of its own, which have stopped, or by reads
    /// that UCX was given, whose end is the proof.
    pub(crate) fn fence_peer(&mut self, peer: PeerId) {
        let instance = self.sessions.get(&peer).and_then(|session| self.links.get(&session.link)).map(|l| l.instance);
        let of_peer: Vec<u64> = self.fetches.values().filter(|fetch| fetch.peer == peer).map(|f| f.link).collect();
        // Also where its session is over and the link only idles.
        let is_its = |id: &u64, its: [u8; KEY_BYTES]| Some(its) == instance || of_peer.contains(id);
        let live: Vec<u64> = self.links.iter().filter(|(id, l)| is_its(id, l.instance)).map(|(id, _)| *id).collect();
        let closing = self.closing.iter().filter(|(id, closing)| is_its(id, closing.instance));
        let mut links: Vec<u64> = closing.map(|(id, _)| *id).chain(live.iter().copied()).collect();
        links.retain(|link| self.fetches.values().any(|fetch| fetch.link == *link && fetch.holds_endpoint()));
        for link in live {
            let others: Vec<PeerId> =
                self.links.get(&link).map_or_else(Vec::new, |l| l.sessions.iter().copied().collect());
            self.drop_link(link, "fenced");
            let others = others.into_iter().filter(|other| *other != peer);
            let reason = "its transport was fenced here".to_owned();
            self.events.extend(others.map(|peer| Event::PeerLost { peer, reason: reason.clone() }));
        }
        if links.is_empty() {
            self.report_fence(peer, FenceProof::OwnerCopies);
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
        let closing = &self.closing;
        let stands = |fence: &Fence| fence.links.iter().any(|link| closing.contains_key(link));
        let (stand, proved): (Vec<Fence>, Vec<Fence>) = std::mem::take(&mut self.fences).into_iter().partition(stands);
        self.fences = stand;
        for fence in proved {
            self.report_fence(fence.peer, FenceProof::EndpointDestroyed);
        }
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
        let links: Vec<u64> = self.closing.keys().copied().collect();
        links.into_iter().for_each(|link| self.force(link));
        let until = Instant::now() + SHUT_DOWN_WAIT;
        while (self.worker.operations.in_flight() > 0 || self.worker.operations.has_done()) && Instant::now() < until {
            self.progress_once();
        }
        // What UCX still holds keeps its own memory alive.
        self.fetches.clear();
        self.remotes.clear();
    }
}
