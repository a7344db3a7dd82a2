//! Processes with a new image that are to be read before their first sample, for they may be gone with it.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::Exec;

/// Time from exec to the first look: the dynamic linker has mapped the libraries by then. What ends before is rarely sampled
/// at all: one of ten at 19 Hz.
const DELAY: Duration = Duration::from_millis(5);
/// Processes that have hardly run, as launchers that wait for others, are looked at again after this long, all at once; so
/// many times.
const IDLE_INTERVAL: Duration = Duration::from_millis(100);
const IDLE_LOOKS: u32 = 20;
/// Processes waiting to be read.
const WAITING_MAX: usize = 1024;
/// Processes in a second that are looked at, 300 µs each where they are read: 3 % of a CPU. Others are read with their first
/// sample.
const PER_SECOND: u32 = 100;

/// A process with a new image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct New {
    pub(super) exec: Exec,
    /// It was sampled before, or is the child of one that was: it is more likely to be sampled than others.
    pub(super) was_known: bool,
}

/// New images, oldest first.
#[derive(Debug, Default)]
pub(super) struct Fresh {
    waiting: VecDeque<(Instant, New)>,
    /// Those that had hardly run, with the number of looks at them since then.
    idle: Vec<(New, u32)>,
    /// When these are looked at again.
    next_look: Option<Instant>,
    /// Those that have run since then.
    busy: Vec<New>,
    second: Option<Instant>,
    read_in_second: u32,
    skipped: u64,
    left_idle: u64,
}

impl Fresh {
    /// A process has a new image.
    pub(super) fn add(&mut self, new: New, now: Instant) {
        if self.waiting.len() + self.idle.len() >= WAITING_MAX || !self.has_budget(now) {
            self.skipped += 1;
            return;
        }
        self.waiting.push_back((now + DELAY, new));
    }

    /// When the next one is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.waiting.front().map(|&(due, _)| due).into_iter().chain(self.next_look).min()
    }

    /// The next one that is due and has run, by `is_idle` whether it hardly has.
    pub(super) fn take(&mut self, now: Instant, mut is_idle: impl FnMut(&New) -> bool) -> Option<New> {
        while let Some((_, new)) = self.waiting.pop_front_if(|&mut (due, _)| due <= now) {
            if !is_idle(&new) {
                return Some(new);
            }
            self.idle.push((new, 0));
            self.next_look.get_or_insert(now + IDLE_INTERVAL);
        }
        if self.next_look.is_some_and(|due| due <= now) {
            self.busy.extend(self.idle.extract_if(.., |(new, _)| !is_idle(new)).map(|(new, _)| new));
            self.idle.iter_mut().for_each(|(_, looks)| *looks += 1);
            self.left_idle += self.idle.extract_if(.., |&mut (_, looks)| looks >= IDLE_LOOKS).count() as u64;
            self.next_look = (!self.idle.is_empty()).then_some(now + IDLE_INTERVAL);
        }
        self.busy.pop()
    }

    /// Gives up those that are due.
    pub(super) fn skip(&mut self, now: Instant) {
        while self.take(now, |_| false).is_some() {
            self.skipped += 1;
        }
    }

    /// New images that are not read here, there being too many, or no CPU time for them.
    pub(super) fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Those that had hardly run at the last look.
    pub(super) fn left_idle(&self) -> u64 {
        self.left_idle
    }

    fn has_budget(&mut self, now: Instant) -> bool {
        if self.second.is_none_or(|second| now - second >= Duration::from_secs(1)) {
            (self.second, self.read_in_second) = (Some(now), 0);
        }
        self.read_in_second += 1;
        self.read_in_second <= PER_SECOND
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exec(pid: u32) -> New {
        New { exec: Exec { pid, start_ns: 0, cgroup_id: 1 }, was_known: pid == 2 }
    }

    #[test]
    fn those_that_are_due_come_in_their_order() {
        let (mut fresh, now) = (Fresh::default(), Instant::now());
        fresh.add(exec(1), now);
        fresh.add(exec(2), now + DELAY);
        assert_eq!(fresh.take(now, |_| false), None);
        assert_eq!(fresh.take(now + DELAY, |_| false), Some(exec(1)));
        assert_eq!(fresh.take(now + DELAY, |_| false), None);
        assert_eq!(fresh.next(), Some(now + 2 * DELAY));
    }

    #[test]
    fn those_that_have_hardly_run_are_looked_at_again_and_at_last_left() {
        let (mut fresh, start) = (Fresh::default(), Instant::now());
        fresh.add(exec(1), start);
        fresh.add(exec(2), start);
        let (mut looks, mut taken) = (0, Vec::new());
        while let Some(due) = fresh.next() {
            looks += 1;
            taken.extend(fresh.take(due, |new| new.exec.pid == 1 || looks < 3).map(|new| (looks, new)));
        }
        assert_eq!(taken, [(3, exec(2))]);
        assert_eq!((looks, fresh.left_idle(), fresh.skipped()), (1 + IDLE_LOOKS, 1, 0));
        assert_eq!(fresh.next(), None);
    }

    #[test]
    fn those_that_are_due_and_skipped_are_counted() {
        let (mut fresh, now) = (Fresh::default(), Instant::now());
        fresh.add(exec(1), now);
        fresh.add(exec(2), now + DELAY);
        fresh.skip(now + DELAY);
        assert_eq!((fresh.next(), fresh.skipped()), (Some(now + 2 * DELAY), 1));
    }

    #[test]
    fn a_storm_of_new_images_is_left_to_their_samples() {
        let (mut fresh, now) = (Fresh::default(), Instant::now());
        (0..PER_SECOND + 7).for_each(|pid| fresh.add(exec(pid), now));
        assert_eq!((fresh.waiting.len(), fresh.skipped()), (PER_SECOND as usize, 7));
        fresh.add(exec(0), now + Duration::from_secs(1));
        assert_eq!(fresh.skipped(), 7);
    }
}
