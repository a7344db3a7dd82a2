//! How long tests wait for what must come.

use std::time::{Duration, Instant};

/// By how much everything takes longer than on a machine of its own: 1 or more. Virtual machines set it.
const VARIABLE: &str = "PROFILER_TEST_PATIENCE";

/// When a wait of this length ends that begins now.
pub fn end_of(wait: Duration) -> Instant {
    let factor = std::env::var(VARIABLE).ok().map(|factor| factor.parse().expect("a factor of patience"));
    Instant::now() + wait * factor.unwrap_or(1)
}
