//! The suite that every transport passes, over UCX's shared memory and over its tcp, one-sided and two-sided.

/// Whether there is a UCX library. Without one the case says so and passes, unless `KVFERRY_REQUIRE` names ucx.
fn usable() -> bool {
    let Some(reason) = kvferry_ucx::UcxProvider::unavailable() else { return true };
    kvferry_transport::conformance::absent("ucx", &reason);
    false
}

mod memory {
    kvferry_transport::conformance!(if super::usable() => kvferry_ucx::UcxProvider::new().only("memory"));
}

mod tcp {
    kvferry_transport::conformance!(if super::usable() => kvferry_ucx::UcxProvider::new().only("lo"));
}

mod memory_two_sided {
    kvferry_transport::conformance!(if super::usable() => kvferry_ucx::UcxProvider::new().only("memory").two_sided());
}

mod tcp_two_sided {
    kvferry_transport::conformance!(if super::usable() => kvferry_ucx::UcxProvider::new().only("lo").two_sided());
}

/// Everything is packed, and read out of its source's staging: as over a device that cuts messages up.
mod memory_packed_read {
    kvferry_transport::conformance!(
        if super::usable() =>
        kvferry_ucx::UcxProvider::new().only("memory").packed(kvferry_transport::PackedBy::Read, u64::MAX)
    );
}
