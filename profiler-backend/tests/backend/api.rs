//! The API over HTTP, as an agent and a browser use it.

use std::{
    collections::BTreeSet,
    io::Write,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use super::common::{Backend, Line, PERIOD_NS, cpu, get, heap, request, send, tree};
use profiler_backend::{Options, ServeError, Server, Token};
use profiler_pprof::{
    DecodeLimits, FrameKind, FunctionSpec, LineSpec, LocationSpec, MappingSpec, ProfileBuilder, TypeSpec,
    check, decode, encode,
    push::{PushRequest, Series},
};
use serde_json::{Value, json};

fn backend() -> (tempfile::TempDir, Backend) {
    let directory = tempfile::tempdir().expect("tempdir");
    let backend = Backend::start(directory.path());
    (directory, backend)
}

const CART: &[(&str, &str)] = &[("container", "cart"), ("node", "n1")];
const SHOP: &[(&str, &str)] = &[("container", "shop"), ("node", "n1")];

/// Two containers: cart with 30 samples in two windows, shop with 5.
fn two_containers(backend: &Backend) {
    backend.store(cpu(
        CART,
        60_000,
        &[
            Line("main;work;hot", 8, &[("comm", "cartd"), ("pid", "41")]),
            Line("main;idle", 2, &[("comm", "cartd"), ("pid", "41")]),
        ],
    ));
    backend.store(cpu(CART, 50_000, &[Line("main;work;hot", 20, &[("comm", "worker"), ("pid", "42")])]));
    backend.store(cpu(SHOP, 60_000, &[Line("main;sell", 5, &[("comm", "shopd")])]));
}

#[test]
fn a_selector_finds_exactly_the_stacks_of_its_container() {
    let (_directory, backend) = backend();
    two_containers(&backend);
    let merged = backend.json(r#"/api/v1/merge?query={container="cart"}&sample_type=samples"#);
    assert_eq!(tree(&merged), ["0 total 30 0", "1 main 30 0", "2 work 28 0", "3 hot 28 28", "2 idle 2 2"]);
    let fields =
        ["type", "sample_type", "unit", "temporality", "total", "profiles", "duration_ms", "comments"];
    let expect = json!(["cpu", "samples", "count", "delta", 30, 2, 20_000, ["rate: 100 Hz"]]);
    assert_eq!(fields.iter().map(|field| merged[field].clone()).collect::<Value>(), expect);
    assert_eq!(merged["files"], json!(["", "app.c:7", "app.c:7", "app.c:7", "app.c:7"]));
    assert_eq!(merged["kinds"], json!([0, 1, 1, 1, 1]));
}

#[test]
fn the_default_sample_type_is_the_profiles_own() {
    let (_directory, backend) = backend();
    two_containers(&backend);
    let merged = backend.json("/api/v1/merge");
    assert_eq!((&merged["sample_type"], &merged["unit"]), (&json!("cpu"), &json!("nanoseconds")));
    assert_eq!(merged["total"], json!(35 * PERIOD_NS));
}

#[test]
fn sample_labels_select_and_group_as_series_labels_do() {
    let (_directory, backend) = backend();
    two_containers(&backend);
    let total = |query: &str| {
        backend.json(&format!("/api/v1/merge?sample_type=samples&query={query}"))["total"].clone()
    };
    assert_eq!(total(r#"{comm="worker"}"#), 20);
    assert_eq!(total(r#"{comm=~"cart.*|shopd"}"#), 15);
    assert_eq!(total(r#"{comm!="worker",container="cart"}"#), 10);
    assert_eq!(total(r#"{pid="42"}"#), 20);
    assert_eq!(total(r#"{pid=""}"#), 5);
    assert_eq!(total(r#"{nothing="x"}"#), 0);
    assert_eq!(total(r#"{nothing=""}"#), 35);

    let by_comm = backend.json("/api/v1/merge?sample_type=samples&group_by=comm");
    let first: Vec<String> = tree(&by_comm).into_iter().filter(|line| line.starts_with("1 ")).collect();
    assert_eq!(first, ["1 worker 20 0", "1 cartd 10 0", "1 shopd 5 0"]);
    let by_pid = backend.json("/api/v1/merge?sample_type=samples&group_by=pid");
    let first: Vec<String> = tree(&by_pid).into_iter().filter(|line| line.starts_with("1 ")).collect();
    assert_eq!(first, ["1 42 20 0", "1 41 10 0", "1 [no pid] 5 0"]);
}

#[test]
fn inlined_calls_are_levels_of_their_own() {
    let (_directory, backend) = backend();
    backend.store(cpu(CART, 1000, &[Line("main;outer<middle<inner;leaf", 1, &[])]));
    let merged = backend.json("/api/v1/merge?sample_type=samples");
    let expect = ["0 total 1 0", "1 main 1 0", "2 outer 1 0", "3 middle 1 0", "4 inner 1 0", "5 leaf 1 1"];
    assert_eq!(tree(&merged), expect);
}

#[test]
fn a_frame_without_a_symbol_is_its_binary_and_offset() {
    let (_directory, backend) = backend();
    backend.store(cpu(CART, 1000, &[Line("main;", 1, &[])]));
    let merged = backend.json("/api/v1/merge?sample_type=samples");
    assert_eq!(tree(&merged), ["0 total 1 0", "1 main 1 0", "2 app+0x1000 1 1"]);
}

#[test]
fn small_nodes_are_folded_without_losing_a_value() {
    let (_directory, backend) = backend();
    two_containers(&backend);
    let merged = backend.json("/api/v1/merge?sample_type=samples&max_nodes=3");
    assert_eq!(
        tree(&merged),
        ["0 total 35 0", "1 main 35 0", "2 work 28 0", "3 [other] 28 28", "2 [other] 7 7"]
    );
    assert_eq!(merged["truncated_nodes"], 3);
}

#[test]
fn of_a_snapshot_type_only_the_newest_of_each_series_counts() {
    let (_directory, backend) = backend();
    backend.store(heap(CART, 40_000, &[Line("main;alloc", 500, &[])]));
    backend.store(heap(CART, 20_000, &[Line("main;alloc", 700, &[])]));
    backend.store(heap(SHOP, 30_000, &[Line("main;alloc", 11, &[])]));
    let merged = backend.json("/api/v1/merge?type=heap");
    assert_eq!((&merged["total"], &merged["profiles"]), (&json!(711), &json!(2)));
    assert_eq!(merged["temporality"], "snapshot");
    let earlier = backend.json("/api/v1/merge?type=heap&to=now-25s");
    assert_eq!(earlier["total"], 511);
}

#[test]
fn totals_over_time_equal_the_merged_total() {
    let (_directory, backend) = backend();
    two_containers(&backend);
    let answer = backend.json("/api/v1/series?sample_type=samples&step=10s&group_by=container");
    assert_eq!((&answer["unit"], &answer["step_ms"]), (&json!("count"), &json!(10_000)));
    assert_eq!(answer["start_ms"].as_i64().expect("a time") % 10_000, 0);
    let total = |group: &Value| -> i64 {
        group["values"].as_array().expect("values").iter().filter_map(Value::as_i64).sum()
    };
    let groups = answer["series"].as_array().expect("groups");
    let totals: Vec<_> = groups.iter().map(|group| (&group["labels"], total(group))).collect();
    assert_eq!(totals, [(&json!({"container": "cart"}), 30), (&json!({"container": "shop"}), 5)]);

    let one = backend.json("/api/v1/series?sample_type=samples");
    assert_eq!(one["series"][0]["labels"], json!({}));
    assert_eq!(total(&one["series"][0]), 35);
    let sum = backend.json("/api/v1/merge?sample_type=samples")["total"].clone();
    assert_eq!(sum, 35);
}

#[test]
fn a_window_is_spread_over_the_steps_it_overlaps() {
    let (_directory, backend) = backend();
    // Windows of 10 s side by side, never on the grid of the steps: what is between the first and the last is level.
    let start = cpu(SHOP, 61_000, &[]).start_unix_ns / 10_000_000_000 * 10_000_000_000 + 3_000_000_000;
    for window in 0..5 {
        let mut series = cpu(SHOP, 0, &[Line("main", 1000, &[])]);
        series.start_unix_ns = start + window * 10_000_000_000;
        backend.store(series);
    }
    let from = start / 1_000_000;
    let path = format!("/api/v1/series?sample_type=samples&step=10s&from={from}&to={}", from + 41_000);
    let values = backend.json(&path)["series"][0]["values"].clone();
    assert_eq!(values, json!([700, 1000, 1000, 1000, 1000, 300]));
}

#[test]
fn a_profile_counts_where_its_window_starts() {
    let (_directory, backend) = backend();
    two_containers(&backend);
    let total =
        |range: &str| backend.json(&format!("/api/v1/merge?sample_type=samples&{range}"))["total"].clone();
    assert_eq!(total("from=now-55s"), 20);
    assert_eq!(total("to=now-55s"), 15);
    assert_eq!(total("to=now-5m"), 0);
}

#[test]
fn types_labels_and_values_tell_what_there_is() {
    let (_directory, backend) = backend();
    two_containers(&backend);
    backend.store(heap(&[("container", "cart"), ("team", "a")], 1000, &[Line("main", 1, &[("kind", "x")])]));
    let types = json!({"types": [
        {"type": "cpu", "temporality": "delta", "default_sample_type": "cpu", "sample_types": [
            {"type": "samples", "unit": "count"}, {"type": "cpu", "unit": "nanoseconds"}]},
        {"type": "heap", "temporality": "snapshot", "default_sample_type": "inuse_space", "sample_types": [
            {"type": "inuse_space", "unit": "bytes"}]},
    ]});
    assert_eq!(backend.json("/api/v1/types"), types);
    let labels = backend.json("/api/v1/labels");
    assert_eq!(labels, json!({"labels": ["comm", "container", "kind", "node", "pid", "team"]}));
    let of_heap = backend.json("/api/v1/labels?type=heap");
    assert_eq!(of_heap, json!({"labels": ["container", "kind", "team"]}));

    let values = |path: &str| backend.json(&format!("/api/v1/labels/{path}"));
    let all = |values: &[&str]| json!({"values": values, "truncated": false});
    assert_eq!(values("container/values"), all(&["cart", "shop"]));
    assert_eq!(values(r#"container/values?query={comm="shopd"}"#), all(&["shop"]));
    assert_eq!(values("comm/values"), all(&["cartd", "shopd", "worker"]));
    assert_eq!(values(r#"comm/values?query={container="cart"}"#), all(&["cartd", "worker"]));
    assert_eq!(values("pid/values"), all(&["41", "42"]));
    assert_eq!(values("team/values?type=cpu"), all(&[]));
    assert_eq!(values("team/values?type=heap"), all(&["a"]));
    assert_eq!(values("nothing/values"), all(&[]));
    assert_eq!(values("comm/values?limit=1")["truncated"], true);
}

#[test]
fn pprof_keeps_values_labels_inlining_and_duration() {
    let (_directory, backend) = backend();
    two_containers(&backend);
    backend.store(cpu(SHOP, 40_000, &[Line("main;outer<inner", 1, &[("comm", "shopd")])]));
    let response =
        backend.get(r#"/api/v1/merge?format=pprof&query={container=~"cart|shop"}&sample_type=samples"#);
    assert_eq!(response.status, 200);
    assert_eq!(response.header("content-disposition"), "attachment; filename=\"cpu.pb.gz\"");
    let profile = decode(&response.body, &DecodeLimits::default()).expect("a profile");
    check(&profile).expect("a valid profile");

    let text = |index: i64| profile.string(index).expect("in the table").to_owned();
    let total = |index: usize| profile.sample.iter().map(|sample| sample.value[index]).sum::<i64>();
    assert_eq!((total(0), total(1)), (36, 36 * PERIOD_NS));
    assert_eq!(text(profile.default_sample_type), "samples");
    assert_eq!(profile.period, PERIOD_NS);
    // Windows of 10 s at -60 s, twice, at -50 s and at -40 s; the test's own delays move them a little.
    assert!(
        (29_000_000_000..=31_000_000_000).contains(&profile.duration_nanos),
        "{}",
        profile.duration_nanos
    );
    assert_eq!(profile.comment.iter().map(|&c| text(c)).collect::<Vec<_>>(), ["rate: 100 Hz"]);
    assert!(profile.mapping.iter().all(|mapping| mapping.has_functions));

    let labels: BTreeSet<String> = profile
        .sample
        .iter()
        .flat_map(|sample| &sample.label)
        .map(|l| {
            format!(
                "{}={}{}",
                text(l.key),
                text(l.str),
                if l.str == 0 { l.num.to_string() } else { String::new() }
            )
        })
        .collect();
    let expect = [
        "comm=cartd",
        "comm=shopd",
        "comm=worker",
        "container=cart",
        "container=shop",
        "node=n1",
        "pid=41",
        "pid=42",
    ];
    assert_eq!(labels, expect.map(str::to_owned).into());

    let lines = profile.location.iter().map(|location| &location.line).find(|lines| lines.len() == 2);
    let names: Vec<String> = lines
        .expect("the inlined call shares a location")
        .iter()
        .map(|line| text(profile.function(line.function_id).expect("in the table").name))
        .collect();
    assert_eq!(names, ["inner", "outer"]);
}

#[test]
#[ignore = "needs go"]
fn go_tool_pprof_reads_the_download() {
    let (directory, backend) = backend();
    two_containers(&backend);
    let path = directory.path().join("cart.pb.gz");
    std::fs::write(&path, backend.get(r#"/api/v1/merge?format=pprof&query={container="cart"}"#).body)
        .expect("write");
    let pprof = |arguments: &[&str]| {
        let output =
            Command::new("go").args(["tool", "pprof"]).args(arguments).arg(&path).output().expect("run go");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let top = pprof(&["-top"]);
    assert!(top.contains("Duration: 20s, Total samples = 300ms ( 1.50%)"), "{top}");
    let hot = top.lines().find(|line| line.ends_with(" hot")).unwrap_or_else(|| panic!("no hot in\n{top}"));
    assert_eq!(hot.split_whitespace().take(2).collect::<Vec<_>>(), ["280ms", "93.33%"], "{top}");
    let tags = pprof(&["-tags"]);
    for tag in ["container", "comm", "worker", "cartd", "pid"] {
        assert!(tags.contains(tag), "{tag} in\n{tags}");
    }
    assert!(pprof(&["-raw"]).contains("samples/count cpu/nanoseconds[dflt]"));
}

#[test]
fn an_empty_store_answers_every_question() {
    let (_directory, backend) = backend();
    assert_eq!(backend.json("/api/v1/types"), json!({"types": []}));
    assert_eq!(backend.json("/api/v1/labels"), json!({"labels": []}));
    assert_eq!(tree(&backend.json("/api/v1/merge")), ["0 total 0 0"]);
    assert_eq!(backend.json("/api/v1/series")["series"][0]["labels"], json!({}));
    let profile = backend.get("/api/v1/merge?format=pprof").body;
    check(&decode(&profile, &DecodeLimits::default()).expect("a profile")).expect("a valid profile");
}

#[test]
fn every_bad_parameter_is_named_in_the_error() {
    let (_directory, backend) = backend();
    two_containers(&backend);
    for (path, parameter) in [
        ("merge?from=yesterday", "from"),
        ("merge?to=2026-13-01T00:00:00Z", "to"),
        ("merge?from=now&to=now-1h", "from"),
        ("merge?query={container=}", "query"),
        ("merge?query={a=~\"(\"}", "query"),
        ("merge?sample_type=watts", "sample_type"),
        ("merge?format=svg", "format"),
        ("merge?max_nodes=many", "max_nodes"),
        ("series?step=0s", "step"),
        ("series?step=10", "step"),
        ("series?step=1ms", "step"),
        ("series?query=}", "query"),
        ("types?from=x", "from"),
        ("labels?query=,", "query"),
        ("labels/comm/values?limit=-1", "limit"),
    ] {
        let error = backend.error(&format!("/api/v1/{path}"));
        assert!(error.starts_with(&format!("parameter {parameter}: ")), "{path}: {error}");
        assert!(!error.contains('\n'), "{path}: {error}");
    }
}

#[test]
fn a_batch_is_stored_once() {
    let (_directory, backend) = backend();
    let push = request(vec![cpu(CART, 1000, &[Line("main", 3, &[])])]);
    assert_eq!(backend.push(&push).text(), r#"{"stored":1}"#);
    let again = backend.push(&push);
    assert_eq!((again.status, again.json()), (200, json!({"stored": 0, "duplicate": true})));
    assert_eq!(backend.json("/api/v1/merge?sample_type=samples")["total"], 3);
    assert_eq!(backend.metric("pushes_duplicate_total"), 1);
}

#[test]
fn one_bad_series_refuses_the_whole_push_and_is_named() {
    let (_directory, backend) = backend();
    let mut push =
        request(vec![cpu(CART, 1000, &[Line("main", 3, &[])]), cpu(SHOP, 1000, &[Line("main", 4, &[])])]);
    push.series[1].pprof.truncate(20);
    let response = backend.push(&push);
    assert_eq!(response.status, 400, "{}", response.text());
    assert!(
        response.text().starts_with("series 1 {container=\"shop\",node=\"n1\"}: pprof: "),
        "{}",
        response.text()
    );
    assert_eq!(response.text().lines().count(), 1);
    assert_eq!(backend.json("/api/v1/merge")["total"], 0);

    push.series[1] = cpu(SHOP, 1000, &[Line("main", 4, &[])]);
    assert_eq!(backend.push(&push).text(), r#"{"stored":2}"#, "the refused batch id is still free");
}

#[test]
fn a_push_that_can_never_be_stored_says_why() {
    let (_directory, backend) = backend();
    let good = || cpu(CART, 1000, &[Line("main", 3, &[])]);
    let refused = |change: fn(&mut PushRequest), message: &str| {
        let mut push = request(vec![good()]);
        change(&mut push);
        let response = backend.push(&push);
        assert_eq!(response.status, 400, "{}", response.text());
        assert!(response.text().contains(message), "{:?} in {}", message, response.text());
    };
    refused(|push| push.format_version = 2, "format_version is 2");
    refused(|push| push.batch_id.clear(), "batch_id has 0 bytes");
    refused(|push| push.series[0].labels[0].name = "a-b".to_owned(), "a-b");
    refused(|push| push.series[0].temporality = 0, "temporality is 0");
    refused(|push| push.series[0].start_unix_ns = 1, "older than");
    refused(|push| push.series[0].start_unix_ns += 7_200_000_000_000, "ahead");

    let body = request(vec![good()]).to_bytes();
    let push =
        |headers: &[(&str, &str)], body: &[u8]| send(backend.address, "POST", "/api/v1/push", headers, body);
    let protobuf = ("Content-Type", "application/x-protobuf");
    assert_eq!(push(&[("Content-Type", "application/json")], &body).status, 415);
    assert_eq!(push(&[protobuf, ("Content-Encoding", "br")], &body).status, 415);
    assert_eq!(push(&[protobuf, ("Content-Encoding", "gzip")], &body).status, 400);
    assert_eq!(push(&[protobuf, ("Content-Encoding", "zstd")], &body).status, 400);
    assert_eq!(push(&[protobuf], b"\xff\xff").status, 400);
    assert_eq!(push(&[protobuf], &body).status, 200);
}

#[test]
fn gzip_and_zstd_bodies_are_read() {
    let (_directory, backend) = backend();
    let headers = |encoding| [("Content-Type", "application/x-protobuf"), ("Content-Encoding", encoding)];
    let body = || request(vec![cpu(CART, 1000, &[Line("main", 3, &[])])]).to_bytes();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&body()).expect("compress");
    let gzip = gzip.finish().expect("compress");
    let zstd = zstd::encode_all(&*body(), 1).expect("compress");
    for (encoding, body) in [("gzip", gzip), ("zstd", zstd), ("identity", body())] {
        let response = send(backend.address, "POST", "/api/v1/push", &headers(encoding), &body);
        assert_eq!((response.status, response.text()), (200, r#"{"stored":1}"#.to_owned()), "{encoding}");
    }
    assert_eq!(backend.json("/api/v1/merge?sample_type=samples")["total"], 9);
}

#[test]
fn a_body_beyond_the_bounds_is_refused_before_it_is_held() {
    let directory = tempfile::tempdir().expect("tempdir");
    let options =
        Options { push_bytes_max: 1000, push_inflated_bytes_max: 10_000, ..Options::new(directory.path()) };
    let backend = Backend::start_with(options);
    let headers = [("Content-Type", "application/x-protobuf"), ("Content-Encoding", "zstd")];
    let push = |body: &[u8]| send(backend.address, "POST", "/api/v1/push", &headers, body);
    assert_eq!(push(&[0; 2000]).status, 413);
    let bomb = zstd::encode_all(&*vec![0; 1 << 20], 1).expect("compress");
    assert!(bomb.len() < 1000);
    let response = push(&bomb);
    assert_eq!(response.status, 413, "{}", response.text());
}

#[test]
fn a_foreign_host_is_refused_and_a_configured_one_is_not() {
    let directory = tempfile::tempdir().expect("tempdir");
    let options =
        Options { allowed_hosts: vec!["profiles.example".to_owned()], ..Options::new(directory.path()) };
    let backend = Backend::start_with(options);
    let status = |host: &str| send(backend.address, "GET", "/api/v1/types", &[("Host", host)], &[]).status;
    assert_eq!(status("evil.example"), 403);
    assert_eq!(status("localhost:7700"), 200);
    assert_eq!(status("profiles.example"), 200);
    assert_eq!(backend.metric("hosts_refused_total"), 1);
}

/// A profile whose frames are (binary, function), leaf first; a frame of no binary is a marker.
fn cut_stacks(stacks: &[(&[(&str, &str)], i64)]) -> Series {
    let types = [TypeSpec::new("samples", "count"), TypeSpec::new("cpu", "nanoseconds")];
    let mut builder = ProfileBuilder::new(&types, types[1], PERIOD_NS);
    for (number, (stack, count)) in stacks.iter().enumerate() {
        let locations: Vec<_> = stack
            .iter()
            .map(|(binary, name)| {
                let mapping = (!binary.is_empty()).then(|| {
                    let filename = &format!("/usr/lib/{binary}");
                    builder.mapping(&MappingSpec {
                        start: 0,
                        limit: 1 << 20,
                        offset: 0,
                        filename,
                        build_id: "",
                    })
                });
                let kind = if mapping.is_some() { FrameKind::Native } else { FrameKind::Marker };
                let function = FunctionSpec { name, system_name: name, filename: "", start_line: 0 };
                let lines = &[LineSpec { function, line: 0, column: 0 }];
                let address = 0x1000 + number as u64;
                builder.location(&LocationSpec { mapping, address, kind, is_folded: false, lines })
            })
            .collect();
        builder.sample(&locations, &[*count, count * PERIOD_NS], [].as_slice());
    }
    Series { pprof: encode(&builder.finish()), ..cpu(CART, 1000, &[]) }
}

#[test]
fn binaries_say_what_cuts_their_stacks_and_what_has_no_name() {
    let (_directory, backend) = backend();
    let whole: &[_] = &[("libx.so", "hot"), ("app", "main")];
    let cut: &[_] =
        &[("app", "work"), ("libx.so", "libx.so+0x1001"), ("", "[truncated: no unwind information]")];
    let deep: &[_] = &[("libx.so", "hot"), ("", "[truncated: too deep]")];
    backend.store(cut_stacks(&[(whole, 5), (cut, 3), (deep, 2)]));
    let answer = backend.json("/api/v1/binaries?type=cpu&sample_type=samples");
    let of = |index: usize| answer["binaries"][index].clone();
    assert_eq!(of(0)["binary"], "libx.so");
    assert_eq!((of(0)["total"].clone(), of(0)["truncated"].clone()), (json!(10), json!(5)));
    assert_eq!(
        (of(0)["truncated_percent"].clone(), of(0)["unknown_percent"].clone()),
        (json!(50.0), json!(30.0))
    );
    assert_eq!(of(0)["reason"], "no unwind information", "the most frequent one");
    assert!(of(0)["hint"].as_str().is_some_and(|hint| hint.contains(".eh_frame")), "{answer}");
    assert_eq!((of(1)["binary"].clone(), of(1)["total"].clone()), (json!("app"), json!(8)));
    assert_eq!((of(1)["truncated"].clone(), of(1)["reason"].clone()), (json!(0), Value::Null));
    assert_eq!((answer["left_out"].clone(), answer["unit"].clone()), (json!(0), json!("count")));
    let none = backend.json(r#"/api/v1/binaries?type=cpu&query={container="none"}"#);
    assert_eq!(none["binaries"], json!([]));
}

const TOKEN: &str = "0123456789abcdef";

fn token_file(directory: &Path) -> PathBuf {
    let file = directory.join("token");
    let mut options = std::fs::OpenOptions::new();
    let opened = options.write(true).create(true).truncate(true).mode(0o600).open(&file);
    opened.expect("create the token").write_all(TOKEN.as_bytes()).expect("write the token");
    file
}

#[test]
fn with_a_token_nothing_but_health_is_answered_without_it() {
    let directory = tempfile::tempdir().expect("tempdir");
    let token = Token::read(&token_file(directory.path())).expect("a token");
    let options = Options { token: Some(token), ..Options::new(directory.path().join("store")) };
    let backend = Backend::start_with(options);
    let bearer = format!("Bearer {TOKEN}");
    // any:0123456789abcdef
    let basic = "Basic YW55OjAxMjM0NTY3ODlhYmNkZWY=";
    let paths = [
        "/",
        "/app.js",
        "/metrics",
        "/api/v1/types",
        "/api/v1/labels",
        "/api/v1/merge",
        "/api/v1/binaries",
        "/api/v1/series",
    ];
    for path in paths {
        let get = |headers: &[(&str, &str)]| send(backend.address, "GET", path, headers, &[]);
        let refused = get(&[]);
        assert_eq!(refused.status, 401, "{path}");
        assert!(refused.header("www-authenticate").starts_with("Basic realm="), "{path}");
        assert!(!refused.text().contains(TOKEN));
        for wrong in ["Bearer 0123456789abcdeF", "Bearer", "Basic YW55Og==", ""] {
            assert_eq!(get(&[("Authorization", wrong)]).status, 401, "{path} {wrong:?}");
        }
        for right in [bearer.as_str(), basic] {
            assert_eq!(get(&[("Authorization", right)]).status, 200, "{path} {right:?}");
        }
        let foreign = [("Host", "evil.example"), ("Authorization", bearer.as_str())];
        assert_eq!(get(&foreign).status, 403, "{path}");
    }
    for path in ["/healthz", "/readyz"] {
        assert_eq!(backend.get(path).status, 200, "{path}");
    }
    let body = request(vec![cpu(CART, 1000, &[Line("main", 1, &[])])]).to_bytes();
    let push = |authorization: &str| {
        let headers = [("Content-Type", "application/x-protobuf"), ("Authorization", authorization)];
        send(backend.address, "POST", "/api/v1/push", &headers, &body).status
    };
    assert_eq!((push(""), push(&bearer)), (401, 200));
}

#[test]
fn an_address_of_a_network_without_a_token_opens_nothing() {
    let directory = tempfile::tempdir().expect("tempdir");
    let store = directory.path().join("store");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    for listen in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
        let listen = listen.parse().expect("an address");
        let bound = runtime.block_on(Server::bind(Options { listen, ..Options::new(&store) }));
        assert!(matches!(bound, Err(ServeError::Unprotected { .. })), "{listen}");
        assert!(!store.exists(), "{listen}");
    }
}

#[test]
fn the_program_refuses_an_open_address_in_one_line() {
    let directory = tempfile::tempdir().expect("tempdir");
    let store = directory.path().join("store");
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_profiler-backend"));
        let output = command.arg("--data-dir").arg(&store).args(arguments).output().expect("it starts");
        let message = String::from_utf8(output.stderr).expect("text");
        assert_eq!((output.status.code(), message.lines().count()), (Some(2), 1), "{message}");
        message
    };
    let message = run(&["--listen", "0.0.0.0:0"]);
    assert!(message.contains("0.0.0.0:0") && message.contains("token"), "{message}");
    let file = token_file(directory.path());
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).expect("set the mode");
    let message = run(&["--listen", "0.0.0.0:0", "--token-file", file.to_str().expect("plain")]);
    assert!(message.contains("token-file") && message.contains("mode is 644"), "{message}");
    assert!(!message.contains(TOKEN) && !store.exists(), "{message}");
}

#[test]
fn the_page_is_served_with_a_policy_and_an_etag() {
    let (_directory, backend) = backend();
    let page = backend.get("/");
    assert_eq!(page.status, 200);
    assert_eq!(page.header("content-type"), "text/html; charset=utf-8");
    assert!(page.header("content-security-policy").starts_with("default-src 'self';"));
    assert_eq!(
        (page.header("x-content-type-options"), page.header("cache-control")),
        ("nosniff", "no-cache")
    );
    let again = send(backend.address, "GET", "/", &[("If-None-Match", page.header("etag"))], &[]);
    assert_eq!((again.status, again.body.len()), (304, 0));
    for path in ["/app.js", "/app.css", "/healthz", "/readyz", "/metrics"] {
        assert_eq!(backend.get(path).status, 200, "{path}");
    }
    let missing = get(backend.address, "/api/v1/nothing");
    assert_eq!((missing.status, missing.json()), (404, json!({"error": "no such path: /api/v1/nothing"})));
}

#[test]
fn large_answers_are_compressed_for_those_who_accept_it() {
    let (_directory, backend) = backend();
    let stacks: Vec<String> = (0..100).map(|number| format!("main;function_{number}")).collect();
    let lines: Vec<Line<'_>> = stacks.iter().map(|stack| Line(stack, 1, &[])).collect();
    backend.store(cpu(CART, 1000, &lines));
    let headers = [("Accept-Encoding", "gzip")];
    let path = format!("/api/v1/merge?to={}", super::common::now_ms());
    let compressed = send(backend.address, "GET", &path, &headers, &[]);
    assert_eq!(compressed.header("content-encoding"), "gzip");
    let mut inflated = Vec::new();
    std::io::copy(&mut flate2::read::GzDecoder::new(&*compressed.body), &mut inflated).expect("inflate");
    let plain: Value = serde_json::from_slice(&inflated).expect("JSON");
    assert_eq!(plain["rows"], backend.json(&path)["rows"]);
}
