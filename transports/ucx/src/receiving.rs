//! Chunks that come by rendezvous: UCX brings them into buffers of ours, and from there they go into blocks like any other.
//!
//! Never straight into a pool: an endpoint that fails may leave UCX's fetch under way, and nobody could say when it stops.

use ucx_sys::{UCS_OK, ucs_status_t};

use crate::inbox::{Key, Rendezvous};
use crate::link::CREDITS;
use crate::request::Begun;
use crate::transport::UcxTransport;
use crate::wire::{HEADER_BYTES, Header, RENDEZVOUS_BYTES_MAX};

/// Buffers that are kept for the next chunks.
const SPARES_MAX: usize = 2 * CREDITS as usize;
/// Chunks of all peers that may be on their way at once; each link's are bounded by its credits, which only honest peers keep to.
const IN_FLIGHT_MAX: usize = 4096;

/// What UCX is bringing.
#[derive(Default)]
pub(crate) struct Receiving {
    /// Chunks on their way.
    pub(crate) in_flight: usize,
    spares: Vec<Vec<u8>>,
}

impl UcxTransport {
    /// A peer offers a chunk.
    pub(crate) fn announced(&mut self, rendezvous: Rendezvous) {
        let Rendezvous { header, bytes, .. } = rendezvous;
        let known = self.numbers.get(&header.session).copied();
        let fits = bytes <= RENDEZVOUS_BYTES_MAX - HEADER_BYTES && self.receiving.in_flight < IN_FLIGHT_MAX;
        let wanted = Key::of(&header).is_some_and(|key| self.worker.inbox.wants(key));
        if !(fits && wanted && known.is_some()) {
            self.worker.decline(rendezvous);
            if let Some((_, link)) = known.filter(|_| !fits) {
                return self.lose_link(link, "a chunk is longer than one may be, or one too many");
            }
            // As one of a transfer that has ended here: it frees its place on the link.
            self.worker.inbox.brought(header, &[]);
            return self.take_arrivals();
        }
        let buffer = self.receiving.spares.pop().unwrap_or_default();
        self.receiving.in_flight += 1;
        if let Begun::Over(operation, status) = self.worker.receive(rendezvous, buffer) {
            self.finished(operation, status);
        }
    }

    /// UCX has brought a chunk, or could not.
    pub(crate) fn received(&mut self, header: Header, buffer: Vec<u8>, status: ucs_status_t) {
        self.receiving.in_flight = self.receiving.in_flight.saturating_sub(1);
        if status == UCS_OK {
            self.worker.inbox.brought(header, &buffer);
            self.take_arrivals();
        } else if let Some((_, link)) = self.numbers.get(&header.session).copied() {
            let reason = format!("receiving from the peer failed: {}", self.context.library.words(status));
            self.lose_link(link, &reason);
        }
        if self.receiving.spares.len() < SPARES_MAX {
            self.receiving.spares.push(buffer);
        }
    }
}
