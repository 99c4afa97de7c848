//! Pools in a device's memory: who waits for the device, and what is told only once it no longer touches a pool.

use std::time::Duration;

use kvferry_core::FenceProof;
use kvferry_transport::{Event, PeerId, Stage, TransferError};

use crate::frame::Refusal;
use crate::stream::{Flow, Key, Stream};
use crate::transport::TcpTransport;

impl TcpTransport {
    /// Reports an event that says that memory is no longer touched: once everything that these stages have under way has ended, and in order.
    pub(crate) fn report(&mut self, stages: &[Stage], event: Event) {
        self.deferred.report(stages, event, &mut self.events);
    }

    /// Tells of a fence: no copy that is under way for anybody touches a pool any more.
    pub(crate) fn report_fence(&mut self, peer: PeerId) {
        let bound = self.pools.values().filter_map(|bound| bound.stage.clone());
        let stages: Vec<Stage> = bound.collect();
        // Only this thread and the devices that it starts write this transport's pools, and it has forgotten everything of that peer. What
        // earlier events still wait for is waited for, too: they come first.
        self.report(&stages, Event::Fenced { peer, proof: FenceProof::OwnerCopies });
    }

    /// Looks what the devices have done, and gives turns to the streams that waited for it.
    pub(crate) fn attend(&mut self) {
        for bound in self.pools.values() {
            if let Some(stage) = &bound.stage {
                stage.poll();
            }
        }
        self.deferred.settle(&mut self.events);
        if self.is_starved() {
            let streams = self.connections.values_mut().flat_map(|connection| &mut connection.streams);
            streams.for_each(Stream::relieve);
        }
        self.wake();
    }

    /// Whether a stream could send and has no slot.
    fn is_starved(&self) -> bool {
        let starved = |(peer, index): &(PeerId, usize)| {
            let stream = self.connections.get(peer).and_then(|connection| connection.streams.get(*index));
            stream.is_some_and(Stream::is_starved)
        };
        self.staging.iter().any(starved)
    }

    /// Gives turns to streams that can go on where they waited for a device or a slot.
    pub(crate) fn wake(&mut self) {
        for (peer, index) in std::mem::take(&mut self.staging) {
            self.schedule(peer, index);
        }
    }

    /// Whether a device is at work, an event waits for it or a stream for a slot, and whether to look for its end all the time.
    pub(crate) fn waits_for_device(&self) -> Option<bool> {
        let bound = self.pools.values().filter_map(|bound| bound.stage.as_ref());
        let (mut is_busy, mut is_recent) = (!self.deferred.is_empty() || self.is_starved(), false);
        for stage in bound.chain(self.deferred.stages()) {
            let (busy, recent) = stage.is_busy();
            is_busy |= busy;
            is_recent |= busy && recent;
        }
        is_busy.then_some(is_recent)
    }

    /// Ends a transfer whose bytes the device failed to copy.
    pub(crate) fn broken(&mut self, peer: PeerId, (flow, tag): Key, is_outgoing: bool, reason: String) {
        let Some(connection) = self.connections.get_mut(&peer) else {
            return;
        };
        let error =
            TransferError::Io { context: "copying between the device and host memory", message: reason.clone() };
        let words = format!("the other side's device failed to copy: {reason}");
        match (flow, is_outgoing) {
            (Flow::Pull, true) => {
                if let Some(serving) = connection.reads.remove(&tag) {
                    connection.drop_transfer((flow, tag), true);
                    self.refuse(peer, serving.base, tag, &Refusal::text(words));
                }
            }
            (Flow::Push, true) | (Flow::Pull, false) => {
                if let Some(id) = connection.posts.get(&tag).copied() {
                    self.end_posted(id, error);
                }
            }
            (Flow::Push, false) => {
                if let Some(id) = connection.writes.get(&tag).copied() {
                    self.end_expected(id, error, &words);
                }
            }
        }
    }

    /// Tells how a pool was staged for a transfer that is over: after the first on a connection, and once more when many bytes have come.
    pub(crate) fn show_staged(&mut self, peer: PeerId, stage: &Stage, bytes: u64, took: Duration) {
        let Some(connection) = self.connections.get_mut(&peer) else {
            return;
        };
        if !connection.told.is_due(bytes) {
            return;
        }
        let evidence = stage.shown(connection.evidence(), bytes, took);
        self.events.push(Event::Shown { peer, evidence: Box::new(evidence) });
    }
}
