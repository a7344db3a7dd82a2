//! How well the code of each binary unwinds and is named: which one cuts stacks short, why, and what would help.
//!
//! Counted per window where all is known, off the way of samples. Binaries are told apart by file name: two versions of
//! one are one here.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use profiler_common::wire::StackEnd;
use serde::Serialize;

use crate::{
    normalize::Location,
    symbolize::{self, LocationId, LocationKey},
    window::Closed,
};

/// Binaries with counts of their own, about 250 bytes each; further ones are [`OTHER`].
const BINARIES_MAX: usize = 512;

/// Binaries whose names are in the metrics: those with the most samples.
const NAMED_IN_METRICS: usize = 20;

/// What pprof files call memory of generated code, which is no binary's.
const GENERATED: &str = "//anon";

/// Binaries beyond the bound, and in the metrics all but the largest.
const OTHER: &str = "other";

/// Share of frames without names from which the missing names are worth a hint, in percent.
const UNNAMED_HINT_PERCENT: f64 = 20.0;

/// Counts since the start.
#[derive(Debug, Default)]
pub(crate) struct Binaries {
    rows: Mutex<HashMap<Box<str>, Row>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Row {
    /// Samples whose stack has a frame here.
    samples: u64,
    /// Those whose stack ends here too early, by why.
    cut: [u64; StackEnd::ALL.len()],
    frames: u64,
    /// Frames without a name.
    unnamed: u64,
}

/// One binary, as shown.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Report {
    /// Name of its file; `//anon` for generated code.
    pub(crate) binary: String,
    /// Samples whose stack has a frame here.
    pub(crate) samples: u64,
    /// Those whose stack ends here too early.
    pub(crate) truncated: u64,
    truncated_percent: f64,
    /// Frames of its code without a name, in percent of its frames.
    unknown_percent: f64,
    /// Why most of its truncated stacks end, as in `profiler_agent_stacks_total{end}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    /// What would help.
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'static str>,
}

impl Binaries {
    /// Counts a window. `symbols` has an answer for every location of it that is code.
    pub(crate) fn add(&self, window: &Closed, symbols: &HashMap<LocationId, symbolize::Location>) {
        let counted = Counted::of(window, symbols);
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, row) in counted.names.iter().zip(&counted.rows) {
            let has_room = rows.contains_key(&**name) || rows.len() < BINARIES_MAX;
            let name = if has_room { &**name } else { OTHER };
            rows.entry(name.into()).or_default().add(row);
        }
    }

    /// Every binary, those that cut the most stacks first.
    pub(crate) fn reports(&self) -> Vec<Report> {
        let rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        let mut reports: Vec<_> = rows.iter().map(|(name, row)| row.report(name)).collect();
        drop(rows);
        reports.sort_by(|a, b| (b.truncated, b.samples, &a.binary).cmp(&(a.truncated, a.samples, &b.binary)));
        reports
    }

    /// Name, samples and truncated stacks of the binaries with the most samples, and of all others together.
    pub(crate) fn largest(&self) -> Vec<(String, u64, u64)> {
        let mut reports = self.reports();
        reports.sort_by(|a, b| {
            (a.binary == OTHER, b.samples, &a.binary).cmp(&(b.binary == OTHER, a.samples, &b.binary))
        });
        let others = reports.split_off(reports.len().min(NAMED_IN_METRICS));
        let mut largest: Vec<_> =
            reports.into_iter().map(|row| (row.binary, row.samples, row.truncated)).collect();
        if !others.is_empty() {
            let (samples, truncated) =
                others.iter().fold((0, 0), |sum, row| (sum.0 + row.samples, sum.1 + row.truncated));
            match largest.iter_mut().find(|row| row.0 == OTHER) {
                Some(row) => (row.1, row.2) = (row.1 + samples, row.2 + truncated),
                None => largest.push((OTHER.to_owned(), samples, truncated)),
            }
        }
        largest
    }
}

impl Row {
    fn add(&mut self, other: &Self) {
        let Self { samples, cut, frames, unnamed } = other;
        self.samples += samples;
        self.frames += frames;
        self.unnamed += unnamed;
        self.cut.iter_mut().zip(cut).for_each(|(sum, count)| *sum += count);
    }

    fn report(&self, binary: &str) -> Report {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole.max(1) as f64;
        let most = StackEnd::ALL.into_iter().zip(self.cut).max_by_key(|&(_, count)| count);
        let reason = most.filter(|&(_, count)| count > 0).map(|(end, _)| end);
        let truncated = self.cut.iter().sum();
        let unknown_percent = percent(self.unnamed, self.frames);
        Report {
            binary: binary.to_owned(),
            samples: self.samples,
            truncated,
            truncated_percent: percent(truncated, self.samples),
            unknown_percent,
            reason: reason.map(StackEnd::name),
            hint: reason
                .and_then(|end| hint(end, binary))
                .or_else(|| (unknown_percent >= UNNAMED_HINT_PERCENT).then(|| unnamed_hint(binary))),
        }
    }
}

/// What would lead on where a walk ended.
fn hint(end: StackEnd, binary: &str) -> Option<&'static str> {
    match end {
        StackEnd::NoUnwindInformation | StackEnd::NotRising | StackEnd::ReadFailed if binary == GENERATED => {
            Some("generated code: have its engine keep frame pointers (JVM: -XX:+PreserveFramePointer)")
        }
        StackEnd::NoUnwindInformation => Some(
            "no table: built without (-fno-asynchronous-unwind-tables), or refused, see \
             profiler_agent_unwind_table_errors_total",
        ),
        StackEnd::NotRising => {
            Some("walked before the process had its tables, or by frame pointers that it does not keep")
        }
        StackEnd::InvalidRule | StackEnd::RegisterLost => {
            Some("hand-written assembly: build the library without it, or live with it")
        }
        StackEnd::NoMapping => Some("mapped after its tables were made: passes when they are renewed"),
        StackEnd::DepthLimit => Some("deeper than a sample holds: look for the recursion"),
        StackEnd::ReadFailed => Some("its stack is swapped out, or the frame pointer holds something else"),
        StackEnd::NoRegisters | StackEnd::Root | StackEnd::NoUserStack | StackEnd::FramePointerZero => None,
    }
}

fn unnamed_hint(binary: &str) -> &'static str {
    match binary {
        GENERATED => "generated code: have its engine write /tmp/perf-PID.map (Node: --perf-basic-prof)",
        _ => "stripped: install its debug symbols",
    }
}

/// The binaries of one window.
struct Counted<'a> {
    names: Vec<std::borrow::Cow<'a, str>>,
    rows: Vec<Row>,
}

impl<'a> Counted<'a> {
    fn of(window: &'a Closed, symbols: &HashMap<LocationId, symbolize::Location>) -> Self {
        let mut counted = Self { names: Vec::new(), rows: Vec::new() };
        let mut numbers = HashMap::new();
        let binaries: Vec<Option<usize>> = window
            .locations
            .iter()
            .map(|location| {
                let name = binary(location)?;
                Some(*numbers.entry(name.clone()).or_insert_with(|| {
                    counted.names.push(name);
                    counted.rows.push(Row::default());
                    counted.rows.len() - 1
                }))
            })
            .collect();
        let is_named: Vec<bool> =
            window.locations.iter().map(|location| is_named(location, symbols)).collect();
        let mut seen = vec![None; counted.rows.len()];
        for (number, (stack, samples)) in window.stacks.iter().zip(samples_by_stack(window)).enumerate() {
            let mut innermost_cut = None;
            for &index in stack {
                let Some(location) = window.locations.get(index as usize) else { continue };
                match (location, binaries[index as usize]) {
                    (Location::Marker(end), _) => innermost_cut = Some(*end),
                    (_, Some(binary)) => {
                        let row = &mut counted.rows[binary];
                        row.frames += samples;
                        row.unnamed += if is_named[index as usize] { 0 } else { samples };
                        if seen[binary].replace(number) != Some(number) {
                            row.samples += samples;
                        }
                    }
                    (_, None) => {}
                }
            }
            // The marker lies behind the last frame.
            let last = stack.iter().rev().find_map(|&index| *binaries.get(index as usize)?);
            if let (Some(end), Some(last)) = (innermost_cut, last) {
                let slot = StackEnd::ALL.iter().position(|&known| known == end).expect("ALL holds every end");
                counted.rows[last].cut[slot] += samples;
            }
        }
        counted
    }
}

fn samples_by_stack(window: &Closed) -> Vec<u64> {
    let mut samples = vec![0; window.stacks.len()];
    for entry in window.series.iter().flat_map(|series| &series.samples) {
        if let Some(sum) = samples.get_mut(entry.stack as usize) {
            *sum += entry.counts.samples;
        }
    }
    samples
}

/// The binary that a user frame's code is in.
fn binary(location: &Location) -> Option<std::borrow::Cow<'_, str>> {
    match location {
        Location::Code(LocationKey::Native { executable, .. }) => Some(executable.name()),
        Location::Code(LocationKey::Generated { .. }) => Some(GENERATED.into()),
        Location::Unnamed { mapping, .. } if mapping.is_empty() => Some("[unmapped]".into()),
        Location::Unnamed { mapping, .. } => Some((&**mapping).into()),
        Location::Code(LocationKey::Kernel(_)) | Location::Marker(_) | Location::KernelMarker(_) => None,
    }
}

/// A frame of the vDSO or of no known mapping has no name.
fn is_named(location: &Location, symbols: &HashMap<LocationId, symbolize::Location>) -> bool {
    match location {
        Location::Code(key) => matches!(symbols.get(&key.id()), Some(symbolize::Location::Resolved(_))),
        Location::Unnamed { .. } | Location::Marker(_) | Location::KernelMarker(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        addr::Addr,
        label::{Labeler, Subject},
        window::{Counts, Entry, Measure, Room, SampleLabels, Series, Taken},
    };

    /// A window with these stacks, leaf first, and so many samples of each.
    fn window(stacks: &[(&[Location], u64)]) -> Closed {
        let mut locations = Vec::new();
        let mut indexes = Vec::new();
        let mut samples = Vec::new();
        for (number, (stack, count)) in (0..).zip(stacks) {
            let first = u32::try_from(locations.len()).expect("few");
            locations.extend(stack.iter().cloned());
            indexes.push((first..first + u32::try_from(stack.len()).expect("few")).collect());
            samples.push(Entry {
                stack: number,
                labels: 0,
                counts: Counts { samples: *count, value: 1, objects: 0 },
            });
        }
        let labels = Labeler::new("n", &[]).series(&Subject { exe: "/x", ..Subject::default() });
        Closed {
            start_unix_ns: 1,
            duration_ns: 1,
            measure: Measure::Cpu,
            period_ns: 1,
            samples: 1,
            series: vec![Series { labels, samples, comments: Vec::new() }],
            locations,
            stacks: indexes,
            labels: vec![SampleLabels { comm: "x".into(), thread_name: "x".into(), pid: 1 }],
            taken: Taken::nothing(&Room::new(0)),
        }
    }

    fn frame(mapping: &str) -> Location {
        Location::Unnamed { mapping: Arc::from(mapping), addr: Addr(0) }
    }

    #[track_caller]
    fn check(binaries: &Binaries, expect: &[(&str, u64, u64, Option<&str>)]) {
        let reports = binaries.reports();
        let found: Vec<_> =
            reports.iter().map(|row| (&*row.binary, row.samples, row.truncated, row.reason)).collect();
        assert_eq!(found, expect);
    }

    #[test]
    fn a_truncated_stack_counts_for_the_binary_it_ends_in_and_no_other() {
        let binaries = Binaries::default();
        let end = Location::Marker(StackEnd::NoUnwindInformation);
        let cut = [frame("a"), frame("b"), frame("b"), end];
        let whole = [frame("b"), frame("a")];
        binaries.add(&window(&[(&cut, 3), (&whole, 5)]), &HashMap::new());
        binaries.add(&window(&[(&whole, 2)]), &HashMap::new());
        check(&binaries, &[("b", 10, 3, Some("no_unwind_information")), ("a", 10, 0, None)]);
        let reports = binaries.reports();
        assert_eq!((reports[0].truncated_percent, reports[0].unknown_percent), (30.0, 100.0));
        assert!(reports.iter().all(|row| row.hint.is_some()), "{reports:?}");
    }

    #[test]
    fn the_most_frequent_reason_is_told() {
        let binaries = Binaries::default();
        let rare = [frame("a"), Location::Marker(StackEnd::ReadFailed)];
        let frequent = [frame("a"), Location::Marker(StackEnd::DepthLimit)];
        binaries.add(&window(&[(&rare, 1), (&frequent, 2)]), &HashMap::new());
        check(&binaries, &[("a", 3, 3, Some("depth_limit"))]);
    }

    #[test]
    fn a_stack_of_nothing_but_a_marker_belongs_to_nobody() {
        let binaries = Binaries::default();
        binaries.add(&window(&[(&[Location::Marker(StackEnd::NoRegisters)], 1)]), &HashMap::new());
        check(&binaries, &[]);
    }

    #[test]
    fn binaries_beyond_the_bounds_are_counted_together() {
        let binaries = Binaries::default();
        let stacks: Vec<[Location; 1]> =
            (0..BINARIES_MAX + 9).map(|n| [frame(&format!("b{n:04}"))]).collect();
        let stacks: Vec<(&[Location], u64)> = stacks.iter().map(|stack| (&stack[..], 1)).collect();
        binaries.add(&window(&stacks), &HashMap::new());
        let reports = binaries.reports();
        assert_eq!(reports.len(), BINARIES_MAX + 1);
        let total: u64 = reports.iter().map(|row| row.samples).sum();
        assert_eq!(total, BINARIES_MAX as u64 + 9);

        let largest = binaries.largest();
        assert_eq!(largest.len(), NAMED_IN_METRICS + 1);
        assert_eq!(largest.last().map(|row| (&*row.0, row.2)), Some((OTHER, 0)));
        assert_eq!(largest.iter().map(|row| row.1).sum::<u64>(), total);
    }
}
