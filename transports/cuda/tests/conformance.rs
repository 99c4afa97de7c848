//! The suite that every transport has to pass, on the first GPU: `cargo test -p kvferry-cuda -- --ignored`.

use kvferry_cuda::{Allocate, CudaProvider};

/// Physical memory behind descriptors, where the machine has it.
mod best {
    kvferry_transport::conformance!(
        super::CudaProvider::default().by_turns(); #[ignore = "needs a GPU"]
    );
}

/// Plain memory.
mod plain {
    use super::Allocate;

    kvferry_transport::conformance!(
        super::CudaProvider::default().with_memory(Allocate::Plain).by_turns(); #[ignore = "needs a GPU"]
    );
}
