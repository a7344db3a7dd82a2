//! Any bytes as a record of a perf event: a mapping that is read is not empty, and its name lies inside the record.
#![no_main]

#[path = "../../profiler-agent/src/sys/perf_record.rs"]
mod perf_record;

use libfuzzer_sys::fuzz_target;
use perf_record::{HEADER_BYTES, PerfRecord, parse};

fuzz_target!(|bytes: &[u8]| {
    // As it came, and with a header that says its length: else hardly any input would come behind that check.
    let _ = parse(bytes);
    let Ok(length) = u16::try_from(HEADER_BYTES + bytes.len()) else { return };
    let kind = if bytes.len().is_multiple_of(2) { 10u32 } else { 2 };
    let record = [&kind.to_ne_bytes()[..], &[0, 0], &length.to_ne_bytes(), bytes].concat();
    if let Some(PerfRecord::Mapped(mapped)) = parse(&record) {
        assert!(mapped.start < mapped.end);
        assert!(mapped.path.len() <= bytes.len() && !mapped.path.contains(&0));
    }
});
