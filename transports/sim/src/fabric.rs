//! The handle that everybody in one world shares.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::address::decode_address;
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

/// What a fabric is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FabricOptions {
    /// Of every NIC, in each direction.
    pub bytes_per_second: u64,
    /// One way.
    pub latency: Duration,
    /// Bytes that travel as one: transfers that share a NIC take turns after so many.
    pub slice_bytes: u64,
    /// Keys of NICs and pools follow from it.
    pub seed: u64,
    /// Who lets time pass.
    pub pacing: Pacing,
}

impl Default for FabricOptions {
    fn default() -> Self {
        FabricOptions {
            bytes_per_second: 25_000_000_000,
            latency: Duration::from_micros(3),
            slice_bytes: 256 << 10,
            seed: 0,
            pacing: Pacing::Driven,
        }
    }
}

/// A cheap handle to one fabric.
#[derive(Clone)]
pub struct Fabric {
    state: Arc<Mutex<State>>,
}

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

    /// The NIC that has an address, if it is up.
    pub fn nic_at(&self, address: &[u8]) -> Option<NicId> {
        let (nic, key) = decode_address(address).ok()?;
        self.state().nics.get(&nic).is_some_and(|state| state.key == key).then_some(nic)
    }

    /// A hash of everything that has happened, in order, and how much that was.
    pub fn digest(&self) -> (u64, u64) {
        self.state().digest()
    }

    /// Transfers that are under way.
    pub fn in_flight(&self) -> usize {
        self.state().flows.len()
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere is that node's end, not the fabric's.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
