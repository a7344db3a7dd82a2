//! How long tests wait for what must come.

use std::time::{Duration, Instant};

/// By how much everything takes longer than on a machine of its own: 1 or more. Virtual machines set it.
const VARIABLE: &str = "PROFILER_TEST_PATIENCE";

/// Asks every `pause` until there is an answer; gives up after `wait` with what the agent has logged.
pub fn wait_for<T>(
    wait: Duration,
    pause: Duration,
    what: &str,
    log: impl Fn() -> String,
    mut probe: impl FnMut() -> Option<T>,
) -> T {
    let end = end_of(wait);
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < end, "never: {what}\n--- agent's log\n{}", log());
        std::thread::sleep(pause);
    }
}

/// When a wait of this length ends that begins now.
pub fn end_of(wait: Duration) -> Instant {
    let factor = std::env::var(VARIABLE).ok().map(|factor| factor.parse().expect("a factor of patience"));
    Instant::now() + wait * factor.unwrap_or(1)
}
