//! The walker against the definition of a segment, byte by byte.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::BTreeMap;
use std::sync::Arc;

use kvferry_core::{End, Location, Plane, PoolLayout, Program, Segment, Side, Strip, UnitRange};
use proptest::prelude::*;
use proptest::sample::Index;

type Memory = Vec<Vec<u8>>;

#[derive(Clone, Debug)]
struct SideSpec {
    block_tokens: u32,
    cp: u32,
    cp_rank: u32,
    plane: u32,
    plane_step: u32,
    head_major: bool,
    gaps: [u64; 3],
    shuffle: u64,
    slack: u32,
}

fn side_spec() -> impl Strategy<Value = SideSpec> {
    (
        prop::sample::select(vec![1u32, 2, 3, 4, 8, 16]),
        1u32..4,
        any::<u32>(),
        0u32..3,
        1u32..3,
        any::<bool>(),
        prop::array::uniform3(prop::sample::select(vec![0u64, 0, 0, 5])),
        any::<u64>(),
        0u32..3,
    )
        .prop_map(|(block_tokens, cp, cp_rank, plane, plane_step, head_major, gaps, shuffle, slack)| SideSpec {
            block_tokens,
            cp,
            cp_rank: cp_rank % cp,
            plane,
            plane_step,
            head_major,
            gaps,
            shuffle,
            slack,
        })
}

/// A table of distinct blocks: a plain run for an even `shuffle`, else a permutation.
fn table(spec: &SideSpec, blocks: u32) -> (Arc<[u32]>, u32) {
    let pool = blocks + spec.slack;
    let mut ids: Vec<u32> = (0..pool).collect();
    if !spec.shuffle.is_multiple_of(2) {
        let mut state = spec.shuffle;
        for index in (1..ids.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ids.swap(index, (state >> 33) as usize % (index + 1));
        }
    }
    (ids.into_iter().take(blocks as usize).collect(), pool)
}

fn build(spec: &SideSpec, planes: u32, tokens: (u64, u64), heads: u32, run: u32) -> (Side, Arc<[u32]>, PoolLayout) {
    let (run, heads_count, block) = (u64::from(run), u64::from(heads), u64::from(spec.block_tokens));
    let (token_pitch, head_pitch) = if spec.head_major {
        let token_pitch = run + spec.gaps[0];
        (token_pitch, token_pitch * block + spec.gaps[1])
    } else {
        let head_pitch = run + spec.gaps[0];
        (head_pitch * heads_count + spec.gaps[1], head_pitch)
    };
    let block_bytes = spec.gaps[2] + (block - 1) * token_pitch + (heads_count - 1) * head_pitch + run;
    let first_block = tokens.0 / (block * u64::from(spec.cp));
    let last = tokens.1.max(1).div_ceil(block * u64::from(spec.cp));
    let (table, pool) = table(spec, (last.max(first_block) - first_block) as u32);
    let side = Side {
        plane: spec.plane,
        plane_step: spec.plane_step,
        table: 0,
        first_block,
        block_tokens: spec.block_tokens,
        cp: spec.cp,
        cp_rank: spec.cp_rank,
        token_pitch,
        head_pitch,
        offset: spec.gaps[2],
    };
    let plane_bytes = block_bytes * u64::from(pool);
    let count = u64::from(spec.plane + (planes - 1) * spec.plane_step + 1);
    let plane = |index: u64| Plane {
        region: 0,
        offset: index * plane_bytes,
        blocks: pool,
        block_stride: block_bytes,
        block_bytes,
    };
    let layout = PoolLayout { regions: vec![count * plane_bytes], planes: (0..count).map(plane).collect() };
    (side, table, layout)
}

fn program() -> impl Strategy<Value = (Program, PoolLayout, PoolLayout)> {
    (side_spec(), side_spec(), 1u32..4, 0u64..40, 0u64..70, 1u32..4, 1u32..5).prop_map(
        |(source, destination, planes, start, length, heads, run)| {
            let end = start + length;
            let (source, source_table, source_layout) = build(&source, planes, (start, end), heads, run);
            let (destination, destination_table, destination_layout) =
                build(&destination, planes, (start, end), heads, run);
            let segment = Segment { source, destination, planes, start, end, heads, run_bytes: run };
            let program = Program {
                segments: vec![segment],
                sources: vec![Some(source_table)],
                destinations: vec![Some(destination_table)],
            };
            (program, source_layout, destination_layout)
        },
    )
}

fn byte_at(side: &Side, table: &[u32], layout: &PoolLayout, plane: u32, token: u64, head: u32) -> Option<u64> {
    let block = token / u64::from(side.block_tokens);
    if block % u64::from(side.cp) != u64::from(side.cp_rank) {
        return None;
    }
    let id = table[(block / u64::from(side.cp) - side.first_block) as usize];
    let plane = &layout.planes[(side.plane + plane * side.plane_step) as usize];
    Some(
        plane.offset
            + u64::from(id) * plane.block_stride
            + side.offset
            + token % u64::from(side.block_tokens) * side.token_pitch
            + u64::from(head) * side.head_pitch,
    )
}

/// Destination byte -> source byte, straight from the definition.
fn oracle(program: &Program, range: UnitRange, source: &PoolLayout, destination: &PoolLayout) -> BTreeMap<u64, u64> {
    let mut map = BTreeMap::new();
    let (sources, destinations) = (program.sources[0].clone(), program.destinations[0].clone());
    let (sources, destinations) = (sources.unwrap_or_default(), destinations.unwrap_or_default());
    let mut unit = 0;
    for segment in &program.segments {
        for plane in 0..segment.planes {
            for token in segment.start..segment.end {
                unit += 1;
                if unit <= range.start || unit > range.end {
                    continue;
                }
                for head in 0..segment.heads {
                    let from = byte_at(&segment.source, &sources, source, plane, token, head);
                    let to = byte_at(&segment.destination, &destinations, destination, plane, token, head);
                    if let (Some(from), Some(to)) = (from, to) {
                        for byte in 0..u64::from(segment.run_bytes) {
                            assert!(map.insert(to + byte, from + byte).is_none());
                        }
                    }
                }
            }
        }
    }
    map
}

/// Where a side keeps the bytes of a strip, in stream order.
fn strip_bytes(strip: &Strip, program: &Program, end: End, table: &[u32], layout: &PoolLayout) -> Vec<u64> {
    let segment = &program.segments[strip.segment];
    let run = u64::from(strip.run_bytes);
    let (tokens, heads) = (strip.token..strip.token + strip.tokens, strip.head..strip.head + strip.heads);
    let mut runs = Vec::new();
    for token in tokens {
        for head in heads.clone() {
            let (token_pitch, head_pitch) = strip.pitches();
            let at = (token - strip.token) * token_pitch + u64::from(head - strip.head) * head_pitch;
            let from = byte_at(segment.side(end), table, layout, strip.plane, token, head).unwrap();
            runs.push((at, from + u64::from(strip.byte)));
        }
    }
    runs.sort_unstable();
    for (index, (at, _)) in runs.iter().enumerate() {
        assert_eq!(*at, index as u64 * run, "the stream has gaps");
    }
    runs.iter().flat_map(|(_, from)| *from..*from + run).collect()
}

fn memory(layout: &PoolLayout) -> Memory {
    let fill = |bytes: &u64| (0..*bytes).map(|index| (index.wrapping_mul(2_654_435_761) >> 7) as u8).collect();
    layout.regions.iter().map(fill).collect()
}

fn bytes(memory: &Memory, at: Location, bytes: u64) -> &[u8] {
    &memory[at.region as usize][at.offset as usize..(at.offset + bytes) as usize]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn all_walks_agree_with_the_definition((program, source, destination) in program(), from: Index, to: Index) {
        source.validate().unwrap();
        destination.validate().unwrap();
        program.validate(End::Source, &source).unwrap();
        program.validate(End::Destination, &destination).unwrap();
        let units = program.units() as usize + 1;
        let (from, to) = (from.index(units) as u64, to.index(units) as u64);
        for range in [program.whole(), UnitRange { start: from.min(to), end: from.max(to) }] {
            let wanted = oracle(&program, range, &source, &destination);
            prop_assert_eq!(program.bytes_in(range), wanted.len() as u64);

            let mut copied = BTreeMap::new();
            for copy in program.copies(range, &source, &destination) {
                for byte in 0..copy.bytes {
                    prop_assert!(copied.insert(copy.destination.offset + byte, copy.source.offset + byte).is_none());
                }
            }
            prop_assert_eq!(&copied, &wanted);

            let mut tiled = BTreeMap::new();
            for tile in program.tiles(range, &source, &destination) {
                for outer in 0..u64::from(tile.outer) {
                    for inner in 0..u64::from(tile.inner) {
                        let from = tile.source.offset + outer * tile.outer_source + inner * tile.inner_source;
                        let to = tile.destination.offset + outer * tile.outer_destination + inner * tile.inner_destination;
                        for byte in 0..tile.run_bytes {
                            prop_assert!(tiled.insert(to + byte, from + byte).is_none());
                        }
                    }
                }
            }
            prop_assert_eq!(&tiled, &wanted);

            // Each end walks the stream with nothing but its own tables, as after a journey over the wire.
            let mut encoded = Vec::new();
            program.encode_for(End::Source, &mut encoded);
            let sender = Program::decode(&encoded).unwrap();
            for (end, other) in [(End::Source, End::Destination), (End::Destination, End::Source)] {
                let (mut told, mut copied) = (Vec::new(), Vec::new());
                program.encode_for(end, &mut told);
                program.without(other).encode(&mut copied);
                prop_assert_eq!(told, copied);
            }
            prop_assert_eq!(&sender, &program.without(End::Destination));
            let receiver = program.without(End::Source);
            prop_assert_eq!(sender.fingerprint(), receiver.fingerprint());
            let from = memory(&source);
            let mut stream = Vec::new();
            for span in sender.spans(End::Source, range, &source) {
                stream.extend_from_slice(bytes(&from, span.at, span.bytes));
            }
            let mut rest = &stream[..];
            let mut received = BTreeMap::new();
            for span in receiver.spans(End::Destination, range, &destination) {
                let (head, tail) = rest.split_at(span.bytes as usize);
                rest = tail;
                for (index, byte) in head.iter().enumerate() {
                    received.insert(span.at.offset + index as u64, *byte);
                }
            }
            prop_assert!(rest.is_empty());
            let expected: BTreeMap<u64, u8> = wanted.iter().map(|(to, at)| (*to, from[0][*at as usize])).collect();
            prop_assert_eq!(received, expected);
        }
    }

    #[test]
    fn strips_are_the_stream_cut_at_any_byte(
        (program, source, destination) in program(),
        cut in (any::<Index>(), any::<Index>()),
        sizes in prop::collection::vec((1u64..40, 1usize..5), 1..20),
    ) {
        let units = program.units() as usize + 1;
        let (a, b) = (cut.0.index(units) as u64, cut.1.index(units) as u64);
        for range in [program.whole(), UnitRange { start: a.min(b), end: a.max(b) }] {
            for (end, layout) in [(End::Source, &source), (End::Destination, &destination)] {
                // A strip is found with the definition of a side alone.
                let mut due = Vec::new();
                for span in program.spans(end, range, layout) {
                    due.extend(span.at.offset..span.at.offset + span.bytes);
                }
                let table = program.tables(end)[0].clone().unwrap_or_default();
                let (mut strips, mut places, mut sizes) = (program.strips(range), Vec::new(), sizes.iter().cycle());
                loop {
                    let (bytes, most) = *sizes.next().unwrap();
                    let mut taken = Vec::new();
                    let count = strips.take(&program, bytes, most, &mut taken);
                    prop_assert!(taken.len() <= most);
                    prop_assert_eq!(count, taken.iter().map(|strip| strip.bytes()).sum::<u64>());
                    prop_assert!(count == bytes || taken.len() == most || places.len() as u64 + count == due.len() as u64);
                    for strip in &taken {
                        places.extend(strip_bytes(strip, &program, end, &table, layout));
                    }
                    if count == 0 {
                        break;
                    }
                }
                prop_assert_eq!(&places, &due);
            }
        }
    }

    #[test]
    fn a_split_covers_everything_evenly((program, source, destination) in program(), parts in 1u32..40) {
        let ranges = program.split(parts);
        prop_assert_eq!(ranges.len(), parts as usize);
        let mut next = 0;
        for range in &ranges {
            prop_assert_eq!(range.start, next);
            prop_assert!(range.start <= range.end);
            next = range.end;
        }
        prop_assert_eq!(next, program.units());
        let total: u64 = ranges.iter().map(|range| program.bytes_in(*range)).sum();
        prop_assert_eq!(total, program.bytes());
        let segment = &program.segments[0];
        let token = u64::from(segment.heads * segment.run_bytes);
        for range in &ranges {
            let copied: u64 = program.copies(*range, &source, &destination).map(|copy| copy.bytes).sum();
            prop_assert_eq!(copied, program.bytes_in(*range));
            let share = program.bytes() / u64::from(parts);
            prop_assert!(copied <= share + share / 16 + 2 * token, "{} of {} in {} parts", copied, program.bytes(), parts);
        }
    }

    #[test]
    fn a_split_by_weights_is_disjoint_ordered_and_covers_everything(
        (program, source, destination) in program(),
        weights in prop::collection::vec(prop_oneof![Just(0u32), 1u32..10, any::<u32>()], 1..20),
    ) {
        let ranges = program.split_by(&weights);
        prop_assert_eq!(ranges.len(), weights.len());
        let mut next = 0;
        for range in &ranges {
            prop_assert!(range.start == next && range.start <= range.end);
            next = range.end;
        }
        prop_assert_eq!(next, program.units());
        let sum: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();
        let segment = &program.segments[0];
        let token = u64::from(segment.heads * segment.run_bytes);
        for (range, weight) in ranges.iter().zip(&weights) {
            let copied: u64 = program.copies(*range, &source, &destination).map(|copy| copy.bytes).sum();
            prop_assert_eq!(copied, program.bytes_in(*range));
            if let Some(share) = (u128::from(program.bytes()) * u128::from(*weight)).checked_div(sum) {
                let share = share as u64;
                prop_assert!(copied <= share + share / 16 + 2 * token, "{} for {} of {:?}", copied, weight, weights);
            }
        }
    }

    #[test]
    fn a_program_of_smaller_units_is_the_same_copies((program, source, destination) in program(), most in 1u64..200) {
        let bytes_of = |program: &Program| -> BTreeMap<(u32, u64), (u32, u64)> {
            let copies = program.copies(program.whole(), &source, &destination);
            copies.flat_map(|copy| (0..copy.bytes).map(move |byte| {
                let (to, from) = (copy.destination, copy.source);
                ((to.region, to.offset + byte), (from.region, from.offset + byte))
            })).collect()
        };
        let cut = program.with_units_up_to(most);
        prop_assert!(cut.unit_bytes_max() <= most);
        prop_assert_eq!(cut.bytes(), program.bytes());
        prop_assert_eq!(bytes_of(&cut), bytes_of(&program));
        for (end, layout) in [(End::Source, &source), (End::Destination, &destination)] {
            prop_assert!(cut.validate(end, layout).is_ok());
        }
        prop_assert_eq!(program.with_units_up_to(u64::MAX), program);
    }

    #[test]
    fn decoding_anything_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = Program::decode(&bytes);
    }

    #[test]
    fn a_damaged_program_never_panics(
        (program, source, destination) in program(),
        places in prop::collection::vec((any::<Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = Vec::new();
        program.encode(&mut bytes);
        for (place, value) in places {
            let at = place.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(program) = Program::decode(&bytes) {
            let mut valid = true;
            for (end, layout) in [(End::Source, &source), (End::Destination, &destination)] {
                if program.validate(end, layout).is_err() {
                    valid = false;
                    continue;
                }
                let mut total = 0;
                for span in program.spans(end, program.whole(), layout) {
                    prop_assert!(span.at.offset + span.bytes <= layout.regions[span.at.region as usize]);
                    total += span.bytes;
                }
                prop_assert_eq!(total, program.bytes());
            }
            // An invalid program may be absurdly long; a short one is walked to see that nothing panics.
            let heads: u64 = program.segments.iter().map(|segment| u64::from(segment.heads)).sum();
            if program.units() < 100_000 && heads < 100 {
                let copied: u64 = program.copies(program.whole(), &source, &destination).fold(0, |sum, copy| sum.wrapping_add(copy.bytes));
                let _ = (program.split(7), program.spans(End::Source, program.whole(), &source).count());
                if valid {
                    prop_assert_eq!(copied, program.bytes());
                }
            }
        }
    }
}

#[test]
fn a_program_beyond_4_gib_is_split_evenly() {
    let side = Side {
        plane: 0,
        plane_step: 1,
        table: 0,
        first_block: 0,
        block_tokens: 64,
        cp: 1,
        cp_rank: 0,
        token_pitch: 1 << 16,
        head_pitch: 1 << 16,
        offset: 0,
    };
    let segment = Segment {
        source: side,
        destination: Side { block_tokens: 32, ..side },
        planes: 160,
        start: 0,
        end: 8192,
        heads: 1,
        run_bytes: 1 << 16,
    };
    let program = Program { segments: vec![segment], sources: vec![None], destinations: vec![None] };
    assert_eq!(program.bytes(), (160 * 8192) << 16);
    for parts in [1, 3, 8, 1000] {
        let ranges = program.split(parts);
        let share = program.bytes() / u64::from(parts);
        for range in ranges {
            assert!(program.bytes_in(range).abs_diff(share) <= share / 16);
        }
    }
    assert!(Program::default().split(4).iter().all(|range| range.is_empty()));
    assert_eq!(Program::default().bytes(), 0);
}

#[test]
fn one_huge_piece_is_shared_by_bytes() {
    let side = Side {
        plane: 0,
        plane_step: 1,
        table: 0,
        first_block: 0,
        block_tokens: 1,
        cp: 1,
        cp_rank: 0,
        token_pitch: 1 << 36,
        head_pitch: u64::from(u32::MAX),
        offset: 0,
    };
    let of = |heads, run_bytes| Program {
        segments: vec![Segment { source: side, destination: side, planes: 1, start: 0, end: 1, heads, run_bytes }],
        sources: vec![None],
        destinations: vec![None],
    };
    // 17 GB of one token: as it is, nobody can share it.
    let huge = of(4, u32::MAX);
    assert_eq!(huge.split(4).iter().filter(|range| !range.is_empty()).count(), 1);
    let cut = huge.with_units_up_to(huge.bytes() / 32);
    assert_eq!((cut.bytes(), cut.segments.len()), (4 * u64::from(u32::MAX), 36));
    let share = cut.bytes() / 4;
    for range in cut.split(4) {
        assert!(cut.bytes_in(range).abs_diff(share) <= cut.unit_bytes_max(), "{}", cut.bytes_in(range));
    }
    for bytes in [1, 2, 3] {
        let small = of(1, bytes).with_units_up_to(1);
        let sizes: Vec<u64> = small.split(4).into_iter().map(|range| small.bytes_in(range)).collect();
        assert!(sizes.iter().all(|size| *size <= 1) && sizes.iter().sum::<u64>() == u64::from(bytes), "{sizes:?}");
    }
    // Nothing is cut into more segments than a program may have.
    assert_eq!(huge.with_units_up_to(1), huge);
}

#[test]
fn neighbouring_blocks_become_one_copy() {
    let side = Side {
        plane: 0,
        plane_step: 1,
        table: 0,
        first_block: 0,
        block_tokens: 4,
        cp: 1,
        cp_rank: 0,
        token_pitch: 8,
        head_pitch: 8,
        offset: 0,
    };
    let segment = Segment { source: side, destination: side, planes: 1, start: 0, end: 16, heads: 1, run_bytes: 8 };
    let table: Arc<[u32]> = Arc::from([0, 1, 2, 3]);
    let program = Program {
        segments: vec![segment],
        sources: vec![Some(table.clone())],
        destinations: vec![Some(table.clone())],
    };
    let plane = Plane { region: 0, offset: 0, blocks: 4, block_stride: 32, block_bytes: 32 };
    let layout = PoolLayout { regions: vec![128], planes: vec![plane] };
    assert_eq!(program.copies(program.whole(), &layout, &layout).count(), 1);
    let mut encoded = Vec::new();
    program.encode(&mut encoded);
    let mut once = Vec::new();
    program.without(End::Source).encode(&mut once);
    assert_eq!(encoded.len(), once.len() + 4, "a table that both ends share is encoded once");
    encoded.push(0);
    assert!(Program::decode(&encoded).is_err(), "trailing bytes are refused");
}
