#![no_main]

include!("../checks/elf.rs");

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| elf(bytes));
