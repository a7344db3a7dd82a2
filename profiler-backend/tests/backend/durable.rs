//! What was acknowledged stays, is counted once, and goes when its time is over.

use std::{
    fs,
    io::{BufRead, BufReader},
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use profiler_backend::Options;
use profiler_pprof::push::PushRequest;
use serde_json::Value;

use super::common::{Backend, Line, cpu, get, heap, push_to, request, send, tree, wait_until};

const CART: &[(&str, &str)] = &[("container", "cart"), ("node", "n1"), ("team", "a")];
const SHOP: &[(&str, &str)] = &[("container", "shop"), ("node", "n1")];
const MINUTE_MS: i64 = 60_000;

/// Writes parts as soon as it can.
fn quick(data_dir: &Path) -> Options {
    Options { flush_interval: Duration::from_millis(50), ..Options::new(data_dir) }
}

fn samples(address: SocketAddr, range: &str) -> i64 {
    let response = get(address, &format!("/api/v1/merge?sample_type=samples&{range}"));
    assert_eq!(response.status, 200, "{}", response.text());
    response.json()["total"].as_i64().expect("a number")
}

/// All files below a directory, relative to it, sorted.
fn files(directory: &Path) -> Vec<PathBuf> {
    fn walk(root: &Path, directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).expect("list") {
            let path = entry.expect("list").path();
            match path.is_dir() {
                true => walk(root, &path, found),
                false => found.push(path.strip_prefix(root).expect("below").to_owned()),
            }
        }
    }
    let mut found = Vec::new();
    if directory.exists() {
        walk(directory, directory, &mut found);
    }
    found.sort();
    found
}

fn copy(from: &Path, to: &Path) {
    for file in files(from) {
        let target = to.join(&file);
        fs::create_dir_all(target.parent().expect("a file has a parent")).expect("create");
        fs::copy(from.join(&file), target).expect("copy");
    }
}

/// What a store says about everything, but for numbers that depend on the moment.
fn answers(backend: &Backend, from_ms: i64, to_ms: i64) -> Vec<Value> {
    let paths = [
        "types?x=1",
        "labels?x=1",
        "labels/comm/values?x=1",
        "labels/pid/values?x=1",
        "labels/route/values?x=1",
        "labels/team/values?x=1",
        "merge?type=heap",
        "merge?type=cpu&group_by=comm",
        "merge?sample_type=samples",
        r#"merge?query={container="cart",comm=~"w.*"}"#,
        r#"merge?query={team="a"}"#,
        r#"merge?query={route="/pay"}"#,
        r#"merge?query={pid!="",pid!="41"}"#,
        "series?step=1m&group_by=container",
        "series?step=1m&type=heap",
        "series?step=1m&group_by=route",
    ];
    paths.iter().map(|path| backend.json(&format!("/api/v1/{path}&from={from_ms}&to={to_ms}"))).collect()
}

fn fill(backend: &Backend) {
    let worker: &[(&str, &str)] = &[("comm", "worker"), ("pid", "42"), ("route", "/pay")];
    backend.store(cpu(
        CART,
        3 * MINUTE_MS,
        &[Line("main;work<inlined;hot", 8, &[("comm", "cartd"), ("pid", "41")]), Line("main;", 2, worker)],
    ));
    backend.store(cpu(CART, 2 * MINUTE_MS, &[Line("main;work<inlined;hot", 20, worker)]));
    backend.store(cpu(SHOP, 2 * MINUTE_MS, &[Line("main;sell", 5, &[("thread_name", "t1")])]));
    backend.store(cpu(SHOP, MINUTE_MS, &[]));
    backend.store(heap(CART, 2 * MINUTE_MS, &[Line("main;alloc", 700, worker)]));
    backend.store(heap(CART, MINUTE_MS, &[Line("main;alloc", 500, worker)]));
}

#[test]
fn memory_parts_and_a_restart_give_the_same_answers() {
    let directory = tempfile::tempdir().expect("tempdir");
    let backend = Backend::start(directory.path());
    fill(&backend);
    let (from_ms, to_ms) = (super::common::now_ms() - 10 * MINUTE_MS, super::common::now_ms() + MINUTE_MS);
    let from_memory = answers(&backend, from_ms, to_ms);
    assert_eq!(backend.metric("parts"), 0);
    backend.stop();
    assert_eq!(files(&directory.path().join("wal")).len(), 0, "all rows are in parts");

    let backend = Backend::start(directory.path());
    assert!(backend.metric("parts") > 0);
    assert_eq!(backend.metric("memory_profiles"), 0);
    for (memory, parts) in from_memory.iter().zip(answers(&backend, from_ms, to_ms)) {
        assert_eq!(memory, &parts);
    }
}

#[test]
fn profiles_from_memory_and_from_parts_are_merged() {
    let directory = tempfile::tempdir().expect("tempdir");
    let backend = Backend::start(directory.path());
    backend.store(cpu(CART, MINUTE_MS, &[Line("main;work", 1, &[])]));
    backend.stop();
    let backend = Backend::start(directory.path());
    backend.store(cpu(CART, MINUTE_MS / 2, &[Line("main;work", 2, &[])]));
    let merged = backend.json("/api/v1/merge?sample_type=samples");
    assert_eq!(tree(&merged), ["0 total 3 0", "1 main 3 0", "2 work 3 3"]);
}

#[test]
fn a_batch_is_known_after_a_restart() {
    let directory = tempfile::tempdir().expect("tempdir");
    let push = request(vec![cpu(CART, 1000, &[Line("main", 3, &[])])]);
    let backend = Backend::start(directory.path());
    assert_eq!(backend.push(&push).text(), r#"{"stored":1}"#);
    backend.stop();
    let backend = Backend::start(directory.path());
    assert_eq!(backend.push(&push).text(), r#"{"stored":0,"duplicate":true}"#);
    assert_eq!(samples(backend.address, ""), 3);
}

#[test]
fn one_backend_uses_a_directory_at_a_time() {
    let directory = tempfile::tempdir().expect("tempdir");
    let _backend = Backend::start(directory.path());
    let second = program(directory.path()).stderr(Stdio::piped()).output().expect("run");
    assert_eq!(second.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&second.stderr);
    assert!(stderr.contains("in use by another backend"), "{stderr}");
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("stat").permissions().mode() & 0o777
}

/// Of a directory and everything in it.
fn modes(path: &Path) -> Vec<(PathBuf, u32)> {
    let mut found = vec![(path.to_owned(), mode(path))];
    if path.is_dir() {
        let entries = path.read_dir().expect("list");
        found.extend(entries.flat_map(|entry| modes(&entry.expect("an entry").path())));
    }
    found
}

#[test]
fn only_the_owner_can_look_into_the_store() {
    let directory = tempfile::tempdir().expect("tempdir");
    let data_dir = directory.path().join("a/b");
    let backend = Backend::start(&data_dir);
    fill(&backend);
    backend.stop();
    let modes = modes(&directory.path().join("a"));
    assert!(
        modes.iter().any(|(path, _)| path.extension().is_some_and(|name| name == "parquet")),
        "{modes:?}"
    );
    for (path, mode) in modes {
        assert_eq!(mode, if path.is_dir() { 0o700 } else { 0o600 }, "{path:?}");
    }
}

#[test]
fn an_existing_directory_is_closed_to_others() {
    let directory = tempfile::tempdir().expect("tempdir");
    let open = || fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
    for what in ["empty", "a store already"] {
        open();
        Backend::start(directory.path()).stop();
        assert_eq!(mode(directory.path()), 0o700, "{what}");
    }
}

#[test]
fn a_directory_that_others_use_is_refused_and_stays_as_it_is() {
    let directory = tempfile::tempdir().expect("tempdir");
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
    fs::write(directory.path().join("letter"), "to all").expect("write");
    let refused = program(directory.path()).stderr(Stdio::piped()).output().expect("run");
    assert_eq!(refused.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert!(stderr.contains("is open to others (mode 0755) and holds other files"), "{stderr}");
    assert_eq!(mode(directory.path()), 0o755);
}

#[test]
fn rows_in_parts_and_still_in_the_log_are_counted_once() {
    let directory = tempfile::tempdir().expect("tempdir");
    let (wal, kept) = (directory.path().join("wal"), directory.path().join("kept"));
    let backend = Backend::start(directory.path());
    // One push over two hours: its rows go to two parts.
    let push = request(vec![
        cpu(CART, 2 * 60 * MINUTE_MS, &[Line("main", 3, &[])]),
        cpu(CART, MINUTE_MS, &[Line("main", 4, &[])]),
    ]);
    assert_eq!(backend.push(&push).text(), r#"{"stored":2}"#);
    copy(&wal, &kept);
    backend.stop();
    // As after a crash between the last part and the deletion of the log.
    copy(&kept, &wal);
    let backend = Backend::start(directory.path());
    assert_eq!(samples(backend.address, "from=now-4h"), 7);
    backend.stop();
    // As after a crash between the two parts.
    copy(&kept, &wal);
    let parts = directory.path().join("v1/profiles");
    fs::remove_file(parts.join(&files(&parts)[0])).expect("remove");
    let backend = Backend::start(directory.path());
    assert_eq!(samples(backend.address, "from=now-4h"), 7);
    backend.stop();
    let backend = Backend::start(directory.path());
    assert_eq!(samples(backend.address, "from=now-4h"), 7);
}

#[test]
fn a_torn_log_gives_what_was_whole() {
    let directory = tempfile::tempdir().expect("tempdir");
    let mut process = Process::start(directory.path());
    for _ in 0..2 {
        let push = request(vec![cpu(CART, 1000, &[Line("main", 3, &[])])]);
        assert_eq!(push_to(process.address, &push).status, 200);
    }
    process.kill();
    let wal = directory.path().join("wal");
    let segment = wal.join(&files(&wal)[0]);
    let bytes = fs::read(&segment).expect("read");
    fs::write(&segment, &bytes[..bytes.len() - 1]).expect("write");
    let backend = Backend::start(directory.path());
    assert_eq!(samples(backend.address, ""), 3);
    assert_eq!(backend.metric("wal_records_replayed_total"), 1);
    assert!(backend.metric("wal_torn_bytes_total") > 0);
}

#[test]
fn closed_hours_become_one_part_and_answers_stay() {
    let directory = tempfile::tempdir().expect("tempdir");
    let backend = Backend::start_with(quick(directory.path()));
    // In the middle of an hour that ended more than an hour ago.
    let hour_ms = 60 * MINUTE_MS;
    let age_ms = super::common::now_ms().rem_euclid(hour_ms) + hour_ms + hour_ms / 2;
    for count in 1..=3 {
        let written = backend.metric("parts_written_total");
        let stack = format!("main;work_{count}");
        backend.store(cpu(CART, age_ms, &[Line("main", 10, &[("comm", "c")]), Line(&stack, count, &[])]));
        wait_until("a part is written", || backend.metric("parts_written_total") > written);
    }
    let parts = directory.path().join("v1/profiles");
    wait_until("the parts became one", || files(&parts).len() == 1 && backend.metric("parts") == 1);
    let total = || backend.json("/api/v1/merge?sample_type=samples&from=now-6h");
    let expect = ["0 total 36 0", "1 main 36 30", "2 work_3 3 3", "2 work_2 2 2", "2 work_1 1 1"];
    assert_eq!(tree(&total()), expect);
    let kept = directory.path().join("kept");
    copy(&directory.path().join("v1"), &kept);
    backend.stop();
    for table in ["frames", "stacks", "samples", "profiles"] {
        assert_eq!(files(&directory.path().join("v1").join(table)).len(), 1, "{table}");
    }
    let backend = Backend::start(directory.path());
    assert_eq!(tree(&backend.json("/api/v1/merge?sample_type=samples&from=now-6h")), expect);
}

#[test]
fn what_an_unfinished_compaction_left_is_not_counted_twice() {
    let directory = tempfile::tempdir().expect("tempdir");
    let (v1, kept) = (directory.path().join("v1"), directory.path().join("kept"));
    let hour_ms = 60 * MINUTE_MS;
    let age_ms = super::common::now_ms().rem_euclid(hour_ms) + hour_ms + hour_ms / 2;
    for count in [1, 2] {
        // Stopping writes a part, and does not compact.
        let backend = Backend::start(directory.path());
        backend.store(cpu(CART, age_ms, &[Line("main", count, &[])]));
        backend.stop();
    }
    copy(&v1, &kept);
    let backend = Backend::start_with(quick(directory.path()));
    wait_until("the parts became one", || backend.metric("parts_compacted_total") == 2);
    backend.stop();
    assert_eq!(files(&v1.join("profiles")).len(), 1);
    // As after a crash between the new part and the deletion of the old ones.
    copy(&kept, &v1);
    fs::write(v1.join(files(&v1)[0].with_file_name(".part-x.parquet.tmp")), b"half").expect("write");
    let backend = Backend::start(directory.path());
    assert_eq!(samples(backend.address, "from=now-6h"), 3);
    assert_eq!(files(&v1).len(), 4, "one part in four tables: {:?}", files(&v1));
}

#[test]
fn hours_past_retention_are_deleted() {
    let directory = tempfile::tempdir().expect("tempdir");
    let backend = Backend::start(directory.path());
    backend.store(cpu(CART, 3 * 60 * MINUTE_MS, &[Line("main", 3, &[])]));
    backend.store(cpu(CART, MINUTE_MS, &[Line("main", 4, &[])]));
    backend.stop();
    assert_eq!(files(&directory.path().join("v1")).len(), 8);
    let hour = Duration::from_secs(60 * 60);
    let backend = Backend::start_with(Options { retention: hour, ..quick(directory.path()) });
    wait_until("the old hour is gone", || backend.metric("parts_expired_total") == 1);
    assert_eq!(samples(backend.address, "from=now-6h"), 4);
    wait_until("its files are gone", || files(&directory.path().join("v1")).len() == 4);
    let days: usize = fs::read_dir(directory.path().join("v1/samples"))
        .expect("list")
        .map(|date| fs::read_dir(date.expect("list").path()).expect("list").count())
        .sum();
    assert_eq!(days, 1, "empty hours leave no directory");
}

#[test]
fn a_part_that_cannot_be_read_is_left_alone_and_counted() {
    let directory = tempfile::tempdir().expect("tempdir");
    let backend = Backend::start(directory.path());
    backend.store(cpu(CART, MINUTE_MS, &[Line("main", 4, &[])]));
    backend.stop();
    let profiles = directory.path().join("v1/profiles");
    let part = profiles.join(&files(&profiles)[0]);
    let bytes = fs::read(&part).expect("read");
    fs::write(&part, &bytes[..bytes.len() / 2]).expect("write");
    let backend = Backend::start(directory.path());
    assert_eq!(backend.metric("parts_unreadable_total"), 1);
    assert_eq!(samples(backend.address, ""), 0);
    assert_eq!(files(&directory.path().join("v1")).len(), 4);
}

#[test]
fn a_damaged_part_is_left_out_and_the_answer_says_so() {
    let directory = tempfile::tempdir().expect("tempdir");
    let backend = Backend::start(directory.path());
    backend.store(cpu(CART, MINUTE_MS, &[Line("main;damaged", 4, &[])]));
    backend.stop();
    let table = directory.path().join("v1/samples");
    fs::write(table.join(&files(&table)[0]), b"PAR1 not").expect("write");
    let backend = Backend::start(directory.path());
    backend.store(cpu(CART, MINUTE_MS, &[Line("main;whole", 3, &[])]));
    let merged = backend.json("/api/v1/merge?sample_type=samples");
    assert_eq!(tree(&merged), ["0 total 3 0", "1 main 3 0", "2 whole 3 3"]);
    assert_eq!(merged["comments"][1], "incomplete: 1 stored parts cannot be read");
    assert_eq!(backend.metric("parts_unreadable_total"), 1);
}

#[test]
fn what_is_acknowledged_is_seen_at_once_and_stays_while_parts_are_written() {
    let directory = tempfile::tempdir().expect("tempdir");
    let backend =
        Backend::start_with(Options { flush_interval: Duration::from_millis(1), ..quick(directory.path()) });
    let (address, acknowledged) = (backend.address, AtomicI64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let push = request(vec![cpu(CART, 1000, &[Line("main;work", 1, &[])])]);
                    assert_eq!(push_to(address, &push).status, 200);
                    let before = acknowledged.fetch_add(1, Ordering::SeqCst) + 1;
                    let seen = samples(address, "");
                    assert!((before..=200).contains(&seen), "{seen} seen, {before} acknowledged");
                }
            });
        }
    });
    assert_eq!(samples(address, ""), 200);
    assert!(backend.metric("parts_written_total") > 1);
}

#[test]
#[ignore = "needs root: mounts a small file system"]
fn a_full_disk_defers_pushes_and_leaves_queries_alone() {
    let directory = tempfile::tempdir().expect("tempdir");
    let mount = Mount::small(directory.path());
    let backend = Backend::start_with(quick(directory.path()));
    let stacks: Vec<String> = (0..400).map(|number| format!("main;{}", random_name(number))).collect();
    let lines: Vec<Line<'_>> = stacks.iter().map(|stack| Line(stack, 1, &[])).collect();
    let mut stored = 0;
    let deferred = loop {
        let response = backend.push(&request(vec![cpu(CART, 1000, &lines)]));
        match response.status {
            200 => stored += 400,
            _ => break response,
        }
        assert!(stored < 400_000, "the disk never fills");
    };
    assert_eq!(deferred.status, 503, "{}", deferred.text());
    assert_ne!(deferred.header("retry-after"), "");
    assert!(backend.metric("pushes_unwritable_total") > 0);
    assert_eq!(samples(backend.address, ""), stored);
    mount.grow();
    assert_eq!(backend.push(&request(vec![cpu(CART, 1000, &lines)])).status, 200);
    backend.stop();
    let backend = Backend::start(directory.path());
    assert_eq!(samples(backend.address, ""), stored + 400);
    backend.stop();
}

/// A name that does not compress.
fn random_name(number: u64) -> String {
    (0..8)
        .map(|part| (number * 8 + part + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
        .map(|n| format!("{n:x}"))
        .collect()
}

/// A file system of its own, unmounted at the end.
struct Mount(PathBuf);

impl Mount {
    fn small(at: &Path) -> Self {
        run("mount", &["-t", "tmpfs", "-o", "size=1m", "tmpfs"], at);
        Self(at.to_owned())
    }

    fn grow(&self) {
        run("mount", &["-o", "remount,size=64m"], &self.0);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        run("umount", &["--lazy"], &self.0);
    }
}

fn run(program: &str, arguments: &[&str], path: &Path) {
    let status = Command::new(program).args(arguments).arg(path).status().expect("run");
    assert!(status.success(), "{program} {arguments:?} {}", path.display());
}

#[test]
fn an_acknowledged_push_survives_kill_9() {
    let directory = tempfile::tempdir().expect("tempdir");
    let mut acknowledged = 0;
    // Killed several times, also over what earlier deaths left.
    for _ in 0..3 {
        let mut process = Process::start(directory.path());
        assert_eq!(samples(process.address, ""), acknowledged);
        acknowledged += push_until_killed(&mut process);
    }
    let process = Process::start(directory.path());
    assert_eq!(samples(process.address, ""), acknowledged);
}

/// Pushes from several threads, kills the process in the midst of it, retries elsewhere what was not answered; gives
/// the samples that were acknowledged.
fn push_until_killed(process: &mut Process) -> i64 {
    let (address, killed) = (process.address, Arc::new(AtomicBool::new(false)));
    let acknowledged = Arc::new(AtomicI64::new(0));
    let senders: Vec<_> = (0..4)
        .map(|_| {
            let (killed, acknowledged) = (Arc::clone(&killed), Arc::clone(&acknowledged));
            std::thread::spawn(move || push_until(address, &killed, &acknowledged))
        })
        .collect();
    wait_until("some pushes are acknowledged", || acknowledged.load(Ordering::Relaxed) > 40);
    process.kill();
    killed.store(true, Ordering::Relaxed);
    let unanswered: Vec<PushRequest> =
        senders.into_iter().filter_map(|sender| sender.join().expect("a sender does not panic")).collect();
    // What was underway may be stored or not: the retry makes it exactly once.
    let mut again = Process::start(&process.data_dir);
    for push in unanswered {
        assert_eq!(push_to(again.address, &push).status, 200);
        acknowledged.fetch_add(1, Ordering::Relaxed);
    }
    again.kill();
    acknowledged.load(Ordering::Relaxed)
}

/// Gives the push that got no answer, if there is one.
fn push_until(address: SocketAddr, killed: &AtomicBool, acknowledged: &AtomicI64) -> Option<PushRequest> {
    while !killed.load(Ordering::Relaxed) {
        let push = request(vec![cpu(CART, 1000, &[Line("main;work", 1, &[])])]);
        let headers = [("Content-Type", "application/x-protobuf")];
        let body = push.to_bytes();
        let answer = std::panic::catch_unwind(|| send(address, "POST", "/api/v1/push", &headers, &body));
        match answer {
            Ok(answer) if answer.status == 200 => drop(acknowledged.fetch_add(1, Ordering::Relaxed)),
            _ => return Some(push),
        }
    }
    None
}

/// The program itself, killed at the end.
struct Process {
    child: Child,
    address: SocketAddr,
    data_dir: PathBuf,
}

fn program(data_dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_profiler-backend"));
    command.args(["--listen", "127.0.0.1:0", "--data-dir"]).arg(data_dir).stdin(Stdio::null());
    command
}

impl Process {
    fn start(data_dir: &Path) -> Self {
        let mut child = program(data_dir).stderr(Stdio::piped()).spawn().expect("start the program");
        let stderr = child.stderr.take().expect("piped");
        let mut lines = BufReader::new(stderr).lines();
        let mut seen = Vec::new();
        let address = loop {
            let line = lines.next().unwrap_or_else(|| panic!("it ended: {seen:#?}")).expect("read stderr");
            if let Some((_, rest)) = line.split_once("http://") {
                break rest.split('/').next().and_then(|address| address.parse().ok());
            }
            seen.push(line);
        };
        // Read on, or the program would block on a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        let address = address.expect("the log names the address");
        Self { child, address, data_dir: data_dir.to_owned() }
    }

    fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails when it was killed before.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
