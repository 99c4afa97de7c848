//! The kernels of known blocks, run by the processor, against what the host writes.

use std::ffi::c_uint;

use kvferry_transport::{DeviceBlock, KnownRun, write_known};
use proptest::prelude::*;

use crate::emulated::kernel;

/// Blocks of a buffer that is aligned to words, and what they are to hold: (offset of the block, bytes, runs).
fn known_case() -> impl Strategy<Value = Vec<(usize, u32, Vec<KnownRun>)>> {
    let cuts = prop::collection::vec((0u32..300, 0u32..300, any::<u64>()), 0..9);
    prop::collection::vec((0usize..9, 0u32..40, cuts), 1..6).prop_map(|blocks| {
        let mut at = 0;
        let mut made = Vec::new();
        for (gap, tail, cuts) in blocks {
            let (mut runs, mut end) = (Vec::new(), 0);
            for (gap, bytes, state) in cuts {
                // None is empty, as the kernel is promised.
                runs.push(KnownRun { state, offset: end + gap, bytes: bytes + 1 });
                end += gap + bytes + 1;
            }
            made.push((at + gap, end + tail, runs));
            at += gap + (end + tail) as usize;
        }
        made
    })
}

proptest! {
    #[test]
    fn known_blocks_are_written_and_counted_as_the_host_does(
        case in known_case(),
        grid in (1u32..4, 1u32..4),
        changed in any::<prop::sample::Index>(),
    ) {
        let Some(kernel) = kernel() else { return Ok(()) };
        // What the source calls threadIdx and so on is one for all: nobody else runs a kernel meanwhile.
        let kernel = kernel.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let emulate = kernel.1;
        let length = case.last().map_or(0, |(at, bytes, _)| at + *bytes as usize) + 8;
        let mut due = vec![0x55; length];
        let mut runs = Vec::new();
        let mut memory = vec![0x5555_5555_5555_5555u64; length.div_ceil(8)];
        let base = memory.as_mut_ptr() as u64;
        let mut blocks = Vec::new();
        for (at, bytes, own) in &case {
            let image = &mut due[*at..at + *bytes as usize];
            image.fill(0xdb);
            own.iter().for_each(|run| write_known(&mut image[run.offset as usize..][..run.bytes as usize], run.state));
            let (first, count) = (runs.len() as u32, own.len() as u32);
            blocks.push(DeviceBlock { address: base + *at as u64, bytes: *bytes, first, count, background: 0xdb });
            runs.extend(own);
        }
        let mut wrong = vec![0; blocks.len()];
        let call = |flip, wrong: *mut c_uint| {
            // SAFETY: every block lies in `memory`, every run in its block; there is a count for each.
            unsafe { emulate(blocks.as_ptr(), runs.as_ptr(), blocks.len() as u32, flip, wrong, grid.0, grid.1) }
        };
        let lengths: Vec<u32> = case.iter().map(|(_, bytes, _)| *bytes).collect();
        call(u64::MAX, std::ptr::null_mut());
        call(0, wrong.as_mut_ptr());
        prop_assert_eq!(&wrong, &lengths, "every byte of the complement is wrong");
        wrong.fill(0);
        call(0, std::ptr::null_mut());
        call(0, wrong.as_mut_ptr());
        prop_assert!(wrong.iter().all(|count| *count == 0));
        let bytes = |memory: &[u64]| memory.iter().flat_map(|word| word.to_le_bytes()).take(length).collect::<Vec<u8>>();
        prop_assert!(bytes(&memory) == due);
        let at = changed.index(length);
        memory[at / 8] ^= 0x80 << (at % 8 * 8);
        call(0, wrong.as_mut_ptr());
        let inside = |(start, bytes, _): &(usize, u32, Vec<KnownRun>)| u32::from((*start..start + *bytes as usize).contains(&at));
        prop_assert_eq!(wrong, case.iter().map(inside).collect::<Vec<u32>>());
    }
}
