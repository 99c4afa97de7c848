//! What tests of real peers share.

use std::sync::{Mutex, MutexGuard, PoisonError};

use kvferry_libfabric::LibfabricProvider;
use kvferry_transport::conformance::absent;

/// The library's tcp, and tcp below its layer for datagrams.
pub(crate) const DEVICES: [&str; 2] = ["lo", "tcp;ofi_rxm/lo"];

/// Tests of a program take turns: some count what the process holds, others move much.
static TURN: Mutex<()> = Mutex::new(());

/// This test's turn; none without a library, unless `KVFERRY_REQUIRE` names libfabric.
pub(crate) fn turn() -> Option<MutexGuard<'static, ()>> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(reason) = LibfabricProvider::unavailable() else { return Some(turn) };
    absent("libfabric", &reason);
    None
}
