//! The suite that every transport has to pass, within a host, on a GPU that is the processor.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code")]

mod support;

use kvferry_cuda::{Allocate, CudaProvider};
use support::is_ready;

mod best {
    kvferry_transport::conformance!(if super::is_ready() => super::CudaProvider::default().by_turns());
}

mod descriptor {
    use super::Allocate;

    kvferry_transport::conformance!(
        if super::is_ready() => super::CudaProvider::default().with_memory(Allocate::Descriptor).by_turns()
    );
}
