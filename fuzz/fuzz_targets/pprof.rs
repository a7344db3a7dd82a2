//! Any bytes as a profile: what can be read is the same when it is written and read again, and what is sound can be merged.
#![no_main]

use libfuzzer_sys::fuzz_target;
use profiler_pprof::{DecodeLimits, check, decode, encode, merge};

const LIMITS: DecodeLimits = DecodeLimits { inflated_bytes_max: 1 << 20, decoded_bytes_max: 16 << 20 };

fuzz_target!(|bytes: &[u8]| {
    let Ok(profile) = decode(bytes, &LIMITS) else { return };
    let again = decode(&encode(&profile), &DecodeLimits::default());
    // Nothing but fields that are not known: written, it is empty.
    if let Ok(again) = again {
        assert_eq!(again, profile);
    }
    let is_sound = check(&profile).is_ok();
    if let Ok(merged) = merge(&[&profile, &profile]) {
        assert!(!is_sound || check(&merged).is_ok(), "{merged:?}");
    }
});
