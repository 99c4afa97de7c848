//! Packed chunks that their destination reads: the source puts them into a [`Depot`] of the link's own and names them in a short message, the
//! destination reads each by one large read into staging of its own and unpacks it from there, and a credit gives the buffer back.
//!
//! Never straight into a pool, and never out of a buffer that may hold something else: see `depot.rs` for what keeps a late read honest.

use std::rc::Rc;

use kvferry_topology::Way;
use kvferry_transport::codec::{decode, encode};
use kvferry_transport::{Borrowing, PackedBy};
use ucx_sys::{UCS_OK, ucs_status_t};

use crate::depot::{DEPOT_BYTES, Depot};
use crate::endpoint::{Operation, RemoteKeys};
use crate::inbox::Key;
use crate::lanes::Lanes;
use crate::link::CREDITS;
use crate::request::Begun;
use crate::staging::Buffer;
use crate::transport::UcxTransport;
use crate::wire::{Header, Kind, PARCEL_BYTES_MAX, Parcel, RegionKey, Staged, data_of};

/// A peer's depot, as this end of the link sees it.
pub(crate) struct Supply {
    keys: Rc<RemoteKeys>,
    base: u64,
    /// Buffers that were named, until they are given back with a credit.
    borrowed: Borrowing,
}

impl Supply {
    /// Takes a chunk that the peer names; where it lies.
    fn open(&mut self, parcel: Parcel) -> Result<u64, String> {
        let Parcel { buffer, bytes } = parcel;
        self.borrowed.open(buffer, bytes)?;
        Ok(self.base + u64::from(buffer) * PARCEL_BYTES_MAX as u64)
    }

    /// A chunk's place on the link is free.
    pub(crate) fn close(&mut self, buffer: u32) {
        self.borrowed.close(buffer);
    }

    /// What is given back now.
    pub(crate) fn give_back(&mut self) -> u64 {
        self.borrowed.give_back()
    }
}

impl UcxTransport {
    /// Whether packed chunks over a link are better read than sent to this side.
    fn collects(&mut self, id: u64) -> bool {
        let by = self.options.packed_by;
        self.reads_memory(id)
            && match by {
                PackedBy::Auto => self.lanes(id).is_some_and(Lanes::read_by_device),
                PackedBy::Message => false,
                PackedBy::Read => true,
            }
    }

    /// Asks the peer to put packed chunks where they can be read, once a link.
    pub(crate) fn ask_for_staging(&mut self, id: u64) {
        if !self.collects(id) {
            return;
        }
        let Some(link) = self.links.get(&id).filter(|link| link.supply.is_none() && !link.warmth.asking) else {
            return;
        };
        let Some(peer) = self.speaker(link) else { return };
        if let Some(link) = self.links.get_mut(&id) {
            link.warmth.asking = true;
        }
        self.say(peer, Kind::Ask, 0, 0, &[]);
    }

    /// The peer would rather read what is packed for it.
    pub(crate) fn on_ask(&mut self, id: u64) -> Result<(), String> {
        let Some(link) = self.links.get(&id) else { return Ok(()) };
        if link.depot.is_some() {
            return Err("it asks for staging a second time".to_owned());
        }
        let Some(peer) = self.speaker(link) else {
            // Whoever asked waits: the next session answers.
            if let Some(link) = self.links.get_mut(&id) {
                link.owes_staging = true;
            }
            return Ok(());
        };
        let mut depot = None;
        if self.method.registers(self.access) && self.options.packed_by != PackedBy::Message {
            match Depot::new(&self.context, self.staging.budget()) {
                Ok(Some(made)) => depot = Some(made),
                Ok(None) => tracing::info!(
                    limit = self.options.staging_bytes_max,
                    "no staging is left for a peer that would read packed chunks: they are sent"
                ),
                Err(reason) => {
                    tracing::warn!(reason, "no staging for a peer that would read packed chunks: they are sent")
                }
            }
        }
        let staging = depot.as_ref().map(|depot| depot.key().clone());
        if let Some(link) = self.links.get_mut(&id) {
            (link.depot, link.owes_staging) = (depot, false);
        }
        self.say(peer, Kind::Staged, 0, 0, &encode(&Staged { staging }));
        Ok(())
    }

    /// The peer says where it puts packed chunks.
    pub(crate) fn on_staged(&mut self, id: u64, body: &[u8]) -> Result<(), String> {
        let Staged { staging } = decode(body).map_err(|error| format!("staging: {error}"))?;
        let Some(link) = self.links.get_mut(&id) else { return Ok(()) };
        if !std::mem::replace(&mut link.warmth.asking, false) {
            return Err("staging that nobody asked for".to_owned());
        }
        if let Some(region) = staging {
            let RegionKey { base, bytes, .. } = region;
            region.check()?;
            if bytes != DEPOT_BYTES || region.rkey.is_empty() {
                return Err(format!(
                    "staging of {bytes} bytes with a key of {}; {DEPOT_BYTES} are due",
                    region.rkey.len()
                ));
            }
            let keys = Rc::new(RemoteKeys::unpack(&link.endpoint, [region.rkey.as_slice()].into_iter())?);
            link.supply = Some(Supply { keys, base, borrowed: Borrowing::new(CREDITS, PARCEL_BYTES_MAX) });
            // Packing costs something else now, and nothing was measured yet.
            link.costs = None;
            let supplied = self.links.values().filter(|link| link.supply.is_some()).count();
            self.landing.provide(supplied);
        }
        self.join(id);
        Ok(())
    }

    /// A chunk waits in the peer's staging.
    pub(crate) fn on_parcel(&mut self, id: u64, header: Header, body: &[u8]) -> Result<(), String> {
        let parcel: Parcel = decode(body).map_err(|error| format!("a packed chunk: {error}"))?;
        let Some(link) = self.links.get_mut(&id) else { return Ok(()) };
        let Some(supply) = &mut link.supply else {
            return Err("a packed chunk in staging that was not shown".to_owned());
        };
        let from = supply.open(parcel)?;
        let data = data_of(header.kind).map(|kind| Header { kind, ..header });
        let wanted = data.filter(|data| Key::of(data).is_some_and(|key| self.worker.inbox.wants(key)));
        let Some(header) = wanted else {
            // Of a transfer that has ended here: it frees its place on the link.
            supply.close(parcel.buffer);
            link.consumed += 1;
            return Ok(());
        };
        let keys = supply.keys.clone();
        let (mut buffer, bytes) = (self.landing.buffer(), parcel.bytes as usize);
        let Some(to) = buffer.lay_open(bytes) else { return Err("a packed chunk that is too long".to_owned()) };
        link.collecting += 1;
        let memory = buffer.handle();
        let operation = Operation::Collected { link: id, header, place: parcel.buffer, buffer, _keys: keys.clone() };
        // SAFETY: the operation owns the buffer, which was laid open for so many bytes, and the key.
        let begun = unsafe { link.endpoint.read(operation, &keys, 0, from, to, bytes, memory) };
        if let Begun::Over(operation, status) = begun {
            self.finished(operation, status);
        }
        Ok(())
    }

    /// A chunk was read, or could not be.
    pub(crate) fn collected(&mut self, id: u64, header: Header, place: u32, buffer: Buffer, status: ucs_status_t) {
        if status != UCS_OK {
            // It still counts as under way: a device that failed may write, until the worker is flushed behind the endpoint.
            self.receiving.doubt(id, buffer);
            let reason = format!("a read of the peer's packed bytes failed: {}", self.context.library.words(status));
            return self.lose_link(id, &reason);
        }
        if let Some(link) = self.links.get_mut(&id) {
            link.collecting = link.collecting.saturating_sub(1);
        }
        self.note_moved(id, Way::Read, buffer.len() as u64);
        self.worker.inbox.brought(header, buffer, Some(place));
        self.take_arrivals();
    }
}

#[cfg(test)]
mod tests;
