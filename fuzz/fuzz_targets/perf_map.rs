//! Any bytes as a perf map, whole or in two parts: the same ranges, each with a name inside the text.
#![no_main]

#[path = "../../profiler-agent/src/symbolize/perf_map.rs"]
#[expect(dead_code, reason = "the agent uses all of it")]
mod perf_map;

use libfuzzer_sys::fuzz_target;
use perf_map::{PerfMap, readable};

fuzz_target!(|text: &[u8]| {
    let mut whole = PerfMap::default();
    let taken = whole.take(text, 0);
    let mut parts = PerfMap::default();
    let first = parts.take(&text[..text.len() / 2], 0);
    parts.take(&text[first..], u32::try_from(first).expect("inputs are small"));
    for addr in [0, 0x1000, 0x1010, 0x2000, u64::MAX] {
        let found = whole.find(addr);
        assert_eq!(found, parts.find(addr));
        if let Some(at) = found {
            let name = &text[at.offset as usize..][..usize::from(at.bytes)];
            assert!(at.offset as usize + name.len() < taken);
            readable(&String::from_utf8_lossy(name));
        }
    }
});
