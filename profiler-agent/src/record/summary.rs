//! What a recording shows at its end: the functions that use most CPU time.

use std::{
    collections::{HashMap, HashSet},
    fmt,
};

use profiler_pprof::proto::{Profile, Sample};

/// Functions shown.
const TOP: usize = 5;
/// Characters of a name that are shown.
const NAME_CHARS_MAX: usize = 100;

/// One sample of a profile, with names.
pub(super) struct Stack<'a> {
    /// The process' name, where the sample has it.
    pub(super) process: Option<&'a str>,
    /// Leaf first, inlined functions before what they are inlined in.
    pub(super) functions: Vec<&'a str>,
    /// In the unit of the default sample type.
    pub(super) value: i64,
}

/// The samples of a profile by its default sample type.
pub(super) fn stacks(profile: &Profile) -> impl Iterator<Item = Stack<'_>> {
    let index = profile.default_sample_type_index().unwrap_or(0);
    profile.sample.iter().map(move |sample| Stack {
        process: label(profile, sample, "comm"),
        functions: functions(profile, sample),
        value: sample.value.get(index).copied().unwrap_or(0),
    })
}

fn label<'a>(profile: &'a Profile, sample: &Sample, key: &str) -> Option<&'a str> {
    let label = sample.label.iter().find(|label| profile.string(label.key) == Some(key))?;
    profile.string(label.str)
}

fn functions<'a>(profile: &'a Profile, sample: &Sample) -> Vec<&'a str> {
    let locations = sample.location_id.iter().filter_map(|&id| profile.location(id));
    let lines = locations.flat_map(|location| &location.line);
    lines
        .map(|line| {
            let function = profile.function(line.function_id);
            function.and_then(|function| profile.string(function.name)).unwrap_or("?")
        })
        .collect()
}

/// The functions with most time of their own.
pub(super) struct Summary<'a> {
    total: i64,
    samples: i64,
    /// Name, time of its own, time with all that it calls.
    top: Vec<(&'a str, i64, i64)>,
}

impl<'a> Summary<'a> {
    /// Of a profile whose values are nanoseconds of CPU time.
    pub(super) fn new(profile: &'a Profile) -> Self {
        let mut functions: HashMap<&str, (i64, i64)> = HashMap::new();
        let mut total = 0;
        for stack in stacks(profile) {
            total += stack.value;
            if let Some(leaf) = stack.functions.first() {
                functions.entry(leaf).or_default().0 += stack.value;
            }
            // A recursive function is on a stack more than once, and counts once.
            for function in stack.functions.into_iter().collect::<HashSet<_>>() {
                functions.entry(function).or_default().1 += stack.value;
            }
        }
        let mut top: Vec<_> = functions.into_iter().map(|(name, (own, all))| (name, own, all)).collect();
        top.sort_unstable_by_key(|&(name, own, all)| (-own, -all, name));
        top.truncate(TOP);
        let count = profile.sample_type_index("samples");
        let samples = profile.sample.iter().filter_map(|sample| sample.value.get(count?)).sum();
        Self { total, samples, top }
    }
}

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { total, samples, top } = self;
        writeln!(f, "{:.2} s of CPU time in {samples} samples", seconds(*total))?;
        writeln!(f, "{:>9} {:>6} {:>6}  function", "own s", "own %", "all %")?;
        for &(name, own, all) in top {
            let name: String = name.chars().filter(|c| !c.is_control()).take(NAME_CHARS_MAX).collect();
            let (own_share, all_share) = (percent(own, *total), percent(all, *total));
            writeln!(f, "{:>9.2} {own_share:>6.1} {all_share:>6.1}  {name}", seconds(own))?;
        }
        Ok(())
    }
}

#[expect(clippy::cast_precision_loss, reason = "shown with two digits")]
fn seconds(ns: i64) -> f64 {
    ns as f64 / 1e9
}

fn percent(part: i64, total: i64) -> f64 {
    if total == 0 { 0.0 } else { 100.0 * seconds(part) / seconds(total) }
}

#[cfg(test)]
pub(super) mod tests {
    use profiler_pprof::{
        FrameKind, FunctionSpec, LabelSpec, LineSpec, LocationSpec, ProfileBuilder, TypeSpec,
    };

    use super::*;

    /// `app`: 30 ns in `inner; leaf` under `main`, 10 ns in `other` under `main`.
    pub(in crate::record) fn profile() -> Profile {
        let (samples, cpu) = (TypeSpec::new("samples", "count"), TypeSpec::new("cpu", "nanoseconds"));
        let mut builder = ProfileBuilder::new(&[samples, cpu], cpu, 10);
        builder.default_sample_type("cpu");
        let mut location = |address, name| {
            let function = FunctionSpec { name, system_name: name, filename: "", start_line: 0 };
            let lines = &[LineSpec { function, line: 0, column: 0 }];
            let kind = FrameKind::Native;
            builder.location(&LocationSpec { mapping: None, address, kind, is_folded: false, lines })
        };
        let (leaf, other, main) = (location(1, "inner; leaf"), location(2, "other"), location(3, "main"));
        let app = [LabelSpec::text("comm", "app")];
        builder.sample(&[leaf, main], &[3, 30], &app);
        builder.sample(&[other, main, main], &[1, 10], &app);
        builder.finish()
    }

    #[test]
    fn functions_are_sorted_by_their_own_time_and_recursion_counts_once() {
        let text = Summary::new(&profile()).to_string();
        let lines: Vec<_> = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
        assert_eq!(lines[0].join(" "), "0.00 s of CPU time in 4 samples");
        assert_eq!(lines[2][1..], ["75.0", "75.0", "inner;", "leaf"]);
        assert_eq!(lines[3][1..], ["25.0", "25.0", "other"]);
        assert_eq!(lines[4][1..], ["0.0", "100.0", "main"]);
    }
}
