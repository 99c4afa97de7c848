//! The suite that every transport passes, over libfabric's tcp (native where the library has it), tcp;ofi_rxm and shm.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvferry_libfabric::LibfabricProvider;
use kvferry_transport::{Device, OpenError, Options, PackedBy, Provider, Transport, TransportKind};

/// Whether there is a libfabric. Without one the case says so and passes, unless `KVFERRY_REQUIRE` names libfabric.
fn usable() -> bool {
    let Some(reason) = LibfabricProvider::unavailable() else { return true };
    kvferry_transport::conformance::absent("libfabric", &reason);
    false
}

/// Whether shared memory works inside one process, which the suite runs in. Where it does not the case says so and passes, unless
/// `KVFERRY_REQUIRE` names libfabric-shm.
fn shares_with_itself() -> bool {
    if !usable() {
        return false;
    }
    let reason = unshared(LibfabricProvider::version());
    if let Some(reason) = &reason {
        kvferry_transport::conformance::absent("libfabric-shm", reason);
    }
    reason.is_none()
}

/// Why peers of one process do not meet in shared memory of that version.
fn unshared(version: Option<(u32, u32)>) -> Option<String> {
    let (major, minor) = version.filter(|version| *version >= (2, 0))?;
    Some(format!(
        "libfabric {major}.{minor} has no shared memory inside one process; it shows nothing over shm, 1.17 does"
    ))
}

#[test]
fn a_suite_that_does_not_run_over_shm_says_so() {
    assert_eq!(unshared(Some((1, 17))), None);
    assert!(unshared(Some((2, 5))).is_some_and(|reason| reason.contains("libfabric 2.5 has no shared memory")));
}

/// Cases over shared memory take turns: 1.17 ends a process that sends to an endpoint of its own that was closed, and the case that changes
/// addresses hits those of other cases.
struct InTurn {
    provider: LibfabricProvider,
}

/// Whether a case has its turn: a provider is shared with other threads, which a lock's guard is not.
static TURN: AtomicBool = AtomicBool::new(false);

impl InTurn {
    fn new(provider: LibfabricProvider) -> InTurn {
        while TURN.swap(true, Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(1));
        }
        InTurn { provider: provider.only("shm").within_process() }
    }
}

impl Drop for InTurn {
    fn drop(&mut self) {
        TURN.store(false, Ordering::Release);
    }
}

impl Provider for InTurn {
    fn kind(&self) -> TransportKind {
        self.provider.kind()
    }

    fn discover(&self) -> Vec<Device> {
        self.provider.discover()
    }

    fn named(&self, name: &str) -> Option<Device> {
        self.provider.named(name)
    }

    fn open(&self, device: &Device, options: &Options) -> Result<Box<dyn Transport>, OpenError> {
        self.provider.open(device, options)
    }
}

mod tcp {
    kvferry_transport::conformance!(if super::usable() => kvferry_libfabric::LibfabricProvider::new().only("lo"));
}

mod rxm {
    kvferry_transport::conformance!(
        if super::usable() => kvferry_libfabric::LibfabricProvider::new().only("tcp;ofi_rxm/lo")
    );
}

mod shm {
    kvferry_transport::conformance!(
        if super::shares_with_itself() => super::InTurn::new(kvferry_libfabric::LibfabricProvider::new())
    );
}

/// Everything is packed by its source, and read in chunks.
mod tcp_packed {
    kvferry_transport::conformance!(
        if super::usable() =>
        kvferry_libfabric::LibfabricProvider::new().only("lo").packed(super::PackedBy::Read, u64::MAX)
    );
}

mod shm_packed {
    kvferry_transport::conformance!(
        if super::shares_with_itself() =>
        super::InTurn::new(kvferry_libfabric::LibfabricProvider::new().packed(super::PackedBy::Read, u64::MAX))
    );
}
