//! The kernel's source, run by the processor, between a pool and a contiguous buffer: against the stream that a program defines.

use std::sync::Arc;

use kvferry_core::{End, Plane, PoolLayout, Program, Segment, Side, UnitRange};
use proptest::prelude::*;

use crate::emulated::{Case, Memory, case, kernel, run};
use crate::rectangle::RECTANGLE_BYTES;
use crate::staged::lower_strips;

/// Bytes on either side of the buffer's content that nothing may touch.
const MARGIN: usize = 64;

/// The stream of a range, by the definition.
fn stream(program: &Program, end: End, range: UnitRange, layout: &PoolLayout, region: &[u8]) -> Vec<u8> {
    let spans = program.spans(end, range, layout);
    spans.flat_map(|span| region[span.at.offset as usize..][..span.bytes as usize].to_vec()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn chunks_are_packed_and_unpacked_at_any_byte(
        case in case(),
        cut in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
        sizes in prop::collection::vec((1u64..9000, 1usize..40), 1..6),
        shift in 0usize..17,
    ) {
        let Case { program, layouts: [from, to], shifts } = &case;
        let units = program.units() as usize + 1;
        let (a, b) = (cut.0.index(units) as u64, cut.1.index(units) as u64);
        let range = UnitRange { start: a.min(b), end: a.max(b) };
        let source = Memory::new(from, shifts[0], |at| (at as u32).wrapping_mul(2_654_435_761) as u8 ^ (at >> 9) as u8);
        let destination = Memory::new(to, shifts[1], |_| 0xee);
        let due = stream(program, End::Source, range, from, source.region(from));

        let mut buffer = vec![0x77u8; due.len() + 2 * MARGIN];
        let plane = [buffer.as_mut_ptr() as u64, 0];
        let tables = |memory: &Memory| (memory.planes.as_ptr() as u64, plane.as_ptr() as u64);
        // Both ends cut as they like.
        for (end, memory, skip) in [(End::Source, &source, 0), (End::Destination, &destination, 1)] {
            let (mut strips, mut done, mut sizes) = (program.strips(range), 0, sizes.iter().cycle().skip(skip));
            loop {
                let (bytes, most) = *sizes.next().unwrap();
                let mut taken = Vec::new();
                let count = strips.take(program, bytes, most, &mut taken);
                if count == 0 {
                    break;
                }
                let at = (MARGIN - shift) as u64 + done;
                let payload = lower_strips(program, end, &taken, at, tables(memory)).unwrap();
                prop_assert_eq!(run(&payload, 2, 3), 0, "accesses that a GPU refuses");
                done += count;
            }
            prop_assert_eq!(done, due.len() as u64);
            if kernel().is_none() {
                return Ok(());
            }
            let start = MARGIN - shift;
            prop_assert!(buffer[start..start + due.len()] == due, "{end:?}");
            let outside = buffer.iter().take(start).chain(buffer.iter().skip(start + due.len()));
            prop_assert!(outside.into_iter().all(|byte| *byte == 0x77), "{end:?}: written outside");
        }
        let mut wanted = vec![0xee; destination.region(to).len()];
        for copy in program.copies(range, from, to) {
            let (at, bytes) = (copy.source.offset as usize, copy.bytes as usize);
            wanted[copy.destination.offset as usize..][..bytes].copy_from_slice(&source.region(from)[at..at + bytes]);
        }
        prop_assert!(destination.region(to) == wanted.as_slice());
    }
}

/// Byte after byte from alternating ends of tables that are all one long one.
#[test]
fn long_tables_do_not_make_long_payloads() {
    const BLOCKS: u32 = 1 << 16;
    const TABLES: u32 = 64;
    let ids: Arc<[u32]> = (0..BLOCKS).rev().collect();
    let side = |table| Side {
        plane: 0,
        plane_step: 1,
        table,
        first_block: 0,
        block_tokens: 1,
        cp: 1,
        cp_rank: 0,
        token_pitch: 1,
        head_pitch: 1,
        offset: 0,
    };
    let segment = |index: u32| {
        let table = index / 2 % TABLES;
        // Near the ends, no token twice of one table.
        let step = u64::from(index / 2 / TABLES);
        let start = if index.is_multiple_of(2) { step } else { u64::from(BLOCKS) - 1 - step };
        let (source, destination) = (side(table), side(table));
        Segment { source, destination, planes: 1, start, end: start + 1, heads: 1, run_bytes: 1 }
    };
    let tables = vec![Some(ids); TABLES as usize];
    let segments: Vec<_> = (0..2048).map(segment).collect();
    let program = Program { segments, sources: tables.clone(), destinations: tables };
    let bytes = u64::from(BLOCKS);
    let plane = Plane { region: 0, offset: 0, blocks: BLOCKS, block_stride: 1, block_bytes: 1 };
    let layout = PoolLayout { regions: vec![bytes], planes: vec![plane] };
    program.validate(End::Source, &layout).unwrap();

    let source = Memory::new(&layout, 0, |at| (at as u32).wrapping_mul(2_654_435_761) as u8 ^ (at >> 9) as u8);
    let due = stream(&program, End::Source, program.whole(), &layout, source.region(&layout));
    let mut buffer = vec![0x77u8; due.len()];
    let plane = [buffer.as_mut_ptr() as u64, 0];
    let tables = (source.planes.as_ptr() as u64, plane.as_ptr() as u64);
    let mut taken = Vec::new();
    assert_eq!(program.strips(program.whole()).take(&program, 512 << 10, 2048, &mut taken), 2048);
    let payload = lower_strips(&program, End::Source, &taken, 0, tables).unwrap();
    let most = 2048 * (RECTANGLE_BYTES + size_of::<u32>()) + size_of::<u32>();
    assert!(payload.bytes.len() <= most, "{} bytes", payload.bytes.len());
    assert_eq!(run(&payload, 2, 3), 0, "accesses that a GPU refuses");
    assert!(kernel().is_none() || buffer == due);
}
