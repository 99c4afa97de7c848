//! The shadow, as its users see it.

use std::ops::Range;

use kvferry_core::{Epoch, HandoverId, RequestId};
use kvferry_transport::Pool;

use crate::fabric::{Fabric, NicId};
use crate::flow::FlowId;
use crate::shadow::{Owner, Shadow, Violation};
use crate::state::State;

/// A shadow of pool memory. Whoever stands between a node and its engine says whose blocks are; the fabric compares that with what it
/// reads and writes.
///
/// Content is told by request: all that is read from an [`Owner::Offer`]'s blocks is that request's.
impl Fabric {
    /// Begins to watch. Call it before NICs bind pools; it costs nothing where it is not called.
    pub fn watch(&self) {
        self.state().shadow.get_or_insert_with(Shadow::default);
    }

    /// A pool in an incarnation of its node, with the planes of each of its layer groups. All of its blocks are nobody's.
    pub fn incarnate(&self, pool: &Pool, epoch: Epoch, groups: &[Range<u32>]) {
        if let Some(shadow) = &mut self.state().shadow {
            shadow.incarnate(pool, epoch, groups);
        }
    }

    /// Blocks of a plane's layer group change hands. Blocks that are claimed twice, or that become [`Owner::Nobody`] while a transfer of
    /// their handover may still write this pool, are violations.
    pub fn claim(&self, pool: &Pool, plane: u32, blocks: &[u32], owner: Owner) {
        let mut state = self.state();
        let Some(mut shadow) = state.shadow.take() else { return };
        let now = state.now;
        let nics = shadow.nics(pool).to_vec();
        shadow.claim(now, pool, plane, blocks, owner, |handover| {
            nics.iter().any(|nic| state.may_write(*nic, pool, handover))
        });
        state.shadow = Some(shadow);
    }

    /// The engine is told that these blocks hold that request's KV, brought by that handover: if the fabric has not seen all of it, and
    /// nothing else, come from blocks that were offered at that time, it is a violation.
    pub fn delivered(&self, pool: &Pool, plane: u32, blocks: &[u32], handover: HandoverId, request: RequestId) {
        let mut state = self.state();
        let now = state.now;
        if let Some(shadow) = &mut state.shadow {
            shadow.delivered(now, pool, plane, blocks, handover, request);
        }
    }

    /// Whether a transfer of that handover may still write that pool: it is expected or pulled into it, and not over. False when nobody
    /// watches.
    pub fn may_write(&self, pool: &Pool, handover: HandoverId) -> bool {
        let state = self.state();
        let nics = state.shadow.as_ref().map(|shadow| shadow.nics(pool)).unwrap_or_default();
        nics.iter().any(|nic| state.may_write(*nic, pool, handover))
    }

    /// Whether anything was found since [`Fabric::take_violations`] was last asked.
    pub fn has_violations(&self) -> bool {
        self.state().shadow.as_ref().is_some_and(|shadow| !shadow.violations.is_empty())
    }

    /// What was found since this was last asked.
    pub fn take_violations(&self) -> Vec<Violation> {
        self.state().shadow.as_mut().map(|shadow| std::mem::take(&mut shadow.violations)).unwrap_or_default()
    }
}

impl State {
    fn may_write(&self, nic: NicId, pool: &Pool, handover: HandoverId) -> bool {
        let Some(state) = self.nic(nic) else { return false };
        let writes =
            |id: FlowId| self.flows.get(id.0).is_some_and(|flow| !flow.is_push() && flow.transfer.local == pool.id());
        state.expected_of(handover).any(|met| met.expected.pool == pool.id()) || state.posted_of(handover).any(writes)
    }
}
