//! The handle that everybody in one world shares.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvferry_core::{Direction, HandoverId, TransferId};

use crate::address::decode_address;
use crate::nic::{Health, NicStats};
use crate::state::State;

/// One NIC of a fabric, in the order of opening.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NicId(pub(crate) u32);

/// How a fabric's time passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pacing {
    /// Only by [`Fabric::advance`]: a simulator's kernel drives it.
    Driven,
    /// Every poll of a NIC lets this much time pass: for use without a kernel.
    Stepped(Duration),
}

/// In which order the slices of one transfer land.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// In the order in which they left, as over a reliable connection.
    Ordered,
    /// In any order that [`FabricOptions::jitter`] makes, as over AWS's SRD.
    Unordered,
}

/// What a fence does to the peer that it shuts out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FenceBy {
    /// It tears down all connections with that peer.
    Endpoint,
    /// It registers the NIC's own pools anew. Connections stand, their keys do not: **every** peer is refused, and gets new ones when it
    /// connects again.
    Rekeying,
}

/// How a NIC dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NicDeath {
    /// With errors, at both ends of everything that is under way.
    Error,
    /// Without a word: nothing completes, nothing arrives, and posts are taken up to the queue's depth.
    BlackHole,
}

/// What becomes of slices that have left the NIC of a process that dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnTheWire {
    /// They land: late writes, unless they are fenced off.
    Lands,
    /// They are lost.
    Lost,
}

/// What a fabric is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FabricOptions {
    /// Of every NIC, in each direction.
    pub bytes_per_second: u64,
    /// One way.
    pub latency: Duration,
    /// Added to the way of every slice, at most.
    pub jitter: Duration,
    /// In which order slices land.
    pub delivery: Delivery,
    /// Bytes that travel as one: transfers that share a NIC take turns after so many.
    pub slice_bytes: u64,
    /// Slices of one transfer that may be on their way at once; at least 1.
    pub window: u32,
    /// Transfers that a NIC takes at once, where its own options do not allow fewer.
    pub depth: usize,
    /// For how long hardware tries again what does not get through, before it takes the peer for lost.
    pub retry_for: Duration,
    /// How peers are fenced off.
    pub fence_by: FenceBy,
    /// Whether bytes are copied at all. Without it only times are true, and pools may be sparse and huge.
    pub move_bytes: bool,
    /// Keys, jitter and errors follow from it.
    pub seed: u64,
    /// Who lets time pass.
    pub pacing: Pacing,
}

impl Default for FabricOptions {
    fn default() -> Self {
        FabricOptions {
            bytes_per_second: 25_000_000_000,
            latency: Duration::from_micros(3),
            jitter: Duration::ZERO,
            delivery: Delivery::Ordered,
            slice_bytes: 256 << 10,
            window: 4,
            depth: usize::MAX,
            retry_for: Duration::from_millis(50),
            fence_by: FenceBy::Endpoint,
            move_bytes: true,
            seed: 0,
            pacing: Pacing::Driven,
        }
    }
}

/// When a transfer did what, in nanoseconds of the fabric's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Which transfer.
    pub id: TransferId,
    /// Whether it read or wrote.
    pub direction: Direction,
    /// The NIC that posted it, and the one that it named.
    pub nics: [NicId; 2],
    /// Bytes that moved.
    pub bytes: u64,
    /// It was posted.
    pub posted_at: u64,
    /// Its first slice left: it had been told to the other end, and the wire was free.
    pub left_at: u64,
    /// Its last slice was in place.
    pub landed_at: u64,
    /// The NIC that posted it knew.
    pub ended_at: u64,
}

/// A cheap handle to one fabric.
#[derive(Clone)]
pub struct Fabric {
    state: Arc<Mutex<State>>,
}

/// Time, and what is under way.
impl Fabric {
    /// A fabric without NICs, at nanosecond 0.
    pub fn new(options: FabricOptions) -> Self {
        Fabric { state: Arc::new(Mutex::new(State::new(options))) }
    }

    /// When the next thing happens, in nanoseconds of the driver's time.
    pub fn next_event_at(&self) -> Option<u64> {
        self.state().next_at()
    }

    /// Lets everything happen that is due at `now` nanoseconds or before. Time never goes back: an earlier `now` changes nothing.
    pub fn advance(&self, now: u64) {
        self.state().advance(now);
    }

    /// The NICs that have something to report since this was last asked, ascending: they want to be polled.
    pub fn take_ready(&self) -> Vec<NicId> {
        self.state().take_ready()
    }

    /// The NIC that has an address, unless it was let go.
    pub fn nic_at(&self, address: &[u8]) -> Option<NicId> {
        let (nic, key) = decode_address(address).ok()?;
        self.state().nic(nic).is_some_and(|state| state.key == key && state.health != Health::Gone).then_some(nic)
    }

    /// A hash of everything that has happened, in order, and how much that was.
    pub fn digest(&self) -> (u64, u64) {
        self.state().digest()
    }

    /// Transfers that are not over at both ends.
    pub fn in_flight(&self) -> usize {
        self.state().flows.len()
    }

    /// Transfers of a handover that are not over at both ends, of those posted since [`Fabric::watch`]. 0 when nobody watches.
    pub fn in_flight_to(&self, handover: HandoverId) -> usize {
        self.state().shadow.as_ref().map_or(0, |shadow| shadow.in_flight_to(handover))
    }

    /// What a NIC has done so far, and the bytes that are on their way from and to it.
    pub fn stats(&self, nic: NicId) -> NicStats {
        self.state().nic(nic).map(|state| state.stats).unwrap_or_default()
    }

    /// Begins to note when transfers that complete did what.
    pub fn time_transfers(&self) {
        self.state().timings.get_or_insert_with(Vec::new);
    }

    /// The transfers that have completed since this was last asked, in that order; none before [`Fabric::time_transfers`].
    pub fn take_timings(&self) -> Vec<Timing> {
        self.state().timings.as_mut().map(std::mem::take).unwrap_or_default()
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere is that node's end, not the fabric's.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Faults. All of them take effect at once, at the fabric's present time.
impl Fabric {
    /// Kills a NIC; one that is not up stays as it is.
    pub fn kill(&self, nic: NicId, death: NicDeath) {
        self.state().kill_nic(nic, death);
    }

    /// Brings a killed NIC back, under the same address and keys. What a black hole had under way ends in errors, and its peers lose it, so
    /// that everybody connects anew.
    pub fn revive(&self, nic: NicId) {
        self.state().revive_nic(nic);
    }

    /// Makes every byte of a NIC take `factor` times as long as the fabric's bandwidth says; 1 (and 0) is as it was.
    pub fn slow(&self, nic: NicId, factor: u32) {
        if let Some(state) = self.state().nic_mut(nic) {
            state.slowness = factor.max(1);
        }
    }

    /// Of a million transfers that begin from now on, how many end in a completion error, after some or all of their bytes have landed.
    pub fn fail_completions(&self, per_million: u32) {
        self.state().errors_ppm = per_million;
    }

    /// Cuts the way from one NIC to another, or mends it. What travels meanwhile is tried again for [`FabricOptions::retry_for`]; then the
    /// side that waits for an answer loses the peer. Only the side that has connected can know.
    pub fn cut(&self, from: NicId, to: NicId, on: bool) {
        let mut state = self.state();
        if on {
            state.cuts.insert((from, to))
        } else {
            state.cuts.remove(&(from, to))
        };
    }

    /// The process of a NIC has died, and that is known: call it for each of its NICs *before* its transports are dropped. Peers lose it
    /// sooner or later, within [`FabricOptions::retry_for`]; fencing it is proved by the process's death.
    pub fn process_died(&self, nic: NicId, on_the_wire: OnTheWire) {
        self.state().process_died(nic, on_the_wire);
    }
}
