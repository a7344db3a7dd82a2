//! Compares what is written in `docs/` with what is there. Metrics are compared with a running agent, in
//! `tests/commands.rs`.

use std::{collections::BTreeSet, fs, path::Path, sync::Arc};

use clap::{Args as _, Command};

use crate::{
    config::{Flags, SAMPLE_LABELS, tests::sources},
    label::{Labeler, Owner, Subject},
    reload,
};

/// The rows of a document's tables that begin with a name in code: their cells, without the backticks.
fn rows(name: &str) -> Vec<Vec<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let cells = |line: &str| line.split('|').skip(1).map(|cell| cell.trim().replace('`', "")).collect();
    text.lines().filter(|line| line.starts_with("| `")).map(cells).collect()
}

fn names(rows: &[Vec<String>]) -> BTreeSet<&str> {
    rows.iter().map(|row| row[0].as_str()).collect()
}

#[test]
fn every_key_is_documented_and_every_documented_key_is_there() {
    let rows = rows("config.md");
    let config = sources(&[]).load().expect("defaults are valid");
    let values = config.values();
    let keys: BTreeSet<_> = values.iter().map(|(key, _)| *key).collect();
    assert_eq!(names(&rows), keys);

    let list =
        |cell: &str| cell.split(", ").filter(|part| !part.is_empty()).map(str::to_owned).collect::<Vec<_>>();
    let documented: BTreeSet<_> =
        rows.iter().flat_map(|row| list(&row[1]).into_iter().zip(list(&row[2]))).collect();
    let command = Flags::augment_args(Command::new("profiler-agent"));
    let there: BTreeSet<_> = command
        .get_arguments()
        .filter(|argument| !matches!(argument.get_id().as_str(), "config" | "print_config"))
        .filter(|argument| !argument.is_hide_set())
        .map(|argument| {
            let variable = argument.get_env().expect("every flag has a variable");
            let flag = argument.get_long().expect("every flag has a long form");
            (format!("--{flag}"), variable.to_string_lossy().into_owned())
        })
        .collect();
    assert_eq!(documented, there);
}

#[test]
fn the_documented_defaults_are_the_defaults() {
    let config = sources(&[]).load().expect("defaults are valid");
    let values = config.values();
    for row in rows("config.md") {
        let value = values.iter().find(|(key, _)| *key == row[0]).and_then(|(_, value)| value.as_ref());
        let value =
            value.map(|value| value.as_str().map_or(value.to_string(), str::to_owned)).unwrap_or_default();
        let depends_on_the_machine = row[3].starts_with("the ") || row[3].contains("cgroup");
        let documented = row[3].as_str();
        assert!(depends_on_the_machine || documented == value, "{}: {documented:?} is {value:?}", row[0]);
    }
}

#[test]
fn the_keys_that_are_said_to_change_at_run_time_do() {
    let said: BTreeSet<_> =
        rows("config.md").into_iter().filter(|row| row[4] == "yes").map(|row| row[0].clone()).collect();
    let live: BTreeSet<_> = reload::tests::live_keys().into_iter().map(str::to_owned).collect();
    assert_eq!(said, live);
}

#[test]
fn every_label_is_documented_and_every_documented_label_is_there() {
    let text = |text: &str| Some(text.to_owned());
    // In full: a new field has a label, maybe.
    let owner = Owner { container_id: text("c"), unit: text("u.service"), slice: text("s.slice") };
    let subject = Subject { exe: "/bin/x", is_kernel_thread: false, comm: "x", owner: Arc::new(owner) };
    let series = Labeler::new("n", &[]).series(&subject);
    let there: BTreeSet<_> = series.iter().map(|(name, _)| name).chain(SAMPLE_LABELS).collect();
    assert_eq!(names(&rows("labels.md")), there);
}

/// What goes out, field by field: destructured, so that a new field does not compile until it is documented.
#[test]
fn every_field_that_leaves_the_node_is_documented() {
    use profiler_pprof::{
        proto::{Function, Label, Line, Location, Mapping, Profile, Sample, ValueType},
        push::{PushRequest, Series},
    };
    let PushRequest { format_version: _, batch_id: _, agent: _, series: _ } = PushRequest::default();
    let Series { labels: _, profile_type: _, temporality: _, start_unix_ns: _, duration_ns: _, pprof: _ } =
        Series::default();
    let Profile {
        sample_type: _,
        sample: _,
        mapping: _,
        location: _,
        function: _,
        string_table: _,
        drop_frames: _,
        keep_frames: _,
        time_nanos: _,
        duration_nanos: _,
        period_type: _,
        period: _,
        comment: _,
        default_sample_type: _,
        doc_url: _,
    } = Profile::default();
    let Sample { location_id: _, value: _, label: _ } = Sample::default();
    let Label { key: _, str: _, num: _, num_unit: _ } = Label::default();
    let Mapping {
        id: _,
        memory_start: _,
        memory_limit: _,
        file_offset: _,
        filename: _,
        build_id: _,
        has_functions: _,
        has_filenames: _,
        has_line_numbers: _,
        has_inline_frames: _,
    } = Mapping::default();
    let Location { id: _, mapping_id: _, address: _, line: _, is_folded: _, kind: _ } = Location::default();
    let Line { function_id: _, line: _, column: _ } = Line::default();
    let Function { id: _, name: _, system_name: _, filename: _, start_line: _ } = Function::default();
    let ValueType { r#type: _, unit: _ } = ValueType::default();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/data.md");
    let text = fs::read_to_string(path).expect("it is in the tree");
    let said = [
        (
            "format_version, agent, batch_id",
            "version of the format, name and version of the agent, a random number of the batch",
        ),
        (
            "start_unix_ns, duration_ns, profile_type, period",
            "start and length of the window, sampling period, profile type",
        ),
        ("series labels", "series labels"),
        ("sample labels", "sample labels: process name, thread name, pid"),
        ("mappings", "executables: path as the process sees it, build id, address range"),
        (
            "locations, lines, functions",
            "frames: function, file and line of source, address as the file states it",
        ),
        ("kernel locations", "kernel frames: function and offset in its module"),
        ("values", "how often each stack was seen, and the CPU time it stands for"),
        ("comments", "what a profile says of itself"),
        ("values of heap profiles", "allocations"),
    ];
    for (fields, phrase) in said {
        assert!(text.contains(phrase), "docs/data.md says of {fields}: {phrase:?}");
    }
}
