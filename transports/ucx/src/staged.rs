//! Pools in a device's memory: what goes out of them, who waits for the device, and what is told only once it no longer touches a pool.
//!
//! Every transfer from or to such a pool takes the packed way, and the device packs and unpacks it. A slot of the stage belongs to a copy, and to
//! this thread for as long as it copies bytes between the slot and what UCX moves: never to UCX, nor to a peer that may stand still.

use kvferry_core::FenceProof;
use kvferry_transport::{Event, PeerId, Stage, TransferError};

use crate::inbox::{Flow, Key};
use crate::posted::Posted;
use crate::remote::Remote;
use crate::serving::{PARCEL_BYTES_MIN, named};
use crate::transport::UcxTransport;
use crate::wire::{HEADER_BYTES, PARCEL_BYTES_MAX, Refusal};

impl UcxTransport {
    /// Reports an event that says that memory is no longer touched: once everything that these stages have under way has ended, and in order.
    pub(crate) fn report(&mut self, stages: &[Stage], event: Event) {
        self.deferred.report(stages, event, &mut self.events);
    }

    /// Tells of a fence: no copy that is under way for anybody touches a pool any more.
    pub(crate) fn report_fence(&mut self, peer: PeerId, proof: FenceProof) {
        let stages: Vec<Stage> = self.pools.values().filter_map(|bound| bound.stage.clone()).collect();
        self.report(&stages, Event::Fenced { peer, proof });
    }

    /// Looks what the devices have done, and goes on where something waited for it.
    pub(crate) fn attend(&mut self) {
        for stage in self.pools.values().filter_map(|bound| bound.stage.as_ref()) {
            stage.poll();
        }
        self.worker.inbox.settle();
        self.take_arrivals();
        self.deferred.settle(&mut self.events);
    }

    /// Whether a device is at work or an event waits for one, and whether to look for its end all the time.
    pub(crate) fn waits_for_device(&self) -> Option<bool> {
        let bound = self.pools.values().filter_map(|bound| bound.stage.as_ref());
        let (mut is_busy, mut is_recent) = (!self.deferred.is_empty(), false);
        for stage in bound.chain(self.deferred.stages()) {
            let (busy, recent) = stage.is_busy();
            is_busy |= busy;
            is_recent |= busy && recent;
        }
        is_busy.then_some(is_recent)
    }

    /// Sends the next chunk that a device has filled, and has it fill more; says how many bytes were sent, if any.
    pub(crate) fn send_staged(&mut self, id: u64) -> Option<u64> {
        if self.links.get(&id)?.outgoing.staged.is_idle() {
            return None;
        }
        self.fill_ahead(id);
        let mut failed = Vec::new();
        let next = self.links.get_mut(&id).and_then(|link| link.outgoing.staged.next(&mut failed));
        self.uncopied_out(failed);
        let (chunk, link) = (next?, self.links.get_mut(&id)?);
        let ((key, peer), last) = (chunk.key, chunk.last);
        let header = key.header(chunk.number as u32);
        let bytes = chunk.contents();
        let depot = link.depot.as_mut().filter(|_| bytes.len() as u64 > PARCEL_BYTES_MIN);
        let parcel = depot.and_then(|depot| {
            let idle = depot.idle()?;
            depot.put(idle, bytes)
        });
        let length = bytes.len() as u64;
        let buffer = match parcel {
            Some(parcel) => Some(named(header, parcel).into()),
            None if bytes.len() + HEADER_BYTES <= self.access.chunk_bytes_max() => {
                let mut buffer = self.staging.buffer();
                (buffer.append(&header.encode()) && buffer.append(bytes)).then_some(buffer)
            }
            None => None,
        };
        let Some(buffer) = buffer else {
            // It was to be read by a peer whose staging has gone since, or is full: the device cuts it anew.
            link.outgoing.staged.put_back(chunk);
            link.outgoing.staged.shed();
            return None;
        };
        // The slot is free, whatever UCX and the peer do with the bytes.
        drop(chunk);
        if let Some(pieces) = last {
            self.source_ended(peer, key, pieces);
        }
        self.send_chunk(id, buffer);
        self.fill_ahead(id);
        Some(length)
    }

    /// Has a device fill slots for chunks that the link has a place for.
    fn fill_ahead(&mut self, id: u64) {
        let message = self.access.chunk_bytes_max() - HEADER_BYTES;
        let mut failed = Vec::new();
        while let Some(link) = self.links.get_mut(&id)
            && link.outgoing.may_send_chunk()
        {
            let idle = link.depot.as_ref().map_or(0, |depot| depot.idle_count());
            let read = link.outgoing.staged.ahead().filter(|bytes| *bytes as u64 > PARCEL_BYTES_MIN).count();
            let most = |left| if idle > read && left > PARCEL_BYTES_MIN { PARCEL_BYTES_MAX } else { message };
            if !link.outgoing.staged.refill(most, &mut failed) {
                break;
            }
        }
        self.uncopied_out(failed);
    }

    /// Ends transfers out of a device's memory that it failed to copy.
    fn uncopied_out(&mut self, failed: Vec<((Key, PeerId), String)>) {
        for ((key, peer), reason) in failed {
            let Some(session) = self.sessions.get_mut(&peer) else { continue };
            match key.flow {
                Flow::Pull => {
                    if session.reads.remove(&key.tag).is_some() {
                        let words = format!("the other side's device failed to copy: {reason}");
                        self.refuse(peer, key.tag, &Refusal::text(words));
                    }
                }
                Flow::Push => {
                    if let Some(id) = session.posts.get(&key.tag).copied() {
                        self.end_posted(id, uncopied(reason));
                    }
                }
            }
        }
    }

    /// Ends a transfer into a device's memory that it failed to copy.
    pub(crate) fn uncopied_in(&mut self, key: Key, reason: String) {
        let Some((Some(peer), _)) = self.numbers.get(&key.session).copied() else { return };
        let Some(session) = self.sessions.get(&peer) else { return };
        match key.flow {
            Flow::Pull => {
                if let Some(id) = session.posts.get(&key.tag).copied() {
                    self.end_posted(id, uncopied(reason));
                }
            }
            Flow::Push => {
                if let Some(id) = session.writes.get(&key.tag).copied() {
                    let words = format!("the other side's device failed to copy: {reason}");
                    self.end_expected(id, uncopied(reason), &words);
                }
            }
        }
    }

    /// Whether this peer's pool is not to be read though its transport reads memory: it is in a device's.
    pub(crate) fn is_unread(&self, remote: &Remote) -> bool {
        self.method.registers(self.access) && remote.lent.as_ref().is_some_and(|(keys, _)| !keys.are_readable())
    }

    /// Whether transfers over a link go by way of a stage, at this end or the other, as far as is known.
    pub(crate) fn is_staged(&self, id: u64) -> bool {
        let Some(link) = self.links.get(&id) else { return false };
        self.pools.values().any(|bound| bound.stage.is_some())
            || self.remotes.values().any(|remote| link.sessions.contains(&remote.peer) && self.is_unread(remote))
    }

    /// Tells how a pool was staged for a transfer that is over: after the first on a link, and once more when many bytes have come.
    pub(crate) fn show_staged(&mut self, posted: &Posted) {
        let (Some(stage), bytes) = (&posted.local.stage, posted.bytes()) else { return };
        let Some(link) = self.sessions.get(&posted.peer).map(|session| session.link) else { return };
        if !self.links.get_mut(&link).is_some_and(|link| link.shown.is_due(bytes)) {
            return;
        }
        if let Some(evidence) = self.evidence(link) {
            let evidence = Box::new(stage.shown(evidence, bytes, posted.took()));
            self.events.push(Event::Shown { peer: posted.peer, evidence });
        }
    }
}

fn uncopied(message: String) -> TransferError {
    TransferError::Io { context: "copying between the device and host memory", message }
}

#[cfg(test)]
mod tests;
