#![no_main]

include!("../checks/config.rs");

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| config(bytes));
