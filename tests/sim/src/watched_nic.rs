//! A NIC's transport with somebody looking over its shoulder.

use std::collections::BTreeMap;

use bytes::Bytes;
use kvferry_core::{Direction, PoolId, PoolLayout, TransferId, UnitRange};
use kvferry_transport::{
    BindError, ConnectError, Event, Expected, ImportError, NicInfo, PeerId, Pool, PoolKeys, PostError, RemotePool,
    Transfer, Transport, Wait,
};

use crate::chronicle::{Chronicle, What};
use crate::plant::Plant;
use crate::timeline::{Life, Timeline};

/// Notes what is posted and what becomes of it, and behaves as the plant says.
pub(crate) struct WatchedNic {
    inner: Box<dyn Transport>,
    life: Life,
    timeline: Timeline,
    chronicle: Chronicle,
    plant: Option<Plant>,
    /// Planted: what the whole of a halved transfer is.
    halved: BTreeMap<TransferId, u64>,
}

impl WatchedNic {
    pub(crate) fn new(
        inner: Box<dyn Transport>,
        life: Life,
        timeline: Timeline,
        chronicle: Chronicle,
        plant: Option<Plant>,
    ) -> Self {
        WatchedNic { inner, life, timeline, chronicle, plant, halved: BTreeMap::new() }
    }

    fn note(&self, what: What) {
        self.chronicle.put(self.timeline.now(), self.life, what);
    }
}

impl Transport for WatchedNic {
    fn info(&self) -> &NicInfo {
        self.inner.info()
    }

    fn address(&self) -> Bytes {
        self.inner.address()
    }

    fn bind(&mut self, pool: &Pool) -> Result<PoolKeys, BindError> {
        self.inner.bind(pool)
    }

    fn unbind(&mut self, pool: PoolId) {
        self.inner.unbind(pool);
    }

    fn connect(&mut self, address: &[u8]) -> Result<PeerId, ConnectError> {
        self.inner.connect(address)
    }

    fn import(&mut self, peer: PeerId, keys: &PoolKeys, layout: &PoolLayout) -> Result<RemotePool, ImportError> {
        self.inner.import(peer, keys, layout)
    }

    fn expect(&mut self, transfer: Expected) -> Result<(), PostError> {
        let (id, first) = (transfer.id, transfer.range.start);
        let bytes = transfer.program.bytes_in(transfer.range);
        self.inner.expect(transfer)?;
        self.note(What::Expected { id, bytes, first });
        Ok(())
    }

    fn post(&mut self, mut transfer: Transfer) -> Result<(), PostError> {
        let (id, direction, range) = (transfer.id, transfer.direction, transfer.range);
        let bytes = transfer.program.bytes_in(range);
        if self.plant == Some(Plant::HalfNic) && direction == Direction::Pull {
            let UnitRange { start, end } = transfer.range;
            transfer.range = UnitRange { start, end: start + (end - start).div_ceil(2) };
            self.halved.insert(id, bytes);
        }
        self.inner.post(transfer)?;
        self.note(What::Posted { id, direction, bytes, first: range.start });
        Ok(())
    }

    fn cancel(&mut self, id: TransferId) {
        self.inner.cancel(id);
    }

    fn fence(&mut self, peer: PeerId) {
        self.inner.fence(peer);
    }

    fn disconnect(&mut self, peer: PeerId) {
        self.inner.disconnect(peer);
    }

    fn poll(&mut self, events: &mut Vec<Event>) {
        let first = events.len();
        self.inner.poll(events);
        for event in events.iter_mut().skip(first) {
            match event {
                Event::Completed { id, bytes, .. } | Event::Arrived { id, bytes, .. } => {
                    if let Some(whole) = self.halved.remove(id) {
                        *bytes = whole;
                    }
                    self.note(What::Landed { id: *id, bytes: Some(*bytes) });
                }
                Event::Failed { id, .. } => self.note(What::Landed { id: *id, bytes: None }),
                _ => {}
            }
        }
    }

    fn arm(&mut self) -> Wait {
        self.inner.arm()
    }
}
