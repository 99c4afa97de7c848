#![no_main]

include!("../checks/log.rs");

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| log(bytes));
