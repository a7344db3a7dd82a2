//! Sampled allocations on their way into profiles: those made in a window, and those in use at its end.

use profiler_common::heap::{AllocPart, LiveKey, PART_LIVE_FULL, PART_NOT_LIVE, SCALE_ONE};
use profiler_heap::Weight;

use super::{Live, Notes, Orders, Sample};
use crate::{
    label::SeriesLabels,
    normalize::Location,
    sys::clock::WallClock,
    window::{Closed, Counts, Full, Measure, OBJECT, Room, SampleLabels, Windows},
};

/// The worker's part of heap profiling.
pub(crate) struct HeapWindows {
    /// Allocations by when they were made.
    pub(crate) windows: Windows,
    live: Live,
    /// Tells those who attach of execs.
    pub(crate) orders: Orders,
    notes: Notes,
    room: Room,
}

impl HeapWindows {
    /// No allocation yet.
    pub(crate) fn new(windows: Windows, live: Live, orders: Orders, notes: Notes, room: Room) -> Self {
        Self { windows, live, orders, notes, room }
    }

    /// Adds a sampled allocation of `size` bytes, made at a boot time. Even if its window is full, it may be in use.
    pub(crate) fn add(
        &mut self,
        (series, labels, stack): (SeriesLabels, SampleLabels, Vec<Location>),
        (time_ns, size): (u64, u64),
        part: AllocPart,
        on_new: impl FnMut(&Location),
    ) -> Result<(), Full> {
        let AllocPart { pointer, target, rate, scale, flags } = part;
        let counts = counts(size, rate, scale);
        let key = LiveKey { pointer, target, reserved: 0 };
        let sample = Sample { time_ns, series: series.clone(), labels: labels.clone(), counts };
        if flags & PART_LIVE_FULL != 0 {
            self.live.lose(target, sample);
        } else if flags & PART_NOT_LIVE == 0 {
            self.live.insert(key, sample, &stack);
        }
        self.windows.at(time_ns).add_counts(series, labels, stack, counts, on_new)
    }

    /// Processes have other labels from now on, which `series` gives.
    pub(crate) fn relabel(&mut self, series: impl Fn(u32) -> SeriesLabels) {
        self.live.relabel(series);
    }

    /// Closes the windows whose samples are all there, and takes a snapshot when there was one.
    pub(crate) fn close_due(&mut self, complete_ns: u64, clock: WallClock) -> Vec<Closed> {
        let closed = self.windows.close_due(complete_ns, clock);
        let ends_ns = closed.iter().map(|window| clock.boot_of(window.start_unix_ns) + window.duration_ns);
        let at_ns = ends_ns.max();
        self.with_snapshot(closed, at_ns, clock)
    }

    /// Closes everything. All samples are there: the last snapshot is of now, even if the last window ended before.
    pub(crate) fn close_all(&mut self, now_ns: u64) -> Vec<Closed> {
        let closed = self.windows.close_all(now_ns);
        self.with_snapshot(closed, Some(now_ns), WallClock::now())
    }

    fn with_snapshot(&mut self, closed: Vec<Closed>, at_ns: Option<u64>, clock: WallClock) -> Vec<Closed> {
        let snapshot = at_ns.and_then(|at_ns| self.live.snapshot(at_ns, &self.room));
        let rate = self.notes.rate();
        let allocs = closed.into_iter().map(|window| {
            let mut window = Closed { measure: Measure::Allocs { rate }, ..window };
            let start_ns = clock.boot_of(window.start_unix_ns);
            for (series, text) in self.notes.of_window(start_ns, start_ns + window.duration_ns) {
                window.comment(&series, text);
            }
            window
        });
        allocs.chain(snapshot).collect()
    }
}

/// What one sample stands for.
fn counts(size: u64, rate: u32, scale: u32) -> Counts {
    // A sample of what is never sampled would be a record that was damaged: it stands for itself.
    let weight = Weight::of(size, rate).unwrap_or(Weight { objects: 1.0, bytes: size as f64 });
    let scale = f64::from(scale) / f64::from(SCALE_ONE);
    let objects = (weight.objects * scale * OBJECT as f64).round() as u64;
    Counts { samples: 1, value: (weight.bytes * scale).round() as u64, objects }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_stands_for_its_like() {
        assert_eq!(counts(100, 1, SCALE_ONE), Counts { samples: 1, value: 100, objects: OBJECT });
        let small = counts(16, 1 << 19, SCALE_ONE);
        assert!((32_000..33_500).contains(&(small.objects / OBJECT)), "{small:?}");
        assert!((520_000..530_000).contains(&small.value), "{small:?}");
        assert_eq!(counts(10, 0, SCALE_ONE), Counts { samples: 1, value: 10, objects: OBJECT });
    }

    #[test]
    fn a_sample_of_a_window_stands_for_the_gap_before_it_too() {
        let scaled = counts(100, 1, SCALE_ONE * 5 / 2);
        assert_eq!(scaled, Counts { samples: 1, value: 250, objects: OBJECT * 5 / 2 });
    }
}
