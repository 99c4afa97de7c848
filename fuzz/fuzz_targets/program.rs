#![no_main]

include!("../checks/program.rs");

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| program(bytes));
