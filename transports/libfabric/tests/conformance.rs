//! The suite that every transport passes, over libfabric's tcp (native where the library has it), tcp;ofi_rxm and shm.

use kvferry_libfabric::LibfabricProvider;

/// Whether there is a libfabric. Without one the case says so and passes, unless `KVFERRY_REQUIRE` names libfabric.
fn usable() -> bool {
    let Some(reason) = LibfabricProvider::unavailable() else { return true };
    kvferry_transport::conformance::absent("libfabric", &reason);
    false
}

/// Whether shared memory works inside one process, which the suite runs in; `tests/processes.rs` has the other versions.
fn shares_with_itself() -> bool {
    usable() && LibfabricProvider::version() < Some((2, 0))
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
        if super::shares_with_itself() => kvferry_libfabric::LibfabricProvider::new().only("shm")
    );
}

/// Everything is packed by its source, and read in chunks.
mod tcp_packed {
    kvferry_transport::conformance!(
        if super::usable() =>
        kvferry_libfabric::LibfabricProvider::new().only("lo").packed(kvferry_transport::PackedBy::Read, u64::MAX)
    );
}

mod shm_packed {
    kvferry_transport::conformance!(
        if super::shares_with_itself() =>
        kvferry_libfabric::LibfabricProvider::new().only("shm").packed(kvferry_transport::PackedBy::Read, u64::MAX)
    );
}
