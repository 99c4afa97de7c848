#![no_main]

include!("../checks/nixl.rs");

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| nixl(bytes));
