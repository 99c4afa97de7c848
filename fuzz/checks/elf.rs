// What is done with a library that somebody names. Shared by the fuzz target and the corpus test, by `include!`.

use kvferry_nixl_plugins::{Elf, ElfError};

/// Reads `bytes` as a library: what is wrong is said with its place, and what is right is bounded by the file.
fn elf(bytes: &[u8]) {
    match Elf::parse(bytes) {
        Ok(elf) => {
            if let Some(vtable) = elf.vtable {
                let slots = (vtable.bytes / 8).saturating_sub(2);
                assert!(vtable.slots.len() as u64 == slots, "{} slots in {} bytes", vtable.slots.len(), vtable.bytes);
            }
            // A symbol takes 24 bytes, a need 16; entries of version tables may overlap.
            let entries = elf.defined.len() + elf.undefined.len() + elf.needed.len();
            assert!(entries <= bytes.len() / 16 + 1, "{entries} entries in {} bytes", bytes.len());
        }
        Err(error) => {
            let text = error.to_string();
            assert!(matches!(error, ElfError::Malformed { .. } | ElfError::TooLarge { .. }), "{text}");
            assert!(text.starts_with("byte 0x") && text.contains("fetch it again"), "{text}");
        }
    }
}
