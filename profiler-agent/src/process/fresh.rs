//! Processes with a new image that are to be read before their first sample, for they may be gone with it.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::Exec;

/// Time from exec to reading: the dynamic linker has mapped the libraries by then. What ends before is rarely sampled at
/// all: one of ten at 19 Hz.
const DELAY: Duration = Duration::from_millis(5);
/// Processes waiting to be read.
const WAITING_MAX: usize = 1024;
/// Readings in a second, about 100 µs each: 1 % of a CPU. Others are read with their first sample.
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
    second: Option<Instant>,
    read_in_second: u32,
    skipped: u64,
}

impl Fresh {
    /// A process has a new image.
    pub(super) fn add(&mut self, new: New, now: Instant) {
        if self.waiting.len() >= WAITING_MAX || !self.has_budget(now) {
            self.skipped += 1;
            return;
        }
        self.waiting.push_back((now + DELAY, new));
    }

    /// When the next one is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.waiting.front().map(|&(due, _)| due)
    }

    /// The next one that is due.
    pub(super) fn take(&mut self, now: Instant) -> Option<New> {
        let (_, new) = self.waiting.pop_front_if(|&mut (due, _)| due <= now)?;
        Some(new)
    }

    /// Gives up those that are due.
    pub(super) fn skip(&mut self, now: Instant) {
        while self.take(now).is_some() {
            self.skipped += 1;
        }
    }

    /// New images that are not read here, there being too many, or no CPU time for them.
    pub(super) fn skipped(&self) -> u64 {
        self.skipped
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
        assert_eq!(fresh.take(now), None);
        assert_eq!(fresh.take(now + DELAY), Some(exec(1)));
        assert_eq!(fresh.take(now + DELAY), None);
        assert_eq!(fresh.next(), Some(now + 2 * DELAY));
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
