//! Sizes that are easily got wrong, on one GPU: `cargo test -p kvferry-cuda -- --ignored`.
#![allow(clippy::unwrap_used, reason = "this is test code")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::{Direction, Plane, PoolId, PoolLayout, TransferId};
use kvferry_cuda::{CudaProvider, check_blocks, fill_blocks};
use kvferry_transport::conformance::whole_blocks;
use kvferry_transport::{Device, Event, Options, Pool, Provider, Transfer, Transport, TransportKind};

fn device() -> Device {
    Device { kind: TransportKind::Cuda, name: "gpu0".into(), unavailable: None }
}

/// A plane of blocks that begin `offset` bytes from their region's start.
fn pool(id: u32, blocks: u32, block_bytes: u64, stride: u64, offset: u64) -> Pool {
    let plane = Plane { region: 0, offset, blocks, block_stride: stride, block_bytes };
    let layout = PoolLayout { regions: vec![offset + u64::from(blocks) * stride], planes: vec![plane] };
    CudaProvider::default().allocate(&device(), PoolId(id), layout, "sizes").unwrap()
}

/// Moves all blocks of one pool to the other, in reverse, and compares every byte.
fn move_all(source: &Pool, destination: &Pool, tokens: u32, run_bytes: u32) {
    let blocks = source.layout().planes[0].blocks;
    let up: Vec<u64> = (0..u64::from(blocks)).collect();
    let down: Vec<u64> = up.iter().rev().copied().collect();
    fill_blocks(source, &up, 0).unwrap();
    fill_blocks(destination, &down, u64::MAX).unwrap();
    let block_bytes = u64::from(tokens) * u64::from(run_bytes);
    let program = Arc::new(whole_blocks(1, tokens, block_bytes, 0..blocks, (0..blocks).rev()));
    let range = program.whole();
    let open = || CudaProvider::default().open(&device(), &Options::default()).unwrap();
    let (mut a, mut b): (Box<dyn Transport>, Box<dyn Transport>) = (open(), open());
    let keys = a.bind(source).unwrap();
    b.bind(destination).unwrap();
    let peer = b.connect(&a.address()).unwrap();
    let remote = b.import(peer, &keys, source.layout()).unwrap();
    let (id, direction, local) = (TransferId(1), Direction::Pull, destination.id());
    b.post(Transfer { id, peer, direction, local, remote, program, range, notice: None }).unwrap();
    let (start, mut events) = (Instant::now(), Vec::new());
    while !events.iter().any(|e| matches!(e, Event::Completed { .. } | Event::Failed { .. })) {
        assert!(start.elapsed() < Duration::from_secs(60), "{events:?}");
        a.poll(&mut Vec::new());
        b.poll(&mut events);
    }
    assert!(events.iter().any(|e| matches!(e, Event::Completed { .. })), "{events:?}");
    assert_eq!(check_blocks(destination, &down).unwrap(), None);
    assert_eq!(check_blocks(source, &up).unwrap(), None);
}

#[test]
#[ignore = "needs a GPU"]
fn every_size_and_alignment() {
    for (tokens, run_bytes) in [(1, 1), (1, 3), (16, 1), (16, 37), (5, 4096), (16, 257), (7, 1000), (1, 4097), (16, 16)]
    {
        for offset in [0, 1, 2, 4, 8, 13] {
            let bytes = u64::from(tokens * run_bytes);
            let source = pool(1, 33, bytes, bytes, offset);
            let destination = pool(2, 33, bytes, bytes + 5, 16 + offset / 2);
            move_all(&source, &destination, tokens, run_bytes);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_block_of_more_than_four_gibibytes() {
    let bytes = (4u64 << 30) + (1 << 20) + 48;
    let tokens = 16;
    let source = pool(1, 2, bytes, bytes, 0);
    let destination = pool(2, 2, bytes, bytes, 16);
    move_all(&source, &destination, tokens, u32::try_from(bytes / u64::from(tokens)).unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn many_small_blocks_beyond_four_gibibytes() {
    let (blocks, bytes) = (1 << 17, 40 << 10);
    let source = pool(1, blocks, bytes, bytes, 0);
    let destination = pool(2, blocks, bytes, bytes, 0);
    move_all(&source, &destination, 16, 2560);
}
