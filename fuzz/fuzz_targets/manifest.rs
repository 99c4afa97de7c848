#![no_main]

include!("../checks/manifest.rs");

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| manifest(bytes));
