//! What the real `go tool pprof` makes of our profiles.

use std::path::PathBuf;
use std::process::Command;

use profiler_pprof::proto::Profile;
use profiler_pprof::{
    FrameKind, FunctionSpec, LabelSpec, LineSpec, LocationSpec, MappingSpec, ProfileBuilder, TypeSpec, diff,
    encode, encode_gzip, merge,
};

const CPU: TypeSpec<'_> = TypeSpec::new("cpu", "nanoseconds");
const SAMPLES: TypeSpec<'_> = TypeSpec::new("samples", "count");
const SPECIAL: &str = "<impl a::B<'_, \"q\"> as C>::d\u{e9}::{{closure}}";

/// Two and a half seconds of CPU in a window of ten: an inlined call, a kernel frame, a frame without a symbol.
fn profile() -> Profile {
    let mut builder = ProfileBuilder::new(&[SAMPLES, CPU], CPU, 10_000_000);
    builder.default_sample_type("cpu");
    builder.comment("100 Hz, nothing lost");
    builder.time_ns(1_700_000_000_000_000_000);
    builder.duration_ns(10_000_000_000);
    // A path that exists, and holds other symbols: pprof must not look there.
    let app = builder.mapping(&mapping(0x40_0000, "/bin/sh", "c0ffee"));
    let kernel = builder.mapping(&mapping(0xffff_ffff_8100_0000, "[kernel.kallsyms]", ""));
    let inlined = builder.location(&LocationSpec {
        mapping: Some(app),
        address: 0x40_1000,
        kind: FrameKind::Native,
        is_folded: false,
        lines: &[line("inner(int)", "_Z5inneri", 12, 3), line("outer", "outer", 40, 0)],
    });
    let special = builder.location(&LocationSpec {
        mapping: Some(app),
        address: 0x40_2000,
        kind: FrameKind::Native,
        is_folded: false,
        lines: &[line(SPECIAL, "_RNvB_5weird", 7, 0)],
    });
    let read = builder.location(&LocationSpec {
        mapping: Some(kernel),
        address: 0xffff_ffff_8100_1234,
        kind: FrameKind::Kernel,
        is_folded: false,
        lines: &[line("vfs_read", "vfs_read", 0, 0)],
    });
    let unresolved = builder.location(&LocationSpec {
        mapping: Some(app),
        address: 0x40_3000,
        kind: FrameKind::Native,
        is_folded: false,
        lines: &[],
    });
    let labels = [LabelSpec::text("comm", "app \"1\""), LabelSpec::number("pid", 42)];
    builder.sample(&[inlined, special], &[150, 1_500_000_000], &labels);
    builder.sample(&[read, inlined, special], &[75, 750_000_000], &labels);
    builder.sample(&[unresolved, special], &[25, 250_000_000], &[LabelSpec::text("comm", "other")]);
    builder.finish()
}

fn mapping<'a>(start: u64, filename: &'a str, build_id: &'a str) -> MappingSpec<'a> {
    MappingSpec { start, limit: start + 0x10_0000, offset: 0, filename, build_id }
}

fn line<'a>(name: &'a str, system_name: &'a str, line: i64, column: i64) -> LineSpec<'a> {
    LineSpec {
        function: FunctionSpec { name, system_name, filename: "/src/app.cc", start_line: 5 },
        line,
        column,
    }
}

/// Writes the bytes where `go tool pprof` can read them.
fn file(name: &str, bytes: &[u8]) -> String {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.pb.gz"));
    std::fs::write(&path, bytes).expect("the target directory is writable");
    path.into_os_string().into_string().expect("the target directory has a UTF-8 name")
}

/// Standard output of `go tool pprof`. It must succeed without a word of complaint.
#[track_caller]
fn run(args: &[&str]) -> String {
    let mut command = Command::new("go");
    // The user's settings have no say in it.
    command.args(["tool", "pprof"]).args(args).env("PPROF_BINARY_PATH", "").env("TZ", "UTC");
    let output = command.output().expect("`go` is on the PATH");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && err.is_empty(), "{command:?}: {}\n{out}\n{err}", output.status);
    out.into_owned()
}

/// What `go tool pprof <args>` prints for a file with these bytes.
#[track_caller]
fn pprof(test: &str, args: &[&str], bytes: &[u8]) -> String {
    run(&[args, &[&file(test, bytes)]].concat())
}

/// The table of `-top`, without the header above it.
fn table(top: &str) -> Vec<&str> {
    top.lines().skip_while(|line| !line.starts_with("Showing nodes")).collect()
}

/// Every line of `expect` occurs in `text`, in this order, perhaps with others between; blanks count as one.
#[track_caller]
fn assert_lines(text: &str, expect: &[&str]) {
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut lines = text.lines().map(words);
    for wanted in expect {
        assert!(lines.any(|line| line == *wanted), "no line {wanted:?}, or not in its place, in\n{text}");
    }
}

#[test]
#[ignore = "needs go"]
fn raw_shows_every_part_of_the_profile() {
    let raw = pprof("raw", &["-raw"], &encode_gzip(&profile()));
    let special = format!("2: 0x402000 M=1 {SPECIAL} /src/app.cc:7:0 s=5(_RNvB_5weird)");
    assert_lines(
        &raw,
        &[
            "Comment: 100 Hz, nothing lost",
            "PeriodType: cpu nanoseconds",
            "Period: 10000000",
            "Time: 2023-11-14 22:13:20 +0000 UTC",
            "Duration: 10s",
            "samples/count cpu/nanoseconds[dflt]",
            "150 1500000000: 1 2",
            "comm:[app \"1\"]",
            "pid:[42]",
            "75 750000000: 3 1 2",
            "25 250000000: 4 2",
            "comm:[other]",
            "Locations",
            "1: 0x401000 M=1 inner(int) /src/app.cc:12:3 s=5(_Z5inneri)",
            "outer /src/app.cc:40:0 s=5",
            &special,
            "3: 0xffffffff81001234 M=2 vfs_read /src/app.cc:0:0 s=5",
            "4: 0x403000 M=1",
            "Mappings",
            "1: 0x400000/0x500000/0x0 /bin/sh c0ffee [FN][FL][LN][IN]",
            "2: 0xffffffff81000000/0xffffffff81100000/0x0 [kernel.kallsyms] [FN][FL]",
        ],
    );
}

#[test]
#[ignore = "needs go"]
fn top_shows_duration_utilisation_and_shares() {
    let special = format!("0 0% 100% 2500ms 100% {SPECIAL}");
    let header = ["File: sh", "Build ID: c0ffee", "100 Hz, nothing lost", "Type: cpu"];
    let expect = [
        "Duration: 10s, Total samples = 2500ms (25.00%)",
        "1500ms 60.00% 60.00% 2250ms 90.00% inner(int) (inline)",
        "750ms 30.00% 90.00% 750ms 30.00% vfs_read",
        "250ms 10.00% 100% 250ms 10.00% [sh]",
        "0 0% 100% 2250ms 90.00% outer",
    ];
    for (test, bytes) in [("top", encode_gzip(&profile())), ("top-plain", encode(&profile()))] {
        let top = pprof(test, &["-top", "-nodecount=20"], &bytes);
        assert_lines(&top, &header);
        assert_lines(&top, &expect);
        assert_lines(&top, &[&special]);
    }
}

#[test]
#[ignore = "needs go"]
fn another_sample_type_can_be_chosen() {
    let top = pprof("samples", &["-top", "-sample_index=samples"], &encode_gzip(&profile()));
    assert_lines(&top, &["Type: samples", "150 60.00% 60.00% 225 90.00% inner(int) (inline)"]);
}

#[test]
#[ignore = "needs go"]
fn labels_select_samples() {
    let top = pprof("focus", &["-top", "-tagfocus=comm=other"], &encode_gzip(&profile()));
    assert_lines(&top, &["Showing nodes accounting for 250ms, 10.00% of 2500ms total"]);
    let tags = pprof("tags", &["-tags"], &encode_gzip(&profile()));
    assert!(tags.contains("app \"1\"") && tags.contains("pid: Total 2.25s of 2.50s (90.00%)"), "{tags}");
}

#[test]
#[ignore = "needs go"]
fn a_merged_profile_adds_up() {
    let merged = merge(&[&profile(), &profile()]).expect("equal types");
    let top = pprof("merged", &["-top"], &encode_gzip(&merged));
    assert_lines(&top, &["Duration: 20s, Total samples = 5000ms (25.00%)"]);
    assert_lines(&top, &["3000ms 60.00% 60.00% 4500ms 90.00% inner(int) (inline)"]);
}

#[test]
#[ignore = "needs go"]
fn our_sums_and_differences_are_those_of_go() {
    let mut smaller = profile();
    smaller.sample.pop();
    smaller.sample[0].value = vec![50, 500_000_000];
    let (all, base) = (file("all", &encode_gzip(&profile())), file("base", &encode_gzip(&smaller)));

    let sum = merge(&[&profile(), &smaller]).expect("equal types");
    let ours = pprof("sum", &["-top"], &encode_gzip(&sum));
    let theirs = run(&["-top", &all, &base]);
    assert_lines(&ours, &["2000ms 53.33% 53.33% 3500ms 93.33% inner(int) (inline)"]);
    assert_eq!(table(&ours), table(&theirs));

    let difference = diff(&profile(), &smaller).expect("equal types");
    let ours = pprof("difference", &["-top"], &encode_gzip(&difference));
    let theirs = run(&["-top", &format!("-base={base}"), &all]);
    assert_lines(&ours, &["1000ms 80.00% 80.00% 1000ms 80.00% inner(int) (inline)"]);
    assert!(!ours.contains("vfs_read"), "it did not change:\n{ours}");
    assert_eq!(table(&ours), table(&theirs));
}

#[test]
#[ignore = "needs go"]
fn a_profile_without_samples_is_read() {
    let empty = ProfileBuilder::new(&[SAMPLES, CPU], CPU, 10_000_000).finish();
    assert_lines(&pprof("empty", &["-raw"], &encode_gzip(&empty)), &["samples/count cpu/nanoseconds"]);
}
