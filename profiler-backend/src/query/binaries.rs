//! How well the code of each binary unwinds and is named: which one cuts stacks short, why, and what would help.
//!
//! Read from the stacks themselves: the frame at the root end that says why there are no more, and the frames that have an
//! address for a name.

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
    sync::Arc,
};

use profiler_pprof::FrameKind;
use serde::Serialize;

use super::{QueryError, merge::Sums, params::Params, select::Selection};
use crate::{
    stack::{Frame, FrameParts, Stack},
    store::Snapshot,
};

/// Binaries in an answer: those that cut the most stacks, then those with the most frames without a name.
const BINARIES_MAX: usize = 200;
/// Reasons told apart per binary; the agent has nine.
const REASONS_MAX: usize = 16;
/// Share of frames without names from which the missing names are worth a hint, in percent.
const UNNAMED_HINT_PERCENT: f64 = 20.0;
/// What pprof files call memory of generated code.
const GENERATED: &str = "//anon";
/// Code in no file.
const UNMAPPED: &str = "[unmapped]";

/// Answer of `binaries`.
#[derive(Debug, Serialize)]
pub(crate) struct Binaries {
    r#type: String,
    sample_type: Arc<str>,
    unit: Arc<str>,
    profiles: usize,
    binaries: Vec<Row>,
    /// Binaries beyond the bound.
    left_out: usize,
}

/// One binary. Values are of the sample type.
#[derive(Debug, PartialEq, Serialize)]
struct Row {
    binary: String,
    /// Of stacks with a frame here.
    total: i64,
    /// Of those whose stack ends here too early.
    truncated: i64,
    truncated_percent: f64,
    /// Frames of its code without a name, in percent of its frames, each weighted by its stack's value.
    unknown_percent: f64,
    /// Why most of its truncated stacks end.
    reason: Option<String>,
    /// What would help.
    hint: Option<&'static str>,
}

/// The binaries of the selected stacks.
pub(crate) fn binaries(snapshot: &Snapshot, params: &Params) -> Result<Binaries, QueryError> {
    params.range_ms()?;
    let selection = Selection::from_params(snapshot, params)?;
    let value_type = selection.value_type(params.sample_type())?;
    let (sample_type, unit) = match &value_type {
        Some(value_type) => (Arc::clone(&value_type.name), Arc::clone(&value_type.unit)),
        None => (params.sample_type().unwrap_or("").into(), "".into()),
    };
    let mut sums = Sums::default();
    if value_type.is_some() {
        sums.add_all(snapshot, &selection, (&sample_type, &unit), None)?;
    }
    let mut counts = Counts::default();
    sums.for_each_stack(snapshot, &selection, |stack, value| counts.add(stack, value));
    let mut rows: Vec<Row> = counts.rows.iter().map(|(name, count)| count.row(name)).collect();
    let unnamed = |row: &Row| (row.unknown_percent * row.total as f64) as i64;
    rows.sort_by(|a, b| {
        let key = |row: &Row| (Reverse(row.truncated), Reverse(unnamed(row)), Reverse(row.total));
        key(a).cmp(&key(b)).then_with(|| a.binary.cmp(&b.binary))
    });
    let left_out = rows.len().saturating_sub(BINARIES_MAX);
    rows.truncate(BINARIES_MAX);
    Ok(Binaries {
        r#type: params.profile_type().to_owned(),
        sample_type,
        unit,
        profiles: selection.profiles,
        binaries: rows,
        left_out,
    })
}

#[derive(Default)]
struct Counts {
    rows: HashMap<String, Count>,
}

#[derive(Default)]
struct Count {
    total: i64,
    frames: i64,
    unnamed: i64,
    /// Values of stacks that end here too early, by the frame that says why.
    cut: HashMap<Arc<str>, i64>,
}

impl Counts {
    fn add(&mut self, stack: &Stack, value: i64) {
        let mut seen: HashSet<&str> = HashSet::new();
        let code = || stack.frames.iter().map(|frame| &frame.parts).filter(|parts| is_user_code(parts));
        for parts in code() {
            let name = binary(parts);
            let is_first = seen.insert(name);
            let count = self.of(name);
            count.frames = count.frames.saturating_add(value);
            count.unnamed = count.unnamed.saturating_add(if is_unnamed(parts) { value } else { 0 });
            count.total = count.total.saturating_add(if is_first { value } else { 0 });
        }
        let why = stack.frames.last().map(|frame: &Arc<Frame>| &frame.parts);
        let why = why.filter(|parts| parts.kind == FrameKind::Marker);
        if let (Some(why), Some(last)) = (why, code().next_back()) {
            let cut = &mut self.of(binary(last)).cut;
            let has_room = cut.len() < REASONS_MAX || cut.contains_key(&why.function);
            let reason = if has_room { Arc::clone(&why.function) } else { "[other]".into() };
            let sum = cut.entry(reason).or_default();
            *sum = sum.saturating_add(value);
        }
    }

    fn of(&mut self, name: &str) -> &mut Count {
        if !self.rows.contains_key(name) {
            self.rows.insert(name.to_owned(), Count::default());
        }
        self.rows.get_mut(name).expect("it was there or was inserted")
    }
}

impl Count {
    fn row(&self, binary: &str) -> Row {
        let percent = |part: i64, whole: i64| part as f64 * 100.0 / whole.max(1) as f64;
        let truncated = self.cut.values().copied().fold(0, i64::saturating_add);
        let most = self.cut.iter().max_by_key(|(reason, value)| (**value, Reverse(*reason)));
        let reason = most.map(|(reason, _)| plain(reason).to_owned());
        let unknown_percent = percent(self.unnamed, self.frames);
        let hint = reason.as_deref().and_then(|reason| hint(reason, binary));
        let unnamed = (unknown_percent >= UNNAMED_HINT_PERCENT).then(|| unnamed_hint(binary));
        Row {
            binary: binary.to_owned(),
            total: self.total,
            truncated,
            truncated_percent: percent(truncated, self.total),
            unknown_percent,
            reason,
            hint: hint.or(unnamed),
        }
    }
}

fn is_user_code(parts: &FrameParts) -> bool {
    !matches!(parts.kind, FrameKind::Marker | FrameKind::Kernel)
}

/// The name of its file.
fn binary(parts: &FrameParts) -> &str {
    let path: &str = &parts.binary;
    match path {
        "" => UNMAPPED,
        GENERATED => GENERATED,
        path => path.rsplit('/').next().filter(|name| !name.is_empty()).unwrap_or(path),
    }
}

/// No name was found: `app+0x1234`, `[jit]` and what begins so, `[unknown]`.
fn is_unnamed(parts: &FrameParts) -> bool {
    let function: &str = &parts.function;
    let is_address = |rest: &str| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_hexdigit());
    match function {
        "" | "[unknown]" | "[jit]" => true,
        _ if function.starts_with("[jit: ") => true,
        _ => function
            .strip_prefix(binary(parts))
            .and_then(|rest| rest.strip_prefix("+0x"))
            .is_some_and(is_address),
    }
}

/// `[truncated: no frame pointers]` -> `no frame pointers`.
fn plain(marker: &str) -> &str {
    let inside = marker.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(marker);
    inside.strip_prefix("truncated: ").unwrap_or(inside)
}

/// What would lead on where a walk ended: by beginnings of the reasons that agents give.
const HINTS: [(&str, &str); 7] = [
    (
        "no unwind information",
        "built without tables (-fno-asynchronous-unwind-tables): keep .eh_frame or frame pointers",
    ),
    ("no frame pointers", "walked before its tables were there, or by frame pointers that it does not keep"),
    ("unwind information", "hand-written assembly: build the library without it, or live with it"),
    ("address in no known mapping", "mapped after its tables were made: passes when they are renewed"),
    ("too deep", "deeper than a sample holds: look for the recursion"),
    ("stack memory not readable", "its stack is swapped out, or the frame pointer holds something else"),
    ("user registers not found", "the kernel does not tell them: a newer one does"),
];

fn hint(reason: &str, binary: &str) -> Option<&'static str> {
    if binary == GENERATED {
        return Some("generated code: have its engine keep frame pointers (JVM: -XX:+PreserveFramePointer)");
    }
    HINTS.iter().find(|(known, _)| reason.starts_with(known)).map(|(_, hint)| *hint)
}

fn unnamed_hint(binary: &str) -> &'static str {
    match binary {
        GENERATED => "generated code: the notes of the profile say which switch names it",
        UNMAPPED => "code in no file: its process was gone before its mappings were read",
        _ => "stripped: install its debug symbols",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(kind: FrameKind, binary: &str, function: &str) -> FrameParts {
        FrameParts {
            kind,
            inlined: false,
            function: function.into(),
            system_name: function.into(),
            file: "".into(),
            start_line: 0,
            line: 0,
            column: 0,
            address: 0x1234,
            binary: binary.into(),
            build_id: "".into(),
        }
    }

    #[test]
    fn a_frame_without_a_name_is_known_by_its_address() {
        let check = |binary: &str, function: &str, expect: bool| {
            assert_eq!(is_unnamed(&parts(FrameKind::Native, binary, function)), expect, "{function}");
        };
        check("/usr/lib/libc.so.6", "libc.so.6+0x29d90", true);
        check("/usr/lib/libc.so.6", "libc.so.6+0xoops", false);
        check("/usr/lib/libc.so.6", "other+0x29d90", false);
        check("/usr/lib/libc.so.6", "qsort", false);
        check("//anon", "[jit: names with node --perf-basic-prof]", true);
        check("//anon", "[jit]", true);
        check("//anon", "hot", false);
        check("", "[unknown]", true);
        check("/x", "", true);
    }

    #[test]
    fn every_reason_that_agents_give_has_a_hint() {
        // As the agent's export/encode.rs names them.
        let markers = [
            "[truncated: stack memory not readable]",
            "[truncated: no frame pointers]",
            "[truncated: address in no known mapping]",
            "[truncated: no unwind information]",
            "[truncated: unwind information not usable]",
            "[truncated: unwind information needs a lost register]",
            "[truncated: too deep]",
            "[truncated: user registers not found]",
        ];
        for marker in markers {
            assert!(hint(plain(marker), "x").is_some(), "{marker}");
        }
        assert_eq!(hint("something new", "x"), None);
    }
}
