#![no_main]

include!("../checks/yaml.rs");

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| yaml(bytes));
