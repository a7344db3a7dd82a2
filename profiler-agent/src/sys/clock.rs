//! The boot clock, which the kernel side stamps samples with, and its distance to the wall clock.

use std::time::Duration;

/// Nanoseconds since boot, time in suspend included. Source: clock_gettime(2), CLOCK_BOOTTIME.
pub(crate) fn boot_ns() -> u64 {
    read(libc::CLOCK_BOOTTIME)
}

/// Nanoseconds since the Unix epoch. Source: clock_gettime(2), CLOCK_REALTIME.
pub(crate) fn wall_ns() -> u64 {
    read(libc::CLOCK_REALTIME)
}

fn read(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec that outlives the call.
    let status = unsafe { libc::clock_gettime(clock, &raw mut time) };
    assert_eq!(status, 0, "clock_gettime knows clock {clock}");
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}

/// Maps boot-clock times to wall-clock times.
///
/// The two differ by an offset that changes when somebody sets the clock and, by microseconds, while NTP slews it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WallClock {
    /// Wall time minus boot time, in nanoseconds.
    offset_ns: i64,
}

impl WallClock {
    /// A jump of the wall clock that is not slewing: NTP slews by at most 500 ppm, 5 ms in a 10 s window.
    const STEP_NS: u64 = 100_000_000;

    /// Readings of the boot clock farther apart than this had the thread preempted between them.
    const GAP_NS: u64 = 1_000_000;
    const READINGS_MAX: u32 = 8;

    /// The offset as it is now.
    pub(crate) fn now() -> Self {
        Self::read(boot_ns, wall_ns)
    }

    /// Reads the wall clock between two readings of the boot clock. Half their distance is the error, so that they are
    /// repeated until they are close together; the closest ones count when none are.
    fn read(mut boot: impl FnMut() -> u64, mut wall: impl FnMut() -> u64) -> Self {
        let mut reading = || {
            let before = boot();
            let wall = wall();
            let gap = boot().saturating_sub(before);
            (gap, Self::from_readings(wall, before + gap / 2))
        };
        let mut best = reading();
        for _ in 1..Self::READINGS_MAX {
            if best.0 <= Self::GAP_NS {
                break;
            }
            let next = reading();
            if next.0 < best.0 {
                best = next;
            }
        }
        best.1
    }

    fn from_readings(wall_ns: u64, boot_ns: u64) -> Self {
        Self { offset_ns: wall_ns.cast_signed().wrapping_sub(boot_ns.cast_signed()) }
    }

    /// A clock at a known distance.
    #[cfg(test)]
    pub(crate) fn with_offset(offset_ns: i64) -> Self {
        Self { offset_ns }
    }

    /// The wall time of a boot time.
    pub(crate) fn at(self, boot_ns: u64) -> u64 {
        boot_ns.wrapping_add_signed(self.offset_ns)
    }

    /// The boot time of a wall time.
    pub(crate) fn boot_of(self, wall_ns: u64) -> u64 {
        wall_ns.wrapping_add_signed(self.offset_ns.wrapping_neg())
    }

    /// Somebody has set the clock between the two readings.
    pub(crate) fn stepped_from(self, earlier: Self) -> bool {
        self.offset_ns.abs_diff(earlier.offset_ns) > Self::STEP_NS
    }
}

/// Time until the boot clock shows `boot_ns`; zero when it has.
pub(crate) fn until(boot_ns_then: u64) -> Duration {
    Duration::from_nanos(boot_ns_then.saturating_sub(boot_ns()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_and_wall_times_map_to_each_other() {
        let clock = WallClock::from_readings(1_700_000_000_000_000_000, 5_000_000_000);
        assert_eq!(clock.at(6_000_000_000), 1_700_000_001_000_000_000);
        assert_eq!(clock.boot_of(1_700_000_001_000_000_000), 6_000_000_000);
    }

    #[test]
    fn slewing_is_not_a_step_and_setting_the_clock_is() {
        let before = WallClock::from_readings(1_000_000_000_000, 0);
        assert!(!WallClock::from_readings(1_000_005_000_000, 0).stepped_from(before));
        assert!(WallClock::from_readings(1_000_200_000_000, 0).stepped_from(before));
        assert!(WallClock::from_readings(0, 0).stepped_from(before));
    }

    #[test]
    fn being_preempted_between_the_readings_is_not_a_step() {
        const OFFSET_NS: u64 = 1_000_000_000_000;
        let now = std::cell::Cell::new(5_000_000_000);
        // Preempted for 300 ms behind the first two readings of the wall clock, and never again.
        let mut preemptions = [300_000_000, 300_000_000].into_iter();
        let wall = || {
            let wall = now.get() + OFFSET_NS;
            now.set(now.get() + preemptions.next().unwrap_or(0));
            wall
        };
        let here = WallClock::read(|| now.replace(now.get() + 100), wall);
        let there = WallClock::with_offset(OFFSET_NS.cast_signed());
        assert!(!here.stepped_from(there), "{here:?} is {there:?}");
        assert!(here.offset_ns.abs_diff(there.offset_ns) < WallClock::GAP_NS, "{here:?} is {there:?}");
    }

    #[test]
    fn a_machine_on_which_every_reading_is_slow_still_has_an_offset() {
        let now = std::cell::Cell::new(0);
        let boot = || now.replace(now.get() + 50_000_000);
        let here = WallClock::read(boot, || 7_000_000_000);
        assert!(here.offset_ns > 6_000_000_000, "{here:?}");
    }

    #[test]
    fn the_wall_clock_read_now_agrees_with_the_system() {
        let here = WallClock::now().at(boot_ns());
        assert!(here.abs_diff(wall_ns()) < 1_000_000_000, "{here}");
    }
}
