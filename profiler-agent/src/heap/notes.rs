//! What was done to the processes whose heap is profiled, as far as their profiles must say so.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

use super::budget::Budget;
use crate::label::SeriesLabels;

/// Time that samples were taken in.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Span {
    begin_ns: u64,
    /// `u64::MAX` while it goes on.
    end_ns: u64,
    /// What one sample stands for, 1 where all of the time is sampled.
    scale: f64,
}

/// Spans kept of one process: those that ended longer ago than the oldest open window are of no use.
const SPANS_MAX: usize = 1024;

/// Whether what is in use is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InUse {
    /// It is.
    Known,
    /// Its frees alone would take more than half of the budget.
    FreesTooDear,
    /// It is under a seccomp filter, which might kill it for a probed return.
    Seccomp,
}

/// One process.
#[derive(Clone, Debug)]
struct Note {
    pid: u32,
    series: SeriesLabels,
    budget: Budget,
    since_ns: u64,
    /// `u64::MAX` while it is profiled.
    until_ns: u64,
    in_use: InUse,
    spans: VecDeque<Span>,
}

/// Shared by the thread that attaches, which writes, and the one that closes windows, which reads.
#[derive(Clone, Debug, Default)]
pub(crate) struct Notes(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// By slot of the process.
    notes: Mutex<HashMap<u32, Vec<Note>>>,
    /// Numbers of the processes whose samples are followed until they are freed.
    followed: Mutex<HashSet<u32>>,
    /// Mean bytes between samples that profiles state; every sample has its own.
    rate: AtomicU32,
}

impl Notes {
    /// Numbers of those whose samples are followed (`profiler_common::heap::Target::id`).
    pub(super) fn followed(&self) -> HashSet<u32> {
        self.lock_followed().clone()
    }

    pub(super) fn follow(&self, id: u32) {
        self.lock_followed().insert(id);
    }

    pub(super) fn unfollow(&self, id: u32) {
        self.lock_followed().remove(&id);
    }

    pub(super) fn rate(&self) -> u32 {
        self.0.rate.load(Relaxed)
    }

    pub(super) fn set_rate(&self, rate: u32) {
        self.0.rate.store(rate, Relaxed);
    }

    /// A process is profiled from now on.
    pub(super) fn begin(&self, slot: u32, pid: u32, series: SeriesLabels, budget: Budget, now_ns: u64) {
        let note = Note {
            pid,
            series,
            budget,
            since_ns: now_ns,
            until_ns: u64::MAX,
            in_use: InUse::Known,
            spans: VecDeque::new(),
        };
        self.lock().entry(slot).or_default().push(note);
    }

    /// It no longer is. What is noted of it stays until the windows of its time are closed.
    pub(super) fn end(&self, slot: u32, now_ns: u64) {
        self.close_span(slot, now_ns);
        self.change(slot, |note| note.until_ns = now_ns);
    }

    /// It has other labels from now on: the profiles of both series say what was done in their time.
    pub(super) fn set_series(&self, slot: u32, series: SeriesLabels, now_ns: u64) {
        let mut notes = self.lock();
        let Some(notes) = notes.get_mut(&slot) else { return };
        if let Some(last) = notes.last_mut().filter(|last| last.series != series) {
            let next = Note { series, since_ns: now_ns, ..last.clone() };
            last.until_ns = now_ns;
            notes.push(next);
        }
    }

    pub(super) fn set_in_use(&self, slot: u32, in_use: InUse) {
        self.change(slot, |note| note.in_use = in_use);
    }

    pub(super) fn set_budget(&self, slot: u32, budget: Budget) {
        self.change(slot, |note| note.budget = budget);
    }

    /// Samples are taken from one time to another, `u64::MAX` for until [`Self::close_span`].
    pub(super) fn open_span(&self, slot: u32, begin_ns: u64, end_ns: u64, scale: f64) {
        self.change(slot, |note| {
            if note.spans.len() >= SPANS_MAX {
                note.spans.pop_front();
            }
            note.spans.push_back(Span { begin_ns, end_ns, scale });
        });
    }

    /// No samples are taken from now on.
    pub(super) fn close_span(&self, slot: u32, now_ns: u64) {
        self.change(slot, |note| {
            if let Some(span) = note.spans.back_mut() {
                span.end_ns = span.end_ns.min(now_ns);
            }
        });
    }

    fn change(&self, slot: u32, change: impl FnOnce(&mut Note)) {
        if let Some(note) = self.lock().get_mut(&slot).and_then(|notes| notes.last_mut()) {
            change(note);
        }
    }

    /// What the profiles of a window of allocations must say, by series. Forgets what is older.
    pub(super) fn of_window(&self, start_ns: u64, end_ns: u64) -> Vec<(SeriesLabels, String)> {
        let mut notes = self.lock();
        let mut comments = Vec::new();
        for note in notes.values_mut().flatten() {
            comments.extend(note.comments(start_ns, end_ns).map(|text| (note.series.clone(), text)));
            note.spans.retain(|span| span.end_ns > start_ns);
        }
        notes.retain(|_, notes| {
            notes.retain(|note| note.until_ns > start_ns);
            !notes.is_empty()
        });
        comments
    }

    /// What a snapshot must say of processes that are not in it, by series.
    pub(super) fn of_snapshot(&self) -> Vec<(SeriesLabels, String)> {
        let notes = self.lock();
        let current = notes.values().flatten().filter(|note| note.until_ns == u64::MAX);
        current.filter_map(|note| Some((note.series.clone(), note.lack()?))).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Vec<Note>>> {
        // Every change is complete before anything that could panic.
        self.0.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_followed(&self) -> MutexGuard<'_, HashSet<u32>> {
        // As above.
        self.0.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Note {
    fn comments(&self, start_ns: u64, end_ns: u64) -> impl Iterator<Item = String> {
        let (start_ns, end_ns) = (start_ns.max(self.since_ns), end_ns.min(self.until_ns));
        let is_of_window = start_ns < end_ns;
        let sampled = is_of_window.then(|| self.sampled(start_ns, end_ns)).flatten();
        sampled.into_iter().chain(is_of_window.then(|| self.lack()).flatten())
    }

    /// For how much of a time samples were taken; `None` where that is all of it.
    fn sampled(&self, start_ns: u64, end_ns: u64) -> Option<String> {
        /// What attaching takes, and a reading of the clock more or less.
        const SLACK_NS: u64 = 200_000_000;
        let spans: Vec<(u64, f64)> = self
            .spans
            .iter()
            .map(|span| (span.end_ns.min(end_ns).saturating_sub(span.begin_ns.max(start_ns)), span.scale))
            .filter(|&(ns, _)| ns > 0)
            .collect();
        let (on_ns, of_ns) = (spans.iter().map(|(ns, _)| ns).sum::<u64>(), end_ns - start_ns);
        let is_whole = on_ns + SLACK_NS >= of_ns && spans.iter().all(|&(_, scale)| scale == 1.0);
        if is_whole {
            return None;
        }
        let Self { pid, budget, .. } = self;
        let (on, of) = (on_ns as f64 / 1e9, of_ns as f64 / 1e9);
        let scale = spans.iter().map(|(_, scale)| *scale).fold(0.0, f64::max);
        let what = match on_ns {
            0 => "that it shows nothing does not mean that it allocated nothing".to_owned(),
            _ => format!("what it shows stands for the gap before as well, scaled by up to {scale:.2}"),
        };
        Some(format!(
            "pid {pid}: above its heap budget of {budget}, sampled for {on:.2} s of {of:.2} s: {what}"
        ))
    }

    fn lack(&self) -> Option<String> {
        let Self { pid, budget, .. } = self;
        match self.in_use {
            InUse::Known => None,
            InUse::FreesTooDear => Some(format!(
                "pid {pid}: what is in use is not known: probing its frees alone takes more than half of its heap budget of {budget}"
            )),
            InUse::Seccomp => Some(format!(
                "pid {pid}: what is in use is not known: it is under a seccomp filter, which on this kernel might kill it for a \
                 probed return; allocations are counted where they are asked for"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::label::{Labeler, Subject};

    const S: u64 = 1_000_000_000;

    fn notes() -> Notes {
        let series = Labeler::new("n", &[]).series(&Subject { exe: "/x", ..Subject::default() });
        let notes = Notes::default();
        notes.begin(3, 71, series, Budget::DEFAULT, 100 * S);
        notes
    }

    #[track_caller]
    fn check(notes: &Notes, (start, end): (u64, u64), expect: &[&str]) {
        let found: Vec<_> = notes.of_window(start * S, end * S).into_iter().map(|(_, text)| text).collect();
        assert_eq!(found.len(), expect.len(), "{found:?}");
        for (found, expect) in found.iter().zip(expect) {
            assert!(found.contains(expect), "{found}");
        }
    }

    #[test]
    fn what_is_sampled_all_the_time_needs_no_words() {
        let notes = notes();
        notes.open_span(3, 100 * S, u64::MAX, 1.0);
        check(&notes, (90, 110), &[]);
        check(&notes, (110, 120), &[]);
    }

    #[test]
    fn a_window_says_for_how_long_samples_were_taken_in_it() {
        let notes = notes();
        notes.open_span(3, 100 * S, u64::MAX, 1.0);
        notes.close_span(3, 112 * S);
        notes.open_span(3, 125 * S, 126 * S, 14.0);
        check(&notes, (100, 110), &[]);
        check(&notes, (110, 120), &["sampled for 2.00 s of 10.00 s"]);
        check(
            &notes,
            (120, 130),
            &[
                "sampled for 1.00 s of 10.00 s: what it shows stands for the gap before as well, scaled by up to 14.00",
            ],
        );
        check(&notes, (130, 140), &["sampled for 0.00 s of 10.00 s: that it shows nothing"]);
    }

    #[test]
    fn a_process_with_new_labels_is_told_of_under_both() {
        let notes = notes();
        let other = Labeler::new("m", &[]).series(&Subject { exe: "/x", ..Subject::default() });
        notes.set_in_use(3, InUse::Seccomp);
        notes.open_span(3, 100 * S, u64::MAX, 1.0);
        notes.set_series(3, other.clone(), 115 * S);
        notes.set_series(3, other.clone(), 116 * S);
        check(&notes, (110, 120), &["seccomp", "seccomp"]);
        let of_now: Vec<_> =
            notes.of_window(120 * S, 130 * S).into_iter().map(|(series, _)| series).collect();
        assert_eq!(of_now, [other]);
        assert_eq!(notes.of_snapshot().len(), 1);
    }

    #[test]
    fn a_process_is_told_of_until_the_window_of_its_end() {
        let notes = notes();
        notes.set_in_use(3, InUse::Seccomp);
        notes.open_span(3, 100 * S, u64::MAX, 1.0);
        assert_eq!(notes.of_snapshot().len(), 1);
        notes.end(3, 115 * S);
        assert_eq!(notes.of_snapshot().len(), 0);
        check(&notes, (110, 120), &["seccomp"]);
        check(&notes, (120, 130), &[]);
        assert!(notes.lock().is_empty());
    }
}
