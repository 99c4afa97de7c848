//! The kernel's source, run by the processor, against the definition of a program: lowering and walking without a GPU.

use std::ffi::{CString, c_uint, c_ulonglong};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};

use kvferry_core::{End, Plane, PoolLayout, Program, Segment, Side, UnitRange};
use kvferry_transport::conformance::absent;
use kvferry_transport::{DeviceBlock, KnownRun};
use proptest::prelude::*;

use crate::even::{EVEN_BYTES, lower_even};
use crate::launch::{INLINE_BYTES, SMALL_BYTES};
use crate::planes::PlaneTable;
use crate::rectangle::{Payload, Walk, lower};

pub(crate) type Emulate =
    unsafe extern "C" fn(*const u8, c_uint, c_uint, c_uint, c_uint, c_uint, bool, c_uint) -> c_ulonglong;
pub(crate) type EmulateKnown =
    unsafe extern "C" fn(*const DeviceBlock, *const KnownRun, c_uint, c_ulonglong, *mut c_uint, c_uint, c_uint);

/// The kernels as functions of the processor; `None` where there is no C++ compiler.
pub(crate) fn kernel() -> Option<&'static Mutex<(Emulate, EmulateKnown)>> {
    static KERNEL: OnceLock<Option<Mutex<(Emulate, EmulateKnown)>>> = OnceLock::new();
    let build = || {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels");
        let library = std::env::temp_dir().join(format!("kvferry-walk-{}.so", std::process::id()));
        let mut compiler = Command::new("c++");
        compiler.args(["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-x", "c++", "-o"]).arg(&library);
        let output = match compiler.arg(format!("{folder}/emulated.h")).output() {
            Ok(output) => output,
            Err(error) => {
                absent("c++", &format!("the kernel's source is not run here: c++ does not start ({error})"));
                return None;
            }
        };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let path = CString::new(library.to_str()?).ok()?;
        // SAFETY: the library was just built from our own source; it has no initialisers beyond the language's.
        let emulate = unsafe {
            let handle = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
            assert!(!handle.is_null(), "the emulated kernel does not load");
            let [walk, known] = [c"emulate", c"emulate_known"].map(|name| libc::dlsym(handle, name.as_ptr()));
            assert!(!walk.is_null() && !known.is_null(), "the emulated kernels have no entries");
            let known = std::mem::transmute::<*mut libc::c_void, EmulateKnown>(known);
            (std::mem::transmute::<*mut libc::c_void, Emulate>(walk), known)
        };
        let _left_behind = std::fs::remove_file(&library);
        Some(Mutex::new(emulate))
    };
    KERNEL.get_or_init(build).as_ref()
}

/// A side's memory, with room around it, and where its planes are.
pub(crate) struct Memory {
    bytes: Vec<u8>,
    base: u64,
    pub(crate) planes: Vec<[u64; 2]>,
}

impl Memory {
    pub(crate) fn new(layout: &PoolLayout, shift: usize, fill: impl Fn(usize) -> u8) -> Memory {
        let length = layout.regions.first().copied().unwrap_or(0) as usize;
        let mut bytes = vec![0; length + 64];
        let start = bytes.as_ptr().align_offset(32) + shift;
        bytes.iter_mut().skip(start).take(length).enumerate().for_each(|(at, byte)| *byte = fill(at));
        let base = bytes.as_ptr() as u64 + start as u64;
        let planes = layout.planes.iter().map(|plane| [base + plane.offset, plane.block_stride]).collect();
        Memory { bytes, base, planes }
    }

    fn table(&self) -> PlaneTable<'_> {
        PlaneTable {
            address: self.planes.as_ptr() as u64,
            entries: &self.planes,
            step: crate::planes::step(&self.planes),
        }
    }

    pub(crate) fn region(&self, layout: &PoolLayout) -> &[u8] {
        let start = (self.base - self.bytes.as_ptr() as u64) as usize;
        &self.bytes[start..start + layout.regions[0] as usize]
    }
}

/// How a kernel is told what to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    AtLaunch,
    /// Later, to one that stands by for it.
    Later,
    /// Never, to one that stands by.
    Never,
}

/// Runs a kernel, and says how many accesses a GPU would refuse, and whether its end is not told as it should be.
pub(crate) fn run(payload: &Payload, blocks: u32, warps: u32) -> u64 {
    run_told(Told::AtLaunch, payload, blocks, warps)
}

fn run_told(told: Told, payload: &Payload, blocks: u32, warps: u32) -> u64 {
    let Some(kernel) = kernel() else { return 0 };
    // Of eight-byte words, as GPU memory is aligned, and as long as what travels as an argument.
    let mut words = vec![0u64; payload.bytes.len().max(INLINE_BYTES).div_ceil(8)];
    for (word, bytes) in words.iter_mut().zip(payload.bytes.chunks(8)) {
        let mut whole = [0; 8];
        whole[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_le_bytes(whole);
    }
    let (rectangles, items) = (payload.rectangles, payload.items);
    let argument = [SMALL_BYTES, INLINE_BYTES].into_iter().find(|room| payload.bytes.len() <= *room).unwrap_or(0);
    // Nothing in it is poisoned by a panic: it is code.
    let emulate = kernel.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let is_even = payload.walk == Walk::Even;
    // SAFETY: the payload was lowered from a valid program over the memories that its plane tables name, which the caller holds.
    unsafe {
        emulate.0(words.as_ptr().cast(), rectangles, items, blocks, warps, argument as c_uint, is_even, told as c_uint)
    }
}

#[derive(Clone, Debug)]
struct SideSpec {
    block_tokens: u32,
    cp: u32,
    cp_rank: u32,
    plane: u32,
    plane_step: u32,
    head_major: bool,
    gaps: [u64; 3],
    seed: u64,
    shift: usize,
    /// More and more room between planes: they do not follow each other evenly.
    spread: u64,
}

fn side() -> impl Strategy<Value = SideSpec> {
    let blocks = prop::sample::select(vec![1u32, 2, 3, 4, 8, 16, 24, 64]);
    let gaps = prop::array::uniform3(prop::sample::select(vec![0u64, 0, 0, 0, 5, 16]));
    let shift = prop::sample::select(vec![0usize, 0, 0, 1, 2, 4, 8]);
    (blocks, 1u32..4, any::<u32>(), 0u32..3, 1u32..3, any::<bool>(), gaps, any::<u64>(), shift).prop_map(
        |(block_tokens, cp, rank, plane, plane_step, head_major, gaps, seed, shift)| SideSpec {
            block_tokens,
            cp,
            cp_rank: rank % cp,
            plane,
            plane_step,
            head_major,
            gaps,
            seed,
            shift,
            spread: 0,
        },
    )
}

#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) program: Program,
    pub(crate) layouts: [PoolLayout; 2],
    pub(crate) shifts: [usize; 2],
}

fn build(spec: &SideSpec, planes: u32, tokens: (u64, u64), heads: u32, run: u32) -> (Side, Arc<[u32]>, PoolLayout) {
    let (run, count, block) = (u64::from(run), u64::from(heads), u64::from(spec.block_tokens));
    let narrow = run + spec.gaps[0];
    let (token_pitch, head_pitch) =
        if spec.head_major { (narrow, narrow * block + spec.gaps[1]) } else { (narrow * count + spec.gaps[1], narrow) };
    let block_bytes = spec.gaps[2] + (block - 1) * token_pitch + (count - 1) * head_pitch + run;
    let first_block = tokens.0 / (block * u64::from(spec.cp));
    let needed = tokens.1.max(1).div_ceil(block * u64::from(spec.cp)).max(first_block) - first_block;
    let mut ids: Vec<u32> = (0..needed as u32 + 2).collect();
    let mut state = spec.seed | 1;
    for index in (1..ids.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ids.swap(index, (state >> 33) as usize % (index + 1));
    }
    let pool = ids.len() as u32;
    ids.truncate(needed as usize);
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
    let total = u64::from(spec.plane + (planes - 1) * spec.plane_step + 1);
    let offset = |index| index * plane_bytes + index * index * spec.spread;
    let plane =
        |index| Plane { region: 0, offset: offset(index), blocks: pool, block_stride: block_bytes, block_bytes };
    let layout = PoolLayout { regions: vec![offset(total)], planes: (0..total).map(plane).collect() };
    (side, ids.into(), layout)
}

pub(crate) fn case() -> impl Strategy<Value = Case> {
    let runs = prop::sample::select(vec![1u32, 2, 3, 7, 16, 64, 96, 128, 1000, 5000]);
    (side(), side(), 1u32..4, 0u64..90, 0u64..200, 1u32..4, runs).prop_map(
        |(from, to, planes, start, length, heads, run)| {
            // Large runs of few tokens, small runs of many.
            let end = start + if run > 500 { length / 8 } else { length };
            let shifts = [from.shift, to.shift];
            let (source, sources, source_layout) = build(&from, planes, (start, end), heads, run);
            let (destination, destinations, destination_layout) = build(&to, planes, (start, end), heads, run);
            let segment = Segment { source, destination, planes, start, end, heads, run_bytes: run };
            let (sources, destinations) = (vec![Some(sources)], vec![Some(destinations)]);
            // The same once more, as K and V are: an interrupted range then spans segments.
            let program = Program { segments: vec![segment], sources, destinations };
            Case { program, layouts: [source_layout, destination_layout], shifts }
        },
    )
}

/// Copies a range by a kernel and by the definition, and compares every byte of the destination. `false` if that kernel does not take it.
fn compare(walk: Walk, case: &Case, range: UnitRange, (blocks, warps): (u32, u32)) -> bool {
    let Case { program, layouts: [from, to], shifts } = case;
    program.validate(End::Source, from).unwrap();
    program.validate(End::Destination, to).unwrap();
    let source = Memory::new(from, shifts[0], |at| (at as u32).wrapping_mul(2_654_435_761) as u8 ^ (at >> 9) as u8);
    let destination = Memory::new(to, shifts[1], |_| 0xee);
    let tables = [source.table(), destination.table()];
    let payload = match walk {
        Walk::Tokens => lower(program, range, tables.map(|table| table.address)).unwrap(),
        Walk::Even => match lower_even(program, range, tables) {
            Some(payload) => payload,
            None => return false,
        },
    };
    let mut due = destination.region(to).to_vec();
    for copy in program.copies(range, from, to) {
        let (at, bytes) = (copy.source.offset as usize, copy.bytes as usize);
        let place = copy.destination.offset as usize;
        due[place..place + bytes].copy_from_slice(&source.region(from)[at..at + bytes]);
    }
    let stands_by = walk == Walk::Even && payload.bytes.len() <= INLINE_BYTES && (blocks + warps).is_multiple_of(2);
    let told = if stands_by { Told::Later } else { Told::AtLaunch };
    assert_eq!(run_told(told, &payload, blocks, warps), 0, "accesses that a GPU refuses");
    if kernel().is_some() {
        let moved = destination.region(to);
        let wrong = moved.iter().zip(&due).position(|(is, due)| is != due);
        assert_eq!(wrong, None, "first wrong byte; {payload:?}");
    }
    true
}

/// Programs whose pieces are even, but for blocks that are taken in part.
fn even_case() -> impl Strategy<Value = Case> {
    let runs = prop::sample::select(vec![16u32, 48, 256, 1024, 2048, 2064, 4096, 6160]);
    let spreads = prop::array::uniform2(prop::sample::select(vec![0u64, 0, 16, 48]));
    let blocks = prop::sample::select(vec![1u32, 2, 3, 4, 8, 16, 24, 64]);
    let pitch = prop::sample::select(vec![0u64, 16, 80]);
    (side(), side(), spreads, pitch, (1u32..4, 1u32..5, blocks), (0u64..90, 0u64..200), runs).prop_map(
        |(from, to, spreads, pitch, (planes, heads, same), (start, length), run)| {
            let end = start + if run > 500 { length / 8 } else { length };
            // Heads that lie apart are even only in whole blocks, of the same size on both sides.
            let head_major = from.head_major && heads > 1;
            let (start, end, block) = if head_major {
                let whole = |token: u64| token / u64::from(same) * u64::from(same);
                (whole(start), whole(end), Some(same))
            } else {
                (start, end, None)
            };
            let spec = |side: &SideSpec, spread| SideSpec {
                block_tokens: block.unwrap_or(side.block_tokens),
                cp: 1,
                cp_rank: 0,
                head_major,
                gaps: [0, 0, pitch],
                shift: side.shift / 4 * 16,
                spread,
                ..side.clone()
            };
            let (from, to) = (spec(&from, spreads[0]), spec(&to, spreads[1]));
            let shifts = [from.shift, to.shift];
            let (source, sources, source_layout) = build(&from, planes, (start, end), heads, run);
            let (destination, destinations, destination_layout) = build(&to, planes, (start, end), heads, run);
            let segment = Segment { source, destination, planes, start, end, heads, run_bytes: run };
            let (sources, destinations) = (vec![Some(sources)], vec![Some(destinations)]);
            let program = Program { segments: vec![segment], sources, destinations };
            Case { program, layouts: [source_layout, destination_layout], shifts }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn the_kernel_moves_what_the_program_says(
        case in case(),
        cut in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
        grid in (1u32..4, 1u32..5),
    ) {
        let units = case.program.units() as usize + 1;
        let (a, b) = (cut.0.index(units) as u64, cut.1.index(units) as u64);
        for walk in [Walk::Tokens, Walk::Even] {
            compare(walk, &case, case.program.whole(), grid);
            compare(walk, &case, UnitRange { start: a.min(b), end: a.max(b) }, grid);
        }
    }

    #[test]
    fn the_short_kernel_moves_what_is_even(
        case in even_case(),
        cut in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
        grid in (1u32..20, 1u32..5),
    ) {
        prop_assert!(compare(Walk::Even, &case, case.program.whole(), grid), "even, but not lowered");
        let units = case.program.units() as usize + 1;
        let (a, b) = (cut.0.index(units) as u64, cut.1.index(units) as u64);
        compare(Walk::Even, &case, UnitRange { start: a.min(b), end: a.max(b) }, grid);
    }

    #[test]
    fn parts_together_are_the_whole(case in case(), parts in 1u32..6) {
        let Case { program, layouts: [from, to], shifts } = &case;
        let source = Memory::new(from, shifts[0], |at| (at % 251) as u8);
        let destination = Memory::new(to, shifts[1], |_| 0xee);
        let mut due = destination.region(to).to_vec();
        for copy in program.copies(program.whole(), from, to) {
            let (at, bytes, place) = (copy.source.offset as usize, copy.bytes as usize, copy.destination.offset as usize);
            due[place..place + bytes].copy_from_slice(&source.region(from)[at..at + bytes]);
        }
        let planes = [source.table().address, destination.table().address];
        for range in program.split(parts) {
            prop_assert_eq!(run(&lower(program, range, planes).unwrap(), 2, 2), 0);
        }
        if kernel().is_some() {
            prop_assert!(destination.region(to) == due.as_slice());
        }
    }
}

/// Programs of which no two neighbouring blocks can be merged, and of whose blocks one side's are whole multiples of the other's.
fn apart_case() -> impl Strategy<Value = (SideSpec, SideSpec, (u32, u64, u64, u32))> {
    let sizes = prop::sample::select(vec![(1u32, 1u32), (1, 16), (4, 4), (16, 16), (64, 16), (8, 24), (24, 8)]);
    (side(), side(), sizes, (1u32..4, 0u64..90, 0u64..200, 1u32..4)).prop_map(|(from, to, (one, other), shape)| {
        let apart =
            |side: SideSpec, block_tokens| SideSpec { block_tokens, gaps: [side.gaps[0], side.gaps[1], 5], ..side };
        (apart(from, one), apart(to, other), shape)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn pieces_are_what_is_moved(
        (from, to, (planes, start, length, heads)) in apart_case(),
        cut in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
    ) {
        let tokens = (start, start + length);
        let (source, sources, source_layout) = build(&from, planes, tokens, heads, 16);
        let (destination, destinations, destination_layout) = build(&to, planes, tokens, heads, 16);
        let segment = Segment { source, destination, planes, start, end: tokens.1, heads, run_bytes: 16 };
        let program = Program {
            segments: vec![segment],
            sources: vec![Some(sources)],
            destinations: vec![Some(destinations)],
        };
        let units = program.units() as usize + 1;
        let (a, b) = (cut.0.index(units) as u64, cut.1.index(units) as u64);
        for range in [program.whole(), UnitRange { start: a.min(b), end: a.max(b) }] {
            let due = program.copies(range, &source_layout, &destination_layout).count() as u64;
            prop_assert_eq!(lower(&program, range, [0, 0]).unwrap().pieces, due);
        }
    }
}

#[test]
fn several_segments_share_their_tables() {
    let (tokens, heads, run) = ((0, 1000), 2, 128);
    let (source, sources, from) = build(&plain_side(16, 3), 5, tokens, heads, run);
    let (destination, destinations, to) = build(&plain_side(64, 9), 5, tokens, heads, run);
    let segment = Segment { source, destination, planes: 5, start: 0, end: 1000, heads, run_bytes: run };
    // The layouts have nine planes: 0, 2 .. 8 for K, and 1, 3, 5, 7 for V.
    let other = Segment {
        source: Side { plane: 1, ..source },
        destination: Side { plane: 1, ..destination },
        planes: 4,
        start: 17,
        ..segment
    };
    let (sources, destinations) = (vec![Some(sources)], vec![Some(destinations)]);
    let program = Program { segments: vec![segment, other], sources, destinations };
    let payload = lower(&program, program.whole(), [0, 0]).unwrap();
    assert_eq!(payload.rectangles, 2);
    assert_eq!(payload.bytes.len(), 2 * 160 + 4 * (63 + 16), "each table is there once");
    let case = Case { program, layouts: [from, to], shifts: [0, 0] };
    for part in case.program.split(7) {
        compare(Walk::Tokens, &case, part, (3, 4));
        assert!(compare(Walk::Even, &case, part, (3, 4)));
    }
    compare(Walk::Tokens, &case, case.program.whole(), (1, 1));
}

fn plain_side(block_tokens: u32, seed: u64) -> SideSpec {
    SideSpec {
        block_tokens,
        cp: 1,
        cp_rank: 0,
        plane: 0,
        plane_step: 2,
        head_major: false,
        gaps: [0; 3],
        seed,
        shift: 0,
        spread: 0,
    }
}

/// Two tensors with planes in turn, the same tokens of each.
fn twins(blocks: [u32; 2], tokens: u64) -> Case {
    let (heads, run) = (2, 128);
    let (source, sources, from) = build(&plain_side(blocks[0], 3), 5, (0, tokens), heads, run);
    let (destination, destinations, to) = build(&plain_side(blocks[1], 9), 5, (0, tokens), heads, run);
    let first = Segment { source, destination, planes: 5, start: 0, end: tokens, heads, run_bytes: run };
    let (source, destination) = (Side { plane: 1, ..source }, Side { plane: 1, ..destination });
    let second = Segment { source, destination, planes: 4, ..first };
    let (sources, destinations) = (vec![Some(sources)], vec![Some(destinations)]);
    let program = Program { segments: vec![first, second], sources, destinations };
    Case { program, layouts: [from, to], shifts: [0, 0] }
}

#[test]
fn tensors_that_differ_in_planes_share_their_places() {
    // Whole blocks; and one in part, of which there is a rectangle more each.
    for (tokens, rectangles, places) in [(992, 2, 62), (1000, 4, 63)] {
        let case = twins([16, 64], tokens);
        let table = |layout| Memory::new(layout, 0, |_| 0);
        let memories = [table(&case.layouts[0]), table(&case.layouts[1])];
        let payload =
            lower_even(&case.program, case.program.whole(), [memories[0].table(), memories[1].table()]).unwrap();
        assert_eq!(
            (payload.rectangles, payload.bytes.len()),
            (rectangles, rectangles as usize * EVEN_BYTES + 8 * places)
        );
        assert_eq!(payload.pieces, 9 * places as u64);
        assert!(compare(Walk::Even, &case, case.program.whole(), (3, 4)));
    }
}

#[test]
fn a_kernel_that_stands_by_in_vain_moves_nothing() {
    let Case { program, layouts: [from, to], .. } = twins([16, 64], 992);
    let memories = [Memory::new(&from, 0, |_| 1), Memory::new(&to, 0, |_| 0xee)];
    let [source, destination] = &memories;
    let payload = lower_even(&program, program.whole(), [source.table(), destination.table()]).unwrap();
    for blocks in [1, 3, 20] {
        assert_eq!(run_told(Told::Never, &payload, blocks, 4), 0);
        assert!(destination.region(&to).iter().all(|byte| *byte == 0xee));
    }
}

#[test]
fn many_places_come_in_memory_of_their_own() {
    let case = twins([1, 1], INLINE_BYTES as u64 / 8 + 1);
    assert!(compare(Walk::Even, &case, case.program.whole(), (17, 3)));
}

#[test]
fn what_is_not_even_is_left_to_the_general_kernel() {
    let even = twins([16, 64], 992);
    let is_taken = |case: &Case| compare(Walk::Even, case, case.program.whole(), (2, 2));
    assert!(is_taken(&even));
    // Odd addresses, runs or heads that lie apart, blocks dealt out among ranks.
    assert!(!is_taken(&Case { shifts: [8, 0], ..even.clone() }));
    let with = |change: fn(&mut Segment)| {
        let mut case = even.clone();
        case.program.segments.iter_mut().for_each(change);
        case
    };
    assert!(!is_taken(&with(|segment| segment.run_bytes = 120)));
    assert!(!is_taken(&with(|segment| segment.heads = 1)));
    assert!(!is_taken(&with(|segment| segment.source.cp = 2)));
}
