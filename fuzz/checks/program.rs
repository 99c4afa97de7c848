// What is done with a program of a peer. Shared by the fuzz target and the corpus test, by `include!`.

use kvferry_core::{End, Plane, PoolLayout, Program};

/// Decodes `bytes`, validates at both ends, and walks what is valid: every copy must lie inside the pools.
fn program(bytes: &[u8]) {
    let Ok(program) = Program::decode(bytes) else { return };
    let mut again = Vec::new();
    program.encode(&mut again);
    assert!(Program::decode(&again).as_ref() == Ok(&program), "{program:?} does not come back");
    // Four planes of 64 blocks of 4 KiB.
    let (blocks, block_bytes) = (64u32, 4096u64);
    let plane_bytes = u64::from(blocks) * block_bytes;
    let plane = |index| Plane { region: 0, offset: index * plane_bytes, blocks, block_stride: block_bytes, block_bytes };
    let layout = PoolLayout { regions: vec![4 * plane_bytes], planes: (0..4).map(plane).collect() };
    let valid = [End::Source, End::Destination].into_iter().all(|end| program.validate(end, &layout).is_ok());
    let (units, bytes) = (program.units(), program.bytes());
    // What claims to be large is not walked to its end here.
    if valid && units <= 1 << 12 && bytes <= 1 << 24 {
        let mut moved = 0;
        for copy in program.copies(program.whole(), &layout, &layout) {
            for place in [copy.source, copy.destination] {
                let end = place.offset.checked_add(copy.bytes);
                assert!(end.is_some_and(|end| end <= 4 * plane_bytes), "{copy:?} lies outside the pool");
            }
            moved += copy.bytes;
        }
        assert!(moved == bytes, "{moved} of {bytes} bytes were walked");
    }
}
