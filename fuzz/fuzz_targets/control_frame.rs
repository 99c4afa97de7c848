#![no_main]

include!("../checks/control_frame.rs");

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| control_frame(bytes));
