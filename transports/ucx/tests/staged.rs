//! The suite once more with pools that only a device touches, at both ends or at one: over tcp's lanes and memory's, as messages and read.

use kvferry_core::PoolId;
use kvferry_transport::PackedBy;
use kvferry_transport::conformance::{OnDevice, destination_pools, every_pool, source_pools};
use kvferry_ucx::UcxProvider;

/// Whether there is a UCX library. Without one the case says so and passes, unless `KVFERRY_REQUIRE` names ucx.
fn usable() -> bool {
    let Some(reason) = UcxProvider::unavailable() else { return true };
    kvferry_transport::conformance::absent("ucx", &reason);
    false
}

fn over(device: &str, by: PackedBy) -> UcxProvider {
    UcxProvider::new().only(device).packed(by, u64::MAX)
}

/// By slots so small that most transfers take several.
fn small(provider: UcxProvider, which: fn(PoolId) -> bool) -> OnDevice<UcxProvider> {
    OnDevice::new(provider, which, 64 << 10, 8)
}

/// One slot for each direction, of a page.
fn tiny(provider: UcxProvider) -> OnDevice<UcxProvider> {
    OnDevice::new(provider, every_pool, 4096, 2)
}

mod tcp_both {
    use super::*;
    kvferry_transport::conformance!(if usable() => small(over("lo", PackedBy::Message), every_pool));
}

mod tcp_source {
    use super::*;
    kvferry_transport::conformance!(if usable() => small(over("lo", PackedBy::Message), source_pools));
}

mod tcp_destination {
    use super::*;
    kvferry_transport::conformance!(if usable() => small(over("lo", PackedBy::Message), destination_pools));
}

mod tcp_two_sided {
    use super::*;
    kvferry_transport::conformance!(if usable() => small(over("lo", PackedBy::Message).two_sided(), every_pool));
}

/// Messages of memory go over tcp, too.
mod memory_message {
    use super::*;
    kvferry_transport::conformance!(if usable() => small(over("memory", PackedBy::Message), every_pool));
}

mod memory_read_both {
    use super::*;
    kvferry_transport::conformance!(if usable() => small(over("memory", PackedBy::Read), every_pool));
}

mod memory_read_source {
    use super::*;
    kvferry_transport::conformance!(if usable() => small(over("memory", PackedBy::Read), source_pools));
}

mod memory_read_destination {
    use super::*;
    kvferry_transport::conformance!(if usable() => small(over("memory", PackedBy::Read), destination_pools));
}

mod tiny_message {
    use super::*;
    kvferry_transport::conformance!(if usable() => tiny(over("lo", PackedBy::Message)));
}

mod tiny_read {
    use super::*;
    kvferry_transport::conformance!(if usable() => tiny(over("memory", PackedBy::Read)));
}
