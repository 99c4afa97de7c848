//! One side's KV: its geometry, its pool with a verifiable content, and the block table of the request.

use std::fmt;
use std::sync::Arc;

use kvferry::{
    BlockTable, Dtype, Extent, Format, GroupGeometry, KvPlacement, LayerGroup, Model, Order, PairPlan, Parallel,
    PlanRequest, PlanePlacement, Pool, PoolId, PoolOptions, Program, Rank, Sharding, Tables, Tensor, transport,
};
use kvferry_core::{PlanError, Segment, Side};
use kvferry_transport::write_known;

use super::Options;
use super::error::BenchError;
use super::way::Way;

/// Tokens of a block whose bytes can be divided by that, as most serving systems have it.
const BLOCK_TOKENS: u32 = 16;
/// Labels of blocks that are not the request's: no index in a table is that large, and the two sides differ.
const STRAY_AT_SOURCE: u64 = 1 << 40;
const STRAY_AT_DESTINATION: u64 = 2 << 40;

/// The request: both sides store it alike, in different blocks.
#[derive(Debug)]
pub(crate) struct Shape {
    geometry: GroupGeometry,
    plan: PairPlan,
    layers: u32,
    blocks: u32,
    block_bytes: u32,
}

impl Shape {
    pub(crate) fn of(options: &Options) -> Result<Shape, BenchError> {
        let Options { layers, blocks, block_bytes, .. } = *options;
        let block_tokens = if block_bytes.is_multiple_of(BLOCK_TOKENS) { BLOCK_TOKENS } else { 1 };
        let tensor = |name: &str| Tensor {
            name: name.to_owned(),
            heads: 1,
            elements: block_bytes / block_tokens,
            sharding: Sharding::Heads,
        };
        let group = LayerGroup {
            name: "attention".to_owned(),
            layers: (0..layers).collect(),
            dtype: Dtype::Uint8,
            extent: Extent::Full,
            tensors: vec![tensor("k"), tensor("v")],
        };
        let model = Model { name: "bench".to_owned(), layers, groups: vec![group] };
        let format = Format { block_tokens, order: Order::Nhd, kv: KvPlacement::Separate, planes: PlanePlacement::One };
        let geometry = GroupGeometry { model, format, parallel: Parallel::default() };
        geometry.validate()?;
        let plan = PairPlan::new(&geometry, Rank(0), &geometry, Rank(0))?;
        Ok(Shape { geometry, plan, layers, blocks, block_bytes })
    }

    /// Blocks of the request in all planes.
    pub(crate) fn pieces(&self) -> u64 {
        2 * u64::from(self.layers) * u64::from(self.blocks)
    }

    /// Bytes of the request.
    pub(crate) fn bytes(&self) -> u64 {
        self.pieces() * u64::from(self.block_bytes)
    }

    /// What moves from one table to another; one of them may be known in shape only.
    pub(crate) fn program(&self, source: &Tables, destination: &Tables) -> Result<Arc<Program>, PlanError> {
        let tokens = u64::from(self.blocks) * u64::from(self.geometry.format.block_tokens);
        let request = PlanRequest { tokens, have: 0, layers: 0..self.layers, source, destination };
        self.plan.program(&request).map(Arc::new)
    }

    /// As many bytes in as few pieces as there can be: the first half of the planes, every block of them in its place.
    pub(crate) fn contiguous(&self) -> Arc<Program> {
        let blocks = self.blocks.saturating_mul(2);
        let side = Side {
            plane: 0,
            plane_step: 1,
            table: 0,
            first_block: 0,
            block_tokens: 1,
            cp: 1,
            cp_rank: 0,
            token_pitch: u64::from(self.block_bytes),
            head_pitch: u64::from(self.block_bytes),
            offset: 0,
        };
        let segment = Segment {
            source: side,
            destination: side,
            planes: self.layers,
            start: 0,
            end: blocks.into(),
            heads: 1,
            run_bytes: self.block_bytes,
        };
        let table: Arc<[u32]> = (0..blocks).collect();
        let tables = vec![Some(table)];
        Arc::new(Program { segments: vec![segment], sources: tables.clone(), destinations: tables })
    }
}

/// The role of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holds {
    Source,
    Destination,
}

/// A pool in which the request has blocks.
#[derive(Debug)]
pub(crate) struct Cache {
    pool: Pool,
    tables: Tables,
    table: Arc<[u32]>,
    /// What each block of the pool is: its index in the table, or a stray's label.
    labels: Vec<u64>,
    holds: Holds,
    block_bytes: usize,
}

impl Cache {
    /// A pool of twice as many blocks as the request has; `seed` chooses which ones it gets. Its content is written: a pattern at the
    /// source, something else in every byte at the destination.
    pub(crate) fn allocate(options: &Options, shape: &Shape, holds: Holds, seed: u64) -> Result<Cache, BenchError> {
        let count = shape.blocks.saturating_mul(2);
        let layout = shape.geometry.shard(Rank(0))?.layout(&[count]);
        let pool = match options.transport {
            Way::Transport(kind) => {
                let (kind, device) = options.memory_of(kind, holds)?;
                transport::allocate(kind, device.as_deref(), PoolId(0), layout, "kvferry-bench")?
            }
            Way::Nixl => Pool::allocate_private(PoolId(0), layout, &PoolOptions::default())?,
        };
        let mut table = shuffled(count, seed);
        table.truncate(shape.blocks as usize);
        let stray = match holds {
            Holds::Source => STRAY_AT_SOURCE,
            Holds::Destination => STRAY_AT_DESTINATION,
        };
        let mut labels: Vec<u64> = (0..u64::from(count)).map(|block| stray | block).collect();
        for (block, index) in table.iter().zip(0..) {
            if let Some(label) = labels.get_mut(*block as usize) {
                *label = index;
            }
        }
        let table: Arc<[u32]> = table.into();
        let tables = Tables { groups: vec![BlockTable::known(0, Arc::clone(&table))] };
        let cache = Cache { pool, tables, table, labels, holds, block_bytes: shape.block_bytes as usize };
        cache.write()?;
        Ok(cache)
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    pub(crate) fn tables(&self) -> &Tables {
        &self.tables
    }

    /// The request's blocks, in token order.
    pub(crate) fn table(&self) -> &[u32] {
        &self.table
    }

    /// Writes every block: at the destination, the opposite of what is due in each byte of the request's.
    pub(crate) fn write(&self) -> Result<(), BenchError> {
        if self.pool.device().is_some() {
            let complement_below = if self.holds == Holds::Destination { STRAY_AT_SOURCE } else { 0 };
            return kvferry_cuda::fill_blocks(&self.pool, &self.labels, complement_below).map_err(BenchError::Gpu);
        }
        let mut bytes = vec![0; self.block_bytes];
        for plane in self.planes() {
            for (block, label) in (0..).zip(&self.labels) {
                pattern(plane, *label, &mut bytes);
                if self.holds == Holds::Destination && *label < STRAY_AT_SOURCE {
                    bytes.iter_mut().for_each(|byte| *byte = !*byte);
                }
                self.pool.write(plane, block, 0, &bytes)?;
            }
        }
        Ok(())
    }

    /// Compares every byte of every block with what is due once the request is here. The first that differs, if any.
    pub(crate) fn verify(&self) -> Result<Option<Mismatch>, BenchError> {
        if self.pool.device().is_some() {
            let found = kvferry_cuda::check_blocks(&self.pool, &self.labels).map_err(BenchError::Gpu)?;
            let is_stray = |block: u32| self.labels.get(block as usize).is_none_or(|label| *label >= STRAY_AT_SOURCE);
            return Ok(found.map(|found| Mismatch {
                plane: found.plane,
                block: found.block,
                byte: found.byte as usize,
                is_stray: is_stray(found.block),
            }));
        }
        let (mut due, mut found) = (vec![0; self.block_bytes], vec![0; self.block_bytes]);
        for plane in self.planes() {
            for (block, label) in (0..).zip(&self.labels) {
                pattern(plane, *label, &mut due);
                self.pool.read(plane, block, 0, &mut found)?;
                if due != found {
                    let byte = due.iter().zip(&found).position(|(due, found)| due != found).unwrap_or(0);
                    return Ok(Some(Mismatch { plane, block, byte, is_stray: *label >= STRAY_AT_SOURCE }));
                }
            }
        }
        Ok(None)
    }

    fn planes(&self) -> std::ops::Range<u32> {
        0..u32::try_from(self.pool.layout().planes.len()).unwrap_or(u32::MAX)
    }
}

/// The first byte that is not what it must be.
#[derive(Debug)]
pub(crate) struct Mismatch {
    plane: u32,
    block: u32,
    byte: usize,
    is_stray: bool,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mismatch { plane, block, byte, is_stray } = self;
        let what = if *is_stray { "a block that is not the request's was written" } else { "not what the source has" };
        write!(f, "plane {plane}, block {block}, byte {byte}: {what}")
    }
}

/// The bytes of a block: no two blocks are alike.
fn pattern(plane: u32, label: u64, out: &mut [u8]) {
    write_known(out, kvferry_cuda::block_state(plane, label));
}

/// The numbers below `count` in an order that `seed` chooses.
fn shuffled(count: u32, seed: u64) -> Vec<u32> {
    let mut numbers: Vec<u32> = (0..count).collect();
    let mut state = mix(seed);
    for index in (1..numbers.len()).rev() {
        state = mix(state.wrapping_add(index as u64));
        numbers.swap(index, (state % (index as u64 + 1)) as usize);
    }
    numbers
}

/// A bijection that leaves no bit where it was (the finaliser of SplitMix64).
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(block_bytes: u32) -> Options {
        let line = format!("bench --transport shm --layers 2 --blocks 5 --block-bytes {block_bytes}");
        Line::try_parse_from(line.split(' ')).unwrap().options
    }

    fn shape(block_bytes: u32) -> Shape {
        Shape::of(&options(block_bytes)).unwrap()
    }

    fn cache(shape: &Shape, holds: Holds, seed: u64) -> Cache {
        Cache::allocate(&options(shape.block_bytes), shape, holds, seed).unwrap()
    }

    /// Moves the request by the definitions alone.
    fn deliver(source: &Cache, destination: &Cache) {
        let mut bytes = vec![0; source.block_bytes];
        for plane in source.planes() {
            for (from, to) in source.table().iter().zip(destination.table()) {
                source.pool.read(plane, *from, 0, &mut bytes).unwrap();
                destination.pool.write(plane, *to, 0, &bytes).unwrap();
            }
        }
    }

    #[test]
    fn any_wrong_byte_is_found() {
        for block_bytes in [1, 7, 4096] {
            let shape = shape(block_bytes);
            let source = cache(&shape, Holds::Source, 1);
            let destination = cache(&shape, Holds::Destination, 2);
            assert_ne!(source.table(), destination.table());
            assert!(destination.verify().unwrap().is_some(), "nothing was moved yet");
            deliver(&source, &destination);
            assert!(destination.verify().unwrap().is_none());
            for plane in destination.planes() {
                for block in 0..10 {
                    for at in [0, block_bytes / 2, block_bytes - 1] {
                        let mut byte = [0];
                        destination.pool.read(plane, block, at.into(), &mut byte).unwrap();
                        destination.pool.write(plane, block, at.into(), &[byte[0] ^ 1]).unwrap();
                        let found = destination.verify().unwrap().unwrap();
                        assert_eq!((found.plane, found.block, found.byte), (plane, block, at as usize));
                        assert_eq!(found.is_stray, !destination.table().contains(&block));
                        destination.pool.write(plane, block, at.into(), &byte).unwrap();
                    }
                }
            }
            assert!(destination.verify().unwrap().is_none());
        }
    }

    #[test]
    fn what_was_not_moved_is_wrong_in_every_byte() {
        let shape = shape(4096);
        let source = cache(&shape, Holds::Source, 1);
        let destination = cache(&shape, Holds::Destination, 2);
        let (mut there, mut here) = (vec![0; 4096], vec![0; 4096]);
        for plane in source.planes() {
            for (from, to) in source.table().iter().zip(destination.table()) {
                source.pool.read(plane, *from, 0, &mut there).unwrap();
                destination.pool.read(plane, *to, 0, &mut here).unwrap();
                assert!(there.iter().zip(&here).all(|(there, here)| there != here));
            }
        }
    }

    #[test]
    fn programs_name_every_piece_once_whatever_is_known() {
        let shape = shape(1000);
        let source = cache(&shape, Holds::Source, 1);
        let destination = cache(&shape, Holds::Destination, 2);
        let whole = shape.program(source.tables(), destination.tables()).unwrap();
        assert_eq!((shape.pieces(), shape.bytes()), (20, 20_000));
        assert_eq!(whole.bytes(), shape.bytes());
        let pushed = shape.program(source.tables(), &destination.tables().shapes()).unwrap();
        let expected = shape.program(&source.tables().shapes(), destination.tables()).unwrap();
        assert_eq!(pushed.fingerprint(), expected.fingerprint());
    }
}
