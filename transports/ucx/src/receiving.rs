//! Chunks that come by rendezvous: UCX brings them into our staging, and from there they go into blocks like any other.
//!
//! Never straight into a pool: an endpoint that fails may leave UCX's fetch under way, and nobody could say when it stops.

use ucx_sys::{UCS_OK, ucs_status_t};

use crate::inbox::{Key, Rendezvous};
use crate::link::CREDITS;
use crate::request::Begun;
use crate::staging::Buffer;
use crate::transport::UcxTransport;
use crate::wire::{HEADER_BYTES, Header, RENDEZVOUS_BYTES_MAX, WARMING_TAG};

/// What UCX is bringing.
#[derive(Default)]
pub(crate) struct Receiving {
    /// Chunks on their way.
    pub(crate) in_flight: usize,
    /// Buffers of receives that failed, by link: kept until its endpoint is gone.
    doubtful: Vec<(u64, Buffer)>,
}

impl Receiving {
    /// Keeps what a failed operation may still be writing to, until its link's endpoint is gone.
    pub(crate) fn doubt(&mut self, link: u64, buffer: Buffer) {
        self.doubtful.push((link, buffer));
    }

    /// Lets the buffers of links go that `is_open` does not know any more.
    pub(crate) fn settle(&mut self, is_open: impl Fn(u64) -> bool) {
        self.doubtful.retain(|(link, _)| is_open(*link));
    }
}

impl UcxTransport {
    /// A peer offers a chunk.
    pub(crate) fn announced(&mut self, rendezvous: Rendezvous) {
        let Rendezvous { header, bytes, .. } = rendezvous;
        let id = self.numbers.get(&header.session).map(|(_, link)| *link);
        let Some((id, link)) = id.and_then(|id| Some((id, self.links.get_mut(&id)?))) else {
            return self.worker.decline(rendezvous);
        };
        if bytes > RENDEZVOUS_BYTES_MAX - HEADER_BYTES || link.receiving >= CREDITS {
            self.worker.decline(rendezvous);
            return self.lose_link(id, "a chunk is longer than one may be, or one more than it has credits for");
        }
        // What warms the link up is received, too: for that it comes.
        if header.tag != WARMING_TAG && !Key::of(&header).is_some_and(|key| self.worker.inbox.wants(key)) {
            self.worker.decline(rendezvous);
            // Of a transfer that has ended here: it frees its place on the link.
            link.consumed += 1;
            return;
        }
        link.receiving += 1;
        self.receiving.in_flight += 1;
        let buffer = self.staging.buffer();
        if let Begun::Over(operation, status) = self.worker.receive(id, rendezvous, buffer) {
            self.finished(operation, status);
        }
    }

    /// UCX has brought a chunk, or could not.
    pub(crate) fn received(&mut self, link: u64, header: Header, buffer: Buffer, status: ucs_status_t) {
        self.receiving.in_flight = self.receiving.in_flight.saturating_sub(1);
        if status != UCS_OK {
            self.receiving.doubt(link, buffer);
            let reason = format!("receiving from the peer failed: {}", self.context.library.words(status));
            return self.lose_link(link, &reason);
        }
        if let Some(link) = self.links.get_mut(&link) {
            link.receiving = link.receiving.saturating_sub(1);
        }
        self.worker.inbox.brought(header, buffer, None);
        self.take_arrivals();
    }
}
