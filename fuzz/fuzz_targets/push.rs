//! Any bytes as what an agent sends: what is accepted is the same when it is written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use profiler_pprof::push::PushRequest;

fuzz_target!(|bytes: &[u8]| {
    let Ok(request) = PushRequest::from_bytes(bytes) else { return };
    let again = PushRequest::from_bytes(&request.to_bytes()).expect("it was accepted before");
    assert_eq!(again, request);
});
