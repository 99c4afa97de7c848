//! The suite that every transport has to pass, within a host, on a GPU that is the processor.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code")]

mod support;

use kvferry_core::PoolId;
use kvferry_cuda::{Allocate, CudaProvider, allocate};
use kvferry_transport::Writer;
use kvferry_transport::conformance::block_planes;
use support::{asked, is_ready};

mod best {
    kvferry_transport::conformance!(if super::is_ready() => super::CudaProvider::default().by_turns());
}

mod descriptor {
    use super::Allocate;

    kvferry_transport::conformance!(
        if super::is_ready() => super::CudaProvider::default().with_memory(Allocate::Descriptor).by_turns()
    );
}

/// What a NIC's library is told of a pool, and what its writes take to be seen.
#[test]
fn memory_says_how_nics_reach_it() {
    if !is_ready() {
        return;
    }
    let layout = block_planes(1, 4, 4096);
    let pool = allocate(0, PoolId(1), layout.clone(), Allocate::Best).unwrap();
    let (memory, region) = (pool.device().unwrap(), pool.device_regions()[0]);
    assert_eq!(memory.cuda_device(), Ok(0));
    let dmabuf = memory.dmabuf(region).unwrap();
    assert!(dmabuf.base % 4096 == 0 && dmabuf.base + dmabuf.offset == region.address);
    assert!(rustix::fs::fstat(&dmabuf.fd).unwrap().st_size as u64 >= dmabuf.offset + region.bytes);
    for writer in [Writer::Nic, Writer::Driver] {
        memory.settles(writer).unwrap();
        memory.settle(writer).unwrap();
    }
    // Nobody asks the driver again for what was found out when a NIC bound the pool; other tests may ask meanwhile.
    let is_quiet = (0..1000).any(|_| {
        let before = asked();
        memory.settle(Writer::Nic).unwrap();
        asked() == before
    });
    assert!(is_quiet, "every transfer asks the driver");
    let plain = allocate(0, PoolId(2), layout, Allocate::Plain).unwrap();
    let refused = plain.device().unwrap().dmabuf(plain.device_regions()[0]).unwrap_err();
    assert!(refused.contains("cuMemGetHandleForAddressRange"), "{refused}");
}
