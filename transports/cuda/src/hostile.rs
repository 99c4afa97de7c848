//! Peers whose word about their memory is false, on a GPU: refused before any kernel is told, and nothing else is harmed.
//! `cargo test -p kvferry-cuda --lib -- --ignored`.

use std::fs::File;
use std::os::fd::OwnedFd;

use bytes::Bytes;
use kvferry_core::{Plane, PoolId, PoolLayout};
use kvferry_local::wire::MemoryKind;
use kvferry_transport::Pool;

use crate::allocation::Allocate;
use crate::blocks::{check_blocks, fill_blocks};
use crate::gpu::Gpu;
use crate::memory::{GpuMemory, allocate};
use crate::shared::{Described, How, Part, process, reach, share};

const BYTES: u64 = 4 << 20;

fn layout(bytes: u64) -> PoolLayout {
    let plane = Plane { region: 0, offset: 0, blocks: 4, block_stride: bytes / 4, block_bytes: bytes / 4 };
    PoolLayout { regions: vec![bytes], planes: vec![plane] }
}

fn pool(how: Allocate) -> Pool {
    allocate(0, PoolId(0), layout(BYTES), how).unwrap()
}

/// Says something of one region, from a process called `process`.
fn words(process: Option<[u8; 16]>, number: u64, parts: Vec<Part>) -> MemoryKind {
    let described = Described { process, number, gpu: "gpu9".to_owned(), uuid: [0; 16], regions: vec![parts] };
    MemoryKind::Opaque(Bytes::from(postcard::to_allocvec(&described).unwrap()))
}

fn refused(memory: MemoryKind, descriptors: Vec<OwnedFd>, bytes: u64) -> String {
    let gpu = Gpu::open(0).unwrap();
    match reach(&gpu, &layout(bytes), &memory, descriptors, false) {
        Ok(_) => panic!("it was believed"),
        Err(reason) => reason,
    }
}

fn part(bytes: u64, how: How) -> Vec<Part> {
    vec![Part { bytes, how }]
}

/// Kernels still work, and a pool that was named keeps its bytes.
fn is_well(pool: &Pool) {
    let labels = [3, 1, 4, 2];
    fill_blocks(pool, &labels, 0).unwrap();
    assert_eq!(check_blocks(pool, &labels).unwrap(), None);
}

#[test]
#[ignore = "needs a GPU"]
fn memory_of_this_process_is_what_its_owner_knows() {
    let pool = pool(Allocate::Best);
    let number = GpuMemory::of(&pool).unwrap().number;
    let named = |bytes| (words(process(), number, part(bytes, How::Descriptor { offset: 0 })), bytes);
    let (memory, bytes) = named(64 * BYTES);
    assert!(refused(memory, Vec::new(), bytes).contains("regions of"));
    // No more than is there is fine, whatever is said besides.
    let gpu = Gpu::open(0).unwrap();
    assert!(reach(&gpu, &layout(BYTES / 2), &named(64 * BYTES).0, Vec::new(), false).is_ok());
    is_well(&pool);
}

#[test]
#[ignore = "needs a GPU"]
fn a_descriptor_stands_for_no_more_than_it_has() {
    let pool = pool(Allocate::Descriptor);
    let descriptor = || {
        let shared = share(&pool, false).unwrap();
        let fd = shared.descriptors.first().and_then(|d| d.fd()).unwrap();
        fd.try_clone_to_owned().unwrap()
    };
    let said = |bytes, offset| words(None, 0, part(bytes, How::Descriptor { offset }));
    // The truth first: the refusals below are for the lies.
    let gpu = Gpu::open(0).unwrap();
    assert!(reach(&gpu, &layout(BYTES), &said(BYTES, 0), vec![descriptor()], false).is_ok());
    refused(said(16 * BYTES, 0), vec![descriptor()], 16 * BYTES);
    refused(said(BYTES, 4096), vec![descriptor()], BYTES);
    refused(said(u64::MAX, u64::MAX - BYTES), vec![descriptor()], BYTES);
    refused(said(!(BYTES - 1), 0), vec![descriptor()], BYTES);
    refused(said(BYTES, 0), Vec::new(), BYTES);
    refused(said(BYTES, 0), vec![descriptor(), descriptor()], BYTES);
    refused(words(None, 0, Vec::new()), vec![], BYTES);
    is_well(&pool);
}

#[test]
#[ignore = "needs a GPU"]
fn a_descriptor_may_be_anything() {
    let pool = pool(Allocate::Best);
    for path in ["/dev/null", "/proc/self/exe", "/dev/nvidiactl", "/dev/nvidia0"] {
        let Ok(file) = File::open(path) else { continue };
        let memory = words(None, 0, part(BYTES, How::Descriptor { offset: 0 }));
        refused(memory, vec![file.into()], BYTES);
    }
    is_well(&pool);
}

#[test]
#[ignore = "needs a GPU"]
fn a_handle_may_be_anything() {
    let pool = pool(Allocate::Plain);
    for handle in [vec![0; 64], vec![0xff; 64], (0..64).collect(), vec![7; 63]] {
        refused(words(None, 0, part(BYTES, How::Ipc { handle: handle.clone(), offset: 0 })), Vec::new(), BYTES);
        refused(words(None, 0, part(BYTES, How::Fabric { handle, offset: 0 })), Vec::new(), BYTES);
    }
    is_well(&pool);
}
