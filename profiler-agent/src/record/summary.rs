//! What a recording shows at its end: the functions that use most CPU time, or hold most memory.

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
    /// Of the sample type that is shown.
    pub(super) value: i64,
}

/// What is shown of a profile that has several sample types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shown {
    /// CPU time, in nanoseconds.
    Cpu,
    /// Bytes in use.
    InUse,
    /// Bytes allocated: of a heap of which nothing is in use.
    Allocated,
}

impl Shown {
    /// What of this profile.
    pub(super) fn of(profile: &Profile) -> Self {
        match (sum(profile, "inuse_space"), profile.sample_type_index("cpu")) {
            (None, _) | (_, Some(_)) => Self::Cpu,
            (Some(0), None) => Self::Allocated,
            (Some(_), None) => Self::InUse,
        }
    }

    /// Its sample type.
    fn column(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::InUse => "inuse_space",
            Self::Allocated => "alloc_space",
        }
    }

    /// For people, and the unit.
    pub(super) fn title(self) -> (&'static str, &'static str) {
        match self {
            Self::Cpu => ("CPU time", "ns"),
            Self::InUse => ("Memory in use", "bytes"),
            Self::Allocated => ("Memory allocated", "bytes"),
        }
    }
}

/// Of all values of a sample type; `None` where the profile has no such type.
fn sum(profile: &Profile, column: &str) -> Option<i64> {
    let index = profile.sample_type_index(column)?;
    Some(profile.sample.iter().filter_map(|sample| sample.value.get(index)).sum())
}

/// The samples of a profile by the sample type that is shown, but for those that have none of it.
pub(super) fn stacks(profile: &Profile) -> impl Iterator<Item = Stack<'_>> {
    let index = profile.sample_type_index(Shown::of(profile).column()).unwrap_or(0);
    let profile_stacks = profile.sample.iter().map(move |sample| stack(profile, sample, index));
    profile_stacks.filter(|stack| stack.value != 0)
}

fn stack<'a>(profile: &'a Profile, sample: &Sample, index: usize) -> Stack<'a> {
    Stack {
        process: label(profile, sample, "comm"),
        functions: functions(profile, sample),
        value: sample.value.get(index).copied().unwrap_or(0),
    }
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

/// The functions with most of their own.
pub(super) struct Summary<'a> {
    shown: Shown,
    headline: String,
    total: i64,
    /// Name, its own, with all that it calls.
    top: Vec<(&'a str, i64, i64)>,
}

impl<'a> Summary<'a> {
    /// Of a profile of CPU time or of a heap.
    pub(super) fn new(profile: &'a Profile) -> Self {
        let mut functions: HashMap<&str, (i64, i64)> = HashMap::new();
        let mut total = 0;
        for stack in stacks(profile) {
            total += stack.value;
            if let Some(leaf) = stack.functions.iter().find(|function| !is_allocator(function)) {
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
        Self { shown: Shown::of(profile), headline: headline(profile), total, top }
    }
}

/// Every allocation of C++ is its: what it is called by tells them apart.
fn is_allocator(function: &str) -> bool {
    function.starts_with("operator new")
}

fn headline(profile: &Profile) -> String {
    let of = |column| sum(profile, column).unwrap_or(0);
    match Shown::of(profile) {
        Shown::Cpu => format!("{:.2} s of CPU time in {} samples", seconds(of("cpu")), of("samples")),
        Shown::InUse | Shown::Allocated => format!(
            "{:.1} MiB in use of {:.1} MiB allocated ({} and {} objects; estimates)",
            mebibytes(of("inuse_space")),
            mebibytes(of("alloc_space")),
            of("inuse_objects"),
            of("alloc_objects")
        ),
    }
}

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { shown, headline, total, top } = self;
        writeln!(f, "{headline}")?;
        let unit = match shown {
            Shown::Cpu => "own s",
            Shown::InUse => "held MiB",
            Shown::Allocated => "own MiB",
        };
        writeln!(f, "{unit:>9} {:>6} {:>6}  function", "own %", "all %")?;
        for &(name, own, all) in top {
            let name: String = name.chars().filter(|c| !c.is_control()).take(NAME_CHARS_MAX).collect();
            let (own_share, all_share) = (percent(own, *total), percent(all, *total));
            let own = if *shown == Shown::Cpu { seconds(own) } else { mebibytes(own) };
            writeln!(f, "{own:>9.2} {own_share:>6.1} {all_share:>6.1}  {name}")?;
        }
        Ok(())
    }
}

#[expect(clippy::cast_precision_loss, reason = "shown with two digits")]
fn seconds(ns: i64) -> f64 {
    ns as f64 / 1e9
}

#[expect(clippy::cast_precision_loss, reason = "shown with two digits")]
fn mebibytes(bytes: i64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
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
    use crate::record::heap::tests::four_columns;

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

    #[test]
    fn of_a_heap_the_functions_that_hold_memory_are_shown_or_else_those_that_allocate() {
        let mut heap = four_columns();
        let text = Summary::new(&heap).to_string();
        assert!(text.contains("(1 and 7 objects; estimates)") && text.contains("held MiB"), "{text}");
        assert!(text.contains("keep") && !text.contains("drop_all"), "{text}");
        heap.sample.iter_mut().for_each(|sample| sample.value[2..].fill(0));
        let text = Summary::new(&heap).to_string();
        assert!(text.contains("own MiB") && text.contains("drop_all"), "{text}");
        assert!(is_allocator("operator new[](unsigned long)") && !is_allocator("keep"));
    }
}
