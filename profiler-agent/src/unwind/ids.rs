//! Numbers of map slots, which rest before they are used again: a program in flight may still hold them.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// How long what programs may still hold is left alone. A program runs for some 10 µs.
const QUARANTINE: Duration = Duration::from_secs(1);

/// Things given up, oldest first.
#[derive(Debug)]
pub(super) struct Quarantine<T>(VecDeque<(Instant, T)>);

impl<T> Quarantine<T> {
    pub(super) fn new() -> Self {
        Self(VecDeque::new())
    }

    /// Gives something up.
    pub(super) fn put(&mut self, now: Instant, thing: T) {
        self.0.push_back((now, thing));
    }

    /// The next thing that no program can hold any more.
    pub(super) fn take_rested(&mut self, now: Instant) -> Option<T> {
        self.0.pop_front_if(|(since, _)| now.duration_since(*since) >= QUARANTINE).map(|(_, thing)| thing)
    }
}

/// The slots of one map.
#[derive(Debug)]
pub(super) struct Ids {
    /// Numbers from here on were never used.
    next: u32,
    max: u32,
    free: Vec<u32>,
    resting: Quarantine<Vec<u32>>,
}

impl Ids {
    /// Numbers below `max`.
    pub(super) fn new(max: u32) -> Self {
        Self { next: 0, max, free: Vec::new(), resting: Quarantine::new() }
    }

    /// Whether there are so many numbers, used or not.
    pub(super) fn has_as_many(&self, count: usize) -> bool {
        count <= self.max as usize
    }

    /// So many numbers, or none of them where there are too few.
    pub(super) fn take(&mut self, count: usize, now: Instant) -> Option<Vec<u32>> {
        while let Some(rested) = self.resting.take_rested(now) {
            self.free.extend(rested);
        }
        let unused = (self.max - self.next) as usize;
        if count > self.free.len() + unused {
            return None;
        }
        let again = self.free.split_off(self.free.len() - count.min(self.free.len()));
        let new =
            u32::try_from(count - again.len()).expect("no more than the unused ones, counted in 32 bits");
        let first = self.next;
        self.next += new;
        Some(again.into_iter().chain(first..self.next).collect())
    }

    /// Gives up numbers that programs may still hold.
    pub(super) fn give_back(&mut self, ids: Vec<u32>, now: Instant) {
        self.resting.put(now, ids);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_used_again_only_after_its_rest() {
        let (mut ids, start) = (Ids::new(3), Instant::now());
        assert_eq!(ids.take(2, start), Some(vec![0, 1]));
        ids.give_back(vec![0], start);
        assert_eq!(ids.take(2, start + QUARANTINE / 2), None, "0 still rests");
        assert_eq!(ids.take(2, start + QUARANTINE), Some(vec![0, 2]));
        assert_eq!(ids.take(1, start + QUARANTINE), None);
    }

    #[test]
    fn too_few_numbers_are_no_numbers() {
        let (mut ids, now) = (Ids::new(2), Instant::now());
        assert_eq!(ids.take(3, now), None);
        assert_eq!(ids.take(2, now), Some(vec![0, 1]));
        assert_eq!(ids.take(0, now), Some(vec![]));
    }

    #[test]
    fn things_rest_in_the_order_they_were_given_up() {
        let (mut resting, start) = (Quarantine::new(), Instant::now());
        resting.put(start, 'a');
        resting.put(start + QUARANTINE / 2, 'b');
        assert_eq!(resting.take_rested(start + QUARANTINE), Some('a'));
        assert_eq!(resting.take_rested(start + QUARANTINE), None);
        assert_eq!(resting.take_rested(start + QUARANTINE * 2), Some('b'));
    }
}
