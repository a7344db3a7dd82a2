//! Any bytes as Go's table of functions: a look-up ends, and gives as many functions as it may. Seeds: `.gopclntab` of small
//! Go programs.
#![no_main]

#[path = "../../profiler-agent/src/symbolize/pclntab.rs"]
mod pclntab;

use libfuzzer_sys::fuzz_target;
use pclntab::{Module, Pclntab};

fuzz_target!(|input: (u64, u64, Vec<u8>)| {
    let (addr, trees_at, bytes) = input;
    let module = Module { text: 0x1000, trees_at: Some(trees_at) };
    let Some(table) = Pclntab::new(bytes.as_slice(), module) else { return };
    for addr in [addr, 0, 0x1000, 0x1010, u64::MAX] {
        assert!(table.find(addr).len() <= 64);
    }
});
