//! The suite over TCP and UCX with pools in GPU memory, staged through page-locked host memory: `cargo test -p kvferry-cuda -- --ignored`.

use kvferry_core::{PoolId, PoolLayout, TransportKind};
use kvferry_cuda::{Allocate, allocate};
use kvferry_tcp::TcpProvider;
use kvferry_transport::conformance::{destination_pools, every_pool, source_pools};
use kvferry_transport::{Device, OpenError, Options, PackedBy, Pool, PoolError, Provider, Transport};
use kvferry_ucx::UcxProvider;

/// A transport between pools on the first GPU, in chunks so small that most transfers take several.
struct Staged<P> {
    provider: P,
    which: fn(PoolId) -> bool,
}

impl<P> Staged<P> {
    fn new(provider: P, which: fn(PoolId) -> bool) -> Staged<P> {
        Staged { provider, which }
    }
}

impl<P: Provider> Provider for Staged<P> {
    fn kind(&self) -> TransportKind {
        self.provider.kind()
    }

    fn discover(&self) -> Vec<Device> {
        self.provider.discover()
    }

    fn allocate(&self, device: &Device, id: PoolId, layout: PoolLayout, name: &str) -> Result<Pool, PoolError> {
        if (self.which)(id) {
            return allocate(0, id, layout, Allocate::Best);
        }
        self.provider.allocate(device, id, layout, name)
    }

    fn open(&self, device: &Device, options: &Options) -> Result<Box<dyn Transport>, OpenError> {
        let staged = Options { staged_chunk_bytes: 64 << 10, staged_chunks: 8, ..options.clone() };
        self.provider.open(device, &staged)
    }
}

/// Chunks come as messages over TCP's lanes, or are read through shared memory.
fn ucx(by: PackedBy) -> UcxProvider {
    let device = if by == PackedBy::Read { "memory" } else { "lo" };
    UcxProvider::new().only(device).packed(by, u64::MAX)
}

mod both {
    use super::*;
    kvferry_transport::conformance!(Staged::new(TcpProvider::new(), every_pool); #[ignore = "needs a GPU"]);
}

mod source {
    use super::*;
    kvferry_transport::conformance!(Staged::new(TcpProvider::new(), source_pools); #[ignore = "needs a GPU"]);
}

mod destination {
    use super::*;
    kvferry_transport::conformance!(Staged::new(TcpProvider::new(), destination_pools); #[ignore = "needs a GPU"]);
}

mod ucx_message {
    use super::*;
    kvferry_transport::conformance!(Staged::new(ucx(PackedBy::Message), every_pool); #[ignore = "needs a GPU and UCX"]);
}

mod ucx_read {
    use super::*;
    kvferry_transport::conformance!(Staged::new(ucx(PackedBy::Read), every_pool); #[ignore = "needs a GPU and UCX"]);
}

mod ucx_source {
    use super::*;
    kvferry_transport::conformance!(Staged::new(ucx(PackedBy::Read), source_pools); #[ignore = "needs a GPU and UCX"]);
}

mod ucx_destination {
    use super::*;
    kvferry_transport::conformance!(Staged::new(ucx(PackedBy::Read), destination_pools); #[ignore = "needs a GPU and UCX"]);
}
