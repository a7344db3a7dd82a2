//! One interval of aggregation: open, add, close. Counts per series, stack and sample labels.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use crate::{
    label::SeriesLabels,
    ledger::ProfileType,
    normalize::Location,
    sys::{clock::WallClock, heap},
};

/// Windows open at once. Two in normal running: the current one, and the last one until the drain has passed its end.
/// More after a stall, when samples of many windows come at once.
const OPEN_MAX: usize = 64;
/// The first windows end this long after the start, so that the first flame graph comes early.
const FIRST_ENDS_NS: [u64; 2] = [1_000_000_000, 5_000_000_000];

/// Labels of samples inside a profile.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SampleLabels {
    /// Name of the process.
    pub(crate) comm: String,
    /// Name of the thread.
    pub(crate) thread_name: String,
    /// Process id in the initial pid namespace.
    pub(crate) pid: u32,
}

/// Bytes of the heap that labels take: names and values, in the nodes of a tree that are two thirds full.
fn series_bytes(series: &SeriesLabels) -> usize {
    const LABEL_BYTES: usize = 2 * size_of::<String>() * 3 / 2;
    series.iter().map(|(name, value)| LABEL_BYTES + name.len() + value.len()).sum()
}

impl SampleLabels {
    fn heap_bytes(&self) -> usize {
        let Self { comm, thread_name, pid: _ } = self;
        comm.capacity() + thread_name.capacity()
    }
}

/// What was counted for one stack under one set of labels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Samples.
    pub(crate) samples: u64,
    /// Sum of their values: nanoseconds of CPU time, or the bytes of all allocations or page faults that they stand for.
    pub(crate) value: u64,
    /// Allocations or page faults that they stand for, in units of 1/[`OBJECT`]; 0 for on-CPU samples.
    pub(crate) objects: u64,
}

/// One allocation in [`Counts::objects`]: sums of fixed point do not depend on their order.
pub(crate) const OBJECT: u64 = 1 << 16;

/// What the samples of a window were taken of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Measure {
    /// CPU time.
    Cpu,
    /// Allocations, made within the window. `rate`: mean bytes between samples.
    Allocs { rate: u32 },
    /// Allocations in use at its time; the window has no length.
    InUse { rate: u32 },
    /// Page faults, and the memory that came with them.
    PageFaults,
}

impl Measure {
    /// The account in which its samples are.
    pub(crate) fn profile_type(self) -> ProfileType {
        match self {
            Self::Cpu => ProfileType::Cpu,
            Self::Allocs { .. } | Self::InUse { .. } => ProfileType::Allocs,
            Self::PageFaults => ProfileType::PageFaults,
        }
    }
}

/// Position of a location in [`Window::locations`].
pub(crate) type LocationIndex = u32;

/// Gives equal values one number.
#[derive(Debug)]
struct Interner<T> {
    numbers: HashMap<T, u32>,
}

impl<T: Hash + Eq> Interner<T> {
    fn new() -> Self {
        Self { numbers: HashMap::new() }
    }

    /// The value's number.
    fn intern(&mut self, value: T) -> u32 {
        let next = u32::try_from(self.numbers.len()).expect("fewer than 2^32 values fit a window");
        *self.numbers.entry(value).or_insert(next)
    }

    /// The number of a value that has one.
    fn get(&self, value: &T) -> Option<u32> {
        self.numbers.get(value).copied()
    }

    /// The values by their numbers.
    fn into_values(self) -> Vec<T> {
        let mut pairs: Vec<_> = self.numbers.into_iter().collect();
        pairs.sort_unstable_by_key(|&(_, number)| number);
        pairs.into_iter().map(|(value, _)| value).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    series: u32,
    stack: u32,
    labels: u32,
}

/// Memory for all windows that are open or wait to be encoded, in bytes.
#[derive(Clone, Debug)]
pub(crate) struct Room {
    used: Arc<AtomicUsize>,
    max: usize,
}

impl Room {
    /// Room for so many bytes.
    pub(crate) fn new(max: usize) -> Self {
        Self { used: Arc::default(), max }
    }

    fn is_full(&self) -> bool {
        self.used.load(Relaxed) >= self.max
    }
}

/// What one window has taken of the room, as counted by the allocator; given back when it is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct Taken {
    room: Room,
    bytes: usize,
}

impl Taken {
    pub(crate) fn nothing(room: &Room) -> Self {
        Self { room: room.clone(), bytes: 0 }
    }

    fn add(&mut self, bytes: usize) {
        self.bytes += bytes;
        self.room.used.fetch_add(bytes, Relaxed);
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.room.used.fetch_sub(self.bytes, Relaxed);
    }
}

/// A window that takes samples. Holds everything they need, so that a process may exit at any time.
#[derive(Debug)]
pub(crate) struct Window {
    start_ns: u64,
    end_ns: u64,
    period_ns: u64,
    series: Interner<SeriesLabels>,
    locations: Interner<Location>,
    stacks: Interner<Box<[LocationIndex]>>,
    labels: Interner<SampleLabels>,
    counts: HashMap<Key, Counts>,
    taken: Taken,
}

/// There was no room for the sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

impl Window {
    /// A window for a snapshot at a boot time; [`Self::close_snapshot`] ends it.
    pub(crate) fn snapshot(at_ns: u64, room: &Room) -> Self {
        Self::new(at_ns, at_ns, 0, room)
    }

    /// Ends a snapshot. Its samples have been accounted for when they were taken, so it is of none.
    pub(crate) fn close_snapshot(self, clock: WallClock, measure: Measure) -> Closed {
        let end_ns = self.end_ns;
        Closed { samples: 0, measure, ..self.close(end_ns, clock) }
    }

    fn new(start_ns: u64, end_ns: u64, period_ns: u64, room: &Room) -> Self {
        Self {
            start_ns,
            end_ns,
            period_ns,
            series: Interner::new(),
            locations: Interner::new(),
            stacks: Interner::new(),
            labels: Interner::new(),
            counts: HashMap::new(),
            taken: Taken::nothing(room),
        }
    }

    /// Adds one sample of so many nanoseconds; `on_new` sees each location the first time it comes up in this window.
    pub(crate) fn add(
        &mut self,
        series: SeriesLabels,
        labels: SampleLabels,
        stack: Vec<Location>,
        value: u64,
        on_new: impl FnMut(&Location),
    ) -> Result<(), Full> {
        self.add_counts(series, labels, stack, Counts { samples: 1, value, objects: 0 }, on_new)
    }

    /// As [`Self::add`], for samples that were counted before.
    pub(crate) fn add_counts(
        &mut self,
        series: SeriesLabels,
        labels: SampleLabels,
        stack: Vec<Location>,
        added: Counts,
        mut on_new: impl FnMut(&Location),
    ) -> Result<(), Full> {
        let key = match self.known(&series, &labels, &stack) {
            Some(key) => key,
            None if self.taken.room.is_full() => return Err(Full),
            None => self.intern_counted(series, labels, stack, &mut on_new),
        };
        let counts = self.counts.entry(key).or_default();
        counts.samples += added.samples;
        counts.value = counts.value.saturating_add(added.value);
        counts.objects = counts.objects.saturating_add(added.objects);
        Ok(())
    }

    /// The key of a sample that has been seen before.
    fn known(&self, series: &SeriesLabels, labels: &SampleLabels, stack: &[Location]) -> Option<Key> {
        let stack: Option<Box<[_]>> = stack.iter().map(|location| self.locations.get(location)).collect();
        let key = Key {
            series: self.series.get(series)?,
            stack: self.stacks.get(&stack?)?,
            labels: self.labels.get(labels)?,
        };
        self.counts.contains_key(&key).then_some(key)
    }

    /// Interns a key and takes from the room what the window has grown by.
    fn intern_counted(
        &mut self,
        series: SeriesLabels,
        labels: SampleLabels,
        stack: Vec<Location>,
        on_new: &mut impl FnMut(&Location),
    ) -> Key {
        let mut others = 0;
        // Labels of a series are shared with the process table, for as long as the process is there.
        let shared = if self.series.get(&series).is_none() { series_bytes(&series) } else { 0 };
        let moved_in = shared + labels.heap_bytes() + stack.capacity() * size_of::<Location>();
        let before = heap::held_bytes();
        let key = self.intern(series, labels, stack, &mut |location| {
            let before = heap::held_bytes();
            on_new(location);
            others += heap::held_bytes() - before;
        });
        self.counts.entry(key).or_default();
        let grown = heap::held_bytes() - before - others;
        self.taken.add(moved_in.saturating_add_signed(grown));
        key
    }

    fn intern(
        &mut self,
        series: SeriesLabels,
        labels: SampleLabels,
        stack: Vec<Location>,
        on_new: &mut impl FnMut(&Location),
    ) -> Key {
        let indices = stack.into_iter().map(|location| {
            if self.locations.get(&location).is_none() {
                on_new(&location);
            }
            self.locations.intern(location)
        });
        let stack = indices.collect();
        Key {
            series: self.series.intern(series),
            stack: self.stacks.intern(stack),
            labels: self.labels.intern(labels),
        }
    }

    /// Samples in the window, counted from what it holds.
    pub(crate) fn samples(&self) -> u64 {
        self.counts.values().map(|counts| counts.samples).sum()
    }

    /// Ends the window at `end_ns` and sorts what it holds by series.
    fn close(self, end_ns: u64, clock: WallClock) -> Closed {
        let samples = self.samples();
        let Self { start_ns, end_ns: _, period_ns, series, locations, stacks, labels, counts, taken } = self;
        let mut by_series: Vec<_> = series.into_values().into_iter().map(Series::new).collect();
        for (Key { series, stack, labels }, counts) in counts {
            by_series[series as usize].samples.push(Entry { stack, labels, counts });
        }
        Closed {
            start_unix_ns: clock.at(start_ns),
            duration_ns: end_ns.saturating_sub(start_ns),
            period_ns,
            measure: Measure::Cpu,
            samples,
            series: by_series,
            locations: locations.into_values(),
            stacks: stacks.into_values(),
            labels: labels.into_values(),
            taken,
        }
    }
}

/// A closed window.
#[derive(Debug)]
pub(crate) struct Closed {
    /// Start, in nanoseconds since the Unix epoch.
    pub(crate) start_unix_ns: u64,
    /// Length in nanoseconds.
    pub(crate) duration_ns: u64,
    /// Sampling period of [`Measure::Cpu`], in nanoseconds.
    pub(crate) period_ns: u64,
    /// What was sampled.
    pub(crate) measure: Measure,
    /// Samples in the account that it holds.
    pub(crate) samples: u64,
    /// Samples by series.
    pub(crate) series: Vec<Series>,
    /// Locations, by [`LocationIndex`].
    pub(crate) locations: Vec<Location>,
    /// Stacks, leaf first, by number.
    pub(crate) stacks: Vec<Box<[LocationIndex]>>,
    /// Sample labels, by number.
    pub(crate) labels: Vec<SampleLabels>,
    /// Its share of the memory of all windows.
    #[expect(dead_code, reason = "given back when the window is dropped")]
    pub(crate) taken: Taken,
}

/// The samples of one series.
#[derive(Debug)]
pub(crate) struct Series {
    /// What identifies it.
    pub(crate) labels: SeriesLabels,
    /// Its samples.
    pub(crate) samples: Vec<Entry>,
    /// What its profile says besides.
    pub(crate) comments: Vec<String>,
}

impl Series {
    fn new(labels: SeriesLabels) -> Self {
        Self { labels, samples: Vec::new(), comments: Vec::new() }
    }
}

impl Closed {
    /// Has the profile of a series say something, even if it has no samples.
    pub(crate) fn comment(&mut self, labels: &SeriesLabels, text: String) {
        let known = self.series.iter().position(|series| series.labels == *labels);
        let index = known.unwrap_or_else(|| {
            self.series.push(Series::new(labels.clone()));
            self.series.len() - 1
        });
        self.series[index].comments.push(text);
    }
}

/// One line of a series: a stack under one set of sample labels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// Number in [`Closed::stacks`].
    pub(crate) stack: u32,
    /// Number in [`Closed::labels`].
    pub(crate) labels: u32,
    /// What was counted.
    pub(crate) counts: Counts,
}

/// The open windows, oldest first. Samples go to windows by their own time, not by when they were drained.
#[derive(Debug)]
pub(crate) struct Windows {
    open: VecDeque<Window>,
    clock: WallClock,
    started_ns: u64,
    length_ns: u64,
    period_ns: u64,
    late: u64,
    room: Room,
}

impl Windows {
    /// No window yet. `started_ns` is the boot time at which sampling starts, `length` the grid on the wall clock.
    pub(crate) fn new(
        started_ns: u64,
        length: Duration,
        period_ns: u64,
        clock: WallClock,
        room: Room,
    ) -> Self {
        let length_ns = u64::try_from(length.as_nanos()).expect("a window is shorter than 500 years");
        assert!(length_ns > 0, "a window has a length");
        let mut windows =
            Self { open: VecDeque::new(), clock, started_ns, length_ns, period_ns, late: 0, room };
        windows.push(started_ns);
        windows
    }

    /// The window of a boot time. A sample older than every open window goes to the oldest, one for which no further
    /// window may be opened to the newest; both are counted as late.
    pub(crate) fn at(&mut self, time_ns: u64) -> &mut Window {
        self.open_up_to(time_ns);
        let behind = self.open.partition_point(|window| window.start_ns <= time_ns);
        let index = behind.saturating_sub(1);
        let window = &mut self.open[index];
        if !(window.start_ns..window.end_ns).contains(&time_ns) {
            self.late += 1;
        }
        window
    }

    fn open_up_to(&mut self, time_ns: u64) {
        while self.newest_end() <= time_ns && self.open.len() < OPEN_MAX {
            self.push(self.start_for(time_ns));
        }
    }

    /// Where the next window starts: windows follow each other without a gap, but for a time that nobody was sampled in
    /// or the machine slept.
    fn start_for(&self, time_ns: u64) -> u64 {
        let newest_end = self.newest_end();
        if time_ns - newest_end <= self.length_ns {
            return newest_end;
        }
        self.start_of(time_ns).max(newest_end)
    }

    /// The last point of the grid before a boot time.
    fn start_of(&self, time_ns: u64) -> u64 {
        let wall_ns = self.clock.at(time_ns);
        self.clock.boot_of(wall_ns - wall_ns % self.length_ns)
    }

    /// Closes the windows whose samples are all there: `complete_ns` is how far the drain has come. When somebody has set
    /// the clock, closes all of them: the wall times of further samples differ.
    pub(crate) fn close_due(&mut self, complete_ns: u64, clock: WallClock) -> Vec<Closed> {
        if clock.stepped_from(self.clock) {
            let end_ns = complete_ns.max(self.open.back().map_or(0, |window| window.start_ns));
            let closed = self.close_all(end_ns);
            self.clock = clock;
            self.push(end_ns);
            return closed;
        }
        let newest_end = self.newest_end();
        let ended = self.open.partition_point(|window| window.end_ns <= complete_ns);
        let closed = self.open.drain(..ended).map(|window| {
            let end_ns = window.end_ns;
            window.close(end_ns, self.clock)
        });
        let closed = closed.collect();
        self.clock = clock;
        if self.open.is_empty() {
            self.push(newest_end.max(self.start_of(complete_ns)));
        }
        closed
    }

    /// Samples taken from `at_ns` on have another period: the window that is open then ends there, for a profile states
    /// one period. Where no further window may be opened, it goes on with the old one.
    pub(crate) fn set_period(&mut self, period_ns: u64, at_ns: u64) {
        self.open_up_to(at_ns);
        self.period_ns = period_ns;
        let has_room = self.open.len() < OPEN_MAX;
        let Some(newest) = self.open.back_mut().filter(|_| has_room) else { return };
        if at_ns <= newest.start_ns {
            newest.period_ns = period_ns;
        } else if at_ns < newest.end_ns {
            newest.end_ns = at_ns;
            self.push(at_ns);
        }
    }

    /// Closes everything, the current window at `now_ns`.
    pub(crate) fn close_all(&mut self, now_ns: u64) -> Vec<Closed> {
        let clock = self.clock;
        let close = |window: Window| {
            let end_ns = window.end_ns.min(now_ns).max(window.start_ns);
            window.close(end_ns, clock)
        };
        self.open.drain(..).map(close).collect()
    }

    /// When the next window ends, on the boot clock.
    pub(crate) fn next_end_ns(&self) -> u64 {
        self.open.front().map_or(u64::MAX, |window| window.end_ns)
    }

    /// Samples that came after their window had closed.
    pub(crate) fn late(&self) -> u64 {
        self.late
    }

    fn newest_end(&self) -> u64 {
        self.open.back().map_or(self.started_ns, |window| window.end_ns)
    }

    fn push(&mut self, start_ns: u64) {
        self.open.push_back(Window::new(start_ns, self.end_after(start_ns), self.period_ns, &self.room));
    }

    /// Where a window that starts at a boot time ends: early after the start, then on the grid of the wall clock.
    fn end_after(&self, start_ns: u64) -> u64 {
        let first = FIRST_ENDS_NS.map(|end| self.started_ns + end);
        if let Some(end) = first.into_iter().find(|&end| start_ns < end && end - start_ns <= self.length_ns) {
            return end;
        }
        let wall_ns = self.clock.at(start_ns);
        let end_ns = (wall_ns / self.length_ns + 1) * self.length_ns;
        self.clock.boot_of(end_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{addr::Addr, label::Labeler, label::Subject};

    const S: u64 = 1_000_000_000;
    const ROOM_BYTES: usize = 1 << 20;

    fn windows() -> Windows {
        Windows::new(100 * S, Duration::from_secs(10), 1, clock(0), Room::new(ROOM_BYTES))
    }

    /// Wall time = boot time + 1,000,003 s + `by_ns`.
    fn clock(by_ns: i64) -> WallClock {
        WallClock::with_offset((1_000_003 * S).cast_signed() + by_ns)
    }

    fn add(windows: &mut Windows, time_ns: u64, frames: &[u64]) {
        let series = Labeler::new("n", &[]).series(&Subject { exe: "/x", ..Subject::default() });
        let labels = SampleLabels { comm: "x".into(), thread_name: "x".into(), pid: 1 };
        let stack = frames.iter().map(|&addr| Location::unnamed("//anon", Addr(addr))).collect();
        windows.at(time_ns).add(series, labels, stack, 5, |_| ()).expect("there is room");
    }

    fn spans(closed: &[Closed]) -> Vec<(u64, u64, u64)> {
        let base = 1_000_003 * S;
        closed
            .iter()
            .map(|window| (window.start_unix_ns - base, window.duration_ns, window.samples))
            .collect()
    }

    #[test]
    fn the_first_windows_are_short_and_the_others_on_the_grid() {
        let mut windows = windows();
        for second in 100..130 {
            add(&mut windows, second * S, &[1]);
        }
        let closed = windows.close_due(140 * S, clock(0));
        let expect = [(100, 1, 1), (101, 4, 4), (105, 2, 2), (107, 10, 10), (117, 10, 10), (127, 10, 3)];
        let expect = expect.map(|(start, length, samples)| (start * S, length * S, samples));
        assert_eq!(spans(&closed), expect);
        assert!(closed.iter().skip(3).all(|window| window.start_unix_ns % (10 * S) == 0));
    }

    #[test]
    fn a_new_period_ends_the_window_and_begins_the_next_one() {
        let mut windows = windows();
        add(&mut windows, 100 * S, &[1]);
        windows.set_period(2, 103 * S);
        for second in [102, 103, 104, 109] {
            add(&mut windows, second * S, &[1]);
        }
        windows.set_period(3, 107 * S);
        let closed = windows.close_due(140 * S, clock(0));
        let periods: Vec<_> = closed.iter().map(|window| window.period_ns).collect();
        let expect = [(100, 1, 1), (101, 2, 1), (103, 2, 2), (105, 2, 0), (107, 10, 1)];
        assert_eq!(spans(&closed), expect.map(|(start, length, samples)| (start * S, length * S, samples)));
        assert_eq!(periods, [1, 1, 2, 2, 3]);
    }

    #[test]
    fn a_sample_goes_to_the_window_of_its_time_also_when_drained_later() {
        let mut windows = windows();
        add(&mut windows, 101 * S + 1, &[1]);
        add(&mut windows, 101 * S - 1, &[1]);
        let closed = windows.close_due(101 * S, clock(0));
        assert_eq!(spans(&closed), [(100 * S, S, 1)]);
        assert_eq!(windows.late(), 0);
    }

    #[test]
    fn a_sample_behind_every_open_window_is_late_and_kept() {
        let mut windows = windows();
        windows.close_due(102 * S, clock(0));
        add(&mut windows, 100 * S, &[1]);
        assert_eq!(windows.late(), 1);
        assert_eq!(spans(&windows.close_all(103 * S)).iter().map(|span| span.2).sum::<u64>(), 1);
    }

    #[test]
    fn setting_the_clock_closes_the_window() {
        let mut windows = windows();
        add(&mut windows, 100 * S + 5, &[1]);
        let closed = windows.close_due(100 * S + S / 2, clock(3600 * S.cast_signed()));
        assert_eq!(spans(&closed), [(100 * S, S / 2, 1)]);
        add(&mut windows, 100 * S + S / 2 + 1, &[1]);
        let closed = windows.close_all(101 * S);
        assert_eq!(spans(&closed), [(100 * S + S / 2 + 3600 * S, S / 2, 1)]);
    }

    #[test]
    fn equal_stacks_are_one_entry_and_new_locations_are_seen_once() {
        let mut windows = windows();
        add(&mut windows, 100 * S, &[1, 2]);
        add(&mut windows, 100 * S, &[1, 2]);
        add(&mut windows, 100 * S, &[3, 2]);
        let closed = windows.close_all(101 * S);
        let [window] = closed.as_slice() else { panic!("one window, not {}", closed.len()) };
        assert_eq!((window.locations.len(), window.stacks.len(), window.samples), (3, 2, 3));
        let mut samples: Vec<_> = window.series[0].samples.iter().map(|entry| entry.counts.samples).collect();
        samples.sort_unstable();
        assert_eq!(samples, [1, 2]);
    }

    #[test]
    fn samples_that_come_after_a_stall_go_to_their_own_windows() {
        let mut windows = windows();
        for second in 100..190 {
            add(&mut windows, second * S, &[1]);
        }
        let closed = windows.close_due(190 * S, clock(0));
        assert_eq!(windows.late(), 0);
        assert!(
            spans(&closed).iter().all(|&(_, length, samples)| length == samples * S),
            "{:?}",
            spans(&closed)
        );
    }

    #[test]
    fn a_window_is_not_closed_before_the_drain_has_passed_its_end() {
        let mut windows = windows();
        add(&mut windows, 100 * S, &[1]);
        assert_eq!(spans(&windows.close_due(101 * S - 1, clock(0))), []);
        add(&mut windows, 101 * S - 1, &[1]);
        assert_eq!(spans(&windows.close_due(101 * S, clock(0))), [(100 * S, S, 2)]);
    }

    #[test]
    fn a_day_asleep_opens_no_windows() {
        let mut windows = windows();
        add(&mut windows, 100 * S, &[1]);
        add(&mut windows, 90_000 * S, &[1]);
        assert_eq!(windows.late(), 0);
        assert_eq!(windows.open.len(), 2);
    }

    #[test]
    fn a_full_window_still_counts_the_stacks_it_knows() {
        let mut windows = windows();
        add(&mut windows, 100 * S, &[1]);
        windows.at(100 * S).taken.add(ROOM_BYTES);
        add(&mut windows, 100 * S, &[1]);
        let series = Labeler::new("n", &[]).series(&Subject { exe: "/x", ..Subject::default() });
        let labels = SampleLabels { comm: "x".into(), thread_name: "x".into(), pid: 1 };
        let other = vec![Location::unnamed("//anon", Addr(2))];
        assert_eq!(windows.at(100 * S).add(series, labels, other, 5, |_| ()), Err(Full));
        assert_eq!(windows.at(100 * S).samples(), 2);
    }

    #[test]
    fn a_window_gives_back_its_room_when_it_is_gone() {
        let mut windows = windows();
        for second in 100..120 {
            add(&mut windows, second * S, &[1, 2, 3]);
        }
        let used = |windows: &Windows| windows.room.used.load(Relaxed);
        let open = used(&windows);
        let closed = windows.close_due(140 * S, clock(0));
        assert!(open > 3 * 256 && used(&windows) == open, "the encoder has them");
        drop(closed);
        assert_eq!(used(&windows), 0);
    }

    #[test]
    fn what_a_window_takes_of_the_room_is_what_it_holds() {
        let before = heap::held_bytes();
        let mut windows = windows();
        windows.room.max = usize::MAX;
        let series = Labeler::new("n", &[]).series(&Subject { exe: "/x", ..Subject::default() });
        let mapping: Arc<str> = "//anon".into();
        for at in 0..3000 {
            // Every second stack is new, with frames of its own.
            let frames = [at / 2, at / 2 + 100_000, at % 7].map(Addr);
            let location = |addr| Location::Unnamed { mapping: Arc::clone(&mapping), addr };
            let labels = SampleLabels { comm: "x".into(), thread_name: "x".into(), pid: 1 };
            let stack = frames.map(location).into();
            windows.at(100 * S).add(series.clone(), labels, stack, 5, |_| ()).expect("there is room");
        }
        let (held, taken) = (heap::held_bytes() - before, windows.room.used.load(Relaxed));
        assert!(taken > 200_000 && held.abs_diff(taken.cast_signed()) < taken / 20, "{taken}, held {held}");
    }

    #[test]
    fn after_a_long_silence_windows_start_near_now() {
        let mut windows = windows();
        windows.close_due(1000 * S, clock(0));
        add(&mut windows, 1000 * S, &[1]);
        let closed = windows.close_all(1001 * S);
        assert_eq!(closed.iter().map(|window| window.samples).sum::<u64>(), 1);
        assert!(closed.len() <= 2, "{}", closed.len());
    }
}
