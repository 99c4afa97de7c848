//! The suite over TCP with pools in GPU memory, staged through page-locked host memory: `cargo test -p kvferry-cuda -- --ignored`.

use kvferry_core::{PoolId, PoolLayout, TransportKind};
use kvferry_cuda::{Allocate, allocate};
use kvferry_tcp::TcpProvider;
use kvferry_transport::{Device, OpenError, Options, Pool, PoolError, Provider, Transport};

/// TCP between pools on the first GPU, in chunks so small that most transfers take several.
struct Staged {
    tcp: TcpProvider,
    which: fn(PoolId) -> bool,
}

impl Staged {
    fn new(which: fn(PoolId) -> bool) -> Staged {
        Staged { tcp: TcpProvider::new(), which }
    }
}

impl Provider for Staged {
    fn kind(&self) -> TransportKind {
        self.tcp.kind()
    }

    fn discover(&self) -> Vec<Device> {
        self.tcp.discover()
    }

    fn allocate(&self, device: &Device, id: PoolId, layout: PoolLayout, name: &str) -> Result<Pool, PoolError> {
        if (self.which)(id) {
            return allocate(0, id, layout, Allocate::Best);
        }
        self.tcp.allocate(device, id, layout, name)
    }

    fn open(&self, device: &Device, options: &Options) -> Result<Box<dyn Transport>, OpenError> {
        let staged = Options { staged_chunk_bytes: 64 << 10, staged_chunks: 8, ..options.clone() };
        self.tcp.open(device, &staged)
    }
}

mod both {
    kvferry_transport::conformance!(super::Staged::new(|_| true); #[ignore = "needs a GPU"]);
}

// The suite's sources have odd numbers, its destinations even ones.
mod source {
    kvferry_transport::conformance!(super::Staged::new(|pool| !pool.0.is_multiple_of(2)); #[ignore = "needs a GPU"]);
}

mod destination {
    kvferry_transport::conformance!(super::Staged::new(|pool| pool.0.is_multiple_of(2)); #[ignore = "needs a GPU"]);
}
