//! Libraries that are cut, damaged, hostile: an error with its place, in bounded time and memory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "this is test code")]

use std::path::Path;

use proptest::prelude::*;

include!("../../../../fuzz/checks/corpus.rs");
include!("../../../../fuzz/checks/elf.rs");

fn library(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../fuzz/corpus/elf").join(name)).unwrap()
}

#[test]
fn the_corpus_is_survived() {
    survive("elf", elf);
}

#[test]
fn a_plugin_is_read_whole() {
    let elf = Elf::parse(&library("plugin")[..]).unwrap();
    assert_eq!(elf.soname.as_deref(), Some("libplugin_FAKE.so"));
    assert_eq!(elf.needed, ["libnixl.so", "libc.so.6"]);
    assert_eq!(elf.rpath, ["$ORIGIN/..", "$ORIGIN/../../nixl.libs"]);
    assert!(elf.defined.contains_key("nixl_plugin_init"));
    let undefined: Vec<_> = elf.undefined.iter().map(|symbol| symbol.name.as_str()).collect();
    assert!(undefined.contains(&"_Z15nixl_null_agentv"), "{undefined:?}");
    let puts = elf.undefined.iter().find(|symbol| symbol.name == "puts").unwrap();
    assert_eq!(puts.version.as_deref(), Some("GLIBC_2.2.5"));
    assert!(elf.versions_needed.contains(&("libc.so.6".to_owned(), "GLIBC_2.2.5".to_owned())));
    let vtable = elf.vtable.unwrap();
    let slots: Vec<_> = vtable.slots.iter().map(|slot| slot.as_deref().unwrap()).collect();
    assert_eq!(
        slots,
        ["_ZN17nixlBackendEngine7connectEv", "_ZNK17nixlBackendEngine9getNotifsEi", "__cxa_pure_virtual"]
    );
    assert_eq!(vtable.bytes, 40);
}

/// Run paths of the new kind, and symbols of versions that the library defines itself.
#[test]
fn versions_and_run_paths_are_read() {
    let elf = Elf::parse(&library("versioned")[..]).unwrap();
    assert_eq!((elf.rpath.len(), elf.runpath), (0, vec!["/opt/nixl".to_owned()]));
    assert!(elf.versions.contains("FAKE_1") && elf.versions.contains("FAKE_2"), "{:?}", elf.versions);
    assert_eq!(elf.defined["fake"], ["FAKE_2"]);
}

#[test]
fn what_is_no_library_is_refused_with_its_place() {
    for (bytes, words) in [
        (&b""[..], ["byte 0x0", "the file header"]),
        (b"#!/bin/sh\n", ["byte 0x0", "the file header"]),
        (&library("plugin")[..64], ["byte 0x", "the section table"]),
    ] {
        let error = Elf::parse(bytes).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "no {word:?} in {error}");
        }
    }
    let missing = Elf::read(Path::new("/nonexistent")).unwrap_err();
    assert!(matches!(&missing, ElfError::Unreadable { .. }), "{missing}");
    assert!(Elf::read(Path::new("/")).is_err(), "a folder is no library");
    let pipe = std::env::temp_dir().join(format!("kvferry-elf-pipe-{}", std::process::id()));
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let refused = Elf::read(&pipe).unwrap_err().to_string();
    std::fs::remove_file(&pipe).unwrap();
    assert!(refused.contains("it is no file"), "{refused}");
}

proptest! {
    #[test]
    fn damaged_libraries_are_survived(at in any::<prop::sample::Index>(), bytes in prop::collection::vec(any::<u8>(), 1..16)) {
        let mut library = library("plugin");
        let at = at.index(library.len());
        for (place, byte) in library[at..].iter_mut().zip(bytes) {
            *place = byte;
        }
        elf(&library);
    }
}
