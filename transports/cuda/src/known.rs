//! Blocks whose bytes are known, written and compared where they lie.

use std::ffi::c_void;
use std::sync::PoisonError;

use kvferry_transport::{DeviceBlock, KnownRun};

use crate::buffer::Buffer;
use crate::driver;
use crate::memory::GpuMemory;

const THREADS: u32 = 256;
/// Thread blocks at most; each takes a block of the pool at a time.
const GRID_MAX: usize = 512;
/// The buffer for their description grows in steps of this.
const STEP_BYTES: usize = 1 << 20;

/// What the kernel does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    Write,
    /// Every bit the other way round.
    WriteComplement,
    Count,
}

/// Runs a kernel over blocks, and returns how many bytes of each differ; nothing for tasks that write. The caller has checked every block against
/// the pool, and every run against its block.
pub(crate) fn run(
    memory: &GpuMemory,
    task: Task,
    blocks: &[DeviceBlock],
    runs: &[KnownRun],
) -> Result<Vec<u32>, String> {
    let mut count = u32::try_from(blocks.len()).map_err(|_| "more blocks than a kernel counts".to_owned())?;
    let words = encode(blocks, runs);
    let counts_at = words.len();
    let length = counts_at + 4 * blocks.len();
    memory.gpu.enter()?;
    let mut scratch = memory.scratch.lock().unwrap_or_else(PoisonError::into_inner);
    let buffer = match scratch.take().filter(|buffer| buffer.bytes() >= length) {
        Some(buffer) => scratch.insert(buffer),
        None => scratch.insert(Buffer::new(&memory.gpu, length.next_multiple_of(STEP_BYTES))?),
    };
    let mut addresses = [0, size_of_val(blocks), counts_at].map(|offset| buffer.address() + offset as u64);
    let [blocks_at, runs_at, wrong_at] = &mut addresses;
    let wrong = *wrong_at;
    let mut flip = if task == Task::WriteComplement { u64::MAX } else { 0 };
    let last = if task == Task::Count { (&raw mut *wrong_at).cast() } else { (&raw mut flip).cast() };
    let mut parameters =
        [(&raw mut *blocks_at).cast(), (&raw mut *runs_at).cast(), (&raw mut count).cast::<c_void>(), last];
    let grid = blocks.len().clamp(1, GRID_MAX) as u32;
    let mut counts = vec![0u8; if task == Task::Count { 4 * blocks.len() } else { 0 }];
    // SAFETY: the buffer has room for all of it, and is used by nobody else while it is locked; parameters are the kernels'; blocks lie in the pool, whose memory this is, and runs in their blocks, as the caller has checked. Everything is waited for
    // before anything of it goes.
    let ran = unsafe {
        let stream = memory.stream;
        let uploaded = driver::upload(buffer.address(), words.as_ptr(), words.len(), stream);
        let ran = match task {
            Task::Write | Task::WriteComplement => {
                uploaded.and_then(|()| driver::launch(memory.gpu.write_known, grid, THREADS, stream, &mut parameters))
            }
            Task::Count => uploaded
                .and_then(|()| driver::set(wrong, 0, counts.len(), stream))
                .and_then(|()| driver::launch(memory.gpu.count_unknown, grid, THREADS, stream, &mut parameters))
                .and_then(|()| driver::download(counts.as_mut_ptr(), wrong, counts.len(), stream)),
        };
        driver::synchronize(stream).and(ran)
    };
    ran?;
    Ok(counts.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
}

/// As in `walk.cu`: blocks, then runs.
fn encode(blocks: &[DeviceBlock], runs: &[KnownRun]) -> Vec<u8> {
    let mut words = Vec::with_capacity(size_of_val(blocks) + size_of_val(runs));
    for block in blocks {
        words.extend(block.address.to_le_bytes());
        for word in [block.bytes, block.first, block.count, block.background] {
            words.extend(word.to_le_bytes());
        }
    }
    for run in runs {
        words.extend(run.state.to_le_bytes());
        words.extend(run.offset.to_le_bytes());
        words.extend(run.bytes.to_le_bytes());
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocation::Allocate;
    use crate::memory::allocate;
    use kvferry_core::{Plane, PoolId, PoolLayout};
    use kvferry_transport::{KnownBlocks, Pool, write_known};

    const BLOCK: u64 = 4099;

    fn pool() -> Pool {
        let plane = Plane { region: 0, offset: 3, blocks: 600, block_stride: BLOCK + 5, block_bytes: BLOCK };
        let layout = PoolLayout { regions: vec![3 + 600 * (BLOCK + 5)], planes: vec![plane] };
        allocate(0, PoolId(0), layout, Allocate::Best).unwrap()
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn a_gpu_writes_and_compares_as_the_host_does() {
        let pool = pool();
        let run = |block: u32, n: u32| KnownRun {
            state: u64::from(block) << 8 | u64::from(n),
            offset: 5 + 700 * n,
            bytes: 640 + n,
        };
        let mut known = KnownBlocks::default();
        for block in 0..600 {
            known.push(0, block, 0xdb, (0..block % 6).map(|n| run(block, n)));
        }
        assert!(pool.count_unknown(&known).unwrap().iter().any(|wrong| *wrong > 0), "nothing was written yet");
        pool.write_known(&known).unwrap();
        assert_eq!(pool.count_unknown(&known).unwrap(), vec![0; 600]);
        for block in [0, 5, 599] {
            let mut due = vec![0xdb; BLOCK as usize];
            for n in 0..block % 6 {
                let run = run(block, n);
                write_known(&mut due[run.offset as usize..][..run.bytes as usize], run.state);
            }
            let mut is = vec![0; BLOCK as usize];
            pool.read(0, block, 0, &mut is).unwrap();
            assert_eq!(is, due);
            // Any byte that is changed is counted, in its block only.
            for at in [0, 4, 5, 644, 645, 4098] {
                pool.write(0, block, at, &[due[at as usize] ^ 0x40]).unwrap();
                let wrong = pool.count_unknown(&known).unwrap();
                assert_eq!((wrong[block as usize], wrong.iter().sum::<u32>()), (1, 1), "block {block}, byte {at}");
                pool.write(0, block, at, &[due[at as usize]]).unwrap();
            }
        }
    }
}
